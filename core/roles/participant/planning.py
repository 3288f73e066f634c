"""What an upload is to be: its round and base, its header, and its one-time secrets."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from dtl.core import defaults
from dtl.core.ciphers.cipher import Steps
from dtl.core.crypto import masks, one_time
from dtl.core.crypto.one_time import OneTimeKeys
from dtl.core.encoding.fixed_point import Rounding
from dtl.core.errors import FormatError, NotAllowedError, UsageError, VerificationError
from dtl.core.files import tensors
from dtl.core.files.headers import UploadHeader, check_same_shapes, now
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger, OpenEntry, StepEntry
from dtl.core.files.schema import FORMAT
from dtl.core.files.tensors import TensorFile
from dtl.core.roles.participant.basis import Basis, mask_keys, opened_tag, raw, record_step


@dataclass(frozen=True)
class UploadOptions:
    """How gradients become a contribution: x = weight lr gradient, then rounding.

    `own_step` says that `model` is what the operator's own program made of the last opened sum.
    """

    rounding: Rounding
    weight: float | None = None
    lr: float = defaults.LR
    round: int | None = None
    model: Path | None = None
    own_step: bool = False
    accept_differencing: bool = False


@dataclass(frozen=True)
class Plan:
    """An upload that may be made: its header, its secrets, and what it is made of."""

    source: TensorFile
    stamp: tuple[int, ...]
    header: UploadHeader
    steps: Steps
    keys: OneTimeKeys
    mask_keys: tuple[masks.Key, ...]


def make_plan(key: Key, source: TensorFile, basis: Basis, steps: Steps, ledger: Ledger) -> Plan:
    """The header of an upload, fresh one-time keys for it, and the masks of its round."""
    job = key.job
    header = UploadHeader(
        format=FORMAT,
        kind="upload",
        job=job.digest,
        signer=key.name,
        created=now(),
        round=basis.round,
        layout=source.layout,
        values=sum(spec.values for spec in source.layout),
        base=basis.base,
        roster=job.roster_digest,
        masked=job.masks,
        opened_tag=opened_tag(key, basis),
    )
    keys = one_time.derive_one_time(
        key.secrets.sign,
        bytes.fromhex(job.digest),
        basis.round,
        raw(basis.base),
        raw(basis.opened),
        bytes.fromhex(job.roster_digest),
        time.time_ns(),
        ledger.last_link,
    )
    return Plan(source, source.stamp(), header, steps, keys, tuple(mask_keys(key, basis)))


def scale_of(job: Job, options: UploadOptions) -> float:
    """Weight times learning rate; UsageError unless both, and it, are positive numbers."""
    weight = 1 / len(job.participants) if options.weight is None else options.weight
    scale = weight * options.lr
    for name, value in (("weight", weight), ("lr", options.lr), ("weight times --lr", scale)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{name}: expected a positive number, found {value}")
    return scale


def find_basis(source: TensorFile, options: UploadOptions, ledger: Ledger) -> tuple[Basis, int]:
    """The round and base of an upload, from the gradients' metadata, the model, and --round.

    Besides, the first round that can be built on that base.
    """
    known = source.metadata
    if known is not None and known.kind != "gradients":
        raise FormatError(f"{source.path}: expected gradients, found {known.kind}")
    if known and known.base and (known.round == 0) != (known.base == known.opened):
        raise VerificationError(
            f"{source.path}: its metadata contradicts itself: only initial weights, of round 0, "
            "are their own base",
            "dtl compute-grads writes it; it was changed since",
        )
    if options.own_step:
        return _own_step_basis(source, options, ledger)
    if options.model is not None:
        model = tensors.open_tensors(options.model)
        try:
            named = tensors.weights_metadata(model)
            check_same_shapes(source.layout, model.layout, source.path, options.model)
            # What the file holds counts, not what its metadata says of it.
            named = named.model_copy(update={"content": tensors.content_digest(model)})
        finally:
            model.close()
        if known is not None and known.base != named.base:
            raise FormatError(f"{source.path}: based on another model than {options.model}")
        if known is not None and known.content not in (None, named.content):
            raise FormatError(f"{source.path}: computed on other tensors than {options.model}")
        known = named
    if known is None or known.base is None:
        if options.round is None:
            raise UsageError(
                f"{source.path}: does not say which round it is for",
                "add --model M (what the gradients are based on), or --round N without one",
            )
        return Basis(_checked_round(options.round, 1), None, None), 1
    first = known.round + 1
    number = _checked_round(first if options.round is None else options.round, first)
    return Basis(number, known.base, known.opened, known.content), first


def _own_step_basis(
    source: TensorFile, options: UploadOptions, ledger: Ledger
) -> tuple[Basis, int]:
    """The basis of gradients on a model that the operator's own program stepped along a sum."""
    if options.model is None:
        raise UsageError("--own-step: expected --model as well, the model after the step")
    sums = ledger.find(OpenEntry, kind="sum")
    if not sums:
        raise NotAllowedError(
            f"{ledger.path}: --own-step: this key has not opened any sum",
            "open the released sum first (dtl open-model)",
        )
    last = max(sums, key=lambda entry: entry.round)
    model = tensors.open_tensors(options.model)
    try:
        check_same_shapes(source.layout, model.layout, source.path, options.model)
        content = tensors.content_digest(model)
    finally:
        model.close()
    known = source.metadata
    if known is not None and known.content not in (None, content):
        raise FormatError(f"{source.path}: computed on other tensors than {options.model}")
    first = last.round + 1
    number = _checked_round(first if options.round is None else options.round, first)
    return Basis(number, last.result, last.opened, content), first


def record_own_step(ledger: Ledger, basis: Basis) -> None:
    """Record the model that the operator's own program made of the sum that is the base."""
    opened = ledger.find(OpenEntry, result=basis.base)[0]
    record_step(
        ledger,
        StepEntry(
            event="step",
            round=opened.round,
            sum=opened.result,
            content=basis.content or "",
            source="own-step",
        ),
    )


def _checked_round(number: int, least: int) -> int:
    if not least <= number < 1 << 32:
        raise UsageError(f"--round: expected at least {least}, found {number}")
    return number
