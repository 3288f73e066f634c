"""What a participant's ledger says of a model that it keeps itself (jobs of sums).

The server only adds gradients up there; every participant takes the same step along the opened
sum. Its ledger holds the content of each model, so that nobody trains on another one unnoticed.
Source: PROTOCOL.md, section 8.5.
"""

from dataclasses import dataclass
from pathlib import Path

from dtl.core.errors import NotAllowedError, UsageError, VerificationError
from dtl.core.files import tensors
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger, OpenEntry, StepEntry, UploadEntry
from dtl.core.files.tensors import PlainMetadata
from dtl.core.roles.participant.basis import record_step


@dataclass(frozen=True)
class StepOptions:
    """Whose word a model rests on: nobody's but this key's own, or that of `adopt`."""

    adopt: str | None = None


def check_step(ledger: Ledger, total: Path, model: Path) -> OpenEntry:
    """Hold a sum, and the model before its step, against the ledger; returns the sum's entry.

    Raises NotAllowedError for a sum that this key has not opened, or a model that it does not
    know, VerificationError for tensors that are not the ones in the ledger.
    """
    metadata, content = _content(total)
    opened = _opened_sum(ledger, metadata, total)
    if content != opened.content:
        raise VerificationError(
            f"{total}: not the sum that was opened: its tensors were changed",
            "take the file that open-model wrote, or open the release again",
        )
    if opened.parent is None:
        return opened  # uploads without a base name no model
    held, initial = _digests(model)
    pinned = {e.base for e in ledger.find(UploadEntry) if e.base and e.base == e.opened}
    if opened.parent in pinned:
        if initial != opened.parent:
            raise VerificationError(
                f"{model}: not the initial weights that the first upload was based on",
                f"expected {opened.parent[:16]}..., found {initial[:16]}...",
            )
        return opened
    steps = ledger.find(StepEntry, sum=opened.parent)
    if not steps:
        raise NotAllowedError(
            f"{model}: the ledger does not know the model before the sum of round {opened.round}",
            "somebody who joins late takes the model from a participant that it trusts: "
            "apply-sum --adopt NAME records it",
        )
    if held not in [step.content for step in steps]:
        raise VerificationError(
            f"{model}: not the model in the ledger: its tensors were changed",
            "take the file that apply-sum wrote",
        )
    return opened


def record_model(key: Key, total: Path, model: Path, options: StepOptions) -> str:
    """Record the model after the step along a sum; returns its content.

    Raises NotAllowedError for another content than the one that is recorded for that sum.
    """
    key.require("participant")
    if options.adopt is not None and key.job.participant(options.adopt) is None:
        raise UsageError(
            f"--adopt: {options.adopt} is not in this job's roster",
            f"its participants are {', '.join(key.job.names)}",
        )
    with Ledger(key) as ledger:
        opened = _opened_sum(ledger, _content(total)[0], total)
        content = _content(model)[1]
        source = f"adopt:{options.adopt}" if options.adopt else "apply-sum"
        record_step(
            ledger,
            StepEntry(
                event="step", round=opened.round, sum=opened.result, content=content, source=source
            ),
        )
    return content


def _content(path: Path) -> tuple[PlainMetadata | None, str]:
    """What a plain file says of itself, and the content of its tensors."""
    source = tensors.open_tensors(path)
    try:
        return source.metadata, tensors.content_digest(source)
    finally:
        source.close()


def _digests(path: Path) -> tuple[str, str]:
    """The content of a file's tensors, and V0 of the same tensors."""
    source = tensors.open_tensors(path)
    try:
        digest = tensors.ContentDigest(source.layout)
        for _ in tensors.raw_pieces(source, digest):
            pass
        return digest.hexdigest(), digest.initial()
    finally:
        source.close()


def _opened_sum(ledger: Ledger, metadata: PlainMetadata | None, total: Path) -> OpenEntry:
    entries = ledger.find(OpenEntry, kind="sum", result=metadata.base) if metadata else []
    if not entries:
        raise NotAllowedError(
            f"{total}: not a sum that this key has opened",
            "open the release yourself (dtl open-model)",
        )
    return entries[0]
