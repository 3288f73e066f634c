"""Batch arithmetic with the native kernel: eight numbers at a time (see README.md).

The only module that knows `_kernel`. Arrays go in and come out as they are; the kernel
releases the GIL, so several threads may use one instance.
"""

import threading
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dtl.core.crypto import arithmetic, portable
from dtl.core.crypto.arithmetic import (
    MASKED_USES,
    Bytes,
    best_window,
    check_length,
    from_integers,
    to_integers,
)

try:
    from dtl.core.crypto import _kernel
except ImportError:  # it is optional: no compiler, or built for another interpreter
    _missing: str | None = "it was not built when dtl was installed, or does not load"
else:
    _missing = _kernel.unavailable()

MAX_TABLE_BYTES = 192 << 20
"""Memory that one fixed-base table may take; all threads share it."""

_LANES = 8
_SQUARING = 0.7  # its time in products
_READING = 0.01  # the time of reading a table entry under a mask


def unavailable() -> str | None:
    """Why the kernel cannot be used here; None where it can."""
    return _missing


def supports(modulus: int) -> bool:
    """Whether the kernel takes this modulus: odd, 256 to 8192 bits, whole bytes."""
    bits = modulus.bit_length()
    in_range = _kernel.MIN_WIDTH <= bits // 8 <= _kernel.MAX_WIDTH
    return modulus % 2 == 1 and bits % 8 == 0 and in_range


class Arithmetic(arithmetic.Arithmetic):
    """Batch arithmetic, eight numbers at a time. Raises ValueError for wrong shapes."""

    def __init__(self, modulus: int) -> None:
        super().__init__(modulus)
        self._radix = 1 << _kernel.radix_bits(self.block_width)
        complement = from_integers([(1 - self._radix) % modulus], self.block_width)
        n = from_integers([modulus], self.block_width)
        self._kernel = _kernel.Modulus(n, complement, self._radix_power(3))

    def _radix_power(self, exponent: int) -> Bytes:
        """R^exponent mod N^2 as the two halves of a pair."""
        n = self.modulus
        b, a = divmod(pow(self._radix, exponent, n * n), n)
        return from_integers([a, b], self.block_width)

    def _contiguous(self, batch: Bytes, width: int) -> Bytes:
        if batch.dtype != np.uint8 or batch.shape[-1:] != (width,):
            raise ValueError(f"expected bytes [..., {width}], found {batch.dtype} {batch.shape}")
        return np.ascontiguousarray(batch)

    def _residues(self, batch: Bytes) -> Bytes:
        return self._contiguous(batch, self.width)

    def _product_in_range(self, residues: Bytes) -> int | None:
        if residues[..., self.width :].any():
            return None
        products = np.empty((_LANES, self.block_width), np.uint8)
        if not self._kernel.check(self._residues(residues[..., : self.width]), products):
            return None
        product = 1
        for factor in to_integers(products):
            product = product * factor % self.modulus
        return product

    def product(self, batches: Sequence[Bytes]) -> Bytes:
        """All operands of eight products at a time, in the kernel's own form."""
        return self._multiply(batches, 0)

    def group_product(self, batches: Sequence[Bytes]) -> Bytes:
        """As `product`; the first of each group is written modulo N."""
        return self._multiply(batches, batches[0].shape[-2])

    def _multiply(self, batches: Sequence[Bytes], columns: int) -> Bytes:
        out = np.empty(batches[0].shape, np.uint8)
        if any(batch.shape != out.shape for batch in batches):
            raise ValueError("batches of one shape are multiplied")
        operands = tuple(self._residues(batch) for batch in batches)
        self._kernel.product(operands, columns, self._product_scale(len(operands)), out)
        return out

    @cache  # noqa: B019  (an instance lives as long as its job)
    def _product_scale(self, operands: int) -> Bytes:
        return self._radix_power(2 * operands)

    def inverse(self, batch: Bytes) -> Bytes:
        """Montgomery's trick in eight lanes; what remains of them, gmpy2 inverts."""
        residues = self._residues(batch)
        out = np.empty(residues.shape, np.uint8)
        if out.size == 0:
            return out
        steps = -(-out.size // (self.width * _LANES))
        prefixes = np.empty((steps, self._kernel.element_bytes()), np.uint8)
        totals = np.empty((_LANES, self.width), np.uint8)
        self._kernel.running(residues, prefixes, totals)
        inverses = portable.Arithmetic(self.modulus).inverse(totals)
        scaled = (value * self._radix % self.modulus**2 for value in to_integers(inverses))
        self._kernel.unwind(residues, prefixes, from_integers(scaled, self.width), out)
        return out

    def add_blocks(self, residues: Bytes, blocks: Bytes) -> Bytes:
        """Into Montgomery form; the block is multiplied in on the way out of it."""
        out = np.empty(residues.shape, np.uint8)
        self._kernel.add_blocks(
            self._residues(residues), self._contiguous(blocks, self.block_width), out
        )
        return out

    def powers(self, bases: Bytes, exponent: int, *, secret_bits: int | None) -> Bytes:
        """The powers of eight bases at a time."""
        powers = self.shared_base_powers(bases, [exponent], secret_bits=secret_bits)
        return powers.reshape(bases.shape)

    def shared_base_powers(
        self, bases: Bytes, exponents: Sequence[int], *, secret_bits: int | None
    ) -> Bytes:
        """Yao's method, eight bases at a time.

        Public exponents have sliding windows; secret ones have digits at fixed places, and every
        bucket is read and written for every digit.
        """
        check_length(exponents, secret_bits)
        out = np.empty((len(bases), len(exponents), self.width), np.uint8)
        if out.size and secret_bits:
            width = -(-secret_bits // 8)
            packed = from_integers(exponents, width)
            self._kernel.secret_powers(self._residues(bases), packed, width, secret_bits, out)
        elif out.size:
            width = -(-max(exponent.bit_length() for exponent in exponents) // 8) or 1
            packed = from_integers(exponents, width)
            self._kernel.shared_base_powers(self._residues(bases), packed, width, out)
        return out

    def weighted_products(self, batch: Bytes, weights: Bytes) -> Bytes:
        """Eight components at a time."""
        count, columns = batch.shape[:2]
        width = weights.shape[-1]
        out = np.empty((columns, self.width), np.uint8)
        self._kernel.weighted_products(
            self._residues(batch),
            self._contiguous(weights, width),
            width,
            best_window(count, 8 * width),
            out,
        )
        return out

    def logarithms(self, residues: Bytes) -> tuple[Bytes, NDArray[np.bool_]]:
        """Eight at a time, all of them."""
        shape = residues.shape[:-1]
        out, good = np.empty((*shape, self.block_width), np.uint8), np.empty(shape, np.bool_)
        self._kernel.logarithms(self._residues(residues), out, good.view(np.uint8))
        return out, good

    def fixed_base_table(
        self, bases: Sequence[int], exponent_bits: int, uses: int, *, groups: bool = False
    ) -> "FixedBaseTable":
        """A table of up to eight bases, within MAX_TABLE_BYTES."""
        entries = MAX_TABLE_BYTES // self._kernel.element_bytes()
        packed = from_integers(bases, self.width)
        return FixedBaseTable(self._kernel, packed, exponent_bits, uses, entries, groups)


class FixedBaseTable(arithmetic.FixedBaseTable):
    """One comb whose entries hold all bases, one a lane.

    It is filled when it is first used: every thread that needs it fills the blocks that no
    other has begun.
    """

    def __init__(
        self,
        modulus: "_kernel.Modulus",
        bases: Bytes,
        exponent_bits: int,
        uses: int,
        max_entries: int,
        groups: bool,
    ) -> None:
        self._masked = uses <= MASKED_USES
        reading = _READING if self._masked else 0.0
        super().__init__(exponent_bits, uses, max_entries, _SQUARING, reading)
        self._shape = bases.shape
        self._table = modulus.table(bases, self.rows, self.columns, self.depth, groups)
        self._empty = list(range(self.blocks))
        self._unfilled = self.blocks
        self._changed = threading.Condition()

    def powers(self, exponents: Bytes, blocks: Bytes | None = None) -> Bytes:
        """Eight powers at a time, of one exponent."""
        self._fill()
        out = np.empty((len(exponents), *self._shape), np.uint8)
        if blocks is not None:
            blocks = np.ascontiguousarray(blocks)
        packed, width = np.ascontiguousarray(exponents), exponents.shape[-1]
        self._table.powers(packed, width, blocks, self._masked, out)
        return out

    def _fill(self) -> None:
        while self._unfilled:
            try:
                block = self._empty.pop()
            except IndexError:  # others are at the last ones
                with self._changed:
                    self._changed.wait_for(lambda: self._empty or not self._unfilled)
                continue
            try:
                self._table.fill(block)
            except MemoryError:
                self._empty.append(block)
                raise
            else:
                with self._changed:
                    self._unfilled -= 1
            finally:
                with self._changed:
                    self._changed.notify_all()
