"""The names of the kernels, and the environment variable that forces one of them.

Group and lattice choose their back ends by the same names: `native` is AVX-512 IFMA for both;
`portable` is compiled C without special instructions for the lattice, and gmpy2 for the group;
`gmpy2` uses nothing compiled: gmpy2 for the group, numpy for the lattice.
"""

import os

from dtl.core.errors import UsageError

KERNEL_VARIABLE = "DTL_KERNEL"
NATIVE = "native"
PORTABLE = "portable"
GMPY2 = "gmpy2"

_NAMES = (NATIVE, PORTABLE, GMPY2)


def wanted() -> str:
    """The kernel that DTL_KERNEL names; "" where it is unset or empty.

    Raises UsageError when it names none of them.
    """
    name = os.environ.get(KERNEL_VARIABLE, "")
    if name and name not in _NAMES:
        names = f"{', '.join(_NAMES[:-1])} or {_NAMES[-1]}"
        raise UsageError(f"{KERNEL_VARIABLE}: expected {names}, found {name}")
    return name
