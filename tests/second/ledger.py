"""Section 7 and ledgers: the chain, and what it says has been done."""

import re
from pathlib import Path
from typing import Any

from tests.second import encoding
from tests.second.documents import Key, name
from tests.second.encoding import (
    FORMAT,
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
    "tried": "round result release after_failure",
    "open": "round kind result parent opened content admitted",
    "step": "round sum content source",
    "aggregate": "round base uploads content created result",
    "close": "round base uploads digest created",
    "release": "round base result grants admitted",
}
DIGESTS = ("upload", "close", "result", "content", "digest", "sum")
SOURCE = r"apply-sum|own-step|adopt:[a-z0-9][a-z0-9._-]{0,63}"
Entry = dict[str, Any]


def _check(entry: Entry) -> None:
    kind = encoding.text(entry.get("event"))
    require(kind in EVENTS, 4, "an unknown event")
    exactly(entry, f"event link {EVENTS[kind]}")
    for field, value in entry.items():
        if field == "round":
            integer(value, 1, 2**32 - 1)
        elif field in DIGESTS or (field, kind) in (("opened", "open"), ("release", "tried")):
            from_hex(value, 64)
        elif field == "after_failure":
            require(type(value) is bool, 4, "after_failure must be true or false")
        elif field == "kind":
            require(value in ("model", "sum"), 4, "an unknown kind")
        elif field == "source":
            require(re.fullmatch(SOURCE, encoding.text(value)), 4, "an unknown source")
        elif field in ("base", "parent", "opened"):
            digest_or_null(value)
        elif field in ("grants", "admitted"):
            require(isinstance(value, list), 4, "not a list of names")
            for item in value:
                name(item)
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
    entries: list[Entry] = []
    link, older = b"", False
    for line in lines:
        try:
            entry = encoding.loads(line)
            require(isinstance(entry, dict), 4, "not an object")
            if not entries and str(entry.get("format")).startswith("dtl/v1"):
                older = True
                break
            _check(entry)
        except Refused as error:
            raise Refused(4, f"a damaged line: {error}") from error
        unlinked = {field: value for field, value in entry.items() if field != "link"}
        link = hashed("dtl/v2/ledger", link, dumps(unlinked))
        require(entry["link"] == link.hex(), 4, "the chain is broken")
        entries.append(entry)
    require(not older, 3, "of an older version")
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


def first_link(raw: bytes) -> bytes:
    """The link of the first line."""
    return bytes.fromhex(encoding.loads(raw.split(b"\n")[0])["link"])
