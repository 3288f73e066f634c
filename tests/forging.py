"""Files as a malicious party would make them: any header, any residues, a valid signature."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dtl.core.crypto import primitives, proof, scheme
from dtl.core.crypto.residues import Bytes, from_integers, to_integers
from dtl.core.files import canonical_json
from dtl.core.files.container import Container, file_digest
from dtl.core.files.safetensors import build_header
from tests.helpers import Round


def header_of(path: Path) -> dict[str, Any]:
    with Container(path) as container:
        header: dict[str, Any] = canonical_json.loads(container.raw_header, "")
        return header


def write(out: Path, header: dict[str, Any], tensors: dict[str, np.ndarray], secret: bytes) -> Path:
    """A bulk file with this header and these tensors, signed with `secret`."""
    raw = canonical_json.dumps(header)
    data = {name: np.ascontiguousarray(array).tobytes() for name, array in tensors.items()}
    hashes = {name: hashlib.sha512(content).digest() for name, content in data.items()}
    signature = primitives.sign(secret, str(header["kind"]), file_digest(raw, hashes))
    shapes = [(name, "U8", tensors[name].shape) for name in sorted(tensors)]
    outer = build_header({"dtl": raw.decode(), "signature": signature.hex()}, shapes)
    out.write_bytes(outer + b"".join(data[name] for name in sorted(data)))
    return out


def resign(path: Path, changes: Mapping[str, Any], secret: bytes, out: Path) -> Path:
    """The file with a changed header and a valid signature."""
    with Container(path) as container:
        tensors = {
            name: np.frombuffer(b"".join(container.chunks(name)), np.uint8).reshape(info.shape)
            for name, info in container.tensors.items()
        }
    return write(out, {**header_of(path), **changes}, tensors, secret)


class Statement:
    """What a forger claims to know: blocks and randomness; and the residues it sends."""

    def __init__(self, round_: Round, name: str, header: dict[str, Any], groups: int) -> None:
        self.round, self.header, self.groups = round_, header | {"signer": name}, groups
        self.key = round_.job.public_key
        self.secret = round_.opened_key(name).secrets.sign
        self.randomness = scheme.fresh_randomness(self.key, groups)
        self.blocks = from_integers([0] * 7 * groups, self.key.arithmetic.block_width)
        self.blocks = self.blocks.reshape(groups, 7, -1)
        self.residues = self.honest()

    def honest(self) -> Bytes:
        return scheme.encrypt(self.key, self.blocks, self.randomness, 1)

    def numbers(self) -> list[int]:
        return to_integers(self.residues)

    def send(self, numbers: list[int]) -> None:
        self.residues = from_integers(numbers, self.key.arithmetic.width).reshape(
            self.groups, 8, -1
        )

    def proof(self) -> bytes:
        """The best proof that the claimed knowledge gives for the residues sent."""
        witness, d = proof.commit(self.key, self.groups)
        public = primitives.signing_public_key(self.secret)
        sent = hashlib.sha512(self.residues.tobytes()).digest()
        header = canonical_json.dumps(self.header)
        rho = proof.weights(self.key, header, public, self.groups, sent, d)
        responder = proof.Responder(self.key, witness)
        responder.add(rho, self.randomness, self.blocks)
        return proof.encode(self.key, self.groups, responder.proof(d))

    def write(self, out: str, given: bytes | None = None) -> Path:
        proved = np.frombuffer(given or self.proof(), np.uint8)
        tensors = {"residues": self.residues, "proof": proved}
        return write(self.round.folder / out, self.header, tensors, self.secret)
