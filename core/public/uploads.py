"""Check uploads: everything that can be said of them from the public job alone.

Source: PROTOCOL.md, sections 4, 6 and 8.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import numpy as np

from dtl.core.ciphers.cipher import Batch, Cipher, spans
from dtl.core.crypto import proof, scheme
from dtl.core.crypto.group import COMPONENTS, PublicKey
from dtl.core.crypto.residues import Bytes, to_integers
from dtl.core.errors import FormatError, NotAllowedError, VerificationError
from dtl.core.files.container import BODY, PROOF, RESIDUES, Container, Rows
from dtl.core.files.headers import UploadHeader, check_same_shapes, read_header
from dtl.core.files.job_file import Job
from dtl.core.parallel import Work

MIN_PROOF_GROUPS, MAX_PROOF_GROUPS = 64, 1536  # groups a task; many make the buckets cheap
POOL_FROM_GROUPS = 768  # below this, one core is done before a pool of processes has started
SIDE_BY_SIDE = 32  # uploads; their proofs take seconds where no native kernel computes them


@dataclass(frozen=True)
class Upload:
    """An upload whose form and signature have been checked."""

    path: Path
    header: UploadHeader
    digest: str
    container: Container

    @property
    def rows(self) -> Rows:
        """Where its residues lie."""
        return self.container.rows(RESIDUES)

    @property
    def body(self) -> Rows | None:
        """Where its body lies, if it has one."""
        return self.container.bytes_of(BODY) if BODY in self.container.tensors else None


def read_groups(key: PublicKey, rows: Rows, first: int, count: int) -> Bytes:
    """Groups of a file as residues [count, 8, width]."""
    data = rows.read(first, count)
    return np.frombuffer(data, np.uint8).reshape(count, COMPONENTS + 1, key.arithmetic.width)


def open_upload(job: Job, path: Path, stack: ExitStack, work: Work) -> Upload:
    """Open an upload of this job and check its form, signature and roster.

    Raises FormatError or VerificationError.
    """
    container = stack.enter_context(Container(path))
    header = read_header(container, ("upload",), job.digest)
    if not isinstance(header, UploadHeader):
        raise FormatError(f"{path}: expected an upload")
    participant = job.participant(header.signer)
    if participant is None:
        raise FormatError(f"{path}: {header.signer} is not in this job's roster")
    length = proof.proof_length(job.public_key, job.codec.groups(header.values))
    container.require({PROOF: (length,), **job.result_shapes(header.values)})
    digest = container.verify(header.kind, participant.sign, work.progress, work.lanes).hex()
    container.close()  # later reads open it anew: a process may not have 1,000 files open
    if header.roster != job.roster_digest:
        raise FormatError(f"{path}: made for another roster")
    if header.masked != job.masks:
        expected = "masked" if job.masks else "not masked"
        raise FormatError(f"{path}: expected an upload that is {expected}")
    return Upload(path, header, digest, container)


def check_proof(job: Job, upload: Upload, work: Work) -> None:
    """Check an upload's residues (FormatError) and its proof (VerificationError)."""
    (fault,) = check_proofs(job, [upload], work)
    if fault is not None:
        raise fault


def check_proofs(
    job: Job, given: Sequence[Upload], work: Work
) -> Iterator[FormatError | VerificationError | None]:
    """For each upload, in order: what is wrong with its residues or proof, None if nothing is.

    Of a few uploads the groups are checked side by side; many small ones are checked side by
    side themselves.
    """
    small = all(job.codec.groups(upload.header.values) < POOL_FROM_GROUPS for upload in given)
    if small and len(given) >= SIDE_BY_SIDE:
        # Here only: what is sent to a cluster is the adding up.
        here, tasks = replace(work, cluster=None), (_statement(job, upload) for upload in given)
        total = sum(upload.header.values for upload in given)
        alone = partial(_fault, uses=-(-len(given) // here.lanes))
        yield from here.map(
            "check the proofs", alone, tasks, len(given), SIDE_BY_SIDE, values=total
        )
        return
    for upload in given:
        statement = _statement(job, upload)
        yield _fault(*statement, uses=len(given), work=work, values=upload.header.values)


def _statement(job: Job, upload: Upload) -> tuple[PublicKey, Rows, Bytes, proof.Proof]:
    """The key, the residues, their weights, and the proof about them."""
    key, container = job.public_key, upload.container
    groups = job.codec.groups(upload.header.values)
    found = proof.decode(key, groups, container.whole(PROOF))
    rho = proof.weights(
        key,
        container.raw_header,
        job.signing_key(upload.header.signer) or b"",
        groups,
        container.tensor_digest(RESIDUES),
        container.tensor_digest(BODY) if BODY in container.tensors else None,
        found.d,
    )
    return key, upload.rows, rho, found


def _fault(
    key: PublicKey,
    rows: Rows,
    rho: Bytes,
    found: proof.Proof,
    *,
    uses: int,
    work: Work | None = None,
    values: int = 0,
) -> FormatError | VerificationError | None:
    """Check one upload: on all lanes of `work`, or alone in this thread."""
    groups = len(rho)
    lanes = work.lanes if work else 1
    step = min(MAX_PROOF_GROUPS, max(MIN_PROOF_GROUPS, -(-groups // lanes)))
    pieces = spans(groups, step)
    tasks = ((key, rows, rho[first : first + count], first, count) for first, count in pieces)
    try:
        proof.check_ranges(key, groups, found)
        if work is None:
            parts: Iterable[list[int]] = (_weigh(*task) for task in tasks)
        else:
            serial_below = 2 if groups >= POOL_FROM_GROUPS else len(pieces) + 1
            name = f"check {rows.path.name}"
            parts = work.map(
                name, _weigh, tasks, len(pieces), serial_below, values=values, public=True
            )
        proof.verify(key, found, _multiply(key, parts), uses)
    except VerificationError as error:
        return VerificationError(f"{rows.path}: {error.message}", error.hint)
    except FormatError as error:
        return error
    return None


def check_residues(job: Job, rows: Rows, values: int, work: Work) -> None:
    """Raise FormatError for a residue of a file that is not valid."""
    pieces = spans(job.codec.groups(values), MAX_PROOF_GROUPS)
    tasks = ((job.public_key, rows, *piece) for piece in pieces)
    done = work.map("check the residues", check_groups, tasks, len(pieces), public=True)
    for _ in done:
        pass


def check_groups(key: PublicKey, rows: Rows, first: int, count: int) -> Bytes:
    """These groups; FormatError, which names the file, where one of them is not valid."""
    residues = read_groups(key, rows, first, count)
    try:
        scheme.check(key, residues)
    except FormatError as error:
        last = first + count - 1
        raise FormatError(f"{rows.path}: groups {first} to {last}: {error.message}") from None
    return residues


def check_body(job: Job, body: Rows | None, values: int, work: Work) -> None:
    """Raise FormatError for a word of a body that is out of range.

    Whoever adds bodies finds such a word as well. This is for those who must know before: who
    closes a round with an upload cannot leave it out any more.
    """
    if body is None:
        return
    batches = job.codec.batches(values, work.lanes)
    tasks = ((job.codec, values, batch, body) for batch in batches)
    done = work.map(
        "check the body", _check_words, tasks, len(batches), public=True, threads=job.codec.threads
    )
    for _ in done:
        pass


def _check_words(codec: Cipher, values: int, batch: Batch, body: Rows) -> None:
    try:
        codec.check_body(values, batch, body.read)
    except FormatError as error:
        raise FormatError(f"{body.path}: {error.message}") from None


def _weigh(key: PublicKey, rows: Rows, rho: Bytes, first: int, count: int) -> list[int]:
    """Check groups, and return their weighted products, one for each of the 8 components."""
    residues = check_groups(key, rows, first, count)
    return to_integers(key.arithmetic.weighted_products(residues, rho))


def _multiply(key: PublicKey, parts: Iterable[list[int]]) -> list[int]:
    n2 = key.n**2
    return reduce(lambda left, right: [a * b % n2 for a, b in zip(left, right, strict=True)], parts)


def check_same(upload: Upload, other: Upload) -> None:
    """Raise FormatError unless two uploads are of one round, base and layout."""
    mine, theirs = upload.header, other.header
    for what, found, expected in (
        ("round", mine.round, theirs.round),
        ("base", mine.base, theirs.base),
    ):
        if found != expected:
            raise FormatError(
                f"{upload.path}: made for another {what} than {other.path}: "
                f"expected {short(expected)}, found {short(found)}"
            )
    check_same_shapes(mine.layout, theirs.layout, upload.path, other.path)


def check_only(upload: Upload, others: Iterable[Upload]) -> None:
    """Raise NotAllowedError for an upload given twice, or a second one of a participant."""
    for other in others:
        if upload.header.signer == other.header.signer:
            same = other.digest == upload.digest
            problem = "given twice" if same else f"a second upload of {upload.header.signer}"
            raise NotAllowedError(f"{upload.path}: {problem} (besides {other.path})")


def short(value: int | str | None) -> str:
    """A digest or number as it stands in messages."""
    return f"{value[:16]}..." if isinstance(value, str) else str(value)
