"""Faulty job files, key files and ledgers."""

from collections.abc import Callable, Iterator

from dtl.core.files import canonical_json
from tests.vectors.command_lines import AUDIT, FIRST, JOB, OPEN, OTHER, SUM
from tests.vectors.faults import edits, ledger_edits
from tests.vectors.faults.fault import Fault
from tests.vectors.faults.ledger_edits import STEP
from tests.vectors.scenarios import PASSPHRASE
from tests.vectors.scene import Changes, Edit, Json, Scene, drop, put


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
    yield fault("n-upper-case", "N in upper case", 3, edits.upper("N"))
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
    yield fault("slot-bits-too-few", "no room for four participants", 3, edits.tiny)
    yield fault("fraction-bits", "no bit before the binary point", 3, put(fraction_bits=23))
    yield fault("fraction-bits-negative", "negative fraction bits", 3, put(fraction_bits=-1))
    yield fault("min-contributors-1", "one contributor is enough", 3, put(min_contributors=1))
    yield fault("min-contributors-5", "more than there are", 3, put(min_contributors=5))
    yield fault("masks-number", "says 1 where it must say true", 3, put(masks=1))
    yield fault("kem", "another KEM", 3, put(kem="X25519"))
    yield fault("names-unsorted", "participants out of order", 3, edits.reversed("participants"))
    yield fault("name-twice", "a participant twice", 3, edits.participant(1, name="alice"))
    yield fault("name-taken", "a participant is called kgc", 3, edits.participant(3, name="kgc"))
    yield fault("name-upper-case", "an upper-case name", 3, edits.participant(0, name="Alice"))
    yield fault("name-path", "a path for a name", 3, edits.participant(0, name="../alice"))
    yield fault(
        "sign-short",
        "a signing key of 31 bytes",
        3,
        edits.participant(0, sign=edits.encoded(b"x" * 31)),
    )
    yield fault(
        "hpke-short",
        "an HPKE key of 32 bytes",
        3,
        edits.participant(0, hpke=edits.encoded(bytes(32))),
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
            body = canonical_json.loads(edits.box(scene), "")
            edit(body["box"])
            return {alice: canonical_json.dumps(body), "passphrase": given}

        return Fault(f"key-box-{title}", about, command, code, change)

    yield fault("job-other", "pins another job", 4, put(job=OTHER))
    yield fault("center-other", "pins another center", 4, put(kgc=edits.encoded(bytes(32))))
    yield fault(
        "sign-other", "another signing key than in the job", 4, put(sign=edits.encoded(bytes(32)))
    )
    yield fault(
        "hpke-other", "another HPKE key than in the job", 4, put(hpke=edits.encoded(bytes(96)))
    )
    yield fault("mask-seed-missing", "without a mask seed", 4, lambda b: b["mask_seeds"].pop("bob"))
    yield fault("name-other", "the key of another participant by name", 4, put(name="bob"))
    yield fault("name-unknown", "of somebody who is not in the job", 4, put(name="erin"))
    yield fault("ledger-missing", "pins no ledger", 3, drop("ledger"))
    yield fault("field-more", "with a field too many", 3, put(more=0))
    yield fault(
        "seed-short", "a seed of 31 bytes", 3, put(participant_seed=edits.encoded(bytes(31)))
    )
    yield kgc("p-wrong", "p is larger by 2", lambda s, b: b.update(p=f"{s.p + 2:x}"))
    yield kgc(
        "server-seed-wrong",
        "the server's seed is not that of h",
        lambda s, b: b.update(server_seed=edits.encoded(bytes(32))),
    )
    yield kgc(
        "participant-seed-wrong",
        "the participants' seed is not that of h",
        lambda s, b: b.update(participant_seed=edits.encoded(bytes(32))),
    )
    yield fault("audit-seed-missing", "without its audit seed", 3, drop("audit_seed"))
    yield fault(
        "audit-seed-short", "an audit seed of 31 bytes", 3, put(audit_seed=edits.encoded(bytes(31)))
    )
    yield fault(
        "participant-seed-wrong",
        "the participants' seed is not that of h and A",
        4,
        put(participant_seed=edits.encoded(bytes(32))),
    )
    yield Fault(
        "key-server-seed-wrong",
        "the server's seed is not that of A",
        SUM,
        4,
        lambda scene: {
            "job/server.key": scene.plain(
                "job/server.key", put(server_seed=edits.encoded(bytes(32)))
            )
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
            edits.pinned_anew(owner, field),
        )
    yield boxed("passphrase", "a wrong passphrase", 5, put(), b"another one\n")
    yield boxed("changed", "the box has been changed", 4, edits.box_changed)
    yield boxed("more", "something more beside the three parts", 3, put(more=""))


def ledgers() -> Iterator[Fault]:
    name = "job/alice.ledger"

    def fault(title: str, about: str, make: Callable[[list[bytes]], list[bytes]]) -> Fault:
        def change(scene: Scene) -> Changes:
            return {name: b"".join(make(scene.lines("alice")))}

        return Fault(f"ledger-{title}", about, OPEN, 4, change)

    yield fault("line-removed", "a line in the middle is missing", lambda x: x[:2] + x[3:])
    yield fault("first-removed", "the first line is missing", lambda x: x[1:])
    yield fault("line-changed", "a round has been changed", ledger_edits.ledger_round)
    yield fault("lines-swapped", "two lines are swapped", lambda x: [x[0], x[2], x[1], *x[3:]])
    yield fault("line-twice", "the last line twice", lambda x: [*x, x[-1]])
    yield fault("line-empty", "an empty line in the middle", lambda x: [x[0], b"\n", *x[1:]])
    yield fault("line-end-two", "an empty line at the end", lambda x: [*x, b"\n"])
    yield fault("space", "a space in a line", lambda x: [*x[:-1], x[-1].replace(b":", b": ", 1)])
    yield fault("garbage", "a last line that is no JSON", lambda x: [*x, b"garbage"])
    yield fault("damaged", "a damaged last line without its line end", ledger_edits.damaged)
    yield fault("empty", "nothing at all", lambda x: [])
    yield fault("event-unknown", "a linked line with an unknown event", ledger_edits.unknown_event)
    yield fault("field-more", "a linked line with a field too many", ledger_edits.linked_more)
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
        yield fault(title, about, ledger_edits.line_put(event, values))
    for title, about, values in (
        ("step-source", "a step line from nowhere", {"source": "none"}),
        ("step-adopted-nobody", "a step line adopted from nobody", {"source": "adopt:"}),
        ("step-sum", "a step line without a sum", {"sum": None}),
        ("step-content", "a step line without content", {"content": None}),
    ):
        yield fault(title, about, ledger_edits.line_added(STEP | values))
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
        lambda scene: {name: scene.relinked("alice", ledger_edits.opened_other)},
    )
    yield Fault(
        "ledger-content-of-file-other",
        "says that the same result was written with another content",
        OPEN,
        4,
        ledger_edits.ledger("alice", ledger_edits.opened_put("content")),
    )
    yield Fault(
        "ledger-upload-accepted",
        "says that another upload of alice's was accepted for round 3",
        SUM,
        5,
        lambda scene: {"job/server.ledger": scene.relinked("server", ledger_edits.accepted_other)},
    )
    yield Fault(
        "ledger-closed",
        "says that round 3 was closed without alice",
        SUM,
        5,
        lambda scene: {"job/server.ledger": scene.relinked("server", ledger_edits.closed_without)},
    )
    yield Fault(
        "ledger-before-close",
        "an early copy of the ledger, which does not know the close file",
        FIRST,
        3,
        lambda scene: {"job/server.ledger": ledger_edits.before_close(scene.lines("server"))},
    )
    yield Fault(
        "ledger-released-other",
        "says that another result of the round was released",
        "release-model sum-3.enc --key job/server.key -o out",
        5,
        lambda scene: {"job/server.ledger": scene.relinked("server", ledger_edits.released_other)},
    )
