"""Faulty plain files; bases that an upload must not have; files of version 1."""

import struct
from collections.abc import Callable, Iterator

from tests.vectors.command_lines import (
    AGAIN,
    APPLY,
    DIRECT,
    ENCRYPT,
    ENCRYPT_FIRST,
    ENCRYPT_NAMED,
    FIRST,
    JOB,
    LATTICE,
    MODEL_OUT,
    OPEN,
    OTHER,
    OWN_STEP,
    REVEAL,
    STEPPED,
    SUM,
    VERIFY_SUM,
    A,
)
from tests.vectors.faults import edits, ledger_edits
from tests.vectors.faults.fault import Fault
from tests.vectors.scenarios import SPECS, tensors
from tests.vectors.scene import Changes, Scene, put


def plain() -> Iterator[Fault]:
    def weights(title: str, about: str, code: int, text: Callable[[Scene], str]) -> Fault:
        def change(scene: Scene) -> Changes:
            return {"w0.safetensors": tensors("w0", 0.5, text=text(scene))}

        return Fault(f"weights-{title}", about, ENCRYPT_FIRST, code, change, DIRECT)

    def gradients(title: str, about: str, code: int, make: Callable[[bytes], bytes]) -> Fault:
        def change(scene: Scene) -> Changes:
            return {"alice.grads": make(scene.read("alice.grads"))}

        return Fault(f"gradients-{title}", about, ENCRYPT, code, change)

    yield weights(
        "changed", "not those whose digest the metadata names", 4, lambda s: edits.known(OTHER)
    )
    yield weights(
        "kind", "the metadata calls them gradients", 3, lambda s: edits.known(OTHER, "gradients")
    )
    yield weights("metadata-space", "metadata with a space", 3, lambda s: edits.known(OTHER) + " ")
    yield weights(
        "metadata-round", "a negative round", 3, lambda s: edits.known(OTHER).replace("0", "-1", 1)
    )
    yield Fault(
        "weights-other-tensors",
        "other tensors than the gradients",
        ENCRYPT_FIRST,
        3,
        lambda scene: {"w0.safetensors": tensors("w0", 0.5, SPECS[:2])},
        DIRECT,
    )
    yield Fault(
        "weights-headroom",
        "initial weights beyond what slot_bits allow",
        FIRST,
        7,
        lambda scene: {"w0.safetensors": tensors("w0", 65.0)},
    )
    yield gradients(
        "nan", "NaN as the last value", 7, lambda x: x[:-8] + struct.pack("<d", float("nan"))
    )
    yield gradients(
        "infinite",
        "infinity as the last value",
        7,
        lambda x: x[:-8] + struct.pack("<d", float("inf")),
    )
    yield gradients("cut", "the last byte is missing", 3, lambda x: x[:-1])
    yield gradients("trailing-byte", "a byte after the last", 3, lambda x: x + b"\0")
    yield gradients("dtype", "integers", 3, lambda x: x.replace(b'"F16"', b'"I16"'))
    yield gradients("empty", "no byte at all", 3, lambda x: b"")


def bases() -> Iterator[Fault]:
    """What an upload may be based on."""
    model = "alice.model-2.safetensors"

    def fault(
        title: str,
        about: str,
        code: int,
        command: str,
        change: Callable[[Scene], Changes],
        scene: str = LATTICE,
    ) -> Fault:
        return Fault(f"base-{title}", about, command, code, change, scene)

    def weights(title: str, about: str, code: int, make: Callable[[Scene], bytes]) -> Fault:
        return fault(title, about, code, ENCRYPT, lambda scene: {model: make(scene)})

    yield weights("content-other", "a value of the model was changed", 4, edits.weights_changed)
    yield weights(
        "opened-other",
        "the metadata says another V",
        4,
        lambda s: edits.weights_put(s, opened=OTHER),
    )
    yield weights(
        "not-opened",
        "the metadata names a model that was not opened",
        5,
        lambda s: edits.weights_put(s, base=OTHER),
    )
    yield fault(
        "not-opened-here",
        "another participant opened the model",
        5,
        ENCRYPT.replace("model-2", "model-1").replace("job/alice", "job/dave"),
        edits.no,
    )
    yield fault(
        "initial-after-open",
        "initial weights, after something was opened",
        5,
        ENCRYPT.replace(model, "w0.safetensors"),
        edits.no,
    )
    yield fault(
        "initial-other",
        "other initial weights than before",
        5,
        ENCRYPT_FIRST,
        lambda scene: {"w0.safetensors": tensors("w1", 0.5)},
        DIRECT,
    )
    yield fault("second", "a second upload on a base", 5, AGAIN, edits.no)
    yield fault(
        "second-of-round",
        "a second upload of a round",
        5,
        AGAIN.replace("--round 9", "--round 2 --accept-differencing"),
        edits.no,
    )
    yield fault("round-past", "a round that is over", 2, ENCRYPT.replace("9", "2"), edits.no)
    yield fault(
        "round-missing",
        "no model and no round",
        2,
        ENCRYPT_NAMED.replace("--round 9 ", ""),
        edits.no,
    )

    def named(title: str, about: str, code: int, **values: object) -> Fault:
        return fault(title, about, code, ENCRYPT_NAMED, edits.gradients_named(**values))

    yield named("named-content-other", "gradients on another content", 4, content=OTHER)
    yield named("named-content-missing", "gradients on an unknown content", 2, content=None)
    yield named("named-opened-other", "gradients on another V", 4, opened=OTHER)
    yield named("named-not-opened", "gradients on what was not opened", 5, base=OTHER)
    yield named("named-kind", "not gradients", 3, kind="weights")
    yield fault(
        "model-and-gradients",
        "the gradients name another base than --model",
        3,
        ENCRYPT,
        edits.gradients_named(base=OTHER),
    )
    yield fault(
        "model-and-content",
        "the gradients name another content than --model",
        3,
        ENCRYPT,
        edits.gradients_named(content=OTHER),
    )

    def sums(
        title: str, about: str, code: int, command: str, change: Callable[[Scene], Changes]
    ) -> Fault:
        return Fault(f"step-{title}", about, command, code, change, DIRECT)

    yield sums(
        "missing",
        "no step along the sum was taken",
        5,
        STEPPED,
        lambda scene: {"job/alice.ledger": scene.cut("alice", "step")},
    )
    yield sums(
        "model-other",
        "not the model after the step",
        4,
        STEPPED,
        ledger_edits.ledger("alice", ledger_edits.event_put("step", content=OTHER)),
    )
    yield sums(
        "second",
        "another step along the sum was taken",
        5,
        OWN_STEP,
        ledger_edits.ledger("bob", ledger_edits.step_other),
    )
    yield sums("no-sum", "no sum was opened", 5, OWN_STEP.replace("bob", "carol"), edits.no)
    yield sums("round-past", "a round that is over", 2, f"{OWN_STEP} --round 1", edits.no)
    yield sums(
        "apply-sum-other",
        "not the sum that was opened",
        4,
        APPLY,
        ledger_edits.ledger("bob", ledger_edits.event_put("open", content=OTHER)),
    )
    yield sums(
        "apply-not-opened",
        "a sum that the owner has not opened",
        5,
        APPLY.replace("job/bob", "job/carol"),
        edits.no,
    )
    yield sums(
        "apply-model-other",
        "not the pinned initial weights",
        4,
        APPLY,
        lambda scene: {"w0.safetensors": tensors("w1", 0.5)},
    )
    yield sums(
        "apply-model-unknown",
        "the model before the sum is not in the ledger",
        5,
        APPLY,
        ledger_edits.ledger("bob", ledger_edits.event_put("open", parent=OTHER)),
    )


def older() -> Iterator[Fault]:
    """Files of version 1."""

    def fault(name: str, command: str, make: Callable[[Scene], Changes]) -> Fault:
        return Fault(f"older-{name}", "a file of version 1", command, 3, make)

    v1 = put(format="dtl/v1")

    def bulk(name: str, file: str, command: str) -> Fault:
        return fault(name, command, lambda scene: {file: scene.header(file, v1)})

    def document(name: str, file: str, command: str) -> Fault:
        return fault(name, command, lambda scene: {file: scene.document(file, v1)})

    yield bulk("upload", A, SUM)
    yield bulk("sum", "sum-3.enc", VERIFY_SUM)
    yield bulk("model", "model-1.enc", MODEL_OUT)
    yield bulk("release", "model-1.release", OPEN)
    yield document("job", "job/job.json", JOB)
    yield document("close", "round-2.close", REVEAL)
    yield document("reveal", "bob-2.reveal", MODEL_OUT)
    key, ledger = "job/alice.key", "job/alice.ledger"
    yield fault("key", OPEN, lambda scene: {key: scene.plain(key, v1)})
    yield fault(
        "ledger",
        OPEN,
        lambda scene: {ledger: scene.relinked("alice", lambda entries: v1(entries[0]))},
    )
    yield fault(
        "weights",
        ENCRYPT,
        lambda scene: {"alice.model-2.safetensors": edits.weights_put(scene, format="dtl/v1")},
    )
    yield fault("gradients", ENCRYPT, edits.gradients_named(format="dtl/v1"))
