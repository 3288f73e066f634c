"""Values under a one-time lattice pad; only the pad's short secret becomes blocks.

    body_i = a_i s + e_i + 2^28 X_i + masks   modulo q,

with public polynomials a_i, a short secret s and short errors e_i. Adding bodies adds values and
secrets; the sum of the secrets, opened by both halves, opens the sum of the values exactly.
Source: PROTOCOL.md, section 10; ring learning with errors (Lyubashevsky, Peikert, Regev,
Eurocrypt 2010), a seed-homomorphic pseudorandom generator (Boneh et al., Crypto 2013).
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from dtl.core.ciphers.cipher import (
    Batch,
    Cipher,
    Decoding,
    Encoded,
    Encoder,
    Mapper,
    NonFiniteError,
    Opened,
    Reader,
    Steps,
    Values,
    spans,
)
from dtl.core.crypto import masks
from dtl.core.crypto.group import COMPONENTS
from dtl.core.crypto.one_time import OneTimeKeys
from dtl.core.crypto.residues import Bytes
from dtl.core.encoding.fixed_point import FixedPoint, Integers, Stochastic
from dtl.core.encoding.packing import Packing
from dtl.core.lattice import ring as door
from dtl.core.lattice.parameters import BOUND, SECRET_SLOT_BITS, Ring, Shape, ring_of

BATCH_POLYNOMIALS = 8
"""Polynomials a task: some 460,000 values at 24 bits, 1.6 MB of body."""

WIDE_POLYNOMIALS = 64
"""Where many files are read side by side: their bodies are checked in pieces of 4 MiB."""

BodyMasks = tuple[door.Mask, ...]


class LatticeCipher(Cipher):
    """Blocks are the packed secret, the body the padded values."""

    name = "lattice"
    threads = True

    @cached_property
    def ring(self) -> Ring:
        """The ring of the job's size."""
        return ring_of(self.key.modulus_bits)

    @cached_property
    def packing(self) -> Packing:
        """Slots of 28 bits, which hold the sum of 2^21 - 1 secrets."""
        return Packing(self.key.n, SECRET_SLOT_BITS)

    def shape(self, values: int) -> Shape:
        """How a vector lies in polynomials."""
        return Shape(self.ring, self.fixed_point.slot_bits, values)

    def groups(self, values: int) -> int:
        """Those of one secret, whatever the number of values."""
        return -(-self.ring.n // (COMPONENTS * self.packing.slots))

    def body_bytes(self, values: int) -> int:
        """25 bytes a coefficient."""
        return self.shape(values).body_bytes

    @property
    def group_values(self) -> int:
        """None: blocks hold the secret."""
        return 0

    def batches(self, values: int, lanes: int = 0) -> list[Batch]:
        """BATCH_POLYNOMIALS polynomials at a time, or up to WIDE_POLYNOMIALS."""
        shape = self.shape(values)
        step = BATCH_POLYNOMIALS
        if lanes:
            step = max(step, min(WIDE_POLYNOMIALS, -(-shape.polynomials // lanes)))
        found = []
        for first, count in spans(shape.polynomials, step):
            span = shape.span(first, count)
            found.append(Batch(span.first_value, span.values, 0, 0, span.start, span.length))
        return found

    def encoder(
        self,
        job: bytes,
        values: int,
        keys: OneTimeKeys,
        steps: Steps,
        mask_keys: Sequence[masks.Key],
    ) -> Encoder:
        """Draw the secret of this upload's pad."""
        return _LatticeEncoder(self, job, values, keys, steps, _body_masks(mask_keys))

    def public_blocks(self, integers: Integers, groups: int) -> Bytes:
        """Zero: a public start has no secret, so its residues are the neutral ones."""
        return np.zeros(self.block_shape(groups), np.uint8)

    def check_body(self, values: int, batch: Batch, body: Reader) -> None:
        """As it is added."""
        self.combine_body(values, batch, [body], (), None, None)

    def combine_body(
        self,
        values: int,
        batch: Batch,
        uploads: Sequence[Reader],
        orphans: Sequence[masks.Key],
        parent: Reader | None,
        initial: Integers | None,
    ) -> bytes:
        """One upload after the other, so that memory does not grow with their number."""
        shape = self.shape(values)
        first, count = self._polynomials(shape, batch)
        total = door.arithmetic(self.ring).sum(shape, first, count)
        for read in uploads:
            total.add(read(batch.first_byte, batch.body_bytes))
        total.add_masks(_body_masks(masks.opposite(orphans)))
        if parent is not None:
            total.subtract_from(parent(batch.first_byte, batch.body_bytes))
        elif initial is not None:
            total.subtract_from(door.arithmetic(self.ring).encode_public(initial, shape, first))
        return total.body().tobytes()

    def _polynomials(self, shape: Shape, batch: Batch) -> tuple[int, int]:
        """(first, count) of the polynomials of a batch."""
        first = batch.first // shape.capacity
        return first, shape.holding(first, batch.values)

    def decode(
        self,
        job: bytes,
        values: int,
        uploads: int,
        opened: Iterator[Opened],
        body: Reader | None,
        mask_keys: Sequence[masks.Key],
        run: Mapper,
    ) -> Decoding:
        """Open the sum of the secrets first, then the body with it."""
        decoding = Decoding(iter(()))
        secret = self._secret(opened, BOUND * uploads, mask_keys, decoding)
        decoding.batches = self._values(
            job, values, BOUND * uploads, secret, body, _body_masks(mask_keys), run, decoding
        )
        return decoding

    def _secret(
        self,
        opened: Iterator[Opened],
        bound: int,
        mask_keys: Sequence[masks.Key],
        decoding: Decoding,
    ) -> Integers:
        """K, the sum of the secrets [n]; groups that cannot be right are noted and count as 0."""
        blocks, good = (np.concatenate(part) for part in zip(*opened, strict=True))
        flat = masks.add_masks(blocks.reshape(-1, blocks.shape[-1]), mask_keys, 0, self.key.n)
        integers, fits = self.packing.unpack(flat, self.ring.n)
        fits = fits.reshape(-1, COMPONENTS).all(axis=1) & good
        within = np.ones(len(flat) * self.packing.slots, np.bool_)
        within[: self.ring.n] = np.abs(integers) <= bound
        fits &= within.reshape(len(blocks), -1).all(axis=1)
        decoding.bad_groups += [int(bad) for bad in np.flatnonzero(~fits)]
        return np.clip(integers, -bound, bound)

    def _values(
        self,
        job: bytes,
        values: int,
        bound: int,
        secret: Integers,
        body: Reader | None,
        body_masks: BodyMasks,
        run: Mapper,
        decoding: Decoding,
    ) -> Iterator[Integers]:
        if body is None:
            raise ValueError("a lattice vector has a body")
        arithmetic = door.arithmetic(self.ring)
        transformed = arithmetic.transform(secret)
        public = door.public_key(job)
        batches = self.batches(values)
        tasks = (
            (self, public, transformed, bound, values, batch, body, body_masks) for batch in batches
        )
        for integers, bad in run(_open_batch, tasks, len(batches)):
            decoding.bad_polynomials += bad
            yield integers


def _open_batch(
    cipher: LatticeCipher,
    public: bytes,
    transformed: door.Words,
    bound: int,
    values: int,
    batch: Batch,
    body: Reader,
    body_masks: BodyMasks,
) -> tuple[Integers, list[int]]:
    """Open one batch; returns its integers, and the polynomials that cannot be right."""
    shape, arithmetic = cipher.shape(values), door.arithmetic(cipher.ring)
    first, count = cipher._polynomials(shape, batch)
    data = memoryview(body(batch.first_byte, batch.body_bytes))
    integers, bad = np.empty(batch.values, np.int64), list[int]()
    for polynomial in range(first, first + count):
        span = shape.span(polynomial, 1)
        start = span.start - batch.first_byte
        part: door.Buffer = data[start : start + span.length]
        if body_masks:
            total = arithmetic.sum(shape, polynomial, 1)
            total.add(part)
            total.add_masks(body_masks)
            part = total.body()
        found, good = arithmetic.open(public, transformed, bound, part, shape, polynomial)
        place = span.first_value - batch.first
        integers[place : place + span.values] = found
        if not good:
            bad.append(polynomial)
    return integers, bad


def _body_masks(mask_keys: Sequence[masks.Key]) -> BodyMasks:
    """The masks of the body that belong to those of the blocks."""
    return tuple(door.Mask(sign, masks.body_key(key)) for sign, key in mask_keys)


class _LatticeEncoder(Encoder):
    def __init__(
        self,
        cipher: LatticeCipher,
        job: bytes,
        values: int,
        keys: OneTimeKeys,
        steps: Steps,
        body_masks: BodyMasks,
    ) -> None:
        arithmetic = door.arithmetic(cipher.ring)
        self._cipher, self._shape = cipher, cipher.shape(values)
        self._masks, self._error = body_masks, keys.error
        self._public = door.public_key(job)
        self._secret = arithmetic.sample(keys.secret)
        self._transformed = arithmetic.transform(self._secret)
        self._encoding = _encoding(cipher.fixed_point, steps)

    def secret_blocks(self) -> Bytes:
        groups = self._cipher.groups(0)
        packed = self._cipher.packing.pack(self._secret.astype(np.int64), groups * COMPONENTS)
        return packed.reshape(groups, COMPONENTS, -1)

    def encode(self, values: Values, batch: Batch) -> Encoded:
        first = batch.first // self._shape.capacity
        try:
            body, clamped = door.arithmetic(self._cipher.ring).pad(
                self._public,
                self._transformed,
                self._error,
                self._masks,
                self._encoding,
                values,
                self._shape,
                first,
            )
        except door.NonFinite as error:
            raise NonFiniteError(error.index) from None
        blocks = np.zeros((0, COMPONENTS, self._cipher.packing.block_width), np.uint8)
        return Encoded(blocks, body.tobytes(), clamped)

    def wipe(self) -> None:
        self._secret[...] = 0
        self._transformed[...] = 0


def _encoding(fixed_point: FixedPoint, steps: Steps) -> door.Encoding:
    seed = steps.rounding.seed if isinstance(steps.rounding, Stochastic) else None
    return door.Encoding(steps.scale, fixed_point.one, fixed_point.max_step, seed)
