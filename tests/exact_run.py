"""`make exact`: two hundred random jobs of 2 to 40 participants, equal to plain Python integers."""

import argparse
import contextlib
import io
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from dtl.cli import app
from tests.exact import Plan, run
from tests.helpers import CIPHERS, Result
from tests.robustness.scenario import use_fixed_primes

MOST = 40


def dtl(*arguments: object, code: int = 0) -> Result:
    """Run a command in this process; AssertionError for another exit code."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        found = app.run([*map(str, arguments), *_QUIET.get(str(arguments[0]), ())])
    if found != code:
        raise AssertionError(f"dtl {' '.join(map(str, arguments))}: {found} {errors.getvalue()}")
    return Result(found, out.getvalue(), errors.getvalue())


_QUIET = dict.fromkeys(("encrypt-grads", "aggregate", "release-model", "open-model"), ("-q",))


def job(seed: int, number: int) -> tuple[str, Plan, int, str]:
    """Play a job; returns its cipher, its plan, how many integers were compared, what failed."""
    use_fixed_primes()
    chance = random.Random(f"{seed}-{number}")  # noqa: S311
    plan = Plan.drawn(chance, CIPHERS[number % 2], MOST)
    with tempfile.TemporaryDirectory() as place:
        try:
            return plan.cipher, plan, run(dtl, Path(place), chance, plan), ""
        except AssertionError as error:
            return plan.cipher, plan, 0, f"job {number} of seed {seed}: {plan}: {error}"


def jobs(seed: int, numbers: range, workers: int) -> Iterator[tuple[str, Plan, int, str]]:
    """Play jobs in so many processes."""
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(job, [seed] * len(numbers), numbers)


def main() -> int:
    """Print what was compared; 1 if an integer differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    wanted = parser.parse_args()
    start, failed = time.monotonic(), 0
    integers: Counter[str] = Counter()
    played: Counter[str] = Counter()
    for cipher, plan, compared, error in jobs(wanted.seed, range(wanted.jobs), wanted.workers):
        played[cipher] += 1
        played["models" if plan.model else "sums"] += 1
        integers[cipher] += compared
        if error:
            failed += 1
            sys.stdout.write(f"FAILED {error}\n")
            sys.stdout.flush()
    sys.stdout.write(
        f"jobs: {dict(played)}; integers equal: {dict(integers)}; failures: {failed}; "
        f"{time.monotonic() - start:.0f} s\n"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
