"""A participant encrypts its gradients (protocol, section 8, step 1).

The work has three parts: what is to be made (`_plan`), making it (`_encrypt`, `_prove`), and
publishing it under a ledger line (`encrypt_gradients`).
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtl.core import defaults
from dtl.core.ciphers.cipher import Batch, Cipher, Encoder, NonFiniteError, Steps, Values
from dtl.core.crypto import masks, one_time, primitives, proof, scheme
from dtl.core.crypto.group import COMPONENTS
from dtl.core.crypto.one_time import OneTimeKeys
from dtl.core.crypto.residues import Bytes
from dtl.core.encoding.fixed_point import Rounding
from dtl.core.errors import DtlError, FormatError, NotAllowedError, UsageError
from dtl.core.files import tensors
from dtl.core.files.atomic import AtomicOutput, check_output, finish, pending_files
from dtl.core.files.container import BODY, PROOF, RESIDUES, Container, ContainerWriter
from dtl.core.files.headers import UploadHeader, check_same_shapes, now, read_header
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger, OpenEntry, StepEntry, UploadEntry
from dtl.core.files.schema import FORMAT
from dtl.core.files.tensors import TensorFile
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.roles.participant.basis import (
    Basis,
    check_basis,
    mask_keys,
    opened_tag,
    raw,
    record_step,
)

logger = logging.getLogger("dtl")

KEEP_BYTES = 64 << 20
"""Blocks that are kept in memory for the proof; of more, only hashes are."""


@dataclass(frozen=True)
class UploadOptions:
    """How gradients become a contribution: x = weight lr gradient, then rounding.

    `own_step` says that `model` is what the operator's own program made of the last opened sum.
    """

    rounding: Rounding
    weight: float | None = None
    lr: float = defaults.LR
    round: int | None = None
    model: Path | None = None
    own_step: bool = False
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
    """Scale, round, clamp, encode, encrypt and sign gradients (protocol, section 8, step 1).

    Raises NumericError for NaN or infinity, NotAllowedError for a second upload or a base that
    this key has not opened itself, VerificationError for a base of another content.
    """
    key.require("participant")
    check_output(output, force)
    scale = _scale(key.job, options)
    source = tensors.open_tensors(gradients)
    try:
        with Ledger(key) as ledger:
            basis, first = _basis(source, options, ledger)
            done = ledger.find(UploadEntry, round=basis.round)
            if done:
                return _complete(key, output, done[0].upload, basis, first, force)
            if options.own_step:
                _record_own_step(ledger, basis)
            check_basis(ledger, basis, options.accept_differencing)
            _remove_unrecorded(key, ledger, output)
            plan = _plan(key, source, basis, Steps(scale, options.rounding), ledger)
            with AtomicOutput(output, force) as file:
                clamped, digest = _write(key, plan, file, work)
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


# --- what is to be made ------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """An upload that may be made: its header, its secrets, and what it is made of."""

    source: TensorFile
    stamp: tuple[int, ...]
    header: UploadHeader
    steps: Steps
    keys: OneTimeKeys
    mask_keys: tuple[masks.Key, ...]


def _plan(key: Key, source: TensorFile, basis: Basis, steps: Steps, ledger: Ledger) -> _Plan:
    job = key.job
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
        opened_tag=opened_tag(key, basis),
    )
    keys = one_time.derive_one_time(
        key.secrets.sign,
        bytes.fromhex(job.digest),
        basis.round,
        raw(basis.base),
        raw(basis.opened),
        bytes.fromhex(job.roster_digest),
        time.time_ns(),
        ledger.last_link,
    )
    return _Plan(source, source.stamp(), header, steps, keys, tuple(mask_keys(key, basis)))


def _scale(job: Job, options: UploadOptions) -> float:
    weight = 1 / len(job.participants) if options.weight is None else options.weight
    scale = weight * options.lr
    for name, value in (("weight", weight), ("lr", options.lr), ("weight times --lr", scale)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{name}: expected a positive number, found {value}")
    return scale


def _basis(source: TensorFile, options: UploadOptions, ledger: Ledger) -> tuple[Basis, int]:
    """The round and base of an upload, from the gradients' metadata, the model, and --round.

    Besides, the first round that can be built on that base.
    """
    known = source.metadata
    if known is not None and known.kind != "gradients":
        raise FormatError(f"{source.path}: expected gradients, found {known.kind}")
    if options.own_step:
        return _own_step_basis(source, options, ledger)
    if options.model is not None:
        model = tensors.open_tensors(options.model)
        try:
            named = tensors.weights_metadata(model)
            check_same_shapes(source.layout, model.layout, source.path, options.model)
            # What the file holds counts, not what its metadata says of it.
            named = named.model_copy(update={"content": tensors.content_digest(model)})
        finally:
            model.close()
        if known is not None and known.base != named.base:
            raise FormatError(f"{source.path}: based on another model than {options.model}")
        if known is not None and known.content not in (None, named.content):
            raise FormatError(f"{source.path}: computed on other tensors than {options.model}")
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
    return Basis(number, known.base, known.opened, known.content), first


def _own_step_basis(
    source: TensorFile, options: UploadOptions, ledger: Ledger
) -> tuple[Basis, int]:
    """The basis of gradients on a model that the operator's own program stepped along a sum."""
    if options.model is None:
        raise UsageError("--own-step: expected --model as well, the model after the step")
    sums = ledger.find(OpenEntry, kind="sum")
    if not sums:
        raise NotAllowedError(
            f"{ledger.path}: --own-step: this key has not opened any sum",
            "open the released sum first (dtl open-model)",
        )
    last = max(sums, key=lambda entry: entry.round)
    model = tensors.open_tensors(options.model)
    try:
        check_same_shapes(source.layout, model.layout, source.path, options.model)
        content = tensors.content_digest(model)
    finally:
        model.close()
    first = last.round + 1
    number = _checked_round(first if options.round is None else options.round, first)
    return Basis(number, last.result, last.opened, content), first


def _record_own_step(ledger: Ledger, basis: Basis) -> None:
    opened = ledger.find(OpenEntry, result=basis.base)[0]
    record_step(
        ledger,
        StepEntry(
            event="step",
            round=opened.round,
            sum=opened.result,
            content=basis.content or "",
            source="own-step",
        ),
    )


def _checked_round(number: int, least: int) -> int:
    if not least <= number < 1 << 32:
        raise UsageError(f"--round: expected at least {least}, found {number}")
    return number


# --- making it ----------------------------------------------------------------------------


def _write(key: Key, plan: _Plan, file: AtomicOutput, work: Work) -> tuple[int, bytes]:
    """Write the finished upload; returns how many values were clamped, and its digest."""
    job, header = key.job, plan.header
    groups = job.codec.groups(header.values)
    shapes = {
        PROOF: (proof.proof_length(job.public_key, groups),),
        **job.result_shapes(header.values),
    }
    writer = ContainerWriter(file, header.encode(), shapes)
    randomness = one_time.group_randomness(
        plan.keys.randomness, groups, job.public_key.exponent_bits
    )
    encryption = _Encryption(job, plan, randomness)
    try:
        clamped, kept = encryption.run(writer, work)
        if plan.source.stamp() != plan.stamp:
            raise FormatError(f"{plan.source.path}: the file changed while it was read")
        if clamped:
            logger.warning(
                "%d of %d values were clamped: a contribution stays within +-%g",
                *(clamped, header.values, job.fixed_point.largest_step),
            )
        body = writer.tensor_digest(BODY) if BODY in shapes else None
        digests = (writer.tensor_digest(RESIDUES), body)
        writer.write(PROOF, _prove(key, plan, digests, encryption.again(kept, work), randomness))
    finally:
        encryption.wipe()
    return clamped, writer.finish(header.kind, key.secrets.sign)


@dataclass
class _Kept:
    """The masked blocks that were encrypted, in order; or their hashes, where they are many."""

    whole: bool
    blocks: list[Bytes]
    hashes: list[bytes]

    def add(self, blocks: Bytes) -> None:
        if self.whole:
            self.blocks.append(blocks)
        else:
            self.hashes.append(_hash(blocks))


_Made = tuple[Bytes, bytes, bytes, int]
"""(masked blocks, residues, body, clamped) of a batch."""
_Function = Callable[..., _Made]


class _Encryption:
    """Encodes, masks and encrypts the values of one upload."""

    def __init__(self, job: Job, plan: _Plan, randomness: Bytes) -> None:
        self._job, self._plan, self._randomness = job, plan, randomness
        self._values, self._codec = plan.header.values, job.codec
        self._encoder = self._codec.encoder(
            bytes.fromhex(job.digest), self._values, plan.keys, plan.steps, plan.mask_keys
        )

    def run(self, writer: ContainerWriter, work: Work) -> tuple[int, _Kept]:
        """Write `residues` and `body`; returns how many values were clamped, and the blocks."""
        size = len(self._randomness) * COMPONENTS * self._codec.key.arithmetic.block_width
        kept, clamped = _Kept(size <= KEEP_BYTES, [], []), 0
        first = self._mask(self._encoder.secret_blocks(), 0)
        if len(first):
            kept.add(first)
            writer.write(RESIDUES, self._encrypt(first, 0))
        for blocks, residues, body, more in self._each(_encrypt_batch, "encrypt", work):
            if len(body):
                writer.write(BODY, body)
            if len(blocks):
                kept.add(blocks)
                writer.write(RESIDUES, residues)
            clamped += more
        return clamped, kept

    def again(self, kept: _Kept, work: Work) -> Iterator[Bytes]:
        """The same blocks once more; FormatError where the file gives other ones than before."""
        if kept.whole:
            yield from kept.blocks
            return
        made = self._each(_encode_batch, "prepare the proof", work)
        for (blocks, *_), expected in zip(made, kept.hashes, strict=True):
            if _hash(blocks) != expected:
                raise FormatError(f"{self._plan.source.path}: the file changed while it was read")
            yield blocks

    def wipe(self) -> None:
        """Overwrite the secrets of the encoder."""
        self._encoder.wipe()

    def _mask(self, blocks: Bytes, first: int) -> Bytes:
        return _mask(self._codec, self._plan.mask_keys, blocks, first)

    def _encrypt(self, blocks: Bytes, first: int) -> bytes:
        randomness = self._randomness[first : first + len(blocks)]
        groups = len(self._randomness)
        return scheme.encrypt(self._codec.key, blocks, randomness, groups).tobytes()

    def _each(self, function: _Function, step: str, work: Work) -> Iterator[_Made]:
        batches = self._codec.batches(self._values)
        pieces = tensors.batches(self._plan.source, batches[0].values)
        groups = len(self._randomness)
        tasks = (
            (
                self._codec,
                self._encoder,
                self._plan.mask_keys,
                reals,
                batch,
                self._randomness[batch.first_group : batch.first_group + batch.groups],
                groups,
            )
            for batch, reals in zip(batches, pieces, strict=True)
        )
        made = work.map(
            step,
            function,
            tasks,
            len(batches),
            values=self._values,
            threads=self._codec.threads,
        )
        try:
            yield from made
        except _NotFiniteError as error:
            raise tensors.not_finite(self._plan.source, error.place) from None


class _NotFiniteError(Exception):
    """The value at `place` of the whole vector is NaN or infinite."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def _mask(codec: Cipher, keys: tuple[masks.Key, ...], blocks: Bytes, first: int) -> Bytes:
    flat = blocks.reshape(-1, blocks.shape[-1])
    masked = masks.add_masks(flat, keys, first * COMPONENTS, codec.key.n)
    return masked.reshape(blocks.shape)


def _encode_batch(
    codec: Cipher,
    encoder: Encoder,
    keys: tuple[masks.Key, ...],
    values: Values,
    batch: Batch,
    randomness: Bytes,
    groups: int,
) -> _Made:
    """(masked blocks, no residues, body, clamped) of a batch."""
    try:
        encoded = encoder.encode(values, batch)
    except NonFiniteError as error:
        raise _NotFiniteError(batch.first + error.index) from None
    blocks = encoded.blocks
    if batch.groups:
        blocks = _mask(codec, keys, blocks, batch.first_group)
    return blocks, b"", encoded.body, encoded.clamped


def _encrypt_batch(
    codec: Cipher,
    encoder: Encoder,
    keys: tuple[masks.Key, ...],
    values: Values,
    batch: Batch,
    randomness: Bytes,
    groups: int,
) -> _Made:
    """(masked blocks, residues, body, clamped) of a batch."""
    blocks, residues, body, clamped = _encode_batch(
        codec, encoder, keys, values, batch, randomness, groups
    )
    if batch.groups:
        residues = scheme.encrypt(codec.key, blocks, randomness, groups).tobytes()
    return blocks, residues, body, clamped


def _hash(blocks: Bytes) -> bytes:
    return hashlib.sha512(np.ascontiguousarray(blocks).data).digest()


def _prove(
    key: Key,
    plan: _Plan,
    digests: tuple[bytes, bytes | None],
    blocks: Iterator[Bytes],
    randomness: Bytes,
) -> bytes:
    """The proof of an upload (protocol, section 6), from the blocks that were encrypted.

    `digests` are those of the tensors `residues` and, if there is one, `body`.
    """
    public, groups = key.job.public_key, len(randomness)
    stream = primitives.keystream(plan.keys.witness, 0, proof.witness_bytes(public, groups))
    witness, d = proof.commit(public, groups, stream)
    signing_key = primitives.signing_public_key(key.secrets.sign)
    rho = proof.weights(public, plan.header.encode(), signing_key, groups, *digests, d)
    responder = proof.Responder(public, witness)
    end = 0
    for batch in blocks:
        first, end = end, end + len(batch)
        responder.add(rho[first:end], randomness[first:end], batch)
    return proof.encode(public, groups, responder.proof(d))


# --- what was made before ------------------------------------------------------------------


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
