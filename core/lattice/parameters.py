"""The fixed numbers of the lattice body: rings, slots, and where values and bytes stand.

Source: PROTOCOL.md, the section on the lattice body.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

from dtl.core.crypto.group import SECURE_SIZES

NOISE_BITS = 28
"""w: an error takes the lowest 28 bits of a coefficient; Delta = 2^28."""

VALUE_BITS = 171
"""Bits of a coefficient that hold values."""

BOUND = 64
"""The largest |s| and |e| of one upload."""

SECRET_SLOT_BITS = 28
"""Slot bits of the secrets in the blocks of the key part."""

MAX_UPLOADS = (1 << 21) - 1
"""Most contributions in one model or sum, so that 64 of each fit into 28 bits, signed."""

WORD_BITS = 50
"""Bits of a word of a body, and of a keystream word."""

COEFFICIENT_BYTES = 25
"""A coefficient in a body: four words of 50 bits."""


@dataclass(frozen=True)
class Ring:
    """Z_q[X] / (X^n + 1), q the product of four primes that are 1 modulo 2n, below 2^50."""

    n: int
    primes: tuple[int, int, int, int]

    @cached_property
    def q(self) -> int:
        """The product of the primes."""
        return prod(self.primes)

    @cached_property
    def roots(self) -> tuple[int, ...]:
        """psi_j of every prime: a primitive 2n-th root of one.

        It is x^((p_j - 1) / 2n) for the least x >= 2 that gives one: psi^n = -1.
        """
        return tuple(_root(prime, self.n) for prime in self.primes)


def _root(prime: int, n: int) -> int:
    for x in range(2, prime):
        root = pow(x, (prime - 1) // (2 * n), prime)
        if pow(root, n, prime) == prime - 1:
            return root
    raise AssertionError("2n does not divide p - 1")


FULL = Ring(8192, (1125899904679937, 1125899903991809, 1125899903827969, 1125899903795201))
"""The ring of jobs of full size: the largest primes below 2^50 that are 1 mod 2^15."""

INSECURE = Ring(256, (985162417930241, 985162416979969, 985162416783361, 985162416455681))
"""The ring of insecure jobs: an eighth of all mask words is rejected, so that tests see it."""


def ring_of(modulus_bits: int) -> Ring:
    """The ring that goes with a modulus N of so many bits."""
    return FULL if modulus_bits in SECURE_SIZES else INSECURE


def reversed_bits(n: int) -> list[int]:
    """brv of 0, ..., n - 1 for a power of two: word k of NTT order is at psi^(2 brv(k) + 1)."""
    order = [0]
    while len(order) < n:
        order = [2 * k for k in order] + [2 * k + 1 for k in order]
    return order


@dataclass(frozen=True)
class Span:
    """Some polynomials of a body: their bytes, and the values in them."""

    start: int
    """The first byte."""
    length: int
    """How many bytes."""
    first_value: int
    values: int
    """How many values."""


@dataclass(frozen=True)
class Shape:
    """How a vector of `values` integers of `slot_bits` bits lies in polynomials.

    Polynomial i has the values from i n L on, slot after slot: value u of a polynomial of m
    coefficients is slot floor(u / m) of coefficient u mod m. m = n but in the last polynomial,
    which has only as many coefficients as its values need.
    """

    ring: Ring
    slot_bits: int
    values: int

    @cached_property
    def slots(self) -> int:
        """L: slots of a coefficient."""
        return VALUE_BITS // self.slot_bits

    @cached_property
    def capacity(self) -> int:
        """Values of a full polynomial: n L."""
        return self.ring.n * self.slots

    @cached_property
    def polynomials(self) -> int:
        """How many polynomials there are; none for an empty vector."""
        return -(-self.values // self.capacity)

    def values_in(self, polynomial: int) -> int:
        """How many values polynomial i holds."""
        return min(self.capacity, self.values - polynomial * self.capacity)

    def coefficients(self, polynomial: int) -> int:
        """m: how many coefficients of polynomial i are in the body."""
        return -(-self.values_in(polynomial) // self.slots)

    @cached_property
    def body_bytes(self) -> int:
        """The length of the whole body."""
        return self.span(0, self.polynomials).length

    def span(self, first: int, count: int) -> Span:
        """Where `count` polynomials from `first` on stand, in bytes and in values."""
        if not 0 <= first <= first + count <= self.polynomials:
            raise ValueError(f"polynomials {first} to {first + count} of {self.polynomials}")
        first_value = min(first * self.capacity, self.values)
        values = min(count * self.capacity, self.values - first_value)
        full, rest = divmod(values, self.capacity)
        coefficients = full * self.ring.n + -(-rest // self.slots)
        start = first * self.ring.n * COEFFICIENT_BYTES
        return Span(start, coefficients * COEFFICIENT_BYTES, first_value, values)

    def holding(self, first: int, values: int) -> int:
        """How many whole polynomials from `first` on hold exactly so many values.

        Raises ValueError where they end within a polynomial.
        """
        count = -(-values // self.capacity)
        if self.span(first, count).values != values:
            raise ValueError(f"{values} values are not whole polynomials from {first} on")
        return count
