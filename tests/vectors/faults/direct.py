"""Faulty files of a direct job."""

from collections.abc import Callable, Iterator

from tests.vectors import forging
from tests.vectors.command_lines import (
    DIRECT,
    DIRECT_AUDIT,
    DIRECT_MODEL,
    DIRECT_OPEN,
    DIRECT_RECOMPUTED,
    DIRECT_SUM,
    DIRECT_VERIFY,
    TAG,
)
from tests.vectors.faults import contents
from tests.vectors.faults.contents import Edit2
from tests.vectors.faults.fault import Fault
from tests.vectors.scenarios import tensors
from tests.vectors.scene import Changes, Scene, put


def direct() -> Iterator[Fault]:
    upload = "alice-1.upload"

    def fault(
        name: str, about: str, command: str, code: int, change: Callable[[Scene], Changes]
    ) -> Fault:
        return Fault(f"direct-{name}", about, command, code, change, DIRECT)

    def sent(name: str, about: str, code: int, edit: Edit2) -> Fault:
        return fault(
            name, about, DIRECT_SUM, code, lambda scene: {upload: scene.tensors(upload, edit)}
        )

    yield sent(
        "body", "a body in a direct job", 3, lambda found: found.update(body=([575], bytes(575)))
    )
    yield sent("proof-missing", "without a proof", 3, lambda found: found.pop("proof"))
    yield fault(
        "residue-added-to",
        "c_4 of the second group has 1 added to its block",
        DIRECT_SUM,
        4,
        lambda scene: {upload: scene.residue(upload, 1, 4, lambda c: contents.added(scene, c))},
    )
    yield fault(
        "residue-c0-beyond",
        "c_0 of the second group is c + N",
        DIRECT_SUM,
        3,
        lambda scene: {upload: scene.residue(upload, 1, 0, lambda c: c + scene.p * scene.q)},
    )
    yield fault(
        "round-other",
        "made for the next round; the proof is made anew",
        DIRECT_SUM,
        3,
        contents.proven_header("bob-1.upload", put(round=2)),
    )
    yield fault(
        "model-residue-wrong",
        "a block of the model has 1 added",
        DIRECT_VERIFY,
        4,
        lambda scene: {
            "model-1.enc": scene.residue("model-1.enc", 0, 1, lambda c: contents.added(scene, c))
        },
    )
    yield fault(
        "model-body",
        "a model with a body in a direct job",
        DIRECT_VERIFY,
        3,
        lambda scene: {
            "model-1.enc": scene.tensors(
                "model-1.enc", lambda found: found.update(body=([25], bytes(25)))
            )
        },
    )
    yield fault(
        "weights-headroom",
        "initial weights beyond what slot_bits allow",
        DIRECT_MODEL,
        7,
        lambda scene: {"w0.safetensors": tensors("w0", 65.0)},
    )
    yield fault(
        "audit-tag",
        "another opened tag; the proof is made anew",
        DIRECT_AUDIT,
        4,
        contents.proven_header("alice-2.upload", put(opened_tag=TAG)),
    )
    yield fault(
        "audit-value",
        "a value beyond e_max; the proof is made anew",
        DIRECT_AUDIT,
        4,
        lambda scene: {
            "alice-2.upload": forging.proven(
                scene, "alice-2.upload", blocks=contents.block_plus(0, 1 << 22)
            )
        },
    )
    yield fault(
        "audit-padding",
        "a slot after the last value is not zero; the proof is made anew",
        DIRECT_AUDIT,
        4,
        lambda scene: {
            "alice-2.upload": forging.proven(
                scene, "alice-2.upload", blocks=contents.block_plus(20, 1)
            )
        },
    )

    def opened(name: str, about: str, change: Edit2, tried: bool = True) -> Fault:
        def make(scene: Scene) -> Changes:
            return {"sum-1.release": forging.released(scene, "sum-1.release", None, change)}

        command = DIRECT_OPEN if tried else DIRECT_RECOMPUTED
        return Fault(
            f"direct-release-{name}",
            about,
            command,
            4,
            make,
            DIRECT,
            "job/carol.ledger" if tried else "",
        )

    yield opened("value", "a value beyond n e_max", contents.residue_plus(0, 1, 3 << 21))
    yield opened(
        "padding", "a slot after the last value is not zero", contents.residue_plus(2, 7, 1)
    )
    yield opened("block", "a block out of range", contents.residue_plus(1, 2, 1 << 252))
    yield opened("no-block", "a residue that does not open", contents.residue_times(1, 3))
    yield opened(
        "unit", "one unit more than the sum of the uploads", contents.residue_plus(0, 1, 1), False
    )
    yield fault(
        "release-body",
        "a body in a direct job",
        DIRECT_OPEN,
        3,
        lambda scene: {
            "sum-1.release": scene.tensors(
                "sum-1.release", lambda found: found.update(body=([25], bytes(25)))
            )
        },
    )
