"""The interface of a cipher: values to a body and blocks, and back.

Shapes: values are float32 or float64 [v]; integers int64 [v]; blocks uint8 [G, 7, |N|/8], each a
number in [0, N); a body is bytes. A *batch* is a run of whole body units or groups that one
task works on: (index of its first value, number of values).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtl.core.crypto import masks
from dtl.core.crypto.group import COMPONENTS, PublicKey
from dtl.core.crypto.one_time import OneTimeKeys
from dtl.core.crypto.residues import Bytes
from dtl.core.encoding.fixed_point import FixedPoint, Integers, Rounding
from dtl.core.encoding.packing import Packing

Values = NDArray[np.float32] | NDArray[np.float64]


class Batch(NamedTuple):
    """Consecutive values of a vector, and the blocks and body bytes that belong to them."""

    first: int
    values: int
    first_group: int
    groups: int
    first_byte: int
    body_bytes: int


@dataclass(frozen=True)
class Steps:
    """How real numbers become the integers of a contribution: x = value scale 2^f, rounded."""

    scale: float
    rounding: Rounding


@dataclass
class Encoded:
    """What a batch of values became: blocks without masks, a masked body, how many were clamped."""

    blocks: Bytes
    body: bytes
    clamped: int


class Encoder(ABC):
    """One upload in the making; holds its one-time secrets until `wipe`."""

    @abstractmethod
    def secret_blocks(self) -> Bytes:
        """The blocks that do not depend on the values, [G, 7, block width]; G may be 0."""

    @abstractmethod
    def encode(self, values: Values, batch: Batch) -> Encoded:
        """Scale, round, clamp and encode a batch.

        Raises NonFiniteError with the index, counted from the start of the batch, of the first
        NaN or infinity.
        """

    @abstractmethod
    def wipe(self) -> None:
        """Overwrite the secrets."""


class NonFiniteError(ValueError):
    """A value is NaN or infinite; `index` is its place in the array."""

    def __init__(self, index: int) -> None:
        super().__init__(f"the value at {index} is not finite")
        self.index = index


Opened = tuple[Bytes, NDArray[np.bool_]]
"""Blocks [G, 7, block width] that both halves, or the strong trapdoor, opened; which did [G]."""

Reader = Callable[[int, int], bytes]
"""Reads bytes [first, first + count) of a body."""

Mapper = Callable[..., Iterator[tuple[Integers, list[int]]]]
"""Maps a function over tasks, in order: see `Work.map`."""


@dataclass
class Decoding:
    """The integers of a vector, batch by batch, and what did not fit, known at the end.

    Iterating never stops early and raises nothing for content that cannot be right: whoever
    sees how long it takes learns nothing of where it went wrong.
    """

    batches: Iterator[Integers]
    bad_groups: list[int] = field(default_factory=list)
    bad_polynomials: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[Integers]:
        return self.batches

    @property
    def good(self) -> bool:
        """Whether everything opened; meaningful once all batches have been taken."""
        return not (self.bad_groups or self.bad_polynomials)


class Cipher(ABC):
    """What differs between the ciphers; knows neither files nor keys of parties.

    Raises UsageError for a modulus or a number format that it cannot work with.
    """

    name: ClassVar[str]
    threads: ClassVar[bool]
    """Whether its tasks run well in threads, whatever the kernel of the group."""

    def __init__(self, key: PublicKey, fixed_point: FixedPoint) -> None:
        self.key, self.fixed_point = key, fixed_point

    @property
    @abstractmethod
    def packing(self) -> Packing:
        """How integers become blocks."""

    @abstractmethod
    def groups(self, values: int) -> int:
        """Groups of blocks that a vector of so many values has."""

    @abstractmethod
    def body_bytes(self, values: int) -> int:
        """Bytes of the body of a vector of so many values; 0 where there is none."""

    @property
    @abstractmethod
    def group_values(self) -> int:
        """Values that a group of blocks holds; 0 where blocks hold none."""

    @abstractmethod
    def batches(self, values: int, lanes: int = 0) -> list[Batch]:
        """The batches that tasks work on, in order; they cover all values.

        With `lanes`, larger ones for work that reads many files side by side, but enough to
        keep so many tasks busy.
        """

    @abstractmethod
    def encoder(
        self,
        job: bytes,
        values: int,
        keys: OneTimeKeys,
        steps: Steps,
        mask_keys: Sequence[masks.Key],
    ) -> Encoder:
        """Begin an upload of `values` values; `mask_keys` are those of its round."""

    @abstractmethod
    def public_blocks(self, integers: Integers, groups: int) -> Bytes:
        """Public integers (of initial weights) as blocks, where blocks hold values."""

    @abstractmethod
    def check_body(self, values: int, batch: Batch, body: Reader) -> None:
        """Raise FormatError for a word of the body that is out of range."""

    @abstractmethod
    def combine_body(
        self,
        values: int,
        batch: Batch,
        uploads: Sequence[Reader],
        orphans: Sequence[masks.Key],
        parent: Reader | None,
        initial: Integers | None,
    ) -> bytes:
        """The body of a result: the sum of the uploads' without the masks `orphans`; or what it
        starts from, a parent's body or public integers, minus that sum.

        Each reader gives the bytes of one upload's body. Empty where there is no body. Raises
        FormatError for a word that is out of range.
        """

    @abstractmethod
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
        """Turn opened blocks and a body into integers.

        `uploads` is how many uploads are in the vector. `mask_keys` are taken off blocks and
        body before: those of one upload, with opposite signs, or none. `run` maps a function
        over tasks.
        """

    def block_shape(self, groups: int) -> tuple[int, int, int]:
        """Shape of the blocks of so many groups."""
        return groups, COMPONENTS, self.key.arithmetic.block_width


def spans(rows: int, step: int) -> list[tuple[int, int]]:
    """(first, count) of pieces of `step` rows."""
    return [(first, min(step, rows - first)) for first in range(0, rows, step)]
