"""What a participant's ledger says of a model that it keeps itself (jobs of sums).

The server only adds gradients up there; every participant takes the same step along the opened
sum. Its ledger holds the content of each model, so that nobody trains on another one unnoticed.
Source: PROTOCOL.md, section 8.5.
"""

from dtl.core.errors import NotAllowedError, UsageError, VerificationError
from dtl.core.files.job_file import Job
from dtl.core.files.ledger import Ledger, OpenEntry, StepEntry, UploadEntry
from dtl.core.files.tensors import Loaded
from dtl.core.roles.participant.basis import record_step


def opened_sum(ledger: Ledger, total: Loaded) -> OpenEntry:
    """The entry of the sum that a file holds.

    Raises NotAllowedError for a sum that this key has not opened, VerificationError for
    tensors that are not the ones that were opened.
    """
    known = total.metadata
    entries = ledger.find(OpenEntry, kind="sum", result=known.base) if known else []
    if not entries:
        raise NotAllowedError(
            f"{total.path}: not a sum that this key has opened",
            "open the release yourself (dtl open-model)",
        )
    if total.content != entries[0].content:
        raise VerificationError(
            f"{total.path}: not the sum that was opened: its tensors were changed",
            "take the file that open-model wrote, or open the release again",
        )
    return entries[0]


def check_model_before(ledger: Ledger, opened: OpenEntry, model: Loaded) -> None:
    """Raise unless `model` is what the contributions to an opened sum were computed on.

    NotAllowedError for a model that the ledger does not know, VerificationError for one whose
    tensors are not the ones in the ledger. A sum without a parent names no model.
    """
    if opened.parent is None:
        return
    pinned = {e.base for e in ledger.find(UploadEntry) if e.base and e.base == e.opened}
    if opened.parent in pinned:
        if model.initial != opened.parent:
            raise VerificationError(
                f"{model.path}: not the initial weights that the first upload was based on",
                f"expected {opened.parent[:16]}..., found {model.initial[:16]}...",
            )
        return
    steps = ledger.find(StepEntry, sum=opened.parent)
    if not steps:
        raise NotAllowedError(
            f"{model.path}: the ledger does not know the model before the sum of round "
            f"{opened.round}",
            "who joins late takes the model after the sum from a participant that it trusts, and "
            "records it with apply-sum --adopt NAME",
        )
    if model.content not in [step.content for step in steps]:
        raise VerificationError(
            f"{model.path}: not the model in the ledger: its tensors were changed",
            "take the file that apply-sum wrote",
        )


def check_adopted(job: Job, name: str, total: Loaded, model: Loaded) -> None:
    """Raise unless a model may be taken over from participant `name` as the one after a sum."""
    if job.participant(name) is None:
        raise UsageError(
            f"--adopt: {name} is not in this job's roster",
            f"its participants are {', '.join(job.names)}",
        )
    base = total.metadata.base if total.metadata else None
    if model.metadata is not None and model.metadata.base != base:
        raise VerificationError(
            f"{model.path}: not the model after the sum {total.path}",
            "ask for the file that apply-sum wrote for this very sum",
        )


def record_model(ledger: Ledger, opened: OpenEntry, content: str, adopted_from: str | None) -> None:
    """Record the model after the step along a sum.

    Raises NotAllowedError for another content than the one that is recorded for that sum.
    """
    source = f"adopt:{adopted_from}" if adopted_from else "apply-sum"
    record_step(
        ledger,
        StepEntry(
            event="step", round=opened.round, sum=opened.result, content=content, source=source
        ),
    )
