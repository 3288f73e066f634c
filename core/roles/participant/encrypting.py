"""A participant encrypts its gradients (protocol, section 8, step 1).

The work has three parts: what is to be made (`planning`), making it (`producing`), and
publishing it under a ledger line, here.
"""

from dataclasses import dataclass
from pathlib import Path

from dtl.core.ciphers.cipher import Steps
from dtl.core.errors import DtlError, FormatError, NotAllowedError
from dtl.core.files import tensors
from dtl.core.files.atomic import AtomicOutput, check_output, finish, pending_files
from dtl.core.files.container import Container
from dtl.core.files.headers import UploadHeader, read_header
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger, UploadEntry
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.roles.participant.basis import Basis, check_basis
from dtl.core.roles.participant.planning import (
    UploadOptions,
    find_basis,
    make_plan,
    record_own_step,
    scale_of,
)
from dtl.core.roles.participant.producing import write_upload


@dataclass(frozen=True)
class UploadReport:
    """What `encrypt_gradients` did; `clamped` is None when an interrupted run was completed.

    `first` is the round after that of the base: an upload is for this one or a later one.
    """

    header: UploadHeader
    digest: str
    clamped: int | None
    first: int


def encrypt_gradients(
    key: Key,
    gradients: Path,
    output: Path,
    options: UploadOptions,
    force: bool = False,
    work: Work = DEFAULT_WORK,
) -> UploadReport:
    """Scale, round, clamp, encode, encrypt and sign gradients (protocol, section 8, step 1).

    Raises NumericError for NaN or infinity, NotAllowedError for a second upload or a base that
    this key has not opened itself, VerificationError for a base of another content.
    """
    key.require("participant")
    check_output(output, force)
    scale = scale_of(key.job, options)
    source = tensors.open_tensors(gradients)
    try:
        with Ledger(key) as ledger:
            basis, first = find_basis(source, options, ledger)
            done = ledger.find(UploadEntry, round=basis.round)
            if done:
                return _complete(key, output, done[0].upload, basis, first, force)
            if options.own_step:
                record_own_step(ledger, basis)
            check_basis(ledger, basis, options.accept_differencing)
            _remove_unrecorded(key, ledger, output)
            plan = make_plan(key, source, basis, Steps(scale, options.rounding), ledger)
            with AtomicOutput(output, force) as file:
                clamped, digest = write_upload(key, plan, file, work)
                file.seal(digest)
                entry = UploadEntry(
                    event="upload",
                    round=basis.round,
                    base=basis.base,
                    opened=basis.opened,
                    upload=digest.hex(),
                )
                file.record(lambda: ledger.append(entry))
                file.commit()
    finally:
        source.close()
    return UploadReport(plan.header, digest.hex(), clamped, first)


def _complete(
    key: Key, output: Path, digest: str, basis: Basis, first: int, force: bool
) -> UploadReport:
    """Give the upload that an interrupted run had finished its name; else refuse a second one."""
    if not finish(output, bytes.fromhex(digest), force):
        raise NotAllowedError(
            f"{key.name} has made an upload for round {basis.round} already",
            "send that same file again, or go on with the next round",
        )
    with Container(output) as container:
        header = read_header(container, ("upload",), None)
    if not isinstance(header, UploadHeader):
        raise FormatError(f"{output}: expected an upload")
    return UploadReport(header, digest, None, first)


def _remove_unrecorded(key: Key, ledger: Ledger, output: Path) -> None:
    """Remove finished uploads of this key that never got their ledger line.

    Each would be a second upload under one mask.
    """
    recorded = [entry.upload for entry in ledger.find(UploadEntry)]
    for path in pending_files(output):
        try:
            with Container(path) as container:
                header = read_header(container, ("upload",), key.job.digest)
                digest = container.digest().hex()
        except DtlError:
            continue
        if header.signer == key.name and digest not in recorded:
            path.unlink()
