# The lattice kernel; sizes are checked there, what the arguments mean stands in _lattice.h.
from typing import Any

from numpy.typing import NDArray

Buffer = bytes | NDArray[Any]

def variants() -> list[str]: ...

class Ring:
    def __new__(
        cls,
        n: int,
        primes: tuple[int, int, int, int],
        roots: tuple[int, ...],
        variant: str,
        /,
    ) -> Ring: ...
    def sample(self, key: Buffer, polynomial: int, out: Buffer, /) -> None: ...
    def transform(self, small: Buffer, out: Buffer, /) -> None: ...
    def pad(
        self,
        k_a: Buffer,
        secret: Buffer | None,
        k_e: Buffer,
        masks: Buffer,
        slot_bits: int,
        kind: str,
        values: Buffer,
        scale: float,
        one: float,
        limit: float,
        seed: Buffer | None,
        first: int,
        first_value: int,
        out: Buffer,
        /,
    ) -> tuple[bool, int]: ...
    def open(
        self,
        k_a: Buffer,
        secret: Buffer,
        bound: int,
        slot_bits: int,
        body: Buffer,
        first: int,
        out: Buffer,
        /,
    ) -> tuple[bool, bool]: ...
    def sum_body(self, sum: Buffer, body: Buffer, how: int, /) -> bool: ...
    def sum_mask(self, sum: Buffer, first: int, minus: bool, key: Buffer, /) -> None: ...
    def sum_reduce(self, sum: Buffer, /) -> None: ...
    def sum_write(self, sum: Buffer, out: Buffer, /) -> None: ...
