"""Results that a server signs although they are nobody's product: their release proofs hold.

What is left against them: a participant tries one result a round, goes on after a failure only
where its operator says so, and recomputes the result where it is given the uploads.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtl.core.crypto import scheme
from dtl.core.crypto.residues import from_integers
from dtl.core.errors import NotAllowedError, NumericError, VerificationError
from dtl.core.files.container import BODY, RESIDUES
from dtl.core.files.ledger import Ledger, OpenEntry, TriedEntry, UploadEntry
from dtl.core.lattice import ring as lattice
from dtl.core.lattice.parameters import MAX_UPLOADS
from dtl.core.roles import participant
from dtl.core.roles.participant import OpenOptions, opening
from tests.forging import (
    Forged,
    Server,
    fresh_randomness,
    header_of,
    resign,
    sum_header,
    tensors_of,
    untouchable,
)
from tests.helpers import THREE, Cli, Round, random_arrays

NewRound = Callable[..., Round]
SMALL = ("--modulus-bits", 256, "--insecure")
VALUES = 8


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # crashes are told by the order of the lines


class Table:
    """A server that signs results of any content, and alice, who opens them."""

    def __init__(self, round_: Round) -> None:
        self.round, self.server = round_, Server(round_)
        self.job, self.key = round_.job, round_.opened_key("alice")
        self.out = round_.folder / "alice.safetensors"

    def good(self, number: int, value: int = 1, **changes: Any) -> Forged:
        """A result of a round that opens: `value` everywhere."""
        codec = self.job.codec
        groups, key = codec.groups(VALUES), self.job.public_key
        integers = np.full(VALUES, value, np.int64)
        blocks = codec.public_blocks(integers, groups)
        residues = scheme.encrypt(key, blocks, fresh_randomness(self.job, groups), groups)
        body = None
        if codec.body_bytes(VALUES):
            (batch,) = codec.batches(VALUES)
            made = codec.combine_body(VALUES, batch, [], (), None, integers)
            body = np.frombuffer(made, np.uint8)
        header = sum_header(self.job, VALUES, round=number, **changes)
        return self.server.about(header, residues, body)

    def bad(self, number: int) -> Forged:
        """A result of a round that does not open."""
        forged = self.good(number)
        residues = forged.tensors[RESIDUES].copy()
        residues[0, 1] = from_integers([self.job.public_key.g], residues.shape[-1])[0]
        return self.server.about(forged.manifest, residues, forged.tensors.get(BODY))

    def open(self, release: Path, *options: object, code: int = 0) -> str:
        command = ("open-model", release, "--key", self.round.key("alice"), "-o", self.out)
        before = self.out.read_bytes() if self.out.exists() else None
        said = self.round.dtl(*command, "--force", *options, code=code).err
        assert (self.out.read_bytes() if self.out.exists() else None) == before or not code
        return said

    @property
    def lines(self) -> list[tuple[str, int]]:
        """What the ledger says, without its head."""
        with Ledger(self.key) as ledger:
            return [
                (str(entry.plain()["event"]), entry.plain()["round"]) for entry in ledger.entries
            ]

    @property
    def attempts(self) -> list[TriedEntry]:
        with Ledger(self.key) as ledger:
            return ledger.find(TriedEntry)


@pytest.fixture(params=["lattice", "direct"])
def table(new_round: NewRound, request: pytest.FixtureRequest) -> Table:
    return Table(new_round(THREE, "--cipher", request.param, *SMALL))


# --- tried ---------------------------------------------------------------------------------------


def test_one_attempt_a_round_whatever_comes_of_it(table: Table) -> None:
    bad = table.bad(1).write("bad.release")
    table.open(bad, code=4)
    assert table.lines == [("tried", 1)]
    other = table.good(1).write("other.release")
    assert "another result of round 1 was tried before" in table.open(other, code=4)
    # No option lifts that.
    table.open(other, "--after-failure", code=4)
    assert table.lines == [("tried", 1)]
    # The same after one that opened.
    table.open(table.good(2).write("2.release"), "--after-failure")
    table.open(table.good(2, 7).write("2b.release"), code=4)
    assert table.lines == [("tried", 1), ("tried", 2), ("open", 2)]


def test_after_a_failure_only_the_same_file_may_be_tried(table: Table) -> None:
    forged = table.bad(1)
    bad = forged.write("bad.release")
    table.open(bad, code=4)
    for number in (2, 3):
        error = table.open(table.good(number).write(f"{number}.release"), code=5)
        assert "an attempt to open round 1 has failed before" in error
    # Another release of the very same result is another file.
    table.open(forged.write("again.release"), code=5)
    table.open(bad, code=4)
    assert table.lines == [("tried", 1)]  # a line for the same file is there already


def test_going_on_after_a_failure_is_recorded_and_counts_once(table: Table) -> None:
    table.open(table.bad(1).write("1.release"), code=4)
    two, three = (table.good(number).write(f"{number}.release") for number in (2, 3))
    table.open(two, "--after-failure")
    assert [entry.after_failure for entry in table.attempts] == [False, True]
    table.open(three)  # the failure is done with
    bad = table.bad(4).write("4.release")
    table.open(bad, "--after-failure", code=4)  # nothing had failed: the option says nothing
    assert [entry.after_failure for entry in table.attempts] == [False, True, False, False]
    table.open(table.good(5).write("5.release"), code=5)
    table.open(bad, "--after-failure", code=4)
    assert table.attempts[-1].after_failure
    table.open(table.good(5).write("5.release"), code=5)  # that one failed as well


def test_an_attempt_that_was_killed_counts_as_one(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the tried line and the open line: half b was used, or may have been."""
    good = table.good(1).write("1.release")

    class Killed(BaseException):
        pass

    def dies(*_: object) -> Any:
        assert table_lines_on_disk(table) == ["tried"]  # before half b is used
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(opening, "_decode", dies)
        with pytest.raises(Killed):
            participant.open_release(table.key, good, table.out)
    assert table.lines == [("tried", 1)]
    table.open(table.good(1, 2).write("other.release"), code=4)
    table.open(table.good(2).write("2.release"), code=5)
    table.open(good)
    assert table.lines == [("tried", 1), ("open", 1)]
    table.open(table.good(2).write("2.release"))


def table_lines_on_disk(table: Table) -> list[str]:
    data = table.key.ledger_path.read_text().splitlines()
    return [line.split('"event":"')[1].split('"')[0] for line in data[1:]]


def test_half_b_is_not_used_before_the_tried_line_is_on_disk(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = table.good(1).write("1.release")

    def fails(ledger: Ledger, entry: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Ledger, "append", fails)
    with pytest.raises(OSError, match="no space"):
        participant.open_release(untouchable(table.key), good, table.out)


def test_tried_is_not_opened(new_round: NewRound) -> None:
    """A spoiled first round is repeated on the same weights; the spoiled result is no base."""
    round_ = new_round(THREE, *SMALL)
    w0 = round_.save("w0.safetensors", random_arrays(9))
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(THREE)}, "--model", w0)
    result = round_.aggregate(uploads, "--initial", w0)
    server, tensors = Server(round_), tensors_of(result)
    residues = tensors[RESIDUES].copy()
    residues[0, 1] = from_integers([round_.job.public_key.g], residues.shape[-1])[0]
    spoiled = server.about(header_of(result), residues, tensors[BODY]).write("bad.release")
    round_.open(spoiled, "alice", code=4)
    again = ("--model", w0, "--round", 2, "--accept-differencing")
    round_.upload("alice", random_arrays(5), *again, out="again")
    honest = round_.open(round_.release(result), "bob", out="w1.safetensors")
    round_.upload("alice", random_arrays(5), "--model", honest, "--round", 3, out="x", code=5)


def test_nothing_is_revealed_for_a_round_that_was_tried(new_round: NewRound) -> None:
    """Whoever spoiled it may read the sum; closed without dave, the difference would be dave's."""
    round_ = new_round(("a", "b", "c", "dave"), *SMALL, masks=True)
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(round_.names)})
    result = round_.aggregate(uploads)
    server, tensors = Server(round_), tensors_of(result)
    residues = tensors[RESIDUES].copy()
    residues[0, 1] = from_integers([round_.job.public_key.g], residues.shape[-1])[0]
    spoiled = server.about(header_of(result), residues, tensors[BODY]).write("bad.release")
    round_.open(spoiled, "a", code=4)
    ledger = round_.keys / "server.ledger"
    ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0])
    close = round_.folder / "late.close"
    round_.dtl("close-round", *uploads[:3], "--key", round_.key("server"), "-o", close)
    reveal = ("reveal-masks", close, "-o", round_.folder / "x.reveal", "--key")
    error = round_.dtl(*reveal, round_.key("a"), code=5).err
    assert "the result of round 1 was tried already" in error
    round_.dtl(*reveal, round_.key("b"))


# --- what the ledger says against a release ------------------------------------------------------


def test_a_release_is_held_against_the_ledger(table: Table) -> None:
    """The own upload, its base, the parent, the successor, and admissions: before half b."""
    one, two, three = "1" * 128, "2" * 128, "3" * 128
    head = table.key.ledger_path.read_bytes()
    own = {"event": "upload", "round": 5, "base": None, "opened": None, "upload": "ab" * 64}
    seen = {
        "event": "open",
        "round": 4,
        "kind": "sum",
        "result": one,
        "parent": None,
        "opened": one,
        "content": one,
        "admitted": [],
    }
    sent, opened = UploadEntry.check(own, ""), OpenEntry.check(seen, "")
    forged = table.good(5)
    of = header_of(forged.write("forged.release"))["of"]
    admitting = table.good(5)
    admitting.manifest |= {
        "contributors": admitting.manifest["contributors"][:2],
        "missing": ["carol"],
        "contributions": {"alice": 1, "bob": 1},
    }
    admitting.admitted = ["carol"]
    job = table.job.model_copy(update={"min_contributors": 2})
    cases: list[tuple[Any, Forged, str | None]] = [
        (sent, forged, None),
        (sent.model_copy(update={"upload": two}), forged, "the upload that alice made"),
        (sent.model_copy(update={"base": two, "opened": two}), forged, "not built on the model"),
        (opened, forged, None),
        (opened.model_copy(update={"round": 5}), forged, "a second, different result of round 5"),
        (opened, table.good(5, parent=one), None),
        (opened.model_copy(update={"round": 6}), table.good(5, parent=one), "parent is of a later"),
        (opened.model_copy(update={"parent": of, "round": 6}), forged, None),
        (opened.model_copy(update={"parent": of}), forged, "successor is of an earlier"),
        (opened.model_copy(update={"admitted": ("carol",)}), admitting, "admits carol a second"),
        (opened.model_copy(update={"admitted": ("bob",)}), admitting, None),
        (opened.model_copy(update={"result": three}), forged, None),
    ]
    from tests.forging import held

    for entry, made, expected in cases:
        table.key.ledger_path.write_bytes(head)
        key = held(table.key, table.key.half, job)
        with Ledger(key) as ledger:
            ledger.append(entry)
        release = made.write("other.release")
        if made is forged:
            release = table.round.folder / "forged.release"
        before = key.ledger_path.read_bytes()
        if expected:
            with pytest.raises(VerificationError, match=expected):
                participant.open_release(untouchable(key), release, table.out, None, True)
            assert key.ledger_path.read_bytes() == before
        else:
            participant.open_release(key, release, table.out, None, True)


def test_too_many_uploads_in_one_result(table: Table) -> None:
    """64 U must stay below half a noise slot: above 2^21 - 1 nobody makes or opens it (7)."""
    counts = {"alice": MAX_UPLOADS - 2, "bob": 1, "carol": 1}
    model: dict[str, Any] = {
        "kind": "model",
        "initial": "5" * 128,
        "parent": "6" * 128,
        "contributions": counts,
    }
    most = table.good(9, **model)
    participant.open_release(table.key, most.write("most.release"), table.out)
    counts["bob"] += 1
    more = table.good(10, **model | {"contributions": counts})
    with pytest.raises(NumericError, match="2097152 contributions"):
        participant.open_release(
            untouchable(table.key), more.write("x.release"), table.out, None, True
        )
    result = table.server.result(more.manifest, more.tensors, "more.enc")
    table.round.release(result, out="y.release", code=7)
    job = ("--job", table.round.keys / "job.json")
    table.round.dtl("verify", result, *job, code=7)
    table.round.dtl("verify", table.round.folder / "x.release", *job, code=7)


def test_nobody_adds_to_a_model_that_is_full(new_round: NewRound) -> None:
    round_ = new_round(THREE, *SMALL)
    w0 = round_.save("w0.safetensors", random_arrays(9))
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(THREE)}, "--model", w0)
    model = round_.aggregate(uploads, "--initial", w0)
    counts = {"alice": MAX_UPLOADS - 2, "bob": 1, "carol": 1}
    changes = {"contributions": counts, "parent": "6" * 128, "round": 2}
    secret = round_.opened_key("server").secrets.sign
    full = resign(model, changes, secret, round_.folder / "full.enc")
    ledger = round_.keys / "server.ledger"
    ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0])
    release = round_.release(full)
    w2 = {p: round_.open(release, p, out=f"{p}.safetensors") for p in THREE}
    later = [round_.upload(p, random_arrays(1), "--model", w2[p], out=f"{p}3") for p in THREE]
    round_.aggregate(later, "--model", full, out="more.enc", code=7)


# --- a result that is not the product ------------------------------------------------------------


class Chain:
    """Two rounds of a model, and a server that signs something else as the second result."""

    def __init__(self, round_: Round) -> None:
        self.round, self.server = round_, Server(round_)
        self.w0 = round_.save("w0.safetensors", random_arrays(70, 0.5))
        given = {p: random_arrays(i) for i, p in enumerate(THREE)}
        self.first = round_.uploads(given, "--model", self.w0)
        self.parent = round_.aggregate(self.first, "--initial", self.w0, out="1.enc")
        release = round_.release(self.parent, out="1.release")
        w1 = {p: round_.open(release, p, out=f"{p}.w1.safetensors") for p in THREE}
        self.uploads = [
            round_.upload(p, random_arrays(5), "--model", w1[p], out=f"{p}2") for p in THREE
        ]
        self.result = round_.aggregate(self.uploads, "--model", self.parent, out="2.enc")

    def moved_parent(self) -> Forged:
        """The parent with one unit added to one value, under the second round's manifest."""
        tensors = tensors_of(self.parent)
        codec, key = self.round.job.codec, self.round.job.public_key
        unit = np.zeros(335, np.int64)
        unit[0] = 1
        groups = codec.groups(335)
        residues = scheme.add_public(key, tensors[RESIDUES], codec.public_blocks(unit, groups))
        body = tensors.get(BODY)
        if body is not None:
            (batch,) = codec.batches(335)
            more = codec.combine_body(335, batch, [], (), None, unit)
            total = lattice.arithmetic(codec.ring).sum(codec.shape(335), 0, 1)  # type: ignore[attr-defined]
            total.add(body)
            total.add(more)
            body = np.frombuffer(total.body().tobytes(), np.uint8)
        return self.server.about(header_of(self.result), residues, body)

    def evidence(self) -> tuple[object, ...]:
        return ("--uploads", *self.uploads, "--model", self.parent)


@pytest.mark.parametrize("cipher", ["lattice", "direct"])
def test_a_result_that_is_not_the_product_of_its_uploads(
    new_round: NewRound, dtl: Cli, cipher: str
) -> None:
    """With it, the same gradients would be summed up twice: their difference is one input."""
    round_ = new_round(THREE, "--cipher", cipher, *SMALL)
    chain = Chain(round_)
    forged = chain.moved_parent()
    bad, enc = forged.write("bad.release"), round_.folder / "bad.enc"
    chain.server.result(forged.manifest, forged.tensors, "bad.enc")
    job = ("--job", round_.keys / "job.json", "--json")
    honest = round_.release(chain.result, out="2.release")
    more = ("--uploads", *chain.first, *chain.uploads, "--model", chain.parent)
    everything = (*more, "--initial", chain.w0)
    for file, result, code in ((honest, chain.result, 0), (bad, enc, 4)):
        dtl("verify", result, *job, *chain.evidence(), code=code)
        dtl("verify", file, *job, *chain.evidence(), code=code)
        dtl("verify", file, *job, *chain.evidence(), "--key", round_.key("bob"), code=code)
        dtl("verify", file, *job, *everything, code=code)
        # Without the uploads it is never called recomputed.
        assert not dtl("verify", file, *job, "--key", round_.key("bob")).json["recomputed"]
        assert not dtl("verify", result, *job).json["recomputed"]

    key = round_.opened_key("alice")
    before, out = key.ledger_path.read_bytes(), round_.folder / "x.safetensors"
    opening_ = ("open-model", "--key", round_.key("alice"), "-o", out, "--json")
    assert "not the" in dtl(*opening_, bad, *chain.evidence(), code=4).err
    assert key.ledger_path.read_bytes() == before
    options = OpenOptions(evidence_of(chain))
    with pytest.raises(VerificationError):
        participant.open_release(untouchable(key), bad, out, options)
    for missing in (chain.evidence()[:3], ("--uploads", *chain.uploads), more):
        dtl(*opening_, bad, *missing, code=4)
    dtl(*opening_, bad, "--model", chain.parent, code=2)
    found = dtl(*opening_, honest, *chain.evidence()).json
    assert found["recomputed"] is True
    # Who recomputes nothing cannot know, and is told so.
    found = dtl("open-model", "--key", round_.key("bob"), "-o", out, "--force", "--json", bad).json
    assert found["recomputed"] is False


def evidence_of(chain: Chain) -> Any:
    from dtl.core.public.verification import Evidence

    return Evidence(chain.uploads, (chain.parent,))


def test_uploads_of_another_round_do_not_count_as_recomputed(new_round: NewRound) -> None:
    round_ = new_round(THREE, *SMALL)
    chain = Chain(round_)
    forged = chain.moved_parent().write("bad.release")
    before = (round_.keys / "alice.ledger").read_bytes()
    out = round_.folder / "x.safetensors"
    command = ("open-model", forged, "--key", round_.key("alice"), "-o", out)
    for evidence in (
        ("--uploads", *chain.first, "--initial", chain.w0),
        ("--uploads", *chain.first, "--model", chain.parent, "--initial", chain.w0),
    ):
        round_.dtl(*command, *evidence, code=4)
    assert (round_.keys / "alice.ledger").read_bytes() == before


def test_an_operator_says_so_and_no_node(table: Table) -> None:
    """No configuration of a node, of the run or of its own, goes on after a failure."""
    from dtl.core.flower.node import Node

    settings = {"after-failure": True, "after_failure": True}
    folder = table.round.folder / "node"
    folder.mkdir()
    node = Node(table.key, folder, settings, settings)
    with pytest.raises(VerificationError):
        node.receive(table.bad(1).write("1.release").read_bytes())
    with pytest.raises(NotAllowedError):
        node.receive(table.good(2).write("2.release").read_bytes())
    assert table.lines == [("tried", 1)]
