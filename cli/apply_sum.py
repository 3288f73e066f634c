"""`dtl apply-sum`: a participant steps along a released sum, on a model that it keeps itself."""

from pathlib import Path
from typing import Annotated

import typer

from dtl.cli import options
from dtl.cli.options import (
    ForceOption,
    JobOption,
    JsonOption,
    OptimizerName,
    OutOption,
    Output,
    PassphraseOption,
    QuietOption,
)
from dtl.core import defaults

EXAMPLE = """Example:

  dtl apply-sum sum-1.safetensors --model w0.safetensors --key job/alice.key
  --optimizer adam --lr 0.01 --state-out adam-1.safetensors -o w1.safetensors

  dtl apply-sum sum-2.safetensors --model w1.safetensors --key job/alice.key
  --optimizer adam --lr 0.01 --state adam-1.safetensors --state-out adam-2.safetensors
  -o w2.safetensors

  dtl apply-sum sum-1.safetensors --model from-alice.safetensors --key job/dave.key
  --adopt alice -o w1.safetensors"""


def apply_sum(
    total: Annotated[
        Path,
        typer.Argument(metavar="SUM", help="The sum that open-model wrote.", show_default=False),
    ],
    model: Annotated[
        Path,
        typer.Option(
            help="The model before the step, which the gradients were computed on.",
            show_default=False,
        ),
    ],
    out: OutOption,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            envvar="DTL_KEY",
            help="Your key file. Its ledger checks and records the step; without it, "
            "encrypt-grads does not accept the new model.",
            show_default=False,
        ),
    ] = None,
    adopt: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Take no step: --model is the model after this sum, which you got from NAME "
            "and trust. The ledger records that.",
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[OptimizerName, typer.Option(help="The same for everybody.")] = (
        OptimizerName.SGD
    ),
    lr: Annotated[
        float, typer.Option(help="The learning rate; the same for everybody.")
    ] = defaults.LR,
    state: Annotated[
        Path | None,
        typer.Option(help="The file that --state-out wrote in the last step.", show_default=False),
    ] = None,
    state_out: Annotated[
        Path | None,
        typer.Option(help="The file for the state of momentum or adam.", show_default=False),
    ] = None,
    job: JobOption = None,
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Take a step along a released sum of gradients, where participants keep the model."""
    from dtl.core.errors import UsageError
    from dtl.core.learning import optimizers

    if not 0 < lr < float("inf"):
        raise UsageError(f"--lr: expected a positive number, found {lr}")
    if adopt is not None and key is None:
        raise UsageError("--adopt: expected --key as well: the ledger records whom you trust")
    if adopt is not None and (state or state_out):
        raise UsageError("--adopt: takes no step, and so no --state and no --state-out")
    if adopt is None and optimizer is not OptimizerName.SGD and state_out is None:
        raise UsageError(f"--optimizer {optimizer}: needs --state-out, for the next step")
    if optimizer is OptimizerName.SGD and state is not None:
        raise UsageError(
            "--state: expected none, as --optimizer sgd remembers nothing",
            "name the optimizer that wrote it",
        )
    chosen = optimizers.make_optimizer(str(optimizer), lr)
    files = optimizers.StateFiles(state, state_out)
    recording = None
    if key is not None:
        recording = optimizers.Recording(options.open_key(key, job, passphrase_file), adopt)
    written = optimizers.apply_sum(total, model, out, chosen, files, force, recording)
    Output(json, quiet).show(
        model=str(out),
        optimizer=str(optimizer),
        lr=lr,
        round=written.round,
        base=written.base,
        content=written.content,
        recorded=key is not None,
    )
