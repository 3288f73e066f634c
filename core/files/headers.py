"""The headers of bulk files: uploads, sums, models and releases."""

import math
import os
import re
import time
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from dtl.core.errors import FormatError, UsageError
from dtl.core.files import canonical_json
from dtl.core.files.container import Container
from dtl.core.files.safetensors import MAX_DIMENSIONS, MAX_TENSORS
from dtl.core.files.schema import (
    Base64,
    Digest,
    Document,
    Items,
    Name,
    Round,
    Tag,
    Timestamp,
)

MAX_VALUES = 1 << 48
Values = Annotated[int, Field(ge=1, lt=MAX_VALUES)]
MAX_NAME_BYTES = 1024
RESERVED_NAMES = ("__metadata__", "__dtl__")


class TensorSpec(Document):
    """One named tensor of a model: its shape and the dtype it is given out in."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_BYTES)]
    shape: Annotated[
        Items[Annotated[int, Field(ge=0, lt=1 << 48)]], Field(max_length=MAX_DIMENSIONS)
    ]
    dtype: Literal["F16", "BF16", "F32", "F64"]

    @field_validator("name")
    @classmethod
    def _usable(cls, name: str) -> str:
        # The first two are taken in .safetensors and .npz; a zip cuts names at a NUL.
        if name in RESERVED_NAMES or any(ord(char) < 32 or ord(char) == 127 for char in name):
            raise ValueError("the name cannot be used for a tensor")
        return name

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


Layout = Annotated[Items[TensorSpec], Field(max_length=MAX_TENSORS)]
"""Tensors in packing order: the bytewise order of their names."""


def check_layout(layout: Layout, what: str) -> int:
    """Raise FormatError unless in packing order without duplicates; returns the values."""
    names = [spec.name.encode() for spec in layout]
    if names != sorted(set(names)):
        raise FormatError(f"{what}: layout: expected unique names in bytewise order")
    total = sum(spec.values for spec in layout)
    if not 0 < total < MAX_VALUES:
        raise FormatError(f"{what}: layout: expected 1 to 2^48 - 1 values, found {total}")
    return total


def check_same_shapes(found: Layout, expected: Layout, what: object, of: object) -> None:
    """Raise FormatError unless two layouts agree on names and shapes (their dtypes may differ)."""
    here, there = ({s.name: s.shape for s in layout} for layout in (found, expected))
    if here == there:
        return
    problem = f"{what}: its tensors are not those of {of}"
    differing = sorted({*here, *there}, key=lambda name: (here.get(name) == there.get(name), name))
    name = differing[0]
    shapes = [str(list(shapes[name])) if name in shapes else "none" for shapes in (there, here)]
    raise FormatError(f"{problem}: {name!r}: expected {shapes[0]}, found {shapes[1]}")


class Header(Document):
    """What every bulk file says of itself."""

    format: Literal["dtl/v2"]
    kind: str
    job: Digest
    signer: Name
    created: Timestamp


class VectorHeader(Header):
    """A header of a file that holds an encrypted vector."""

    round: Round
    layout: Layout
    values: Values

    @model_validator(mode="after")
    def _counts(self) -> Self:
        try:
            total = check_layout(self.layout, "header")
        except FormatError as error:
            raise ValueError(error.message) from None
        if total != self.values:
            raise ValueError("the layout does not hold that many values")
        return self


class UploadHeader(VectorHeader):
    """An upload: one participant's encrypted contribution to a round."""

    kind: Literal["upload"]
    base: Digest | None
    roster: Digest
    masked: bool
    opened_tag: Tag | None

    @model_validator(mode="after")
    def _tagged(self) -> Self:
        if (self.opened_tag is None) != (self.base is None):
            raise ValueError("an upload has a tag if, and only if, it names a base")
        return self


class Contribution(Document):
    """Whose upload was accepted, and its digest."""

    participant: Name
    upload: Digest


class ResultHeader(VectorHeader):
    """The signed manifest of what the server computed: a sum, or a model."""

    kind: Literal["sum", "model"]
    signer: Literal["server"]
    parent: Digest | None
    initial: Digest | None
    contributors: Items[Contribution]
    missing: Items[Name]
    contributions: dict[Name, Round]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = self.names
        if list(names) != sorted(set(names)) or list(self.missing) != sorted(set(self.missing)):
            raise ValueError("expected unique names in order")
        if set(names) & set(self.missing) or not set(names) <= set(self.contributions):
            raise ValueError("the manifest contradicts itself")
        if (self.kind == "model") != (self.initial is not None):
            raise ValueError("a model names its initial weights, and a sum none")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The participants whose uploads were accepted in this round."""
        return tuple(item.participant for item in self.contributors)

    @property
    def uploads(self) -> int:
        """U: how many uploads are in this result (of a model, over all its rounds)."""
        return sum(self.contributions.values())

    @property
    def base(self) -> str | None:
        """What the uploads of this round were based on."""
        return self.parent if self.parent is not None else self.initial

    def upload_of(self, participant: str) -> str | None:
        """The digest of this participant's accepted upload, if any."""
        return next((c.upload for c in self.contributors if c.participant == participant), None)


class Grant(Document):
    """A content key, wrapped for one participant."""

    participant: Name
    wrapped: Base64


class ReleaseHeader(Header):
    """A release: the whole result, and the sealed part that lets the granted open it.

    `manifest` and `result_signature` are the result's own header and signature.
    """

    kind: Literal["release"]
    signer: Literal["server"]
    round: Round
    of: Digest
    manifest: ResultHeader
    result_signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    grants: Items[Grant]
    admitted: Items[Name]
    commit: Annotated[Base64, Field(min_length=32, max_length=32)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = list(self.names)
        if not names or names != sorted(set(names)):
            raise ValueError("expected grants with unique names in order")
        if list(self.admitted) != sorted(set(self.admitted) & set(names)):
            raise ValueError("expected the admitted among the granted, in order")
        if (self.round, self.job, self.signer) != (
            self.manifest.round,
            self.manifest.job,
            self.manifest.signer,
        ):
            raise ValueError("the release contradicts its manifest")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Who may open the release."""
        return tuple(grant.participant for grant in self.grants)


_LAST_SECOND = 253402300799  # of the year 9999

AnyHeader = UploadHeader | ResultHeader | ReleaseHeader
_KINDS: dict[str, type[UploadHeader] | type[ResultHeader] | type[ReleaseHeader]] = {
    "upload": UploadHeader,
    "sum": ResultHeader,
    "model": ResultHeader,
    "release": ReleaseHeader,
}


def read_header(container: Container, expected: Sequence[str], job: str | None) -> AnyHeader:
    """Read the header of a bulk file.

    Raises FormatError when it is malformed, of another kind than expected, or (where `job`
    is a job digest) of another job.
    """
    parsed = canonical_json.loads(container.raw_header, f"{container.path}: header")
    kind = parsed.get("kind") if isinstance(parsed, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise FormatError(f"{container.path}: header: kind: expected one of {', '.join(_KINDS)}")
    if kind not in expected:
        raise FormatError(f"{container.path}: expected {' or '.join(expected)}, found {kind}")
    header = _KINDS[kind].check(parsed, f"{container.path}: header")
    if job is not None and header.job != job:
        raise FormatError(
            f"{container.path}: belongs to another job",
            f"expected job {job[:16]}..., found {header.job[:16]}...",
        )
    return header


def now() -> str:
    """The time of creation, UTC in seconds; honours SOURCE_DATE_EPOCH."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    if fixed and not (re.fullmatch("[0-9]{1,12}", fixed) and int(fixed) <= _LAST_SECOND):
        raise UsageError("SOURCE_DATE_EPOCH: expected seconds since 1970")
    moment = time.gmtime(int(fixed) if fixed else None)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)
