"""Every faulty vector: what is wrong, with which command, and the exit code it must cause."""

import base64
import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dtl.core.crypto import primitives
from dtl.core.files import canonical_json, key_file
from dtl.core.files.job_file import signed_digest
from tests import helpers
from tests.second import lattice
from tests.vectors import forging
from tests.vectors.scenarios import FOUR, PASSPHRASE, PRESENT, SPECS, THREE, tensors
from tests.vectors.scene import (
    Changes,
    Edit,
    Json,
    Scene,
    Tensors,
    drop,
    entries_of,
    joined,
    linked,
    outer,
    put,
)

LATTICE, DIRECT = "three-rounds", "sums"
UPLOADS = " ".join(f"{name}-3.upload" for name in FOUR)
SUM = f"aggregate {UPLOADS} --key job/server.key -o out"
LATER = " ".join(f"{name}-2.upload" for name in PRESENT)
REVEALS = " ".join(f"{name}-2.reveal" for name in PRESENT)
MODEL = f"aggregate {LATER} --key job/server.key --model model-1.enc --close round-2.close"
MODEL_OUT = f"{MODEL} --reveals {REVEALS} -o out"
VERIFY = (
    f"verify model-2.enc --job job/job.json --model model-1.enc --uploads {LATER} "
    f"--reveals {REVEALS}"
)
VERIFY_SUM = f"verify sum-3.enc --job job/job.json --uploads {UPLOADS}"
VERIFY_RELEASE = "verify model-1.release --key job/carol.key"
INITIAL = MODEL_OUT.replace("--model model-1.enc", "--initial w0.safetensors")
FIRST = INITIAL.replace("-2.", "-1.")
REVEAL = "reveal-masks round-2.close --key job/alice.key -o out"
OPEN = "open-model model-1.release --key job/alice.key -o out.safetensors"
EVIDENCE = (
    "--uploads alice-1.upload bob-1.upload carol-1.upload --initial w0.safetensors "
    "--reveals alice-1.reveal bob-1.reveal carol-1.reveal"
)
OPEN_RECOMPUTED = f"{OPEN} {EVIDENCE}"
VERIFY_ALL = f"{VERIFY_RELEASE} {EVIDENCE}"
OPEN_SUM = "open-model sum-3.release --key job/carol.key -o out.safetensors"
JOB = "verify job/job.json"
ENCRYPT = (
    "encrypt-grads alice.grads --key job/alice.key --model alice.model-2.safetensors --round 9 "
    "-o out"
)
AGAIN = ENCRYPT.replace("model-2", "model-1")
CLOSE = "close-round alice-1.upload bob-1.upload carol-1.upload --key job/server.key -o out"
RELEASE = "release-model model-2.enc --key job/server.key -o out"
AUDIT = "audit alice-3.upload --key job/kgc.key"
AUDIT_LATER = "audit alice-2.upload --key job/kgc.key --model model-1.enc"
A, B, LATE = "alice-3.upload", "bob-3.upload", "alice-2.upload"
OTHER = "5a" * 64
TAG = "5a" * 16
WIDTH = 64
N = math.prod(helpers.PRIMES[256])
PRIMES = lattice.SMALL.primes
SMALL_BODY = lattice.Shape(lattice.SMALL, 24, 159)
COEFFICIENTS = 23  # of a body of 159 values in slots of 24 bits
Edit2 = Callable[[Tensors], object]
Ledger = Callable[[list[Json]], object]
STEP: Json = {
    "event": "step",
    "round": 1,
    "sum": OTHER,
    "content": OTHER,
    "source": "adopt:bob",
}
GROUPS = 5  # of a secret, at 256 bits

ENCRYPT_NAMED = "encrypt-grads alice.grads --key job/alice.key --round 9 -o out"

DIRECT_UPLOADS = " ".join(f"{name}-1.upload" for name in THREE)
DIRECT_SUM = f"aggregate {DIRECT_UPLOADS} --key job/server.key -o out"
DIRECT_MODEL = f"{DIRECT_SUM} --initial w0.safetensors"
DIRECT_VERIFY = (
    f"verify model-1.enc --job job/job.json --uploads {DIRECT_UPLOADS} --initial w0.safetensors"
)
DIRECT_OPEN = "open-model sum-1.release --key job/carol.key -o out.safetensors"
DIRECT_RECOMPUTED = f"{DIRECT_OPEN} --uploads {DIRECT_UPLOADS}"
DIRECT_AUDIT = "audit alice-2.upload --key job/kgc.key --model sum-1.enc"
ENCRYPT_FIRST = (
    "encrypt-grads carol.grads --key job/carol.key --model w0.safetensors --round 9 "
    "--accept-differencing -o out"
)
APPLY = (
    "apply-sum bob.sum-1.safetensors --model w0.safetensors --key job/bob.key -o out.safetensors"
)
OWN_STEP = (
    "encrypt-grads bob.grads --key job/bob.key --model alice.w1.safetensors --own-step -o out"
)
STEPPED = (
    "encrypt-grads alice.grads --key job/alice.key --model alice.w1.safetensors --round 9 "
    "--accept-differencing -o out"
)


@dataclass(frozen=True)
class Fault:
    """A faulty vector: its name, what it is, the command, the exit code, and how it is made.

    `scene` is the job that it is made from. `tried` is a ledger that gains a tried line, though
    the command fails: half b was used.
    """

    name: str
    about: str
    command: str
    code: int
    change: Callable[[Scene], Changes]
    scene: str = LATTICE
    tried: str = ""


def uploads() -> Iterator[Fault]:
    def fault(name: str, about: str, code: int, make: Callable[[Scene], bytes]) -> Fault:
        return Fault(f"upload-{name}", about, SUM, code, lambda scene: {A: make(scene)})

    def header(name: str, about: str, code: int, edit: Edit, of: str = A) -> Fault:
        def change(scene: Scene) -> Changes:
            return {of: scene.header(of, edit)}

        return Fault(f"upload-{name}", f"{about}; signed anew", SUM, code, change)

    def residue(name: str, about: str, code: int, edit: Callable[[Scene, int], int]) -> Fault:
        def make(scene: Scene) -> bytes:
            return scene.residue(A, 1, 4, lambda number: edit(scene, number))

        return fault(f"residue-{name}", f"c_4 of the second group {about}", code, make)

    def first(name: str, about: str, edit: Callable[[Scene, int], int]) -> Fault:
        def make(scene: Scene) -> bytes:
            return scene.residue(A, 1, 0, lambda number: edit(scene, number))

        return fault(f"residue-c0-{name}", f"c_0 of the second group {about}", 3, make)

    yield first("zero", "is 0", lambda scene, c: 0)
    yield first("n", "is N", lambda scene, c: scene.p * scene.q)
    yield first("beyond", "is c + N: the same modulo N", lambda scene, c: c + scene.p * scene.q)
    yield first("multiple-of-p", "is p", lambda scene, c: scene.p)
    yield residue("zero", "is 0", 3, lambda scene, c: 0)
    yield residue("square", "is N^2", 3, lambda scene, c: scene.square)
    yield residue("beyond", "is c + N^2, which is too large", 3, _beyond)
    yield residue("multiple-of-p", "is a multiple of p", 3, lambda scene, c: scene.p)
    yield residue("added-to", "has 1 added to its block", 4, _added)
    yield fault(
        "residues-swapped",
        "c_1 and c_2 of the first group are swapped",
        4,
        lambda scene: scene.tensors(A, lambda found: _swap(found, "residues", scene.width, 1, 2)),
    )
    yield fault(
        "proof-d-swapped",
        "d_1 and d_2 are swapped",
        4,
        lambda scene: scene.tensors(A, lambda found: _swap(found, "proof", scene.width, 1, 2)),
    )
    for part in ("d0", "d7", "z", "v1", "v3", "v7"):
        about = f"{part[0]}_{part[1:]}" if part != "z" else "z"
        yield fault(
            f"proof-{part}-wrong",
            f"{about} of the proof is one larger",
            4,
            _one_larger(part),
        )
    yield fault(
        "proof-d0-beyond",
        "d_0 is larger by N: the same modulo N",
        4,
        lambda scene: scene.proof(A, "d0", lambda number: number + scene.p * scene.q),
    )
    yield fault("proof-d0-zero", "d_0 is 0", 4, lambda scene: scene.proof(A, "d0", lambda d: 0))
    yield fault("proof-d-zero", "d_5 is 0", 4, lambda scene: scene.proof(A, "d5", lambda number: 0))
    yield fault(
        "proof-d-multiple-of-q",
        "d_5 is a multiple of q",
        4,
        lambda scene: scene.proof(A, "d5", lambda number: scene.q),
    )
    yield fault(
        "proof-v-too-large",
        "v_2 is N, where it must be below",
        4,
        lambda scene: scene.proof(A, "v2", lambda number: scene.p * scene.q),
    )
    yield fault(
        "proof-z-too-large",
        "z has a bit more than ell' + 1",
        4,
        lambda scene: scene.proof(A, "z", lambda number: number | 1 << 517),
    )
    yield fault(
        "proof-of-another",
        "the proof is that of another participant's upload",
        4,
        lambda scene: scene.tensors(
            A, lambda found: found.update(proof=_tensor(scene, B, "proof"))
        ),
    )
    yield fault(
        "copied",
        "another participant's tensors under the own name and signature",
        4,
        lambda scene: scene.tensors(A, lambda found: found.update(scene.bulk(B)[1])),
    )
    yield fault(
        "round-not-signed",
        "the header says one round more; the signature is that of the old header",
        4,
        lambda scene: scene.container(A, '\\"round\\":3', '\\"round\\":4'),
    )
    yield fault(
        "residue-not-signed",
        "the last byte has been changed; the signature is that of the old file",
        4,
        lambda scene: scene.read(A)[:-1] + bytes([scene.read(A)[-1] ^ 1]),
    )
    yield fault(
        "signed-by-another",
        "signed with the key of another participant",
        4,
        lambda scene: scene.header(A, put(), signer="bob"),
    )
    yield fault(
        "signature-other-kind",
        "signed as if it were a model",
        4,
        lambda scene: _signed_as_model(scene, A),
    )
    yield header("round-other", "made for the next round", 3, put(round=4), B)
    yield header("round-zero", "for round 0", 3, put(round=0))
    yield header("round-too-large", "for round 2^32", 3, put(round=2**32))
    yield header("round-text", "the round is a text", 3, put(round="1"))
    yield header("base-other", "based on a model", 3, put(base=OTHER, opened_tag="5a" * 16), B)
    yield header("base-short", "the base is no digest", 3, put(base="5a" * 63, opened_tag=TAG))
    yield header("tag-without-base", "an opened tag, but no base", 3, put(opened_tag=TAG))
    yield header("base-without-tag", "a base, but no opened tag", 3, put(base=OTHER))
    yield header("tag-absent", "without `opened_tag`", 3, drop("opened_tag"))

    def tagged(name: str, about: str, code: int, tag: object) -> Fault:
        def change(scene: Scene) -> Changes:
            return {LATE: scene.header(LATE, put(opened_tag=tag))}

        return Fault(f"upload-tag-{name}", f"{about}; signed anew", MODEL_OUT, code, change)

    yield tagged("null", "no opened tag, but a base", 3, None)
    yield tagged("short", "an opened tag of 15 bytes", 3, "5a" * 15)
    yield tagged("long", "an opened tag of 17 bytes", 3, "5a" * 17)
    yield tagged("upper-case", "an opened tag in upper case", 3, "5A" * 16)
    yield tagged("other", "another opened tag, under the old proof", 4, TAG)
    yield header("job-other", "of another job", 3, put(job=OTHER))
    yield header("job-upper-case", "the job's digest in upper case", 3, _upper("job"))
    yield header("roster-other", "of another roster", 3, put(roster=OTHER))
    yield header("signer-unknown", "by somebody who is not in the roster", 3, put(signer="erin"))
    yield header("signer-server", "by the server, who is no participant", 3, put(signer="server"))
    yield header("not-masked", "says that it is not masked", 3, put(masked=False))
    yield header("masked-number", "says 1 where it must say true", 3, put(masked=1))
    yield header("format-other", "of another version", 3, put(format="dtl/v3"))
    yield header("kind-other", "is of no kind that there is", 3, put(kind="uploads"))
    yield header("created-date-only", "without a time", 3, put(created="2023-11-14"))
    yield header("created-line-end", "a line end after the time", 3, _append("created", "\n"))
    yield header("signer-line-end", "a line end after the name", 3, _append("signer", "\n"))
    yield header("field-missing", "without `masked`", 3, drop("masked"))
    yield header("field-more", "with a field too many", 3, put(more=None))
    yield header("values-wrong", "more values than the layout holds", 3, put(values=160))
    yield header("values-float-like", "values are a text", 3, put(values="159"))
    yield header("layout-shape-other", "another shape than the others'", 3, _shape([17, 9]), B)
    yield header("layout-shape-negative", "a negative shape", 3, _shape([-9, -17]))
    yield header("layout-dimensions", "33 dimensions", 3, _shape([1] * 31 + [9, 17]))
    yield header("layout-unsorted", "tensors out of order", 3, lambda h: h["layout"].reverse())
    yield header("layout-name-twice", "two tensors of one name", 3, _renamed(1, "a.weight"))
    yield header("layout-name-empty", "a tensor without a name", 3, _renamed(0, ""))
    yield header("layout-name-control", "a control character in a name", 3, _renamed(0, "a\x7f"))
    yield header("layout-name-reserved", "a reserved name", 3, _renamed(0, "__dtl__"))
    yield header("layout-name-long", "a name of 1025 characters", 3, _renamed(0, "a" * 1025))
    yield header("layout-dtype", "an unknown dtype", 3, lambda h: h["layout"][0].update(dtype="I8"))
    yield header("layout-empty", "no tensors", 3, put(layout=[], values=0))
    yield fault(
        "tensor-missing",
        "without a proof",
        3,
        lambda scene: scene.tensors(A, lambda found: found.pop("proof")),
    )
    yield fault(
        "tensor-more",
        "with a fourth tensor",
        3,
        lambda scene: scene.tensors(A, lambda found: found.update(more=([1], b"\0"))),
    )
    yield fault(
        "residues-flat",
        "the residues are of another shape",
        3,
        lambda scene: scene.tensors(A, lambda found: _reshape(found, [8 * GROUPS, scene.width])),
    )
    yield fault(
        "group-missing",
        "the last group is missing",
        3,
        lambda scene: scene.tensors(A, lambda found: _cut(found, scene.width)),
    )
    yield Fault(
        "upload-given-twice", "an upload is given twice", f"aggregate {A} {SUM[10:]}", 5, _no
    )
    yield Fault(
        "upload-missing",
        "one participant's upload is not given, and the round is not closed",
        f"aggregate {A} {B} carol-3.upload --key job/server.key -o out",
        6,
        _no,
    )
    yield fault(
        "layout-field-more",
        "a field more in a tensor of the layout; signed anew",
        3,
        lambda scene: scene.header(A, lambda h: h["layout"][0].update(more=0)),
    )


def bodies() -> Iterator[Fault]:
    def fault(name: str, about: str, code: int, make: Callable[[Scene], bytes]) -> Fault:
        def change(scene: Scene) -> Changes:
            ledger = scene.cut("server", "aggregate", round=3)
            return {"job/server.ledger": ledger, A: make(scene)}

        return Fault(f"body-{name}", about, SUM, code, change)

    def edited(edit: Callable[[Tensors], object]) -> Callable[[Scene], bytes]:
        return lambda scene: scene.tensors(A, edit)

    yield fault("missing", "without a body", 3, edited(lambda found: found.pop("body")))
    yield fault("cut", "the body is a byte short", 3, edited(lambda found: _resize(found, -1)))
    yield fault("longer", "the body has a byte more", 3, edited(lambda found: _resize(found, 1)))
    yield fault(
        "of-another",
        "the body is that of another participant's upload",
        4,
        lambda scene: scene.tensors(A, lambda found: found.update(body=_tensor(scene, B, "body"))),
    )
    yield fault("changed", "a word is larger by 1, under the old proof", 4, edited(_word_larger))
    for prime in range(4):
        yield fault(
            f"word-{prime + 1}-too-large",
            f"a word modulo p_{prime + 1} is p_{prime + 1}; the proof is made anew",
            3,
            _proven_body(A, _word_set(prime, 0)),
        )
    yield fault(
        "word-largest",
        "a word has all its bits set; the proof is made anew",
        3,
        _proven_body(A, _word_set(0, 2**50 - 1 - PRIMES[0])),
    )

    def result(name: str, about: str, command: str, code: int, edit: Edit2) -> Fault:
        def change(scene: Scene) -> Changes:
            return {"model-1.enc": scene.tensors("model-1.enc", edit)}

        return Fault(f"model-body-{name}", about, command, code, change)

    again = MODEL_OUT
    yield result("word-too-large", "a word of the model is p_1", again, 3, _words(0, 0))
    yield result("missing", "a model without a body", again, 3, lambda found: found.pop("body"))
    yield result("cut", "the body of a model is cut", again, 3, lambda found: _resize(found, -1))

    def audited(name: str, about: str, make: Callable[[Scene], bytes]) -> Fault:
        return Fault(f"audit-{name}", about, AUDIT, 4, lambda scene: {A: make(scene)})

    yield audited(
        "body-error", "an error beyond 64; the proof is made anew", _proven_body(A, _plus(1000))
    )
    yield audited(
        "body-value",
        "a value beyond e_max; the proof is made anew",
        _proven_body(A, _plus(1 << 28 + 21)),
    )
    yield audited(
        "body-padding",
        "a slot that is left over is not zero; the proof is made anew",
        _proven_body(A, _plus(1 << 28 + 24 * 6, COEFFICIENTS - 1)),
    )
    yield audited(
        "secret", "a secret beyond 64; the proof is made anew", _proven_blocks(A, 0, 1000)
    )
    yield audited(
        "secret-padding",
        "the blocks hold more than the secret; the proof is made anew",
        _proven_blocks(A, 7 * GROUPS - 1, 1 << 28 * 8),
    )
    yield audited(
        "block", "a block out of range; the proof is made anew", _proven_blocks(A, 3, 1 << 252)
    )
    yield Fault(
        "audit-malformed",
        "a residue is multiplied by c_0's lift: a block of no meaning; signed anew",
        AUDIT,
        4,
        lambda scene: {A: scene.residue(A, 2, 3, lambda c: c * _lifted(scene, A) % scene.square)},
    )
    for name, about, edit in (
        ("tag", "another opened tag; the proof is made anew", put(opened_tag=TAG)),
        ("round", "for another round: other masks; the proof is made anew", put(round=4)),
    ):
        yield Fault(f"audit-{name}", about, AUDIT_LATER, 4, _proven_header(LATE, edit))


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
        lambda scene: {upload: scene.residue(upload, 1, 4, lambda c: _added(scene, c))},
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
        _proven_header("bob-1.upload", put(round=2)),
    )
    yield fault(
        "model-residue-wrong",
        "a block of the model has 1 added",
        DIRECT_VERIFY,
        4,
        lambda scene: {
            "model-1.enc": scene.residue("model-1.enc", 0, 1, lambda c: _added(scene, c))
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
        _proven_header("alice-2.upload", put(opened_tag=TAG)),
    )
    yield fault(
        "audit-value",
        "a value beyond e_max; the proof is made anew",
        DIRECT_AUDIT,
        4,
        lambda scene: {
            "alice-2.upload": forging.proven(
                scene, "alice-2.upload", blocks=_block_plus(0, 1 << 22)
            )
        },
    )
    yield fault(
        "audit-padding",
        "a slot after the last value is not zero; the proof is made anew",
        DIRECT_AUDIT,
        4,
        lambda scene: {
            "alice-2.upload": forging.proven(scene, "alice-2.upload", blocks=_block_plus(20, 1))
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

    yield opened("value", "a value beyond n e_max", _residue_plus(0, 1, 3 << 21))
    yield opened("padding", "a slot after the last value is not zero", _residue_plus(2, 7, 1))
    yield opened("block", "a block out of range", _residue_plus(1, 2, 1 << 252))
    yield opened("no-block", "a residue that does not open", _residue_times(1, 3))
    yield opened("unit", "one unit more than the sum of the uploads", _residue_plus(0, 1, 1), False)
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


def spellings() -> Iterator[Fault]:
    def fault(name: str, about: str, make: Callable[[Scene], bytes]) -> Fault:
        return Fault(f"container-{name}", about, SUM, 3, lambda scene: {A: make(scene)})

    def text(name: str, about: str, old: str, new: str) -> Fault:
        return fault(name, about, lambda scene: scene.container(A, old, new))

    yield fault("empty", "no byte at all", lambda scene: b"")
    yield fault("trailing-byte", "a byte after the last", lambda scene: scene.read(A) + b"\0")
    yield fault("cut", "the last byte is missing", lambda scene: scene.read(A)[:-1])
    yield fault("header-cut", "ends within the header", lambda scene: scene.read(A)[:100])
    yield fault(
        "length-huge",
        "the header's length is 2^63",
        lambda scene: (1 << 63).to_bytes(8, "little") + scene.read(A)[8:],
    )
    yield fault("padding", "eight spaces more than needed", _padded)
    yield fault("padding-newline", "padded with a line end", _newline)
    yield fault("deep", "the header is 10,000 arrays in one another", _deep)
    yield fault("not-utf-8", "the header is not UTF-8", _not_utf8)
    yield text("key-twice", "a key twice", '"proof":{', '"proof":0,"proof":{')
    yield text("space", "a space after a colon", '"dtype":"U8"', '"dtype": "U8"')
    yield text("keys-unsorted", "keys out of order", *_unsorted())
    yield text("escaped", "a letter escaped without need", '"proof"', '"\\u0070roof"')
    yield text("offset-float", "an offset is 0.0", "[0,", "[0.0,")
    yield text("offset-minus-zero", "an offset is -0", "[0,", "[-0,")
    yield text("overlap", "two tensors overlap", '"data_offsets":[575,', '"data_offsets":[574,')
    yield text("gap", "a gap between two tensors", '"data_offsets":[575,', '"data_offsets":[576,')
    yield text("dtype", "a tensor is of dtype I8", '"dtype":"U8"', '"dtype":"I8"')
    yield text(
        "metadata-more", "a third text in the metadata", '"signature"', '"more":"","signature"'
    )
    yield text("metadata-renamed", "the signature by another name", '"signature"', '"signatures"')
    yield fault("signature-upper-case", "the signature in upper case", _upper_signature)
    yield fault("signature-short", "a digit of the signature is missing", _short_signature)

    def header(name: str, about: str, old: str, new: str) -> Fault:
        return Fault(
            f"header-{name}",
            f"{about}; signed anew",
            SUM,
            3,
            lambda scene: {A: scene.text(A, old, new)},
        )

    yield header("key-twice", "a key twice", '"round":3', '"round":3,"round":3')
    yield header("key-twice-other", "a key twice, not the same", '"round":3', '"round":2,"round":3')
    yield header("space", "a space", '"round":3', '"round": 3')
    yield header("line-end", "a line end at its end", '"values":159}', '"values":159}\n')
    yield header("float", "a float", '"round":3', '"round":3.0')
    yield header("exponent", "an exponent", '"round":3', '"round":3e0')
    yield header("nan", "NaN", '"round":3', '"round":NaN')
    yield header("minus-zero", "-0", '"round":3', '"round":-0')
    yield header("long-number", "a number of 5,000 digits", '"round":3', '"round":' + "1" * 5000)
    yield header("surrogate", "half a surrogate pair", '"b"', '"\\ud800"')
    yield header("escaped", "a letter escaped without need", '"b"', '"\\u0062"')
    yield header("slash", "an escaped slash", '"dtl/v2"', '"dtl\\/v2"')
    yield header("true", "true for 1", '"round":3', '"round":true')
    yield header("null", "null for a text", '"kind":"upload"', '"kind":null')
    yield header("look-alike", "a Cyrillic letter in a name", '"alice"', '"аlice"')


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
        _proven_body(first, _word_set(0, 0)),
    )
    yield fault(
        "residue-added-to",
        "a block has 1 added",
        4,
        lambda scene: scene.residue(first, 0, 1, lambda c: _added(scene, c)),
    )
    yield Fault("closing-released", "the round was released", CLOSE, 5, _no)
    yield Fault(
        "closing-too-few",
        "two of four are in",
        CLOSE.replace(" carol-1.upload", ""),
        6,
        lambda scene: {"job/server.ledger": scene.lines("server")[0]},
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
        lambda scene: {A: forging.proven(scene, A, body=_word_set(3, 0))},
    )


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
        lambda scene: scene.residue(name, 0, 1, lambda c: _added(scene, c)),
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
        lambda scene: scene.tensors(name, _plus_one),
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
            _unreleased(_residue_set(name, 0, 0, value)),
        )
        yield Fault(
            f"start-c0-{title}",
            f"a c_0 of the model that goes on {about}",
            MODEL_OUT,
            3,
            _residue_set("model-1.enc", 0, 0, value),
        )
    yield header("model-too-many", "2^21 contributions", 7, _counts("alice", 2**21 - 4))
    yield header("model-count-huge", "2^32 contributions of one", 3, _counts("alice", 2**32))
    yield fault(
        "model-signed-by-a-participant",
        "signed with the key of a participant",
        4,
        lambda scene: scene.header(name, put(), signer="alice"),
    )
    yield header("model-signer", "says that a participant is its signer", 3, put(signer="alice"))
    yield header("model-counts", "counts a round too many", 4, _counts("alice", 3))
    yield header("model-counts-zero", "counts no rounds", 3, _counts("alice", 0))
    yield header("model-counts-nobody", "does not count a contributor", 3, _uncounted)
    yield header("model-initial-null", "names no initial weights", 3, put(initial=None))
    yield header("model-initial-other", "names other initial weights", 4, put(initial=OTHER))
    yield header("model-parent-other", "names another parent", 4, put(parent=OTHER))
    yield header("model-missing-nobody", "does not name who is missing", 3, put(missing=[]))
    yield header("model-missing-stranger", "names a stranger", 3, put(missing=["dave", "erin"]))
    yield header(
        "model-both", "names one both present and missing", 3, put(missing=["carol", "dave"])
    )
    yield header("model-upload-other", "names another upload", 4, _upload_other)
    yield header("model-contributors-unsorted", "out of order", 3, _reversed("contributors"))
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
        _no,
    )
    yield Fault(
        "model-of-another-round",
        "the model that goes on is of the same round as the uploads",
        MODEL_OUT.replace("model-1.enc", "model-2.enc"),
        3,
        _no,
    )
    yield Fault(
        "upload-unrelated",
        "a good upload of another round is given besides",
        VERIFY.replace("--uploads", "--uploads alice-1.upload"),
        4,
        _no,
    )
    yield Fault(
        "verify-reveal-missing",
        "one of the reveals is not given",
        VERIFY.replace(" carol-2.reveal", ""),
        4,
        _no,
    )
    yield Fault(
        "verify-reveal-wrong",
        "a reveal with another key; signed anew",
        VERIFY,
        4,
        lambda scene: {"bob-2.reveal": scene.document("bob-2.reveal", _wrong_key)},
    )
    yield Fault(
        "verify-upload-missing",
        "one of the uploads is not given",
        VERIFY.replace(" carol-2.upload", ""),
        4,
        _no,
    )


def closing() -> Iterator[Fault]:
    close, reveal = "round-2.close", "bob-2.reveal"

    def closed(title: str, about: str, code: int, edit: Edit, signer: str = "") -> Fault:
        def change(scene: Scene) -> Changes:
            return {close: scene.document(close, edit, signer)}

        return Fault(f"close-{title}", f"{about}; signed anew", REVEAL, code, change)

    yield closed("signed-by-a-participant", "signed by a participant", 4, put(), "bob")
    yield closed("signer", "says that a participant is its signer", 3, put(signer="bob"))
    yield closed("too-few", "two of four are in", 6, _moved(["alice", "bob"]))
    yield closed("declares-missing", "declares alice missing", 5, _moved(["bob", "carol", "dave"]))
    yield closed("nobody-missing", "names nobody missing", 3, put(missing=[]))
    yield closed("roster", "leaves out who is missing", 3, put(missing=["erin"]))
    yield closed("upload-other", "names another upload of alice's", 4, _upload_other)
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
        _no,
    )
    yield Fault(
        "close-upload-more",
        "an upload of the close file is not given",
        MODEL_OUT.replace(" carol-2.upload", ""),
        6,
        _no,
    )

    yield Fault(
        "close-after-tried",
        "the owner has tried to open the result of the round",
        REVEAL,
        5,
        _ledger("alice", _tried_instead_of_reveal),
    )
    yield Fault(
        "close-after-upload",
        "the owner has begun the round anew on the same base",
        REVEAL,
        5,
        _ledger("alice", _begun_anew),
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
    yield edited("about-another", "about somebody who is in", 3, _about("carol"))
    yield edited("about-nobody", "about nobody", 3, put(keys={}))
    yield edited("key-short", "a key of 31 bytes", 3, put(keys={"dave": _base64(bytes(31))}))
    yield edited("key-base64", "base64 with bits that do not count", 3, _loose_base64)
    yield edited("key-base64-line-end", "base64 with a line end", 3, _base64_line_end)
    yield edited("key-base64-unpadded", "base64 without padding", 3, _base64_unpadded)
    yield Fault(
        "reveal-missing",
        "one of the reveals is not given",
        MODEL_OUT.replace(" bob-2.reveal", ""),
        6,
        _no,
    )


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

    yield header("grants-swapped", "the wrapped keys of two are swapped", 4, _swap_grants)
    yield header("grant-removed", "without alice's grant", 5, lambda h: h["grants"].pop(0))
    yield header("grant-of-another", "one other's grant is missing: it is bound to all", 4, _pop)
    yield header("grants-unsorted", "grants out of order", 3, _reversed("grants"))
    yield header("grants-none", "granted to nobody", 3, put(grants=[]))
    yield header("grant-to-a-stranger", "granted to who never contributed", 4, _stranger)
    yield header("grant-cut", "a wrapped key is cut", 4, _cut_grant)
    yield header("admits-a-contributor", "admits who contributed", 4, put(admitted=["bob"]))
    yield header("admits-without-grant", "admits who has no grant", 3, put(admitted=["dave"]))
    yield header("commit-wrong", "another commitment", 4, put(commit=_base64(bytes(32))))
    yield header("commit-short", "a commitment of 31 bytes", 3, put(commit=_base64(bytes(31))))
    yield header("round-other", "of another round than its manifest", 3, put(round=3))
    yield header("of-another", "names another result", 4, put(of=OTHER))
    yield header("manifest-changed", "another time in its manifest", 4, _manifest(_later))
    yield header("manifest-kind", "the manifest is an upload's", 3, _manifest(put(kind="upload")))
    yield header("signature-short", "the result's signature is cut", 3, _short("result_signature"))
    yield header("signature-upper-case", "the result's signature in upper case", 3, _upper_hex)
    yield header("signature-absent", "without the result's signature", 3, drop("result_signature"))
    yield header(
        "signature-zero", "another signature of the result", 4, put(result_signature="00" * 64)
    )
    yield fault(
        "signature-of-another",
        "the result is signed by a participant; the release is signed anew",
        4,
        lambda scene: scene.header(name, _signed_by_bob(scene)),
    )
    yield manifest("own-upload-other", "alice's upload is not in it", 4, _upload_other)
    yield manifest("initial-other", "not built on what alice worked on", 4, put(initial=OTHER))
    yield manifest("result-other", "another result of a round that was opened", 4, _later)
    yield manifest("too-few", "of two contributors", 6, _two)
    yield manifest("counts-wrong", "counts a round too many", 4, _counts("bob", 2))
    yield manifest("too-many", "2^21 contributions", 7, _counts("bob", 2**21 - 2))
    yield manifest("not-the-roster", "names a stranger", 3, put(missing=["erin"]))
    for tensor in ("residues", "body"):
        yield fault(
            f"{tensor}-changed",
            f"a bit of {tensor}; signed anew",
            4,
            lambda scene, tensor=tensor: scene.number(name, tensor, 7, 1, lambda x: x ^ 1),
        )
        yield fault(
            f"{tensor}-absent",
            f"without {tensor}; signed anew",
            3,
            lambda scene, tensor=tensor: scene.tensors(name, lambda found: found.pop(tensor)),
        )
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
    yield fault("payload-cut", "the payload is a byte short; signed anew", 3, _payload_cut)
    yield fault("chunk-not-last", "the last chunk is not marked so", 4, _sealed_anew(0, False))
    yield fault("chunk-number", "the first chunk is number 1", 4, _sealed_anew(1, True))
    yield Fault(
        "release-not-granted",
        "dave opens a release that was not granted to him",
        OPEN.replace("alice", "dave"),
        5,
        _no,
    )
    yield Fault(
        "release-by-server", "the server opens a release", OPEN.replace("alice", "server"), 5, _no
    )
    yield Fault(
        "release-admitted-again",
        "admits somebody for the second time, and alice has seen the first",
        OPEN,
        4,
        lambda scene: {name: _admitted_again(scene)},
    )


def proofs() -> Iterator[Fault]:
    """What is sealed; and signed results that nobody should open."""
    name = "model-1.release"

    def sealed(title: str, about: str, code: int, edit: Callable[[Scene, bytes], bytes]) -> Fault:
        def change(scene: Scene) -> Changes:
            return {name: forging.resealed(scene, name, lambda payload: edit(scene, payload))}

        return Fault(
            f"payload-{title}", f"{about}; sealed and signed anew", VERIFY_RELEASE, code, change
        )

    def part(
        title: str, about: str, code: int, at: int, value: Callable[[Scene, int], int]
    ) -> Fault:
        """Number `at` of c', t, t' in this order."""
        return sealed(
            title,
            about,
            code,
            lambda scene, payload: _number_set(
                payload, at * scene.width, scene.width, lambda old: value(scene, old)
            ),
        )

    last = 7 * GROUPS
    yield part("c1-negated", "c'_1 of the first group is times -1", 4, 0, _negated)
    yield part("c1-added-to", "c'_1 of the first group has a block more", 4, 0, _added)
    yield part("c1-of-c2", "c'_1 of the first group is 3", 4, 0, lambda scene, old: 3)
    for title, about, at, code in (
        ("c", "c'_7 of the last group", last - 1, 3),
        ("t", "t_1", last, 4),
        ("t-prime", "t'_7", last + 13, 4),
    ):
        yield part(f"{title}-zero", f"{about} is 0", code, at, lambda scene, old: 0)
        yield part(f"{title}-square", f"{about} is N^2", code, at, lambda scene, old: scene.square)
        yield part(f"{title}-multiple-of-p", f"{about} is p", code, at, lambda scene, old: scene.p)
    yield part("t-wrong", "t_1 has a block more", 4, last, _added)
    yield part("t-prime-wrong", "t'_7 has a block more", 4, last + 13, _added)

    def z(title: str, about: str, edit: Callable[[int], int]) -> Fault:
        return sealed(
            title,
            about,
            4,
            lambda scene, payload: _number_set(payload, len(payload) - 65, 65, edit),
        )

    yield z("z-larger", "z_7 is larger by 1", lambda old: old + 1)
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
                _set_residue(found, scene.width, 0, 0, new)

            return {"sum-3.release": forging.released(scene, "sum-3.release", None, edit)}

        yield Fault(
            f"result-c0-{title}", f"a c_0 of the result {about}; a release of it", OPEN_SUM, 3, make
        )
    yield hostile("word-too-large", "a word of the body is p_2", _words(1, 5), 3, False)
    yield hostile("garbage", "the body is what nobody made", _garbage_body)
    yield hostile("error", "an error beyond 64 U", _words_plus(300))
    yield hostile("value", "a value beyond n e_max", _words_plus(3 << 28 + 21))
    yield hostile("above", "something above the slots", _words_plus(1 << 28 + 24 * 7))
    yield hostile(
        "padding",
        "a slot that is left over is not zero",
        _words_plus(1 << 28 + 24 * 6, COEFFICIENTS - 1),
    )
    yield hostile("secret", "a secret beyond 64 U, in the blocks alone", _residue_plus(0, 1, 300))
    yield hostile(
        "secret-padding",
        "the blocks hold more than the secret",
        _residue_plus(GROUPS - 1, 7, 1 << 28 * 8),
    )
    yield hostile("block", "a block out of range", _residue_plus(1, 2, 1 << 252))
    yield hostile("no-block", "a residue that does not open", _residue_times(1, 3))
    evidence = f"{OPEN_SUM} --uploads {UPLOADS}"
    unit = "one unit more than the sum of the uploads"
    yield hostile("unit", unit, _words_plus(1 << 28), 4, False, evidence)
    yield hostile(
        "unit-verified",
        unit,
        _words_plus(1 << 28),
        4,
        False,
        f"verify sum-3.release --key job/carol.key --uploads {UPLOADS}",
    )
    yield hostile(
        "unit-without-key",
        unit,
        _words_plus(1 << 28),
        4,
        False,
        f"verify sum-3.release --job job/job.json --uploads {UPLOADS}",
    )
    yield Fault(
        "evidence-missing",
        "one of the uploads is not given",
        f"{OPEN_SUM} --uploads {UPLOADS}".replace(" bob-3.upload", ""),
        4,
        _no,
    )
    yield Fault(
        "evidence-unrelated",
        "an upload of another round is given besides",
        f"{OPEN_SUM} --uploads alice-1.upload {UPLOADS}",
        4,
        _no,
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
        return Fault(f"tried-{title}", about, command, code, _ledger("carol", edit))

    yield fault("another", "another result of the round was tried", 4, _tried(3))
    yield fault(
        "another-after-failure",
        "another result was tried; --after-failure does not lift it",
        4,
        _tried(3),
        f"{OPEN_SUM} --after-failure",
    )
    yield fault("failure", "an attempt of another round has failed", 5, _tried(2**32 - 1))
    yield fault(
        "failure-after-failure",
        "the same, after --after-failure was used once",
        5,
        lambda entries: [_tried(2**31)(entries), _tried(2**32 - 1, True)(entries)],
    )


def jobs() -> Iterator[Fault]:
    def fault(title: str, about: str, code: int, edit: Edit, signer: str = "") -> Fault:
        def change(scene: Scene) -> Changes:
            return {"job/job.json": scene.document("job/job.json", edit, signer)}

        return Fault(f"job-{title}", f"{about}; signed anew", JOB, code, change)

    def h3(title: str, about: str, value: Callable[[Scene], int]) -> Fault:
        def change(scene: Scene) -> Changes:
            def edit(body: Json) -> None:
                body["h"][2] = f"{value(scene):x}"

            return {"job/job.json": scene.document("job/job.json", edit)}

        return Fault(f"job-h3-{title}", f"h_3 {about}; signed anew", JOB, 3, change)

    def a3(title: str, about: str, value: Callable[[Scene], int]) -> Fault:
        def change(scene: Scene) -> Changes:
            def edit(body: Json) -> None:
                body["A"][2] = f"{value(scene):x}"

            return {"job/job.json": scene.document("job/job.json", edit)}

        return Fault(f"job-a3-{title}", f"A_3 {about}; signed anew", JOB, 3, change)

    def gamma(title: str, about: str, value: Callable[[Scene], int]) -> Fault:
        def change(scene: Scene) -> Changes:
            edit = put(gamma=f"{value(scene):x}")
            return {"job/job.json": scene.document("job/job.json", edit)}

        return Fault(f"job-gamma-{title}", f"gamma {about}; signed anew", JOB, 3, change)

    yield h3("zero", "is 0", lambda scene: 0)
    yield h3("one", "is 1", lambda scene: 1)
    yield h3("square", "is N^2", lambda scene: scene.square)
    yield h3("multiple-of-p", "is a multiple of p", lambda scene: 2 * scene.p)
    yield a3("zero", "is 0", lambda scene: 0)
    yield a3("one", "is 1", lambda scene: 1)
    yield a3("square", "is N^2", lambda scene: scene.square)
    yield a3("multiple-of-q", "is a multiple of q", lambda scene: 2 * scene.q)
    yield gamma("zero", "is 0", lambda scene: 0)
    yield gamma("one", "is 1", lambda scene: 1)
    yield gamma("n", "is N", lambda scene: scene.p * scene.q)
    yield gamma("beyond", "is N + 4", lambda scene: scene.p * scene.q + 4)
    yield gamma("multiple-of-p", "is p", lambda scene: scene.p)
    yield gamma("no-generator", "is 1 modulo p, and so generates too little", lambda s: 1 + s.p)
    yield fault("n-even", "N is even", 3, lambda b: b.update(N=f"{int(b['N'], 16) - 1:x}"))
    yield fault("n-size", "N is 8 bits larger", 3, lambda b: b.update(N="1" + b["N"] + "1"))
    yield fault("n-leading-zero", "N with a leading zero", 3, lambda b: b.update(N="0" + b["N"]))
    yield fault("n-upper-case", "N in upper case", 3, _upper("N"))
    yield fault("h-six", "six h", 3, lambda b: b["h"].pop())
    yield fault("a-six", "six A", 3, lambda b: b["A"].pop())
    yield fault("a-eight", "eight A", 3, lambda b: b["A"].append(b["A"][0]))
    yield fault("a-missing", "without A", 3, drop("A"))
    yield fault("cipher-unknown", "a cipher that there is not", 3, put(cipher="lattices"))
    yield fault("cipher-null", "no cipher", 3, put(cipher=None))
    yield fault("cipher-missing", "without `cipher`", 3, drop("cipher"))
    yield fault("g", "g in place of gamma", 3, lambda b: b.update(g=b.pop("gamma")))
    yield fault("security", "another size than that of N", 3, put(security="128"))
    yield fault("id-upper-case", "the id in upper case", 3, put(id="A" * 32))
    yield fault("slot-bits-2", "slots of 2 bits", 3, put(slot_bits=2, fraction_bits=0))
    yield fault("slot-bits-53", "slots of 53 bits", 3, put(slot_bits=53))
    yield fault("slot-bits-too-few", "no room for four participants", 3, _tiny)
    yield fault("fraction-bits", "no bit before the binary point", 3, put(fraction_bits=23))
    yield fault("fraction-bits-negative", "negative fraction bits", 3, put(fraction_bits=-1))
    yield fault("min-contributors-1", "one contributor is enough", 3, put(min_contributors=1))
    yield fault("min-contributors-5", "more than there are", 3, put(min_contributors=5))
    yield fault("masks-number", "says 1 where it must say true", 3, put(masks=1))
    yield fault("kem", "another KEM", 3, put(kem="X25519"))
    yield fault("names-unsorted", "participants out of order", 3, _reversed("participants"))
    yield fault("name-twice", "a participant twice", 3, _participant(1, name="alice"))
    yield fault("name-taken", "a participant is called kgc", 3, _participant(3, name="kgc"))
    yield fault("name-upper-case", "an upper-case name", 3, _participant(0, name="Alice"))
    yield fault("name-path", "a path for a name", 3, _participant(0, name="../alice"))
    yield fault(
        "sign-short", "a signing key of 31 bytes", 3, _participant(0, sign=_base64(b"x" * 31))
    )
    yield fault(
        "hpke-short", "an HPKE key of 32 bytes", 3, _participant(0, hpke=_base64(bytes(32)))
    )
    yield fault("field-more", "with a field too many", 3, put(more=0))
    yield fault("format", "of another version", 3, put(format="dtl/v3"))
    yield fault("signed-by-another", "not signed by its center", 4, put(), "server")
    yield Fault(
        "job-not-signed",
        "another `min_contributors`; the signature is the old one",
        JOB,
        4,
        lambda scene: {"job/job.json": scene.plain("job/job.json", put(min_contributors=2))},
    )
    yield Fault(
        "job-not-pinned",
        "another `min_contributors`, signed by the center; the key pins the old job",
        OPEN,
        4,
        lambda scene: {"job/job.json": scene.document("job/job.json", put(min_contributors=2))},
    )


def keys() -> Iterator[Fault]:
    alice, center = "job/alice.key", "job/kgc.key"

    def fault(title: str, about: str, code: int, edit: Edit) -> Fault:
        def change(scene: Scene) -> Changes:
            return {alice: scene.plain(alice, edit)}

        return Fault(f"key-{title}", about, OPEN, code, change)

    def kgc(title: str, about: str, edit: Callable[[Scene, Json], None]) -> Fault:
        def change(scene: Scene) -> Changes:
            return {center: scene.plain(center, lambda body: edit(scene, body))}

        return Fault(f"key-kgc-{title}", about, AUDIT, 4, change)

    def boxed(title: str, about: str, code: int, edit: Edit, given: bytes = PASSPHRASE) -> Fault:
        command = f"{OPEN} --passphrase-file passphrase"

        def change(scene: Scene) -> Changes:
            body = canonical_json.loads(_box(scene), "")
            edit(body["box"])
            return {alice: canonical_json.dumps(body), "passphrase": given}

        return Fault(f"key-box-{title}", about, command, code, change)

    yield fault("job-other", "pins another job", 4, put(job=OTHER))
    yield fault("center-other", "pins another center", 4, put(kgc=_base64(bytes(32))))
    yield fault(
        "sign-other", "another signing key than in the job", 4, put(sign=_base64(bytes(32)))
    )
    yield fault("hpke-other", "another HPKE key than in the job", 4, put(hpke=_base64(bytes(96))))
    yield fault("mask-seed-missing", "without a mask seed", 4, lambda b: b["mask_seeds"].pop("bob"))
    yield fault("name-other", "the key of another participant by name", 4, put(name="bob"))
    yield fault("name-unknown", "of somebody who is not in the job", 4, put(name="erin"))
    yield fault("ledger-missing", "pins no ledger", 3, drop("ledger"))
    yield fault("field-more", "with a field too many", 3, put(more=0))
    yield fault("seed-short", "a seed of 31 bytes", 3, put(participant_seed=_base64(bytes(31))))
    yield kgc("p-wrong", "p is larger by 2", lambda s, b: b.update(p=f"{s.p + 2:x}"))
    yield kgc(
        "server-seed-wrong",
        "the server's seed is not that of h",
        lambda s, b: b.update(server_seed=_base64(bytes(32))),
    )
    yield kgc(
        "participant-seed-wrong",
        "the participants' seed is not that of h",
        lambda s, b: b.update(participant_seed=_base64(bytes(32))),
    )
    yield fault("audit-seed-missing", "without its audit seed", 3, drop("audit_seed"))
    yield fault(
        "audit-seed-short", "an audit seed of 31 bytes", 3, put(audit_seed=_base64(bytes(31)))
    )
    yield fault(
        "participant-seed-wrong",
        "the participants' seed is not that of h and A",
        4,
        put(participant_seed=_base64(bytes(32))),
    )
    yield Fault(
        "key-server-seed-wrong",
        "the server's seed is not that of A",
        SUM,
        4,
        lambda scene: {
            "job/server.key": scene.plain("job/server.key", put(server_seed=_base64(bytes(32))))
        },
    )
    for field, owner, command in (
        ("h", "alice", OPEN),
        ("A", "alice", OPEN),
        ("A", "server", SUM),
        ("h", "kgc", AUDIT),
        ("A", "kgc", AUDIT),
    ):
        yield Fault(
            f"key-{owner}-{field.lower()}-other",
            f"{field}_3 of the job is squared, the job signed anew, and the key pins it",
            command,
            4,
            _pinned_anew(owner, field),
        )
    yield boxed("passphrase", "a wrong passphrase", 5, put(), b"another one\n")
    yield boxed("changed", "the box has been changed", 4, _box_changed)
    yield boxed("more", "something more beside the three parts", 3, put(more=""))


def ledgers() -> Iterator[Fault]:
    name = "job/alice.ledger"

    def fault(title: str, about: str, make: Callable[[list[bytes]], list[bytes]]) -> Fault:
        def change(scene: Scene) -> Changes:
            return {name: b"".join(make(scene.lines("alice")))}

        return Fault(f"ledger-{title}", about, OPEN, 4, change)

    yield fault("line-removed", "a line in the middle is missing", lambda x: x[:2] + x[3:])
    yield fault("first-removed", "the first line is missing", lambda x: x[1:])
    yield fault("line-changed", "a round has been changed", _ledger_round)
    yield fault("lines-swapped", "two lines are swapped", lambda x: [x[0], x[2], x[1], *x[3:]])
    yield fault("line-twice", "the last line twice", lambda x: [*x, x[-1]])
    yield fault("line-empty", "an empty line in the middle", lambda x: [x[0], b"\n", *x[1:]])
    yield fault("line-end-two", "an empty line at the end", lambda x: [*x, b"\n"])
    yield fault("space", "a space in a line", lambda x: [*x[:-1], x[-1].replace(b":", b": ", 1)])
    yield fault("garbage", "a last line that is no JSON", lambda x: [*x, b"garbage"])
    yield fault("damaged", "a damaged last line without its line end", _damaged)
    yield fault("empty", "nothing at all", lambda x: [])
    yield fault("event-unknown", "a linked line with an unknown event", _unknown_event)
    yield fault("field-more", "a linked line with a field too many", _linked_more)
    for title, about, event, values in (
        ("tried-flag", "a tried line that says 1 for true", "tried", {"after_failure": 1}),
        ("tried-release", "a tried line whose release is no digest", "tried", {"release": None}),
        ("tried-round", "a tried line of round 0", "tried", {"round": 0}),
        ("tried-field-more", "a tried line with a field more", "tried", {"more": 0}),
        ("open-kind", "an open line of kind release", "open", {"kind": "release"}),
        ("open-content", "an open line without content", "open", {"content": None}),
        ("open-opened", "an open line without V", "open", {"opened": None}),
        (
            "open-admitted",
            "an open line that admits what is no name",
            "open",
            {"admitted": ["Bob"]},
        ),
        ("upload-opened", "an upload line whose `opened` is no digest", "upload", {"opened": ""}),
        ("reveal-close", "a reveal line whose `close` is null", "reveal", {"close": None}),
    ):
        yield fault(title, about, _line_put(event, values))
    for title, about, values in (
        ("step-source", "a step line from nowhere", {"source": "none"}),
        ("step-adopted-nobody", "a step line adopted from nobody", {"source": "adopt:"}),
        ("step-sum", "a step line without a sum", {"sum": None}),
        ("step-content", "a step line without content", {"content": None}),
    ):
        yield fault(title, about, _line_added(STEP | values))
    yield Fault(
        "ledger-of-another",
        "the ledger of another participant",
        OPEN,
        4,
        lambda scene: {name: scene.read("job/bob.ledger")},
    )
    yield Fault("ledger-missing", "there is no ledger", OPEN, 5, lambda scene: {name: None})
    yield Fault(
        "ledger-content-other",
        "says that the same result was opened with another content",
        OPEN,
        4,
        lambda scene: {name: scene.relinked("alice", _opened_other)},
    )
    yield Fault(
        "ledger-content-of-file-other",
        "says that the same result was written with another content",
        OPEN,
        4,
        _ledger("alice", _opened_put("content")),
    )
    yield Fault(
        "ledger-upload-accepted",
        "says that another upload of alice's was accepted for round 3",
        SUM,
        5,
        lambda scene: {"job/server.ledger": scene.relinked("server", _accepted_other)},
    )
    yield Fault(
        "ledger-closed",
        "says that round 3 was closed without alice",
        SUM,
        5,
        lambda scene: {"job/server.ledger": scene.relinked("server", _closed_without)},
    )
    yield Fault(
        "ledger-before-close",
        "an early copy of the ledger, which does not know the close file",
        FIRST,
        3,
        lambda scene: {"job/server.ledger": _before_close(scene.lines("server"))},
    )
    yield Fault(
        "ledger-released-other",
        "says that another result of the round was released",
        "release-model sum-3.enc --key job/server.key -o out",
        5,
        lambda scene: {"job/server.ledger": scene.relinked("server", _released_other)},
    )


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
        "changed", "not those whose digest the metadata names", 4, lambda s: _known(OTHER)
    )
    yield weights(
        "kind", "the metadata calls them gradients", 3, lambda s: _known(OTHER, "gradients")
    )
    yield weights("metadata-space", "metadata with a space", 3, lambda s: _known(OTHER) + " ")
    yield weights(
        "metadata-round", "a negative round", 3, lambda s: _known(OTHER).replace("0", "-1", 1)
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

    yield weights("content-other", "a value of the model was changed", 4, _weights_changed)
    yield weights(
        "opened-other", "the metadata says another V", 4, lambda s: _weights_put(s, opened=OTHER)
    )
    yield weights(
        "not-opened",
        "the metadata names a model that was not opened",
        5,
        lambda s: _weights_put(s, base=OTHER),
    )
    yield fault(
        "not-opened-here",
        "another participant opened the model",
        5,
        ENCRYPT.replace("model-2", "model-1").replace("job/alice", "job/dave"),
        _no,
    )
    yield fault(
        "initial-after-open",
        "initial weights, after something was opened",
        5,
        ENCRYPT.replace(model, "w0.safetensors"),
        _no,
    )
    yield fault(
        "initial-other",
        "other initial weights than before",
        5,
        ENCRYPT_FIRST,
        lambda scene: {"w0.safetensors": tensors("w1", 0.5)},
        DIRECT,
    )
    yield fault("second", "a second upload on a base", 5, AGAIN, _no)
    yield fault(
        "second-of-round",
        "a second upload of a round",
        5,
        AGAIN.replace("--round 9", "--round 2 --accept-differencing"),
        _no,
    )
    yield fault("round-past", "a round that is over", 2, ENCRYPT.replace("9", "2"), _no)
    yield fault(
        "round-missing", "no model and no round", 2, ENCRYPT_NAMED.replace("--round 9 ", ""), _no
    )

    def named(title: str, about: str, code: int, **values: object) -> Fault:
        return fault(title, about, code, ENCRYPT_NAMED, _gradients_named(**values))

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
        _gradients_named(base=OTHER),
    )
    yield fault(
        "model-and-content",
        "the gradients name another content than --model",
        3,
        ENCRYPT,
        _gradients_named(content=OTHER),
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
        _ledger("alice", _event_put("step", content=OTHER)),
    )
    yield sums(
        "second", "another step along the sum was taken", 5, OWN_STEP, _ledger("bob", _step_other)
    )
    yield sums("no-sum", "no sum was opened", 5, OWN_STEP.replace("bob", "carol"), _no)
    yield sums("round-past", "a round that is over", 2, f"{OWN_STEP} --round 1", _no)
    yield sums(
        "apply-sum-other",
        "not the sum that was opened",
        4,
        APPLY,
        _ledger("bob", _event_put("open", content=OTHER)),
    )
    yield sums(
        "apply-not-opened",
        "a sum that the owner has not opened",
        5,
        APPLY.replace("job/bob", "job/carol"),
        _no,
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
        _ledger("bob", _event_put("open", parent=OTHER)),
    )


def older() -> Iterator[Fault]:
    """Files of version 1."""

    def fault(name: str, command: str, make: Callable[[Scene], Changes]) -> Fault:
        return Fault(f"older-{name}", "a file of version 1", command, 3, make)

    v1 = put(format="dtl/v1")
    for name, file, command in (
        ("upload", A, SUM),
        ("sum", "sum-3.enc", VERIFY_SUM),
        ("model", "model-1.enc", MODEL_OUT),
        ("release", "model-1.release", OPEN),
    ):
        yield fault(name, command, lambda scene, file=file: {file: scene.header(file, v1)})
    for name, file, command in (
        ("job", "job/job.json", JOB),
        ("close", "round-2.close", REVEAL),
        ("reveal", "bob-2.reveal", MODEL_OUT),
    ):
        yield fault(name, command, lambda scene, file=file: {file: scene.document(file, v1)})
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
        lambda scene: {"alice.model-2.safetensors": _weights_put(scene, format="dtl/v1")},
    )
    yield fault("gradients", ENCRYPT, _gradients_named(format="dtl/v1"))


def all_faults() -> list[Fault]:
    groups = (
        uploads,
        bodies,
        direct,
        spellings,
        results,
        closing,
        closings,
        releases,
        proofs,
        attempts,
        jobs,
        keys,
        ledgers,
        plain,
        bases,
        older,
    )
    return [fault for group in groups for fault in group()]


# --- how they are made ------------------------------------------------------------------------


def _no(scene: Scene) -> Changes:
    """The files are good: the command is at fault."""
    return {}


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _beyond(scene: Scene, c: int) -> int:
    room = (1 << 8 * scene.width) - scene.square
    return c % room + scene.square


def _added(scene: Scene, c: int) -> int:
    return c * (1 + scene.p * scene.q) % scene.square


def _one_larger(part: str) -> Callable[[Scene], bytes]:
    return lambda scene: scene.proof(A, part, lambda number: number + 1)


def _tensor(scene: Scene, name: str, tensor: str) -> tuple[list[int], bytes]:
    return scene.bulk(name)[1][tensor]


def _swap(found: Tensors, tensor: str, width: int, one: int, other: int) -> None:
    shape, data = found[tensor]
    parts = [data[at : at + width] for at in range(0, len(data), width)]
    parts[one], parts[other] = parts[other], parts[one]
    found[tensor] = shape, b"".join(parts)


def _reshape(found: Tensors, shape: list[int]) -> None:
    found["residues"] = shape, found["residues"][1]


def _cut(found: Tensors, width: int) -> None:
    found["residues"] = [GROUPS - 1, 8, width], found["residues"][1][: -8 * width]


def _signed_as_model(scene: Scene, name: str) -> bytes:
    header, _ = scene.bulk(name)
    digest = _digest_of(scene, name)
    signature = primitives.sign(scene.secret(header["signer"]), "model", digest)
    text, data = outer(scene.read(name))
    at = text.index(b'"signature":"') + len('"signature":"')
    return joined(text[:at] + signature.hex().encode() + text[at + 128 :].rstrip(), data)


def _digest_of(scene: Scene, name: str) -> bytes:
    from dtl.core.files.container import Container

    with Container(scene.folder / name) as container:
        return container.digest()


def _upper(field: str) -> Edit:
    return lambda body: body.update({field: body[field].upper()})


def _append(field: str, text: str) -> Edit:
    return lambda body: body.update({field: body[field] + text})


def _reversed(field: str) -> Edit:
    return lambda body: body[field].reverse()


def _shape(shape: list[int]) -> Edit:
    return lambda header: header["layout"][0].update(shape=shape)


def _renamed(index: int, name: str) -> Edit:
    return lambda header: header["layout"][index].update(name=name)


def _padded(scene: Scene) -> bytes:
    text, data = outer(scene.read(A))
    return joined(text + b" " * 8, data)


def _newline(scene: Scene) -> bytes:
    text, data = outer(scene.read(A))
    return joined(text[:-1] + b"\n" if text.endswith(b" ") else text + b"\n" * 8, data)


def _deep(scene: Scene) -> bytes:
    return joined(b"[" * 10000 + b"]" * 10000, outer(scene.read(A))[1])


def _not_utf8(scene: Scene) -> bytes:
    text, data = outer(scene.read(A))
    return joined(text.rstrip().replace(b"proof", b"pr\xff\xffof", 1), data)


def _unsorted() -> tuple[str, str]:
    return '"dtype":"U8","shape":[575]', '"shape":[575],"dtype":"U8"'


def _upper_signature(scene: Scene) -> bytes:
    text, data = outer(scene.read(A))
    at = text.index(b'"signature":"') + len('"signature":"')
    return joined(text[:at] + text[at : at + 128].upper() + text[at + 128 :].rstrip(), data)


def _short_signature(scene: Scene) -> bytes:
    text, data = outer(scene.read(A))
    at = text.index(b'"signature":"') + len('"signature":"')
    return joined(text[:at] + text[at + 1 :].rstrip(), data)


def _counts(name: str, rounds: int) -> Edit:
    return lambda header: header["contributions"].update({name: rounds})


def _uncounted(header: Json) -> None:
    del header["contributions"]["alice"]


def _upload_other(header: Json) -> None:
    header["contributors"][0]["upload"] = OTHER


def _wrong_key(body: Json) -> None:
    body["keys"]["dave"] = _base64(bytes(32))


def _moved(present: list[str]) -> Edit:
    """Other participants in, and the rest missing."""

    def edit(body: Json) -> None:
        known = {entry["participant"]: entry["upload"] for entry in body["contributors"]}
        entries = [{"participant": n, "upload": known.get(n, OTHER)} for n in present]
        body.update(contributors=entries, missing=[n for n in FOUR if n not in present])

    return edit


def _about(name: str) -> Edit:
    return lambda body: body.update(keys={name: body["keys"]["dave"]})


def _edited_key(edit: Callable[[str], str]) -> Edit:
    return lambda body: body["keys"].update(dave=edit(body["keys"]["dave"]))


def _loose(text: str) -> str:
    """32 bytes leave two bits of the last digit without meaning."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return text[:-2] + digits[digits.index(text[-2]) + 1] + "="


_loose_base64 = _edited_key(_loose)
_base64_line_end = _edited_key(lambda text: text + "\n")
_base64_unpadded = _edited_key(lambda text: text.rstrip("="))


def _swap_grants(header: Json) -> None:
    one, other = header["grants"][:2]
    one["wrapped"], other["wrapped"] = other["wrapped"], one["wrapped"]


def _pop(header: Json) -> None:
    header["grants"].pop()


def _stranger(header: Json) -> None:
    header["grants"].append({"participant": "dave", "wrapped": header["grants"][0]["wrapped"]})


def _cut_grant(header: Json) -> None:
    wrapped = base64.b64decode(header["grants"][0]["wrapped"])
    header["grants"][0]["wrapped"] = _base64(wrapped[:-1])


def _manifest(edit: Edit) -> Edit:
    return lambda header: edit(header["manifest"])


def _later(manifest: Json) -> None:
    manifest["created"] = "2023-11-14T22:13:21Z"


def _two(manifest: Json) -> None:
    manifest["contributors"].pop()
    manifest["missing"].insert(0, "carol")
    del manifest["contributions"]["carol"]


def _payload_cut(scene: Scene) -> bytes:
    def edit(found: Tensors) -> None:
        (length,), data = found["sealed"]
        found["sealed"] = [length - 1], data[:-1]

    return scene.tensors("model-1.release", edit)


def _sealed_anew(index: int, last: bool) -> Callable[[Scene], bytes]:
    def make(scene: Scene) -> bytes:
        key, core, payload = forging.unsealed(scene, "model-1.release")
        data = primitives.seal_chunk(key, index, last, payload, core)
        return scene.tensors(
            "model-1.release", lambda found: found.update(sealed=([len(data)], data))
        )

    return make


def _admitted_again(scene: Scene) -> bytes:
    """Dave was admitted in round 2, which alice has opened."""

    def edit(header: Json) -> None:
        _stranger(header)
        header["admitted"] = ["dave"]

    return scene.header("model-1.release", edit)


def _tiny(body: Json) -> None:
    body.update(slot_bits=4, fraction_bits=0)


def _participant(index: int, **values: str) -> Edit:
    return lambda body: body["participants"][index].update(values)


def _box(scene: Scene) -> bytes:
    """Alice's key under the passphrase, with a published salt."""
    key = scene.loaded_key("alice")
    public = canonical_json.dumps(key.pins.plain())
    salt = bytes(range(32))
    derived, commit = primitives._box_keys(PASSPHRASE.rstrip(b"\n"), salt)
    aad = primitives.fields("dtl/v2/key", public)
    data = primitives.seal_chunk(derived, 0, True, key.secrets.encode(), aad)
    box = key_file.Box(salt=salt, commit=commit, sealed=data)
    return canonical_json.dumps(key.pins.plain() | {"box": box.plain()})


def _box_changed(box: Json) -> None:
    data = bytearray(base64.b64decode(box["sealed"]))
    data[0] ^= 1
    box["sealed"] = _base64(bytes(data))


def _unreleased(change: Callable[[Scene], Changes]) -> Callable[[Scene], Changes]:
    """The server has not released the model of round 2 yet."""
    return lambda scene: {
        "job/server.ledger": scene.cut("server", "release", round=2),
        **change(scene),
    }


def _before_close(lines: list[bytes]) -> bytes:
    closes = [number for number, line in enumerate(lines) if b'"event":"close"' in line]
    return b"".join(lines[: closes[0]])


def _ledger_round(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"round":1', b'"round":9'), *lines[2:]]


def _damaged(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1].replace(b'"round"', b'"round\0', 1).rstrip(b"\n")]


def _unknown_event(lines: list[bytes]) -> list[bytes]:
    return linked([*entries_of(lines), {"event": "closed", "round": 1}])


def _linked_more(lines: list[bytes]) -> list[bytes]:
    entries = entries_of(lines)
    entries[-1]["more"] = 0
    return linked(entries)


def _opened_other(entries: list[Json]) -> None:
    for entry in entries:
        if entry["event"] == "open" and entry["round"] == 1:
            entry["opened"] = OTHER


def _accepted_other(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "aggregate" and e["round"] == 3)
    entry["uploads"]["alice"] = OTHER


def _closed_without(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "close" and e["round"] == 2)
    (added,) = (e for e in entries if e["event"] == "aggregate" and e["round"] == 3)
    others = {name: digest for name, digest in added["uploads"].items() if name != "alice"}
    entries.append(entry | {"round": 3, "uploads": others})


def _released_other(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "release" and e["round"] == 3)
    entry["result"] = OTHER


def _known(digest: str, kind: str = "weights") -> str:
    metadata = {
        "base": digest,
        "content": None,
        "format": "dtl/v2",
        "kind": kind,
        "opened": digest,
        "round": 0,
    }
    return canonical_json.dumps(metadata).decode()


# --- bodies and blocks


def _resize(found: Tensors, more: int) -> None:
    (length,), data = found["body"]
    found["body"] = [length + more], (data + bytes(1))[: length + more]


def _with_words(body: bytes, edit: Callable[[list[list[int]]], object]) -> bytes:
    """A body of one polynomial with edited words."""
    shape = SMALL_BODY
    words = lattice.read_body(body, shape)
    edit(words[0])
    return _written(words[0])


def _written(rows: list[list[int]]) -> bytes:
    """Words as they lie in a file, whether they are below their primes or not."""
    return lattice.write_body([rows])


def _plus(number: int, coefficient: int = 0) -> Callable[[bytes], bytes]:
    """Add a number to a coefficient."""

    def edit(rows: list[list[int]]) -> None:
        for row, prime in zip(rows, PRIMES, strict=True):
            row[coefficient] = (row[coefficient] + number) % prime

    return lambda body: _with_words(body, edit)


def _word_set(prime: int, more: int) -> Callable[[bytes], bytes]:
    """The second word modulo a prime is the prime, or larger."""

    def edit(rows: list[list[int]]) -> None:
        rows[prime][1] = PRIMES[prime] + more

    return lambda body: _with_words(body, edit)


def _words(prime: int, more: int) -> Edit2:
    return lambda found: _change_body(found, _word_set(prime, more))


def _words_plus(number: int, coefficient: int = 0) -> Edit2:
    return lambda found: _change_body(found, _plus(number, coefficient))


def _change_body(found: Tensors, edit: Callable[[bytes], bytes]) -> None:
    shape, data = found["body"]
    found["body"] = shape, edit(data)


def _word_larger(found: Tensors) -> None:
    _change_body(found, _plus(1))


_plus_one = _words_plus(1 << 28)


def _garbage_body(found: Tensors) -> None:
    def edit(rows: list[list[int]]) -> None:
        for number, row in enumerate(rows):
            stream = forging.drawn(f"garbage {number}", 6 * len(row))
            row[:] = [int.from_bytes(stream[6 * c : 6 * c + 6], "little") for c in range(len(row))]

    _change_body(found, lambda body: _with_words(body, edit))


def _proven_body(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Scene], bytes]:
    return lambda scene: forging.proven(scene, name, body=edit)


def _proven_blocks(name: str, block: int, number: int) -> Callable[[Scene], bytes]:
    return lambda scene: forging.proven(scene, name, blocks=_block_plus(block, number))


def _proven_header(name: str, edit: Edit) -> Callable[[Scene], Changes]:
    return lambda scene: {name: forging.proven(scene, name, header=edit)}


def _block_plus(block: int, number: int) -> Callable[[list[int]], list[int]]:
    return lambda blocks: [m + number * (t == block) for t, m in enumerate(blocks)]


def _lifted(scene: Scene, name: str) -> int:
    """The lift of c_0 of the third group."""
    n = scene.p * scene.q
    _, data = scene.bulk(name)[1]["residues"]
    at = 16 * scene.width
    return pow(int.from_bytes(data[at : at + scene.width], "little"), n, n * n)


def _set_residue(
    found: Tensors, width: int, group: int, k: int, edit: Callable[[int], int]
) -> None:
    shape, data = found["residues"]
    at = (8 * group + k) * width
    found["residues"] = shape, _number_set(data, at, width, edit)


def _number_set(data: bytes, at: int, width: int, edit: Callable[[int], int]) -> bytes:
    new = edit(int.from_bytes(data[at : at + width], "little"))
    return data[:at] + new.to_bytes(width, "little") + data[at + width :]


def _residue_set(
    name: str, group: int, k: int, value: Callable[[Scene], int]
) -> Callable[[Scene], Changes]:
    return lambda scene: {name: scene.residue(name, group, k, lambda old: value(scene))}


def _residue_plus(group: int, j: int, number: int) -> Edit2:
    """Add to a block of a result; N is the published one."""
    return lambda found: _set_residue(found, WIDTH, group, j, lambda c: c * (1 + number * N) % N**2)


def _residue_times(group: int, j: int) -> Edit2:
    return lambda found: _set_residue(found, WIDTH, group, j, lambda c: 2 * c % N**2)


def _negated(scene: Scene, number: int) -> int:
    return scene.square - number


# --- releases, keys and ledgers


def _short(field: str) -> Edit:
    return lambda body: body.update({field: body[field][:-2]})


def _upper_hex(header: Json) -> None:
    header["result_signature"] = header["result_signature"].upper()


def _signed_by_bob(scene: Scene) -> Edit:
    def edit(header: Json) -> None:
        of = bytes.fromhex(header["of"])
        header["result_signature"] = primitives.sign(scene.secret("bob"), "model", of).hex()

    return edit


def _pinned_anew(owner: str, field: str) -> Callable[[Scene], Changes]:
    def change(scene: Scene) -> Changes:
        def edit(body: Json) -> None:
            body[field][2] = f"{pow(int(body[field][2], 16), 2, scene.square):x}"

        job = scene.document("job/job.json", edit)
        digest = signed_digest("job", canonical_json.loads(job, ""))
        key = f"job/{owner}.key"
        return {"job/job.json": job, key: scene.plain(key, put(job=digest))}

    return change


def _ledger(name: str, edit: Ledger) -> Callable[[Scene], Changes]:
    """A party's ledger with edited entries and right links."""
    return lambda scene: {f"job/{name}.ledger": scene.relinked(name, edit)}


def _tried(number: int, after_failure: bool = False) -> Ledger:
    """One more line: another release of another result was tried."""
    line = {
        "event": "tried",
        "round": number,
        "result": OTHER,
        "release": OTHER,
        "after_failure": after_failure,
    }
    return lambda entries: entries.append(dict(line))


def _gone_on(entries: list[Json]) -> None:
    """A failure, and after it an attempt that opened."""
    _tried(2**31)(entries)
    opened = next(entry for entry in entries if entry["event"] == "open")
    tried = next(e for e in entries if e["event"] == "tried" and e["result"] == opened["result"])
    entries.append(tried | {"after_failure": True})


def _tried_instead_of_reveal(entries: list[Json]) -> None:
    at = _index(entries, "reveal", 2)
    del entries[at:]
    _tried(2)(entries)


def _begun_anew(entries: list[Json]) -> None:
    at = _index(entries, "reveal", 2)
    (sent,) = (e for e in entries if e["event"] == "upload" and e["round"] == 2)
    entries[at:] = [sent | {"round": 9}]


def _index(entries: list[Json], event: str, number: int) -> int:
    return next(i for i, e in enumerate(entries) if e["event"] == event and e["round"] == number)


def _line_put(event: str, values: Json) -> Callable[[list[bytes]], list[bytes]]:
    """The last line of an event with other values."""

    def edit(lines: list[bytes]) -> list[bytes]:
        entries = entries_of(lines)
        [entry for entry in entries if entry["event"] == event][-1].update(values)
        return linked(entries)

    return edit


def _line_added(entry: Json) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: linked([*entries_of(lines), entry])


def _event_put(event: str, **values: object) -> Ledger:
    def edit(entries: list[Json]) -> None:
        for entry in entries:
            if entry["event"] == event:
                entry.update(values)

    return edit


def _opened_put(field: str) -> Ledger:
    return _event_put("open", **{field: OTHER})


def _step_other(entries: list[Json]) -> None:
    (opened,) = (entry for entry in entries if entry["event"] == "open")
    entries.append(STEP | {"sum": opened["result"], "source": "apply-sum"})


# --- plain files


def _weights_put(scene: Scene, **values: object) -> bytes:
    """The opened model with other metadata."""
    text, data = outer(scene.read("alice.model-2.safetensors"))
    entries = json.loads(text)
    metadata = json.loads(entries["__metadata__"]["dtl"]) | values
    entries["__metadata__"]["dtl"] = canonical_json.dumps(metadata).decode()
    return joined(json.dumps(entries).encode(), data)


def _weights_changed(scene: Scene) -> bytes:
    raw = scene.read("alice.model-2.safetensors")
    return raw[:-1] + bytes([raw[-1] ^ 1])


def _gradients_named(**values: object) -> Callable[[Scene], Changes]:
    """Gradients that say what they are based on: the opened model, but for these values."""

    def change(scene: Scene) -> Changes:
        text, _ = outer(scene.read("alice.model-2.safetensors"))
        known = json.loads(json.loads(text)["__metadata__"]["dtl"])
        metadata = known | {"kind": "gradients"} | values
        return {"alice.grads": tensors("alice", 0.1, text=canonical_json.dumps(metadata).decode())}

    return change
