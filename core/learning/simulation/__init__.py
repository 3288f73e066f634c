"""A whole training run on one machine, through the functions and files of the commands."""

from dtl.core.learning.simulation.options import SimulationOptions, participant_names, source_name
from dtl.core.learning.simulation.run import MODEL, PAGE, new_run, resume_run, simulate

__all__ = [
    "MODEL",
    "PAGE",
    "SimulationOptions",
    "new_run",
    "participant_names",
    "resume_run",
    "simulate",
    "source_name",
]
