"""Faulty uploads: residues, proofs, headers, bodies."""

from collections.abc import Callable, Iterator

from tests.vectors.command_lines import AUDIT, AUDIT_LATER, LATE, MODEL_OUT, OTHER, SUM, TAG, A, B
from tests.vectors.faults import contents, edits
from tests.vectors.faults.contents import COEFFICIENTS, GROUPS, PRIMES, Edit2
from tests.vectors.faults.fault import Fault
from tests.vectors.scene import Changes, Edit, Scene, Tensors, drop, put


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
    yield residue("beyond", "is c + N^2, which is too large", 3, contents.beyond)
    yield residue("multiple-of-p", "is a multiple of p", 3, lambda scene, c: scene.p)
    yield residue("added-to", "has 1 added to its block", 4, contents.added)
    yield fault(
        "residues-swapped",
        "c_1 and c_2 of the first group are swapped",
        4,
        lambda scene: scene.tensors(
            A, lambda found: contents.swap(found, "residues", scene.width, 1, 2)
        ),
    )
    yield fault(
        "proof-d-swapped",
        "d_1 and d_2 are swapped",
        4,
        lambda scene: scene.tensors(
            A, lambda found: contents.swap(found, "proof", scene.width, 1, 2)
        ),
    )
    for part in ("d0", "d7", "z", "v1", "v3", "v7"):
        about = f"{part[0]}_{part[1:]}" if part != "z" else "z"
        yield fault(
            f"proof-{part}-wrong",
            f"{about} of the proof is one larger",
            4,
            contents.one_larger(part),
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
            A, lambda found: found.update(proof=contents.tensor(scene, B, "proof"))
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
        lambda scene: edits.signed_as_model(scene, A),
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
    yield header("job-upper-case", "the job's digest in upper case", 3, edits.upper("job"))
    yield header("roster-other", "of another roster", 3, put(roster=OTHER))
    yield header("signer-unknown", "by somebody who is not in the roster", 3, put(signer="erin"))
    yield header("signer-server", "by the server, who is no participant", 3, put(signer="server"))
    yield header("not-masked", "says that it is not masked", 3, put(masked=False))
    yield header("masked-number", "says 1 where it must say true", 3, put(masked=1))
    yield header("format-other", "of another version", 3, put(format="dtl/v3"))
    yield header("kind-other", "is of no kind that there is", 3, put(kind="uploads"))
    yield header("created-date-only", "without a time", 3, put(created="2023-11-14"))
    yield header("created-line-end", "a line end after the time", 3, edits.append("created", "\n"))
    yield header("signer-line-end", "a line end after the name", 3, edits.append("signer", "\n"))
    yield header("field-missing", "without `masked`", 3, drop("masked"))
    yield header("field-more", "with a field too many", 3, put(more=None))
    yield header("values-wrong", "more values than the layout holds", 3, put(values=160))
    yield header("values-float-like", "values are a text", 3, put(values="159"))
    yield header("layout-shape-other", "another shape than the others'", 3, edits.shape([17, 9]), B)
    yield header("layout-shape-negative", "a negative shape", 3, edits.shape([-9, -17]))
    yield header("layout-dimensions", "33 dimensions", 3, edits.shape([1] * 31 + [9, 17]))
    yield header("layout-unsorted", "tensors out of order", 3, lambda h: h["layout"].reverse())
    yield header("layout-name-twice", "two tensors of one name", 3, edits.renamed(1, "a.weight"))
    yield header("layout-name-empty", "a tensor without a name", 3, edits.renamed(0, ""))
    yield header(
        "layout-name-control", "a control character in a name", 3, edits.renamed(0, "a\x7f")
    )
    yield header("layout-name-reserved", "a reserved name", 3, edits.renamed(0, "__dtl__"))
    yield header("layout-name-long", "a name of 1025 characters", 3, edits.renamed(0, "a" * 1025))
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
        lambda scene: scene.tensors(
            A, lambda found: contents.reshape(found, [8 * GROUPS, scene.width])
        ),
    )
    yield fault(
        "group-missing",
        "the last group is missing",
        3,
        lambda scene: scene.tensors(A, lambda found: contents.cut(found, scene.width)),
    )
    yield Fault(
        "upload-given-twice", "an upload is given twice", f"aggregate {A} {SUM[10:]}", 5, edits.no
    )
    yield Fault(
        "upload-missing",
        "one participant's upload is not given, and the round is not closed",
        f"aggregate {A} {B} carol-3.upload --key job/server.key -o out",
        6,
        edits.no,
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
    yield fault(
        "cut", "the body is a byte short", 3, edited(lambda found: contents.resize(found, -1))
    )
    yield fault(
        "longer", "the body has a byte more", 3, edited(lambda found: contents.resize(found, 1))
    )
    yield fault(
        "of-another",
        "the body is that of another participant's upload",
        4,
        lambda scene: scene.tensors(
            A, lambda found: found.update(body=contents.tensor(scene, B, "body"))
        ),
    )
    yield fault(
        "changed", "a word is larger by 1, under the old proof", 4, edited(contents.word_larger)
    )
    for prime in range(4):
        yield fault(
            f"word-{prime + 1}-too-large",
            f"a word modulo p_{prime + 1} is p_{prime + 1}; the proof is made anew",
            3,
            contents.proven_body(A, contents.word_set(prime, 0)),
        )
    yield fault(
        "word-largest",
        "a word has all its bits set; the proof is made anew",
        3,
        contents.proven_body(A, contents.word_set(0, 2**50 - 1 - PRIMES[0])),
    )

    yield Fault(
        "skipped-word-too-large",
        "the upload with the word is left out, and then somebody is missing",
        f"{SUM} --skip-invalid",
        6,
        lambda scene: {A: contents.proven_body(A, contents.word_set(0, 0))(scene)},
    )

    def result(name: str, about: str, command: str, code: int, edit: Edit2) -> Fault:
        def change(scene: Scene) -> Changes:
            return {"model-1.enc": scene.tensors("model-1.enc", edit)}

        return Fault(f"model-body-{name}", about, command, code, change)

    again = MODEL_OUT
    yield result("word-too-large", "a word of the model is p_1", again, 3, contents.words(0, 0))
    yield result("missing", "a model without a body", again, 3, lambda found: found.pop("body"))
    yield result(
        "cut", "the body of a model is cut", again, 3, lambda found: contents.resize(found, -1)
    )

    def audited(name: str, about: str, make: Callable[[Scene], bytes]) -> Fault:
        return Fault(f"audit-{name}", about, AUDIT, 4, lambda scene: {A: make(scene)})

    yield audited(
        "body-error",
        "an error beyond 64; the proof is made anew",
        contents.proven_body(A, contents.plus(1000)),
    )
    yield audited(
        "body-value",
        "a value beyond e_max; the proof is made anew",
        contents.proven_body(A, contents.plus(1 << 28 + 21)),
    )
    yield audited(
        "body-padding",
        "a slot that is left over is not zero; the proof is made anew",
        contents.proven_body(A, contents.plus(1 << 28 + 24 * 6, COEFFICIENTS - 1)),
    )
    yield audited(
        "secret", "a secret beyond 64; the proof is made anew", contents.proven_blocks(A, 0, 1000)
    )
    yield audited(
        "secret-padding",
        "the blocks hold more than the secret; the proof is made anew",
        contents.proven_blocks(A, 7 * GROUPS - 1, 1 << 28 * 8),
    )
    yield audited(
        "block",
        "a block out of range; the proof is made anew",
        contents.proven_blocks(A, 3, 1 << 252),
    )
    yield Fault(
        "audit-malformed",
        "a residue is multiplied by c_0's lift: a block of no meaning; signed anew",
        AUDIT,
        4,
        lambda scene: {
            A: scene.residue(A, 2, 3, lambda c: c * contents.lifted(scene, A) % scene.square)
        },
    )
    for name, about, edit in (
        ("tag", "another opened tag; the proof is made anew", put(opened_tag=TAG)),
        ("round", "for another round: other masks; the proof is made anew", put(round=4)),
    ):
        yield Fault(f"audit-{name}", about, AUDIT_LATER, 4, contents.proven_header(LATE, edit))
