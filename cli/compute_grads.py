"""`dtl compute-grads`: a participant computes gradients on its own shard."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli.options import ForceOption, JsonOption, OutOption, Output, QuietOption, SeedOption
from dtl.core import defaults

EXAMPLE = """Example:

  dtl compute-grads --model w0.safetensors --data shards/alice.npz -o alice.grads.safetensors

  dtl compute-grads --model w0.safetensors --data shards/alice.npz --local-epochs 5
  -o alice.grads.safetensors"""


def compute_grads(
    model: Annotated[
        Path,
        typer.Option(
            help="The plaintext model: initial weights, or a file of open-model or apply-sum.",
            show_default=False,
        ),
    ],
    data: Annotated[Path, typer.Option(help="Your own shard.", show_default=False)],
    out: OutOption,
    local_epochs: Annotated[
        int, typer.Option(help="Train this number of epochs; 0 for the gradient itself.")
    ] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help=f"Samples in a step; by default {defaults.BATCH_SIZE} in local epochs, else all.",
            show_default=False,
        ),
    ] = None,
    local_lr: Annotated[
        float | None,
        typer.Option(
            help=f"The learning rate of local epochs; by default {defaults.LOCAL_LR}.",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = defaults.SEED,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compute the gradient of the model's loss on a shard, or what local epochs change."""
    from dtl.core.learning import mlp

    training = mlp.LocalTraining(local_epochs, batch_size, local_lr, seed)
    gradients = mlp.compute_gradients(model, data, out, training, force)
    Output(json, quiet).show(
        gradients=str(out),
        values=sum(array.size for array in gradients.values()),
        tensors={name: str(list(array.shape)) for name, array in gradients.items()},
    )
