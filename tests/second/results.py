"""Section 8.2: what the server computes, recomputed: products, manifests, orphaned masks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from tests.second import bulk, documents, masks, proof, values
from tests.second.bulk import Bulk
from tests.second.documents import Document, Job
from tests.second.encoding import from_base64, require
from tests.second.group import Blocks, Residues


@dataclass
class Start:
    """What a round starts from: public weights, or the encrypted model."""

    base: str
    initial: str
    layout: Any
    round: int
    contributions: dict[str, int]
    residues: Residues
    parent: str | None


def start_from_weights(job: Job, path: Path) -> Start:
    weights, round_, digest = values.read_weights(path)
    require(round_ == 0, 3, "an opened model, not initial weights")
    blocks = values.pack(job, values.initial_integers(job, weights))
    residues = job.group.public(blocks)
    return Start(digest.hex(), digest.hex(), weights.layout, 0, {}, residues, None)


def start_from_model(job: Job, model: Bulk) -> Start:
    header, digest = model.header, model.digest.hex()
    require(model.kind == "model", 3, "not a model")
    residues = job.group.residues(model.tensors["residues"].data)
    counted = header["contributions"]
    layout, initial = header["layout"], header["initial"]
    return Start(digest, initial, layout, header["round"], counted, residues, digest)


def shapes(layout: Any) -> dict[str, list[int]]:
    return {entry["name"]: entry["shape"] for entry in layout}


def check_base(upload: Bulk, start: Start) -> None:
    header = upload.header
    require(header["base"] == start.base, 3, "based on another model")
    require(header["round"] > start.round, 3, "of a round that is over")
    require(shapes(header["layout"]) == shapes(start.layout), 3, "other tensors than the model")


def check_uploads(job: Job, uploads: Sequence[Bulk], start: Start | None) -> None:
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
        require(header["signer"] not in seen, 5, "two uploads of a participant")
        seen.add(header["signer"])


def orphaned(
    job: Job,
    missing: Sequence[str],
    uploads: Sequence[Bulk],
    reveals: Sequence[Document],
    code: int,
) -> Blocks | None:
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
    groups = job.group.groups(first["values"])
    total = [[0] * 7 for _ in range(groups)]
    for owner, keys in seen.items():
        mask = masks.mask(job, owner, keys, groups)
        total = [
            [x + y for x, y in zip(a, b, strict=True)] for a, b in zip(total, mask, strict=True)
        ]
    return [[m % job.group.N for m in row] for row in total]


def product(
    job: Job, uploads: Sequence[Bulk], start: Start | None, orphans: Blocks | None
) -> Residues:
    group = job.group
    total = reduce(group.product, (group.residues(u.tensors["residues"].data) for u in uploads))
    if orphans:
        negated = [[-m % group.N for m in row] for row in orphans]
        total = group.product(total, group.public(negated))
    return group.product(start.residues, group.inverse(total)) if start else total


def count(start: Start | None, names: Sequence[str]) -> dict[str, int]:
    return dict(Counter(start.contributions if start else {}) + Counter(names))


def manifest(
    job: Job, uploads: Sequence[Bulk], start: Start | None, layout: Any, created: str
) -> dict[str, Any]:
    first = uploads[0].header
    digests = {upload.header["signer"]: upload.digest.hex() for upload in uploads}
    return {
        "format": documents.FORMAT,
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


def verify(
    job: Job,
    result: Bulk,
    uploads: Sequence[Bulk],
    models: Sequence[Bulk],
    initial: Path | None,
    reveals: Sequence[Document],
) -> Residues | None:
    """Recompute a result and the models behind it; returns the residues, if there are uploads."""
    weights = start_from_weights(job, initial) if initial else None
    found = None
    parents = {model.digest.hex(): model for model in models}
    pool = {upload.digest.hex(): upload for upload in uploads}
    if weights:
        named = (result.header["initial"], result.header["parent"])
        require(weights.base in named, 4, "of other initial weights")
    at: Bulk | None = result
    while at is not None:
        header = at.header
        check_manifest(job, header)
        wanted = [entry["upload"] for entry in header["contributors"]]
        used = [pool.pop(digest) for digest in wanted if digest in pool]
        parent = parents.pop(header["parent"] or "", None)
        start = None
        if header["kind"] == "model":
            start = start_from_model(job, parent) if parent else weights
        require(used or not uploads or at is not result, 4, "no upload of its own round is given")
        if used:
            require(len(used) == len(wanted), 4, "an upload is not given")
            require(start or header["kind"] == "sum", 4, "the start is not given")
            check_uploads(job, used, start)
            about = [
                reveal
                for reveal in reveals
                if (reveal.body["round"], reveal.body["base"])
                == (header["round"], used[0].header["base"])
            ]
            orphans = None
            if job.body["masks"] and header["missing"]:
                orphans = orphaned(job, header["missing"], used, about, 4)
            layouts = [start.layout] if start else [upload.header["layout"] for upload in used]
            require(header["layout"] in layouts, 4, "another layout")
            expected = manifest(job, used, start, header["layout"], header["created"])
            require(expected == header, 4, "not the manifest of these uploads")
            residues = product(job, used, start, orphans)
            same = job.group.encode(residues) == at.tensors["residues"].data
            require(same, 4, "not the product of these uploads")
            found = residues if at is result else found
        elif start:
            present = [entry["participant"] for entry in header["contributors"]]
            require(header["contributions"] == count(start, present), 4, "a wrong count")
            require(header["initial"] == start.initial, 4, "of other initial weights")
            require(header["layout"] == start.layout, 4, "of other tensors")
            require(header["round"] > start.round, 4, "its parent is of a later round")
        at = parent
    require(not pool and not parents, 4, "files that have nothing to do with it")
    return found


def read_result(path: Path, job: Job) -> Bulk:
    return bulk.read(path, job, "sum", "model")
