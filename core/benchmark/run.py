"""Run all contenders in turn, each in a process of its own, and take medians.

In turn: what else the machine does then falls on all of them alike.
"""

import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
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
from dtl.core.benchmark import own, peers, plain
from dtl.core.benchmark.sample import CONTRIBUTORS, Sample
from dtl.core.crypto import kernels, residues
from dtl.core.errors import DtlError, UsageError
from dtl.core.files.atomic import AtomicOutput
from dtl.core.files.headers import TensorSpec
from dtl.core.files.job_file import MAX_PARTICIPANTS
from dtl.core.files.tensor_writer import TensorWriter
from dtl.core.lattice import ring
from dtl.core.parallel import Work
from dtl.core.progress import ProgressCallback
from dtl.core.roles.key_center import JobOptions, generate_job

OWN, PLAIN = "dtl", "plain float32"
LATTICE, DIRECT = "lattice", "direct"
_MAX_COUNT = (1 << 48) - 1  # values in a file
_PIECE = 1 << 20  # values written at a time
WARM_VALUES = 1_000_000
"""Values of the first turn, which warms up: it makes keys and tables, and does not count."""

DIRECT_VALUES = {kernels.NATIVE: 1_000_000, kernels.GMPY2: 50_000}
"""Values that the direct cipher encrypts at most: its time a value does not depend on them."""

_NOT_FOR_MANY = "only with --uploads 3"
MAX_UPLOADS = MAX_PARTICIPANTS


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure: so many values, so often, on so many cores, with peers or without."""

    values: int = defaults.BENCH_VALUES
    repeat: int = defaults.BENCH_REPEAT
    workers: int = 1
    uploads: int = CONTRIBUTORS
    modulus_bits: int = defaults.MODULUS_BITS
    insecure: bool = False
    peers: bool = True

    def check(self) -> None:
        """Raise UsageError for what cannot be measured."""
        for name, value in (("values", self.values), ("repeat", self.repeat)):
            if not 1 <= value <= _MAX_COUNT:
                raise UsageError(f"--{name}: expected 1 to {_MAX_COUNT}, found {value}")
        if not CONTRIBUTORS <= self.uploads <= MAX_UPLOADS:
            raise UsageError(
                f"--uploads: expected {CONTRIBUTORS} to {MAX_UPLOADS}, found {self.uploads}"
            )


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
            "lattice_kernel": ring.lattice_kernel_name(),
            "machine": f"{machine()}, {os.cpu_count()} cores",
            "python": python_version(),
            "microseconds_a_value": [row.plain() for row in self.rows],
            "not_measured": self.not_measured,
        }


def run_benchmark(options: BenchmarkOptions, progress: ProgressCallback) -> BenchmarkReport:
    """Measure both ciphers with each kernel, a plain round, and the peers that are installed."""
    options.check()
    with tempfile.TemporaryDirectory(prefix="dtl-bench-") as place, ExitStack() as stack:
        folder = Path(place)
        measures: dict[str, Callable[[int], Sample]] = {}
        failed = {}
        for cipher, kernel, reason in _contenders(options.uploads):
            name = f"{OWN} {cipher} {kernel}"
            if reason:
                failed[name] = reason
                continue
            if not (folder / cipher).exists():
                _make_job(folder / cipher, cipher, options, progress)
            keys = folder / f"{cipher}-{kernel}"  # of its own: everyone uploads once a round
            shutil.copytree(folder / cipher, keys)
            limit = DIRECT_VALUES[kernel] if cipher == DIRECT else options.values
            pool = _process(stack, kernel, options.workers)
            measure = partial(_measure_own, folder, keys, min(limit, options.values), options)
            measures[name] = partial(_in, pool, measure)
        pool = _process(stack, "", options.workers)
        measures[PLAIN] = partial(_in, pool, partial(_measure_plain, folder, options))
        for name, peer in peers.installed().items() if options.peers else ():
            if options.uploads > CONTRIBUTORS:
                failed[name] = _NOT_FOR_MANY
                continue
            pool = _process(stack, "", options.workers)
            measures[name] = partial(_in, pool, partial(_measure_peer, peer, options.values))
        samples, broken = _alternate(measures, options.repeat, progress)
    medians = {
        name: Sample(*(median(column) for column in zip(*map(astuple, found), strict=True)))
        for name, found in samples.items()
    }
    first = next(iter(medians.values())).round
    rows = tuple(Row(name, sample, sample.round / first) for name, sample in medians.items())
    return BenchmarkReport(options, rows, failed | broken)


def _contenders(uploads: int) -> Iterator[tuple[str, str, str | None]]:
    """(cipher, kernel, why it cannot be measured here), the fastest first.

    Without `native`, the group is computed by gmpy2, so the direct cipher has no third one.
    """
    wanted, other = kernels.wanted(), f"{kernels.KERNEL_VARIABLE}={kernels.wanted()}"
    compiled = ring.lattice_kernel_name() != ring.NUMPY
    reasons = {
        kernels.NATIVE: residues.why_not_native() or ring.why_not_ifma(),
        kernels.PORTABLE: None if compiled or wanted else ring.why_not_ifma(),
        kernels.GMPY2: None,
    }
    for cipher in (LATTICE, DIRECT):
        for kernel, reason in reasons.items():
            if cipher == DIRECT and kernel == kernels.PORTABLE:
                continue
            many = _NOT_FOR_MANY if cipher == DIRECT and uploads > CONTRIBUTORS else None
            yield cipher, kernel, other if wanted not in ("", kernel) else reason or many


def _make_job(
    folder: Path, cipher: str, options: BenchmarkOptions, progress: ProgressCallback
) -> None:
    job = JobOptions(
        participants=own.names(options.uploads),
        modulus_bits=options.modulus_bits,
        slot_bits=defaults.SLOT_BITS,
        fraction_bits=defaults.FRACTION_BITS,
        min_contributors=defaults.MIN_CONTRIBUTORS,
        masks=True,
        cipher=cipher,
        insecure=options.insecure,
    )
    generate_job(folder, job, work=Work(None, progress))


def _gradients(folder: Path, values: int) -> Path:
    """A file of so many gradients, made once."""
    path = folder / f"gradients-{values}.safetensors"
    if not path.exists():
        layout = (TensorSpec(name="x", shape=(values,), dtype="F32"),)
        with AtomicOutput(path) as output, TensorWriter(output, layout, None) as writer:
            for start in range(0, values, _PIECE):
                writer.write(peers.gradients(values, start, min(_PIECE, values - start)))
            writer.finish(None)
            output.commit()
    return path


def _measure_own(
    folder: Path, keys: Path, values: int, options: BenchmarkOptions, turn: int
) -> Sample:
    count = values if turn else min(values, WARM_VALUES)
    return own.measure(keys, _gradients(folder, count), count, options.workers)


def _measure_plain(folder: Path, options: BenchmarkOptions, turn: int) -> Sample:
    count = options.values if turn else min(options.values, WARM_VALUES)
    return plain.measure(folder, _gradients(folder, count), count, options.uploads)


def _measure_peer(peer: peers.Measure, values: int, turn: int) -> Sample:
    return peer(values)


def _alternate(
    measures: dict[str, Callable[[int], Sample]], repeat: int, progress: ProgressCallback
) -> tuple[dict[str, list[Sample]], dict[str, str]]:
    """The samples of every contender, in turn; and why some have none.

    Turn 0 warms up, and does not count.
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
                sample = measure(turn)
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


def _in(pool: ProcessPoolExecutor, measure: Callable[[int], Sample], turn: int) -> Sample:
    try:
        return pool.submit(measure, turn).result()
    except BrokenProcessPool:
        raise DtlError("a measuring process died") from None
