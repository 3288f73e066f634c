"""One map over chunks: in this thread, in threads, processes or a cluster, with progress.

The one place that decides where work runs: the native kernel releases the GIL, so threads
share its tables; gmpy2 does not, so its work goes to processes through joblib. Where there is
a Dask cluster, work without secrets goes there. Work is a module-level function of small
arguments; results come back in the order of the tasks, a few at a time, so memory does not
grow with their number.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from dtl.core import dumps
from dtl.core.cluster import Cluster
from dtl.core.errors import DtlError
from dtl.core.progress import ProgressCallback, silent

Result = TypeVar("Result")
logger = logging.getLogger("dtl")

_WATCH_SECONDS = 0.5
SERIAL_TASKS = 8  # fewer tasks than this usually end before a pool of processes has started
_AHEAD = 2  # tasks for each worker that are begun or done before their turn


def default_workers() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Work:
    """Where work is done, and whom it tells of progress.

    On so many cores of this machine (None: all); and on a cluster, where there is one.
    """

    workers: int | None = None
    progress: ProgressCallback = silent
    cluster: Cluster | None = None

    @property
    def lanes(self) -> int:
        """How many tasks run at once, of those whose arguments are public."""
        return self.cluster.threads if self.cluster else self.workers or default_workers()

    def map(
        self,
        step: str,
        function: Callable[..., Result],
        tasks: Iterable[tuple[object, ...]],
        total: int,
        serial_below: int = SERIAL_TASKS,
        kernel: bool = True,
        values: int | None = None,
        public: bool = False,
        threads: bool = False,
    ) -> Iterator[Result]:
        """Yield function(*task) for all `total` tasks, in order; `step` names the work.

        `tasks` may be a generator; it is consumed only as fast as results are taken. Where
        processes are needed, fewer than `serial_below` tasks run in this one. `kernel` says
        that the function spends its time in batch arithmetic; `threads` that it runs well in
        threads whatever computes that arithmetic. `values` is what all tasks
        stand for together, and then what progress counts. `public` says that anybody may see
        the arguments of all tasks: others go to a cluster only where it may have secrets. An
        exception of the function is raised here.
        """
        from dtl.core.crypto.residues import NATIVE, kernel_name  # noqa: PLC0415  (needs numpy)

        workers = self.workers or default_workers()
        threads = threads or (kernel_name() == NATIVE and kernel)
        cluster = self.cluster
        if cluster is not None and total < 2:
            cluster = None  # nothing to share out
        if cluster is not None and not (public or cluster.secrets):
            logger.warning(
                "%s: stays on this machine, as it needs a secret (--secrets-to-workers)", step
            )
            cluster = None
        results: Iterator[Result]
        if cluster is not None:
            results = _in_order(cluster.submit, function, tasks, cluster.threads)
        elif workers == 1 or total < (2 if threads else serial_below):
            results = (function(*task) for task in tasks)
        elif threads:
            results = _threads(function, tasks, workers)
        else:
            results = _processes(function, tasks, workers)
        units = total if values is None else values
        self.progress(step, 0, units)
        for done, result in enumerate(results, 1):
            self.progress(step, units * done // total, units)
            yield result


_guards: list[threading.Thread] = []


def _guarded(parent: int, function: Callable[..., Result], task: tuple[object, ...]) -> Result:
    """Run a task in a worker, which ends when the process that it works for has ended.

    A worker may hold a half; it must not outlive a killed command, nor leave a core dump.
    """
    if not _guards:
        dumps.forbid()
        _guards.append(threading.Thread(target=_watch, args=(parent,), daemon=True))
        _guards[0].start()
    return function(*task)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


DEFAULT_WORK = Work()
"""All cores, silently."""


def _in_order(
    submit: Callable[[Callable[..., Result], tuple[object, ...]], Callable[[], Result]],
    function: Callable[..., Result],
    tasks: Iterable[tuple[object, ...]],
    workers: int,
) -> Iterator[Result]:
    """Results in the order of the tasks, of which a few are begun ahead.

    `submit` begins function(*task) somewhere, and returns what waits for its result.
    """
    remaining = iter(tasks)
    begun = deque(submit(function, task) for task in islice(remaining, _AHEAD * workers))
    while begun:
        yield begun.popleft()()
        begun.extend(submit(function, task) for task in islice(remaining, 1))


def _threads(
    function: Callable[..., Result],
    tasks: Iterable[tuple[object, ...]],
    workers: int,
) -> Iterator[Result]:
    pool = ThreadPoolExecutor(workers)
    try:
        yield from _in_order(
            lambda function, task: pool.submit(function, *task).result, function, tasks, workers
        )
    finally:  # an interrupted command waits for no more than the tasks that run
        pool.shutdown(cancel_futures=True)


def _processes(
    function: Callable[..., Result],
    tasks: Iterable[tuple[object, ...]],
    workers: int,
) -> Iterator[Result]:
    from joblib import Parallel, delayed  # noqa: PLC0415  (slow to import)

    pool = Parallel(
        n_jobs=workers,
        return_as="generator",
        batch_size=1,
        # joblib would write large arguments to a temporary file for its workers to map;
        # they may be plaintext, which must never touch the disk.
        max_nbytes=None,
    )
    try:
        yield from pool(delayed(_guarded)(os.getpid(), function, task) for task in tasks)
    except BrokenProcessPool:
        raise DtlError(
            "a worker process died", "perhaps it ran out of memory: take fewer --workers"
        ) from None
