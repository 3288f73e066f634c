"""Compute the server's results, bit for bit: residues, body, and manifest.

The server computes with these functions, and anyone recomputes with them. Source:
PROTOCOL.md, section 8, step 2.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dtl.core.ciphers.cipher import Batch, Cipher, Reader, spans
from dtl.core.crypto import masks, scheme
from dtl.core.crypto.group import COMPONENTS
from dtl.core.encoding.fixed_point import Integers
from dtl.core.errors import FormatError, NumericError, QuorumError, VerificationError
from dtl.core.files import tensors
from dtl.core.files.closing import Close, Reveal
from dtl.core.files.container import BODY, RESIDUES, Container, Rows
from dtl.core.files.headers import (
    Contribution,
    Layout,
    ResultHeader,
    check_same_shapes,
    read_header,
)
from dtl.core.files.job_file import SERVER, Job
from dtl.core.files.schema import FORMAT
from dtl.core.lattice.parameters import MAX_UPLOADS
from dtl.core.parallel import Work
from dtl.core.public.uploads import (
    Upload,
    check_body,
    check_groups,
    check_residues,
    read_groups,
    short,
)

PRODUCT_GROUPS = 128  # groups a task
WAIT_OR_VOID = (
    "wait for the missing uploads; or the round is void, and a new one on the same base "
    "is begun, everyone with --accept-differencing and a larger --round"
)


@dataclass(frozen=True)
class Start:
    """What a model starts from in a round: the encrypted parent, or public initial weights."""

    base: str
    initial: str
    layout: Layout
    round: int
    contributions: dict[str, int]
    rows: Rows | None = None
    body: Rows | None = None
    weights: Path | None = None

    @property
    def parent(self) -> str | None:
        """The digest of the encrypted parent, if that is what the model starts from."""
        return self.base if self.rows is not None else None


def start_from_weights(job: Job, path: Path) -> Start:
    """Start from public initial weights; NumericError for NaN or lack of headroom."""
    source = tensors.open_tensors(path)
    try:
        digest = tensors.checked_initial_digest(source)
        start = Start(digest, digest, source.layout, 0, {}, weights=path)
    finally:
        source.close()
    for _ in _initial_integers(job, start, tensors.READ_VALUES):
        pass
    return start


@dataclass(frozen=True)
class Result:
    """A sum or model whose form and signature have been checked."""

    path: Path
    header: ResultHeader
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

    def start(self) -> Start:
        """This model as the start of the next round."""
        if self.header.kind != "model" or self.header.initial is None:
            raise FormatError(
                f"{self.path}: expected a model, found a sum",
                "a model is made with --initial first, then carried on with --model",
            )
        return Start(
            self.digest,
            self.header.initial,
            self.header.layout,
            self.header.round,
            dict(self.header.contributions),
            rows=self.rows,
            body=self.body,
        )


def check_result(job: Job, result: Result, work: Work) -> None:
    """Raise FormatError for a residue or a word of the body that is not valid.

    A signature says who made a file, and not that it can be computed with.
    """
    check_residues(job, result.rows, result.header.values, work)
    check_body(job, result.body, result.header.values, work)


def open_result(job: Job, path: Path, stack: ExitStack, work: Work) -> Result:
    """Open a sum or model of this job and check its form and signature."""
    container = stack.enter_context(Container(path))
    header = read_header(container, ("model", "sum"), job.digest)
    if not isinstance(header, ResultHeader):
        raise FormatError(f"{path}: expected a model or sum")
    if header.signer != SERVER:
        raise FormatError(f"{path}: expected the server's signature, found {header.signer}'s")
    container.require(job.result_shapes(header.values))
    digest = container.verify(header.kind, job.server.sign, work.progress, work.lanes)
    check_uploads_bound(header, path)
    return Result(path, header, digest.hex(), container)


def check_uploads_bound(header: ResultHeader, what: object) -> None:
    """Raise NumericError for more uploads than a result can hold and still be opened."""
    if header.uploads > MAX_UPLOADS:
        raise NumericError(
            f"{what}: {header.uploads} contributions: expected at most {MAX_UPLOADS} "
            "in one model or sum",
            "go on in a new job, from the opened model as initial weights",
        )


def check_base(upload: Upload, start: Start) -> None:
    """Raise FormatError unless an upload is based on what the model starts from."""
    header = upload.header
    if header.base != start.base:
        raise FormatError(
            f"{upload.path}: based on another model: "
            f"expected {short(start.base)}, found {short(header.base)}"
        )
    if header.round <= start.round:
        raise FormatError(
            f"{upload.path}: made for round {header.round}, but the model is of round {start.round}"
        )
    check_same_shapes(header.layout, start.layout, upload.path, "the model")


def check_quorum(job: Job, found: int, what: str, missing: Sequence[str]) -> None:
    """Raise QuorumError below the job's `min_contributors`."""
    if found < job.min_contributors:
        absent = f"; missing: {', '.join(missing)}" if missing else ""
        raise QuorumError(
            f"expected at least {job.min_contributors} {what}, found {found}{absent}",
            WAIT_OR_VOID if missing else None,
        )


def can_close(job: Job, present: int) -> bool:
    """Whether so many are enough to go on without the others: at least min, and 3|A| > 2n."""
    return present >= job.min_contributors and 3 * present > 2 * len(job.participants)


def manifest(
    job: Job, uploads: Sequence[Upload], start: Start | None, layout: Layout, created: str
) -> ResultHeader:
    """The manifest that belongs to these uploads on this start.

    `layout` is the start's, or without one that of the upload named first.
    """
    first = uploads[0].header
    by_name = {upload.header.signer: upload.digest for upload in uploads}
    made = ResultHeader(
        format=FORMAT,
        kind="model" if start else "sum",
        job=job.digest,
        signer=SERVER,
        created=created,
        round=first.round,
        layout=layout,
        values=first.values,
        parent=start.parent if start else first.base,
        initial=start.initial if start else None,
        contributors=tuple(
            Contribution(participant=name, upload=by_name[name]) for name in sorted(by_name)
        ),
        missing=tuple(name for name in job.names if name not in by_name),
        contributions=count_contributions(start, by_name),
    )
    check_uploads_bound(made, f"round {first.round}")
    return made


def count_contributions(start: Start | None, names: Iterable[str]) -> dict[str, int]:
    """How many rounds each has contributed to after one more with these names, in order."""
    counts = Counter(start.contributions if start else {})
    counts.update(list(names))  # a mapping would be added up by its values
    return dict(sorted(counts.items()))


def check_close(job: Job, close: Close, uploads: Sequence[Upload], path: Path) -> None:
    """Raise FormatError unless a close file is about these uploads and this roster."""
    if {*close.names, *close.missing} != set(job.names) or not can_close(job, len(close.names)):
        raise FormatError(f"{path}: its round cannot be closed with {len(close.names)} uploads")
    for upload in uploads:
        if (close.round, close.base) != (upload.header.round, upload.header.base):
            raise FormatError(f"{path}: of another round or base than {upload.path}")


def orphaned_masks(
    missing: Sequence[str],
    uploads: Sequence[Upload],
    reveals: Sequence[tuple[Path, Reveal]],
    close: str | None,
) -> list[masks.Key]:
    """The masks that present participants share with missing ones, from their reveals.

    `close` is the digest of the close file that all reveals must name (None: any one).
    Raises QuorumError naming those whose reveal is not there, FormatError for a reveal that
    is not about this round.
    """
    present = [upload.header.signer for upload in uploads]
    keys: list[masks.Key] = []
    seen = set()
    for path, reveal in reveals:
        close = close or reveal.close
        upload = uploads[0].header
        if (reveal.round, reveal.base, reveal.close) != (upload.round, upload.base, close):
            raise FormatError(f"{path}: of another round, base or close file")
        if set(reveal.keys) != set(missing) or reveal.signer not in present:
            raise FormatError(f"{path}: not about those who are missing in this round")
        if reveal.signer in seen:
            raise FormatError(f"{path}: a second reveal of {reveal.signer}")
        seen.add(reveal.signer)
        keys += [(masks.sign_of(reveal.signer, other), key) for other, key in reveal.keys.items()]
    absent = sorted(set(present) - seen)
    if missing and absent:
        raise QuorumError(
            f"the masks of {', '.join(missing)} cannot be taken off: "
            f"no reveal of {', '.join(absent)}",
            "each of them answers the close file with dtl reveal-masks; if one cannot any more, "
            "the round is void: begin a new one on the same base, everyone with "
            "--accept-differencing",
        )
    return keys


def check_manifest(job: Job, header: ResultHeader, path: Path) -> None:
    """Raise FormatError or QuorumError unless a manifest can be one of this job."""
    check_uploads_bound(header, path)
    everyone = {*header.names, *header.missing}
    if everyone != set(job.names) or not set(header.contributions) <= everyone:
        raise FormatError(f"{path}: its manifest is not about this job's roster")
    first = header.kind == "sum" or header.parent is None
    if first and header.contributions != dict.fromkeys(header.names, 1):
        raise VerificationError(f"{path}: its manifest counts contributions that were not made")
    found = len(header.contributors)
    enough = can_close(job, found) or not (job.masks and header.missing)
    if found < job.min_contributors or not enough:
        raise QuorumError(
            f"{path}: too few contributors: {found} of {len(job.names)} "
            f"(at least {job.min_contributors})"
        )


def residues(
    job: Job, uploads: Sequence[Upload], start: Start | None, orphans: list[masks.Key], work: Work
) -> Iterator[bytes]:
    """The result's residues, PRODUCT_GROUPS groups at a time.

    The sum is the product of the uploads without the orphaned masks; a model is its start
    minus the sum.
    """
    rows = [upload.rows for upload in in_order(uploads)]
    values = uploads[0].header.values
    pieces = spans(job.codec.groups(values), PRODUCT_GROUPS)
    size = PRODUCT_GROUPS * job.codec.group_values
    blocks = _initial_integers(job, start, size) if start and start.weights and size else None
    parent = start.rows if start else None
    public_start = start is not None and start.weights is not None
    tasks = (
        (job.codec, rows, orphans, parent, public_start, next(blocks) if blocks else None, *piece)
        for piece in pieces
    )
    # Even the orphaned masks are public: reveals are files that `dtl verify` takes.
    made = work.map("multiply", _residues_chunk, tasks, len(pieces), values=values, public=True)
    yield from made
    _finish(blocks)


def bodies(
    job: Job, uploads: Sequence[Upload], start: Start | None, orphans: list[masks.Key], work: Work
) -> Iterator[bytes]:
    """The result's body, a batch at a time; nothing where the cipher has none."""
    values = uploads[0].header.values
    if not job.codec.body_bytes(values):
        return
    readers = [upload.body.read for upload in in_order(uploads) if upload.body]
    batches = job.codec.batches(values, work.lanes)
    sizes = batches[0].values
    initial = _initial_integers(job, start, sizes) if start and start.weights else None
    parent = start.body.read if start and start.body else None
    tasks = (
        (job.codec, values, batch, readers, orphans, parent, next(initial) if initial else None)
        for batch in batches
    )
    made = work.map(
        "add",
        _body_chunk,
        tasks,
        len(batches),
        values=values,
        public=True,
        threads=job.codec.threads,
    )
    try:
        yield from made
    except FormatError:  # a word that is out of range: say in which file
        for upload in uploads:
            check_body(job, upload.body, values, work)
        check_body(job, start.body if start else None, values, work)
        raise
    _finish(initial)


def in_order(uploads: Sequence[Upload]) -> list[Upload]:
    """Uploads in the order of their participants' names."""
    return sorted(uploads, key=lambda upload: upload.header.signer)


def _residues_chunk(
    codec: Cipher,
    uploads: list[Rows],
    orphans: list[masks.Key],
    parent: Rows | None,
    public_start: bool,
    initial: Integers | None,
    first: int,
    count: int,
) -> bytes:
    key = codec.key
    total = scheme.add(key, [read_groups(key, rows, first, count) for rows in uploads])
    if orphans:
        without = masks.mask_blocks(
            masks.opposite(orphans), first * COMPONENTS, count * COMPONENTS, key.n
        )
        total = scheme.add_public(key, total, without.reshape(count, COMPONENTS, -1))
    if parent is not None:
        before = check_groups(key, parent, first, count)
        total = scheme.subtract(key, before, total)
    elif public_start:
        total = scheme.negate(key, total)
        if initial is not None:
            total = scheme.add_public(key, total, codec.public_blocks(initial, count))
    return total.tobytes()


def _body_chunk(
    codec: Cipher,
    values: int,
    batch: Batch,
    uploads: list[Reader],
    orphans: list[masks.Key],
    parent: Reader | None,
    initial: Integers | None,
) -> bytes:
    return codec.combine_body(values, batch, uploads, orphans, parent, initial)


def _initial_integers(job: Job, start: Start, size: int) -> Iterator[Integers]:
    """The public initial weights as integers, `size` at a time.

    Raises FormatError at the end when the file is no longer the one that was digested: a
    caller must take all of it before it uses the result.
    """
    if start.weights is None:
        return
    source = tensors.open_tensors(start.weights)
    content = tensors.ContentDigest(source.layout)
    try:
        for reals in tensors.in_batches(tensors.values(source, content), size):
            yield job.fixed_point.encode_weights(reals)
        if source.layout != start.layout or content.initial() != start.base:
            raise FormatError(f"{start.weights}: the file changed while it was read")
    finally:
        source.close()


def _finish(integers: Iterator[Integers] | None) -> None:
    """Let `_initial_integers` come to its last check."""
    for _ in integers or ():
        raise ValueError("initial weights are left over")
