"""The lattice body: every back end against plain Python integers, and against each other."""

import struct
from collections.abc import Sequence
from math import ceil, floor

import numpy as np
import pytest
from numpy.typing import NDArray

from dtl.core.crypto.primitives import hash_fields, keystream
from dtl.core.errors import FormatError, UsageError
from dtl.core.lattice import native, parameters, portable, ring
from dtl.core.lattice.arithmetic import Encoding, LatticeArithmetic, Mask, NonFinite, Values
from dtl.core.lattice.parameters import FULL, INSECURE, Ring, Shape

DELTA = 1 << 28
K_A, K_S, K_E, K_1, K_2 = (bytes([i]) * 32 for i in range(1, 6))
SEED = b"r" * 32


def backends(of: Ring) -> list[LatticeArithmetic]:
    """All back ends that run here; the slowest is the first."""
    found: list[LatticeArithmetic] = [portable.Arithmetic(of)]
    if native.unavailable() is None:
        found.append(native.Arithmetic(of, ifma=False))
    if native.why_not_ifma() is None:
        found.append(native.Arithmetic(of, ifma=True))
    return found


# --- the construction once more, in plain integers, straight from the text ------------------


def chacha(key: bytes, nonce: bytes, start: int, length: int) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream = Cipher(algorithms.ChaCha20(key, bytes(4) + nonce), None).encryptor()
    return stream.update(bytes(start + length))[start:]


def word(of: Ring, key: bytes, i: int, j: int, k: int) -> int:
    """word(key, i, j, k, t) for the least t for which it is below p_j; j from 1."""
    t = 0
    while True:
        data = chacha(key, struct.pack("<IQ", t, 4 * i + j - 1), 8 * k, 8)
        found = int.from_bytes(data, "little") % 2**50
        if found < of.primes[j - 1]:
            return found
        t += 1


def small(key: bytes, nonce: bytes, n: int) -> list[int]:
    data = chacha(key, nonce, 0, 16 * n)
    return [int.from_bytes(data[16 * c : 16 * c + 16], "little").bit_count() - 64 for c in range(n)]


def brv(k: int, n: int) -> int:
    return int(f"{k:0{n.bit_length() - 1}b}"[::-1], 2)


def negacyclic_from_values(values: list[int], psi: int, p: int) -> list[int]:
    """The polynomial with these values in NTT order: interpolation, one coefficient at a time."""
    n = len(values)
    inverse, by_n = pow(psi, -1, p), pow(n, -1, p)
    powers = [1]
    for _ in range(2 * n - 1):
        powers.append(powers[-1] * inverse % p)
    places = [2 * brv(k, n) + 1 for k in range(n)]
    return [
        sum(v * powers[e * c % (2 * n)] for v, e in zip(values, places, strict=True)) * by_n % p
        for c in range(n)
    ]


def evaluate(coefficients: Sequence[int], point: int, p: int) -> int:
    total = 0
    for c in reversed(coefficients):
        total = (total * point + c) % p
    return total


def encode(words: list[list[int]]) -> bytes:
    """25 m bytes: four times the low 48 bits of m words, then the tops."""
    low = b"".join((w % 2**48).to_bytes(6, "little") for row in words for w in row)
    return low + bytes(sum(row[c] >> 48 << 2 * j for j, row in enumerate(words))
                       for c in range(len(words[0])))  # fmt: skip


def decode(data: bytes) -> list[list[int]]:
    m = len(data) // 25
    return [
        [int.from_bytes(data[6 * (m * j + c) : 6 * (m * j + c) + 6], "little")
         | (data[24 * m + c] >> 2 * j & 3) << 48 for c in range(m)]
        for j in range(4)
    ]  # fmt: skip


def packed(integers: Sequence[int], slot_bits: int, m: int) -> list[int]:
    """X of one polynomial."""
    x = [0] * m
    for u, e in enumerate(integers):
        x[u % m] += e << slot_bits * (u // m)
    return x


def rounded(value: float, place: int, encoding: Encoding) -> int:
    x = max(-(2.0**60), min(2.0**60, value * encoding.scale * encoding.one))
    if encoding.seed is None:
        low = floor(x)
        fraction = x - low
        up = fraction > 0.5 or (fraction == 0.5 and low % 2 == 1)
    else:
        low = floor(x)
        u = int.from_bytes(keystream(encoding.seed, 4 * place, 4), "little")
        up = u < (x - low) * 2**32
    return low + up


def clamped(value: int, limit: int) -> int:
    return max(-limit, min(limit, value))


class Slow:
    """Upload and opening over the small ring."""

    def __init__(self, of: Ring, slot_bits: int, total: int) -> None:
        self.ring, self.slot_bits, self.total = of, slot_bits, total
        self.slots = 171 // slot_bits
        self.n = of.n

    def parts(self) -> list[tuple[int, int, int]]:
        """(first value, values, m) of every polynomial."""
        found, at = [], 0
        while at < self.total:
            held = min(self.n * self.slots, self.total - at)
            full = held == self.n * self.slots
            found.append((at, held, self.n if full else ceil(held / self.slots)))
            at += held
        return found

    def pad(self, s: list[int], i: int, j: int) -> list[int]:
        p, psi = self.ring.primes[j - 1], self.ring.roots[j - 1]
        values = [
            word(self.ring, K_A, i, j, k) * evaluate(s, pow(psi, 2 * brv(k, self.n) + 1, p), p)
            for k in range(self.n)
        ]
        return negacyclic_from_values(values, psi, p)

    def upload(
        self, s: list[int], errors: list[list[int]], integers: Sequence[int], masks: list[Mask]
    ) -> bytes:
        out = b""
        for i, (at, held, m) in enumerate(self.parts()):
            x = packed(integers[at : at + held], self.slot_bits, m)
            words = []
            for j, p in enumerate(self.ring.primes, 1):
                pad = self.pad(s, i, j)
                row = [(pad[c] + errors[i][c] + DELTA * x[c]) % p for c in range(m)]
                for sign, key in masks:
                    row = [(w + sign * word(self.ring, key, i, j, c)) % p
                           for c, w in enumerate(row)]  # fmt: skip
                words.append(row)
            out += encode(words)
        return out
