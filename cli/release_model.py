"""`dtl release-model`: the server removes its half, proves that, and seals it."""

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
    SecretsOption,
    WorkersOption,
)

EXAMPLE = """Example:

  dtl release-model model-1.enc --key job/server.key -o model-1.release

  dtl release-model model-1.enc --key job/server.key --to alice,bob -o model-1.release

  dtl release-model model-1.enc --key job/server.key --admit dave -o model-1.release"""


def release_model(
    result: Annotated[
        Path,
        typer.Argument(metavar="ENC", help="An encrypted sum or model.", show_default=False),
    ],
    key: KeyOption,
    out: OutOption,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Only to these contributors; by default to all who ever contributed.",
            show_default=False,
        ),
    ] = None,
    min_rounds: Annotated[
        int | None,
        typer.Option(
            help="Only to those who contributed to at least this number of rounds.",
            show_default=False,
        ),
    ] = None,
    min_share: Annotated[
        float | None,
        typer.Option(
            help="Only to those who contributed to at least this share of the model's rounds.",
            show_default=False,
        ),
    ] = None,
    admit: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Also to these, who could not contribute yet. Each can be admitted once.",
            show_default=False,
        ),
    ] = None,
    accept_differencing: Annotated[
        bool,
        typer.Option(
            "--accept-differencing",
            help="Allow a second result on one base, to repeat a void round.",
        ),
    ] = False,
    job: JobOption = None,
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
    workers: WorkersOption = None,
    backend: BackendOption = BackendName.LOCAL,
    cluster: ClusterOption = None,
    secrets_to_workers: SecretsOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Release a result to those who contributed to it, and to nobody else."""
    from dtl.core.roles import server

    output = Output(json, quiet)
    opened = options.open_key(key, job, passphrase_file)
    policy = server.Policy(
        to=options.names(to, "--to") if to is not None else None,
        min_rounds=min_rounds,
        min_share=min_share,
        admit=options.names(admit, "--admit") if admit is not None else (),
        accept_differencing=accept_differencing,
    )
    with output.work(workers, backend, cluster, secrets_to_workers) as work:
        report = server.release(opened, result, out, policy, force, work)
    output.show(
        release=str(out),
        digest=report.digest,
        of=report.header.of,
        round=report.header.round,
        may_open=list(report.header.names),
        admitted=list(report.header.admitted),
    )
