"""The scheme on numbers, against plain Python integers and python-paillier."""

import hashlib
import hmac
import math
import pickle
import secrets
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from phe.paillier import PaillierPrivateKey, PaillierPublicKey

from dtl.core.crypto import (
    group,
    kernels,
    masks,
    one_time,
    primes,
    primitives,
    proof,
    release_proof,
    residues,
    scheme,
)
from dtl.core.crypto.arithmetic import best_comb
from dtl.core.crypto.group import COMPONENTS, PublicKey, StrongTrapdoor
from dtl.core.crypto.residues import Bytes
from dtl.core.errors import FormatError, NotAllowedError, UsageError, VerificationError
from tests.helpers import PRIMES

JOB_ID = bytes(range(16))
P, Q = PRIMES[512]
N = P * Q
N2 = N * N
WIDTH = N.bit_length() // 8
A = group.expand_half(b"a" * 32, "server-half", JOB_ID, 256)
B = group.expand_half(b"b" * 32, "participant-half", JOB_ID, 256)
KEY = group.generate_public_key(StrongTrapdoor(P, Q), A, B)
PHE = PaillierPrivateKey(PaillierPublicKey(N), P, Q)
MODULI = (N, *[N2] * COMPONENTS)
Numbers = list[list[int]]
"""A batch of groups as plain integers."""


def blocks_of(numbers: list[int]) -> Bytes:
    return residues.from_integers(numbers, WIDTH).reshape(-1, COMPONENTS, WIDTH)


def random_blocks(groups: int) -> Bytes:
    return blocks_of([secrets.randbelow(N) for _ in range(COMPONENTS * groups)])


def randomness(groups: int) -> Bytes:
    return one_time.group_randomness(secrets.token_bytes(32), groups, KEY.exponent_bits)


def encrypt(blocks: Bytes) -> Bytes:
    return scheme.encrypt(KEY, blocks, randomness(len(blocks)), len(blocks))


def weak_open(ciphertext: Bytes, b: Sequence[int] = B) -> Bytes:
    half_opened = scheme.apply_half(KEY, ciphertext, A)
    return scheme.open_blocks(KEY, scheme.apply_half(KEY, half_opened, b))


def numbers_of(ciphertext: Bytes) -> Numbers:
    flat = residues.to_integers(ciphertext)
    columns = ciphertext.shape[-2]
    return [flat[start : start + columns] for start in range(0, len(flat), columns)]


def ciphertext_of(numbers: Numbers) -> Bytes:
    flat = [number for row in numbers for number in row]
    return residues.from_integers(flat, 2 * WIDTH).reshape(len(numbers), -1, 2 * WIDTH)


def plain_apply(numbers: Numbers, half: Sequence[int]) -> Numbers:
    """Half removal as the protocol writes it, in plain integers."""
    out = []
    for c_0, *others in numbers:
        lifted = pow(c_0, N, N2)
        powers = [pow(lifted, -x, N2) for x in half]
        out.append([c_0, *[c * power % N2 for c, power in zip(others, powers, strict=True)]])
    return out


def test_encryption_is_the_protocol_formula() -> None:
    blocks, r = random_blocks(3), randomness(3)
    expected = []
    for exponent, row in zip(residues.to_integers(r), blocks, strict=True):
        group_ = [pow(KEY.gamma, exponent, N)]
        for h, m in zip(KEY.h, residues.to_integers(row), strict=True):
            group_.append(pow(h, exponent, N2) * (1 + m * N) % N2)
        expected.append(group_)
    for uses in (3, 500):
        found = scheme.encrypt(KEY, blocks, r, uses)
        assert numbers_of(found) == expected
    scheme.check(KEY, found)


def test_the_lift_depends_on_its_number_modulo_n_only() -> None:
    """So nothing can be smuggled in with c_0: there is no N-part, whatever is sent."""
    numbers = [2, N - 1, secrets.randbelow(N), 1 + 5 * N, secrets.randbelow(N2)]
    batch = residues.from_integers(numbers, 2 * WIDTH)
    found = residues.to_integers(scheme.lift(KEY, batch))
    assert found == [pow(c, N, N2) for c in numbers]
    assert found == [pow(c % N, N, N2) for c in numbers]
    order = (P - 1) * (Q - 1)  # of the N-th residues
    assert all(pow(c, order, N2) == 1 for c in found)


def test_half_removal_is_the_protocol_formula() -> None:
    ciphertext = encrypt(random_blocks(3))
    half_opened = scheme.apply_half(KEY, ciphertext, A)
    assert numbers_of(half_opened) == plain_apply(numbers_of(ciphertext), A)
    opened = scheme.apply_half(KEY, half_opened, B)
    assert numbers_of(opened) == plain_apply(plain_apply(numbers_of(ciphertext), A), B)


def test_both_halves_open_and_agree_with_python_paillier() -> None:
    blocks, others = random_blocks(4), random_blocks(4)
    ciphertext, added = encrypt(blocks), encrypt(others)
    total = scheme.add(KEY, [ciphertext, added])
    assert (weak_open(ciphertext) == blocks).all()
    for batch in (ciphertext, added, total, scheme.subtract(KEY, total, added)):
        scheme.check(KEY, batch)
        opened = [PHE.raw_decrypt(c) for row in numbers_of(batch) for c in row[1:]]
        assert opened == residues.to_integers(weak_open(batch))
        assert opened == residues.to_integers(
            scheme.strong_open(StrongTrapdoor(P, Q), batch[:, 1:])
        )


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


def test_sums_are_the_protocol_formula() -> None:
    c, d = (encrypt(random_blocks(3)) for _ in range(2))
    x, y = numbers_of(c), numbers_of(d)

    def per_number(rule: Callable[[int, int, int], int]) -> Numbers:
        return [
            [rule(a, b, n) for a, b, n in zip(*rows, MODULI, strict=True)]
            for rows in zip(x, y, strict=True)
        ]

    assert numbers_of(scheme.add(KEY, [c])) == x
    assert numbers_of(scheme.add(KEY, [c, d, c])) == per_number(lambda a, b, n: a * b * a % n)
    assert numbers_of(scheme.subtract(KEY, c, d)) == per_number(
        lambda a, b, n: a * pow(b, -1, n) % n
    )
    assert numbers_of(scheme.negate(KEY, c)) == per_number(lambda a, b, n: pow(a, -1, n))


def test_minus_one_opens_to_the_same_block() -> None:
    """An element of order two is harmless: halves are even, and opening takes +-1."""
    blocks = random_blocks(1)
    numbers = residues.to_integers(encrypt(blocks))
    for index, modulus in enumerate(MODULI):
        mauled = list(numbers)
        mauled[index] = modulus - mauled[index]
        ciphertext = residues.from_integers(mauled, 2 * WIDTH).reshape(1, 8, -1)
        assert (weak_open(ciphertext) == blocks).all()


def test_wrong_half_fails_as_a_whole() -> None:
    ciphertext = encrypt(random_blocks(2))
    wrong = (B[0] + 2, *B[1:])
    with pytest.raises(VerificationError):
        scheme.open_blocks(
            KEY, scheme.apply_half(KEY, scheme.apply_half(KEY, ciphertext, A), wrong)
        )


# --- hostile ciphertexts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "bad"),
    [(0, 0), (0, N), (0, N + 1), (0, N2 - 1), (0, P), (0, 2 * Q)]
    + [(j, bad) for j in (1, 7) for bad in (0, N, P, Q * N, N2, N2 + 1)],
)
def test_invalid_residues_are_refused(index: int, bad: int) -> None:
    numbers = numbers_of(encrypt(random_blocks(3)))
    numbers[1][index] = bad
    with pytest.raises(FormatError):
        scheme.check(KEY, ciphertext_of(numbers))


def hostile(b: Sequence[int]) -> list[tuple[Numbers, bool]]:
    """Half-opened groups that a server may seal, and whether they open under half b.

    c_j = w (1 + yN) for N-th residues w: +- lift(c_0)^(b_j) times something or nothing.
    """
    found = []
    for wrong in (1, 2, N - 1, KEY.gamma):
        c_0 = secrets.randbelow(N - 2) + 2
        row = [pow(pow(c_0, N, N2), x, N2) * (1 + 77 * N) % N2 for x in b]
        row[3] = row[3] * pow(wrong, N, N2) % N2
        row[5] = N2 - row[5]
        found.append(([[c_0, *row]], wrong in (1, N - 1)))
    return found


def test_a_block_opens_if_and_only_if_its_residue_part_is_the_power_of_c_0() -> None:
    for numbers, opens in hostile(B):
        blocks, good = scheme.open_each(KEY, scheme.apply_half(KEY, ciphertext_of(numbers), B))
        assert good.tolist() == [opens]
        assert residues.to_integers(blocks) == [77 if opens else 0] * COMPONENTS


def test_what_a_server_can_make_without_b_opens_or_not_whatever_b_is() -> None:
    """The attack on v1: c_0 = 1 + xN, and c_j made without b_j. Its outcome told of b."""
    other = group.expand_half(b"o" * 32, "participant-half", JOB_ID, 256)
    made = []
    for x in (1, 2**100, secrets.randbelow(N)):
        for c_0 in ((1 + x * N) % N, N - 1, 2, secrets.randbelow(N - 2) + 2):
            for w in (1, N2 - 1, 4, secrets.randbelow(N2 - 2) + 2):
                made.append([c_0, *[w * (1 + (x + j) * N) % N2 for j in range(COMPONENTS)]])
    outcomes = []
    for b in (B, other):
        left = scheme.apply_half(KEY, ciphertext_of(made), b)
        blocks, good = scheme.open_each(KEY, left)
        assert not blocks[~good].any()
        outcomes.append((blocks.tobytes(), good.tobytes()))
        assert 0 < good.sum() < len(made)
    assert outcomes[0] == outcomes[1]


def test_opening_goes_on_after_a_block_that_fails() -> None:
    blocks = random_blocks(5)
    numbers = numbers_of(scheme.apply_half(KEY, encrypt(blocks), A))
    numbers[0][1] = numbers[0][1] * 4 % N2
    numbers[3][7] = numbers[3][7] * 4 % N2
    found, good = scheme.open_each(KEY, scheme.apply_half(KEY, ciphertext_of(numbers), B))
    assert good.tolist() == [False, True, True, False, True]
    assert (found[good] == blocks[good]).all()
    assert not found[~good].any()


def test_audit_finds_the_group_that_is_not_well_formed() -> None:
    blocks = random_blocks(4)
    sums = [a + b for a, b in zip(A, B, strict=True)]
    numbers = numbers_of(encrypt(blocks))
    numbers[1][4] = N2 - numbers[1][4]  # the sign is harmless
    numbers[2][4] = numbers[2][4] * pow(3, N, N2) % N2
    numbers[3][0] = numbers[3][0] * 4 % N
    good = scheme.well_formed(KEY, ciphertext_of(numbers), blocks, sums)
    assert good.tolist() == [True, True, False, False]
    assert not scheme.well_formed(KEY, ciphertext_of(numbers[:1]), random_blocks(1), sums).any()


# --- the proof of an upload ------------------------------------------------------------------


def proven(groups: int) -> tuple[Bytes, Bytes, Bytes, proof.Proof]:
    blocks, r = random_blocks(groups), randomness(groups)
    ciphertext = scheme.encrypt(KEY, blocks, r, groups)
    stream = primitives.keystream(secrets.token_bytes(32), 0, proof.witness_bytes(KEY, groups))
    witness, d = proof.commit(KEY, groups, stream)
    rho = proof.weights(KEY, b"{}", b"k" * 32, groups, b"r" * 64, None, d)
    responder = proof.Responder(KEY, witness)
    responder.add(rho, r, blocks)
    return ciphertext, blocks, rho, responder.proof(d)


def verified(ciphertext: Bytes, rho: Bytes, found: proof.Proof) -> bool:
    try:
        proof.check_ranges(KEY, len(rho), found)
        products = residues.to_integers(KEY.arithmetic.weighted_products(ciphertext, rho))
    except VerificationError:
        return False
    outcomes = [outcome(found, products, expected) for expected in (1, 100)]
    assert outcomes[0] == outcomes[1]  # with a table of powers, and without
    return outcomes[0]


def outcome(found: proof.Proof, products: list[int], expected: int) -> bool:
    try:
        proof.verify(KEY, found, products, expected)
    except VerificationError:
        return False
    return True


def test_the_witness_is_cut_from_the_keystream() -> None:
    groups = 5
    bits = 256 + 128 + 128 + 3
    stream = secrets.token_bytes(proof.witness_bytes(KEY, groups))
    width, step = math.ceil(bits / 8), WIDTH + 16
    assert len(stream) == width + 7 * step
    witness, d = proof.commit(KEY, groups, stream)
    assert witness.w == int.from_bytes(stream[:width], "little") % 2**bits
    assert witness.s == tuple(
        int.from_bytes(stream[width + j * step :][:step], "little") % N for j in range(7)
    )
    assert d[0] == pow(KEY.gamma, witness.w, N)
    for h, s, value in zip(KEY.h, witness.s, d[1:], strict=True):
        assert value == pow(h, witness.w, N2) * (1 + s * N) % N2
    with pytest.raises(ValueError, match="another number of bytes"):
        proof.commit(KEY, groups, stream[1:])


def test_the_weights_bind_every_item_of_the_statement() -> None:
    d = tuple(range(2, 10))
    items: tuple[object, ...] = (b"{}", b"k" * 32, 3, b"r" * 64, b"b" * 64, d)
    changes = {0: b"[]", 1: b"l" * 32, 2: 4, 3: b"s" * 64, 4: None, 5: (*d[:7], 11)}

    def first(values: Sequence[object]) -> bytes:
        rho = proof.weights(KEY, *values)  # type: ignore[arg-type]
        return bytes(rho[0])

    state = primitives.hash_fields(
        "dtl/v2/upload-proof", b"{}", b"k" * 32, primitives.u32(3), b"r" * 64, b"b" * 64,
        *(value.to_bytes(2 * WIDTH, "little") for value in d),
    )  # fmt: skip
    stream = hashlib.shake_256(primitives.fields("dtl/v2/upload-rho", state)).digest(16)
    assert first(items) == stream
    for index, change in changes.items():
        assert first([*items[:index], change, *items[index + 1 :]]) != stream


def test_an_honest_proof_holds_and_its_equations_are_those_of_the_protocol() -> None:
    ciphertext, _, rho, found = proven(4)
    assert verified(ciphertext, rho, found)
    assert proof.decode(KEY, 4, proof.encode(KEY, 4, found)) == found
    weights = residues.to_integers(rho)
    columns = list(zip(*numbers_of(ciphertext), strict=True))
    bases, v = (KEY.gamma, *KEY.h), (0, *found.v)
    for j, n in enumerate(MODULI):
        right = found.d[j]
        for c, weight in zip(columns[j], weights, strict=True):
            right = right * pow(c, weight, n) % n
        assert pow(bases[j], found.z, n) * (1 + v[j] * N) % n == right


def test_signs_pass_and_everything_else_is_refused() -> None:
    ciphertext, _, rho, found = proven(3)
    for j, n in enumerate(MODULI):
        flipped = list(found.d)
        flipped[j] = n - flipped[j]
        assert verified(ciphertext, rho, proof.Proof(tuple(flipped), found.z, found.v))
        for wrong in (flipped[j] * 4 % n, 0, P, n):
            d = (*found.d[:j], wrong, *found.d[j + 1 :])
            assert not verified(ciphertext, rho, proof.Proof(d, found.z, found.v))
    # d_0 and c_0 are numbers below N, not modulo N^2.
    d = (found.d[0] + N, *found.d[1:])
    assert not verified(ciphertext, rho, proof.Proof(d, found.z, found.v))
    assert not verified(ciphertext, rho, proof.Proof(found.d, found.z + 1, found.v))
    v = (found.v[0] + 1, *found.v[1:])
    assert not verified(ciphertext, rho, proof.Proof(found.d, found.z, v))
    v = (found.v[0] + N, *found.v[1:])
    assert not verified(ciphertext, rho, proof.Proof(found.d, found.z, v))
    numbers = numbers_of(ciphertext)
    for j, n in enumerate(MODULI):
        changed = [list(row) for row in numbers]
        changed[1][j] = changed[1][j] * 4 % n
        assert not verified(ciphertext_of(changed), rho, found)


# --- the proof of a release ------------------------------------------------------------------


def statement_of(core: bytes, of: bytes, numbers: Bytes, opened: Bytes) -> release_proof._Statement:
    """What a release states of c and c', whatever they are: nothing is checked."""
    digest = hashlib.sha512(opened.tobytes()).digest()
    rho = release_proof.weights(core, of, digest, len(numbers))
    groups, arithmetic = numbers.copy(), KEY.arithmetic
    groups[:, 1:] = arithmetic.product([numbers[:, 1:], arithmetic.inverse(opened)])
    base, *quotients = residues.to_integers(arithmetic.weighted_products(groups, rho))
    products = release_proof.Products(base % N, tuple(quotients))
    return release_proof._stated(KEY, core, of, digest, products)


def prove(
    half: Sequence[int], seed: bytes, core: bytes, of: bytes, numbers: Bytes, opened: Bytes
) -> bytes:
    """A proof for c and c', as a server makes it that may be dishonest."""
    statement = statement_of(core, of, numbers, opened)
    return release_proof._respond(KEY, half, seed, statement)


def check_proof(core: bytes, of: bytes, numbers: Bytes, opened: Bytes, found: bytes) -> None:
    """Verify it, two groups at a time."""
    digest = hashlib.sha512(opened.tobytes()).digest()
    rho = release_proof.weights(core, of, digest, len(numbers))
    pieces = (slice(first, first + 2) for first in range(0, len(numbers), 2))
    parts = [release_proof.products(KEY, numbers[p], opened[p], rho[p]) for p in pieces]
    release_proof.verify(KEY, core, of, digest, release_proof.joined(KEY, parts), found)


CORE, OF, SEED = b"c" * 64, b"o" * 64, b"a" * 32
RELEASED = encrypt(random_blocks(3))
HALF_OPENED = scheme.apply_half(KEY, RELEASED, A)[:, 1:]
REFUSALS: set[str] = set()
PROOF = prove(A, SEED, CORE, OF, RELEASED, HALF_OPENED)


def holds(
    numbers: Bytes = RELEASED,
    opened: Bytes = HALF_OPENED,
    found: bytes = PROOF,
    core: bytes = CORE,
    of: bytes = OF,
) -> bool:
    try:
        check_proof(core, of, numbers, opened, found)
    except FormatError:  # c or c' is not valid
        return False
    except VerificationError as error:
        REFUSALS.add(error.message)
        return False
    return True


@pytest.fixture(autouse=True, scope="module")
def one_refusal() -> Iterator[None]:
    """Whatever is wrong with a release, the text is the same."""
    yield
    assert {"the proof of the release does not hold"} >= REFUSALS


def test_an_honest_release_holds_and_is_the_protocol_formula() -> None:
    assert holds()
    width = 2 * WIDTH
    response = math.ceil((256 + 257) / 8)
    assert len(PROOF) == release_proof.proof_length(KEY) == 14 * width + 7 * response
    assert release_proof.half_opened_bytes(KEY, 3) == HALF_OPENED.nbytes
    values = [int.from_bytes(PROOF[k * width :][:width], "little") for k in range(14)]
    t, t_prime = values[:7], values[7:]
    z = [int.from_bytes(PROOF[14 * width + j * response :][:response], "little") for j in range(7)]
    digest = hashlib.sha512(HALF_OPENED.tobytes()).digest()
    stream = hashlib.shake_256(primitives.fields("dtl/v2/release-rho", CORE, OF, digest)).digest(
        3 * 16
    )
    rho = [int.from_bytes(stream[16 * i :][:16], "little") for i in range(3)]
    product, quotients = 1, [1] * 7
    for row, opened, weight in zip(numbers_of(RELEASED), numbers_of(HALF_OPENED), rho, strict=True):
        product = product * pow(row[0], weight, N) % N
        for j in range(7):
            quotient = row[1 + j] * pow(opened[j], -1, N2)
            quotients[j] = quotients[j] * pow(quotient, weight, N2) % N2
    gamma = pow(product, N, N2)
    items = [v.to_bytes(width, "little") for row in (quotients, t, t_prime) for v in row]
    e = int.from_bytes(
        primitives.hash_fields(
            "dtl/v2/release-proof", CORE, OF, digest, gamma.to_bytes(width, "little"), *items
        )[:16],
        "little",
    )
    for j in range(7):
        assert pow(KEY.g, z[j], N2) == t[j] * pow(KEY.server[j], e, N2) % N2
        assert pow(gamma, z[j], N2) == t_prime[j] * pow(quotients[j], e, N2) % N2
        assert quotients[j] == pow(gamma, A[j], N2)


@pytest.mark.parametrize("index", range(COMPONENTS))
def test_a_release_of_anything_else_is_refused(index: int) -> None:
    for row in (0, 2):
        opened = numbers_of(HALF_OPENED)
        for factor in (1 + N, 1 + secrets.randbelow(N) * N, 4, KEY.g):
            changed = [list(numbers) for numbers in opened]
            changed[row][index] = changed[row][index] * factor % N2
            assert not holds(opened=ciphertext_of(changed))
            # ... nor with a proof that the server makes for it.
            made = prove(A, SEED, CORE, OF, RELEASED, ciphertext_of(changed))
            assert not holds(opened=ciphertext_of(changed), found=made)
        numbers = numbers_of(RELEASED)
        numbers[row][1 + index] = numbers[row][1 + index] * (1 + N) % N2
        assert not holds(ciphertext_of(numbers))
        for bad in (0, P, N2 - N, N2):
            changed = [list(numbers) for numbers in opened]
            changed[row][index] = bad
            assert not holds(opened=ciphertext_of(changed))
            numbers = numbers_of(RELEASED)
            numbers[row][1 + index] = bad
            assert not holds(ciphertext_of(numbers))


def test_another_statement_or_order_is_refused() -> None:
    assert not holds(core=b"d" * 64)
    assert not holds(of=b"p" * 64)
    assert not holds(opened=HALF_OPENED[::-1])
    assert not holds(RELEASED[::-1])
    assert not holds(RELEASED[:2], HALF_OPENED[:2])
    digest = hashlib.sha512(HALF_OPENED.tobytes()).digest()
    rho = release_proof.weights(CORE, OF, digest, len(RELEASED))
    base = release_proof.base_product(KEY, RELEASED, rho)
    assert holds(found=release_proof.prove(KEY, A, SEED, CORE, OF, digest, base))
    assert not holds(RELEASED[:2])
    assert not holds(found=PROOF[:-1])
    assert not holds(found=PROOF + b"\0")
    for bad in (0, N, N + 1, P, 4):
        numbers = numbers_of(RELEASED)
        numbers[1][0] = bad
        assert not holds(ciphertext_of(numbers))
    other = prove((A[0] + 2, *A[1:]), SEED, CORE, OF, RELEASED, HALF_OPENED)
    assert not holds(found=other)


def test_a_zero_c_0_cannot_make_a_proof_of_anything() -> None:
    """With c_0 = 0 in a group, Gamma is 0, and t' = 0 satisfies every equation."""
    numbers, opened = numbers_of(RELEASED), numbers_of(HALF_OPENED)
    numbers[0][0] = 0
    opened[1][2] = opened[1][2] * (1 + 5 * N) % N2
    statement = ciphertext_of(numbers), ciphertext_of(opened)
    forged = prove(A, SEED, CORE, OF, *statement)
    width = 2 * WIDTH
    assert forged[7 * width : 14 * width] == bytes(7 * width)
    assert not holds(*statement, forged)


def test_numbers_that_are_not_reduced_are_refused() -> None:
    """All equations hold for them: only the ranges tell."""
    numbers = numbers_of(RELEASED)
    numbers[1][0] += N
    assert not holds(ciphertext_of(numbers))
    limit = 1 << 16 * WIDTH
    opened, small = numbers_of(HALF_OPENED), 0
    for row in opened:
        for j, number in enumerate(row):
            if number + N2 < limit:
                row[j], small = number + N2, small + 1
    assert small
    longer = ciphertext_of(opened)
    assert not holds(opened=longer, found=prove(A, SEED, CORE, OF, RELEASED, longer))


def test_a_commitment_that_is_not_reduced_is_refused() -> None:
    statement = statement_of(CORE, OF, RELEASED, HALF_OPENED)
    gamma = int.from_bytes(statement.gamma.tobytes(), "little")

    def forged(extra: int) -> bytes:
        w = 1
        while pow(KEY.g, w, N2) + N2 >= 1 << 16 * WIDTH:
            w += 1
        t = residues.from_integers([pow(KEY.g, w, N2) + extra] * 7, 2 * WIDTH)
        t_prime = residues.from_integers([pow(gamma, w, N2)] * 7, 2 * WIDTH)
        e = release_proof._challenge(statement, t, t_prime)
        z = residues.from_integers([w + e * a for a in A], math.ceil((256 + 257) / 8))
        return b"".join(part.tobytes() for part in (t, t_prime, z))

    assert holds(found=forged(0))
    assert not holds(found=forged(N2))


@pytest.mark.parametrize("place", range(14))
def test_commitments_out_of_range_are_refused(place: int) -> None:
    width = 2 * WIDTH
    start = place * width
    value = int.from_bytes(PROOF[start:][:width], "little")
    for bad in (0, P, N, N2, value + N2, value * 4 % N2):
        if bad.bit_length() <= 8 * width:
            forged = PROOF[:start] + bad.to_bytes(width, "little") + PROOF[start + width :]
            assert not holds(found=forged)
    flipped = PROOF[:start] + (N2 - value).to_bytes(width, "little") + PROOF[start + width :]
    assert not holds(found=flipped)  # the challenge covers it


@pytest.mark.parametrize("index", range(COMPONENTS))
def test_responses_out_of_range_are_refused(index: int) -> None:
    response = math.ceil((256 + 257) / 8)
    start = len(PROOF) - (COMPONENTS - index) * response
    z = int.from_bytes(PROOF[start:][:response], "little")
    order = (P - 1) * (Q - 1) // 4
    small = z + order * (2**513 // order + 1)  # the same powers: only its length is wrong
    for bad in (z + 1, small):
        if bad.bit_length() <= 8 * response:
            forged = PROOF[:start] + bad.to_bytes(response, "little") + PROOF[start + response :]
            assert not holds(found=forged)


def test_a_sign_in_what_is_sealed_passes_and_opens_to_the_same() -> None:
    numbers = numbers_of(HALF_OPENED)
    for row, column in ((0, 0), (1, 3), (2, 6)):
        numbers[row][column] = N2 - numbers[row][column]
    opened = ciphertext_of(numbers)
    found = prove(A, SEED, CORE, OF, RELEASED, opened)
    assert holds(opened=opened, found=found)

    def end(half_opened: Bytes) -> Bytes:
        whole = np.concatenate([RELEASED[:, :1], half_opened], axis=1)
        return scheme.open_blocks(KEY, scheme.apply_half(KEY, whole, B))

    assert (end(opened) == end(HALF_OPENED)).all()


def witnesses(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[int]:
    """w_1..w_7 of the proof that `run` makes."""
    found: list[list[int]] = []
    real = release_proof._witness

    def recorded(*arguments: object) -> list[int]:
        found.append(real(*arguments))  # type: ignore[arg-type]
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(release_proof, "_witness", recorded)
        run()
    return found[0]


def test_the_witness_of_a_release_is_fresh_and_hedged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A w under two challenges gives a_j away."""
    other = numbers_of(HALF_OPENED)
    other[0][0] = N2 - other[0][0]
    statements: list[tuple[bytes, bytes, bytes, Bytes, Bytes]] = [
        (SEED, CORE, OF, RELEASED, HALF_OPENED),
        (b"b" * 32, CORE, OF, RELEASED, HALF_OPENED),
        (SEED, b"d" * 64, OF, RELEASED, HALF_OPENED),
        (SEED, CORE, b"p" * 64, RELEASED, HALF_OPENED),
        (SEED, CORE, OF, RELEASED, ciphertext_of(other)),
        (SEED, CORE, OF, scheme.add(KEY, [RELEASED, RELEASED]), HALF_OPENED),
    ]

    def drawn(index: int) -> list[int]:
        return witnesses(monkeypatch, lambda: prove(A, *statements[index]))

    found = drawn(0) + drawn(0)  # the same statement, fresh bytes
    assert len(set(found)) == 14
    asked = []

    def constant(count: int) -> bytes:
        asked.append(count)
        return b"\7" * count

    monkeypatch.setattr(secrets, "token_bytes", constant)
    assert drawn(0) == drawn(0)  # nothing else is random
    assert asked == [64, 64]
    found = [w for index in range(len(statements)) for w in drawn(index)]
    assert len(set(found)) == 7 * len(statements)
    assert 500 < max(w.bit_length() for w in found) <= 512


def test_the_witness_of_a_release_is_the_protocol_formula(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statement = statement_of(CORE, OF, RELEASED, HALF_OPENED)
    monkeypatch.setattr(secrets, "token_bytes", lambda count: b"\7" * count)
    found = release_proof._witness(KEY, SEED, statement)
    digest = hashlib.sha512(HALF_OPENED.tobytes()).digest()
    for j, w in enumerate(found, 1):
        item = primitives.fields(
            "dtl/v2/release-witness", SEED, b"\7" * 64, CORE, OF, digest,
            statement.gamma.tobytes(), *(d.tobytes() for d in statement.quotients),
            primitives.u32(j),
        )  # fmt: skip
        assert w == int.from_bytes(hashlib.shake_256(item).digest(64), "little")


# --- keys ------------------------------------------------------------------------------------


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
    expected = [pow(b, e, N * N) for b in bases for e in exponents]
    for bits in (None, 257):
        found = KEY.arithmetic.shared_base_powers(batch, exponents, secret_bits=bits)
        assert residues.to_integers(found) == expected
    powers = KEY.arithmetic.powers(batch, exponents[0], secret_bits=None)
    assert residues.to_integers(powers) == [pow(b, exponents[0], N * N) for b in bases]


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
    assert pow(KEY.gamma, order, N) == 1
    for prime in (P // 2, Q // 2):
        assert pow(KEY.g, order // prime, N * N) != 1
        assert pow(KEY.gamma, order // prime, N) != 1


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": 1},
        {"gamma": 0},
        {"gamma": P},
        {"gamma": P + 1},
        {"gamma": N},
        {"gamma": N + 2},
        {"h": KEY.h[:6]},
        {"h": (0, *KEY.h[1:])},
        {"h": (N2 + 1, *KEY.h[1:])},
        {"server": KEY.server[:6]},
        {"server": (*KEY.server[:6], Q)},
        {"server": (*KEY.server[:6], N2)},
        {"n": N + 1},
    ],
)
def test_public_key_is_validated(changes: dict[str, object]) -> None:
    values: dict[str, object] = {"n": N, "gamma": KEY.gamma, "h": KEY.h, "server": KEY.server}
    PublicKey(**values)  # type: ignore[arg-type]
    with pytest.raises(FormatError):
        PublicKey(**(values | changes))  # type: ignore[arg-type]


def test_the_key_is_the_protocol_formula_and_knows_its_halves() -> None:
    assert KEY.g == pow(KEY.gamma, N, N2)
    assert KEY.server == tuple(pow(KEY.g, a, N2) for a in A)
    assert KEY.h == tuple(pow(KEY.g, a + b, N2) for a, b in zip(A, B, strict=True))
    assert group.has_server_half(KEY, A)
    assert group.has_participant_half(KEY, B)
    assert group.has_halves(KEY, A, B)
    for index in range(COMPONENTS):
        wrong_a = (*A[:index], A[index] ^ 2, *A[index + 1 :])
        wrong_b = (*B[:index], B[index] ^ 2, *B[index + 1 :])
        assert not group.has_server_half(KEY, wrong_a)
        assert not group.has_participant_half(KEY, wrong_b)
        assert not group.has_halves(KEY, wrong_a, B)
        assert not group.has_halves(KEY, A, wrong_b)
    assert not group.has_halves(KEY, B, A)


def test_a_key_goes_to_another_process_without_what_is_derived() -> None:
    assert KEY.g
    copy = pickle.loads(pickle.dumps(KEY))  # noqa: S301
    assert copy == KEY
    assert "g" not in copy.__dict__
    assert "arithmetic" not in copy.__dict__
    assert copy.g == KEY.g


def test_secrets_are_not_printed() -> None:
    assert str(P) not in repr(StrongTrapdoor(P, Q))
    keys = one_time.OneTimeKeys(*(letter * 32 for letter in (b"s", b"e", b"r", b"w")))
    assert repr(keys) == "OneTimeKeys()"


# --- keys that are used once -----------------------------------------------------------------


def test_one_time_keys_are_the_protocol_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def constant(count: int) -> bytes:
        asked.append(count)
        return b"\7" * count

    monkeypatch.setattr(secrets, "token_bytes", constant)
    found = one_time.derive_one_time(b"k" * 32, b"j", 3, None, None, b"r", 2**40, b"l" * 64)
    info = primitives.fields(
        "dtl/v2/one-time", b"j", b"\3\0\0\0", b"", b"", b"r", (2**40).to_bytes(8, "little"),
        b"l" * 64,
    )  # fmt: skip
    derived = HKDF(SHA512(), 128, None, info).derive(b"\7" * 64 + b"k" * 32)
    parts = (found.secret, found.error, found.randomness, found.witness)
    assert b"".join(parts) == derived
    assert [len(part) for part in parts] == [32] * 4
    assert asked == [64]


def test_one_time_keys_are_fresh_and_bound_to_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items: tuple[object, ...] = (b"k", b"j", 3, b"b", b"o", b"r", 5, b"l")
    changes = (b"K", b"J", 4, None, None, b"R", 6, b"L")

    def drawn(values: Sequence[object]) -> bytes:
        keys = one_time.derive_one_time(*values)  # type: ignore[arg-type]
        return keys.secret + keys.error + keys.randomness + keys.witness

    assert drawn(items) != drawn(items)
    monkeypatch.setattr(secrets, "token_bytes", bytes)  # a generator that repeats itself
    found = {drawn(items)}
    for index, change in enumerate(changes):
        found.add(drawn((*items[:index], change, *items[index + 1 :])))
    assert len(found) == 1 + len(changes)


def test_randomness_is_a_keystream_of_the_full_width() -> None:
    key = secrets.token_bytes(32)
    found = one_time.group_randomness(key, 50, 256)
    assert found.shape == (50, 32)
    assert found.tobytes() == primitives.keystream(key, 0, 50 * 32)
    assert len(np.unique(found, axis=0)) == 50
    assert one_time.group_randomness(key, 5, 224).shape == (5, 28)
    assert (one_time.group_randomness(key, 20, 256, 30) == found[30:]).all()


def test_keys_of_bodies_and_audit_are_the_protocol_formula() -> None:
    def derived(secret: bytes, info: bytes) -> bytes:
        return HKDF(SHA512(), 32, None, info).derive(secret)

    key = secrets.token_bytes(32)
    assert masks.body_key(key) == derived(key, primitives.fields("dtl/v2/body-mask"))
    seed = masks.audit_seed(key, JOB_ID, "alice")
    assert seed == derived(key, primitives.fields("dtl/v2/audit-seed", JOB_ID, "alice"))
    message = primitives.fields("dtl/v2/opened", b"\7\0\0\0", b"base", b"opened")
    expected = hmac.new(seed, message, "sha512").digest()[:16]
    assert masks.opened_tag(seed, 7, b"base", b"opened") == expected
    changed = {
        masks.opened_tag(*items)
        for items in (
            (key, 7, b"base", b"opened"),
            (seed, 8, b"base", b"opened"),
            (seed, 7, b"bas", b"eopened"),
            (seed, 7, b"base", b"other"),
        )
    }
    assert len(changed | {expected}) == 5


@pytest.mark.parametrize("name", ["", "native", "portable", "gmpy2"])
def test_the_kernel_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.KERNEL_VARIABLE, name)
    assert kernels.wanted() == name
    monkeypatch.delenv(kernels.KERNEL_VARIABLE)
    assert kernels.wanted() == ""
    monkeypatch.setenv(kernels.KERNEL_VARIABLE, name + "x")
    with pytest.raises(UsageError, match="expected native, portable or gmpy2"):
        kernels.wanted()


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
