"""What keeps the memory of a process from being written to a file when it crashes."""

import ctypes
import resource
import sys
from contextlib import suppress

_PR_SET_DUMPABLE = 4  # linux/prctl.h


def forbid() -> None:
    """Forbid core dumps of this process, whose memory holds keys and plaintext; for good.

    The limit goes over to child processes, but says nothing to a handler that the system
    pipes dumps to (systemd-coredump, apport). On Linux the process says so itself, which
    also keeps debuggers of the same user out; a child that runs another program does not
    take that over.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library that cannot be found, or has no such
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
