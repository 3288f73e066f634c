"""Verify files from public files alone: signatures, proofs, manifests, and the server's product.

Everything is recomputed with the very functions that the server uses, and compared bit for
bit.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtl.core.crypto import masks
from dtl.core.errors import FormatError, QuorumError, VerificationError
from dtl.core.files.closing import Close, Reveal, load_signed
from dtl.core.files.headers import ResultHeader
from dtl.core.files.job_file import Job
from dtl.core.parallel import Work
from dtl.core.public import releases, results, uploads
from dtl.core.public.releases import Release
from dtl.core.public.results import Result, Start
from dtl.core.public.uploads import Upload


@dataclass(frozen=True)
class Evidence:
    """The public files that a verification may use."""

    uploads: Sequence[Path] = ()
    models: Sequence[Path] = ()
    initial: Path | None = None
    reveals: Sequence[Path] = ()


@dataclass
class _Pool:
    """The evidence, opened and checked, and which of it has been used."""

    uploads: dict[str, Upload] = field(default_factory=dict)
    models: dict[str, Result] = field(default_factory=dict)
    initial: Start | None = None
    reveals: list[tuple[Path, Reveal]] = field(default_factory=list)
    used: set[Path] = field(default_factory=set)


ReleaseKey = Callable[[Release], bytes]
"""Unwraps the content key of a release for a participant that it is granted to."""


def verify(
    path: Path,
    kind: str,
    job: Job,
    evidence: Evidence,
    work: Work,
    release_key: ReleaseKey | None = None,
) -> dict[str, Any]:
    """Verify a file of the given kind; returns what was verified.

    With `release_key`, the sealed part of a release is checked as well; only then can it be
    called recomputed.

    Raises FormatError or VerificationError for anything that does not hold, and for evidence
    that has nothing to do with the file.
    """
    with ExitStack() as stack:
        pool = _gather(job, evidence, stack, work)
        match kind:
            case "upload":
                found = _verify_upload(job, path, stack, work)
            case "sum" | "model":
                found = _verify_result(job, path, pool, stack, work)
            case "release":
                found = _verify_release(job, path, pool, release_key, stack, work)
            case "close" | "reveal":
                found = _verify_document(job, path)
            case "job":
                found = {"signature": "valid; by the center that the file itself names"}
            case _:
                raise FormatError(f"{path}: nothing of dtl's that is signed: {kind!r}")
        _check_all_used(path, evidence, pool)
        return {"file": str(path), "kind": kind, **found}


def _check_all_used(path: Path, evidence: Evidence, pool: _Pool) -> None:
    """Raise VerificationError for evidence that has nothing to do with the file."""
    given = {*evidence.uploads, *evidence.models, *evidence.reveals}
    given |= {evidence.initial} if evidence.initial else set()
    unused = sorted(map(str, given - pool.used))
    if unused:
        raise VerificationError(
            f"{path}: has nothing to do with {', '.join(unused)}",
            "what its manifest names was not among the files given, or not all of it",
        )


def _gather(job: Job, evidence: Evidence, stack: ExitStack, work: Work) -> _Pool:
    pool = _Pool()
    for path in evidence.uploads:
        upload = uploads.open_upload(job, path, stack, work)
        pool.uploads[upload.digest] = upload
    for path in evidence.models:
        model = results.open_result(job, path, stack, work)
        pool.models[model.digest] = model
    if evidence.initial:
        pool.initial = results.start_from_weights(job, evidence.initial)
    pool.reveals = [(path, Reveal.load(path, job)) for path in evidence.reveals]
    return pool


def _verify_upload(job: Job, path: Path, stack: ExitStack, work: Work) -> dict[str, Any]:
    upload = uploads.open_upload(job, path, stack, work)
    uploads.check_proof(job, upload, work)
    uploads.check_body(job, upload.body, upload.header.values, work)
    header = upload.header
    return {
        "digest": upload.digest,
        "signer": header.signer,
        "round": header.round,
        "signature": "valid",
        "proof": "holds",
    }


def _verify_result(
    job: Job, path: Path, pool: _Pool, stack: ExitStack, work: Work
) -> dict[str, Any]:
    """Verify a result, and the chain of models behind it as far as there is evidence."""
    result = results.open_result(job, path, stack, work)
    results.check_result(job, result, work)
    return _verify_chain(job, result, pool, work)


def _verify_chain(job: Job, result: Result, pool: _Pool, work: Work) -> dict[str, Any]:
    path = result.path
    if pool.initial and pool.initial.weights:
        if pool.initial.base not in (result.header.initial, result.header.parent):
            raise VerificationError(f"{path}: does not come from {pool.initial.weights}")
        pool.used.add(pool.initial.weights)
    verified = [_verify_product(job, result, pool, work, needed=bool(pool.uploads))]
    parent = pool.models.get(result.header.parent or "")
    while parent is not None:
        pool.used.add(parent.path)
        verified.append(_verify_product(job, parent, pool, work, needed=False))
        parent = pool.models.get(parent.header.parent or "")
    return {
        "digest": result.digest,
        "round": result.header.round,
        "signature": "valid",
        "contributors": list(result.header.names),
        "missing": list(result.header.missing),
        "product": verified[0],
        "recomputed": verified[0] == _RECOMPUTED,
        "rounds_recomputed": sum(text == _RECOMPUTED for text in verified),
    }


def recompute(job: Job, result: Result, evidence: Evidence, stack: ExitStack, work: Work) -> bool:
    """Recompute a result from evidence, where uploads are given; whether it was recomputed.

    Raises VerificationError for a result that is not the one that follows from its uploads.
    """
    pool = _gather(job, evidence, stack, work)
    verified = _verify_chain(job, result, pool, work)
    _check_all_used(result.path, evidence, pool)
    return bool(verified["recomputed"])


_RECOMPUTED = "recomputed, bit for bit the same"
_NOT_RECOMPUTED = "not recomputed: no uploads given"


def _verify_product(job: Job, result: Result, pool: _Pool, work: Work, needed: bool) -> str:
    """Recompute one result from its uploads and its start; compare manifest and residues.

    Without any of its uploads it is not recomputed, or, if that is `needed`, an error.
    """
    header, path = result.header, result.path
    results.check_manifest(job, header, path)
    named = [pool.uploads.get(c.upload) for c in header.contributors]
    if not any(named) and not needed:
        start = _start(result, pool, needed=False) if header.kind == "model" else None
        if start:
            _check_succession(header, start, path)
        return _NOT_RECOMPUTED
    absent = [
        c.participant for c, upload in zip(header.contributors, named, strict=True) if not upload
    ]
    if absent:
        raise VerificationError(
            f"{path}: the upload of round {header.round} that it names is not given "
            f"for {', '.join(absent)}",
            f"--uploads: all those of round {header.round}, and of earlier rounds if you like",
        )
    found = [upload for upload in named if upload]
    start = _start(result, pool, needed=True) if header.kind == "model" else None
    for upload, fault in zip(found, uploads.check_proofs(job, found, work), strict=True):
        pool.used.add(upload.path)
        if start:
            results.check_base(upload, start)
        uploads.check_same(upload, found[0])
        if fault is not None:
            raise fault
    orphans = _orphans(job, header, found, pool)
    layouts = [start.layout] if start else [upload.header.layout for upload in found]
    if header.layout not in layouts:
        raise VerificationError(f"{path}: its tensors are not those of what it was made of")
    expected = results.manifest(job, found, start, header.layout, header.created)
    if expected != header:
        raise VerificationError(f"{path}: its manifest is not that of these uploads")
    _compare_residues(job, result, found, start, orphans, work)
    _compare_body(job, result, found, start, orphans, work)
    return _RECOMPUTED


def _compare_residues(
    job: Job,
    result: Result,
    found: Sequence[Upload],
    start: Start | None,
    orphans: list[masks.Key],
    work: Work,
) -> None:
    first = 0
    for piece in results.residues(job, found, start, orphans, work):
        count = len(piece) // job.group_bytes
        if result.rows.read(first, count) != piece:
            raise VerificationError(
                f"{result.path}: groups {first} to {first + count - 1} are not the product of "
                "the uploads"
            )
        first += count


def _compare_body(
    job: Job,
    result: Result,
    found: Sequence[Upload],
    start: Start | None,
    orphans: list[masks.Key],
    work: Work,
) -> None:
    place, body = 0, result.body
    for piece in results.bodies(job, found, start, orphans, work):
        if body is None or body.read(place, len(piece)) != piece:
            raise VerificationError(
                f"{result.path}: bytes {place} to {place + len(piece) - 1} of its body are not "
                "the sum of the uploads"
            )
        place += len(piece)


def _start(result: Result, pool: _Pool, needed: bool) -> Start | None:
    header, path = result.header, result.path
    parent = pool.models.get(header.parent or "")
    if header.parent is not None and parent is not None:
        pool.used.add(parent.path)
        return parent.start()
    if header.parent is None and pool.initial and pool.initial.base == header.initial:
        return pool.initial
    if needed:
        option = "--initial M0" if header.parent is None else "--model PARENT"
        raise VerificationError(
            f"{path}: what it starts from is not among the files given", f"add {option}"
        )
    return None


def _orphans(
    job: Job, header: ResultHeader, found: Sequence[Upload], pool: _Pool
) -> list[masks.Key]:
    if not (job.masks and header.missing):
        return []
    about = [
        (path, reveal)
        for path, reveal in pool.reveals
        if (reveal.round, reveal.base) == (header.round, header.base)
    ]
    pool.used.update(path for path, _ in about)
    try:
        return results.orphaned_masks(header.missing, found, about, None)
    except QuorumError as error:
        raise VerificationError(error.message, "add --reveals of everyone who is in") from None


def _check_succession(header: ResultHeader, start: Start, path: Path) -> None:
    """Raise VerificationError unless a manifest goes on from what its model starts from."""
    found = (header.contributions, header.initial, header.layout)
    counted = results.count_contributions(start, header.names)
    if found != (counted, start.initial, start.layout) or header.round <= start.round:
        raise VerificationError(f"{path}: its manifest does not go on from its parent")


def _verify_release(
    job: Job, path: Path, pool: _Pool, key: ReleaseKey | None, stack: ExitStack, work: Work
) -> dict[str, Any]:
    release = releases.open_release(job, path, stack, work)
    releases.check_body(job, release, work)
    header = release.header
    found: dict[str, Any] = {
        "digest": release.digest,
        "round": header.round,
        "signature": "valid",
        "may_open": list(header.names),
        "admitted": list(header.admitted),
        "of": header.of,
    }
    found["sealed"] = "not checked: only a participant that it is granted to can (--key)"
    if key is not None:
        releases.check_release_proof(job, releases.unseal(job, release, key(release)), work)
        found["sealed"] = "the server has applied its half to this very result"
    given = pool.models.get(header.of)
    if given is not None:
        pool.used.add(given.path)
    verified = _verify_chain(job, release.result, pool, work)
    found |= {name: verified[name] for name in ("product", "rounds_recomputed")}
    found["recomputed"] = bool(verified["recomputed"]) and key is not None
    if verified["recomputed"] and key is None:
        found["product"] = "the result inside is recomputed; the sealed part was not checked"
    return found


def _verify_document(job: Job, path: Path) -> dict[str, Any]:
    document = load_signed(path, job)
    found: dict[str, Any] = {
        "digest": document.digest,
        "signer": document.signer,
        "round": document.round,
        "signature": "valid",
    }
    match document:
        case Close():
            if {*document.names, *document.missing} != set(job.names):
                raise FormatError(f"{path}: not about this job's roster")
            if not results.can_close(job, len(document.names)):
                raise QuorumError(f"{path}: {len(document.names)} are too few to close a round")
            return found | {
                "contributors": list(document.names),
                "missing": list(document.missing),
            }
        case Reveal():
            return found | {"close": document.close, "missing": sorted(document.keys)}
