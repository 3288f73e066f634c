"""Make an upload: encode, mask, encrypt, prove; write it piece by piece."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dtl.core.ciphers.cipher import Batch, Cipher, Encoder, NonFiniteError, Values
from dtl.core.crypto import masks, one_time, primitives, proof, scheme
from dtl.core.crypto.group import COMPONENTS
from dtl.core.crypto.residues import Bytes
from dtl.core.errors import FormatError
from dtl.core.files import tensors
from dtl.core.files.atomic import AtomicOutput
from dtl.core.files.container import BODY, PROOF, RESIDUES, ContainerWriter
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key
from dtl.core.parallel import Work
from dtl.core.roles.participant.planning import Plan

logger = logging.getLogger("dtl")

KEEP_BYTES = 64 << 20
"""Blocks that are kept in memory for the proof; of more, only hashes are."""


def write_upload(key: Key, plan: Plan, file: AtomicOutput, work: Work) -> tuple[int, bytes]:
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

    def __init__(self, job: Job, plan: Plan, randomness: Bytes) -> None:
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
    plan: Plan,
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
