"""`make engines`: Dask and Flower as they are meant to be used, in a network of loopback only.

Twenty uploads on a cluster whose worker is killed; ten rounds of five nodes of which one is
away for three; nodes that authenticate themselves. Some minutes.
"""

import fcntl
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import load_file, save_file

from dtl.cli import app
from dtl.core.cluster import connect
from dtl.core.files.key_file import Key
from dtl.core.parallel import Work
from dtl.core.roles import key_center, server
from tests.helpers import PRIMES
from tests.network import DTL, Network, make_certificate
from tests.test_cluster import cluster_of

FIVE = ("a", "b", "c", "d", "e")
ROUNDS, KILLED, BACK = 10, 4, 7
VALUES, UPLOADS = 1_000_000, 20
_ISOLATED = "DTL_TEST_ISOLATED"
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


def isolate() -> None:
    """Go on in a network namespace whose only interface is loopback, where that is possible."""
    if os.environ.get(_ISOLATED) is None:
        command = ["unshare", "-rn", sys.executable, "-m", "tests.engines", *sys.argv[1:]]
        possible = shutil.which("unshare") and not subprocess.call(["unshare", "-rn", "true"])
        if possible:
            os.execvpe(command[0], command, os.environ | {_ISOLATED: "1"})  # noqa: S606
        print("no network namespace here: nothing shows that only loopback is contacted")
        return
    with socket.socket() as any_socket:
        request = struct.pack("16sh22x", b"lo", _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    except OSError:
        print("in a network namespace with loopback only")
    else:
        raise AssertionError("other machines can be reached")


def dtl(*arguments: object) -> None:
    assert app.run([*map(str, arguments), "--quiet"]) == 0, arguments


def make_job(names: tuple[str, ...], bits: int = 512) -> None:
    key_center._safe_primes = lambda size, work: cycle(PRIMES[size])  # type: ignore[assignment]
    roster = ("--participants", ",".join(names))
    dtl("keygen", "job", *roster, "--modulus-bits", bits, *["--insecure"] * (bits < 2048))
    dtl("split-data", "digits", *roster, "--out", "shards")
    first = ("--data", f"shards/{names[0]}.npz", "--hidden", 16, "--seed", 0)
    dtl("init-model", *first, "-o", "w0.safetensors")


def twenty_uploads(folder: Path) -> None:
    names = tuple(f"p{number:02}" for number in range(UPLOADS))
    make_job(names, 3072)
    for number, name in enumerate(names):
        values = np.random.default_rng(number).normal(0, 0.001, VALUES).astype(np.float32)
        save_file({"w": values}, "g.safetensors")
        own = ("--key", f"job/{name}.key", "--round", 1)
        dtl("encrypt-grads", "g.safetensors", *own, "-o", f"{name}.upload")
    paths = [folder / f"{name}.upload" for name in names]
    start = time.monotonic()
    dtl("aggregate", *paths, "--key", "job/server.key", "-o", "local.enc")
    local = time.monotonic() - start
    for kill in (False, True):
        result = folder / f"cluster-{kill}.enc"
        seconds = on_cluster(folder, paths, result, kill)
        assert result.read_bytes() == (folder / "local.enc").read_bytes()
        print(f"dask: {seconds:.1f} s, a worker killed: {kill}; here: {local:.1f} s; same bytes")


def on_cluster(folder: Path, paths: list[Path], result: Path, kill: bool) -> float:
    """Aggregate on a cluster of two workers, of which one may be killed; returns seconds."""
    key = Key.load(folder / "job/server.key", folder / "job/job.json", lambda: b"")
    killed: list[str] = []
    place = folder / result.stem
    place.mkdir()
    with cluster_of(place) as (address, workers), connect(address, False) as cluster:

        def halfway(step: str, done: int, total: int | None) -> None:
            if kill and step == "add" and done > (total or 0) / 3 and not killed:
                os.kill(workers[0], signal.SIGKILL)
                killed.append(step)

        start = time.monotonic()
        work = Work(progress=halfway, cluster=cluster)
        server.aggregate(key, paths, result, server.Round(), work=work)
        seconds = time.monotonic() - start
    assert bool(killed) == kill
    return seconds


def ten_rounds(folder: Path) -> None:
    make_job(FIVE)
    shutil.copytree("job", "hand-job")
    network = Network(folder)
    try:
        for name in FIVE:
            network.node(name)
        given = ("--key", "job/server.key", "--initial", "w0.safetensors", "--rounds", ROUNDS)
        waits = ("--round-timeout", 40, "--superlink", network.address)
        dtl("flower-config", "run", *given, *waits)
        start = time.monotonic()
        run = network.run("run")
        wait_for(network, folder / f"run/rounds/{KILLED - 1:03}/model.release", run)
        network.kill("c")
        # From the close file on, a round is without it; starting takes it a while.
        wait_for(network, folder / f"run/rounds/{BACK - 1:03}/round.close", run)
        network.node("c")
        assert run.wait(900) == 0, network.log()
        seconds = time.monotonic() - start
    finally:
        network.close()
    away = {}
    for number in range(1, ROUNDS + 1):
        with_job = ("verify", f"run/rounds/{number:03}/model.enc", "--job", "job/job.json")
        dtl(*with_job)
        present = sorted(path.stem for path in Path(f"run/rounds/{number:03}").glob("*.upload"))
        away[number] = sorted(set(FIVE) - set(present))
    print(f"flower: {ROUNDS} rounds in {seconds:.0f} s; missing: {away}")
    assert all("c" in away[number] for number in range(KILLED, BACK))
    assert not any(away[number] for number in range(1, KILLED))
    assert not any(away[number] for number in range(BACK + 1, ROUNDS + 1))
    expected = by_hand(away)
    for name in FIVE:
        found = load_file(f"{name}-files/model.safetensors")
        assert all((found[tensor] == expected[tensor]).all() for tensor in expected)
    print("the last model equals the run by hand, integer for integer")
    dtl("evaluate", "--model", "a-files/model.safetensors", "--data", "shards/test.npz")


def wait_for(network: Network, path: Path, run: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert run.poll() is None, network.log()
        time.sleep(0.2)


def by_hand(away: dict[int, list[str]]) -> dict[str, np.ndarray[Any, Any]]:
    """The same rounds with commands, with the keys as they were at the start."""
    Path("hand").mkdir()
    key: Callable[[str], tuple[str, str]] = lambda name: ("--key", f"hand-job/{name}.key")  # noqa: E731
    base: tuple[object, ...] = ("--initial", "w0.safetensors")
    for n in range(1, ROUNDS + 1):
        here = [name for name in FIVE if name not in away[n]]
        for name in here:
            model, grads = "w0.safetensors", f"hand/{n}-{name}.safetensors"
            if n > 1:
                model = f"hand/{name}.model.safetensors"
                dtl("open-model", f"hand/{n - 1}.release", *key(name), "-o", model, "--force")
            data = ("--data", f"shards/{name}.npz", "--local-epochs", 1, "--seed", 0)
            dtl("compute-grads", "--model", model, *data, "-o", grads)
            seed = ("--rounding-seed", f"s-{name}-{n}", "--round", n)
            dtl("encrypt-grads", grads, *key(name), *seed, "-o", f"hand/{n}-{name}.upload")
        uploads = [f"hand/{n}-{name}.upload" for name in here]
        closing: list[str] = []
        if away[n]:
            dtl("close-round", *uploads, *key("server"), "-o", f"hand/{n}.close")
            reveals = [f"hand/{n}-{name}.reveal" for name in here]
            for name, reveal in zip(here, reveals, strict=True):
                dtl("reveal-masks", f"hand/{n}.close", *key(name), "-o", reveal)
            closing = ["--close", f"hand/{n}.close", "--reveals", *reveals]
        dtl("aggregate", *uploads, *key("server"), *base, *closing, "-o", f"hand/{n}.enc")
        dtl("release-model", f"hand/{n}.enc", *key("server"), "-o", f"hand/{n}.release")
        base = ("--model", f"hand/{n}.enc")
    dtl("open-model", f"hand/{ROUNDS}.release", *key("a"), "-o", "hand/last.safetensors")
    found: dict[str, np.ndarray[Any, Any]] = load_file("hand/last.safetensors")
    return found


def authentication(folder: Path) -> None:
    """TLS; a node that is not registered is refused; one speaks for nobody but its own."""
    names = FIVE[:4]
    make_job(names)
    make_certificate(folder)
    for name in (*names, "stranger"):
        make_node_key(folder, name)
    tls = ("--ssl-certfile", "link.pem", "--ssl-keyfile", "link.key", "--ssl-ca-certfile")
    network = Network(folder, (*tls, "link.pem", "--enable-supernode-auth"))
    try:
        given = ("--key", "job/server.key", "--initial", "w0.safetensors", "--rounds", 1)
        link = ("--superlink", network.address, "--root-certificates", "link.pem")
        dtl("flower-config", "run", *given, *link, "--registered-only", "--start-timeout", 30)
        for name in names:
            register = ("supernode", "register", f"{name}.pub", "--name", name)
            subprocess.run([DTL, "flower", "flwr", "run", *register], check=True, cwd=folder)
        for name in names[:3]:
            network.node(name, node_options(name))
        # d's node has b's key (stolen, say), and the stranger's has d's own.
        network.node("d", node_options("d"), key="stolen/b.key", folder="d-files")
        shutil.copytree("job", "stolen")
        network.node("stranger", node_options("stranger"), key="job/d.key", data="shards/d.npz")
        assert network.run("run").wait(300) == 0, network.log()
    finally:
        network.close()
    assert "refused what the node of d delivered" in network.log()
    assert not Path("stranger-files").exists()
    present = sorted(path.stem for path in Path("run/rounds/001").glob("*.upload"))
    assert present == ["a", "b", "c"]
    print("authentication: the stranger is refused; d's node cannot deliver for b")


def node_options(name: str) -> tuple[str, ...]:
    return ("--root-certificates", "link.pem", "--auth-supernode-private-key", f"{name}.pem")


def make_node_key(folder: Path, name: str) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    (folder / f"{name}.pem").write_bytes(private)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (folder / f"{name}.pub").write_bytes(public)


PARTS = {part.__name__: part for part in (twenty_uploads, ten_rounds, authentication)}


def main(wanted: list[str]) -> None:
    isolate()
    logging.disable(logging.WARNING)  # that the keys are for tests only
    for name in wanted or list(PARTS):
        with tempfile.TemporaryDirectory(prefix="dtl-engines-") as folder:
            os.chdir(folder)
            PARTS[name](Path(folder))
            os.chdir("/")


if __name__ == "__main__":
    main(sys.argv[1:])
