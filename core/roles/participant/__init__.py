"""A participant: encrypts its gradients, reveals masks, opens what was released to it."""

from dtl.core.roles.participant.encrypting import UploadReport, encrypt_gradients
from dtl.core.roles.participant.opening import (
    OpenOptions,
    OpenReport,
    content_key,
    open_release,
)
from dtl.core.roles.participant.planning import UploadOptions
from dtl.core.roles.participant.revealing import reveal_masks

__all__ = [
    "OpenOptions",
    "OpenReport",
    "UploadOptions",
    "UploadReport",
    "content_key",
    "encrypt_gradients",
    "open_release",
    "reveal_masks",
]
