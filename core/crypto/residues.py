"""The one door to batch arithmetic: everything above comes through here.

Two back ends compute the same bytes: `native`, eight numbers at a time with AVX-512 IFMA,
and `gmpy2`, which runs anywhere. The environment variable DTL_KERNEL forces one of them.
"""

import os

from dtl.core.crypto import native, portable
from dtl.core.crypto.arithmetic import (
    Arithmetic,
    Bytes,
    FixedBaseTable,
    from_integers,
    to_integers,
)
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

KERNEL_VARIABLE = "DTL_KERNEL"
NATIVE, GMPY2 = "native", "gmpy2"


def kernel_name() -> str:
    """The back end in use: "native" or "gmpy2".

    Raises UsageError when DTL_KERNEL names another, or asks for native where it cannot run.
    """
    wanted = os.environ.get(KERNEL_VARIABLE, "")
    reason = native.unavailable()
    if wanted not in ("", NATIVE, GMPY2):
        raise UsageError(f"{KERNEL_VARIABLE}: expected {NATIVE} or {GMPY2}, found {wanted}")
    if wanted == NATIVE and reason:
        raise UsageError(f"{KERNEL_VARIABLE}={NATIVE}: {reason}")
    return wanted or (GMPY2 if reason else NATIVE)


def why_not_native() -> str | None:
    """Why the native kernel is not in use; None when it is."""
    if kernel_name() == NATIVE:
        return None
    return native.unavailable() or f"{KERNEL_VARIABLE}={GMPY2}"


def arithmetic(modulus: int) -> Arithmetic:
    """Batch arithmetic modulo N^2 for N = `modulus`, with the back end in use.

    Sizes that the native kernel does not take (see `native.supports`) go to gmpy2.
    """
    if kernel_name() == NATIVE and native.supports(modulus):
        return native.Arithmetic(modulus)
    return portable.Arithmetic(modulus)
