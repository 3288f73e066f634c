"""Every faulty vector: what is wrong, with which command, and the exit code it must cause."""

import base64
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dtl.core.crypto import primitives
from dtl.core.files import canonical_json, key_file, ledger, sealed
from dtl.core.files.headers import ReleaseHeader
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key
from tests.vectors.scenarios import FOUR, PASSPHRASE, PRESENT, SPECS, tensors
from tests.vectors.scene import Changes, Edit, Json, Scene, Tensors, drop, joined, outer, put

UPLOADS = " ".join(f"{name}-1.upload" for name in FOUR)
SUM = f"aggregate {UPLOADS} --key job/server.key -o out"
LATER = " ".join(f"{name}-3.upload" for name in PRESENT)
REVEALS = " ".join(f"{name}-3.reveal" for name in PRESENT)
MODEL = f"aggregate {LATER} --key job/server.key --model model-2.enc --close round-3.close"
MODEL_OUT = f"{MODEL} --reveals {REVEALS} -o out"
VERIFY = (
    f"verify model-3.enc --job job/job.json --model model-2.enc --uploads {LATER} "
    f"--reveals {REVEALS}"
)
VERIFY_SUM = f"verify sum-1.enc --job job/job.json --uploads {UPLOADS}"
FIRST = MODEL_OUT.replace("-3.", "-2.").replace("--model model-2.enc", "--initial w0.safetensors")
REVEAL = "reveal-masks round-3.close --key job/alice.key -o out"
OPEN = "open-model model-2.release --key job/alice.key -o out.safetensors"
JOB = "verify job/job.json"
ENCRYPT = (
    "encrypt-grads alice.grads --key job/alice.key --model w0.safetensors --round 9 "
    "--accept-differencing -o out"
)
AUDIT = "audit alice-1.upload --key job/kgc.key"
A, B = "alice-1.upload", "bob-1.upload"
OTHER = "5a" * 64


@dataclass(frozen=True)
class Fault:
    """A faulty vector: its name, what it is, the command, the exit code, and how it is made."""

    name: str
    about: str
    command: str
    code: int
    change: Callable[[Scene], Changes]


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
        lambda scene: scene.proof(A, "z", lambda number: number | 1 << 514),
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
        "another participant's residues and proof under the own name and signature",
        4,
        lambda scene: scene.tensors(A, lambda found: found.update(scene.bulk(B)[1])),
    )
    yield fault(
        "round-not-signed",
        "the header says one round more; the signature is that of the old header",
        4,
        lambda scene: scene.container(A, '\\"round\\":1', '\\"round\\":2'),
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
    yield header("round-other", "made for the next round", 3, put(round=2), B)
    yield header("round-zero", "for round 0", 3, put(round=0))
    yield header("round-too-large", "for round 2^32", 3, put(round=2**32))
    yield header("round-text", "the round is a text", 3, put(round="1"))
    yield header("base-other", "based on another model", 3, put(base=OTHER), B)
    yield header("base-short", "the base is no digest", 3, put(base="5a" * 63))
    yield header("job-other", "of another job", 3, put(job=OTHER))
    yield header("job-upper-case", "the job's digest in upper case", 3, _upper("job"))
    yield header("roster-other", "of another roster", 3, put(roster=OTHER))
    yield header("signer-unknown", "by somebody who is not in the roster", 3, put(signer="erin"))
    yield header("signer-server", "by the server, who is no participant", 3, put(signer="server"))
    yield header("not-masked", "says that it is not masked", 3, put(masked=False))
    yield header("masked-number", "says 1 where it must say true", 3, put(masked=1))
    yield header("format-other", "of another version", 3, put(format="dtl/v2"))
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
        "with a third tensor",
        3,
        lambda scene: scene.tensors(A, lambda found: found.update(more=([1], b"\0"))),
    )
    yield fault(
        "residues-flat",
        "the residues are of another shape",
        3,
        lambda scene: scene.tensors(A, lambda found: _reshape(found, [16, scene.width])),
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
        f"aggregate {A} {B} carol-1.upload --key job/server.key -o out",
        6,
        _no,
    )
    yield fault(
        "layout-field-more",
        "a field more in a tensor of the layout; signed anew",
        3,
        lambda scene: scene.header(A, lambda h: h["layout"][0].update(more=0)),
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
    yield text("overlap", "two tensors overlap", '"data_offsets":[1537,', '"data_offsets":[1536,')
    yield text("gap", "a gap between two tensors", '"data_offsets":[1537,', '"data_offsets":[1538,')
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

    yield header("key-twice", "a key twice", '"round":1', '"round":1,"round":1')
    yield header("key-twice-other", "a key twice, not the same", '"round":1', '"round":2,"round":1')
    yield header("space", "a space", '"round":1', '"round": 1')
    yield header("line-end", "a line end at its end", '"values":159}', '"values":159}\n')
    yield header("float", "a float", '"round":1', '"round":1.0')
    yield header("exponent", "an exponent", '"round":1', '"round":1e0')
    yield header("nan", "NaN", '"round":1', '"round":NaN')
    yield header("minus-zero", "-0", '"round":1', '"round":-0')
    yield header("long-number", "a number of 5,000 digits", '"round":1', '"round":' + "1" * 5000)
    yield header("surrogate", "half a surrogate pair", '"b"', '"\\ud800"')
    yield header("escaped", "a letter escaped without need", '"b"', '"\\u0062"')
    yield header("slash", "an escaped slash", '"dtl/v2"', '"dtl\\/v1"')
    yield header("true", "true for 1", '"round":1', '"round":true')
    yield header("null", "null for a text", '"kind":"upload"', '"kind":null')
    yield header("look-alike", "a Cyrillic letter in a name", '"alice"', '"аlice"')


def results() -> Iterator[Fault]:
    name = "model-3.enc"

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
        "a residue of the model is c_0 times -1: it opens the same, and is not the product",
        4,
        lambda scene: scene.residue(name, 0, 0, lambda c: scene.square - c),
    )
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
        lambda scene: {"sum-1.enc": scene.header("sum-1.enc", put(initial=OTHER))},
    )
    yield Fault(
        "sum-as-model",
        "a sum is given where a model goes on",
        f"aggregate {LATER} --key job/server.key --model sum-1.enc --close round-3.close "
        f"--reveals {REVEALS} -o out",
        3,
        _no,
    )
    yield Fault(
        "model-of-another-round",
        "the model that goes on is of the same round as the uploads",
        MODEL_OUT.replace("model-2.enc", "model-3.enc"),
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
        VERIFY.replace(" carol-3.reveal", ""),
        4,
        _no,
    )
    yield Fault(
        "verify-reveal-wrong",
        "a reveal with another key; signed anew",
        VERIFY,
        4,
        lambda scene: {"bob-3.reveal": scene.document("bob-3.reveal", _wrong_key)},
    )
    yield Fault(
        "verify-upload-missing",
        "one of the uploads is not given",
        VERIFY.replace(" carol-3.upload", ""),
        4,
        _no,
    )


def closing() -> Iterator[Fault]:
    close, reveal = "round-3.close", "bob-3.reveal"

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
        "the close file of round 2 for the uploads of round 3",
        MODEL_OUT.replace("round-3.close", "round-2.close"),
        3,
        _no,
    )
    yield Fault(
        "close-upload-more",
        "an upload of the close file is not given",
        MODEL_OUT.replace(" carol-3.upload", ""),
        6,
        _no,
    )

    def revealed(title: str, about: str, code: int, make: Callable[[Scene], bytes]) -> Fault:
        return Fault(f"reveal-{title}", about, MODEL_OUT, code, lambda scene: {reveal: make(scene)})

    def edited(title: str, about: str, code: int, edit: Edit, signer: str = "") -> Fault:
        return revealed(
            title, f"{about}; signed anew", code, lambda s: s.document(reveal, edit, signer)
        )

    yield revealed(
        "of-another-round",
        "the reveal of round 2",
        3,
        lambda scene: scene.read("bob-2.reveal"),
    )
    yield revealed("twice", "alice's reveal twice", 3, lambda s: s.read("alice-3.reveal"))
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
        MODEL_OUT.replace(" bob-3.reveal", ""),
        6,
        _no,
    )


def releases() -> Iterator[Fault]:
    name = "model-2.release"

    def fault(title: str, about: str, code: int, make: Callable[[Scene], bytes]) -> Fault:
        return Fault(f"release-{title}", about, OPEN, code, lambda scene: {name: make(scene)})

    def header(title: str, about: str, code: int, edit: Edit) -> Fault:
        return fault(title, f"{about}; signed anew", code, lambda scene: scene.header(name, edit))

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
    yield header("of-another", "of another result than was opened", 4, put(of=OTHER))
    yield header("own-upload-other", "alice's upload is not in it", 4, _manifest(_upload_other))
    yield header(
        "initial-other", "not built on what alice worked on", 4, _manifest(put(initial=OTHER))
    )
    yield header("manifest-changed", "another time in its manifest", 4, _manifest(_later))
    yield header("too-few", "of two contributors", 6, _manifest(_two))
    yield header("counts-wrong", "counts a round too many", 4, _manifest(_counts("bob", 2)))
    yield header("manifest-kind", "the manifest is an upload's", 3, _manifest(put(kind="upload")))
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

    def g(title: str, about: str, value: Callable[[Scene], int]) -> Fault:
        def change(scene: Scene) -> Changes:
            edit = put(g=f"{value(scene):x}")
            return {"job/job.json": scene.document("job/job.json", edit)}

        return Fault(f"job-g-{title}", f"g {about}; signed anew", JOB, 3, change)

    yield h3("zero", "is 0", lambda scene: 0)
    yield h3("one", "is 1", lambda scene: 1)
    yield h3("square", "is N^2", lambda scene: scene.square)
    yield h3("multiple-of-p", "is a multiple of p", lambda scene: 2 * scene.p)
    yield g("one", "is 1", lambda scene: 1)
    yield g("no-generator", "is 1 modulo p, and so generates too little", lambda s: 1 + s.p)
    yield fault("n-even", "N is even", 3, lambda b: b.update(N=f"{int(b['N'], 16) - 1:x}"))
    yield fault("n-size", "N is 8 bits larger", 3, lambda b: b.update(N="1" + b["N"] + "1"))
    yield fault("n-leading-zero", "N with a leading zero", 3, lambda b: b.update(N="0" + b["N"]))
    yield fault("n-upper-case", "N in upper case", 3, _upper("N"))
    yield fault("h-six", "six h", 3, lambda b: b["h"].pop())
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
    yield fault("format", "of another version", 3, put(format="dtl/v2"))
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
        lambda scene: {name: _relinked(scene, "alice", _opened_other)},
    )
    yield Fault(
        "ledger-upload-accepted",
        "says that another upload of alice's was accepted for round 1",
        SUM,
        5,
        lambda scene: {"job/server.ledger": _relinked(scene, "server", _accepted_other)},
    )
    yield Fault(
        "ledger-closed",
        "says that round 1 was closed without alice",
        SUM,
        5,
        lambda scene: {"job/server.ledger": _relinked(scene, "server", _closed_without)},
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
        "release-model sum-1.enc --key job/server.key -o out",
        5,
        lambda scene: {"job/server.ledger": _relinked(scene, "server", _released_other)},
    )


def plain() -> Iterator[Fault]:
    def weights(title: str, about: str, code: int, text: Callable[[Scene], str]) -> Fault:
        def change(scene: Scene) -> Changes:
            return {"w0.safetensors": tensors("w0", 0.5, text=text(scene))}

        return Fault(f"weights-{title}", about, ENCRYPT, code, change)

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
        ENCRYPT,
        3,
        lambda scene: {"w0.safetensors": tensors("w0", 0.5, SPECS[:2])},
    )
    yield Fault(
        "weights-headroom",
        "initial weights beyond what slot_bits allow",
        FIRST,
        7,
        lambda scene: {"w0.safetensors": tensors("w0", 5.0)},
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


def all_faults() -> list[Fault]:
    groups = (uploads, spellings, results, closing, releases, jobs, keys, ledgers, plain)
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
    found["residues"] = [1, 8, width], found["residues"][1][: 8 * width]


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
    return '"dtype":"U8","shape":[1537]', '"shape":[1537],"dtype":"U8"'


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

    return scene.tensors("model-2.release", edit)


def _unsealed(scene: Scene, name: str) -> tuple[bytes, bytes, bytes]:
    """(encryption key, core, payload) of a release."""
    raw, found = scene.bulk(name)
    header = ReleaseHeader.check(raw, name)
    key = Key.load(scene.folder / "job/alice.key", scene.folder / "job/job.json", bytes)
    shape = Job.load(scene.folder / "job/job.json").residue_shape(header.manifest.values)
    core = sealed.release_core(header.manifest, header.names, shape, header.commit)
    own = primitives.hpke_public_key(base64.b64decode(scene.key("alice")["hpke"]))
    info = sealed.grant_info(core, "alice", own, key.job.server.sign)
    secret = base64.b64decode(scene.key("alice")["hpke"])
    content_key = primitives.hpke_unwrap(secret, header.grants[0].wrapped, info)
    encryption_key, _ = sealed.content_keys(content_key)
    return (
        encryption_key,
        core,
        primitives.open_chunk(encryption_key, 0, True, found["sealed"][1], core),
    )


def _sealed_anew(index: int, last: bool) -> Callable[[Scene], bytes]:
    def make(scene: Scene) -> bytes:
        key, core, payload = _unsealed(scene, "model-2.release")
        data = primitives.seal_chunk(key, index, last, payload, core)
        return scene.tensors(
            "model-2.release", lambda found: found.update(sealed=([len(data)], data))
        )

    return make


def _admitted_again(scene: Scene) -> bytes:
    """Dave was admitted in round 3, which alice has opened."""

    def edit(header: Json) -> None:
        _stranger(header)
        header["admitted"] = ["dave"]

    return scene.header("model-2.release", edit)


def _tiny(body: Json) -> None:
    body.update(slot_bits=4, fraction_bits=0)


def _participant(index: int, **values: str) -> Edit:
    return lambda body: body["participants"][index].update(values)


def _box(scene: Scene) -> bytes:
    """Alice's key under the passphrase, with a published salt."""
    key = Key.load(scene.folder / "job/alice.key", scene.folder / "job/job.json", bytes)
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


def _entries(lines: list[bytes]) -> list[Json]:
    found = [canonical_json.loads(line.rstrip(b"\n"), "") for line in lines]
    for entry in found:
        del entry["link"]
    return found


def _linked(entries: list[Json]) -> list[bytes]:
    lines, link = [], ""
    for entry in entries:
        lines.append(ledger._line(entry, link))
        link = ledger._link(entry, link)
    return lines


def _relinked(scene: Scene, name: str, edit: Callable[[list[Json]], object]) -> bytes:
    """A ledger with edited entries and right links."""
    entries = _entries(scene.lines(name))
    edit(entries)
    return b"".join(_linked(entries))


def _before_close(lines: list[bytes]) -> bytes:
    closes = [number for number, line in enumerate(lines) if b'"event":"close"' in line]
    return b"".join(lines[: closes[0]])


def _ledger_round(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"round":1', b'"round":9'), *lines[2:]]


def _damaged(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1].replace(b'"round"', b'"round\0', 1).rstrip(b"\n")]


def _unknown_event(lines: list[bytes]) -> list[bytes]:
    return _linked([*_entries(lines), {"event": "closed", "round": 1}])


def _linked_more(lines: list[bytes]) -> list[bytes]:
    entries = _entries(lines)
    entries[-1]["more"] = 0
    return _linked(entries)


def _opened_other(entries: list[Json]) -> None:
    for entry in entries:
        if entry["event"] == "open" and entry["round"] == 2:
            entry["opened"] = OTHER


def _accepted_other(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "aggregate" and e["round"] == 1)
    entry["uploads"]["alice"] = OTHER


def _closed_without(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "close" and e["round"] == 2)
    (added,) = (e for e in entries if e["event"] == "aggregate" and e["round"] == 1)
    others = {name: digest for name, digest in added["uploads"].items() if name != "alice"}
    entries.append(entry | {"round": 1, "uploads": others})


def _released_other(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "release" and e["round"] == 1)
    entry["result"] = OTHER


def _known(digest: str, kind: str = "weights") -> str:
    metadata = {"base": digest, "format": "dtl/v2", "kind": kind, "opened": digest, "round": 0}
    return canonical_json.dumps(metadata).decode()
