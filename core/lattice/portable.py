"""The lattice body with numpy alone, for where nothing was compiled (see crypto/README.md).

Words are int64 of any sign, somewhere below 2^53, and congruent to what they stand for; they
are made canonical only where they leave. Two exact tricks carry everything:

* Products modulo p: the quotient comes from float64, the remainder from int64 that wraps
  around. With |a| <= K p and w in [0, p) the result is below (1 + K/4) p in size, or
  (1 + 3K/8) p where K p > 2^53.
* Sums of products of 25-bit parts stay below 2^53, so that a matrix product of float64 is
  exact in whatever order it is computed.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from itertools import count as count_up

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from dtl.core.crypto.primitives import keystream
from dtl.core.lattice import arithmetic
from dtl.core.lattice.arithmetic import (
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
    check_keys,
    check_masks,
    check_secret,
    check_small,
    out_of_range,
    polynomials_of,
    vector,
)
from dtl.core.lattice.parameters import (
    BOUND,
    COEFFICIENT_BYTES,
    NOISE_BITS,
    WORD_BITS,
    Ring,
    Shape,
    reversed_bits,
)

_Float = NDArray[np.float64]

_PRIMES = 4
_PART = 25  # bits of the parts of exact matrix products
_PART_MASK = (1 << _PART) - 1
_WORD_MASK = (1 << WORD_BITS) - 1
_LOW_BYTES = 6
_LOW_BITS = 8 * _LOW_BYTES
_FAR = 2.0**60  # as in encoding/fixed_point.py
_LAZY_SUMS = 1 << 11  # words below 2^51 that int64 adds up without a reduction
_LEAST_RUN = 512  # elements of the shortest inner loop of a butterfly
_NOISE_BYTES = 4
_BLAS_SIZE = 1 << 17  # multiply-adds that no BLAS divides among threads


def _keystream(key: bytes, nonce: bytes, length: int) -> NDArray[np.uint8]:
    """The first bytes of ChaCha20 under `key` with a nonce of 12 bytes, counter from zero."""
    encryptor = Cipher(ChaCha20(key, bytes(4) + nonce), None).encryptor()
    return np.frombuffer(encryptor.update(bytes(length)), np.uint8)


class _Prime:
    """Arithmetic and transforms modulo one of the primes."""

    def __init__(self, n: int, prime: int, root: int) -> None:
        self.n, self.p, self.inverse_p = n, prime, 1 / prime
        order = reversed_bits(n)
        powers = _powers(root, n, prime)
        inverses = _powers(pow(root, -1, prime), n, prime)
        self._forward = self._stages([powers[k] for k in order])
        self._inverse = self._stages([inverses[k] for k in order])
        self.by_n = pow(n, -1, prime)

    def _stages(self, twiddles: list[int]) -> list[tuple[Integers, _Float]]:
        """The factors of stages with 1, 2, 4, ... blocks, repeated to a run worth a loop."""
        stages = []
        half = 1
        while half < self.n:
            exact = np.array(twiddles[half : 2 * half], np.int64)
            run = min(self.n // 2, max(half, _LEAST_RUN))
            exact = np.tile(exact, run // half)
            stages.append((exact, exact / self.p))
            half *= 2
        return stages

    def product(self, a: Integers, w: Integers | int, quotient: _Float | float) -> Integers:
        """a w modulo p for w in [0, p), with `quotient` = w / p (see the module)."""
        times = (a * quotient).astype(np.int64)
        times *= self.p
        result = a * w
        result -= times
        return result

    def reduced(self, a: Integers) -> Integers:
        """a modulo p, within [-p, p]."""
        times = (a * self.inverse_p).astype(np.int64)
        times *= self.p
        result: Integers = a - times
        return result

    def canonical(self, a: Integers) -> Integers:
        """a modulo p in [0, p), for |a| < 2^62."""
        result = self.reduced(self.reduced(a))  # the first quotient of a large one may be off
        result += (result >> 63) & self.p
        result -= self.p
        result += (result >> 63) & self.p
        return result

    def forward(self, a: Integers) -> Integers:
        """Coefficients, |a| <= p, to NTT order: halves are taken, and written side by side."""
        half = self.n // 2
        for stage, (exact, quotient) in enumerate(self._forward):
            run = len(exact)
            v = self.product(a[half:].reshape(-1, run), exact, quotient).ravel()
            out = np.empty_like(a)
            np.add(a[:half], v, out=out[0::2])
            np.subtract(a[:half], v, out=out[1::2])
            a = self.reduced(out) if stage % 3 == 2 else out  # 1, 2.25, 3.8, 5.8 p
        return a

    def inverse(self, a: Integers) -> Integers:
        """NTT order, |a| <= 1.25 p, to n times the coefficients, |result| <= 2 p.

        Neighbours are taken, and written as halves: after log2(n) stages all is in order.
        """
        half = self.n // 2
        for stage, (exact, quotient) in enumerate(reversed(self._inverse)):
            run = len(exact)
            out = np.empty_like(a)
            u, v = a[0::2], a[1::2]
            np.add(u, v, out=out[:half])
            difference = (u - v).reshape(-1, run)
            out[half:] = self.product(difference, exact, quotient).ravel()
            a = self.reduced(out) if stage % 3 == 2 else out  # 1.25, 2.5, 5, 10 p
        return self.reduced(a)


def _powers(base: int, count: int, prime: int) -> list[int]:
    powers = [1]
    for _ in range(count - 1):
        powers.append(powers[-1] * base % prime)
    return powers


@cache
def _primes_of(ring: Ring) -> tuple[_Prime, ...]:
    return tuple(
        _Prime(ring.n, prime, root) for prime, root in zip(ring.primes, ring.roots, strict=True)
    )


def _exact_product(matrix: _Float, columns: _Float) -> Integers:
    """A product whose sums stay below 2^53, a few columns at a time.

    So small products are computed in one thread: more would only wait for one another, and the
    callers have their own.
    """
    out = np.empty((len(matrix), columns.shape[1]))
    step = max(1, _BLAS_SIZE // matrix.size)
    for at in range(0, columns.shape[1], step):
        np.matmul(matrix, columns[:, at : at + step], out=out[:, at : at + step])
    return out.astype(np.int64)


def _split(constants: Sequence[int]) -> _Float:
    """Constants below 2^50 as their upper 25 bits, then their lower."""
    upper = [constant >> _PART for constant in constants]
    lower = [constant & _PART_MASK for constant in constants]
    return np.array([upper, lower], np.float64)


class _Packer:
    """Slots and errors to words: Delta X + e modulo every prime, by a matrix product."""

    def __init__(self, ring: Ring, slot_bits: int, slots: int) -> None:
        places = [NOISE_BITS + slot_bits * slot for slot in range(slots)]
        self._wide = slot_bits > _PART
        if self._wide:
            places += [place + _PART for place in places]
        self._primes = _primes_of(ring)
        self._matrices = [
            _split([pow(2, place, prime) for place in [*places, 0]]) for prime in ring.primes
        ]

    def words(self, slots: _Float, errors: _Float | None, prime: int) -> Integers:
        """Words of prime number `prime`, below 2^54 in size; slots [L, m], errors [m]."""
        rows = [slots]
        if self._wide:  # signed parts: |lower| <= 2^24, |upper| <= 2^26
            high = np.rint(slots * 2.0**-_PART)
            rows = [slots - high * 2.0**_PART, high]
        rows.append(np.zeros((1, slots.shape[1])) if errors is None else errors[None])
        upper, lower = _exact_product(self._matrices[prime], np.concatenate(rows))
        p = self._primes[prime]
        words: Integers = lower + p.product(upper, 1 << _PART, (1 << _PART) / p.p)
        return words


class _Cutter:
    """Words to slots and errors: the Chinese remainder theorem in parts of 25 bits.

    W = v + bias, where the bias makes the error and all slots of an honest v non-negative, is
    the sum of y_j Q_j minus a multiple of q, with Q_j = q / p_j and y_j = W / Q_j modulo p_j.
    """

    _PARTS = 8

    def __init__(self, ring: Ring, slot_bits: int, slots: int) -> None:
        self.slot_bits, self.slots = slot_bits, slots
        half = 1 << (slot_bits - 1)
        self.bias = (1 << (NOISE_BITS - 1)) + sum(
            half << (NOISE_BITS + slot_bits * slot) for slot in range(slots)
        )
        self._ring, self._primes = ring, _primes_of(ring)
        self._factors = [pow(ring.q // prime, -1, prime) for prime in ring.primes]
        columns = [(ring.q // prime) << shift for shift in (0, _PART) for prime in ring.primes]
        self._matrix = np.array(
            [[float(column >> (_PART * i) & _PART_MASK) for column in columns]
             for i in range(self._PARTS)]
        )  # fmt: skip
        self._q = np.array([ring.q >> (_PART * i) & _PART_MASK for i in range(self._PARTS)])

    def cut(self, words: Sequence[Integers], bound: int) -> tuple[Integers, bool]:
        """Four arrays of words, below 4 p in size, to slots [L, m], and whether all is in range."""
        shares = [
            prime.canonical(prime.product(word + self.bias % prime.p, factor, factor / prime.p))
            for word, factor, prime in zip(words, self._factors, self._primes, strict=True)
        ]
        quotient = np.zeros(shares[0].shape)
        for share, prime in zip(shares, self._primes, strict=True):
            quotient += share * prime.inverse_p
        times = np.floor(quotient)
        lower = [share & _PART_MASK for share in shares]
        upper = [share >> _PART for share in shares]
        parts = _exact_product(self._matrix, np.array([*lower, *upper], np.float64))
        parts -= self._q[:, None] * times.astype(np.int64)
        for i in range(self._PARTS - 1):
            parts[i + 1] += parts[i] >> _PART
            parts[i] &= _PART_MASK
        self._settle(parts, quotient - times)
        wide = parts[0::2] | parts[1::2] << _PART  # words of 50 bits
        good = bool((np.abs((wide[0] & ((1 << NOISE_BITS) - 1)) - (1 << (NOISE_BITS - 1)))
                     <= bound).all())  # fmt: skip
        slots = np.empty((self.slots, parts.shape[1]), np.int64)
        for slot in range(self.slots):
            slots[slot] = self._bits(wide, NOISE_BITS + self.slot_bits * slot, self.slot_bits)
        slots -= 1 << (self.slot_bits - 1)
        end = NOISE_BITS + self.slot_bits * self.slots
        above = self._bits(wide, end, _PRIMES * WORD_BITS - end)
        return slots, good and not above.any()

    @staticmethod
    def _bits(wide: Integers, place: int, length: int) -> Integers:
        """Bits [place, place + length) of every number; at most 63 of them."""
        found = np.zeros(wide.shape[1], np.int64)
        end, got = place + length, 0
        while place < end:
            word, shift = divmod(place, WORD_BITS)
            take = min(WORD_BITS - shift, end - place)
            found |= (wide[word] >> shift & ((1 << take) - 1)) << got
            place, got = place + take, got + take
        return found

    def _settle(self, parts: Integers, fractions: _Float) -> None:
        """Bring numbers next to a multiple of q into [0, q): there the quotient may be off."""
        near = 2.0**-40
        for c in np.flatnonzero((fractions < near) | (fractions > 1 - near)):
            number = sum(int(part) << (_PART * i) for i, part in enumerate(parts[:, c]))
            number %= self._ring.q
            parts[:, c] = [number >> (_PART * i) & _PART_MASK for i in range(self._PARTS)]


@cache
def _packer(ring: Ring, slot_bits: int, slots: int) -> _Packer:
    return _Packer(ring, slot_bits, slots)


@cache
def _cutter(ring: Ring, slot_bits: int, slots: int) -> _Cutter:
    return _Cutter(ring, slot_bits, slots)


def _stream_words(key: bytes, polynomial: int, j: int, count: int, prime: int) -> Integers:
    """The first `count` words of polynomial and prime number j (from 0) under a key."""

    def words(t: int, count: int) -> Integers:
        nonce = struct.pack("<IQ", t, _PRIMES * polynomial + j)
        return _keystream(key, nonce, 8 * count).view("<i8").astype(np.int64) & _WORD_MASK

    found = words(0, count)
    for t in count_up(1):
        rejected = np.flatnonzero(found >= prime)
        if not rejected.size:
            break
        found[rejected] = words(t, int(rejected[-1]) + 1)[rejected]
    return found


def _write(words: Sequence[Integers], body: Body) -> None:
    """Four arrays of canonical words into the 25 m bytes of a polynomial."""
    m = len(words[0])
    tops = np.zeros(m, np.uint8)
    for j, word in enumerate(words):
        low = np.empty((m, 3), "<u2")
        pieces = word.astype("<i8", copy=False).view("<u2").reshape(m, 4)
        for i in range(3):
            low[:, i] = pieces[:, i]
        tops |= (pieces[:, 3] << (2 * j)).astype(np.uint8)
        body[_LOW_BYTES * m * j : _LOW_BYTES * m * (j + 1)] = low.view(np.uint8).ravel()
    body[_LOW_BYTES * m * _PRIMES :] = tops


def _read(body: Body, ring: Ring) -> list[Integers]:
    """The words of one polynomial; FormatError where one is not below its prime."""
    m = len(body) // COEFFICIENT_BYTES
    tops = body[_LOW_BYTES * m * _PRIMES :]
    words = []
    for j, prime in enumerate(ring.primes):
        low = body[_LOW_BYTES * m * j : _LOW_BYTES * m * (j + 1)].copy().view("<u2").reshape(m, 3)
        pieces = np.empty((m, 4), "<u2")
        for i in range(3):
            pieces[:, i] = low[:, i]
        pieces[:, 3] = tops >> (2 * j) & 3
        word = pieces.view("<i8").ravel().astype(np.int64, copy=False)
        if (word >= prime).any():
            raise out_of_range()
        words.append(word)
    return words


class Sum(arithmetic.Sum):
    """Words as int64, reduced once every 2,048 terms."""

    def __init__(self, shape: Shape, first: int, count: int) -> None:
        super().__init__(shape, first, count)
        self._primes = _primes_of(shape.ring)
        self._words = [
            [np.zeros(shape.coefficients(i), np.int64) for _ in self._primes]
            for i in range(first, first + count)
        ]
        self._terms = 0

    def _bodies(self, body: Buffer) -> Iterator[tuple[list[Integers], list[Integers]]]:
        """The sum's words beside those of a body, polynomial after polynomial."""
        found = body_of(body, self.shape, self.first, self.count)
        at = 0
        for words in self._words:
            length = COEFFICIENT_BYTES * len(words[0])
            yield words, _read(found[at : at + length], self.shape.ring)
            at += length

    def _apply(self, body: Buffer, step: Callable[[Integers, Integers], object]) -> None:
        for words, others in self._bodies(body):
            for word, other in zip(words, others, strict=True):
                step(word, other)
        self._count_term()

    def _count_term(self) -> None:
        self._terms += 1
        if self._terms >= _LAZY_SUMS:
            for words in self._words:
                for prime, word in zip(self._primes, words, strict=True):
                    word[:] = prime.canonical(word)
            self._terms = 1

    def add(self, body: Buffer) -> None:
        """Add a body."""
        self._apply(body, lambda word, other: np.add(word, other, out=word))

    def subtract(self, body: Buffer) -> None:
        """Subtract a body."""
        self._apply(body, lambda word, other: np.subtract(word, other, out=word))

    def subtract_from(self, start: Buffer) -> None:
        """Replace the sum by `start` minus the sum."""
        self._apply(start, lambda word, other: np.subtract(other, word, out=word))

    def add_masks(self, masks: Sequence[Mask]) -> None:
        """Add masks, each with its sign."""
        check_masks(masks)
        for mask in masks:
            for i, words in enumerate(self._words, self.first):
                for j, prime in enumerate(self._primes):
                    stream = _stream_words(mask.key, i, j, len(words[j]), prime.p)
                    words[j] += mask.sign * stream
            self._count_term()

    def body(self) -> Body:
        """The sum so far."""
        out = np.empty(self.span.length, np.uint8)
        at = 0
        for words in self._words:
            length = COEFFICIENT_BYTES * len(words[0])
            canonical = [p.canonical(word) for p, word in zip(self._primes, words, strict=True)]
            _write(canonical, out[at : at + length])
            at += length
        return out


class Arithmetic(arithmetic.LatticeArithmetic):
    """The lattice body with numpy."""

    @cached_property
    def _primes(self) -> tuple[_Prime, ...]:
        return _primes_of(self.ring)

    def sample(self, key: bytes, polynomial: int | None = None) -> Integers:
        """Popcounts, by a table of the counts of 16 bits."""
        check_keys(key)
        stream = _keystream(key, struct.pack("<IQ", 0, polynomial or 0), 16 * self.ring.n)
        counts = _popcounts()[stream.view("<u2")].reshape(-1, 8)
        found: Integers = counts.sum(1, dtype=np.int64) - BOUND
        return found

    def transform(self, small: Integers) -> Words:
        """One transform a prime."""
        found = check_small(small, self.ring)
        return np.array([p.canonical(p.forward(found)) for p in self._primes]).astype(np.uint64)

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
        """Values are rounded and clamped as float64, which is exact, polynomial by polynomial."""
        check_encoding(encoding, shape.slot_bits)
        found = vector(values, np.float32, np.float64)
        clamped = 0
        start = shape.span(first, shape.holding(first, len(found))).first_value

        def rounded(at: int, count: int) -> _Float:
            nonlocal clamped
            real = found[at : at + count].astype(np.float64)
            finite = np.isfinite(real)
            if not finite.all():
                raise NonFinite(at + int(np.argmin(finite)))
            result = _round(real, encoding, start + at)
            limit = float(encoding.limit)
            clamped += int(np.count_nonzero(np.abs(result) > limit))
            return np.clip(result, -limit, limit, out=result)

        body = self._padded(k_a, secret, k_e, masks, rounded, len(found), shape, first)
        return body, clamped

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
        found = check_integers(integers, shape.slot_bits)

        def exact(at: int, count: int) -> _Float:
            return found[at : at + count].astype(np.float64)

        return self._padded(k_a, secret, k_e, masks, exact, len(found), shape, first)

    def _padded(
        self,
        k_a: bytes,
        secret: Words,
        k_e: bytes,
        masks: Sequence[Mask],
        slots_of: Callable[[int, int], _Float],
        values: int,
        shape: Shape,
        first: int,
    ) -> Body:
        check_keys(k_a, k_e)
        check_masks(masks)
        count = shape.holding(first, values)
        pads = self._pads(secret)
        packer = _packer(self.ring, shape.slot_bits, shape.slots)
        out = np.empty(shape.span(first, count).length, np.uint8)
        at = 0
        for i in range(first, first + count):
            m = shape.coefficients(i)
            slots = _slots(slots_of((i - first) * shape.capacity, shape.values_in(i)), shape, m)
            errors = self.sample(k_e, i)[:m].astype(np.float64)
            words = []
            for j, prime in enumerate(self._primes):
                word = pads(k_a, i, j)[:m]
                word += packer.words(slots, errors, j)
                for n, mask in enumerate(masks, 1):
                    word += mask.sign * _stream_words(mask.key, i, j, m, prime.p)
                    if n % _LAZY_SUMS == 0:
                        word = prime.canonical(word)
                words.append(prime.canonical(word))
            _write(words, out[at : at + COEFFICIENT_BYTES * m])
            at += COEFFICIENT_BYTES * m
        return out

    def _pads(self, secret: Words) -> Callable[[bytes, int, int], Integers]:
        """A function that gives a_{i,j} s, below 2 p in size, in coefficient order."""
        scaled: list[tuple[Integers, _Float]] = []
        for p, row in zip(self._primes, check_secret(secret, self.ring), strict=True):
            exact = p.canonical(p.product(row.astype(np.int64), p.by_n, p.by_n / p.p))
            scaled.append((exact, exact / p.p))

        def pad(k_a: bytes, polynomial: int, j: int) -> Integers:
            prime = self._primes[j]
            public = _stream_words(k_a, polynomial, j, self.ring.n, prime.p)
            return prime.inverse(prime.product(public, *scaled[j]))

        return pad

    def encode_public(self, integers: Integers, shape: Shape, first: int) -> Body:
        """Delta X alone."""
        found = check_integers(integers, shape.slot_bits)
        count = shape.holding(first, len(found))
        packer = _packer(self.ring, shape.slot_bits, shape.slots)
        out = np.empty(shape.span(first, count).length, np.uint8)
        at = 0
        for i in range(first, first + count):
            m = shape.coefficients(i)
            begin = (i - first) * shape.capacity
            own = found[begin : begin + shape.values_in(i)].astype(np.float64)
            slots = _slots(own, shape, m)
            words = [p.canonical(packer.words(slots, None, j)) for j, p in enumerate(self._primes)]
            _write(words, out[at : at + COEFFICIENT_BYTES * m])
            at += COEFFICIENT_BYTES * m
        return out

    def open(
        self, k_a: bytes, secret: Words, bound: int, body: Buffer, shape: Shape, first: int
    ) -> tuple[Integers, bool]:
        """Every polynomial to its end, whatever is found."""
        check_keys(k_a)
        count = polynomials_of(body, shape, first)
        found = body_of(body, shape, first, count)
        pads = self._pads(secret)
        cutter = _cutter(self.ring, shape.slot_bits, shape.slots)
        out = np.empty(shape.span(first, count).values, np.int64)
        good = True
        at = 0
        for i in range(first, first + count):
            m, held = shape.coefficients(i), shape.values_in(i)
            words = _read(found[at : at + COEFFICIENT_BYTES * m], self.ring)
            for j in range(_PRIMES):
                words[j] -= pads(k_a, i, j)[:m]
            slots, well = cutter.cut(words, bound)
            integers = slots.ravel()
            begin = (i - first) * shape.capacity
            out[begin : begin + held] = integers[:held]
            padding = bool(integers[held:].any())
            good = good and well and not padding
            at += COEFFICIENT_BYTES * m
        return out, good

    def sum(self, shape: Shape, first: int, count: int) -> Sum:
        """A running sum."""
        return Sum(shape, first, count)


def _slots(values: _Float, shape: Shape, m: int) -> _Float:
    """Values of one polynomial as slots [L, m], the rest zero."""
    if len(values) == shape.slots * m:
        return values.reshape(shape.slots, m)
    slots = np.zeros((shape.slots, m))
    slots.ravel()[: len(values)] = values
    return slots


def _round(values: _Float, encoding: Encoding, start: int) -> _Float:
    """Scale and round values that stand from place `start` of the vector on."""
    with np.errstate(over="ignore"):
        values *= encoding.scale
        values *= encoding.one
    np.clip(values, -_FAR, _FAR, out=values)
    if encoding.seed is None:
        return np.rint(values, out=values)
    stream = keystream(encoding.seed, _NOISE_BYTES * start, _NOISE_BYTES * values.size)
    low = np.floor(values)
    values -= low
    values *= 2.0**32
    low += np.frombuffer(stream, "<u4") < values
    return low


@cache
def _popcounts() -> NDArray[np.uint8]:
    """The number of ones in every number of 16 bits."""
    counts = np.zeros(1, np.uint8)
    for _ in range(16):
        counts = np.concatenate([counts, counts + np.uint8(1)])
    return counts
