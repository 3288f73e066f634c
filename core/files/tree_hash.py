"""Tree hashes of bulk data: the data's pieces are hashed first, and then their hashes.

Several cores can hash the pieces of one file, and a reader can check a piece without reading
the others. Source: PROTOCOL.md, section 0.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

from dtl.core.crypto.primitives import hash_fields

PIECE: Final = 4 << 20
"""Bytes in every piece but the last, which may be shorter."""

HASH_BYTES: Final = 32


def piece_hash(data: bytes) -> bytes:
    """SHA-256 of a piece."""
    return hashlib.sha256(data).digest()


def tree_digest(
    label: str, items: Sequence[bytes | str], length: int, hashes: Sequence[bytes]
) -> bytes:
    """H(fields(label, items, u64(length), the pieces' hashes)) of `length` bytes: 64 bytes."""
    return hash_fields(label, *items, length.to_bytes(8, "little"), *hashes)


class TreeHash:
    """The tree hash of bytes that come in parts of any length."""

    def __init__(self, label: str, *items: bytes | str) -> None:
        self._label, self._items = label, items
        self._whole: list[bytes] = []
        self._last = hashlib.sha256()
        self._filled = 0  # bytes in the piece that is not whole yet

    @property
    def length(self) -> int:
        """Bytes so far."""
        return PIECE * len(self._whole) + self._filled

    @property
    def pieces(self) -> list[bytes]:
        """SHA-256 of each piece so far."""
        return [*self._whole, self._last.digest()] if self._filled else list(self._whole)

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes; `data` is contiguous."""
        view = memoryview(data)
        if not view.nbytes:  # `cast` refuses it
            return
        view = view.cast("B")
        while view:
            part = view[: PIECE - self._filled]
            self._last.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == PIECE:
                self._whole.append(self._last.digest())
                self._last, self._filled = hashlib.sha256(), 0

    def digest(self, label: str | None = None) -> bytes:
        """The digest of what was added so far, under another label if one is given."""
        return tree_digest(label or self._label, self._items, self.length, self.pieces)
