"""Random jobs through the command line, held against plain Python integers.

A job has a cipher, a number format, a roster, a kind of result and a few rounds; participants
may be missing. What everybody opens must be the integers that this module computes on its own,
with exact fractions: it shares no arithmetic with dtl.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.helpers import Cli, Round

ROUNDS = 2


@dataclass(frozen=True)
class Plan:
    """What is random in a job."""

    cipher: str
    slot_bits: int
    fraction_bits: int
    names: tuple[str, ...]
    masks: bool
    model: bool
    stochastic: bool
    values: int
    dtype: str

    @classmethod
    def drawn(cls, chance: Random, cipher: str, most: int) -> "Plan":
        """Any plan that a job can have, of at most so many participants."""
        while True:
            slot_bits, count = chance.randint(3, 52), chance.randint(2, most)
            if ((1 << (slot_bits - 2)) - 1) // count:
                break
        largest = ((1 << (slot_bits - 2)) - 1) // count
        return cls(
            cipher=cipher,
            slot_bits=slot_bits,
            fraction_bits=chance.randint(0, slot_bits - 2),
            names=tuple(f"p{number:02}" for number in range(count)),
            masks=chance.random() < 0.7,
            model=largest >= 64 and chance.random() < 0.6,  # else rounding alone leaves the range
            stochastic=chance.random() < 0.5,
            values=chance.choice((1, 2, 50, 700, chance.randint(1, 2500))),
            dtype="float64" if slot_bits > 24 or chance.random() < 0.3 else "float32",
        )

    @property
    def largest(self) -> int:
        """e_max."""
        return ((1 << (self.slot_bits - 2)) - 1) // len(self.names)

    def options(self) -> list[object]:
        """For keygen."""
        formats = ["--slot-bits", self.slot_bits, "--fraction-bits", self.fraction_bits]
        return ["--cipher", self.cipher, *formats, "--min-contributors", 2]

    def contributors(self, chance: Random) -> list[str]:
        """Who is there: all, or enough to go on without the others."""
        count = len(self.names)
        least = max(2, 2 * count // 3 + 1) if self.masks else 2
        present = chance.sample(self.names, chance.randint(min(least, count), count))
        return sorted(present if chance.random() < 0.6 else self.names)


def rounded(plan: Plan, values: NDArray[Any], weight: float, seed: str | None) -> list[int]:
    """The integers of a contribution: exactly, but for the product with weight (float64)."""
    found = []
    noise = b""
    if seed is not None:
        key = _hash("dtl/v2/rounding", seed.encode())[:32]
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
        noise = stream.update(bytes(4 * len(values)))
    for place, value in enumerate(values.tolist()):
        x = Fraction(float(value) * weight) * 2**plan.fraction_bits
        if seed is None:
            whole = round(x)  # ties to even
        else:
            (drawn,) = struct.unpack_from("<I", noise, 4 * place)
            whole = x.__floor__()
            whole += drawn < (x - whole) * 2**32
        found.append(max(-plan.largest, min(plan.largest, whole)))
    return found


def _hash(label: str, *items: bytes) -> bytes:
    parts = [label.encode(), *items]
    return hashlib.sha512(b"".join(struct.pack("<I", len(p)) + p for p in parts)).digest()


def run(dtl: Cli, folder: Path, chance: Random, plan: Plan, *options: object) -> int:
    """Play a job; AssertionError where an integer differs. Returns how many were compared."""
    masks = () if plan.masks else ("--no-masks",)
    round_ = Round(dtl, folder, plan.names, *plan.options(), *masks, *options)
    generator = np.random.default_rng(chance.randrange(1 << 32))
    reach = plan.largest / 2**plan.fraction_bits  # of a contribution

    def drawn(limit: float) -> dict[str, NDArray[Any]]:
        """Values up to a limit; for sums, which stay in range then too, some far beyond it."""
        array = generator.uniform(-1.1 * limit, 1.1 * limit, plan.values)
        if not plan.model:
            array[generator.random(plan.values) < 0.01] *= 1000
        return {"x": array.astype(plan.dtype)}

    current = [0] * plan.values
    source: tuple[object, ...] = ()
    base: tuple[object, ...] = ()
    if plan.model:
        top = (1 << (plan.slot_bits - 2)) - 1
        whole = generator.integers(-(top // 4), top // 4 + 1, plan.values)
        weights = (whole / 2**plan.fraction_bits).astype(plan.dtype)
        current = [round(Fraction(float(w)) * 2**plan.fraction_bits) for w in weights.tolist()]
        start = round_.save("w0.safetensors", {"x": weights})
        source, base = ("--initial", start), ("--model", start)
    compared, still = 0, list[str]()
    for number in range(1, ROUNDS + 1):
        present = still or plan.contributors(chance)
        weight = chance.choice((1.0, 0.5, 1 / len(plan.names)))
        total = [0] * plan.values
        uploads = []
        for name in present:
            seed = f"{name} {number}" if plan.stochastic else None
            rounding = ("--rounding-seed", seed) if seed else ("--rounding", "nearest")
            given = drawn(reach / weight / (1 if not plan.model else 8 * ROUNDS))
            options = (*rounding, "--weight", weight, *base, "--round", number)
            uploads.append(round_.upload(name, given, *options, out=f"{name}.{number}"))
            total = _add(total, rounded(plan, given["x"], weight, seed))
        closing = _close(round_, plan, present, uploads, number)
        result = round_.aggregate(uploads, *source, *closing, out=f"{number}.enc")
        release = round_.release(result, out=f"{number}.release")
        current = [w - s for w, s in zip(current, total, strict=True)] if plan.model else total
        opened = round_.open_all(release, present[:1], out=f"{number}.safetensors")
        for name in present[1:] if plan.model else present[-1:]:
            round_.open_all(release, (name,), out=f"{number}.safetensors")
        compared += _compare(plan, load_file(opened)["x"], current)
        if plan.model:  # only who has opened this one goes on
            source, base = ("--model", result), ("--model", opened)
            still = [] if len(present) == len(plan.names) else present
    return compared


def _add(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _close(
    round_: Round, plan: Plan, present: Sequence[str], uploads: Sequence[Path], number: int
) -> tuple[object, ...]:
    """Go on without those who are missing, where there are masks."""
    if not plan.masks or len(present) == len(plan.names):
        return ()
    closed = round_.folder / f"{number}.close"
    round_.dtl("close-round", *uploads, "--key", round_.key("server"), "-o", closed)
    reveals = [round_.folder / f"{name}.{number}.reveal" for name in present]
    for name, out in zip(present, reveals, strict=True):
        round_.dtl("reveal-masks", closed, "--key", round_.key(name), "-o", out)
    return ("--close", closed, "--reveals", *reveals)


def _compare(plan: Plan, found: NDArray[Any], expected: Sequence[int]) -> int:
    """What was opened is, in its dtype, the nearest to every integer."""
    assert found.dtype == np.dtype(plan.dtype)
    for value, integer in zip(found.tolist(), expected, strict=True):
        exact = Fraction(integer, 2**plan.fraction_bits)
        nearest = np.dtype(plan.dtype).type(float(exact))
        assert value == float(nearest), (plan, value, integer)
    return len(expected)
