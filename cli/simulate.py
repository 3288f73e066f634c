"""`dtl simulate`: a whole training run on one machine, held against training in the clear."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dtl.cli import options
from dtl.cli.options import (
    CipherName,
    JsonOption,
    OptimizerName,
    Output,
    QuietOption,
    SeedOption,
    WorkersOption,
)
from dtl.core import defaults

EXAMPLE = """Example:

  dtl simulate digits --participants 5 --rounds 30 --out run

  dtl simulate digits --participants 5 --rounds 30 --alpha 0.3 --drop 0.2 --out uneven

  dtl simulate --resume --out uneven   # after an interruption"""


class WeightsName(StrEnum):
    """A participant's share of the sum."""

    SAMPLES = "samples"
    EQUAL = "equal"


def simulate(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder of the run.", show_default=False)
    ],
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE",
            help="digits, breast_cancer, a FILE.csv (last column: the class) or a FILE.npz (x, y).",
            show_default=False,
        ),
    ] = None,
    participants: Annotated[
        str, typer.Option(metavar="N|NAMES", help="How many, or their names.")
    ] = defaults.SIMULATION_PARTICIPANTS,
    rounds: Annotated[
        int, typer.Option(help="Rounds, void ones among them.")
    ] = defaults.SIMULATION_ROUNDS,
    hidden: Annotated[str, typer.Option(help="Hidden layers, such as 64,32.")] = ",".join(
        map(str, defaults.SIMULATION_HIDDEN)
    ),
    local_epochs: Annotated[
        int, typer.Option(help="Epochs a participant trains in a round; 0 sends the gradient.")
    ] = defaults.SIMULATION_EPOCHS,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help=f"Samples a step; by default {defaults.BATCH_SIZE} in local epochs, else all.",
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[
        OptimizerName,
        typer.Option(
            help="sgd: the server keeps the encrypted model. momentum, adam: it only adds up, "
            "and participants keep the model."
        ),
    ] = OptimizerName.SGD,
    lr: Annotated[
        float | None,
        typer.Option(
            help="The learning rate of the optimizer (with sgd and local epochs, of those); "
            "by default 0.1, with adam 0.01.",
            show_default=False,
        ),
    ] = None,
    local_lr: Annotated[
        float | None,
        typer.Option(
            help=f"The learning rate of local epochs, with momentum or adam; "
            f"by default {defaults.LOCAL_LR}.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        WeightsName, typer.Option(help="Shares of the sum: by number of samples, or equal.")
    ] = WeightsName.SAMPLES,
    rounding: Annotated[
        options.RoundingName, typer.Option(help="As in encrypt-grads.")
    ] = options.RoundingName.STOCHASTIC,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Split classes unevenly, by Dirichlet(alpha); by default evenly at random.",
            show_default=False,
        ),
    ] = None,
    drop: Annotated[
        float, typer.Option(help="The probability that a participant misses a round.")
    ] = 0.0,
    test: Annotated[
        float, typer.Option(help="The share of samples kept for the test.")
    ] = defaults.TEST_SHARE,
    seed: SeedOption = defaults.SEED,
    modulus_bits: Annotated[
        int, typer.Option(help="2048 or 3072; smaller with --insecure.")
    ] = defaults.MODULUS_BITS,
    slot_bits: Annotated[
        int, typer.Option(help="Bits of an encrypted value.")
    ] = defaults.SLOT_BITS,
    fraction_bits: Annotated[
        int, typer.Option(help="Bits after the binary point.")
    ] = defaults.FRACTION_BITS,
    cipher: Annotated[
        CipherName, typer.Option(help="How values are encrypted: see keygen.")
    ] = CipherName.LATTICE,
    min_contributors: Annotated[
        int, typer.Option(help="The fewest uploads that are ever added up.")
    ] = defaults.MIN_CONTRIBUTORS,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow a small modulus, for tests.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    workers: WorkersOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train for many rounds on one machine, encrypted and in the clear, and compare.

    Every step of every party runs as by hand, on files in the folder of the run. Read
    report.html there, or report.json; commands.sh does the same by hand.
    """
    from dtl.core.errors import DtlError, UsageError
    from dtl.core.learning import simulation

    wanted: dict[str, Any] = {
        "source": simulation.source_name(source) if source else None,
        "participants": simulation.participant_names(participants),
        "rounds": rounds,
        "hidden": tuple(options.sizes(hidden, "--hidden")),
        "local_epochs": local_epochs,
        "batch_size": batch_size,
        "optimizer": str(optimizer),
        "lr": lr,
        "local_lr": local_lr,
        "weights": str(weights),
        "rounding": str(rounding),
        "alpha": alpha,
        "drop": drop,
        "test": test,
        "seed": seed,
        "modulus_bits": modulus_bits,
        "slot_bits": slot_bits,
        "fraction_bits": fraction_bits,
        "min_contributors": min_contributors,
        "cipher": str(cipher),
        "insecure": insecure,
    }
    if resume:
        given = {name: value for name, value in wanted.items() if _is_given(context, name)}
        chosen = simulation.resume_run(out, given)
    elif source is None:
        raise UsageError("missing argument NAME|FILE", "digits and breast_cancer come with dtl")
    else:
        chosen = simulation.new_run(out, wanted)
    output = Output(json, quiet)
    try:
        with output.work(workers) as work:
            report = simulation.simulate(out, chosen, work)
    except KeyboardInterrupt:
        raise DtlError("interrupted", f"dtl simulate --resume --out {out} goes on") from None
    found = report.summary
    output.show(
        report=str(out / simulation.PAGE),
        model=str(out / simulation.MODEL),
        security=report.security,
        **found.model_dump(),
    )


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    origin = context.get_parameter_source(name)
    return origin is not None and origin.name != "DEFAULT"
