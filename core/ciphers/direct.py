"""Every value in a slot of its own of the double-trapdoor scheme; there is no body.

Rests on no lattice assumption. Source: PROTOCOL.md, sections 4 and 5.
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
from dtl.core.encoding.fixed_point import FixedPoint, Integers
from dtl.core.encoding.packing import Packing

BATCH_GROUPS = 32


class DirectCipher(Cipher):
    """Blocks are packed values."""

    name = "direct"
    threads = False

    @cached_property
    def packing(self) -> Packing:
        """Slots of the job's `slot_bits`."""
        return Packing(self.key.n, self.fixed_point.slot_bits)

    @property
    def group_values(self) -> int:
        """7 S."""
        return COMPONENTS * self.packing.slots

    def groups(self, values: int) -> int:
        """As many as hold all values."""
        return -(-values // self.group_values)

    def body_bytes(self, values: int) -> int:
        """None."""
        return 0

    def batches(self, values: int, lanes: int = 0) -> list[Batch]:
        """BATCH_GROUPS groups at a time."""
        size = self.group_values
        return [
            Batch(first * size, min(count * size, values - first * size), first, count, 0, 0)
            for first, count in spans(self.groups(values), BATCH_GROUPS)
        ]

    def encoder(
        self,
        job: bytes,
        values: int,
        keys: OneTimeKeys,
        steps: Steps,
        mask_keys: Sequence[masks.Key],
    ) -> Encoder:
        """Needs nothing but the steps: masks and randomness belong to the blocks."""
        return _DirectEncoder(self.packing, self.fixed_point, steps)

    def public_blocks(self, integers: Integers, groups: int) -> Bytes:
        """Public integers, packed."""
        packed = self.packing.pack(integers, groups * COMPONENTS)
        return packed.reshape(self.block_shape(groups))

    def check_body(self, values: int, batch: Batch, body: Reader) -> None:
        """There is none."""

    def combine_body(
        self,
        values: int,
        batch: Batch,
        uploads: Sequence[Reader],
        orphans: Sequence[masks.Key],
        parent: Reader | None,
        initial: Integers | None,
    ) -> bytes:
        """Nothing."""
        return b""

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
        """Take masks off, and cut blocks into slots, as they come."""
        decoding = Decoding(iter(()))
        decoding.batches = self._unpacked(values, opened, mask_keys, decoding)
        return decoding

    def _unpacked(
        self,
        values: int,
        opened: Iterator[Opened],
        mask_keys: Sequence[masks.Key],
        decoding: Decoding,
    ) -> Iterator[Integers]:
        left, group = values, 0
        for blocks, good in opened:
            flat = blocks.reshape(-1, blocks.shape[-1])
            bare = masks.add_masks(flat, mask_keys, group * COMPONENTS, self.key.n)
            here = min(left, len(flat) * self.packing.slots)
            integers, fits = self.packing.unpack(bare, here)
            fits = fits.reshape(-1, COMPONENTS).all(axis=1) & good
            decoding.bad_groups += [group + int(bad) for bad in np.flatnonzero(~fits)]
            left, group = left - here, group + len(blocks)
            yield integers


class _DirectEncoder(Encoder):
    def __init__(self, packing: Packing, fixed_point: FixedPoint, steps: Steps) -> None:
        self._packing, self._fixed_point, self._steps = packing, fixed_point, steps

    def secret_blocks(self) -> Bytes:
        return np.zeros((0, COMPONENTS, self._packing.block_width), np.uint8)

    def encode(self, values: Values, batch: Batch) -> Encoded:
        finite = np.isfinite(values)
        if not finite.all():
            raise NonFiniteError(int(np.argmin(finite)))
        integers, clamped = self._fixed_point.encode_step(
            values.astype(np.float64), self._steps.scale, self._steps.rounding, batch.first
        )
        packed = self._packing.pack(integers, batch.groups * COMPONENTS)
        return Encoded(packed.reshape(batch.groups, COMPONENTS, -1), b"", clamped)

    def wipe(self) -> None:
        """Holds no secrets."""
