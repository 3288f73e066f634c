"""Rounds between machines: the same files and the same model as by hand, whoever is missing."""

import dataclasses
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dtl.core.ciphers import lattice
from dtl.core.ciphers.cipher import Encoded
from dtl.core.errors import (
    DtlError,
    FormatError,
    NotAllowedError,
    NumericError,
    QuorumError,
    UsageError,
    VerificationError,
)
from dtl.core.files.closing import Reveal
from dtl.core.files.job_file import Job
from dtl.core.files.ledger import Ledger, TriedEntry
from dtl.core.flower.node import Node
from dtl.core.flower.rounds import CONTRIBUTE, NOTHING, RELEASE, REVEAL, Conductor, Plan
from dtl.core.public import results
from tests.helpers import Cli, Result, Round
from tests.network import Network

NewRound = Callable[..., Round]
FOUR = ("a", "b", "c", "d")
RUN = {"local-epochs": 1, "seed": 0}
USERS_OWN = """
import numpy as np

def local_update(arrays, context):
    assert context.participant in "abcd" and context.data.exists() and context.round >= 1
    step = np.float64(context.settings["step"])
    return {name: array - step for name, array in arrays.items()}
"""


@dataclass
class Hand:
    """A courier on foot: every node in this process. `absent` says who is away in a round."""

    nodes: dict[str, Node]
    absent: dict[int, str] = field(default_factory=dict)
    spoil: Callable[[str, str, int, bytes], bytes] = lambda step, name, number, data: data
    steps: list[tuple[str, int, tuple[str, ...]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    now: int = 1
    along: dict[str, bytes] = field(default_factory=dict)

    def present(self) -> Collection[str]:
        return set(self.nodes) - set(self.absent.get(self.now, ""))

    def ask(
        self,
        step: str,
        names: Collection[str],
        number: int,
        file: Path,
        along: Mapping[str, Path] = NOTHING,
    ) -> Iterator[tuple[str, bytes]]:
        self.now = number
        self.along = {told: path.read_bytes() for told, path in along.items()}
        self.steps.append((step, number, tuple(names)))
        for name in sorted(set(names) & set(self.present())):
            node, data = self.nodes[name], file.read_bytes()
            try:
                match step:
                    case "contribute":
                        answer = node.contribute(number, data, self.along)
                    case "reveal":
                        answer = node.reveal(number, data)
                    case _:
                        node.receive(data, self.along)
                        answer = b""
            except DtlError as error:
                self.failures.append(f"{name}: {type(error).__name__}: {error.message}")
            else:
                yield name, self.spoil(step, name, number, answer)


@dataclass
class Party:
    """A job of four with digits, and what it takes to lead its rounds."""

    round: Round
    courier: Hand
    folder: Path

    def conduct(
        self, rounds: int, folder: str = "rounds", by_hand: str = "", send_uploads: bool = False
    ) -> Path:
        initial = self.folder / "w0.safetensors"
        plan = Plan(self.folder / folder, initial, rounds, by_hand, 60, send_uploads)
        return Conductor(self.round.opened_key("server"), plan, self.courier).run()

    def manifest(self, number: int) -> dict[str, Any]:
        path = self.folder / "rounds" / f"{number:03}" / "model.enc"
        return self.round.dtl("inspect", path, "--json").json

    def load(self, name: str, **own: object) -> Node:
        settings = {
            "key": str(self.round.key(name)),
            "data": str(self.folder / "shards" / f"{name}.npz"),
            "folder": str(self.folder / f"{name}-files"),
            "rounding-seed": "s",
        }
        return Node.load(settings | own, RUN)


@pytest.fixture
def party(new_round: NewRound, tmp_path: Path, dtl: Cli) -> Party:
    round_ = new_round(FOUR, masks=True)
    make_data(dtl, tmp_path)
    found = Party(round_, Hand({}), tmp_path)
    found.courier.nodes = {name: found.load(name) for name in FOUR}
    return found


def make_data(dtl: Cli, folder: Path) -> None:
    shards = folder / "shards"
    dtl("split-data", "digits", "--participants", ",".join(FOUR), "--out", shards)
    first = ("--data", shards / "a.npz", "--hidden", 4)
    dtl("init-model", *first, "-o", folder / "w0.safetensors")


def by_hand(
    round_: Round, folder: Path, rounds: int, absent: dict[int, str]
) -> dict[str, np.ndarray[Any, Any]]:
    """The same run with commands; returns the last model."""
    dtl, server = round_.dtl, ("--key", round_.key("server"))
    base: tuple[object, ...] = ("--initial", folder / "w0.safetensors")
    model, release = folder / "w0.safetensors", folder / "none"
    for number in range(1, rounds + 1):
        names = [name for name in FOUR if name not in absent.get(number, "")]
        uploads = []
        for name in names:
            grads, upload = folder / f"{name}.grads.safetensors", folder / f"{name}-{number}.upload"
            if number > 1:
                model = round_.open(release, name, "--force", out=f"{name}.model.safetensors")
            data = ("--data", folder / "shards" / f"{name}.npz", "--local-epochs", 1)
            dtl("compute-grads", "--model", model, *data, "-o", grads, "--force")
            own = ("--key", round_.key(name), "--rounding-seed", f"s-{name}-{number}")
            dtl("encrypt-grads", grads, *own, "-o", upload)
            uploads.append(upload)
        closing: tuple[object, ...] = ()
        if len(names) < len(FOUR):
            close = folder / f"{number}.close"
            dtl("close-round", *uploads, *server, "-o", close)
            reveals = [folder / f"{name}-{number}.reveal" for name in names]
            for name, reveal in zip(names, reveals, strict=True):
                dtl("reveal-masks", close, "--key", round_.key(name), "-o", reveal)
            closing = ("--close", close, "--reveals", *reveals)
        result, release = folder / f"{number}.enc", folder / f"{number}.release"
        dtl("aggregate", *uploads, *server, *base, *closing, "-o", result)
        dtl("release-model", result, *server, "-o", release)
        base = ("--model", result)
    found: dict[str, np.ndarray[Any, Any]] = load_file(
        round_.open(release, "a", out="last.safetensors")
    )
    return found


def opened(party: Party, name: str) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = load_file(
        party.folder / f"{name}-files" / "model.safetensors"
    )
    return found


def test_a_run_equals_the_run_by_hand_and_verifies(
    party: Party, new_round: NewRound, tmp_path: Path
) -> None:
    absent = {2: "c"}
    party.courier.absent = absent
    party.conduct(3)
    other = new_round(FOUR, folder="hand", masks=True)
    make_data(other.dtl, other.folder)
    expected = by_hand(other, other.folder, 3, absent)
    for name in FOUR:
        found = opened(party, name)
        assert all((found[tensor] == expected[tensor]).all() for tensor in expected)
    assert [party.manifest(n)["missing"] for n in (1, 2, 3)] == [[], ["c"], []]
    assert party.manifest(3)["contributions"] == {"a": 3, "b": 3, "c": 2, "d": 3}
    rounds = tmp_path / "rounds"
    models = [rounds / f"{n:03}" / "model.enc" for n in (3, 2, 1)]
    evidence = [
        *("--model", models[1], "--model", models[2], "--initial", tmp_path / "w0.safetensors"),
        *("--uploads", *rounds.glob("*/*.upload"), "--reveals", *rounds.glob("*/*.reveal")),
    ]
    job = ("--job", party.round.keys / "job.json")
    verified = party.round.dtl("verify", models[0], *job, *evidence, "--json").json
    assert verified["rounds_recomputed"] == 3


def test_files_of_a_run_and_of_the_hand_mix(party: Party, tmp_path: Path) -> None:
    """One participant works by hand: its upload is laid into the folder of the round."""
    party.courier.nodes.pop("d")
    folder = tmp_path / "rounds" / "001"
    folder.mkdir(parents=True)
    grads = tmp_path / "d.grads.safetensors"
    model = ("--model", tmp_path / "w0.safetensors", "--data", tmp_path / "shards" / "d.npz")
    party.round.dtl("compute-grads", *model, "-o", grads)
    own = ("--key", party.round.key("d"))
    party.round.dtl("encrypt-grads", grads, *own, "-o", folder / "d.upload")
    release = party.conduct(1)
    assert party.manifest(1)["contributors"] == list(FOUR)
    by_hand_opened = party.round.opened(release, "d")
    assert all((by_hand_opened[t] == array).all() for t, array in opened(party, "a").items())


def test_who_was_never_there_is_admitted_when_it_comes(party: Party) -> None:
    party.courier.absent = {1: "d", 2: "d"}
    party.courier.nodes.pop("d")
    party.conduct(2)  # not there: an admission would be lost
    party.courier.nodes["d"] = party.load("d")
    party.courier.absent = {}
    party.courier.now = 3
    party.conduct(4)
    asked = {number: names for step, number, names in party.courier.steps if step == CONTRIBUTE}
    assert asked[3] == ("a", "b", "c")
    assert asked[4] == FOUR
    assert party.manifest(4)["contributions"] == {"a": 4, "b": 4, "c": 4, "d": 1}


def test_somebody_without_a_node_works_by_hand(
    party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    d, rounds = party.courier.nodes.pop("d"), party.folder / "rounds"
    party.courier.absent = {2: "c"}

    def lay(seconds: float) -> None:
        """What d does while the server waits."""
        number = party.courier.now
        folder, before = rounds / f"{number:03}", rounds / f"{number - 1:03}"
        if (close := folder / "round.close").exists():
            (folder / "d.reveal").write_bytes(d.reveal(number, close.read_bytes()))
        else:
            base = before / "model.release" if number > 1 else party.folder / "w0.safetensors"
            (folder / "d.upload").write_bytes(d.contribute(number, base.read_bytes()))

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lay)
    monkeypatch.setattr("dtl.core.flower.rounds.time", clock)
    party.conduct(2, by_hand="d")
    assert [party.manifest(n)["missing"] for n in (1, 2)] == [[], ["c"]]
    assert party.manifest(2)["contributions"]["d"] == 2


HandClock = Callable[[Callable[[int], None]], None]


@pytest.fixture
def hand_clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    """A clock that stands still but when the server waits: then a hand acts, and a second goes."""

    def set_hand(act: Callable[[int], None]) -> None:
        seconds = 0

        def sleep(_: float) -> None:
            nonlocal seconds
            seconds += 1
            act(seconds)

        clock = SimpleNamespace(monotonic=lambda: seconds, sleep=sleep)
        monkeypatch.setattr("dtl.core.flower.rounds.time", clock)

    return set_hand


def test_files_that_are_copied_in_pieces_count_when_they_are_complete(
    party: Party, hand_clock: HandClock
) -> None:
    d, folder = party.courier.nodes.pop("d"), party.folder / "rounds" / "001"
    party.courier.absent = {1: "c"}
    parts: dict[str, list[bytes]] = {}

    def copy(_: int) -> None:
        """Half a file at a time, the upload and then the reveal."""
        if (close := folder / "round.close").exists():
            ending, data = "reveal", d.reveal(1, close.read_bytes())
        else:
            first = party.folder / "w0.safetensors"
            ending, data = "upload", d.contribute(1, first.read_bytes())
        if ending not in parts:
            parts[ending] = [data[: len(data) // 2], data[len(data) // 2 :]]
        if parts[ending]:
            with (folder / f"d.{ending}").open("ab") as file:
                file.write(parts[ending].pop(0))

    hand_clock(copy)
    party.conduct(1, by_hand="d")
    assert parts == {"upload": [], "reveal": []}
    assert party.manifest(1)["missing"] == ["c"]


@pytest.mark.parametrize("bad", ["half", "another's", "another base", "words", "unreadable"])
def test_an_upload_by_hand_that_is_no_good_in_time_counts_as_missing_and_stays(
    party: Party, hand_clock: HandClock, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    d, folder = party.courier.nodes.pop("d"), party.folder / "rounds" / "001"
    first = (party.folder / "w0.safetensors").read_bytes()
    laid = folder / "d.upload"

    def lay(second: int) -> None:
        if second != 1:
            return
        if bad == "half":
            laid.write_bytes(d.contribute(1, first)[:-1])
        elif bad == "another's":
            laid.write_bytes((folder / "a.upload").read_bytes())
        elif bad == "another base":
            other = party.folder / "w1.safetensors"
            data = ("--data", party.folder / "shards" / "d.npz", "--hidden", 4, "--seed", 1)
            party.round.dtl("init-model", *data, "-o", other)
            laid.write_bytes(d.contribute(1, other.read_bytes()))
        elif bad == "words":  # a body that cannot be added up
            encode = lattice._LatticeEncoder.encode

            def too_large(*arguments: Any) -> Encoded:
                found = encode(*arguments)
                return dataclasses.replace(found, body=b"\xff" * len(found.body))

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lattice._LatticeEncoder, "encode", too_large)
                laid.write_bytes(d.contribute(1, first))
        else:
            laid.mkdir()

    hand_clock(lay)
    with caplog.at_level("WARNING", "flwr.dtl"):
        try:
            party.conduct(1, by_hand="d")
        except FormatError as error:
            pytest.fail(f"the round ends: {error.message}")
    assert party.manifest(1)["missing"] == ["d"]
    assert laid.exists()
    why = "the body holds a word that is out of range" if bad == "words" else ""
    assert (f"{laid}: {why}" if why else f"{laid} does not count: ") in caplog.text


@pytest.mark.parametrize("bad", ["half", "another's", "another close file"])
def test_a_reveal_by_hand_that_is_no_good_ends_the_round_and_not_the_run(
    party: Party, hand_clock: HandClock, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    d, folder = party.courier.nodes["d"], party.folder / "rounds" / "001"
    party.courier.absent = {1: "cd"}
    first = (party.folder / "w0.safetensors").read_bytes()
    laid = folder / "d.reveal"

    def lay(_: int) -> None:
        if not (close := folder / "round.close").exists():
            (folder / "d.upload").write_bytes(d.contribute(1, first))
        elif not laid.exists():
            data = d.reveal(1, close.read_bytes())
            if bad == "another's":
                data = (folder / "a.reveal").read_bytes()
            elif bad == "another close file":
                data = made_for_another_close(party, data)
            laid.write_bytes(data[:-9] if bad == "half" else data)

    hand_clock(lay)
    with caplog.at_level("WARNING", "flwr.dtl"), pytest.raises(QuorumError, match="is void"):
        party.conduct(1, by_hand="d")
    assert "no reveal of d" in (folder / "void").read_text()
    assert laid.exists()
    assert f"{laid} does not count: " in caplog.text


def made_for_another_close(party: Party, reveal: bytes) -> bytes:
    """The reveal with another close file's digest, signed by d."""
    values = Reveal.decode(reveal, "reveal").plain() | {"close": "00" * 64}
    key = party.round.opened_key("d")
    return Reveal.signed(key.secrets.sign, **values).encode()


def test_a_node_with_an_upload_on_another_base_does_not_end_the_run(party: Party) -> None:
    other = party.folder / "w1.safetensors"
    data = ("--data", party.folder / "shards" / "d.npz", "--hidden", 4, "--seed", 1)
    party.round.dtl("init-model", *data, "-o", other)

    party.courier.nodes["d"].contribute(1, other.read_bytes())  # kept, and sent when asked
    party.conduct(1)
    assert party.manifest(1)["missing"] == ["d"]


def test_nobody_is_asked_for_an_upload_once_the_round_is_closed(party: Party) -> None:
    class Stop(Exception):
        pass

    def stop(step: str, name: str, number: int, data: bytes) -> bytes:
        if step == REVEAL:
            raise Stop
        return data

    party.courier.absent = {1: "d"}
    party.courier.spoil = stop
    with pytest.raises(Stop):
        party.conduct(1)
    party.courier.absent, party.courier.spoil = {}, lambda step, name, number, data: data
    party.courier.steps.clear()
    party.conduct(1)
    assert [step for step, _, _ in party.courier.steps] == [REVEAL, RELEASE]
    assert party.manifest(1)["missing"] == ["d"]


def test_a_node_cannot_deliver_what_another_made(party: Party) -> None:
    made: dict[str, bytes] = {}

    def swap(step: str, name: str, number: int, data: bytes) -> bytes:
        made[name] = data
        return made["a"] if step == CONTRIBUTE and name == "d" else data

    party.courier.spoil = swap
    party.conduct(1)
    assert party.manifest(1)["missing"] == ["d"]
    assert not (party.folder / "rounds" / "001" / "d.upload").exists()


def test_a_spoilt_upload_counts_as_missing(party: Party) -> None:
    def spoil(step: str, name: str, number: int, data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1]) if name == "b" else data

    party.courier.spoil = spoil
    party.conduct(1)
    assert party.manifest(1)["missing"] == ["b"]


def test_a_void_round_is_begun_anew_where_the_participants_allow_it(party: Party) -> None:
    party.courier.absent = {1: "cd"}
    with pytest.raises(QuorumError, match="round 1 is void"):
        party.conduct(1)
    party.courier.absent = {}
    with pytest.raises(QuorumError, match="round 2 is void"):
        party.conduct(2)
    assert [line[:2] for line in party.courier.failures] == ["a:", "b:"]
    assert all("NotAllowedError" in line for line in party.courier.failures)
    allowed = {"accept-differencing": True}
    party.courier.nodes = {name: party.load(name, **allowed) for name in FOUR}
    party.conduct(3)
    assert party.manifest(3)["contributors"] == list(FOUR)


def test_an_interrupted_run_is_taken_up_where_it_stopped(party: Party) -> None:
    class Stop(Exception):
        pass

    def stop(step: str, name: str, number: int, data: bytes) -> bytes:
        if (name, number) == ("c", 2):
            raise Stop
        return data

    party.courier.spoil = stop
    with pytest.raises(Stop):
        party.conduct(2)
    party.courier.spoil = lambda step, name, number, data: data
    party.courier.steps.clear()
    party.conduct(2)
    # Round 1 is done, the uploads of a and b are there; c sends again the one that it made.
    assert party.courier.steps == [(CONTRIBUTE, 2, ("c", "d")), (RELEASE, 2, FOUR)]
    assert not party.courier.failures
    assert party.manifest(2)["contributors"] == list(FOUR)


def test_reveals_that_do_not_come_make_a_round_void(party: Party) -> None:
    party.courier.absent = {1: "d"}

    def lose(step: str, name: str, number: int, data: bytes) -> bytes:
        return b"" if (step, name) == (REVEAL, "b") else data

    party.courier.spoil = lose
    with pytest.raises(QuorumError, match="round 1 is void"):
        party.conduct(1)
    reason = (party.folder / "rounds" / "001" / "void").read_text()
    assert "no reveal of b" in reason


def test_a_users_own_model_trains_through_one_function(party: Party, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USERS_OWN)
    own = {"local-update": f"{tmp_path / 'mine.py'}:local_update", "step": 0.25}
    party.courier.nodes = {name: party.load(name, **own) for name in FOUR}
    party.conduct(1)
    before = load_file(tmp_path / "w0.safetensors")
    for name, array in opened(party, "c").items():
        # Four quarters of a quarter; stochastic rounding leaves whole numbers alone.
        assert np.abs(array - (before[name] - 0.25)).max() < 2**-15
    party.conduct(2)  # the gradients say on which content they were computed
    assert not party.courier.failures


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def other(): ...", "no function local_update"),
        ("def local_update(arrays, context): return {}", "names and shapes"),
    ],
)
def test_a_function_that_does_not_fit(party: Party, tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    node = party.load("a", **{"local-update": f"{tmp_path / 'mine.py'}:local_update"})
    with pytest.raises(UsageError, match=reason):
        node.contribute(1, (tmp_path / "w0.safetensors").read_bytes())
    with pytest.raises(UsageError, match=r"expected FILE\.py:FUNCTION"):
        party.load("a", **{"local-update": "nowhere"}).contribute(
            1, (tmp_path / "w0.safetensors").read_bytes()
        )


def test_a_node_that_is_not_configured(party: Party) -> None:
    with pytest.raises(UsageError, match="does not name data, folder"):
        Node.load({"key": "x"}, {})


# --- nodes that recompute what they open ----------------------------------------------------


def attempts(party: Party, name: str) -> list[TriedEntry]:
    with Ledger(party.round.opened_key(name)) as ledger:
        return ledger.find(TriedEntry)


def test_a_node_recomputes_a_release_before_its_half_is_used(party: Party) -> None:
    party.courier.nodes = {name: party.load(name, recompute=True) for name in FOUR}
    party.courier.absent = {2: "c"}
    party.conduct(3, send_uploads=True)
    assert not party.courier.failures
    assert [party.manifest(n)["missing"] for n in (1, 2, 3)] == [[], ["c"], []]
    assert {"model", *(f"upload-{n}" for n in range(4))} == set(party.courier.along)


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda first, count: data


def test_a_node_that_recomputes_never_tries_a_result_that_its_uploads_do_not_give(
    party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server signs the result with one value changed, and proves its release honestly."""

    def off_by_one(job: Job, *given: Any) -> Iterator[bytes]:
        codec, pieces = job.codec, list(results.bodies(job, *given))
        values = given[0][0].header.values
        one = np.zeros(values, np.int64)
        one[0] = 1
        for batch, piece in zip(codec.batches(values), pieces, strict=True):
            change = codec.combine_body(values, batch, (), (), None, one)
            yield codec.combine_body(values, batch, [reader(change)], (), reader(piece), None)

    lying = SimpleNamespace(**vars(results) | {"bodies": off_by_one})
    monkeypatch.setattr("dtl.core.roles.server.aggregating.results", lying)
    party.courier.nodes |= {name: party.load(name, recompute=True) for name in "abc"}
    party.conduct(1, send_uploads=True)
    assert [line[:20] for line in party.courier.failures] == [
        f"{name}: VerificationError"[:20] for name in "abc"
    ]
    assert all("are not the sum of the uploads" in line for line in party.courier.failures)
    assert [len(attempts(party, name)) for name in FOUR] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("along", "error"),
    [
        ({}, UsageError),
        ({"initial": b""}, UsageError),
        ({"upload-0": b"", "../model": b""}, FormatError),
        ({"upload-0": b""}, FormatError),
    ],
)
def test_a_node_that_recomputes_opens_nothing_without_the_uploads(
    party: Party, along: dict[str, bytes], error: type[DtlError]
) -> None:
    release = party.conduct(1).read_bytes()
    before = len(attempts(party, "a"))
    with pytest.raises(error):
        party.load("a", recompute=True).receive(release, along)
    assert len(attempts(party, "a")) == before
    assert not list((party.folder / "a-files").glob(".along-*"))


def test_after_an_attempt_that_failed_a_node_opens_nothing_more(party: Party) -> None:
    """Only a person says `--after-failure`: no configuration of a node or a run does."""
    party.conduct(1)
    good = party.folder / "rounds" / "001" / "model.release"
    with Ledger(party.round.opened_key("a")) as ledger:
        (entry,) = ledger.find(TriedEntry)
        ledger.append(
            entry.model_copy(update={"round": 9, "result": "0" * 128, "release": "1" * 128})
        )
    eager = {"after-failure": True, "after_failure": True}
    node = party.load("a", **eager)
    with pytest.raises(NotAllowedError, match="has failed before"):
        Node(node.key, node.folder, node.own, {**node.settings, **eager}).receive(good.read_bytes())


# --- what Flower needs -----------------------------------------------------------------------


def config(round_: Round, *options: object, code: int = 0) -> Result:
    folder = round_.folder
    given = ("--key", round_.key("server"), "--initial", folder / "w0.safetensors")
    return round_.dtl("flower-config", folder / "run", *given, "--rounds", 2, *options, code=code)


def test_the_configuration_of_a_run(new_round: NewRound) -> None:
    round_ = new_round(FOUR, masks=True)
    make_data(round_.dtl, round_.folder)
    given = ("--local-lr", 0.5, "--registered-only", "--by-hand", "b,c")
    config(round_, *given, "--superlink", "localhost:1")
    app = tomllib.loads((round_.folder / "run" / "app" / "pyproject.toml").read_text())
    settings = app["tool"]["flwr"]["app"]["config"]
    assert settings["key"] == str(round_.key("server"))
    assert (settings["rounds"], settings["local-lr"]) == (2, 0.5)
    assert settings["registered-only"] is True
    assert settings["by-hand"] == "b,c"
    link = tomllib.loads((round_.folder / "run" / "config.toml").read_text())["superlink"]
    assert link[link["default"]] == {"address": "localhost:1", "insecure": True}
    config(round_, code=2)  # exists
    (round_.folder / "run").rename(round_.folder / "other")
    config(round_, "--by-hand", "b,zoe", code=2)


def test_a_name_that_toml_would_read_otherwise_is_refused(new_round: NewRound) -> None:
    round_ = new_round(FOUR)
    make_data(round_.dtl, round_.folder)
    found = config(round_, "--superlink", 'x"\nkey = "y', code=2)
    assert "cannot stand here" in found.err


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("--round-timeout", "-5", 2),
        ("--round-timeout", "nan", 2),
        ("--start-timeout", "0", 2),
        ("--start-timeout", "inf", 2),
        ("--local-epochs", "-3", 2),
        ("--batch-size", "0", 2),
        ("--local-lr", "nan", 2),
        ("--seed", "-1", 2),
        ("--initial", "nonexisting.safetensors", 2),
        ("--root-certificates", "nonexisting.pem", 2),
        ("--initial", "job/job.json", 3),
        ("--initial", "shards/a.npz", 3),
        ("--initial", "gradients.safetensors", 3),
    ],
)
def test_a_configuration_that_cannot_be(
    new_round: NewRound, option: str, value: str, code: int
) -> None:
    round_ = new_round(FOUR, masks=True)
    folder = round_.folder
    make_data(round_.dtl, folder)
    data = ("--model", folder / "w0.safetensors", "--data", folder / "shards" / "a.npz")
    round_.dtl("compute-grads", *data, "-o", folder / "gradients.safetensors")
    named = option in ("--initial", "--root-certificates")
    found = config(round_, option, folder / value if named else value, code=code)
    assert (value if named else option) in found.err
    assert not (folder / "run").exists()


@pytest.mark.parametrize("found", [-1, 0, True, "60", float("nan"), float("inf")])
def test_a_run_that_was_configured_otherwise_wants_numbers_too(found: object) -> None:
    pytest.importorskip("flwr")
    from dtl.core.flower import server

    context: Any = SimpleNamespace(run_config={"round-timeout": found})
    with pytest.raises(UsageError, match="round-timeout: expected a positive number"):
        server._number(context, "round-timeout", 1)


def test_without_the_extra_the_hint_says_what_to_install(
    dtl: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "pyproject.toml").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for part in ("superlink", "supernode", "run"):
        assert "dtl-toolkit[flower]" in dtl("flower", part, tmp_path, code=2).err


def test_the_base_install_imports_no_engine() -> None:
    code = (
        "import sys, dtl.cli.app, dtl.core.roles.server, dtl.core.roles.participant,"
        "dtl.core.flower.rounds, dtl.core.flower.node, dtl.core.flower.config;"
        "print([m for m in ('flwr', 'dask', 'distributed', 'ray', 'torch') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_what_calls_other_machines_is_off_before_anything_of_flower_is_imported() -> None:
    code = (
        "import os, sys, dtl.core.flower;"
        "assert 'flwr' not in sys.modules;"
        "print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['FLWR_DISABLE_UPDATE_CHECK'])"
    )
    on = os.environ | {"FLWR_TELEMETRY_ENABLED": "1"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=on, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["0", "1"]


FAILURES = (
    ValueError("patient 17 weighs 81.5"),
    SystemExit("patient 17"),
    UsageError("patient 17: no such file"),
    FormatError("patient 17"),
    VerificationError("the result cannot be opened"),
    NotAllowedError("not granted"),
    NumericError("patient 17 diverged"),
)


def test_a_node_tells_that_a_step_failed_and_nothing_of_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("flwr")
    from dtl.core.flower import client, payload

    told, message = set(), SimpleNamespace(content=payload.pack(round=1))
    for error in FAILURES:

        def fail(node: Node, number: int, error: BaseException = error) -> bytes:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Node, "load", lambda own, run: None)
            patch.setattr(client, "Message", lambda content, reply_to: content)
            context = SimpleNamespace(node_config={}, run_config={})
            reply: Any = client._answer(message, context, fail)
        assert payload.is_failure(reply)
        told.add(repr(reply))
    assert len(told) == 1
    assert "patient" not in told.pop()
    assert "patient 17 diverged" in caplog.text  # in the node's own log


def test_the_server_says_that_a_step_failed_and_where_to_look(
    party: Party, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("flwr")
    from dtl.core.flower import payload, server

    nodes = server.Nodes(SimpleNamespace(), party.round.job, 1, False)
    reply = payload.pack_failure()
    reply.config_records["dtl"]["code"] = 7  # whatever a node says besides is not read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "_nodes", lambda: {5: "a"})
        patch.setattr(nodes, "_exchange", lambda *_: iter([(5, reply)]))
        with caplog.at_level("WARNING", "flwr.dtl"):
            answers = list(nodes.ask(CONTRIBUTE, ["a"], 1, party.folder / "w0.safetensors"))
    assert answers == []
    assert [r.getMessage() for r in caplog.records] == [
        "round 1: contribute: a step failed at a; its own log says why"
    ]


def test_a_message_carries_a_file_and_what_comes_along() -> None:
    pytest.importorskip("flwr")
    from dtl.core.flower import payload

    content = payload.pack(b"some bytes", {"upload-0": b"more"}, round=3)
    assert payload.file_of(content) == b"some bytes"
    assert payload.along_of(content) == {"upload-0": b"more"}
    assert payload.along_of(payload.pack(b"x")) == {}
    assert not payload.is_failure(content)


def test_real_processes(new_round: NewRound, dtl: Cli, tmp_path: Path) -> None:
    """One round of three nodes and one that fails; then a run that fails as a whole."""
    pytest.importorskip("flwr")
    round_ = new_round(FOUR, masks=True)
    make_data(dtl, tmp_path)
    network = Network(tmp_path)
    try:
        for name in "abc":
            network.node(name)
        network.node("d", data="shards/patient-17.npz")
        place = ("--superlink", network.address, "--files", tmp_path / "rounds")
        config(round_, *place, "--rounds", 1, "--round-timeout", 60)
        assert network.run("run").wait(240) == 0, network.log()
        assert "contribute: a step failed at d; its own log says why" in network.log()
        assert "UsageError" not in network.log()
        assert "patient-17" not in network.log()
        assert "patient-17.npz: no such file" in network.log("d")
        # A run that fails makes the command fail, though Flower itself ends with code 0.
        (tmp_path / "run").rename(tmp_path / "first")
        config(round_, *place, "--files", tmp_path / "again")
        (tmp_path / "w0.safetensors").rename(tmp_path / "lost.safetensors")
        assert network.run("run").wait(120) == 1, network.log()
        assert "dtl: error: the run failed: finished:failed" in network.log()
    finally:
        network.close()
    found = dtl("inspect", tmp_path / "rounds" / "001" / "model.enc", "--json").json
    assert found["missing"] == ["d"]
    models = [load_file(tmp_path / f"{name}-files" / "model.safetensors") for name in "abc"]
    assert all((model[t] == models[0][t]).all() for model in models for t in models[0])
