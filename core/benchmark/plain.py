"""The same round without any protection: float32 files, averaged with numpy, on the same disk.

A participant writes its gradients as a file; the server hashes each file once while it reads
it (SHA-256), adds up, divides, and writes the mean; a participant reads that. Written files
are synchronised to the disk, as dtl's are. Everything goes in pieces, so that any size fits.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtl.core.benchmark.sample import CONTRIBUTORS, Sample, Stopwatch

_PIECE = 1 << 20  # values
_DTYPE = np.dtype("<f4")
_PREFIX = 8  # bytes of a safetensors file that hold the length of its header


def measure(folder: Path, gradients: Path, values: int, uploads: int) -> Sample:
    """One plain round on a safetensors file of float32; the files that it makes are removed.

    Where there are more uploads than three, these three are read again and again.
    """
    watch = Stopwatch(values)
    paths = [folder / f"plain-{number}.safetensors" for number in range(CONTRIBUTORS)]
    mean = folder / "plain-mean.safetensors"
    try:
        written = [watch.time(partial(_write_upload, gradients, path))[0] for path in paths]
        many = [paths[number % CONTRIBUTORS] for number in range(uploads)]
        averaged, _ = watch.time(lambda: _average(many, mean))
        opened, _ = watch.time(lambda: sum(len(piece) for piece in _pieces(mean)))
        size = paths[0].stat().st_size / values
    finally:
        for path in (*paths, mean):
            path.unlink(missing_ok=True)
    return Sample(values, 0.0, sorted(written)[1], averaged, 0.0, opened, size, uploads)


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        prefix = file.read(_PREFIX)
        return prefix + file.read(int.from_bytes(prefix, "little"))


def _pieces(path: Path) -> Iterator[NDArray[np.float32]]:
    """The values of the one tensor in a safetensors file."""
    start = len(_header(path))
    with path.open("rb") as file:
        file.seek(start)
        while len(piece := np.fromfile(file, _DTYPE, _PIECE)):
            yield piece


def _write_upload(gradients: Path, path: Path) -> None:
    with path.open("wb") as file:
        file.write(_header(gradients))
        for piece in _pieces(gradients):
            piece.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def _average(paths: list[Path], mean: Path) -> None:
    hashes = [hashlib.sha256(_header(path)) for path in paths]
    with mean.open("wb") as file:
        file.write(_header(paths[0]))
        for pieces in zip(*map(_pieces, paths), strict=True):
            total = np.zeros_like(pieces[0])
            for state, piece in zip(hashes, pieces, strict=True):
                state.update(piece.data)
                total += piece
            (total / np.float32(len(paths))).tofile(file)
        file.flush()
        os.fsync(file.fileno())
