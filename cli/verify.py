"""`dtl verify`: anyone checks signatures, proofs, manifests, and the server's product."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dtl.cli import options, terminal
from dtl.cli.options import (
    BackendName,
    BackendOption,
    ClusterOption,
    InitialOption,
    JobOption,
    JsonOption,
    Output,
    ParentsOption,
    PassphraseOption,
    QuietOption,
    RevealsOption,
    UploadsOption,
    WorkersOption,
)

EXAMPLE = """Example:

  dtl verify model-1.enc --job job/job.json --initial w0.safetensors
  --uploads alice.upload bob.upload carol.upload

  dtl verify model-2.enc --job job/job.json --model model-1.enc --initial w0.safetensors
  --uploads *.upload

  dtl verify model-1.release --key job/alice.key --initial w0.safetensors --uploads *.upload"""


def verify(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Any signed file.", show_default=False)
    ],
    uploads: UploadsOption = None,
    model: ParentsOption = None,
    initial: InitialOption = None,
    reveals: RevealsOption = None,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            help="For a release: the key of a participant that it is granted to. The sealed part "
            "is then checked as well.",
            show_default=False,
        ),
    ] = None,
    passphrase_file: PassphraseOption = None,
    job: JobOption = None,
    workers: WorkersOption = None,
    backend: BackendOption = BackendName.LOCAL,
    cluster: ClusterOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check a file with public files only; recompute the server's result bit for bit.

    The job file defaults to job.json in the folder of FILE. Exit code 0 means that everything
    that was checked holds. The server's result is recomputed only with --uploads, and the
    sealed part of a release is checked only with --key.
    """
    from dtl.core.files.job_file import Job
    from dtl.core.public.verification import Evidence
    from dtl.core.roles import observer, participant

    output = Output(json, quiet)
    evidence = Evidence(uploads or (), model or (), initial, reveals or ())
    release_key = None
    if key is None:
        opened = Job.load(options.job_path(job, file))
    else:
        own = options.open_key(key, job, passphrase_file)
        own.require("participant")
        opened, release_key = own.job, partial(participant.content_key, own)
    with output.work(workers, backend, cluster) as work:
        verified = observer.verify(file, opened, evidence, work, release_key)
    output.show(**verified)
    if verified.get("recomputed") is False:
        why = "no uploads given" if not uploads else "the sealed part needs --key"
        terminal.show_warning(f"{file}: the server's result was not recomputed: {why}")
