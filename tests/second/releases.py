"""Sections 8.3, 8.4 and 9: check a release, unwrap its key, open it."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite

from tests.second import bulk, values
from tests.second.bulk import Bulk
from tests.second.documents import Job, Key
from tests.second.encoding import Refused, dumps, fields, from_base64, hashed, hkdf, require
from tests.second.group import Residues
from tests.second.ledger import Entry, find
from tests.second.results import check_manifest

CHUNK = 2**20
SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


def read(path: Path, job: Job) -> Bulk:
    """A release whose form, signature, manifest and grants are right."""
    found = bulk.read(path, job, "release")
    header = found.header
    check_manifest(job, header["manifest"])
    contributed = header["manifest"]["contributions"].keys()
    require(granted(found) <= contributed | set(header["admitted"]), 4, "a grant for a stranger")
    require(not contributed & set(header["admitted"]), 4, "admits a contributor")
    return found


def granted(release: Bulk) -> set[str]:
    return {entry["participant"] for entry in release.header["grants"]}


def core(job: Job, release: Bulk) -> bytes:
    header = release.header
    groups = job.group.groups(header["manifest"]["values"])
    named: dict[str, Any] = {field: header[field] for field in ("job", "round", "manifest")}
    named["grants"] = sorted(granted(release))
    named["sizes"] = {"chunk": CHUNK, "residues": [groups, 8, job.group.width]}
    named["commit"] = header["commit"]
    return hashed("dtl/v2/release-core", dumps(named))


def unwrap(job: Job, key: Key, release: Bulk) -> bytes:
    """The content key."""
    wrapped = {entry["participant"]: entry["wrapped"] for entry in release.header["grants"]}
    require(key.name in wrapped, 5, "not granted")
    public = job.hpke[key.name]
    info = fields("dtl/v2/grant", core(job, release), key.name, public, job.sign["server"])
    kem = MLKEM768PrivateKey.from_seed_bytes(key.secret["hpke"][:64])
    exchange = X25519PrivateKey.from_private_bytes(key.secret["hpke"][64:])
    try:
        found = SUITE.decrypt(
            from_base64(wrapped[key.name]), MLKEM768X25519PrivateKey(kem, exchange), info
        )
    except (InvalidTag, ValueError) as error:
        raise Refused(4, "the content key does not open") from error
    require(len(found) == 32, 4, "a content key of a wrong length")
    return found


def unseal(job: Job, release: Bulk, content_key: bytes) -> Residues:
    """The payload: the residues of the result with the server's half taken off."""
    derived = hkdf(content_key, fields("dtl/v2/content"), 64)
    commit = base64.b64encode(derived[32:]).decode()
    require(commit == release.header["commit"], 4, "not the key that is committed to")
    sealed = release.tensors["sealed"].data
    return job.group.residues(open_chunks(sealed, derived[:32], core(job, release)))


def open_chunks(sealed: bytes, key: bytes, aad: bytes) -> bytes:
    """What is in a stream of sealed chunks."""
    plain = b""
    pieces = [sealed[at : at + CHUNK + 16] for at in range(0, len(sealed), CHUNK + 16)]
    for index, piece in enumerate(pieces):
        nonce = index.to_bytes(11, "big") + bytes([index == len(pieces) - 1])
        try:
            plain += ChaCha20Poly1305(key).decrypt(nonce, piece, aad)
        except InvalidTag as error:
            raise Refused(4, "the payload has been changed") from error
    return plain


@dataclass
class Opened:
    """An opened result: its integers, and V."""

    integers: list[int]
    digest: bytes


def decode(job: Job, manifest: dict[str, Any], residues: Residues) -> Opened:
    """Residues that both halves have been taken off."""
    integers = values.unpack(job, job.group.centre(residues), manifest["values"])
    values.check_headroom(job, integers, manifest["kind"])
    return Opened(integers, values.vector_digest(manifest["layout"], integers))


def check_history(entries: list[Entry], key: Key, release: Bulk) -> None:
    """Hold a release against what this participant has sent and seen."""
    header, manifest = release.header, release.header["manifest"]
    of, round_ = header["of"], header["round"]
    sent = {entry["participant"]: entry["upload"] for entry in manifest["contributors"]}
    base = manifest["parent"] or manifest["initial"]
    for seen in find(entries, "open", round=round_):
        require(seen["result"] == of, 4, "a second result of a round")
    for mine in find(entries, "upload", round=round_):
        require(sent.get(key.name) == mine["upload"], 4, "the own upload is not in it")
        require(mine["base"] == base, 4, "built on another model")
    for seen in find(entries, "open"):
        late = seen["result"] == manifest["parent"] and seen["round"] >= round_
        require(not late, 4, "its parent is of a later round")
        early = seen["parent"] == of and seen["round"] <= round_
        require(not early, 4, "its successor is of an earlier round")
        again = seen["result"] != of and set(seen["admitted"]) & set(header["admitted"])
        require(not again, 4, "admits somebody a second time")


def open_release(job: Job, key: Key, release: Bulk, entries: list[Entry]) -> Opened:
    check_history(entries, key, release)
    residues = unseal(job, release, unwrap(job, key, release))
    half = job.group.half(key.secret["participant_seed"], "participant-half")
    opened = decode(job, release.header["manifest"], job.group.take_off(residues, half))
    for seen in find(entries, "open", result=release.header["of"]):
        require(seen["opened"] == opened.digest.hex(), 4, "opened with another content before")
    return opened
