"""Files that change while they are read, proofs made the wrong way round, and an honest
participant that a server wants to see accused.
"""

import json
import mmap
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtl.core.crypto import one_time, primitives, proof
from dtl.core.crypto.residues import Bytes, from_integers, to_integers
from dtl.core.files.container import BODY, PROOF, RESIDUES, SEALED, Container
from dtl.core.files.ledger import Ledger, OpenEntry
from dtl.core.public import releases, results, uploads
from dtl.core.roles.participant import producing
from tests.forging import Statement, header_of, tensors_of, write
from tests.helpers import THREE, Round, random_arrays, residues_of

NewRound = Callable[..., Round]
SMALL = ("--modulus-bits", 256, "--insecure")
CIPHERS = ("lattice", "direct")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here is about a crash


@pytest.fixture(params=CIPHERS)
def round_(new_round: NewRound, request: pytest.FixtureRequest) -> Round:
    return new_round(THREE, "--cipher", request.param, *SMALL)


# --- what is multiplied is what was checked ------------------------------------------------------


class Mapped:
    """A file that its owner holds in a shared mapping; the first write is before the check."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.view = mmap.mmap(file.fileno(), 0)
        self.view[0] = self.view[0]  # from now on, writing does not move the time of the file

    def put(self, place: int, data: bytes) -> None:
        self.view[place : place + len(data)] = data

    def flip(self, place: int) -> None:
        self.put(place, bytes([self.view[place] ^ 1]))


def place_of(path: Path, tensor: str) -> int:
    """Where a byte of a tensor is, not the first one."""
    with Container(path) as container:
        return container.tensors[tensor].start + 3


def after(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, change: Callable[[], None]
) -> None:
    """Let `change` happen once, when a function of a module has come to its end."""
    function, done = getattr(module, name), list[bool]()

    def wrapped(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options)
        if not done:
            change()
        done.append(True)
        return found

    monkeypatch.setattr(module, name, wrapped)


def test_v1_multiplied_what_was_changed_after_the_check(
    new_round: NewRound, tmp_path: Path
) -> None:
    """Its stamp did not move, so v1 went on; and the product gave the server's half away."""
    round_ = new_round(THREE, *SMALL)
    n, n2 = round_.job.N, round_.job.N**2
    key = round_.job.public_key
    # An upload of v1: c_0 modulo N^2, of the attacker's own r, and c_1 of a zero.
    r = secrets.randbits(256)
    group = [pow(key.g, r, n2), pow(key.h[0], r, n2)]
    path = tmp_path / "v1.upload"
    path.write_bytes(b"".join(c.to_bytes(64, "little") for c in group))
    mapped = Mapped(path)

    def stamp() -> tuple[int, ...]:
        found = path.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino

    before, checked = stamp(), path.read_bytes()  # hashed, and its proof holds
    assert [int.from_bytes(checked[i : i + 64], "little") for i in (0, 64)] == group
    mapped.put(0, (group[0] * (1 + n) % n2).to_bytes(64, "little"))
    assert stamp() == before
    multiplied = np.memmap(path, np.uint8, "r").tobytes()
    c_0, c_1 = (int.from_bytes(multiplied[i : i + 64], "little") for i in (0, 64))
    a, b = (round_.opened_key(name).half[0] for name in ("server", "alice"))
    released = c_1 * pow(c_0, -a, n2) % n2
    opened = (released * pow(c_0, -b, n2) % n2 - 1) // n % n
    assert (-opened - b) % n == a % n


@pytest.mark.parametrize("tensor", [RESIDUES, BODY])
def test_an_upload_that_changes_after_its_proof_was_checked(
    round_: Round, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    made = [round_.upload(p, random_arrays(i)) for i, p in enumerate(THREE)]
    if tensor == BODY and not round_.job.codec.body_bytes(335):
        return
    mapped, place = Mapped(made[0]), place_of(made[0], tensor)
    ledger = (round_.keys / "server.ledger").read_bytes()
    after(monkeypatch, uploads, "_fault", lambda: mapped.flip(place))
    command = ("aggregate", *made, "--key", round_.key("server"), "-o", round_.folder / "x.enc")
    error = round_.dtl(*command, code=3).err
    assert "the file changed while it was read" in error
    assert not list(round_.folder.glob("*x.enc*"))
    assert (round_.keys / "server.ledger").read_bytes() == ledger


def model_round(round_: Round) -> tuple[Path, list[Path], Path, list[Path]]:
    """Initial weights, the uploads on them, the model, and uploads on the model."""
    w0 = round_.save("w0.safetensors", random_arrays(50))
    first = round_.uploads({p: random_arrays(i) for i, p in enumerate(THREE)}, "--model", w0)
    model = round_.aggregate(first, "--initial", w0, out="m1.enc")
    release = round_.release(model)
    opened = [round_.open(release, p, out=f"{p}1.safetensors") for p in THREE]
    second = [
        round_.upload(p, random_arrays(5), "--model", w, out=f"{p}2")
        for p, w in zip(THREE, opened, strict=True)
    ]
    return w0, first, model, second


def test_what_a_round_starts_from_changes(round_: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    """Initial weights after they were digested; the encrypted model after it was hashed."""
    w0, first, model, second = model_round(round_)
    ledger = round_.keys / "server.ledger"
    ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0])
    bodies = [BODY] if round_.job.codec.body_bytes(335) else []
    with monkeypatch.context() as patch:
        mapped = Mapped(w0)
        after(patch, results, "start_from_weights", lambda: mapped.flip(len(mapped.view) - 4))
        round_.aggregate(first, "--initial", w0, out="x.enc", code=3)
        mapped.flip(len(mapped.view) - 4)
    for tensor in (RESIDUES, *bodies):
        place, mapped = place_of(model, tensor), Mapped(model)
        for command in (
            ("aggregate", *second, "--model", model),
            ("release-model", model),
        ):
            with monkeypatch.context() as patch:
                after(patch, results, "open_result", lambda: mapped.flip(place))  # noqa: B023
                key = ("--key", round_.key("server"), "-o", round_.folder / "x.enc")
                error = round_.dtl(*command, *key, code=3).err
                assert "the file changed while it was read" in error
                assert not list(round_.folder.glob("*x.enc*"))
            mapped.flip(place)
    round_.aggregate(second, "--model", model, out="x.enc")  # nothing of it is left


def test_a_release_that_changes_after_its_proof_was_checked(
    round_: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [round_.upload(p, random_arrays(i)) for i, p in enumerate(THREE)]
    release = round_.release(round_.aggregate(made))
    bodies = [BODY] if round_.job.codec.body_bytes(335) else []
    mapped = Mapped(release)
    for tensor in (SEALED, RESIDUES, *bodies):
        place = place_of(release, tensor)
        with monkeypatch.context() as patch:
            after(patch, releases, "check_release_proof", lambda: mapped.flip(place))  # noqa: B023
            round_.open(release, "alice", code=3)
        mapped.flip(place)
    round_.open(release, "alice")


def test_a_product_is_recomputed_from_what_was_checked(
    round_: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [round_.upload(p, random_arrays(i)) for i, p in enumerate(THREE)]
    result = round_.aggregate(made)
    mapped, place = Mapped(made[0]), place_of(made[0], RESIDUES)
    after(monkeypatch, uploads, "_fault", lambda: mapped.flip(place))
    job = ("--job", round_.keys / "job.json", "--uploads", *made)
    round_.dtl("verify", result, *job, code=3)


def test_gradients_that_change_before_they_are_proven(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof must be about the blocks that were encrypted: they are computed twice if many."""
    round_ = new_round(THREE, "--cipher", "direct", *SMALL)
    path = round_.save("g.safetensors", random_arrays(1))
    mapped = Mapped(path)
    monkeypatch.setattr(producing, "KEEP_BYTES", 0)
    run = producing._Encryption.run

    def changed(*arguments: Any) -> Any:
        found = run(*arguments)
        mapped.put(len(mapped.view) - 4, np.float32(1).tobytes())
        return found

    monkeypatch.setattr(producing._Encryption, "run", changed)
    ledger = (round_.keys / "alice.ledger").read_bytes()
    command = ("encrypt-grads", path, "--round", 1, "--key", round_.key("alice"))
    round_.dtl(*command, "-o", round_.folder / "x.upload", code=3)
    assert not list(round_.folder.glob("*x.upload*"))
    assert (round_.keys / "alice.ledger").read_bytes() == ledger


# --- the hash of the proof: what it covers cannot be chosen after it ------------------------------


def statement_of(round_: Round) -> Statement:
    """A statement about alice's header and body: blocks of zeros, under randomness it knows."""
    upload = round_.upload("alice", random_arrays(1))
    body = tensors_of(upload).get(BODY)
    return Statement(round_, "alice", header_of(upload), round_.job.codec.groups(335), body)


def weights_without(made: Statement, **changes: Any) -> Bytes:
    """rho as it would be if the hash did not cover something: that has another value here."""
    residues, body = made.digests()
    given = {"residues": residues, "body": body, "d": (1,) * 8} | changes
    public = primitives.signing_public_key(made.secret)
    raw = json.dumps(made.header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    items = (given["residues"], given["body"], given["d"])
    return proof.weights(made.key, raw.encode(), public, made.groups, *items)


def deliver(round_: Round, made: Statement, given: bytes, code: int) -> None:
    ledger = round_.keys / "server.ledger"
    before = ledger.read_bytes()
    others = [
        round_.folder / f"{p}.upload"
        if (round_.folder / f"{p}.upload").exists()
        else round_.upload(p, random_arrays(2))
        for p in ("bob", "carol")
    ]
    round_.aggregate([made.write("forged.upload", given), *others], out="f.enc", code=code)
    ledger.write_bytes(before)
    (round_.folder / "f.enc").unlink(missing_ok=True)


def test_a_statement_that_is_known_is_accepted(round_: Round) -> None:
    made = statement_of(round_)
    deliver(round_, made, made.proof(), 0)


def test_commitments_cannot_be_chosen_after_the_challenge(round_: Round) -> None:
    """If rho did not depend on d: take any z and v, and solve for d. No block need be known."""
    made = statement_of(round_)
    key, n, n2 = made.key, made.key.n, made.key.n**2
    numbers = made.numbers()
    for place in range(1, 8):  # blocks that the forger does not know
        numbers[place] = numbers[place] * (1 + n * secrets.randbelow(n)) % n2
    made.send(numbers)
    rho = to_integers(weights_without(made))
    z, v = secrets.randbits(500), [secrets.randbelow(n) for _ in range(7)]
    d = []
    for j, modulus in enumerate((n, *[n2] * 7)):
        left = pow(key.gamma, z, n) if j == 0 else pow(key.h[j - 1], z, n2) * (1 + v[j - 1] * n)
        for i, weight in enumerate(rho):
            left = left * pow(numbers[8 * i + j], -weight, modulus) % modulus
        d.append(left % modulus)
    forged = proof.encode(key, made.groups, proof.Proof(tuple(d), z, tuple(v)))
    products = to_integers(key.arithmetic.weighted_products(made.residues, from_integers(rho, 16)))
    proof.verify(key, proof.Proof(tuple(d), z, tuple(v)), products)  # the equations hold
    deliver(round_, made, forged, 4)


def test_residues_cannot_be_chosen_after_the_challenge(round_: Round) -> None:
    """If rho did not depend on the residues: factors that cancel under these weights."""
    made = statement_of(round_)
    key, n2 = made.key, made.key.n**2
    honest = made.digests()[0]
    witness, d = proof.commit(
        key, made.groups, secrets.token_bytes(proof.witness_bytes(key, made.groups))
    )
    weights = weights_without(made, residues=honest, d=d)
    rho = to_integers(weights)
    responder = proof.Responder(key, witness)
    responder.add(weights, made.randomness, made.blocks)
    found = responder.proof(d)
    numbers = made.numbers()
    factor = 1 + key.n  # any number will do, an N-part or another's ciphertext
    numbers[1] = numbers[1] * pow(factor, rho[1], n2) % n2
    numbers[9] = numbers[9] * pow(factor, -rho[0], n2) % n2
    made.send(numbers)
    products = to_integers(key.arithmetic.weighted_products(made.residues, weights))
    proof.verify(key, found, products)  # the equations hold
    deliver(round_, made, proof.encode(key, made.groups, found), 4)


def test_the_body_cannot_be_chosen_after_the_proof(new_round: NewRound) -> None:
    """Else somebody could deliver another's key part under a body of its own, and the reverse."""
    round_ = new_round(THREE, *SMALL)
    made = statement_of(round_)
    given = made.proof()
    deliver(round_, made, given, 0)
    made.body = made.body.copy()
    made.body[0] ^= 1
    deliver(round_, made, given, 4)


def test_a_proof_is_its_signers_own(round_: Round) -> None:
    """The same statement, delivered by somebody else under its own name."""
    made = statement_of(round_)
    given = made.proof()
    made.secret = round_.opened_key("bob").secrets.sign
    made.header = made.header | {"signer": "bob"}
    bad = made.write("forged.upload", given)
    others = [round_.folder / "alice.upload", round_.upload("carol", random_arrays(2))]
    round_.aggregate([bad, *others], out="f.enc", code=4)


# --- fresh and wide ------------------------------------------------------------------------------


def test_r_has_its_full_width(round_: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    """c_0 = gamma^r with all ell bits of the keystream: 64 bits of it would be found."""
    derive, seen = one_time.derive_one_time, list[one_time.OneTimeKeys]()

    def noted(*arguments: Any) -> one_time.OneTimeKeys:
        seen.append(derive(*arguments))
        return seen[-1]

    monkeypatch.setattr(one_time, "derive_one_time", noted)
    numbers = to_integers(residues_of(round_.upload("alice", random_arrays(1))))
    groups, key = round_.job.codec.groups(335), round_.job.public_key
    stream = primitives.keystream(seen[0].randomness, 0, groups * 32)
    exponents = [int.from_bytes(stream[32 * i : 32 * i + 32], "little") for i in range(groups)]
    assert max(exponents).bit_length() > 250
    assert len(set(exponents)) == groups
    assert numbers[::8] == [pow(key.gamma, r, key.n) for r in exponents]


def test_two_uploads_of_the_same_gradients_share_nothing(
    round_: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with a ledger that was put back, and a clock that stands still."""
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    ledger = (round_.keys / "alice.ledger").read_bytes()
    made = []
    for number in range(2):
        (round_.keys / "alice.ledger").write_bytes(ledger)
        upload = round_.upload("alice", random_arrays(1), "--rounding", "nearest", out=str(number))
        found = tensors_of(upload)
        found[RESIDUES] = found[RESIDUES][:, 1:]  # the upper half of every c_0 is zero
        made.append(found)
    for name in (RESIDUES, PROOF, BODY):
        if name in made[0]:
            same = made[0][name] == made[1][name]
            assert same.mean() < 0.05, name
    assert not set(map(bytes, made[0][RESIDUES].reshape(-1, 64))) & set(
        map(bytes, made[1][RESIDUES].reshape(-1, 64))
    )


def test_the_witness_of_an_upload_is_not_its_randomness(
    round_: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Secret, errors, randomness and witness have keys of their own."""
    derive, seen = one_time.derive_one_time, list[one_time.OneTimeKeys]()

    def noted(*arguments: Any) -> one_time.OneTimeKeys:
        seen.append(derive(*arguments))
        return seen[-1]

    monkeypatch.setattr(one_time, "derive_one_time", noted)
    for number in (1, 2):
        round_.upload("alice", random_arrays(1), "--round", number, out=str(number))
    keys = [getattr(k, name) for k in seen for name in ("secret", "error", "randomness", "witness")]
    assert len(set(keys)) == 8


def test_two_boxes_under_one_passphrase_share_nothing(new_round: NewRound, tmp_path: Path) -> None:
    phrase = tmp_path / "phrase"
    phrase.write_text("correct horse\n")
    options = ("--passphrase-file", phrase, "--min-contributors", 2)
    round_ = new_round(("alice", "bob"), *SMALL, *options)
    boxes = [json.loads(round_.key(name).read_bytes())["box"] for name in ("alice", "bob", "kgc")]
    for field in ("salt", "commit", "sealed"):
        assert len({box[field] for box in boxes}) == 3, field
    assert all(len(primitives.decode_base64(box["salt"])) == 32 for box in boxes)


# --- an audit that accuses the right one ----------------------------------------------------------


def audit(round_: Round, *arguments: object, code: int = 0) -> dict[str, dict[str, Any]]:
    command = ("audit", *arguments, "--key", round_.key("kgc"), "--json")
    found = json.loads(round_.dtl(*command, code=code).out)["files"]
    return {str(verdict["signer"]): verdict for verdict in found}


@pytest.fixture(params=CIPHERS)
def masked(new_round: NewRound, request: pytest.FixtureRequest) -> Round:
    return new_round(THREE, "--cipher", request.param, *SMALL, masks=True)


class Shown:
    """A second round with masks; bob believes that the model opened to something else."""

    def __init__(self, round_: Round) -> None:
        self.round = round_
        w0 = round_.save("w0.safetensors", random_arrays(50))
        first = round_.uploads({p: random_arrays(i) for i, p in enumerate(THREE)}, "--model", w0)
        self.model = round_.aggregate(first, "--initial", w0, out="m1.enc")
        self.release = round_.release(self.model)
        self.true = {p: round_.open(self.release, p, out=f"{p}1.safetensors") for p in THREE}
        with Ledger(round_.opened_key("bob")) as ledger:
            (known,) = ledger.find(OpenEntry)
        self.opened, self.lie = known.opened, secrets.token_hex(64)
        self.lied = round_.folder / "lied.safetensors"
        text = self.true["bob"].read_bytes()
        self.lied.write_bytes(text.replace(self.opened.encode(), self.lie.encode()))
        path = round_.keys / "bob.ledger"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
        with Ledger(round_.opened_key("bob")) as ledger:
            ledger.append(known.model_copy(update={"opened": self.lie}))
        models = self.true | {"bob": self.lied}
        self.uploads = [
            round_.upload(p, random_arrays(5), "--model", models[p], out=f"{p}2") for p in THREE
        ]


def test_v1_accused_whoever_had_been_shown_something_else(masked: Round) -> None:
    """v1 knew the masks only: those of an honest bob, who was shown another model, are wrong."""
    shown = Shown(masked)
    verdicts = audit(masked, *shown.uploads, "--model", shown.model, code=4)
    v1 = {name: verdict["masks"] for name, verdict in verdicts.items()}
    assert v1 == {"alice": "as they should be", "bob": "wrong", "carol": "as they should be"}
    # v2: the tag says why, and that nobody but bob can have done it: one result opens to one
    # content (test_attacks_releases.py), so there is no release that shows him another.
    assert verdicts["bob"]["base_opened_to"] == "something else"
    assert "worked on another model" in verdicts["bob"]["verdict"]
    assert "unless it shows a release by the server" in verdicts["bob"]["verdict"]
    for name in ("alice", "carol"):
        assert verdicts[name]["verdict"] == "good"
        assert verdicts[name]["base_opened_to"] == "what was released"
    # The same with the release instead of the model.
    again = audit(masked, *shown.uploads, "--model", shown.release, code=4)
    assert {n: v["verdict"] == "good" for n, v in again.items()} == {
        name: name != "bob" for name in THREE
    }


def test_a_plain_file_is_a_claim_and_accuses_nobody(masked: Round) -> None:
    """Its metadata say what bob says; the honest ones are not to blame for that."""
    shown = Shown(masked)
    verdicts = audit(masked, *shown.uploads, "--model", shown.lied, code=4)
    for name in ("alice", "carol"):
        said = verdicts[name]["verdict"]
        assert "give the encrypted model instead" in said
        assert "own" not in said
        assert verdicts[name]["masks"] == "unknown"
        for part in said.split("; "):
            if "wrong masks" in part:
                assert "--model is not what was released" in part
    # Nor without any --model: bob's masks would be right for a base of initial weights.
    verdicts = audit(masked, *shown.uploads, code=4)
    for name in ("alice", "carol"):
        assert "add --model" in verdicts[name]["verdict"]


def test_a_random_tag_is_no_excuse(masked: Round) -> None:
    """Wrong masks and a tag of nothing: the signer's own fault; and a right tag does not help."""
    shown = Shown(masked)
    alice, bob, carol = shown.uploads
    secret = masked.opened_key("alice").secrets.sign
    tagged = write(
        masked.folder / "tagged",
        header_of(alice) | {"opened_tag": "0" * 32},
        tensors_of(alice),
        secret,
    )
    verdicts = audit(masked, tagged, bob, carol, "--model", shown.model, code=4)
    assert "the fault is alice's own" in verdicts["alice"]["verdict"]
    assert verdicts["carol"]["verdict"] == "good"
    # Right tag, wrong masks: no doubt, whatever else is known of the base.
    good = header_of(shown.uploads[2])["opened_tag"]
    body = json.loads(masked.key("carol").read_bytes())
    body["mask_seeds"]["alice"] = body["sign"]
    path = masked.key("carol")
    path.write_bytes(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    ledger = masked.keys / "carol.ledger"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    spoiled = masked.upload("carol", random_arrays(5), "--model", shown.true["carol"], out="c")
    assert header_of(spoiled)["opened_tag"] == good
    for model in (shown.model, shown.true["alice"]):
        verdict = audit(masked, alice, spoiled, "--model", model, code=4)["carol"]
        assert verdict["masks"] == "wrong"
        assert "--model" not in verdict["verdict"]


def test_the_tag_is_bound_to_round_base_and_name(masked: Round) -> None:
    """Nobody else's tag and no other round's fits."""
    w0 = masked.save("w0.safetensors", random_arrays(50))
    tags = {}
    for name in THREE:
        upload = masked.upload(name, random_arrays(1), "--model", w0)
        tags[name, 1] = header_of(upload)["opened_tag"]
        again = ("--round", 2, "--accept-differencing")
        upload = masked.upload(name, random_arrays(1), "--model", w0, *again, out=f"{name}2")
        tags[name, 2] = header_of(upload)["opened_tag"]
    assert len(set(tags.values())) == 6
    assert (
        header_of(masked.upload("bob", random_arrays(1), "--round", 3, out="n"))["opened_tag"]
        is None
    )
