"""Faulty releases, hostile results, and attempts to open that must not be made."""

from collections.abc import Callable, Iterator

from tests.vectors import forging
from tests.vectors.command_lines import (
    LATTICE,
    OPEN,
    OPEN_RECOMPUTED,
    OPEN_SUM,
    OTHER,
    UPLOADS,
    VERIFY_RELEASE,
)
from tests.vectors.faults import contents, edits, ledger_edits
from tests.vectors.faults.contents import COEFFICIENTS, GROUPS, Edit2
from tests.vectors.faults.fault import Fault
from tests.vectors.faults.ledger_edits import Ledger
from tests.vectors.scenarios import tensors
from tests.vectors.scene import Changes, Edit, Scene, Tensors, drop, put


def releases() -> Iterator[Fault]:
    name = "model-1.release"

    def fault(title: str, about: str, code: int, make: Callable[[Scene], bytes]) -> Fault:
        return Fault(f"release-{title}", about, OPEN, code, lambda scene: {name: make(scene)})

    def header(title: str, about: str, code: int, edit: Edit) -> Fault:
        return fault(title, f"{about}; signed anew", code, lambda scene: scene.header(name, edit))

    def manifest(title: str, about: str, code: int, edit: Edit) -> Fault:
        return fault(
            title,
            f"{about}; the result is signed anew",
            code,
            lambda scene: forging.reissued(scene, name, edit),
        )

    yield header("grants-swapped", "the wrapped keys of two are swapped", 4, edits.swap_grants)
    yield header("grant-removed", "without alice's grant", 5, lambda h: h["grants"].pop(0))
    yield header(
        "grant-of-another", "one other's grant is missing: it is bound to all", 4, edits.pop
    )
    yield header("grants-unsorted", "grants out of order", 3, edits.reversed("grants"))
    yield header("grants-none", "granted to nobody", 3, put(grants=[]))
    yield header("grant-to-a-stranger", "granted to who never contributed", 4, edits.stranger)
    yield header("grant-cut", "a wrapped key is cut", 4, edits.cut_grant)
    yield header("admits-a-contributor", "admits who contributed", 4, put(admitted=["bob"]))
    yield header("admits-without-grant", "admits who has no grant", 3, put(admitted=["dave"]))
    yield header("commit-wrong", "another commitment", 4, put(commit=edits.encoded(bytes(32))))
    yield header(
        "commit-short", "a commitment of 31 bytes", 3, put(commit=edits.encoded(bytes(31)))
    )
    yield header("round-other", "of another round than its manifest", 3, put(round=3))
    yield header("of-another", "names another result", 4, put(of=OTHER))
    yield header("manifest-changed", "another time in its manifest", 4, edits.manifest(edits.later))
    yield header(
        "manifest-kind", "the manifest is an upload's", 3, edits.manifest(put(kind="upload"))
    )
    yield header(
        "signature-short", "the result's signature is cut", 3, edits.short("result_signature")
    )
    yield header("signature-upper-case", "the result's signature in upper case", 3, edits.upper_hex)
    yield header("signature-absent", "without the result's signature", 3, drop("result_signature"))
    yield header(
        "signature-zero", "another signature of the result", 4, put(result_signature="00" * 64)
    )
    yield fault(
        "signature-of-another",
        "the result is signed by a participant; the release is signed anew",
        4,
        lambda scene: scene.header(name, edits.signed_by_bob(scene)),
    )
    yield manifest("own-upload-other", "alice's upload is not in it", 4, edits.upload_other)
    yield manifest("initial-other", "not built on what alice worked on", 4, put(initial=OTHER))
    yield manifest("result-other", "another result of a round that was opened", 4, edits.later)
    yield manifest("too-few", "of two contributors", 6, edits.two)
    yield manifest("counts-wrong", "counts a round too many", 4, edits.counts("bob", 2))
    yield manifest("too-many", "2^21 contributions", 7, edits.counts("bob", 2**21 - 2))
    yield manifest("not-the-roster", "names a stranger", 3, put(missing=["erin"]))

    def result_tensor(tensor: str) -> Iterator[Fault]:
        yield fault(
            f"{tensor}-changed",
            f"a bit of {tensor}; signed anew",
            4,
            lambda scene: scene.number(name, tensor, 7, 1, lambda number: number ^ 1),
        )
        yield fault(
            f"{tensor}-absent",
            f"without {tensor}; signed anew",
            3,
            lambda scene: scene.tensors(name, lambda found: found.pop(tensor)),
        )

    yield from result_tensor("residues")
    yield from result_tensor("body")
    yield fault(
        "not-signed",
        "another time in the header; the signature is that of the old one",
        4,
        lambda scene: scene.container(name, "22:13:20Z", "22:13:21Z"),
    )
    yield fault(
        "signed-by-a-participant",
        "signed with the key of a participant",
        4,
        lambda scene: scene.header(name, put(), signer="bob"),
    )
    yield fault(
        "payload-changed",
        "a bit of the payload; signed anew",
        4,
        lambda scene: scene.number(name, "sealed", 100, 1, lambda number: number ^ 1),
    )
    yield fault("payload-cut", "the payload is a byte short; signed anew", 3, edits.payload_cut)
    yield fault("chunk-not-last", "the last chunk is not marked so", 4, edits.sealed_anew(0, False))
    yield fault("chunk-number", "the first chunk is number 1", 4, edits.sealed_anew(1, True))
    yield Fault(
        "release-not-granted",
        "dave opens a release that was not granted to him",
        OPEN.replace("alice", "dave"),
        5,
        edits.no,
    )
    yield Fault(
        "release-by-server",
        "the server opens a release",
        OPEN.replace("alice", "server"),
        5,
        edits.no,
    )
    yield Fault(
        "release-admitted-again",
        "admits somebody for the second time, and alice has seen the first",
        OPEN,
        4,
        lambda scene: {name: edits.admitted_again(scene)},
    )


def proofs() -> Iterator[Fault]:
    """What is sealed; and signed results that nobody should open."""
    name = "model-1.release"

    def sealed(title: str, about: str, edit: Callable[[Scene, bytes], bytes]) -> Fault:
        def change(scene: Scene) -> Changes:
            return {name: forging.resealed(scene, name, lambda payload: edit(scene, payload))}

        return Fault(
            f"payload-{title}", f"{about}; sealed and signed anew", VERIFY_RELEASE, 4, change
        )

    def part(title: str, about: str, at: int, value: Callable[[Scene, int], int]) -> Fault:
        """Number `at` of c', t, t' in this order."""
        return sealed(
            title,
            about,
            lambda scene, payload: contents.number_set(
                payload, at * scene.width, scene.width, lambda old: value(scene, old)
            ),
        )

    last = 7 * GROUPS
    yield part("c1-negated", "c'_1 of the first group is times -1", 0, contents.negated)
    yield part("c1-added-to", "c'_1 of the first group has a block more", 0, contents.added)
    yield part("c1-small", "c'_1 of the first group is 3", 0, lambda scene, old: 3)
    for title, about, at in (
        ("c", "c'_7 of the last group", last - 1),
        ("t", "t_1", last),
        ("t-prime", "t'_7", last + 13),
    ):
        yield part(f"{title}-zero", f"{about} is 0", at, lambda scene, old: 0)
        yield part(f"{title}-square", f"{about} is N^2", at, lambda scene, old: scene.square)
        yield part(f"{title}-multiple-of-p", f"{about} is p", at, lambda scene, old: scene.p)
    yield part("t-wrong", "t_1 has a block more", last, contents.added)
    yield part("t-prime-wrong", "t'_7 has a block more", last + 13, contents.added)

    def z(title: str, about: str, edit: Callable[[int], int]) -> Fault:
        return sealed(
            title,
            about,
            lambda scene, payload: contents.number_set(payload, len(payload) - 65, 65, edit),
        )

    yield z("z-wrong", "z_7 is larger by 1", lambda old: old + 1)
    yield z("z-too-large", "z_7 has a bit too many", lambda old: old | 1 << 513)

    def hostile(
        title: str,
        about: str,
        change: Edit2,
        code: int = 4,
        tried: bool = True,
        command: str = OPEN_SUM,
    ) -> Fault:
        def make(scene: Scene) -> Changes:
            file = "sum-3.release"
            return {file: forging.released(scene, file, None, change)}

        ledger = "job/carol.ledger" if tried else ""
        return Fault(
            f"result-{title}", f"{about}; a release of it", command, code, make, LATTICE, ledger
        )

    for title, about, value in (
        ("zero", "is 0", lambda scene: 0),
        ("n", "is N", lambda scene: scene.p * scene.q),
        ("beyond", "is c + N", None),
        ("multiple-of-q", "is q", lambda scene: scene.q),
    ):

        def make(scene: Scene, value: Callable[[Scene], int] | None = value) -> Changes:
            def edit(found: Tensors) -> None:
                new = (lambda old: value(scene)) if value else (lambda old: old + scene.p * scene.q)
                contents.set_residue(found, scene.width, 0, 0, new)

            return {"sum-3.release": forging.released(scene, "sum-3.release", None, edit)}

        yield Fault(
            f"result-c0-{title}", f"a c_0 of the result {about}; a release of it", OPEN_SUM, 3, make
        )
    yield hostile("word-too-large", "a word of the body is p_2", contents.words(1, 5), 3, False)
    yield hostile("garbage", "the body is what nobody made", contents.garbage_body)
    yield hostile("error", "an error beyond 64 U", contents.words_plus(300))
    yield hostile("value", "a value beyond n e_max", contents.words_plus(3 << 28 + 21))
    yield hostile("above", "something above the slots", contents.words_plus(1 << 28 + 24 * 7))
    yield hostile(
        "padding",
        "a slot that is left over is not zero",
        contents.words_plus(1 << 28 + 24 * 6, COEFFICIENTS - 1),
    )
    yield hostile(
        "secret", "a secret beyond 64 U, in the blocks alone", contents.residue_plus(0, 1, 300)
    )
    yield hostile(
        "secret-padding",
        "the blocks hold more than the secret",
        contents.residue_plus(GROUPS - 1, 7, 1 << 28 * 8),
    )
    yield hostile("block", "a block out of range", contents.residue_plus(1, 2, 1 << 252))
    yield hostile("no-block", "a residue that does not open", contents.residue_times(1, 3))
    evidence = f"{OPEN_SUM} --uploads {UPLOADS}"
    unit = "one unit more than the sum of the uploads"
    yield hostile("unit", unit, contents.words_plus(1 << 28), 4, False, evidence)
    yield hostile(
        "unit-verified",
        unit,
        contents.words_plus(1 << 28),
        4,
        False,
        f"verify sum-3.release --key job/carol.key --uploads {UPLOADS}",
    )
    yield hostile(
        "unit-without-key",
        unit,
        contents.words_plus(1 << 28),
        4,
        False,
        f"verify sum-3.release --job job/job.json --uploads {UPLOADS}",
    )
    yield Fault(
        "evidence-missing",
        "one of the uploads is not given",
        f"{OPEN_SUM} --uploads {UPLOADS}".replace(" bob-3.upload", ""),
        4,
        edits.no,
    )
    yield Fault(
        "evidence-unrelated",
        "an upload of another round is given besides",
        f"{OPEN_SUM} --uploads alice-1.upload {UPLOADS}",
        4,
        edits.no,
    )
    yield Fault(
        "evidence-initial-other",
        "other initial weights are given",
        OPEN_RECOMPUTED,
        4,
        lambda scene: {"w0.safetensors": tensors("w1", 0.5)},
    )


def attempts() -> Iterator[Fault]:
    """What an earlier attempt to open forbids; carol has not opened sum-3."""

    def fault(title: str, about: str, code: int, edit: Ledger, command: str = OPEN_SUM) -> Fault:
        return Fault(f"tried-{title}", about, command, code, ledger_edits.ledger("carol", edit))

    yield fault("another", "another result of the round was tried", 4, ledger_edits.tried(3))
    yield fault(
        "another-after-failure",
        "another result was tried; --after-failure does not lift it",
        4,
        ledger_edits.tried(3),
        f"{OPEN_SUM} --after-failure",
    )
    yield fault(
        "failure", "an attempt of another round has failed", 5, ledger_edits.tried(2**32 - 1)
    )
    yield fault(
        "failure-after-failure",
        "the same, after --after-failure was used once",
        5,
        lambda entries: [
            ledger_edits.tried(2**31)(entries),
            ledger_edits.tried(2**32 - 1, True)(entries),
        ],
    )
