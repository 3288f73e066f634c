"""Section 10: the lattice body, in plain integers."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from math import prod

from tests.second.encoding import hashed, keystream, require, u32, u64

NOISE = 2**28
VALUE_BITS = 171
WORD_BITS = 50
Words = list[list[int]]  # of one polynomial: for each prime, its coefficients
Body = list[Words]


@dataclass(frozen=True)
class Ring:
    degree: int
    primes: tuple[int, ...]

    @property
    def q(self) -> int:
        return prod(self.primes)


FULL = Ring(8192, (1125899904679937, 1125899903991809, 1125899903827969, 1125899903795201))
SMALL = Ring(256, (985162417930241, 985162416979969, 985162416783361, 985162416455681))


@dataclass(frozen=True)
class Shape:
    """How a vector of `values` lies in polynomials, with slots of `slot_bits`."""

    ring: Ring
    slot_bits: int
    values: int

    @property
    def slots(self) -> int:
        """L."""
        return VALUE_BITS // self.slot_bits

    @property
    def polynomials(self) -> int:
        return -(-self.values // (self.ring.degree * self.slots))

    def coefficients(self, polynomial: int) -> int:
        """m."""
        if polynomial < self.polynomials - 1:
            return self.ring.degree
        rest = self.values - polynomial * self.ring.degree * self.slots
        return -(-rest // self.slots)

    @property
    def length(self) -> int:
        """Bytes of a body."""
        return 25 * sum(map(self.coefficients, range(self.polynomials)))


# --- transforms ---------------------------------------------------------------------------------


def _reversed_bits(number: int, size: int) -> int:
    return int(f"{number:0{size.bit_length() - 1}b}"[::-1], 2)


@cache
def root(degree: int, prime: int) -> int:
    """psi: the power of the least x that is a primitive 2 degree-th root of one."""
    powers = (pow(x, (prime - 1) // (2 * degree), prime) for x in range(2, prime))
    return next(psi for psi in powers if pow(psi, degree, prime) == prime - 1)


@cache
def _twiddles(degree: int, prime: int) -> list[int]:
    psi = root(degree, prime)
    return [pow(psi, _reversed_bits(k, degree), prime) for k in range(degree)]


def transform(coefficients: Sequence[int], prime: int) -> list[int]:
    """In NTT order: word k is the value at psi^(2 brv(k) + 1).

    X^2m - w^2 = (X^m - w)(X^m + w): the remainders by both, again and again.
    """
    found = [c % prime for c in coefficients]
    degree = len(found)
    twiddles, parts, half = _twiddles(degree, prime), 1, degree // 2
    while half:
        for part in range(parts):
            w = twiddles[parts + part]
            for at in range(2 * half * part, 2 * half * part + half):
                low, high = found[at], found[at + half] * w
                found[at], found[at + half] = (low + high) % prime, (low - high) % prime
        parts, half = 2 * parts, half // 2
    return found


def coefficients(words: Sequence[int], prime: int) -> list[int]:
    """The polynomial that has these values: the steps of `transform` backwards."""
    found = list(words)
    degree = len(found)
    twiddles, parts, half = _twiddles(degree, prime), degree // 2, 1
    while parts:
        for part in range(parts):
            w = pow(twiddles[parts + part], -1, prime)
            for at in range(2 * half * part, 2 * half * part + half):
                plus, minus = found[at], found[at + half]
                found[at], found[at + half] = plus + minus, (plus - minus) * w % prime
        parts, half = parts // 2, 2 * half
    scale = pow(degree, -1, prime)
    return [c * scale % prime for c in found]


# --- words and samples -------------------------------------------------------------------------


def _row(key: bytes, ring: Ring, polynomial: int, j: int, count: int) -> list[int]:
    """word(key, i, j, k, t) for k < count, of the least t for which it is below p_j."""
    prime, found, attempt = ring.primes[j - 1], [2**WORD_BITS] * count, 0
    while any(word >= prime for word in found):
        stream = keystream(key, u32(attempt) + u64(4 * polynomial + j - 1), 8 * count)
        words = [word % 2**WORD_BITS for word in struct.unpack(f"<{count}Q", stream)]
        found = [old if old < prime else new for old, new in zip(found, words, strict=True)]
        attempt += 1
    return found


def words(key: bytes, ring: Ring, polynomial: int, count: int) -> Words:
    return [_row(key, ring, polynomial, j, count) for j in (1, 2, 3, 4)]


def public_key(job: bytes) -> bytes:
    """k_A, from the job's digest."""
    return hashed("dtl/v2/public-polynomials", job)[:32]


@cache
def public(key: bytes, ring: Ring, polynomial: int) -> Words:
    """a_i in NTT order."""
    return words(key, ring, polynomial, ring.degree)


def sample(key: bytes, ring: Ring, polynomial: int | None = None) -> list[int]:
    """s under k_s; e_i under k_e."""
    nonce = bytes(12) if polynomial is None else u32(0) + u64(polynomial)
    stream = keystream(key, nonce, 16 * ring.degree)
    rows = (stream[at : at + 16] for at in range(0, len(stream), 16))
    return [int.from_bytes(row, "little").bit_count() - 64 for row in rows]


# --- bodies ------------------------------------------------------------------------------------


def read_body(raw: bytes, shape: Shape) -> Body:
    """The words; refused where one is not below its prime."""
    body, at = [], 0
    for polynomial in range(shape.polynomials):
        m = shape.coefficients(polynomial)
        high = raw[at + 24 * m : at + 25 * m]
        rows = []
        for j, prime in enumerate(shape.ring.primes):
            low = raw[at + 6 * m * j : at + 6 * m * (j + 1)]
            row = [
                int.from_bytes(low[6 * c : 6 * c + 6], "little") + (high[c] >> 2 * j) % 4 * 2**48
                for c in range(m)
            ]
            require(max(row) < prime, 3, "a word that is not below its prime")
            rows.append(row)
        body.append(rows)
        at += 25 * m
    return body


def write_body(body: Body) -> bytes:
    parts = []
    for rows in body:
        parts += [(word % 2**48).to_bytes(6, "little") for row in rows for word in row]
        parts += [
            bytes([sum((word >> 48) << 2 * j for j, word in enumerate(column))])
            for column in zip(*rows, strict=True)
        ]
    return b"".join(parts)


def combine(ring: Ring, left: Body, right: Body, sign: int = 1) -> Body:
    """left + sign right."""
    return [
        [
            [(x + sign * y) % prime for x, y in zip(one, other, strict=True)]
            for one, other, prime in zip(rows, others, ring.primes, strict=True)
        ]
        for rows, others in zip(left, right, strict=True)
    ]


def add(ring: Ring, bodies: Sequence[Body]) -> Body:
    return reduce(lambda left, right: combine(ring, left, right), bodies)


def mask(key: bytes, shape: Shape) -> Body:
    """F'(k', i) of all polynomials."""
    places = range(shape.polynomials)
    return [words(key, shape.ring, i, shape.coefficients(i)) for i in places]


def zero(shape: Shape) -> Body:
    sizes = map(shape.coefficients, range(shape.polynomials))
    return [[[0] * m for _ in shape.ring.primes] for m in sizes]


def encode_public(integers: Sequence[int], shape: Shape) -> Body:
    """Delta X."""
    body = []
    for polynomial in range(shape.polynomials):
        m = shape.coefficients(polynomial)
        first = polynomial * shape.ring.degree * shape.slots
        own = integers[first : first + m * shape.slots]
        packed = [
            NOISE * sum(e << shape.slot_bits * slot for slot, e in enumerate(own[c::m]))
            for c in range(m)
        ]
        body.append([[number % prime for number in packed] for prime in shape.ring.primes])
    return body


@dataclass
class Opened:
    integers: list[int]
    errors: list[list[int]]  # of each polynomial


def open_body(key: bytes, secret: Sequence[int], body: Body, shape: Shape) -> Opened:
    """v = body - a K, cut into errors and values; refused (4) where it cannot be cut.

    `secret` is the sum of secrets K. Nothing is said of the bounds.
    """
    ring = shape.ring
    transformed = [transform(secret, prime) for prime in ring.primes]
    integers: list[int] = []
    errors = []
    for polynomial, rows in enumerate(body):
        pads = []
        for a, s, prime in zip(
            public(key, ring, polynomial), transformed, ring.primes, strict=True
        ):
            products = [x * y % prime for x, y in zip(a, s, strict=True)]
            pads.append(coefficients(products, prime)[: len(rows[0])])
        bare = combine(ring, [rows], [pads], -1)[0]
        numbers = [_centred(_joined(ring, column), ring.q) for column in zip(*bare, strict=True)]
        noise = [(number + NOISE // 2) % NOISE - NOISE // 2 for number in numbers]
        values = [_digits((v - e) // NOISE, shape) for v, e in zip(numbers, noise, strict=True)]
        integers += [digits[slot] for slot in range(shape.slots) for digits in values]
        rest = integers[shape.values :]
        require(not any(rest), 4, "slots that are left over are not zero")
        errors.append(noise)
    return Opened(integers[: shape.values], errors)


@cache
def _basis(ring: Ring) -> list[int]:
    """Numbers modulo q that are 1 modulo one prime, and 0 modulo the others."""
    return [ring.q // p * pow(ring.q // p, -1, p) for p in ring.primes]


def _joined(ring: Ring, column: Sequence[int]) -> int:
    return sum(word * one for word, one in zip(column, _basis(ring), strict=True)) % ring.q


def _centred(number: int, modulus: int) -> int:
    return number if number <= modulus // 2 else number - modulus


def _digits(number: int, shape: Shape) -> list[int]:
    bits, half = shape.slot_bits, 2 ** (shape.slot_bits - 1)
    shifted = number + sum(half << bits * slot for slot in range(shape.slots))
    require(0 <= shifted < 2 ** (bits * shape.slots), 4, "something is above the slots")
    return [(shifted >> bits * slot) % 2**bits - half for slot in range(shape.slots)]
