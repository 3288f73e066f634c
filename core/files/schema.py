"""What the JSON of dtl is made of: strict, frozen models and the types of their fields."""

import re
from typing import Annotated, Any, Final, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
)

from dtl.core.crypto.primitives import decode_base64, encode_base64
from dtl.core.errors import FormatError
from dtl.core.files import canonical_json

FORMAT: Final = "dtl/v2"
OLDER: Final = "dtl/v1"
OLDER_MARK: Final = f'"format":"{OLDER}"'
"""How the format of an older version stands in canonical JSON, and nowhere else."""
NAME_PATTERN = "[a-z0-9][a-z0-9._-]{0,63}"
_HEX = re.compile(r"[1-9a-f][0-9a-f]*")
MAX_HEX_DIGITS = 16384 // 4 * 2


def _integer(value: Any, info: ValidationInfo) -> int:
    if info.mode == "python" and type(value) is int:
        return value
    if not isinstance(value, str) or len(value) > MAX_HEX_DIGITS or not _HEX.fullmatch(value):
        raise ValueError("expected a lower-case hex integer")
    return int(value, 16)


def _base64(value: Any, info: ValidationInfo) -> bytes:
    if info.mode == "python" and isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError("expected canonical base64")
    try:
        return decode_base64(value)
    except FormatError:
        raise ValueError("expected canonical base64") from None


BigInteger = Annotated[int, BeforeValidator(_integer), PlainSerializer(lambda value: f"{value:x}")]
Base64 = Annotated[bytes, BeforeValidator(_base64), PlainSerializer(encode_base64)]
Key32 = Annotated[Base64, Field(min_length=32, max_length=32)]
Signature = Annotated[Base64, Field(min_length=64, max_length=64)]
Item = TypeVar("Item")
Items = Annotated[tuple[Item, ...], FailFast()]
"""Any number of items; the first bad one ends the check, as every error takes memory."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Tag = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Identifier = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
Round = Annotated[int, Field(ge=1, lt=1 << 32)]
Timestamp = Annotated[
    str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")
]


class OlderFormatError(FormatError):
    """A file that an older version wrote, which is not damaged for that."""


def older_format(what: str) -> OlderFormatError:
    """The error for a file of an older version."""
    return OlderFormatError(
        f"{what}: written by an older version of dtl ({OLDER}), expected {FORMAT}",
        "a job lives with the version that made it; make a new one with dtl keygen",
    )


def refuse_older(value: canonical_json.Json, what: str) -> None:
    """Raise OlderFormatError for a document whose `format` is that of an older version."""
    if isinstance(value, dict) and value.get("format") == OLDER:
        raise older_format(what)


class Document(BaseModel):
    """A JSON object with exactly these fields, of exactly these types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    @classmethod
    def decode(cls, data: bytes, what: str) -> Self:
        """Read canonical JSON; FormatError names the field at fault, never its value."""
        return cls.check(canonical_json.loads(data, what), what)

    @classmethod
    def check(cls, value: canonical_json.Json, what: str) -> Self:
        """Validate parsed JSON; FormatError as `decode`."""
        refuse_older(value, what)
        try:
            # JSON mode, so that arrays become tuples while all else stays strict.
            text = canonical_json.dumps(value)
            cls._check_names(value, what)
            return cls.model_validate_json(text)
        except UnicodeEncodeError:
            raise FormatError(f"{what}: expected text that can be encoded as UTF-8") from None
        except ValidationError as error:
            first = error.errors(include_input=False, include_context=False, include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "document"
            problem = first["msg"][:1].lower() + first["msg"][1:]
            raise FormatError(f"{what}: {place}: {problem}") from None

    @classmethod
    def _check_names(cls, value: canonical_json.Json, what: str) -> None:
        """Raise FormatError for a field too few or too many, in documents inside as well.

        pydantic would say the same, but remembers the whole input once for every such field.
        """
        if not isinstance(value, dict):
            return  # pydantic's to refuse
        for name, field in cls.model_fields.items():
            if name not in value:
                raise FormatError(f"{what}: {name}: field required")
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Document):
                kind._check_names(value[name], f"{what}: {name}")
        for name in value.keys() - cls.model_fields.keys():
            raise FormatError(f"{what}: {name}: extra inputs are not permitted")

    def plain(self) -> dict[str, Any]:
        """As plain JSON values."""
        return self.model_dump(mode="json")

    def encode(self) -> bytes:
        """As canonical JSON."""
        return canonical_json.dumps(self.plain())
