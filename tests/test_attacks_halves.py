"""A server that signs whatever it likes learns nothing of half b from what a participant does.

The attack on v1 is carried out first, with v1's arithmetic on plain integers. Then hostile
releases go through the real open_release and through a node of Flower, with two different halves:
code, message, ledger and files are the same, byte for byte. `DTL_ATTACKS=2000` makes that many.
"""

import importlib
import os
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtl.core.crypto import primitives
from dtl.core.crypto.residues import Bytes, from_integers, to_integers
from dtl.core.errors import DtlError
from dtl.core.files.job_file import Job, signed_digest
from dtl.core.files.key_file import Key
from dtl.core.flower.node import Node
from dtl.core.roles import participant
from tests.forging import Forged, Held, Server, held, sum_header
from tests.helpers import THREE, Round

NewRound = Callable[..., Round]
COUNT = int(os.environ.get("DTL_ATTACKS", "66"))
VALUES = 8


# --- the attack on v1 ----------------------------------------------------------------------------


@dataclass(frozen=True)
class V1Participant:
    """open-model of v1, for one component: c_0 is a number modulo N^2, and carries what it may."""

    n: int
    half: int
    slot_bits: int = 24

    @property
    def slots(self) -> int:
        return (self.n.bit_length() - 2) // self.slot_bits

    @property
    def offset(self) -> int:
        """What makes all slots of a block positive."""
        step = self.slot_bits
        return sum(1 << (step - 1 + step * i) for i in range(self.slots))

    def code(self, c_0: int, c_j: int) -> int:
        """The exit code: 4 for a block that does not open or fit, 7 for a value out of range."""
        n2 = self.n**2
        u = c_j * pow(c_0, -self.half, n2) % n2
        if u % self.n not in (1, self.n - 1):
            return 4
        u = u if u % self.n == 1 else n2 - u
        block = (u - 1) // self.n
        block -= self.n if block > self.n // 2 else 0
        shifted = block + self.offset
        if not 0 <= shifted < 1 << self.slot_bits * self.slots:
            return 4
        mask, centre = (1 << self.slot_bits) - 1, 1 << (self.slot_bits - 1)
        digits = [(shifted >> self.slot_bits * i & mask) - centre for i in range(self.slots)]
        return 7 if max(map(abs, digits)) >= 1 << (self.slot_bits - 2) else 0


def v1_queries(n: int, half_bits: int, accepts: Callable[[int, int], bool]) -> Iterator[int]:
    """Bisect the interval in which b lies: one signed release a bit. Yields the lower bound."""
    told = V1Participant(n, 0)
    top = (1 << told.slot_bits * told.slots) - told.offset - 1  # the largest block that fits
    low, width = 0, 1 << half_bits
    while width > 1:
        width = (width + 1) // 2
        x = max(1, (1 << told.slot_bits * told.slots - 2) // width)
        # y - x b fits if, and only if, b is in the upper half.
        y = top + x * (low + width)
        if accepts(1 + x * n, 1 + y % n * n):
            low += width
        yield low


def test_v1_gave_the_participants_half_away_bit_by_bit(new_round: NewRound) -> None:
    round_ = new_round(THREE)
    for b_j in round_.opened_key("alice").half[:2]:
        victim = V1Participant(round_.job.N, b_j)
        bounds = list(v1_queries(victim.n, 257, lambda *c: victim.code(*c) != 4))  # noqa: B023
        assert bounds[-1] == b_j
        assert len(bounds) == 257  # releases for one component


# --- two halves ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A server, and a participant whose half goes with the server's."""

    server: Server
    key: Held


@dataclass(frozen=True)
class Seen:
    """All that anybody can see of an attempt to open."""

    code: int
    text: str
    ledger: bytes
    output: bytes | None
    left: tuple[str, ...]

    def named(self) -> "Seen":
        """The same with digests by the order in which they come, for jobs of other digests."""
        order: dict[bytes, bytes] = {}

        def name(match: re.Match[bytes]) -> bytes:
            return order.setdefault(match[0], f"{len(order):0128}".encode())

        def replaced(data: bytes) -> bytes:
            return re.sub(rb"[0-9a-f]{128}", name, data)

        output = replaced(self.output) if self.output is not None else None
        return Seen(self.code, self.text, replaced(self.ledger), output, self.left)


def attempt(side: Side, release: Path, through: Callable[[Key, Path, Path], None]) -> Seen:
    """One attempt to open, with a ledger that knows of no other."""
    ledger, folder = side.key.ledger_path, release.parent / "opening"
    head = ledger.read_bytes()
    folder.mkdir(exist_ok=True)
    output, code, text = folder / "model.safetensors", 0, ""
    try:
        through(side.key, release, output)
    except DtlError as error:
        code, text = error.exit_code, f"{error.message}\n{error.hint}"
    seen = Seen(
        code,
        text,
        ledger.read_bytes(),
        output.read_bytes() if output.exists() else None,
        tuple(sorted(path.name for path in folder.iterdir())),
    )
    ledger.write_bytes(head)
    for path in folder.iterdir():
        path.unlink()
    return seen


def by_function(key: Key, release: Path, output: Path) -> None:
    participant.open_release(key, release, output)


@pytest.fixture(params=["lattice", "direct"])
def round_(
    new_round: NewRound, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Round:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here is about a crash
    return new_round(THREE, "--cipher", request.param, "--modulus-bits", 256, "--insecure")


def other_half(round_: Round) -> tuple[int, ...]:
    """Another half with the same public key: other integers, the same modulo the group's order.

    So one file is opened by both. v1's c_0 with an N-part told them apart.
    """
    trapdoor, half = round_.opened_key("kgc").trapdoor, round_.opened_key("alice").half
    order = (trapdoor.p - 1) * (trapdoor.q - 1) // 2  # of all lifts
    others = tuple(b % order if b >= order else b + order for b in half)
    assert all(b % 2 == 0 and b < 1 << 257 for b in others)
    return others


def other_split(round_: Round, server: Server, seed: int) -> Side:
    """A job with the same h and another split of a + b, with the same keys for all else."""
    rng, key = random.Random(seed), round_.job.public_key  # noqa: S311
    alice = round_.opened_key("alice")
    moved = [2 * rng.randrange(b // 2) for b in alice.half]
    a = tuple(x + d for x, d in zip(server.half, moved, strict=True))
    a = tuple(x if x < 1 << 257 else old for x, old in zip(a, server.half, strict=True))
    b = tuple(x + y - z for x, y, z in zip(server.half, alice.half, a, strict=True))
    assert a != server.half
    powers = [pow(key.g, x, key.n**2) for x in a]
    plain = round_.job.plain() | {"A": [f"{power:x}" for power in powers]}
    kgc = round_.opened_key("kgc").secrets.sign
    signature = primitives.sign(kgc, "job", bytes.fromhex(signed_digest("job", plain)))
    encoded = primitives.encode_base64(signature)
    job = Job.check(plain | {"signature": encoded}, "")
    other = Server(round_)
    other.job, other.half = job, a
    return Side(other, held(alice, b, job))


# --- hostile releases ----------------------------------------------------------------------------


class Hostile:
    """What a server can make that knows its half and the public key, by kind; from a seed."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.rng = server, random.Random(seed)  # noqa: S311
        self.key, self.job = server.job.public_key, server.job
        self.n, self.n2 = self.key.n, self.key.n**2
        self.groups = self.job.codec.groups(VALUES)
        self.queries = iter(list(self._queries()))

    def _queries(self) -> Iterator[tuple[int, int]]:
        """What the attack on v1 asks, whatever the answers are."""
        asked: list[tuple[int, int]] = []

        def guess(c_0: int, c_j: int) -> bool:
            asked.append((c_0, c_j))
            return self.rng.random() < 0.5

        for _ in range(1 + COUNT // 257):
            list(v1_queries(self.n, 257, guess))
        yield from asked

    def numbers(self, blocks: Bytes | None = None) -> list[list[int]]:
        """Groups as an honest party would encrypt them; without blocks, any blocks."""
        if blocks is None:
            given = [[self.rng.randrange(self.n) for _ in range(7)] for _ in range(self.groups)]
        else:
            given = [to_integers(row) for row in blocks]
        made = []
        for row in given:
            r = self.rng.getrandbits(256)
            c = [
                pow(h, r, self.n2) * (1 + m * self.n) % self.n2
                for h, m in zip(self.key.h, row, strict=True)
            ]
            made.append([pow(self.key.gamma, r, self.n), *c])
        return made

    def forged(self, numbers: list[list[int]], body: Bytes | None = None) -> Forged:
        return self.server.about(sum_header(self.job, VALUES), self.rows(numbers), body)

    def rows(self, numbers: list[list[int]]) -> Bytes:
        flat = [number for row in numbers for number in row]
        width = self.key.arithmetic.width
        return from_integers(flat, width).reshape(len(numbers), -1, width)

    def unit(self, modulus: int) -> int:
        return 1 + self.rng.randrange(modulus - 1)

    def honest(self) -> Forged:
        """A sum of small values."""
        integers = np.array([self.rng.randrange(-99, 99) for _ in range(VALUES)], np.int64)
        codec = self.job.codec
        if not codec.body_bytes(VALUES):
            blocks = codec.public_blocks(integers, self.groups)
            return self.forged(self.numbers(blocks))
        (batch,) = codec.batches(VALUES)
        body = codec.combine_body(VALUES, batch, [], (), None, integers)
        blocks = np.zeros(codec.block_shape(self.groups), np.uint8)
        return self.forged(self.numbers(blocks), np.frombuffer(body, np.uint8))

    def n_part_in_c0(self) -> Forged:
        """The attack on v1, in one group: c_0 = 1 + xN, c_j = 1 + yN."""
        c_0, c_j = next(self.queries)
        numbers = self.numbers()
        numbers[0] = [c_0, *[c_j] * 7]
        return self.forged(numbers)

    def n_part_modulo_n(self) -> Forged:
        """The same where the part is gone: c_0 = 1 in every group."""
        _, c_j = next(self.queries)
        return self.forged([[1, *[c_j] * 7] for _ in range(self.groups)])

    def n_part_in_any_c0(self) -> Forged:
        numbers = self.numbers()
        row = numbers[self.rng.randrange(self.groups)]
        row[0] += self.n * (1 + self.rng.randrange(self.n - 1))
        return self.forged(numbers)

    def any_blocks(self) -> Forged:
        """Blocks of the server's choice, out of every range."""
        return self.forged(self.numbers())

    def any_numbers(self) -> Forged:
        numbers = [
            [self.unit(self.n), *[self.unit(self.n2) for _ in range(7)]] for _ in range(self.groups)
        ]
        return self.forged(numbers)

    def one_number(self) -> Forged:
        made = self.honest()
        numbers = to_integers(made.tensors["residues"])
        place = self.rng.randrange(len(numbers))
        numbers[place] = self.unit(self.n2 if place % 8 else self.n)
        rows = [numbers[i : i + 8] for i in range(0, len(numbers), 8)]
        return self.forged(rows, made.tensors.get("body"))

    def another_exponent(self) -> Forged:
        """w = +- lift(c_0)^(b_j) does not hold for one component, although it is of the group."""
        made = self.honest()
        numbers = to_integers(made.tensors["residues"])
        place = 8 * self.rng.randrange(self.groups) + 1 + self.rng.randrange(7)
        numbers[place] = numbers[place] * pow(self.key.g, self.unit(99), self.n2) % self.n2
        rows = [numbers[i : i + 8] for i in range(0, len(numbers), 8)]
        return self.forged(rows, made.tensors.get("body"))

    def signs(self) -> Forged:
        made = self.honest()
        numbers = to_integers(made.tensors["residues"])
        for place in range(len(numbers)):
            if self.rng.random() < 0.5:
                numbers[place] = (self.n2 if place % 8 else self.n) - numbers[place]
        rows = [numbers[i : i + 8] for i in range(0, len(numbers), 8)]
        return self.forged(rows, made.tensors.get("body"))

    def any_sealed(self) -> Forged:
        """An honest result; sealed with it, numbers of the server's choice."""
        made = self.honest()
        opened = [[self.unit(self.n2) for _ in range(7)] for _ in range(self.groups)]
        made.opened = self.rows(opened)
        return made

    def n_part_in_sealed(self) -> Forged:
        made = self.honest()
        opened = to_integers(made.opened)
        place = self.rng.randrange(len(opened))
        opened[place] = opened[place] * (1 + self.n * self.unit(self.n)) % self.n2
        made.opened = self.rows([opened[i : i + 7] for i in range(0, len(opened), 7)])
        return made


KINDS = (
    Hostile.honest,
    Hostile.n_part_in_c0,
    Hostile.n_part_modulo_n,
    Hostile.n_part_in_any_c0,
    Hostile.any_blocks,
    Hostile.any_numbers,
    Hostile.one_number,
    Hostile.another_exponent,
    Hostile.signs,
    Hostile.any_sealed,
    Hostile.n_part_in_sealed,
)
OPENS = {Hostile.honest: {0}, Hostile.signs: {0}}
REFUSED = {
    Hostile.n_part_in_c0: {3},
    Hostile.n_part_in_any_c0: {3},
    Hostile.any_sealed: {4},
    Hostile.n_part_in_sealed: {4},
}
"""Before half b is used; the others are tried."""


def releases(hostile: Hostile) -> Iterator[tuple[Any, Path]]:
    for number in range(COUNT):
        kind = KINDS[number % len(KINDS)]
        yield kind, kind(hostile).write("hostile.release")


def check_outcome(kind: Any, seen: Seen) -> None:
    """What is expected of a kind, so that the comparison compares something."""
    assert seen.code in REFUSED.get(kind, OPENS.get(kind, {4})), (kind, seen)
    events = re.findall(rb'"event":"([a-z]+)"', seen.ledger)
    tried = [] if kind in REFUSED else [b"tried"]
    assert events == [b"ledger", *tried, *([b"open"] if seen.code == 0 else [])]
    assert (seen.output is None) == (seen.code != 0)


def test_hostile_releases_do_not_tell_two_halves_apart(round_: Round) -> None:
    """The very same files, and two halves that are different integers."""
    server, alice = Server(round_), round_.opened_key("alice")
    sides = [Side(server, held(alice, b)) for b in (alice.half, other_half(round_))]
    for kind, release in releases(Hostile(server, 1)):
        seen = [attempt(side, release, by_function) for side in sides]
        assert seen[0] == seen[1], kind
        check_outcome(kind, seen[0])


def test_v1_did_tell_these_halves_apart(round_: Round) -> None:
    hostile, n = Hostile(Server(round_), 1), round_.job.N
    halves = [round_.opened_key("alice").half, other_half(round_)]
    told = 0
    for c_0, c_j in hostile._queries():
        first, second = (V1Participant(n, half[0], 42).code(c_0, c_j) for half in halves)
        told += first != second
    assert told  # a single query that differs tells them apart


def test_hostile_releases_do_not_tell_two_splits_apart(round_: Round) -> None:
    """Two jobs with the same h, and another a and b: what a server makes by the same recipe."""
    server, alice = Server(round_), round_.opened_key("alice")
    sides = [Side(server, held(alice, alice.half)), other_split(round_, server, 5)]
    both = [releases(Hostile(side.server, 2)) for side in sides]
    for pair in range(COUNT // 2):
        seen = []
        for side, made in zip(sides, both, strict=True):
            kind, release = next(made)
            seen.append(attempt(side, release, by_function))
        assert seen[0].named() == seen[1].named(), (kind, pair)
        check_outcome(kind, seen[0])


def test_a_node_of_flower_does_not_tell_two_halves_apart(
    round_: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node leaves the same files behind, and its answers are the same for every failure."""
    client = load_client(monkeypatch)
    server, alice = Server(round_), round_.opened_key("alice")
    sides = [Side(server, held(alice, b)) for b in (alice.half, other_half(round_))]
    answers = set()
    for number, (kind, release) in enumerate(releases(Hostile(server, 3))):
        if number == 2 * len(KINDS):
            break
        told: list[str] = []
        seen = [attempt(side, release, through_client(client, monkeypatch, told)) for side in sides]
        assert seen[0] == seen[1], kind
        assert told[0] == told[1], kind
        if seen[0].left != ("base", "model.safetensors"):
            answers.add(told[0])
    assert len(answers) == 1  # that it failed, and nothing of why


class Records(dict[str, Any]):
    """Stands for Flower's records: what is in a message, and nothing else."""

    @property
    def config_records(self) -> dict[str, Any]:
        return {name: value for name, value in self.items() if name == "dtl"}

    @property
    def array_records(self) -> dict[str, Any]:
        return {name: value for name, value in self.items() if name == "file"}


def load_client(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The participant's app, where Flower need not be installed."""

    def same(function: Any) -> Any:
        return function

    names = dict.fromkeys(("query", "train", "evaluate"), lambda self, _: same)
    app = types.ModuleType("flwr.app")
    app.__dict__.update(
        RecordDict=Records,
        ConfigRecord=dict,
        ArrayRecord=dict,
        Array=types.SimpleNamespace,
        Message=lambda content, reply_to: content,
        Context=object,
    )
    clientapp = types.ModuleType("flwr.clientapp")
    clientapp.__dict__["ClientApp"] = type("ClientApp", (), names)
    for name, module in (("flwr", types.ModuleType("flwr")), ("flwr.app", app)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "flwr.clientapp", clientapp)
    package = importlib.import_module("dtl.core.flower")
    for name in ("client", "payload"):  # imported anew, here and for whoever comes after this
        monkeypatch.setitem(sys.modules, f"{package.__name__}.{name}", package)
        del sys.modules[f"{package.__name__}.{name}"]
        monkeypatch.setattr(package, name, None, raising=False)
        delattr(package, name)
    return importlib.import_module("dtl.core.flower.client")


def through_client(
    client: Any, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> Callable[[Key, Path, Path], None]:
    """Opens by a message to the node's app; `told` gets what goes back to the server."""

    def through(key: Key, release: Path, output: Path) -> None:
        node = Node(key, output.parent, {}, {})
        monkeypatch.setattr(client.Node, "load", lambda own, run: node)
        content = client.payload.pack(release.read_bytes(), round=1)
        message = types.SimpleNamespace(content=content)
        context = types.SimpleNamespace(node_config={}, run_config={})
        told.append(str(client.release(message, context)))

    return through
