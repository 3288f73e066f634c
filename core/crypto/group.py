"""The double-trapdoor group: parameters, public key, and the two trapdoors.

G is the group of squares among the N-th residues modulo N^2, for N = pq with safe primes.
Its order p'q' is known to the key generation center only. An element of G is the lift c^N of
a square c modulo N, and depends on c modulo N only. Source: PROTOCOL.md, sections 2 and 3;
Damgard-Jurik (ACISP 2003), Bresson-Catalano-Pointcheval (Asiacrypt 2003), DT-PKC (IEEE TIFS
2016).
"""

import hashlib
import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dtl.core.crypto import residues
from dtl.core.crypto.primitives import fields, u32
from dtl.core.errors import FormatError, UsageError

COMPONENTS = 7
"""Blocks under one r: k of the protocol. A group is COMPONENTS + 1 residues."""

SECURE_SIZES = {2048: ("112", 224), 3072: ("128", 256)}
"""|N| -> (security in bits, exponent length ell in bits)."""

MIN_INSECURE_BITS = 256
_INSECURE_EXPONENT_BITS = 256
_SIZE_STEP = 16  # both primes get the same whole number of bytes


def security_of(modulus_bits: int) -> str:
    """The security label of a modulus size: "128", "112", or "insecure-..."."""
    known = SECURE_SIZES.get(modulus_bits)
    return known[0] if known else f"insecure-{modulus_bits}"


def exponent_bits(modulus_bits: int) -> int:
    """The exponent length ell for a modulus size."""
    known = SECURE_SIZES.get(modulus_bits)
    return known[1] if known else _INSECURE_EXPONENT_BITS


def half_bits(modulus_bits: int) -> int:
    """Bits of an exponent of a half: twice a number of ell bits."""
    return exponent_bits(modulus_bits) + 1


def sum_bits(modulus_bits: int) -> int:
    """Bits of a sum of two such exponents, a_j + b_j."""
    return half_bits(modulus_bits) + 1


def check_modulus_bits(modulus_bits: int, insecure: bool) -> None:
    """Raise UsageError for a size that is not allowed."""
    if modulus_bits in SECURE_SIZES:
        return
    if modulus_bits > max(SECURE_SIZES) or modulus_bits % _SIZE_STEP:
        raise UsageError(f"modulus of {modulus_bits} bits: expected 2048 or 3072")
    if modulus_bits < MIN_INSECURE_BITS:
        raise UsageError(f"modulus of {modulus_bits} bits: expected at least {MIN_INSECURE_BITS}")
    if not insecure:
        raise UsageError(
            f"modulus of {modulus_bits} bits is not secure",
            "take 2048 or 3072; for tests only, add --insecure",
        )


@dataclass(frozen=True)
class PublicKey:
    """N, the generator gamma modulo N, and for j = 1..7 h_j = g^(a_j + b_j), A_j = g^(a_j).

    g = gamma^N mod N^2 is the generator modulo N^2; `server` holds the A_j, by which a release
    is checked. Raises FormatError when a value cannot belong to a key.
    """

    n: int
    gamma: int
    h: tuple[int, ...]
    server: tuple[int, ...]

    def __post_init__(self) -> None:
        bits = self.n.bit_length()
        if not self.n % 2 or bits < MIN_INSECURE_BITS or bits % _SIZE_STEP:
            raise FormatError(f"public key: a modulus of {bits} bits cannot be one of ours")
        for values in (self.h, self.server):
            if len(values) != COMPONENTS:
                raise FormatError(
                    f"public key: expected {COMPONENTS} components, found {len(values)}"
                )
        limits = [(self.gamma, self.n), *((value, self.n**2) for value in self.h + self.server)]
        for value, limit in limits:
            if not 1 < value < limit or math.gcd(value, self.n) != 1:
                raise FormatError("public key: a value is out of range")
        if math.gcd(self.gamma - 1, self.n) != 1:  # else its order is not p'q'
            raise FormatError("public key: gamma is not a generator")

    @property
    def modulus_bits(self) -> int:
        """|N| in bits."""
        return self.n.bit_length()

    @property
    def exponent_bits(self) -> int:
        """The exponent length ell."""
        return exponent_bits(self.modulus_bits)

    @cached_property
    def g(self) -> int:
        """The generator modulo N^2: the lift of gamma."""
        return residues.power(self.gamma, self.n, self.n**2)

    @cached_property
    def arithmetic(self) -> residues.Arithmetic:
        """Batch arithmetic modulo N^2."""
        return residues.arithmetic(self.n)

    def __getstate__(self) -> dict[str, object]:
        # What is derived is not sent to worker processes.
        return {"n": self.n, "gamma": self.gamma, "h": self.h, "server": self.server}


@dataclass(frozen=True)
class StrongTrapdoor:
    """The primes p and q: opens every block by itself, without a half."""

    p: int = field(repr=False)
    q: int = field(repr=False)

    @property
    def n(self) -> int:
        """The modulus N = pq."""
        return self.p * self.q


def choose_trapdoor(primes: Iterable[int]) -> StrongTrapdoor:
    """Take the first two safe primes of a stream that are distinct and not close together.

    Close means |p - q| <= 2^(|N|/2 - 100), which would let Fermat's method factor N.
    """
    stream = iter(primes)
    p = next(stream)
    for q in stream:
        if abs(p - q) > 1 << max(0, p.bit_length() - 100):
            return StrongTrapdoor(p, q)
    raise UsageError("too few primes to choose a trapdoor from")


def generate_public_key(
    trapdoor: StrongTrapdoor, server_half: tuple[int, ...], participant_half: tuple[int, ...]
) -> PublicKey:
    """Choose gamma = x^2 mod N; compute h_j = g^(a_j + b_j) and A_j = g^(a_j).

    Source: protocol, sections 2 and 3.
    """
    n = trapdoor.n
    while True:
        x = 1 + secrets.randbelow(n - 1)
        gamma = x * x % n
        if math.gcd(x, n) == 1 and math.gcd(gamma - 1, n) == 1:
            break
    g = residues.power(gamma, n, n * n)
    sums = [a + b for a, b in zip(server_half, participant_half, strict=True)]
    bits = sum_bits(n.bit_length())
    powers = _powers(residues.arithmetic(n), g, [*sums, *server_half], bits)
    return PublicKey(n, gamma, powers[:COMPONENTS], powers[COMPONENTS:])


def has_server_half(key: PublicKey, half: tuple[int, ...]) -> bool:
    """Whether A_j = g^(a_j) for every j."""
    return key.server == _powers(key.arithmetic, key.g, half, half_bits(key.modulus_bits))


def has_participant_half(key: PublicKey, half: tuple[int, ...]) -> bool:
    """Whether h_j = A_j g^(b_j) for every j."""
    powers = _powers(key.arithmetic, key.g, half, half_bits(key.modulus_bits))
    pairs = zip(key.server, powers, strict=True)
    return key.h == tuple(a * power % key.n**2 for a, power in pairs)


def has_halves(
    key: PublicKey, server_half: tuple[int, ...], participant_half: tuple[int, ...]
) -> bool:
    """Whether both halves are those of this key."""
    return has_server_half(key, server_half) and has_participant_half(key, participant_half)


def _powers(
    arithmetic: residues.Arithmetic, base: int, exponents: Sequence[int], secret_bits: int
) -> tuple[int, ...]:
    """One base to several secret exponents, modulo N^2."""
    bases = residues.from_integers([base], arithmetic.width)
    powers = arithmetic.shared_base_powers(bases, exponents, secret_bits=secret_bits)
    return tuple(residues.to_integers(powers))


def expand_half(seed: bytes, label: str, job_id: bytes, bits: int) -> tuple[int, ...]:
    """Expand a 32-byte seed into the 7 exponents of a half (protocol, section 3).

    2 * int_le(SHAKE-256(fields("dtl/v2/expand", label, id, seed, u32(j)))), j = 1..7: even,
    so that an element of order two in a ciphertext cannot reveal a bit of the half.
    """
    return tuple(
        2
        * int.from_bytes(
            hashlib.shake_256(fields("dtl/v2/expand", label, job_id, seed, u32(j))).digest(
                bits // 8
            ),
            "little",
        )
        for j in range(1, COMPONENTS + 1)
    )
