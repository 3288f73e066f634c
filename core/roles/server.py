"""The parameter server: checks uploads, multiplies ciphertexts, releases what it cannot read."""

import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from dtl.core.crypto import masks, primitives, scheme
from dtl.core.crypto.group import PublicKey
from dtl.core.errors import DtlError, FormatError, NotAllowedError, QuorumError, UsageError
from dtl.core.files import canonical_json, sealed
from dtl.core.files.atomic import AtomicOutput, check_output
from dtl.core.files.closing import Close, Reveal
from dtl.core.files.container import RESIDUES, SEALED, ContainerWriter, Rows
from dtl.core.files.documents import SERVER, Job, Key
from dtl.core.files.headers import Contribution, Grant, ReleaseHeader, ResultHeader, now
from dtl.core.files.ledger import AggregateEntry, CloseEntry, Ledger, ReleaseEntry
from dtl.core.files.schema import FORMAT
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.public import results, uploads
from dtl.core.public.results import Start
from dtl.core.public.uploads import Upload

HALF_GROUPS = 16  # groups a task when the half is applied


@dataclass(frozen=True)
class Round:
    """What goes into a result besides the uploads."""

    model: Path | None = None
    initial: Path | None = None
    close: Path | None = None
    reveals: Sequence[Path] = ()
    skip_invalid: bool = False


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
        accepted, refused = _accept(job, paths, start, given.skip_invalid, stack, work)
        ledger = stack.enter_context(Ledger(key))
        for upload in accepted:
            _check_first_upload(ledger, upload)
        missing = _missing(job, accepted)
        results.check_quorum(job, len(accepted), "accepted uploads", missing)
        orphans = _orphans(job, accepted, given, closing, ledger)

        layout = start.layout if start else accepted[0].header.layout
        header = results.manifest(job, accepted, start, layout, now())
        content = _content(header)
        before = ledger.find(AggregateEntry, content=content)
        if before:  # the same result again is the same file
            header = header.model_copy(update={"created": before[0].created})
        with AtomicOutput(output, force) as file:
            shape = job.residue_shape(header.values)
            writer = ContainerWriter(file, header.encode(), {RESIDUES: shape})
            for piece in results.products(job, accepted, start, orphans, work):
                writer.write(RESIDUES, piece)
            digest = writer.finish(header.kind, key.secrets.sign)
            file.sync()
            if not before:
                ledger.append(
                    AggregateEntry(
                        event="aggregate",
                        round=header.round,
                        base=header.base,
                        uploads=_digests(accepted),
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


def _accept(
    job: Job,
    paths: Sequence[Path],
    start: Start | None,
    skip_invalid: bool,
    stack: ExitStack,
    work: Work,
) -> tuple[list[Upload], dict[str, str]]:
    """Check the uploads; returns the accepted, and the reasons by refused file."""
    accepted: list[Upload] = []
    refused: dict[str, str] = {}
    for path in paths:
        try:
            upload = uploads.open_upload(job, path, stack, work)
            if start:
                results.check_base(upload, start)
            for other in accepted[:1]:
                uploads.check_same(upload, other)
            uploads.check_proof(job, upload, work)
            uploads.check_only(upload, accepted)
        except DtlError as error:
            if not skip_invalid or error.exit_code < FormatError.exit_code:
                raise
            refused[str(path)] = error.message
            continue
        accepted.append(upload)
    return accepted, refused


def _missing(job: Job, accepted: Sequence[Upload]) -> list[str]:
    present = {upload.header.signer for upload in accepted}
    return [name for name in job.names if name not in present]


def _digests(accepted: Sequence[Upload]) -> dict[str, str]:
    return {u.header.signer: u.digest for u in sorted(accepted, key=lambda u: u.header.signer)}


def _content(header: ResultHeader) -> str:
    """The hash of a manifest without its time."""
    timeless = {name: value for name, value in header.plain().items() if name != "created"}
    return primitives.hash_fields("dtl/v1/result", canonical_json.dumps(timeless)).hex()


def _check_first_upload(ledger: Ledger, upload: Upload) -> None:
    """One digest for a (job, round, participant), ever."""
    name, number = upload.header.signer, upload.header.round
    entries: list[AggregateEntry | CloseEntry] = [
        *ledger.find(AggregateEntry, round=number),
        *ledger.find(CloseEntry, round=number),
    ]
    for entry in entries:
        if entry.uploads.get(name, upload.digest) != upload.digest:
            raise NotAllowedError(
                f"{upload.path}: a second upload of {name} for round {number}",
                f"the first one, {entry.uploads[name][:16]}..., stays the only one",
            )
        if isinstance(entry, CloseEntry) and name not in entry.uploads:
            raise NotAllowedError(
                f"{upload.path}: round {number} was closed without {name}",
                "nothing is accepted for a closed round any more",
            )


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
    job: Job,
    accepted: Sequence[Upload],
    given: Round,
    closing: _Closing | None,
    ledger: Ledger,
) -> list[masks.Key]:
    """The masks to take off because somebody is missing; QuorumError where that cannot be."""
    if closing is None:
        missing = _missing(job, accepted)
        if job.masks and missing:
            raise _how_to_go_on(job, accepted, given, missing)
        return []
    close = closing.close
    results.check_close(job, close, accepted, closing.path)
    closed = ledger.find(CloseEntry, round=close.round)
    if closed and closed[0].digest != close.digest:
        raise FormatError(f"{closing.path}: not the close file of round {close.round}")
    here = _digests(accepted)
    for name, digest in here.items():
        if close.uploads.get(name) != digest:
            raise NotAllowedError(f"the upload of {name} is not the one in {closing.path}")
    absent = sorted(set(close.names) - set(here))
    if absent:
        raise QuorumError(f"no upload of {', '.join(absent)}, who is in {closing.path}")
    return results.orphaned_masks(close.missing, accepted, closing.reveals, close.digest)


def _how_to_go_on(
    job: Job, accepted: Sequence[Upload], given: Round, missing: Sequence[str]
) -> QuorumError:
    """The error for masked uploads with somebody missing, with the commands that help."""
    number = accepted[0].header.round
    problem = f"round {number}: missing: {', '.join(missing)}"
    if not results.can_close(job, len(accepted)):
        needed = 2 * len(job.participants) // 3 + 1
        return QuorumError(
            f"{problem}; expected at least {max(needed, job.min_contributors)} of "
            f"{len(job.participants)} to go on without the others, found {len(accepted)}",
            "wait for the missing uploads; or the round is void, and a new one on the same base "
            "is begun, everyone with --accept-differencing",
        )
    names = [upload.header.signer for upload in accepted]
    files = " ".join(str(upload.path) for upload in accepted)
    close = f"round-{number}.close"
    source = f" --model {given.model}" if given.model else ""
    source = f" --initial {given.initial}" if given.initial else source
    lines = [
        "wait for them, or go on without them (their masks have to be taken off):",
        f"  server: dtl close-round {files} --key server.key -o {close}",
        *(
            f"  {name}: dtl reveal-masks {close} --key {name}.key -o {name}-{number}.reveal"
            for name in names
        ),
        f"  server: dtl aggregate {files} --key server.key{source} --close {close} "
        f"--reveals {' '.join(f'{name}-{number}.reveal' for name in names)} -o OUT",
    ]
    return QuorumError(problem, "\n".join(lines))


# --- close a round -----------------------------------------------------------------------------


def close_round(
    key: Key,
    paths: Sequence[Path],
    output: Path,
    force: bool = False,
    work: Work = DEFAULT_WORK,
) -> Close:
    """Declare who is in and who is missing; nothing is accepted for that round any more.

    Protocol, section 7. Raises QuorumError unless enough are in: at least
    `min_contributors`, and more than two thirds of the roster.
    """
    key.require(SERVER)
    check_output(output, force)
    job = key.job
    if not job.masks:
        raise UsageError("this job has no masks: aggregate without closing the round")
    with ExitStack() as stack:
        accepted, _ = _accept(job, paths, None, False, stack, work)
        ledger = stack.enter_context(Ledger(key))
        for upload in accepted:
            _check_first_upload(ledger, upload)
        missing = _missing(job, accepted)
        if not missing:
            raise UsageError("nobody is missing: aggregate without closing the round")
        if not results.can_close(job, len(accepted)):
            raise _how_to_go_on(job, accepted, Round(), missing)
        first, digests = accepted[0].header, _digests(accepted)
        before = ledger.find(CloseEntry, round=first.round)
        if before and (before[0].uploads, before[0].base) != (digests, first.base):
            raise NotAllowedError(f"round {first.round} was closed already, with other uploads")
        close = Close.signed(
            key.secrets.sign,
            format=FORMAT,
            kind="close",
            job=job.digest,
            signer=SERVER,
            created=before[0].created if before else now(),
            round=first.round,
            base=first.base,
            contributors=tuple(
                Contribution(participant=name, upload=digest) for name, digest in digests.items()
            ),
            missing=tuple(missing),
        )
        with AtomicOutput(output, force) as file:
            file.write(close.encode())
            file.sync()
            if not before:
                ledger.append(
                    CloseEntry(
                        event="close",
                        round=close.round,
                        base=close.base,
                        uploads=digests,
                        digest=close.digest,
                        created=close.created,
                    )
                )
            file.commit()
    return close


# --- release -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """To whom a result is released; without any of it, to all who ever contributed."""

    to: Sequence[str] | None = None
    min_rounds: int | None = None
    min_share: float | None = None
    admit: Sequence[str] = ()
    accept_differencing: bool = False

    def check(self) -> None:
        """Raise UsageError for impossible bounds."""
        if self.min_rounds is not None and self.min_rounds < 1:
            raise UsageError(f"--min-rounds: expected at least 1, found {self.min_rounds}")
        if self.min_share is not None and not 0 < self.min_share <= 1:
            raise UsageError(f"--min-share: expected a share up to 1, found {self.min_share}")


@dataclass(frozen=True)
class ReleaseReport:
    """What `release` did."""

    header: ReleaseHeader
    digest: str


def release(
    key: Key,
    result: Path,
    output: Path,
    policy: Policy,
    force: bool = False,
    work: Work = DEFAULT_WORK,
) -> ReleaseReport:
    """Take the server's half off a result and seal it for those who contributed.

    Protocol, section 8, step 3, and section 9. NotAllowedError for anybody who neither
    contributed nor can be admitted, and for a second, different result of a round or base.
    """
    key.require(SERVER)
    policy.check()
    check_output(output, force)
    job = key.job
    with ExitStack() as stack:
        opened = results.open_result(job, result, stack, work)
        found, digest = opened.header, opened.digest
        results.check_quorum(job, len(found.contributors), "contributors", found.missing)
        ledger = stack.enter_context(Ledger(key))
        admitted = _admitted(job, found, digest, policy, ledger)
        names = tuple(sorted({*_grants(job, found, digest, policy, ledger), *admitted}))
        _check_only_result(ledger, found, digest, policy.accept_differencing)

        shape = job.residue_shape(found.values)
        content_key = secrets.token_bytes(primitives.KEY_BYTES)
        encryption_key, commit = sealed.content_keys(content_key)
        core = sealed.release_core(found, names, shape, commit)
        header = ReleaseHeader(
            format=FORMAT,
            kind="release",
            job=job.digest,
            signer=SERVER,
            created=now(),
            round=found.round,
            of=digest,
            manifest=found,
            grants=tuple(_grant(job, name, content_key, core) for name in names),
            admitted=admitted,
            commit=commit,
        )
        length = primitives.sealed_length(shape[0] * job.group_bytes)
        with AtomicOutput(output, force) as file:
            writer = ContainerWriter(file, header.encode(), {SEALED: (length,)})
            half, pieces = key.half, uploads.spans(shape[0], HALF_GROUPS)
            tasks = ((job.public_key, half, opened.rows, *piece) for piece in pieces)
            half_opened = work.map("apply the server's half", _half_chunk, tasks, len(pieces))
            for chunk in sealed.seal_stream(encryption_key, core, half_opened):
                writer.write(SEALED, chunk)
            release_digest = writer.finish(header.kind, key.secrets.sign)
            file.sync()
            ledger.append(
                ReleaseEntry(
                    event="release",
                    round=found.round,
                    base=found.base,
                    result=digest,
                    grants=names,
                    admitted=admitted,
                )
            )
            file.commit()
    return ReleaseReport(header, release_digest.hex())


def _grants(
    job: Job, found: ResultHeader, digest: str, policy: Policy, ledger: Ledger
) -> tuple[str, ...]:
    """Who gets the result for having contributed to it."""
    unknown = sorted(set(policy.to or ()) - set(job.names))
    if unknown:
        raise UsageError(f"not in this job's roster: {', '.join(unknown)}")
    least: float = policy.min_rounds or 1
    if policy.min_share is not None:
        least = max(least, policy.min_share * _rounds_of(found, digest, ledger))
    eligible = {name for name, rounds in found.contributions.items() if rounds >= least}
    wanted = set(eligible if policy.to is None else policy.to) - set(policy.admit)
    strangers = sorted(wanted - eligible)
    if strangers:
        known = all(name in found.contributions for name in strangers)
        raise NotAllowedError(
            f"{'contributed too little to' if known else 'never contributed to'} this model: "
            f"{', '.join(strangers)}",
            "the model is released only to those who took part; --admit NAME lets somebody in "
            "once who cannot have contributed yet",
        )
    if not wanted and not policy.admit:
        raise NotAllowedError("nobody has contributed enough to get this result")
    return tuple(sorted(wanted))


def _rounds_of(found: ResultHeader, digest: str, ledger: Ledger) -> int:
    """How many rounds a model has behind it: its chain in the server's ledger."""
    rounds, current = 0, digest
    while entries := ledger.find(AggregateEntry, result=current):
        rounds += 1
        base = entries[0].base
        if found.kind == "sum" or base is None:
            break
        current = base
    return max(1, rounds, *found.contributions.values())


def _admitted(
    job: Job, found: ResultHeader, digest: str, policy: Policy, ledger: Ledger
) -> tuple[str, ...]:
    """Who gets the result without having contributed: once, so that it can contribute next."""
    names = sorted(set(policy.admit))
    for name in names:
        if job.participant(name) is None:
            raise UsageError(f"not in this job's roster: {name}")
        if name in found.contributions:
            raise UsageError(f"--admit {name}: has contributed, and needs no admission")
        for entry in ledger.find(ReleaseEntry):
            if name in entry.admitted and entry.result != digest:
                raise NotAllowedError(
                    f"{name} was admitted in round {entry.round} already",
                    "an admission is given once, and lapses without a contribution",
                )
    return tuple(names)


def _check_only_result(
    ledger: Ledger, found: ResultHeader, digest: str, accept_differencing: bool
) -> None:
    for entry in ledger.find(ReleaseEntry):
        if entry.result == digest:
            continue
        if entry.round == found.round:
            raise NotAllowedError(
                f"another result of round {found.round} was released already",
                f"only {entry.result[:16]}... may be released for this round",
            )
        if found.base is not None and entry.base == found.base and not accept_differencing:
            raise NotAllowedError(
                f"another result on the same base was released in round {entry.round}",
                "two results on one base differ by what their contributors differ in; "
                "--accept-differencing releases this one all the same",
            )


def _grant(job: Job, name: str, content_key: bytes, core: bytes) -> Grant:
    participant = job.participant(name)
    if participant is None:
        raise FormatError(f"{name} is not in this job's roster")
    info = sealed.grant_info(core, name, participant.hpke, job.server.sign)
    return Grant(
        participant=name, wrapped=primitives.hpke_wrap(participant.hpke, content_key, info)
    )


def _half_chunk(key: PublicKey, half: tuple[int, ...], rows: Rows, first: int, count: int) -> bytes:
    return scheme.apply_half(key, uploads.read_groups(key, rows, first, count), half).tobytes()
