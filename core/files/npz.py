"""What both readers of .npz files check before they unpack anything.

A few bytes of a zip can claim, and truly hold, very many: a reader bounds what it unpacks.
"""

import io
import zipfile
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.lib import format as npy

from dtl.core.errors import FormatError
from dtl.core.files.safetensors import MAX_TENSORS

FREE_BYTES: Final = 64 << 20
MAX_RATIO: Final = 100
_MAX_HEADER_BYTES = 1 << 16
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those of numpy; others unpack unbounded


def may_unpack(packed: int, unpacked: int) -> bool:
    """Whether a reader takes an archive of `packed` bytes that unpacks to `unpacked` bytes."""
    return unpacked <= FREE_BYTES + MAX_RATIO * packed


def check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise FormatError for an archive that numpy would not write, or that unpacks to too much."""
    members = archive.infolist()
    if any(member.compress_type not in _METHODS for member in members):
        raise FormatError(f"{path}: expected arrays that are stored or deflated")
    if len(members) > MAX_TENSORS:
        raise FormatError(f"{path}: expected at most {MAX_TENSORS} arrays")
    packed, unpacked = path.stat().st_size, sum(member.file_size for member in members)
    if not may_unpack(packed, unpacked):
        raise FormatError(
            f"{path}: unpacks to {unpacked} bytes from {packed}", "save it without compression"
        )


def read_array_header(
    member: IO[bytes],
) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """(shape, Fortran order, dtype) of an array; ValueError for a header that is none."""
    version = npy.read_magic(member)
    if version == (1, 0):
        return npy.read_array_header_1_0(member)
    return npy.read_array_header_2_0(_Bounded(member))


class _Bounded(io.RawIOBase):
    """A file that refuses to read what no array header is as long as."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes."""
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise ValueError("too long a header")
        return self._file.read(size)
