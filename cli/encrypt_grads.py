"""`dtl encrypt-grads`: a participant encrypts its gradients."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli import options, terminal
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
    RoundingName,
    SecretsOption,
    WorkersOption,
)
from dtl.core import defaults

EXAMPLE = """Example:

  dtl encrypt-grads alice.grads.safetensors --key job/alice.key -o alice.upload

  dtl encrypt-grads from-pytorch.safetensors --model w1.safetensors --weight 0.25
  --key job/alice.key -o alice.upload"""


def encrypt_grads(
    gradients: Annotated[
        Path,
        typer.Argument(metavar="G", help="Named arrays, .safetensors or .npz.", show_default=False),
    ],
    key: KeyOption,
    out: OutOption,
    round_number: Annotated[
        int | None,
        typer.Option("--round", help="The round; by default the model's + 1.", show_default=False),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="The model that the gradients are based on: a file that you opened or stepped "
            "yourself, or initial weights; by default as compute-grads wrote into G.",
            show_default=False,
        ),
    ] = None,
    weight: Annotated[
        float | None,
        typer.Option(
            help="Your share of the sum; by default 1/n for n participants.", show_default=False
        ),
    ] = None,
    lr: Annotated[
        float, typer.Option(help="The learning rate; the gradients are scaled.")
    ] = defaults.LR,
    rounding: Annotated[
        RoundingName, typer.Option(help="Stochastic is unbiased: small gradients are not lost.")
    ] = RoundingName.STOCHASTIC,
    rounding_seed: Annotated[
        str | None,
        typer.Option(help="Fixes the rounding (and nothing else).", show_default=False),
    ] = None,
    own_step: Annotated[
        bool,
        typer.Option(
            "--own-step",
            help="In a job of sums: your own program took the step along the last opened sum, "
            "and --model is the model after it. The ledger records that.",
        ),
    ] = False,
    accept_differencing: Annotated[
        bool,
        typer.Option(
            "--accept-differencing",
            help="Allow a second upload on one base, to repeat a void round.",
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
    """Scale, round, clamp, pack, encrypt and sign gradients: an upload for the server."""
    import secrets

    from dtl.core.encoding.fixed_point import Stochastic, nearest
    from dtl.core.errors import UsageError
    from dtl.core.roles import participant

    if rounding is RoundingName.NEAREST and rounding_seed is not None:
        raise UsageError("--rounding-seed: only with --rounding stochastic")
    if rounding is RoundingName.NEAREST:
        rounds = nearest
    elif rounding_seed is not None:
        rounds = Stochastic.from_text(rounding_seed)
    else:
        rounds = Stochastic(secrets.token_bytes(32))
    output = Output(json, quiet)
    opened = options.open_key(key, job, passphrase_file)
    wanted = participant.UploadOptions(
        rounding=rounds,
        weight=weight,
        lr=lr,
        round=round_number,
        model=model,
        own_step=own_step,
        accept_differencing=accept_differencing,
    )
    with output.work(workers, backend, cluster, secrets_to_workers) as work:
        report = participant.encrypt_gradients(opened, gradients, out, wanted, force, work)
    header = report.header
    if header.base is not None and header.round > report.first:
        terminal.show_warning(
            f"round {header.round} on the model of round {report.first - 1}: right only if the "
            "rounds between were void"
        )
    output.show(
        upload=str(out),
        digest=report.digest,
        participant=header.signer,
        round=header.round,
        base=header.base,
        values=header.values,
        clamped="unknown: completed an interrupted run"
        if report.clamped is None
        else report.clamped,
        bytes=out.stat().st_size,
    )
