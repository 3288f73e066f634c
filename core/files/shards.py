"""Shards: one party's own samples, as an .npz file.

Arrays `x` float64 [samples, features], `y` int64 [samples] (indices of classes) and
`classes` text [classes]. Any .npz with `x` and `y` can be split into shards.
"""

import io
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from dtl.core.errors import DtlError, FormatError
from dtl.core.files.atomic import open_regular
from dtl.core.files.npz import check_archive, may_unpack, read_array_header

MIN_CLASSES = 2
_ZIP_MAGIC = b"PK"


@dataclass(frozen=True)
class Shard:
    """Samples and their classes. Raises FormatError for shapes that do not fit together."""

    x: NDArray[np.float64]
    y: NDArray[np.int64]
    classes: NDArray[np.str_]

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.shape != (len(self.x),) or not self.x.size:
            raise FormatError("expected x [samples, features] and y [samples], at least one each")
        if not np.isfinite(self.x).all():
            raise FormatError("x holds a value that is not finite")
        if self.classes.ndim != 1 or len(self.classes) < MIN_CLASSES:
            raise FormatError(f"expected at least {MIN_CLASSES} classes")
        if self.y.min() < 0 or self.y.max() >= len(self.classes):
            raise FormatError("y holds a class that is not there")

    def subset(self, rows: NDArray[np.int64]) -> "Shard":
        """The samples at these rows."""
        return Shard(self.x[rows], self.y[rows], self.classes)


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of an .npz file; FormatError for anything else. Nothing is unpickled."""
    file = os.fdopen(open_regular(path), "rb")
    try:
        with file:
            if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:  # numpy goes by it, zipfile does not
                raise FormatError(f"{path}: expected an .npz file")
            _check_sizes(file, path)
            file.seek(0)
            loaded = np.load(file)
            return {name: loaded[name] for name in loaded.files}
    except (DtlError, MemoryError):
        raise
    except Exception:  # whatever numpy and zipfile make of a damaged file
        raise FormatError(f"{path}: expected an .npz file of numbers and texts") from None


def _check_sizes(file: IO[bytes], path: Path) -> None:
    """Raise FormatError for an array whose header claims more than is there, or for a bomb."""
    with zipfile.ZipFile(file) as archive:
        check_archive(archive, path)
        for info in archive.infolist():
            with archive.open(info) as member:
                shape, _, dtype = read_array_header(member)
                if member.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
                    raise FormatError(f"{path}: an array is not as long as it claims")


def is_shard(path: Path) -> bool:
    """Whether an .npz file has the arrays of a shard."""
    try:
        with zipfile.ZipFile(path) as file:
            return {"x.npy", "y.npy", "classes.npy"} == set(file.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def load_shard(path: Path) -> Shard:
    """Read a shard."""
    arrays = read_arrays(path)
    match arrays:
        case {"x": x, "y": y, "classes": classes} if (
            x.dtype.kind == "f" and y.dtype.kind in "iu" and classes.dtype.kind == "U"
        ):
            try:
                return Shard(x.astype(np.float64), y.astype(np.int64), classes.astype(np.str_))
            except FormatError as error:
                raise FormatError(f"{path}: {error.message}") from None
    raise FormatError(
        f"{path}: expected a shard with arrays x, y and classes", "make one with dtl split-data"
    )


def encode_shard(shard: Shard) -> bytes:
    """The bytes of a shard's file: the same for the same samples."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=shard.x, y=shard.y, classes=shard.classes)
    with zipfile.ZipFile(buffer) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if not may_unpack(len(buffer.getvalue()), unpacked):
        buffer = io.BytesIO()
        np.savez(buffer, x=shard.x, y=shard.y, classes=shard.classes)
    return buffer.getvalue()
