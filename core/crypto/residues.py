"""Batch arithmetic on residues: arrays of little-endian bytes in, arrays out.

The only module that knows gmpy2. Everything above speaks in whole batches, so that a
native kernel can be put underneath. A batch is a uint8 array whose last axis holds one
number, little-endian; the other axes are the batch.

Not constant time: gmpy2 branches on its operands (see the limits in README.md).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import gmpy2
import numpy as np
from gmpy2 import mpz
from numpy.typing import NDArray

from dtl.core.errors import FormatError, VerificationError

Bytes = NDArray[np.uint8]
"""A batch of little-endian numbers, uint8 [..., width]."""

PRIMALITY_ROUNDS = 40
MAX_TABLE_BYTES = 56 << 20
"""Memory that one fixed-base table may take."""

_ENTRY_OVERHEAD = 176  # a tuple of two mpz objects and the list slot
_BUCKET_BITS = 4  # digits of the shared-base powers; 3 and 4 cost the same, 5 more


# --- single numbers: key generation and checks ---------------------------------------------


def is_prime(candidate: int) -> bool:
    """Baillie-PSW and further Miller-Rabin rounds: wrong with probability below 2^-80."""
    return bool(gmpy2.is_prime(mpz(candidate), PRIMALITY_ROUNDS))


def power(base: int, exponent: int, modulus: int) -> int:
    """Return base^exponent mod modulus; a negative exponent inverts."""
    return int(gmpy2.powmod(mpz(base), mpz(exponent), mpz(modulus)))


def remainders(value: int, moduli: Sequence[int]) -> list[int]:
    """Remainders of one large number by many small ones."""
    dividend = mpz(value)
    return [int(dividend % modulus) for modulus in moduli]


# --- conversions ---------------------------------------------------------------------------


def _numbers(batch: Bytes) -> list[mpz]:
    width = batch.shape[-1]
    data = np.ascontiguousarray(batch).tobytes()
    return [
        mpz.from_bytes(data[start : start + width], "little")
        for start in range(0, len(data), width)
    ]


def _bytes(numbers: Iterable[mpz], width: int, *shape: int) -> Bytes:
    data = b"".join(number.to_bytes(width, "little") for number in numbers)
    return np.frombuffer(data, np.uint8).reshape(*shape, width)


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


# --- numbers modulo N^2 as pairs --------------------------------------------------------------

Pair = tuple[mpz, mpz]
"""(a, b) with a, b in [0, N), for a + b N: long chains of products are a fifth faster so than
with reductions of the full length (6.7 us against 8.6 at 3072 bits)."""

_ONE: Pair = (mpz(1), mpz(0))


def _multiply(x: Pair, y: Pair, n: mpz) -> Pair:
    (a, b), (c, d) = x, y
    carry, low = gmpy2.f_divmod(a * c, n)
    return low, (a * d + b * c + carry) % n


def _square(x: Pair, n: mpz) -> Pair:
    a, b = x
    carry, low = gmpy2.f_divmod(a * a, n)
    return low, (2 * a * b + carry) % n


# --- arithmetic modulo N^2 -------------------------------------------------------------------


class Arithmetic:
    """Batch arithmetic modulo N^2, and on blocks modulo N.

    `width` is the bytes of a residue (2|N|/8), `block_width` those of a block (|N|/8).
    """

    def __init__(self, modulus: int) -> None:
        self._n = mpz(modulus)
        self._n2 = self._n * self._n
        self.block_width = modulus.bit_length() // 8
        self.width = 2 * self.block_width

    def check(self, residues: Bytes) -> None:
        """Raise FormatError unless all of [..., width] are in (0, N^2) and prime to N.

        The gcd is taken once, of the product of all modulo N (protocol, section 4).
        """
        product = mpz(1)
        for number in _numbers(residues):
            if not 0 < number < self._n2:
                raise FormatError("a residue is out of range")
            product = product * (number % self._n) % self._n
        if gmpy2.gcd(product, self._n) != 1:
            raise FormatError("a residue has a factor in common with the modulus")

    def product(self, batches: Sequence[Bytes]) -> Bytes:
        """Componentwise product of batches of one shape."""
        first, *others = batches
        result = _numbers(first)
        for batch in others:
            result = [a * b % self._n2 for a, b in zip(result, _numbers(batch), strict=True)]
        return _bytes(result, *self._shape(first))

    def inverse(self, batch: Bytes) -> Bytes:
        """Componentwise inverse: one inversion for the whole batch (Montgomery's trick)."""
        numbers = _numbers(batch)
        running, prefixes = mpz(1), []
        for number in numbers:
            prefixes.append(running)
            running = running * number % self._n2
        try:
            running = gmpy2.invert(running, self._n2)
        except ZeroDivisionError:
            raise VerificationError("a residue is not invertible") from None
        inverses = [mpz(0)] * len(numbers)
        for index in reversed(range(len(numbers))):
            inverses[index] = running * prefixes[index] % self._n2
            running = running * numbers[index] % self._n2
        return _bytes(inverses, *self._shape(batch))

    def add_blocks(self, residues: Bytes, blocks: Bytes) -> Bytes:
        """Multiply each residue c by (1 + m N) for its block m in [0, N).

        c (1 + m N) = c + N (c m mod N) modulo N^2: half the length of a full product.
        """
        n, n2 = self._n, self._n2
        result = (
            (c + n * (c % n * m % n)) % n2
            for c, m in zip(_numbers(residues), _numbers(blocks), strict=True)
        )
        return _bytes(result, *self._shape(residues))

    def subtract_blocks(self, residues: Bytes, blocks: Bytes) -> Bytes:
        """Multiply each residue by (1 + m N)^-1 = 1 + (N - m) N for its block m in [0, N)."""
        negated = _bytes(
            (-m % self._n for m in _numbers(blocks)), self.block_width, *blocks.shape[:-1]
        )
        return self.add_blocks(residues, negated)

    def shared_base_powers(self, bases: Bytes, exponents: Sequence[int]) -> Bytes:
        """Raise every base to all exponents: [G, width] -> [G, len(exponents), width].

        The squarings of a base are shared between its exponents: Yao's method (SIAM J.
        Comput. 5, 1976) puts each power base^(2^(4i)) into the bucket of the exponent's
        i-th digit and multiplies bucket d in d times by running products.
        """
        digits = [_digits(exponent, _BUCKET_BITS) for exponent in exponents]
        length = max(map(len, digits), default=0)
        out: list[mpz] = []
        for base in _numbers(bases):
            value = self._pair(base)
            powers = [value]
            for _ in range(length - 1):
                for _ in range(_BUCKET_BITS):
                    value = _square(value, self._n)
                powers.append(value)
            out += [self._number(self._bucket_power(powers, row)) for row in digits]
        return _bytes(out, self.width, len(bases), len(exponents))

    def _bucket_power(self, powers: list[Pair], digits: list[int]) -> Pair:
        n = self._n
        buckets: list[Pair | None] = [None] * (1 << _BUCKET_BITS)
        for value, digit in zip(powers, digits, strict=False):
            if digit:
                held = buckets[digit]
                buckets[digit] = value if held is None else _multiply(held, value, n)
        return _running_products(buckets, n)

    def weighted_products(self, batch: Bytes, weights: Bytes) -> Bytes:
        """prod over i of batch[i, k]^weights[i]: [G, K, width], [G, bytes] -> [K, width].

        Pippenger's buckets: for every window of the weights' bits, each base goes into the
        bucket of its digit, and running products raise bucket d to the d.
        """
        count, columns = batch.shape[:2]
        bits = 8 * weights.shape[-1]
        window = min(range(1, 16), key=lambda w: -(-bits // w) * (count + (2 << w)))
        digits = _windows(weights, window)
        pairs = [self._pair(number) for number in _numbers(batch)]
        out = [
            self._number(self._bucket_product(pairs[column::columns], digits, window))
            for column in range(columns)
        ]
        return _bytes(out, self.width, columns)

    def _bucket_product(self, bases: list[Pair], digits: list[list[int]], window: int) -> Pair:
        n = self._n
        result: Pair | None = None
        for row in digits:
            if result is not None:
                for _ in range(window):
                    result = _square(result, n)
            buckets: list[Pair | None] = [None] * (1 << window)
            for base, digit in zip(bases, row, strict=True):
                if digit:
                    held = buckets[digit]
                    buckets[digit] = base if held is None else _multiply(held, base, n)
            product = _running_products(buckets, n)
            result = product if result is None else _multiply(result, product, n)
        return _ONE if result is None else result

    def logarithms(self, residues: Bytes) -> Bytes:
        """L(u) of residues that must be 1 or -1 modulo N: [..., width] -> [..., block_width].

        Of u = -1 (mod N) the negative is taken (protocol, section 4). Anything else means a
        wrong key or a damaged file: VerificationError.
        """
        n, n2 = self._n, self._n2
        blocks: list[mpz] = []
        for number in _numbers(residues):
            quotient, remainder = gmpy2.f_divmod(number, n)
            if remainder == n - 1:
                quotient, remainder = gmpy2.f_divmod(n2 - number, n)
            if remainder != 1:
                raise VerificationError(
                    "a block does not open",
                    "the key does not belong to this ciphertext, or the ciphertext was damaged",
                )
            blocks.append(quotient)
        return _bytes(blocks, self.block_width, *residues.shape[:-1])

    def _pair(self, number: mpz) -> Pair:
        b, a = gmpy2.f_divmod(number, self._n)
        return a, b

    def _number(self, pair: Pair) -> mpz:
        return pair[0] + pair[1] * self._n

    def _shape(self, batch: Bytes) -> tuple[int, ...]:
        return (self.width, *batch.shape[:-1])


def _running_products(buckets: Sequence[Pair | None], n: mpz) -> Pair:
    """The product of bucket[d]^d over all d > 0, by running products."""
    running: Pair | None = None
    result: Pair | None = None
    for bucket in reversed(buckets[1:]):
        if bucket is not None:
            running = bucket if running is None else _multiply(running, bucket, n)
        if running is not None:
            result = running if result is None else _multiply(result, running, n)
    return _ONE if result is None else result


class FixedBaseTable:
    """Powers of fixed bases to many exponents, by Lim and Lee's comb (Crypto '94).

    The exponent's bits are laid out in `rows` rows of `columns`; one table entry covers a
    column, one bit a row. The columns are cut into blocks of `depth`, each with a table of
    its own, at the price of depth - 1 squarings a power. `uses` powers of each base are
    expected: rows and depth are chosen for the fewest multiplications, within
    MAX_TABLE_BYTES.
    """

    def __init__(
        self, arithmetic: Arithmetic, bases: Sequence[int], exponent_bits: int, uses: int
    ) -> None:
        self._arithmetic = arithmetic
        self._n = arithmetic._n
        self._bases = len(bases)
        self._bits = exponent_bits
        entry_bytes = arithmetic.width + _ENTRY_OVERHEAD
        limit = MAX_TABLE_BYTES // (entry_bytes * self._bases)
        self.rows, self.depth = _best_comb(exponent_bits, uses, limit)
        self._columns = -(-exponent_bits // self.rows)
        self._blocks = -(-self._columns // self.depth)
        self._tables = [self._comb(arithmetic._pair(mpz(base))) for base in bases]

    def _comb(self, base: Pair) -> list[list[Pair]]:
        n = self._n
        chain = [base]  # base^(2^i)
        for _ in range(self.rows * self._columns - 1):
            chain.append(_square(chain[-1], n))
        tables = []
        for block in range(self._blocks):
            entries = [_ONE]
            for row in range(self.rows):
                factor = chain[row * self._columns + block * self.depth]
                entries.append(factor)
                entries += [_multiply(entry, factor, n) for entry in entries[1 : 1 << row]]
            tables.append(entries)
        return tables

    def powers(self, exponents: Bytes) -> Bytes:
        """Every base to every exponent: [G, exponent bytes] -> [G, bases, width].

        Exponents must be below 2^exponent_bits.
        """
        n, number = self._n, self._arithmetic._number
        out: list[mpz] = []
        for schedule in self._schedules(exponents):
            for tables in self._tables:
                result: Pair | None = None
                for digits in schedule:
                    if result is not None:
                        result = _square(result, n)
                    for table, digit in zip(tables, digits, strict=True):
                        if digit:
                            entry = table[digit]
                            result = entry if result is None else _multiply(result, entry, n)
                out.append(number(_ONE if result is None else result))
        return _bytes(out, self._arithmetic.width, len(exponents), self._bases)

    def _schedules(self, exponents: Bytes) -> Iterator[list[list[int]]]:
        """The comb digits of each exponent, as depth steps of one digit for each block."""
        bits = np.unpackbits(exponents, axis=-1, bitorder="little")
        if bits[:, self._bits :].any():
            raise ValueError("an exponent is longer than the table")
        bits = bits[:, : self._bits]
        padded = np.zeros((len(bits), self.rows, self._blocks * self.depth), np.int64)
        comb = np.zeros((len(bits), self.rows * self._columns), np.int64)
        comb[:, : bits.shape[1]] = bits
        padded[:, :, : self._columns] = comb.reshape(len(bits), self.rows, self._columns)
        digits = np.tensordot(padded, 1 << np.arange(self.rows), axes=(1, 0))
        steps = digits.reshape(len(bits), self._blocks, self.depth)[:, :, ::-1]
        yield from steps.transpose(0, 2, 1).tolist()


def _best_comb(bits: int, uses: int, max_entries: int) -> tuple[int, int]:
    """The (rows, depth) of a comb with the fewest multiplications for `uses` powers."""
    best, choice = math.inf, (1, bits)
    for rows in range(1, 17):
        columns = -(-bits // rows)
        for depth in range(1, columns + 1):
            entries = -(-columns // depth) << rows
            if rows > 1 and entries > max_entries:
                continue
            cost = entries + bits + uses * (columns + depth - 2)
            if cost < best:
                best, choice = cost, (rows, depth)
    return choice


def _digits(exponent: int, bits: int) -> list[int]:
    mask = (1 << bits) - 1
    return [(exponent >> shift) & mask for shift in range(0, exponent.bit_length(), bits)]


def _windows(exponents: Bytes, window: int) -> list[list[int]]:
    """The digits of exponents [G, bytes] in base 2^window: a list a window, highest first."""
    bits = np.unpackbits(exponents, axis=-1, bitorder="little")
    rows = -(-bits.shape[1] // window)
    padded = np.zeros((len(bits), rows * window), np.int64)
    padded[:, : bits.shape[1]] = bits
    digits = padded.reshape(len(bits), rows, window) @ (1 << np.arange(window))
    return [row.tolist() for row in digits.T[::-1]]


class PaillierArithmetic:
    """Opening with the factors of N: Paillier decryption by CRT (Eurocrypt '99, section 7)."""

    def __init__(self, p: int, q: int) -> None:
        self._p, self._q = mpz(p), mpz(q)
        self._n = self._p * self._q
        self.block_width = int(self._n.bit_length()) // 8

    @cached_property
    def _constants(self) -> tuple[mpz, mpz, mpz]:
        p, q = self._p, self._q
        # L_p((1 + N)^(p - 1)) = (p - 1) q = -q (mod p), and likewise for q.
        return gmpy2.invert(-q % p, p), gmpy2.invert(-p % q, q), gmpy2.invert(p, q)

    def open(self, residues: Bytes) -> Bytes:
        """Blocks [..., block_width] of residues [..., width], each opened on its own."""
        p, q = self._p, self._q
        inverse_p, inverse_q, p_in_q = self._constants
        blocks = []
        for number in _numbers(residues):
            m_p = (gmpy2.powmod(number, p - 1, p * p) - 1) // p * inverse_p % p
            m_q = (gmpy2.powmod(number, q - 1, q * q) - 1) // q * inverse_q % q
            blocks.append(m_p + p * ((m_q - m_p) * p_in_q % q))
        return _bytes(blocks, self.block_width, *residues.shape[:-1])
