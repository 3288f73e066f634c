"""The sealed payload of a release: what it is bound to, and its stream of chunks.

Source: PROTOCOL.md, section 9.
"""

from collections.abc import Iterable, Iterator

from dtl.core.crypto import primitives
from dtl.core.errors import FormatError, VerificationError
from dtl.core.files import canonical_json
from dtl.core.files.container import SEALED, Container
from dtl.core.files.headers import ResultHeader


def release_core(
    manifest: ResultHeader, grants: Iterable[str], shape: tuple[int, int, int], commit: bytes
) -> bytes:
    """H(core): job, round, manifest, the grants' names, sizes and the key commitment (64 bytes).

    Every wrapped key and every chunk is bound to it.
    """
    core = {
        "job": manifest.job,
        "round": manifest.round,
        "manifest": manifest.plain(),
        "grants": list(grants),
        "sizes": {"chunk": primitives.SEAL_CHUNK, "residues": list(shape)},
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


def open_stream(container: Container, key: bytes, core: bytes, length: int) -> Iterator[bytes]:
    """The plaintext chunks of a release whose payload has `length` bytes.

    Raises FormatError for a payload of another length, VerificationError for one that was
    changed. A caller must run through the whole stream once before it uses any of it.
    """
    tensor = container.tensors[SEALED]
    if tensor.length != primitives.sealed_length(length):
        raise FormatError(f"{container.path}: the sealed payload has the wrong length")
    size = primitives.SEAL_CHUNK + primitives.TAG_BYTES
    starts = range(0, tensor.length, size)
    for index, start in enumerate(starts):
        last = index == len(starts) - 1
        chunk = container.read(tensor.start + start, min(size, tensor.length - start))
        try:
            yield primitives.open_chunk(key, index, last, chunk, core)
        except VerificationError as error:
            raise VerificationError(f"{container.path}: {error.message}") from None
