"""The one door to the lattice body: everything above comes through here.

Three back ends compute the same bytes: `ifma` (AVX-512), `portable` (compiled C that needs no
special processor) and `numpy` (nothing compiled). The environment variable DTL_KERNEL forces
one of them: native, portable, gmpy2, in this order.
"""

from functools import cache

from dtl.core.crypto import kernels
from dtl.core.errors import UsageError
from dtl.core.lattice import native, portable
from dtl.core.lattice.arithmetic import (
    Body,
    Buffer,
    Encoding,
    Integers,
    LatticeArithmetic,
    Mask,
    NonFinite,
    Sum,
    Values,
    Words,
    public_key,
)
from dtl.core.lattice.parameters import (
    BOUND,
    COEFFICIENT_BYTES,
    FULL,
    INSECURE,
    MAX_UPLOADS,
    NOISE_BITS,
    SECRET_SLOT_BITS,
    VALUE_BITS,
    Ring,
    Shape,
    Span,
    ring_of,
)

__all__ = [
    "BOUND",
    "COEFFICIENT_BYTES",
    "FULL",
    "INSECURE",
    "MAX_UPLOADS",
    "NOISE_BITS",
    "SECRET_SLOT_BITS",
    "VALUE_BITS",
    "Body",
    "Buffer",
    "Encoding",
    "Integers",
    "LatticeArithmetic",
    "Mask",
    "NonFinite",
    "Ring",
    "Shape",
    "Span",
    "Sum",
    "Values",
    "Words",
    "arithmetic",
    "lattice_kernel_name",
    "public_key",
    "ring_of",
    "why_not_ifma",
]

IFMA, PORTABLE, NUMPY = "ifma", "portable", "numpy"
_NAMES = {kernels.NATIVE: IFMA, kernels.PORTABLE: PORTABLE, kernels.GMPY2: NUMPY}


def lattice_kernel_name() -> str:
    """The back end in use: "ifma", "portable" or "numpy".

    Raises UsageError when DTL_KERNEL names none, or asks for one that cannot run here.
    """
    wanted = kernels.wanted()
    reasons = {kernels.NATIVE: native.why_not_ifma(), kernels.PORTABLE: native.unavailable()}
    if reason := reasons.get(wanted):
        raise UsageError(f"{kernels.KERNEL_VARIABLE}={wanted}: {reason}")
    if wanted:
        return _NAMES[wanted]
    return next((_NAMES[name] for name, reason in reasons.items() if reason is None), NUMPY)


def why_not_ifma() -> str | None:
    """Why the fastest back end is not in use, for `dtl --version --verbose`; None when it is."""
    name = lattice_kernel_name()
    if name == IFMA:
        return None
    reason = native.unavailable() if name == NUMPY else None
    return reason or native.why_not_ifma() or f"{kernels.KERNEL_VARIABLE}={kernels.wanted()}"


def arithmetic(ring: Ring) -> LatticeArithmetic:
    """The lattice body over a ring, with the back end in use."""
    return _arithmetic(ring, lattice_kernel_name())


@cache
def _arithmetic(ring: Ring, name: str) -> LatticeArithmetic:
    if name == NUMPY:
        return portable.Arithmetic(ring)
    return native.Arithmetic(ring, IFMA if name == IFMA else native.portable_variant())
