"""The lattice body with the compiled kernel (see crypto/README.md).

The only module that knows `_lattice`. The kernel releases the GIL, so threads may share an
instance.
"""

from collections.abc import Sequence

import numpy as np

from dtl.core.lattice import arithmetic
from dtl.core.lattice.arithmetic import (
    KEY_BYTES,
    Body,
    Buffer,
    Encoding,
    Integers,
    Mask,
    NonFinite,
    Values,
    Words,
    body_of,
    check_encoding,
    check_integers,
    check_masks,
    check_secret,
    check_small,
    out_of_range,
    polynomials_of,
    vector,
)
from dtl.core.lattice.parameters import COEFFICIENT_BYTES, Ring, Shape

try:
    from dtl.core.lattice import _lattice
except ImportError:  # it is optional: no compiler, or built for another interpreter
    _missing: str | None = "it was not built when dtl was installed, or does not load"
    _variants: list[str] = []
else:
    _missing = None
    _variants = _lattice.variants()

_IFMA = "ifma"
_PRIMES = 4
_MAX_TERMS = 1 << 13  # as in _lattice.h: so many words below 2^50 stay below 2^64
_ADD, _SUBTRACT, _SUBTRACT_FROM = range(3)


def unavailable() -> str | None:
    """Why the compiled kernel cannot be used here; None where it can."""
    return _missing


def why_not_ifma() -> str | None:
    """Why its AVX-512 IFMA variant cannot be used here; None where it can."""
    if _missing or _IFMA in _variants:
        return _missing
    return "the processor has no AVX-512 IFMA"


def portable_variant() -> str:
    """The fastest variant that needs no AVX-512: "avx2" or "generic"."""
    return [name for name in _variants if name != _IFMA][-1]


class Sum(arithmetic.Sum):
    """Words as uint64, reduced before they could overflow."""

    def __init__(self, kernel: "_lattice.Ring", shape: Shape, first: int, count: int) -> None:
        super().__init__(shape, first, count)
        self._kernel = kernel
        self._words = np.zeros(_PRIMES * self.span.length // COEFFICIENT_BYTES, np.uint64)
        self._terms = 0

    def _apply(self, body: Buffer, how: int) -> None:
        self._count_term()
        found = body_of(body, self.shape, self.first, self.count)
        if not self._kernel.sum_body(self._words, found, how):
            raise out_of_range()

    def _count_term(self) -> None:
        self._terms += 1
        if self._terms >= _MAX_TERMS:
            self._kernel.sum_reduce(self._words)
            self._terms = 2

    def add(self, body: Buffer) -> None:
        """Add a body."""
        self._apply(body, _ADD)

    def subtract(self, body: Buffer) -> None:
        """Subtract a body."""
        self._apply(body, _SUBTRACT)

    def subtract_from(self, start: Buffer) -> None:
        """Replace the sum by `start` minus the sum."""
        self._apply(start, _SUBTRACT_FROM)

    def add_masks(self, masks: Sequence[Mask]) -> None:
        """Add masks, each with its sign."""
        check_masks(masks)
        for sign, key in masks:
            self._count_term()
            self._kernel.sum_mask(self._words, self.first, sign < 0, key)

    def body(self) -> Body:
        """The sum so far."""
        out = np.empty(self.span.length, np.uint8)
        self._kernel.sum_write(self._words, out)
        self._terms = 1
        return out


class Arithmetic(arithmetic.LatticeArithmetic):
    """The lattice body with one variant of the kernel: "generic", "avx2" or "ifma"."""

    def __init__(self, ring: Ring, variant: str) -> None:
        super().__init__(ring)
        self._kernel = _lattice.Ring(ring.n, ring.primes, ring.roots, variant)

    def sample(self, key: bytes, polynomial: int | None = None) -> Integers:
        """Popcounts."""
        out = np.empty(self.ring.n, np.int64)
        self._kernel.sample(key, polynomial or 0, out)
        return out

    def transform(self, small: Integers) -> Words:
        """One transform a prime."""
        out = np.empty((_PRIMES, self.ring.n), np.uint64)
        self._kernel.transform(check_small(small, self.ring), out)
        return out

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
        """All of it in one pass over a polynomial that stays in the cache."""
        check_encoding(encoding, shape.slot_bits)
        found = vector(values, np.float32, np.float64)
        out, start = self._out(shape, first, len(found))
        finite, clamped = self._kernel.pad(
            k_a, check_secret(secret, self.ring), k_e, _packed(masks), shape.slot_bits,
            found.dtype.char, found, encoding.scale, encoding.one, float(encoding.limit),
            encoding.seed, first, start, out,
        )  # fmt: skip
        if not finite:
            raise NonFinite(int(np.argmin(np.isfinite(found))))
        return out, clamped

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
        """The same from integers."""
        return self._integers(
            k_a, check_secret(secret, self.ring), k_e, masks, integers, shape, first
        )

    def encode_public(self, integers: Integers, shape: Shape, first: int) -> Body:
        """Delta X alone."""
        unused = bytes(KEY_BYTES)
        return self._integers(unused, None, unused, (), integers, shape, first)

    def _integers(
        self,
        k_a: bytes,
        secret: Words | None,
        k_e: bytes,
        masks: Sequence[Mask],
        integers: Integers,
        shape: Shape,
        first: int,
    ) -> Body:
        found = check_integers(integers, shape.slot_bits)
        out, start = self._out(shape, first, len(found))
        self._kernel.pad(
            k_a, secret, k_e, _packed(masks), shape.slot_bits, "i", found, 1.0, 1.0, 0.0, None,
            first, start, out,
        )  # fmt: skip
        return out

    @staticmethod
    def _out(shape: Shape, first: int, values: int) -> tuple[Body, int]:
        """Room for the polynomials of so many values, and the place of the first value."""
        span = shape.span(first, shape.holding(first, values))
        return np.empty(span.length, np.uint8), span.first_value

    def open(
        self, k_a: bytes, secret: Words, bound: int, body: Buffer, shape: Shape, first: int
    ) -> tuple[Integers, bool]:
        """All of it, whatever is found."""
        count = polynomials_of(body, shape, first)
        found = body_of(body, shape, first, count)
        out = np.empty(shape.span(first, count).values, np.int64)
        in_range, good = self._kernel.open(
            k_a, check_secret(secret, self.ring), bound, shape.slot_bits, found, first, out
        )
        if not in_range:
            raise out_of_range()
        return out, good

    def sum(self, shape: Shape, first: int, count: int) -> Sum:
        """A running sum."""
        return Sum(self._kernel, shape, first, count)


def _packed(masks: Sequence[Mask]) -> bytes:
    """Masks as the kernel takes them: a byte for minus, and the key."""
    check_masks(masks)
    return b"".join(bytes([sign < 0]) + key for sign, key in masks)
