"""A Dask cluster: connect to it, check that it can do dtl's work, and hand tasks to it.

Tasks go to Dask directly rather than through joblib's bridge, which waits for ever when a task
fails outside of its function, and copies arrays to workers whose death then loses them. What a
task reads, it reads from a shared file system.

Scheduler and workers are trusted: what they compute is not computed again here, and Dask
unpickles what they answer, so that they can run code as whoever runs the command.
"""

import logging
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from dtl.core.errors import DtlError, UsageError

Result = TypeVar("Result")

CONNECT_SECONDS = 20
ANSWER_SECONDS = 600  # a task takes about a second
LOOK_SECONDS = 10  # after so long without an answer, see whether there are workers at all
_ADDRESS = re.compile(r"(tcp|tls)://[^/\s]+:[0-9]{1,5}")
_ENCRYPTED = "tls://"
_SAFE = (_ENCRYPTED, "tcp://127.0.0.1:")  # where secrets may go
_SHARED = "workers read the same files under the same names: they need a shared file system"
_CERTIFICATES = "Dask reads its certificates from DASK_DISTRIBUTED__COMM__TLS__... variables"


@dataclass(frozen=True)
class _Call:
    """A task as Dask sees it: bytes that show in no log, dashboard or graph."""

    data: bytes = field(repr=False)


def _run(call: _Call) -> Any:
    function, task = pickle.loads(call.data)  # noqa: S301  (workers run what clients send anyway)
    try:
        return function(*task)
    except OSError as error:  # by itself it would pass for a failure of the connection
        what = error.filename or function.__name__
        reason = error.strerror.lower() if error.strerror else type(error).__name__
        raise DtlError(f"{what}: {reason}") from None


def _versions() -> tuple[str, str]:
    return version("dtl-toolkit"), f"{sys.version_info.major}.{sys.version_info.minor}"


def _spills() -> bool:
    """Whether a worker moves what it holds to disk when memory runs low."""
    import dask  # noqa: PLC0415  (an extra)

    return dask.config.get("distributed.worker.memory.spill") is not False


@dataclass(frozen=True)
class Cluster:
    """A cluster to send tasks to; `secrets` says whether tasks that hold secrets may go there.

    Then all tasks go to the workers that were `checked`, and to none that joins later.
    """

    address: str
    secrets: bool
    client: Any = field(repr=False)
    checked: tuple[str, ...] = ()

    @property
    def threads(self) -> int:
        """How many tasks run at once; DtlError when the scheduler is gone."""
        try:
            return max(1, sum(self._workers().values()))
        except OSError:
            raise self._gone() from None

    def _workers(self) -> dict[str, int]:
        """The threads of the workers that tasks may go to."""
        found: dict[str, int] = self.client.nthreads()
        return {name: n for name, n in found.items() if not self.secrets or name in self.checked}

    def submit(
        self, function: Callable[..., Result], task: tuple[object, ...]
    ) -> Callable[[], Result]:
        """Begin function(*task) on some worker; returns what waits for its result.

        A worker that dies is none: its tasks begin again on another one.
        """
        call = _Call(pickle.dumps((function, task)))
        workers = list(self.checked) if self.secrets else None
        future = self.client.submit(
            _run, call, pure=False, workers=workers, allow_other_workers=False
        )
        return lambda: self._result(future)

    def _result(self, future: Any) -> Any:
        from distributed import KilledWorker  # noqa: PLC0415  (an extra)
        from distributed.client import FutureCancelledError  # noqa: PLC0415

        deadline = time.monotonic() + ANSWER_SECONDS
        try:
            while True:
                try:
                    return future.result(timeout=LOOK_SECONDS)
                except TimeoutError:
                    # One that died may be on its way back: Dask starts it again.
                    self.client.wait_for_workers(1, timeout=CONNECT_SECONDS)
                    if time.monotonic() > deadline or not self._workers():
                        raise
        except TimeoutError:
            which = "no worker that was checked" if self.secrets else "no worker"
            raise DtlError(f"{self.address}: {which} answers any more") from None
        except KilledWorker:
            raise DtlError(
                f"{self.address}: several workers died of one task",
                "perhaps they ran out of memory: give each fewer threads",
            ) from None
        except DtlError as error:
            if error.exit_code > UsageError.exit_code:  # wrong in itself, wherever it is found
                raise
            hint = _SHARED if isinstance(error, UsageError) else error.hint
            raise DtlError(f"{self.address}: on a worker: {error.message}", hint) from None
        except (FutureCancelledError, OSError):
            raise self._gone() from None

    def _gone(self) -> DtlError:
        return DtlError(f"{self.address}: the scheduler does not answer any more")


@contextmanager
def connect(address: str, secrets: bool) -> Iterator[Cluster]:
    """Connect to the scheduler at `address` (tcp://HOST:PORT, tls://HOST:PORT), and check it.

    Raises UsageError without the extra, for another kind of address, and for secrets where
    they would be in clear on a network or on a disk; DtlError when nobody answers, or another
    dtl or Python does.
    """
    if not _ADDRESS.fullmatch(address):
        raise UsageError(f"{address}: expected tcp://HOST:PORT or tls://HOST:PORT")
    if secrets:
        _check_safe(address, address)
    try:
        from distributed import Client  # noqa: PLC0415  (an extra)
    except ImportError:
        raise UsageError(
            "--backend dask: Dask is not installed", "pip install 'dtl-toolkit[dask]'"
        ) from None
    for name in ("distributed", "distributed.client"):  # dtl itself says what fails, once
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if address.startswith(_ENCRYPTED):
        _check_certificates(address)
    with _begin(Client, address) as client:
        _check(client, address)
        if secrets:
            yield Cluster(address, True, client, _check_workers(client, address))
        else:
            yield Cluster(address, False, client)


def _begin(client: Callable[..., Any], address: str) -> Any:
    """A client of the scheduler at `address`; DtlError when none answers.

    In a thread, because Dask waits for ever where something else than a scheduler listens.
    """
    begun: SimpleQueue[Any] = SimpleQueue()

    def begin() -> None:
        try:
            begun.put(client(address, timeout=CONNECT_SECONDS, set_as_default=False))
        except Exception:
            begun.put(None)

    Thread(target=begin, daemon=True).start()
    try:
        found = begun.get(timeout=2 * CONNECT_SECONDS)
    except Empty:
        found = None
    if found is None:
        raise DtlError(f"{address}: no Dask scheduler answers there")
    return found


def _check_safe(address: str, place: str) -> None:
    """Raise UsageError where secrets would be in clear on a network: a scheduler, a worker."""
    if not place.startswith(_SAFE):
        where = "" if place == address else f"{place}: "
        raise UsageError(
            f"{address}: {where}secrets go to other machines by tls:// only", _CERTIFICATES
        )


def _check_workers(client: Any, address: str) -> tuple[str, ...]:
    """The workers that are there; UsageError unless secrets may go to all of them."""
    spilling: dict[str, bool] = client.run(_spills)
    for place in (client.scheduler_info()["address"], *spilling):
        _check_safe(address, place)
    if any(spilling.values()):
        raise UsageError(
            f"{address}: secrets go only to workers that never write memory to disk",
            "start them with DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False",
        )
    return tuple(spilling)


def _check_certificates(address: str) -> None:
    """Raise UsageError unless Dask's configuration names certificates that can be read."""
    from distributed.security import Security  # noqa: PLC0415  (an extra)

    try:
        found = Security().get_connection_args("client")["ssl_context"]
    except (OSError, ValueError) as error:  # OSError: also what ssl finds wrong with them
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UsageError(f"{address}: Dask's certificates: {reason}", _CERTIFICATES) from None
    if found is None:
        raise UsageError(f"{address}: Dask's certificates are not configured", _CERTIFICATES)


def _check(client: Any, address: str) -> None:
    """Raise DtlError unless there are workers, and scheduler and workers have this dtl."""
    expected = _versions()
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        found = {"the scheduler": client.run_on_scheduler(_versions), **client.run(_versions)}
    except TimeoutError:
        raise DtlError(f"{address}: the scheduler has no workers") from None
    except Exception as error:
        raise DtlError(
            f"{address}: a task of dtl's cannot run there ({type(error).__name__})",
            "the scheduler and every worker need the same dtl-toolkit installed",
        ) from None
    for where, versions in found.items():
        if versions != expected:
            raise DtlError(
                f"{address}: {where} has dtl {versions[0]} on Python {versions[1]}, "
                f"expected dtl {expected[0]} on Python {expected[1]}"
            )
