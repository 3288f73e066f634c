"""Bulk files: a signed header and a few byte tensors in a strict safetensors container.

The bytes of a file follow from its header, signature and tensors alone: the reader builds
the outer header anew and refuses any other spelling, so that there is no byte which the
signature does not cover. See FORMATS.md in this folder.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dtl.core.crypto.primitives import (
    SIGNATURE_BYTES,
    hash_fields,
    sign,
    verify_signature,
)
from dtl.core.errors import FormatError
from dtl.core.files.atomic import AtomicOutput, machine_errors
from dtl.core.files.safetensors import SafetensorsFile, TensorInfo, build_header, stamp_of
from dtl.core.progress import ProgressCallback, silent

HEADER_KEY, SIGNATURE_KEY = "dtl", "signature"
RESIDUES, PROOF, SEALED = "residues", "proof", "sealed"
READ_CHUNK = 4 << 20


class Container(SafetensorsFile):
    """An open bulk file: its raw header, its signature, and its U8 tensors.

    Raises FormatError unless the file is spelled exactly as dtl writes it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._hashes: dict[str, bytes] | None = None
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
        """The bytes of a tensor, piece by piece."""
        tensor = self.tensors[name]
        for start in range(0, tensor.length, READ_CHUNK):
            yield self.read(tensor.start + start, min(READ_CHUNK, tensor.length - start))

    def digest(self, progress: ProgressCallback = silent) -> bytes:
        """The digest of the file: what is signed, and what other files name it by."""
        return file_digest(self.raw_header, self._hash_tensors(progress))

    def tensor_hash(self, name: str) -> bytes:
        """SHA-512 of a tensor's bytes."""
        return self._hash_tensors(silent)[name]

    def _hash_tensors(self, progress: ProgressCallback) -> dict[str, bytes]:
        if self._hashes is not None:
            return self._hashes
        done, hashes = 0, {}
        for name in sorted(self.tensors):
            state = hashlib.sha512()
            for chunk in self.chunks(name):
                state.update(chunk)
                done += len(chunk)
                progress(f"hash {self.path.name}", done, self.size - len(self.header))
            hashes[name] = state.digest()
        self._hashes = hashes
        return hashes

    def verify(self, kind: str, public_key: bytes, progress: ProgressCallback = silent) -> bytes:
        """Check the signature; returns the digest. Raises VerificationError."""
        digest = self.digest(progress)
        verify_signature(public_key, kind, digest, self.signature, str(self.path))
        return digest

    def rows(self, name: str) -> "Rows":
        """How another process can read rows of a tensor."""
        tensor = self.tensors[name]
        count = tensor.shape[0]
        width = tensor.length // count if count else 0
        return Rows(self.path.absolute(), tensor.start, width, self.stamp)


def is_container(path: Path) -> bool:
    """Whether a safetensors file is a bulk file of dtl's rather than plain tensors."""
    with SafetensorsFile(path) as file:
        return {HEADER_KEY, SIGNATURE_KEY} <= set(file.metadata)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a tensor lie in a file; small, so that it can be sent to a worker.

    The stamp (inode, size, time of change) tells when the file is no longer the one that
    was verified.
    """

    path: Path
    start: int
    row_bytes: int
    stamp: tuple[int, ...]

    def read(self, first: int, count: int) -> bytes:
        """The bytes of `count` rows from `first` on; FormatError if the file has changed."""
        with machine_errors(self.path), self.path.open("rb", buffering=0) as file:
            place = self.start + first * self.row_bytes
            data = os.pread(file.fileno(), count * self.row_bytes, place)
            if len(data) != count * self.row_bytes or stamp_of(file.fileno()) != self.stamp:
                raise FormatError(f"{self.path}: the file changed while it was read")
        return data


def file_digest(raw_header: bytes, tensor_hashes: Mapping[str, bytes]) -> bytes:
    """SHA-512(fields("dtl/v2/digest", header, for each tensor in name order: name, SHA-512))."""
    items = [item for name in sorted(tensor_hashes) for item in (name, tensor_hashes[name])]
    return hash_fields("dtl/v2/digest", raw_header, *items)


class ContainerWriter:
    """Writes a bulk file: the header, its tensors piece by piece, then the signature."""

    def __init__(
        self, output: AtomicOutput, raw_header: bytes, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._output = output
        self._raw_header = raw_header
        self._tensors = [(name, "U8", shape) for name, shape in sorted(shapes.items())]
        self._hashes = {name: hashlib.sha512() for name in sorted(shapes)}
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

    def write(self, name: str, data: bytes) -> None:
        """Append to a tensor."""
        self._hashes[name].update(data)
        self._output.write_at(data, self._place[name])
        self._place[name] += len(data)

    def tensor_hash(self, name: str) -> bytes:
        """SHA-512 of what has been written to a tensor."""
        return self._hashes[name].digest()

    def finish(self, kind: str, signing_key: bytes) -> bytes:
        """Sign; returns the digest of the file."""
        hashes = {name: state.digest() for name, state in self._hashes.items()}
        digest = file_digest(self._raw_header, hashes)
        self._output.write_at(self._outer(sign(signing_key, kind, digest)), 0)
        return digest


def _describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())) or "none"
