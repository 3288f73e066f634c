"""The lattice body: every back end against plain Python integers, and against each other."""

import os
import random
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from math import ceil, floor, isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dtl.core.crypto.primitives import keystream
from dtl.core.errors import FormatError, UsageError
from dtl.core.lattice import native, parameters, portable, ring
from dtl.core.lattice.arithmetic import Encoding, LatticeArithmetic, Mask, NonFinite, Values
from dtl.core.lattice.parameters import FULL, INSECURE, Ring, Shape
from tests.emulated import build

DELTA = 1 << 28
K_A, K_S, K_E, K_1, K_2 = (bytes([i]) * 32 for i in range(1, 6))
SEED = b"r" * 32


LATTICE = Path(__file__).parent.parent / "core" / "lattice"
SOURCES = sorted(LATTICE.glob("*.c"))


FOLDER: list[Path] = []


@pytest.fixture(scope="session", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the emulated kernel is built: one place for all processes of a run."""
    folder = tmp_path_factory.getbasetemp()
    FOLDER.append(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@cache
def emulated_kernel() -> Any:
    """The kernel with emulated AVX-512 (tests/emulated), built once."""
    library = FOLDER[0] / "emulated-lattice" / "_lattice.so"
    try:
        build.build(SOURCES, library)
    except build.NoCompiler as error:
        pytest.skip(f"AVX-512 IFMA cannot be emulated: {error}")
    return build.load("dtl.core.lattice._lattice", library)


class Emulated(native.Arithmetic):
    """The variant for AVX-512 IFMA, on a machine that does not have it."""

    def __init__(self, of: Ring) -> None:
        LatticeArithmetic.__init__(self, of)
        self._kernel = emulated_kernel().Ring(of.n, of.primes, of.roots, "ifma")


BACKENDS: dict[str, Callable[[Ring], LatticeArithmetic]] = {"numpy": portable.Arithmetic}
if native.unavailable() is None:
    for _name in native._variants:
        BACKENDS[_name] = partial(native.Arithmetic, variant=_name)
if "ifma" not in BACKENDS:
    BACKENDS["emulated"] = Emulated
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
Backend = Callable[[Ring], LatticeArithmetic]


# --- the construction once more, in plain integers, straight from the text ------------------


def chacha(key: bytes, nonce: bytes, start: int, length: int) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream = Cipher(algorithms.ChaCha20(key, bytes(4) + nonce), None).encryptor()
    return stream.update(bytes(start + length))[start:]


def word(of: Ring, key: bytes, i: int, j: int, k: int) -> int:
    """word(key, i, j, k, t) for the least t for which it is below p_j; j from 1."""
    t = 0
    while True:
        data = chacha(key, struct.pack("<IQ", t, 4 * i + j - 1), 8 * k, 8)
        found = int.from_bytes(data, "little") % 2**50
        if found < of.primes[j - 1]:
            return found
        t += 1


def small(key: bytes, nonce: bytes, n: int) -> list[int]:
    data = chacha(key, nonce, 0, 16 * n)
    return [int.from_bytes(data[16 * c : 16 * c + 16], "little").bit_count() - 64 for c in range(n)]


def brv(k: int, n: int) -> int:
    return int(f"{k:0{n.bit_length() - 1}b}"[::-1], 2)


def negacyclic_from_values(values: list[int], psi: int, p: int) -> list[int]:
    """The polynomial with these values in NTT order: interpolation, one coefficient at a time."""
    n = len(values)
    inverse, by_n = pow(psi, -1, p), pow(n, -1, p)
    powers = [1]
    for _ in range(2 * n - 1):
        powers.append(powers[-1] * inverse % p)
    places = [2 * brv(k, n) + 1 for k in range(n)]
    return [
        sum(v * powers[e * c % (2 * n)] for v, e in zip(values, places, strict=True)) * by_n % p
        for c in range(n)
    ]


def evaluate(coefficients: Sequence[int], point: int, p: int) -> int:
    total = 0
    for c in reversed(coefficients):
        total = (total * point + c) % p
    return total


def encode(words: list[list[int]]) -> bytes:
    """25 m bytes: four times the low 48 bits of m words, then the tops."""
    low = b"".join((w % 2**48).to_bytes(6, "little") for row in words for w in row)
    return low + bytes(sum(row[c] >> 48 << 2 * j for j, row in enumerate(words))
                       for c in range(len(words[0])))  # fmt: skip


def decode(data: bytes) -> list[list[int]]:
    m = len(data) // 25
    return [
        [int.from_bytes(data[6 * (m * j + c) : 6 * (m * j + c) + 6], "little")
         | (data[24 * m + c] >> 2 * j & 3) << 48 for c in range(m)]
        for j in range(4)
    ]  # fmt: skip


def packed(integers: Sequence[int], slot_bits: int, m: int) -> list[int]:
    """X of one polynomial."""
    x = [0] * m
    for u, e in enumerate(integers):
        x[u % m] += e << slot_bits * (u // m)
    return x


def rounded(value: float, place: int, encoding: Encoding) -> int:
    x = max(-(2.0**60), min(2.0**60, value * encoding.scale * encoding.one))
    if encoding.seed is None:
        low = floor(x)
        fraction = x - low
        up = fraction > 0.5 or (fraction == 0.5 and low % 2 == 1)
    else:
        low = floor(x)
        u = int.from_bytes(keystream(encoding.seed, 4 * place, 4), "little")
        up = u < (x - low) * 2**32
    return low + up


def clamped(value: int, limit: int) -> int:
    return max(-limit, min(limit, value))


class Slow:
    """Upload and opening over the small ring."""

    def __init__(self, of: Ring, slot_bits: int, total: int) -> None:
        self.ring, self.slot_bits, self.total = of, slot_bits, total
        self.slots = 171 // slot_bits
        self.n = of.n

    def parts(self) -> list[tuple[int, int, int]]:
        """(first value, values, m) of every polynomial."""
        found, at = [], 0
        while at < self.total:
            held = min(self.n * self.slots, self.total - at)
            full = held == self.n * self.slots
            found.append((at, held, self.n if full else ceil(held / self.slots)))
            at += held
        return found

    def pad(self, s: list[int], i: int, j: int) -> list[int]:
        p, psi = self.ring.primes[j - 1], self.ring.roots[j - 1]
        values = [
            word(self.ring, K_A, i, j, k) * evaluate(s, pow(psi, 2 * brv(k, self.n) + 1, p), p)
            for k in range(self.n)
        ]
        return negacyclic_from_values(values, psi, p)

    def upload(
        self, s: list[int], errors: list[list[int]], integers: Sequence[int], masks: list[Mask]
    ) -> bytes:
        out = b""
        for i, (at, held, m) in enumerate(self.parts()):
            x = packed(integers[at : at + held], self.slot_bits, m)
            words = []
            for j, p in enumerate(self.ring.primes, 1):
                pad = self.pad(s, i, j)
                row = [(pad[c] + errors[i][c] + DELTA * x[c]) % p for c in range(m)]
                for sign, key in masks:
                    row = [(w + sign * word(self.ring, key, i, j, c)) % p
                           for c, w in enumerate(row)]  # fmt: skip
                words.append(row)
            out += encode(words)
        return out


# --- rings and shapes ------------------------------------------------------------------------


def is_prime(p: int) -> bool:
    d, twos = p - 1, 0
    while d % 2 == 0:
        d, twos = d // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):  # enough below 2^64
        x = pow(base, d, p)
        if x not in (1, p - 1) and all((x := x * x % p) != p - 1 for _ in range(twos - 1)):
            return False
    return True


@pytest.mark.parametrize(("of", "below"), [(FULL, 2**50), (INSECURE, 7 * 2**47)])
def test_the_primes_are_the_largest(of: Ring, below: int) -> None:
    step = 2**15
    found = [p for p in range((below - 1) // step * step + 1, below - 200 * step, -step)
             if p < below and is_prime(p)][:4]  # fmt: skip
    assert list(of.primes) == found
    for p, psi in zip(of.primes, of.roots, strict=True):
        assert pow(psi, of.n, p) == p - 1
        candidates = (pow(x, (p - 1) // (2 * of.n), p) for x in range(2, isqrt(p)))
        assert psi == next(y for y in candidates if pow(y, of.n, p) == p - 1)


def test_rings_go_with_sizes() -> None:
    assert ring.ring_of(2048) is ring.ring_of(3072) is FULL
    assert ring.ring_of(256) is ring.ring_of(4096) is INSECURE
    assert [FULL.n, INSECURE.n] == [8192, 256]


@pytest.mark.parametrize(
    ("bits", "slots"), [(24, 7), (16, 10), (12, 14), (10, 17), (3, 57), (52, 3)]
)
def test_shapes(bits: int, slots: int) -> None:
    n = INSECURE.n
    for values in (0, 1, slots, slots + 1, n * slots - 1, n * slots, n * slots + 1, 3 * n * slots):
        shape = Shape(INSECURE, bits, values)
        slow = Slow(INSECURE, bits, values)
        assert shape.slots == slots
        assert shape.polynomials == len(slow.parts())
        assert shape.body_bytes == sum(25 * m for _, _, m in slow.parts())
        for i, (at, held, m) in enumerate(slow.parts()):
            assert (shape.values_in(i), shape.coefficients(i)) == (held, m)
            span = shape.span(i, 1)
            assert (span.first_value, span.values, span.length) == (at, held, 25 * m)
            assert span.start == 25 * n * i
        for bad in ((-1, 1), (0, shape.polynomials + 1), (shape.polynomials + 1, 0)):
            with pytest.raises(ValueError, match="polynomials"):
                shape.span(*bad)
    with pytest.raises(ValueError, match="whole polynomials"):
        Shape(INSECURE, bits, 3 * n * slots).holding(0, n * slots + 1)


# --- against plain integers ------------------------------------------------------------------


@each_backend
def test_samples_are_popcounts(backend: Backend) -> None:
    for of in (INSECURE, FULL):
        arithmetic = backend(of)
        assert arithmetic.sample(K_S).tolist() == small(K_S, bytes(12), of.n)
        number = 2**32 + 5
        nonce = struct.pack("<IQ", 0, number)
        assert arithmetic.sample(K_E, number).tolist() == small(K_E, nonce, of.n)


@each_backend
def test_the_transform_evaluates(backend: Backend) -> None:
    for of, places in ((INSECURE, range(256)), (FULL, (0, 1, 2, 4095, 4096, 8191))):
        coefficients = [*small(K_S, bytes(12), of.n)[:-2], 2**49 - 1, 1 - 2**49]
        found = backend(of).transform(np.array(coefficients))
        for j, (p, psi) in enumerate(zip(of.primes, of.roots, strict=True)):
            for k in places:
                point = pow(psi, 2 * brv(k, of.n) + 1, p)
                assert int(found[j, k]) == evaluate(coefficients, point, p)


PLAIN_MASKS = (Mask(1, K_1), Mask(-1, K_2))


@cache
def plain_upload(bits: int, total: int) -> tuple[NDArray[np.int64], bytes, bytes]:
    """(integers, the slow implementation's upload of them, their public body)."""
    slow, n = Slow(INSECURE, bits, total), INSECURE.n
    integers = np.random.default_rng(1).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), total)
    integers[:2] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    polynomials = len(slow.parts())
    errors = [small(K_E, struct.pack("<IQ", 0, i), n) for i in range(polynomials)]
    s = small(K_S, bytes(12), n)
    upload = slow.upload(s, errors, integers.tolist(), list(PLAIN_MASKS))
    public = slow.upload([0] * n, [[0] * n] * polynomials, integers.tolist(), [])
    return integers, upload, public


@each_backend
@pytest.mark.parametrize(("bits", "total"), [(24, 7 * 256 + 100), (52, 2), (3, 57 * 3 + 1)])
def test_an_upload_is_the_plain_one(backend: Backend, bits: int, total: int) -> None:
    arithmetic, shape = backend(INSECURE), Shape(INSECURE, bits, total)
    integers, upload, public = plain_upload(bits, total)
    secret = arithmetic.transform(np.array(small(K_S, bytes(12), INSECURE.n)))
    body = arithmetic.pad_integers(K_A, secret, K_E, PLAIN_MASKS, integers, shape, 0)
    assert body.tobytes() == upload
    off = [Mask(-sign, key) for sign, key in PLAIN_MASKS]
    clean = arithmetic.combine(shape, 0, shape.polynomials, [upload], [], off)
    opened, good = arithmetic.open(K_A, secret, 64, clean, shape, 0)
    assert good
    assert opened.tolist() == integers.tolist()
    assert arithmetic.encode_public(integers, shape, 0).tobytes() == public


def test_the_small_ring_rejects() -> None:
    """About an eighth of all words, some more than once: the tests above take the branch."""
    first, second = (
        np.frombuffer(chacha(K_A, struct.pack("<IQ", t, 0), 0, 8 * 256), "<u8") % 2**50
        >= INSECURE.primes[0]
        for t in range(2)
    )
    assert 10 < first.sum() < 60
    assert (first & second).any()


@each_backend
def test_the_full_ring_in_spots(backend: Backend) -> None:
    """One whole polynomial: body - e - Delta X, evaluated, is a s evaluated."""
    shape = Shape(FULL, 24, 7 * 8192)
    arithmetic = backend(FULL)
    s = small(K_S, bytes(12), FULL.n)
    integers = np.random.default_rng(2).integers(-(2**23), 2**23, shape.values)
    body = arithmetic.pad_integers(
        K_A, arithmetic.transform(np.array(s)), K_E, [], integers, shape, 0
    )
    rows = decode(body.tobytes())
    errors = small(K_E, bytes(12), FULL.n)
    x = packed(integers.tolist(), 24, FULL.n)
    for j, (p, psi) in enumerate(zip(FULL.primes, FULL.roots, strict=True), 1):
        pad = [w - e - DELTA * y for w, e, y in zip(rows[j - 1], errors, x, strict=True)]
        for k in (0, 1, 5000, 8191):
            point = pow(psi, 2 * brv(k, FULL.n) + 1, p)
            assert evaluate(pad, point, p) == word(FULL, K_A, 0, j, k) * evaluate(s, point, p) % p


@each_backend
@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_and_clamping(backend: Backend, seed: bytes | None, dtype: Any) -> None:
    arithmetic, bits = backend(INSECURE), 24
    shape = Shape(INSECURE, bits, 7 * 256 * 2 + 77)
    secret = arithmetic.transform(arithmetic.sample(K_S))
    encoding = Encoding(-0.7, 2.0**10, 1000, seed)
    values: NDArray[Any] = np.random.default_rng(3).normal(size=shape.span(1, 2).values)
    values = values.astype(dtype)
    edges = [0.0, -0.0, 1e30, -1e30, 1e-30, 5e-324, np.finfo(dtype).max, -np.finfo(dtype).max]
    values[: len(edges)] = edges
    if seed is None:
        encoding = Encoding(0.5, 2.0, 1000)
        values[20:30] = np.arange(-5, 5) + 0.5  # ties
    body, count = arithmetic.pad(K_A, secret, K_E, [], encoding, values, shape, 1)
    opened, good = arithmetic.open(K_A, secret, 64, body, shape, 1)
    start = shape.span(1, 2).first_value
    whole = [rounded(float(v), start + n, encoding) for n, v in enumerate(values)]
    assert good
    assert opened.tolist() == [clamped(value, encoding.limit) for value in whole]
    assert count == sum(abs(value) > encoding.limit for value in whole) > 3


# --- the back ends against one another -------------------------------------------------------


def everything(arithmetic: LatticeArithmetic, seed: int) -> list[object]:
    """What every operation gives for inputs drawn from `seed`."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)  # noqa: S311
    of = FULL if seed % 5 == 0 else INSECURE
    bits = draw.randint(3, 52)
    capacity = 171 // bits * of.n
    shape = Shape(of, bits, draw.randint(1, capacity if of is FULL else 3 * capacity))
    first = draw.randrange(shape.polynomials)
    count = draw.randint(1, shape.polynomials - first)
    held = shape.span(first, count).values
    big = draw.choice([0.0, 1.0, 1e3, 1e30])
    values = numbers.normal(size=held) * big
    given: Values = values.astype(np.float32) if draw.randrange(2) else values
    half = 2 ** (bits - 1)
    integers = numbers.integers(-half, half, held)
    encoding = Encoding(
        draw.choice([1.0, -0.3, 1e10, 1e300]), 2.0 ** draw.randint(0, bits - 2),
        max(1, (half // 2 - 1) // draw.randint(1, 3)), draw.choice([None, SEED]),
    )  # fmt: skip
    masks = [Mask(draw.choice([1, -1]), draw.randbytes(32)) for _ in range(draw.randint(0, 3))]
    small = arithmetic.sample(K_S)
    secret = arithmetic.transform(small)
    body, beyond = arithmetic.pad(K_A, secret, K_E, masks, encoding, given, shape, first)
    exact = arithmetic.pad_integers(K_A, secret, K_E, masks, integers, shape, first)
    public = arithmetic.encode_public(integers, shape, first)
    unmasked = arithmetic.combine(
        shape, first, count, [exact], [], [Mask(-sign, key) for sign, key in masks]
    )
    opened, good = arithmetic.open(K_A, secret, 64, unmasked, shape, first)
    assert good
    assert (opened == integers).all()
    total = arithmetic.sum(shape, first, count)
    total.add(body)
    total.subtract(exact)
    total.add_masks(masks)
    total.subtract_from(public.tobytes())
    total.add(bytearray(public))
    masked = arithmetic.open(K_A, secret, 64, body, shape, first)[1]
    arrays: list[NDArray[Any]] = [small, secret, body, exact, public, unmasked, total.body()]
    return [beyond, masked, *(array.tobytes() for array in arrays)]


@pytest.mark.parametrize("seed", range(30))
def test_back_ends_are_equal(seed: int) -> None:
    of = FULL if seed % 5 == 0 else INSECURE
    expected = everything(BACKENDS["numpy"](of), seed)
    for name, backend in BACKENDS.items():
        assert everything(backend(of), seed) == expected, name


@each_backend
def test_sums_of_masked_uploads_open(backend: Backend) -> None:
    """Five participants, masks between every two: the sum opens exactly, without them."""
    arithmetic, people, bits = backend(INSECURE), 5, 12
    shape = Shape(INSECURE, bits, 14 * 256 + 9)
    limit = (2 ** (bits - 2) - 1) // people
    numbers = np.random.default_rng(4)
    vectors = numbers.integers(-limit, limit + 1, (people, shape.values))
    secrets = [arithmetic.sample(bytes([60 + a]) * 32) for a in range(people)]
    bodies = []
    for a in range(people):
        masks = [Mask(1 if b > a else -1, bytes([min(a, b), max(a, b)]) * 16)
                 for b in range(people) if b != a]  # fmt: skip
        secret = arithmetic.transform(secrets[a])
        k_e = bytes([90 + a]) * 32
        bodies.append(arithmetic.pad_integers(K_A, secret, k_e, masks, vectors[a], shape, 0))
    start = numbers.integers(-500, 500, shape.values)
    polynomials = shape.polynomials
    total = arithmetic.combine(shape, 0, polynomials, bodies)
    model = arithmetic.combine(
        shape, 0, polynomials, [arithmetic.encode_public(start, shape, 0)], [total]
    )
    small_sum = sum(secrets, np.zeros(INSECURE.n, np.int64))
    opened, good = arithmetic.open(
        K_A, arithmetic.transform(small_sum), 64 * people, total, shape, 0
    )
    assert good
    assert (opened == vectors.sum(0)).all()
    opened, good = arithmetic.open(
        K_A, arithmetic.transform(-small_sum), 64 * people, model, shape, 0
    )
    assert good
    assert (opened == start - vectors.sum(0)).all()
    single = arithmetic.open(K_A, arithmetic.transform(secrets[0]), 64, bodies[0], shape, 0)
    assert not single[1]  # one upload alone stays masked
    wrong = small_sum.copy()
    wrong[7] += 1
    assert not arithmetic.open(K_A, arithmetic.transform(wrong), 64 * people, total, shape, 0)[1]


# --- edges -----------------------------------------------------------------------------------


def made(
    arithmetic: LatticeArithmetic, shape: Shape, k: list[int], e: list[int], x: list[int]
) -> tuple[NDArray[np.uint64], bytes]:
    """The transformed K and a body a K + E + Delta X of one polynomial, E and X as given."""
    secret = arithmetic.transform(np.array(k))
    zeros = np.zeros(shape.values, np.int64)
    rows = decode(arithmetic.pad_integers(K_A, secret, K_E, [], zeros, shape, 0).tobytes())
    sampled = arithmetic.sample(K_E, 0).tolist()
    words = [
        [
            (w - old + new + DELTA * y) % p
            for w, old, new, y in zip(row, sampled, e, x, strict=False)
        ]
        for row, p in zip(rows, shape.ring.primes, strict=True)
    ]
    return secret, encode(words)


@each_backend
@pytest.mark.parametrize("uploads", [1, parameters.MAX_UPLOADS])
@pytest.mark.parametrize("bits", [3, 9, 19, 24, 52])
def test_the_largest_of_everything_opens(backend: Backend, uploads: int, bits: int) -> None:
    arithmetic, n, slots = backend(INSECURE), INSECURE.n, 171 // bits
    shape = Shape(INSECURE, bits, n * slots)
    bound, half = 64 * uploads, 2 ** (bits - 1)
    assert bound < DELTA // 2
    for sign, value in ((1, half - 1), (-1, -half), (-1, half - 1)):
        integers = [value] * shape.values
        secret, body = made(
            arithmetic, shape, [sign * bound] * n, [sign * bound] * n, packed(integers, bits, n)
        )
        opened, good = arithmetic.open(K_A, secret, bound, body, shape, 0)
        assert good
        assert opened.tolist() == integers
        assert not arithmetic.open(K_A, secret, bound - 1, body, shape, 0)[1]


@each_backend
def test_what_is_out_of_range_is_seen(backend: Backend) -> None:
    arithmetic, n, bits = backend(INSECURE), INSECURE.n, 24
    full, short = Shape(INSECURE, bits, 7 * n), Shape(INSECURE, bits, 20)  # short: m = 3, 1 unused
    top = 2 ** (bits * 7 - 1)  # just above the slots, signed
    for shape, m in ((full, n), (short, 3)):
        for c in (0, 1, m - 1):
            for e, x in ((65, 0), (-65, 0), (0, top), (0, -2 * top), (0, 2**170), (0, -(2**170))):
                errors, slots = [0] * m, [0] * m
                errors[c], slots[c] = e, x
                secret, body = made(arithmetic, shape, [1] * n, errors, slots)
                assert not arithmetic.open(K_A, secret, 64, body, shape, 0)[1], (c, e, x)
            errors[c], slots[c] = 64, -1 << bits * 3
            secret, body = made(arithmetic, shape, [1] * n, errors, slots)
            opened, good = arithmetic.open(K_A, secret, 64, body, shape, 0)
            assert good
            assert opened[3 * m + c] == -1
    slots = [0, 0, 1 << bits * 6]  # value 20, of 20
    secret, body = made(arithmetic, short, [1] * n, [0] * 3, slots)
    assert not arithmetic.open(K_A, secret, 64, body, short, 0)[1]
    garbage = np.random.default_rng(5)
    for shape in (full, short):
        words = [garbage.integers(0, p, shape.coefficients(0)).tolist() for p in INSECURE.primes]
        assert not arithmetic.open(K_A, secret, 64 * 2**20, encode(words), shape, 0)[1]


@each_backend
def test_numbers_next_to_multiples_of_q(backend: Backend) -> None:
    """The quotient of the remainder theorem is found with a rounding: here it is hardest."""
    arithmetic, n = backend(INSECURE), INSECURE.n
    shape = Shape(INSECURE, 3, 57 * n)
    bias = 2**27 + sum(4 << 28 + 3 * i for i in range(57))
    q = INSECURE.q
    numbers = [0, 1, q - 1, q - 2, 2**199 - 1, 2**199, q // 2, 2**64, 2**128 - 1, q - 2**64]
    for number in numbers:
        v = number - bias
        rows = [[v % p] * n for p in INSECURE.primes]
        secret = arithmetic.transform(np.zeros(n, np.int64))
        opened, good = arithmetic.open(K_A, secret, 2**27, encode(rows), shape, 0)
        assert good == (number < 2**199)
        if good:
            assert opened[::n].tolist() == [(number >> 28 + 3 * i) % 8 - 4 for i in range(57)]


@each_backend
@pytest.mark.parametrize("values", [1, 20, 7 * 256, 7 * 256 + 1])
def test_words_out_of_range_are_refused(backend: Backend, values: int) -> None:
    arithmetic = backend(INSECURE)
    shape = Shape(INSECURE, 24, values)
    count = shape.polynomials
    secret = arithmetic.transform(arithmetic.sample(K_S))
    good = arithmetic.pad_integers(K_A, secret, K_E, [], np.ones(values, np.int64), shape, 0)
    last = shape.span(count - 1, 1).start
    for j, p in enumerate(INSECURE.primes):
        for c in {0, shape.coefficients(count - 1) - 1}:
            for wrong in (p, p + 1, 2**50 - 1):
                rows = decode(good.tobytes()[last:])
                rows[j][c] = wrong
                body = good.tobytes()[:last] + encode(rows)
                total = arithmetic.sum(shape, 0, count)
                for refuse in (
                    partial(total.add, body),
                    partial(total.subtract, body),
                    partial(total.subtract_from, body),
                    partial(arithmetic.open, K_A, secret, 64, body, shape, 0),
                ):
                    with pytest.raises(FormatError, match="out of range"):
                        refuse()
            rows[j][c] = p - 1
            arithmetic.sum(shape, 0, count).add(good.tobytes()[:last] + encode(rows))


@each_backend
def test_values_that_are_not_finite(backend: Backend) -> None:
    arithmetic = backend(INSECURE)
    shape = Shape(INSECURE, 24, 7 * 256 + 700)
    secret = arithmetic.transform(arithmetic.sample(K_S))
    for dtype in (np.float32, np.float64):
        for places in ([0], [shape.values - 1], [300, 299], [1793, 1001], [1792 + 3]):
            for wrong in (np.nan, np.inf, -np.inf):
                values: NDArray[Any] = np.zeros(shape.values, dtype)
                values[places] = wrong
                for seed in (None, SEED):
                    with pytest.raises(NonFinite) as found:
                        arithmetic.pad(
                            K_A, secret, K_E, [], Encoding(1.0, 1.0, 5, seed), values, shape, 0
                        )
                    assert found.value.index == min(places)


@each_backend
def test_the_rounding_stream_is_endless(backend: Backend) -> None:
    """Beyond 2^32 blocks of keystream the nonce goes up: places of a very long vector."""
    arithmetic = backend(INSECURE)
    total = 2**36 + 5000
    shape = Shape(INSECURE, 24, total)
    first = 2**36 // (7 * 256) - 1
    count = 2
    secret = arithmetic.transform(arithmetic.sample(K_S))
    values = np.full(shape.span(first, count).values, 0.5, np.float32)
    start = shape.span(first, count).first_value
    assert start < 2**36 < start + len(values)
    encoding = Encoding(1.0, 1.0, 100, SEED)
    body, _ = arithmetic.pad(K_A, secret, K_E, [], encoding, values, shape, first)
    opened, good = arithmetic.open(K_A, secret, 64, body, shape, first)
    stream = np.frombuffer(keystream(SEED, 4 * start, 4 * len(values)), "<u4")
    assert good
    assert (opened == (stream < 2**31)).all()


@each_backend
def test_many_terms(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than words can add up without a reduction."""
    arithmetic = backend(INSECURE)
    shape = Shape(INSECURE, 24, 1)
    secret = arithmetic.transform(arithmetic.sample(K_S))
    many = 8200
    if isinstance(arithmetic, portable.Arithmetic):
        monkeypatch.setattr(portable, "_LAZY_SUMS", 50)
        many = 60
    masks = [Mask(1, K_1)] * many + [Mask(-1, K_2)] * many
    one = np.ones(1, np.int64)
    body = arithmetic.pad_integers(K_A, secret, K_E, masks, one, shape, 0)
    plain = decode(arithmetic.pad_integers(K_A, secret, K_E, [], one, shape, 0).tobytes())
    for j, p in enumerate(INSECURE.primes, 1):
        masked = many * (word(INSECURE, K_1, 0, j, 0) - word(INSECURE, K_2, 0, j, 0))
        assert decode(body.tobytes())[j - 1][0] == (plain[j - 1][0] + masked) % p
    total = arithmetic.sum(shape, 0, 1)
    total.add(body)
    total.add_masks([Mask(-sign, key) for sign, key in masks])
    assert total.body().tobytes() == encode(plain)
    total = arithmetic.sum(shape, 0, 1)
    for _ in range(2 * many):
        total.add(body)
    for _ in range(2 * many + 1):
        total.subtract(body)
    total.subtract_from(bytes(25))
    assert total.body().tobytes() == body.tobytes()


@each_backend
def test_wrong_arguments_raise(backend: Backend) -> None:
    arithmetic = backend(INSECURE)
    shape = Shape(INSECURE, 24, 7 * 256 + 1)
    secret = arithmetic.transform(arithmetic.sample(K_S))
    zeros = np.zeros(shape.values, np.int64)
    reals: NDArray[Any] = np.zeros(shape.values, np.float32)
    body = arithmetic.encode_public(zeros, shape, 0)
    pad, exact = arithmetic.pad, arithmetic.pad_integers
    encoding = Encoding(1.0, 1.0, 1)
    for wrong in (
        lambda: arithmetic.transform(zeros[:255]),
        lambda: arithmetic.transform(np.full(256, 2**49)),
        lambda: arithmetic.transform(np.zeros(256, np.int32)),
        lambda: pad(K_A, secret, K_E, [], encoding, reals[:-2], shape, 0),
        lambda: pad(K_A, secret, K_E, [], encoding, reals, shape, 1),
        lambda: pad(K_A, secret, K_E, [], encoding, reals.astype(np.int16), shape, 0),  # type: ignore[arg-type]
        lambda: pad(K_A, secret, K_E, [], encoding, reals[None], shape, 0),
        lambda: pad(K_A, secret[:3], K_E, [], encoding, reals, shape, 0),
        lambda: pad(K_A, secret.astype(np.int64), K_E, [], encoding, reals, shape, 0),
        lambda: pad(K_A, secret, K_E, [], Encoding(1.0, 1.0, 2**23), reals, shape, 0),
        lambda: pad(K_A, secret, K_E, [], Encoding(np.inf, 1.0, 1), reals, shape, 0),
        lambda: pad(K_A[:31], secret, K_E, [], encoding, reals, shape, 0),
        lambda: pad(K_A, secret, K_E[:31], [], encoding, reals, shape, 0),
        lambda: pad(K_A, secret, K_E, [], Encoding(1.0, 1.0, 1, b"short"), reals, shape, 0),
        lambda: pad(K_A, secret, K_E, [Mask(1, b"short")], encoding, reals, shape, 0),
        lambda: pad(K_A, secret, K_E, [Mask(2, K_1)], encoding, reals, shape, 0),
        lambda: exact(K_A, secret, K_E, [], zeros + 2**23, shape, 0),
        lambda: exact(K_A, secret, K_E, [], zeros - 2**23 - 1, shape, 0),
        lambda: arithmetic.encode_public(zeros[:-1].astype(np.int32), shape, 0),
        lambda: arithmetic.open(K_A, secret, 64, body[:-1], shape, 0),
        lambda: arithmetic.open(K_A, secret, 64, body[:-25], shape, 1),
        lambda: arithmetic.open(K_A, secret[:2], 64, body, shape, 0),
        lambda: arithmetic.open(K_A[:31], secret, 64, body, shape, 0),
        lambda: arithmetic.sum(shape, 0, 3),
        lambda: arithmetic.sum(shape, 0, 2).add(body[:-1]),
        lambda: arithmetic.sum(shape, 0, 1).add(body),
        lambda: arithmetic.sum(shape, 0, 1).add_masks([Mask(1, b"short")]),
        lambda: arithmetic.sum(shape, 0, 1).add_masks([Mask(0, K_1)]),
        lambda: arithmetic.sample(b"short"),
    ):
        with pytest.raises(ValueError, match=r"."):
            wrong()
    strided = np.zeros(2 * shape.values, np.float32)[::2]
    whole = pad(K_A, secret, K_E, [], encoding, strided, shape, 0)  # copied, not refused
    assert (whole[0] == pad(K_A, secret, K_E, [], encoding, reals, shape, 0)[0]).all()
    empty = Shape(INSECURE, 24, 0)
    assert pad(K_A, secret, K_E, [], encoding, reals[:0], empty, 0)[0].size == 0
    assert arithmetic.open(K_A, secret, 64, b"", empty, 0)[1]
    assert arithmetic.combine(empty, 0, 0, [b"", b""]).size == 0


@each_backend
def test_threads_share_an_instance(backend: Backend) -> None:
    arithmetic = backend(INSECURE)
    shape = Shape(INSECURE, 24, 7 * 256 * 20)
    secret = arithmetic.transform(arithmetic.sample(K_S))
    integers = np.arange(shape.values)
    expected = arithmetic.pad_integers(K_A, secret, K_E, [Mask(1, K_1)], integers, shape, 0)
    found: dict[int, bytes] = {}

    def work(i: int) -> None:
        span = shape.span(5 * i, 5)
        own = integers[span.first_value : span.first_value + span.values]
        found[i] = arithmetic.pad_integers(
            K_A, secret, K_E, [Mask(1, K_1)], own, shape, 5 * i
        ).tobytes()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b"".join(found[i] for i in range(4)) == expected.tobytes()


# --- which back end --------------------------------------------------------------------------


def test_the_back_end_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTL_KERNEL", "gmpy2")
    assert ring.lattice_kernel_name() == "numpy"
    assert ring.why_not_ifma()
    assert isinstance(ring.arithmetic(INSECURE), portable.Arithmetic)
    monkeypatch.setenv("DTL_KERNEL", "abacus")
    with pytest.raises(UsageError, match="abacus"):
        ring.lattice_kernel_name()
    monkeypatch.setattr(native, "_missing", "no such luck")
    for name in ("native", "portable"):
        monkeypatch.setenv("DTL_KERNEL", name)
        with pytest.raises(UsageError, match=f"{name}: no such luck"):
            ring.lattice_kernel_name()
    monkeypatch.delenv("DTL_KERNEL")
    assert ring.lattice_kernel_name() == "numpy"
    assert ring.why_not_ifma() == "no such luck"


@pytest.mark.skipif(native.unavailable() is not None, reason="nothing was compiled")
def test_the_best_is_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTL_KERNEL", raising=False)
    monkeypatch.setattr(native, "_variants", ["generic", "avx2"])
    assert ring.lattice_kernel_name() == "portable"
    assert "AVX-512" in (ring.why_not_ifma() or "")
    monkeypatch.setenv("DTL_KERNEL", "native")
    with pytest.raises(UsageError, match="AVX-512"):
        ring.lattice_kernel_name()
    monkeypatch.setattr(native, "_variants", ["generic", "avx2", "ifma"])
    assert ring.lattice_kernel_name() == "ifma"
    assert ring.why_not_ifma() is None
    assert native.portable_variant() == "avx2"
    monkeypatch.setenv("DTL_KERNEL", "portable")
    assert ring.lattice_kernel_name() == "portable"
    assert ring.why_not_ifma() == "DTL_KERNEL=portable"
    assert isinstance(ring.arithmetic(INSECURE), native.Arithmetic)


# --- without Python: other processors, and memory --------------------------------------------

DRIVER = Path(__file__).parent / "lattice_driver.c"
KERNEL = [LATTICE / f"{name}.c" for name in ("_body", "_generic", "_avx2", "_ifma512")]
PROBES = [f"-D{name}=probe_{name}" for name in ("malloc", "calloc", "free")]


def built_driver(compiler: str, target: Path, *options: str) -> Path:
    command = [compiler, "-std=c11", "-O2", "-ffp-contract=off", f"-I{LATTICE}", *options]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    made = subprocess.run(
        [*command, *map(str, [DRIVER, *KERNEL]), "-o", str(target)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    return target


def run_case(command: Sequence[str], of: Ring, seed: int) -> None:
    """One case through the driver, and through numpy."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)  # noqa: S311
    bits = draw.randint(3, 52)
    capacity = 171 // bits * of.n
    shape = Shape(of, bits, draw.randint(capacity // 2, capacity * (1 if of is FULL else 3)))
    first = shape.polynomials - 1 if draw.randrange(2) else 0
    span = shape.span(first, shape.polynomials - first)
    values: NDArray[Any] = numbers.normal(size=span.values)
    kind = draw.randrange(2)
    values = values.astype(np.float64 if kind else np.float32)
    limit = 2 ** (bits - 2)
    one = 2.0 ** (bits - 4)
    encoding = Encoding(3.7, one, limit, SEED if draw.randrange(3) else None)
    masks = [Mask(draw.choice([1, -1]), draw.randbytes(32)) for _ in range(draw.randint(0, 2))]
    case = struct.pack(
        "<16Q3d", of.n, *of.primes, *of.roots, bits, span.values, first, span.first_value, kind,
        encoding.seed is not None, len(masks), encoding.scale, one, limit,
    )  # fmt: skip
    case += K_A + K_S + K_E + SEED
    case += b"".join(bytes([sign < 0]) + key for sign, key in masks) + values.tobytes()
    numpy = portable.Arithmetic(of)
    secret = numpy.transform(numpy.sample(K_S))
    body, clamps = numpy.pad(K_A, secret, K_E, masks, encoding, values, shape, first)
    plain, _ = numpy.pad(K_A, secret, K_E, [], encoding, values, shape, first)
    opened, good = numpy.open(K_A, secret, 64, plain, shape, first)
    assert good
    expected = body.tobytes() + plain.tobytes() + opened.tobytes()
    found = subprocess.run([*command], input=case, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout == expected + struct.pack("<3Q", clamps, 1, 1)


def test_secrets_are_overwritten(tmp_path: Path) -> None:
    """What pad and open work with holds nothing when it is given back."""
    compiler = os.environ.get("CC", "gcc")
    driver = str(built_driver(compiler, tmp_path / "driver", *PROBES))
    for seed in range(4):
        run_case([driver, "generic"], INSECURE, seed)
    if "avx2" in native._variants:
        run_case([driver, "avx2"], FULL, 5)


def test_on_aarch64(tmp_path: Path) -> None:
    """The same text for ARM, with its own vectors of float64, in an emulator."""
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64")
    driver = str(built_driver("aarch64-linux-gnu-gcc", tmp_path / "driver", "-static"))
    for seed in range(6):
        run_case(["qemu-aarch64", driver, "generic"], INSECURE, seed)
    run_case(["qemu-aarch64", driver, "generic"], FULL, 7)


@pytest.mark.skipif(native.unavailable() is not None, reason="nothing was compiled")
def test_the_kernel_checks_sizes() -> None:
    """What native.py never gives it."""
    from dtl.core.lattice import _lattice

    of, roots = INSECURE, INSECURE.roots
    kernel = _lattice.Ring(of.n, of.primes, roots, "generic")
    key, table, row = bytes(32), np.zeros((4, 256), np.uint64), np.zeros(256, np.int64)
    out, body = np.zeros(7, np.int64), np.zeros(25, np.uint8)
    frozen = np.zeros(256, np.int64)
    frozen.flags.writeable = False

    def pad(**changes: Any) -> None:
        given: dict[str, Any] = {
                 "k_a": key, "secret": table, "k_e": key, "masks": b"", "bits": 24, "kind": "i",
                 "values": out, "scale": 1.0, "one": 1.0, "limit": 0.0, "seed": None,
                 "first": 0, "start": 0, "out": body,
        } | changes  # fmt: skip
        kernel.pad(*given.values())

    pad()
    one_off: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = (
        (_lattice.Ring, (100, of.primes, roots, "generic")),
        (_lattice.Ring, (32, of.primes, roots, "generic")),
        (_lattice.Ring, (2**16, of.primes, roots, "generic")),
        (_lattice.Ring, (256, (2**49 - 1, *of.primes[1:]), roots, "generic")),
        (_lattice.Ring, (256, (2**50 + 1, *of.primes[1:]), roots, "generic")),
        (_lattice.Ring, (256, of.primes, (of.primes[0], *roots[1:]), "generic")),
        (_lattice.Ring, (256, of.primes[:3], roots, "generic")),
        (_lattice.Ring, (256, of.primes, roots, "abacus")),
        (kernel.sample, (key[:31], 0, row)),
        (kernel.sample, (key, -1, row)),
        (kernel.sample, (key, 0, row[:255])),
        (kernel.sample, (key, 0, frozen)),
        (kernel.transform, (row[:255], table)),
        (kernel.transform, (row, table[:3])),
        (kernel.open, (key, table, 64, 24, body[:24], 0, out)),
        (kernel.open, (key, table, 64, 24, body, 0, out.view(np.uint8)[:55])),
        (kernel.open, (key, table, -1, 24, body, 0, out)),
        (kernel.open, (key, table, 2**28 + 1, 24, body, 0, out)),
        (kernel.open, (key, table, 64, 2, body, 0, out)),
        (kernel.open, (key, table, 64, 53, body, 0, out)),
        (kernel.open, (key[:31], table, 64, 24, body, 0, out)),
        (kernel.open, (key, table[:3], 64, 24, body, 0, out)),
        (kernel.sum_body, (out[:4], body[:24], 0)),
        (kernel.sum_body, (out[:5], body, 0)),
        (kernel.sum_body, (out[:4], body, 3)),
        (kernel.sum_mask, (out[:5], 0, False, key)),
        (kernel.sum_mask, (out[:4], 0, False, key[:31])),
        (kernel.sum_reduce, (out[:5],)),
        (kernel.sum_write, (out[:4], body[:24])),
        (kernel.sum_write, (out[:5], body)),
    )
    changes: tuple[dict[str, Any], ...] = (
        {"k_a": key[:31]}, {"secret": table[:3]}, {"secret": 5}, {"k_e": key[:31]},
        {"masks": key}, {"bits": 2}, {"bits": 53}, {"kind": "f"}, {"values": out[:0]},
        {"limit": 2.0**23}, {"limit": -1.0}, {"limit": float("nan")}, {"scale": float("inf")},
        {"one": float("nan")}, {"seed": key[:31]}, {"out": body[:24]}, {"first": -1},
        {"values": out.view(np.uint8)[:55]},
    )  # fmt: skip
    refused = [partial(call, *arguments) for call, arguments in one_off]
    refused += [partial(pad, **change) for change in changes]
    for wrong in refused:
        with pytest.raises((ValueError, TypeError, BufferError, RuntimeError, OverflowError)):
            wrong()


@pytest.mark.slow
def test_the_kernel_is_clean_under_sanitizers(tmp_path: Path) -> None:
    """Build it with -fsanitize=address,undefined, and run these very tests on that build."""
    import sysconfig

    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        pytest.skip("no compiler")
    flags = ["-std=c11", "-O0", "-fPIC", "-shared", "-fno-sanitize-recover=all"]
    flags += ["-fsanitize=address,undefined", "-ffp-contract=off"]
    flags += [f"-I{sysconfig.get_paths()['include']}"]
    library = tmp_path / "_lattice.abi3.so"
    made = subprocess.run(
        [compiler, *flags, *SOURCES, "-o", library], capture_output=True, text=True, check=False
    )
    preload = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if made.returncode or not Path(preload).is_absolute():
        pytest.skip(f"the compiler has no sanitizers: {made.stderr[-200:]}")
    code = (
        "import importlib.machinery, importlib.util, sys\n"
        "name = 'dtl.core.lattice._lattice'\n"
        "loader = importlib.machinery.ExtensionFileLoader(name, sys.argv[1])\n"
        "module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))\n"
        "loader.exec_module(module)\n"
        "import dtl.core.lattice\n"
        "sys.modules[name] = dtl.core.lattice._lattice = module\n"
        "from tests import test_lattice as t\n"
        "assert t.native._lattice is module\n"
        "t.BACKENDS.pop('emulated', None)\n"
        "for seed in range(4, 9):\n"
        "    t.test_back_ends_are_equal(seed)\n"
        "for name in t.native._variants:\n"
        "    backend = t.BACKENDS[name]\n"
        "    t.test_the_largest_of_everything_opens(backend, 1, 9)\n"
        "    t.test_words_out_of_range_are_refused(backend, 1)\n"
        "    t.test_values_that_are_not_finite(backend)\n"
        "    t.test_the_rounding_stream_is_endless(backend)\n"
        "    t.test_wrong_arguments_raise(backend)\n"
        "    t.test_threads_share_an_instance(backend)\n"
        "t.test_the_kernel_checks_sizes()\n"
        "print('clean')\n"
    )
    environment = os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    found = subprocess.run(
        [sys.executable, "-c", code, library],
        cwd=LATTICE.parent.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout.strip() == "clean", found.stderr[-4000:]
