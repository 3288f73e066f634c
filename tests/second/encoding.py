"""Section 0: unambiguous encodings, hashes, canonical JSON, and texts for bytes."""

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

FORMAT = "dtl/v2"
PIECE = 2**22
LONGEST_DOCUMENT = 2**24
MOST_KEYS = 2**14


class Refused(Exception):
    """What a reader must not accept, with the exit code that says so."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{code}: {why}")
        self.code = code


def require(holds: object, code: int, why: str) -> None:
    if not holds:
        raise Refused(code, why)


def u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def u64(number: int) -> bytes:
    return number.to_bytes(8, "little")


def fields(label: str, *items: bytes | str | None) -> bytes:
    encoded = b""
    for item in (label, *items):
        raw = item.encode() if isinstance(item, str) else item or b""
        encoded += u32(len(raw)) + raw
    return encoded


def hashed(label: str, *items: bytes | str | None) -> bytes:
    return hashlib.sha512(fields(label, *items)).digest()


def tree_hash(label: str, items: Sequence[bytes | str], data: bytes) -> bytes:
    """The digest of long data: over the digests of its pieces."""
    pieces = [data[at : at + PIECE] for at in range(0, len(data), PIECE)]
    digests = [hashlib.sha256(piece).digest() for piece in pieces]
    return hashed(label, *items, u64(len(data)), *digests)


def hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA512 without a salt (RFC 5869)."""
    key = hmac.digest(bytes(64), secret, "sha512")
    block, output = b"", b""
    for counter in range(1, -(-length // 64) + 1):
        block = hmac.digest(key, block + info + bytes([counter]), "sha512")
        output += block
    return output[:length]


def keystream(key: bytes, nonce: bytes, length: int) -> bytes:
    """The first bytes of ChaCha20 (less than 256 GiB) under a nonce of 12 bytes."""
    return Cipher(ChaCha20(key, bytes(4) + nonce), None).encryptor().update(bytes(length))


def numbers(raw: bytes, width: int) -> list[int]:
    """Little-endian numbers of `width` bytes each."""
    return [int.from_bytes(raw[at : at + width], "little") for at in range(0, len(raw), width)]


def dumps(value: Any) -> bytes:
    """Canonical JSON."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode()


def parse(raw: bytes) -> Any:
    """JSON without floats or keys that come twice; ValueError or RecursionError."""

    def refuse(text: str) -> None:
        raise ValueError(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key twice")
        return found

    return json.loads(
        raw.decode(), parse_float=refuse, parse_constant=refuse, object_pairs_hook=unique
    )


def _few_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return len(value) <= MOST_KEYS and all(map(_few_keys, value.values()))
    return not isinstance(value, list) or all(map(_few_keys, value))


def loads(raw: bytes) -> Any:
    """Canonical JSON, or it is refused."""
    require(len(raw) <= LONGEST_DOCUMENT, 3, "a document that is too long")
    try:
        value = parse(raw)
        require(_few_keys(value), 3, "too many keys")
        same = dumps(value) == raw
    except (ValueError, RecursionError) as error:
        raise Refused(3, f"not canonical JSON: {error}") from error
    require(same, 3, "not canonical JSON")
    return value


def exactly(value: Any, names: str) -> dict[str, Any]:
    """An object with exactly these fields."""
    require(isinstance(value, dict) and value.keys() == set(names.split()), 3, f"fields: {names}")
    found: dict[str, Any] = value
    return found


def integer(value: Any, low: int, high: int) -> int:
    require(type(value) is int and low <= value <= high, 3, "an integer out of its range")
    number: int = value
    return number


def text(value: Any) -> str:
    require(isinstance(value, str), 3, "not a text")
    return str(value)


def from_base64(value: Any, length: int | None = None) -> bytes:
    """Canonical base64 of `length` bytes."""
    try:
        raw = base64.b64decode(text(value).encode(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(3, "not base64") from error
    require(base64.b64encode(raw).decode() == value, 3, "base64 is not canonical")
    require(length is None or len(raw) == length, 3, "bytes of a wrong length")
    return raw


def from_hex(value: Any, length: int) -> bytes:
    """`length` bytes in lower-case hex digits."""
    require(re.fullmatch(r"[0-9a-f]*", text(value)), 3, "not lower-case hex")
    require(len(value) == 2 * length, 3, "hex of a wrong length")
    return bytes.fromhex(value)


def number_from_hex(value: Any) -> int:
    """A big integer in lower-case hex without leading zeros."""
    require(re.fullmatch(r"[1-9a-f][0-9a-f]{0,8191}", text(value)), 3, "not a number in hex")
    return int(value, 16)


def digest_or_null(value: Any) -> bytes | None:
    return None if value is None else from_hex(value, 64)
