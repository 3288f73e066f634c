"""The sealed payload of a release: what it is bound to, and its stream of chunks.

Source: PROTOCOL.md, section 9.
"""

from collections.abc import Iterable, Iterator, Mapping

from dtl.core.crypto import primitives
from dtl.core.crypto.group import COMPONENTS
from dtl.core.errors import VerificationError
from dtl.core.files import canonical_json
from dtl.core.files.container import Rows
from dtl.core.files.headers import ResultHeader


def release_core(
    manifest: ResultHeader,
    of: str,
    tensors: Mapping[str, bytes],
    grants: Iterable[str],
    shape: tuple[int, int, int],
    commit: bytes,
) -> bytes:
    """H(core): what every wrapped key, every chunk and the release's proof are bound to.

    `of` is the digest of the result, `tensors` the digests of its tensors by name, `shape`
    that of its residues [groups, 8, width]. Protocol, section 9. 64 bytes.
    """
    groups, _, width = shape
    core = {
        "job": manifest.job,
        "round": manifest.round,
        "of": of,
        "manifest": manifest.plain(),
        "tensors": {name: digest.hex() for name, digest in tensors.items()},
        "grants": list(grants),
        "sizes": {"chunk": primitives.SEAL_CHUNK, "sealed": [groups, COMPONENTS, width]},
        "commit": primitives.encode_base64(commit),
    }
    return primitives.hash_fields("dtl/v2/release-core", canonical_json.dumps(core))


def content_keys(content_key: bytes) -> tuple[bytes, bytes]:
    """(K_enc, commit) of a content key."""
    return primitives.committed_keys(content_key, "dtl/v2/content")


def grant_info(core: bytes, name: str, hpke_public: bytes, server_public: bytes) -> bytes:
    """What a wrapped content key is bound to."""
    return primitives.fields("dtl/v2/grant", core, name, hpke_public, server_public)


def seal_stream(key: bytes, core: bytes, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Seal pieces of any length as chunks of 1 MiB, the last one marked."""
    size = primitives.SEAL_CHUNK
    held, index = bytearray(), 0
    for piece in pieces:
        held += piece
        while len(held) > size:  # a full chunk is held back: it may be the last
            yield primitives.seal_chunk(key, index, False, bytes(held[:size]), core)
            del held[:size]
            index += 1
    yield primitives.seal_chunk(key, index, True, bytes(held), core)


def open_stream(rows: Rows, key: bytes, core: bytes, what: str) -> Iterator[bytes]:
    """The plaintext chunks of a release's payload; VerificationError for one that was changed.

    `rows` are the bytes of the tensor `sealed`, whose length was checked. A caller must run
    through the whole stream once before it uses any of it.
    """
    size = primitives.SEAL_CHUNK + primitives.TAG_BYTES
    starts = range(0, rows.length, size)
    for index, start in enumerate(starts):
        last = index == len(starts) - 1
        chunk = rows.read(start, min(size, rows.length - start))
        try:
            yield primitives.open_chunk(key, index, last, chunk, core)
        except VerificationError as error:
            raise VerificationError(f"{what}: {error.message}") from None
