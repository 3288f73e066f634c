"""`dtl open-model`: a participant opens what was released to it."""

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

  dtl open-model model-1.release --key job/alice.key -o w1.safetensors"""


def open_model(
    release: Annotated[
        Path, typer.Argument(metavar="RELEASE", help="A release.", show_default=False)
    ],
    key: KeyOption,
    out: OutOption,
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
    """Check a release and open it: the plaintext model, or the sum of the gradients."""
    from dtl.core.roles import participant

    output = Output(json, quiet)
    opened = options.open_key(key, job, passphrase_file)
    with output.work(workers, backend, cluster, secrets_to_workers) as work:
        report = participant.open_release(opened, release, out, force, work)
    manifest = report.header.manifest
    output.show(
        output=str(out),
        kind=manifest.kind,
        round=manifest.round,
        of=report.header.of,
        opened=report.opened,
        contributors=list(manifest.names),
        missing=list(manifest.missing),
        values=manifest.values,
    )
