"""How long work tells of its progress: a plain callback, so that core knows no terminal."""

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int | None], None]
"""Called with (step, units done, units in all); ``None`` in all where that is not known."""


def silent(step: str, done: int, total: int | None) -> None:
    """Report nothing."""
