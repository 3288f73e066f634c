"""Vectors that look faulty and must be accepted, and the good command of every faulty one."""

from collections.abc import Callable, Iterator

from tests.vectors import faults, forging
from tests.vectors.faults import DIRECT, LATTICE, Fault
from tests.vectors.scenarios import PASSPHRASE
from tests.vectors.scene import Changes, Scene

GOOD = {
    "aggregate-sum": faults.SUM,
    "aggregate-model": faults.MODEL_OUT,
    "aggregate-initial": faults.FIRST,
    "audit": faults.AUDIT,
    "audit-later": faults.AUDIT_LATER,
    "encrypt": faults.ENCRYPT,
    "encrypt-again": f"{faults.AGAIN} --accept-differencing",
    "open": faults.OPEN,
    "open-first": faults.OPEN_SUM,
    "open-recomputed": faults.OPEN_RECOMPUTED,
    "open-sum-recomputed": f"{faults.OPEN_SUM} --uploads {faults.UPLOADS}",
    "release-again": "release-model sum-3.enc --key job/server.key -o out",
    "release-model": faults.RELEASE,
    "release-admitting": f"{faults.RELEASE} --admit dave",
    "verify-upload": f"verify {faults.A} --job job/job.json",
    "verify-upload-late": f"verify {faults.LATE} --job job/job.json",
    "reveal-again": faults.REVEAL,
    "verify-close": "verify round-2.close --job job/job.json",
    "verify-job": faults.JOB,
    "verify-model": faults.VERIFY,
    "verify-sum": faults.VERIFY_SUM,
    "verify-release": "verify model-2.release --job job/job.json --model model-2.enc",
    "verify-release-opened": faults.VERIFY_RELEASE,
    "verify-release-recomputed": faults.VERIFY_ALL,
    "verify-sum-release": (f"verify sum-3.release --key job/carol.key --uploads {faults.UPLOADS}"),
    "verify-sum-release-without-key": (
        f"verify sum-3.release --job job/job.json --uploads {faults.UPLOADS}"
    ),
}
GOOD_DIRECT = {
    "aggregate": faults.DIRECT_SUM,
    "aggregate-initial": faults.DIRECT_MODEL,
    "apply-sum": faults.APPLY,
    "apply-sum-again": faults.APPLY.replace("bob", "alice"),
    "audit": faults.DIRECT_AUDIT,
    "encrypt-initial": faults.ENCRYPT_FIRST,
    "encrypt-own-step": faults.OWN_STEP,
    "encrypt-stepped": faults.STEPPED,
    "open": faults.DIRECT_OPEN,
    "open-recomputed": faults.DIRECT_RECOMPUTED,
    "verify": faults.DIRECT_VERIFY,
}


def accepted() -> Iterator[Fault]:
    for name, command in GOOD.items():
        yield Fault(f"good-{name}", "nothing is wrong", command, 0, lambda scene: {})
    for name, command in GOOD_DIRECT.items():
        about = "nothing is wrong"
        yield Fault(f"good-direct-{name}", about, command, 0, lambda scene: {}, DIRECT)

    def torn(scene: Scene) -> dict[str, bytes]:
        return {"job/alice.ledger": scene.read("job/alice.ledger") + b'{"base":"5a5'}

    def grown(scene: Scene) -> dict[str, bytes]:
        return {"job/alice.ledger": scene.read("job/alice.ledger") + bytes(100)}

    def unended(scene: Scene) -> dict[str, bytes]:
        return {"job/alice.ledger": scene.read("job/alice.ledger")[:-1]}

    def boxed(scene: Scene) -> dict[str, bytes]:
        return {"job/alice.key": faults._box(scene), "passphrase": PASSPHRASE}

    def before_any(scene: Scene) -> dict[str, bytes]:
        return {"job/server.ledger": scene.lines("server")[0]}

    yield Fault("good-close", "the round is not closed yet", faults.CLOSE, 0, before_any)
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
    yield from _attempts()
    yield from _unnoticed()


def _attempts() -> Iterator[Fault]:
    """After a failure: the same file again, or with the owner's consent."""

    def fault(title: str, about: str, command: str, change: Callable[[Scene], Changes]) -> Fault:
        return Fault(f"tried-{title}", about, command, 0, change)

    def same(scene: Scene) -> Changes:
        ledger = scene.read("job/alice.ledger")
        tried = next(e for e in faults.entries_of(ledger.splitlines()) if e["event"] == "tried")
        cut = scene.cut("alice", "open")
        return {"job/alice.ledger": cut} if tried["round"] == 1 else {}

    failed = faults._ledger("carol", faults._tried(2**32 - 1))
    yield fault("same", "the same release was tried, and not opened", faults.OPEN, same)
    after = f"{faults.OPEN_SUM} --after-failure"
    yield fault("after-failure", "an attempt of another round has failed", after, failed)
    yield fault("no-failure", "--after-failure without a failure", after, lambda scene: {})
    yield fault(
        "gone-on",
        "an attempt has failed, and the owner has gone on after it",
        faults.OPEN_SUM,
        faults._ledger("carol", faults._gone_on),
    )


def _unnoticed() -> Iterator[Fault]:
    """What is wrong and cannot be seen with the files that are given."""
    unit = "one unit more than the sum of the uploads: nobody sees it without them"

    def larger(scene: Scene) -> Changes:
        file = "sum-3.release"
        return {file: forging.released(scene, file, None, faults._plus_one)}

    def larger_direct(scene: Scene) -> Changes:
        edit, file = faults._residue_plus(0, 1, 1), "sum-1.release"
        return {file: forging.released(scene, file, None, edit)}

    yield Fault("result-unit", unit, faults.OPEN_SUM, 0, larger)
    yield Fault("direct-result-unit", unit, faults.DIRECT_OPEN, 0, larger_direct, DIRECT)
    a, late = faults.A, faults.LATE
    for name, about, command, change in (
        (
            "upload-error",
            "an error beyond 64; only an audit sees it",
            faults.SUM,
            lambda scene: {a: forging.proven(scene, a, body=faults._plus(1000))},
        ),
        (
            "upload-tag",
            "another opened tag; only an audit sees it",
            f"verify {late} --job job/job.json",
            faults._proven_header(late, faults.put(opened_tag=faults.TAG)),
        ),
        (
            "upload-made-again",
            "another proof of the same upload",
            faults.SUM,
            lambda scene: {a: forging.proven(scene, a), "job/server.ledger": _closed(scene)},
        ),
    ):
        yield Fault(name, about, command, 0, _without_third(change), LATTICE)


def _closed(scene: Scene) -> bytes:
    return scene.cut("server", "aggregate", round=3)


def _without_third(change: Callable[[Scene], Changes]) -> Callable[[Scene], Changes]:
    """The server has not accepted another upload for round 3 yet."""
    return lambda scene: {"job/server.ledger": _closed(scene), **change(scene)}
