"""`dtl inspect`: says what a file is."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli.options import JobOption, JsonOption, Output, QuietOption

EXAMPLE = """Example:

  dtl inspect alice.upload --job job/job.json"""


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Any file of dtl's.", show_default=False)
    ],
    job: JobOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Describe a file: its kind, its owner, its content; never a secret.

    The job file defaults to job.json in the folder of FILE. With a job file, the signature is
    checked as well.
    """
    from dtl.core.roles import observer

    output = Output(json, quiet)
    with output.progress() as progress:
        described = observer.inspect(file, observer.job_beside(file, job), progress)
    output.show(**described)
