"""Pairwise masks: uniform blocks that cancel in the sum of all uploads of a round.

Every pair of participants shares a seed; a round's key is derived from it, and a ChaCha20
keystream under that key gives one number modulo N for every block. Participant i adds the
numbers it shares with later participants and subtracts those it shares with earlier ones.
Source: PROTOCOL.md, section 7; Bonawitz et al. (CCS 2017) without their double masking.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from dtl.core.crypto.primitives import KEY_BYTES, derive, fields, keystream, tag, u32
from dtl.core.crypto.residues import Bytes, from_integers, to_integers

EXTRA_BYTES = 16
"""Keystream bytes beyond those of N, so that the number modulo N is uniform up to 2^-128."""

Key = tuple[int, bytes]
"""(sign, round key): +1 where the mask is added, -1 where it is subtracted."""

_LIMB_BITS = 32


def pair_seed(root: bytes, job_id: bytes, first: str, second: str) -> bytes:
    """The seed s_ij that the center gives to two participants, named in roster order."""
    return derive(root, fields("dtl/v2/mask-seed", job_id, first, second), KEY_BYTES)


def round_key(
    seed: bytes,
    job: bytes,
    number: int,
    base: bytes | None,
    opened: bytes | None,
    roster: bytes,
) -> bytes:
    """k_ij: bound to the job, the round, the base, what was opened as the base, the roster."""
    info = fields("dtl/v2/mask", job, u32(number), base, opened, roster)
    return derive(seed, info, KEY_BYTES)


def body_key(key: bytes) -> bytes:
    """The key k' of the masks of the lattice body, derived from the round key k of a pair."""
    return derive(key, fields("dtl/v2/body-mask"), KEY_BYTES)


def audit_seed(root: bytes, job_id: bytes, name: str) -> bytes:
    """The seed with which a participant tags what it opened; the center derives it again."""
    return derive(root, fields("dtl/v2/audit-seed", job_id, name), KEY_BYTES)


def opened_tag(seed: bytes, number: int, base: bytes, opened: bytes) -> bytes:
    """The 16-byte tag of an upload of round `number`: what its sender opened as the base.

    `seed` is that of `audit_seed`. Only the center can recompute it (PROTOCOL.md, section 7).
    """
    return tag(seed, fields("dtl/v2/opened", u32(number), base, opened))


def sign_of(own: str, other: str) -> int:
    """The sign with which `own` applies the mask it shares with `other`."""
    return 1 if own < other else -1


def mask_sums(keys: Sequence[Key], first: int, count: int, width: int) -> list[int]:
    """The signed sum of all masks for blocks first, ..., first + count - 1; not yet reduced.

    `width` is that of a block in bytes. The keystreams are added up as columns of 32-bit
    limbs, lifted so that none is negative; only the sums become numbers.
    """
    stride = width + EXTRA_BYTES
    lift = len(keys) << _LIMB_BITS
    limbs = np.full((count, stride // 4), lift, np.int64)
    for sign, key in keys:
        stream = np.frombuffer(keystream(key, first * stride, count * stride), "<u4")
        change = np.add if sign > 0 else np.subtract
        change(limbs, stream.reshape(count, -1), out=limbs)
    words = limbs.astype("<u8", copy=False).view("<u4").reshape(count, -1, 2)
    low, high = (to_integers(np.ascontiguousarray(words[..., k]).view(np.uint8)) for k in (0, 1))
    lifted = sum(lift << (_LIMB_BITS * place) for place in range(stride // 4))
    return [a + (b << _LIMB_BITS) - lifted for a, b in zip(low, high, strict=True)]


def add_masks(blocks: Bytes, keys: Sequence[Key], first: int, modulus: int) -> Bytes:
    """Add the masks of `keys` to blocks [n, block width], the first being number `first`."""
    if not keys or not len(blocks):
        return blocks
    sums = mask_sums(keys, first, len(blocks), blocks.shape[-1])
    return _reduced(zip(to_integers(blocks), sums, strict=True), modulus, blocks.shape[-1])


def mask_blocks(keys: Sequence[Key], first: int, count: int, modulus: int) -> Bytes:
    """The masks alone, as blocks [count, block width]."""
    width = modulus.bit_length() // 8
    sums = mask_sums(keys, first, count, width)
    return _reduced(((0, total) for total in sums), modulus, width)


def _reduced(pairs: Iterable[tuple[int, int]], modulus: int, width: int) -> Bytes:
    return from_integers(((block + total) % modulus for block, total in pairs), width)


def opposite(keys: Iterable[Key]) -> list[Key]:
    """The same masks with their signs turned: takes off what they added."""
    return [(-sign, key) for sign, key in keys]
