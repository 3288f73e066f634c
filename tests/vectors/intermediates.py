"""Everything that is computed on the way, by dtl's own functions."""

import base64
import hashlib
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from dtl.core.ciphers.lattice import LatticeCipher
from dtl.core.crypto import masks, one_time, proof, release_proof, scheme
from dtl.core.crypto.one_time import OneTimeKeys
from dtl.core.crypto.residues import Bytes, to_integers
from dtl.core.files.closing import load_signed
from dtl.core.files.container import BODY, PROOF, RESIDUES, Container
from dtl.core.files.headers import ResultHeader, UploadHeader, read_header
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger, UploadEntry
from dtl.core.files.tensors import (
    ContentDigest,
    VectorDigest,
    checked_initial_digest,
    content_digest,
    from_reals,
    open_tensors,
)
from dtl.core.lattice import ring as door
from dtl.core.parallel import DEFAULT_WORK
from dtl.core.public import releases
from dtl.core.roles.participant import content_key
from dtl.core.roles.participant.basis import Basis, mask_keys, raw, round_key
from tests.helpers import residues_of

Inputs = dict[str, dict[str, Any]]


def numbers(blocks: Bytes) -> list[str]:
    """Numbers as they stand in documents: lower-case hex."""
    return [f"{number:x}" for number in to_integers(blocks)]


def rows(blocks: Bytes) -> list[list[str]]:
    return [numbers(group) for group in blocks]


def _in_order(function: Any, tasks: Any, total: int) -> Iterator[Any]:
    return (function(*task) for task in tasks)


class Witnessed:
    """A finished job in a folder, seen with all of its keys; `inputs` as in `Published`."""

    def __init__(self, folder: Path, inputs: Inputs) -> None:
        self.folder, self.inputs = folder, inputs
        self.job = Job.load(folder / "job/job.json")
        self.center, self.server = self.key("kgc"), self.key("server")
        self._opened: dict[Path, Bytes] = {}

    def key(self, name: str) -> Key:
        return Key.load(self.folder / f"job/{name}.key", self.folder / "job/job.json", bytes)

    def files(self, *suffixes: str) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.suffix in suffixes)

    def opened(self, path: Path) -> Bytes:
        """Blocks [G, 7, block width], by the strong trapdoor."""
        if path not in self._opened:
            residues = residues_of(path)[:, 1:]
            self._opened[path] = scheme.strong_open(self.center.trapdoor, residues)
        return self._opened[path]

    def everything(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "job": self.job.digest,
            "roster": self.job.roster_digest,
            "halves": {
                "server": [f"{x:x}" for x in self.server.half],
                "participant": [f"{x:x}" for x in self.key(self.job.names[0]).half],
            },
            "uploads": {path.name: self.upload(path) for path in self.files(".upload")},
            "results": {path.name: self.result(path) for path in self.files(".enc")},
            "releases": {path.name: self.release(path) for path in self.files(".release")},
            "documents": {
                path.name: load_signed(path, self.job).digest
                for path in self.files(".close", ".reveal")
            },
        }
        weights = self.folder / "w0.safetensors"
        if weights.exists():
            found["initial"] = {
                "V0": checked_initial_digest(open_tensors(weights)),
                "content": content_digest(open_tensors(weights)),
            }
        return found

    def decoded(
        self, container: Container, values: int, uploads: int, keys: list[masks.Key]
    ) -> list[int]:
        """The integers of a vector; `keys` take masks off."""
        blocks = self.opened(container.path)
        good = np.ones(len(blocks), np.bool_)
        body = container.bytes_of(BODY).read if BODY in container.tensors else None
        digest = bytes.fromhex(self.job.digest)
        decoding = self.job.codec.decode(
            digest, values, uploads, iter([(blocks, good)]), body, keys, _in_order
        )
        found = [int(e) for part in decoding for e in part]
        assert decoding.good
        return found

    def upload(self, path: Path) -> dict[str, Any]:
        job = self.job
        with Container(path) as container:
            header = read_header(container, ("upload",), job.digest)
            assert isinstance(header, UploadHeader)
            key = self.key(header.signer)
            groups = residues_of(path).shape[0]
            found = proof.decode(job.public_key, groups, container.whole(PROOF))
            rho = proof.weights(
                job.public_key,
                container.raw_header,
                job.signing_key(header.signer) or b"",
                groups,
                container.tensor_digest(RESIDUES),
                container.tensor_digest(BODY) if BODY in container.tensors else None,
                found.d,
            )
            digest = container.digest().hex()
            with Ledger(key) as ledger:
                (entry,) = ledger.find(UploadEntry, round=header.round)
            basis = Basis(header.round, header.base, entry.opened)
            keys = mask_keys(key, basis)
            integers = self.decoded(container, header.values, 1, masks.opposite(keys))
        others = [name for name in job.names if name != header.signer]
        one_time_keys = self.one_time(path, key, basis)
        return {
            "digest": digest,
            "one_time": {
                "s": one_time_keys.secret.hex(),
                "e": one_time_keys.error.hex(),
                "r": one_time_keys.randomness.hex(),
                "w": one_time_keys.witness.hex(),
            },
            "round_keys": {name: round_key(key, basis, name).hex() for name in others},
            "blocks": rows(self.opened(path)),
            "integers": integers,
            "secret": self.secret(one_time_keys),
            "errors": self.errors(one_time_keys, header.values),
            "rho": [f"{number:x}" for number in to_integers(rho)],
            "d": [f"{number:x}" for number in found.d],
            "z": f"{found.z:x}",
            "v": [f"{number:x}" for number in found.v],
        }

    def one_time(self, path: Path, key: Key, basis: Basis) -> OneTimeKeys:
        """The keys of an upload, derived again from published bytes."""
        given = self.inputs[path.name]
        lines = key.ledger_path.read_bytes().splitlines()
        digest = Container(path).digest().hex()
        (at,) = (i for i, line in enumerate(lines) if f'"upload":"{digest}"'.encode() in line)
        link = lines[at - 1].split(b'"link":"')[1][:128].decode()
        with patch.object(secrets, "token_bytes", lambda count: bytes.fromhex(given["system"])):
            return one_time.derive_one_time(
                key.secrets.sign,
                bytes.fromhex(self.job.digest),
                basis.round,
                raw(basis.base),
                raw(basis.opened),
                bytes.fromhex(self.job.roster_digest),
                given["time"],
                bytes.fromhex(link),
            )

    def secret(self, keys: OneTimeKeys) -> list[int]:
        """The secret of the pad; none in a direct job."""
        codec = self.job.codec
        if not isinstance(codec, LatticeCipher):
            return []
        found: list[int] = door.arithmetic(codec.ring).sample(keys.secret).tolist()
        return found

    def errors(self, keys: OneTimeKeys, values: int) -> list[list[int]]:
        """Those of each polynomial, as far as its coefficients are in the body."""
        codec = self.job.codec
        if not isinstance(codec, LatticeCipher):
            return []
        shape, arithmetic = codec.shape(values), door.arithmetic(codec.ring)
        return [
            arithmetic.sample(keys.error, i)[: shape.coefficients(i)].tolist()
            for i in range(shape.polynomials)
        ]

    def result(self, path: Path) -> dict[str, Any]:
        with Container(path) as container:
            header = read_header(container, ("sum", "model"), self.job.digest)
            assert isinstance(header, ResultHeader)
            digest = container.digest().hex()
            integers = self.decoded(container, header.values, header.uploads, [])
        array = np.array(integers)
        state = VectorDigest(header.layout, header.values, self.job.slot_bits)
        state.update(array)
        reals, place = self.job.fixed_point.decode(array), 0
        content = ContentDigest(header.layout)
        for spec in header.layout:
            content.update(from_reals(reals[place : place + spec.values], spec.dtype))
            place += spec.values
        return {
            "digest": digest,
            "manifest": header.plain(),
            "integers": integers,
            "opened": state.hexdigest(),
            "content": content.hexdigest(),
        }

    def release(self, path: Path) -> dict[str, Any]:
        with ExitStack() as stack:
            release = releases.open_release(self.job, path, stack, DEFAULT_WORK)
            header, public = release.header, self.job.public_key
            own = content_key(self.key(header.names[0]), release)
            part = releases.unseal(self.job, release, own)
            payload = b"".join(part.payload())
            width = public.arithmetic.width
            opened = np.frombuffer(payload[: part.opened_length], np.uint8).reshape(-1, 7, width)
            digest = hashlib.sha512(opened.tobytes()).digest()
            rho = release_proof.weights(part.core, bytes.fromhex(header.of), digest, part.groups)
            found = release_proof.products(public, residues_of(path), opened, rho)
            base = np.frombuffer(found.base.to_bytes(width, "little"), np.uint8)
            tail = payload[part.opened_length + 14 * width :]
            responses = np.frombuffer(tail, np.uint8).reshape(7, -1)
            return {
                "digest": release.digest,
                "core": part.core.hex(),
                "encryption_key": own.hex(),
                "commit": base64.b64encode(header.commit).decode(),
                "payload": hashlib.sha512(payload).hexdigest(),
                "rho": numbers(rho),
                "Gamma": numbers(public.arithmetic.lift(base[None]))[0],
                "D": [f"{number:x}" for number in found.quotients],
                "z": numbers(responses),
            }
