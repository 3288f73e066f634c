"""What a vector is made from."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.vectors.command_lines import LATTICE
from tests.vectors.scene import Changes, Scene


@dataclass(frozen=True)
class Fault:
    """A faulty vector: its name, what it is, the command, the exit code, and how it is made.

    `scene` is the job that it is made from. `tried` is a ledger that gains a tried line, though
    the command fails: half b was used.
    """

    name: str
    about: str
    command: str
    code: int
    change: Callable[[Scene], Changes]
    scene: str = LATTICE
    tried: str = ""
