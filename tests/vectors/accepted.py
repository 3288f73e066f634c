"""Vectors that look faulty and must be accepted, and the good command of every faulty one."""

from collections.abc import Iterator

from tests.vectors import faults
from tests.vectors.faults import Fault
from tests.vectors.scenarios import PASSPHRASE
from tests.vectors.scene import Scene


def accepted() -> Iterator[Fault]:
    commands = {
        "aggregate-sum": faults.SUM,
        "aggregate-model": faults.MODEL_OUT,
        "aggregate-initial": faults.FIRST,
        "audit": faults.AUDIT,
        "encrypt": faults.ENCRYPT,
        "open": faults.OPEN,
        "release-again": "release-model sum-1.enc --key job/server.key -o out",
        "reveal-again": faults.REVEAL,
        "verify-close": "verify round-3.close --job job/job.json",
        "verify-job": faults.JOB,
        "verify-model": faults.VERIFY,
        "verify-sum": faults.VERIFY_SUM,
        "verify-release": "verify model-3.release --job job/job.json --model model-3.enc",
    }
    for name, command in commands.items():
        yield Fault(f"good-{name}", "nothing is wrong", command, 0, lambda scene: {})

    def torn(scene: Scene) -> dict[str, bytes]:
        return {"job/alice.ledger": scene.read("job/alice.ledger") + b'{"base":"5a5'}

    def grown(scene: Scene) -> dict[str, bytes]:
        return {"job/alice.ledger": scene.read("job/alice.ledger") + bytes(100)}

    def unended(scene: Scene) -> dict[str, bytes]:
        return {"job/alice.ledger": scene.read("job/alice.ledger")[:-1]}

    def boxed(scene: Scene) -> dict[str, bytes]:
        return {"job/alice.key": faults._box(scene), "passphrase": PASSPHRASE}

    yield Fault("ledger-torn", "a torn last line is cut off", faults.OPEN, 0, torn)
    yield Fault("ledger-grown", "zeros at the end are cut off", faults.OPEN, 0, grown)
    yield Fault("ledger-line-end-lost", "only the last line end is lost", faults.OPEN, 0, unended)
    yield Fault(
        "key-boxed",
        "a key under a passphrase",
        f"{faults.OPEN} --passphrase-file passphrase",
        0,
        boxed,
    )
