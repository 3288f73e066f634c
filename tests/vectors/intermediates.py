"""Everything that is computed on the way, by dtl's own functions."""

import base64
import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dtl.core.crypto import masks, primitives, proof, scheme
from dtl.core.crypto.residues import Bytes, to_integers
from dtl.core.files import sealed
from dtl.core.files.closing import load_signed
from dtl.core.files.container import PROOF, RESIDUES, Container
from dtl.core.files.headers import ReleaseHeader, ResultHeader, UploadHeader, read_header
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key, ParticipantSecrets
from dtl.core.files.ledger import Ledger, UploadEntry
from dtl.core.files.tensors import VectorDigest, checked_initial_digest, open_tensors
from dtl.core.roles.participant.basis import Basis, mask_keys, round_key
from tests.helpers import residues_of


def numbers(blocks: Bytes) -> list[str]:
    """Numbers as they stand in documents: lower-case hex."""
    return [f"{number:x}" for number in to_integers(blocks)]


def rows(blocks: Bytes) -> list[list[str]]:
    return [numbers(group) for group in blocks]


class Witnessed:
    """A finished job in a folder, seen with all of its keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = Job.load(folder / "job/job.json")
        self.center, self.server = self.key("kgc"), self.key("server")

    def key(self, name: str) -> Key:
        return Key.load(self.folder / f"job/{name}.key", self.folder / "job/job.json", bytes)

    def files(self, *suffixes: str) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.suffix in suffixes)

    def opened(self, path: Path) -> Bytes:
        """Blocks [G, 7, block width], by the strong trapdoor."""
        return scheme.strong_open(self.center.trapdoor, residues_of(path)[:, 1:])

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
            found["initial"] = checked_initial_digest(open_tensors(weights))
        return found

    def upload(self, path: Path) -> dict[str, Any]:
        with Container(path) as container:
            header = read_header(container, ("upload",), self.job.digest)
            assert isinstance(header, UploadHeader)
            key = self.key(header.signer)
            groups, tensor = residues_of(path).shape[0], container.tensors[PROOF]
            sent = container.read(tensor.start, tensor.length)
            found = proof.decode(self.job.public_key, groups, sent)
            rho = proof.weights(
                self.job.public_key,
                container.raw_header,
                self.job.signing_key(header.signer) or b"",
                groups,
                container.tensor_hash(RESIDUES),
                found.d,
            )
            digest = container.digest().hex()
        with Ledger(key) as ledger:
            (entry,) = ledger.find(UploadEntry, round=header.round)
        basis = Basis(header.round, header.base, entry.opened)
        mask = masks.mask_blocks(mask_keys(key, basis), 0, 7 * groups, self.job.N)
        blocks = self.opened(path)
        opposite = masks.opposite(mask_keys(key, basis))
        bare = masks.add_masks(blocks.reshape(7 * groups, -1), opposite, 0, self.job.N)
        others = [name for name in self.job.names if name != header.signer]
        return {
            "digest": digest,
            "round_keys": {name: round_key(key, basis, name).hex() for name in others},
            "masks": rows(mask.reshape(groups, 7, -1)),
            "blocks": rows(blocks),
            "integers": self.job.packing.unpack(bare, header.values).tolist(),
            "rho": [f"{number:x}" for number in to_integers(rho)],
            "d": [f"{number:x}" for number in found.d],
            "z": f"{found.z:x}",
            "v": [f"{number:x}" for number in found.v],
        }

    def result(self, path: Path) -> dict[str, Any]:
        with Container(path) as container:
            header = read_header(container, ("sum", "model"), self.job.digest)
            digest = container.digest().hex()
        assert isinstance(header, ResultHeader)
        blocks = self.opened(path)
        flat = blocks.reshape(-1, blocks.shape[-1])
        integers = self.job.packing.unpack(flat, header.values)
        state = VectorDigest(header.layout, header.values)
        state.update(integers)
        return {
            "digest": digest,
            "manifest": header.plain(),
            "blocks": rows(blocks),
            "integers": integers.tolist(),
            "opened": state.hexdigest(),
        }

    def release(self, path: Path) -> dict[str, Any]:
        with ExitStack() as stack:
            container = stack.enter_context(Container(path))
            header = read_header(container, ("release",), self.job.digest)
            assert isinstance(header, ReleaseHeader)
            shape = self.job.residue_shape(header.manifest.values)
            core = sealed.release_core(header.manifest, header.names, shape, header.commit)
            grant = header.grants[0]
            key = self.key(grant.participant)
            assert isinstance(key.secrets, ParticipantSecrets)
            own = primitives.hpke_public_key(key.secrets.hpke)
            info = sealed.grant_info(core, key.name, own, self.job.server.sign)
            content_key = primitives.hpke_unwrap(key.secrets.hpke, grant.wrapped, info)
            encryption_key, commit = sealed.content_keys(content_key)
            length = shape[0] * self.job.group_bytes
            payload = b"".join(sealed.open_stream(container, encryption_key, core, length))
            return {
                "digest": container.digest().hex(),
                "core": core.hex(),
                "content_key": content_key.hex(),
                "encryption_key": encryption_key.hex(),
                "commit": base64.b64encode(commit).decode(),
                "payload": hashlib.sha512(payload).hexdigest(),
            }
