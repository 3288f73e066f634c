"""`make long`: two hundred rounds with absences and kills, and a server with five hundred uploads.

The simulation itself stops at the first integer that differs from the plaintext twin's.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

DTL = [sys.executable, "-c", "from dtl.cli.app import main; main()"]
SMALL = ("--modulus-bits", 512, "--insecure")
ROUNDS, PARTICIPANTS, UPLOADS = 200, 10, 500
KILL_AFTER = 90.0  # seconds at most
SEED = 6


def dtl(*arguments: object) -> None:
    """Run a command; it must succeed."""
    subprocess.run([*DTL, *map(str, arguments)], check=True, stderr=subprocess.DEVNULL)


def killed_again_and_again(folder: Path) -> int:
    """A simulation that is killed at random until it is done; returns how often."""
    wanted = ("--participants", PARTICIPANTS, "--rounds", ROUNDS, "--drop", 0.15, "--seed", SEED)
    start = ("simulate", "digits", *SMALL, *wanted, "--hidden", 8, "--quiet", "--out", folder)
    chance, kills = np.random.default_rng(SEED), 0
    while True:
        begun = (folder / "simulation.json").exists()
        command = ("simulate", "--resume", "--quiet", "--out", folder) if begun else start
        process = subprocess.Popen([*DTL, *map(str, command)], stderr=subprocess.PIPE)
        try:
            code = process.wait(chance.uniform(1, KILL_AFTER))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        if code:
            raise SystemExit(f"failed with {code}: {process.stderr and process.stderr.read()!r}")
        return kills


def many_uploads(folder: Path) -> float:
    """Add up one upload each of many participants; returns the seconds of `aggregate`."""
    names = [f"p{number:03}" for number in range(UPLOADS)]
    dtl("keygen", folder / "job", "--participants", ",".join(names), *SMALL, "--quiet")
    generator, total, uploads = np.random.default_rng(SEED), np.zeros(100, np.int64), []
    for name in names:
        gradients = folder / "g.safetensors"
        values = generator.normal(0, 0.01, 100)
        save_file({"x": values}, gradients)
        total += np.rint(values * 2**16 / UPLOADS).astype(np.int64)
        uploads.append(folder / f"{name}.upload")
        key = ("--key", folder / "job" / f"{name}.key", "--rounding", "nearest", "--round", 1)
        dtl("encrypt-grads", gradients, *key, "-o", uploads[-1], "--quiet")
    server = ("--key", folder / "job" / "server.key", "--quiet")
    start = time.perf_counter()
    dtl("aggregate", *uploads, *server, "-o", folder / "sum")
    seconds = time.perf_counter() - start
    dtl("release-model", folder / "sum", *server, "-o", folder / "release")
    opened = folder / "sum.safetensors"
    dtl("open-model", folder / "release", "--key", folder / "job" / "p250.key", "-o", opened, "-q")
    found = load_file(opened)["x"] * 2**16
    if found.tolist() != total.tolist():
        raise SystemExit("the sum of many uploads is wrong")
    return seconds


def main() -> None:
    """Run both, and print what they survived."""
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        kills = killed_again_and_again(Path(place) / "run")
        report = json.loads((Path(place) / "run" / "report.json").read_text())
        found = report["summary"]
        if found["rounds_identical_to_twin"] != found["rounds_released"]:
            raise SystemExit("a round is not that of the twin")
        print(
            f"{ROUNDS} rounds, {PARTICIPANTS} participants: {found['rounds_released']} released, "
            f"{found['rounds_void']} void, {kills} kills survived, "
            f"{found['rounds_identical_to_twin']} equal to the twin; accuracy "
            f"{found['accuracy']} %, float64 {found['float_accuracy']} % "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as place:
        print(f"{UPLOADS} uploads added up in {many_uploads(Path(place)):.1f} s; the sum is exact")


if __name__ == "__main__":
    main()
