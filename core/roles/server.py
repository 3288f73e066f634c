"""The parameter server: checks uploads, multiplies ciphertexts, releases what it cannot read."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from dtl.core.crypto import primitives, scheme
from dtl.core.crypto.group import COMPONENTS, PublicKey
from dtl.core.crypto.residues import Bytes
from dtl.core.errors import (
    DtlError,
    FormatError,
    NotAllowedError,
    QuorumError,
    UsageError,
    VerificationError,
)
from dtl.core.files import canonical_json, sealed, tensors
from dtl.core.files.atomic import AtomicOutput, check_output
from dtl.core.files.container import RESIDUES, SEALED, Container, ContainerWriter, Rows
from dtl.core.files.documents import SERVER, Job, Key
from dtl.core.files.headers import (
    Contribution,
    Grant,
    Layout,
    ReleaseHeader,
    ResultHeader,
    UploadHeader,
    now,
    read_header,
    same_shapes,
)
from dtl.core.files.ledger import AggregateEntry, Ledger, ReleaseEntry
from dtl.core.files.schema import FORMAT
from dtl.core.parallel import DEFAULT_WORK, Work

PRODUCT_GROUPS = 128  # groups a task when uploads are checked or multiplied
HALF_GROUPS = 16  # groups a task when the half is applied


@dataclass(frozen=True)
class Upload:
    """An upload that has passed every check of its own."""

    path: Path
    header: UploadHeader
    digest: str
    rows: Rows


@dataclass(frozen=True)
class Start:
    """What a model starts from in this round: the encrypted parent, or public initial weights."""

    base: str
    initial: str
    layout: Layout
    round: int
    contributions: dict[str, int]
    parent: str | None = None
    rows: Rows | None = None
    weights: Path | None = None


@dataclass(frozen=True)
class AggregateReport:
    """What `aggregate` did."""

    header: ResultHeader
    digest: str
    refused: dict[str, str] = field(default_factory=dict)


def aggregate(
    key: Key,
    uploads: Sequence[Path],
    output: Path,
    model: Path | None = None,
    initial: Path | None = None,
    skip_invalid: bool = False,
    force: bool = False,
    work: Work = DEFAULT_WORK,
) -> AggregateReport:
    """Check every upload, then multiply: a sum, or the next encrypted model W <- W - sum.

    Protocol, section 8, step 2. Raises what the first failing check calls for; with
    `skip_invalid` goes on without the files that fail a check of their own.
    """
    key.require(SERVER)
    if model and initial:
        raise UsageError("--model and --initial exclude one another")
    check_output(output, force)
    with ExitStack() as stack:
        start = _start(key, model, initial, stack, work)
        accepted, refused = _accept(key, uploads, start, skip_invalid, stack, work)
        ledger = stack.enter_context(Ledger(key))
        for name, upload in sorted(accepted.items()):
            _check_first_upload(ledger, name, upload)
        absent = set(key.job.names) - set(accepted)
        _check_quorum(key.job, len(accepted), "accepted uploads", absent)
        header, content = _result_header(key, list(accepted.values()), start)
        before = ledger.find(AggregateEntry, content=content)
        if before:  # the same result again is the same file
            header = header.model_copy(update={"created": before[0].created})
        with AtomicOutput(output, force) as file:
            shape = key.job.residue_shape(header.values)
            writer = ContainerWriter(file, header.encode(), {RESIDUES: shape})
            rows = [accepted[name].rows for name in header.names]
            for piece in _products(key.job, rows, start, shape[0], work):
                writer.write(RESIDUES, piece)
            digest = writer.finish(header.kind, key.secrets.sign)
            file.sync()
            if not before:
                ledger.append(
                    AggregateEntry(
                        event="aggregate",
                        round=header.round,
                        base=header.base,
                        uploads={name: upload.digest for name, upload in sorted(accepted.items())},
                        content=content,
                        created=header.created,
                    )
                )
            file.commit()
    return AggregateReport(header, digest.hex(), refused)


def _start(
    key: Key,
    model: Path | None,
    initial: Path | None,
    stack: ExitStack,
    work: Work,
) -> Start | None:
    job = key.job
    if initial:
        weights = tensors.open_tensors(initial)
        stack.callback(weights.close)
        for reals in tensors.values(weights):  # refuse NaN and lack of headroom beforehand
            job.fixed_point.encode_weights(reals)
        digest = tensors.checked_initial_digest(weights)
        return Start(digest, digest, weights.layout, 0, {}, weights=initial)
    if model:
        container, header, digest = _open_result(key, model, stack, work)
        if header.kind != "model" or header.initial is None:
            raise FormatError(
                f"{model}: expected a model, found a sum",
                "a model is made with --initial first, then carried on with --model",
            )
        return Start(
            digest,
            header.initial,
            header.layout,
            header.round,
            dict(header.contributions),
            parent=digest,
            rows=container.rows(RESIDUES),
        )
    return None


def _open_result(
    key: Key, path: Path, stack: ExitStack, work: Work
) -> tuple[Container, ResultHeader, str]:
    """Open a sum or model of this server's own and verify it."""
    container = stack.enter_context(Container(path))
    header = read_header(container, ("model", "sum"), key.job.digest)
    if not isinstance(header, ResultHeader):
        raise FormatError(f"{path}: expected a model or sum")
    container.require({RESIDUES: key.job.residue_shape(header.values)})
    digest = container.verify(header.kind, key.job.server.sign, work.progress)
    return container, header, digest.hex()


def _accept(
    key: Key,
    paths: Sequence[Path],
    start: Start | None,
    skip_invalid: bool,
    stack: ExitStack,
    work: Work,
) -> tuple[dict[str, Upload], dict[str, str]]:
    """Check the uploads; returns the accepted by participant, the refused by file."""
    accepted: dict[str, Upload] = {}
    refused: dict[str, str] = {}
    for path in paths:
        try:
            upload = _check_upload(key.job, path, stack, work)
            if start:
                _check_base(upload, start)
            for other in accepted.values():
                _check_same(upload, other)
            known = accepted.get(upload.header.signer)
            if known:
                same = known.digest == upload.digest
                problem = "given twice" if same else f"a second upload of {upload.header.signer}"
                raise NotAllowedError(f"{path}: {problem} (besides {known.path})")
        except DtlError as error:
            if not skip_invalid or error.exit_code < FormatError.exit_code:
                raise
            refused[str(path)] = error.message
            continue
        accepted[upload.header.signer] = upload
    return accepted, refused


def _check_upload(job: Job, path: Path, stack: ExitStack, work: Work) -> Upload:
    """All that can be said of an upload by itself (protocol, sections 4 and 8)."""
    container = stack.enter_context(Container(path))
    header = read_header(container, ("upload",), job.digest)
    if not isinstance(header, UploadHeader):
        raise FormatError(f"{path}: expected an upload")
    signer = job.participant(header.signer)
    if signer is None:
        raise FormatError(f"{path}: {header.signer} is not in this job's roster")
    container.require({RESIDUES: job.residue_shape(header.values)})
    digest = container.verify(header.kind, signer.sign, work.progress)
    if header.roster != job.roster_digest:
        raise FormatError(f"{path}: made for another roster")
    if header.masked != job.masks:
        expected = "masked" if job.masks else "not masked"
        raise FormatError(f"{path}: expected an upload that is {expected}")
    rows = container.rows(RESIDUES)
    spans = _spans(job.groups(header.values), PRODUCT_GROUPS)
    checks = ((job.public_key, rows, *span) for span in spans)
    for _ in work.map(f"check {path.name}", _check_rows, checks, len(spans)):
        pass
    return Upload(path, header, digest.hex(), rows)


def _spans(rows: int, step: int) -> list[tuple[int, int]]:
    """(first, count) of pieces of `step` rows."""
    return [(first, min(step, rows - first)) for first in range(0, rows, step)]


def _read_groups(key: PublicKey, rows: Rows, first: int, count: int) -> Bytes:
    data = rows.read(first, count)
    return np.frombuffer(data, np.uint8).reshape(count, COMPONENTS + 1, key.arithmetic.width)


def _check_rows(key: PublicKey, rows: Rows, first: int, count: int) -> None:
    try:
        key.arithmetic.check(_read_groups(key, rows, first, count))
    except FormatError as error:
        last = first + count - 1
        raise FormatError(f"{rows.path}: groups {first} to {last}: {error.message}") from None


def _check_base(upload: Upload, start: Start) -> None:
    header = upload.header
    if header.base != start.base:
        raise FormatError(
            f"{upload.path}: based on another model: expected {start.base[:16]}..., "
            f"found {header.base[:16] + '...' if header.base else 'none'}"
        )
    if header.round <= start.round:
        raise FormatError(
            f"{upload.path}: made for round {header.round}, but the model is of round {start.round}"
        )
    if not same_shapes(header.layout, start.layout):
        raise FormatError(f"{upload.path}: its tensors are not those of the model")


def _check_same(upload: Upload, other: Upload) -> None:
    mine, theirs = upload.header, other.header
    for what, found, expected in (
        ("round", mine.round, theirs.round),
        ("base", mine.base, theirs.base),
    ):
        if found != expected:
            raise FormatError(
                f"{upload.path}: made for another {what} than {other.path}: "
                f"expected {_short(expected)}, found {_short(found)}"
            )
    if not same_shapes(mine.layout, theirs.layout):
        raise FormatError(f"{upload.path}: its tensors are not those of {other.path}")


def _short(value: int | str | None) -> str:
    return f"{value[:16]}..." if isinstance(value, str) else str(value)


def _check_first_upload(ledger: Ledger, name: str, upload: Upload) -> None:
    """One digest for a (job, round, participant), ever."""
    for entry in ledger.find(AggregateEntry, round=upload.header.round):
        known = entry.uploads.get(name)
        if known is not None and known != upload.digest:
            raise NotAllowedError(
                f"{upload.path}: a second upload of {name} for round {upload.header.round}",
                f"the first one, {known[:16]}..., stays the only one",
            )


def _check_quorum(job: Job, found: int, what: str, missing: set[str]) -> None:
    if found < job.min_contributors:
        absent = f"; missing: {', '.join(sorted(missing))}" if missing else ""
        raise QuorumError(f"expected at least {job.min_contributors} {what}, found {found}{absent}")


def _result_header(
    key: Key, uploads: list[Upload], start: Start | None
) -> tuple[ResultHeader, str]:
    """The signed manifest, and the hash of it without its time."""
    first = uploads[0].header
    names = sorted(upload.header.signer for upload in uploads)
    by_name = {upload.header.signer: upload.digest for upload in uploads}
    contributions = dict(start.contributions) if start else {}
    for name in names:
        contributions[name] = contributions.get(name, 0) + 1
    layout = start.layout if start else first.layout
    header = ResultHeader(
        format=FORMAT,
        kind="model" if start else "sum",
        job=key.job.digest,
        signer=SERVER,
        created=now(),
        round=first.round,
        layout=layout,
        values=first.values,
        parent=start.parent if start else first.base,
        initial=start.initial if start else None,
        contributors=tuple(Contribution(participant=n, upload=by_name[n]) for n in names),
        missing=tuple(sorted(set(key.job.names) - set(names))),
        contributions=dict(sorted(contributions.items())),
    )
    timeless = {name: value for name, value in header.plain().items() if name != "created"}
    content = primitives.hash_fields("dtl/v1/result", canonical_json.dumps(timeless))
    return header, content.hex()


def _products(
    job: Job,
    uploads: list[Rows],
    start: Start | None,
    groups: int,
    work: Work,
) -> Iterator[bytes]:
    """The result's residues, PRODUCT_GROUPS groups at a time."""
    blocks = (
        _initial_blocks(job, start.weights, PRODUCT_GROUPS) if start and start.weights else None
    )
    parent = start.rows if start else None

    spans = _spans(groups, PRODUCT_GROUPS)
    tasks = (
        (job.public_key, uploads, parent, next(blocks) if blocks else None, *span) for span in spans
    )
    yield from work.map("multiply", _product_chunk, tasks, len(spans))


def _product_chunk(
    key: PublicKey,
    uploads: list[Rows],
    parent: Rows | None,
    initial: Bytes | None,
    first: int,
    count: int,
) -> bytes:
    total = scheme.add(key, [_read_groups(key, rows, first, count) for rows in uploads])
    if parent is not None:
        total = scheme.subtract(key, _read_groups(key, parent, first, count), total)
    elif initial is not None:
        total = scheme.add_public(key, scheme.negate(key, total), initial)
    return total.tobytes()


def _initial_blocks(job: Job, weights: Path, groups: int) -> Iterator[Bytes]:
    """The public initial weights as blocks [G, 7, block width], `groups` groups at a time."""
    source = tensors.open_tensors(weights)
    try:
        size = groups * COMPONENTS * job.packing.slots
        for reals in tensors.in_batches(tensors.values(source), size):
            count = job.groups(reals.size)
            integers = job.fixed_point.encode_weights(reals)
            packed = job.packing.pack(integers, count * COMPONENTS)
            yield packed.reshape(count, COMPONENTS, -1)
    finally:
        source.close()


# --- release -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReleaseReport:
    """What `release` did."""

    header: ReleaseHeader
    digest: str


def release(
    key: Key,
    result: Path,
    output: Path,
    to: Sequence[str] | None = None,
    force: bool = False,
    work: Work = DEFAULT_WORK,
) -> ReleaseReport:
    """Take the server's half off a result and seal it for those who contributed.

    Protocol, section 8, step 3, and section 9. Grants go to everyone who contributed to at
    least one round of this model, or to those of them named in `to`; NotAllowedError for
    anybody else, and for a second, different result of a round or of a base.
    """
    key.require(SERVER)
    check_output(output, force)
    job = key.job
    with ExitStack() as stack:
        container, manifest, digest = _open_result(key, result, stack, work)
        _check_quorum(job, len(manifest.contributors), "contributors", set(manifest.missing))
        names = _grants(job, manifest, to)
        ledger = stack.enter_context(Ledger(key))
        _check_only_result(ledger, manifest, digest)

        shape = job.residue_shape(manifest.values)
        content_key = secrets.token_bytes(primitives.KEY_BYTES)
        encryption_key, commit = sealed.content_keys(content_key)
        core = sealed.release_core(manifest, names, shape, commit)
        header = ReleaseHeader(
            format=FORMAT,
            kind="release",
            job=job.digest,
            signer=SERVER,
            created=now(),
            round=manifest.round,
            of=digest,
            manifest=manifest,
            grants=tuple(_grant(job, name, content_key, core) for name in names),
            admitted=(),
            commit=commit,
        )
        length = primitives.sealed_length(shape[0] * job.group_bytes)
        with AtomicOutput(output, force) as file:
            writer = ContainerWriter(file, header.encode(), {SEALED: (length,)})
            half, rows = key.half, container.rows(RESIDUES)
            spans = _spans(shape[0], HALF_GROUPS)
            tasks = ((job.public_key, half, rows, *span) for span in spans)
            half_opened = work.map("apply the server's half", _half_chunk, tasks, len(spans))
            for chunk in sealed.seal_stream(encryption_key, core, half_opened):
                writer.write(SEALED, chunk)
            release_digest = writer.finish(header.kind, key.secrets.sign)
            file.sync()
            ledger.append(
                ReleaseEntry(
                    event="release",
                    round=manifest.round,
                    base=manifest.base,
                    result=digest,
                    grants=names,
                    admitted=(),
                )
            )
            file.commit()
    return ReleaseReport(header, release_digest.hex())


def _grants(job: Job, manifest: ResultHeader, to: Sequence[str] | None) -> tuple[str, ...]:
    eligible = set(manifest.contributions)
    wanted = set(eligible if to is None else to)
    unknown = wanted - set(job.names)
    if unknown:
        raise UsageError(f"not in this job's roster: {', '.join(sorted(unknown))}")
    if not wanted:
        raise UsageError("nobody to release to")
    strangers = wanted - eligible
    if strangers:
        raise NotAllowedError(
            f"never contributed to this model: {', '.join(sorted(strangers))}",
            "the model is released only to those who took part",
        )
    return tuple(sorted(wanted))


def _check_only_result(ledger: Ledger, manifest: ResultHeader, digest: str) -> None:
    for entry in ledger.entries:
        if not isinstance(entry, ReleaseEntry) or entry.result == digest:
            continue
        if entry.round == manifest.round:
            raise NotAllowedError(
                f"another result of round {manifest.round} was released already",
                f"only {entry.result[:16]}... may be released for this round",
            )
        if manifest.base is not None and entry.base == manifest.base:
            raise NotAllowedError(
                f"another result on the same base was released in round {entry.round}",
                "two results on one base differ by what their contributors differ in",
            )


def _grant(job: Job, name: str, content_key: bytes, core: bytes) -> Grant:
    participant = job.participant(name)
    if participant is None:
        raise VerificationError(f"{name} is not in this job's roster")
    info = sealed.grant_info(core, name, participant.hpke, job.server.sign)
    return Grant(
        participant=name, wrapped=primitives.hpke_wrap(participant.hpke, content_key, info)
    )


def _half_chunk(key: PublicKey, half: tuple[int, ...], rows: Rows, first: int, count: int) -> bytes:
    return scheme.apply_half(key, _read_groups(key, rows, first, count), half).tobytes()
