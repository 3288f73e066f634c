"""Bulk files: a signed header and a few byte tensors in a strict safetensors container.

The bytes of a file follow from its header, signature and tensors alone: the reader builds
the outer header anew and refuses any other spelling, so that there is no byte which the
signature does not cover. See FORMATS.md in this folder.
"""

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from dtl.core.crypto.primitives import (
    SIGNATURE_BYTES,
    hash_fields,
    sign,
    verify_signature,
)
from dtl.core.errors import FormatError
from dtl.core.files.atomic import AtomicOutput, machine_errors, open_regular, pread_up_to
from dtl.core.files.safetensors import SafetensorsFile, TensorInfo, build_header
from dtl.core.files.schema import OLDER_MARK, older_format
from dtl.core.files.tree_hash import HASH_BYTES, PIECE, TreeHash, piece_hash, tree_digest
from dtl.core.progress import ProgressCallback, silent

HEADER_KEY, SIGNATURE_KEY = "dtl", "signature"
BODY, RESIDUES, PROOF, SEALED = "body", "residues", "proof", "sealed"
TENSOR_LABEL = "dtl/v2/tensor"
KEPT_PIECES = 32


class Container(SafetensorsFile):
    """An open bulk file: its raw header, its signature, and its U8 tensors.

    Raises FormatError unless the file is spelled exactly as dtl writes it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._hashes: dict[str, tuple[bytes, ...]] | None = None
        try:
            self._check_spelling()
        except BaseException:
            self.close()
            raise

    def _check_spelling(self) -> None:
        header = self.metadata.get(HEADER_KEY)
        signature = self.metadata.get(SIGNATURE_KEY)
        if header is None or signature is None:
            raise FormatError(
                f"{self.path}: expected an upload, sum, model or release of dtl, "
                "found plain tensors",
                "gradients: encrypt-grads comes first; weights to start from: --initial",
            )
        if OLDER_MARK in header:
            raise older_format(str(self.path))
        order = [(item.name, item.dtype, item.shape) for item in self._ordered()]
        expected = build_header({HEADER_KEY: header, SIGNATURE_KEY: signature}, order)
        if expected != self.header or any(dtype != "U8" for _, dtype, _ in order):
            raise FormatError(f"{self.path}: the container is not spelled as dtl writes it")
        try:
            self.signature = bytes.fromhex(signature)
        except ValueError:
            self.signature = b""
        if len(self.signature) != SIGNATURE_BYTES or self.signature.hex() != signature:
            raise FormatError(f"{self.path}: expected a signature of 64 bytes in lower-case hex")
        self.raw_header = header.encode()

    def _ordered(self) -> list[TensorInfo]:
        return sorted(self.tensors.values(), key=lambda item: item.name)

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise FormatError unless the file holds exactly these tensors, of these shapes."""
        found = {name: tensor.shape for name, tensor in self.tensors.items()}
        if found != dict(shapes):
            raise FormatError(
                f"{self.path}: expected the tensors {_describe(shapes)}, found {_describe(found)}"
            )

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, piece by piece, each checked as in `Rows`."""
        rows = self.bytes_of(name)
        for start in range(0, rows.length, PIECE):
            yield rows.read(start, min(PIECE, rows.length - start))

    def whole(self, name: str) -> bytes:
        """The bytes of a small tensor, checked as in `Rows`."""
        rows = self.bytes_of(name)
        return rows.read(0, rows.length)

    def digest(self, progress: ProgressCallback = silent, lanes: int = 1) -> bytes:
        """The digest of the file: what is signed, and what other files name it by.

        A large file is read and hashed in up to `lanes` threads.
        """
        self._hash_pieces(progress, lanes)
        return file_digest(
            self.raw_header, {name: self.tensor_digest(name) for name in self.tensors}
        )

    def tensor_digest(self, name: str) -> bytes:
        """H(fields("dtl/v2/tensor", name, u64(length), SHA-256 of each piece)), 64 bytes."""
        hashes = self._hash_pieces(silent, 1)[name]
        return tree_digest(TENSOR_LABEL, (name,), self.tensors[name].length, hashes)

    def _hash_pieces(self, progress: ProgressCallback, lanes: int) -> dict[str, tuple[bytes, ...]]:
        """The hashes of every tensor's pieces; the file is read for them once."""
        if self._hashes is None:
            self._hashes = self._read_hashes(progress, lanes)
        return self._hashes

    def _read_hashes(self, progress: ProgressCallback, lanes: int) -> dict[str, tuple[bytes, ...]]:
        pieces = [
            (tensor.name, tensor.start + at, min(PIECE, tensor.length - at))
            for tensor in self._ordered()
            for at in range(0, tensor.length, PIECE)
        ]
        found: dict[str, list[bytes]] = {name: [] for name in self.tensors}
        done = 0
        hashed = _map(lambda piece: piece_hash(self.read(*piece[1:])), pieces, lanes)
        for (name, _, length), piece in zip(pieces, hashed, strict=True):
            found[name].append(piece)
            done += length
            progress(f"hash {self.path.name}", done, self.size - len(self.header))
        return {name: tuple(hashes) for name, hashes in found.items()}

    def verify(
        self, kind: str, public_key: bytes, progress: ProgressCallback = silent, lanes: int = 1
    ) -> bytes:
        """Check the signature; returns the digest. Raises VerificationError."""
        digest = self.digest(progress, lanes)
        verify_signature(public_key, kind, digest, self.signature, str(self.path))
        return digest

    def rows(self, name: str) -> "Rows":
        """How a tensor's rows (of its first dimension) are read, here or in another process."""
        tensor = self.tensors[name]
        count = tensor.shape[0]
        return self._rows(name, tensor.length // count if count else 0)

    def bytes_of(self, name: str) -> "Rows":
        """How a tensor's bytes are read, here or in another process: each is a row."""
        return self._rows(name, 1)

    def _rows(self, name: str, row_bytes: int) -> "Rows":
        hashes = b"".join(self._hash_pieces(silent, 1)[name])
        tensor = self.tensors[name]
        return Rows(self.path.absolute(), tensor.start, row_bytes, tensor.length, hashes)


Piece = tuple[str, int, int]


def _map(function: Callable[[Piece], bytes], pieces: list[Piece], lanes: int) -> Iterator[bytes]:
    """As `map`, in up to `lanes` threads."""
    if min(lanes, len(pieces)) <= 1:
        yield from map(function, pieces)
        return
    pool = ThreadPoolExecutor(min(lanes, len(pieces)))
    try:
        yield from pool.map(function, pieces)
    finally:  # an interrupted command waits for no more than the pieces that are being read
        pool.shutdown(cancel_futures=True)


def is_container(path: Path) -> bool:
    """Whether a safetensors file is a bulk file of dtl's rather than plain tensors."""
    with SafetensorsFile(path) as file:
        return {HEADER_KEY, SIGNATURE_KEY} <= set(file.metadata)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a tensor lie in a file; small, so that it can be sent to a worker.

    `hashes` holds the SHA-256 of each piece of the tensor, as the signature covers them, one
    after the other. What `read` returns has these hashes, whoever writes to the file meanwhile.
    """

    path: Path
    start: int
    row_bytes: int
    length: int
    hashes: bytes = field(repr=False)
    # Marks the pieces that `_recent` keeps for this object. Unpickling makes another one.
    _mark: object = field(default_factory=object, init=False, repr=False, compare=False)

    def read(self, first: int, count: int) -> bytes:
        """The bytes of `count` rows from `first` on; FormatError if they have changed."""
        begin, end = first * self.row_bytes, (first + count) * self.row_bytes
        if not 0 <= begin <= end <= self.length:
            raise ValueError("there are no such rows")
        parts = []
        while begin < end:
            number, skip = divmod(begin, PIECE)
            piece = self._piece(number, end - number * PIECE)
            parts.append(piece[skip : end - number * PIECE])
            begin += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _piece(self, number: int, end: int) -> bytes:
        """A piece with the hash that it must have, of which the bytes up to `end` are wanted."""
        expected = self.hashes[HASH_BYTES * number : HASH_BYTES * (number + 1)]
        piece = _recent.get((self._mark, number))
        if piece is None:
            place = number * PIECE
            with machine_errors(self.path):
                descriptor = open_regular(self.path)
                try:
                    length = min(PIECE, self.length - place)
                    piece = pread_up_to(descriptor, length, self.start + place)
                finally:
                    os.close(descriptor)
            if piece_hash(piece) != expected:
                raise FormatError(f"{self.path}: the file changed while it was read")
        if end < len(piece):  # the next reader probably wants the rest
            _recent.put((self._mark, number), piece)
        return piece


class _Recent:
    """The pieces that were read and checked last, a few for all files together."""

    def __init__(self) -> None:
        self._pieces: OrderedDict[tuple[object, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, int]) -> bytes | None:
        with self._lock:
            return self._pieces.get(key)

    def put(self, key: tuple[object, int], piece: bytes) -> None:
        with self._lock:
            self._pieces[key] = piece
            self._pieces.move_to_end(key)
            if len(self._pieces) > KEPT_PIECES:
                self._pieces.popitem(last=False)


_recent = _Recent()


def file_digest(raw_header: bytes, tensor_digests: Mapping[str, bytes]) -> bytes:
    """H(fields("dtl/v2/digest", header, for each tensor in name order: name, its digest))."""
    items = [item for name in sorted(tensor_digests) for item in (name, tensor_digests[name])]
    return hash_fields("dtl/v2/digest", raw_header, *items)


def tensor_tree(name: str) -> TreeHash:
    """What hashes the bytes of a tensor."""
    return TreeHash(TENSOR_LABEL, name)


class ContainerWriter:
    """Writes a bulk file: the header, its tensors piece by piece, then the signature.

    The tensors may be written in any order, and in turns.
    """

    def __init__(
        self, output: AtomicOutput, raw_header: bytes, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._output = output
        self._raw_header = raw_header
        self._tensors = [(name, "U8", shape) for name, shape in sorted(shapes.items())]
        self._trees = {name: tensor_tree(name) for name in shapes}
        outer = self._outer(bytes(SIGNATURE_BYTES))
        output.write(outer)
        self._place = {}
        start = len(outer)
        for name, _, shape in self._tensors:
            self._place[name] = start
            start += math.prod(shape)

    def _outer(self, signature: bytes) -> bytes:
        header = {HEADER_KEY: self._raw_header.decode(), SIGNATURE_KEY: signature.hex()}
        return build_header(header, self._tensors)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Append to a tensor."""
        self._trees[name].update(data)
        self._output.write_at(data, self._place[name])
        self._place[name] += memoryview(data).nbytes

    def copy(self, name: str, rows: Rows) -> None:
        """Append the bytes of another file's tensor; FormatError if they have changed."""
        whole = replace(rows, row_bytes=1)
        for start in range(0, rows.length, PIECE):
            self.write(name, whole.read(start, min(PIECE, rows.length - start)))

    def tensor_digest(self, name: str) -> bytes:
        """The digest of what has been written to a tensor, as `Container.tensor_digest`."""
        return self._trees[name].digest()

    def finish(self, kind: str, signing_key: bytes) -> bytes:
        """Sign; returns the digest of the file."""
        for name, _, shape in self._tensors:
            if self._trees[name].length != math.prod(shape):
                raise ValueError(f"the tensor {name} is not complete")
        digests = {name: tree.digest() for name, tree in self._trees.items()}
        digest = file_digest(self._raw_header, digests)
        self._output.write_at(self._outer(sign(signing_key, kind, digest)), 0)
        return digest


def _describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())) or "none"
