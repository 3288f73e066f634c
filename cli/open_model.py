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
    InitialOption,
    JobOption,
    JsonOption,
    KeyOption,
    OutOption,
    Output,
    ParentsOption,
    PassphraseOption,
    QuietOption,
    RevealsOption,
    SecretsOption,
    UploadsOption,
    WorkersOption,
)

EXAMPLE = """Example:

  dtl open-model model-1.release --key job/alice.key -o w1.safetensors

  dtl open-model model-2.release --key job/alice.key --uploads alice.upload bob.upload
  carol.upload --model model-1.enc -o w2.safetensors"""


def open_model(
    release: Annotated[
        Path, typer.Argument(metavar="RELEASE", help="A release.", show_default=False)
    ],
    key: KeyOption,
    out: OutOption,
    uploads: UploadsOption = None,
    model: ParentsOption = None,
    initial: InitialOption = None,
    reveals: RevealsOption = None,
    after_failure: Annotated[
        bool,
        typer.Option(
            "--after-failure",
            help="Open this release although an earlier one did not open. Find out why first: each "
            "failed attempt can tell the server one bit.",
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
    """Check a release and open it: the plaintext model, or the sum of the gradients.

    With --uploads (and --model or --initial, and --reveals) the server's result is recomputed
    first. Without, it is checked that the release is the result that the server signed, not
    that this result is the sum of the uploads.
    """
    from dtl.core.errors import UsageError
    from dtl.core.public.verification import Evidence
    from dtl.core.roles import participant

    if not uploads and (model or initial or reveals):
        raise UsageError("--model, --initial and --reveals: only with --uploads")
    evidence = Evidence(uploads, model or (), initial, reveals or ()) if uploads else None

    output = Output(json, quiet)
    opened = options.open_key(key, job, passphrase_file)
    with output.work(workers, backend, cluster, secrets_to_workers) as work:
        wanted = participant.OpenOptions(evidence, after_failure)
        report = participant.open_release(opened, release, out, wanted, force, work)
    manifest = report.header.manifest
    output.show(
        output=str(out),
        kind=manifest.kind,
        round=manifest.round,
        of=report.header.of,
        opened=report.opened,
        recomputed=report.recomputed,
        contributors=list(manifest.names),
        missing=list(manifest.missing),
        values=manifest.values,
    )
