"""The one door to batch arithmetic: everything above comes through here.

Two back ends compute the same bytes: `native`, eight numbers at a time with AVX-512 IFMA,
and `gmpy2`, which runs anywhere. The environment variable DTL_KERNEL forces one of them
(see `kernels`); `portable` means gmpy2 here.
"""

from dtl.core.crypto import native, portable
from dtl.core.crypto.arithmetic import (
    Arithmetic,
    Bytes,
    FixedBaseTable,
    from_integers,
    to_integers,
)
from dtl.core.crypto.kernels import GMPY2, KERNEL_VARIABLE, NATIVE, wanted
from dtl.core.crypto.portable import LIBRARY, PaillierArithmetic, is_prime, power, remainders
from dtl.core.errors import UsageError

__all__ = [
    "GMPY2",
    "LIBRARY",
    "NATIVE",
    "Arithmetic",
    "Bytes",
    "FixedBaseTable",
    "PaillierArithmetic",
    "arithmetic",
    "from_integers",
    "is_prime",
    "kernel_name",
    "power",
    "remainders",
    "to_integers",
    "why_not_native",
]


def kernel_name() -> str:
    """The back end in use: "native" or "gmpy2".

    Raises UsageError when DTL_KERNEL names another, or asks for native where it cannot run.
    """
    name, reason = wanted(), native.unavailable()
    if name == NATIVE and reason:
        raise UsageError(f"{KERNEL_VARIABLE}={NATIVE}: {reason}")
    return NATIVE if name in ("", NATIVE) and not reason else GMPY2


def why_not_native() -> str | None:
    """Why the native kernel is not in use; None when it is."""
    if kernel_name() == NATIVE:
        return None
    return native.unavailable() or f"{KERNEL_VARIABLE}={wanted()}"


def arithmetic(modulus: int) -> Arithmetic:
    """Batch arithmetic modulo N^2 for N = `modulus`, with the back end in use.

    Sizes that the native kernel does not take (see `native.supports`) go to gmpy2.
    """
    if kernel_name() == NATIVE and native.supports(modulus):
        return native.Arithmetic(modulus)
    return portable.Arithmetic(modulus)
