"""The keys that one upload uses once: for its lattice secret, errors, randomness and witness.

They are derived from fresh bytes of the operating system and from everything that tells one
upload from another, so that a weak generator alone never makes two uploads share a key. They
are never stored. Source: PROTOCOL.md, section 9.2.
"""

import secrets
from dataclasses import dataclass, field

import numpy as np

from dtl.core.crypto.primitives import KEY_BYTES, derive, fields, keystream, u32, u64
from dtl.core.crypto.residues import Bytes

SYSTEM_BYTES = 64
"""Bytes drawn from the operating system for every upload."""


@dataclass(frozen=True)
class OneTimeKeys:
    """k_s, k_e, k_r and k_w: 32 bytes each."""

    secret: bytes = field(repr=False)
    error: bytes = field(repr=False)
    randomness: bytes = field(repr=False)
    witness: bytes = field(repr=False)


def derive_one_time(
    sign_secret: bytes,
    job: bytes,
    number: int,
    base: bytes | None,
    opened: bytes | None,
    roster: bytes,
    time_ns: int,
    last_line: bytes,
) -> OneTimeKeys:
    """Fresh keys for one upload of round `number`.

    `sign_secret` is the participant's signing key; `job`, `base`, `opened` and `roster` are
    digests; `time_ns` is the time in nanoseconds, `last_line` the digest of the last line of
    the participant's ledger.
    """
    info = fields(
        "dtl/v2/one-time", job, u32(number), base, opened, roster, u64(time_ns), last_line
    )
    derived = derive(secrets.token_bytes(SYSTEM_BYTES) + sign_secret, info, 4 * KEY_BYTES)
    parts = (derived[start : start + KEY_BYTES] for start in range(0, len(derived), KEY_BYTES))
    return OneTimeKeys(*parts)


def group_randomness(key: bytes, groups: int, exponent_bits: int, first: int = 0) -> Bytes:
    """r of the groups first, ..., first + groups - 1, uint8 [G, ell/8], ell = `exponent_bits`.

    They are consecutive bytes of the ChaCha20 keystream under `key`, which is k_r.
    """
    width = exponent_bits // 8
    stream = keystream(key, first * width, groups * width)
    return np.frombuffer(stream, np.uint8).reshape(groups, width)
