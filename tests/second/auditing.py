"""Section 8.6: what the center sees in an upload, a sum or a model; one code for all of it."""

from pathlib import Path
from typing import Any

from tests.second import bulk, lattice, masks, releases, results, values
from tests.second.bulk import Bulk
from tests.second.documents import Job, Key
from tests.second.encoding import require
from tests.second.group import Blocks
from tests.second.values import Decoded


def open_blocks(job: Job, center: Key, found: Bulk) -> Blocks:
    """The blocks, by the strong trapdoor; every group must be well-formed."""
    group, secret = job.group, center.secret
    residues = found.residues(job)
    group.check_groups(residues, 3)
    blocks = group.strong_open(residues, secret["p"], secret["q"])
    a = group.half(secret["server_seed"], "server-half")
    b = group.half(secret["participant_seed"], "participant-half")
    sums = [x + y for x, y in zip(a, b, strict=True)]
    for row, opened in zip(residues, blocks, strict=True):
        require(group.is_well_formed(row, opened, sums), 4, "a malformed group")
    return blocks


def opened_of(job: Job, center: Key, base: str | None, model: Path | None) -> str | None:
    """What the base of an upload opened to, from the base itself."""
    if base is None:
        return None
    require(model, 2, "the base is not given")
    path = Path(str(model))
    if path.suffix in (".safetensors", ".npz"):
        _, basis = values.read_weights(path)
        require(basis.base == base, 3, "not the base of the upload")
        return basis.opened
    found = bulk.read(path, job, "sum", "model", "release")
    result = found.result if found.kind == "release" else found
    require(result.digest.hex() == base, 3, "not the base of the upload")
    return open_result(job, center, result).vector


def open_result(job: Job, center: Key, result: Bulk) -> releases.Opened:
    blocks = open_blocks(job, center, result)
    uploads = bulk.uploads_in(result.header)
    found = values.decode(job, blocks, result.body(job), result.header["values"], uploads)
    return releases.finished(job, result.header, found.integers)


def context(job: Job, header: dict[str, Any], opened: str | None) -> masks.Context:
    pair = [None if text is None else bytes.fromhex(text) for text in (header["base"], opened)]
    return masks.Context(job, header["round"], *pair)


def round_keys(job: Job, root: bytes, owner: str, about: masks.Context) -> dict[str, bytes]:
    """k_ij of one participant with all others."""
    others = [name for name in job.names if name != owner]
    return {other: about.round_key(masks.pair_seed(job, root, owner, other)) for other in others}


def open_upload(
    job: Job, center: Key, upload: Bulk, opened: str | None
) -> tuple[dict[str, bytes], Blocks, Decoded]:
    """Round keys, masked blocks, and what the upload holds."""
    header, root = upload.header, center.secret["mask_root"]
    owner, about = header["signer"], context(job, upload.header, opened)
    blocks = open_blocks(job, center, upload)
    if about.base and about.opened:
        seed = masks.audit_seed(job, root, owner)
        tag = masks.opened_tag(seed, about.round, about.base, about.opened)
        require(tag.hex() == header["opened_tag"], 4, "another tag")
    keys = round_keys(job, root, owner, about) if header["masked"] else {}
    bare = masks.combine(job, blocks, masks.mask(job, owner, keys, len(blocks)), -1)
    body = upload.body(job)
    if job.lattice:
        shape = job.shape(header["values"])
        body = lattice.combine(shape.ring, body, masks.mask_body(owner, keys, shape), -1)
    found = values.decode(job, bare, body, header["values"], 1)
    values.check_range(found.integers, job.e_max, 4)
    return keys, blocks, found


def audit(job: Job, center: Key, path: Path, model: Path | None) -> None:
    """Refused with 4 for a file that is not as its signer must have made it."""
    found = bulk.read(path, job, "upload", "sum", "model")
    if found.kind == "upload":
        opened = opened_of(job, center, found.header["base"], model)
        open_upload(job, center, found, opened)
    else:
        results.check_manifest(job, found.header)
        open_result(job, center, found)
