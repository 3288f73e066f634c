"""What an upload is based on, and the masks that follow from it."""

from dataclasses import dataclass

from dtl.core.crypto import masks
from dtl.core.errors import (
    NotAllowedError,
)
from dtl.core.files.key_file import Key, ParticipantSecrets


@dataclass(frozen=True)
class Basis:
    """What an upload is based on: the round it is for, the base, the opened vector's digest."""

    round: int
    base: str | None
    opened: str | None


def mask_keys(key: Key, basis: Basis) -> list[masks.Key]:
    """This participant's masks for a round: one with every other participant."""
    return [(masks.sign_of(key.name, other), round_key(key, basis, other)) for other in _seeds(key)]


def _seeds(key: Key) -> dict[str, bytes]:
    if not isinstance(key.secrets, ParticipantSecrets):
        raise NotAllowedError(f"{key.path}: expected a participant's key")
    return key.secrets.mask_seeds


def round_key(key: Key, basis: Basis, other: str) -> bytes:
    """The key of the mask that this participant shares with another in one round."""
    return masks.round_key(
        _seeds(key)[other],
        bytes.fromhex(key.job.digest),
        basis.round,
        bytes.fromhex(basis.base) if basis.base else None,
        bytes.fromhex(basis.opened) if basis.opened else None,
        bytes.fromhex(key.job.roster_digest),
    )
