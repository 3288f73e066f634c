"""The native kernel against plain Python integers and against the gmpy2 back end.

Where the processor has no AVX-512 IFMA, the kernel runs on emulated instructions
(tests/emulated), so that it is tested on every machine with a compiler.
"""

import ctypes
import functools
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from math import gcd
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtl.core.crypto import group, native, portable, proof, release_proof, residues, scheme
from dtl.core.crypto.arithmetic import (
    Arithmetic,
    Bytes,
    best_window,
    from_integers,
    to_integers,
)
from dtl.core.errors import FormatError, UsageError, VerificationError
from dtl.core.lattice import ring
from tests.emulated import build
from tests.helpers import PRIMES, Cli, Round, random_arrays

CRYPTO = Path(__file__).parent.parent / "core" / "crypto"
SIZES = (256, 264, 512, 1040, 1664, 2048, 3072, 4096, 8192)  # bits of N; N^2 has twice as many
REAL_KERNEL = getattr(native, "_kernel", None)
NAME = "dtl.core.crypto._kernel"
SOURCES = [CRYPTO / "_kernel.c", CRYPTO / "_ifma.c"]


@pytest.fixture(scope="session")
def emulated_kernel(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The kernel with emulated instructions; built once, also for several test processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    library = folder / "emulated" / "_kernel.so"
    try:
        build.build(SOURCES, library)
    except build.NoCompiler as error:
        pytest.skip(f"no native kernel ({native.unavailable()}), and {error}")
    return build.load(NAME, library)


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernel as it is, or else emulated."""
    if native.unavailable():
        module = request.getfixturevalue("emulated_kernel")
        monkeypatch.setattr(native, "_kernel", module, raising=False)
        monkeypatch.setattr(native, "_missing", None)


needs_kernel = pytest.mark.usefixtures("kernel")


@pytest.fixture(params=["native", "gmpy2"])
def backend(request: pytest.FixtureRequest) -> "Backend":
    """Both back ends, one after the other."""
    if request.param == "gmpy2":
        return portable.Arithmetic
    request.getfixturevalue("kernel")
    return native.Arithmetic


def moduli() -> Iterator[int]:
    """Odd moduli of exact size: the least, the greatest (limbs all ones), one in between."""
    for bits in SIZES:
        yield (1 << bits - 1) + 1
        yield (1 << bits) - 1
        yield secrets.randbits(bits) | 1 | 1 << bits - 1


def operands(n: int) -> list[int]:
    """Adversarial residues modulo n^2, the random one last; 13 of them: not a multiple of 8."""
    n2, bits = n * n, n.bit_length()
    ones = (1 << 2 * bits) - 1
    lowest = (1 << bits) - 1  # all limbs of one half
    wanted = [0, 1, 2, n - 1, n, n + 1, n2 - 1, n2 - n, n2 - n + 1, n2 // 2, ones % n2]
    return [*wanted, lowest % n2, secrets.randbelow(n2)]


def batch_of(numbers: list[int], arithmetic: Arithmetic) -> Bytes:
    return from_integers(numbers, arithmetic.width)


def blocks_of(numbers: list[int], arithmetic: Arithmetic) -> Bytes:
    return from_integers(numbers, arithmetic.block_width)


EVERY = list(moduli())
MOST_EMULATED_BITS = 2048  # emulated instructions are slow


def skip_if_slow(arithmetic: Arithmetic) -> None:
    if getattr(native, "_kernel", None) is not REAL_KERNEL and (
        isinstance(arithmetic, native.Arithmetic)
        and arithmetic.modulus.bit_length() > MOST_EMULATED_BITS
    ):
        pytest.skip("emulated instructions are slow")


IDS = [
    f"{n.bit_length()}-{kind}"
    for n, kind in zip(EVERY, ["least", "ones", "random"] * 9, strict=True)
]
Backend = Callable[[int], Arithmetic]


@pytest.mark.parametrize("n", EVERY, ids=IDS)
def test_every_operation_is_the_integers_one(backend: Backend, n: int) -> None:
    arithmetic, n2, x = backend(n), n * n, operands(n)
    skip_if_slow(arithmetic)
    y = [*x[5:], *x[:5]]
    first, second = batch_of(x, arithmetic), batch_of(y, arithmetic)

    def numbers(batch: Bytes) -> list[int]:
        assert batch.dtype == np.uint8
        return to_integers(batch)

    assert numbers(arithmetic.product([first])) == x
    assert numbers(arithmetic.product([first, second])) == [
        a * b % n2 for a, b in zip(x, y, strict=True)
    ]
    assert numbers(arithmetic.product([first, second, second, first])) == [
        (a * b) ** 2 % n2 for a, b in zip(x, y, strict=True)
    ]
    m = [v % n for v in y]
    blocks = blocks_of(m, arithmetic)
    assert numbers(arithmetic.add_blocks(first, blocks)) == [
        a * (1 + b * n) % n2 for a, b in zip(x, m, strict=True)
    ]
    assert numbers(arithmetic.subtract_blocks(first, blocks)) == [
        a * (1 - b * n) % n2 for a, b in zip(x, m, strict=True)
    ]
    opened = [(1 + b * n) % n2 for b in m] + [(-1 - b * n) % n2 for b in m]
    found, good = arithmetic.logarithms(batch_of(opened, arithmetic))
    assert numbers(found) == [*m, *m]
    assert good.all()
    if n.bit_length() <= 1040:  # the exponent is as long as n
        assert numbers(arithmetic.lift(first)) == [pow(a, n, n2) for a in x]

    # Groups of 3 and of 4: the first of each is a number modulo n.
    for columns in (3, 4):
        groups = first[:12].reshape(-1, columns, arithmetic.width)
        others = second[:12].reshape(groups.shape)
        moduli = [n, *[n2] * (columns - 1)] * (12 // columns)
        pairs = list(zip(x, y, moduli, strict=False))
        assert numbers(arithmetic.group_product([groups])) == [a % m for a, _, m in pairs]
        assert numbers(arithmetic.group_product([groups, others])) == [
            a * b % m for a, b, m in pairs
        ]
        assert numbers(arithmetic.reduce_groups(groups)) == [a % m for a, _, m in pairs]
        units = [2, 4, 8, n - 2, n2 - 2, n2 - 4] * 2
        inverses = arithmetic.group_inverse(batch_of(units, arithmetic).reshape(groups.shape))
        assert numbers(inverses) == [pow(a, -1, m) for a, m in zip(units, moduli, strict=True)]
    units = [v for v in x if gcd(v, n) == 1]
    assert numbers(arithmetic.inverse(batch_of(units, arithmetic))) == [
        pow(v, -1, n2) for v in units
    ]
    arithmetic.check(batch_of(units, arithmetic))


@pytest.mark.parametrize(
    "n",
    [
        pytest.param(n, id=name, marks=[pytest.mark.slow] * (n.bit_length() > 3072))
        for n, name in zip(EVERY[2::3], IDS[2::3], strict=True)
    ],
)
def test_every_power_is_the_integers_one(backend: Backend, n: int) -> None:
    arithmetic, n2, x = backend(n), n * n, operands(n)
    skip_if_slow(arithmetic)
    exponents = [0, 1, 2, 6, (1 << 64) - 1, 1 << 63, secrets.randbits(60)]
    batch = batch_of(x, arithmetic)
    for bits in (None, 64, 67):
        found = arithmetic.shared_base_powers(batch, exponents, secret_bits=bits)
        assert found.shape == (len(x), len(exponents), arithmetic.width)
        assert to_integers(found) == [pow(v, e, n2) for v in x for e in exponents]
        found = arithmetic.powers(batch, exponents[-1], secret_bits=bits)
        assert to_integers(found) == [pow(v, exponents[-1], n2) for v in x]
    with pytest.raises(ValueError, match="more than 63 bits"):
        arithmetic.shared_base_powers(batch, exponents, secret_bits=63)

    rows, columns = [x, x[::-1], [*x[3:], *x[:3]]], len(x)
    weights = [0, 1, secrets.randbits(24)]
    cube = np.stack([batch_of(row, arithmetic) for row in rows])
    product = arithmetic.weighted_products(cube, from_integers(weights, 3))
    expected = [1] * columns
    for row, weight in zip(rows, weights, strict=True):
        expected = [e * pow(v, weight, n2) % n2 for e, v in zip(expected, row, strict=True)]
    assert to_integers(product) == expected

    if n.bit_length() <= 512:  # many bases: by Pippenger's buckets
        many = [[secrets.randbelow(n2) for _ in range(2)] for _ in range(100)]
        drawn = [0, 1, *(secrets.randbits(24) for _ in range(98))]
        assert [best_window(count, 24) > 0 for count in (3, 100)] == [False, True]
        flat = batch_of([number for row in many for number in row], arithmetic)
        product = arithmetic.weighted_products(flat.reshape(100, 2, -1), from_integers(drawn, 3))
        assert to_integers(product) == [
            functools.reduce(lambda e, f: e * f % n2, (pow(row[k], weight, n2)
            for row, weight in zip(many, drawn, strict=True)))
            for k in range(2)
        ]  # fmt: skip

    for count, uses in ((1, 1), (7, 3), (8, 400)):
        bases, m = x[-count:], [v % n for v in x[:count]]
        table = arithmetic.fixed_base_table(bases, 64, uses)
        packed = from_integers(exponents, 8)
        powers = [pow(v, e, n2) for e in exponents for v in bases]
        assert to_integers(table.powers(packed)) == powers
        blocks = np.tile(blocks_of(m, arithmetic), (len(exponents), 1, 1))
        assert to_integers(table.powers(packed, blocks)) == [
            p * (1 + b * n) % n2 for p, b in zip(powers, m * len(exponents), strict=True)
        ]
        table = arithmetic.fixed_base_table(bases, 64, uses, groups=True)
        moduli = [n, *[n2] * (count - 1)] * len(exponents)
        assert to_integers(table.powers(packed)) == [
            power % modulus for power, modulus in zip(powers, moduli, strict=True)
        ]


@needs_kernel
@given(st.data())
@settings(
    max_examples=20 if native.unavailable() else 60,  # emulated instructions are slow
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_both_back_ends_agree(data: st.DataObject) -> None:
    bits = data.draw(st.integers(32, 160)) * 8
    n = data.draw(st.integers(1 << bits - 1, (1 << bits) - 1)) | 1
    ours, theirs = native.Arithmetic(n), portable.Arithmetic(n)
    count = data.draw(st.integers(0, 19))
    numbers = st.lists(st.integers(0, n * n - 1), min_size=count, max_size=count)
    x, y = (batch_of(data.draw(numbers), ours) for _ in range(2))
    small = st.lists(st.integers(0, n - 1), min_size=count, max_size=count)
    m = blocks_of(data.draw(small), ours)
    exponents = data.draw(st.lists(st.integers(0, 1 << 90), min_size=1, max_size=3))
    weights = np.frombuffer(data.draw(st.binary(min_size=4 * count, max_size=4 * count)), np.uint8)
    seven = [secrets.randbelow(n * n) for _ in range(7)]
    drawn = np.frombuffer(data.draw(st.binary(min_size=12 * count, max_size=12 * count)), np.uint8)
    uses = data.draw(st.integers(1, 2000))

    cube, weights = x.reshape(count, 1, ours.width), weights.reshape(count, 4)

    def results(arithmetic: Arithmetic) -> list[bytes]:
        table = arithmetic.fixed_base_table(seven, 96, uses)
        return [
            found.tobytes()
            for found in (
                arithmetic.product([x, y, x]),
                arithmetic.add_blocks(x, m),
                arithmetic.subtract_blocks(x, m),
                arithmetic.shared_base_powers(x, exponents, secret_bits=None),
                arithmetic.shared_base_powers(x, exponents, secret_bits=91),
                arithmetic.weighted_products(cube, weights),
                table.powers(drawn.reshape(count, 12)),
            )
        ]

    assert results(ours) == results(theirs)


@needs_kernel
def test_empty_batches() -> None:
    n = EVERY[8]
    arithmetic = native.Arithmetic(n)
    none = np.zeros((0, arithmetic.width), np.uint8)
    blocks = np.zeros((0, arithmetic.block_width), np.uint8)
    arithmetic.check(none)
    assert arithmetic.product([none, none]).shape == none.shape
    assert arithmetic.inverse(none).shape == none.shape
    assert arithmetic.add_blocks(none, blocks).shape == none.shape
    assert arithmetic.logarithms(none)[0].shape == blocks.shape
    assert arithmetic.logarithms(none)[1].shape == (0,)
    one = batch_of([1], arithmetic)
    for bits in (None, 3):
        found = arithmetic.shared_base_powers(none, [3, 4], secret_bits=bits)
        assert found.shape == (0, 2, arithmetic.width)
        found = arithmetic.shared_base_powers(one, [], secret_bits=bits)
        assert found.shape == (1, 0, arithmetic.width)
    weighted = arithmetic.weighted_products(
        np.zeros((0, 8, arithmetic.width), np.uint8), np.zeros((0, 16), np.uint8)
    )
    assert to_integers(weighted) == [1] * 8
    table = arithmetic.fixed_base_table([5], 64, 10)
    assert table.powers(np.zeros((0, 8), np.uint8)).shape == (0, 1, arithmetic.width)


def test_what_must_be_refused_is(backend: Backend) -> None:
    p, q = PRIMES[512]
    n = p * q
    arithmetic = backend(n)
    fine = [2] * 20
    for place in (0, 7, 8, 20):
        for bad in (0, n * n, n * n + 1, p, q * 5, n):
            numbers = [*fine[:place], bad, *fine[place:]]
            with pytest.raises(FormatError):
                arithmetic.check(batch_of(numbers, arithmetic))
        with pytest.raises(VerificationError):
            arithmetic.inverse(batch_of([*fine[:place], p, *fine[place:]], arithmetic))
        opened = [1 + 5 * n, *[n * n - 1 - 3 * n] * 20]
        for bad in (0, 2, n, n + 2, n * n - 2, n - 2):
            numbers = [*opened[:place], bad, *opened[place:]]
            blocks, good = arithmetic.logarithms(batch_of(numbers, arithmetic))
            found = to_integers(blocks)  # all of the others open nevertheless
            assert found.pop(place) == 0
            assert found == [5, *[3] * 20]
            assert good.tolist() == [index != place for index in range(22)]


@needs_kernel
def test_wrong_arguments_raise() -> None:
    _kernel: Any = vars(native)["_kernel"]  # the real one, or emulated
    n = EVERY[8]
    arithmetic = native.Arithmetic(n)
    w, b = arithmetic.width, arithmetic.block_width
    x = batch_of([1, 2, 3], arithmetic)
    blocks = blocks_of([1, 2], arithmetic)
    strided = np.zeros((3, 2 * w), np.uint8)[:, ::2]
    wide: Any = np.zeros((3, w), np.uint16)
    for wrong in (
        lambda: arithmetic.product([x, x[:2]]),
        lambda: arithmetic.product([x[:, 1:]]),
        lambda: arithmetic.product([wide]),
        lambda: arithmetic.add_blocks(x, blocks),
        lambda: arithmetic.inverse(x[:, :-1]),
        lambda: arithmetic.check(x[:, :-1]),
        lambda: arithmetic.logarithms(blocks),
        lambda: arithmetic.shared_base_powers(blocks, [1], secret_bits=None),
        lambda: arithmetic.shared_base_powers(blocks, [1], secret_bits=8),
        lambda: arithmetic.weighted_products(x.reshape(3, 1, w), x[:2, :16]),
        lambda: arithmetic.fixed_base_table([1] * 9, 64, 10),
        lambda: arithmetic.fixed_base_table([], 64, 10),
        lambda: arithmetic.fixed_base_table([1], 64, 10).powers(x[:, :9] + np.uint8(128)),
        lambda: arithmetic.fixed_base_table([1], 64, 10).powers(x[:, :8], blocks),
    ):
        with pytest.raises(ValueError, match=r"."):
            wrong()
    assert to_integers(arithmetic.product([strided])) == [0, 0, 0]  # copied, not refused

    kernel = arithmetic._kernel
    out, small = np.zeros((3, w), np.uint8), np.zeros(w - 1, np.uint8)
    half = np.zeros((2, b), np.uint8)
    frozen = np.zeros((3, w), np.uint8)
    frozen.flags.writeable = False
    for call, arguments in (
        (kernel.product, ((x,), 0, half, small)),
        (kernel.product, ((), 0, half, out)),
        (kernel.product, ((x, small), 0, half, out)),
        (kernel.product, ((x, 5), 0, half, out)),
        (kernel.product, ([x], 0, half, out)),
        (kernel.product, ((x,), 0, small, out)),
        (kernel.product, ((x,), -1, half, out)),
        (kernel.product, ((strided,), 0, half, out)),
        (kernel.product, ((x,), 0, half, frozen)),
        (kernel.running, (x, small, np.zeros((8, w), np.uint8))),
        (kernel.running, (x, np.zeros(kernel.element_bytes(), np.uint8), out)),
        (kernel.unwind, (x, small, np.zeros((8, w), np.uint8), out)),
        (kernel.unwind, (x, np.zeros(kernel.element_bytes(), np.uint8), out, out)),
        (kernel.add_blocks, (x, half, out)),
        (kernel.check, (x, half)),
        (kernel.logarithms, (x, out, np.zeros(3, np.uint8))),
        (kernel.logarithms, (x, np.zeros((3, b), np.uint8), np.zeros(2, np.uint8))),
        (kernel.secret_powers, (x, b"12", 0, 8, out)),
        (kernel.secret_powers, (x, b"123", 2, 8, out)),
        (kernel.secret_powers, (x, b"", 2, 8, out)),
        (kernel.secret_powers, (x, b"12", 1, 8, out)),
        (kernel.secret_powers, (x, b"1", 1, 0, out)),
        (kernel.secret_powers, (x, b"1", 1, 9, out)),
        (kernel.shared_base_powers, (x, b"12", 0, out)),
        (kernel.shared_base_powers, (x, b"123", 2, out)),
        (kernel.shared_base_powers, (x, b"", 2, out)),
        (kernel.shared_base_powers, (x, b"12", 1, out)),
        (kernel.shared_base_powers, (x, b"12", -1, out)),
        (kernel.weighted_products, (x, b"123", 1, -1, out)),
        (kernel.weighted_products, (x, b"123", 1, 17, out)),
        (kernel.weighted_products, (x, b"12", 1, 4, out)),
        (kernel.weighted_products, (x, b"123", 1, 4, b"")),
        (kernel.table, (x, 0, 4, 1, False)),
        (kernel.table, (x, 17, 4, 1, False)),
        (kernel.table, (x, 2, 4, 5, False)),
        (kernel.table, (x, 2, 1 << 40, 1, False)),
        (kernel.table(x, 2, 4, 2, False).fill, (2,)),
        (kernel.table(x, 2, 4, 2, False).fill, (-1,)),
        (kernel.table(x, 2, 4, 2, False).powers, (b"1", 1, None, True, np.zeros((3, w), np.uint8))),
        (_kernel.Modulus, (b"",) * 3),
        (_kernel.Modulus, (bytes(b), bytes(b), bytes(w))),
        (_kernel.Modulus, (bytes([2]) * b, bytes(b), bytes(w))),
        (_kernel.Modulus, (bytes([1]) * b, bytes(b), bytes(b))),
        (_kernel.Modulus, (bytes([1]) * 1025, bytes(1025), bytes(2050))),
        (_kernel.radix_bits, (0,)),
    ):
        with pytest.raises((ValueError, TypeError, BufferError)):
            call(*arguments)
    with pytest.raises(TypeError):
        type(kernel.table(x, 2, 4, 2, False))()  # only a modulus makes tables


@needs_kernel
def test_threads_share_one_table() -> None:
    n = EVERY[8]
    arithmetic = native.Arithmetic(n)
    bases = [secrets.randbelow(n * n) for _ in range(8)]
    table = arithmetic.fixed_base_table(bases, 256, 2000)
    exponents = [secrets.randbits(256) for _ in range(12)]
    found: dict[int, list[int]] = {}

    def work(i: int) -> None:
        found[i] = to_integers(table.powers(from_integers(exponents[i : i + 1], 32)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(exponents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, exponent in enumerate(exponents):
        assert found[i] == [pow(base, exponent, n * n) for base in bases]


# --- constant time ---------------------------------------------------------------------------


class Tracer:
    """The kernel, built to record every branch and every address (tests/emulated/trace.c)."""

    OPTIONS = ("-fsanitize=thread", "-fsanitize-coverage=trace-pc", "-fno-builtin-memcpy",
               "-fno-builtin-memset")  # fmt: skip
    WRAPPED = ("memcpy", "memset", "aligned_alloc", "free")

    def __init__(self, folder: Path) -> None:
        objects = []
        for source, options in (
            (CRYPTO / "_ifma.c", self.OPTIONS),
            (CRYPTO / "_kernel.c", ()),
            (build.HERE / "trace.c", ()),
        ):
            objects.append(folder / f"{source.stem}.o")
            build.compile_object(source, objects[-1], options)
        library = folder / "traced.so"
        build.link(objects, library, [f"-Wl,--wrap={name}" for name in self.WRAPPED])
        self.kernel = build.load(NAME, library)
        self._functions = ctypes.CDLL(str(library))
        for function in (self._functions.trace_stop, self._functions.trace_events):
            function.restype = ctypes.c_uint64

    def steps(self, run: Callable[[], object]) -> tuple[int, int]:
        """A hash over all steps of a run, and their number."""
        self._functions.trace_start()
        run()
        return self._functions.trace_stop(), self._functions.trace_events()


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> Tracer:
    try:
        return Tracer(tmp_path_factory.mktemp("traced"))
    except build.NoCompiler as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_steps_with_secret_exponents_are_the_same_for_all_of_them(
    tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every branch and every address, of powers by a half or by w, and of the comb for r.

    The variable-time functions beside them show that the recorder sees the difference.
    """
    monkeypatch.setattr(native, "_kernel", tracer.kernel, raising=False)
    n = secrets.randbits(256) | 1 | 1 << 255
    arithmetic = native.Arithmetic(n)
    kernel, width = arithmetic._kernel, arithmetic.width
    bases = from_integers([secrets.randbelow(n * n) for _ in range(8)], width)
    exponents, out = np.zeros((3, 9), np.uint8), np.zeros((8, 3, width), np.uint8)
    table = kernel.table(bases, 4, 18, 9, True)
    for block in range(2):
        table.fill(block)
    drawn = np.frombuffer(secrets.token_bytes(2 * exponents.size), np.uint8)
    secret = [*drawn.reshape(2, 3, 9), np.zeros((3, 9)), np.full((3, 9), 255)]

    def recorded(run: Callable[[], object]) -> set[tuple[int, int]]:
        found = set()
        for numbers in secret:
            exponents[...] = numbers
            found.add(tracer.steps(run))
        return found

    masked = [
        lambda: kernel.secret_powers(bases, exponents, 9, 70, out),
        lambda: table.powers(exponents, 9, None, True, out),
    ]
    variable = [
        lambda: kernel.shared_base_powers(bases, exponents, 9, out),
        lambda: table.powers(exponents, 9, None, False, out),
    ]
    for run in masked:
        assert len(recorded(run)) == 1
    for run in variable:
        assert len(recorded(run)) == len(secret)


class Recorder:
    """In the place of the kernel's modulus: notes which functions are called, and how."""

    def __init__(self, modulus: Any, calls: list[tuple[str, int, list[int]]]) -> None:
        self._modulus, self._calls = modulus, calls

    def __getattr__(self, name: str) -> Any:
        if name == "secret_powers":
            return self._secret_powers
        if name == "shared_base_powers":
            return self._public_powers
        return getattr(self._modulus, name)

    def _secret_powers(self, bases: Bytes, exponents: Bytes, width: int, bits: int, out: Bytes
    ) -> None:  # fmt: skip
        self._calls.append(("secret", bits, to_integers(exponents)))
        self._modulus.secret_powers(bases, exponents, width, bits, out)

    def _public_powers(self, bases: Bytes, exponents: Bytes, width: int, out: Bytes) -> None:
        self._calls.append(("public", 0, to_integers(exponents)))
        self._modulus.shared_base_powers(bases, exponents, width, out)


@needs_kernel
def test_secret_exponents_take_the_masked_path() -> None:
    """Halves, sums of halves, w of both proofs, and r of a short vector."""
    p, q = PRIMES[512]
    n = p * q
    halves = [group.expand_half(bytes([k]) * 32, "half", bytes(16), 256) for k in (1, 2)]
    public_key = group.generate_public_key(group.StrongTrapdoor(p, q), *halves)
    calls: list[tuple[str, int, list[int]]] = []
    arithmetic: Any = native.Arithmetic(n)
    key = group.PublicKey(n, public_key.gamma, public_key.h, public_key.server)
    key.__dict__["arithmetic"] = arithmetic
    arithmetic._kernel = Recorder(arithmetic._kernel, calls)

    def secret_bits(run: Callable[[], object]) -> list[int]:
        calls.clear()
        run()
        return [bits for kind, bits, _ in calls if kind == "secret"]

    blocks = np.zeros((3, 7, arithmetic.block_width), np.uint8)
    randomness = np.frombuffer(secrets.token_bytes(96), np.uint8).reshape(3, 32)
    residues_ = scheme.encrypt(key, blocks, randomness, 3)
    sums = [a + b for a, b in zip(*halves, strict=True)]
    stream = secrets.token_bytes(proof.witness_bytes(key, 3))
    assert secret_bits(lambda: group.has_halves(key, *halves)) == [257, 257]
    assert secret_bits(lambda: scheme.apply_half(key, residues_, halves[1])) == [257]
    assert [values for kind, _, values in calls if kind == "public"] == [[n]]  # the lift
    assert secret_bits(lambda: scheme.well_formed(key, residues_, blocks, sums)) == [259]
    assert secret_bits(lambda: proof.commit(key, 3, stream)) == [256 + 256 + 2]
    rho = release_proof.weights(b"core", b"of", bytes(64), 3)
    base = release_proof.base_product(key, residues_, rho)
    prove = functools.partial(release_proof.prove, key, halves[0], b"s" * 32, b"core", b"of")
    assert secret_bits(lambda: prove(bytes(64), base)) == [257, 512]
    few, many = (arithmetic.fixed_base_table([5], 256, uses) for uses in (17, 33))
    assert few._masked
    assert few.rows <= 6  # all entries of a block are read for every digit
    assert not many._masked


# --- which back end --------------------------------------------------------------------------


def test_the_kernel_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    n = EVERY[8]
    monkeypatch.setenv("DTL_KERNEL", "gmpy2")
    assert residues.kernel_name() == "gmpy2"
    assert residues.why_not_native()
    assert isinstance(residues.arithmetic(n), portable.Arithmetic)
    monkeypatch.setenv("DTL_KERNEL", "abacus")
    with pytest.raises(UsageError, match="expected native, portable or gmpy2, found abacus"):
        residues.kernel_name()
    monkeypatch.setenv("DTL_KERNEL", "portable")  # a name of the lattice's kernels
    assert residues.kernel_name() == "gmpy2"
    monkeypatch.setattr(native, "_missing", "no such luck")
    monkeypatch.setenv("DTL_KERNEL", "native")
    with pytest.raises(UsageError, match="no such luck"):
        residues.kernel_name()
    monkeypatch.delenv("DTL_KERNEL")
    assert residues.kernel_name() == "gmpy2"
    assert residues.why_not_native() == "no such luck"


@needs_kernel
def test_native_is_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTL_KERNEL", raising=False)
    assert residues.kernel_name() == "native"
    assert residues.why_not_native() is None
    assert isinstance(residues.arithmetic(EVERY[8]), native.Arithmetic)
    for unsupported in (EVERY[8] + 1, (1 << 8208) - 1, (1 << 129) - 1, (1 << 240) - 1):
        assert isinstance(residues.arithmetic(unsupported), portable.Arithmetic)


def test_version_names_the_kernel(dtl: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dtl("--version").out.count("\n") == 1
    monkeypatch.setenv("DTL_KERNEL", "gmpy2")
    found = dtl("--version", "--verbose").out
    assert "kernel: gmpy2 (not native: " in found
    monkeypatch.setenv("DTL_KERNEL", "abacus")
    assert "abacus" in dtl("--version", "--verbose", code=2).err


@needs_kernel
@pytest.mark.parametrize("masks", [pytest.param(False, marks=pytest.mark.slow), True])
def test_both_back_ends_write_the_same_files(
    new_round: Callable[..., Round], monkeypatch: pytest.MonkeyPatch, masks: bool
) -> None:
    """With the randomness fixed, uploads and results are the same byte for byte."""
    monkeypatch.setattr(secrets, "token_bytes", lambda count: b"\7" * count)
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    # The lattice's back ends are held against one another in test_lattice.
    monkeypatch.setattr(ring, "lattice_kernel_name", lambda: ring.NUMPY)
    round_ = new_round(masks=masks)
    given = {name: random_arrays(n) for n, name in enumerate(round_.names)}
    ledgers = {path: path.read_bytes() for path in round_.keys.glob("*.ledger")}
    results = []
    for kernel in ("native", "gmpy2"):
        for path, content in ledgers.items():
            path.write_bytes(content)
        monkeypatch.setenv("DTL_KERNEL", kernel)
        uploads = round_.uploads(given, "--rounding-seed", "5" * 64, tag=kernel)
        total = round_.aggregate(uploads, out=f"{kernel}.enc")
        release = round_.release(total, out=f"{kernel}.release")
        opened = round_.open(release, "alice", out=f"{kernel}.safetensors")
        results.append([path.read_bytes() for path in (*uploads, total, opened)])
    assert results[0] == results[1]


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_kernel_is_clean_under_sanitizers(tmp_path: Path) -> None:
    """Build it with -fsanitize=address,undefined, and run these very tests on that build.

    With emulated instructions building alone takes a minute: only where DTL_SLOW_TESTS is set.
    """
    emulated = REAL_KERNEL is None or bool(REAL_KERNEL.unavailable())
    if emulated and not os.environ.get("DTL_SLOW_TESTS"):
        pytest.skip("emulated instructions under sanitizers: set DTL_SLOW_TESTS to run this")
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        pytest.skip("no compiler")
    import sysconfig

    def run(*command: object, **options: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*map(str, command)], check=False, capture_output=True, text=True, **options
        )

    flags = ["-std=c11", "-O1", "-g", "-fPIC", "-shared", "-fno-sanitize-recover=all"]
    flags += ["-fsanitize=address,undefined", f"-I{sysconfig.get_paths()['include']}"]
    flags += [f"-I{build.HERE}", "-DDTL_EMULATED", "-Wno-psabi"] if emulated else []
    built = tmp_path / "_kernel.abi3.so"
    sources = [CRYPTO / "_kernel.c", CRYPTO / "_ifma.c"]
    made = subprocess.run(
        [compiler, *flags, *sources, "-o", built], capture_output=True, text=True, check=False
    )
    library = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if made.returncode or not Path(library).is_absolute():
        pytest.skip(f"the compiler has no sanitizers: {made.stderr[-200:]}")
    code = (
        "import importlib.machinery, importlib.util, sys\n"
        "loader = importlib.machinery.ExtensionFileLoader('dtl.core.crypto._kernel', sys.argv[1])\n"
        "spec = importlib.util.spec_from_loader(loader.name, loader)\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "loader.exec_module(module)\n"
        "import dtl.core.crypto\n"
        "sys.modules[loader.name] = dtl.core.crypto._kernel = module\n"
        "from tests import test_kernel as t\n"
        "assert t.native._kernel is module\n"
        "emulated = sys.argv[2] == 'True'\n"
        "for n in t.EVERY[2:9:3] if emulated else t.EVERY[2:21:3] + t.EVERY[-1:]:\n"
        "    t.test_every_operation_is_the_integers_one(t.native.Arithmetic, n)\n"
        "for n in t.EVERY[2:3] if emulated else t.EVERY[2:21:6]:\n"
        "    t.test_every_power_is_the_integers_one(t.native.Arithmetic, n)\n"
        "t.test_empty_batches(); t.test_wrong_arguments_raise(); t.test_threads_share_one_table()\n"
        "t.test_what_must_be_refused_is(t.native.Arithmetic)\n"
        "print('clean')\n"
    )
    environment = os.environ | {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    found = run(
        sys.executable, "-c", code, built, emulated, cwd=CRYPTO.parent.parent, env=environment
    )
    assert found.stdout.strip() == "clean", found.stderr[-4000:]
