"""The safetensors format: a strict reader of its header, and a writer of one.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes
without gaps. Read and written here rather than with the `safetensors` package because that
one maps whole files into memory, knows no bfloat16 in numpy, and does not tell about
duplicate keys; the tests hold the two against one another.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dtl.core.errors import FormatError
from dtl.core.files import canonical_json
from dtl.core.files.atomic import machine_errors, open_regular, pread_up_to

MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 32
MAX_TENSORS = 1 << 16
_LENGTH_BYTES = 8
_ALIGNMENT = 8

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: its dtype, shape, and place in the file in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


class SafetensorsFile:
    """An open safetensors file, its header checked, its tensors read with `read`.

    Raises UsageError when there is no such file, FormatError when it is not valid: unknown
    or duplicate keys, wrong types, gaps, overlaps, trailing bytes, too long a header.
    """

    expected = "a safetensors file"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_regular(path)
        try:
            self.size = os.fstat(self._descriptor).st_size
            self.stamp = stamp_of(self._descriptor)
            self._parse()
        except BaseException:
            self.close()
            raise

    def stamp_now(self) -> tuple[int, ...]:
        """The stamp of the open file as it is now."""
        return stamp_of(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parse(self) -> None:
        length = int.from_bytes(self.read(0, min(_LENGTH_BYTES, self.size)), "little")
        if self.size < _LENGTH_BYTES or length > min(MAX_HEADER_BYTES, self.size - _LENGTH_BYTES):
            raise FormatError(f"{self.path}: expected {self.expected}, found something else")
        self.header = self.read(0, _LENGTH_BYTES + length)
        parsed = canonical_json.parse(self.header[_LENGTH_BYTES:], f"{self.path}: header")
        if not isinstance(parsed, dict):
            raise FormatError(f"{self.path}: header: expected an object")
        self.metadata = self._metadata(parsed.pop("__metadata__", {}))
        if len(parsed) > MAX_TENSORS:
            raise FormatError(f"{self.path}: expected at most {MAX_TENSORS} tensors")
        tensors = [self._tensor(name, entry, len(self.header)) for name, entry in parsed.items()]
        self.tensors = {tensor.name: tensor for tensor in tensors}
        end = len(self.header)
        for tensor in sorted(tensors, key=lambda item: (item.start, item.length)):
            if tensor.start != end:
                raise FormatError(f"{self.path}: tensors overlap or leave a gap")
            end += tensor.length
        if end != self.size:
            raise FormatError(f"{self.path}: expected {end} bytes, found {self.size}")

    def _metadata(self, value: object) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise FormatError(f"{self.path}: metadata: expected text only")
        return value

    def _tensor(self, name: str, entry: object, data: int) -> TensorInfo:
        match entry:
            case {
                "dtype": str(dtype),
                "shape": list(shape),
                "data_offsets": [start, end],
                **others,
            } if (
                not others
                and dtype in ITEM_BYTES
                and len(shape) <= MAX_DIMENSIONS
                and all(_is_size(item) for item in (*shape, start, end))
                and start + math.prod(shape) * ITEM_BYTES[dtype] == end
            ):
                return TensorInfo(name, dtype, tuple(shape), data + start, end - start)
        raise FormatError(f"{self.path}: the entry of a tensor is malformed")

    def read(self, start: int, length: int) -> bytes:
        """Read exactly these bytes of the file; FormatError if it has become shorter."""
        with machine_errors(self.path):
            data = pread_up_to(self._descriptor, length, start)
        if len(data) < length:
            raise FormatError(f"{self.path}: the file ends too early")
        return data


def stamp_of(descriptor: int) -> tuple[int, ...]:
    """What changes when a file is written to or replaced: inode, size, times of change.

    Not the device: a shared file system has another number on every machine that mounts it.
    """
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def build_header(
    metadata: Mapping[str, str], tensors: Sequence[tuple[str, str, Sequence[int]]]
) -> bytes:
    """The length and header of a file whose tensors (name, dtype, shape) follow in this order."""
    entries: dict[str, object] = {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"data_offsets": [offset, end], "dtype": dtype, "shape": list(shape)}
        offset = end
    if metadata:
        entries["__metadata__"] = dict(metadata)
    header = canonical_json.dumps(entries)
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header
