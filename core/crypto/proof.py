"""The proof that comes with every upload: knowledge and well-formedness, batched.

For groups i = 1..T with blocks m_{j,i} and randomness r_i, the prover shows that it knows
them all, in one Schnorr-like proof over a random combination with 128-bit weights rho_i:

    g^z             = +- d_0 prod c_{0,i}^rho_i
    h_j^z (1 + v_j N) = +- d_j prod c_{j,i}^rho_i          j = 1..7, modulo N^2.

It rules out an N-part in c_0 (which would make a release reveal the server's half), copied
or powered uploads, and residues that open to nothing. It does not prove ranges. The sign is
part of the statement. Source: PROTOCOL.md, section 6; small-exponent batching of
Bellare-Garay-Rabin (Eurocrypt '98), Fiat-Shamir made non-interactive.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dtl.core.crypto.group import COMPONENTS, PublicKey
from dtl.core.crypto.primitives import fields, hash_fields, u32
from dtl.core.crypto.residues import Bytes, from_integers, to_integers
from dtl.core.errors import FormatError, VerificationError

WEIGHT_BYTES = 16
_WEIGHT_BITS = 8 * WEIGHT_BYTES
_HIDING_BITS = 128  # kappa


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


def commit(key: PublicKey, groups: int) -> tuple[Witness, tuple[int, ...]]:
    """A fresh witness, and its commitments d_0 = g^w, d_j = h_j^w (1 + s_j N)."""
    witness = Witness(
        secrets.randbits(witness_bits(key, groups)),
        tuple(secrets.randbelow(key.n) for _ in range(COMPONENTS)),
    )
    d = _key_powers(key, witness.w, (0, *witness.s))
    return witness, tuple(to_integers(d))


def _key_powers(key: PublicKey, exponent: int, blocks: Sequence[int]) -> Bytes:
    """g^e (1 + m_0 N), h_1^e (1 + m_1 N), ..., [8, width]."""
    arithmetic = key.arithmetic
    bases = from_integers((key.g, *key.h), arithmetic.width)
    powers = arithmetic.powers(bases, exponent)
    return arithmetic.add_blocks(powers, from_integers(blocks, arithmetic.block_width))


def weights(
    key: PublicKey,
    header: bytes,
    signing_key: bytes,
    groups: int,
    residues_hash: bytes,
    d: tuple[int, ...],
) -> Bytes:
    """rho_1..rho_T, uint8 [T, 16], from everything that the statement names.

    The header names job, round, base, roster, participant and layout.
    """
    width = key.arithmetic.width
    state = hash_fields(
        "dtl/v2/upload-proof",
        header,
        signing_key,
        u32(groups),
        residues_hash,
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
        key.arithmetic.check(from_integers(proof.d, key.arithmetic.width))
    except FormatError as error:
        raise VerificationError(f"the proof does not hold: {error.message}") from None
    if proof.z >> (witness_bits(key, groups) + 1) or max(proof.v) >= key.n:
        raise VerificationError("the proof does not hold: a response is out of range")


def verify(key: PublicKey, proof: Proof, products: list[int]) -> None:
    """Raise VerificationError unless the equations hold.

    `products` are prod c_{j,i}^rho_i for j = 0..7 (see `Arithmetic.weighted_products`); the
    ranges must have been checked before.
    """
    n2 = key.n**2
    powers = to_integers(_key_powers(key, proof.z, (0, *proof.v)))
    for left, d, product in zip(powers, proof.d, products, strict=True):
        right = d * product % n2
        if left not in (right, n2 - right):
            raise VerificationError(
                "the proof of the upload does not hold",
                "its sender does not know what it encrypts, or it is not well-formed",
            )
