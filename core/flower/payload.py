"""Files in Flower's messages: an array of bytes for the file, a few words beside it."""

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from dtl.core.errors import DtlError, FormatError

_FILE, _WORDS = "file", "dtl"
_DTYPE, _STYPE = "uint8", "dtl.file"
_ERROR, _CODE = "error", "code"


def pack(file: bytes | None = None, **words: str | int) -> RecordDict:
    """A message's content: a file's bytes, and words such as round=3."""
    records = {_WORDS: ConfigRecord(words)}
    if file is not None:
        array = Array(dtype=_DTYPE, shape=(len(file),), stype=_STYPE, data=file)
        records[_FILE] = ArrayRecord({_FILE: array})
    return RecordDict(records)


def pack_error(error: BaseException) -> RecordDict:
    """The content that reports a failure: its kind and exit code, never its text.

    The text names the participant's files and numbers; it stays in the participant's own log.
    """
    code = error.exit_code if isinstance(error, DtlError) else DtlError.exit_code
    return RecordDict({_WORDS: ConfigRecord({_ERROR: type(error).__name__, _CODE: code})})


def file_of(content: RecordDict) -> bytes:
    """The bytes of the file in a message; FormatError when there is none.

    Raises DtlError for a content that reports a failure.
    """
    failure = content.config_records.get(_WORDS, {}).get(_ERROR)
    if failure is not None:
        code = content.config_records[_WORDS].get(_CODE)
        raise DtlError(f"{failure!s:.40} (exit code {code!s:.4})")
    try:
        array = content.array_records[_FILE][_FILE]
    except KeyError:
        raise FormatError("a message without its file") from None
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
