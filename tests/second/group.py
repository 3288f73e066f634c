"""Sections 2 to 4: the group, halves, residues, and opening with either trapdoor."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import gcd

from tests.second.encoding import fields, require, u32

Blocks = list[list[int]]  # seven a group
Residues = list[list[int]]  # eight a group


@dataclass
class Group:
    """The public key, and the sizes that follow from it."""

    identity: bytes
    bits: int
    N: int
    g: int
    h: list[int]
    slot_bits: int

    @cached_property
    def square(self) -> int:
        return self.N * self.N

    @property
    def ell(self) -> int:
        return 224 if self.bits == 2048 else 256

    @property
    def width(self) -> int:
        """Bytes of a residue."""
        return 2 * self.bits // 8

    @property
    def slots(self) -> int:
        """Values of a block."""
        return (self.bits - 2) // self.slot_bits

    def groups(self, values: int) -> int:
        return -(-values // (7 * self.slots))

    def check(self) -> None:
        """Raise Refused unless the numbers can be those of a key."""
        require(self.N.bit_length() == self.bits and self.N % 2, 3, "N cannot be a modulus")
        require(self.bits >= 256 and self.bits % 16 == 0, 3, "no such size")
        for number in (self.g, *self.h):
            require(1 < number < self.square, 3, "g or h out of range")
            require(gcd(number, self.N) == 1, 3, "g or h shares a factor with N")
        require(gcd(self.g - 1, self.N) == 1, 3, "g is not a generator")
        require(self.slots >= 1, 3, "a slot does not fit into a block")

    def half(self, seed: bytes, label: str) -> list[int]:
        """a_1..a_7 or b_1..b_7."""
        return [
            2
            * int.from_bytes(
                hashlib.shake_256(
                    fields("dtl/v2/expand", label, self.identity, seed, u32(j))
                ).digest(self.ell // 8),
                "little",
            )
            for j in range(1, 8)
        ]

    def residues(self, raw: bytes) -> Residues:
        return list(rows(raw, self.width, 8))

    def encode(self, residues: Iterable[list[int]]) -> bytes:
        return b"".join(c.to_bytes(self.width, "little") for group in residues for c in group)

    def check_residues(self, numbers: Iterable[int], code: int) -> None:
        """In range, and prime to N; all of them at once."""
        product = 1
        for number in numbers:
            require(0 < number < self.square, code, "a residue out of range")
            product = product * number % self.N
        require(gcd(product, self.N) == 1, code, "a residue that shares a factor with N")

    def take_off(self, residues: Residues, half: list[int]) -> Residues:
        taken = []
        for c0, *others in residues:
            inverse = pow(c0, -1, self.square)
            powers = (pow(inverse, x, self.square) for x in half)
            taken.append([c0, *(c * u % self.square for c, u in zip(others, powers, strict=True))])
        return taken

    def centre(self, residues: Residues) -> Blocks:
        """The blocks, after both halves have been taken off."""
        return [[self._message(u) for u in group[1:]] for group in residues]

    def _message(self, u: int) -> int:
        require(u % self.N in (1, self.N - 1), 4, "a wrong key, or a damaged file")
        return ((u if u % self.N == 1 else self.square - u) - 1) // self.N

    def strong_open(self, residues: Residues, p: int, q: int) -> Blocks:
        """Every residue by itself, with p and q alone."""
        return [[self._decrypt(c, p, q) for c in group[1:]] for group in residues]

    def _decrypt(self, c: int, p: int, q: int) -> int:
        parts = []
        for prime, other in ((p, q), (q, p)):
            # c = y^N (1 + N)^m: the order of y^N modulo prime^2 divides prime - 1
            u = pow(c, prime - 1, prime * prime)
            log = (u - 1) // prime
            parts.append(log * pow((prime - 1) * other, -1, prime) % prime)
        return (parts[0] + p * ((parts[1] - parts[0]) * pow(p, -1, q) % q)) % self.N

    def product(self, left: Residues, right: Residues) -> Residues:
        return [
            [x * y % self.square for x, y in zip(one, other, strict=True)]
            for one, other in zip(left, right, strict=True)
        ]

    def inverse(self, residues: Residues) -> Residues:
        return [[pow(c, -1, self.square) for c in group] for group in residues]

    def public(self, blocks: Blocks) -> Residues:
        """The residues that blocks are multiplied by to add something public."""
        return [[1, *((1 + m * self.N) % self.square for m in group)] for group in blocks]


def rows(raw: bytes, width: int, count: int) -> Iterator[list[int]]:
    """Little-endian numbers of `width` bytes, `count` at a time."""
    for start in range(0, len(raw), width * count):
        yield [
            int.from_bytes(raw[at : at + width], "little")
            for at in range(start, start + width * count, width)
        ]
