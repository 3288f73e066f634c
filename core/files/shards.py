"""Shards: one party's own samples, as an .npz file.

Arrays `x` float64 [samples, features], `y` int64 [samples] (indices of classes) and
`classes` text [classes]. Any .npz with `x` and `y` can be split into shards.
"""

import io
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dtl.core.errors import FormatError
from dtl.core.files.atomic import machine_errors, open_regular, write_file
from numpy.typing import NDArray

MIN_CLASSES = 2


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
    try:
        with machine_errors(path), os.fdopen(open_regular(path), "rb") as file:
            loaded = np.load(file)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise FormatError(f"{path}: expected an .npz file")
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        raise FormatError(f"{path}: expected an .npz file of numbers and texts") from None


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


def save_shard(path: Path, shard: Shard, force: bool) -> None:
    """Write a shard."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=shard.x, y=shard.y, classes=shard.classes)
    write_file(path, buffer.getvalue(), force)
