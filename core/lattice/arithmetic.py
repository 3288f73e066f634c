"""What every back end of the lattice body can do.

Vectors come as numpy arrays, bodies as bytes in the form of FORMATS.md. All back ends give the
same bytes. Source: PROTOCOL.md, the section on the lattice body.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtl.core.crypto.primitives import hash_fields
from dtl.core.errors import FormatError
from dtl.core.lattice.parameters import WORD_BITS, Ring, Shape

Body = NDArray[np.uint8]
Integers = NDArray[np.int64]
Words = NDArray[np.uint64]
Values = NDArray[np.float32] | NDArray[np.float64]
Buffer = bytes | bytearray | memoryview | Body

KEY_BYTES = 32


class Mask(NamedTuple):
    """One mask: the sign with which it counts, and the key k' of its words."""

    sign: int
    """+1 or -1."""
    key: bytes


@dataclass(frozen=True)
class Encoding:
    """How reals become integers: value * scale * one, rounded, clamped to +-limit."""

    scale: float
    one: float
    """2^f."""
    limit: int
    """The largest |e|; at most 2^(B-1) - 1."""
    seed: bytes | None = None
    """Key of stochastic rounding; None rounds to nearest, ties to even."""


class NonFinite(ValueError):  # noqa: N818  (what was found, not what failed)
    """A value is NaN or infinite; `index` is its place in the array that was given."""

    def __init__(self, index: int) -> None:
        super().__init__(f"value {index} is not finite")
        self.index = index


def public_key(job_digest: bytes) -> bytes:
    """k_A, the key of a job's public polynomials (32 bytes), from its digest."""
    return hash_fields("dtl/v2/public-polynomials", job_digest)[:KEY_BYTES]


def out_of_range() -> FormatError:
    """The error for a body with a word that is not below its prime."""
    return FormatError("the body holds a word that is out of range")


def body_of(data: Buffer, shape: Shape, first: int, count: int) -> Body:
    """The bytes of `count` polynomials as an array; ValueError for another length."""
    body = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data
    wanted = shape.span(first, count).length
    if body.dtype != np.uint8 or body.shape != (wanted,):
        raise ValueError(f"expected {wanted} bytes of a body, found {body.dtype} {body.shape}")
    return np.ascontiguousarray(body)


def polynomials_of(body: Buffer, shape: Shape, first: int) -> int:
    """How many whole polynomials from `first` on a body of this length is; ValueError if none."""
    length = len(body)
    full = shape.span(0, min(1, shape.polynomials)).length
    count = min(-(-length // full) if full else 0, shape.polynomials - first)
    if shape.span(first, count).length != length:
        raise ValueError(f"{length} bytes are not whole polynomials from {first} on")
    return count


def vector(array: NDArray[Any], *dtypes: type) -> NDArray[Any]:
    """The array, contiguous and aligned; ValueError unless a vector of one of these types."""
    if array.ndim != 1 or array.dtype not in [np.dtype(dtype) for dtype in dtypes]:
        raise ValueError(f"expected a vector of {dtypes}, found {array.dtype} {array.shape}")
    return np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED"])


def check_integers(integers: Integers, slot_bits: int) -> Integers:
    """Integers that fit into their slots: -2^(B-1) <= e < 2^(B-1); ValueError else."""
    found = vector(integers, np.int64)
    bound = 1 << (slot_bits - 1)
    if found.size and (found.min() < -bound or found.max() >= bound):
        raise ValueError(f"an integer does not fit into {slot_bits} bits")
    return found


def check_keys(*keys: bytes | None) -> None:
    """ValueError unless every key that is given has 32 bytes."""
    if any(key is not None and len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"a key has {KEY_BYTES} bytes")


def check_masks(masks: Sequence[Mask]) -> None:
    """ValueError unless every sign is +1 or -1 and every key has 32 bytes."""
    if any(sign not in (1, -1) for sign, _ in masks):
        raise ValueError("the sign of a mask is +1 or -1")
    check_keys(*(key for _, key in masks))


def check_encoding(encoding: Encoding, slot_bits: int) -> None:
    """ValueError for a limit that does not fit into a slot, a scale or a seed that is none."""
    check_keys(encoding.seed)
    if not 0 <= encoding.limit < 1 << (slot_bits - 1):
        raise ValueError(f"a limit of {encoding.limit} does not fit into {slot_bits} bits")
    if not isfinite(encoding.scale) or not isfinite(encoding.one):
        raise ValueError("the scale is not finite")


def check_small(small: Integers, ring: Ring) -> Integers:
    """n coefficients below 2^49 in size, contiguous; ValueError else."""
    found = vector(small, np.int64)
    bound = 1 << (WORD_BITS - 1)
    if found.shape != (ring.n,) or found.min() <= -bound or found.max() >= bound:
        raise ValueError(f"expected {ring.n} coefficients below 2^49")
    return found


def check_secret(secret: Words, ring: Ring) -> Words:
    """The transformed secret, contiguous; ValueError for another shape."""
    if secret.dtype != np.uint64 or secret.shape != (len(ring.primes), ring.n):
        raise ValueError(f"expected uint64 [4, {ring.n}], found {secret.dtype} {secret.shape}")
    return np.ascontiguousarray(secret)


class Sum(ABC):
    """A running sum of bodies over some polynomials, in bounded memory.

    Bodies may come as `bytes`, or as uint8 arrays. After a FormatError the sum is of no use.
    """

    def __init__(self, shape: Shape, first: int, count: int) -> None:
        self.shape, self.first, self.count = shape, first, count
        self.span = shape.span(first, count)

    @abstractmethod
    def add(self, body: Buffer) -> None:
        """Add a body of these polynomials; FormatError for a word out of range."""

    @abstractmethod
    def subtract(self, body: Buffer) -> None:
        """Subtract a body of these polynomials; FormatError for a word out of range."""

    @abstractmethod
    def subtract_from(self, start: Buffer) -> None:
        """Replace the sum by `start` minus the sum."""

    @abstractmethod
    def add_masks(self, masks: Sequence[Mask]) -> None:
        """Add masks, each with its sign."""

    @abstractmethod
    def body(self) -> Body:
        """The sum so far, as a body."""


class LatticeArithmetic(ABC):
    """The lattice body over one ring. Instances hold public tables only; threads may share one.

    Array sizes that do not fit raise ValueError. A secret is what `transform` makes of the
    small coefficients of s (or of their sum K).
    """

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    @abstractmethod
    def sample(self, key: bytes, polynomial: int | None = None) -> Integers:
        """n small integers, -64 to 64: popcounts of 128 keystream bits, minus 64.

        Without a polynomial: s under k_s; with one: its errors e_i under k_e.
        """

    @abstractmethod
    def transform(self, small: Integers) -> Words:
        """The number-theoretic transform of n signed coefficients: uint64 [4, n], NTT order.

        |coefficient| < 2^49; ValueError else.
        """

    @abstractmethod
    def pad(
        self,
        k_a: bytes,
        secret: Words,
        k_e: bytes,
        masks: Sequence[Mask],
        encoding: Encoding,
        values: Values,
        shape: Shape,
        first: int,
    ) -> tuple[Body, int]:
        """Encode and encrypt the values of whole polynomials from `first` on, in one pass.

        `values` are those of the polynomials only. Returns (body, how many were clamped).
        Raises NonFinite for NaN and infinity.
        """

    @abstractmethod
    def pad_integers(
        self,
        k_a: bytes,
        secret: Words,
        k_e: bytes,
        masks: Sequence[Mask],
        integers: Integers,
        shape: Shape,
        first: int,
    ) -> Body:
        """Encrypt integers that are encoded already: -2^(B-1) <= e < 2^(B-1)."""

    @abstractmethod
    def encode_public(self, integers: Integers, shape: Shape, first: int) -> Body:
        """The body Delta X of public integers: no secret, no error, no mask."""

    @abstractmethod
    def open(
        self, k_a: bytes, secret: Words, bound: int, body: Buffer, shape: Shape, first: int
    ) -> tuple[Integers, bool]:
        """Take a K off a body of whole polynomials and cut it into slots.

        Returns (integers, good). `good` is False where an |E| > `bound`, where something is
        above the slots, or where padding is not zero; the integers mean nothing then. All
        of it is computed in any case. FormatError for a word out of range.
        """

    @abstractmethod
    def sum(self, shape: Shape, first: int, count: int) -> Sum:
        """A running sum over `count` polynomials, zero so far."""

    def combine(
        self,
        shape: Shape,
        first: int,
        count: int,
        plus: Sequence[Buffer],
        minus: Sequence[Buffer] = (),
        masks: Sequence[Mask] = (),
    ) -> Body:
        """The sum of `plus` and `masks` minus the sum of `minus`, over `count` polynomials."""
        total = self.sum(shape, first, count)
        for body in plus:
            total.add(body)
        for body in minus:
            total.subtract(body)
        total.add_masks(masks)
        return total.body()
