"""What a participant contributes on: a server, or another participant, that shows other weights.

With masks, two sums that differ in one contributor give that contributor's input away, and so do
sums of gradients on weights that the server chose. So everybody contributes only on a model that
it opened itself, or on the weights that its first upload pinned.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dtl.core.crypto import masks
from dtl.core.files import canonical_json
from dtl.core.files.ledger import Ledger, StepEntry
from dtl.core.files.tensors import METADATA_KEY
from tests.helpers import THREE, Arrays, Cli, Round, random_arrays

NewRound = Callable[..., Round]
SMALL = ("--modulus-bits", 256, "--insecure")
FOUR = ("a", "b", "c", "dave")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here is about a crash


def metadata_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "np") as file:
        found: dict[str, Any] = canonical_json.loads(file.metadata()["dtl"].encode(), "")
        return found


def rewritten(path: Path, out: Path, arrays: Arrays | None = None, **changes: object) -> Path:
    """The file with other tensors under the same metadata, or other metadata."""
    known = canonical_json.dumps(metadata_of(path) | changes).decode()
    save_file(arrays or load_file(path), out, {"dtl": known})
    return out


def moved(path: Path, out: Path) -> Path:
    """Other weights with the right metadata: one value is one ulp away."""
    arrays = {name: array.copy() for name, array in load_file(path).items()}
    arrays["b"][7] = np.nextafter(arrays["b"][7], np.float32(9))
    return rewritten(path, out, arrays)


def ulp_away(arrays: Arrays) -> Arrays:
    changed = {name: array.copy() for name, array in arrays.items()}
    changed["b"][7] = np.nextafter(changed["b"][7], np.float32(9))
    return changed


def encrypt(round_: Round, name: str, gradients: Path, *options: object, code: int = 0) -> str:
    """Encrypts a file of gradients; returns what was said. A refusal changes no ledger."""
    ledger, out = round_.keys / f"{name}.ledger", round_.folder / "out.upload"
    before = ledger.read_bytes()
    command = ("encrypt-grads", gradients, "--key", round_.key(name), "-o", out, "--force")
    said = round_.dtl(*command, *options, code=code).err
    assert (ledger.read_bytes() == before) == (code != 0)
    return said


def gradients_on(round_: Round, model: Path, out: str, **changes: object) -> Path:
    """Gradients that compute-grads could have made on a model."""
    known = metadata_of(model) | {"kind": "gradients"} | changes
    path = round_.folder / out
    save_file(random_arrays(3), path, {"dtl": canonical_json.dumps(known).decode()})
    return path


# --- initial weights -----------------------------------------------------------------------------


def v1_allows(uploads: list[tuple[int, bytes]], number: int, base: bytes) -> bool:
    """The rule of v1's ledger: one upload for a round, and one on a base."""
    return all(number != n and base != b for n, b in uploads)


def test_weights_one_ulp_away_gave_v1_a_difference_of_two_sums(new_round: NewRound) -> None:
    """The server shows other initial weights in round 2, in which dave is missing."""
    round_ = new_round(FOUR, *SMALL)
    first = random_arrays(50)
    second = ulp_away(first)
    bases = [
        b"".join(arrays[name].tobytes() for name in sorted(arrays)) for arrays in (first, second)
    ]
    assert v1_allows([(1, bases[0])], 2, bases[1])
    one = round_.job.fixed_point.one
    given = {p: random_arrays(i)["b"].astype(np.float64) for i, p in enumerate(FOUR)}
    encoded = {p: np.rint(g / 4 * one).astype(np.int64) for p, g in given.items()}
    starts = [np.rint(w["b"].astype(np.float64) * one).astype(np.int64) for w in (first, second)]
    opened = [starts[0] - sum(encoded.values()), starts[1] - sum(encoded[p] for p in "abc")]
    difference = (starts[0] - opened[0]) - (starts[1] - opened[1])
    assert (difference == encoded["dave"]).all()

    # v2: the first upload pins the initial weights.
    w0, other = round_.save("w0.safetensors", first), round_.save("other.safetensors", second)
    for name in FOUR:
        round_.upload(name, random_arrays(1), "--model", w0)
    for options in ((), ("--accept-differencing",), ("--round", 7)):
        grads = round_.folder / "a.grads.safetensors"
        more = options if "--round" in options else (*options, "--round", 2)
        error = encrypt(round_, "a", grads, "--model", other, *more, code=5)
        assert "the initial weights are not those of the first upload" in error
    # A void first round is repeated on the very same weights.
    round_.upload(
        "a", random_arrays(1), "--model", w0, "--round", 2, "--accept-differencing", out="x"
    )


def test_no_initial_weights_once_anything_was_opened(new_round: NewRound) -> None:
    """Neither the pinned ones nor others, with --round or without; nor for a late joiner."""
    round_ = new_round(FOUR, *SMALL)
    w0 = round_.save("w0.safetensors", random_arrays(50))
    uploads = round_.uploads({p: random_arrays(1) for p in "abc"}, "--model", w0)
    model = round_.aggregate(uploads, "--initial", w0)
    release = round_.release(model, "--admit", "dave")
    other = round_.save("other.safetensors", ulp_away(random_arrays(50)))
    grads = round_.save("g.safetensors", random_arrays(2))
    for name in ("a", "dave"):
        round_.open(release, name, out=f"{name}.safetensors")
        for weights in (w0, other):
            for options in (("--round", 2), ("--round", 9, "--accept-differencing")):
                error = encrypt(round_, name, grads, "--model", weights, *options, code=5)
                assert "has opened round 1 already" in error
        encrypt(round_, name, grads, "--model", round_.folder / f"{name}.safetensors")


# --- a model that was handed on ------------------------------------------------------------------


@pytest.fixture
def handed(new_round: NewRound) -> Round:
    """A job with masks whose first model was released; a.safetensors is what a opened."""
    round_ = new_round(FOUR, *SMALL, masks=True)
    w0 = round_.save("w0.safetensors", random_arrays(50))
    uploads = round_.uploads({p: random_arrays(1) for p in FOUR}, "--model", w0)
    round_.release(round_.aggregate(uploads, "--initial", w0))
    round_.open(round_.folder / "result.release", "a", out="a.safetensors")
    return round_


def test_v1_trained_on_whatever_had_the_right_metadata(handed: Round) -> None:
    """v1 took base and opened from the metadata; so masks cancel, and nobody notices."""
    true = handed.folder / "a.safetensors"
    bad = moved(true, handed.folder / "bad.safetensors")
    assert load_file(true)["b"].tobytes() != load_file(bad)["b"].tobytes()

    def v1_mask(model: Path) -> bytes:
        known, job = metadata_of(model), handed.job
        raw = [bytes.fromhex(text) for text in (known["base"], known["opened"])]
        digests = [bytes.fromhex(text) for text in (job.digest, job.roster_digest)]
        return masks.round_key(bytes(32), digests[0], 2, raw[0], raw[1], digests[1])

    assert v1_mask(true) == v1_mask(bad)

    # v2: who has not opened the release itself is not led by a file, whatever it holds.
    grads = handed.save("g.safetensors", random_arrays(2))
    for model in (true, bad):
        error = encrypt(handed, "b", grads, "--model", model, code=5)
        assert "has not opened the model that the gradients are based on" in error
        assert "open the release yourself" in error
        encrypt(handed, "b", gradients_on(handed, model, "gb.safetensors"), code=5)
    # Who has opened it contributes on the content that it opened, by option or by metadata.
    assert "its tensors were changed" in encrypt(handed, "a", grads, "--model", bad, code=4)
    content = "1" * 128
    encrypt(handed, "a", gradients_on(handed, true, "ga.safetensors", content=content), code=4)
    encrypt(handed, "a", gradients_on(handed, true, "gn.safetensors", content=None), code=2)
    lied = rewritten(true, handed.folder / "lied.safetensors", opened="2" * 128)
    encrypt(handed, "a", grads, "--model", lied, code=4)
    encrypt(handed, "a", gradients_on(handed, lied, "gl.safetensors"), code=4)
    # What the file holds counts, not what its metadata says of it.
    lied = rewritten(true, handed.folder / "lied.safetensors", content=content)
    encrypt(handed, "a", gradients_on(handed, true, "ok.safetensors"), "--model", lied)


def test_gradients_and_model_must_be_of_one_content(handed: Round) -> None:
    true = handed.folder / "a.safetensors"
    grads = gradients_on(handed, true, "g.safetensors", content="1" * 128)
    error = encrypt(handed, "a", grads, "--model", true, code=3)
    assert "computed on other tensors" in error
    other = rewritten(true, handed.folder / "o.safetensors", base="3" * 128)
    encrypt(handed, "a", gradients_on(handed, other, "h.safetensors"), "--model", true, code=3)


# --- jobs of sums --------------------------------------------------------------------------------


class Sums:
    """A job of sums: a, b, c contribute on w0 in round 1; dave is admitted."""

    def __init__(self, round_: Round) -> None:
        self.round = round_
        self.w0 = round_.save("w0.safetensors", random_arrays(50))
        uploads = round_.uploads({p: random_arrays(1) for p in "abc"}, "--model", self.w0)
        release = round_.release(round_.aggregate(uploads), "--admit", "dave")
        self.sums = {p: round_.open(release, p, out=f"{p}.sum.safetensors") for p in FOUR}

    def path(self, name: str) -> Path:
        return self.round.folder / name

    def apply(
        self,
        name: str,
        model: Path,
        out: str,
        *options: object,
        total: Path | None = None,
        code: int = 0,
    ) -> Path:
        key, path = self.round.key(name), self.path(out)
        ledger = (self.round.keys / f"{name}.ledger").read_bytes()
        command = ("apply-sum", total or self.sums[name], "--model", model, "--key", key)
        self.round.dtl(*command, "-o", path, "--force", *options, code=code)
        if code:
            assert (self.round.keys / f"{name}.ledger").read_bytes() == ledger
        return path

    def steps(self, name: str) -> list[StepEntry]:
        with Ledger(self.round.opened_key(name)) as ledger:
            return ledger.find(StepEntry)


@pytest.fixture
def sums(new_round: NewRound) -> Sums:
    return Sums(new_round(FOUR, *SMALL))


def test_a_base_that_is_a_sum_needs_a_step_in_the_ledger(sums: Sums) -> None:
    round_, grads = sums.round, sums.round.save("g.safetensors", random_arrays(2))
    unrecorded = sums.path("u.safetensors")
    round_.dtl("apply-sum", sums.sums["a"], "--model", sums.w0, "-o", unrecorded)
    error = encrypt(round_, "a", grads, "--model", unrecorded, code=5)
    assert "does not know the model after the sum of round 1" in error
    assert not sums.steps("a")
    w1 = sums.apply("a", sums.w0, "w1.safetensors")
    (step,) = sums.steps("a")
    assert (step.source, step.content) == ("apply-sum", metadata_of(w1)["content"])
    bad = moved(w1, sums.path("bad.safetensors"))
    assert "its tensors were changed" in encrypt(round_, "a", grads, "--model", bad, code=4)
    encrypt(round_, "a", gradients_on(round_, w1, "c.safetensors", content="1" * 128), code=4)
    encrypt(round_, "a", gradients_on(round_, w1, "c.safetensors", content=None), code=2)
    encrypt(round_, "a", grads, "--model", w1)


def test_the_step_is_made_along_the_opened_sum_from_the_right_model(sums: Sums) -> None:
    round_ = sums.round
    # The weights are held against what was pinned, computed from the tensors, not what is said.
    known = metadata_of(sums.apply("b", sums.w0, "b1.safetensors"))
    v0 = sums.w0
    initial = {"kind": "weights", "round": 0}
    with Ledger(round_.opened_key("a")) as ledger:
        base = ledger.entries[0].plain()["base"]
    said = canonical_json.dumps(known | initial | {"base": base, "opened": base}).decode()
    for metadata in (None, {"dtl": said}):
        save_file(ulp_away(load_file(v0)), sums.path("ulp.safetensors"), metadata)
        sums.apply("a", sums.path("ulp.safetensors"), "x.safetensors", code=4)
    # The sum is the one that was opened, and opened by this key.
    bad = moved(sums.sums["a"], sums.path("bad.safetensors"))
    sums.apply("a", v0, "x.safetensors", total=bad, code=4)
    hidden = rewritten(bad, sums.path("hidden.safetensors"), content=None)
    sums.apply("a", v0, "x.safetensors", total=hidden, code=4)
    foreign = rewritten(sums.sums["a"], sums.path("foreign.safetensors"), base="4" * 128)
    sums.apply("a", v0, "x.safetensors", total=foreign, code=5)
    assert not sums.steps("a")
    sums.apply("a", v0, "a1.safetensors")


def test_one_sum_has_one_model(sums: Sums) -> None:
    round_ = sums.round
    w1 = sums.apply("a", sums.w0, "w1.safetensors")
    sums.apply("a", sums.w0, "w1.safetensors")  # the same again
    assert len(sums.steps("a")) == 1
    sums.apply("a", sums.w0, "x.safetensors", "--lr", 0.5, code=5)
    grads = round_.save("g.safetensors", random_arrays(2))
    own = round_.save("own.safetensors", ulp_away(load_file(w1)))
    error = encrypt(round_, "a", grads, "--model", own, "--own-step", code=5)
    assert "another model after the sum of round 1 is recorded" in error
    sums.apply("a", own, "x.safetensors", "--adopt", "b", code=5)


def test_a_model_that_another_program_stepped(sums: Sums) -> None:
    round_, grads = sums.round, sums.round.save("g.safetensors", random_arrays(2))
    own = round_.save("own.safetensors", random_arrays(51))
    encrypt(round_, "a", grads, "--own-step", code=2)  # which model?
    encrypt(round_, "a", grads, "--model", own, "--own-step")
    (step,) = sums.steps("a")
    assert step.source == "own-step"
    other = round_.save("other.safetensors", random_arrays(52))
    encrypt(round_, "a", grads, "--model", other, "--own-step", "--round", 3, code=5)


def test_own_step_needs_an_opened_sum(new_round: NewRound) -> None:
    round_ = new_round(THREE, *SMALL)
    grads = round_.save("g.safetensors", random_arrays(2))
    error = encrypt(round_, "alice", grads, "--model", grads, "--own-step", code=5)
    assert "has not opened any sum" in error


def test_a_late_joiner_takes_the_model_over_from_whom_it_trusts(sums: Sums, dtl: Cli) -> None:
    round_, grads = sums.round, sums.round.save("g.safetensors", random_arrays(2))
    w1 = sums.apply("a", sums.w0, "w1.safetensors")
    encrypt(round_, "dave", grads, "--model", w1, code=5)
    sums.apply("dave", w1, "x.safetensors", "--adopt", "zoe", code=2)
    dtl("apply-sum", sums.sums["dave"], "--model", w1, "--adopt", "a", "-o", "x.npz", code=2)
    foreign = rewritten(w1, sums.path("foreign.safetensors"), base="4" * 128)
    sums.apply("dave", foreign, "x.safetensors", "--adopt", "a", code=4)
    adopted = sums.apply("dave", w1, "dave.w1.safetensors", "--adopt", "a")
    (step,) = sums.steps("dave")
    assert step.source == "adopt:a"
    assert load_file(adopted)["b"].tobytes() == load_file(w1)["b"].tobytes()
    uploads = [round_.upload("dave", random_arrays(2), "--model", adopted, out="d2")]
    for name in "abc":
        model = w1 if name == "a" else sums.apply(name, sums.w0, f"{name}1.safetensors")
        uploads.append(round_.upload(name, random_arrays(2), "--model", model, out=f"{name}2"))
    release = round_.release(round_.aggregate(uploads, out="2.enc"), out="2.release")
    # The second step begins with the model after the first one, and with no other.
    total = round_.open(release, "dave", out="sum-2.safetensors")
    bad = moved(adopted, sums.path("bad.safetensors"))
    sums.apply("dave", bad, "x.safetensors", total=total, code=4)
    hidden = rewritten(bad, sums.path("hidden.safetensors"), content=None)
    sums.apply("dave", hidden, "x.safetensors", total=total, code=4)
    sums.apply("dave", adopted, "w2.safetensors", total=total)
    assert [step.source for step in sums.steps("dave")] == ["adopt:a", "apply-sum"]


def test_without_the_model_before_there_is_no_step(sums: Sums) -> None:
    """A late joiner that opened two sums, and adopted nothing after the first one."""
    round_ = sums.round
    models = {p: sums.apply(p, sums.w0, f"{p}1.safetensors") for p in "abc"}
    uploads = [round_.upload(p, random_arrays(2), "--model", models[p], out=f"{p}2") for p in "abc"]
    result = round_.aggregate(uploads, out="2.enc")
    ledger = round_.keys / "server.ledger"  # a server that forgets that it has admitted dave
    ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0])
    release = round_.release(result, "--admit", "dave", out="2.release")
    round_.open(release, "dave", out="sum-2.safetensors", code=4)  # a second admission
    dave = round_.keys / "dave.ledger"
    dave.write_bytes(dave.read_bytes().splitlines(keepends=True)[0])
    total = round_.open(release, "dave", out="sum-2.safetensors")
    sums.apply("dave", models["a"], "x.safetensors", total=total, code=5)


@pytest.mark.parametrize("doctored", ["round", "base and round", "opened"])
def test_initial_weights_are_what_their_tensors_are_whatever_round_they_name(
    new_round: NewRound, doctored: str
) -> None:
    """A weight moved, under the identity of the honest initial weights, or of a model."""
    round_ = new_round()
    shards = round_.folder / "shards"
    round_.dtl("split-data", "digits", "--participants", "alice", "--out", shards)
    shard = ("--data", shards / "alice.npz")
    w0 = round_.folder / "w0.safetensors"
    round_.dtl("init-model", *shard, "--hidden", 3, "--seed", 0, "-o", w0)
    with safe_open(w0, "np") as file:
        said = json.loads(file.metadata()[METADATA_KEY])
    said |= {"round": 1} if doctored != "opened" else {"opened": "5" * 128}
    if doctored == "base and round":
        said |= {"base": "5" * 128, "opened": "5" * 128}
    arrays = load_file(w0)
    arrays["layer1.bias"][0] += 0.5
    claim = {METADATA_KEY: canonical_json.dumps(said).decode()}
    evil = round_.save("evil.safetensors", arrays, **claim)
    out = ("-o", round_.folder / "evil.grads.safetensors")
    round_.dtl("compute-grads", "--model", evil, *shard, *out, code=4)
    gradients = round_.save("g.safetensors", arrays, **{METADATA_KEY: _as_gradients(said)})
    plain = round_.save("plain.safetensors", arrays)
    key = ("--key", round_.key("alice"), "-o", round_.folder / "u")
    round_.dtl("encrypt-grads", gradients, *key, code=4)
    for source in (gradients, plain):
        round_.dtl("encrypt-grads", source, "--model", evil, *key, code=4)
    assert (round_.keys / "alice.ledger").read_bytes().count(b"\n") == 1


def _as_gradients(said: dict[str, Any]) -> str:
    return canonical_json.dumps({**said, "kind": "gradients"}).decode()
