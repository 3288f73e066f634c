"""`dtl verify`: anyone checks signatures, proofs, manifests, and the server's product."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli import options, terminal
from dtl.cli.options import (
    BackendName,
    BackendOption,
    ClusterOption,
    JobOption,
    JsonOption,
    Output,
    QuietOption,
    WorkersOption,
)

EXAMPLE = """Example:

  dtl verify model-1.enc --job job/job.json --initial w0.safetensors
  --uploads alice.upload bob.upload carol.upload

  dtl verify model-2.enc --job job/job.json --model model-1.enc --initial w0.safetensors
  --uploads *.upload"""


def verify(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Any signed file.", show_default=False)
    ],
    uploads: Annotated[
        list[Path] | None,
        typer.Option(metavar="U...", help="The uploads it was made of.", show_default=False),
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PARENT",
            help="The model it goes on from; again for the one before, back to round 1.",
            show_default=False,
        ),
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(metavar="M0", help="The public initial weights.", show_default=False),
    ] = None,
    reveals: Annotated[
        list[Path] | None,
        typer.Option(metavar="R...", help="The reveals, if any.", show_default=False),
    ] = None,
    job: JobOption = None,
    workers: WorkersOption = None,
    backend: BackendOption = BackendName.LOCAL,
    cluster: ClusterOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check a file with public files only; recompute the server's result bit for bit.

    The job file defaults to job.json beside FILE. Exit code 0 says that all that was checked
    holds; the server's product is recomputed, and so checked, only with --uploads.
    """
    from dtl.core.files.job_file import Job
    from dtl.core.public.verification import Evidence
    from dtl.core.roles import observer

    output = Output(json, quiet)
    evidence = Evidence(uploads or (), model or (), initial, reveals or ())
    opened = Job.load(options.job_path(job, file))
    with output.work(workers, backend, cluster) as work:
        verified = observer.verify(file, opened, evidence, work)
    output.show(**verified)
    if verified.get("recomputed") is False:
        terminal.show_warning(f"{file}: the server's product was not recomputed: no uploads given")
