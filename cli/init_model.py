"""`dtl init-model`: public initial weights."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli import options
from dtl.cli.options import ForceOption, JsonOption, OutOption, Output, QuietOption, SeedOption
from dtl.core import defaults

EXAMPLE = """Example:

  dtl init-model --data shards/alice.npz --hidden 64,32 --seed 0 -o w0.safetensors"""


def init_model(
    data: Annotated[
        Path, typer.Option(help="Any shard: it gives features and classes.", show_default=False)
    ],
    out: OutOption,
    hidden: Annotated[
        str, typer.Option(metavar="SIZES", help="Sizes of the hidden layers: 64,32.")
    ] = defaults.HIDDEN,
    seed: SeedOption = defaults.SEED,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw the initial weights of a multi-layer perceptron; they are public."""
    from dtl.core.learning import mlp

    weights = mlp.init_model(data, out, options.sizes(hidden, "--hidden"), seed, force)
    Output(json, quiet).show(
        model=str(out),
        values=sum(array.size for array in weights.values()),
        tensors={name: str(list(array.shape)) for name, array in weights.items()},
    )
