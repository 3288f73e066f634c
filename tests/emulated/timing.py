"""Does the time of a secret exponent's power depend on it? `make timing` reports, nothing fails.

Two classes of exponents take turns at random: one fixed, one drawn anew for each call. Welch's
t says whether their times differ: a |t| above 4.5 is taken for a leak (Reparaz, Balasch and
Verbauwhede, "Dude, is my code constant time?", DATE 2017). Times above a percentile are left
out, since interruptions are not of interest. A small |t| shows nothing about another machine.
With --emulated the native kernel runs on emulated instructions: that says something about its
C code, nothing about the real instructions.
"""

import argparse
import math
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtl.core.crypto import native, residues
from dtl.core.crypto.arithmetic import MASKED_USES, Bytes, from_integers
from tests.emulated import build

BITS = 256  # of N: short calls
EXPONENT_BITS = 257
THRESHOLD = 4.5
FIXED = {"few ones": 2, "all ones": (1 << EXPONENT_BITS) - 1}
Run = Callable[[int], object]


def main() -> None:
    """Measure every operation, with the back end in use."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--calls", type=int, default=100_000, help="of each measurement")
    options.add_argument("--emulated", action="store_true", help="time the emulated kernel")
    chosen = options.parse_args()
    calls = chosen.calls
    if chosen.emulated:
        emulate()
        print("emulated instructions: not those of a processor")
    print(f"kernel {residues.kernel_name()} (not native: {residues.why_not_native()})")
    n = secrets.randbits(BITS) | 1 | 1 << BITS - 1
    for name, run, bits in operations(residues.arithmetic(n)):
        for kind, fixed in FIXED.items():
            exponent = fixed >> max(0, fixed.bit_length() - bits)
            first, second = measure(run, exponent, bits, calls)
            t = worst(first, second)
            verdict = "differs" if abs(t) > THRESHOLD else "no difference seen"
            mean = 1e6 * float(np.median(np.concatenate([first, second])))
            print(f"{name}, {kind} against random: t = {t:.1f}, {verdict} ({mean:.0f} us a call)")


def emulate() -> None:
    """Put the native kernel, with emulated instructions, in the place of the one in use."""
    crypto = Path(native.__file__).parent
    library = Path(tempfile.mkdtemp()) / "_kernel.so"
    build.build([crypto / "_kernel.c", crypto / "_ifma.c"], library)
    vars(native).update(_kernel=build.load("dtl.core.crypto._kernel", library), _missing=None)


def operations(arithmetic: residues.Arithmetic) -> list[tuple[str, Run, int]]:
    """(name, what to time, bits of its exponent)."""
    n2 = arithmetic.modulus**2
    base = from_integers([secrets.randbelow(n2)], arithmetic.width)
    eight = [secrets.randbelow(n2) for _ in range(8)]
    table = arithmetic.fixed_base_table(eight, BITS, MASKED_USES, groups=True)

    def half(exponent: int) -> Bytes:
        return arithmetic.shared_base_powers(base, [exponent], secret_bits=EXPONENT_BITS)

    def witness(exponent: int) -> Bytes:
        return arithmetic.powers(base, exponent, secret_bits=EXPONENT_BITS)

    def randomness(exponent: int) -> Bytes:
        return table.powers(from_integers([exponent], BITS // 8))

    return [
        ("power by a half", half, EXPONENT_BITS),
        ("powers by w", witness, EXPONENT_BITS),
        ("powers by r", randomness, BITS),
    ]


def measure(run: Run, fixed: int, bits: int, calls: int) -> Sequence[NDArray[np.float64]]:
    """Times in seconds of the fixed class, and of the random one."""
    times: tuple[list[int], list[int]] = ([], [])
    clock = time.perf_counter_ns
    for _ in range(calls):
        drawn = secrets.randbits(bits) | 1 << bits - 1
        which = secrets.randbits(1)
        exponent = (fixed, drawn)[which]
        start = clock()
        run(exponent)
        times[which].append(clock() - start)
    return [np.array(values) / 1e9 for values in times]


def worst(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Welch's t of the greatest size, over all times and over those below some percentiles."""
    limits = np.quantile(np.concatenate([first, second]), [0.5, 0.75, 0.9, 0.99, 1])
    found = [welch(first[first <= limit], second[second <= limit]) for limit in limits]
    return max(found, key=abs)


def welch(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """(mean - mean) / sqrt(variance / count + variance / count)."""
    if min(len(first), len(second)) < 2:
        return 0.0
    spread = first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second)
    difference = float(first.mean() - second.mean())
    return difference / math.sqrt(spread) if spread else 0.0


if __name__ == "__main__":
    main()
