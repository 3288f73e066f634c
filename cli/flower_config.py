"""`dtl flower-config`: writes what a run with Flower needs."""

import math
from pathlib import Path
from typing import Annotated

import typer

from dtl.cli.options import JobOption, JsonOption, KeyOption, Output, PassphraseOption, QuietOption
from dtl.core import defaults
from dtl.core.errors import UsageError

EXAMPLE = """Example:

  dtl flower-config run --key job/server.key --initial w0.safetensors --rounds 10

  dtl flower run run   # once SuperLink and SuperNodes are running"""


def flower_config(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder.", show_default=False)
    ],
    key: KeyOption,
    initial: Annotated[Path, typer.Option(help="Public initial weights.", show_default=False)],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in all.", show_default=False)],
    files: Annotated[
        Path | None,
        typer.Option(
            help="The server's folder for uploads, models and releases; by default DIR/rounds.",
            show_default=False,
        ),
    ] = None,
    superlink: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the SuperLink is.")
    ] = defaults.SUPERLINK,
    root_certificates: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Who vouches for the SuperLink: TLS.", show_default=False),
    ] = None,
    registered_only: Annotated[
        bool,
        typer.Option(
            "--registered-only",
            help="Only nodes registered under a participant's name: with --enable-supernode-auth.",
        ),
    ] = False,
    by_hand: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Who has no node: the server waits for the files that they lay into its folder.",
            show_default=False,
        ),
    ] = None,
    send_uploads: Annotated[
        bool,
        typer.Option(
            "--send-uploads",
            help="Send what each release was made of along with it: nodes whose configuration "
            "says recompute=true take no other.",
        ),
    ] = False,
    round_timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the answers of a step.")
    ] = defaults.ROUND_SECONDS,
    start_timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the nodes at the start.")
    ] = defaults.START_SECONDS,
    local_epochs: Annotated[int, typer.Option(help="As in compute-grads.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(help="As in compute-grads.", show_default=False)
    ] = None,
    local_lr: Annotated[
        float | None, typer.Option(help="As in compute-grads.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="As in compute-grads.")] = defaults.SEED,
    job: JobOption = None,
    passphrase_file: PassphraseOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the Flower app of a job, for the server: its files, its rounds, how to train."""
    from dtl.cli import options
    from dtl.core.files.atomic import read_start
    from dtl.core.flower import config
    from dtl.core.learning import mlp
    from dtl.core.public import results

    mlp.LocalTraining(local_epochs, batch_size, local_lr, seed)  # refuses what cannot be
    _check_seconds("--round-timeout", round_timeout)
    _check_seconds("--start-timeout", start_timeout)
    opened = options.open_key(key, job, passphrase_file)
    opened.require("server")
    manual = options.names(by_hand, "--by-hand") if by_hand is not None else []
    unknown = sorted(set(manual) - set(opened.job.names))
    if unknown:
        raise UsageError(f"--by-hand: not in this job's roster: {', '.join(unknown)}")
    results.start_from_weights(opened.job, initial)
    if root_certificates:
        read_start(root_certificates, 1)
    settings: dict[str, config.Value | None] = {
        "key": str(key.absolute()),
        "job": str(options.job_path(job, key).absolute()),
        "passphrase-file": str(passphrase_file.absolute()) if passphrase_file else None,
        "folder": str((files or folder / "rounds").absolute()),
        "initial": str(initial.absolute()),
        "rounds": rounds,
        "registered-only": registered_only,
        "send-uploads": send_uploads,
        "by-hand": ",".join(manual) if manual else None,
        "round-timeout": round_timeout,
        "start-timeout": start_timeout,
        "local-epochs": local_epochs,
        "batch-size": batch_size,
        "local-lr": local_lr,
        "seed": seed,
    }
    config.write_config(folder, settings, config.Connection(superlink, root_certificates))
    Output(json, quiet).show(folder=str(folder), rounds=rounds, run=f"dtl flower run {folder}")


def _check_seconds(option: str, seconds: float) -> None:
    if not 0 < seconds < math.inf:  # a NaN is neither
        raise UsageError(f"{option}: expected a number of seconds above 0, found {seconds:g}")
