"""Every failure that dtl can report, each with its exit code.

The command line turns these into ``dtl: error: ...`` and the exit code in one
place (``cli/app.py``). A message names the file, what was expected and what was
found; it never holds a secret or a plaintext value.
"""


class DtlError(Exception):
    """Base of all reported failures; raised itself for a failure of the machine."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DtlError):
    """The command was called wrongly: missing input, existing output, impossible parameters."""

    exit_code = 2


class FormatError(DtlError):
    """A file is malformed, damaged, or belongs to another job, round, base, roster or layout."""

    exit_code = 3


class VerificationError(DtlError):
    """A signature, pin, proof or replay check failed, or a result cannot be opened."""

    exit_code = 4


class NotAllowedError(DtlError):
    """The protocol forbids this step: not granted, wrong key, a second upload or release."""

    exit_code = 5


class QuorumError(DtlError):
    """Not enough contributors for this step."""

    exit_code = 6


class NumericError(DtlError):
    """NaN, infinity, or a value outside the fixed-point range."""

    exit_code = 7
