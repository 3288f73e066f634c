"""Files as a malicious party would make them: any header, any residues, a valid signature."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from dtl.core.crypto import one_time, primitives, proof, release_proof, scheme
from dtl.core.crypto.residues import Bytes, from_integers, to_integers
from dtl.core.files import canonical_json, sealed
from dtl.core.files.container import BODY, RESIDUES, Container, file_digest, tensor_tree
from dtl.core.files.headers import ResultHeader
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key
from dtl.core.files.safetensors import build_header
from tests.helpers import Round, residues_of


def header_of(path: Path) -> dict[str, Any]:
    with Container(path) as container:
        header: dict[str, Any] = canonical_json.loads(container.raw_header, "")
        return header


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a bulk file, as they are."""
    with Container(path) as container:
        return {
            name: np.frombuffer(container.whole(name), np.uint8).reshape(info.shape)
            for name, info in container.tensors.items()
        }


def digest_of(name: str, content: bytes) -> bytes:
    """The digest of a tensor."""
    tree = tensor_tree(name)
    tree.update(content)
    return tree.digest()


def write(out: Path, header: dict[str, Any], tensors: dict[str, np.ndarray], secret: bytes) -> Path:
    """A bulk file with this header and these tensors, signed with `secret`."""
    raw = canonical_json.dumps(header)
    data = {name: np.ascontiguousarray(array).tobytes() for name, array in tensors.items()}
    digest = file_digest(raw, {name: digest_of(name, content) for name, content in data.items()})
    signature = primitives.sign(secret, str(header["kind"]), digest)
    shapes = [(name, "U8", tensors[name].shape) for name in sorted(tensors)]
    outer = build_header({"dtl": raw.decode(), "signature": signature.hex()}, shapes)
    out.write_bytes(outer + b"".join(data[name] for name in sorted(data)))
    return out


def resign(path: Path, changes: Mapping[str, Any], secret: bytes, out: Path) -> Path:
    """The file with a changed header and a valid signature."""
    return write(out, {**header_of(path), **changes}, tensors_of(path), secret)


def fresh_randomness(job: Job, groups: int) -> Bytes:
    """r of so many groups."""
    bits = job.public_key.exponent_bits
    return one_time.group_randomness(secrets.token_bytes(32), groups, bits)


def witness_stream(job: Job, groups: int) -> bytes:
    """The bytes that a prover's w and s_j are made of."""
    return secrets.token_bytes(proof.witness_bytes(job.public_key, groups))


def make_body(job: Job, values: int) -> Bytes:
    """A body of zeros; empty where the cipher has none."""
    return np.zeros(job.codec.body_bytes(values), np.uint8)


class Statement:
    """What a forger claims to know: blocks and randomness; and the residues and body it sends."""

    def __init__(
        self,
        round_: Round,
        name: str,
        header: dict[str, Any],
        groups: int,
        body: Bytes | None = None,
    ) -> None:
        self.round, self.header, self.groups = round_, header | {"signer": name}, groups
        self.key = round_.job.public_key
        self.secret = round_.opened_key(name).secrets.sign
        self.randomness = fresh_randomness(round_.job, groups)
        self.blocks = from_integers([0] * 7 * groups, self.key.arithmetic.block_width)
        self.blocks = self.blocks.reshape(groups, 7, -1)
        self.residues = self.honest()
        self.body = make_body(round_.job, header["values"]) if body is None else body

    def honest(self) -> Bytes:
        return scheme.encrypt(self.key, self.blocks, self.randomness, 1)

    def numbers(self) -> list[int]:
        return to_integers(self.residues)

    def send(self, numbers: list[int]) -> None:
        self.residues = from_integers(numbers, self.key.arithmetic.width).reshape(
            self.groups, 8, -1
        )

    def tensors(self) -> dict[str, np.ndarray]:
        found = {RESIDUES: self.residues}
        return found | ({BODY: self.body} if len(self.body) else {})

    def digests(self) -> tuple[bytes, bytes | None]:
        """The digests of residues and body, as the proof binds them."""
        found = {name: digest_of(name, t.tobytes()) for name, t in self.tensors().items()}
        return found[RESIDUES], found.get(BODY)

    def proof(self) -> bytes:
        """The best proof that the claimed knowledge gives for the residues sent."""
        witness, d = proof.commit(
            self.key, self.groups, witness_stream(self.round.job, self.groups)
        )
        public = primitives.signing_public_key(self.secret)
        header = canonical_json.dumps(self.header)
        rho = proof.weights(self.key, header, public, self.groups, *self.digests(), d)
        responder = proof.Responder(self.key, witness)
        responder.add(rho, self.randomness, self.blocks)
        return proof.encode(self.key, self.groups, responder.proof(d))

    def write(self, out: str, given: bytes | None = None) -> Path:
        proved = np.frombuffer(given or self.proof(), np.uint8)
        tensors = {**self.tensors(), "proof": proved}
        return write(self.round.folder / out, self.header, tensors, self.secret)


@dataclass
class Forged:
    """A release in the making: every part may be replaced before `write`."""

    server: "Server"
    manifest: dict[str, Any]
    tensors: dict[str, np.ndarray]
    opened: Bytes
    names: Sequence[str]
    admitted: Sequence[str] = ()
    proof: bytes | None = None
    content_key: bytes = b""
    commit: bytes | None = None
    header: Mapping[str, Any] | None = None

    def write(self, out: str) -> Path:
        """The release, with a proof by the server's own half unless another one is given."""
        server, job = self.server, self.server.job
        self.content_key = self.content_key or secrets.token_bytes(primitives.KEY_BYTES)
        encryption_key, commit = sealed.content_keys(self.content_key)
        commit = self.commit or commit
        raw = canonical_json.dumps(self.manifest)
        digests = {name: digest_of(name, t.tobytes()) for name, t in self.tensors.items()}
        of = file_digest(raw, digests)
        core = sealed.release_core(
            ResultHeader.check(self.manifest, ""),
            of.hex(),
            digests,
            self.names,
            job.residue_shape(self.manifest["values"]),
            commit,
        )
        proved = self.proof if self.proof is not None else self.prove(core, of)
        grants = []
        for name in self.names:
            participant = job.participant(name)
            assert participant is not None
            info = sealed.grant_info(core, name, participant.hpke, job.server.sign)
            wrapped = primitives.hpke_wrap(participant.hpke, self.content_key, info)
            grants.append({"participant": name, "wrapped": primitives.encode_base64(wrapped)})
        signature = primitives.sign(server.secret, str(self.manifest["kind"]), of)
        header = {
            "format": "dtl/v2",
            "kind": "release",
            "job": job.digest,
            "signer": "server",
            "created": self.manifest["created"],
            "round": self.manifest["round"],
            "of": of.hex(),
            "manifest": self.manifest,
            "result_signature": signature.hex(),
            "grants": grants,
            "admitted": list(self.admitted),
            "commit": primitives.encode_base64(commit),
        } | dict(self.header or {})
        payload = [self.opened.tobytes(), proved]
        stream = b"".join(sealed.seal_stream(encryption_key, core, payload))
        tensors = {**self.tensors, "sealed": np.frombuffer(stream, np.uint8)}
        return write(server.round.folder / out, header, tensors, server.secret)

    def prove(self, core: bytes, of: bytes) -> bytes:
        """The proof that the server's half gives, whatever is sealed."""
        key, residues = self.server.job.public_key, self.tensors[RESIDUES]
        opened_hash = hashlib.sha512(self.opened.tobytes()).digest()
        rho = release_proof.weights(core, of, opened_hash, len(residues))
        base = release_proof.base_product(key, residues, rho)
        half, seed = self.server.half, self.server.seed
        return release_proof.prove(key, half, seed, core, of, opened_hash, base)


class Server:
    """A server that signs and releases whatever it likes, with its real keys."""

    def __init__(self, round_: Round) -> None:
        self.round, self.job = round_, round_.job
        key = round_.opened_key("server")
        self.half, self.secret = key.half, key.secrets.sign
        self.seed = key.server_secrets.server_seed

    def result(self, header: dict[str, Any], tensors: dict[str, np.ndarray], out: str) -> Path:
        """A signed sum or model of any content."""
        return write(self.round.folder / out, header, tensors, self.secret)

    def half_opened(self, residues: Bytes) -> Bytes:
        """c'_1..c'_7 of residues, by the server's own half."""
        return scheme.apply_half(self.job.public_key, residues, self.half)[:, 1:]

    def of(self, result: Path, names: Sequence[str] | None = None) -> Forged:
        """A release of a signed result, honest so far."""
        header, tensors = header_of(result), tensors_of(result)
        half_opened = self.half_opened(tensors[RESIDUES])
        return Forged(self, header, tensors, half_opened, names or self.job.names)

    def about(self, header: dict[str, Any], residues: Bytes, body: Bytes | None = None) -> Forged:
        """A release of a result that need not exist, its sealed part made honestly."""
        body = make_body(self.job, header["values"]) if body is None else body
        tensors = {RESIDUES: residues} | ({BODY: body} if len(body) else {})
        return Forged(self, header, tensors, self.half_opened(residues), self.job.names)


@dataclass(frozen=True)
class Held(Key):
    """A participant's key with a half of the test's choice."""

    own: tuple[int, ...] = ()

    @property
    def half(self) -> tuple[int, ...]:
        return self.own


def held(key: Key, half: tuple[int, ...], job: Job | None = None) -> Held:
    """The key with another half, and of another job."""
    given = {item.name: getattr(key, item.name) for item in fields(Key)}
    return Held(**given | {"job": job or key.job}, own=half)


class _Untouchable(Held):
    @property
    def half(self) -> tuple[int, ...]:
        raise AssertionError("half b was used")


def untouchable(key: Key) -> Key:
    """The key, whose half nobody may look at."""
    return _Untouchable(**{item.name: getattr(key, item.name) for item in fields(Key)})


def sum_header(job: Job, values: int, **changes: Any) -> dict[str, Any]:
    """The manifest of a sum of everybody's uploads, which need not exist."""
    return {
        "format": "dtl/v2",
        "kind": "sum",
        "job": job.digest,
        "signer": "server",
        "created": "2026-01-01T00:00:00Z",
        "round": 1,
        "layout": [{"name": "x", "shape": [values], "dtype": "F32"}],
        "values": values,
        "parent": None,
        "initial": None,
        "contributors": [{"participant": name, "upload": "ab" * 64} for name in job.names],
        "missing": [],
        "contributions": dict.fromkeys(job.names, 1),
    } | changes


def changed_residue(path: Path, place: int, change: Any) -> Bytes:
    """The residues of a file with number `place` replaced by `change` of it."""
    residues = residues_of(path)
    numbers = to_integers(residues)
    numbers[place] = change(numbers[place])
    return from_integers(numbers, residues.shape[-1]).reshape(residues.shape)
