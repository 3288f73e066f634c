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
    """Say what a file is, whom it belongs to, what it says of itself; never a secret.

    The job file defaults to job.json beside FILE; with one, the signature is checked too.
    """
    from dtl.core.roles import observer

    output = Output(json, quiet)
    with output.progress() as progress:
        described = observer.inspect(file, observer.job_beside(file, job), progress)
    output.show(**described)
