"""A participant opens what was released to it (protocol, section 8, step 4).

Everything that can be checked from public values is checked before this party's half is used.
After that, every check is computed to the end and all failures are one: a server that could
tell them apart would learn something of the half from each.
"""

import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtl.core.ciphers.cipher import Opened
from dtl.core.crypto import primitives, scheme
from dtl.core.crypto.group import PublicKey
from dtl.core.crypto.residues import Bytes
from dtl.core.errors import NotAllowedError, VerificationError
from dtl.core.files import sealed
from dtl.core.files.atomic import PRIVATE_MODE, AtomicOutput, check_output
from dtl.core.files.headers import Grant, ReleaseHeader, ResultHeader
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger, OpenEntry, TriedEntry, UploadEntry
from dtl.core.files.schema import FORMAT
from dtl.core.files.tensor_writer import TensorWriter, check_suffix
from dtl.core.files.tensors import PlainMetadata, VectorDigest
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.public import releases, uploads, verification
from dtl.core.public.releases import Release, Sealed
from dtl.core.public.verification import Evidence

_HINT = (
    "an upload is spoiled, the server made a wrong result, or a value left the range of the job "
    "or of its dtype; dtl audit by the key generation center says which"
)


@dataclass(frozen=True)
class OpenOptions:
    """How much to check, and whether to go on after an attempt that did not open.

    With `evidence` (uploads, the model before, reveals) the result is recomputed first.
    """

    evidence: Evidence | None = None
    after_failure: bool = False


@dataclass(frozen=True)
class OpenReport:
    """What `open_release` did; `recomputed` says whether the result was recomputed before."""

    header: ReleaseHeader
    opened: str
    recomputed: bool


def open_release(
    key: Key,
    path: Path,
    output: Path,
    options: OpenOptions | None = None,
    force: bool = False,
    work: Work = DEFAULT_WORK,
) -> OpenReport:
    """Check a release, apply this party's half, and decode (protocol, section 8, step 4).

    Raises NotAllowedError without a grant or after a failed attempt, VerificationError for
    anything that was tampered with, contradicts this participant's ledger, or does not open.
    """
    options = options or OpenOptions()
    key.require("participant")
    check_suffix(output)
    check_output(output, force)
    job = key.job
    with ExitStack() as stack:
        release = releases.open_release(job, path, stack, work)
        _own_grant(key, release.header, path)
        with Ledger(key) as ledger:
            _check_history(ledger, release.header, key.name, path)
            _check_attempts(ledger, release, options.after_failure)
            part = releases.unseal(job, release, content_key(key, release))
            releases.check_body(job, release, work)
            releases.check_release_proof(job, part, work)
            recomputed = options.evidence is not None and verification.recompute(
                job, release.result, options.evidence, stack, work
            )
            known = ledger.find(OpenEntry, result=release.header.of)
            with AtomicOutput(output, force, PRIVATE_MODE) as file:
                _record_attempt(ledger, release, options.after_failure)
                decoded = _decode(key, part, file, work)
                if known and (known[0].opened, known[0].content) != decoded:
                    raise _cannot_open(path)
                opened, content = decoded
                file.sync()
                if not known:
                    ledger.append(
                        OpenEntry(
                            event="open",
                            round=release.header.round,
                            kind=release.header.manifest.kind,
                            result=release.header.of,
                            parent=release.header.manifest.parent,
                            opened=opened,
                            content=content,
                            admitted=release.header.admitted,
                        )
                    )
                file.commit()
    return OpenReport(release.header, opened, recomputed)


def _cannot_open(path: Path) -> VerificationError:
    """The one error of everything that fails once this party's half has been used."""
    return VerificationError(f"{path}: the result cannot be opened", _HINT)


# --- before the half is used ------------------------------------------------------------------


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


def _check_attempts(ledger: Ledger, release: Release, after_failure: bool) -> None:
    """One attempt a round, whatever came of it; after a failure, nothing but the same file.

    Raises VerificationError for another result of a round that was tried, NotAllowedError
    for another release after an attempt that did not open, unless `after_failure`.
    """
    header = release.header
    for tried in ledger.find(TriedEntry, round=header.round):
        if tried.result != header.of:
            raise VerificationError(
                f"{release.path}: another result of round {header.round} was tried before",
                f"this participant applied its half to {tried.result[:16]}... for that round",
            )
    failed = failed_attempts(ledger)
    if failed and not after_failure and release.digest not in {t.release for t in failed}:
        raise NotAllowedError(
            f"{release.path}: an attempt to open round {failed[-1].round} has failed before",
            "find out why (dtl audit); then --after-failure goes on. Every attempt that fails "
            "can tell the server one bit",
        )


def failed_attempts(ledger: Ledger) -> list[TriedEntry]:
    """The attempts that did not open, since the operator last said to go on after a failure."""
    opened = {entry.result for entry in ledger.find(OpenEntry)}
    attempts = ledger.find(TriedEntry)
    last = max((i for i, entry in enumerate(attempts) if entry.after_failure), default=0)
    return [entry for entry in attempts[last:] if entry.result not in opened]


def _record_attempt(ledger: Ledger, release: Release, after_failure: bool) -> None:
    """Write down, durably, that this party's half is about to be used on a release."""
    going_on = after_failure and bool(failed_attempts(ledger))
    if ledger.find(TriedEntry, release=release.digest) and not going_on:
        return
    ledger.append(
        TriedEntry(
            event="tried",
            round=release.header.round,
            result=release.header.of,
            release=release.digest,
            after_failure=going_on,
        )
    )


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


def content_key(key: Key, release: Release) -> bytes:
    """The encryption key of a release's sealed part, from this participant's own grant.

    Raises NotAllowedError without a grant, VerificationError for a content key that is not
    the one committed to.
    """
    job, header = key.job, release.header
    grant = _own_grant(key, header, release.path)
    own = job.participant(key.name)
    if own is None:
        raise NotAllowedError(f"{key.path}: expected a participant's key")
    info = sealed.grant_info(release.core(job), key.name, own.hpke, job.server.sign)
    unwrapped = primitives.hpke_unwrap(key.participant_secrets.hpke, grant.wrapped, info)
    if len(unwrapped) != primitives.KEY_BYTES:
        raise VerificationError(f"{release.path}: the content key has the wrong length")
    encryption_key, commit = sealed.content_keys(unwrapped)
    if not primitives.equal_secrets(commit, header.commit):
        raise VerificationError(f"{release.path}: the content key is not the one committed to")
    return encryption_key


# --- with the half --------------------------------------------------------------------------


def _decode(key: Key, part: Sealed, file: AtomicOutput, work: Work) -> tuple[str, str]:
    """Open a result into `file`; returns V of its integers and the content of its tensors.

    Computes everything to the end, whatever it meets; only then it fails, with one text.
    """
    job, manifest = key.job, part.release.header.manifest
    fixed_point = job.fixed_point
    model = manifest.kind == "model"
    limit = fixed_point.max_value if model else fixed_point.max_sum
    state = VectorDigest(manifest.layout, manifest.values, job.slot_bits)

    def metadata(opened: str, content: str) -> PlainMetadata:
        return PlainMetadata(
            format=FORMAT,
            kind="weights" if model else "sum",
            round=manifest.round,
            base=part.release.header.of,
            opened=opened,
            content=content,
        )

    body = part.release.result.body
    decoding = job.codec.decode(
        bytes.fromhex(job.digest),
        manifest.values,
        manifest.uploads,
        _opened(key, part, work),
        body.read if body else None,
        (),
        lambda function, tasks, total: work.map(
            "open", function, tasks, total, values=manifest.values, threads=job.codec.threads
        ),
    )
    within = True
    draft = metadata(secrets.token_hex(64), secrets.token_hex(64))
    with TensorWriter(file, manifest.layout, draft, strict=False) as writer:
        for integers in decoding:
            within &= bool((np.abs(integers) <= limit).all())
            state.update(integers)
            writer.write(fixed_point.decode(integers))
        opened, content = state.hexdigest(), writer.content
        writer.finish(metadata(opened, content))
    if not (decoding.good and within and not writer.overflowed):
        raise _cannot_open(part.release.path)
    return opened, content


def _opened(key: Key, part: Sealed, work: Work) -> Iterator[Opened]:
    """The blocks of a result after both halves, a few groups at a time, and which opened."""
    public, half, rows = key.job.public_key, key.half, part.release.result.rows
    tasks = (
        (public, half, uploads.read_groups(public, rows, first, len(pieces)), pieces)
        for first, pieces in releases.opened_pieces(key.job, part, releases.HALF_GROUPS)
    )
    total = -(-part.groups // releases.HALF_GROUPS)
    yield from work.map("apply this participant's half", _open_chunk, tasks, total)


def _open_chunk(key: PublicKey, half: tuple[int, ...], residues: Bytes, opened: Bytes) -> Opened:
    """Blocks of groups whose components c'_j are given instead of c_j."""
    ready = np.concatenate([residues[:, :1], opened], axis=1)
    return scheme.open_each(key, scheme.apply_half(key, ready, half))
