"""Defences one by one, each as narrowly as it can be seen: `make mutants` removes them in turn.

Whole attacks, with their arithmetic, are in test_attacks.py.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dtl.core.ciphers.lattice import LatticeCipher
from dtl.core.crypto import masks, one_time, primitives, proof, scheme
from dtl.core.crypto.residues import to_integers
from dtl.core.errors import (
    DtlError,
    FormatError,
    NotAllowedError,
    NumericError,
    QuorumError,
    UsageError,
    VerificationError,
)
from dtl.core.files import sealed
from dtl.core.files.atomic import pending_files
from dtl.core.files.container import BODY, PROOF, RESIDUES, Container, Rows
from dtl.core.files.headers import (
    Contribution,
    Grant,
    Layout,
    ReleaseHeader,
    ResultHeader,
    TensorSpec,
    UploadHeader,
)
from dtl.core.files.ledger import (
    AggregateEntry,
    CloseEntry,
    Ledger,
    OpenEntry,
    ReleaseEntry,
    StepEntry,
    TriedEntry,
    UploadEntry,
)
from dtl.core.files.tensors import Loaded, PlainMetadata
from dtl.core.lattice import ring as door
from dtl.core.lattice.parameters import MAX_UPLOADS
from dtl.core.public import results
from dtl.core.public import uploads as public_uploads
from dtl.core.roles import participant
from dtl.core.roles.participant import basis, opening, producing, revealing, stepping
from dtl.core.roles.participant.basis import Basis
from dtl.core.roles.server import accepting, closing, releasing
from tests import hostile
from tests.helpers import Cli, Round, random_arrays

NewRound = Callable[..., Round]
A, B, C, D = ("a" * 128, "b" * 128, "c" * 128, "d" * 128)
CANNOT_OPEN = "the result cannot be opened"


class CrashError(Exception):
    """The power goes."""


@contextmanager
def raises(error: type[DtlError]) -> Iterator[None]:
    """Demand an error of exactly this class: another error is another check's."""
    with pytest.raises(DtlError) as found:
        yield
    assert type(found.value) is error


def sum_of(round_: Round, *options: object) -> Path:
    """The encrypted sum of small uploads of everybody."""
    given = {name: random_arrays(i) for i, name in enumerate(round_.names)}
    return round_.aggregate(round_.uploads(given, *options))


def lines(round_: Round, name: str) -> list[dict[str, Any]]:
    """The lines of a ledger, without its head."""
    text = (round_.keys / f"{name}.ledger").read_text()
    return [json.loads(line) for line in text.splitlines()[1:]]


def events(round_: Round, name: str) -> list[str]:
    return [str(line["event"]) for line in lines(round_, name)]


def entry_of_upload(number: int, base: str | None, opened: str | None = None) -> UploadEntry:
    return UploadEntry(event="upload", round=number, base=base, opened=opened or base, upload=D)


def entry_of_open(number: int, result: str, **more: Any) -> OpenEntry:
    values: dict[str, Any] = {"kind": "model", "parent": None, "opened": B, "content": C}
    values |= {"admitted": ()} | more
    return OpenEntry(event="open", round=number, result=result, **values)


def entry_of_try(number: int, result: str, release: str, after: bool = False) -> TriedEntry:
    return TriedEntry(
        event="tried", round=number, result=result, release=release, after_failure=after
    )


def manifest_of(number: int, **more: Any) -> ResultHeader:
    layout: Layout = (TensorSpec(name="x", shape=(1,), dtype="F32"),)
    values: dict[str, Any] = {
        "format": "dtl/v2",
        "kind": "sum",
        "job": A,
        "signer": "server",
        "created": "2026-01-01T00:00:00Z",
        "round": number,
        "layout": layout,
        "values": 1,
        "parent": None,
        "initial": None,
        "contributors": (),
        "missing": (),
        "contributions": {},
    }
    return ResultHeader(**(values | more))


def release_of(manifest: ResultHeader, of: str, **more: Any) -> ReleaseHeader:
    values: dict[str, Any] = {
        "format": "dtl/v2",
        "kind": "release",
        "job": A,
        "signer": "server",
        "created": "2026-01-01T00:00:00Z",
        "round": manifest.round,
        "of": of,
        "manifest": manifest,
        "result_signature": "0" * 128,
        "grants": (Grant(participant="alice", wrapped=b"x"),),
        "admitted": (),
        "commit": bytes(32),
    }
    return ReleaseHeader(**(values | more))


# --- whatever fails once the half is used, is one failure, and computed to the end -------------


SPOILED: dict[str, tuple[str, Callable[[hostile.Spoiler, int], None]]] = {
    "a block": ("float32", lambda s, _: s.spoil_block()),
    "the sum of the secrets": ("float32", lambda s, _: s.shift_secret(3, 2 * 64 * 3 + 1)),
    "noise": ("float32", lambda s, _: s.shift(5, 2 * 64 * 3 + 1)),
    "above the slots": ("float32", lambda s, _: s.shift(7, 1 << (28 + 24 * 7))),
    "padding": ("float32", lambda s, _: s.shift(47, 1 << (28 + 24 * 6))),
    "the range of values": ("float32", lambda s, limit: s.shift(0, (limit + (1 << 19)) << 28)),
    "the dtype": ("float16", lambda s, _: s.shift(0, 1 << (21 + 28))),
}


def watch_the_work(round_: Round, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes every polynomial that is opened."""
    codec = round_.job.codec
    assert isinstance(codec, LatticeCipher)
    kind, seen = type(door.arithmetic(codec.ring)), []
    original = kind.open

    def watched(self: Any, *arguments: Any) -> Any:
        seen.append(arguments[-1])
        return original(self, *arguments)

    monkeypatch.setattr(kind, "open", watched)
    return seen


@pytest.mark.parametrize("kind", SPOILED)
def test_what_is_wrong_in_a_result_is_found_and_told_in_one_way(
    new_round: NewRound, kind: str
) -> None:
    dtype, spoil = SPOILED[kind]
    round_ = new_round(("a", "b", "c"), "--fraction-bits", 4)
    given = {name: random_arrays(i, dtype=dtype) for i, name in enumerate(round_.names)}
    spoiler = hostile.Spoiler(round_, round_.aggregate(round_.uploads(given)))
    spoil(spoiler, round_.job.fixed_point.max_sum)
    release = round_.release(spoiler.write("spoiled.enc"))
    options = (release, "--key", round_.key("a"), "-o", round_.folder / "opened.npz")
    failed = round_.dtl("open-model", *options, code=4)
    assert CANNOT_OPEN in failed.err
    assert failed.err.count("hint") == 1
    assert opening._HINT in failed.err
    assert not (round_.folder / "opened.npz").exists()
    assert events(round_, "a") == ["upload", "tried"]


def test_what_is_within_all_bounds_opens(new_round: NewRound) -> None:
    """So that the test above fails of what it says, and not of how it makes it."""
    round_ = new_round(("a", "b", "c"), "--fraction-bits", 4)
    spoiler = hostile.Spoiler(round_, sum_of(round_))
    spoiler.shift_secret(3, 9)
    spoiler.shift(5, 9)
    spoiler.shift(0, 5 << 28)
    before = round_.opened(round_.release(round_.folder / "result.enc"), "a")
    hostile.forget(round_, "server")
    hostile.forget(round_, "a")
    after = round_.opened(round_.release(spoiler.write("s.enc"), out="s.release"), "a")
    assert after["a.weight"][0, 0] == before["a.weight"][0, 0] + 5 / 16


@pytest.mark.parametrize("kind", ["a block", "the sum of the secrets", "noise", "range"])
def test_a_result_is_opened_to_the_end_whatever_fails(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    round_ = new_round(("a", "b", "c"), "--fraction-bits", 4)
    given = {name: {"x": np.zeros(16000, np.float32)} for name in round_.names}
    spoiler = hostile.Spoiler(round_, round_.aggregate(round_.uploads(given)))
    limit = round_.job.fixed_point.max_sum
    spoil: dict[str, Callable[[], None]] = {
        "a block": spoiler.spoil_block,
        "the sum of the secrets": lambda: spoiler.shift_secret(0, 500),
        "noise": lambda: spoiler.shift(0, 500),
        "range": lambda: spoiler.shift(0, (limit + 9) << 28),
    }
    spoil[kind]()
    release = round_.release(spoiler.write("spoiled.enc"))
    seen = watch_the_work(round_, monkeypatch)
    # With one worker, nothing is computed ahead of what is read.
    round_.open(release, "a", "--workers", 1, code=4)
    assert sorted(seen) == list(range(spoiler.shape.polynomials))
    assert len(seen) > 8  # more than one batch


def test_a_result_that_opens_otherwise_than_before_is_one_failure_too(
    new_round: NewRound,
) -> None:
    round_ = new_round()
    release = round_.release(sum_of(round_))
    round_.open(release, "alice")
    key = round_.opened_key("alice")
    with Ledger(key) as ledger:
        entries = list(ledger.entries)
    hostile.forget(round_, "alice")
    with Ledger(key) as ledger:
        for entry in entries:
            changed = entry.model_copy(update={"content": A} if "content" in entry.plain() else {})
            ledger.append(changed)
    options = (release, "--key", round_.key("alice"), "-o", round_.folder / "again.npz")
    assert CANNOT_OPEN in round_.dtl("open-model", *options, code=4).err


# --- what is tried is written down before ------------------------------------------------------


def crash(*_: object) -> None:
    raise CrashError


def open_release(round_: Round, name: str, release: Path, **options: Any) -> None:
    """open-model without the command line, which would not let a crash through."""
    out = round_.folder / f"{name}.opened.npz"
    wanted = participant.OpenOptions(**options)
    participant.open_release(round_.opened_key(name), release, out, wanted, force=True)


def test_an_attempt_is_on_disk_before_the_half_is_used(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()
    release = round_.release(sum_of(round_))
    with monkeypatch.context() as patch:
        patch.setattr(scheme, "apply_half", crash)
        with pytest.raises(CrashError):
            open_release(round_, "alice", release)
    assert events(round_, "alice") == ["upload", "tried"]
    tried = lines(round_, "alice")[-1]
    assert (tried["event"], tried["release"]) == ("tried", hostile.digest_of(release))
    assert tried["after_failure"] is False
    open_release(round_, "alice", release)
    assert events(round_, "alice") == ["upload", "tried", "open"]


def test_nothing_is_tried_before_everything_else_is_checked(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round(THREE_, "--cipher", "direct")
    result = sum_of(round_)
    with monkeypatch.context() as patch:
        patch.setattr(releasing, "_half_chunk", another_message(releasing._half_chunk))
        release = round_.release(result)
    options = (release, "--key", round_.key("alice"), "-o", round_.folder / "o.npz")
    assert "proof of the release" in round_.dtl("open-model", *options, code=4).err
    assert events(round_, "alice") == ["upload"]


THREE_ = ("alice", "bob", "carol")


def another_message(half_chunk: Callable[..., bytes]) -> Callable[..., bytes]:
    """The server's half, and then one more in the first slot of the first block."""

    def changed(key: Any, *arguments: Any) -> bytes:
        data = half_chunk(key, *arguments)
        width: int = key.arithmetic.width
        number = int.from_bytes(data[:width], "little") * (1 + key.n) % key.n**2
        first: bytes = number.to_bytes(width, "little")
        return first + data[width:]

    return changed


def test_a_round_is_tried_once(new_round: NewRound) -> None:
    round_ = new_round()
    spoiler = hostile.Spoiler(round_, sum_of(round_))
    spoiler.spoil_block()
    bad = round_.release(spoiler.write("bad.enc"), out="bad.release")
    hostile.forget(round_, "server")
    good = round_.release(round_.folder / "result.enc", out="good.release")
    round_.open(bad, "alice", code=4)
    again = ("open-model", good, "--key", round_.key("alice"), "-o", round_.folder / "o.npz")
    for more in ((), ("--after-failure",)):
        assert "was tried before" in round_.dtl(*again, *more, code=4).err
    assert events(round_, "alice") == ["upload", "tried"]


def test_after_a_failure_only_the_same_file_until_somebody_says_so(new_round: NewRound) -> None:
    round_ = new_round()
    spoiler = hostile.Spoiler(round_, sum_of(round_))
    spoiler.spoil_block()
    bad = round_.release(spoiler.write("bad.enc"), out="bad.release")
    given = {name: random_arrays(i) for i, name in enumerate(round_.names)}
    later = round_.aggregate(round_.uploads(given, "--round", 2, tag="2"), out="2.enc")
    good = round_.release(later, out="good.release")
    round_.open(bad, "alice", code=4)
    round_.open(bad, "alice", code=4)
    round_.open(good, "alice", code=5)
    assert events(round_, "alice") == ["upload", "upload", "tried"]
    round_.open(good, "alice", "--after-failure")
    tried = [line for line in lines(round_, "alice") if line["event"] == "tried"]
    assert [line["after_failure"] for line in tried] == [False, True]
    round_.open(
        bad, "bob", "--after-failure", out="b.npz", code=4
    )  # there was no failure to go on after
    assert lines(round_, "bob")[-1]["after_failure"] is False


@pytest.mark.parametrize(
    ("entries", "release", "failed"),
    [
        ([], A, 0),
        ([entry_of_try(1, A, C)], A, 1),
        ([entry_of_try(1, A, C), entry_of_open(1, A)], A, 0),
        ([entry_of_try(1, A, C), entry_of_try(2, B, D, after=True)], A, 1),
        ([entry_of_try(1, A, C), entry_of_try(2, B, D, True), entry_of_open(2, B)], A, 0),
    ],
)
def test_what_counts_as_a_failure(entries: list[Any], release: str, failed: int) -> None:
    assert len(opening.failed_attempts(hostile.ledger_of(*entries))) == failed


# --- a release against what a participant did and saw ------------------------------------------

ALICE: dict[str, Any] = {
    "contributors": (Contribution(participant="alice", upload=D),),
    "contributions": {"alice": 1},
}

HISTORIES: dict[str, tuple[list[Any], ReleaseHeader]] = {
    "a second result of a round": ([entry_of_open(1, A)], release_of(manifest_of(1), B)),
    "the own upload is not in it": ([entry_of_upload(1, None)], release_of(manifest_of(1), B)),
    "another upload under the own name": (
        [entry_of_upload(1, None).model_copy(update={"upload": A})],
        release_of(manifest_of(1, **ALICE), B),
    ),
    "another base than that of the own upload": (
        [entry_of_upload(1, A)],
        release_of(manifest_of(1, parent=C, **ALICE), B),
    ),
    "a parent of a later round": (
        [entry_of_open(5, A)],
        release_of(manifest_of(3, parent=A), B),
    ),
    "a successor of an earlier round": (
        [entry_of_open(3, A, parent=B)],
        release_of(manifest_of(5), B),
    ),
    "an admission for the second time": (
        [entry_of_open(1, A, admitted=("alice",))],
        release_of(manifest_of(2), B, admitted=("alice",)),
    ),
}


@pytest.mark.parametrize("kind", HISTORIES)
def test_a_release_is_held_against_the_ledger(kind: str) -> None:
    entries, header = HISTORIES[kind]
    with pytest.raises(VerificationError):
        opening._check_history(hostile.ledger_of(*entries), header, "alice", Path("r"))
    opening._check_history(hostile.ledger_of(), header, "alice", Path("r"))


def test_open_model_holds_a_release_against_the_ledger(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c", "d"))
    uploads = round_.uploads({name: random_arrays(1) for name in round_.names})
    result = round_.aggregate(uploads[:3])
    release = round_.release(result, "--admit", "d")
    options = (release, "--key", round_.key("d"), "-o", round_.folder / "o.npz")
    assert "is not in it" in round_.dtl("open-model", *options, code=4).err
    assert events(round_, "d") == ["upload"]


# --- what a release is, before the half is used ------------------------------------------------


def hostile_release(
    round_: Round, monkeypatch: pytest.MonkeyPatch, result: Path, place: Any, name: str, value: Any
) -> Path:
    """What release-model makes of a result where one of its parts is another."""
    hostile.forget(round_)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, value)
        return round_.release(result, "--force", out="hostile.release")


def refused(round_: Round, release: Path, text: str, code: int = 4) -> None:
    """Nobody opens it, and no attempt was made."""
    options = (release, "--key", round_.key("alice"), "-o", round_.folder / "o.npz")
    assert text in round_.dtl("open-model", *options, code=code).err
    assert "tried" not in events(round_, "alice")


def test_a_release_names_the_result_inside_by_its_digest(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()
    original = results.open_result

    def renamed(*arguments: Any) -> results.Result:
        return dataclasses.replace(original(*arguments), digest=A)

    release = hostile_release(round_, monkeypatch, sum_of(round_), results, "open_result", renamed)
    refused(round_, release, "not the one that it names")


def test_the_result_inside_a_release_is_signed(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()
    original = results.open_result

    def unsigned(*arguments: Any) -> results.Result:
        found = original(*arguments)
        found.container.signature = bytes(64)
        return found

    release = hostile_release(round_, monkeypatch, sum_of(round_), results, "open_result", unsigned)
    refused(round_, release, "the result inside: the signature does not verify")


def test_a_release_is_signed_by_the_server(new_round: NewRound) -> None:
    round_ = new_round()
    release = round_.release(sum_of(round_))
    refused(round_, hostile.again(round_, release, "x", signer="bob"), "does not verify")


def test_the_manifest_in_a_release_is_checked(new_round: NewRound) -> None:
    round_ = new_round()
    counted = {"contributions": dict.fromkeys(round_.names, 2)}
    result = hostile.again(round_, sum_of(round_), "x.enc", counted)
    refused(round_, round_.release(result), "counts contributions that were not made")


def test_the_grants_of_a_release_are_checked(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round(("alice", "bob", "carol", "dave"))
    given = {name: random_arrays(1) for name in THREE_}
    result = round_.aggregate(round_.uploads(given))
    everyone = lambda *_: round_.names  # noqa: E731
    release = hostile_release(round_, monkeypatch, result, releasing, "_grants", everyone)
    refused(round_, release, "granted to dave, who never contributed")
    needless = lambda *_: ("bob",)  # noqa: E731
    release = hostile_release(round_, monkeypatch, result, releasing, "_admitted", needless)
    refused(round_, release, "admits bob, who contributed")


def test_only_the_granted_open(new_round: NewRound) -> None:
    round_ = new_round()
    release = round_.release(sum_of(round_), "--to", "bob")
    round_.open(release, "alice", code=5)
    assert events(round_, "alice") == ["upload"]
    round_.open(release, "bob")


def test_the_content_key_is_the_one_committed_to(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()
    result, original = sum_of(round_), sealed.content_keys
    release = hostile_release(
        round_,
        monkeypatch,
        result,
        sealed,
        "content_keys",
        lambda key: (original(key)[0], bytes(32)),
    )
    refused(round_, release, "not the one committed to")


def test_what_is_sealed_is_the_signed_result(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In v1 a server could seal any model: one more in the first value, and everybody opened it."""
    round_ = new_round(THREE_, "--cipher", "direct")
    changed = another_message(releasing._half_chunk)
    release = hostile_release(
        round_, monkeypatch, sum_of(round_), releasing, "_half_chunk", changed
    )
    refused(round_, release, "the proof of the release does not hold")
    options = (release, "--key", round_.key("alice"))
    assert "the proof of the release" in round_.dtl("verify", *options, code=4).err


def test_a_word_out_of_range_in_a_release_is_refused(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that releases what its own release-model refuses."""
    round_ = new_round()
    _, tensors = hostile.read(sum_of(round_))
    body = tensors[BODY]
    body[:] = 0xFF
    result = hostile.again(round_, round_.folder / "result.enc", "x.enc", tensors={BODY: body})
    release = hostile_release(round_, monkeypatch, result, results, "check_result", lambda *_: None)
    refused(round_, release, "out of range", code=3)


@pytest.mark.parametrize("bad", ["zero", "c_0 not below N", "a factor in common"])
@pytest.mark.parametrize("cipher", ["direct", "lattice"])
def test_residues_of_a_release_are_valid(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch, bad: str, cipher: str
) -> None:
    """A server whose own check is gone releases them; the recipients refuse them."""
    round_ = new_round(THREE_, "--cipher", cipher)
    _, tensors = hostile.read(sum_of(round_))
    residues = tensors[RESIDUES]
    p = round_.opened_key("kgc").trapdoor.p
    n = round_.job.N
    c_0 = to_integers(residues[:1, :1].reshape(1, -1))[0]
    number = {"zero": 0, "c_0 not below N": c_0 + n, "a factor in common": 3 * p}[bad]
    residues[0, 0] = np.frombuffer(number.to_bytes(residues.shape[2], "little"), np.uint8)
    result = hostile.again(round_, round_.folder / "result.enc", "x.enc", tensors=tensors)
    half = scheme.apply_half

    def any_half(key: Any, ready: Any, secret: Any) -> Any:
        usable = ready.copy()
        usable[0, 0, :] = residues[1 if len(residues) > 1 else 0, 1, :] if bad != "zero" else 1
        return half(key, usable, secret)

    with monkeypatch.context() as patch:
        patch.setattr(scheme, "check", lambda *_: None)
        patch.setattr(scheme, "apply_half", any_half)
        release = round_.release(result)
    assert events(round_, "alice") == ["upload"]
    round_.open(release, "alice", code=3)
    assert events(round_, "alice") == ["upload"]
    round_.dtl("verify", release, "--key", round_.key("alice"), code=3)


# --- recomputing -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [RESIDUES, BODY, "manifest"])
def test_a_result_that_is_not_the_product_is_found_by_who_recomputes(
    new_round: NewRound, part: str
) -> None:
    round_ = new_round()
    result = sum_of(round_)
    uploads = [round_.folder / f"{name}.upload" for name in round_.names]
    spoiler = hostile.Spoiler(round_, result)
    if part == RESIDUES:
        key, first = round_.job.public_key, spoiler.tensors[RESIDUES]
        spoiler.tensors[RESIDUES] = scheme.add(key, [first, minus_one_squared(key, first)])
    elif part == BODY:
        spoiler.shift(0, 1 << 28)
    else:
        spoiler.header["layout"][0]["dtype"] = "F64"
    changed = spoiler.write("changed.enc")
    release = round_.release(changed)
    job = ("--job", round_.keys / "job.json")
    round_.dtl("verify", changed, *job, "--uploads", *uploads, code=4)
    refused_with = (release, "--key", round_.key("alice"), "-o", round_.folder / "o.npz")
    round_.dtl("open-model", *refused_with, "--uploads", *uploads, code=4)
    assert events(round_, "alice") == ["upload"]
    assert not round_.dtl("open-model", *refused_with, "--json").json["recomputed"]


def minus_one_squared(key: Any, like: Any) -> Any:
    """Encryptions of zero, [G, 8, width]."""
    groups = len(like)
    blocks = np.zeros((groups, 7, key.arithmetic.block_width), np.uint8)
    randomness = one_time.group_randomness(b"k" * 32, groups, key.exponent_bits)
    return scheme.encrypt(key, blocks, randomness, groups)


def test_a_release_is_called_recomputed_only_where_its_sealed_part_was_checked(
    new_round: NewRound, dtl: Cli
) -> None:
    round_ = new_round()
    result = sum_of(round_)
    release = round_.release(result)
    uploads = [round_.folder / f"{name}.upload" for name in round_.names]
    job = ("--job", round_.keys / "job.json")
    assert dtl("verify", result, *job, "--uploads", *uploads, "--json").json["recomputed"]
    without = dtl("verify", release, *job, "--uploads", *uploads, "--json").json
    assert not without["recomputed"]
    key = ("--key", round_.key("alice"))
    assert dtl("verify", release, *key, "--uploads", *uploads, "--json").json["recomputed"]
    assert events(round_, "alice") == ["upload"]


# --- what an upload is based on ----------------------------------------------------------------

INITIAL = Basis(2, A, A, C)
BASES: dict[str, tuple[list[Any], Basis, type[DtlError]]] = {
    "initial weights after a model was opened": ([entry_of_open(1, B)], INITIAL, NotAllowedError),
    "other initial weights": ([entry_of_upload(1, B)], INITIAL, NotAllowedError),
    "a model that another opened": (
        [entry_of_open(1, D)],
        Basis(2, A, B, C),
        NotAllowedError,
    ),
    "a model that opened to something else": (
        [entry_of_open(1, A)],
        Basis(2, A, D, C),
        VerificationError,
    ),
    "a model whose tensors were changed": (
        [entry_of_open(1, A)],
        Basis(2, A, B, D),
        VerificationError,
    ),
    "gradients that do not say of which tensors": (
        [entry_of_open(1, A)],
        Basis(2, A, B, None),
        UsageError,
    ),
    "a sum after which no model is known": (
        [entry_of_open(1, A, kind="sum")],
        Basis(2, A, B, C),
        NotAllowedError,
    ),
    "another model after a sum": (
        [
            entry_of_open(1, A, kind="sum"),
            StepEntry(event="step", round=1, sum=A, content=D, source="apply-sum"),
        ],
        Basis(2, A, B, C),
        VerificationError,
    ),
    "a base that was used before": (
        [entry_of_open(1, A), entry_of_upload(2, A, B)],
        Basis(3, A, B, C),
        NotAllowedError,
    ),
}


@pytest.mark.parametrize("kind", BASES)
def test_a_base_is_held_against_the_ledger(kind: str) -> None:
    entries, wanted, error = BASES[kind]
    with raises(error):
        basis.check_basis(hostile.ledger_of(*entries), wanted, accept_differencing=False)


def test_bases_that_are_allowed() -> None:
    for entries, wanted, again in (
        ([], INITIAL, False),
        ([entry_of_upload(1, A)], INITIAL, True),
        ([], Basis(1, None, None), False),
        ([entry_of_open(1, A)], Basis(2, A, B, C), False),
        ([entry_of_open(1, A), entry_of_upload(2, A, B)], Basis(3, A, B, C), True),
    ):
        basis.check_basis(hostile.ledger_of(*entries), wanted, accept_differencing=again)


def test_encrypt_grads_holds_the_base_against_the_ledger(new_round: NewRound) -> None:
    round_ = new_round()
    first, second = (round_.save(f"{i}.w.safetensors", random_arrays(i)) for i in range(2))
    round_.upload("alice", random_arrays(5), "--model", first)
    round_.upload("alice", random_arrays(5), "--model", second, "--round", 2, out="2", code=5)
    assert events(round_, "alice") == ["upload"]


def test_a_model_is_what_its_tensors_are_and_not_what_its_metadata_says(
    new_round: NewRound,
) -> None:
    """In v1, somebody trained on a handed-on model with other weights, and nobody noticed."""
    round_ = new_round()
    initial = round_.save("w.safetensors", random_arrays(9))
    given = {name: random_arrays(i) for i, name in enumerate(round_.names)}
    result = round_.aggregate(round_.uploads(given, "--model", initial), "--initial", initial)
    opened = round_.open(round_.release(result), "alice")
    data = bytearray(opened.read_bytes())
    data[-1] ^= 1
    changed = round_.folder / "changed.safetensors"
    changed.write_bytes(data)
    round_.upload("alice", random_arrays(1), "--model", changed, out="2", code=4)
    round_.upload("bob", random_arrays(1), "--model", opened, out="2", code=5)
    round_.upload("alice", random_arrays(1), "--model", opened, out="2")


def test_gradients_that_change_while_they_are_read_are_not_sent(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replaced file of the same size and time, seen by the stamp."""
    round_ = new_round()
    original = producing._Encryption.run

    def run(self: Any, *arguments: Any) -> Any:
        made = original(self, *arguments)
        path = self._plan.source.path
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\x3d")
        return made

    monkeypatch.setattr(producing._Encryption, "run", run)
    round_.upload("alice", random_arrays(1), code=3)
    assert events(round_, "alice") == []


# --- the model that a participant keeps itself -------------------------------------------------


def loaded(content: str, initial: str = D, base: str | None = None) -> Loaded:
    """A file with this content, on this base."""
    known = base and PlainMetadata(
        format="dtl/v2", kind="sum", round=1, base=base, opened=B, content=content
    )
    return Loaded(Path("m"), {}, known or None, content, initial)


def step(content: str, total: str = A) -> StepEntry:
    return StepEntry(event="step", round=1, sum=total, content=content, source="apply-sum")


def test_a_sum_is_the_one_that_was_opened() -> None:
    ledger = hostile.ledger_of(entry_of_open(1, A, kind="sum"))
    stepping.opened_sum(ledger, loaded(C, base=A))
    with pytest.raises(VerificationError):
        stepping.opened_sum(ledger, loaded(D, base=A))
    with pytest.raises(NotAllowedError):
        stepping.opened_sum(ledger, loaded(C, base=B))


def test_a_step_begins_at_the_model_before() -> None:
    after = entry_of_open(2, B, kind="sum", parent=A)
    pinned = hostile.ledger_of(entry_of_upload(1, A))
    stepping.check_model_before(pinned, after, loaded(C, initial=A))
    with pytest.raises(VerificationError):
        stepping.check_model_before(pinned, after, loaded(C, initial=B))
    stepped = hostile.ledger_of(step(C))
    stepping.check_model_before(stepped, after, loaded(C))
    with pytest.raises(VerificationError):
        stepping.check_model_before(stepped, after, loaded(D))
    with pytest.raises(NotAllowedError):
        stepping.check_model_before(hostile.ledger_of(), after, loaded(C))


def test_a_sum_has_one_step() -> None:
    ledger = hostile.ledger_of(step(C))
    basis.record_step(ledger, step(C))
    with pytest.raises(NotAllowedError):
        basis.record_step(ledger, step(D))


# --- masks, tags, and what is used once --------------------------------------------------------


def test_masks_and_tags_are_bound_to_all_that_tells_rounds_apart(new_round: NewRound) -> None:
    round_ = new_round(masks=True)
    key = round_.opened_key("alice")
    wanted = Basis(2, A, B)
    others = [Basis(3, A, B), Basis(2, C, B), Basis(2, A, C)]
    tags = [basis.opened_tag(key, other) for other in (wanted, *others)]
    assert len(set(tags)) == len(tags)
    assert basis.opened_tag(round_.opened_key("bob"), wanted) != tags[0]
    found = [basis.round_key(key, other, "bob") for other in (wanted, *others)]
    assert len(set(found)) == len(found)
    assert basis.round_key(key, wanted, "carol") != found[0]
    assert basis.round_key(round_.opened_key("bob"), wanted, "alice") == found[0]
    signs = {name: dict.fromkeys(round_.names, 0) for name in round_.names}
    for name in round_.names:
        made = basis.mask_keys(round_.opened_key(name), wanted)
        assert len(made) == 2
        assert len({key for _, key in made}) == 2
        del signs[name]
    assert [sign for sign, _ in basis.mask_keys(key, wanted)] == [1, 1]


def test_the_masks_of_blocks_and_body_have_different_keys() -> None:
    """One keystream for both would show each mask by the other."""
    key = bytes(range(32))
    assert masks.body_key(key) not in (key, masks.body_key(bytes(32)))
    from dtl.core.ciphers import lattice

    (mask,) = lattice._body_masks([(-1, key)])
    assert (mask.sign, mask.key) == (-1, masks.body_key(key))


def test_nothing_that_is_used_once_is_used_twice(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two uploads of one participant: secrets, errors, randomness and witnesses all differ."""
    round_ = new_round(THREE_[:2], "--min-contributors", 2)
    seen: list[bytes] = []
    commit, encoder, encrypt = proof.commit, LatticeCipher.encoder, scheme.encrypt

    def watched_commit(key: Any, groups: int, stream: bytes) -> Any:
        witness, d = commit(key, groups, stream)
        seen.extend([str(witness.w).encode(), *(str(s).encode() for s in witness.s)])
        return witness, d

    def watched_encoder(self: Any, job: Any, values: Any, keys: Any, *more: Any) -> Any:
        seen.extend([keys.secret, keys.error])
        return encoder(self, job, values, keys, *more)

    def watched_encrypt(key: Any, blocks: Any, randomness: Any, groups: int) -> Any:
        seen.extend(row.tobytes() for row in randomness)
        assert all(row[8:].any() for row in randomness)
        return encrypt(key, blocks, randomness, groups)

    monkeypatch.setattr(proof, "commit", watched_commit)
    monkeypatch.setattr(LatticeCipher, "encoder", watched_encoder)
    monkeypatch.setattr(scheme, "encrypt", watched_encrypt)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    for number in (1, 2):
        round_.upload("alice", random_arrays(1), "--round", number, out=str(number))
    groups = round_.job.codec.groups(1)
    assert len(seen) == 2 * (2 + groups + 8)
    assert len(set(seen)) == len(seen)


def test_salts_content_keys_and_witnesses_are_fresh(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(primitives, "_SCRYPT_N", 1 << 4)
        first, second = (primitives.box(b"p", b"m", b"") for _ in range(2))
    assert first[0] != second[0]
    round_ = new_round()
    result = sum_of(round_)
    keys: list[bytes] = []
    original = sealed.content_keys

    def watched(key: bytes) -> tuple[bytes, bytes]:
        keys.append(key)
        return original(key)

    monkeypatch.setattr(sealed, "content_keys", watched)
    proofs = []
    for number in range(2):
        release = round_.release(result, out=str(number))
        proofs.append(hostile.read(release)[1]["sealed"].tobytes())
    assert len(set(keys)) == 2
    assert len(set(proofs)) == 2


# --- what the server accepts and gives out -----------------------------------------------------


def aggregate_entry(
    number: int, uploads: dict[str, str], base: str | None = None
) -> AggregateEntry:
    return AggregateEntry(
        event="aggregate",
        round=number,
        base=base,
        uploads=uploads,
        content=A,
        created="2026-01-01T00:00:00Z",
        result=B,
    )


def close_entry(number: int, uploads: dict[str, str]) -> CloseEntry:
    return CloseEntry(
        event="close",
        round=number,
        base=None,
        uploads=uploads,
        digest=A,
        created="2026-01-01T00:00:00Z",
    )


def release_entry(number: int, result: str, base: str | None, *admitted: str) -> ReleaseEntry:
    return ReleaseEntry(
        event="release", round=number, base=base, result=result, grants=(), admitted=admitted
    )


def fake_upload(number: int = 1, signer: str = "alice", digest: str = D) -> Any:
    class Fake:
        path = Path("u")
        header = type("H", (), {"signer": signer, "round": number, "base": None})

    Fake.digest = digest  # type: ignore[attr-defined]
    return Fake


@pytest.mark.parametrize(
    "entry",
    [
        aggregate_entry(1, {"alice": C}),
        close_entry(1, {"alice": C}),
        close_entry(1, {"bob": C}),
    ],
)
def test_one_upload_of_a_participant_for_a_round(entry: Any) -> None:
    with pytest.raises(NotAllowedError):
        accepting.check_first_upload(hostile.ledger_of(entry), fake_upload())
    accepting.check_first_upload(hostile.ledger_of(entry), fake_upload(2))


def test_aggregate_and_close_round_hold_uploads_against_the_ledger(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c", "d"), masks=True)
    given = {name: random_arrays(1) for name in round_.names}
    uploads = round_.uploads(given)
    round_.aggregate(uploads)
    hostile.forget(round_, "a")
    second = round_.upload("a", random_arrays(2), out="second.upload")
    round_.aggregate([second, *uploads[1:]], out="2.enc", code=5)
    close = ("close-round", second, *uploads[1:3], "--key", round_.key("server"), "-o", "x")
    round_.dtl(*close[:-1], round_.folder / "x.close", code=5)


@pytest.mark.parametrize("entry", [release_entry(1, A, None), aggregate_entry(1, {"zoe": C})])
def test_a_round_that_is_known_is_not_closed(entry: Any) -> None:
    with pytest.raises(NotAllowedError):
        closing._check_open(hostile.ledger_of(entry), 1, {"alice"})
    closing._check_open(hostile.ledger_of(entry), 2, {"alice"})


def test_one_result_of_a_round_and_of_a_base_is_released() -> None:
    ledger = hostile.ledger_of(release_entry(1, A, C))
    for found, differencing in (
        (manifest_of(1, parent=D), True),
        (manifest_of(2, parent=C), False),
    ):
        with pytest.raises(NotAllowedError):
            releasing._check_only_result(ledger, found, B, differencing)
        releasing._check_only_result(ledger, found, A, differencing)
    releasing._check_only_result(ledger, manifest_of(2, parent=C), B, True)


def test_an_admission_is_given_once_and_to_newcomers() -> None:
    policy = releasing.Policy(admit=["bob"])
    ledger = hostile.ledger_of(release_entry(1, A, None, "bob"))
    nobody = hostile.ledger_of()
    job: Any = None
    with pytest.raises(NotAllowedError):
        releasing._admitted(job, manifest_of(2), B, policy, ledger)
    assert releasing._admitted(job, manifest_of(2), A, policy, ledger) == ("bob",)
    with pytest.raises(UsageError):
        releasing._admitted(job, manifest_of(2, contributions={"bob": 1}), B, policy, nobody)


def test_grants_go_to_who_contributed() -> None:
    found, job = manifest_of(1, contributions={"alice": 2, "bob": 1}), None
    grants: Any = releasing._grants
    assert grants(job, found, A, releasing.Policy(), hostile.ledger_of()) == ("alice", "bob")
    assert grants(job, found, A, releasing.Policy(min_rounds=2), hostile.ledger_of()) == ("alice",)
    for policy in (releasing.Policy(to=["carol"]), releasing.Policy(to=["bob"], min_rounds=2)):
        with pytest.raises(NotAllowedError):
            grants(job, found, A, policy, hostile.ledger_of())


@pytest.mark.parametrize("side_by_side", [False, True])
def test_an_upload_without_a_good_proof_is_not_added_up(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch, side_by_side: bool
) -> None:
    """A residue of another group, signed by its sender."""
    if side_by_side:  # as where there are many, in processes
        monkeypatch.setattr(public_uploads, "SIDE_BY_SIDE", 2)
    round_ = new_round(("alice", "bob", "carol", "dave"))
    uploads = round_.uploads({name: random_arrays(1) for name in round_.names})
    _, tensors = hostile.read(uploads[0])
    residues = tensors[RESIDUES]
    residues[0], residues[1] = residues[1].copy(), residues[0].copy()
    bad = hostile.again(round_, uploads[0], "bad", tensors=tensors, signer="alice")
    round_.aggregate([*uploads[1:], bad], code=4)
    words = ("--key", round_.key("server"), "-o", round_.folder / "three.enc")
    made = round_.dtl("aggregate", *uploads[1:], bad, "--skip-invalid", "--json", *words).json
    ((path, reason),) = made["refused"].items()
    assert path == str(bad)
    assert "the proof of the upload does not hold" in reason
    body = hostile.read(uploads[0])[1][BODY]
    body[-1] ^= 1
    bad = hostile.again(round_, uploads[0], "bad", tensors={BODY: body}, signer="alice")
    round_.aggregate([bad, *uploads[1:]], code=4)
    round_.aggregate(uploads)


@pytest.mark.parametrize(
    ("changes", "signer", "code"),
    [
        ({}, "bob", 4),
        ({"signer": "mallory"}, "alice", 3),
        ({"roster": A}, "alice", 3),
        ({"masked": True}, "alice", 3),
        ({"job": A}, "alice", 3),
        ({"opened_tag": "0" * 32}, "alice", 3),
    ],
)
def test_uploads_of_strangers_or_of_something_else(
    new_round: NewRound, changes: dict[str, Any], signer: str, code: int
) -> None:
    """The proof binds the header too; what is said before it is told by its text."""
    round_ = new_round()
    uploads = round_.uploads({name: random_arrays(1) for name in round_.names})
    bad = hostile.again(round_, uploads[0], "bad", changes, signer=signer)
    options = ("--key", round_.key("server"), "-o", round_.folder / "x.enc")
    failed = round_.dtl("aggregate", bad, *uploads[1:], *options, code=code)
    assert "proof" not in failed.err


def test_an_upload_of_another_base_is_not_added(new_round: NewRound) -> None:
    def upload(base: str | None, number: int) -> Any:
        made = fake_upload(number)
        made.header = type("H", (), {"base": base, "round": number, "layout": ()})
        return made

    start = results.Start(base=A, initial=B, layout=(), round=3, contributions={})
    results.check_base(upload(A, 4), start)
    for wrong in (upload(C, 4), upload(None, 4), upload(A, 3)):
        with pytest.raises(FormatError):
            results.check_base(wrong, start)


def test_enough_are_needed(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c", "d", "e", "f"), masks=True)
    results.check_quorum(round_.job, 3, "uploads", ())
    with pytest.raises(QuorumError):
        results.check_quorum(round_.job, 2, "uploads", ())
    assert results.can_close(round_.job, 5)
    assert not results.can_close(round_.job, 4)
    small = round_.job.model_copy(update={"min_contributors": 6})
    assert not results.can_close(small, 5)
    few = manifest_of(
        1,
        contributors=tuple(Contribution(participant=n, upload=A) for n in "abcd"),
        contributions=dict.fromkeys("abcd", 1),
        missing=("e", "f"),
    )
    with raises(QuorumError):
        results.check_manifest(round_.job, few, Path("m"))
    for unnamed in ({}, {"missing": ("zoe",)}):  # nothing about f
        five = manifest_of(
            1,
            contributors=tuple(Contribution(participant=n, upload=A) for n in "abcde"),
            contributions=dict.fromkeys("abcde", 1),
            **unnamed,
        )
        with raises(FormatError):
            results.check_manifest(round_.job, five, Path("m"))


def test_more_uploads_than_can_be_opened_are_refused(new_round: NewRound) -> None:
    results.check_uploads_bound(manifest_of(1, contributions={"a": MAX_UPLOADS}), "m")
    with pytest.raises(NumericError):
        results.check_uploads_bound(manifest_of(1, contributions={"a": MAX_UPLOADS + 1}), "m")
    round_ = new_round()
    huge = {"contributions": dict.fromkeys(round_.names, 1 << 20)}
    result = hostile.again(round_, sum_of(round_), "x.enc", huge)
    round_.release(result, code=7)


# --- reveals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [entry_of_open(1, A), entry_of_try(1, A, B), entry_of_upload(2, A)],
)
def test_nothing_is_revealed_of_a_round_that_is_known_or_was_begun_anew(entry: Any) -> None:
    sent = entry_of_upload(1, A)
    revealing._check_still_open(hostile.ledger_of(sent), sent, Path("c"))
    with pytest.raises(NotAllowedError):
        revealing._check_still_open(hostile.ledger_of(sent, entry), sent, Path("c"))


REVEALS: dict[str, tuple[dict[str, Any], int]] = {
    "the own upload is another": ({"contributors": {"a": A}}, 4),
    "another base": ({"base": A}, 4),
    "declared missing itself": ({"missing": "a"}, 5),
    "not about the whole roster": (
        {"names": "abcdefg", "missing": "g", "contributors": {"f": None}},
        3,
    ),
    "somebody else declared missing": ({"missing": "zoe"}, 3),
    "too few": ({"missing": "cd"}, 6),
}


@pytest.mark.parametrize("kind", REVEALS)
def test_a_close_file_is_checked_before_anything_is_revealed(
    new_round: NewRound, kind: str
) -> None:
    from dtl.core.files.closing import Close

    changes, code = REVEALS[kind]
    round_ = new_round(tuple(changes.get("names", "abcd")), masks=True)
    round_.upload("a", random_arrays(1))
    own = lines(round_, "a")[0]["upload"]
    wanted: dict[str, Any] = {"contributors": {}, "missing": "d", "base": None} | changes
    missing = [wanted["missing"]] if wanted["missing"] == "zoe" else list(wanted["missing"])
    present = [name for name in round_.names if name not in missing]
    uploads = {name: own if name == "a" else B for name in present} | wanted["contributors"]
    uploads = {name: upload for name, upload in uploads.items() if upload is not None}
    close = Close.signed(
        round_.opened_key("server").secrets.sign,
        format="dtl/v2",
        kind="close",
        job=round_.job.digest,
        signer="server",
        created="2026-01-01T00:00:00Z",
        round=1,
        base=wanted["base"],
        contributors=tuple(Contribution(participant=n, upload=u) for n, u in uploads.items()),
        missing=tuple(missing),
    )
    path = round_.folder / "c.close"
    path.write_bytes(close.encode())
    options = ("--key", round_.key("a"), "-o", round_.folder / "a.reveal")
    round_.dtl("reveal-masks", path, *options, code=code)
    assert events(round_, "a") == ["upload"]
    honest = close.model_copy(
        update={
            "base": None,
            "missing": ("d",),
            "contributors": tuple(
                Contribution(participant=n, upload=own if n == "a" else B) for n in "abc"
            ),
        }
    )
    forged = round_.folder / "forged.close"
    forged.write_bytes(honest.encode())
    round_.dtl("reveal-masks", forged, *options, code=4)  # signed for something else


def test_one_close_file_of_a_round_is_answered(new_round: NewRound) -> None:
    from dtl.core.files.closing import Close

    round_ = new_round(("a", "b", "c", "d"), masks=True)
    uploads = round_.uploads({name: random_arrays(1) for name in "abc"})
    path, out = round_.folder / "c.close", round_.folder / "a.reveal"
    round_.dtl("close-round", *uploads, "--key", round_.key("server"), "-o", path)
    round_.dtl("reveal-masks", path, "--key", round_.key("a"), "-o", out)
    close = Close.load(path, round_.job)
    uploads_of = close.uploads | {"b": B}
    second = Close.signed(
        round_.opened_key("server").secrets.sign,
        **close.plain()
        | {
            "contributors": tuple(
                Contribution(participant=n, upload=u) for n, u in uploads_of.items()
            ),
            "missing": close.missing,
        },
    )
    other = round_.folder / "2.close"
    other.write_bytes(second.encode())
    round_.dtl("reveal-masks", other, "--key", round_.key("a"), "-o", out, "--force", code=5)


# --- files -------------------------------------------------------------------------------------


def test_rows_are_what_was_hashed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    from dtl.core.files.tree_hash import piece_hash

    assert Rows(path, 0, 10, 100, piece_hash(b"x" * 100)).read(2, 1) == b"x" * 10
    rows = Rows(path, 0, 10, 100, piece_hash(b"x" * 100))
    path.write_bytes(b"x" * 99 + b"y")
    with pytest.raises(FormatError):
        rows.read(2, 1)


def test_an_upload_that_changes_after_its_check_is_not_added(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In v1 a participant could change its upload between the check and the product."""
    round_ = new_round()
    uploads = round_.uploads({name: random_arrays(1) for name in round_.names})
    original, done = public_uploads._fault, []

    def swapped(*statement: Any, **more: Any) -> None:
        assert original(*statement, **more) is None
        done.append(statement)
        if len(done) == len(uploads):
            with Container(uploads[0]) as container:
                place = container.tensors[RESIDUES].start
            with uploads[0].open("r+b") as file:
                file.seek(place)
                file.write(bytes(range(64)))

    monkeypatch.setattr(public_uploads, "_fault", swapped)
    round_.aggregate(uploads, code=3)
    assert "aggregate" not in events(round_, "server")


def test_a_ledger_line_is_on_disk_when_it_counts(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl
    import os

    round_ = new_round()
    key = round_.opened_key("alice")
    synced: list[int] = []
    locked: list[int] = []
    fsync, flock = os.fsync, fcntl.flock

    def watched_fsync(descriptor: int) -> None:
        synced.append(descriptor)
        fsync(descriptor)

    def watched_flock(descriptor: int, how: int) -> None:
        locked.append(how)
        flock(descriptor, how)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(fcntl, "flock", watched_flock)
    with Ledger(key) as ledger:
        assert locked == [fcntl.LOCK_EX]
        before = ledger.last_link
        ledger.append(entry_of_try(1, A, B))
        assert synced == [ledger._descriptor]
        assert ledger.last_link != before
    with Ledger(key) as ledger:
        assert ledger.find(TriedEntry, result=A)


def test_a_ledger_is_a_chain_and_the_pinned_one(new_round: NewRound) -> None:
    round_ = new_round()
    for name in ("alice", "bob"):
        with Ledger(round_.opened_key(name)) as ledger:
            ledger.append(entry_of_try(1, A, B))
            ledger.append(entry_of_try(2, A, B))
    path = round_.keys / "alice.ledger"
    original = path.read_bytes()
    head, first, second = original.splitlines(keepends=True)
    for changed in (
        head + second,
        head + second + first,
        head + first.replace(b'"round":1', b'"round":7'),
    ):
        path.write_bytes(changed)
        with pytest.raises(VerificationError):
            Ledger(round_.opened_key("alice"))
    path.write_bytes((round_.keys / "bob.ledger").read_bytes())
    with pytest.raises(VerificationError):
        Ledger(round_.opened_key("alice"))
    path.unlink()
    with pytest.raises(NotAllowedError):
        Ledger(round_.opened_key("alice"))


def test_a_key_is_held_against_the_job(new_round: NewRound) -> None:
    """Halves, identities and masks seeds of another job, put into this job's key files."""
    round_, other = new_round(masks=True), new_round(folder="other", masks=True)
    for name, field in (
        ("server", "server_seed"),
        ("alice", "participant_seed"),
        ("kgc", "server_seed"),
        ("kgc", "participant_seed"),
        ("alice", "sign"),
        ("alice", "hpke"),
        ("server", "sign"),
        ("kgc", "sign"),
    ):
        own, theirs = (json.loads(at.key(name).read_bytes()) for at in (round_, other))
        before = round_.key(name).read_bytes()
        text = json.dumps(own | {field: theirs[field]}, sort_keys=True, separators=(",", ":"))
        round_.key(name).write_bytes(text.encode())
        with pytest.raises(VerificationError):
            round_.opened_key(name)
        round_.key(name).write_bytes(before)
        round_.opened_key(name)


def test_a_key_pins_its_job_and_its_center(new_round: NewRound) -> None:
    from dtl.core.files import canonical_json
    from dtl.core.files.job_file import signed_digest

    round_, other = new_round(), new_round(folder="other")
    plain = canonical_json.loads((round_.keys / "job.json").read_bytes(), "job")
    center = round_.opened_key("kgc").secrets.sign
    changed = {name: value for name, value in plain.items() if name != "signature"}
    changed["min_contributors"] = 2
    signature = primitives.sign(center, "job", bytes.fromhex(signed_digest("job", changed)))
    changed["signature"] = primitives.encode_base64(signature)
    path = round_.keys / "job.json"
    before = path.read_bytes()
    for data in (canonical_json.dumps(changed), (other.keys / "job.json").read_bytes()):
        path.write_bytes(data)
        with pytest.raises(VerificationError, match="not the job that"):
            round_.opened_key("alice")
    path.write_bytes(before.replace(b'"min_contributors":3', b'"min_contributors":2'))
    with pytest.raises(VerificationError, match="signature"):
        round_.opened_key("alice")


def test_a_box_is_committed_to_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "_SCRYPT_N", 1 << 4)
    salt, commit, closed = primitives.box(b"right", b"message", b"aad")
    with pytest.raises(NotAllowedError):
        primitives.open_box(b"right", salt, bytes(32), closed, b"aad")
    assert primitives.open_box(b"right", salt, commit, closed, b"aad") == b"message"


def test_chunks_keep_their_places_and_their_release() -> None:
    chunks = list(sealed.seal_stream(bytes(32), b"core", [bytes(primitives.SEAL_CHUNK), b"x" * 9]))
    assert len(chunks) == 2
    assert primitives.open_chunk(bytes(32), 0, False, chunks[0], b"core") is not None
    for index, last, chunk, core in (
        (1, False, chunks[0], b"core"),
        (0, True, chunks[0], b"core"),
        (1, False, chunks[1], b"core"),
        (1, True, chunks[1], b"another"),
    ):
        with pytest.raises(VerificationError):
            primitives.open_chunk(bytes(32), index, last, chunk, core)


def test_a_content_key_is_wrapped_for_one_name_and_one_release() -> None:
    made = {
        sealed.grant_info(core, name, key, server)
        for core in (b"1", b"2")
        for name in ("a", "b")
        for key in (b"k", b"l")
        for server in (b"s", b"t")
    }
    assert len(made) == 16


def test_what_a_release_is_bound_to() -> None:
    values: dict[str, Any] = {
        "manifest": manifest_of(1),
        "of": A,
        "tensors": {"residues": b"r"},
        "grants": ["a"],
        "shape": (3, 8, 128),
        "commit": bytes(32),
    }
    changes: Iterable[dict[str, Any]] = (
        {},
        {"manifest": manifest_of(1, contributions={"alice": 1})},
        {"of": B},
        {"tensors": {"residues": b"s"}},
        {"grants": ["a", "b"]},
        {"shape": (4, 8, 128)},
        {"commit": b"c" * 32},
    )
    assert len({sealed.release_core(**values | change) for change in changes}) == 7


@pytest.mark.parametrize(
    "text", [b'{"a": 1}', b'{"b":1,"a":1}', b'{"a":1,"a":1}', b'{"a":"\\u0041"}', b'{"a":1}\n']
)
def test_json_has_one_spelling(text: bytes) -> None:
    from dtl.core.files import canonical_json

    with pytest.raises(FormatError):
        canonical_json.loads(text, "x")


def test_a_container_has_one_spelling(new_round: NewRound) -> None:
    """An outer header with spaces at its end, as the format of others allows."""
    round_ = new_round()
    path = round_.upload("alice", random_arrays(1))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    padded = (
        (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]
    )
    path.write_bytes(padded)
    with pytest.raises(FormatError):
        Container(path)


def test_secret_files_are_private(new_round: NewRound) -> None:
    round_ = new_round()
    for path in round_.keys.iterdir():
        private = path.suffix in (".key", ".ledger")
        assert path.stat().st_mode & 0o077 == (0 if private else path.stat().st_mode & 0o077), path
    opened = round_.open(round_.release(sum_of(round_)), "alice")
    assert opened.stat().st_mode & 0o077 == 0
    assert set(load_file(opened)) == {"a.weight", "b"}


def test_an_upload_with_a_base_has_a_tag() -> None:
    values: dict[str, Any] = {
        "format": "dtl/v2",
        "kind": "upload",
        "job": A,
        "signer": "alice",
        "created": "2026-01-01T00:00:00Z",
        "round": 1,
        "layout": (TensorSpec(name="x", shape=(1,), dtype="F32"),),
        "values": 1,
        "base": A,
        "roster": A,
        "masked": True,
        "opened_tag": "0" * 32,
    }
    UploadHeader(**values)
    for change in ({"opened_tag": None}, {"base": None}):
        with pytest.raises(ValueError, match="tag"):
            UploadHeader(**values | change)


def test_one_time_keys_are_given_the_time_and_the_ledger(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_, seen = new_round(), []
    original = one_time.derive_one_time

    def watched(*arguments: Any) -> Any:
        seen.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(one_time, "derive_one_time", watched)
    monkeypatch.setattr(time, "time_ns", lambda: 12345)
    with Ledger(round_.opened_key("alice")) as ledger:
        last = ledger.last_link
    round_.upload("alice", random_arrays(1))
    assert seen[0][-2:] == (12345, last)
    job = round_.job
    secret = round_.opened_key("alice").secrets.sign
    digests = (bytes.fromhex(job.digest), bytes.fromhex(job.roster_digest))
    assert seen[0][:-2] == (secret, digests[0], 1, None, None, digests[1])


@pytest.mark.parametrize("bad", ["zero", "c_0 not below N", "a factor in common"])
def test_residues_of_an_upload_are_valid(new_round: NewRound, bad: str) -> None:
    """They are refused as such (3), before the proof is held against them (4)."""
    round_ = new_round()
    uploads = round_.uploads({name: random_arrays(1) for name in round_.names})
    _, tensors = hostile.read(uploads[0])
    residues = tensors[RESIDUES]
    c_0 = to_integers(residues[:1, :1].reshape(1, -1))[0]
    p = round_.opened_key("kgc").trapdoor.p
    number = {"zero": 0, "c_0 not below N": c_0 + round_.job.N, "a factor in common": 3 * p}[bad]
    residues[0, 0] = np.frombuffer(number.to_bytes(residues.shape[2], "little"), np.uint8)
    changed = hostile.again(round_, uploads[0], "bad", tensors=tensors, signer="alice")
    round_.aggregate([changed, *uploads[1:]], code=3)


def test_an_upload_is_masked_in_blocks_and_body(new_round: NewRound) -> None:
    """Without its masks, both halves together open an upload; with them, neither part opens."""
    from dtl.core.public.uploads import read_groups

    for masked in (False, True):
        round_ = new_round(folder=str(masked), masks=masked)
        path = round_.upload("alice", random_arrays(1))
        a, b = round_.opened_key("server").half, round_.opened_key("alice").half
        key, codec = round_.job.public_key, round_.job.codec
        assert isinstance(codec, LatticeCipher)
        with Container(path) as container:
            rows = container.rows(RESIDUES)
            residues = read_groups(key, rows, 0, container.tensors[RESIDUES].shape[0])
            body = container.whole(BODY)
        blocks = scheme.open_blocks(
            key, scheme.apply_half(key, scheme.apply_half(key, residues, a), b)
        )
        secret, fits = codec.packing.unpack(blocks.reshape(-1, blocks.shape[-1]), codec.ring.n)
        assert bool(fits.all()) is not masked
        # With the true secret, which the masks of the blocks hide:
        without = [
            (-sign, mask)
            for sign, mask in basis.mask_keys(round_.opened_key("alice"), Basis(1, None, None))
        ]
        bare = masks.add_masks(blocks.reshape(-1, blocks.shape[-1]), without, 0, key.n)
        secret, fits = codec.packing.unpack(bare, codec.ring.n)
        assert fits.all()
        arithmetic = door.arithmetic(codec.ring)
        public = door.public_key(bytes.fromhex(round_.job.digest))
        transformed = arithmetic.transform(secret)
        _, good = arithmetic.open(public, transformed, 64, body, codec.shape(335), 0)
        assert good is not masked


def test_audit_names_who_worked_on_another_model(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()
    initial = round_.save("w.safetensors", random_arrays(9))
    given = {name: random_arrays(i) for i, name in enumerate(round_.names)}
    result = round_.aggregate(round_.uploads(given, "--model", initial), "--initial", initial)
    opened = round_.open(round_.release(result), "alice")
    good = round_.upload("alice", random_arrays(1), "--model", opened, out="good.upload")
    bad = hostile.again(round_, good, "bad.upload", {"opened_tag": "0" * 32}, signer="alice")
    audit = ("audit", bad, "--unsigned", "--model", result, "--key", round_.key("kgc"), "--json")
    (verdict,) = round_.dtl(*audit, code=4).json["files"]
    assert verdict["base_opened_to"] == "something else"
    assert "worked on another model" in verdict["verdict"]
    again = ("audit", good, "--model", result, "--key", round_.key("kgc"), "--json")
    (verdict,) = round_.dtl(*again).json["files"]
    assert (verdict["base_opened_to"], verdict["verdict"]) == ("what was released", "good")


def test_a_grant_opens_for_its_info_only() -> None:
    secret = primitives.hpke_generate()
    wrapped = primitives.hpke_wrap(primitives.hpke_public_key(secret), b"k" * 32, b"one")
    with pytest.raises(VerificationError):
        primitives.hpke_unwrap(secret, wrapped, b"")
    with pytest.raises(VerificationError):
        primitives.hpke_unwrap(secret, wrapped, b"two")


def test_chunks_of_a_release_are_bound_to_it() -> None:
    (chunk,) = sealed.seal_stream(bytes(32), b"core", [b"x" * 9])
    for core in (b"", b"another"):
        with pytest.raises(VerificationError):
            primitives.open_chunk(bytes(32), 0, True, chunk, core)


def test_a_manifest_that_is_not_that_of_the_uploads(new_round: NewRound) -> None:
    """One who contributed is named as missing, and a participant is counted twice."""
    round_ = new_round(("a", "b", "c", "d"))
    uploads = round_.uploads({name: random_arrays(1) for name in round_.names})
    initial = round_.save("w.safetensors", random_arrays(9))
    header = hostile.read(round_.aggregate(uploads))[0]
    others = header["contributors"][:3]
    changes = {"contributors": others, "missing": ["d"]}
    changes["contributions"] = dict.fromkeys("abc", 1)
    changed = hostile.again(round_, round_.folder / "result.enc", "x.enc", changes)
    job = ("--job", round_.keys / "job.json")
    round_.dtl("verify", changed, *job, "--uploads", *uploads[:3], code=4)
    assert initial.exists()
    later = hostile.again(round_, round_.folder / "result.enc", "y.enc", {"round": 2})
    failed = round_.dtl("verify", later, *job, "--uploads", *uploads, code=4)
    assert "its manifest is not that of these uploads" in failed.err


def test_a_bad_block_is_a_failure_of_its_own(new_round: NewRound) -> None:
    """Whatever the body says: the group itself is noted as one that did not open."""
    round_ = new_round()
    codec = round_.job.codec
    assert isinstance(codec, LatticeCipher)
    groups = codec.groups(1)
    blocks = codec.packing.pack(np.zeros(codec.ring.n, np.int64), groups * 7)
    good = np.ones(groups, np.bool_)
    good[1] = False
    body = (
        door.arithmetic(codec.ring)
        .encode_public(np.zeros(9, np.int64), codec.shape(9), 0)
        .tobytes()
    )

    def run(function: Any, tasks: Any, total: int) -> Any:
        return (function(*task) for task in tasks)

    def bad_groups(opened: np.ndarray[Any, Any]) -> list[int]:
        pieces = iter([(blocks.reshape(groups, 7, -1), opened)])
        reader = lambda first, count: body[first : first + count]  # noqa: E731
        decoding = codec.decode(bytes(64), 9, 3, pieces, reader, (), run)
        assert not np.concatenate(list(decoding)).any()
        return decoding.bad_groups

    assert bad_groups(np.ones(groups, np.bool_)) == []
    assert bad_groups(good) == [1]


def test_a_participant_makes_one_upload_for_a_round(new_round: NewRound) -> None:
    round_ = new_round()
    round_.upload("alice", random_arrays(1))
    round_.upload("alice", random_arrays(2), out="2.upload", code=5)
    assert events(round_, "alice") == ["upload"]


def test_blocks_that_change_are_not_proven(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many blocks only hashes are kept, and the file is read again for the proof."""
    round_ = new_round(THREE_, "--cipher", "direct")
    monkeypatch.setattr(producing, "KEEP_BYTES", 0)
    original = producing._Encryption.again

    def again(self: Any, kept: Any, work: Any) -> Any:
        path = self._plan.source.path
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\x3d")
        return original(self, kept, work)

    monkeypatch.setattr(producing._Encryption, "again", again)
    round_.upload("alice", random_arrays(1), code=3)
    assert events(round_, "alice") == []


def test_a_missing_participant_does_not_reveal(new_round: NewRound) -> None:
    """Though its upload came after all, and the server has it."""
    round_ = new_round(("a", "b", "c", "d"), masks=True)
    uploads = round_.uploads({name: random_arrays(1) for name in "abcd"})
    path = round_.folder / "c.close"
    round_.dtl("close-round", *uploads[1:], "--key", round_.key("server"), "-o", path)
    options = ("--key", round_.key("a"), "-o", round_.folder / "a.reveal")
    failed = round_.dtl("reveal-masks", path, *options, code=5)
    assert "declares a missing" in failed.err


def test_an_upload_is_not_added_twice(new_round: NewRound) -> None:
    round_ = new_round()
    uploads = round_.uploads({name: random_arrays(1) for name in round_.names})
    copy = round_.folder / "copy.upload"
    copy.write_bytes(uploads[0].read_bytes())
    round_.aggregate([*uploads, copy], code=5)


def test_the_server_applies_its_half_to_valid_residues_only(new_round: NewRound) -> None:
    round_ = new_round()
    _, tensors = hostile.read(sum_of(round_))
    residues = tensors[RESIDUES]
    c_0 = to_integers(residues[:1, :1].reshape(1, -1))[0] + round_.job.N
    residues[0, 0] = np.frombuffer(c_0.to_bytes(residues.shape[2], "little"), np.uint8)
    round_.release(
        hostile.again(round_, round_.folder / "result.enc", "x.enc", tensors=tensors), code=3
    )


def test_initial_weights_that_change_are_not_used(new_round: NewRound) -> None:
    round_ = new_round()
    path = round_.save("w.safetensors", random_arrays(9))
    start = results.start_from_weights(round_.job, path)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError):
        list(results._initial_integers(round_.job, start, 1000))


def test_json_of_others_has_no_key_twice() -> None:
    """The containers' outer header may be spelled otherwise, but says everything once."""
    from dtl.core.files import canonical_json

    with pytest.raises(FormatError):
        canonical_json.parse(b'{ "a": 1, "a": 2 }', "x")
    assert canonical_json.parse(b'{ "a": 1 }', "x") == {"a": 1}


def test_an_upload_has_its_line_before_its_name(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()
    seen: list[bool] = []
    original = Ledger.append

    def append(self: Ledger, entry: Any) -> None:
        seen.append((round_.folder / "alice.upload").exists())
        original(self, entry)

    monkeypatch.setattr(Ledger, "append", append)
    round_.upload("alice", random_arrays(1))
    assert seen == [False]


def test_a_finished_upload_without_its_line_is_removed(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two; the next run must not leave a second upload under one mask."""
    round_ = new_round()
    out = round_.folder / "alice.upload"

    def killed(self: Ledger, entry: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            round_.upload("alice", random_arrays(1))
    assert len(pending_files(out)) == 1
    round_.upload("alice", random_arrays(1))
    assert pending_files(out) == []


def test_responses_of_a_proof_are_in_their_ranges(new_round: NewRound) -> None:
    key = new_round().job.public_key
    most = (1 << (proof.witness_bits(key, 3) + 1)) - 1
    proof.check_ranges(key, 3, proof.Proof((1,) * 8, most, (key.n - 1,) * 7))
    for z, v in ((most + 1, 0), (0, key.n)):
        with pytest.raises(VerificationError):
            proof.check_ranges(key, 3, proof.Proof((1,) * 8, z, (0,) * 6 + (v,)))


def test_padding_of_blocks_is_zero(new_round: NewRound) -> None:
    packing = new_round().job.codec.packing
    blocks = packing.pack(np.ones(packing.slots + 1, np.int64), 2)
    assert packing.unpack(blocks, packing.slots + 1)[1].all()
    assert packing.unpack(blocks, packing.slots)[1].tolist() == [True, False]


def test_who_recomputes_checks_the_proofs_as_well(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that lets an upload pass whose proof does not hold."""
    round_ = new_round()
    uploads = round_.uploads({name: random_arrays(1) for name in round_.names})
    _, tensors = hostile.read(uploads[0])
    tensors[PROOF][-1] ^= 1
    bad = hostile.again(round_, uploads[0], "bad", tensors=tensors, signer="alice")
    with monkeypatch.context() as patch:
        patch.setattr(public_uploads, "_fault", lambda *_, **__: None)
        result = round_.aggregate([bad, *uploads[1:]])
    job = ("--job", round_.keys / "job.json")
    failed = round_.dtl("verify", result, *job, "--uploads", bad, *uploads[1:], code=4)
    assert "proof" in failed.err


def test_a_result_is_signed_by_the_server(new_round: NewRound) -> None:
    round_ = new_round()
    forged = hostile.again(round_, sum_of(round_), "x.enc", signer="bob")
    round_.release(forged, code=4)
    round_.dtl("verify", forged, "--job", round_.keys / "job.json", code=4)
