"""Files in Flower's messages: an array of bytes for each file, a few words beside them."""

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from dtl.core.errors import FormatError

_FILE, _ALONG, _WORDS = "file", "along", "dtl"
_DTYPE, _STYPE = "uint8", "dtl.file"
_FAILED = "failed"


def pack(
    file: bytes | None = None, along: Mapping[str, bytes] | None = None, **words: str | int
) -> RecordDict:
    """A message's content: a file's bytes, other files along with it, words such as round=3."""
    records = {_WORDS: ConfigRecord(words)}
    if file is not None:
        records[_FILE] = ArrayRecord({_FILE: _array(file)})
    if along:
        records[_ALONG] = ArrayRecord({name: _array(data) for name, data in along.items()})
    return RecordDict(records)


def pack_failure() -> RecordDict:
    """The content that reports that a step failed, the same for every failure.

    A server that learned the kind, the code or the text of a failure could learn something of
    a participant's half or data from each (PROTOCOL.md, section 8.4).
    """
    return RecordDict({_WORDS: ConfigRecord({_FAILED: True})})


def is_failure(content: RecordDict) -> bool:
    """Whether a content reports that a step failed."""
    return _FAILED in content.config_records.get(_WORDS, {})


def file_of(content: RecordDict) -> bytes:
    """The bytes of the file in a message; FormatError when there is none."""
    try:
        return _data(content.array_records[_FILE][_FILE])
    except KeyError:
        raise FormatError("a message without its file") from None


def along_of(content: RecordDict) -> dict[str, bytes]:
    """The files that came along with the file of a message, by name."""
    found = content.array_records.get(_ALONG, {})
    return {name: _data(array) for name, array in found.items()}


def _array(data: bytes) -> Array:
    return Array(dtype=_DTYPE, shape=(len(data),), stype=_STYPE, data=data)


def _data(array: Array) -> bytes:
    if array.dtype != _DTYPE or array.stype != _STYPE:
        raise FormatError("a message with something else than a file")
    data: bytes = array.data
    return data


def word(content: RecordDict, name: str) -> str | int:
    """A word of a message; FormatError when it is not there."""
    found = content.config_records.get(_WORDS, {}).get(name)
    if not isinstance(found, str | int):
        raise FormatError(f"a message that does not say its {name}")
    return found
