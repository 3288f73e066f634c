"""Sections 2 to 4: the group, halves, residues, and opening with either trapdoor."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd

from tests.second.encoding import fields, numbers, require, u32

Blocks = list[list[int]]  # seven a group
Residues = list[list[int]]  # eight a group, or seven without c_0


@dataclass
class Group:
    """The public key, and the sizes that follow from it."""

    identity: bytes
    bits: int
    N: int
    gamma: int
    h: list[int]
    A: list[int]

    @cached_property
    def square(self) -> int:
        return self.N * self.N

    @cached_property
    def g(self) -> int:
        return self.lift(self.gamma)

    @property
    def ell(self) -> int:
        return 224 if self.bits == 2048 else 256

    @property
    def width(self) -> int:
        """Bytes of a residue."""
        return 2 * self.bits // 8

    @property
    def moduli(self) -> list[int]:
        """Of c_0, c_1, ..., c_7."""
        return [self.N, *[self.square] * 7]

    def lift(self, number: int) -> int:
        return pow(number, self.N, self.square)

    def check(self) -> None:
        """Raise Refused unless the numbers can be those of a key."""
        require(self.N.bit_length() == self.bits and self.N % 2, 3, "N cannot be a modulus")
        require(self.bits >= 256 and self.bits % 16 == 0, 3, "no such size")
        require(1 < self.gamma < self.N, 3, "gamma out of range")
        require(gcd(self.gamma, self.N) == 1, 3, "gamma shares a factor with N")
        require(gcd(self.gamma - 1, self.N) == 1, 3, "gamma is not a generator")
        for number in (*self.h, *self.A):
            require(1 < number < self.square, 3, "h or A out of range")
            require(gcd(number, self.N) == 1, 3, "h or A shares a factor with N")

    def half(self, seed: bytes, label: str) -> list[int]:
        """a_1..a_7 or b_1..b_7."""
        seeds = [fields("dtl/v2/expand", label, self.identity, seed, u32(j)) for j in range(1, 8)]
        digests = [hashlib.shake_256(item).digest(self.ell // 8) for item in seeds]
        return [2 * int.from_bytes(digest, "little") for digest in digests]

    def are_powers(self, images: Sequence[int], base: Sequence[int], half: list[int]) -> bool:
        """Whether image_j = base_j g^(x_j) for every j."""
        return all(
            image == start * pow(self.g, x, self.square) % self.square
            for image, start, x in zip(images, base, half, strict=True)
        )

    def residues(self, raw: bytes, columns: int = 8) -> Residues:
        found = numbers(raw, self.width)
        return [found[at : at + columns] for at in range(0, len(found), columns)]

    def encode(self, rows: Iterable[Iterable[int]]) -> bytes:
        return b"".join(c.to_bytes(self.width, "little") for row in rows for c in row)

    def check_numbers(self, found: Iterable[int], code: int) -> None:
        """Below N^2, above 0, and prime to N."""
        product = 1
        for number in found:
            require(0 < number < self.square, code, "a residue out of range")
            product = product * number % self.N
        require(gcd(product, self.N) == 1, code, "a residue that shares a factor with N")

    def check_groups(self, residues: Residues, code: int) -> None:
        """The same of c_1..c_7, and of c_0 with N in place of N^2."""
        for row in residues:
            require(row[0] < self.N, code, "a c_0 out of range")
        self.check_numbers((c for row in residues for c in row), code)

    def remove(self, residues: Residues, half: list[int]) -> Residues:
        """Remove one half from c_1..c_7."""
        found = []
        for c0, *others in residues:
            inverse = pow(self.lift(c0), -1, self.square)
            powers = [pow(inverse, x, self.square) for x in half]
            found.append([c0, *(c * u % self.square for c, u in zip(others, powers, strict=True))])
        return found

    def messages(self, residues: Residues) -> Blocks:
        """The blocks, after both halves have been removed."""
        return [[self._message(u) for u in row[1:]] for row in residues]

    def _message(self, u: int) -> int:
        require(u % self.N in (1, self.N - 1), 4, "a block that does not open")
        return ((u if u % self.N == 1 else self.square - u) - 1) // self.N

    def strong_open(self, residues: Residues, p: int, q: int) -> Blocks:
        """Every residue by itself, with p and q alone."""
        return [[self._decrypt(c, p, q) for c in row[1:]] for row in residues]

    def _decrypt(self, c: int, p: int, q: int) -> int:
        parts = []
        for prime, other in ((p, q), (q, p)):
            # c = y^N (1 + N)^m: the order of y^N modulo prime^2 divides prime - 1
            u = pow(c, prime - 1, prime * prime)
            log = (u - 1) // prime
            parts.append(log * pow((prime - 1) * other, -1, prime) % prime)
        return (parts[0] + p * ((parts[1] - parts[0]) * pow(p, -1, q) % q)) % self.N

    def is_well_formed(self, row: list[int], blocks: list[int], halves: list[int]) -> bool:
        """Section 4.7, of one group; `halves` are a_j + b_j."""
        lifted = self.lift(row[0])
        return all(
            pow(c * pow(1 + m * self.N, -1, self.square), 2, self.square)
            == pow(lifted, 2 * x, self.square)
            for c, m, x in zip(row[1:], blocks, halves, strict=True)
        )

    def product(self, left: Residues, right: Residues) -> Residues:
        return [
            [x * y % modulus for x, y, modulus in zip(one, other, self.moduli, strict=True)]
            for one, other in zip(left, right, strict=True)
        ]

    def inverse(self, residues: Residues) -> Residues:
        return [
            [pow(c, -1, modulus) for c, modulus in zip(row, self.moduli, strict=True)]
            for row in residues
        ]

    def public(self, blocks: Blocks) -> Residues:
        """The residues that blocks are multiplied by to add something public."""
        return [[1, *((1 + m * self.N) % self.square for m in row)] for row in blocks]
