"""The server goes on without those who are missing (protocol, section 7)."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from dtl.core.errors import NotAllowedError, UsageError
from dtl.core.files.atomic import AtomicOutput, check_output
from dtl.core.files.closing import Close
from dtl.core.files.headers import Contribution, now
from dtl.core.files.job_file import SERVER
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import AggregateEntry, CloseEntry, Ledger, ReleaseEntry
from dtl.core.files.schema import FORMAT
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.public import results
from dtl.core.roles.server.accepting import (
    Round,
    accept,
    check_first_upload,
    digests_of,
    how_to_go_on,
    missing_of,
)


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
        accepted, _ = accept(job, paths, None, False, stack, work, closing=True)
        ledger = stack.enter_context(Ledger(key))
        for upload in accepted:
            check_first_upload(ledger, upload)
        missing = missing_of(job, accepted)
        if not missing:
            raise UsageError("nobody is missing: aggregate without closing the round")
        if not results.can_close(job, len(accepted)):
            raise how_to_go_on(key, accepted, Round(), None)
        first, digests = accepted[0].header, digests_of(accepted)
        _check_open(ledger, first.round, set(digests))
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


def _check_open(ledger: Ledger, number: int, present: set[str]) -> None:
    """Raise NotAllowedError for a round that was released, or added up with somebody missing now.

    The two sums would differ in that participant's input alone.
    """
    if ledger.find(ReleaseEntry, round=number):
        raise NotAllowedError(f"round {number} was released already, and cannot be closed any more")
    for entry in ledger.find(AggregateEntry, round=number):
        if not set(entry.uploads) <= present:
            absent = ", ".join(sorted(set(entry.uploads) - present))
            raise NotAllowedError(
                f"round {number} was added up with {absent} already",
                "release that result; or begin a new round on the same base",
            )
