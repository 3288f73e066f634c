"""Anyone: says what a file is, from the file and the public job alone; never a secret."""

from pathlib import Path
from typing import Any

from dtl.core.errors import DtlError, FormatError, VerificationError
from dtl.core.files import canonical_json, job_file, key_file, ledger, tensors
from dtl.core.files.atomic import read_file, read_start
from dtl.core.files.closing import Close, Reveal, kind_of
from dtl.core.files.container import Container, is_container
from dtl.core.files.headers import ReleaseHeader, ResultHeader, UploadHeader, read_header
from dtl.core.files.job_file import Job
from dtl.core.files.schema import FORMAT, OLDER
from dtl.core.files.shards import is_shard, load_shard
from dtl.core.parallel import Work
from dtl.core.progress import ProgressCallback, silent
from dtl.core.public import verification
from dtl.core.public.verification import Evidence, ReleaseKey

Description = dict[str, Any]
_ZIP_MAGIC = b"PK"
_JSON_START = b"{"


def inspect(path: Path, job: Job | None, progress: ProgressCallback = silent) -> Description:
    """Describe any file of dtl's: what it is, whom it belongs to, what it says of itself.

    With `job`, a bulk file's signature is checked as well. Raises UsageError when there is
    no file, FormatError when it is none of dtl's, VerificationError for a bad signature.
    """
    start = read_start(path, len(_ZIP_MAGIC))
    if start.startswith(_JSON_START):
        return _document(path, job)
    if start.startswith(_ZIP_MAGIC):
        return _plain(path)
    return _bulk(path, job, progress) if is_container(path) else _plain(path)


def _document(path: Path, job: Job | None) -> Description:
    data = read_file(path, job_file.MAX_DOCUMENT_BYTES)
    if ledger.is_ledger(data):
        return _ledger(path, data)
    if FORMAT.encode() not in data and OLDER.encode() not in data:
        raise FormatError(
            f"{path}: not a file that dtl inspects: expected one of {FORMAT}, found other JSON"
        )
    parsed = canonical_json.loads(data, str(path))
    match parsed:
        case {"participants": _}:
            return _job(Job.load(path))
        case {"kind": "close"}:
            return _signed(Close.decode(data, str(path)), job)
        case {"kind": "reveal"}:
            return _signed(Reveal.decode(data, str(path)), job)
    pins, rest = key_file.split_key(data, str(path))
    return {
        "file": "key (secret)",
        "owner": pins.name,
        "job": pins.job,
        "ledger": pins.ledger or "none",
        "passphrase": "boxed" if key_file.is_boxed(rest) else "none: the file is in clear",
    }


def _job(job: Job) -> Description:
    return {
        "file": "job",
        "job": job.digest,
        "security": job.security,
        "modulus_bits": job.public_key.modulus_bits,
        "slot_bits": job.slot_bits,
        "fraction_bits": job.fraction_bits,
        "cipher": job.cipher,
        "largest_contribution": job.fixed_point.max_step / job.fixed_point.one,
        "largest_weight": job.fixed_point.max_value / job.fixed_point.one,
        "masks": job.masks,
        "min_contributors": job.min_contributors,
        "participants": list(job.names),
        "roster": job.roster_digest,
        "signature": "valid; by the center that the file itself names",
    }


def _signed(document: Close | Reveal, job: Job | None) -> Description:
    described: Description = {
        "file": document.kind,
        "digest": document.digest,
        "job": document.job,
        "signer": document.signer,
        "created": document.created,
        "round": document.round,
        "base": document.base,
    }
    match document:
        case Close():
            described |= {
                "contributors": list(document.names),
                "missing": list(document.missing),
            }
        case Reveal():
            described |= {"close": document.close, "missing": sorted(document.keys)}
    described["signature"] = "not checked: dtl verify does"
    if job is not None and document.job == job.digest:
        document.check_signature(job, "the file")
        described["signature"] = f"valid: {document.signer} of job {job.digest[:8]}"
    return described


def _ledger(path: Path, data: bytes) -> Description:
    entries = ledger.read_entries(data, str(path))
    head = entries[0]
    if not isinstance(head, ledger.LedgerHead):
        raise VerificationError(f"{path}: line 1: expected the head of a ledger")
    counts: dict[str, int] = {}
    for entry in entries[1:]:
        event = str(entry.plain()["event"])
        counts[event] = counts.get(event, 0) + 1
    return {
        "file": "ledger",
        "owner": head.name,
        "ledger": head.ledger,
        "chain": "intact",
        "entries": counts,
    }


def _plain(path: Path) -> Description:
    if path.suffix == ".npz" and is_shard(path):
        shard = load_shard(path)
        return {
            "file": "shard",
            "samples": len(shard.x),
            "features": shard.x.shape[1],
            "classes": list(map(str, shard.classes)),
        }
    source = tensors.open_tensors(path)
    try:
        known = source.metadata
        described: Description = {
            "file": f"plain {known.kind}" if known else "plain tensors",
            "values": sum(spec.values for spec in source.layout),
            "tensors": {spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in source.layout},
        }
        if known:
            described |= {"round": known.round, "base": known.base, "opened": known.opened}
            described |= {"content": known.content}
        return described
    finally:
        source.close()


def _bulk(path: Path, job: Job | None, progress: ProgressCallback) -> Description:
    with Container(path) as container:
        header = read_header(container, ("upload", "sum", "model", "release"), None)
        digest = container.digest(progress)
        described: Description = {
            "file": header.kind,
            "digest": digest.hex(),
            "job": header.job,
            "signer": header.signer,
            "created": header.created,
            "round": header.round,
        }
        match header:
            case UploadHeader():
                described |= {"base": header.base, "masked": header.masked}
                described |= {"parts": _parts(container), **_vector(header)}
            case ResultHeader():
                described |= {"parts": _parts(container), **_result(header)}
            case ReleaseHeader():
                described |= {
                    "of": header.of,
                    "may_open": {name: _reason(header, name) for name in header.names},
                    "admitted": list(header.admitted),
                    "parts": _parts(container),
                    "manifest": _result(header.manifest),
                }
        described["signature"] = _signature(container, header.signer, header.kind, job)
    return described


def _parts(container: Container) -> Description:
    """The bytes of each part of a bulk file."""
    return {name: container.tensors[name].length for name in sorted(container.tensors)}


def _vector(header: UploadHeader | ResultHeader) -> Description:
    layout = {spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in header.layout}
    return {"values": header.values, "tensors": layout}


def _result(header: ResultHeader) -> Description:
    return {
        "parent": header.parent,
        "initial": header.initial,
        "contributors": list(header.names),
        "missing": list(header.missing),
        "contributions": header.contributions,
        **_vector(header),
    }


def _reason(header: ReleaseHeader, name: str) -> str:
    """Why somebody may open a release."""
    rounds = header.manifest.contributions.get(name)
    if rounds is None:
        return "admitted for this one release; has not contributed yet"
    return f"contributed to {rounds} round{'s' if rounds > 1 else ''} of this model"


def verify(
    path: Path,
    job: Job,
    evidence: Evidence,
    work: Work,
    release_key: ReleaseKey | None = None,
) -> Description:
    """Verify any signed file; see `dtl.core.public.verification`."""
    start = read_start(path, len(_ZIP_MAGIC))
    if start.startswith(_JSON_START):
        kind = kind_of(path) or "job"
        if kind == "job":
            if Job.load(path).digest != job.digest:
                raise FormatError(f"{path}: another job than the one to verify it with")
        elif kind not in ("close", "reveal"):
            raise FormatError(f"{path}: expected a job file, a close file or a reveal")
    else:
        with Container(path) as container:
            header = read_header(container, ("upload", "sum", "model", "release"), job.digest)
            kind = header.kind
    return verification.verify(path, kind, job, evidence, work, release_key)


def _signature(container: Container, signer: str, kind: str, job: Job | None) -> str:
    if job is None:
        return "not checked: no job file given or beside it"
    if read_header(container, (kind,), None).job != job.digest:
        return "not checked: the job file is another job's"
    public = job.signing_key(signer)
    if public is None:
        raise FormatError(f"{container.path}: {signer} is not in this job's roster")
    container.verify(kind, public)
    return f"valid: {signer} of job {job.digest[:8]}"


def job_beside(path: Path, job_path: Path | None) -> Job | None:
    """The job to inspect a file with: the one named, or `job.json` in the same folder."""
    if job_path is not None:
        return Job.load(job_path)
    beside = path.with_name("job.json")
    if not beside.is_file() or beside == path:
        return None
    try:
        return Job.load(beside)
    except DtlError:
        return None
