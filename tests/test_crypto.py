"""The scheme on numbers, against plain Python integers and python-paillier."""

import hashlib
import math
import secrets

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phe.paillier import PaillierPrivateKey, PaillierPublicKey

from dtl.core.crypto import group, primes, primitives, residues, scheme
from dtl.core.crypto.arithmetic import best_comb
from dtl.core.crypto.group import COMPONENTS, PublicKey, StrongTrapdoor
from dtl.core.crypto.residues import Bytes
from dtl.core.errors import FormatError, NotAllowedError, UsageError, VerificationError
from tests.helpers import PRIMES

JOB_ID = bytes(range(16))
P, Q = PRIMES[512]
N = P * Q
WIDTH = N.bit_length() // 8
A = group.expand_half(b"a" * 32, "server-half", JOB_ID, 256)
B = group.expand_half(b"b" * 32, "participant-half", JOB_ID, 256)
KEY = group.generate_public_key(StrongTrapdoor(P, Q), A, B)
PHE = PaillierPrivateKey(PaillierPublicKey(N), P, Q)


def blocks_of(numbers: list[int]) -> Bytes:
    return residues.from_integers(numbers, WIDTH).reshape(-1, COMPONENTS, WIDTH)


def random_blocks(groups: int) -> Bytes:
    return blocks_of([secrets.randbelow(N) for _ in range(COMPONENTS * groups)])


def encrypt(blocks: Bytes) -> Bytes:
    randomness = scheme.fresh_randomness(KEY, len(blocks))
    return scheme.encrypt(KEY, blocks, randomness, len(blocks))


def weak_open(ciphertext: Bytes) -> Bytes:
    half_opened = scheme.apply_half(KEY, ciphertext, A)
    return scheme.open_blocks(KEY, scheme.apply_half(KEY, half_opened, B))


def test_encryption_is_the_protocol_formula() -> None:
    blocks = random_blocks(3)
    randomness = scheme.fresh_randomness(KEY, 3)
    found = residues.to_integers(scheme.encrypt(KEY, blocks, randomness, 3))
    expected = []
    for r, row in zip(residues.to_integers(randomness), blocks, strict=True):
        expected.append(pow(KEY.g, r, N * N))
        for h, m in zip(KEY.h, residues.to_integers(row), strict=True):
            expected.append(pow(h, r, N * N) * (1 + m * N) % N**2)
    assert found == expected


def test_both_halves_open_and_agree_with_python_paillier() -> None:
    blocks = random_blocks(4)
    ciphertext = encrypt(blocks)
    assert (weak_open(ciphertext) == blocks).all()
    opened = [PHE.raw_decrypt(c) for c in residues.to_integers(ciphertext[:, 1:])]
    assert opened == residues.to_integers(blocks)
    assert (scheme.strong_open(StrongTrapdoor(P, Q), ciphertext[:, 1:]) == blocks).all()
    assert not scheme.strong_open(StrongTrapdoor(P, Q), ciphertext[:, 0]).any()


@pytest.mark.parametrize("half", [A, B])
def test_one_half_alone_opens_nothing(half: tuple[int, ...]) -> None:
    blocks = random_blocks(2)
    ciphertext = encrypt(blocks)
    with pytest.raises(VerificationError):
        scheme.open_blocks(KEY, scheme.apply_half(KEY, ciphertext, half))
    # ... and not by ignoring the check either: what one half leaves is still a blinded block.
    left = residues.to_integers(scheme.apply_half(KEY, ciphertext, half)[:, 1:])
    guesses = [(value - 1) // N % N for value in left]
    assert not set(guesses) & set(residues.to_integers(blocks))
    assert all(value % N not in (1, N - 1) for value in left)


def test_homomorphisms_against_plain_integers() -> None:
    first, second, public = (random_blocks(2) for _ in range(3))
    x, y, z = (residues.to_integers(blocks) for blocks in (first, second, public))
    c, d = encrypt(first), encrypt(second)

    def opened(ciphertext: Bytes) -> list[int]:
        return residues.to_integers(weak_open(ciphertext))

    assert opened(scheme.add(KEY, [c, d, d])) == [
        (a + 2 * b) % N for a, b in zip(x, y, strict=True)
    ]
    assert opened(scheme.subtract(KEY, c, d)) == [(a - b) % N for a, b in zip(x, y, strict=True)]
    assert opened(scheme.negate(KEY, c)) == [-a % N for a in x]
    assert opened(scheme.add_public(KEY, c, public)) == [
        (a + b) % N for a, b in zip(x, z, strict=True)
    ]


def test_minus_one_opens_to_the_same_block() -> None:
    """An element of order two is harmless: halves are even, and opening takes +-1."""
    blocks = random_blocks(1)
    numbers = residues.to_integers(encrypt(blocks))
    for index in range(COMPONENTS + 1):
        mauled = list(numbers)
        mauled[index] = N * N - mauled[index]
        ciphertext = residues.from_integers(mauled, 2 * WIDTH).reshape(1, 8, -1)
        assert (weak_open(ciphertext) == blocks).all()


def test_wrong_half_fails_as_a_whole() -> None:
    ciphertext = encrypt(random_blocks(2))
    wrong = (B[0] + 2, *B[1:])
    with pytest.raises(VerificationError):
        scheme.open_blocks(
            KEY, scheme.apply_half(KEY, scheme.apply_half(KEY, ciphertext, A), wrong)
        )


def test_halves_are_the_protocol_formula_and_even() -> None:
    for j, value in enumerate(A, 1):
        info = b""
        for item in (b"dtl/v2/expand", b"server-half", JOB_ID, b"a" * 32, j.to_bytes(4, "little")):
            info += len(item).to_bytes(4, "little") + item
        assert value == 2 * int.from_bytes(hashlib.shake_256(info).digest(32), "little")
        assert value % 2 == 0
    assert len(set(A) | set(B)) == 2 * COMPONENTS


@pytest.mark.parametrize("uses", [1, 3, 100, 5000])
def test_fixed_base_table_is_pow(uses: int) -> None:
    table = KEY.arithmetic.fixed_base_table(KEY.h, 256, uses)
    exponents = [0, 1, 2, (1 << 256) - 1, 1 << 255, secrets.randbits(256)]
    found = table.powers(residues.from_integers(exponents, 32))
    expected = [pow(h, e, N * N) for e in exponents for h in KEY.h]
    assert residues.to_integers(found) == expected


def test_fixed_base_table_grows_with_its_uses_within_its_memory() -> None:
    small, large = (KEY.arithmetic.fixed_base_table(KEY.h[:1], 256, uses) for uses in (1, 20000))
    assert large.rows > small.rows
    rows, depth = best_comb(256, 10**9, 7000, 0.7)
    assert math.ceil(math.ceil(256 / rows) / depth) << rows <= 7000


@given(st.lists(st.integers(0, (1 << 257) - 1), min_size=1, max_size=7))
@settings(max_examples=30, deadline=None)
def test_shared_base_powers_is_pow(exponents: list[int]) -> None:
    bases = [1, N * N - 1, KEY.g]
    batch = residues.from_integers(bases, 2 * WIDTH)
    found = residues.to_integers(KEY.arithmetic.shared_base_powers(batch, exponents))
    assert found == [pow(b, e, N * N) for b in bases for e in exponents]


def test_inverse_and_its_failure() -> None:
    values = [1, 2, N * N - 1, KEY.g]
    found = residues.to_integers(KEY.arithmetic.inverse(residues.from_integers(values, 2 * WIDTH)))
    assert found == [pow(v, -1, N * N) for v in values]
    with pytest.raises(VerificationError):
        KEY.arithmetic.inverse(residues.from_integers([3, P], 2 * WIDTH))


@pytest.mark.parametrize("bad", [0, N * N, N * N + 1, P, Q * 5, N])
def test_check_refuses_bad_residues(bad: int) -> None:
    good = [1, KEY.g, N * N - 1]
    KEY.arithmetic.check(residues.from_integers(good, 2 * WIDTH))
    with pytest.raises(FormatError):
        KEY.arithmetic.check(residues.from_integers([*good, bad], 2 * WIDTH + 1))


def test_safe_primes() -> None:
    found: set[int] = set()
    while len(found) < 4:
        p = primes.search_safe_prime(128)
        if p:
            found.add(p)
    for p in found:
        assert p.bit_length() == 128
        assert p >> 126 == 3
        assert residues.is_prime(p)
        assert residues.is_prime(p // 2)


def test_sieve_strikes_out_exactly_the_multiples() -> None:
    start, window = 1 << 90, 3000
    survivors = set(primes._sieve(start, window, 90))
    small = primes._small_primes().tolist()
    assert small[:4] == [3, 5, 7, 11]
    for offset in range(0, window, 7):
        half = start + offset
        factor = any(
            half % p == 0 or (2 * half + 1) % p == 0 for p in [2, *small] if p != 2 or half % 2 == 0
        )
        assert (offset in survivors) == (not factor)


def test_the_trapdoor_takes_distinct_distant_primes() -> None:
    assert group.choose_trapdoor(iter([P, P, P + 2, Q])) == StrongTrapdoor(P, Q)
    with pytest.raises(UsageError):
        group.choose_trapdoor(iter([P, P]))


def test_the_generator_has_full_order() -> None:
    order = (P // 2) * (Q // 2)
    assert pow(KEY.g, order, N * N) == 1
    assert math.gcd(KEY.g - 1, N) == 1
    for prime in (P // 2, Q // 2):
        assert pow(KEY.g, order // prime, N * N) != 1


@pytest.mark.parametrize(
    "changes",
    [{"g": 1}, {"g": P}, {"g": 1 + N}, {"h": KEY.h[:6]}, {"h": (0, *KEY.h[1:])}, {"n": N + 1}],
)
def test_public_key_is_validated(changes: dict[str, object]) -> None:
    values: dict[str, object] = {"n": N, "g": KEY.g, "h": KEY.h} | changes
    with pytest.raises(FormatError):
        PublicKey(**values)  # type: ignore[arg-type]


def test_randomness_is_fresh() -> None:
    draws = scheme.fresh_randomness(KEY, 50)
    assert len(np.unique(draws, axis=0)) == 50


def test_secrets_are_not_printed() -> None:
    assert str(P) not in repr(StrongTrapdoor(P, Q))


# --- primitives ------------------------------------------------------------------------------


def test_fields_is_unambiguous() -> None:
    assert primitives.fields("a", b"bc", None) == (b"\x01\0\0\0a" + b"\x02\0\0\0bc" + b"\0\0\0\0")
    assert primitives.fields("a", b"b", b"c") != primitives.fields("a", b"bc")


@pytest.mark.parametrize("text", ["QQ", "QR==", "Q Q==", "QQ==\n", "QQ-_", "é"])
def test_base64_has_one_spelling(text: str) -> None:
    with pytest.raises(FormatError):
        primitives.decode_base64(text)


def test_keystream_can_be_entered_anywhere() -> None:
    key = secrets.token_bytes(32)
    whole = primitives.keystream(key, 0, 1000)
    assert primitives.keystream(key, 123, 456) == whole[123 : 123 + 456]
    end = 64 << 32  # where the block counter runs out, the next nonce begins
    across = primitives.keystream(key, end - 10, 30)
    assert across[10:] == primitives.keystream(key, end, 20)
    assert across[10:] != primitives.keystream(key, 0, 20)


def test_signatures_bind_kind_and_digest() -> None:
    secret = secrets.token_bytes(32)
    public = primitives.signing_public_key(secret)
    signature = primitives.sign(secret, "upload", b"d" * 64)
    primitives.verify_signature(public, "upload", b"d" * 64, signature, "file")
    for kind, digest in (("model", b"d" * 64), ("upload", b"e" * 64)):
        with pytest.raises(VerificationError):
            primitives.verify_signature(public, kind, digest, signature, "file")


def test_hpke_binds_key_and_info() -> None:
    mine, other = primitives.hpke_generate(), primitives.hpke_generate()
    wrapped = primitives.hpke_wrap(primitives.hpke_public_key(mine), b"k" * 32, b"info")
    assert primitives.hpke_unwrap(mine, wrapped, b"info") == b"k" * 32
    for secret, info in ((other, b"info"), (mine, b"other")):
        with pytest.raises(VerificationError):
            primitives.hpke_unwrap(secret, wrapped, info)


def test_a_box_opens_only_with_its_passphrase() -> None:
    salt, commit, sealed = primitives.box(b"secret", b"message", b"aad")
    assert primitives.open_box(b"secret", salt, commit, sealed, b"aad") == b"message"
    with pytest.raises(NotAllowedError):
        primitives.open_box(b"other", salt, commit, sealed, b"aad")
    with pytest.raises(VerificationError):
        primitives.open_box(b"secret", salt, commit, sealed, b"other")
