"""How good files become faulty ones: headers, documents, keys, plain files."""

import base64
import json
from collections.abc import Callable

from dtl.core.crypto import primitives
from dtl.core.files import canonical_json, key_file
from dtl.core.files.job_file import signed_digest
from tests.vectors import forging
from tests.vectors.command_lines import OTHER, A
from tests.vectors.scenarios import FOUR, PASSPHRASE, tensors
from tests.vectors.scene import (
    Changes,
    Edit,
    Json,
    Scene,
    Tensors,
    joined,
    outer,
    put,
)


def no(scene: Scene) -> Changes:
    """The files are good: the command is at fault."""
    return {}


def encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


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
