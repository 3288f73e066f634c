"""The attacks of PROTOCOL.md, carried out with real arithmetic against the defences before.

Each shows what the attacker gets where the defence is left out, and that with it the attack
is refused or harmless.
"""

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtl.core.crypto import masks, primitives, proof, scheme
from dtl.core.crypto.residues import Bytes, from_integers, to_integers
from dtl.core.encoding.packing import Packing
from dtl.core.errors import VerificationError
from dtl.core.files.container import BODY, Container
from dtl.core.files.key_file import ParticipantSecrets
from dtl.core.files.ledger import Ledger, OpenEntry
from tests.forging import (
    Statement,
    fresh_randomness,
    header_of,
    tensors_of,
    witness_stream,
)
from tests.helpers import Arrays, Round, random_arrays, residues_of

NewRound = Callable[..., Round]
GROUPS = 3


DIRECT = ("--cipher", "direct")


@pytest.fixture(params=["lattice", "direct"])
def round_(new_round: NewRound, request: pytest.FixtureRequest) -> Round:
    return new_round(("alice", "bob", "carol"), "--cipher", request.param)


def uploads_of(round_: Round, *options: object) -> list[Path]:
    return round_.uploads({p: random_arrays(i) for i, p in enumerate(round_.names)}, *options)


def statement(round_: Round, victim: Path, name: str = "carol") -> Statement:
    """A forger that begins with a victim's header and body, and with blocks of zeros."""
    return Statement(round_, name, header_of(victim), GROUPS, tensors_of(victim).get(BODY))


def weak_open(round_: Round, residues: Bytes, name: str = "alice") -> Bytes:
    """What server and participant see together when they leave out all checks."""
    key = round_.job.public_key
    a, b = (round_.opened_key(holder).half for holder in ("server", name))
    return scheme.open_blocks(key, scheme.apply_half(key, scheme.apply_half(key, residues, a), b))


def proof_of(path: Path) -> bytes:
    with Container(path) as container:
        return b"".join(container.chunks("proof"))


# --- section 6: the proof ------------------------------------------------------------------------


def v1_opened(group: list[int], halves: list[tuple[int, ...]], n: int) -> list[int]:
    """What v1 computed of a group: c_0 was a number modulo N^2, and was never lifted."""
    base, *rest = group
    for half in halves:
        rest = [c * pow(base, -x, n * n) % (n * n) for c, x in zip(rest, half, strict=True)]
    return [(u - 1) // n % n for u in rest]


@pytest.mark.parametrize("t", [1, 2, 12345])
def test_an_n_part_in_c0_recovers_the_servers_half_where_the_proof_is_not_checked(
    round_: Round, t: int
) -> None:
    """v1: the attacker's own half b, and a result that was opened, gave it all seven a_j."""
    alice, bob, _ = uploads_of(round_)
    forged = statement(round_, alice)
    n = round_.job.N
    numbers = forged.numbers()
    lifted = pow(numbers[0], n, n * n)
    with_part = lifted * (1 + t * n) % (n * n)
    a, b = (round_.opened_key(name).half for name in ("server", "alice"))
    opened = v1_opened([with_part, *numbers[1:8]], [a, b], n)
    # The blocks are zero, so what is opened is -t (a_j + b_j).
    recovered = [-value * pow(t, -1, n) % n - mine for value, mine in zip(opened, b, strict=True)]
    assert tuple(recovered) == a

    # v2: c_0 has no place for such a part. It is refused, or it is gone modulo N.
    forged.send([with_part, *numbers[1:]])
    round_.aggregate([alice, bob, forged.write("forged.upload")], code=3)
    forged.send([with_part % n, *numbers[1:]])
    round_.aggregate([alice, bob, forged.write("forged.upload")], code=4)
    assert pow(with_part % n, n, n * n) == pow(lifted, n, n * n)


def test_a_copied_upload(round_: Round) -> None:
    alice, bob, _ = uploads_of(round_)
    forged = statement(round_, alice)
    forged.send(to_integers(residues_of(alice)))
    for number, given in enumerate((proof_of(alice), None)):
        bad = forged.write(f"copied{number}.upload", given)
        round_.aggregate([alice, bob, bad], code=4)


def test_a_powered_and_rerandomised_upload_reads_the_victim_off_the_sum(round_: Round) -> None:
    alice, bob, _ = uploads_of(round_)
    forged = statement(round_, alice)
    key = round_.job.public_key
    fresh = to_integers(forged.honest())
    pairs = zip(to_integers(residues_of(alice)), fresh, strict=True)
    moduli = [key.n, *[key.n**2] * 7] * GROUPS
    forged.send([pow(c, 1000, m) * new % m for (c, new), m in zip(pairs, moduli, strict=True)])
    # Unnoticed, the sum would hold 1001 times the victim's values, and bob's drown in them.
    total = scheme.add(key, [residues_of(alice), residues_of(bob), forged.residues])
    parts = [to_integers(weak_open(round_, residues_of(path))) for path in (alice, bob)]
    expected = [(1001 * x + y) % round_.job.N for x, y in zip(*parts, strict=True)]
    assert to_integers(weak_open(round_, total)) == expected
    round_.aggregate([alice, bob, forged.write("powered.upload")], code=4)


def test_one_garbage_residue_makes_a_round_unopenable(round_: Round) -> None:
    alice, bob, _ = uploads_of(round_)
    forged = statement(round_, alice)
    numbers = forged.numbers()
    numbers[10] = secrets.randbelow(round_.job.N**2)
    forged.send(numbers)
    total = scheme.add(
        round_.job.public_key, [residues_of(alice), residues_of(bob), forged.residues]
    )
    with pytest.raises(VerificationError):
        weak_open(round_, total)
    round_.aggregate([alice, bob, forged.write("garbage.upload")], code=4)


def test_minus_one_is_accepted_opens_the_same_and_leaks_no_bit(round_: Round) -> None:
    alice, bob, _ = uploads_of(round_)
    forged = statement(round_, alice)
    key = round_.job.public_key
    forged.body = forged.body * 0  # nothing in it, as in the blocks
    honest = forged.numbers()
    a = round_.opened_key("server").half
    plain = scheme.apply_half(key, forged.residues, a)
    for place in (0, 1, 8, 15):
        numbers = list(honest)
        numbers[place] = (key.n**2 if place % 8 else key.n) - numbers[place]
        forged.send(numbers)
        assert (weak_open(round_, forged.residues) == forged.blocks).all()
        # c_0 turned: nothing at all changes in c_1..c_7, for a half is even.
        half = scheme.apply_half(key, forged.residues, a)
        group, column = divmod(place, 8)
        changed = (half != plain).any(axis=-1)
        assert changed.sum() == 1
        assert changed[group, column]
    bad = forged.write("minus.upload")
    opened = round_.opened(round_.release(round_.aggregate([alice, bob, bad])), "bob")
    given = [random_arrays(i) for i in range(2)]
    for name, array in opened.items():
        exact = (given[0][name].astype(float) + given[1][name]) / 3
        assert np.abs(array - exact).max() < 3 / round_.job.fixed_point.one


def test_a_proof_is_bound_to_its_header_and_signer(round_: Round) -> None:
    alice, bob, carol = uploads_of(round_)
    forged = statement(round_, carol)
    good = forged.proof()
    for changes in ({"created": "2020-01-01T00:00:00Z"}, {"values": 334}):
        other = statement(round_, carol)
        other.randomness, other.residues = forged.randomness, forged.residues
        other.header |= changes
        bad = other.write("other.upload", good)
        round_.dtl(
            "verify", bad, "--job", round_.keys / "job.json", code=3 if "values" in changes else 4
        )
        round_.dtl(
            "aggregate",
            alice,
            bob,
            bad,
            "--key",
            round_.key("server"),
            "-o",
            "x",
            code=3 if "values" in changes else 4,
        )


KEY_SIZES = [1, 2, 3]


def small_statement(round_: Round, groups: int) -> tuple[Any, ...]:
    """Blocks, randomness, residues, and a proof of them, on numbers alone."""
    key = round_.job.public_key
    blocks = from_integers(
        [secrets.randbelow(key.n) for _ in range(7 * groups)], key.arithmetic.block_width
    ).reshape(groups, 7, -1)
    randomness = fresh_randomness(round_.job, groups)
    return blocks, randomness, scheme.encrypt(key, blocks, randomness, 1)


def prove(round_: Round, blocks: Bytes, randomness: Bytes, residues: Bytes) -> tuple[Any, Bytes]:
    key, groups = round_.job.public_key, len(blocks)
    witness, d = proof.commit(key, groups, witness_stream(round_.job, groups))
    hashed = primitives.hash_fields("test", residues.tobytes())
    rho = proof.weights(key, b"{}", b"k" * 32, groups, hashed, None, d)
    responder = proof.Responder(key, witness)
    responder.add(rho, randomness, blocks)
    return responder.proof(d), rho


def check(round_: Round, found: proof.Proof, rho: Bytes, residues: Bytes) -> None:
    key = round_.job.public_key
    proof.check_ranges(key, len(rho), found)
    encoded = proof.encode(key, len(rho), found)
    assert proof.decode(key, len(rho), encoded) == found
    proof.verify(key, found, to_integers(key.arithmetic.weighted_products(residues, rho)))


@pytest.fixture
def tiny(new_round: NewRound) -> Round:
    """A job of 256 bits, for tests of hundreds of cases."""
    return new_round(("a", "b", "c"), "--modulus-bits", 256, "--insecure")


@pytest.mark.slow
def test_hundreds_of_honest_proofs_hold(tiny: Round) -> None:
    round_ = tiny
    for number in range(200):
        blocks, randomness, residues = small_statement(round_, KEY_SIZES[number % 3])
        found, rho = prove(round_, blocks, randomness, residues)
        check(round_, found, rho, residues)


MALFORMED: dict[str, Callable[[int, int, int], int]] = {
    "n-part": lambda c, n, other: c * (1 + n * (1 + secrets.randbelow(n - 1))),
    "n-part of one": lambda c, n, other: c * (1 + n),
    "garbage": lambda c, n, other: secrets.randbelow(n**2),
    "power": lambda c, n, other: pow(c, 2 + secrets.randbelow(1000), n**2),
    "inverse": lambda c, n, other: pow(c, -1, n**2),
    "product with another": lambda c, n, other: c * other,
    "another's": lambda c, n, other: other,
    "one": lambda c, n, other: 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MALFORMED)
def test_hundreds_of_malformed_uploads_of_each_kind_do_not(tiny: Round, kind: str) -> None:
    round_ = tiny
    key = round_.job.public_key
    _, _, others = small_statement(round_, 1)
    for number in range(200):
        groups = KEY_SIZES[number % 3]
        blocks, randomness, residues = small_statement(round_, groups)
        numbers = to_integers(residues)
        place = secrets.randbelow(len(numbers))
        if "n-part" in kind and place % 8 == 0:  # there is none in c_0
            place += 1
        other = to_integers(others)[place % 8]
        changed = MALFORMED[kind](numbers[place], key.n, other)
        numbers[place] = changed % (key.n**2 if place % 8 else key.n)
        residues = from_integers(numbers, key.arithmetic.width).reshape(groups, 8, -1)
        found, rho = prove(round_, blocks, randomness, residues)
        with pytest.raises(VerificationError):
            check(round_, found, rho, residues)


def test_responses_and_commitments_out_of_range_are_refused(round_: Round) -> None:
    key = round_.job.public_key
    blocks, randomness, residues = small_statement(round_, 2)
    found, rho = prove(round_, blocks, randomness, residues)
    order = round_.opened_key("kgc").trapdoor
    phi = (order.p // 2) * (order.q // 2)
    top = 1 << (proof.witness_bits(key, 2) + 1)
    too_long = found.z + phi * (top // phi + 1)  # satisfies the equations, but not the range
    for changes in (
        {"z": too_long},
        {"v": (found.v[0] + key.n, *found.v[1:])},
        {"d": (0, *found.d[1:])},
        {"d": (order.p, *found.d[1:])},
    ):
        values = {"d": found.d, "z": found.z, "v": found.v} | changes
        with pytest.raises(VerificationError):
            proof.check_ranges(key, 2, proof.Proof(**values))
    products = to_integers(key.arithmetic.weighted_products(residues, rho))
    proof.verify(key, proof.Proof(found.d, too_long, found.v), products)


def test_two_proofs_never_share_a_witness(round_: Round) -> None:
    blocks, randomness, residues = small_statement(round_, 1)
    first, second = (prove(round_, blocks, randomness, residues)[0] for _ in range(2))
    assert not set(first.d) & set(second.d)


# --- section 7: masks ---------------------------------------------------------------------


@pytest.fixture
def masked(new_round: NewRound) -> Round:
    return new_round(("a", "b", "c", "d", "e"), *DIRECT, masks=True)


def coalition_keys(round_: Round, name: str, partners: set[str], upload: Path) -> list[masks.Key]:
    """What takes off every mask of an upload that the coalition knows."""
    header = header_of(upload)
    keys = []
    for partner in sorted(partners):
        held = round_.opened_key(partner).secrets
        assert isinstance(held, ParticipantSecrets)
        key = masks.round_key(
            held.mask_seeds[name],
            bytes.fromhex(round_.job.digest),
            header["round"],
            None,
            None,
            bytes.fromhex(round_.job.roster_digest),
        )
        keys.append((-masks.sign_of(name, partner), key))
    return keys


def coalition_view(round_: Round, name: str, partners: set[str], upload: Path) -> Bytes:
    """An upload opened with both halves and stripped of every mask the coalition knows."""
    blocks = weak_open_with(round_, upload, next(iter(partners)))
    keys = coalition_keys(round_, name, partners, upload)
    return masks.add_masks(blocks.reshape(-1, blocks.shape[-1]), keys, 0, round_.job.N)


def weak_open_with(round_: Round, upload: Path, name: str) -> Bytes:
    return weak_open(round_, residues_of(upload), name)


def test_the_server_with_all_but_two_participants_learns_only_the_sum(masked: Round) -> None:
    given = {p: random_arrays(i) for i, p in enumerate(masked.names)}
    uploads = dict(zip(masked.names, masked.uploads(given, "--rounding", "nearest"), strict=True))
    honest, partners = ("b", "d"), {"a", "c", "e"}
    views = {p: coalition_view(masked, p, partners, uploads[p]) for p in honest}
    job, packing = masked.job, Packing(masked.job.N, 24)
    true = {}
    for p in honest:
        flat = np.concatenate([given[p][n].ravel() for n in sorted(given[p])]).astype(np.float64)
        true[p] = packing.pack(np.rint(flat / 5 * 2**16).astype(np.int64), len(views[p]))
    for p in honest:
        # Not one block of any group is the true one, and no group is even in range (a uniform
        # block is, at this small size, once in 170): it stays uniform.
        assert not (views[p] == true[p]).all(axis=1).any()
        for group in views[p].reshape(-1, 7, views[p].shape[-1]):
            assert not packing.unpack(group, 7 * packing.slots)[1].all()
    total = [
        (x + y) % job.N
        for x, y in zip(to_integers(views["b"]), to_integers(views["d"]), strict=True)
    ]
    expected = [
        (x + y) % job.N for x, y in zip(to_integers(true["b"]), to_integers(true["d"]), strict=True)
    ]
    assert total == expected
    # With one honest participant fewer the masks are all known: n - 2 is the limit.
    assert (coalition_view(masked, "b", partners | {"d"}, uploads["b"]) == true["b"]).all()


def test_the_server_with_all_but_two_participants_learns_only_the_sum_of_bodies(
    new_round: NewRound,
) -> None:
    """The same in a lattice job, where the masks are on blocks and body."""
    round_ = new_round(("a", "b", "c", "d", "e"), masks=True)
    given = {p: random_arrays(i) for i, p in enumerate(round_.names)}
    uploads = dict(zip(round_.names, round_.uploads(given, "--rounding", "nearest"), strict=True))
    job, codec, partners = round_.job, round_.job.codec, {"a", "c", "e"}
    bodies = {p: tensors_of(uploads[p])[BODY].tobytes() for p in "bd"}
    (batch,) = codec.batches(335)

    def seen(names: str, knowing: set[str]) -> tuple[bool, np.ndarray]:
        """What the coalition opens of the sum of some uploads; whether it is anything at all."""
        total = scheme.add(job.public_key, [residues_of(uploads[p]) for p in names])
        readers = [lambda first, count, p=p: bodies[p][first : first + count] for p in names]
        body = codec.combine_body(335, batch, readers, (), None, None)
        keys = [key for p in names for key in coalition_keys(round_, p, knowing, uploads[p])]
        decoding = codec.decode(
            bytes.fromhex(job.digest),
            335,
            len(names),
            iter([(weak_open(round_, total, "a"), np.ones(GROUPS, np.bool_))]),
            lambda first, count: body[first : first + count],
            keys,
            lambda function, tasks, total: (function(*task) for task in tasks),
        )
        values = np.concatenate(list(decoding))
        return decoding.good, values

    assert not seen("b", partners)[0]
    assert not seen("d", partners)[0]
    good, total = seen("bd", partners)
    assert good
    assert (total == exact(given["b"], 5) + exact(given["d"], 5)).all()
    good, alone = seen("b", partners | {"d"})  # with one honest participant fewer
    assert good
    assert (alone == exact(given["b"], 5)).all()


def test_two_uploads_under_one_mask_give_the_difference_away(masked: Round) -> None:
    ledger = masked.keys / "a.ledger"
    before = ledger.read_bytes()
    first = masked.upload("a", random_arrays(1), "--rounding", "nearest")
    masked.upload("a", random_arrays(2), out="second", code=5)  # the participant's own ledger
    ledger.write_bytes(before)  # ... unless it is copied, which cannot be noticed
    second = masked.upload("a", random_arrays(2), "--rounding", "nearest", out="second")
    opened = [
        to_integers(weak_open_with(masked, path, "a").reshape(-1, 64)) for path in (first, second)
    ]
    difference = [(x - y) % masked.job.N for x, y in zip(*opened, strict=True)]
    integers, fits = masked.job.codec.packing.unpack(from_integers(difference, 64), 335)
    assert fits.all()
    flat = [
        np.concatenate([random_arrays(i)[n].ravel() for n in ("a.weight", "b")]) for i in (1, 2)
    ]
    exact = [np.rint(vector.astype(np.float64) / 5 * 2**16) for vector in flat]
    assert (integers == exact[0] - exact[1]).all()
    # The server's ledger takes the first only.
    others = [masked.upload(p, random_arrays(1)) for p in "bcde"]
    masked.aggregate([first, *others])
    masked.aggregate([second, *others], out="other.enc", code=5)


def test_a_server_that_shows_different_models_gets_masks_that_do_not_cancel(
    new_round: NewRound,
) -> None:
    """The masks bind what the base opened to: whoever believes in another content spoils the
    sum. (That the server can show no other content is the release proof's part.)"""
    masked = new_round(("a", "b", "c", "d", "e"), masks=True)
    w0 = masked.save("w0.safetensors", random_arrays(50))
    uploads = masked.uploads({p: random_arrays(1) for p in masked.names}, "--model", w0)
    model = masked.aggregate(uploads, "--initial", w0, out="model.enc")
    release = masked.release(model)
    opened = {p: masked.open(release, p, out=f"{p}.w1.safetensors") for p in "acde"}
    with Ledger(masked.opened_key("a")) as ledger:
        known = ledger.find(OpenEntry)[0]
    other = masked.folder / "shown-to-b.safetensors"
    other.write_bytes(opened["a"].read_bytes().replace(known.opened.encode(), b"0" * 128))
    with Ledger(masked.opened_key("b")) as ledger:  # what b believes in
        ledger.append(known.model_copy(update={"opened": "0" * 128}))
    uploads = [
        masked.upload(p, random_arrays(2), "--model", opened.get(p, other), out=f"{p}2")
        for p in masked.names
    ]
    spoiled = masked.aggregate(uploads, "--model", model, out="model-2.enc")
    masked.open(masked.release(spoiled, out="r2"), "c", out="w2.safetensors", code=4)


def test_masks_are_the_protocol_formula(masked: Round) -> None:
    """Against HKDF by hand (RFC 5869) and plain integers."""
    import hmac

    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    job = masked.job
    arrays = random_arrays(3)
    upload = masked.upload("b", arrays, "--rounding", "nearest")
    flat = np.concatenate([arrays[n].ravel() for n in sorted(arrays)]).astype(np.float64)
    groups, packing = job.codec.groups(335), job.codec.packing
    packed = to_integers(packing.pack(np.rint(flat / 5 * 2**16).astype(np.int64), 7 * groups))
    held = masked.opened_key("b").secrets
    assert isinstance(held, ParticipantSecrets)
    for other, seed in held.mask_seeds.items():
        info = b""
        items = (b"dtl/v2/mask", bytes.fromhex(job.digest), (1).to_bytes(4, "little"), b"", b"")
        for item in (*items, bytes.fromhex(job.roster_digest)):
            info += len(item).to_bytes(4, "little") + item
        extracted = hmac.digest(bytes(64), seed, "sha512")
        key = hmac.digest(extracted, info + b"\x01", "sha512")[:32]
        stride = (512 + 128) // 8
        stream = (
            Cipher(ChaCha20(key, bytes(16)), None).encryptor().update(bytes(stride * 7 * groups))
        )
        for t in range(7 * groups):
            value = int.from_bytes(stream[t * stride : (t + 1) * stride], "little") % job.N
            packed[t] = (packed[t] + (value if other > "b" else -value)) % job.N
    assert to_integers(weak_open_with(masked, upload, "b").reshape(-1, 64)) == packed


def test_pairs_share_seeds_and_nobody_else_has_them(masked: Round) -> None:
    held = {name: json.loads(masked.key(name).read_bytes())["mask_seeds"] for name in masked.names}
    for one in masked.names:
        assert set(held[one]) == set(masked.names) - {one}
        for other in held[one]:
            assert held[one][other] == held[other][one]
    assert len({seed for seeds in held.values() for seed in seeds.values()}) == 10
    assert "mask" not in masked.key("server").read_text()


def test_unmasked_uploads_are_refused_in_a_masked_job(masked: Round) -> None:
    uploads = uploads_of(masked)
    forged = Statement(masked, "a", header_of(uploads[0]) | {"masked": False}, GROUPS)
    masked.aggregate([*uploads[1:], forged.write("bare")], code=3)


# --- differencing: two results that differ in one contributor ------------------------------


def differing_sums(round_: Round) -> tuple[list[Path], Path, Path]:
    given = {p: random_arrays(i) for i, p in enumerate(round_.names)}
    uploads = round_.uploads(given, "--rounding", "nearest")
    both = round_.aggregate(uploads, out="all.enc"), round_.aggregate(uploads[:3], out="some.enc")
    return uploads, *both


def test_a_second_release_gives_the_odd_one_out_away(new_round: NewRound) -> None:
    """Released both, the two sums differ by dave's gradient; so the second is not released."""
    round_ = new_round(("a", "b", "c", "dave"), *DIRECT)
    _, everyone, some = differing_sums(round_)
    opened = [weak_sum(round_, path) for path in (everyone, some)]
    assert (opened[0] - opened[1] == exact(random_arrays(3), 4)).all()
    round_.release(everyone, out="r1")
    round_.release(some, out="r2", code=5)
    round_.release(some, "--accept-differencing", out="r2", code=5)  # not for one round, ever


def test_a_rerun_on_the_same_base_gives_the_odd_one_out_away(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c", "dave"), *DIRECT)
    w0 = round_.save("w0.safetensors", random_arrays(50))
    given = {p: random_arrays(i) for i, p in enumerate(round_.names)}
    options = ("--model", w0, "--rounding", "nearest")
    first = round_.aggregate(round_.uploads(given, *options), "--initial", w0, out="1.enc")
    again = (*options, "--round", 2)
    round_.upload("a", given["a"], *again, out="a2", code=5)  # the participant's own ledger
    del given["dave"]
    uploads = round_.uploads(given, *again, "--accept-differencing", tag="2")
    second = round_.aggregate(uploads, "--initial", w0, out="2.enc")
    opened = [weak_sum(round_, path) for path in (first, second)]
    assert (opened[1] - opened[0] == exact(random_arrays(3), 4)).all()
    round_.release(first, out="r1")
    round_.release(second, out="r2", code=5)  # the server's ledger


def weak_sum(round_: Round, path: Path) -> np.ndarray:
    blocks = weak_open_with(round_, path, "a")
    integers, fits = round_.job.codec.packing.unpack(blocks.reshape(-1, blocks.shape[-1]), 335)
    assert fits.all()
    return integers


def exact(arrays: Arrays, count: int) -> np.ndarray:
    flat = np.concatenate([arrays[n].ravel() for n in sorted(arrays)]).astype(np.float64)
    return np.rint(flat / count * 2**16).astype(np.int64)


def test_a_round_that_is_closed_after_its_result_is_known(new_round: NewRound) -> None:
    """The full sum less the closed one would be dave's gradient: a flaw of the protocol, mended."""
    round_ = new_round(("a", "b", "c", "dave"), masks=True)
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(round_.names)})
    closed = round_.folder / "late.close"
    close = ("close-round", *uploads[:3], "--key", round_.key("server"), "-o", closed)
    ledger = round_.keys / "server.ledger"
    before = ledger.read_bytes()
    release = round_.release(round_.aggregate(uploads))
    round_.dtl(*close, code=5)
    round_.open(release, "a")
    ledger.write_bytes(before)  # a server that forgets on purpose
    round_.dtl(*close)
    reveal = ("reveal-masks", closed, "-o", round_.folder / "x.reveal", "--key")
    round_.dtl(*reveal, round_.key("a"), code=5)
    round_.dtl(*reveal, round_.key("b"))  # who has opened nothing cannot know


def test_a_close_file_for_a_round_that_was_begun_anew(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c", "dave"), masks=True)
    w0 = round_.save("w0.safetensors", random_arrays(50))
    options = ("--model", w0)
    uploads = [round_.upload(p, random_arrays(1), *options) for p in "abc"]
    closed = round_.folder / "late.close"
    round_.dtl("close-round", *uploads, "--key", round_.key("server"), "-o", closed)
    again = (*options, "--round", 2, "--accept-differencing")
    round_.upload("a", random_arrays(1), *again, out="a2")
    reveal = ("reveal-masks", closed, "-o", round_.folder / "a.reveal", "--key", round_.key("a"))
    round_.dtl(*reveal, code=5)
