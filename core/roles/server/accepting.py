"""What the server accepts: each upload checked, one a participant and round, enough of them."""

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dtl.core.errors import DtlError, FormatError, NotAllowedError, QuorumError
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import AggregateEntry, CloseEntry, Ledger
from dtl.core.parallel import Work
from dtl.core.public import results, uploads
from dtl.core.public.results import Start
from dtl.core.public.uploads import Upload


@dataclass(frozen=True)
class Round:
    """What goes into a result besides the uploads."""

    model: Path | None = None
    initial: Path | None = None
    close: Path | None = None
    reveals: Sequence[Path] = ()
    skip_invalid: bool = False


def accept(
    job: Job,
    paths: Sequence[Path],
    start: Start | None,
    skip_invalid: bool,
    stack: ExitStack,
    work: Work,
    closing: bool = False,
) -> tuple[list[Upload], dict[str, str]]:
    """Check the uploads; returns the accepted, and the reasons by refused file.

    With `skip_invalid`, uploads of another round, base or layout than most are refused; else
    the first one that differs from the one named first is an error. Words of bodies are checked
    here only with `skip_invalid` or when `closing` a round: who adds them up finds them anyway.
    """
    refused: dict[str, str] = {}

    def passes(check: Callable[[], object], path: Path) -> bool:
        try:
            check()
        except DtlError as error:
            if not skip_invalid or error.exit_code < FormatError.exit_code:
                raise
            refused[str(path)] = error.message
            return False
        return True

    opened: list[Upload] = []
    for path in paths:

        def open_one(path: Path = path) -> None:
            opened.append(uploads.open_upload(job, path, stack, work))

        passes(open_one, path)

    def fits(upload: Upload) -> bool:
        return start is None or passes(lambda: results.check_base(upload, start), upload.path)

    based = [upload for upload in opened if fits(upload)]
    reference = _commonest(based) if skip_invalid else next(iter(based), None)
    accepted: list[Upload] = []
    for upload, fault in zip(based, uploads.check_proofs(job, based, work), strict=True):

        def check(upload: Upload = upload, fault: DtlError | None = fault) -> None:
            if reference:
                uploads.check_same(upload, reference)
            if fault is not None:
                raise fault
            if skip_invalid or closing:
                uploads.check_body(job, upload.body, upload.header.values, work)
            uploads.check_only(upload, accepted)

        if passes(check, upload.path):
            accepted.append(upload)
    return accepted, refused


def _commonest(opened: Sequence[Upload]) -> Upload | None:
    """An upload of the round, base and tensors that most participants made one for."""

    def statement(upload: Upload) -> tuple[object, ...]:
        header = upload.header
        return header.round, header.base, tuple((s.name, s.shape) for s in header.layout)

    counts = Counter(text for _, text in {(u.header.signer, statement(u)) for u in opened})
    return max(opened, key=lambda upload: counts[statement(upload)], default=None)


def missing_of(job: Job, accepted: Sequence[Upload]) -> list[str]:
    """Who of the roster has no accepted upload."""
    present = {upload.header.signer for upload in accepted}
    return [name for name in job.names if name not in present]


def digests_of(accepted: Sequence[Upload]) -> dict[str, str]:
    """Upload digests by participant, in order."""
    return {u.header.signer: u.digest for u in sorted(accepted, key=lambda u: u.header.signer)}


def check_first_upload(ledger: Ledger, upload: Upload) -> None:
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


def how_to_go_on(
    key: Key, accepted: Sequence[Upload], given: Round, output: Path | None
) -> QuorumError:
    """The error for masked uploads with somebody missing, with the commands that help."""
    job = key.job
    number = accepted[0].header.round
    problem = f"round {number}: missing: {', '.join(missing_of(job, accepted))}"
    if not results.can_close(job, len(accepted)):
        needed = 2 * len(job.participants) // 3 + 1
        return QuorumError(
            f"{problem}; expected at least {max(needed, job.min_contributors)} of "
            f"{len(job.participants)} to go on without the others, found {len(accepted)}",
            results.WAIT_OR_VOID,
        )
    names = [upload.header.signer for upload in accepted]
    files = " ".join(shlex.quote(str(upload.path)) for upload in accepted)
    close = f"round-{number}.close"
    reveals = [f"{name}-{number}.reveal" for name in names]
    own = shlex.quote(str(key.path))
    source = f" --model {shlex.quote(str(given.model))}" if given.model else ""
    source += f" --initial {shlex.quote(str(given.initial))}" if given.initial else ""
    target = shlex.quote(str(output or f"result-{number}.enc"))
    lines = [
        "wait for them, or go on without them; their masks have to be taken off:",
        f"  server: dtl close-round {files} --key {own} -o {close}",
        *(
            f"  {name}: dtl reveal-masks {close} --key {_key_of(key, name)} -o {reveal}"
            for name, reveal in zip(names, reveals, strict=True)
        ),
        f"  server: dtl aggregate {files} --key {own}{source} --close {close} "
        f"--reveals {' '.join(reveals)} -o {target}",
    ]
    return QuorumError(problem, "\n".join(lines))


def _key_of(key: Key, name: str) -> str:
    """Where a participant's key is: beside the server's where all keys lie together."""
    beside = key.path.with_name(f"{name}.key")
    return shlex.quote(str(beside)) if beside.exists() else f"{name}.key"
