"""A participant: encrypts its gradients, and opens what was released to it."""

import hashlib
import math
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dtl.core.crypto import masks, primitives, proof, scheme
from dtl.core.crypto.group import COMPONENTS, PublicKey
from dtl.core.crypto.residues import Bytes
from dtl.core.encoding.fixed_point import Integers, Rounding, headroom_exhausted
from dtl.core.errors import (
    FormatError,
    NotAllowedError,
    QuorumError,
    UsageError,
    VerificationError,
)
from dtl.core.files import sealed, tensors
from dtl.core.files.atomic import AtomicOutput, check_output, finish
from dtl.core.files.closing import Close, Reveal
from dtl.core.files.container import PROOF, RESIDUES, ContainerWriter
from dtl.core.files.documents import Job, Key, ParticipantSecrets
from dtl.core.files.headers import (
    Grant,
    ReleaseHeader,
    ResultHeader,
    UploadHeader,
    now,
    same_shapes,
)
from dtl.core.files.ledger import Ledger, OpenEntry, RevealEntry, UploadEntry
from dtl.core.files.schema import FORMAT
from dtl.core.files.tensors import PlainMetadata, TensorFile, TensorWriter, VectorDigest
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.progress import ProgressCallback, silent
from dtl.core.public import results, verification

ENCRYPT_GROUPS = 32  # groups a task
OPEN_GROUPS = 16


@dataclass(frozen=True)
class UploadOptions:
    """How gradients become a contribution: x = weight lr gradient, then rounding."""

    rounding: Rounding
    weight: float | None = None
    lr: float = 1.0
    round: int | None = None
    model: Path | None = None
    accept_differencing: bool = False


@dataclass(frozen=True)
class UploadReport:
    """What `encrypt_gradients` did; `clamped` is None when an interrupted run was completed."""

    header: UploadHeader
    digest: str
    clamped: int | None


@dataclass(frozen=True)
class Basis:
    """What an upload is based on: the round it is for, the base, the opened vector's digest."""

    round: int
    base: str | None
    opened: str | None


def encrypt_gradients(
    key: Key,
    gradients: Path,
    output: Path,
    options: UploadOptions,
    force: bool = False,
    work: Work = DEFAULT_WORK,
) -> UploadReport:
    """Scale, round, clamp, pack, encrypt and sign gradients (protocol, section 8, step 1).

    Raises NumericError for NaN or infinity, NotAllowedError for a second upload.
    """
    key.require("participant")
    check_output(output, force)
    job = key.job
    scale = _scale(job, options)
    source = tensors.open_tensors(gradients)
    try:
        basis = _basis(source, options)
        header = UploadHeader(
            format=FORMAT,
            kind="upload",
            job=job.digest,
            signer=key.name,
            created=now(),
            round=basis.round,
            layout=source.layout,
            values=sum(spec.values for spec in source.layout),
            base=basis.base,
            roster=job.roster_digest,
            masked=job.masks,
        )
        # A first pass finds bad input before the ledger is touched.
        encoded = _Encoded(job, source, scale, options.rounding)
        for _ in encoded.batches(work.progress):
            pass
        clamped = encoded.clamped
        with Ledger(key) as ledger:
            done = _check_only_upload(ledger, basis, options.accept_differencing)
            if done is not None:
                if not finish(output, bytes.fromhex(done), force):
                    raise NotAllowedError(
                        f"{key.name} has made an upload for round {basis.round} already",
                        "send that same file again, or go on with the next round",
                    )
                return UploadReport(header, done, None)
            blocks = _Blocks(job, encoded, _mask_keys(key, basis))
            with AtomicOutput(output, force) as file:
                shape = job.residue_shape(header.values)
                shapes = {PROOF: (proof.proof_length(job.public_key, shape[0]),), RESIDUES: shape}
                writer = ContainerWriter(file, header.encode(), shapes)
                randomness = scheme.fresh_randomness(job.public_key, shape[0])
                for piece in _encrypted(job, blocks, randomness, work):
                    writer.write(RESIDUES, piece)
                _write_proof(key, header, blocks, randomness, writer, work)
                digest = writer.finish(header.kind, key.secrets.sign)
                file.seal(digest)
                ledger.append(
                    UploadEntry(
                        event="upload",
                        round=basis.round,
                        base=basis.base,
                        opened=basis.opened,
                        upload=digest.hex(),
                    )
                )
                file.keep()
                file.commit()
    finally:
        source.close()
    return UploadReport(header, digest.hex(), clamped)


def _scale(job: Job, options: UploadOptions) -> float:
    weight = 1 / len(job.participants) if options.weight is None else options.weight
    for name, value in (("weight", weight), ("lr", options.lr)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{name}: expected a positive number, found {value}")
    return weight * options.lr


def _basis(source: TensorFile, options: UploadOptions) -> Basis:
    """The round and base of an upload, from the gradients' metadata, the model, and --round."""
    known = source.metadata
    if known is not None and known.kind != "gradients":
        raise FormatError(f"{source.path}: expected gradients, found {known.kind}")
    if options.model is not None:
        model = tensors.open_tensors(options.model)
        try:
            named = tensors.weights_metadata(model)
            if not same_shapes(source.layout, model.layout):
                raise FormatError(f"{source.path}: its tensors are not those of {options.model}")
        finally:
            model.close()
        if known is not None and known.base != named.base:
            raise FormatError(f"{source.path}: based on another model than {options.model}")
        known = named
    if known is None or known.base is None:
        if options.round is None:
            raise UsageError(
                f"{source.path}: does not say which round it is for",
                "add --model M (what the gradients are based on), or --round N without one",
            )
        return Basis(_checked_round(options.round, 1), None, None)
    first = known.round + 1
    return Basis(_checked_round(options.round or first, first), known.base, known.opened)


def _checked_round(number: int, least: int) -> int:
    if not least <= number < 1 << 32:
        raise UsageError(f"--round: expected at least {least}, found {number}")
    return number


class _Encoded:
    """The gradients as integers, batch by batch; can be run through more than once."""

    def __init__(self, job: Job, source: TensorFile, scale: float, rounding: Rounding) -> None:
        self._job, self._source = job, source
        self._scale, self._rounding = scale, rounding
        self._total = sum(spec.values for spec in source.layout)
        self.digest, self.clamped = b"", 0

    def batches(self, progress: ProgressCallback = silent) -> Iterator[Integers]:
        """Integers of ENCRYPT_GROUPS groups at a time; sets `digest` and `clamped`.

        Raises FormatError when another pass gave other integers: the file has changed.
        """
        fixed_point, state = self._job.fixed_point, hashlib.sha512()
        size = ENCRYPT_GROUPS * COMPONENTS * self._job.packing.slots
        start = self.clamped = 0
        for reals in tensors.in_batches(tensors.values(self._source), size):
            integers, clamped = fixed_point.encode_step(reals, self._scale, self._rounding, start)
            start += integers.size
            self.clamped += clamped
            state.update(integers.tobytes())
            progress("check gradients", start, self._total)
            yield integers
        if self.digest not in (b"", state.digest()):
            raise FormatError(f"{self._source.path}: the file changed while it was read")
        self.digest = state.digest()


def _mask_keys(key: Key, basis: Basis) -> list[masks.Key]:
    """This participant's masks for a round: one with every other participant."""
    return [
        (masks.sign_of(key.name, other), _round_key(key, basis, other)) for other in _seeds(key)
    ]


def _seeds(key: Key) -> dict[str, bytes]:
    if not isinstance(key.secrets, ParticipantSecrets):
        raise NotAllowedError(f"{key.path}: expected a participant's key")
    return key.secrets.mask_seeds


def _round_key(key: Key, basis: Basis, other: str) -> bytes:
    return masks.round_key(
        _seeds(key)[other],
        bytes.fromhex(key.job.digest),
        basis.round,
        bytes.fromhex(basis.base) if basis.base else None,
        bytes.fromhex(basis.opened) if basis.opened else None,
        bytes.fromhex(key.job.roster_digest),
    )


class _Blocks:
    """The masked blocks of an upload, batch by batch; can be run through more than once."""

    def __init__(self, job: Job, encoded: _Encoded, keys: list[masks.Key]) -> None:
        self._job, self._encoded, self._keys = job, encoded, keys

    def batches(self) -> Iterator[tuple[int, Bytes]]:
        """(first group, blocks [G, 7, block width]), ENCRYPT_GROUPS groups at a time."""
        job, first = self._job, 0
        for integers in self._encoded.batches():
            count = job.groups(integers.size)
            packed = job.packing.pack(integers, count * COMPONENTS)
            masked = masks.add_masks(packed, self._keys, first * COMPONENTS, job.N)
            yield first, masked.reshape(count, COMPONENTS, -1)
            first += count


def _encrypted(job: Job, blocks: _Blocks, randomness: Bytes, work: Work) -> Iterator[bytes]:
    """The residues of an upload, ENCRYPT_GROUPS groups at a time."""
    groups = len(randomness)
    tasks = (
        (job.public_key, batch, randomness[first : first + len(batch)], groups)
        for first, batch in blocks.batches()
    )
    total = -(-groups // ENCRYPT_GROUPS)
    yield from work.map("encrypt", _encrypt_chunk, tasks, total)


def _write_proof(
    key: Key,
    header: UploadHeader,
    blocks: _Blocks,
    randomness: Bytes,
    writer: ContainerWriter,
    work: Work,
) -> None:
    """Prove the upload (protocol, section 6), in a second pass over its blocks."""
    public, groups = key.job.public_key, len(randomness)
    witness, d = proof.commit(public, groups)
    signing_key = primitives.signing_public_key(key.secrets.sign)
    residues_hash = writer.tensor_hash(RESIDUES)
    rho = proof.weights(public, header.encode(), signing_key, groups, residues_hash, d)
    responder = proof.Responder(public, witness)
    for first, batch in blocks.batches():
        end = first + len(batch)
        responder.add(rho[first:end], randomness[first:end], batch)
        work.progress("prove", end, groups)
    writer.write(PROOF, proof.encode(public, groups, responder.proof(d)))


def _encrypt_chunk(key: PublicKey, blocks: Bytes, randomness: Bytes, groups: int) -> bytes:
    return scheme.encrypt(key, blocks, randomness, groups).tobytes()


def _check_only_upload(ledger: Ledger, basis: Basis, accept_differencing: bool) -> str | None:
    """The digest of the upload that was made for this round already, if any.

    Raises NotAllowedError for a second upload on one base, VerificationError when the base
    was opened with another content.
    """
    made = ledger.find(UploadEntry, round=basis.round)
    if made:
        return made[0].upload
    if basis.base is None:
        return None
    for entry in ledger.find(OpenEntry, result=basis.base):
        if entry.opened != basis.opened:
            raise VerificationError("the model is not the one that was opened under this name")
    if ledger.find(UploadEntry, base=basis.base) and not accept_differencing:
        raise NotAllowedError(
            "an upload on this base was made already, for another round",
            "two uploads on one base can be subtracted from one another; "
            "--accept-differencing repeats a void round all the same",
        )
    return None


# --- reveal ------------------------------------------------------------------------------------


def reveal_masks(key: Key, path: Path, output: Path, force: bool = False) -> Reveal:
    """Sign the round keys of the masks shared with those whom a close file declares missing.

    Protocol, section 7. Raises VerificationError when this participant's upload is not in
    the close file, NotAllowedError when it is declared missing itself or has revealed
    for another close file of the round, QuorumError when too few are present.
    """
    key.require("participant")
    check_output(output, force)
    job = key.job
    close = Close.load(path, job)
    if {*close.names, *close.missing} != set(job.names):
        raise FormatError(f"{path}: not about this job's roster")
    if key.name in close.missing:
        raise NotAllowedError(
            f"{path}: declares {key.name} missing",
            "who is missing must not reveal: its own upload could be opened",
        )
    if not results.can_close(job, len(close.names)):
        raise QuorumError(
            f"{path}: {len(close.names)} of {len(job.names)} are too few to reveal anything"
        )
    with Ledger(key) as ledger:
        sent = ledger.find(UploadEntry, round=close.round)
        if not sent or (sent[0].upload, sent[0].base) != (close.uploads[key.name], close.base):
            raise VerificationError(f"{path}: does not name the upload that {key.name} made")
        before = ledger.find(RevealEntry, round=close.round)
        if before and before[0].close != close.digest:
            raise NotAllowedError(
                f"{path}: a second close of round {close.round}",
                f"{key.name} has revealed for {before[0].close[:16]}... already",
            )
        basis = Basis(close.round, close.base, sent[0].opened)
        reveal = Reveal.signed(
            key.secrets.sign,
            format=FORMAT,
            kind="reveal",
            job=job.digest,
            signer=key.name,
            created=now(),
            round=close.round,
            base=close.base,
            close=close.digest,
            keys={name: _round_key(key, basis, name) for name in close.missing},
        )
        with AtomicOutput(output, force) as file:
            file.write(reveal.encode())
            file.sync()
            if not before:
                entry = RevealEntry(event="reveal", round=close.round, close=close.digest)
                ledger.append(entry)
            file.commit()
    return reveal


# --- open --------------------------------------------------------------------------------------


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
    tensors.check_suffix(output)
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
            with AtomicOutput(output, force) as file:
                opened = _decode(key, header, payload, file, release, work)
                file.sync()
                if not ledger.find(OpenEntry, result=header.of):
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
                f"{release}: the upload that {name} made for round {header.round} is not in it"
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

    writer = TensorWriter(file, manifest.layout, metadata(secrets.token_hex(64)))
    left = manifest.values
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
    yield from work.map("apply the own half", _open_chunk, tasks, total)


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
