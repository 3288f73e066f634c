"""A SuperLink and SuperNodes of Flower as real processes on loopback."""

import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

DTL = str(Path(sys.executable).with_name("dtl"))
LOOPBACK = "127.0.0.1"


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Network:
    """Starts processes, each with a log in the folder, and ends them all."""

    def __init__(self, folder: Path, link_options: tuple[str, ...] = ("--insecure",)) -> None:
        self.folder = folder
        self.address = f"{LOOPBACK}:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        port = self.address.rpartition(":")[2]
        place = ("--host", LOOPBACK, "--port", port)
        self.start("superlink", "superlink", *place, *link_options)
        self._wait_for_port(int(port))

    def _wait_for_port(self, port: int, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection((LOOPBACK, port)).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    self.close()
                    raise AssertionError(self.log("superlink")) from None
            time.sleep(0.1)

    def start(self, name: str, part: str, *options: str) -> None:
        """Start a part in a session of its own, so that all it starts ends with it."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [DTL, "flower", part, str(self.folder / f"{name}-home"), *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )

    def node(
        self, name: str, options: tuple[str, ...] = ("--insecure",), **settings: object
    ) -> None:
        """Start a participant's SuperNode; settings go into its node configuration."""
        words = {
            "key": f"job/{name}.key",
            "data": f"shards/{name}.npz",
            "folder": f"{name}-files",
            "rounding-seed": "s",
        } | {key.replace("_", "-"): value for key, value in settings.items()}
        shown = {
            key: f'"{v}"' if isinstance(v, str) else str(v).lower() for key, v in words.items()
        }
        config = " ".join(f"{key}={value}" for key, value in shown.items())
        here = ("--superlink", self.address, "--host", LOOPBACK, "--port", str(free_port()))
        self.start(name, "supernode", *here, *options, "--node-config", config)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, folder: str) -> subprocess.Popen[bytes]:
        """Start the run that flower-config wrote."""
        with (self.folder / "run.log").open("ab") as log:
            return subprocess.Popen(
                [DTL, "flower", "run", folder], stdout=log, stderr=log, cwd=self.folder
            )

    def log(self, name: str = "run") -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for name in list(self.processes):
            self.kill(name)


def make_certificate(folder: Path) -> None:
    """One that vouches for itself: link.pem, link.key."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "dtl test")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(hosts, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA384())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "link.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "link.key").write_bytes(private)
