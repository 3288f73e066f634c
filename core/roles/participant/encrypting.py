"""A participant encrypts its gradients (protocol, section 8, step 1)."""

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dtl.core import defaults
from dtl.core.crypto import masks, primitives, proof, scheme
from dtl.core.crypto.group import COMPONENTS, PublicKey
from dtl.core.crypto.residues import Bytes
from dtl.core.encoding.fixed_point import Integers, Rounding
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
from dtl.core.files.documents import Job, Key
from dtl.core.files.headers import (
    UploadHeader,
    check_same_shapes,
    now,
    read_header,
)
from dtl.core.files.ledger import Ledger, OpenEntry, UploadEntry
from dtl.core.files.schema import FORMAT
from dtl.core.files.tensors import TensorFile
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.progress import ProgressCallback, silent
from dtl.core.roles.participant.basis import Basis, mask_keys

logger = logging.getLogger("dtl")

ENCRYPT_GROUPS = 32  # groups a task


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
    """What `encrypt_gradients` did; `clamped` is None when an interrupted run was completed."""

    header: UploadHeader
    digest: str
    clamped: int | None


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
        basis = _basis(source, options)
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
        # A first pass finds bad input before the ledger is touched.
        encoded = _Encoded(job, source, scale, options.rounding)
        for _ in encoded.batches(work.progress):
            pass
        clamped = encoded.clamped
        if clamped:
            logger.warning(
                "%d of %d values were clamped: a contribution stays within +-%g in this job",
                clamped,
                header.values,
                job.fixed_point.max_step / job.fixed_point.one,
            )
        with Ledger(key) as ledger:
            done = _check_only_upload(ledger, basis, options.accept_differencing)
            if done is not None:
                if not finish(output, bytes.fromhex(done), force):
                    raise NotAllowedError(
                        f"{key.name} has made an upload for round {basis.round} already",
                        "send that same file again, or go on with the next round",
                    )
                return UploadReport(_written_header(output), done, None)
            _check_not_resaved(ledger, basis, options)
            _remove_unrecorded(key, ledger, output)
            blocks = _Blocks(job, encoded, mask_keys(key, basis))
            with AtomicOutput(output, force) as file:
                shape = job.residue_shape(header.values)
                shapes = {PROOF: (proof.proof_length(job.public_key, shape[0]),), RESIDUES: shape}
                writer = ContainerWriter(file, header.encode(), shapes)
                randomness = scheme.fresh_randomness(job.public_key, shape[0])
                for piece in _encrypted(job, blocks, randomness, work):
                    writer.write(RESIDUES, piece)
                _write_proof(key, header, blocks, randomness, writer, work)
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
    return UploadReport(header, digest.hex(), clamped)


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


def _basis(source: TensorFile, options: UploadOptions) -> Basis:
    """The round and base of an upload, from the gradients' metadata, the model, and --round."""
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
        return Basis(_checked_round(options.round, 1), None, None)
    first = known.round + 1
    return Basis(
        _checked_round(first if options.round is None else options.round, first),
        known.base,
        known.opened,
    )


def _checked_round(number: int, least: int) -> int:
    if not least <= number < 1 << 32:
        raise UsageError(f"--round: expected at least {least}, found {number}")
    return number


class _Encoded:
    """The gradients as integers, batch by batch; can be run through more than once."""

    def __init__(self, job: Job, source: TensorFile, scale: float, rounding: Rounding) -> None:
        self._job, self._source = job, source
        self._scale, self._rounding = scale, rounding
        self._total = sum(spec.values for spec in source.layout)
        self.digest, self.clamped = b"", 0

    def batches(self, progress: ProgressCallback = silent) -> Iterator[Integers]:
        """Integers of ENCRYPT_GROUPS groups at a time; sets `digest` and `clamped`.

        Raises FormatError when another pass gave other integers: the file has changed.
        """
        fixed_point, state = self._job.fixed_point, hashlib.sha512()
        size = ENCRYPT_GROUPS * COMPONENTS * self._job.packing.slots
        start = self.clamped = 0
        for reals in tensors.in_batches(tensors.values(self._source), size):
            integers, clamped = fixed_point.encode_step(reals, self._scale, self._rounding, start)
            start += integers.size
            self.clamped += clamped
            state.update(integers.tobytes())
            progress("check gradients", start, self._total)
            yield integers
        if self.digest not in (b"", state.digest()):
            raise FormatError(f"{self._source.path}: the file changed while it was read")
        self.digest = state.digest()


class _Blocks:
    """The masked blocks of an upload, batch by batch; can be run through more than once."""

    def __init__(self, job: Job, encoded: _Encoded, keys: list[masks.Key]) -> None:
        self._job, self._encoded, self._keys = job, encoded, keys

    def batches(self) -> Iterator[tuple[int, Bytes]]:
        """(first group, blocks [G, 7, block width]), ENCRYPT_GROUPS groups at a time."""
        job, first = self._job, 0
        for integers in self._encoded.batches():
            count = job.groups(integers.size)
            packed = job.packing.pack(integers, count * COMPONENTS)
            masked = masks.add_masks(packed, self._keys, first * COMPONENTS, job.N)
            yield first, masked.reshape(count, COMPONENTS, -1)
            first += count


def _encrypted(job: Job, blocks: _Blocks, randomness: Bytes, work: Work) -> Iterator[bytes]:
    """The residues of an upload, ENCRYPT_GROUPS groups at a time."""
    groups = len(randomness)
    tasks = (
        (job.public_key, batch, randomness[first : first + len(batch)], groups)
        for first, batch in blocks.batches()
    )
    total = -(-groups // ENCRYPT_GROUPS)
    yield from work.map("encrypt", _encrypt_chunk, tasks, total)


def _write_proof(
    key: Key,
    header: UploadHeader,
    blocks: _Blocks,
    randomness: Bytes,
    writer: ContainerWriter,
    work: Work,
) -> None:
    """Prove the upload (protocol, section 6), in a second pass over its blocks."""
    public, groups = key.job.public_key, len(randomness)
    witness, d = proof.commit(public, groups)
    signing_key = primitives.signing_public_key(key.secrets.sign)
    residues_hash = writer.tensor_hash(RESIDUES)
    rho = proof.weights(public, header.encode(), signing_key, groups, residues_hash, d)
    responder = proof.Responder(public, witness)
    for first, batch in blocks.batches():
        end = first + len(batch)
        responder.add(rho[first:end], randomness[first:end], batch)
        work.progress("prove", end, groups)
    writer.write(PROOF, proof.encode(public, groups, responder.proof(d)))


def _encrypt_chunk(key: PublicKey, blocks: Bytes, randomness: Bytes, groups: int) -> bytes:
    return scheme.encrypt(key, blocks, randomness, groups).tobytes()


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
    if ledger.find(UploadEntry, base=basis.base) and not accept_differencing:
        raise NotAllowedError(
            "an upload on this base was made already, for another round",
            "two uploads on one base can be subtracted from one another; "
            "--accept-differencing repeats a void round all the same",
        )
    return None
