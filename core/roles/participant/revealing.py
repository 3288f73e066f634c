"""A participant helps to take off the masks of the missing (protocol, section 7)."""

from pathlib import Path

from dtl.core.errors import (
    FormatError,
    NotAllowedError,
    QuorumError,
    UsageError,
    VerificationError,
)
from dtl.core.files.atomic import AtomicOutput, check_output
from dtl.core.files.closing import Close, Reveal
from dtl.core.files.headers import (
    now,
)
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger, OpenEntry, RevealEntry, TriedEntry, UploadEntry
from dtl.core.files.schema import FORMAT
from dtl.core.public import results
from dtl.core.roles.participant.basis import Basis, round_key


def reveal_masks(key: Key, path: Path, output: Path, force: bool = False) -> Reveal:
    """Sign the round keys of the masks shared with those whom a close file declares missing.

    Protocol, section 7. Raises VerificationError when this participant's upload is not in
    the close file, NotAllowedError when it is declared missing itself or has revealed
    for another close file of the round, QuorumError when too few are present.
    """
    key.require("participant")
    check_output(output, force)
    job = key.job
    close = Close.load(path, job)
    if not job.masks:
        raise UsageError("this job has no masks: there is nothing to reveal")
    if {*close.names, *close.missing} != set(job.names):
        raise FormatError(f"{path}: not about this job's roster")
    if key.name in close.missing:
        raise NotAllowedError(
            f"{path}: declares {key.name} missing",
            "who is missing must not reveal: its own upload could be opened",
        )
    if not results.can_close(job, len(close.names)):
        raise QuorumError(
            f"{path}: {len(close.names)} of {len(job.names)} are too few to reveal anything"
        )
    with Ledger(key) as ledger:
        sent = ledger.find(UploadEntry, round=close.round)
        if not sent or (sent[0].upload, sent[0].base) != (close.uploads.get(key.name), close.base):
            raise VerificationError(f"{path}: does not name the upload that {key.name} made")
        before = ledger.find(RevealEntry, round=close.round)
        if not before:
            _check_still_open(ledger, sent[0], path)
        if before and before[0].close != close.digest:
            raise NotAllowedError(
                f"{path}: a second close of round {close.round}",
                f"{key.name} has revealed for {before[0].close[:16]}... already",
            )
        basis = Basis(close.round, close.base, sent[0].opened)
        reveal = Reveal.signed(
            key.secrets.sign,
            format=FORMAT,
            kind="reveal",
            job=job.digest,
            signer=key.name,
            created=now(),
            round=close.round,
            base=close.base,
            close=close.digest,
            keys={name: round_key(key, basis, name) for name in close.missing},
        )
        with AtomicOutput(output, force) as file:
            file.write(reveal.encode())
            file.sync()
            if not before:
                entry = RevealEntry(event="reveal", round=close.round, close=close.digest)
                ledger.append(entry)
            file.commit()
    return reveal


def _check_still_open(ledger: Ledger, sent: UploadEntry, path: Path) -> None:
    """Raise NotAllowedError for a round whose result is known, or that was begun anew.

    A close file that comes only then would take somebody out of a sum that is known with it.
    """
    if ledger.find(OpenEntry, round=sent.round):
        raise NotAllowedError(f"{path}: the result of round {sent.round} was opened already")
    if ledger.find(TriedEntry, round=sent.round):  # whoever spoiled it may know what it holds
        raise NotAllowedError(f"{path}: the result of round {sent.round} was tried already")
    later = [e for e in ledger.find(UploadEntry) if e.round > sent.round]
    if any(sent.base is not None and entry.base == sent.base for entry in later):
        raise NotAllowedError(f"{path}: round {sent.round} was void, and was begun anew since")
