"""How good files become faulty ones."""

import base64
import json
import math
from collections.abc import Callable

from dtl.core.crypto import primitives
from dtl.core.files import canonical_json, key_file
from dtl.core.files.job_file import signed_digest
from tests import helpers
from tests.second import lattice
from tests.vectors import forging
from tests.vectors.command_lines import OTHER, A
from tests.vectors.scenarios import FOUR, PASSPHRASE, tensors
from tests.vectors.scene import (
    Changes,
    Edit,
    Json,
    Scene,
    Tensors,
    entries_of,
    joined,
    linked,
    outer,
    put,
)

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


def no(scene: Scene) -> Changes:
    """The files are good: the command is at fault."""
    return {}


def encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def beyond(scene: Scene, c: int) -> int:
    room = (1 << 8 * scene.width) - scene.square
    return c % room + scene.square


def added(scene: Scene, c: int) -> int:
    return c * (1 + scene.p * scene.q) % scene.square


def one_larger(part: str) -> Callable[[Scene], bytes]:
    return lambda scene: scene.proof(A, part, lambda number: number + 1)


def tensor(scene: Scene, name: str, tensor: str) -> tuple[list[int], bytes]:
    return scene.bulk(name)[1][tensor]


def swap(found: Tensors, tensor: str, width: int, one: int, other: int) -> None:
    shape, data = found[tensor]
    parts = [data[at : at + width] for at in range(0, len(data), width)]
    parts[one], parts[other] = parts[other], parts[one]
    found[tensor] = shape, b"".join(parts)


def reshape(found: Tensors, shape: list[int]) -> None:
    found["residues"] = shape, found["residues"][1]


def cut(found: Tensors, width: int) -> None:
    found["residues"] = [GROUPS - 1, 8, width], found["residues"][1][: -8 * width]


def signed_as_model(scene: Scene, name: str) -> bytes:
    header, _ = scene.bulk(name)
    digest = digest_of(scene, name)
    signature = primitives.sign(scene.secret(header["signer"]), "model", digest)
    text, data = outer(scene.read(name))
    at = text.index(b'"signature":"') + len('"signature":"')
    return joined(text[:at] + signature.hex().encode() + text[at + 128 :].rstrip(), data)


def digest_of(scene: Scene, name: str) -> bytes:
    from dtl.core.files.container import Container

    with Container(scene.folder / name) as container:
        return container.digest()


def upper(field: str) -> Edit:
    return lambda body: body.update({field: body[field].upper()})


def append(field: str, text: str) -> Edit:
    return lambda body: body.update({field: body[field] + text})


def reversed(field: str) -> Edit:
    return lambda body: body[field].reverse()


def shape(shape: list[int]) -> Edit:
    return lambda header: header["layout"][0].update(shape=shape)


def renamed(index: int, name: str) -> Edit:
    return lambda header: header["layout"][index].update(name=name)


def padded(scene: Scene) -> bytes:
    text, data = outer(scene.read(A))
    return joined(text + b" " * 8, data)


def newline(scene: Scene) -> bytes:
    text, data = outer(scene.read(A))
    return joined(text[:-1] + b"\n" if text.endswith(b" ") else text + b"\n" * 8, data)


def deep(scene: Scene) -> bytes:
    return joined(b"[" * 10000 + b"]" * 10000, outer(scene.read(A))[1])


def not_utf8(scene: Scene) -> bytes:
    text, data = outer(scene.read(A))
    return joined(text.rstrip().replace(b"proof", b"pr\xff\xffof", 1), data)


def unsorted() -> tuple[str, str]:
    return '"dtype":"U8","shape":[575]', '"shape":[575],"dtype":"U8"'


def upper_signature(scene: Scene) -> bytes:
    text, data = outer(scene.read(A))
    at = text.index(b'"signature":"') + len('"signature":"')
    return joined(text[:at] + text[at : at + 128].upper() + text[at + 128 :].rstrip(), data)


def short_signature(scene: Scene) -> bytes:
    text, data = outer(scene.read(A))
    at = text.index(b'"signature":"') + len('"signature":"')
    return joined(text[:at] + text[at + 1 :].rstrip(), data)


def counts(name: str, rounds: int) -> Edit:
    return lambda header: header["contributions"].update({name: rounds})


def uncounted(header: Json) -> None:
    del header["contributions"]["alice"]


def upload_other(header: Json) -> None:
    header["contributors"][0]["upload"] = OTHER


def wrong_key(body: Json) -> None:
    body["keys"]["dave"] = encoded(bytes(32))


def moved(present: list[str]) -> Edit:
    """Other participants in, and the rest missing."""

    def edit(body: Json) -> None:
        known = {entry["participant"]: entry["upload"] for entry in body["contributors"]}
        entries = [{"participant": n, "upload": known.get(n, OTHER)} for n in present]
        body.update(contributors=entries, missing=[n for n in FOUR if n not in present])

    return edit


def about(name: str) -> Edit:
    return lambda body: body.update(keys={name: body["keys"]["dave"]})


def edited_key(edit: Callable[[str], str]) -> Edit:
    return lambda body: body["keys"].update(dave=edit(body["keys"]["dave"]))


def loose(text: str) -> str:
    """32 bytes leave two bits of the last digit without meaning."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return text[:-2] + digits[digits.index(text[-2]) + 1] + "="


loose_base64 = edited_key(loose)


base64_line_end = edited_key(lambda text: text + "\n")


base64_unpadded = edited_key(lambda text: text.rstrip("="))


def swap_grants(header: Json) -> None:
    one, other = header["grants"][:2]
    one["wrapped"], other["wrapped"] = other["wrapped"], one["wrapped"]


def pop(header: Json) -> None:
    header["grants"].pop()


def stranger(header: Json) -> None:
    header["grants"].append({"participant": "dave", "wrapped": header["grants"][0]["wrapped"]})


def cut_grant(header: Json) -> None:
    wrapped = base64.b64decode(header["grants"][0]["wrapped"])
    header["grants"][0]["wrapped"] = encoded(wrapped[:-1])


def manifest(edit: Edit) -> Edit:
    return lambda header: edit(header["manifest"])


def later(manifest: Json) -> None:
    manifest["created"] = "2023-11-14T22:13:21Z"


def two(manifest: Json) -> None:
    manifest["contributors"].pop()
    manifest["missing"].insert(0, "carol")
    del manifest["contributions"]["carol"]


def payload_cut(scene: Scene) -> bytes:
    def edit(found: Tensors) -> None:
        (length,), data = found["sealed"]
        found["sealed"] = [length - 1], data[:-1]

    return scene.tensors("model-1.release", edit)


def sealed_anew(index: int, last: bool) -> Callable[[Scene], bytes]:
    def make(scene: Scene) -> bytes:
        key, core, payload = forging.unsealed(scene, "model-1.release")
        data = primitives.seal_chunk(key, index, last, payload, core)
        return scene.tensors(
            "model-1.release", lambda found: found.update(sealed=([len(data)], data))
        )

    return make


def admitted_again(scene: Scene) -> bytes:
    """Dave was admitted in round 2, which alice has opened."""

    def edit(header: Json) -> None:
        stranger(header)
        header["admitted"] = ["dave"]

    return scene.header("model-1.release", edit)


def tiny(body: Json) -> None:
    body.update(slot_bits=4, fraction_bits=0)


def participant(index: int, **values: str) -> Edit:
    return lambda body: body["participants"][index].update(values)


def box(scene: Scene) -> bytes:
    """Alice's key under the passphrase, with a published salt."""
    key = scene.loaded_key("alice")
    public = canonical_json.dumps(key.pins.plain())
    salt = bytes(range(32))
    derived, commit = primitives._box_keys(PASSPHRASE.rstrip(b"\n"), salt)
    aad = primitives.fields("dtl/v2/key", public)
    data = primitives.seal_chunk(derived, 0, True, key.secrets.encode(), aad)
    box = key_file.Box(salt=salt, commit=commit, sealed=data)
    return canonical_json.dumps(key.pins.plain() | {"box": box.plain()})


def box_changed(box: Json) -> None:
    data = bytearray(base64.b64decode(box["sealed"]))
    data[0] ^= 1
    box["sealed"] = encoded(bytes(data))


def unreleased(change: Callable[[Scene], Changes]) -> Callable[[Scene], Changes]:
    """The server has not released the model of round 2 yet."""
    return lambda scene: {
        "job/server.ledger": scene.cut("server", "release", round=2),
        **change(scene),
    }


def before_close(lines: list[bytes]) -> bytes:
    closes = [number for number, line in enumerate(lines) if b'"event":"close"' in line]
    return b"".join(lines[: closes[0]])


def ledger_round(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"round":1', b'"round":9'), *lines[2:]]


def damaged(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1].replace(b'"round"', b'"round\0', 1).rstrip(b"\n")]


def unknown_event(lines: list[bytes]) -> list[bytes]:
    return linked([*entries_of(lines), {"event": "closed", "round": 1}])


def linked_more(lines: list[bytes]) -> list[bytes]:
    entries = entries_of(lines)
    entries[-1]["more"] = 0
    return linked(entries)


def opened_other(entries: list[Json]) -> None:
    for entry in entries:
        if entry["event"] == "open" and entry["round"] == 1:
            entry["opened"] = OTHER


def accepted_other(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "aggregate" and e["round"] == 3)
    entry["uploads"]["alice"] = OTHER


def closed_without(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "close" and e["round"] == 2)
    (added,) = (e for e in entries if e["event"] == "aggregate" and e["round"] == 3)
    others = {name: digest for name, digest in added["uploads"].items() if name != "alice"}
    entries.append(entry | {"round": 3, "uploads": others})


def released_other(entries: list[Json]) -> None:
    (entry,) = (e for e in entries if e["event"] == "release" and e["round"] == 3)
    entry["result"] = OTHER


def known(digest: str, kind: str = "weights") -> str:
    metadata = {
        "base": digest,
        "content": None,
        "format": "dtl/v2",
        "kind": kind,
        "opened": digest,
        "round": 0,
    }
    return canonical_json.dumps(metadata).decode()


def resize(found: Tensors, more: int) -> None:
    (length,), data = found["body"]
    found["body"] = [length + more], (data + bytes(1))[: length + more]


def with_words(body: bytes, edit: Callable[[list[list[int]]], object]) -> bytes:
    """A body of one polynomial with edited words."""
    shape = SMALL_BODY
    words = lattice.read_body(body, shape)
    edit(words[0])
    return written(words[0])


def written(rows: list[list[int]]) -> bytes:
    """Words as they lie in a file, whether they are below their primes or not."""
    return lattice.write_body([rows])


def plus(number: int, coefficient: int = 0) -> Callable[[bytes], bytes]:
    """Add a number to a coefficient."""

    def edit(rows: list[list[int]]) -> None:
        for row, prime in zip(rows, PRIMES, strict=True):
            row[coefficient] = (row[coefficient] + number) % prime

    return lambda body: with_words(body, edit)


def word_set(prime: int, more: int) -> Callable[[bytes], bytes]:
    """The second word modulo a prime is the prime, or larger."""

    def edit(rows: list[list[int]]) -> None:
        rows[prime][1] = PRIMES[prime] + more

    return lambda body: with_words(body, edit)


def words(prime: int, more: int) -> Edit2:
    return lambda found: change_body(found, word_set(prime, more))


def words_plus(number: int, coefficient: int = 0) -> Edit2:
    return lambda found: change_body(found, plus(number, coefficient))


def change_body(found: Tensors, edit: Callable[[bytes], bytes]) -> None:
    shape, data = found["body"]
    found["body"] = shape, edit(data)


def word_larger(found: Tensors) -> None:
    change_body(found, plus(1))


plus_one = words_plus(1 << 28)


def garbage_body(found: Tensors) -> None:
    def edit(rows: list[list[int]]) -> None:
        for number, row in enumerate(rows):
            stream = forging.drawn(f"garbage {number}", 6 * len(row))
            row[:] = [int.from_bytes(stream[6 * c : 6 * c + 6], "little") for c in range(len(row))]

    change_body(found, lambda body: with_words(body, edit))


def proven_body(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Scene], bytes]:
    return lambda scene: forging.proven(scene, name, body=edit)


def proven_blocks(name: str, block: int, number: int) -> Callable[[Scene], bytes]:
    return lambda scene: forging.proven(scene, name, blocks=block_plus(block, number))


def proven_header(name: str, edit: Edit) -> Callable[[Scene], Changes]:
    return lambda scene: {name: forging.proven(scene, name, header=edit)}


def block_plus(block: int, number: int) -> Callable[[list[int]], list[int]]:
    return lambda blocks: [m + number * (t == block) for t, m in enumerate(blocks)]


def lifted(scene: Scene, name: str) -> int:
    """The lift of c_0 of the third group."""
    n = scene.p * scene.q
    _, data = scene.bulk(name)[1]["residues"]
    at = 16 * scene.width
    return pow(int.from_bytes(data[at : at + scene.width], "little"), n, n * n)


def set_residue(found: Tensors, width: int, group: int, k: int, edit: Callable[[int], int]) -> None:
    shape, data = found["residues"]
    at = (8 * group + k) * width
    found["residues"] = shape, number_set(data, at, width, edit)


def number_set(data: bytes, at: int, width: int, edit: Callable[[int], int]) -> bytes:
    new = edit(int.from_bytes(data[at : at + width], "little"))
    return data[:at] + new.to_bytes(width, "little") + data[at + width :]


def residue_set(
    name: str, group: int, k: int, value: Callable[[Scene], int]
) -> Callable[[Scene], Changes]:
    return lambda scene: {name: scene.residue(name, group, k, lambda old: value(scene))}


def residue_plus(group: int, j: int, number: int) -> Edit2:
    """Add to a block of a result; N is the published one."""
    return lambda found: set_residue(found, WIDTH, group, j, lambda c: c * (1 + number * N) % N**2)


def residue_times(group: int, j: int) -> Edit2:
    return lambda found: set_residue(found, WIDTH, group, j, lambda c: 2 * c % N**2)


def negated(scene: Scene, number: int) -> int:
    return scene.square - number


def short(field: str) -> Edit:
    return lambda body: body.update({field: body[field][:-2]})


def upper_hex(header: Json) -> None:
    header["result_signature"] = header["result_signature"].upper()


def signed_by_bob(scene: Scene) -> Edit:
    def edit(header: Json) -> None:
        of = bytes.fromhex(header["of"])
        header["result_signature"] = primitives.sign(scene.secret("bob"), "model", of).hex()

    return edit


def pinned_anew(owner: str, field: str) -> Callable[[Scene], Changes]:
    def change(scene: Scene) -> Changes:
        def edit(body: Json) -> None:
            body[field][2] = f"{pow(int(body[field][2], 16), 2, scene.square):x}"

        job = scene.document("job/job.json", edit)
        digest = signed_digest("job", canonical_json.loads(job, ""))
        key = f"job/{owner}.key"
        return {"job/job.json": job, key: scene.plain(key, put(job=digest))}

    return change


def ledger(name: str, edit: Ledger) -> Callable[[Scene], Changes]:
    """A party's ledger with edited entries and right links."""
    return lambda scene: {f"job/{name}.ledger": scene.relinked(name, edit)}


def tried(number: int, after_failure: bool = False) -> Ledger:
    """One more line: another release of another result was tried."""
    line = {
        "event": "tried",
        "round": number,
        "result": OTHER,
        "release": OTHER,
        "after_failure": after_failure,
    }
    return lambda entries: entries.append(dict(line))


def gone_on(entries: list[Json]) -> None:
    """A failure, and after it an attempt that opened."""
    tried(2**31)(entries)
    opened = next(entry for entry in entries if entry["event"] == "open")
    before = next(e for e in entries if e["event"] == "tried" and e["result"] == opened["result"])
    entries.append(before | {"after_failure": True})


def tried_instead_of_reveal(entries: list[Json]) -> None:
    at = index(entries, "reveal", 2)
    del entries[at:]
    tried(2)(entries)


def begun_anew(entries: list[Json]) -> None:
    at = index(entries, "reveal", 2)
    (sent,) = (e for e in entries if e["event"] == "upload" and e["round"] == 2)
    entries[at:] = [sent | {"round": 9}]


def index(entries: list[Json], event: str, number: int) -> int:
    return next(i for i, e in enumerate(entries) if e["event"] == event and e["round"] == number)


def line_put(event: str, values: Json) -> Callable[[list[bytes]], list[bytes]]:
    """The last line of an event with other values."""

    def edit(lines: list[bytes]) -> list[bytes]:
        entries = entries_of(lines)
        [entry for entry in entries if entry["event"] == event][-1].update(values)
        return linked(entries)

    return edit


def line_added(entry: Json) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: linked([*entries_of(lines), entry])


def event_put(event: str, **values: object) -> Ledger:
    def edit(entries: list[Json]) -> None:
        for entry in entries:
            if entry["event"] == event:
                entry.update(values)

    return edit


def opened_put(field: str) -> Ledger:
    return event_put("open", **{field: OTHER})


def step_other(entries: list[Json]) -> None:
    (opened,) = (entry for entry in entries if entry["event"] == "open")
    entries.append(STEP | {"sum": opened["result"], "source": "apply-sum"})


def weights_put(scene: Scene, **values: object) -> bytes:
    """The opened model with other metadata."""
    text, data = outer(scene.read("alice.model-2.safetensors"))
    entries = json.loads(text)
    metadata = json.loads(entries["__metadata__"]["dtl"]) | values
    entries["__metadata__"]["dtl"] = canonical_json.dumps(metadata).decode()
    return joined(json.dumps(entries).encode(), data)


def weights_changed(scene: Scene) -> bytes:
    raw = scene.read("alice.model-2.safetensors")
    return raw[:-1] + bytes([raw[-1] ^ 1])


def gradients_named(**values: object) -> Callable[[Scene], Changes]:
    """Gradients that say what they are based on: the opened model, but for these values."""

    def change(scene: Scene) -> Changes:
        text, _ = outer(scene.read("alice.model-2.safetensors"))
        known = json.loads(json.loads(text)["__metadata__"]["dtl"])
        metadata = known | {"kind": "gradients"} | values
        return {"alice.grads": tensors("alice", 0.1, text=canonical_json.dumps(metadata).decode())}

    return change
