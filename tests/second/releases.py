"""Sections 8.3, 8.4, 9 and 11: check a release, unwrap its key, check its proof, open it."""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite

from tests.second import bulk, proof, results, values
from tests.second.bulk import CHUNK, Bulk
from tests.second.documents import Job, Key
from tests.second.encoding import (
    Refused,
    dumps,
    fields,
    from_base64,
    hashed,
    hkdf,
    numbers,
    require,
    u32,
)
from tests.second.group import Residues
from tests.second.ledger import Entry, find

SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


def read(path: Path, job: Job) -> Bulk:
    """A release whose form, signatures, manifest and grants are right."""
    found = bulk.read(path, job, "release")
    header = found.header
    results.check_manifest(job, header["manifest"])
    contributed = header["manifest"]["contributions"].keys()
    require(granted(found) <= contributed | set(header["admitted"]), 4, "a grant for a stranger")
    require(not contributed & set(header["admitted"]), 4, "admits a contributor")
    return found


def granted(release: Bulk) -> set[str]:
    return {entry["participant"] for entry in release.header["grants"]}


def core(job: Job, release: Bulk) -> bytes:
    header, result = release.header, release.result
    groups = job.groups(header["manifest"]["values"])
    named: dict[str, Any] = {
        field: header[field] for field in ("job", "round", "of", "manifest", "commit")
    }
    named["grants"] = sorted(granted(release))
    named["sizes"] = {"chunk": CHUNK, "sealed": [groups, 7, job.group.width]}
    named["tensors"] = {
        name: bulk.tensor_digest(name, tensor.data).hex() for name, tensor in result.tensors.items()
    }
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


def content_keys(content_key: bytes) -> tuple[bytes, bytes]:
    """(K_enc, the commitment)."""
    derived = hkdf(content_key, fields("dtl/v2/content"), 64)
    return derived[:32], derived[32:]


def unseal(job: Job, release: Bulk, content_key: bytes) -> bytes:
    """The payload: c' and the proof."""
    encryption_key, commit = content_keys(content_key)
    committed = base64.b64encode(commit).decode() == release.header["commit"]
    require(committed, 4, "not the key that is committed to")
    release.result.body(job)
    return open_chunks(release.tensors["sealed"].data, encryption_key, core(job, release))


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


# --- the proof ---------------------------------------------------------------------------------


@dataclass
class Statement:
    """What a release proves: log_Gamma D_j = log_g A_j."""

    core: bytes
    of: bytes
    hash: bytes
    gamma: int
    D: list[int]
    width: int

    def items(self, *more: list[int]) -> list[bytes]:
        """The items of a hash: itself, and more numbers."""
        tall = [number for row in ([self.gamma], self.D, *more) for number in row]
        encoded = [number.to_bytes(self.width, "little") for number in tall]
        return [self.core, self.of, self.hash, *encoded]


@dataclass
class Proof:
    """What is sealed besides c'."""

    t: list[int]
    t_prime: list[int]
    z: list[int]


@dataclass
class Sealed:
    """A payload whose proof holds."""

    opened: Residues  # c'
    rho: list[int]
    statement: Statement
    proof: Proof


def check_payload(job: Job, release: Bulk, payload: bytes) -> Sealed:
    """The payload, or it is refused; the residues of the result with it."""
    group, of = job.group, bytes.fromhex(release.header["of"])
    residues = release.residues(job)
    group.check_groups(residues, 3)
    size = 7 * len(residues) * group.width
    opened = group.residues(payload[:size], 7)
    split = size + 14 * group.width
    commitments = numbers(payload[size:split], group.width)
    found = Proof(
        commitments[:7], commitments[7:], numbers(payload[split:], bulk.response_bytes(job))
    )
    group.check_numbers([*(c for row in opened for c in row), *commitments], 4)
    require(all(z < 2 ** (group.ell + 257) for z in found.z), 4, "z out of range")
    named, digest = core(job, release), hashlib.sha512(payload[:size]).digest()
    seed = fields("dtl/v2/release-rho", named, of, digest)
    rho = numbers(hashlib.shake_256(seed).digest(16 * len(residues)), 16)
    gamma = group.lift(proof.weighted(residues, 0, rho, group.N))
    D = [
        proof.weighted(residues, j, rho, group.square)
        * pow(proof.weighted(opened, j - 1, rho, group.square), -1, group.square)
        % group.square
        for j in range(1, 8)
    ]
    statement = Statement(named, of, digest, gamma, D, group.width)
    _check_proof(job, statement, found)
    return Sealed(opened, rho, statement, found)


def _check_proof(job: Job, statement: Statement, found: Proof) -> None:
    group, square = job.group, job.group.square
    items = statement.items(found.t, found.t_prime)
    e = int.from_bytes(hashed("dtl/v2/release-proof", *items)[:16], "little")
    for base, sent, images in (
        (group.g, found.t, group.A),
        (statement.gamma, found.t_prime, statement.D),
    ):
        for t, z, image in zip(sent, found.z, images, strict=True):
            right = t * pow(image, e, square) % square
            holds = pow(base, z, square) in (right, square - right)
            require(holds, 4, "the proof of the release does not hold")


def commitments(job: Job, statement: Statement, seed: bytes, system: bytes) -> list[list[int]]:
    """t_1..t_7 and t'_1..t'_7, from s_A and the bytes of the operating system."""
    group = job.group
    count = (group.ell + 256) // 8
    first, *rest = statement.items()
    labelled = [
        fields("dtl/v2/release-witness", seed, system, first, *rest, u32(j)) for j in range(1, 8)
    ]
    w = [int.from_bytes(hashlib.shake_256(item).digest(count), "little") for item in labelled]
    return [[pow(base, x, group.square) for x in w] for base in (group.g, statement.gamma)]


# --- opening -----------------------------------------------------------------------------------


@dataclass
class Opened:
    """An opened result: its integers, V, and the content of the file that is written."""

    integers: list[int]
    vector: str
    data: bytes
    content: str


def check_history(entries: list[Entry], name: str, release: Bulk) -> None:
    """Hold a release against what this participant has sent and seen."""
    header, manifest = release.header, release.header["manifest"]
    of, round_ = header["of"], header["round"]
    sent = {entry["participant"]: entry["upload"] for entry in manifest["contributors"]}
    base = manifest["parent"] or manifest["initial"]
    for event in ("open", "tried"):
        for seen in find(entries, event, round=round_):
            require(seen["result"] == of, 4, "a second result of a round")
    for mine in find(entries, "upload", round=round_):
        require(sent.get(name) == mine["upload"], 4, "the own upload is not in it")
        require(mine["base"] == base, 4, "built on another model")
    for seen in find(entries, "open"):
        late = seen["result"] == manifest["parent"] and seen["round"] >= round_
        require(not late, 4, "its parent is of a later round")
        early = seen["parent"] == of and seen["round"] <= round_
        require(not early, 4, "its successor is of an earlier round")
        again = seen["result"] != of and set(seen["admitted"]) & set(header["admitted"])
        require(not again, 4, "admits somebody a second time")


def failures(entries: list[Entry]) -> list[Entry]:
    """Tried lines that nothing came of, and that nobody has gone on after."""
    opened = {entry["result"] for entry in find(entries, "open")}
    found: list[Entry] = []
    for entry in find(entries, "tried"):
        if entry["after_failure"]:
            found = []
        if entry["result"] not in opened:
            found.append(entry)
    return found


def check_attempts(entries: list[Entry], release: Bulk, after_failure: bool) -> None:
    """After a failure, the same file again or nothing."""
    for entry in failures(entries):
        same = entry["release"] == release.digest.hex()
        require(same or after_failure, 5, "a failure that nobody has looked into")


def unlock(job: Job, key: Key, release: Bulk) -> Sealed:
    """The payload of a release, checked without half b."""
    return check_payload(job, release, unseal(job, release, unwrap(job, key, release)))


def open_sealed(job: Job, key: Key, release: Bulk, sealed: Sealed, entries: list[Entry]) -> Opened:
    """Use half b, and decode."""
    manifest = release.header["manifest"]
    rows = zip(release.residues(job), sealed.opened, strict=True)
    halved = [[row[0], *opened] for row, opened in rows]
    half = job.group.half(key.secret["participant_seed"], "participant-half")
    blocks = job.group.messages(job.group.remove(halved, half))
    body = release.result.body(job)
    uploads = bulk.uploads_in(manifest)
    integers = values.decode(job, blocks, body, manifest["values"], uploads).integers
    opened = finished(job, manifest, integers)
    for seen in find(entries, "open", result=release.header["of"]):
        same = (seen["opened"], seen["content"]) == (opened.vector, opened.content)
        require(same, 4, "opened with another content before")
    return opened


def finished(job: Job, manifest: dict[str, Any], integers: list[int]) -> Opened:
    """Integers that are in range, and what a file of them holds."""
    layout = manifest["layout"]
    values.check_range(integers, values.limit(job, manifest["kind"]), 4)
    data = values.as_written(job, layout, integers)
    digest = values.vector_digest(job, layout, integers).hex()
    return Opened(integers, digest, data, values.content_digest(layout, data).hex())
