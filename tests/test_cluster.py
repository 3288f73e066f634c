"""Heavy work on a Dask cluster: real processes on loopback, and the same bytes."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtl.core.cluster import Cluster, connect
from dtl.core.errors import DtlError, UsageError
from dtl.core.files.container import RESIDUES, Container, Rows
from dtl.core.parallel import Work
from dtl.core.roles import server
from tests.helpers import THREE, Arrays, Cli, Round, random_arrays
from tests.network import make_certificate

NewRound = Callable[..., Round]
LOOPBACK = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")
SECONDS = 60
TASK_ERRORS = {
    "TimeoutError": "exec: TimeoutError",
    "ConnectionResetError(104, 'Connection reset')": "exec: connection reset",
    "PermissionError(13, 'Permission denied', '/x')": "/x: permission denied",
}


def start(folder: Path, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
    tls = ("--protocol", "tls") if set(settings) & set(certificates(folder)) else ()
    command = [sys.executable, "-m", "dask", *arguments, *LOOPBACK, *tls]
    log = (folder / f"{arguments[0]}.log").open("ab")
    return subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, cwd="/")


def certificates(folder: Path) -> dict[str, str]:
    """What Dask documents for TLS, as variables."""
    pair = {"CERT": f"{folder}/link.pem", "KEY": f"{folder}/link.key"}
    roles = ("SCHEDULER", "WORKER", "CLIENT")
    names = {f"{role}__{part}": path for role in roles for part, path in pair.items()}
    names["CA_FILE"] = f"{folder}/link.pem"
    return {f"DASK_DISTRIBUTED__COMM__TLS__{name}": path for name, path in names.items()}


def configured(settings: dict[str, str]) -> Any:
    """The same settings in this process."""
    dask = pytest.importorskip("dask")
    names = (name.removeprefix("DASK_").lower().replace("__", ".") for name in settings)
    return dask.config.set(dict(zip(names, settings.values(), strict=True)))


@contextmanager
def cluster_of(folder: Path, **settings: str) -> Iterator[tuple[str, list[int]]]:
    """A scheduler and two workers; yields its address and the workers' process ids."""
    pytest.importorskip("distributed")
    import json
    import time

    place = folder / "scheduler.json"
    named = ("--scheduler-file", str(place))
    processes = [start(folder, "scheduler", "--port", "0", *named, **settings)]
    try:
        worker = ("worker", *named, "--nthreads", "1", "--no-nanny", "--local-directory")
        processes += [start(folder, *worker, str(folder), **settings) for _ in range(2)]
        deadline = time.monotonic() + SECONDS
        while not place.exists():
            assert time.monotonic() < deadline, (folder / "scheduler.log").read_text()
            time.sleep(0.05)
        address = json.loads(place.read_text())["address"]
        with connect(address, secrets=False) as cluster:
            cluster.client.wait_for_workers(2, timeout=SECONDS)
        yield address, [process.pid for process in processes[1:]]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def many_values(seed: int, values: int = 20_000) -> Arrays:
    return {"w": np.random.default_rng(seed).normal(0, 0.05, values).astype(np.float32)}


class Counting:
    """A cluster that counts the tasks which it gets."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self.tasks = cluster, 0
        self.threads, self.secrets = cluster.threads, cluster.secrets

    def submit(self, function: Callable[..., object], task: tuple[object, ...]) -> object:
        self.tasks += 1
        return self._cluster.submit(function, task)


SHARED = {"direct": ("multiply", 20_000, 6), "lattice": ("add", 500_000, 4)}
"""By cipher: the step that a cluster shares out, values for several tasks, and how many."""


@pytest.mark.parametrize("cipher", SHARED)
def test_a_cluster_gives_the_same_bytes_even_when_a_worker_is_killed(
    new_round: NewRound, tmp_path: Path, cipher: str
) -> None:
    shared, values, tasks = SHARED[cipher]
    round_ = new_round(THREE, "--cipher", cipher, masks=True)
    uploads = round_.uploads({name: many_values(i, values) for i, name in enumerate(round_.names)})
    local = round_.aggregate(uploads, out="local.enc")
    key, again = round_.opened_key("server"), tmp_path / "cluster.enc"
    with cluster_of(tmp_path) as (address, workers), connect(address, False) as cluster:
        killed: list[str] = []

        def kill_one(step: str, done: int, total: int | None) -> None:
            # When the first results are there, others are begun or done on both workers.
            if step == shared and 0 < done < (total or 0) and not killed:
                os.kill(workers[0], signal.SIGKILL)
                killed.append(step)

        counting = Counting(cluster)
        work = Work(progress=kill_one, cluster=counting)  # type: ignore[arg-type]
        server.aggregate(key, uploads, again, server.Round(), work=work)
        assert killed
        assert cluster.threads == 1  # the other worker did it
        assert counting.tasks >= tasks
    assert again.read_bytes() == local.read_bytes()


@pytest.mark.parametrize("cipher", SHARED)
def test_commands_take_a_cluster_and_secrets_stay_unless_they_may_go(
    new_round: NewRound, tmp_path: Path, cipher: str
) -> None:
    round_ = new_round(THREE, "--cipher", cipher, masks=True)
    given = {name: many_values(i) for i, name in enumerate(round_.names)}
    job = ("--job", round_.keys / "job.json")
    with cluster_of(tmp_path, DASK_DISTRIBUTED__WORKER__MEMORY__SPILL="False") as (address, _):
        dask = ("--backend", "dask", "--cluster", address)
        secret = (*dask, "--secrets-to-workers")
        for number, name in enumerate(given):
            grads = round_.save("g.safetensors", given[name])
            encrypt = ("encrypt-grads", grads, "--key", round_.key(name), "--round", 1)
            # Without the word, nothing of it leaves; then the rest goes to workers.
            to: tuple[str, ...] = dask if number == 0 else secret
            shown = round_.dtl(*encrypt, *to, "-o", round_.folder / f"{name}.upload")
            assert ("encrypt: stays on this machine" in shown.err) == (number == 0)
        uploads = [round_.folder / f"{name}.upload" for name in given]
        result = round_.aggregate(uploads, *dask)
        found = round_.dtl("verify", result, *job, "--uploads", *uploads, *dask, "--json").json
        assert found["product"].startswith("recomputed")
        release = round_.folder / "result.release"
        kept = round_.dtl(
            "release-model", result, "--key", round_.key("server"), "-o", release, *dask
        )
        # With the lattice cipher, there is but one task.
        alone = "apply the server's half: stays on this machine" in kept.err
        assert alone == (cipher == "direct")
        opened = [tmp_path / f"{name}.safetensors" for name in ("kept", "sent")]
        for path, to in zip(opened, (dask, secret), strict=True):
            own = ("--key", round_.key("alice"), "-o", path)
            shown = round_.dtl("open-model", release, *own, *to)
            assert ("stays on this machine" in shown.err) == (to is dask)
        assert opened[0].read_bytes() == opened[1].read_bytes()
        # What is wrong on a worker is reported as if it had been found here.
        broken = tmp_path / "broken.upload"
        data = bytearray(uploads[0].read_bytes())
        data[-1] ^= 1
        broken.write_bytes(data)
        round_.dtl("verify", broken, *job, *dask, code=4)
        with connect(address, False) as cluster:
            lost = cluster.submit(Rows(Path("/only-here/x"), 0, 1, 1, bytes(32)).read, (0, 1))
            with pytest.raises(DtlError, match="on a worker: /only-here/x: no such file"):
                lost()
            # What fails in a task is no failure of the connection.
            for error, told in TASK_ERRORS.items():
                failed = cluster.submit(exec, (f"raise {error}",))
                with pytest.raises(DtlError, match=f"{address}: on a worker: {told}") as raised:
                    failed()
                assert raised.value.hint is None
    with Container(uploads[0]) as container:
        assert container.tensors[RESIDUES].shape[0] > 1


def test_secrets_go_to_no_worker_that_may_write_them_to_disk(tmp_path: Path) -> None:
    with (
        cluster_of(tmp_path) as (address, _),
        pytest.raises(UsageError, match="never write memory"),
        connect(address, secrets=True),
    ):
        pass


def test_secrets_go_to_no_worker_that_came_after_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtl.core.cluster.LOOK_SECONDS", 2)
    no_spill = {"DASK_DISTRIBUTED__WORKER__MEMORY__SPILL": "False"}
    with (
        cluster_of(tmp_path, **no_spill) as (address, checked),
        connect(address, secrets=True) as cluster,
    ):
        named = ("--scheduler-file", str(tmp_path / "scheduler.json"))
        late = start(tmp_path, "worker", *named, "--no-nanny", "--nthreads", "4")
        try:
            cluster.client.wait_for_workers(3, timeout=SECONDS)
            assert cluster.threads == 2
            tasks = [cluster.submit(os.getpid, ()) for _ in range(24)]
            assert {task() for task in tasks} <= set(checked)
            for process in checked:
                os.kill(process, signal.SIGKILL)
            with pytest.raises(DtlError, match="no worker that was checked answers any more"):
                cluster.submit(os.getpid, ())()
        finally:
            late.kill()
            late.wait()


def test_secrets_go_by_tls_with_the_certificates_that_dask_is_configured_with(
    new_round: NewRound, tmp_path: Path
) -> None:
    pytest.importorskip("dask")
    make_certificate(tmp_path)
    round_ = new_round(masks=True)
    given = {name: many_values(i) for i, name in enumerate(round_.names)}
    settings = certificates(tmp_path)
    no_spill = {"DASK_DISTRIBUTED__WORKER__MEMORY__SPILL": "False"}
    with configured(settings), cluster_of(tmp_path, **settings, **no_spill) as (address, _):
        assert address.startswith("tls://")
        to = ("--backend", "dask", "--cluster", address)
        uploads = round_.uploads(given, *to, "--secrets-to-workers")
        again = round_.aggregate(uploads, *to, out="cluster.enc")
    assert again.read_bytes() == round_.aggregate(uploads, out="local.enc").read_bytes()


@pytest.mark.parametrize("trouble", ["workers", "scheduler"])
def test_a_cluster_that_is_gone_is_an_error_soon(
    new_round: NewRound,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    for name in ("LOOK_SECONDS", "CONNECT_SECONDS"):
        monkeypatch.setattr(f"dtl.core.cluster.{name}", 2)
    round_ = new_round(THREE, "--cipher", "direct", masks=True)
    uploads = round_.uploads({name: many_values(i) for i, name in enumerate(round_.names)})
    key, output = round_.opened_key("server"), tmp_path / "cluster.enc"
    with cluster_of(tmp_path) as (address, workers), connect(address, False) as cluster:
        (scheduler,) = cluster.client.run_on_scheduler(lambda: [os.getpid()])

        def kill(step: str, done: int, total: int | None) -> None:
            if step == "multiply" and not done:
                for process in workers if trouble == "workers" else [scheduler]:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)

        with pytest.raises(DtlError, match="any more") as error:
            server.aggregate(key, uploads, output, server.Round(), work=Work(None, kill, cluster))
        assert trouble[:6] in error.value.message
    assert not output.exists()
    assert logging.getLogger("distributed.client").level == logging.CRITICAL  # no traceback
    round_.aggregate(uploads, out="cluster.enc")  # nothing half-done is in the way


@pytest.mark.parametrize("address", ["here", "http://127.0.0.1:1", "tcp://127.0.0.1", "inproc://"])
def test_an_address_of_another_kind(address: str) -> None:
    with pytest.raises(UsageError, match="expected tcp://HOST:PORT"), connect(address, False):
        pass


def test_tls_without_certificates() -> None:
    pytest.importorskip("distributed")
    place = "tls://127.0.0.1:1"
    with pytest.raises(UsageError, match="not configured"), connect(place, False):
        pass
    with (
        configured(certificates(Path("/nowhere"))),
        pytest.raises(UsageError, match="No such file"),
        connect(place, False),
    ):
        pass


def test_secrets_go_to_no_worker_in_clear_though_the_scheduler_is_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distributed = pytest.importorskip("distributed")

    class Client(contextlib.nullcontext[object]):
        def __init__(self, address: str, **settings: object) -> None:
            super().__init__(self)

        def scheduler_info(self) -> dict[str, str]:
            return {"address": "tcp://127.0.0.1:8786"}

        def run(self, function: object) -> dict[str, bool]:
            return {"tcp://127.0.0.1:5": False, "tcp://10.0.0.2:5": False}

    monkeypatch.setattr(distributed, "Client", Client)
    monkeypatch.setattr("dtl.core.cluster._check", lambda client, address: None)
    with (
        pytest.raises(UsageError, match=r"tcp://10\.0\.0\.2:5: secrets go .* by tls"),
        connect("tcp://127.0.0.1:8786", secrets=True),
    ):
        pass


def test_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("dtl.core.cluster.CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DtlError, match="no Dask scheduler answers"), connect(place, False):
            pass


def test_options_of_a_cluster(dtl: Cli, tmp_path: Path) -> None:
    dtl("verify", tmp_path / "x", "--backend", "dask", "--job", tmp_path, code=2)
    with pytest.raises(UsageError, match="tls://"), connect("tcp://10.0.0.1:8786", secrets=True):
        pass


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("dtl.core.cluster.CONNECT_SECONDS", 0.2)
    with (
        pytest.raises(DtlError, match="no Dask scheduler answers"),
        connect("tcp://127.0.0.1:1", False),
    ):
        pass


def test_rows_are_the_same_where_the_device_has_another_number(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()
    path = round_.upload("alice", random_arrays(1))
    with Container(path) as container:
        rows = container.rows(RESIDUES)
    stat = os.fstat

    def elsewhere(descriptor: int) -> os.stat_result:
        found = list(stat(descriptor))
        found[2] += 1  # st_dev
        times = {name: getattr(stat(descriptor), name) for name in ("st_mtime_ns", "st_ctime_ns")}
        return os.stat_result(found, times)

    before = rows.read(0, 1)
    monkeypatch.setattr(os, "fstat", elsewhere)
    monkeypatch.chdir("/")
    assert rows.read(0, 1) == before
