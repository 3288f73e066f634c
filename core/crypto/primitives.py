"""Hashes, signatures, key wrapping and sealing: thin calls into `cryptography`.

Nothing here is home-made but the encoding of hash inputs (`fields`) and the choice
of labels. Verification raises; it never returns False. Source: PROTOCOL.md, sections 0 and 9.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
import struct

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from dtl.core.errors import FormatError, NotAllowedError, VerificationError

KEY_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16
SEAL_CHUNK = 1 << 20
"""Plaintext bytes in every chunk of a sealed stream but the last."""

KEM_NAME = "ML-KEM-768+X25519"
HPKE_PRIVATE_BYTES = 64 + 32
HPKE_PUBLIC_BYTES = 1184 + 32
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)

_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 1 << 17, 8, 1
SALT_BYTES = 32
_CHACHA_BLOCK = 64
_CHACHA_BLOCKS = 1 << 32  # the counter of RFC 8439 is 32 bits


def u32(value: int) -> bytes:
    """Encode an integer as 4 little-endian bytes."""
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    """Encode an integer as 8 little-endian bytes."""
    return struct.pack("<Q", value)


def fields(label: str, *items: bytes | str | None) -> bytes:
    """Encode a label and items unambiguously, each behind its length as u32 little-endian.

    Every hash, HKDF info, HPKE info and signature input of dtl is such an encoding.
    Text is UTF-8; ``None`` is the empty string.
    """
    parts: list[bytes] = []
    for item in (label, *items):
        data = item.encode() if isinstance(item, str) else (item or b"")
        parts += (u32(len(data)), data)
    return b"".join(parts)


def hash_fields(label: str, *items: bytes | str | None) -> bytes:
    """SHA-512 of `fields` (64 bytes)."""
    return hashlib.sha512(fields(label, *items)).digest()


def encode_base64(data: bytes) -> str:
    """Encode as canonical base64."""
    return base64.b64encode(data).decode()


def decode_base64(text: str) -> bytes:
    """Decode base64, refusing every spelling but the canonical one (FormatError)."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise FormatError("expected canonical base64") from None
    if base64.b64encode(data).decode() != text:
        raise FormatError("expected canonical base64")
    return data


# --- Ed25519 ---------------------------------------------------------------------------


def signing_public_key(secret: bytes) -> bytes:
    """Return the 32-byte Ed25519 public key of a 32-byte secret."""
    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def sign(secret: bytes, kind: str, digest: bytes) -> bytes:
    """Sign the digest of a file of the given kind (64 bytes)."""
    message = fields(f"dtl/v2/{kind}", digest)
    return Ed25519PrivateKey.from_private_bytes(secret).sign(message)


def verify_signature(public: bytes, kind: str, digest: bytes, signature: bytes, what: str) -> None:
    """Raise VerificationError unless `signature` is that of `public` on this kind and digest."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, fields(f"dtl/v2/{kind}", digest))
        _check_order(public)
    except (InvalidSignature, ValueError):
        raise VerificationError(
            f"{what}: the signature does not verify",
            "the file was changed, or signed by someone else; ask its sender for a fresh copy",
        ) from None


_FIELD_PRIME = 2**255 - 19
_SMALL_ORDER = {
    0,
    1,
    _FIELD_PRIME - 1,
    int.from_bytes(
        bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"
    ),
    int.from_bytes(
        bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"
    ),
}
"""The y of the eight points of Ed25519 whose order divides 8."""


def _check_order(public: bytes) -> None:
    """Raise ValueError for a public key under which everybody can sign, or of a second spelling.

    OpenSSL takes both (RFC 8032, section 5.1.7, leaves it open).
    """
    y = int.from_bytes(public, "little") & ((1 << 255) - 1)
    if y >= _FIELD_PRIME or y in _SMALL_ORDER:
        raise ValueError


def equal_secrets(left: bytes, right: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(left, right)


# --- HPKE: ML-KEM-768 + X25519, HKDF-SHA256, ChaCha20-Poly1305 ---------------------------


def _hpke_private(secret: bytes) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    return (
        MLKEM768PrivateKey.from_seed_bytes(secret[:64]),
        X25519PrivateKey.from_private_bytes(secret[64:]),
    )


def hpke_generate() -> bytes:
    """Return a fresh private key: 64-byte ML-KEM seed, then 32-byte X25519 secret."""
    return secrets.token_bytes(HPKE_PRIVATE_BYTES)


def hpke_public_key(secret: bytes) -> bytes:
    """Return the public key of `secret`: 1184 bytes ML-KEM-768, then 32 bytes X25519."""
    mlkem, x25519 = _hpke_private(secret)
    return mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()


def hpke_wrap(public: bytes, message: bytes, info: bytes) -> bytes:
    """Encrypt a short message to a public key, bound to `info`."""
    try:
        mlkem = MLKEM768PublicKey.from_public_bytes(public[:1184])
        x25519 = X25519PublicKey.from_public_bytes(public[1184:])
    except ValueError:
        raise FormatError("expected an ML-KEM-768+X25519 public key") from None
    return _SUITE.encrypt(message, MLKEM768X25519PublicKey(mlkem, x25519), info)


def hpke_unwrap(secret: bytes, wrapped: bytes, info: bytes) -> bytes:
    """Open what `hpke_wrap` made; VerificationError if the key or `info` differ."""
    try:
        return _SUITE.decrypt(wrapped, MLKEM768X25519PrivateKey(*_hpke_private(secret)), info)
    except (InvalidTag, ValueError):
        raise VerificationError("the wrapped content key does not open with this key") from None


# --- authentication tags -----------------------------------------------------------------


def tag(key: bytes, message: bytes) -> bytes:
    """The first 16 bytes of HMAC-SHA512."""
    return hmac.digest(key, message, "sha512")[:TAG_BYTES]


# --- keystream ---------------------------------------------------------------------------


def keystream(key: bytes, offset: int, length: int) -> bytes:
    """Bytes [offset, offset + length) of the ChaCha20 keystream under `key`.

    The nonce starts at zero and goes up by one whenever the 32-bit block counter is
    used up (256 GiB), so the stream can be entered anywhere.
    """
    out = b""
    while length > 0:
        block, skip = divmod(offset, _CHACHA_BLOCK)
        nonce, counter = divmod(block, _CHACHA_BLOCKS)
        room = (_CHACHA_BLOCKS - counter) * _CHACHA_BLOCK - skip
        take = min(length, room)
        cipher = Cipher(
            ChaCha20(key, struct.pack("<I", counter) + struct.pack("<Q4x", nonce)), None
        )
        out += cipher.encryptor().update(bytes(skip + take))[skip:]
        offset += take
        length -= take
    return out


# --- sealing with key commitment ---------------------------------------------------------


def derive(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA512 without salt."""
    return HKDF(SHA512(), length, None, info).derive(secret)


def committed_keys(secret: bytes, label: str) -> tuple[bytes, bytes]:
    """Derive (encryption key, 32-byte commitment) from a content key.

    ChaCha20-Poly1305 does not commit to its key, so one ciphertext can open under two
    keys; publishing the commitment, and checking it first, rules that out.
    """
    derived = derive(secret, fields(label), 2 * KEY_BYTES)
    return derived[:KEY_BYTES], derived[KEY_BYTES:]


def _chunk_nonce(index: int, last: bool) -> bytes:
    return index.to_bytes(11, "big") + bytes([last])


def seal_chunk(key: bytes, index: int, last: bool, chunk: bytes, aad: bytes) -> bytes:
    """Seal chunk `index` of a stream: its place and whether it is the last are authenticated."""
    return ChaCha20Poly1305(key).encrypt(_chunk_nonce(index, last), chunk, aad)


def open_chunk(key: bytes, index: int, last: bool, sealed: bytes, aad: bytes) -> bytes:
    """Open what `seal_chunk` made; VerificationError on any difference."""
    try:
        return ChaCha20Poly1305(key).decrypt(_chunk_nonce(index, last), sealed, aad)
    except InvalidTag:
        raise VerificationError("the sealed payload was changed or cut") from None


def sealed_length(length: int) -> int:
    """Bytes that a stream of `length` plaintext bytes takes when sealed."""
    chunks = max(1, -(-length // SEAL_CHUNK))
    return length + chunks * TAG_BYTES


# --- passphrase box ----------------------------------------------------------------------


def _box_keys(passphrase: bytes, salt: bytes) -> tuple[bytes, bytes]:
    stretched = Scrypt(salt=salt, length=KEY_BYTES, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P)
    return committed_keys(stretched.derive(passphrase), "dtl/v2/box")


def box(passphrase: bytes, message: bytes, aad: bytes) -> tuple[bytes, bytes, bytes]:
    """Seal under a passphrase; returns (salt, commitment, sealed)."""
    salt = secrets.token_bytes(SALT_BYTES)
    key, commit = _box_keys(passphrase, salt)
    # The salt is fresh, hence the key, so the nonce may be constant.
    return salt, commit, seal_chunk(key, 0, True, message, aad)


def open_box(passphrase: bytes, salt: bytes, commit: bytes, sealed: bytes, aad: bytes) -> bytes:
    """Open what `box` made.

    Raises NotAllowedError for a wrong passphrase, VerificationError for a changed box.
    """
    key, expected = _box_keys(passphrase, salt)
    if not equal_secrets(commit, expected):
        raise NotAllowedError("wrong passphrase")
    return open_chunk(key, 0, True, sealed, aad)
