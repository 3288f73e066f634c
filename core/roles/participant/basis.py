"""What an upload is based on, whether its ledger allows that, and the masks that follow from it.

A participant contributes only on a model that it knows to be the one that the others have: one
that it opened itself, the pinned initial weights, or what its own step along an opened sum
gave. Source: PROTOCOL.md, sections 7 and 8.1.
"""

import logging
from dataclasses import dataclass

from dtl.core.crypto import masks
from dtl.core.errors import NotAllowedError, UsageError, VerificationError
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger, OpenEntry, StepEntry, UploadEntry

logger = logging.getLogger("dtl")


@dataclass(frozen=True)
class Basis:
    """What an upload is based on: its round, the base, the digest of what the base opened to.

    `content` is the hash of the tensors that the gradients were computed on, where it is known.
    """

    round: int
    base: str | None
    opened: str | None
    content: str | None = None

    @property
    def initial(self) -> bool:
        """Whether the base is initial weights, which are their own digest."""
        return self.base is not None and self.base == self.opened


def check_basis(ledger: Ledger, basis: Basis, accept_differencing: bool) -> None:
    """Raise NotAllowedError or VerificationError unless a first upload may be made on this base."""
    if basis.base is None:
        return
    if basis.initial:
        _check_pinned(ledger, basis)
    else:
        _check_own(ledger, basis)
    on_base = ledger.find(UploadEntry, base=basis.base)
    if on_base and not accept_differencing:
        raise NotAllowedError(
            f"{ledger.path}: expected no upload on this base yet, found the one for round "
            f"{on_base[-1].round}",
            "two uploads on one base can be subtracted from one another; "
            "--accept-differencing repeats a void round all the same",
        )


def _check_pinned(ledger: Ledger, basis: Basis) -> None:
    """The first upload on initial weights pins them, until a result of the job is opened."""
    opened = ledger.find(OpenEntry)
    if opened:
        raise NotAllowedError(
            f"the gradients are based on initial weights, but this key has opened round "
            f"{max(entry.round for entry in opened)} already",
            "compute gradients on the file that open-model wrote; a model that another program "
            "saved again counts as initial weights: name the opened file with --model",
        )
    for entry in ledger.find(UploadEntry):
        if entry.base is not None and entry.base == entry.opened and entry.base != basis.base:
            raise NotAllowedError(
                f"{ledger.path}: the initial weights are not those of the first upload: "
                f"expected {entry.base[:16]}..., found {basis.base or '':.16}...",
                "two models that differ a little give two sums that can be subtracted; "
                "other initial weights need a new job",
            )


def _check_own(ledger: Ledger, basis: Basis) -> None:
    """The base must be a model that this key opened, or the step along a sum that it opened."""
    opened = ledger.find(OpenEntry, result=basis.base)
    if not opened:
        raise NotAllowedError(
            f"{ledger.path}: this key has not opened the model that the gradients are based on",
            "open the release yourself (dtl open-model), and compute the gradients on that file",
        )
    known = opened[0]
    if basis.opened != known.opened:
        raise VerificationError("the model is not the one that was opened under this name")
    contents = [known.content]
    if known.kind == "sum":
        steps = ledger.find(StepEntry, sum=basis.base)
        if not steps:
            raise NotAllowedError(
                f"{ledger.path}: does not know the model after the sum of round {known.round}",
                "apply-sum --key records it; a model that your own program stepped is named "
                "with --model M --own-step",
            )
        contents = [step.content for step in steps]
    if basis.content is None:
        raise UsageError(
            "the gradients do not say which model they were computed on",
            "name it with --model",
        )
    if basis.content not in contents:
        raise VerificationError(
            "the model that the gradients were computed on is not the one in the ledger: its "
            "tensors were changed",
            "compute them on the file that open-model or apply-sum wrote",
        )


def record_step(ledger: Ledger, entry: StepEntry) -> None:
    """Record the model after the step along a sum; one content for one sum.

    Raises NotAllowedError for a second, different content.
    """
    for known in ledger.find(StepEntry, sum=entry.sum):
        if known.content != entry.content:
            raise NotAllowedError(
                f"{ledger.path}: another model after the sum of round {entry.round} is recorded",
                "one sum has one step: go on from the model that was recorded",
            )
        return
    ledger.append(entry)


def mask_keys(key: Key, basis: Basis) -> list[masks.Key]:
    """This participant's masks for a round: one with every other participant."""
    seeds = key.participant_secrets.mask_seeds
    return [(masks.sign_of(key.name, other), round_key(key, basis, other)) for other in seeds]


def round_key(key: Key, basis: Basis, other: str) -> bytes:
    """The key of the mask that this participant shares with another in one round."""
    return masks.round_key(
        key.participant_secrets.mask_seeds[other],
        bytes.fromhex(key.job.digest),
        basis.round,
        raw(basis.base),
        raw(basis.opened),
        bytes.fromhex(key.job.roster_digest),
    )


def opened_tag(key: Key, basis: Basis) -> str | None:
    """What shows the center, and nobody else, what this participant's base opened to."""
    if basis.base is None or basis.opened is None:
        return None
    seed = key.participant_secrets.audit_seed
    base, opened = bytes.fromhex(basis.base), bytes.fromhex(basis.opened)
    return masks.opened_tag(seed, basis.round, base, opened).hex()


def raw(digest: str | None) -> bytes | None:
    """A digest as bytes."""
    return bytes.fromhex(digest) if digest else None
