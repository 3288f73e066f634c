"""Run all contenders in turn, each in a process of its own, and take medians.

In turn: what else the machine does then falls on all of them alike.
"""

import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from platform import machine, python_version
from statistics import median
from typing import Any

from dtl.core import defaults
from dtl.core.benchmark import own, peers
from dtl.core.benchmark.sample import Sample
from dtl.core.crypto import kernels, residues
from dtl.core.errors import DtlError, UsageError
from dtl.core.files.tensor_writer import write_arrays
from dtl.core.parallel import Work
from dtl.core.progress import ProgressCallback
from dtl.core.roles.key_center import JobOptions, generate_job

OWN = "dtl"
_MAX_COUNT = (1 << 48) - 1  # values in a file


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure: so many values, so often, on so many cores, with peers or without."""

    values: int = defaults.BENCH_VALUES
    repeat: int = defaults.BENCH_REPEAT
    workers: int = 1
    modulus_bits: int = defaults.MODULUS_BITS
    insecure: bool = False
    peers: bool = True

    def check(self) -> None:
        """Raise UsageError for what cannot be measured."""
        for name, value in (("values", self.values), ("repeat", self.repeat)):
            if not 1 <= value <= _MAX_COUNT:
                raise UsageError(f"--{name}: expected 1 to {_MAX_COUNT}, found {value}")


@dataclass(frozen=True)
class Row:
    """A contender's medians; `times` is how long its round takes, in rounds of the first one's."""

    name: str
    sample: Sample
    times: float

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        figures = {name: round(value, 4) for name, value in asdict(self.sample).items()}
        whole = {"round": round(self.sample.round, 4), "round_ratio": round(self.times, 3)}
        return {"name": self.name, **figures, **whole}


@dataclass(frozen=True)
class BenchmarkReport:
    """What was measured, and on what."""

    options: BenchmarkOptions
    rows: tuple[Row, ...]
    not_measured: dict[str, str]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **asdict(self.options),
            "kernel": residues.kernel_name(),
            "machine": f"{machine()}, {os.cpu_count()} cores",
            "python": python_version(),
            "microseconds_a_value": [row.plain() for row in self.rows],
            "not_measured": self.not_measured,
        }


def run_benchmark(options: BenchmarkOptions, progress: ProgressCallback) -> BenchmarkReport:
    """Measure dtl with each of its kernels, and the peers that are installed."""
    options.check()
    with tempfile.TemporaryDirectory(prefix="dtl-bench-") as place, ExitStack() as stack:
        folder = Path(place)
        _prepare(folder, options, progress)
        measures: dict[str, Callable[[], Sample]] = {}
        reason = residues.why_not_native()
        kernels = [residues.NATIVE, residues.GMPY2][1 if reason else 0 :]
        for kernel in kernels:
            pool = _process(stack, kernel, options.workers)
            keys = folder / kernel  # of its own: everyone uploads once a round
            shutil.copytree(folder / own.JOB, keys)
            measure = partial(own.measure, folder, keys, options.values, options.workers)
            measures[f"{OWN} {kernel}"] = partial(_in, pool, measure)
        for name, peer in peers.installed().items() if options.peers else ():
            pool = _process(stack, "", options.workers)
            measures[name] = partial(_in, pool, partial(peer, options.values))
        samples, failed = _alternate(measures, options.repeat, progress)
        if reason:
            failed[f"{OWN} {residues.NATIVE}"] = reason
    medians = {
        name: Sample(*(median(column) for column in zip(*map(astuple, found), strict=True)))
        for name, found in samples.items()
    }
    first = next(iter(medians.values())).round
    rows = tuple(Row(name, sample, sample.round / first) for name, sample in medians.items())
    return BenchmarkReport(options, rows, failed)


def _prepare(folder: Path, options: BenchmarkOptions, progress: ProgressCallback) -> None:
    """Keys, and gradients to encrypt."""
    job = JobOptions(
        participants=own.NAMES,
        modulus_bits=options.modulus_bits,
        slot_bits=defaults.SLOT_BITS,
        fraction_bits=defaults.FRACTION_BITS,
        min_contributors=defaults.MIN_CONTRIBUTORS,
        masks=True,
        insecure=options.insecure,
    )
    generate_job(folder / own.JOB, job, work=Work(None, progress))
    write_arrays(folder / own.GRADIENTS, {"x": peers.gradients(options.values)}, "F32", None)


def _alternate(
    measures: dict[str, Callable[[], Sample]], repeat: int, progress: ProgressCallback
) -> tuple[dict[str, list[Sample]], dict[str, str]]:
    """The samples of every contender, in turn; and why some have none.

    The first turn warms up, makes keys and tables, and does not count.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in measures}
    failed: dict[str, str] = {}
    total, done = (repeat + 1) * len(measures), 0
    for turn in range(repeat + 1):
        for name, measure in measures.items():
            progress("measure", done, total)
            done += 1
            if name in failed:
                continue
            try:
                sample = measure()
            except Exception as error:
                if name.startswith(OWN):
                    raise
                # A peer that does not work here is not a failure of dtl.
                failed[name] = f"{type(error).__name__}"
                del samples[name]
                continue
            if turn:
                samples[name].append(sample)
    progress("measure", total, total)
    return samples, failed


def _process(stack: ExitStack, kernel: str, cores: int) -> ProcessPoolExecutor:
    """A fresh process that uses a kernel ("": whatever there is) and so many cores."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, _set_up, (kernel, cores))
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool


def _set_up(kernel: str, cores: int) -> None:
    logging.getLogger("dtl").setLevel(logging.ERROR)  # what is to be said was said before
    if kernel:
        os.environ[kernels.KERNEL_VARIABLE] = kernel
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:cores])


def _in(pool: ProcessPoolExecutor, measure: Callable[[], Sample]) -> Sample:
    try:
        return pool.submit(measure).result()
    except BrokenProcessPool:
        raise DtlError("a measuring process died") from None
