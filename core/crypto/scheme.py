"""Encrypt, add, open: the double-trapdoor scheme on batches of groups.

A *group* is 7 blocks under one random r: residues uint8 [G, 8, width], in the order
c_0, c_1, ..., c_7, with

    c_0 = g^r,   c_j = h_j^r (1 + m_j N)   modulo N^2.

Its blocks are uint8 [G, 7, block width], each a number in [0, N). Source: PROTOCOL.md,
section 4; one g^r for several keys: Kurosawa (PKC 2002), Bellare-Boldyreva-Staddon (PKC 2003).
"""

import secrets
import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dtl.core.crypto.group import COMPONENTS, PublicKey, StrongTrapdoor
from dtl.core.crypto.residues import Bytes, FixedBaseTable, PaillierArithmetic


def fresh_randomness(key: PublicKey, groups: int) -> Bytes:
    """Draw r for `groups` groups from the operating system: uint8 [G, ell/8]."""
    width = key.exponent_bits // 8
    return np.frombuffer(secrets.token_bytes(groups * width), np.uint8).reshape(groups, width)


@lru_cache(maxsize=2)
def _encryption_table(key: PublicKey, uses: int) -> FixedBaseTable:
    return key.arithmetic.fixed_base_table((key.g, *key.h), key.exponent_bits, uses)


_one_table = threading.Lock()  # lru_cache alone would let two threads make the same one


def encrypt(key: PublicKey, blocks: Bytes, randomness: Bytes, expected_groups: int) -> Bytes:
    """Encrypt blocks [G, 7, block width] under randomness [G, ell/8] -> residues [G, 8, width].

    `expected_groups` is how many groups will be encrypted in all: it sizes the table of
    powers, which is kept from call to call.
    """
    with _one_table:
        table = _encryption_table(key, expected_groups)
    padded = np.zeros((len(blocks), COMPONENTS + 1, blocks.shape[-1]), np.uint8)
    padded[:, 1:] = blocks  # c_0 carries none
    return table.powers(randomness, padded)


def add(key: PublicKey, batches: Sequence[Bytes]) -> Bytes:
    """Add ciphertexts: the componentwise product of batches [G, 8, width]."""
    return key.arithmetic.product(batches)


def subtract(key: PublicKey, minuend: Bytes, subtrahend: Bytes) -> Bytes:
    """Subtract ciphertexts [G, 8, width]."""
    return key.arithmetic.product([minuend, key.arithmetic.inverse(subtrahend)])


def negate(key: PublicKey, residues: Bytes) -> Bytes:
    """Negate ciphertexts [G, 8, width]."""
    return key.arithmetic.inverse(residues)


def add_public(key: PublicKey, residues: Bytes, blocks: Bytes) -> Bytes:
    """Add public blocks [G, 7, block width]: c_j (1 + m_j N); c_0 is unchanged."""
    result = residues.copy()
    result[:, 1:] = key.arithmetic.add_blocks(residues[:, 1:], blocks)
    return result


def apply_half(key: PublicKey, residues: Bytes, half: Sequence[int]) -> Bytes:
    """Take one half off: c_j (c_0^-1)^(x_j); c_0 is unchanged."""
    arithmetic = key.arithmetic
    powers = arithmetic.shared_base_powers(arithmetic.inverse(residues[:, 0]), half)
    result = residues.copy()
    result[:, 1:] = arithmetic.product([residues[:, 1:], powers])
    return result


def open_blocks(key: PublicKey, residues: Bytes) -> Bytes:
    """Blocks [G, 7, block width] of residues from which both halves have been taken off.

    Raises VerificationError when any block does not open: a wrong key or a damaged file.
    """
    return key.arithmetic.logarithms(residues[:, 1:])


def well_formed(
    key: PublicKey, residues: Bytes, blocks: Bytes, exponents: Sequence[int]
) -> NDArray[np.bool_]:
    """Which groups are encryptions of these blocks: bool [G].

    (c_j (1 + m_j N)^-1)^2 = (c_0^x_j)^2 for j = 1..7, with x_j = a_j + b_j and m_j as the
    strong trapdoor opened it (protocol, section 4).
    """
    bare = key.arithmetic.subtract_blocks(residues[:, 1:], blocks)
    powers = key.arithmetic.shared_base_powers(residues[:, 0], exponents)
    squares = [key.arithmetic.product([side, side]) for side in (bare, powers)]
    same: NDArray[np.bool_] = (squares[0] == squares[1]).all(axis=(1, 2))
    return same


def strong_open(trapdoor: StrongTrapdoor, residues: Bytes) -> Bytes:
    """Blocks of residues [..., width], each opened by itself with the strong trapdoor."""
    return PaillierArithmetic(trapdoor.p, trapdoor.q).open(residues)
