"""Batch arithmetic with gmpy2: runs anywhere. The only module that knows gmpy2.

Not constant time: gmpy2 branches on its operands (see SECURITY.md).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TypeVar

import gmpy2
import numpy as np
from gmpy2 import mpz
from numpy.typing import NDArray

from dtl.core.crypto import arithmetic
from dtl.core.crypto.arithmetic import STRAUS_WINDOW, Bytes, best_window, check_length, to_integers
from dtl.core.errors import VerificationError

PRIMALITY_ROUNDS = 40
MAX_TABLE_BYTES = 56 << 20
"""Memory that one fixed-base table may take; every worker process has its own."""

_ENTRY_OVERHEAD = 176  # a tuple of two mpz objects and the list slot
_SQUARING = 0.8  # its time in products
_WINDOW = 4  # bits of the shared-base powers' digits
_POWER_WINDOW = 5  # bits of the digits of powers of one base
_PAIRS_FROM_BITS = 2560
"""From this length of N on, a power of one base is faster by pairs than by gmpy2.powmod: at
3072 bits by a sixth. At 2048 bits both are equal; at 512 bits pairs take three times as long."""

LIBRARY = f"gmpy2 {gmpy2.version()}, {gmpy2.mp_version()}"


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


# --- numbers modulo N^2 as pairs --------------------------------------------------------------

Pair = tuple[mpz, mpz]
"""(a, b) with a, b in [0, N), for a + b N: long chains of products are a fifth faster so than
with reductions of the full length (6.7 us against 8.6 at 3072 bits)."""

_T = TypeVar("_T")
_Product = Callable[[_T, _T, mpz], _T]

_ONE: Pair = (mpz(1), mpz(0))


def _multiply(x: Pair, y: Pair, n: mpz) -> Pair:
    (a, b), (c, d) = x, y
    carry, low = gmpy2.f_divmod(a * c, n)
    return low, (a * d + b * c + carry) % n


def _square(x: Pair, n: mpz) -> Pair:
    a, b = x
    carry, low = gmpy2.f_divmod(a * a, n)
    return low, (2 * a * b + carry) % n


def _multiply_short(x: mpz, y: mpz, n: mpz) -> mpz:
    """The same of numbers modulo N alone."""
    return x * y % n


def _square_short(x: mpz, n: mpz) -> mpz:
    return x * x % n


# --- arithmetic modulo N^2 -------------------------------------------------------------------


class Arithmetic(arithmetic.Arithmetic):
    """Batch arithmetic, number after number."""

    def __init__(self, modulus: int) -> None:
        super().__init__(modulus)
        self._n = mpz(modulus)
        self._n2 = self._n * self._n

    def _product_in_range(self, residues: Bytes) -> int | None:
        product = mpz(1)
        for number in _numbers(residues):
            if not 0 < number < self._n2:
                return None
            product = product * (number % self._n) % self._n
        return int(product)

    def product(self, batches: Sequence[Bytes]) -> Bytes:
        """Multiply and divide, number after number."""
        first, *others = batches
        result = _numbers(first)
        for batch in others:
            result = [a * b % self._n2 for a, b in zip(result, _numbers(batch), strict=True)]
        return _bytes(result, *self._shape(first))

    def inverse(self, batch: Bytes) -> Bytes:
        """Montgomery's trick; VerificationError where one is not invertible."""
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
        """By c (1 + m N) = c + N (c m mod N) modulo N^2: half the length of a full product."""
        n, n2 = self._n, self._n2
        result = (
            (c + n * (c % n * m % n)) % n2 if m else c % n2
            for c, m in zip(_numbers(residues), _numbers(blocks), strict=True)
        )
        return _bytes(result, *self._shape(residues))

    def group_product(self, batches: Sequence[Bytes]) -> Bytes:
        """As `product`; the first of each group is multiplied modulo N."""
        first, *others = batches
        if not others:
            return self.reduce_groups(first)
        result, columns = _numbers(first), first.shape[-2]
        moduli = [self._n, *[self._n2] * (columns - 1)] * (len(result) // columns)
        for batch in others:
            triples = zip(result, _numbers(batch), moduli, strict=True)
            result = [a * b % modulus for a, b, modulus in triples]
        return _bytes(result, *self._shape(first))

    def powers(self, bases: Bytes, exponent: int, *, secret_bits: int | None) -> Bytes:
        """One base after the other; of long numbers by pairs, with sliding windows."""
        check_length([exponent], secret_bits)
        shape, n = self._shape(bases), self._n
        if n.bit_length() < _PAIRS_FROM_BITS:
            short = (gmpy2.powmod(b, exponent, self._n2) for b in _numbers(bases))
            return _bytes(short, *shape)
        digits = _sliding(exponent, _POWER_WINDOW)
        powers = (self._number(_power(self._pair(b), digits, n)) for b in _numbers(bases))
        return _bytes(powers, *shape)

    def shared_base_powers(
        self, bases: Bytes, exponents: Sequence[int], *, secret_bits: int | None
    ) -> Bytes:
        """Yao's method with sliding windows: odd digits that begin at any bit."""
        check_length(exponents, secret_bits)
        digits = [_sliding(exponent, _WINDOW) for exponent in exponents]
        length = max((exponent.bit_length() for exponent in exponents), default=0)
        out: list[mpz] = []
        for base in _numbers(bases):
            powers = [self._pair(base)]
            for _ in range(length - 1):
                powers.append(_square(powers[-1], self._n))
            out += [self._number(self._bucket_power(powers, row)) for row in digits]
        return _bytes(out, self.width, len(bases), len(exponents))

    def _bucket_power(self, powers: list[Pair], digits: list[tuple[int, int]]) -> Pair:
        """The product of powers[i]^d over all (i, d): that of bucket[j]^(2j + 1).

        With the product S_j of the buckets from j on, it is S_0 (S_1 S_2 ...)^2.
        """
        n = self._n
        buckets: list[Pair | None] = [None] * (1 << (_WINDOW - 1))
        for index, digit in digits:
            held, value = buckets[digit // 2], powers[index]
            buckets[digit // 2] = value if held is None else _multiply(held, value, n)
        running: Pair | None = None
        doubled: Pair | None = None
        for j in reversed(range(len(buckets))):
            bucket = buckets[j]
            if bucket is not None:
                running = bucket if running is None else _multiply(running, bucket, n)
            if j and running is not None:
                doubled = running if doubled is None else _multiply(doubled, running, n)
        if running is None or doubled is None:
            return running or _ONE
        return _multiply(_square(doubled, n), running, n)

    def weighted_products(self, batch: Bytes, weights: Bytes) -> Bytes:
        """One component after the other."""
        count, columns = batch.shape[:2]
        window = best_window(count, 8 * weights.shape[-1])
        pairs = [self._pair(number) for number in _numbers(batch)]
        if not window:
            sliding = [_sliding(weight, STRAUS_WINDOW) for weight in to_integers(weights)]
            few = (_straus(pairs[c::columns], sliding, self._n) for c in range(columns))
            return _bytes(map(self._number, few), self.width, columns)
        digits = _windows(weights, window)
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

    def logarithms(self, residues: Bytes) -> tuple[Bytes, NDArray[np.bool_]]:
        """One division each: of -1 - m N, which is N - 1 + (N - 1 - m) N, it takes m."""
        n, minus = self._n, self._n - 1
        blocks, good = [], []
        for number in _numbers(residues):
            quotient, remainder = gmpy2.f_divmod(number, n)
            found = {1: quotient, minus: minus - quotient}.get(remainder)
            blocks.append(mpz(0) if found is None else found)
            good.append(found is not None)
        shape = residues.shape[:-1]
        return _bytes(blocks, self.block_width, *shape), np.array(good, np.bool_).reshape(shape)

    def fixed_base_table(
        self, bases: Sequence[int], exponent_bits: int, uses: int, *, groups: bool = False
    ) -> "FixedBaseTable":
        """A table of pairs within MAX_TABLE_BYTES."""
        return FixedBaseTable(self, bases, exponent_bits, uses, groups)

    def _pair(self, number: mpz) -> Pair:
        b, a = gmpy2.f_divmod(number, self._n)
        return a, b

    def _number(self, pair: Pair) -> mpz:
        return pair[0] + pair[1] * self._n

    def _shape(self, batch: Bytes) -> tuple[int, ...]:
        return (self.width, *batch.shape[:-1])


def _straus(bases: Sequence[Pair], digits: Sequence[list[tuple[int, int]]], n: mpz) -> Pair:
    """The product of all bases to the exponents of which `digits` are the sliding windows."""
    due: dict[int, list[Pair]] = {}
    for base, row in zip(bases, digits, strict=True):
        odd = _odd_powers(base, row, n)
        for index, digit in row:
            due.setdefault(index, []).append(odd[digit // 2])
    result: Pair | None = None
    for index in range(max(due, default=-1), -1, -1):
        if result is not None:
            result = _square(result, n)
        for power in due.get(index, ()):
            result = power if result is None else _multiply(result, power, n)
    return _ONE if result is None else result


def _odd_powers(base: Pair, digits: list[tuple[int, int]], n: mpz) -> list[Pair]:
    """base, base^3, base^5, ... up to the greatest digit."""
    most, odd = max((digit for _, digit in digits), default=1), [base]
    if most > 1:
        square = _square(base, n)
        for _ in range(most // 2):
            odd.append(_multiply(odd[-1], square, n))
    return odd


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


class FixedBaseTable(arithmetic.FixedBaseTable):
    """A comb for each base, of pairs."""

    def __init__(
        self,
        owner: Arithmetic,
        bases: Sequence[int],
        exponent_bits: int,
        uses: int,
        groups: bool,
    ) -> None:
        limit = MAX_TABLE_BYTES // ((owner.width + _ENTRY_OVERHEAD) * len(bases))
        super().__init__(exponent_bits, uses, limit, _SQUARING)
        self._arithmetic = owner
        self._n = owner._n
        pairs = [owner._pair(mpz(base)) for base in bases]
        self._short: list[list[mpz]] | None = None
        if groups:  # powers of the first base are wanted modulo N only
            self._short = self._comb(pairs.pop(0)[0], mpz(1), _multiply_short, _square_short)
        self._tables = [self._comb(pair, _ONE, _multiply, _square) for pair in pairs]

    def _comb(
        self, base: _T, one: _T, multiply: _Product[_T], square: Callable[[_T, mpz], _T]
    ) -> list[list[_T]]:
        n = self._n
        chain = [base]  # base^(2^i)
        for _ in range(self.rows * self.columns - 1):
            chain.append(square(chain[-1], n))
        tables = []
        for block in range(self.blocks):
            entries = [one]
            for row in range(self.rows):
                factor = chain[row * self.columns + block * self.depth]
                entries.append(factor)
                entries += [multiply(entry, factor, n) for entry in entries[1 : 1 << row]]
            tables.append(entries)
        return tables

    def powers(self, exponents: Bytes, blocks: Bytes | None = None) -> Bytes:
        """One power after the other."""
        n, number = self._n, self._arithmetic._number
        out: list[mpz] = []
        for schedule in self._schedules(exponents):
            if self._short is not None:
                short = _look_up(self._short, schedule, _multiply_short, _square_short, n)
                out.append(mpz(1) if short is None else short)
            for tables in self._tables:
                power = _look_up(tables, schedule, _multiply, _square, n)
                out.append(number(_ONE if power is None else power))
        shape = (len(exponents), len(self._tables) + (self._short is not None))
        powers = _bytes(out, self._arithmetic.width, *shape)
        return powers if blocks is None else self._arithmetic.add_blocks(powers, blocks)

    def _schedules(self, exponents: Bytes) -> Iterator[list[list[int]]]:
        """The comb digits of each exponent, as depth steps of one digit for each block."""
        bits = np.unpackbits(exponents, axis=-1, bitorder="little")
        if bits[:, self.exponent_bits :].any():
            raise ValueError("an exponent is longer than the table")
        bits = bits[:, : self.exponent_bits]
        padded = np.zeros((len(bits), self.rows, self.blocks * self.depth), np.int64)
        comb = np.zeros((len(bits), self.rows * self.columns), np.int64)
        comb[:, : bits.shape[1]] = bits
        padded[:, :, : self.columns] = comb.reshape(len(bits), self.rows, self.columns)
        digits = np.tensordot(padded, 1 << np.arange(self.rows), axes=(1, 0))
        steps = digits.reshape(len(bits), self.blocks, self.depth)[:, :, ::-1]
        yield from steps.transpose(0, 2, 1).tolist()


def _look_up(
    tables: list[list[_T]],
    schedule: list[list[int]],
    multiply: _Product[_T],
    square: Callable[[_T, mpz], _T],
    n: mpz,
) -> _T | None:
    """One power from a comb; None for the exponent zero."""
    result: _T | None = None
    for digits in schedule:
        if result is not None:
            result = square(result, n)
        for table, digit in zip(tables, digits, strict=True):
            if digit:
                entry = table[digit]
                result = entry if result is None else multiply(result, entry, n)
    return result


def _power(base: Pair, digits: list[tuple[int, int]], n: mpz) -> Pair:
    """base to the sum of all d 2^i, for (i, d) as `_sliding` gives them."""
    if not digits:
        return _ONE
    odd = _odd_powers(base, digits, n)
    last, top = digits[-1]
    result = odd[top // 2]
    for index, digit in reversed(digits[:-1]):
        for _ in range(last - index):
            result = _square(result, n)
        result, last = _multiply(result, odd[digit // 2], n), index
    for _ in range(last):
        result = _square(result, n)
    return result


def _sliding(exponent: int, window: int) -> list[tuple[int, int]]:
    """(i, d): the exponent is the sum of all d 2^i, each d odd and below 2^window."""
    found, index = [], 0
    while exponent >> index:
        digit = exponent >> index & (1 << window) - 1
        if digit % 2:
            found.append((index, digit))
        index += window if digit % 2 else 1
    return found


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
