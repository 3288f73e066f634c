"""Reals to integers and back: scale, round, clamp. Source: PROTOCOL.md, section 5."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dtl.core.crypto.primitives import hash_fields, keystream
from dtl.core.errors import NumericError, UsageError

MAX_SLOT_BITS = 52  # so that every clamped integer is exact in float64

Reals = NDArray[np.float64]
Values = NDArray[np.float32] | NDArray[np.float64]
Integers = NDArray[np.int64]

_FAR = 2.0**60  # beyond every max_step, and finite
_NOISE_BYTES = 4


class Rounding(Protocol):
    """Rounds values that stand at places `start`, `start + 1`, ... of the whole vector."""

    def __call__(self, values: Reals, start: int) -> Reals:
        """Return whole numbers, still as float64."""
        ...


def nearest(values: Reals, start: int) -> Reals:
    """Round to the nearest integer, ties to even."""
    return np.rint(values)


@dataclass(frozen=True)
class Stochastic:
    """Round up with the probability of the fraction: unbiased, so small gradients survive.

    Value i takes bytes [4i, 4i + 4) of a ChaCha20 keystream as a number u32, and is rounded up
    if u32 < fraction 2^32; so the result does not depend on how the vector is cut into chunks.
    """

    seed: bytes

    @classmethod
    def from_text(cls, text: str) -> "Stochastic":
        """Fix the rounding by a text that a user gave."""
        given = text.encode("utf-8", "surrogateescape")  # any bytes will do
        return cls(hash_fields("dtl/v2/rounding", given)[:32])

    def __call__(self, values: Reals, start: int) -> Reals:
        """Return floor(x) or floor(x) + 1."""
        stream = keystream(self.seed, _NOISE_BYTES * start, _NOISE_BYTES * values.size)
        low = np.floor(values)
        return low + (np.frombuffer(stream, "<u4") < (values - low) * 2.0**32)


@dataclass(frozen=True)
class FixedPoint:
    """The number format of a job: B = `slot_bits`, f = `fraction_bits`, n participants.

    Raises UsageError for parameters that leave no room.
    """

    slot_bits: int
    fraction_bits: int
    participants: int

    def __post_init__(self) -> None:
        if not 2 < self.slot_bits <= MAX_SLOT_BITS:
            raise UsageError(f"slot bits: expected 3 to {MAX_SLOT_BITS}, found {self.slot_bits}")
        if not 0 <= self.fraction_bits < self.slot_bits - 1:
            raise UsageError(
                f"fraction bits: expected 0 to {self.slot_bits - 2}, found {self.fraction_bits}"
            )
        if self.max_step < 1:
            raise UsageError(
                f"{self.participants} participants do not fit into {self.slot_bits} slot bits",
                "take more slot bits",
            )

    @property
    def max_value(self) -> int:
        """The largest |e| of initial weights and of an opened model: 2^(B-2) - 1."""
        return (1 << (self.slot_bits - 2)) - 1

    @property
    def max_step(self) -> int:
        """The largest |e| of a contribution: e_max = floor((2^(B-2) - 1) / n)."""
        return self.max_value // self.participants

    @property
    def largest_step(self) -> float:
        """The real number that max_step stands for."""
        return self.max_step / self.one

    @property
    def max_sum(self) -> int:
        """The largest |e| of a sum of contributions: n e_max."""
        return self.participants * self.max_step

    @cached_property
    def one(self) -> float:
        """The integer that stands for 1.0: 2^f."""
        return 2.0**self.fraction_bits

    def encode_step(
        self, values: Values, scale: float, rounding: Rounding, start: int
    ) -> tuple[Integers, int]:
        """Encode finite values x scale of a contribution; returns (integers, how many clamped).

        The integer, not the real, is clamped to |e| <= max_step.
        """
        with np.errstate(over="ignore"):
            scaled = np.clip(values.astype(np.float64, copy=False) * scale * self.one, -_FAR, _FAR)
        rounded = rounding(scaled, start)
        clamped = int(np.count_nonzero(np.abs(rounded) > self.max_step))
        return np.clip(rounded, -self.max_step, self.max_step).astype(np.int64), clamped

    def encode_weights(self, values: Values) -> Integers:
        """Encode initial weights with nearest rounding; NumericError beyond max_value."""
        with np.errstate(over="ignore"):
            rounded = np.rint(values.astype(np.float64, copy=False) * self.one)
        if not (np.abs(rounded) <= self.max_value).all():  # nor for what is no number
            raise headroom_exhausted(self, "the initial weights")
        return rounded.astype(np.int64)

    def decode(self, integers: Integers) -> Reals:
        """The reals that integers stand for; exact."""
        return integers / self.one


def headroom_exhausted(fixed_point: FixedPoint, what: str) -> NumericError:
    """The error for a value that has left the range in which no overflow goes unnoticed."""
    reach = (fixed_point.max_value + 1) / fixed_point.one
    return NumericError(
        f"headroom exhausted: {what} left the range of +-{reach:g}",
        f"this job has --slot-bits {fixed_point.slot_bits} and --fraction-bits "
        f"{fixed_point.fraction_bits}; make a job with more slot bits "
        f"(say {min(MAX_SLOT_BITS, fixed_point.slot_bits + 4)}) or fewer fraction bits "
        f"(say {max(0, fixed_point.fraction_bits - 4)}), or train with a smaller --lr",
    )
