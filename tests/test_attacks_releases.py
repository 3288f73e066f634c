"""A server that signs any release or result: what is refused before half b is used, and how
everything fails that fails after it.
"""

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dtl.core.ciphers.lattice import LatticeCipher
from dtl.core.crypto.residues import Bytes, from_integers, to_integers
from dtl.core.errors import DtlError
from dtl.core.files.container import BODY, RESIDUES
from dtl.core.files.key_file import Key
from dtl.core.files.tensor_writer import TensorWriter
from dtl.core.lattice import ring as lattice
from dtl.core.roles import participant
from dtl.core.roles.participant import opening
from tests.forging import (
    Forged,
    Server,
    Statement,
    fresh_randomness,
    header_of,
    sum_header,
    tensors_of,
    untouchable,
)
from tests.helpers import THREE, Round, random_arrays, residues_of

NewRound = Callable[..., Round]
SMALL = ("--modulus-bits", 256, "--insecure")
VALUES = 8


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here is about a crash


@pytest.fixture(params=["lattice", "direct"])
def round_(new_round: NewRound, request: pytest.FixtureRequest) -> Round:
    return new_round(THREE, "--cipher", request.param, *SMALL)


@dataclass
class Made:
    """A whole round: the uploads, the result, and what a server may make of it."""

    round: Round
    server: Server
    uploads: list[Path]
    result: Path

    def release(self) -> Forged:
        return self.server.of(self.result)

    def refused(self, release: Path, code: int, *names: str) -> None:
        """Every recipient refuses it: half b is not looked at, and no line is written."""
        for name in names or self.round.names:
            refused(self.round.opened_key(name), release, code)

    def verify(self, release: Path, *options: object, code: int = 0) -> dict[str, Any]:
        job = ("--job", self.round.keys / "job.json", "--json")
        found = self.round.dtl("verify", release, *job, *options, code=code)
        return {} if code else found.json

    def checked(self, release: Path, code: int = 0) -> dict[str, Any]:
        """By a granted participant, with all evidence."""
        key = ("--key", self.round.key("alice"))
        return self.verify(release, *key, "--uploads", *self.uploads, code=code)


def refused(key: Key, release: Path, code: int) -> str:
    """Refused before half b is used; returns what was said."""
    before, out = key.ledger_path.read_bytes(), release.parent / "refused.safetensors"
    with pytest.raises(DtlError) as error:
        participant.open_release(untouchable(key), release, out)
    assert error.value.exit_code == code, error.value.message
    assert key.ledger_path.read_bytes() == before
    assert not out.exists()
    return error.value.message


@pytest.fixture
def made(round_: Round) -> Made:
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(round_.names)})
    return Made(round_, Server(round_), uploads, round_.aggregate(uploads))


# --- releases that are not the signed result -----------------------------------------------------


def set_residue(made: Made, place: tuple[int, int], value: int) -> Forged:
    """A signed result with one residue of the server's choice, and the best proof for it."""
    forged = made.release()
    residues = forged.tensors[RESIDUES].copy()
    residues[place] = from_integers([value], residues.shape[-1])[0]
    forged.tensors[RESIDUES] = residues
    return forged


def set_sealed(made: Made, place: tuple[int, int], change: Callable[[int], int]) -> Forged:
    forged = made.release()
    forged.opened = forged.opened.copy()
    (old,) = to_integers(forged.opened[place][None])
    forged.opened[place] = from_integers([change(old)], forged.opened.shape[-1])[0]
    return forged


def set_proof(made: Made, part: str, value: int) -> Forged:
    """A proof with t_1 or t'_1 or z_1 of the server's choice; nothing else is changed."""
    forged, width = made.release(), made.server.job.public_key.arithmetic.width
    honest = forged.prove

    def prove(core: bytes, of: bytes) -> bytes:
        found = honest(core, of)
        start, length = {"t": (0, width), "t'": (7 * width, width), "z": (14 * width, 65)}[part]
        return found[:start] + value.to_bytes(length, "little") + found[start + length :]

    forged.prove = prove  # type: ignore[method-assign]
    return forged


def factor(made: Made) -> int:
    """p: what no server can know."""
    found: int = made.round.opened_key("kgc").trapdoor.p
    return found


def first(made: Made) -> int:
    """c_0 of the first group."""
    return to_integers(residues_of(made.result))[0]


BAD_RELEASES: dict[str, tuple[Callable[[Made], Forged], int]] = {
    "c_0 is 0": (lambda m: set_residue(m, (0, 0), 0), 3),
    "c_0 is N": (lambda m: set_residue(m, (0, 0), m.server.job.N), 3),
    "c_0 is above N": (lambda m: set_residue(m, (0, 0), first(m) + m.server.job.N), 3),
    "c_0 has a factor of N": (lambda m: set_residue(m, (1, 0), 2 * factor(m)), 3),
    "c_3 is 0": (lambda m: set_residue(m, (1, 3), 0), 3),
    "c_3 is N^2": (lambda m: set_residue(m, (1, 3), m.server.job.N**2), 3),
    "c_3 has a factor of N": (lambda m: set_residue(m, (0, 3), 2 * factor(m)), 3),
    "c'_3 is 0": (lambda m: set_sealed(m, (0, 2), lambda _: 0), 4),
    "c'_3 has a factor of N": (lambda m: set_sealed(m, (0, 2), lambda _: factor(m)), 4),
    "another weight is sealed": (
        lambda m: set_sealed(
            m, (0, 0), lambda c: c * (1 + (3 << 16) * m.server.job.N) % m.server.job.N**2
        ),
        4,
    ),
    "another number is sealed": (
        lambda m: set_sealed(m, (1, 6), lambda c: c * 4 % m.server.job.N**2),
        4,
    ),
    "t is 0": (lambda m: set_proof(m, "t", 0), 4),
    "t' is 0": (lambda m: set_proof(m, "t'", 0), 4),
    "z is too long": (lambda m: set_proof(m, "z", 1 << 513), 4),
    "z is another": (lambda m: set_proof(m, "z", 5), 4),
}


@pytest.mark.parametrize("name", BAD_RELEASES)
def test_a_release_that_is_not_the_signed_result(made: Made, name: str) -> None:
    make, code = BAD_RELEASES[name]
    release = make(made).write("bad.release")
    made.refused(release, code)
    made.verify(release, "--key", made.round.key("alice"), code=code)


def test_only_the_honest_release_is_called_recomputed(made: Made) -> None:
    honest = made.release().write("honest.release")
    found = made.checked(honest)
    assert found["recomputed"]
    assert found["product"] == "recomputed, bit for bit the same"
    without_key = made.verify(honest, "--uploads", *made.uploads)
    assert not without_key["recomputed"]
    assert "not checked" in without_key["sealed"]
    assert not made.verify(honest, "--key", made.round.key("alice"))["recomputed"]
    assert not made.verify(honest)["recomputed"]
    out = made.round.folder / "o.safetensors"
    command = ("open-model", honest, "--json", "-o", out, "--force", "--key")
    evidence = ("--uploads", *made.uploads)
    assert made.round.dtl(*command, made.round.key("alice"), *evidence).json["recomputed"] is True
    assert made.round.dtl(*command, made.round.key("bob")).json["recomputed"] is False


def changed(array: np.ndarray, place: int = 0) -> np.ndarray:
    """The bytes with one bit turned."""
    data = np.array(array)
    data.reshape(-1)[place] ^= 1
    return data


def test_nothing_of_the_result_inside_a_release_can_be_changed(made: Made) -> None:
    """Neither residue nor body nor manifest nor signature: `of` and the signature cover them."""
    original = made.release()
    release = original.write("honest.release")
    kept = {key: header_of(release)[key] for key in ("of", "result_signature")}

    def forge(**changes: Any) -> Forged:
        forged = made.release()
        forged.header = kept
        for name, value in changes.items():
            setattr(forged, name, value)
        return forged

    for name, tensor in original.tensors.items():
        bad = forge(tensors=original.tensors | {name: changed(tensor, 1)}).write("bad.release")
        made.refused(bad, 4)
        made.checked(bad, code=4)
    for change in ({"created": "2020-01-01T00:00:00Z"}, {"parent": "0" * 128}):
        made.refused(forge(manifest=original.manifest | change).write("bad.release"), 4)
    bad = forge(header=kept | {"result_signature": "0" * 128}).write("bad.release")
    made.refused(bad, 4)
    made.checked(bad, code=4)


def test_a_result_whose_own_signature_is_of_something_else(made: Made) -> None:
    """`of` holds, but the server never signed that result as one: only as a release."""
    forged = made.release()
    header = forged.manifest | {"created": "2020-01-01T00:00:00Z"}
    forged.manifest = header
    honest = header_of(made.release().write("honest.release"))
    forged.header = {"result_signature": honest["result_signature"]}
    made.refused(forged.write("bad.release"), 4)


def test_another_signed_result_inside(made: Made) -> None:
    """The sealed part of one result beside another one, in all ways to mix them."""
    other = [made.round.upload(p, random_arrays(9), "--round", 2, out=f"{p}2") for p in THREE]
    second = made.round.aggregate(other, out="second.enc")
    one, two = made.server.of(made.result), made.server.of(second)
    one.opened = two.opened
    made.refused(one.write("bad.release"), 4)
    one = made.release()
    one.tensors = two.tensors
    made.refused(one.write("bad.release"), 4)
    two.manifest = two.manifest | {"round": 1}
    made.refused(two.write("bad.release"), 4)  # the own upload is not in it
    made.checked(two.write("bad.release"), code=4)


def test_v1_released_any_model_and_verify_confirmed_it(made: Made) -> None:
    """v1: all residues were sealed, and a release only named the digest of the result."""
    job, b = made.server.job, made.round.opened_key("bob").half
    n, n2 = job.N, job.N**2
    honest = made.release()
    plus = honest.opened.copy()
    numbers = to_integers(plus)
    numbers[0] = numbers[0] * (1 + 3 * n) % n2
    sealed = from_integers(numbers, plus.shape[-1]).reshape(plus.shape)

    def v1_opens(c_0: int, rest: list[int]) -> list[int]:
        base = pow(c_0, n, n2)
        pairs = zip(rest, b, strict=True)
        return [(c * pow(base, -b_j, n2) % n2 - 1) // n % n for c, b_j in pairs]

    def v1_verifies(named: bytes, residues: Bytes) -> bool:
        """The uploads give a result, and the release names it: nothing of what is sealed."""
        return residues_of(made.result).tobytes() == residues.tobytes() and named == result_digest

    result_digest = made.result.read_bytes()[:64]
    residues = honest.tensors[RESIDUES]
    assert v1_verifies(result_digest, residues)
    c_0 = to_integers(residues[0, :1])[0]
    shown = v1_opens(c_0, to_integers(sealed[0]))
    true = v1_opens(c_0, to_integers(honest.opened[0]))
    assert [x - y for x, y in zip(shown, true, strict=True)] == [3] + [0] * 6

    forged = made.release()
    forged.opened = sealed
    release = forged.write("bad.release")
    made.refused(release, 4)
    made.checked(release, code=4)
    without_key = made.verify(release, "--uploads", *made.uploads)
    assert not without_key["recomputed"]


def test_words_of_the_body_that_are_out_of_range(new_round: NewRound) -> None:
    round_ = new_round(THREE, *SMALL)
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(round_.names)})
    found = Made(round_, Server(round_), uploads, round_.aggregate(uploads))
    forged = found.release()
    body = forged.tensors[BODY].copy()
    body[:6] = body[24 * 48] = 255  # 335 values take 48 coefficients; this is the first one
    forged.tensors = forged.tensors | {BODY: body}
    release = forged.write("bad.release")
    found.refused(release, 3)
    found.verify(release, code=3)
    ledger = round_.keys / "server.ledger"
    ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0])
    upload = Statement(round_, "alice", header_of(uploads[0]), round_.job.codec.groups(335), body)
    round_.aggregate([upload.write("bad.upload"), *uploads[1:]], out="x.enc", code=3)


def test_a_content_key_that_is_not_the_one_committed_to(made: Made) -> None:
    """Without the commitment, one sealed part could open under two keys to two contents."""
    forged = made.release()
    forged.commit = secrets.token_bytes(32)
    made.refused(forged.write("bad.release"), 4)


def test_two_releases_of_one_result_share_nothing_secret(made: Made) -> None:
    one, two = (made.round.release(made.result, out=f"{i}.release") for i in range(2))
    first, second = header_of(one), header_of(two)
    assert first["of"] == second["of"]
    assert first["commit"] != second["commit"]
    for grant, other in zip(first["grants"], second["grants"], strict=True):
        assert grant["wrapped"] != other["wrapped"]
    same = tensors_of(one)["sealed"] == tensors_of(two)["sealed"]
    assert same.mean() < 0.05


# --- everything that fails after half b was used -------------------------------------------------


class Bench:
    """Results whose every value the server chooses, of several batches; only sealed honestly."""

    def __init__(self, round_: Round) -> None:
        self.round, self.server, self.job = round_, Server(round_), round_.job
        self.key, self.codec = self.job.public_key, self.job.codec
        self.lattice = isinstance(self.codec, LatticeCipher)
        self.values = 30_001 if self.lattice else 2_301
        self.groups = self.codec.groups(self.values)
        self.blocks = np.zeros(self.codec.block_shape(self.groups), np.uint8)
        self.integers = np.arange(self.values, dtype=np.int64) % 100
        self.offsets: dict[int, int] = {}  # what is added to coefficients of the first polynomial
        self.secret = np.zeros(256, np.int64)
        self.dtype = "F32"

    def block(self, place: int, value: int) -> None:
        flat = self.blocks.reshape(-1, self.blocks.shape[-1])
        flat[place] = from_integers([value % self.key.n], flat.shape[-1])[0]

    def forged(self, change: Callable[[list[int]], None] | None = None) -> Forged:
        if self.lattice:
            packed = self.codec.packing.pack(self.secret, 7 * self.groups)
            self.blocks = packed.reshape(self.blocks.shape)
        blocks = self.blocks
        randomness = fresh_randomness(self.job, self.groups)
        numbers = [int(x) for x in self.encrypt(blocks, randomness)]
        if change:
            change(numbers)
        residues = from_integers(numbers, self.key.arithmetic.width)
        shape = [{"name": "x", "shape": [self.values], "dtype": self.dtype}]
        header = sum_header(self.job, self.values, layout=shape)
        return self.server.about(header, residues.reshape(self.groups, 8, -1), self.body())

    def encrypt(self, blocks: Bytes, randomness: Bytes) -> list[int]:
        from dtl.core.crypto import scheme

        if not self.lattice:
            packed = self.codec.packing.pack(self.integers, 7 * self.groups)
            plain = to_integers(packed)
            more = to_integers(blocks.reshape(-1, blocks.shape[-1]))
            total = [(a + b) % self.key.n for a, b in zip(plain, more, strict=True)]
            blocks = from_integers(total, blocks.shape[-1]).reshape(blocks.shape)
        return to_integers(scheme.encrypt(self.key, blocks, randomness, 1))

    def body(self) -> Bytes | None:
        """a K + e + 2^28 X, and what is added to it."""
        if not isinstance(self.codec, LatticeCipher):
            return None
        shape, ring = self.codec.shape(self.values), self.codec.ring
        arithmetic = lattice.arithmetic(ring)
        public = lattice.public_key(bytes.fromhex(self.job.digest))
        transformed = arithmetic.transform(self.secret)
        made = arithmetic.pad_integers(public, transformed, bytes(32), (), self.integers, shape, 0)
        total = arithmetic.sum(shape, 0, shape.polynomials)
        total.add(made)
        total.add(self.added(ring.primes, ring.n, len(made)))
        return np.frombuffer(total.body().tobytes(), np.uint8)

    def added(self, primes: tuple[int, ...], n: int, length: int) -> bytes:
        """The offsets as a body: FORMATS.md, 3.2."""
        body = bytearray(length)
        for place, offset in self.offsets.items():
            words = [offset % prime for prime in primes]
            for j, word in enumerate(words):
                start = 6 * (j * n + place)
                body[start : start + 6] = (word & (1 << 48) - 1).to_bytes(6, "little")
            body[24 * n + place] = sum(word >> 48 << 2 * j for j, word in enumerate(words))
        return bytes(body)


def no_block(bench: Bench) -> Forged:
    """A block does not open: c_1 of the first group is of another r."""

    def change(numbers: list[int]) -> None:
        numbers[1] = numbers[1] * bench.key.g % bench.key.n**2

    return bench.forged(change)


def no_block_at_the_end(bench: Bench) -> Forged:
    def change(numbers: list[int]) -> None:
        numbers[-1] = numbers[-1] * bench.key.g % bench.key.n**2

    return bench.forged(change)


def far_out(bench: Bench) -> Forged:
    """Something above the slots."""
    if bench.lattice:
        bench.offsets[0] = 1 << 28 + 170
    else:
        bench.block(0, bench.key.n // 2)
    return bench.forged()


def in_the_padding(bench: Bench) -> Forged:
    if bench.lattice:
        codec = bench.codec
        assert isinstance(codec, LatticeCipher)
        bench.values -= 1  # 7 slots a coefficient: the last polynomial has some to spare
        bench.integers = bench.integers[:-1]
        left = bench.values % (7 * 256)
        assert 0 < left < 7 * 256
        assert left % -(-left // 7)
        return in_the_last_slot(bench)
    slots = bench.codec.packing.slots
    assert bench.values % (7 * slots)
    bench.block(7 * bench.groups - 1, 1 << 24 * (slots - 1))
    return bench.forged()


def in_the_last_slot(bench: Bench) -> Forged:
    """One value more is in the last polynomial than the layout has."""
    left = bench.values % (7 * 256)
    m = -(-left // 7)
    forged = bench.forged()
    body = forged.tensors[BODY]
    assert isinstance(bench.codec, LatticeCipher)
    shape, ring = bench.codec.shape(bench.values), bench.codec.ring
    last = shape.polynomials - 1
    start = shape.span(last, 1).start
    bench.offsets = {m - 1: 1 << 28 + 24 * 6}
    total = lattice.arithmetic(ring).sum(shape, last, 1)
    total.add(body[start:])
    total.add(bench.added(ring.primes, m, len(body) - start))
    whole = np.concatenate([body[:start], total.body()])
    forged.tensors = forged.tensors | {BODY: whole}
    return forged


def out_of_range(bench: Bench) -> Forged:
    """A value beyond n e_max."""
    bench.integers[5] = bench.job.fixed_point.max_sum + 1
    return bench.forged()


def in_a_narrow_dtype(bench: Bench) -> Forged:
    """65520 is no number of float16."""
    bench.dtype = "F16"
    bench.integers[5] = 65_520 << bench.job.fraction_bits
    return bench.forged()


def secret_out_of_range(bench: Bench) -> Forged:
    """|K| > 64 U, with a body to match: nothing else is wrong."""
    bench.secret[3] = 3 * 64 + 1
    return bench.forged()


def error_out_of_range(bench: Bench) -> Forged:
    """|E| > 64 U."""
    bench.offsets[7] = 4 * 64 + 1
    return bench.forged()


FAILURES: dict[str, Callable[[Bench], Forged]] = {
    "a block does not open": no_block,
    "the last block does not open": no_block_at_the_end,
    "above the slots": far_out,
    "padding": in_the_padding,
    "out of range": out_of_range,
}
NARROW_FAILURES: dict[str, Callable[[Bench], Forged]] = {"overflow": in_a_narrow_dtype}
LATTICE_FAILURES: dict[str, Callable[[Bench], Forged]] = {
    "|K|": secret_out_of_range,
    "|E|": error_out_of_range,
}


@dataclass
class Work:
    """What was done, counted."""

    halves: int = 0
    batches: int = 0


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    found = Work()
    apply, write_values = opening._open_chunk, TensorWriter.write

    def applied(*task: Any) -> Any:
        found.halves += 1
        return apply(*task)

    def written(writer: TensorWriter, reals: Any) -> None:
        found.batches += 1
        write_values(writer, reals)

    monkeypatch.setattr(opening, "_open_chunk", applied)
    monkeypatch.setattr(TensorWriter, "write", written)
    return found


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_all_failures_after_half_b_are_one(new_round: NewRound, work: Work, suffix: str) -> None:
    """One text, one exit code, one line in the ledger; and nothing stops early."""
    sizes = ("--slot-bits", 48, "--fraction-bits", 10)
    cipher = {"safetensors": "direct", "npz": "lattice"}[suffix]
    for narrow in (True, False):
        options = sizes if narrow else ()
        folder = "narrow" if narrow else "wide"
        round_ = new_round(THREE, "--cipher", cipher, *SMALL, *options, folder=folder)
        kinds = FAILURES | (LATTICE_FAILURES if cipher == "lattice" else {})
        if narrow:
            kinds = NARROW_FAILURES
        check_failures(round_, kinds, work, suffix)


def check_failures(
    round_: Round, kinds: dict[str, Callable[[Bench], Forged]], work: Work, suffix: str
) -> None:
    ledger, head = round_.keys / "alice.ledger", (round_.keys / "alice.ledger").read_bytes()
    out = round_.folder / f"out.{suffix}"
    key = ("--key", round_.key("alice"), "--workers", 1)
    command = ("open-model", round_.folder / "x.release", *key, "-o", out)
    work.halves = work.batches = 0
    Bench(round_).forged().write("x.release")
    assert "error" not in round_.dtl(*command).err
    out.unlink()
    honest = (work.halves, work.batches)
    assert honest[1] >= 2
    seen = set()
    for name, kind in kinds.items():
        ledger.write_bytes(head)
        work.halves = work.batches = 0
        kind(Bench(round_)).write("x.release")
        failed = round_.dtl(*command, code=4)
        seen.add((failed.err, failed.out))
        assert (work.halves, work.batches) == honest, name
        assert not out.exists()
        lines = ledger.read_bytes()[len(head) :].splitlines()
        assert len(lines) == 1, name
        assert b'"event":"tried"' in lines[0]
    assert len(seen) == 1
    assert "x.release: the result cannot be opened" in seen.pop()[0]


def test_a_second_opening_must_give_what_the_first_gave(new_round: NewRound) -> None:
    """The ledger's open line holds what it opened to: another content fails like all else."""
    round_ = new_round(THREE, *SMALL)
    release = Bench(round_).forged().write("x.release")
    round_.open(release, "alice")
    from dtl.core.files.ledger import Ledger, OpenEntry

    key = round_.opened_key("alice")
    head = key.ledger_path.read_bytes().splitlines(keepends=True)[0]
    with Ledger(key) as ledger:
        known = ledger.find(OpenEntry)[0]
    for field in ("opened", "content"):
        key.ledger_path.write_bytes(head)
        with Ledger(key) as ledger:
            ledger.append(known.model_copy(update={field: "0" * 128}))
        command = ("open-model", release, "--key", round_.key("alice"), "--force")
        failed = round_.dtl(*command, "-o", round_.folder / "opened.safetensors", code=4)
        assert "x.release: the result cannot be opened" in failed.err
    assert len(load_file(round_.folder / "opened.safetensors")) == 1
