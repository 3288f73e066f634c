"""The proof that comes with every upload: knowledge and well-formedness, batched.

For groups i = 1..T with blocks m_{j,i} and randomness r_i, the prover shows that it knows
them all, in one Schnorr-like proof over a random combination with 128-bit weights rho_i:

    gamma^z           = +- d_0 prod c_{0,i}^rho_i          modulo N
    h_j^z (1 + v_j N) = +- d_j prod c_{j,i}^rho_i          j = 1..7, modulo N^2.

It rules out copied or powered uploads, and residues that open to nothing. It does not prove
ranges. The sign is part of the statement. Source: PROTOCOL.md, section 6; small-exponent
batching of Bellare-Garay-Rabin (Eurocrypt '98), Fiat-Shamir made non-interactive.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from dtl.core.crypto import scheme
from dtl.core.crypto.group import COMPONENTS, PublicKey
from dtl.core.crypto.primitives import fields, hash_fields, u32
from dtl.core.crypto.residues import Bytes, FixedBaseTable, from_integers, to_integers
from dtl.core.errors import FormatError, VerificationError

WEIGHT_BYTES = 16
_WEIGHT_BITS = 8 * WEIGHT_BYTES
_HIDING_BITS = 128  # kappa
_TABLE_USES = 8  # proofs from which on a table of powers is worth making
_EXTRA_BYTES = 16  # so that s modulo N is uniform up to 2^-128


@dataclass(frozen=True)
class Witness:
    """What the prover must never use twice: w, and s_1..s_7."""

    w: int = field(repr=False)
    s: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Proof:
    """The commitments d_0..d_7, and the responses z and v_1..v_7."""

    d: tuple[int, ...]
    z: int
    v: tuple[int, ...]


def witness_bits(key: PublicKey, groups: int) -> int:
    """ell' = ell + 128 + kappa + ceil(log2 T)."""
    return key.exponent_bits + _WEIGHT_BITS + _HIDING_BITS + (groups - 1).bit_length()


def _response_width(key: PublicKey, groups: int) -> int:
    return -(-(witness_bits(key, groups) + 1) // 8)


def proof_length(key: PublicKey, groups: int) -> int:
    """Bytes of an encoded proof: 8 residues, z, and 7 blocks."""
    arithmetic = key.arithmetic
    fixed = (COMPONENTS + 1) * arithmetic.width + COMPONENTS * arithmetic.block_width
    return fixed + _response_width(key, groups)


def encode(key: PublicKey, groups: int, proof: Proof) -> bytes:
    """d_0..d_7, z, v_1..v_7, all little-endian, each of its fixed width."""
    arithmetic = key.arithmetic
    return (
        from_integers(proof.d, arithmetic.width).tobytes()
        + proof.z.to_bytes(_response_width(key, groups), "little")
        + from_integers(proof.v, arithmetic.block_width).tobytes()
    )


def decode(key: PublicKey, groups: int, data: bytes) -> Proof:
    """The opposite of `encode`; FormatError for a wrong length."""
    if len(data) != proof_length(key, groups):
        raise FormatError("the proof has the wrong length")
    arithmetic = key.arithmetic
    start = (COMPONENTS + 1) * arithmetic.width
    end = start + _response_width(key, groups)
    d = np.frombuffer(data[:start], np.uint8).reshape(-1, arithmetic.width)
    v = np.frombuffer(data[end:], np.uint8).reshape(-1, arithmetic.block_width)
    z = int.from_bytes(data[start:end], "little")
    return Proof(tuple(to_integers(d)), z, tuple(to_integers(v)))


def _witness_width(key: PublicKey, groups: int) -> int:
    return -(-witness_bits(key, groups) // 8)


def witness_bytes(key: PublicKey, groups: int) -> int:
    """Bytes of keystream that a witness is made of: w, then s_1..s_7 with 16 more each."""
    return _witness_width(key, groups) + COMPONENTS * (key.arithmetic.block_width + _EXTRA_BYTES)


def commit(key: PublicKey, groups: int, stream: bytes) -> tuple[Witness, tuple[int, ...]]:
    """The witness that `stream` makes, and its commitments d_0..d_7.

    d_0 = gamma^w modulo N, d_j = h_j^w (1 + s_j N) modulo N^2. `stream` is `witness_bytes` of a
    keystream that is used for nothing else; ValueError for another length.
    """
    if len(stream) != witness_bytes(key, groups):
        raise ValueError("a witness takes another number of bytes")
    width, step = _witness_width(key, groups), key.arithmetic.block_width + _EXTRA_BYTES
    w = int.from_bytes(stream[:width], "little") & ((1 << witness_bits(key, groups)) - 1)
    s = tuple(
        int.from_bytes(stream[start : start + step], "little") % key.n
        for start in range(width, len(stream), step)
    )
    powers = _key_powers(key, w, s, witness_bits(key, groups))
    return Witness(w, s), tuple(to_integers(powers))


def _key_powers(
    key: PublicKey, exponent: int, blocks: Sequence[int], secret_bits: int | None
) -> Bytes:
    """gamma^e modulo N, h_1^e (1 + m_1 N), ..., h_7^e (1 + m_7 N): a group, [8, width]."""
    arithmetic = key.arithmetic
    bases = from_integers((key.gamma, *key.h), arithmetic.width)
    powers = arithmetic.powers(bases, exponent, secret_bits=secret_bits)
    encoded = from_integers((0, *blocks), arithmetic.block_width)
    return arithmetic.reduce_groups(arithmetic.add_blocks(powers, encoded))


def weights(
    key: PublicKey,
    header: bytes,
    signing_key: bytes,
    groups: int,
    residues_digest: bytes,
    body_digest: bytes | None,
    d: tuple[int, ...],
) -> Bytes:
    """rho_1..rho_T, uint8 [T, 16], from everything that the statement names.

    The header names job, round, base, roster, participant and layout; the digests are those of
    the tensors `residues` and `body`, None where there is no body.
    """
    width = key.arithmetic.width
    state = hash_fields(
        "dtl/v2/upload-proof",
        header,
        signing_key,
        u32(groups),
        residues_digest,
        body_digest,
        *(value.to_bytes(width, "little") for value in d),
    )
    stream = hashlib.shake_256(fields("dtl/v2/upload-rho", state)).digest(groups * WEIGHT_BYTES)
    return np.frombuffer(stream, np.uint8).reshape(groups, WEIGHT_BYTES)


class Responder:
    """Collects the responses z = w + sum rho_i r_i, v_j = s_j + sum rho_i m_{j,i} mod N."""

    def __init__(self, key: PublicKey, witness: Witness) -> None:
        self._n = key.n
        self._z = witness.w
        self._v = list(witness.s)

    def add(self, rho: Bytes, randomness: Bytes, blocks: Bytes) -> None:
        """Add groups: rho [G, 16], r [G, ell/8], blocks [G, 7, block width]."""
        numbers = to_integers(rho)
        self._z += sum(a * b for a, b in zip(numbers, to_integers(randomness), strict=True))
        for j in range(COMPONENTS):
            column = to_integers(blocks[:, j])
            self._v[j] += sum(a * b for a, b in zip(numbers, column, strict=True))

    def proof(self, d: tuple[int, ...]) -> Proof:
        """The finished proof."""
        return Proof(d, self._z, tuple(value % self._n for value in self._v))


def check_ranges(key: PublicKey, groups: int, proof: Proof) -> None:
    """Raise VerificationError for commitments or responses out of range."""
    try:
        scheme.check(key, from_integers(proof.d, key.arithmetic.width))
    except FormatError as error:
        raise VerificationError(f"the proof does not hold: {error.message}") from None
    if proof.z >> (witness_bits(key, groups) + 1) or max(proof.v) >= key.n:
        raise VerificationError("the proof does not hold: a response is out of range")


@lru_cache(maxsize=2)
def _response_table(key: PublicKey, uses: int) -> FixedBaseTable:
    bits = 8 * _table_width(key)
    return key.arithmetic.fixed_base_table((key.gamma, *key.h), bits, uses, groups=True)


def _table_width(key: PublicKey) -> int:
    """Bytes of the longest response, of 2^64 groups."""
    return (key.exponent_bits + _WEIGHT_BITS + _HIDING_BITS + 64) // 8


_one_table = threading.Lock()  # lru_cache alone would let two threads make the same one


def _response_powers(key: PublicKey, proof: Proof, expected: int) -> Bytes:
    """gamma^z modulo N, h_1^z (1 + v_1 N), ..., h_7^z (1 + v_7 N): [8, width]."""
    if expected < _TABLE_USES:
        return _key_powers(key, proof.z, proof.v, None)
    with _one_table:
        table = _response_table(key, expected)
    blocks = from_integers((0, *proof.v), key.arithmetic.block_width)
    powers = table.powers(from_integers([proof.z], _table_width(key)), blocks[None])
    return powers.reshape(powers.shape[1:])


def verify(key: PublicKey, proof: Proof, products: list[int], expected: int = 1) -> None:
    """Raise VerificationError unless the equations hold.

    `products` are prod c_{j,i}^rho_i for j = 0..7 (see `Arithmetic.weighted_products`); of
    the first only the value modulo N counts. The ranges must have been checked before.
    `expected` is how many proofs are verified in all: from some on, a table of powers is made,
    and kept from call to call.
    """
    moduli = (key.n, *[key.n**2] * COMPONENTS)
    powers = to_integers(_response_powers(key, proof, expected))
    for left, d, product, modulus in zip(powers, proof.d, products, moduli, strict=True):
        right = d * product % modulus
        if left not in (right, modulus - right):
            raise VerificationError(
                "the proof of the upload does not hold",
                "its sender does not know what it encrypts, or it is not well-formed",
            )
