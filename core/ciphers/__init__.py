"""The two ciphers: what of a vector becomes blocks of the double-trapdoor scheme, and what a body.

`lattice` hides the values under a one-time lattice pad (the body), and only the short secret of
that pad becomes blocks. `direct` puts every value into blocks and has no body. Everything above
knows the interface in `cipher` only.
"""

from dtl.core.ciphers.cipher import Batch, Cipher, Decoding, Encoded, Encoder, Steps
from dtl.core.ciphers.direct import DirectCipher
from dtl.core.ciphers.lattice import LatticeCipher
from dtl.core.crypto.group import PublicKey
from dtl.core.encoding.fixed_point import FixedPoint
from dtl.core.errors import UsageError

__all__ = [
    "CIPHERS",
    "Batch",
    "Cipher",
    "Decoding",
    "Encoded",
    "Encoder",
    "Steps",
    "check_cipher",
    "make_cipher",
]

CIPHERS: dict[str, type[LatticeCipher] | type[DirectCipher]] = {
    LatticeCipher.name: LatticeCipher,
    DirectCipher.name: DirectCipher,
}


def check_cipher(name: str) -> None:
    """Raise UsageError unless there is a cipher of that name."""
    if name not in CIPHERS:
        raise UsageError(f"cipher: expected {' or '.join(CIPHERS)}, found {name}")


def make_cipher(name: str, key: PublicKey, fixed_point: FixedPoint) -> Cipher:
    """The cipher of that name for a job's key and number format."""
    check_cipher(name)
    return CIPHERS[name](key, fixed_point)
