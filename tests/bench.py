"""`make bench`: time and bytes a value for every step, next to python-paillier, in one run.

Every step is a whole `dtl` process on one core; python-paillier encrypts single numbers at
the same modulus size in this process. Figures are medians; absolute times depend on the
machine, the ratio much less.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from phe.paillier import PaillierPublicKey
from safetensors.numpy import save_file

from dtl.core.files.documents import Job

DTL = [sys.executable, "-c", "from dtl.cli.app import main; main()"]
NAMES = ("alice", "bob", "carol")
PAILLIER_SAMPLES = 9


def run(*arguments: object) -> tuple[float, float]:
    """(seconds, peak MB) of one command on one core."""
    command = [*DTL, *map(str, arguments)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: dtl {' '.join(map(str, arguments))}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=1_000_000)
    values = parser.parse_args().values
    os.environ.pop("DTL_JOB", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job, gradients = folder / "job", folder / "g.safetensors"
        options = ("--no-masks",)
        keygen = run("keygen", job, "--participants", ",".join(NAMES), *options, "-q")
        noise = np.random.default_rng(0).normal(0, 0.1, values).astype(np.float32)
        save_file({"x": noise}, gradients)
        common = ("--workers", 1, "-q", "--key")
        uploads = [folder / f"{participant}.upload" for participant in NAMES]
        peer = PaillierPublicKey(Job.load(job / "job.json").N)
        encrypt, paillier = [], []
        for participant, upload in zip(NAMES, uploads, strict=True):  # in turn with the peer
            key = job / f"{participant}.key"
            encrypt.append(
                run("encrypt-grads", gradients, "--round", 1, *common, key, "-o", upload)
            )
            for number in range(PAILLIER_SAMPLES // len(NAMES)):
                start = time.perf_counter()
                peer.raw_encrypt(number)
                paillier.append(time.perf_counter() - start)
        server = (*common, job / "server.key")
        result, release, opened = (folder / n for n in ("r.enc", "r.release", "r.safetensors"))
        steps = {
            "encrypt-grads": (statistics.median(s for s, _ in encrypt), encrypt[0][1]),
            f"aggregate, {len(NAMES)} uploads": run("aggregate", *uploads, *server, "-o", result),
            "release-model": run("release-model", result, *server, "-o", release),
            "open-model": run("open-model", release, *common, job / "alice.key", "-o", opened),
        }
        size = uploads[0].stat().st_size
        print(f"{values:,} float32 values, 3072 bits, default encoding, one core, whole processes")
        print(f"keygen (all cores): {keygen[0]:.1f} s; upload: {size / values:.2f} bytes a value\n")
        print("| step | seconds | us a value | peak MB |\n|---|---|---|---|")
        for step, (seconds, peak) in steps.items():
            print(f"| {step} | {seconds:.2f} | {seconds / values * 1e6:.2f} | {peak:.0f} |")
        one = statistics.median(paillier)
        print(f"| python-paillier, one value | {one:.4f} | {one * 1e6:,.0f} | |")
        mine = steps["encrypt-grads"][0] / values
        print(f"\nencryption is {one / mine:,.0f} times as fast a value as python-paillier")


if __name__ == "__main__":
    main()
