"""`dtl aggregate`: the server checks uploads and multiplies them."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli import options
from dtl.cli.options import (
    BackendName,
    BackendOption,
    ClusterOption,
    ForceOption,
    JobOption,
    JsonOption,
    KeyOption,
    OutOption,
    Output,
    PassphraseOption,
    QuietOption,
    WorkersOption,
)

EXAMPLE = """Example:

  dtl aggregate alice.upload bob.upload carol.upload --key job/server.key
  --initial w0.safetensors -o model-1.enc

  dtl aggregate *.upload --key job/server.key --model model-1.enc -o model-2.enc

  dtl aggregate alice.upload bob.upload carol.upload --key job/server.key
  --close round-1.close --reveals alice.reveal bob.reveal carol.reveal -o sum-1.enc"""


def aggregate(
    uploads: Annotated[
        list[Path], typer.Argument(metavar="U...", help="Uploads.", show_default=False)
    ],
    key: KeyOption,
    out: OutOption,
    model: Annotated[
        Path | None,
        typer.Option(help="The current encrypted model: W becomes W - sum.", show_default=False),
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(
            help="Public initial weights, in the first round of a model.", show_default=False
        ),
    ] = None,
    close: Annotated[
        Path | None,
        typer.Option(help="The close file, if somebody is missing.", show_default=False),
    ] = None,
    reveals: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="R...",
            help="With --close: the reveals of all contributors.",
            show_default=False,
        ),
    ] = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Continue without the files that are refused.")
    ] = False,
    job: JobOption = None,
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
    workers: WorkersOption = None,
    backend: BackendOption = BackendName.LOCAL,
    cluster: ClusterOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Add up uploads that the server cannot read: an encrypted sum, or the next model."""
    from dtl.core.roles import server

    output = Output(json, quiet)
    opened = options.open_key(key, job, passphrase_file)
    with output.work(workers, backend, cluster) as work:
        given = server.Round(model, initial, close, reveals or (), skip_invalid)
        report = server.aggregate(opened, uploads, out, given, force, work)
    header = report.header
    output.show(
        result=str(out),
        kind=header.kind,
        digest=report.digest,
        round=header.round,
        contributors=list(header.names),
        missing=list(header.missing),
        refused=report.refused,
        values=header.values,
    )
