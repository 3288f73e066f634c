"""Vectors that look faulty and must be accepted, and the good command of every faulty one."""

from collections.abc import Callable, Iterator

from tests.vectors import command_lines as lines
from tests.vectors import forging
from tests.vectors.command_lines import DIRECT, LATTICE
from tests.vectors.faults import Fault, contents, edits, ledger_edits
from tests.vectors.scenarios import PASSPHRASE
from tests.vectors.scene import Changes, Scene, entries_of, put

GOOD = {
    "aggregate-sum": lines.SUM,
    "aggregate-skipping": f"{lines.SUM} --skip-invalid",
    "aggregate-model": lines.MODEL_OUT,
    "aggregate-initial": lines.FIRST,
    "audit": lines.AUDIT,
    "audit-later": lines.AUDIT_LATER,
    "encrypt": lines.ENCRYPT,
    "encrypt-again": f"{lines.AGAIN} --accept-differencing",
    "open": lines.OPEN,
    "open-first": lines.OPEN_SUM,
    "open-recomputed": lines.OPEN_RECOMPUTED,
    "open-sum-recomputed": f"{lines.OPEN_SUM} --uploads {lines.UPLOADS}",
    "release-again": "release-model sum-3.enc --key job/server.key -o out",
    "release-model": lines.RELEASE,
    "release-admitting": f"{lines.RELEASE} --admit dave",
    "verify-upload": f"verify {lines.A} --job job/job.json",
    "verify-upload-late": f"verify {lines.LATE} --job job/job.json",
    "reveal-again": lines.REVEAL,
    "verify-close": "verify round-2.close --job job/job.json",
    "verify-job": lines.JOB,
    "verify-model": lines.VERIFY,
    "verify-sum": lines.VERIFY_SUM,
    "verify-release": "verify model-2.release --job job/job.json --model model-2.enc",
    "verify-release-opened": lines.VERIFY_RELEASE,
    "verify-release-recomputed": lines.VERIFY_ALL,
    "verify-sum-release": (f"verify sum-3.release --key job/carol.key --uploads {lines.UPLOADS}"),
    "verify-sum-release-without-key": (
        f"verify sum-3.release --job job/job.json --uploads {lines.UPLOADS}"
    ),
}
GOOD_DIRECT = {
    "aggregate": lines.DIRECT_SUM,
    "aggregate-initial": lines.DIRECT_MODEL,
    "apply-sum": lines.APPLY,
    "apply-sum-again": lines.APPLY.replace("bob", "alice"),
    "audit": lines.DIRECT_AUDIT,
    "encrypt-initial": lines.ENCRYPT_FIRST,
    "encrypt-own-step": lines.OWN_STEP,
    "encrypt-stepped": lines.STEPPED,
    "open": lines.DIRECT_OPEN,
    "open-recomputed": lines.DIRECT_RECOMPUTED,
    "verify": lines.DIRECT_VERIFY,
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
        return {"job/alice.key": edits.box(scene), "passphrase": PASSPHRASE}

    def before_any(scene: Scene) -> dict[str, bytes]:
        return {"job/server.ledger": scene.lines("server")[0]}

    named = edits.gradients_named()
    yield Fault("good-encrypt-named", "no --model", lines.ENCRYPT_NAMED, 0, named)
    yield Fault("good-close", "the round is not closed yet", lines.CLOSE, 0, before_any)
    yield Fault("ledger-torn", "a torn last line is cut off", lines.OPEN, 0, torn)
    yield Fault("ledger-grown", "zeros at the end are cut off", lines.OPEN, 0, grown)
    yield Fault("ledger-line-end-lost", "only the last line end is lost", lines.OPEN, 0, unended)
    yield Fault(
        "key-boxed",
        "a key under a passphrase",
        f"{lines.OPEN} --passphrase-file passphrase",
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
        tried = next(e for e in entries_of(ledger.splitlines()) if e["event"] == "tried")
        cut = scene.cut("alice", "open")
        return {"job/alice.ledger": cut} if tried["round"] == 1 else {}

    failed = ledger_edits.ledger("carol", ledger_edits.tried(2**32 - 1))
    yield fault("same", "the same release was tried, and not opened", lines.OPEN, same)
    after = f"{lines.OPEN_SUM} --after-failure"
    yield fault("after-failure", "an attempt of another round has failed", after, failed)
    yield fault("no-failure", "--after-failure without a failure", after, lambda scene: {})
    yield fault(
        "gone-on",
        "an attempt has failed, and the owner has gone on after it",
        lines.OPEN_SUM,
        ledger_edits.ledger("carol", ledger_edits.gone_on),
    )


def _unnoticed() -> Iterator[Fault]:
    """What is wrong and cannot be seen with the files that are given."""
    unit = "one unit more than the sum of the uploads: nobody sees it without them"

    def larger(scene: Scene) -> Changes:
        file = "sum-3.release"
        return {file: forging.released(scene, file, None, contents.plus_one)}

    def larger_direct(scene: Scene) -> Changes:
        edit, file = contents.residue_plus(0, 1, 1), "sum-1.release"
        return {file: forging.released(scene, file, None, edit)}

    yield Fault("result-unit", unit, lines.OPEN_SUM, 0, larger)
    yield Fault("direct-result-unit", unit, lines.DIRECT_OPEN, 0, larger_direct, DIRECT)
    a, late = lines.A, lines.LATE
    for name, about, command, change in (
        (
            "upload-error",
            "an error beyond 64; only an audit sees it",
            lines.SUM,
            lambda scene: {a: forging.proven(scene, a, body=contents.plus(1000))},
        ),
        (
            "upload-tag",
            "another opened tag; only an audit sees it",
            f"verify {late} --job job/job.json",
            contents.proven_header(late, put(opened_tag=lines.TAG)),
        ),
        (
            "upload-made-again",
            "another proof of the same upload",
            lines.SUM,
            lambda scene: {a: forging.proven(scene, a), "job/server.ledger": _closed(scene)},
        ),
    ):
        yield Fault(name, about, command, 0, _without_third(change), LATTICE)


def _closed(scene: Scene) -> bytes:
    return scene.cut("server", "aggregate", round=3)


def _without_third(change: Callable[[Scene], Changes]) -> Callable[[Scene], Changes]:
    """The server has not accepted another upload for round 3 yet."""
    return lambda scene: {"job/server.ledger": _closed(scene), **change(scene)}
