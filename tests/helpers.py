"""A job and its parties through the command line, from fixed primes."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dtl.core.files.container import RESIDUES, Container
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key

# Safe primes, fixed and published here: never to be used for anything but tests.
PRIMES = {
    256: (0xD3572EADA4CDCADAD8F8D70A151A048F, 0xE9E32B0AADDA528B92478107FB0031AB),
    512: (
        0xC4A4F55A741382846AD20675B8BBC43496B813630D44950A9FB98D4ED37624B7,
        0xD4B428511BE9FD71061AB0C06839C5E26B6AADCAED5988D6B84B55427853200B,
    ),
    3072: (
        int(
            "f2de34d5db05bf2700b0a3e788ede9206bcdb4c2da735bff1ba9bf44774a73de186facad00942777"
            "7b0ce54a0142d79cf43b3fcdd08ddd19e7013fe0c73dc157d6c6f2e10bce7784333eca579ef7968c"
            "75929f073297091da14636400def526fb71bdd586ef2c0705820794b764ae12890746dd59a0807b8"
            "d8ae02d7d7c780eb28ec862a378972922252e413f0ec64c33a0708748f11e8ca217393be8999cc59"
            "e96d9283b271f0c3fb90555619094599750dd0fbf1a177227d771608c4695e67",
            16,
        ),
        int(
            "e20789a6187184020a01716fad21e44854ff6e27bfc04190b0520896cb933fdb3430a7f0e32e126d"
            "85660f02ab8780cfd4f94aa41c7171dfbd96a8851e94b3b992964debf6caf9deeff0a7c17b2eb42a"
            "f8572df43d52ee4a2a648ecb93130cbd46fb5f23c945575eff7237cd6516abf3a0e6ac58de843546"
            "2803fd7b9a43f457ef385faed26acd09fcdd93bb5d18e6317b779add4a03b60f3e7b92a95a8e7646"
            "bee0888e364724ed4764dac73356a35d5bc013285d5ec9e68d209e1693176e5f",
            16,
        ),
    ),
}
THREE = ("alice", "bob", "carol")
CIPHERS = ("lattice", "direct")
ONE = 2**16  # the integer that stands for 1.0, by default
Arrays = dict[str, NDArray[Any]]


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


Cli = Callable[..., Result]


class Round:
    """A job in a folder, and the steps of its parties through the command line."""

    def __init__(self, dtl: Cli, folder: Path, names: tuple[str, ...], *options: object) -> None:
        self.dtl, self.folder, self.names = dtl, folder, names
        self.keys = folder / "job"
        roster = ",".join(names)
        sizes = () if "--modulus-bits" in options else ("--modulus-bits", 512, "--insecure")
        if not self.keys.exists():
            dtl("keygen", self.keys, "--participants", roster, *sizes, *options)
        self.job = Job.load(self.keys / "job.json")

    def copied(self, folder: Path) -> "Round":
        """The same round with all its files in another folder."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Round(self.dtl, folder, self.names)

    def key(self, name: str) -> Path:
        return self.keys / f"{name}.key"

    def opened_key(self, name: str) -> Key:
        return Key.load(self.key(name), self.keys / "job.json", lambda: b"")

    def save(self, name: str, arrays: Arrays, **metadata: str) -> Path:
        path = self.folder / name
        save_file(arrays, path, metadata or None)
        return path

    def upload(
        self, name: str, arrays: Arrays, *options: object, code: int = 0, out: str = ""
    ) -> Path:
        gradients = self.save(f"{name}.grads.safetensors", arrays)
        path = self.folder / (out or f"{name}.upload")
        if not {"--round", "--model"} & set(options):
            options = (*options, "--round", 1)
        self.dtl(
            "encrypt-grads", gradients, "--key", self.key(name), "-o", path, *options, code=code
        )
        return path

    def uploads(self, arrays: dict[str, Arrays], *options: object, tag: str = "") -> list[Path]:
        return [
            self.upload(name, given, *options, out=f"{name}{tag}.upload")
            for name, given in arrays.items()
        ]

    def aggregate(
        self, uploads: list[Path], *options: object, out: str = "result.enc", code: int = 0
    ) -> Path:
        path = self.folder / out
        self.dtl(
            "aggregate", *uploads, "--key", self.key("server"), "-o", path, *options, code=code
        )
        assert path.exists() == (code == 0)
        return path

    def release(
        self, result: Path, *options: object, out: str = "result.release", code: int = 0
    ) -> Path:
        path = self.folder / out
        self.dtl(
            "release-model", result, "--key", self.key("server"), "-o", path, *options, code=code
        )
        assert path.exists() == (code == 0)
        return path

    def open(
        self,
        release: Path,
        name: str,
        *options: object,
        out: str = "opened.safetensors",
        code: int = 0,
    ) -> Path:
        path = self.folder / out
        before = path.exists()
        self.dtl("open-model", release, "--key", self.key(name), "-o", path, *options, code=code)
        assert path.exists() == (before or code == 0)
        return path

    def open_all(self, release: Path, names: Iterable[str] = (), *, out: str) -> Path:
        """Everybody opens a release, by default all of the job: to the same bytes."""
        found: set[bytes] = set()
        for name in names or self.names:
            found.add(self.open(release, name, "--force", out=out).read_bytes())
        assert len(found) == 1
        return self.folder / out

    def opened(self, release: Path, name: str) -> Arrays:
        path = self.open(release, name, "--force")
        found: Arrays = load_file(path)
        return found


def random_arrays(seed: int, scale: float = 0.05, dtype: Any = np.float32) -> Arrays:
    """Two small tensors of normal values."""
    generator = np.random.default_rng(seed)
    return {
        "a.weight": generator.normal(0, scale, (7, 5)).astype(dtype),
        "b": generator.normal(0, scale, 300).astype(dtype),
    }


def residues_of(path: Path) -> NDArray[np.uint8]:
    """The residues of a bulk file, [groups, 8, width]."""
    with Container(path) as container:
        tensor = container.tensors[RESIDUES]
        data = container.read(tensor.start, tensor.length)
        return np.frombuffer(data, np.uint8).reshape(tensor.shape)
