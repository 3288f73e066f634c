"""Accuracy against bits a value, on both data sets: the README's table. `make bits` runs it.

At a modulus of insecure size: accuracy does not depend on it, as every round is checked to
give the integers of the plaintext twin.
"""

import tempfile
from pathlib import Path

from dtl.core.learning import simulation

ENCODINGS = ((24, 20), (16, 12), (12, 8), (10, 6))
SEEDS = range(5)
MODULUS_BITS, SLOTS_3072 = 512, 3070
GROUP_BYTES, BLOCKS = 8 * 768, 7


def main() -> None:
    """Print the table, as Markdown; accuracies are means over the seeds."""
    print("| slot bits / fraction bits | bytes a value | digits | breast_cancer |")
    print("|---|---|---|---|")
    for slot_bits, fraction_bits in ENCODINGS:
        cells = [f"{slot_bits} / {fraction_bits}"]
        cells.append(f"{GROUP_BYTES / (BLOCKS * (SLOTS_3072 // slot_bits)):.2f}")
        for source in ("digits", "breast_cancer"):
            runs = [accuracy(source, slot_bits, fraction_bits, seed) for seed in SEEDS]
            encrypted, clear = (sum(column) / len(runs) for column in zip(*runs, strict=True))
            cells.append(f"{encrypted:.1f} % (float64 {clear:.1f} %)")
        print(f"| {' | '.join(cells)} |", flush=True)


def accuracy(source: str, slot_bits: int, fraction_bits: int, seed: int) -> tuple[float, float]:
    """Test accuracy in percent after 30 rounds of 5 participants: encrypted, and float64."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = {
            "source": source,
            "participants": simulation.participant_names("5"),
            "rounds": 30,
            "seed": seed,
            "slot_bits": slot_bits,
            "fraction_bits": fraction_bits,
            "modulus_bits": MODULUS_BITS,
            "insecure": True,
        }
        run = Path(folder) / "run"
        found = simulation.simulate(run, simulation.new_run(run, wanted)).summary
        return found.accuracy, found.float_accuracy


if __name__ == "__main__":
    main()
