"""What is measured: one round of three participants, or of more, step by step, by one contender."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")

CONTRIBUTORS = 3


@dataclass(frozen=True)
class Sample:
    """Microseconds a value of every step, and bytes a value of an upload.

    `encrypt` and `serialise` are one participant's, `aggregate` adds up all uploads, `release`
    is what only dtl has, `open` turns the result into numbers again. A step that is part of
    another, or does not exist, is 0. `values` were measured, `uploads` were added up.
    """

    values: int
    encrypt: float
    serialise: float
    aggregate: float
    release: float
    open: float
    upload_bytes: float
    uploads: int = CONTRIBUTORS

    @property
    def round(self) -> float:
        """A whole round: all participants' uploads, the sum, and one opening."""
        own = self.encrypt + self.serialise
        return self.uploads * own + self.aggregate + self.release + self.open


class Stopwatch:
    """Times steps, in microseconds a value."""

    def __init__(self, values: int) -> None:
        self._values = values

    def time(self, function: Callable[[], Result]) -> tuple[float, Result]:
        """(microseconds a value, result) of one call."""
        start = time.perf_counter()
        result = function()
        return (time.perf_counter() - start) * 1e6 / self._values, result
