"""Releases: what anyone can check of them, and what a recipient checks before it opens one.

A release carries the whole signed result. Sealed for its recipients are the residues after the
server's half, and the proof that they are just that. Source: PROTOCOL.md, sections 8.3, 9, 11.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtl.core.crypto import primitives, release_proof
from dtl.core.crypto.group import COMPONENTS
from dtl.core.crypto.residues import Bytes
from dtl.core.errors import FormatError, VerificationError
from dtl.core.files import sealed
from dtl.core.files.container import SEALED, Container, Rows, file_digest
from dtl.core.files.headers import ReleaseHeader, read_header
from dtl.core.files.job_file import Job
from dtl.core.parallel import Work
from dtl.core.public import results, uploads
from dtl.core.public.results import Result

PROOF_GROUPS = 128  # groups a task
HALF_GROUPS = 16  # the same, where a half is applied


@dataclass(frozen=True)
class Release:
    """A release whose form, signatures, manifest and grants have been checked.

    `result` is the result inside it: its digest was recomputed, its signature checked.
    """

    path: Path
    container: Container
    header: ReleaseHeader
    digest: str
    result: Result

    def core(self, job: Job) -> bytes:
        """What its keys, its chunks and its proof are bound to."""
        manifest = self.header.manifest
        return sealed.release_core(
            manifest,
            self.header.of,
            tensor_digests(self.container),
            self.header.names,
            job.residue_shape(manifest.values),
            self.header.commit,
        )


@dataclass(frozen=True)
class Sealed:
    """The sealed part of a release, with the key that opens it."""

    release: Release
    encryption_key: bytes
    core: bytes
    groups: int
    opened_length: int
    rows: Rows

    def payload(self) -> Iterator[bytes]:
        """The payload, chunk by chunk; VerificationError for one that was changed."""
        return sealed.open_stream(self.rows, self.encryption_key, self.core, str(self.release.path))


def tensor_digests(container: Container) -> dict[str, bytes]:
    """The digests of the result's tensors in a release (or result), by name."""
    names = sorted(set(container.tensors) - {SEALED})
    return {name: container.tensor_digest(name) for name in names}


def payload_bytes(job: Job, values: int) -> int:
    """Bytes of a release's payload: the half-opened components, then the proof."""
    key, groups = job.public_key, job.codec.groups(values)
    return release_proof.half_opened_bytes(key, groups) + release_proof.proof_length(key)


def open_release(job: Job, path: Path, stack: ExitStack, work: Work) -> Release:
    """Open a release of this job; check its form, both signatures, its manifest and grants.

    The result that it carries is hashed anew: its digest must be the one that the release
    names, and carry the server's signature. Raises FormatError or VerificationError.
    """
    container = stack.enter_context(Container(path))
    header = read_header(container, ("release", "sum", "model"), job.digest)
    if not isinstance(header, ReleaseHeader):
        raise FormatError(
            f"{path}: expected release, found {header.kind}", "release-model comes first"
        )
    manifest = header.manifest
    length = primitives.sealed_length(payload_bytes(job, manifest.values))
    container.require({SEALED: (length,), **job.result_shapes(manifest.values)})
    digest = container.verify(header.kind, job.server.sign, work.progress, work.lanes).hex()
    of = file_digest(manifest.encode(), tensor_digests(container))
    if of.hex() != header.of:
        raise VerificationError(f"{path}: the result inside is not the one that it names")
    signature = bytes.fromhex(header.result_signature)
    what = f"{path}: the result inside"
    primitives.verify_signature(job.server.sign, manifest.kind, of, signature, what)
    results.check_manifest(job, manifest, path)
    check_grants(header, path)
    return Release(path, container, header, digest, Result(path, manifest, header.of, container))


def check_grants(header: ReleaseHeader, path: Path) -> None:
    """Raise VerificationError when a release is granted to somebody who has no right to it."""
    strangers = set(header.names) - set(header.manifest.contributions) - set(header.admitted)
    if strangers:
        raise VerificationError(
            f"{path}: granted to {', '.join(sorted(strangers))}, who never contributed"
        )
    needless = set(header.admitted) & set(header.manifest.contributions)
    if needless:
        raise VerificationError(f"{path}: admits {', '.join(sorted(needless))}, who contributed")


def unseal(job: Job, release: Release, encryption_key: bytes) -> Sealed:
    """The sealed part of a release, to be read with its encryption key."""
    groups = job.codec.groups(release.header.manifest.values)
    return Sealed(
        release,
        encryption_key,
        release.core(job),
        groups,
        release_proof.half_opened_bytes(job.public_key, groups),
        release.container.bytes_of(SEALED),
    )


def opened_pieces(job: Job, part: Sealed, groups: int) -> Iterator[tuple[int, Bytes]]:
    """(first group, c' [G, 7, width]) of a release's sealed part, so many groups at a time."""
    width = job.public_key.arithmetic.width
    size = groups * COMPONENTS * width
    held, first, left = bytearray(), 0, part.opened_length
    for chunk in part.payload():
        held += chunk[:left]
        left -= min(left, len(chunk))
        while len(held) >= size or (held and not left):
            residues = np.frombuffer(bytes(held[:size]), np.uint8).reshape(-1, COMPONENTS, width)
            del held[:size]
            yield first, residues
            first += len(residues)


def check_body(job: Job, release: Release, work: Work) -> None:
    """Raise FormatError for a word of the body that is out of range."""
    uploads.check_body(job, release.result.body, release.header.manifest.values, work)


def check_release_proof(job: Job, part: Sealed, work: Work) -> None:
    """Raise VerificationError unless the server has applied its own half to this very result.

    Protocol, section 11. Every chunk of the payload is authenticated first; the participants'
    half is not needed, and must not be used before.
    """
    key, path = job.public_key, part.release.path
    state, seen, proof = hashlib.sha512(), 0, bytearray()
    for chunk in part.payload():
        inside = max(0, min(len(chunk), part.opened_length - seen))
        state.update(chunk[:inside])
        proof += chunk[inside:]
        seen += len(chunk)
    of, opened_hash = bytes.fromhex(part.release.header.of), state.digest()
    rho = release_proof.weights(part.core, of, opened_hash, part.groups)
    rows = part.release.result.rows
    tasks = (
        (
            key,
            uploads.read_groups(key, rows, first, len(opened)),
            opened,
            rho[first : first + len(opened)],
        )
        for first, opened in opened_pieces(job, part, PROOF_GROUPS)
    )
    total = -(-part.groups // PROOF_GROUPS)
    try:
        parts = work.map("check the release", release_proof.products, tasks, total)
        products = release_proof.joined(key, parts)
        release_proof.verify(key, part.core, of, opened_hash, products, bytes(proof))
    except (VerificationError, FormatError) as error:
        raise type(error)(f"{path}: {error.message}", error.hint) from None
