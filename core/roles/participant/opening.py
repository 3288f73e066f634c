"""A participant opens what was released to it (protocol, section 8, step 4)."""

import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtl.core.crypto import primitives, scheme
from dtl.core.crypto.group import COMPONENTS, PublicKey
from dtl.core.crypto.residues import Bytes
from dtl.core.encoding.fixed_point import headroom_exhausted
from dtl.core.errors import (
    NotAllowedError,
    VerificationError,
)
from dtl.core.files import sealed
from dtl.core.files.atomic import PRIVATE_MODE, AtomicOutput, check_output
from dtl.core.files.headers import (
    Grant,
    ReleaseHeader,
    ResultHeader,
)
from dtl.core.files.key_file import Key, ParticipantSecrets
from dtl.core.files.ledger import Ledger, OpenEntry, UploadEntry
from dtl.core.files.schema import FORMAT
from dtl.core.files.tensor_writer import TensorWriter, check_suffix
from dtl.core.files.tensors import PlainMetadata, VectorDigest
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.public import verification

OPEN_GROUPS = 16  # groups a task


@dataclass(frozen=True)
class OpenReport:
    """What `open_release` did."""

    header: ReleaseHeader
    opened: str


def open_release(
    key: Key,
    release: Path,
    output: Path,
    force: bool = False,
    work: Work = DEFAULT_WORK,
) -> OpenReport:
    """Check a release, take this party's half off, and decode (protocol, section 8, step 4).

    Raises NotAllowedError without a grant, VerificationError for anything tampered with or
    contradicting this participant's ledger, NumericError when headroom is exhausted.
    """
    key.require("participant")
    check_suffix(output)
    check_output(output, force)
    job = key.job
    with ExitStack() as stack:
        container, header, _ = verification.open_release(job, release, stack, work)
        grant = _own_grant(key, header, release)
        shape = job.residue_shape(header.manifest.values)
        length = shape[0] * job.group_bytes
        with Ledger(key) as ledger:
            _check_history(ledger, header, key.name, release)
            core = sealed.release_core(header.manifest, header.names, shape, header.commit)
            encryption_key = _unwrap(key, header, grant, core, release)
            # Nothing of the payload is used before all of it has been checked.
            for _ in sealed.open_stream(container, encryption_key, core, length):
                pass
            payload = sealed.open_stream(container, encryption_key, core, length)
            with AtomicOutput(output, force, PRIVATE_MODE) as file:
                opened = _decode(key, header, payload, file, release, work)
                known = ledger.find(OpenEntry, result=header.of)
                if known and known[0].opened != opened:
                    raise VerificationError(
                        f"{release}: {header.of[:16]}... was opened with another content"
                    )
                file.sync()
                if not known:
                    ledger.append(
                        OpenEntry(
                            event="open",
                            round=header.round,
                            result=header.of,
                            parent=header.manifest.parent,
                            opened=opened,
                            admitted=header.admitted,
                        )
                    )
                file.commit()
    return OpenReport(header, opened)


def _check_history(ledger: Ledger, header: ReleaseHeader, name: str, release: Path) -> None:
    """Hold a release against what this participant has sent and seen."""
    manifest = header.manifest
    for seen in ledger.find(OpenEntry, round=header.round):
        if seen.result != header.of:
            raise VerificationError(
                f"{release}: a second, different result of round {header.round}",
                f"this participant has opened {seen.result[:16]}... for that round",
            )
    for sent in ledger.find(UploadEntry, round=header.round):
        if manifest.upload_of(name) != sent.upload:
            raise VerificationError(
                f"{release}: the upload that {name} made for round {header.round} is not in it",
                _why_left_out(manifest, name),
            )
        if sent.base != manifest.base:
            raise VerificationError(f"{release}: not built on the model that {name} worked on")
    for seen in ledger.find(OpenEntry):
        if seen.result == manifest.parent and seen.round >= header.round:
            raise VerificationError(f"{release}: its parent is of a later round")
        if seen.result != header.of and set(seen.admitted) & set(header.admitted):
            twice = ", ".join(sorted(set(seen.admitted) & set(header.admitted)))
            raise VerificationError(f"{release}: admits {twice} a second time")
        if seen.parent == header.of and seen.round <= header.round:
            raise VerificationError(f"{release}: its successor is of an earlier round")


def _why_left_out(manifest: ResultHeader, name: str) -> str:
    """What to tell a participant whose upload is not in a result."""
    if name in manifest.missing:
        return (
            f"declared missing in round {manifest.round}: it came too late, and this release stays "
            f"closed; a later one that is granted to {name} opens, if what {name} sends for its "
            "round is in it"
        )
    return f"another upload of {name}'s is in it: show this release to the others"


def _own_grant(key: Key, header: ReleaseHeader, release: Path) -> Grant:
    for grant in header.grants:
        if grant.participant == key.name:
            return grant
    raise NotAllowedError(
        f"{release}: not granted to {key.name}", f"it can be opened by {', '.join(header.names)}"
    )


def _unwrap(key: Key, header: ReleaseHeader, grant: Grant, core: bytes, release: Path) -> bytes:
    own = key.job.participant(key.name)
    if own is None or not isinstance(key.secrets, ParticipantSecrets):
        raise NotAllowedError(f"{key.path}: expected a participant's key")
    info = sealed.grant_info(core, key.name, own.hpke, key.job.server.sign)
    content_key = primitives.hpke_unwrap(key.secrets.hpke, grant.wrapped, info)
    if len(content_key) != primitives.KEY_BYTES:
        raise VerificationError(f"{release}: the content key has the wrong length")
    encryption_key, commit = sealed.content_keys(content_key)
    if not primitives.equal_secrets(commit, header.commit):
        raise VerificationError(f"{release}: the content key is not the one committed to")
    return encryption_key


def _decode(
    key: Key,
    header: ReleaseHeader,
    payload: Iterator[bytes],
    file: AtomicOutput,
    release: Path,
    work: Work,
) -> str:
    """Open the payload into `file`; returns the digest V of the opened integers."""
    job, manifest = key.job, header.manifest
    fixed_point = job.fixed_point
    model = manifest.kind == "model"
    limit = fixed_point.max_value if model else fixed_point.max_sum
    state = VectorDigest(manifest.layout, manifest.values)

    def metadata(opened: str) -> PlainMetadata:
        return PlainMetadata(
            format=FORMAT,
            kind="weights" if model else "sum",
            round=header.round,
            base=header.of,
            opened=opened,
        )

    left = manifest.values
    with TensorWriter(file, manifest.layout, metadata(secrets.token_hex(64))) as writer:
        for blocks in _opened_blocks(key, payload, manifest, work):
            count = min(left, len(blocks) * job.packing.slots)
            try:
                integers = job.packing.unpack(blocks, count)
            except VerificationError as error:
                raise VerificationError(f"{release}: {error.message}") from None
            if (np.abs(integers) > limit).any():
                raise headroom_exhausted(fixed_point, "a value of the result")
            left -= count
            state.update(integers)
            writer.write(fixed_point.decode(integers))
        opened = state.hexdigest()
        writer.finish(metadata(opened))
    return opened


def _opened_blocks(
    key: Key,
    payload: Iterator[bytes],
    manifest: ResultHeader,
    work: Work,
) -> Iterator[Bytes]:
    """Blocks [7 G, block width], OPEN_GROUPS groups at a time."""
    job = key.job
    size = OPEN_GROUPS * job.group_bytes
    half = key.half
    tasks = ((job.public_key, half, piece) for piece in _cut(payload, size))
    total = -(-job.groups(manifest.values) // OPEN_GROUPS)
    yield from work.map("apply the own half", _open_chunk, tasks, total, values=manifest.values)


def _open_chunk(key: PublicKey, half: tuple[int, ...], data: bytes) -> Bytes:
    width = key.arithmetic.width
    residues = np.frombuffer(data, np.uint8).reshape(-1, COMPONENTS + 1, width)
    blocks = scheme.open_blocks(key, scheme.apply_half(key, residues, half))
    return blocks.reshape(-1, blocks.shape[-1])


def _cut(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Cut a stream of bytes anew: all pieces have `size` bytes but the last."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)
