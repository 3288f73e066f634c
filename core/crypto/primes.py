"""Safe primes p = 2p' + 1, for the strong trapdoor."""

import secrets
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dtl.core.crypto import residues

SIEVE_LIMIT = 1 << 20
_PER_WORD = 3  # sieve primes whose product still fits an int64
_SMALL_BITS = 64  # below this, sieving would strike out the primes themselves
_WINDOW_PER_BIT_SQUARED = 0.05


def search_safe_prime(bits: int) -> int | None:
    """Search one random window for a safe prime of exactly `bits` bits, its top two bits set.

    Returns None when the window holds none (about six times in seven), so that a caller can
    repeat the search, in several processes if it likes. A window of candidates p' is drawn
    at random and both p' and 2p' + 1 are sieved before any primality test; the survivors
    are tested in random order. A window expects far less than one hit, so no prime is more
    than about 1.1 times as likely as under exactly uniform choice. Randomness comes from
    the operating system only.
    """
    low, high = 3 << (bits - 3), 1 << (bits - 1)  # of p', so that p has its top two bits set
    window = max(64, min(int(_WINDOW_PER_BIT_SQUARED * bits * bits), high - low))
    start = low + secrets.randbelow(high - low - window + 1)
    candidates = _sieve(start, window, bits)
    secrets.SystemRandom().shuffle(candidates)
    for offset in candidates:
        half = start + offset
        # A Fermat test refutes nearly every composite at a tenth of the cost.
        if (
            residues.power(2, half - 1, half) == 1
            and residues.power(2, 2 * half, 2 * half + 1) == 1
            and residues.is_prime(half)
            and residues.is_prime(2 * half + 1)
        ):
            return 2 * half + 1
    return None


def _sieve(start: int, window: int, bits: int) -> list[int]:
    """Offsets in the window at which neither p' nor 2p' + 1 has a small factor."""
    odd = np.arange(window) % 2 != start % 2
    if bits < _SMALL_BITS:
        return np.flatnonzero(odd).tolist()
    primes = _small_primes()
    words = primes.reshape(-1, _PER_WORD)
    rest = np.array(residues.remainders(start, words.prod(axis=1).tolist()), np.int64)
    rest = (rest[:, None] % words).ravel()
    # start + x = 0 (mod l), and 2 (start + x) + 1 = 0 (mod l): x = (l - 1) / 2 - start
    for first in ((-rest) % primes, ((primes - 1) // 2 - rest) % primes):
        short = primes < window
        for prime, offset in zip(primes[short].tolist(), first[short].tolist(), strict=True):
            odd[offset::prime] = False
        far = first[~short]
        odd[far[far < window]] = False
    return np.flatnonzero(odd).tolist()


@lru_cache(maxsize=1)
def _small_primes() -> NDArray[np.int64]:
    """The odd primes below SIEVE_LIMIT, but for the last few: a multiple of _PER_WORD."""
    sieve = np.ones(SIEVE_LIMIT, bool)
    sieve[:3] = False
    sieve[4::2] = False
    for number in range(3, int(SIEVE_LIMIT**0.5) + 1, 2):
        if sieve[number]:
            sieve[number * number :: number] = False
    primes = np.flatnonzero(sieve)
    return primes[: len(primes) // _PER_WORD * _PER_WORD]
