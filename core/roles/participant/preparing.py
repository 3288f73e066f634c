"""From real numbers to the masked blocks of an upload (protocol, sections 5 and 7).

The proof needs the very blocks that were encrypted, once all residues are there. They are
kept in memory as long as they are few; of more only hashes are kept, and the blocks are
made again.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from dtl.core.crypto import masks
from dtl.core.crypto.group import COMPONENTS
from dtl.core.crypto.residues import Bytes
from dtl.core.encoding.fixed_point import FixedPoint, Reals, Rounding
from dtl.core.encoding.packing import Packing
from dtl.core.errors import FormatError
from dtl.core.parallel import Work

PREPARE_GROUPS = 32  # groups a task
KEEP_BYTES = 64 << 20  # of blocks: about 20,000,000 values of 24 bits


@dataclass(frozen=True)
class Preparation:
    """How real numbers become masked blocks: all that a worker must know."""

    fixed_point: FixedPoint
    packing: Packing
    scale: float
    rounding: Rounding
    mask_keys: tuple[masks.Key, ...]

    @property
    def group_bytes(self) -> int:
        """Bytes of the blocks of a group."""
        return COMPONENTS * self.packing.block_width

    def blocks(self, reals: Reals, first: int) -> tuple[Bytes, int]:
        """Blocks [G, 7, block width] of values from group `first` on; and how many were clamped."""
        group = COMPONENTS * self.packing.slots
        integers, clamped = self.fixed_point.encode_step(
            reals, self.scale, self.rounding, first * group
        )
        groups = -(-len(integers) // group)
        packed = self.packing.pack(integers, groups * COMPONENTS)
        masked = masks.add_masks(packed, self.mask_keys, first * COMPONENTS, self.packing.modulus)
        return masked.reshape(groups, COMPONENTS, -1), clamped


class Remembered:
    """The blocks that were encrypted, in order; or their hashes, where they are many."""

    def __init__(self, total_bytes: int) -> None:
        self._keep = total_bytes <= KEEP_BYTES
        self._blocks: list[Bytes] = []
        self._hashes: list[bytes] = []

    def add(self, blocks: Bytes) -> None:
        """Remember the next blocks."""
        if self._keep:
            self._blocks.append(blocks)
        else:
            self._hashes.append(_hash(blocks))

    def again(
        self,
        preparation: Preparation,
        pieces: Callable[[], Iterator[Reals]],
        what: str,
        work: Work,
    ) -> Iterator[Bytes]:
        """The same blocks once more; FormatError where `pieces` gives other ones than before."""
        if self._keep:
            yield from self._blocks
            return
        tasks = (
            (preparation, reals, first)
            for first, reals in zip(count(0, PREPARE_GROUPS), pieces(), strict=False)
        )
        made = work.map("prepare the proof", _blocks_chunk, tasks, len(self._hashes))
        for blocks, expected in zip(made, self._hashes, strict=True):
            if _hash(blocks) != expected:
                raise FormatError(f"{what}: the file changed while it was read")
            yield blocks


def _blocks_chunk(preparation: Preparation, reals: Reals, first: int) -> Bytes:
    return preparation.blocks(reals, first)[0]


def _hash(blocks: Bytes) -> bytes:
    return hashlib.sha512(np.ascontiguousarray(blocks).data).digest()
