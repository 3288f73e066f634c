"""Section 8.2: what the server computes, recomputed: products, manifests, orphaned masks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from tests.second import bulk, documents, lattice, masks, proof, values
from tests.second.bulk import Bulk
from tests.second.documents import Document, Job
from tests.second.encoding import FORMAT, from_base64, require
from tests.second.group import Blocks, Residues
from tests.second.lattice import Body


@dataclass
class Vector:
    """The encrypted part of a file."""

    residues: Residues
    body: Body

    def encode(self, job: Job) -> dict[str, bytes]:
        """The tensors."""
        body = {"body": lattice.write_body(self.body)} if job.lattice else {}
        return body | {"residues": job.group.encode(self.residues)}


def vector(job: Job, found: Bulk) -> Vector:
    """Of a file whose residues and words are valid, or it is refused."""
    residues = found.residues(job)
    job.group.check_groups(residues, 3)
    return Vector(residues, found.body(job))


@dataclass
class Start:
    """What a round starts from: public weights, or the encrypted model."""

    base: str
    initial: str
    layout: Any
    round: int
    contributions: dict[str, int]
    vector: Vector
    parent: str | None


def start_from_weights(job: Job, path: Path) -> Start:
    weights, basis = values.read_weights(path)
    require(basis.round == 0 and basis.base, 3, "an opened model, not initial weights")
    integers = values.initial_integers(job, weights)
    if job.lattice:
        neutral = [[0] * 7 for _ in range(job.groups(len(integers)))]
        body = lattice.encode_public(integers, job.shape(len(integers)))
        found = Vector(job.group.public(neutral), body)
    else:
        found = Vector(job.group.public(values.pack(job, integers)), [])
    digest = str(basis.base)
    return Start(digest, digest, weights.layout, 0, {}, found, None)


def start_from_model(job: Job, model: Bulk) -> Start:
    header, digest = model.header, model.digest.hex()
    require(model.kind == "model", 3, "not a model")
    counted = header["contributions"]
    layout, initial = header["layout"], header["initial"]
    return Start(digest, initial, layout, header["round"], counted, vector(job, model), digest)


def shapes(layout: Any) -> dict[str, list[int]]:
    return {entry["name"]: entry["shape"] for entry in layout}


def check_base(upload: Bulk, start: Start) -> None:
    header = upload.header
    require(header["base"] == start.base, 3, "based on another model")
    require(header["round"] > start.round, 3, "of a round that is over")
    require(shapes(header["layout"]) == shapes(start.layout), 3, "other tensors than the model")


def check_uploads(
    job: Job, uploads: Sequence[Bulk], start: Start | None, closing: bool = False
) -> None:
    """What is asked of uploads besides their form: section 8.2."""
    if start:
        for upload in uploads:
            check_base(upload, start)
    first, seen = uploads[0].header, set()
    for upload in uploads:
        header = upload.header
        require(header["round"] == first["round"], 3, "of another round")
        require(header["base"] == first["base"], 3, "of another base")
        require(shapes(header["layout"]) == shapes(first["layout"]), 3, "of other tensors")
        proof.check(job, upload)
        if closing:  # in a close file, it cannot be left out any more
            upload.body(job)
        require(header["signer"] not in seen, 5, "two uploads of a participant")
        seen.add(header["signer"])


@dataclass
class Orphans:
    """The masks with the missing that are left in a sum."""

    blocks: Blocks
    body: Body


def orphaned(
    job: Job,
    missing: Sequence[str],
    uploads: Sequence[Bulk],
    reveals: Sequence[Document],
    code: int,
) -> Orphans | None:
    """The masks with the missing that are left in the sum, from everybody's reveals.

    `code` is that of a reveal that is not given.
    """
    present = {upload.header["signer"] for upload in uploads}
    first = uploads[0].header
    seen: dict[str, dict[str, bytes]] = {}
    for reveal in reveals:
        body = reveal.body
        require((body["round"], body["base"]) == (first["round"], first["base"]), 3, "of another")
        require(body["close"] == reveals[0].body["close"], 3, "of another close file")
        require(body["keys"].keys() == set(missing), 3, "not about those who are missing")
        require(body["signer"] in present, 3, "by somebody who is not in")
        require(body["signer"] not in seen, 3, "a second reveal")
        seen[body["signer"]] = {other: from_base64(key) for other, key in body["keys"].items()}
    if not missing:
        return None
    require(seen.keys() == present, code, "a reveal is missing")
    groups, shape = job.groups(first["values"]), job.shape(first["values"])
    total = Orphans([[0] * 7 for _ in range(groups)], lattice.zero(shape) if job.lattice else [])
    for owner, keys in seen.items():
        blocks = masks.mask(job, owner, keys, groups)
        total.blocks = masks.combine(job, total.blocks, blocks, 1)
        added = masks.mask_body(owner, keys, shape) if job.lattice else []
        total.body = lattice.combine(shape.ring, total.body, added)
    return total


def product(
    job: Job, uploads: Sequence[Bulk], start: Start | None, orphans: Orphans | None
) -> Vector:
    group, ring = job.group, job.shape(1).ring
    vectors = [vector(job, upload) for upload in uploads]
    residues = reduce(group.product, (item.residues for item in vectors))
    body = lattice.add(ring, [item.body for item in vectors])
    if orphans:
        negated = [[-m % group.N for m in row] for row in orphans.blocks]
        residues = group.product(residues, group.public(negated))
        body = lattice.combine(ring, body, orphans.body, -1)
    if start:
        residues = group.product(start.vector.residues, group.inverse(residues))
        body = lattice.combine(ring, start.vector.body, body, -1)
    return Vector(residues, body)


def count(start: Start | None, names: Sequence[str]) -> dict[str, int]:
    return dict(Counter(start.contributions if start else {}) + Counter(names))


def manifest(
    job: Job, uploads: Sequence[Bulk], start: Start | None, layout: Any, created: str
) -> dict[str, Any]:
    first = uploads[0].header
    digests = {upload.header["signer"]: upload.digest.hex() for upload in uploads}
    found = {
        "format": FORMAT,
        "kind": "model" if start else "sum",
        "job": job.digest.hex(),
        "signer": "server",
        "created": created,
        "round": first["round"],
        "parent": start.parent if start else first["base"],
        "initial": start.initial if start else None,
        "contributors": [{"participant": n, "upload": digests[n]} for n in sorted(digests)],
        "missing": [name for name in job.names if name not in digests],
        "contributions": count(start, list(digests)),
        "layout": layout,
        "values": first["values"],
    }
    require(bulk.uploads_in(found) <= bulk.MOST_UPLOADS, 7, "too many contributions")
    return found


def check_manifest(job: Job, header: dict[str, Any]) -> None:
    """What can be said of a manifest by itself."""
    present = [entry["participant"] for entry in header["contributors"]]
    require(sorted([*present, *header["missing"]]) == job.names, 3, "not the roster")
    require(header["contributions"].keys() <= set(job.names), 3, "counts strangers")
    if header["kind"] == "sum" or header["parent"] is None:
        require(header["contributions"] == dict.fromkeys(present, 1), 4, "a wrong count")
    require(len(present) >= job.body["min_contributors"], 6, "too few contributors")
    if job.body["masks"] and header["missing"]:
        require(documents.can_close(job, len(present)), 6, "too few contributors")


@dataclass
class Evidence:
    """Files that a result may be recomputed from; their form has been checked."""

    uploads: Sequence[Bulk]
    models: Sequence[Bulk]
    weights: Start | None
    reveals: Sequence[Document]


def recompute(job: Job, result: Bulk, given: Evidence) -> bool:
    """Recompute a result and the models behind it; whether there were uploads of its own."""
    at: Bulk | None = result
    pool = {upload.digest.hex(): upload for upload in given.uploads}
    parents = {model.digest.hex(): model for model in given.models}
    reveals = list(given.reveals)
    if given.weights:
        named = (result.header["initial"], result.header["parent"])
        require(given.weights.base in named, 4, "of other initial weights")
    parents.pop(result.digest.hex(), None)
    while at is not None:
        header = at.header
        check_manifest(job, header)
        wanted = [entry["upload"] for entry in header["contributors"]]
        used = [pool.pop(digest) for digest in wanted if digest in pool]
        parent = parents.pop(header["parent"] or "", None)
        start = None
        if header["kind"] == "model":
            start = start_from_model(job, parent) if parent else given.weights
            if start and start.base != (header["parent"] or header["initial"]):
                start = None
        require(used or not given.uploads or at is not result, 4, "no upload of its own round")
        if used:
            about = [r for r in reveals if _is_about(r, header)]
            reveals = [r for r in reveals if not _is_about(r, header)]
            require(len(used) == len(wanted), 4, "an upload is not given")
            require(start or header["kind"] == "sum", 4, "the start is not given")
            _compare(job, at, used, start, about)
        elif start:
            _check_succession(header, start)
        at = parent
    require(not pool and not parents and not reveals, 4, "files that have nothing to do with it")
    return bool(given.uploads)


def _is_about(reveal: Document, header: dict[str, Any]) -> bool:
    base = header["parent"] or header["initial"]
    return bool((reveal.body["round"], reveal.body["base"]) == (header["round"], base))


def _compare(
    job: Job, result: Bulk, used: Sequence[Bulk], start: Start | None, reveals: Sequence[Document]
) -> None:
    header = result.header
    check_uploads(job, used, start)
    orphans = None
    if job.body["masks"] and header["missing"]:
        orphans = orphaned(job, header["missing"], used, reveals, 4)
    layouts = [start.layout] if start else [upload.header["layout"] for upload in used]
    require(header["layout"] in layouts, 4, "another layout")
    expected = manifest(job, used, start, header["layout"], header["created"])
    require(expected == header, 4, "not the manifest of these uploads")
    tensors = {name: tensor.data for name, tensor in result.tensors.items()}
    found = product(job, used, start, orphans).encode(job)
    require(found == tensors, 4, "not the product of these uploads")


def _check_succession(header: dict[str, Any], start: Start) -> None:
    present = [entry["participant"] for entry in header["contributors"]]
    require(header["contributions"] == count(start, present), 4, "a wrong count")
    require(header["initial"] == start.initial, 4, "of other initial weights")
    require(header["layout"] == start.layout, 4, "of other tensors")
    require(header["round"] > start.round, 4, "its parent is of a later round")


def read_result(path: Path, job: Job) -> Bulk:
    return bulk.read(path, job, "sum", "model")
