"""The proof inside a release: the residues sealed in it are the result's without half a.

For a result's groups i = 1..T with residues c, and c'_{j,i} = c_{j,i} lift(c_{0,i})^(-a_j), the
server combines all groups with 128-bit weights rho_i,

    Gamma = lift(prod c_{0,i}^rho_i),   D_j = prod (c_{j,i} / c'_{j,i})^rho_i,

and proves that log_Gamma D_j = log_g A_j for j = 1..7, with A_j = g^(a_j) from the public key:

    g^z_j = +- t_j A_j^e,   Gamma^z_j = +- t'_j D_j^e.

So whoever opens the release knows that it is the signed result. Source: PROTOCOL.md, section
11; Chaum-Pedersen (Crypto '92) in a group of unknown order, Fiat-Shamir made non-interactive,
small-exponent batching of Bellare-Garay-Rabin (Eurocrypt '98).
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dtl.core.crypto import scheme
from dtl.core.crypto.group import COMPONENTS, PublicKey
from dtl.core.crypto.primitives import fields, hash_fields, u32
from dtl.core.crypto.residues import Bytes, from_integers, to_integers
from dtl.core.errors import FormatError, VerificationError

SYSTEM_BYTES = 64
"""Bytes drawn from the operating system for every proof."""

_WEIGHT_BYTES = 16
_HIDING_BITS = 256  # w is so much longer than ell


class Products(NamedTuple):
    """prod c_{0,i}^rho_i modulo N, and D_1..D_7 = prod (c_{j,i} / c'_{j,i})^rho_i, over groups."""

    base: int
    quotients: tuple[int, ...]


class _Statement(NamedTuple):
    """What is proven: hashes bind it; Gamma is [width], D_1..D_7 are [7, width]."""

    core: bytes
    of: bytes
    opened_hash: bytes
    gamma: Bytes
    quotients: Bytes

    def items(self) -> tuple[bytes, ...]:
        """The items that stand for it in a hash, in order."""
        return self.core, self.of, self.opened_hash, self.gamma.tobytes(), *_items(self.quotients)


def _items(numbers: Bytes) -> list[bytes]:
    """Seven numbers [7, width] as seven items of a hash."""
    return [number.tobytes() for number in numbers]


def _no_proof() -> VerificationError:
    return VerificationError(
        "the proof of the release does not hold",
        "what the server sealed is not the signed result without its half",
    )


def half_opened_bytes(key: PublicKey, groups: int) -> int:
    """Bytes of c', [groups, 7, width]."""
    return groups * COMPONENTS * key.arithmetic.width


def _response_width(key: PublicKey) -> int:
    return -(-(key.exponent_bits + _HIDING_BITS + 1) // 8)


def proof_length(key: PublicKey) -> int:
    """Bytes of a proof: t_1..t_7, t'_1..t'_7, z_1..z_7."""
    return COMPONENTS * (2 * key.arithmetic.width + _response_width(key))


def weights(core: bytes, of: bytes, opened_hash: bytes, groups: int) -> Bytes:
    """rho_1..rho_T, uint8 [T, 16]. `opened_hash` is the SHA-512 of the bytes of c'."""
    item = fields("dtl/v2/release-rho", core, of, opened_hash)
    stream = hashlib.shake_256(item).digest(groups * _WEIGHT_BYTES)
    return np.frombuffer(stream, np.uint8).reshape(groups, _WEIGHT_BYTES)


def base_product(key: PublicKey, residues: Bytes, rho: Bytes) -> int:
    """prod c_{0,i}^rho_i modulo N of some groups [G, 8, width]: what Gamma is the lift of."""
    product = key.arithmetic.weighted_products(residues[:, :1], rho)
    return to_integers(product)[0] % key.n


def products(key: PublicKey, residues: Bytes, opened: Bytes, rho: Bytes) -> Products:
    """The products of some groups: c [G, 8, width], c' [G, 7, width], rho [G, 16].

    All of c and c' must be valid (protocol, section 4): with a c_0 of zero in one group,
    everything would pass. Raises FormatError for one of c, which anybody can see, and
    VerificationError for one of c', which is the proof's matter (protocol, section 11.4).
    """
    arithmetic = key.arithmetic
    scheme.check(key, residues)
    try:
        arithmetic.check(opened)
    except FormatError:
        raise _no_proof() from None
    groups = residues.copy()
    groups[:, 1:] = arithmetic.product([residues[:, 1:], arithmetic.inverse(opened)])
    base, *quotients = to_integers(arithmetic.weighted_products(groups, rho))
    return Products(base % key.n, tuple(quotients))


def joined(key: PublicKey, parts: Iterable[Products]) -> Products:
    """The products of all groups, from those of parts."""
    base, quotients = 1, [1] * COMPONENTS
    for part in parts:
        base = base * part.base % key.n
        quotients = [a * b % key.n**2 for a, b in zip(quotients, part.quotients, strict=True)]
    return Products(base, tuple(quotients))


def prove(
    key: PublicKey,
    half: Sequence[int],
    seed: bytes,
    core: bytes,
    of: bytes,
    opened_hash: bytes,
    base: int,
) -> bytes:
    """The proof for a result whose groups have `base` = prod c_{0,i}^rho_i.

    `half` is the server's, `seed` the one that it was expanded from; `core` and `of` are
    digests: of what the release says, and of the result. As every c'_j is c_j G^(-a_j), the
    quotients are D_j = Gamma^(a_j).
    """
    arithmetic = key.arithmetic
    gamma = arithmetic.lift(_row(key, base)[None])[0]
    quotients = arithmetic.shared_base_powers(gamma[None], half, secret_bits=key.exponent_bits + 1)[
        0
    ]
    return _respond(key, half, seed, _Statement(core, of, opened_hash, gamma, quotients))


def _respond(key: PublicKey, half: Sequence[int], seed: bytes, statement: _Statement) -> bytes:
    """Commit to fresh w_1..w_7, and answer the challenge."""
    arithmetic = key.arithmetic
    w = _witness(key, seed, statement)
    bases = np.stack([_row(key, key.g), statement.gamma])
    bits = key.exponent_bits + _HIDING_BITS
    t, t_prime = arithmetic.shared_base_powers(bases, w, secret_bits=bits)
    e = _challenge(statement, t, t_prime)
    z = [w_j + e * a_j for w_j, a_j in zip(w, half, strict=True)]
    responses = from_integers(z, _response_width(key))
    return b"".join(part.tobytes() for part in (t, t_prime, responses))


def verify(
    key: PublicKey, core: bytes, of: bytes, opened_hash: bytes, found: Products, proof: bytes
) -> None:
    """Raise VerificationError unless c' is what the server's half makes of c.

    `found` are the products of all groups, which also checks that they are valid.
    """
    if not _holds(key, core, of, opened_hash, found, proof):
        raise _no_proof()


def _holds(
    key: PublicKey, core: bytes, of: bytes, opened_hash: bytes, found: Products, proof: bytes
) -> bool:
    arithmetic = key.arithmetic
    if len(proof) != proof_length(key):
        return False
    split = 2 * COMPONENTS * arithmetic.width
    commitments = np.frombuffer(proof[:split], np.uint8).reshape(2, COMPONENTS, -1)
    responses = np.frombuffer(proof[split:], np.uint8).reshape(COMPONENTS, -1)
    try:
        arithmetic.check(commitments)
    except FormatError:
        return False
    z = to_integers(responses)
    if any(number >> (key.exponent_bits + _HIDING_BITS + 1) for number in z):
        return False
    statement = _stated(key, core, of, opened_hash, found)
    e = _challenge(statement, *commitments)
    bases = np.stack([_row(key, key.g), statement.gamma])
    left = arithmetic.shared_base_powers(bases, z, secret_bits=None)
    servers = from_integers(key.server, arithmetic.width)
    images = np.concatenate([servers, statement.quotients])
    powers = arithmetic.powers(images, e, secret_bits=None).reshape(commitments.shape)
    right = arithmetic.product([commitments, powers])
    sides = zip(to_integers(left), to_integers(right), strict=True)
    return all(a in (b, key.n**2 - b) for a, b in sides)


def _stated(
    key: PublicKey, core: bytes, of: bytes, opened_hash: bytes, found: Products
) -> _Statement:
    """What a proof must be about, for these products."""
    gamma = key.arithmetic.lift(_row(key, found.base)[None])[0]
    quotients = from_integers(found.quotients, key.arithmetic.width)
    return _Statement(core, of, opened_hash, gamma, quotients)


def _row(key: PublicKey, number: int) -> Bytes:
    return from_integers([number], key.arithmetic.width).reshape(-1)


def _witness(key: PublicKey, seed: bytes, statement: _Statement) -> list[int]:
    """w_1..w_7, fresh for every proof and every j.

    A w that is used under two challenges gives a_j away. So it depends on fresh bytes of the
    operating system and on the statement and the seed as well: a machine restored from a
    snapshot, or one whose generator repeats itself, makes the same w for the same statement
    only, which has the same challenge.
    """
    fresh = secrets.token_bytes(SYSTEM_BYTES)
    count = (key.exponent_bits + _HIDING_BITS) // 8
    inputs = (
        fields("dtl/v2/release-witness", seed, fresh, *statement.items(), u32(j))
        for j in range(1, COMPONENTS + 1)
    )
    return [int.from_bytes(hashlib.shake_256(item).digest(count), "little") for item in inputs]


def _challenge(statement: _Statement, t: Bytes, t_prime: Bytes) -> int:
    """e: 128 bits of the hash of the statement and the commitments."""
    items = (*statement.items(), *_items(t), *_items(t_prime))
    digest = hash_fields("dtl/v2/release-proof", *items)
    return int.from_bytes(digest[:_WEIGHT_BYTES], "little")
