"""A participant encrypts its gradients (protocol, section 8, step 1)."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from dtl.core import defaults
from dtl.core.crypto import primitives, proof, scheme
from dtl.core.crypto.group import COMPONENTS, PublicKey
from dtl.core.crypto.residues import Bytes
from dtl.core.encoding.fixed_point import Reals, Rounding
from dtl.core.errors import (
    DtlError,
    FormatError,
    NotAllowedError,
    UsageError,
    VerificationError,
)
from dtl.core.files import tensors
from dtl.core.files.atomic import AtomicOutput, check_output, finish, pending_files
from dtl.core.files.container import PROOF, RESIDUES, Container, ContainerWriter
from dtl.core.files.headers import (
    UploadHeader,
    check_same_shapes,
    now,
    read_header,
)
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger, OpenEntry, UploadEntry
from dtl.core.files.schema import FORMAT
from dtl.core.files.tensors import TensorFile
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.roles.participant.basis import Basis, mask_keys
from dtl.core.roles.participant.preparing import PREPARE_GROUPS, Preparation, Remembered

logger = logging.getLogger("dtl")


@dataclass(frozen=True)
class UploadOptions:
    """How gradients become a contribution: x = weight lr gradient, then rounding."""

    rounding: Rounding
    weight: float | None = None
    lr: float = defaults.LR
    round: int | None = None
    model: Path | None = None
    accept_differencing: bool = False


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
    """Scale, round, clamp, pack, encrypt and sign gradients (protocol, section 8, step 1).

    Raises NumericError for NaN or infinity, NotAllowedError for a second upload.
    """
    key.require("participant")
    check_output(output, force)
    job = key.job
    scale = _scale(job, options)
    source = tensors.open_tensors(gradients)
    try:
        basis, first = _basis(source, options)
        header = UploadHeader(
            format=FORMAT,
            kind="upload",
            job=job.digest,
            signer=key.name,
            created=now(),
            round=basis.round,
            layout=source.layout,
            values=sum(spec.values for spec in source.layout),
            base=basis.base,
            roster=job.roster_digest,
            masked=job.masks,
        )
        stamp = source.stamp()
        _check_finite(source, header.values, work)  # before the ledger is touched
        with Ledger(key) as ledger:
            done = _check_only_upload(ledger, basis, options.accept_differencing)
            if done is not None:
                if not finish(output, bytes.fromhex(done), force):
                    raise NotAllowedError(
                        f"{key.name} has made an upload for round {basis.round} already",
                        "send that same file again, or go on with the next round",
                    )
                return UploadReport(_written_header(output), done, None, first)
            _check_not_resaved(ledger, basis, options)
            _remove_unrecorded(key, ledger, output)
            preparation = Preparation(
                job.fixed_point, job.packing, scale, options.rounding, tuple(mask_keys(key, basis))
            )

            def pieces() -> Iterator[Reals]:
                size = PREPARE_GROUPS * COMPONENTS * job.packing.slots
                return tensors.in_batches(tensors.values(source), size)

            with AtomicOutput(output, force) as file:
                shape = job.residue_shape(header.values)
                shapes = {PROOF: (proof.proof_length(job.public_key, shape[0]),), RESIDUES: shape}
                writer = ContainerWriter(file, header.encode(), shapes)
                randomness = scheme.fresh_randomness(job.public_key, shape[0])
                remembered, clamped = _encrypt(
                    job.public_key,
                    preparation,
                    pieces(),
                    header.values,
                    randomness,
                    lambda residues: writer.write(RESIDUES, residues),
                    work,
                )
                if source.stamp() != stamp:
                    raise FormatError(f"{gradients}: the file changed while it was read")
                if clamped:
                    logger.warning(
                        "%d of %d values were clamped: a contribution stays within +-%g",
                        *(clamped, header.values, job.fixed_point.largest_step),
                    )
                blocks = remembered.again(preparation, pieces, str(gradients), work)
                residues_hash = writer.tensor_hash(RESIDUES)
                writer.write(PROOF, _prove(key, header, residues_hash, blocks, randomness, work))
                digest = writer.finish(header.kind, key.secrets.sign)
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
    return UploadReport(header, digest.hex(), clamped, first)


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


def _written_header(path: Path) -> UploadHeader:
    """The header of an upload that an interrupted run had finished."""
    with Container(path) as container:
        header = read_header(container, ("upload",), None)
    if not isinstance(header, UploadHeader):
        raise FormatError(f"{path}: expected an upload")
    return header


def _check_not_resaved(ledger: Ledger, basis: Basis, options: UploadOptions) -> None:
    """Raise UsageError for initial weights after models were opened, unless --round is given.

    A program that saves an opened model again drops what dtl wrote into it.
    """
    opened = [entry.round for entry in ledger.find(OpenEntry)]
    if opened and options.round is None and basis.base and basis.base == basis.opened:
        raise UsageError(
            f"the gradients are based on initial weights, but this key has opened round "
            f"{max(opened)} already",
            "a model that another program saved again counts as initial weights: name the file "
            "that open-model wrote with --model; --round N says that initial weights are meant",
        )


def _scale(job: Job, options: UploadOptions) -> float:
    weight = 1 / len(job.participants) if options.weight is None else options.weight
    scale = weight * options.lr
    for name, value in (("weight", weight), ("lr", options.lr), ("weight times --lr", scale)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{name}: expected a positive number, found {value}")
    return scale


def _basis(source: TensorFile, options: UploadOptions) -> tuple[Basis, int]:
    """The round and base of an upload, from the gradients' metadata, the model, and --round.

    Besides, the first round that can be built on that base.
    """
    known = source.metadata
    if known is not None and known.kind != "gradients":
        raise FormatError(f"{source.path}: expected gradients, found {known.kind}")
    if options.model is not None:
        model = tensors.open_tensors(options.model)
        try:
            named = tensors.weights_metadata(model)
            check_same_shapes(source.layout, model.layout, source.path, options.model)
        finally:
            model.close()
        if known is not None and known.base != named.base:
            raise FormatError(f"{source.path}: based on another model than {options.model}")
        known = named
    if known is None or known.base is None:
        if options.round is None:
            raise UsageError(
                f"{source.path}: does not say which round it is for",
                "add --model M (what the gradients are based on), or --round N without one",
            )
        return Basis(_checked_round(options.round, 1), None, None), 1
    first = known.round + 1
    number = _checked_round(first if options.round is None else options.round, first)
    return Basis(number, known.base, known.opened), first


def _check_finite(source: TensorFile, total: int, work: Work) -> None:
    """Raise NumericError for NaN or infinity."""
    done = 0
    for reals in tensors.values(source):
        done += reals.size
        work.progress("check gradients", done, total)


def _checked_round(number: int, least: int) -> int:
    if not least <= number < 1 << 32:
        raise UsageError(f"--round: expected at least {least}, found {number}")
    return number


def _encrypt(
    key: PublicKey,
    preparation: Preparation,
    pieces: Iterator[Reals],
    values: int,
    randomness: Bytes,
    write: Callable[[bytes], None],
    work: Work,
) -> tuple[Remembered, int]:
    """Encrypt all groups; returns what the proof needs of the blocks, and how many were clamped."""
    groups = len(randomness)
    remembered = Remembered(groups * preparation.group_bytes)
    clamped = 0
    tasks = (
        (key, preparation, reals, first, randomness[first : first + PREPARE_GROUPS], groups)
        for first, reals in zip(count(0, PREPARE_GROUPS), pieces, strict=False)
    )
    total = -(-groups // PREPARE_GROUPS)
    encrypted = work.map("encrypt", _encrypt_chunk, tasks, total, values=values)
    for residues, blocks, more in encrypted:
        write(residues)
        remembered.add(blocks)
        clamped += more
    return remembered, clamped


def _encrypt_chunk(
    key: PublicKey,
    preparation: Preparation,
    reals: Reals,
    first: int,
    randomness: Bytes,
    groups: int,
) -> tuple[bytes, Bytes, int]:
    blocks, clamped = preparation.blocks(reals, first)
    return scheme.encrypt(key, blocks, randomness, groups).tobytes(), blocks, clamped


def _prove(
    key: Key,
    header: UploadHeader,
    residues_hash: bytes,
    blocks: Iterator[Bytes],
    randomness: Bytes,
    work: Work,
) -> bytes:
    """The proof of an upload (protocol, section 6), from the blocks that were encrypted."""
    public, groups = key.job.public_key, len(randomness)
    witness, d = proof.commit(public, groups)
    signing_key = primitives.signing_public_key(key.secrets.sign)
    rho = proof.weights(public, header.encode(), signing_key, groups, residues_hash, d)
    responder = proof.Responder(public, witness)
    end = 0
    for batch in blocks:
        first, end = end, end + len(batch)
        responder.add(rho[first:end], randomness[first:end], batch)
        work.progress("prove", header.values * end // groups, header.values)
    return proof.encode(public, groups, responder.proof(d))


def _check_only_upload(ledger: Ledger, basis: Basis, accept_differencing: bool) -> str | None:
    """The digest of the upload that was made for this round already, if any.

    Raises NotAllowedError for a second upload on one base, VerificationError when the base
    was opened with another content.
    """
    made = ledger.find(UploadEntry, round=basis.round)
    if made:
        return made[0].upload
    if basis.base is None:
        return None
    opened = ledger.find(OpenEntry, result=basis.base)
    if basis.opened != basis.base and not opened:
        logger.warning("this key has not opened the model that the gradients are based on itself")
    for entry in opened:
        if entry.opened != basis.opened:
            raise VerificationError("the model is not the one that was opened under this name")
    on_base = ledger.find(UploadEntry, base=basis.base)
    if on_base and not accept_differencing:
        raise NotAllowedError(
            f"{ledger.path}: expected no upload on this base yet, found the one for round "
            f"{on_base[-1].round}",
            "two uploads on one base can be subtracted from one another; "
            "--accept-differencing repeats a void round all the same",
        )
    return None
