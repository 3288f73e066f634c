"""Faulty sums and models, close files and reveals."""

from collections.abc import Callable, Iterator

from tests.vectors import forging
from tests.vectors.command_lines import (
    CLOSE,
    LATER,
    MODEL_OUT,
    OTHER,
    RELEASE,
    REVEAL,
    REVEALS,
    VERIFY,
    VERIFY_SUM,
    A,
)
from tests.vectors.faults import contents, edits, ledger_edits
from tests.vectors.faults.fault import Fault
from tests.vectors.scene import Changes, Edit, Scene, put


def results() -> Iterator[Fault]:
    name = "model-2.enc"

    def fault(title: str, about: str, code: int, make: Callable[[Scene], bytes]) -> Fault:
        return Fault(title, about, VERIFY, code, lambda scene: {name: make(scene)})

    def header(title: str, about: str, code: int, edit: Edit) -> Fault:
        return fault(title, f"{about}; signed anew", code, lambda scene: scene.header(name, edit))

    yield fault(
        "model-residue-wrong",
        "a block of the model has 1 added",
        4,
        lambda scene: scene.residue(name, 0, 1, lambda c: contents.added(scene, c)),
    )
    yield fault(
        "model-residue-negated",
        "a residue of the model is c_1 times -1: it opens the same, and is not the product",
        4,
        lambda scene: scene.residue(name, 0, 1, lambda c: scene.square - c),
    )
    yield fault(
        "model-c0-negated",
        "a c_0 of the model is times -1",
        4,
        lambda scene: scene.residue(name, 0, 0, lambda c: scene.p * scene.q - c),
    )
    yield fault(
        "model-body-wrong",
        "a value of the model is one unit larger",
        4,
        lambda scene: scene.tensors(name, contents.plus_one),
    )
    for title, about, value in (
        ("zero", "is 0", lambda scene: 0),
        ("n", "is N", lambda scene: scene.p * scene.q),
        ("multiple-of-q", "is q", lambda scene: scene.q),
    ):
        yield Fault(
            f"model-c0-{title}",
            f"a c_0 of the model {about}",
            RELEASE,
            3,
            ledger_edits.unreleased(contents.residue_set(name, 0, 0, value)),
        )
        yield Fault(
            f"start-c0-{title}",
            f"a c_0 of the model that goes on {about}",
            MODEL_OUT,
            3,
            contents.residue_set("model-1.enc", 0, 0, value),
        )
    yield header("model-too-many", "2^21 contributions", 7, edits.counts("alice", 2**21 - 4))
    yield header("model-count-huge", "2^32 contributions of one", 3, edits.counts("alice", 2**32))
    yield fault(
        "model-signed-by-a-participant",
        "signed with the key of a participant",
        4,
        lambda scene: scene.header(name, put(), signer="alice"),
    )
    yield header("model-signer", "says that a participant is its signer", 3, put(signer="alice"))
    yield header("model-counts", "counts a round too many", 4, edits.counts("alice", 3))
    yield header("model-counts-zero", "counts no rounds", 3, edits.counts("alice", 0))
    yield header("model-counts-nobody", "does not count a contributor", 3, edits.uncounted)
    yield header("model-initial-null", "names no initial weights", 3, put(initial=None))
    yield header("model-initial-other", "names other initial weights", 4, put(initial=OTHER))
    yield header("model-parent-other", "names another parent", 4, put(parent=OTHER))
    yield header("model-missing-nobody", "does not name who is missing", 3, put(missing=[]))
    yield header("model-missing-stranger", "names a stranger", 3, put(missing=["dave", "erin"]))
    yield header(
        "model-both", "names one both present and missing", 3, put(missing=["carol", "dave"])
    )
    yield header("model-upload-other", "names another upload", 4, edits.upload_other)
    yield header("model-contributors-unsorted", "out of order", 3, edits.reversed("contributors"))
    yield header("model-round-other", "of another round", 4, put(round=4))
    yield header("model-of-another-job", "of another job", 3, put(job=OTHER))
    yield Fault(
        "sum-with-initial",
        "a sum that names initial weights; signed anew",
        VERIFY_SUM,
        3,
        lambda scene: {"sum-3.enc": scene.header("sum-3.enc", put(initial=OTHER))},
    )
    yield Fault(
        "sum-as-model",
        "a sum is given where a model goes on",
        f"aggregate {LATER} --key job/server.key --model sum-3.enc --close round-2.close "
        f"--reveals {REVEALS} -o out",
        3,
        edits.no,
    )
    yield Fault(
        "model-of-another-round",
        "the model that goes on is of the same round as the uploads",
        MODEL_OUT.replace("model-1.enc", "model-2.enc"),
        3,
        edits.no,
    )
    yield Fault(
        "upload-unrelated",
        "a good upload of another round is given besides",
        VERIFY.replace("--uploads", "--uploads alice-1.upload"),
        4,
        edits.no,
    )
    yield Fault(
        "verify-reveal-missing",
        "one of the reveals is not given",
        VERIFY.replace(" carol-2.reveal", ""),
        4,
        edits.no,
    )
    yield Fault(
        "verify-reveal-wrong",
        "a reveal with another key; signed anew",
        VERIFY,
        4,
        lambda scene: {"bob-2.reveal": scene.document("bob-2.reveal", edits.wrong_key)},
    )
    yield Fault(
        "verify-upload-missing",
        "one of the uploads is not given",
        VERIFY.replace(" carol-2.upload", ""),
        4,
        edits.no,
    )


def closing() -> Iterator[Fault]:
    close, reveal = "round-2.close", "bob-2.reveal"

    def closed(title: str, about: str, code: int, edit: Edit, signer: str = "") -> Fault:
        def change(scene: Scene) -> Changes:
            return {close: scene.document(close, edit, signer)}

        return Fault(f"close-{title}", f"{about}; signed anew", REVEAL, code, change)

    yield closed("signed-by-a-participant", "signed by a participant", 4, put(), "bob")
    yield closed("signer", "says that a participant is its signer", 3, put(signer="bob"))
    yield closed("too-few", "two of four are in", 6, edits.moved(["alice", "bob"]))
    yield closed(
        "declares-missing", "declares alice missing", 5, edits.moved(["bob", "carol", "dave"])
    )
    yield closed("nobody-missing", "names nobody missing", 3, put(missing=[]))
    yield closed("roster", "leaves out who is missing", 3, put(missing=["erin"]))
    yield closed("upload-other", "names another upload of alice's", 4, edits.upload_other)
    yield closed("base-other", "of another base", 4, put(base=OTHER))
    yield closed("round-unknown", "of a round for which nothing was sent", 4, put(round=7))
    yield closed("second", "a second one of the round", 5, put(created="2023-11-14T22:13:21Z"))
    yield closed("job-other", "of another job", 3, put(job=OTHER))
    yield closed("field-more", "with a field too many", 3, put(more=0))
    yield Fault(
        "close-kind-unknown",
        "of a kind that there is not",
        f"verify {close} --job job/job.json",
        3,
        lambda scene: {close: scene.plain(close, put(kind=OTHER))},
    )
    yield Fault(
        "close-not-signed",
        "the round has been changed; the signature is the old one",
        REVEAL,
        4,
        lambda scene: {close: scene.plain(close, put(round=4))},
    )
    yield Fault(
        "close-line-end",
        "a line end at the end",
        REVEAL,
        3,
        lambda scene: {close: scene.read(close) + b"\n"},
    )
    yield Fault(
        "close-of-another-round",
        "the close file of round 1 for the uploads of round 2",
        MODEL_OUT.replace("round-2.close", "round-1.close"),
        3,
        edits.no,
    )
    yield Fault(
        "close-upload-more",
        "an upload of the close file is not given",
        MODEL_OUT.replace(" carol-2.upload", ""),
        6,
        edits.no,
    )

    yield Fault(
        "close-after-tried",
        "the owner has tried to open the result of the round",
        REVEAL,
        5,
        ledger_edits.ledger("alice", ledger_edits.tried_instead_of_reveal),
    )
    yield Fault(
        "close-after-upload",
        "the owner has begun the round anew on the same base",
        REVEAL,
        5,
        ledger_edits.ledger("alice", ledger_edits.begun_anew),
    )

    def revealed(title: str, about: str, code: int, make: Callable[[Scene], bytes]) -> Fault:
        return Fault(f"reveal-{title}", about, MODEL_OUT, code, lambda scene: {reveal: make(scene)})

    def edited(title: str, about: str, code: int, edit: Edit, signer: str = "") -> Fault:
        return revealed(
            title, f"{about}; signed anew", code, lambda s: s.document(reveal, edit, signer)
        )

    yield revealed(
        "of-another-round",
        "the reveal of round 1",
        3,
        lambda scene: scene.read("bob-1.reveal"),
    )
    yield revealed("twice", "alice's reveal twice", 3, lambda s: s.read("alice-2.reveal"))
    yield edited("signed-by-another", "signed by another participant", 4, put(), "carol")
    yield edited("close-other", "answers another close file", 3, put(close=OTHER))
    yield edited("about-another", "about somebody who is in", 3, edits.about("carol"))
    yield edited("about-nobody", "about nobody", 3, put(keys={}))
    yield edited("key-short", "a key of 31 bytes", 3, put(keys={"dave": edits.encoded(bytes(31))}))
    yield edited("key-base64", "base64 with bits that do not count", 3, edits.loose_base64)
    yield edited("key-base64-line-end", "base64 with a line end", 3, edits.base64_line_end)
    yield edited("key-base64-unpadded", "base64 without padding", 3, edits.base64_unpadded)
    yield Fault(
        "reveal-missing",
        "one of the reveals is not given",
        MODEL_OUT.replace(" bob-2.reveal", ""),
        6,
        edits.no,
    )


def closings() -> Iterator[Fault]:
    """Uploads that the server looks at before it closes a round."""
    first = "alice-1.upload"

    def fault(title: str, about: str, code: int, make: Callable[[Scene], bytes]) -> Fault:
        def change(scene: Scene) -> Changes:
            return {"job/server.ledger": scene.lines("server")[0], first: make(scene)}

        return Fault(f"closing-{title}", about, CLOSE, code, change)

    yield fault(
        "word-too-large",
        "a word of the body is p_1: it could not be added up; the proof is made anew",
        3,
        contents.proven_body(first, contents.word_set(0, 0)),
    )
    yield fault(
        "residue-added-to",
        "a block has 1 added",
        4,
        lambda scene: scene.residue(first, 0, 1, lambda c: contents.added(scene, c)),
    )
    yield Fault("closing-released", "the round was released", CLOSE, 5, edits.no)
    yield Fault(
        "closing-too-few",
        "two of four are in",
        CLOSE.replace(" carol-1.upload", ""),
        6,
        edits.no,
    )
    yield Fault(
        "closing-with-others",
        "the round was closed with another upload",
        CLOSE,
        5,
        lambda scene: {
            "job/server.ledger": scene.cut("server", "aggregate", round=1),
            first: forging.proven(scene, first),
        },
    )
    yield Fault(
        "verify-word-too-large",
        "a word of the body is p_4; the proof is made anew",
        f"verify {A} --job job/job.json",
        3,
        lambda scene: {A: forging.proven(scene, A, body=contents.word_set(3, 0))},
    )
