"""What batch arithmetic is: one interface, which portable.py and native.py implement.

A batch is a uint8 array whose last axis holds one number, little-endian; the other axes are
the batch. Everything speaks in whole batches, never in single numbers: so eight of them can
be computed on at once.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from dtl.core.errors import FormatError

STRAUS_WINDOW = 4
"""Bits of the sliding windows of Straus' method."""

MASKED_USES = 32
"""Up to so many powers, a native fixed-base table reads all of its entries for every digit.

That is the lattice cipher's key part. A vector of thousands of groups needs tables too large
to be read whole."""

Bytes = NDArray[np.uint8]
"""A batch of little-endian numbers, uint8 [..., width]."""


def to_integers(batch: Bytes) -> list[int]:
    """The batch as plain Python integers, in C order."""
    width = batch.shape[-1]
    data = np.ascontiguousarray(batch).tobytes()
    return [
        int.from_bytes(data[start : start + width], "little")
        for start in range(0, len(data), width)
    ]


def from_integers(numbers: Iterable[int], width: int) -> Bytes:
    """Plain Python integers as a batch [n, width]."""
    data = b"".join(number.to_bytes(width, "little") for number in numbers)
    return np.frombuffer(data, np.uint8).reshape(-1, width)


class FixedBaseTable(ABC):
    """Powers of fixed bases to many exponents, by Lim and Lee's comb (Crypto '94).

    The exponent's bits are laid out in `rows` rows of `columns`; one table entry covers a
    column, one bit a row. The columns are cut into blocks of `depth`, each with a table of
    its own, at the price of depth - 1 squarings a power.
    """

    def __init__(
        self,
        exponent_bits: int,
        uses: int,
        max_entries: int,
        squaring: float,
        reading: float = 0.0,
    ) -> None:
        self.exponent_bits = exponent_bits
        self.rows, self.depth = best_comb(exponent_bits, uses, max_entries, squaring, reading)
        self.columns = -(-exponent_bits // self.rows)
        self.blocks = -(-self.columns // self.depth)

    @abstractmethod
    def powers(self, exponents: Bytes, blocks: Bytes | None = None) -> Bytes:
        """Every base to every exponent: [G, exponent bytes] -> [G, bases, width].

        With blocks m [G, bases, block_width], each in [0, N), times (1 + m N). Raises
        ValueError for an exponent of more than exponent_bits.
        """


def best_comb(
    bits: int, uses: int, max_entries: int, squaring: float, reading: float = 0.0
) -> tuple[int, int]:
    """The (rows, depth) of the comb that is made and used in the least time.

    `squaring` is the time of a squaring in products; `reading` that of reading one entry, where
    all entries of a block are read for each digit.
    """
    best, choice = math.inf, (1, bits)
    for rows in range(1, 17):
        columns = -(-bits // rows)
        for depth in range(1, columns + 1):
            entries = -(-columns // depth) << rows
            if rows > 1 and entries > max_entries:
                continue
            products = (columns - 1) * (1 + reading * (1 << rows)) + squaring * (depth - 1)
            cost = entries + squaring * bits + uses * products
            if cost < best:
                best, choice = cost, (rows, depth)
    return choice


class Arithmetic(ABC):
    """Batch arithmetic modulo N^2, and on blocks modulo N.

    `width` is the bytes of a residue (2|N|/8), `block_width` those of a block (|N|/8). In a
    batch of *groups* [..., K, width] the first of the K residues is a number modulo N.

    Where `secret_bits` is not None, exponents are secret and below 2^secret_bits (ValueError
    otherwise). The native back end then takes steps, and reads memory, in an order that depends
    on that length only; gmpy2 does not.
    """

    def __init__(self, modulus: int) -> None:
        self.modulus = modulus
        self.block_width = modulus.bit_length() // 8
        self.width = 2 * self.block_width

    def check(self, residues: Bytes) -> None:
        """Raise FormatError unless all of [..., width] are in (0, N^2) and prime to N.

        The gcd is taken once, of the product of all modulo N (protocol, section 4).
        """
        product = self._product_in_range(residues)
        if product is None:
            raise FormatError("a residue is out of range")
        if math.gcd(product, self.modulus) != 1:
            raise FormatError("a residue has a factor in common with the modulus")

    def check_groups(self, groups: Bytes) -> None:
        """As `check`, of groups [..., K, width]; the first of each must be below N."""
        self.check(groups)
        if any(number >= self.modulus for number in to_integers(groups[..., 0, :])):
            raise FormatError("a residue is out of range")

    @abstractmethod
    def _product_in_range(self, residues: Bytes) -> int | None:
        """The product modulo N, up to a known unit; None if any is not in (0, N^2)."""

    @abstractmethod
    def product(self, batches: Sequence[Bytes]) -> Bytes:
        """Componentwise product of batches of one shape."""

    @abstractmethod
    def inverse(self, batch: Bytes) -> Bytes:
        """Componentwise inverse: one inversion for the whole batch (Montgomery's trick)."""

    def group_product(self, batches: Sequence[Bytes]) -> Bytes:
        """Componentwise product of groups [..., K, width]."""
        return self.reduce_groups(self.product(batches))

    def group_inverse(self, batch: Bytes) -> Bytes:
        """Componentwise inverse of groups [..., K, width]."""
        return self.reduce_groups(self.inverse(batch))

    def reduce_groups(self, batch: Bytes) -> Bytes:
        """Residues [..., K, width] with the first of each K reduced modulo N."""
        result = batch.copy()
        reduced = from_integers(
            (number % self.modulus for number in to_integers(batch[..., 0, :])), self.width
        )
        result[..., 0, :] = reduced.reshape(batch[..., 0, :].shape)
        return result

    @abstractmethod
    def add_blocks(self, residues: Bytes, blocks: Bytes) -> Bytes:
        """Multiply each residue c by (1 + m N) for its block m in [0, N)."""

    def subtract_blocks(self, residues: Bytes, blocks: Bytes) -> Bytes:
        """Multiply each residue by (1 + m N)^-1 = 1 + (N - m) N for its block m in [0, N)."""
        negated = from_integers(
            (-block % self.modulus for block in to_integers(blocks)), self.block_width
        )
        return self.add_blocks(residues, negated.reshape(blocks.shape))

    def lift(self, batch: Bytes) -> Bytes:
        """c^N for each c of [..., width]: it depends on c modulo N only."""
        flat = batch.reshape(-1, batch.shape[-1])
        return self.powers(flat, self.modulus, secret_bits=None).reshape(batch.shape)

    @abstractmethod
    def powers(self, bases: Bytes, exponent: int, *, secret_bits: int | None) -> Bytes:
        """Every base [n, width] to one exponent, which is not negative."""

    @abstractmethod
    def shared_base_powers(
        self, bases: Bytes, exponents: Sequence[int], *, secret_bits: int | None
    ) -> Bytes:
        """Raise every base to all exponents: [G, width] -> [G, len(exponents), width].

        The squarings of a base are shared between its exponents: Yao's method (SIAM J.
        Comput. 5, 1976) puts the powers base^(2^i) into buckets by the exponent's digits, and
        raises each bucket to its digit by running products.
        """

    @abstractmethod
    def weighted_products(self, batch: Bytes, weights: Bytes) -> Bytes:
        """prod over i of batch[i, k]^weights[i]: [G, K, width], [G, bytes] -> [K, width].

        The weights are public. For many bases, Pippenger's buckets: for every window of the
        weights' bits, each base goes into the bucket of its digit, and running products raise
        bucket d to the d. For few, Straus' method: odd powers of every base, sliding windows,
        and the squarings shared by all.
        """

    @abstractmethod
    def logarithms(self, residues: Bytes) -> tuple[Bytes, NDArray[np.bool_]]:
        """L(u) of each u of [..., width] that is 1 or -1 modulo N, and which are [...].

        Of u = -1 (mod N) the negative is taken (protocol, section 4). Where u is neither, the
        block is zero. All are computed, whatever the first ones are.
        """

    @abstractmethod
    def fixed_base_table(
        self, bases: Sequence[int], exponent_bits: int, uses: int, *, groups: bool = False
    ) -> FixedBaseTable:
        """A table for `uses` powers of each base; it sizes itself by them.

        The exponents are secret; the native back end protects them as said above where `uses`
        is at most MASKED_USES. With `groups` the powers of all bases to one exponent are a
        group: those of the first base are numbers modulo N.
        """


def check_length(exponents: Sequence[int], secret_bits: int | None) -> None:
    """Raise ValueError for an exponent of more than `secret_bits` bits, where that is given."""
    if secret_bits is not None and any(exponent >> secret_bits for exponent in exponents):
        raise ValueError(f"a secret exponent has more than {secret_bits} bits")


def best_window(count: int, bits: int) -> int:
    """The window with the fewest products for Pippenger's buckets over `count` bases.

    0 where Straus' method with windows of STRAUS_WINDOW bits takes fewer.
    """

    def products(window: int) -> int:
        return -(-bits // window) * (count + (2 << window))

    best = min(range(1, 16), key=products)
    odd_powers = 1 << (STRAUS_WINDOW - 1)
    straus = count * (odd_powers + bits // (STRAUS_WINDOW + 1))
    return 0 if straus < products(best) else best
