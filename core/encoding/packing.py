"""Integers to blocks and back: S slots of B bits in one number modulo N.

A block is M = sum of e_i 2^(B i), signed, modulo N; blocks are uint8 [n, |N|/8],
little-endian. Source: PROTOCOL.md, section 5.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dtl.core.encoding.fixed_point import Integers
from dtl.core.errors import UsageError

Blocks = NDArray[np.uint8]


@dataclass(frozen=True)
class Packing:
    """How many slots a block has, and how integers get into them and out again."""

    modulus: int
    slot_bits: int

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise UsageError(
                f"slots of {self.slot_bits} bits do not fit into a modulus of "
                f"{self.modulus.bit_length()} bits"
            )

    @cached_property
    def slots(self) -> int:
        """S = floor((|N| - 2) / B)."""
        return (self.modulus.bit_length() - 2) // self.slot_bits

    @cached_property
    def block_width(self) -> int:
        """Bytes of a block."""
        return self.modulus.bit_length() // 8

    @cached_property
    def _bias(self) -> int:
        """The sum of 2^(B-1) 2^(B i): makes every slot of a packed block non-negative."""
        slot = 1 << (self.slot_bits - 1)
        return sum(slot << (self.slot_bits * i) for i in range(self.slots))

    def pack(self, integers: Integers, blocks: int) -> Blocks:
        """Pack |e| < 2^(B-1) into `blocks` blocks, the unused slots zero."""
        slots = np.zeros((blocks * self.slots), np.int64)
        slots[: integers.size] = integers
        words = (slots + (1 << (self.slot_bits - 1))).astype("<u8").view(np.uint8).reshape(-1, 8)
        if self.slot_bits % 8:
            bits = np.unpackbits(words, axis=1, bitorder="little")[:, : self.slot_bits]
            data = np.packbits(bits.reshape(blocks, -1), axis=1, bitorder="little")
        else:
            data = words[:, : self.slot_bits // 8].reshape(blocks, -1)
        packed = np.zeros((blocks, self.block_width), np.uint8)
        packed[:, : data.shape[1]] = data
        return self._each(packed, lambda value: (value - self._bias) % self.modulus)

    def unpack(self, packed: Blocks, values: int) -> tuple[Integers, NDArray[np.bool_]]:
        """Cut blocks into slots; returns the first `values` of them, and which blocks fit [n].

        A block does not fit when it is out of range, or when a slot beyond `values` is not
        zero. Whatever the blocks hold, all of them are cut: nothing is said before the end.
        """
        limit = 1 << (self.slot_bits * self.slots)
        fits = np.ones(len(packed), np.bool_)
        numbers = iter(range(len(packed)))

        def shifted(value: int) -> int:
            biased = (value + self._bias) % self.modulus
            fits[next(numbers)] = biased < limit
            return biased % limit

        data = self._each(packed, shifted)
        words = np.zeros((len(packed) * self.slots, 8), np.uint8)
        used = self.slots * self.slot_bits
        if self.slot_bits % 8:
            bits = np.unpackbits(data, axis=1, bitorder="little")[:, :used]
            bytes_of = np.packbits(bits.reshape(-1, self.slot_bits), axis=1, bitorder="little")
        else:
            bytes_of = data[:, : used // 8].reshape(-1, self.slot_bits // 8)
        words[:, : bytes_of.shape[1]] = bytes_of
        integers = words.view("<i8").ravel() - (1 << (self.slot_bits - 1))
        padding = np.zeros(integers.size, np.bool_)
        padding[values:] = integers[values:] != 0
        return integers[:values], fits & ~padding.reshape(len(packed), -1).any(axis=1)

    def _each(self, blocks: Blocks, function: Callable[[int], int]) -> Blocks:
        """Apply a function of one number to every block."""
        width = self.block_width
        data = blocks.tobytes()
        starts: Iterable[int] = range(0, len(data), width)
        return np.frombuffer(
            b"".join(
                function(int.from_bytes(data[at : at + width], "little")).to_bytes(width, "little")
                for at in starts
            ),
            np.uint8,
        ).reshape(-1, width)
