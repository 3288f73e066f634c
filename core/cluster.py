"""A Dask cluster: connect to it, check that it can do dtl's work, and hand tasks to it.

Tasks go to Dask directly rather than through joblib's bridge, which waits for ever when a task
fails outside of its function, and copies arrays to workers whose death then loses them. What a
task reads, it reads from a shared file system.
"""

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

from dtl.core.errors import DtlError, UsageError

Result = TypeVar("Result")

CONNECT_SECONDS = 20
ANSWER_SECONDS = 600  # a task takes about a second; longer than this, and no worker is left
_ENCRYPTED = "tls://"


@dataclass(frozen=True)
class _Call:
    """A task as Dask sees it: bytes that show in no log, dashboard or graph."""

    data: bytes = field(repr=False)


def _run(call: _Call) -> Any:
    function, task = pickle.loads(call.data)  # noqa: S301  (workers run what clients send anyway)
    return function(*task)


def _versions() -> tuple[str, str]:
    return version("dtl-toolkit"), f"{sys.version_info.major}.{sys.version_info.minor}"


def _spills() -> bool:
    """Whether a worker moves what it holds to disk when memory runs low."""
    import dask  # noqa: PLC0415  (an extra)

    return dask.config.get("distributed.worker.memory.spill") is not False


@dataclass(frozen=True)
class Cluster:
    """A cluster to send tasks to; `secrets` says whether tasks that hold secrets may go there."""

    address: str
    secrets: bool
    client: Any = field(repr=False)

    @property
    def threads(self) -> int:
        """How many tasks run at once."""
        found: dict[str, int] = self.client.nthreads()
        return max(1, sum(found.values()))

    def submit(
        self, function: Callable[..., Result], task: tuple[object, ...]
    ) -> Callable[[], Result]:
        """Begin function(*task) on some worker; returns what waits for its result.

        A worker that dies is none: its tasks begin again on another one.
        """
        call = _Call(pickle.dumps((function, task)))
        future = self.client.submit(_run, call, pure=False)
        return lambda: self._result(future)

    def _result(self, future: Any) -> Any:
        from distributed import KilledWorker, TimeoutError  # noqa: PLC0415  (an extra)
        from distributed.client import FutureCancelledError  # noqa: PLC0415

        try:
            return future.result(timeout=ANSWER_SECONDS)
        except TimeoutError:
            raise DtlError(f"{self.address}: no worker answers any more") from None
        except (KilledWorker, FutureCancelledError):
            raise DtlError(
                f"{self.address}: several workers died of one task, or the scheduler did",
                "perhaps they ran out of memory: give each fewer threads",
            ) from None


@contextmanager
def connect(address: str, secrets: bool) -> Iterator[Cluster]:
    """Connect to the scheduler at `address` (tcp://HOST:PORT, tls://HOST:PORT), and check it.

    Raises UsageError without the extra, and for secrets where they would be in clear on a
    network or on a disk; DtlError when nobody answers, or another dtl or Python does.
    """
    if secrets and not address.startswith((_ENCRYPTED, "tcp://127.0.0.1:")):
        raise UsageError(
            f"{address}: secrets go to other machines by tls:// only",
            "Dask reads its certificates from DASK_DISTRIBUTED__COMM__TLS__... variables",
        )
    try:
        from distributed import Client  # noqa: PLC0415  (an extra)
    except ImportError:
        raise UsageError(
            "--backend dask: Dask is not installed", "pip install 'dtl-toolkit[dask]'"
        ) from None
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError):
        raise DtlError(f"{address}: no Dask scheduler answers there") from None
    with client:
        _check(client, address)
        if secrets and any(client.run(_spills).values()):
            raise UsageError(
                f"{address}: secrets go only to workers that never write memory to disk",
                "start them with DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False",
            )
        yield Cluster(address, secrets, client)


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
