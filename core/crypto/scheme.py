"""Encrypt, add, open: the double-trapdoor scheme on batches of groups.

A *group* is 7 blocks under one random r: residues uint8 [G, 8, width], in the order
c_0, c_1, ..., c_7, with

    c_0 = gamma^r modulo N,   c_j = h_j^r (1 + m_j N) modulo N^2.

c_0 stands for its lift c_0^N modulo N^2, which is g^r: an N-th residue, whatever c_0 is. So a
ciphertext cannot carry anything in c_0 that would show a bit of a half. Its blocks are uint8
[G, 7, block width], each a number in [0, N). Source: PROTOCOL.md, section 4; Damgard-Jurik
(ACISP 2003); one g^r for several keys: Kurosawa (PKC 2002), Bellare-Boldyreva-Staddon (PKC
2003).
"""

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dtl.core.crypto.group import COMPONENTS, PublicKey, StrongTrapdoor, half_bits, sum_bits
from dtl.core.crypto.residues import Bytes, FixedBaseTable, PaillierArithmetic
from dtl.core.errors import FormatError, VerificationError


@lru_cache(maxsize=2)
def _encryption_table(key: PublicKey, uses: int) -> FixedBaseTable:
    bases = (key.gamma, *key.h)
    return key.arithmetic.fixed_base_table(bases, key.exponent_bits, uses, groups=True)


_one_table = threading.Lock()  # lru_cache alone would let two threads make the same one


def check(key: PublicKey, residues: Bytes) -> None:
    """Raise FormatError unless residues [..., 8, width] are valid.

    c_0 must be in (0, N), c_j in (0, N^2), and all prime to N (protocol, section 4).
    """
    if residues.shape[-2] != COMPONENTS + 1:
        raise FormatError(f"expected groups of {COMPONENTS + 1} residues")
    key.arithmetic.check_groups(residues)


def lift(key: PublicKey, first: Bytes) -> Bytes:
    """c^N modulo N^2 for each c_0 of [G, width]: an N-th residue."""
    return key.arithmetic.lift(first)


def encrypt(key: PublicKey, blocks: Bytes, randomness: Bytes, expected_groups: int) -> Bytes:
    """Encrypt blocks [G, 7, block width] under randomness [G, ell/8] -> residues [G, 8, width].

    The randomness must be fresh for every group (see `one_time.group_randomness`).
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
    return key.arithmetic.group_product(batches)


def subtract(key: PublicKey, minuend: Bytes, subtrahend: Bytes) -> Bytes:
    """Subtract ciphertexts [G, 8, width]."""
    return key.arithmetic.group_product([minuend, key.arithmetic.inverse(subtrahend)])


def negate(key: PublicKey, residues: Bytes) -> Bytes:
    """Negate ciphertexts [G, 8, width]."""
    return key.arithmetic.group_inverse(residues)


def add_public(key: PublicKey, residues: Bytes, blocks: Bytes) -> Bytes:
    """Add public blocks [G, 7, block width]: c_j (1 + m_j N); c_0 is unchanged."""
    result = residues.copy()
    result[:, 1:] = key.arithmetic.add_blocks(residues[:, 1:], blocks)
    return result


def apply_half(key: PublicKey, residues: Bytes, half: Sequence[int]) -> Bytes:
    """Take one half off: c_j lift(c_0)^(-x_j); c_0 is unchanged.

    Raises VerificationError where a c_0 is not prime to N: check residues before.
    """
    arithmetic = key.arithmetic
    inverses = arithmetic.lift(arithmetic.inverse(residues[:, 0]))
    result = residues.copy()
    bits = half_bits(key.modulus_bits)
    powers = arithmetic.shared_base_powers(inverses, half, secret_bits=bits)
    result[:, 1:] = arithmetic.product([residues[:, 1:], powers])
    return result


def open_each(key: PublicKey, residues: Bytes) -> tuple[Bytes, NDArray[np.bool_]]:
    """Blocks of residues from which both halves have been taken off, and which groups opened.

    [G, 8, width] -> [G, 7, block width] and bool [G]. The blocks of a group that does not open
    are zero. Every group is computed, whatever became of those before it: so neither the
    result nor the time tells whoever made the ciphertext where it failed.
    """
    blocks, opened = key.arithmetic.logarithms(residues[:, 1:])
    good = np.logical_and.reduce(opened, axis=1)
    return blocks * good[:, None, None].astype(np.uint8), good


def open_blocks(key: PublicKey, residues: Bytes) -> Bytes:
    """Blocks [G, 7, block width] of residues from which both halves have been taken off.

    Raises VerificationError when any block does not open: a wrong key or a damaged file.
    """
    blocks, good = open_each(key, residues)
    if not good.all():
        raise VerificationError(
            "a block does not open",
            "the key does not belong to this ciphertext, or the ciphertext was damaged",
        )
    return blocks


def well_formed(
    key: PublicKey, residues: Bytes, blocks: Bytes, exponents: Sequence[int]
) -> NDArray[np.bool_]:
    """Which groups are encryptions of these blocks: bool [G].

    (c_j (1 + m_j N)^-1)^2 = lift(c_0)^(2 x_j) for j = 1..7, with x_j = a_j + b_j and m_j as the
    strong trapdoor opened it (protocol, section 4).
    """
    arithmetic = key.arithmetic
    bare = arithmetic.subtract_blocks(residues[:, 1:], blocks)
    doubled = [2 * exponent for exponent in exponents]
    bits = sum_bits(key.modulus_bits) + 1
    lifted = arithmetic.lift(residues[:, 0])
    powers = arithmetic.shared_base_powers(lifted, doubled, secret_bits=bits)
    same: NDArray[np.bool_] = (arithmetic.product([bare, bare]) == powers).all(axis=(1, 2))
    return same


def strong_open(trapdoor: StrongTrapdoor, residues: Bytes) -> Bytes:
    """Blocks of residues c_1..c_7 [..., width], each opened by itself with the strong trapdoor."""
    return PaillierArithmetic(trapdoor.p, trapdoor.q).open(residues)
