"""Everything that is computed on the way, from the files and keys of a finished job."""

import hashlib
from pathlib import Path
from typing import Any

from tests.second import (
    auditing,
    bulk,
    documents,
    lattice,
    ledger,
    masks,
    proof,
    releases,
    results,
    values,
)
from tests.second.encoding import require

Inputs = dict[str, dict[str, Any]]


def hexadecimal(numbers: list[int]) -> list[str]:
    return [f"{number:x}" for number in numbers]


class Witnessed:
    """A finished job in a folder, seen with all of its keys.

    `inputs` has, for each upload, the bytes of the operating system and the time in ns that its
    keys were made of, and the seed of the rounding; for each release the bytes that its proof was
    made of, and its content key.
    """

    def __init__(self, folder: Path, inputs: Inputs) -> None:
        self.folder, self.inputs = folder, inputs
        self.center, self.job = self.read_key("kgc")
        self.a = self.job.group.half(self.center.secret["server_seed"], "server-half")
        self.b = self.job.group.half(self.center.secret["participant_seed"], "participant-half")

    def read_key(self, name: str) -> tuple[documents.Key, documents.Job]:
        return documents.read_key(self.folder / f"job/{name}.key", self.folder / "job/job.json")

    def files(self, *suffixes: str) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.suffix in suffixes)

    def everything(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "job": self.job.digest.hex(),
            "roster": self.job.roster.hex(),
            "halves": self.halves(),
            "uploads": {path.name: self.upload(path) for path in self.files(".upload")},
            "results": {path.name: self.result(path) for path in self.files(".enc")},
            "releases": {path.name: self.release(path) for path in self.files(".release")},
            "documents": {
                path.name: documents.read_document(path, self.job).digest.hex()
                for path in self.files(".close", ".reveal")
            },
        }
        weights = self.folder / "w0.safetensors"
        if weights.exists():
            plain = values.read_plain(weights)
            found["initial"] = {"V0": plain.digest.hex(), "content": plain.content}
        return found

    def halves(self) -> dict[str, list[str]]:
        return {"server": hexadecimal(self.a), "participant": hexadecimal(self.b)}

    def upload(self, path: Path) -> dict[str, Any]:
        """What is in an upload; made anew from its one-time keys where they are known."""
        job, upload = self.job, bulk.read(path, self.job, "upload")
        header, owner = upload.header, upload.header["signer"]
        key, _ = self.read_key(owner)
        entries = ledger.read(self.folder / f"job/{owner}.ledger", key)
        (at,) = (i for i, e in enumerate(entries) if e.get("upload") == upload.digest.hex())
        opened = entries[at]["opened"]
        found = proof.check(job, upload)
        root = self.center.secret["mask_root"]
        require(key.secret["audit_seed"] == masks.audit_seed(job, root, owner), 4, "another seed")
        for other, seed in key.secret["mask_seeds"].items():
            require(seed == masks.pair_seed(job, root, owner, other), 4, "another mask seed")
        keys, blocks, decoded = auditing.open_upload(job, self.center, upload, opened)
        given = self.inputs[path.name]
        link = self._link_before(owner, at, entries)
        one_time = auditing.context(job, header, opened).one_time(
            bytes.fromhex(given["system"]), key.secret["sign"], given["time"], link
        )
        self._check_made(upload, found, decoded, one_time)
        gradients = values.read_plain(self.folder / f"{owner}.grads").floats()
        scale = 1 / len(job.names)
        seed = bytes.fromhex(given["rounding"])
        integers = values.contribution(job, gradients, scale, seed)
        require(decoded.integers == integers, 4, "not these gradients")
        return {
            "digest": upload.digest.hex(),
            "one_time": dict(zip("serw", map(bytes.hex, one_time), strict=True)),
            "round_keys": {other: key.hex() for other, key in keys.items()},
            "blocks": [hexadecimal(row) for row in blocks],
            "integers": decoded.integers,
            "secret": decoded.secret,
            "errors": decoded.errors,
            "rho": hexadecimal(found.rho),
            "d": hexadecimal(found.d),
            "z": f"{found.z:x}",
            "v": hexadecimal(found.v),
        }

    def _link_before(self, owner: str, at: int, entries: list[ledger.Entry]) -> bytes:
        """The link of the line before the upload's."""
        if at:
            return bytes.fromhex(entries[at - 1]["link"])
        raw = (self.folder / f"job/{owner}.ledger").read_bytes()
        return ledger.first_link(raw)

    def _check_made(
        self,
        upload: bulk.Bulk,
        found: proof.Proof,
        decoded: values.Decoded,
        one_time: list[bytes],
    ) -> None:
        """Secret, errors, randomness and witness are those of the one-time keys."""
        job, group = self.job, self.job.group
        k_s, k_e, k_r, k_w = one_time
        residues = upload.residues(job)
        if job.lattice:
            shape = job.shape(upload.header["values"])
            require(decoded.secret == lattice.sample(k_s, shape.ring), 4, "another secret")
            for i, errors in enumerate(decoded.errors):
                expected = lattice.sample(k_e, shape.ring, i)[: len(errors)]
                require(errors == expected, 4, "other errors")
        exponents = proof.randomness(job, k_r, len(residues))
        for row, r in zip(residues, exponents, strict=True):
            require(row[0] == pow(group.gamma, r, group.N), 4, "other randomness")
        require(found.d == proof.commitments(job, k_w, len(residues)), 4, "another witness")

    def result(self, path: Path) -> dict[str, Any]:
        found = results.read_result(path, self.job)
        results.check_manifest(self.job, found.header)
        opened = auditing.open_result(self.job, self.center, found)
        return {
            "digest": found.digest.hex(),
            "manifest": found.header,
            "integers": opened.integers,
            "opened": opened.vector,
            "content": opened.content,
        }

    def release(self, path: Path, *names: str) -> dict[str, Any]:
        """Opened by those of these names, by default by everybody to whom it is granted."""
        job, server = self.job, self.read_key("server")[0]
        found = releases.read(path, job)
        keys = set()
        for name in names or releases.granted(found):
            key, _ = self.read_key(name)
            entries = ledger.read(self.folder / f"job/{name}.ledger", key)
            releases.check_history(entries, name, found)
            keys.add(releases.unwrap(job, key, found))
            sealed = releases.unlock(job, key, found)
            releases.open_sealed(job, key, found, sealed, entries)
        (content_key,) = keys  # one for all
        payload = releases.unseal(job, found, content_key)
        drawn = bytes.fromhex(self.inputs[path.name]["content_key"])
        require(content_key == drawn, 4, "another content key")
        system = bytes.fromhex(self.inputs[path.name]["system"])
        made = releases.commitments(job, sealed.statement, server.secret["server_seed"], system)
        require(made == [sealed.proof.t, sealed.proof.t_prime], 4, "another witness")
        halved = job.group.remove(found.residues(job), self.a)
        require([row[1:] for row in halved] == sealed.opened, 4, "not without the server's half")
        return {
            "digest": found.digest.hex(),
            "core": releases.core(job, found).hex(),
            "encryption_key": releases.content_keys(content_key)[0].hex(),
            "commit": found.header["commit"],
            "payload": hashlib.sha512(payload).hexdigest(),
            "rho": hexadecimal(sealed.rho),
            "Gamma": f"{sealed.statement.gamma:x}",
            "D": hexadecimal(sealed.statement.D),
            "z": hexadecimal(sealed.proof.z),
        }
