"""How good ledgers become faulty ones, or such as forbid something."""

from collections.abc import Callable

from tests.vectors.command_lines import OTHER
from tests.vectors.scene import (
    Changes,
    Json,
    Scene,
    entries_of,
    linked,
)

Ledger = Callable[[list[Json]], object]
STEP: Json = {
    "event": "step",
    "round": 1,
    "sum": OTHER,
    "content": OTHER,
    "source": "adopt:bob",
}


def unreleased(change: Callable[[Scene], Changes]) -> Callable[[Scene], Changes]:
    """The server has not released the model of round 2 yet."""
    return lambda scene: {
        "job/server.ledger": scene.cut("server", "release", round=2),
        **change(scene),
    }


def before_close(lines: list[bytes]) -> bytes:
    closes = [number for number, line in enumerate(lines) if b'"event":"close"' in line]
    return b"".join(lines[: closes[0]])


def ledger_round(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"round":1', b'"round":9'), *lines[2:]]


def damaged(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1].replace(b'"round"', b'"round\0', 1).rstrip(b"\n")]


def unknown_event(lines: list[bytes]) -> list[bytes]:
    return linked([*entries_of(lines), {"event": "closed", "round": 1}])


def linked_more(lines: list[bytes]) -> list[bytes]:
    entries = entries_of(lines)
    entries[-1]["more"] = 0
    return linked(entries)


def opened_other(entries: list[Json]) -> None:
    for entry in entries:
        if entry["event"] == "open" and entry["round"] == 1:
            entry["opened"] = OTHER


def accepted_other(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "aggregate" and e["round"] == 3)
    entry["uploads"]["alice"] = OTHER


def closed_without(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "close" and e["round"] == 2)
    (added,) = (e for e in entries if e["event"] == "aggregate" and e["round"] == 3)
    others = {name: digest for name, digest in added["uploads"].items() if name != "alice"}
    entries.append(entry | {"round": 3, "uploads": others})


def released_other(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "release" and e["round"] == 3)
    entry["result"] = OTHER


def ledger(name: str, edit: Ledger) -> Callable[[Scene], Changes]:
    """A party's ledger with edited entries and right links."""
    return lambda scene: {f"job/{name}.ledger": scene.relinked(name, edit)}


def tried(number: int, after_failure: bool = False) -> Ledger:
    """One more line: another release of another result was tried."""
    line = {
        "event": "tried",
        "round": number,
        "result": OTHER,
        "release": OTHER,
        "after_failure": after_failure,
    }
    return lambda entries: entries.append(dict(line))


def gone_on(entries: list[Json]) -> None:
    """A failure, and after it an attempt that opened."""
    tried(2**31)(entries)
    opened = next(entry for entry in entries if entry["event"] == "open")
    before = next(e for e in entries if e["event"] == "tried" and e["result"] == opened["result"])
    entries.append(before | {"after_failure": True})


def tried_instead_of_reveal(entries: list[Json]) -> None:
    at = index(entries, "reveal", 2)
    del entries[at:]
    tried(2)(entries)


def begun_anew(entries: list[Json]) -> None:
    at = index(entries, "reveal", 2)
    (sent,) = (e for e in entries if e["event"] == "upload" and e["round"] == 2)
    entries[at:] = [sent | {"round": 9}]


def index(entries: list[Json], event: str, number: int) -> int:
    return next(i for i, e in enumerate(entries) if e["event"] == event and e["round"] == number)


def line_put(event: str, values: Json) -> Callable[[list[bytes]], list[bytes]]:
    """The last line of an event with other values."""

    def edit(lines: list[bytes]) -> list[bytes]:
        entries = entries_of(lines)
        [entry for entry in entries if entry["event"] == event][-1].update(values)
        return linked(entries)

    return edit


def line_added(entry: Json) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: linked([*entries_of(lines), entry])


def event_put(event: str, **values: object) -> Ledger:
    def edit(entries: list[Json]) -> None:
        for entry in entries:
            if entry["event"] == event:
                entry.update(values)

    return edit


def opened_put(field: str) -> Ledger:
    return event_put("open", **{field: OTHER})


def step_other(entries: list[Json]) -> None:
    (opened,) = (entry for entry in entries if entry["event"] == "open")
    entries.append(STEP | {"sum": opened["result"], "source": "apply-sum"})
