"""`dtl flower`: starts Flower's programs so that they call nobody but one another."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dtl.cli.options import Output

EXAMPLE = """Example:

  dtl flower superlink link --insecure

  dtl flower supernode node --insecure --superlink 127.0.0.1:8000
  --node-config 'key="job/alice.key" data="shards/alice.npz" folder="alice"'

  dtl flower flwr run supernode register alice.pub --name alice

  dtl flower run run"""


class Part(StrEnum):
    """What to start."""

    SUPERLINK = "superlink"
    SUPERNODE = "supernode"
    FLWR = "flwr"
    RUN = "run"


def flower(
    context: typer.Context,
    part: Annotated[
        Part,
        typer.Argument(
            help="The server's SuperLink, a participant's SuperNode, any command of flwr, or a "
            "run, to its end.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Where Flower keeps files of its own; for a run, what flower-config wrote.",
            show_default=False,
        ),
    ],
) -> None:
    """Start a part of Flower, with telemetry, update checks and installations off.

    All other options are Flower's: see flower-superlink --help, flower-supernode --help.
    A run that fails ends with code 1.
    """
    from dtl.core.flower import engine

    if part is not Part.RUN:
        engine.start(part, folder, context.args)
    Output(False, False).show(run=engine.run(folder, context.args), status="completed")
