"""One small job through every command, with a snapshot of the folder before each of them.

Four participants, insecure keys of 256 bits, one group of values. In round 1 dave is missing:
the round is closed, masks are revealed, dave is admitted. In round 2 all four are there, and
the bare sum is released. In round 3 they add up gradients of another program, and step along
the sum on their own.
"""

import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from dtl.cli import app
from dtl.core.roles import key_center
from tests.helpers import PRIMES

NAMES = ("alice", "bob", "carol", "dave")
PRESENT = NAMES[:3]
ROSTER = ",".join(NAMES)
SUFFIXES = ("safetensors", "npz")
MODULUS_BITS = 256
SMALL = ("--modulus-bits", str(MODULUS_BITS), "--insecure")
EPOCH = 1_700_000_000
RUN = ("--participants", "3", "--rounds", "2", "--hidden", "2", "--local-epochs", "1")


@dataclass(frozen=True)
class Step:
    """A command that writes: its words, its output, and the commands that accept the output."""

    name: str
    words: tuple[str, ...]
    output: str
    accept: tuple[tuple[str, ...], ...] = ()


def _step(name: str, output: str, words: str, *accept: str) -> Step:
    return Step(name, tuple(words.split()), output, tuple(tuple(text.split()) for text in accept))


def _upload(name: str, number: int, base: str) -> list[Step]:
    suffix = SUFFIXES[NAMES.index(name) % 2 - 1]  # of alice .npz, of bob the other, and so on
    gradients, upload = f"{name}-{number}.grads.{suffix}", f"{name}-{number}.upload"
    opens = f"--model {base}" if number > 1 else ""
    return [
        _step(
            "compute-grads",
            gradients,
            f"compute-grads --model {base} --data shards/{name}.npz -o {gradients}",
            f"inspect {gradients}",
        ),
        _step(
            "encrypt-grads",
            upload,
            f"encrypt-grads {gradients} --key job/{name}.key -o {upload}",
            f"verify {upload} --job job/job.json",
            f"audit {upload} --key job/kgc.key {opens}",
        ),
    ]


def _opened(name: str, number: int, suffix: str) -> Step:
    out = f"{name}-w{number}.{suffix}"
    words = f"open-model model-{number}.release --key job/{name}.key -o {out}"
    accept = f"evaluate --model {out} --data shards/test.npz"
    return _step("open-model", out, words, accept)


def steps() -> list[Step]:
    """Every command that writes, in the order of a job of two rounds, and a simulation."""
    first = " ".join(f"{name}-1.upload" for name in PRESENT)
    second, third = (" ".join(f"{name}-{n}.upload" for name in NAMES) for n in (2, 3))
    reveals = " ".join(f"{name}.reveal" for name in PRESENT)
    closing = f"--close round-1.close --reveals {reveals}"
    job, server = "--job job/job.json", "--key job/server.key"
    return [
        _step(
            "keygen",
            "job",
            f"keygen job --participants {ROSTER} {' '.join(SMALL)}",
            "verify job/job.json --job job/job.json",
            *(f"inspect job/{name}.ledger" for name in ("server", *NAMES)),
        ),
        _step(
            "split-data",
            "shards",
            f"split-data data.csv --participants {ROSTER} --out shards",
            *(f"inspect shards/{name}.npz" for name in (*NAMES, "test")),
        ),
        _step(
            "init-model",
            "w0.safetensors",
            "init-model --data shards/alice.npz --hidden 2 -o w0.safetensors",
            "evaluate --model w0.safetensors --data shards/test.npz",
        ),
        *(step for name in PRESENT for step in _upload(name, 1, "w0.safetensors")),
        _step(
            "close-round",
            "round-1.close",
            f"close-round {first} {server} -o round-1.close",
            f"verify round-1.close {job}",
        ),
        *(
            _step(
                "reveal-masks",
                f"{name}.reveal",
                f"reveal-masks round-1.close --key job/{name}.key -o {name}.reveal",
                f"verify {name}.reveal {job}",
                f"audit {name}.reveal --key job/kgc.key",
            )
            for name in PRESENT
        ),
        _step(
            "aggregate",
            "model-1.enc",
            f"aggregate {first} {server} --initial w0.safetensors {closing} -o model-1.enc",
            f"verify model-1.enc {job} --initial w0.safetensors --uploads {first} "
            f"--reveals {reveals}",
            "audit model-1.enc --key job/kgc.key",
        ),
        _step(
            "release-model",
            "model-1.release",
            f"release-model model-1.enc {server} --admit dave -o model-1.release",
            f"verify model-1.release {job} --initial w0.safetensors --uploads {first} "
            f"--reveals {reveals} --key job/alice.key",
        ),
        *(_opened(name, 1, suffix) for name, suffix in zip(NAMES, cycle(SUFFIXES), strict=False)),
        _step(
            "audit",
            "recovered.npz",
            "audit model-1.enc --key job/kgc.key --plaintext recovered.npz",
            "evaluate --model recovered.npz --data shards/test.npz",
        ),
        *(
            step
            for name, suffix in zip(NAMES, cycle(SUFFIXES), strict=False)
            for step in _upload(name, 2, f"{name}-w1.{suffix}")
        ),
        _step(
            "aggregate",
            "model-2.enc",
            f"aggregate {second} {server} --model model-1.enc -o model-2.enc",
            "audit model-2.enc --key job/kgc.key",
        ),
        _step(
            "aggregate",
            "sum-2.enc",
            f"aggregate {second} {server} -o sum-2.enc",
            "audit sum-2.enc --key job/kgc.key",
        ),
        _step(
            "release-model",
            "sum-2.release",
            f"release-model sum-2.enc {server} -o sum-2.release",
            f"verify sum-2.release {job}",
        ),
        _step(
            "open-model",
            "alice-sum-2.npz",
            f"open-model sum-2.release --key job/alice.key -o alice-sum-2.npz --uploads {second}",
        ),
        *(
            _step(
                "encrypt-grads",
                f"{name}-3.upload",
                f"encrypt-grads plain.safetensors --round 3 --key job/{name}.key "
                f"-o {name}-3.upload",
            )
            for name in NAMES
        ),
        _step("aggregate", "sum-3.enc", f"aggregate {third} {server} -o sum-3.enc"),
        _step(
            "release-model", "sum-3.release", f"release-model sum-3.enc {server} -o sum-3.release"
        ),
        *(
            _step(
                "open-model",
                f"{name}-sum-3.npz",
                f"open-model sum-3.release --key job/{name}.key -o {name}-sum-3.npz",
            )
            for name in NAMES[:2]
        ),
        _step(
            "apply-sum",
            "alice-w3.npz",
            "apply-sum alice-sum-3.npz --model alice-w1.safetensors --key job/alice.key "
            "--optimizer adam --lr 0.1 --state-out adam-3.npz -o alice-w3.npz",
            "evaluate --model alice-w3.npz --data shards/test.npz",
        ),
        _step(
            "encrypt-grads",
            "bob-4.upload",
            "encrypt-grads plain.safetensors --model bob-w1.npz --own-step --key job/bob.key "
            "-o bob-4.upload",
            "audit bob-4.upload --key job/kgc.key --model sum-3.enc",
        ),
        _step(
            "flower-config",
            "flower",
            f"flower-config flower {server} --initial w0.safetensors --rounds 3",
        ),
        _step(
            "simulate",
            "run",
            f"simulate data.csv {' '.join(RUN + SMALL)} --out run",
            "verify run/rounds/002/model.enc --job run/job/job.json",
        ),
    ]


PARALLEL = (
    *("keygen", "encrypt-grads", "aggregate", "release-model", "open-model"),
    *("verify", "close-round", "audit", "simulate"),
)


def use_fixed_primes() -> None:
    """Make keygen take the fixed primes, in this process."""

    def primes(modulus_bits: int, work: object) -> Iterator[int]:
        return cycle(PRIMES[modulus_bits])

    key_center._safe_primes = primes


def command(words: tuple[str, ...]) -> list[str]:
    """The arguments of a command: quiet, and in one thread where it has a choice."""
    return [*words, "--quiet", *(("--workers", "1") if words[0] in PARALLEL else ())]


@dataclass(frozen=True)
class Stage:
    """The state before a step: its folder, never to be written to."""

    number: int
    step: Step
    folder: Path

    def copy(self, to: Path) -> Path:
        """A fresh copy of the folder, at `to`."""
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.folder, to, symlinks=True)
        return to


@dataclass(frozen=True)
class Scenario:
    """The stages of the whole job, and what is there at the end."""

    stages: list[Stage]
    end: Path

    def stage(self, name: str) -> Stage:
        """The first stage whose step has this command's name."""
        return next(stage for stage in self.stages if stage.step.name == name)


@contextmanager
def printed_to(log: Path) -> Iterator[None]:
    """Send what is printed, by whatever way, to a file."""
    kept = [os.dup(number) for number in (1, 2)]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(descriptor, number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(descriptor)


def play(folder: Path, until: str | None = None) -> Scenario:
    """Play the job in `folder`, up to the first command `until`, in this process.

    Every command must succeed.
    """
    use_fixed_primes()
    here = Path.cwd()
    work, stages = folder / "work", []
    work.mkdir(parents=True)
    save_file(_gradients(), work / "plain.safetensors")
    (work / "data.csv").write_text("\n".join(["a,b,c,class", *_rows()]) + "\n")
    try:
        os.chdir(work)
        for number, step in enumerate(steps()):
            if step.name == until:
                break
            stages.append(Stage(number, step, folder / f"{number:02}-{step.name}"))
            shutil.copytree(work, stages[-1].folder)
            with printed_to(folder / "log"):
                _must(step.words)
                if not (work / step.output).exists():
                    raise AssertionError(f"{step.words}: no output")
                for check in step.accept:
                    _must(check)
    finally:
        os.chdir(here)
    return Scenario(stages, work)


def _must(words: tuple[str, ...]) -> None:
    code = app.run(command(words))
    if code:
        raise AssertionError(f"{' '.join(words)}: exit code {code}")


def _gradients() -> dict[str, NDArray[np.float32]]:
    """What another program computed on the model: it names no base."""
    chance = np.random.default_rng(1)
    shapes = {"layer1.bias": (2,), "layer1.weight": (3, 2), "layer2.bias": (3,)}
    shapes |= {"layer2.weight": (2, 3)}
    return {name: chance.normal(0, 0.1, s).astype(np.float32) for name, s in shapes.items()}


def _rows() -> Iterator[str]:
    chance = random.Random(0)  # noqa: S311  (samples of a test)
    for number in range(60):
        label = number % 3
        yield ",".join([*(f"{label + chance.gauss(0, 0.3):.3f}" for _ in range(3)), f"c{label}"])
