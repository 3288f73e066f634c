"""`dtl evaluate`: accuracy and loss of a plaintext model."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli.options import JsonOption, Output, QuietOption

EXAMPLE = """Example:

  dtl evaluate --model w1.safetensors --data shards/test.npz"""


def evaluate(
    model: Annotated[Path, typer.Option(help="The plaintext model.", show_default=False)],
    data: Annotated[Path, typer.Option(help="The shard to score it on.", show_default=False)],
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score a model on a shard: accuracy, and cross-entropy loss."""
    from dtl.core.learning import mlp

    accuracy, loss, samples = mlp.evaluate(model, data)
    Output(json, quiet).show(accuracy=accuracy, loss=loss, samples=samples)
