"""Section 7 and ledgers: the chain, and what it says has been done."""

from pathlib import Path
from typing import Any

from tests.second import encoding
from tests.second.documents import FORMAT, Key, name, names
from tests.second.encoding import (
    Refused,
    digest_or_null,
    dumps,
    exactly,
    from_hex,
    hashed,
    integer,
    require,
)

EVENTS = {
    "ledger": "format ledger name",
    "upload": "round base opened upload",
    "reveal": "round close",
    "open": "round result parent opened admitted",
    "aggregate": "round base uploads content created result",
    "close": "round base uploads digest created",
    "release": "round base result grants admitted",
}
DIGESTS = ("upload", "close", "result", "content", "digest")
Entry = dict[str, Any]


def _check(entry: Entry) -> None:
    kind = encoding.text(entry.get("event"))
    require(kind in EVENTS, 4, "an unknown event")
    exactly(entry, f"event link {EVENTS[kind]}")
    for field, value in entry.items():
        if field == "round":
            integer(value, 1, 2**32 - 1)
        elif field in DIGESTS or (field == "opened" and kind == "open"):
            from_hex(value, 64)
        elif field in ("base", "parent", "opened"):
            digest_or_null(value)
        elif field in ("grants", "admitted"):
            names(value)
        elif field == "uploads":
            for participant, digest in value.items():
                name(participant)
                from_hex(digest, 64)


def _is_torn(line: bytes) -> bool:
    """Whether a last line is the beginning of one, and no more."""
    written = line.rstrip(b"\0")
    still_open = written.count(b"{") > written.count(b"}")
    return not written or (written[:1] == b"{" and still_open)


def read(path: Path, key: Key) -> list[Entry]:
    """The entries of a party's ledger, without the first."""
    require(path.exists(), 5, "the ledger is missing")
    lines = path.read_bytes().split(b"\n")
    if _is_torn(lines[-1]):
        lines.pop()
    entries, link = [], b""
    for line in lines:
        try:
            entry = encoding.loads(line)
            require(isinstance(entry, dict), 4, "not an object")
            _check(entry)
        except Refused as error:
            raise Refused(4, f"a damaged line: {error}") from error
        unlinked = {field: value for field, value in entry.items() if field != "link"}
        link = hashed("dtl/v2/ledger", link, dumps(unlinked))
        require(entry["link"] == link.hex(), 4, "the chain is broken")
        entries.append(entry)
    first = {"event": "ledger", "format": FORMAT, "ledger": key.ledger, "name": key.name}
    require(entries, 4, "an empty ledger")
    found = {field: value for field, value in entries.pop(0).items() if field != "link"}
    require(found == first, 4, "another ledger")
    return entries


def find(entries: list[Entry], event: str, **fields: object) -> list[Entry]:
    return [
        entry
        for entry in entries
        if entry["event"] == event and all(entry[name] == fields[name] for name in fields)
    ]
