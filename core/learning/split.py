"""Split a data set into one shard a participant and a test shard."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from dtl import datasets
from dtl.core import defaults
from dtl.core.errors import DtlError, FormatError, UsageError
from dtl.core.files.atomic import (
    PRIVATE_MODE,
    AtomicFolder,
    AtomicOutput,
    machine_errors,
    open_regular,
    read_file,
    remove_second_names,
    write_file,
)
from dtl.core.files.job_file import NAME_HINT, valid_name
from dtl.core.files.shards import Shard, encode_shard, read_arrays

TEST = "test"
_DIRICHLET_TRIES = 100
_MIN_SAMPLES = 2
MAX_LABEL = 256  # characters
MAX_LINE = 16 << 20  # characters


@dataclass(frozen=True)
class SplitOptions:
    """How to split: the test share, Dirichlet `alpha` (None: evenly at random), the seed."""

    participants: Sequence[str]
    test: float = defaults.TEST_SHARE
    alpha: float | None = None
    seed: int = defaults.SEED


def split_data(
    source: str, folder: Path, options: SplitOptions, force: bool = False
) -> dict[str, Shard]:
    """Write `NAME.npz` for every participant and `test.npz`; errors as `make_shards`.

    A new folder appears complete or not at all. In a folder that is there, all files are
    finished before the first gets its name; where only some of these very files are there,
    an interrupted run is completed.
    """
    shards = make_shards(source, options)
    files = {f"{name}.npz": encode_shard(shard) for name, shard in shards.items()}
    with machine_errors(folder):
        there = folder.exists()
    if there:
        _write_into(folder, files, force)
    else:
        with AtomicFolder(folder) as staging:
            for name, data in files.items():
                write_file(staging.temporary / name, data, True, PRIVATE_MODE)
            staging.commit()
    return shards


def _write_into(folder: Path, files: Mapping[str, bytes], force: bool) -> None:
    done = [] if force else [name for name in files if _holds(folder / name, files[name])]
    todo = [name for name in files if name not in done or len(done) == len(files)]
    for name in done:
        remove_second_names(folder / name)
    with ExitStack() as stack:
        outputs = []
        for name in todo:
            output = AtomicOutput(folder / name, force, PRIVATE_MODE)
            outputs.append(stack.enter_context(output))
            output.write(files[name])
        for output in outputs:
            output.commit()
    for name in done:
        remove_second_names(folder / name)


def _holds(path: Path, data: bytes) -> bool:
    """Whether a file holds exactly these bytes."""
    with suppress(DtlError):
        return read_file(path, len(data)) == data
    return False


def make_shards(source: str, options: SplitOptions) -> dict[str, Shard]:
    """The shard of every participant, and that of the test.

    Features are standardised with the mean and deviation of all training samples. Raises
    UsageError for impossible options, FormatError for a source that cannot be read.
    """
    names = list(options.participants)
    if not names or len(set(names)) != len(names) or TEST in names:
        raise UsageError("participants: expected unique names, none of them 'test'")
    if bad := [name for name in names if not valid_name(name)]:
        raise UsageError(f"participant {bad[0]!r}: not a name that can be used", NAME_HINT)
    if not 0 < options.test < 1:
        raise UsageError(f"--test: expected a share between 0 and 1, found {options.test}")
    if options.alpha is not None and not 0 < options.alpha < float("inf"):
        raise UsageError(f"--alpha: expected a positive number, found {options.alpha}")
    if options.seed < 0:
        raise UsageError(f"--seed: expected a number from 0 on, found {options.seed}")
    return _split(load_source(source), names, options)


def load_source(source: str) -> Shard:
    """A data set by name, or a FILE.csv (last column: the class) or FILE.npz (x, y)."""
    if source in datasets.NAMES:
        return _read_csv(datasets.path_of(source))
    path = Path(source)
    if path.suffix not in (".csv", ".npz"):
        raise UsageError(
            f"{source}: no such data set",
            f"known are {', '.join(datasets.NAMES)}; or name a file .csv or .npz",
        )
    return _read_csv(path) if path.suffix == ".csv" else _read_npz(path)


def _read_csv(path: Path) -> Shard:
    try:
        descriptor = open_regular(path)
        with machine_errors(path), os.fdopen(descriptor, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(_lines(file)) if row]
        labels = [row[-1].strip() for row in rows[1:]]
        if any(len(label) > MAX_LABEL for label in labels):  # numpy gives all the longest's room
            raise ValueError
        x = np.array([row[:-1] for row in rows[1:]], np.float64)
    except (ValueError, IndexError, csv.Error):
        raise FormatError(
            f"{path}: expected a header line, then rows of numbers and a class "
            f"(of at most {MAX_LABEL} characters)"
        ) from None
    return _shard(x, np.array(labels), path)


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; ValueError for one that is too long to be read."""
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError
        yield line


def _read_npz(path: Path) -> Shard:
    arrays = {name.lower(): array for name, array in read_arrays(path).items()}
    if not {"x", "y"} <= set(arrays) or arrays["x"].dtype.kind not in "fiub":
        raise FormatError(f"{path}: expected arrays x (numbers) and y (classes)")
    x = arrays["x"].astype(np.float64)
    return _shard(x.reshape(len(x), -1) if x.ndim > 1 else x, arrays["y"], path)


def _shard(x: NDArray[np.float64], labels: NDArray[np.generic], path: Path) -> Shard:
    try:
        classes, y = np.unique(labels, return_inverse=True)
        return Shard(x, y.astype(np.int64), classes.astype(np.str_))
    except FormatError as error:
        raise FormatError(f"{path}: {error.message}") from None


def _split(data: Shard, names: list[str], options: SplitOptions) -> dict[str, Shard]:
    generator = np.random.default_rng(options.seed)
    order = generator.permutation(len(data.x))
    cut = round(options.test * len(order))
    test, train = order[:cut], order[cut:]
    if not cut or len(train) < _MIN_SAMPLES * len(names):
        raise UsageError(f"{len(order)} samples are too few for {len(names)} participants")
    with np.errstate(over="ignore", invalid="ignore"):  # a Shard must be finite, and says so
        mean, deviation = data.x[train].mean(axis=0), data.x[train].std(axis=0)
        deviation[deviation == 0] = 1
        scaled = Shard((data.x - mean) / deviation, data.y, data.classes)
    if options.alpha is None:
        parts = np.array_split(train, len(names))
    else:
        parts = _dirichlet(data.y, train, len(names), options.alpha, generator)
    shards = {name: scaled.subset(part) for name, part in zip(names, parts, strict=True)}
    return shards | {TEST: scaled.subset(test)}


def _dirichlet(
    y: NDArray[np.int64],
    train: NDArray[np.int64],
    count: int,
    alpha: float,
    generator: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """Give each class out in shares drawn from Dirichlet(alpha): small alpha, uneven shards."""
    for _ in range(_DIRICHLET_TRIES):
        parts: list[list[NDArray[np.int64]]] = [[] for _ in range(count)]
        for label in np.unique(y[train]):
            rows = train[y[train] == label]
            ends = (np.cumsum(generator.dirichlet([alpha] * count))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, ends), strict=True):
                part.append(piece)
        whole = [generator.permutation(np.concatenate(part)) for part in parts]
        if min(map(len, whole)) >= _MIN_SAMPLES:
            return whole
    raise UsageError(
        f"--alpha {alpha}: leaves a participant without samples", "take a larger --alpha"
    )
