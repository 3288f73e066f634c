"""`dtl split-data`: one shard a participant, and a test shard."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli import options
from dtl.cli.options import (
    ForceOption,
    JsonOption,
    Output,
    ParticipantsOption,
    QuietOption,
    SeedOption,
)
from dtl.core import defaults

EXAMPLE = """Example:

  dtl split-data digits --participants alice,bob,carol --out shards

  dtl split-data patients.csv --participants alice,bob --alpha 0.5 --out shards"""


def split_data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            help="digits, breast_cancer, a FILE.csv (last column: the class) or a FILE.npz (x, y).",
            show_default=False,
        ),
    ],
    participants: ParticipantsOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for the shards.", show_default=False)
    ],
    test: Annotated[
        float, typer.Option(help="The share of samples kept for the test.")
    ] = defaults.TEST_SHARE,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Split classes unevenly, by Dirichlet(alpha); by default evenly at random.",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = defaults.SEED,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Split a data set into NAME.npz for every participant and test.npz."""
    from dtl.core.learning import split

    wanted = split.SplitOptions(options.names(participants, "--participants"), test, alpha, seed)
    shards = split.split_data(source, out, wanted, force)
    Output(json, quiet).show(
        folder=str(out),
        samples={name: len(shard.x) for name, shard in shards.items()},
        classes=list(map(str, next(iter(shards.values())).classes)),
    )
