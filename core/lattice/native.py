"""The lattice body with the compiled kernel (see crypto/README.md)."""

from dtl.core.lattice import portable
from dtl.core.lattice.parameters import Ring


def unavailable() -> str | None:
    """Why the compiled kernel cannot be used here; None where it can."""
    return "it was not built when dtl was installed, or does not load"


def why_not_ifma() -> str | None:
    """Why the AVX-512 IFMA variant cannot be used here; None where it can."""
    return unavailable()


class Arithmetic(portable.Arithmetic):
    """To come."""

    def __init__(self, ring: Ring, *, ifma: bool) -> None:
        super().__init__(ring)
