"""Canonical JSON: one spelling for every value, so that digests are well defined.

UTF-8, unescaped, keys sorted, no spaces, no floats. Source: PROTOCOL.md, section 0.
"""

import json
from typing import Any, NoReturn

from dtl.core.errors import FormatError

MAX_KEYS = 1 << 14  # of an object; a validator remembers every bad one
Json = Any
"""None, bool, int, str, list or dict of those."""


def dumps(value: Json) -> bytes:
    """Encode canonically."""
    text = json.dumps(
        value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return text.encode()


def loads(data: bytes, what: str) -> Json:
    """Decode; FormatError unless encoding the result again gives the same bytes.

    That refuses duplicate keys, floats, escapes, spaces, unsorted keys and every other
    second spelling. `what` names the file in the error.
    """
    value = parse(data, what, MAX_KEYS)
    try:
        same = dumps(value) == data
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise FormatError(f"{what}: expected canonical JSON")
    return value


def parse(data: bytes, what: str, max_keys: int | None = None) -> Json:
    """Decode JSON without floats or duplicate keys, but in any spelling; else FormatError.

    No object may have more than `max_keys` keys.
    """

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        found = dict(pairs)
        if len(found) != len(pairs) or (max_keys is not None and len(pairs) > max_keys):
            raise ValueError
        return found

    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_float=_refuse,
            parse_constant=_refuse,
            object_pairs_hook=unique,
        )
        if b"\\u" in data:
            dumps(value)  # an escaped lone surrogate cannot be written as UTF-8
        return value
    except (ValueError, RecursionError):  # includes bad UTF-8 and absurdly long integers
        found = _other_kind(data)
        raise FormatError(f"{what}: expected JSON with unique keys and no floats{found}") from None


def _other_kind(data: bytes) -> str:
    """What a file that is no JSON seems to be, where that can be seen."""
    if not data:
        return ", found an empty file"
    if data.startswith(b"PK\x03\x04"):
        return ", found an .npz or .zip file"
    if data[8:9] == b"{" and data[:8] != data[:8].strip(b"\0"):  # a short length comes first
        return ", found a file of tensors: .safetensors, an upload, a result or a release"
    return ""


def _refuse(_: str) -> NoReturn:
    raise ValueError
