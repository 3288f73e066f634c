"""The server adds up uploads that it cannot read (protocol, section 8, step 2)."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from dtl.core.crypto import masks, primitives
from dtl.core.errors import FormatError, NotAllowedError, QuorumError, UsageError
from dtl.core.files import canonical_json
from dtl.core.files.atomic import AtomicOutput, check_output
from dtl.core.files.closing import Close, Reveal
from dtl.core.files.container import BODY, RESIDUES, ContainerWriter
from dtl.core.files.headers import ResultHeader, now
from dtl.core.files.job_file import SERVER, Job
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import AggregateEntry, CloseEntry, Ledger
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.public import results
from dtl.core.public.results import Start
from dtl.core.public.uploads import Upload
from dtl.core.roles.server.accepting import (
    Round,
    accept,
    check_first_upload,
    digests_of,
    how_to_go_on,
    missing_of,
)


@dataclass(frozen=True)
class AggregateReport:
    """What `aggregate` did."""

    header: ResultHeader
    digest: str
    refused: dict[str, str] = field(default_factory=dict)


def aggregate(
    key: Key,
    paths: Sequence[Path],
    output: Path,
    given: Round,
    force: bool = False,
    work: Work = DEFAULT_WORK,
) -> AggregateReport:
    """Check every upload, then multiply: a sum, or the next encrypted model W <- W - sum.

    Protocol, section 8, step 2. Raises what the first failing check calls for; with
    `skip_invalid` goes on without the files that fail a check of their own.
    """
    key.require(SERVER)
    if given.model and given.initial:
        raise UsageError("--model and --initial exclude one another")
    check_output(output, force)
    job = key.job
    with ExitStack() as stack:
        closing = _closing(job, given)
        start = _start(job, given, stack, work)
        accepted, refused = accept(job, paths, start, given.skip_invalid, stack, work)
        ledger = stack.enter_context(Ledger(key))
        for upload in list(accepted):
            try:
                check_first_upload(ledger, upload)
            except NotAllowedError as error:
                if not given.skip_invalid:
                    raise
                refused[str(upload.path)] = error.message
                accepted.remove(upload)
        missing = missing_of(job, accepted)
        results.check_quorum(job, len(accepted), "accepted uploads", missing)
        orphans = _orphans(key, accepted, given, closing, ledger, output)

        layout = start.layout if start else results.in_order(accepted)[0].header.layout
        header = results.manifest(job, accepted, start, layout, now())
        content = _content(header)
        before = ledger.find(AggregateEntry, content=content)
        if before:  # the same result again is the same file
            header = header.model_copy(update={"created": before[0].created})
        with AtomicOutput(output, force) as file:
            writer = ContainerWriter(file, header.encode(), job.result_shapes(header.values))
            for piece in results.residues(job, accepted, start, orphans, work):
                writer.write(RESIDUES, piece)
            for piece in results.bodies(job, accepted, start, orphans, work):
                writer.write(BODY, piece)
            digest = writer.finish(header.kind, key.secrets.sign)
            file.sync()
            if not before:
                ledger.append(
                    AggregateEntry(
                        event="aggregate",
                        round=header.round,
                        base=header.base,
                        uploads=digests_of(accepted),
                        content=content,
                        created=header.created,
                        result=digest.hex(),
                    )
                )
            file.commit()
    return AggregateReport(header, digest.hex(), refused)


def _start(job: Job, given: Round, stack: ExitStack, work: Work) -> Start | None:
    if given.initial:
        return results.start_from_weights(job, given.initial)
    if given.model:
        return results.open_result(job, given.model, stack, work).start()
    return None


def _content(header: ResultHeader) -> str:
    """The hash of a manifest without its time."""
    timeless = {name: value for name, value in header.plain().items() if name != "created"}
    return primitives.hash_fields("dtl/v2/result", canonical_json.dumps(timeless)).hex()


@dataclass(frozen=True)
class _Closing:
    """A close file and the reveals that answer it, their signatures checked."""

    path: Path
    close: Close
    reveals: Sequence[tuple[Path, Reveal]]


def _closing(job: Job, given: Round) -> _Closing | None:
    if given.close is None:
        if given.reveals:
            raise UsageError("--reveals: only with --close")
        return None
    close = Close.load(given.close, job)
    return _Closing(given.close, close, [(path, Reveal.load(path, job)) for path in given.reveals])


def _orphans(
    key: Key,
    accepted: Sequence[Upload],
    given: Round,
    closing: _Closing | None,
    ledger: Ledger,
    output: Path,
) -> list[masks.Key]:
    """The masks to take off because somebody is missing; QuorumError where that cannot be."""
    job = key.job
    if closing is None:
        if job.masks and missing_of(job, accepted):
            raise how_to_go_on(key, accepted, given, output)
        return []
    close = closing.close
    results.check_close(job, close, accepted, closing.path)
    closed = ledger.find(CloseEntry, round=close.round)
    if not closed or closed[0].digest != close.digest:
        raise FormatError(f"{closing.path}: not the close file of round {close.round}")
    here = digests_of(accepted)
    for name, digest in here.items():
        if close.uploads.get(name) != digest:
            raise NotAllowedError(f"the upload of {name} is not the one in {closing.path}")
    absent = sorted(set(close.names) - set(here))
    if absent:
        raise QuorumError(f"no upload of {', '.join(absent)}, who is in {closing.path}")
    return results.orphaned_masks(close.missing, accepted, closing.reveals, close.digest)
