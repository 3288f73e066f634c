"""Everything that is computed on the way, from the files and keys of a finished job."""

import hashlib
from pathlib import Path
from typing import Any

from tests.second import bulk, documents, ledger, masks, proof, releases, results, values
from tests.second.encoding import fields, hkdf, require
from tests.second.group import Blocks


def hexadecimal(numbers: list[int]) -> list[str]:
    return [f"{number:x}" for number in numbers]


class Witnessed:
    """A finished job in a folder, seen with all of its keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.center, self.job = self.read_key("kgc")
        self.a = self.job.group.half(self.center.secret["server_seed"], "server-half")
        self.b = self.job.group.half(self.center.secret["participant_seed"], "participant-half")

    def read_key(self, name: str) -> tuple[documents.Key, documents.Job]:
        return documents.read_key(self.folder / f"job/{name}.key", self.folder / "job/job.json")

    def files(self, *suffixes: str) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.suffix in suffixes)

    def opened(self, found: bulk.Bulk) -> Blocks:
        """The blocks, by the strong trapdoor and by the halves, which must agree."""
        group = self.job.group
        residues = group.residues(found.tensors["residues"].data)
        group.check_residues((c for row in residues for c in row), 3)
        blocks = group.strong_open(residues, self.center.secret["p"], self.center.secret["q"])
        halved = group.take_off(group.take_off(residues, self.a), self.b)
        require(group.centre(halved) == blocks, 4, "the two trapdoors disagree")
        return blocks

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
            found["initial"] = values.read_weights(weights)[2].hex()
        return found

    def halves(self) -> dict[str, list[str]]:
        return {"server": hexadecimal(self.a), "participant": hexadecimal(self.b)}

    def upload(self, path: Path) -> dict[str, Any]:
        upload = bulk.read(path, self.job, "upload")
        header, owner = upload.header, upload.header["signer"]
        key, _ = self.read_key(owner)
        entries = ledger.read(self.folder / f"job/{owner}.ledger", key)
        (entry,) = ledger.find(entries, "upload", round=header["round"])
        require(entry["upload"] == upload.digest.hex(), 4, "not the upload of the ledger")
        base, opened = (bytes.fromhex(text or "") for text in (header["base"], entry["opened"]))
        root, job = self.center.secret["mask_root"], self.job
        keys = {}
        for other, seed in key.secret["mask_seeds"].items():
            require(seed == masks.pair_seed(job, root, owner, other), 4, "another mask seed")
            keys[other] = masks.round_key(job, seed, header["round"], base, opened)
        blocks = self.opened(upload)
        mask = masks.mask(job, owner, keys, len(blocks))
        found = proof.check(job, upload)
        integers = values.unpack(job, masks.subtract(job, blocks, mask), header["values"])
        require(all(abs(e) <= job.e_max for e in integers), 7, "beyond e_max")
        return {
            "digest": upload.digest.hex(),
            "round_keys": {other: key.hex() for other, key in keys.items()},
            "masks": [hexadecimal(row) for row in mask],
            "blocks": [hexadecimal(row) for row in blocks],
            "integers": integers,
            "rho": hexadecimal(found.rho),
            "d": hexadecimal(found.d),
            "z": f"{found.z:x}",
            "v": hexadecimal(found.v),
        }

    def result(self, path: Path) -> dict[str, Any]:
        found = results.read_result(path, self.job)
        results.check_manifest(self.job, found.header)
        blocks = self.opened(found)
        integers = values.unpack(self.job, blocks, found.header["values"])
        values.check_headroom(self.job, integers, found.kind)
        return {
            "digest": found.digest.hex(),
            "manifest": found.header,
            "blocks": [hexadecimal(row) for row in blocks],
            "integers": integers,
            "opened": values.vector_digest(found.header["layout"], integers).hex(),
        }

    def release(self, path: Path, *names: str) -> dict[str, Any]:
        """Opened by those of these names, by default by everybody to whom it is granted."""
        job = self.job
        found = releases.read(path, job)
        content_keys = set()
        for name in names or releases.granted(found):
            key, _ = self.read_key(name)
            entries = ledger.read(self.folder / f"job/{name}.ledger", key)
            content_keys.add(releases.unwrap(job, key, found))
            releases.open_release(job, key, found, entries)
        (content_key,) = content_keys  # one for all
        residues = releases.unseal(job, found, content_key)
        derived = hkdf(content_key, fields("dtl/v2/content"), 64)
        return {
            "digest": found.digest.hex(),
            "core": releases.core(job, found).hex(),
            "content_key": content_key.hex(),
            "encryption_key": derived[:32].hex(),
            "commit": found.header["commit"],
            "payload": hashlib.sha512(job.group.encode(residues)).hexdigest(),
        }
