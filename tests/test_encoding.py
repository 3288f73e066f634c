"""Fixed point and packing, against plain Python integers and fractions."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtl.core.crypto import residues
from dtl.core.crypto.primitives import keystream
from dtl.core.encoding.fixed_point import FixedPoint, Stochastic, nearest
from dtl.core.encoding.packing import Packing
from dtl.core.errors import NumericError, UsageError
from tests.helpers import PRIMES

N = PRIMES[512][0] * PRIMES[512][1]
SEED = Stochastic(b"s" * 32)


@given(st.integers(3, 52), st.data())
@settings(max_examples=60, deadline=None)
def test_packing_is_the_protocol_formula(bits: int, data: st.DataObject) -> None:
    packing = Packing(N, bits)
    assert packing.slots == (512 - 2) // bits
    limit = (1 << (bits - 1)) - 1
    integers = data.draw(st.lists(st.integers(-limit, limit), min_size=1, max_size=400))
    blocks = -(-len(integers) // packing.slots)
    packed = packing.pack(np.array(integers), blocks)
    for number, found in enumerate(residues.to_integers(packed)):
        part = integers[number * packing.slots : (number + 1) * packing.slots]
        assert found == sum(e << (bits * i) for i, e in enumerate(part)) % N
    unpacked, fits = packing.unpack(packed, len(integers))
    assert unpacked.tolist() == integers
    assert fits.tolist() == [True] * blocks


def test_unpacking_adds_up_sums() -> None:
    packing = Packing(N, 24)
    rows = np.random.default_rng(0).integers(-(2**20), 2**20, (3, 50))
    total = sum(residues.to_integers(packing.pack(row, 3))[0] for row in rows) % N
    block = residues.from_integers([total], 64)
    slots = packing.slots
    found, fits = packing.unpack(block, slots)
    assert found.tolist() == rows.sum(axis=0)[:slots].tolist()
    assert fits.all()


@pytest.mark.parametrize("value", [N // 2, 1 << 509, N - (1 << 509)])
def test_a_block_out_of_range_is_noted_and_the_others_are_cut(value: int) -> None:
    packing = Packing(N, 24)
    good = residues.to_integers(packing.pack(np.arange(packing.slots), 1))[0]
    blocks = residues.from_integers([good, value, good], 64)
    found, fits = packing.unpack(blocks, 3 * packing.slots)
    assert fits.tolist() == [True, False, True]
    assert found[: packing.slots].tolist() == found[2 * packing.slots :].tolist()
    assert found[: packing.slots].tolist() == list(range(packing.slots))


def test_padding_must_be_zero() -> None:
    packing = Packing(N, 24)
    packed = packing.pack(np.array([1, 2, 3]), 2)
    found, fits = packing.unpack(packed, 3)
    assert (found.tolist(), fits.tolist()) == ([1, 2, 3], [True, True])
    assert packing.unpack(packed, 2)[1].tolist() == [False, True]
    last = packing.pack(np.arange(packing.slots + 1), 2)
    assert packing.unpack(last, packing.slots)[1].tolist() == [True, False]


@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=True), min_size=1, max_size=50),
    st.floats(1e-3, 1e3),
)
def test_nearest_rounding_is_ties_to_even_then_clamp(values: list[float], scale: float) -> None:
    fixed_point = FixedPoint(24, 20, 5)
    found, clamped = fixed_point.encode_step(np.array(values), scale, nearest, 0)
    expected = [round(Fraction(value * scale) * 2**20) for value in values]
    limit = (2**22 - 1) // 5
    assert fixed_point.max_step == limit
    assert found.tolist() == [max(-limit, min(limit, e)) for e in expected]
    assert clamped == sum(abs(e) > limit for e in expected)


def test_stochastic_rounding_is_unbiased_and_within_one() -> None:
    fixed_point = FixedPoint(24, 20, 5)
    exact = np.linspace(-3.3, 3.3, 41) * 2.0**-20
    draws = np.array(
        [
            fixed_point.encode_step(exact, 1.0, Stochastic(bytes([i % 256, i // 256] * 16)), 0)[0]
            for i in range(4000)
        ]
    )
    assert (np.abs(draws - exact * 2**20) < 1).all()
    # The deviation of a mean of 4000 draws is at most 0.5 / sqrt(4000) = 0.008.
    assert np.abs(draws.mean(axis=0) - exact * 2**20).max() < 5 * 0.008


def test_stochastic_rounding_is_the_protocol_formula() -> None:
    """Value i is rounded up if the u32 at byte 4 i of the keystream is below its fraction 2^32."""
    fixed_point = FixedPoint(24, 16, 5)
    values = np.random.default_rng(2).normal(0, 1, 300).astype(np.float32)
    start, scale = 1001, 0.3
    stream = keystream(SEED.seed, 4 * start, 4 * len(values))
    expected = []
    for place, value in enumerate(map(float, values)):
        exact = value * scale * 2.0**16  # in float64, in this order
        word = int.from_bytes(stream[4 * place : 4 * place + 4], "little")
        fraction = Fraction(exact) - floor(exact)
        expected.append(floor(exact) + (word < fraction * 2**32))
    assert fixed_point.encode_step(values, scale, SEED, start)[0].tolist() == expected


def test_stochastic_rounding_compares_strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.array([0, 0, 2**31 - 1, 2**31, 2**32 - 1], "<u4")
    monkeypatch.setattr("dtl.core.encoding.fixed_point.keystream", lambda *_: words.tobytes())
    exact = np.array([3.0, 3.5, 3.5, 3.5, -3.25])
    assert SEED(exact, 0).tolist() == [3, 4, 4, 3, -4]


def test_stochastic_rounding_does_not_depend_on_the_chunks() -> None:
    values = np.random.default_rng(1).normal(0, 3, 1000)
    whole = SEED(values, 0)
    parts = [SEED(values[start : start + 137], start) for start in range(0, 1000, 137)]
    assert (np.concatenate(parts) == whole).all()


def test_huge_values_are_clamped_not_wrapped() -> None:
    fixed_point = FixedPoint(52, 40, 3)
    found, clamped = fixed_point.encode_step(np.array([1e308, -1e308]), 1e3, nearest, 0)
    assert found.tolist() == [fixed_point.max_step, -fixed_point.max_step]
    assert clamped == 2


def test_initial_weights_must_fit() -> None:
    fixed_point = FixedPoint(24, 20, 3)
    limit = fixed_point.max_value / fixed_point.one
    assert fixed_point.encode_weights(np.array([limit, -limit])).tolist() == [2**22 - 1, 1 - 2**22]
    for beyond in (4.0, -4.0, np.inf, np.nan):
        with pytest.raises(NumericError, match="headroom"):
            fixed_point.encode_weights(np.array([beyond]))


@pytest.mark.parametrize(
    "parameters", [(2, 0, 3), (53, 20, 3), (24, 23, 3), (24, -1, 3), (4, 1, 4), (10, 3, 256)]
)
def test_impossible_parameters(parameters: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        FixedPoint(*parameters)


def test_no_overflow_goes_unnoticed() -> None:
    """From the largest allowed value, n largest steps still stay inside a slot."""
    for participants in (1, 3, 5, 100):
        fixed_point = FixedPoint(24, 20, participants)
        assert fixed_point.max_value + participants * fixed_point.max_step < 1 << 23
