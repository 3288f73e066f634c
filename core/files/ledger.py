"""Ledgers: what a party has already done, append-only, chained, locked, durable.

A ledger keeps its party from doing twice what the protocol allows once: it is JSON lines,
each holding a hash of itself and the line before it. The first line names the ledger; its
id is pinned in the key file. Source: PROTOCOL.md, section 7.

A torn last line (a crash while it was written: the beginning of a line, and no more) is cut
off; nothing had been handed out on the strength of it. Anything else that is not a whole,
linked line is damage.
"""

import fcntl
import io
import itertools
import os
import secrets
import stat
from types import TracebackType
from typing import IO, Annotated, Any, Literal, Self, TypeVar

from pydantic import Field

from dtl.core.crypto.primitives import hash_fields
from dtl.core.errors import FormatError, NotAllowedError, UsageError, VerificationError
from dtl.core.files import canonical_json
from dtl.core.files.atomic import machine_errors
from dtl.core.files.job_file import MAX_DOCUMENT_BYTES
from dtl.core.files.key_file import Key
from dtl.core.files.schema import (
    NAME_PATTERN,
    Digest,
    Document,
    Identifier,
    Items,
    Name,
    OlderFormatError,
    Round,
    Timestamp,
    refuse_older,
)

_LINK = "link"


class LedgerHead(Document):
    """The first line: which ledger this is."""

    event: Literal["ledger"]
    format: Literal["dtl/v2"]
    ledger: Identifier
    name: Name


class UploadEntry(Document):
    """A participant made an upload."""

    event: Literal["upload"]
    round: Round
    base: Digest | None
    opened: Digest | None
    upload: Digest


class TriedEntry(Document):
    """A participant is about to apply its half to a release whose proof holds.

    With `after_failure` its operator has said that earlier failures shall not count any more.
    """

    event: Literal["tried"]
    round: Round
    result: Digest
    release: Digest
    after_failure: bool


class OpenEntry(Document):
    """A participant opened a result; `content` is the hash of the tensors that were written."""

    event: Literal["open"]
    round: Round
    kind: Literal["model", "sum"]
    result: Digest
    parent: Digest | None
    opened: Digest
    content: Digest
    admitted: Items[Name]


class StepEntry(Document):
    """A participant has, in `content`, the model after the step along a sum.

    `source` says where it is from: `apply-sum`, `own-step` (the operator's own program), or
    `adopt:NAME` (a file that another participant handed over).
    """

    event: Literal["step"]
    round: Round
    sum: Digest
    content: Digest
    source: Annotated[str, Field(pattern=f"^(apply-sum|own-step|adopt:{NAME_PATTERN})$")]


class RevealEntry(Document):
    """A participant revealed its masks with the missing of a round."""

    event: Literal["reveal"]
    round: Round
    close: Digest


class CloseEntry(Document):
    """The server closed a round; `created` as in AggregateEntry."""

    event: Literal["close"]
    round: Round
    base: Digest | None
    uploads: dict[Name, Digest]
    digest: Digest
    created: Timestamp


class AggregateEntry(Document):
    """The server accepted uploads and computed a result.

    `content` is the hash of the result's header without its time, so that the same result
    made again is the same file: it takes over `created`.
    """

    event: Literal["aggregate"]
    round: Round
    base: Digest | None
    uploads: dict[Name, Digest]
    content: Digest
    created: Timestamp
    result: Digest


class ReleaseEntry(Document):
    """The server released a result."""

    event: Literal["release"]
    round: Round
    base: Digest | None
    result: Digest
    grants: Items[Name]
    admitted: Items[Name]


_ENTRIES: dict[str, type[Document]] = {
    "upload": UploadEntry,
    "tried": TriedEntry,
    "open": OpenEntry,
    "step": StepEntry,
    "reveal": RevealEntry,
    "close": CloseEntry,
    "aggregate": AggregateEntry,
    "release": ReleaseEntry,
}
EntryType = TypeVar("EntryType", bound=Document)


def new_identifier() -> str:
    """A fresh ledger id: 16 random bytes in hex."""
    return secrets.token_hex(16)


def first_line(identifier: str, name: str) -> bytes:
    """The bytes of a fresh ledger."""
    head = LedgerHead(event="ledger", format="dtl/v2", ledger=identifier, name=name)
    return _line(head.plain(), "")


def _link(plain: dict[str, Any], previous: str) -> str:
    """The hash that a line carries: of the link before it, and of all else in the line."""
    return hash_fields("dtl/v2/ledger", bytes.fromhex(previous), canonical_json.dumps(plain)).hex()


def _line(plain: dict[str, Any], previous: str) -> bytes:
    return canonical_json.dumps(plain | {_LINK: _link(plain, previous)}) + b"\n"


def is_ledger(data: bytes) -> bool:
    """Whether these bytes begin like a ledger."""
    return b'"event":"ledger"' in data.partition(b"\n")[0]


def read_entries(data: bytes, what: str) -> list[Document]:
    """The entries of a ledger's whole lines, its head first.

    Raises VerificationError for a damaged line or a broken chain, FormatError for a ledger of an
    older version.
    """
    return _read_lines(io.BytesIO(data), what)[0]


def _read_lines(file: IO[bytes], what: str) -> tuple[list[Document], str, int]:
    """(entries, last link, how many bytes are whole lines) of a ledger."""
    entries: list[Document] = []
    previous, size = "", 0
    for number in itertools.count(1):
        place = f"{what}: line {number}"
        read = file.readline(MAX_DOCUMENT_BYTES + 1)
        if len(read) > MAX_DOCUMENT_BYTES:
            raise VerificationError(f"{place}: damaged: more than {MAX_DOCUMENT_BYTES} bytes")
        line = read.removesuffix(b"\n")
        behind = not read.endswith(b"\n")  # the last line end
        if behind and entries and _is_torn(line):  # the head is never torn
            break
        try:
            plain = canonical_json.loads(line, place)
            if number == 1:
                refuse_older(plain, what)
            link = plain.pop(_LINK)
            kind = LedgerHead if number == 1 else _ENTRIES[plain["event"]]
            entries.append(kind.check(plain, place))
        except OlderFormatError:
            raise
        except (FormatError, AttributeError, KeyError, TypeError):
            raise VerificationError(f"{place}: damaged") from None
        if link != _link(plain, previous):
            raise VerificationError(f"{place}: the chain is broken; lines were changed or removed")
        previous, size = link, size + len(line) + 1
    return entries, previous, size


def _is_torn(line: bytes) -> bool:
    """Whether this is the beginning of a line, cut off before its JSON ended.

    No text of a ledger holds a brace, so one that is still open says so. A file may also have
    grown in a crash before its bytes were written: then zeros stand for what is missing.
    """
    written = line.rstrip(b"\0")
    return not written or (written.startswith(b"{") and written.count(b"{") > written.count(b"}"))


class Ledger:
    """The ledger beside a key, locked for as long as it is open.

    Commands on one ledger wait for each other. Raises NotAllowedError when the ledger is
    missing, VerificationError when it is not the pinned one or its chain is broken.
    """

    def __init__(self, key: Key) -> None:
        self.path = key.ledger_path
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise NotAllowedError(
                f"{self.path}: the ledger is missing",
                f"a key is used only with its ledger; put it back beside {key.path}",
            ) from None
        except OSError:
            with machine_errors(self.path):
                raise
            raise
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            self._read(key)
        except BaseException:
            self.close()
            raise

    def _read(self, key: Key) -> None:
        with machine_errors(self.path):
            found = os.fstat(self._descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(f"{self.path}: expected a file")
            with os.fdopen(self._descriptor, "rb", closefd=False) as file:
                self.entries, self._last, self._size = _read_lines(file, str(self.path))
            if self._size > found.st_size:  # only the last line end was lost
                self._write(b"\n", found.st_size)
        head = self.entries.pop(0) if self.entries else None
        if not isinstance(head, LedgerHead) or (head.ledger, head.name) != (
            key.pins.ledger,
            key.name,
        ):
            raise VerificationError(f"{self.path}: not the ledger that {key.path} pins")

    def find(self, kind: type[EntryType], /, **fields: object) -> list[EntryType]:
        """Entries of a kind whose fields have these values, oldest first."""
        return [
            entry
            for entry in self.entries
            if isinstance(entry, kind)
            and all(getattr(entry, name) == value for name, value in fields.items())
        ]

    @property
    def last_link(self) -> bytes:
        """The hash of the last line: changes with every line, and never comes back."""
        return bytes.fromhex(self._last)

    def append(self, entry: Document) -> None:
        """Add an entry; it is on disk when this returns."""
        plain = entry.plain()
        line = _line(plain, self._last)
        with machine_errors(self.path):
            try:
                os.ftruncate(self._descriptor, self._size)  # a torn last line, if any
                self._write(line, self._size)
            except OSError:
                # Not durable: take it back, so that the ledger says only what is so.
                os.ftruncate(self._descriptor, self._size)
                raise
        self._size += len(line)
        self._last = _link(plain, self._last)
        self.entries.append(entry)

    def _write(self, data: bytes, place: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], place + done)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
