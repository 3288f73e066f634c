"""Accuracy against bits a value, on both data sets: the README's table. `make bits` runs it.

The accuracies are those of the plaintext twin, which trains in fixed point without encryption:
its integers are those of the encrypted run, in both ciphers. The first seed of every row is run
encrypted as well, at a modulus of insecure size, and must give the twin's accuracy.
"""

import tempfile
from pathlib import Path
from typing import Any

from dtl.core.files.tensors import read_arrays
from dtl.core.learning import mlp, simulation, split
from dtl.core.learning.simulation.baselines import Baselines
from dtl.core.learning.simulation.options import SimulationOptions

ENCODINGS = ((24, 16), (16, 12), (16, 10), (12, 8), (10, 6))
SEEDS = range(5)
ROUNDS = 30
INSECURE_BITS = 512
BODY_BITS, COEFFICIENT_BYTES = 171, 25  # of a coefficient: PROTOCOL.md, section 10


def main() -> None:
    """Print the table, as Markdown; accuracies are means over the seeds."""
    print("| slot bits / fraction bits | bytes a value | range | step | digits | breast_cancer |")
    print("|---|---|---|---|---|---|")
    for slot_bits, fraction_bits in ENCODINGS:
        cells = [
            f"{slot_bits} / {fraction_bits}",
            f"{COEFFICIENT_BYTES / (BODY_BITS // slot_bits):.2f}",
            f"±{2.0 ** (slot_bits - 2 - fraction_bits):g}",
            f"2^-{fraction_bits}",
        ]
        for source in ("digits", "breast_cancer"):
            runs = [accuracy(source, slot_bits, fraction_bits, seed) for seed in SEEDS]
            fixed, clear = (sum(column) / len(runs) for column in zip(*runs, strict=True))
            cells.append(f"{fixed:.1f} % (float64 {clear:.1f} %)")
        print(f"| {' | '.join(cells)} |", flush=True)


def accuracy(source: str, slot_bits: int, fraction_bits: int, seed: int) -> tuple[float, float]:
    """Test accuracy in percent after 30 rounds of 5 participants: in fixed point, and float64."""
    wanted: dict[str, Any] = {
        "source": source,
        "participants": simulation.participant_names("5"),
        "rounds": ROUNDS,
        "seed": seed,
        "slot_bits": slot_bits,
        "fraction_bits": fraction_bits,
        "modulus_bits": INSECURE_BITS,
        "insecure": True,
    }
    fixed, clear = in_the_clear(SimulationOptions(**wanted))
    if seed == SEEDS[0]:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            found = simulation.simulate(run, simulation.new_run(run, wanted)).summary
        if (found.accuracy, found.float_accuracy) != (fixed, clear):
            raise SystemExit(f"{source}: the encrypted run has another accuracy than its twin")
    return fixed, clear


def in_the_clear(options: SimulationOptions) -> tuple[float, float]:
    """The same training by the twin alone, and in float64."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shards = split.split_data(options.source, place / "shards", options.split)
        first = place / "shards" / f"{options.participants[0]}.npz"
        mlp.init_model(first, place / "w0.safetensors", options.hidden, options.seed)
        initial, _ = read_arrays(place / "w0.safetensors")
    counts = {name: len(shards[name].x) for name in options.participants}
    shares = {name: count / sum(counts.values()) for name, count in counts.items()}
    baselines = Baselines(options, initial, shards, shares)
    for number in range(1, options.rounds + 1):
        baselines.advance(number, options.participants)
    found = []
    for weights in (baselines.twin.weights, baselines.float.weights):
        found.append(round(100 * mlp.score(weights, shards[split.TEST], "w")[0], 3))
    return found[0], found[1]


if __name__ == "__main__":
    main()
