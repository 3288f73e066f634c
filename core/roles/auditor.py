"""The key generation center as auditor: the strong trapdoor opens any upload, sum or model.

Source: PROTOCOL.md, sections 4 (strong opening, audit check) and 7 (masks).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from dtl.core.crypto import masks, scheme
from dtl.core.crypto.group import COMPONENTS, PublicKey, StrongTrapdoor
from dtl.core.crypto.residues import Bytes
from dtl.core.encoding.fixed_point import Integers
from dtl.core.errors import DtlError, FormatError, UsageError, VerificationError
from dtl.core.files import tensors
from dtl.core.files.atomic import AtomicOutput, check_output, read_start
from dtl.core.files.closing import Reveal, kind_of
from dtl.core.files.container import PROOF, RESIDUES, Container, Rows, is_container
from dtl.core.files.documents import KGC, Job, Key, KgcSecrets, participant_half, server_half
from dtl.core.files.headers import ResultHeader, UploadHeader, read_header
from dtl.core.files.schema import FORMAT
from dtl.core.files.tensor_writer import TensorWriter, check_suffix
from dtl.core.files.tensors import PlainMetadata, VectorDigest
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.public import uploads
from dtl.core.public.uploads import Upload

AUDIT_GROUPS = 4  # groups a task
_JSON_START = b"{"


@dataclass(frozen=True)
class AuditOptions:
    """What is needed besides the files: the base to take masks off, where plaintext goes."""

    model: Path | None = None
    reveals: Sequence[Path] = ()
    plaintext: Path | None = None
    unsigned: bool = False
    force: bool = False


@dataclass
class Verdict:
    """What the audit says of one file; `problems` is empty for a good one."""

    file: str
    kind: str
    signer: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "file": self.file,
            "kind": self.kind,
            "signer": self.signer,
            "verdict": "; ".join(self.problems) or "good",
            **self.facts,
        }


@dataclass(frozen=True)
class _Subject:
    """A file under audit."""

    path: Path
    header: UploadHeader | ResultHeader
    digest: str
    container: Container


@dataclass
class _Opened:
    """What the strong trapdoor found in a file, before masks are taken off."""

    blocks: list[Bytes] = field(default_factory=list)
    malformed: list[int] = field(default_factory=list)


def audit(
    key: Key, paths: Sequence[Path], options: AuditOptions, work: Work = DEFAULT_WORK
) -> list[Verdict]:
    """Open every file with the strong trapdoor and judge it; a verdict for each.

    Raises VerificationError for a bad signature (unless `unsigned`), UsageError for
    plaintext of more than one file.
    """
    key.require(KGC)
    if options.plaintext is not None:
        check_suffix(options.plaintext)
        check_output(options.plaintext, options.force)
        if len(paths) != 1:
            raise UsageError("--plaintext: expected exactly one file to open")
    with ExitStack() as stack:
        reveals = [(path, Reveal.load(path, key.job)) for path in options.reveals]
        bulk = []
        for path in paths:
            if _is_json(path):
                if kind_of(path) != "reveal":
                    raise FormatError(f"{path}: expected an upload, sum, model or reveal")
                reveals.append((path, Reveal.load(path, key.job)))
            else:
                bulk.append(_subject(key.job, path, options.unsigned, stack, work))
        auditor = _Auditor(key, work)
        auditor.learn_base(options.model, bulk, options.unsigned, stack)
        verdicts = [auditor.judge(subject, options) for subject in bulk]
        verdicts += [auditor.judge_reveal(path, reveal) for path, reveal in reveals]
    return verdicts


def _is_json(path: Path) -> bool:
    return read_start(path, 1) == _JSON_START


def _subject(job: Job, path: Path, unsigned: bool, stack: ExitStack, work: Work) -> _Subject:
    if not unsigned:
        container = Container(path)
        with container:
            kind = read_header(container, ("upload", "sum", "model"), job.digest).kind
        if kind == "upload":
            upload = uploads.open_upload(job, path, stack, work)
            return _Subject(path, upload.header, upload.digest, upload.container)
    container = stack.enter_context(Container(path))
    header = read_header(container, ("upload", "sum", "model"), job.digest)
    if not isinstance(header, UploadHeader | ResultHeader):
        raise FormatError(f"{path}: expected an upload, sum or model")
    shape = container.tensors.get(RESIDUES)
    if shape is None or shape.shape != job.residue_shape(header.values):
        raise FormatError(f"{path}: expected residues {list(job.residue_shape(header.values))}")
    if unsigned:
        digest = container.digest(work.progress)
    else:
        digest = container.verify(header.kind, job.server.sign, work.progress)
    return _Subject(path, header, digest.hex(), container)


class _Auditor:
    """Judges files with the center's secrets."""

    def __init__(self, key: Key, work: Work) -> None:
        if not isinstance(key.secrets, KgcSecrets):
            raise UsageError(f"{key.path}: expected the key generation center's key")
        self._job, self._work, self._secrets = key.job, work, key.secrets
        self._trapdoor = key.trapdoor
        job_id, bits = bytes.fromhex(key.job.id), key.job.public_key.exponent_bits
        halves = zip(
            server_half(key.secrets.server_seed, job_id, bits),
            participant_half(key.secrets.participant_seed, job_id, bits),
            strict=True,
        )
        self._exponents = tuple(a + b for a, b in halves)
        self._vectors: dict[str, str] = {}  # digest of a model -> V of what it opens to

    def learn_base(
        self, model: Path | None, bulk: Sequence[_Subject], unsigned: bool, stack: ExitStack
    ) -> None:
        """Find out what the bases of masked uploads opened to: their masks depend on it."""
        needed = {s.header.base for s in bulk if isinstance(s.header, UploadHeader)}
        candidates = [s for s in bulk if s.digest in needed]
        if model is not None:
            if model.suffix == ".npz" or not is_container(model):
                self._learn_from_plain(model)
            else:
                candidates.append(_subject(self._job, model, unsigned, stack, self._work))
        for subject in candidates:
            if isinstance(subject.header, ResultHeader):
                state = VectorDigest(subject.header.layout, subject.header.values)
                for integers in self._integers(self._open(subject).blocks, subject.header.values):
                    state.update(integers)
                self._vectors[subject.digest] = state.hexdigest()

    def _learn_from_plain(self, model: Path) -> None:
        source = tensors.open_tensors(model)
        try:
            known = tensors.weights_metadata(source)
        finally:
            source.close()
        if known.base and known.opened:
            self._vectors[known.base] = known.opened

    def judge(self, subject: _Subject, options: AuditOptions) -> Verdict:
        """The verdict on an upload, a sum or a model."""
        header = subject.header
        verdict = Verdict(str(subject.path), header.kind, header.signer)
        verdict.facts["round"] = header.round
        opened = self._open(subject)
        groups = self._job.groups(header.values)
        verdict.facts["groups"] = groups
        verdict.facts["malformed_groups"] = opened.malformed
        if opened.malformed:
            verdict.problems.append(f"malformed groups: {_ranges(opened.malformed)}")
        blocks = opened.blocks
        if isinstance(header, UploadHeader):
            self._judge_proof(subject, verdict)
            blocks = self._unmask(header, opened.blocks, verdict)
        self._judge_values(header, blocks, verdict)
        if options.plaintext is not None and verdict.facts["opens"]:
            self._write(subject, blocks, options.plaintext, options.force)
            verdict.facts["plaintext"] = str(options.plaintext)
        return verdict

    def judge_reveal(self, path: Path, reveal: Reveal) -> Verdict:
        """The verdict on a reveal: are its keys those of the center's seeds?"""
        verdict = Verdict(str(path), reveal.kind, reveal.signer)
        verdict.facts["round"] = reveal.round
        opened = self._opened_as(reveal.base)
        expected = {
            other: self._round_key(reveal.signer, other, reveal.round, reveal.base, opened)
            for other in reveal.keys
        }
        if reveal.keys != expected:
            verdict.problems.append(f"the keys that {reveal.signer} revealed are wrong")
        return verdict

    def _open(self, subject: _Subject) -> _Opened:
        rows = subject.container.rows(RESIDUES)
        groups = self._job.groups(subject.header.values)
        pieces = uploads.spans(groups, AUDIT_GROUPS)
        tasks = (
            (self._job.public_key, self._trapdoor, self._exponents, rows, *piece)
            for piece in pieces
        )
        opened = _Opened()
        step = f"open {subject.path.name}"
        for blocks, malformed in self._work.map(step, _open_chunk, tasks, len(pieces)):
            opened.blocks.append(blocks)
            opened.malformed += malformed
        return opened

    def _judge_proof(self, subject: _Subject, verdict: Verdict) -> None:
        if PROOF not in subject.container.tensors or not isinstance(subject.header, UploadHeader):
            verdict.facts["proof"] = "none"
            verdict.problems.append("no proof")
            return
        upload = Upload(subject.path, subject.header, subject.digest, subject.container)
        try:
            uploads.check_proof(self._job, upload, self._work)
            verdict.facts["proof"] = "holds"
        except DtlError as error:
            verdict.facts["proof"] = "does not hold"
            verdict.problems.append(error.message.removeprefix(f"{subject.path}: "))

    def _opened_as(self, base: str | None) -> str | None:
        """V of what the base opened to; what no model was given for counts as initial weights."""
        return None if base is None else self._vectors.get(base, base)

    def _round_key(
        self, own: str, other: str, number: int, base: str | None, opened: str | None
    ) -> bytes:
        first, second = sorted((own, other))
        seed = masks.pair_seed(self._secrets.mask_root, bytes.fromhex(self._job.id), first, second)
        return masks.round_key(
            seed,
            bytes.fromhex(self._job.digest),
            number,
            bytes.fromhex(base) if base else None,
            bytes.fromhex(opened) if opened else None,
            bytes.fromhex(self._job.roster_digest),
        )

    def _unmask(
        self, header: UploadHeader, blocks: Sequence[Bytes], verdict: Verdict
    ) -> list[Bytes]:
        if not header.masked:
            verdict.facts["masks"] = "none"
            return list(blocks)
        opened = self._opened_as(header.base)
        keys = [
            (
                -masks.sign_of(header.signer, other),
                self._round_key(header.signer, other, header.round, header.base, opened),
            )
            for other in self._job.names
            if other != header.signer
        ]
        bare, first = [], 0
        for batch in blocks:
            bare.append(masks.add_masks(batch, keys, first, self._job.N))
            first += len(batch)
        wrong = self._undecodable(bare)
        verdict.facts["masks"] = "as they should be" if not wrong else "wrong"
        if wrong:
            verdict.facts["wrongly_masked_groups"] = wrong
            hint = ""
            if header.base is not None and header.base not in self._vectors:
                hint = " (or its base was not initial weights: add --model)"
            verdict.problems.append(f"wrong masks in groups {_ranges(wrong)}{hint}")
        return bare

    def _undecodable(self, blocks: Sequence[Bytes]) -> list[int]:
        """Groups with a block out of range."""
        wrong, number = set(), 0
        for batch in blocks:
            for block in batch:
                try:
                    self._job.packing.unpack(block[None], self._job.packing.slots)
                except VerificationError:
                    wrong.add(number // COMPONENTS)
                number += 1
        return sorted(wrong)

    def _judge_values(
        self, header: UploadHeader | ResultHeader, blocks: Sequence[Bytes], verdict: Verdict
    ) -> None:
        fixed_point, limit = self._job.fixed_point, self._limit(header)
        smallest, largest, squares, at_limit, beyond = 0, 0, 0.0, 0, 0
        try:
            for integers in self._integers(blocks, header.values):
                smallest = min(smallest, int(integers.min(initial=0)))
                largest = max(largest, int(integers.max(initial=0)))
                squares += float(np.square(integers.astype(np.float64)).sum())
                at_limit += int((np.abs(integers) == limit).sum())
                beyond += int((np.abs(integers) > limit).sum())
        except VerificationError as error:
            verdict.facts["opens"] = False
            verdict.facts["undecodable_groups"] = self._undecodable(blocks)
            verdict.problems.append(f"cannot be opened: {error.message}")
            if isinstance(header, ResultHeader):
                verdict.problems.append(
                    "masks do not cancel, or an upload is spoiled: audit the uploads and reveals "
                    "of the round to see whose"
                )
            return
        verdict.facts |= {
            "opens": True,
            "smallest": smallest / fixed_point.one,
            "largest": largest / fixed_point.one,
            "norm": squares**0.5 / fixed_point.one,
            "share_clamped": at_limit / header.values,
            "share_out_of_range": beyond / header.values,
        }
        if beyond:
            verdict.problems.append(f"{beyond} values beyond +-{limit / fixed_point.one:g}")

    def _limit(self, header: UploadHeader | ResultHeader) -> int:
        fixed_point = self._job.fixed_point
        limits = {
            "upload": fixed_point.max_step,
            "sum": fixed_point.max_sum,
            "model": fixed_point.max_value,
        }
        return limits[header.kind]

    def _integers(self, blocks: Sequence[Bytes], count: int) -> Iterator[Integers]:
        """The values in blocks; VerificationError when they do not decode."""
        for batch in blocks:
            here = min(count, len(batch) * self._job.packing.slots)
            yield self._job.packing.unpack(batch, here)
            count -= here

    def _write(self, subject: _Subject, blocks: Sequence[Bytes], path: Path, force: bool) -> None:
        header = subject.header
        fixed_point = self._job.fixed_point
        state = VectorDigest(header.layout, header.values)
        for integers in self._integers(blocks, header.values):
            state.update(integers)
        metadata = None
        if header.kind == "model":
            metadata = PlainMetadata(
                format=FORMAT,
                kind="weights",
                round=header.round,
                base=subject.digest,
                opened=state.hexdigest(),
            )
        with AtomicOutput(path, force) as output:
            with TensorWriter(output, header.layout, metadata) as writer:
                for integers in self._integers(blocks, header.values):
                    writer.write(fixed_point.decode(integers))
                writer.finish(metadata)
            output.commit()


def _open_chunk(
    key: PublicKey,
    trapdoor: StrongTrapdoor,
    exponents: tuple[int, ...],
    rows: Rows,
    first: int,
    count: int,
) -> tuple[Bytes, list[int]]:
    """Strongly opened blocks [7 G, block width], and the groups that are not well-formed.

    The audit check of a group: (c_j (1 + m_j N)^-1)^2 = (c_0^(a_j + b_j))^2.
    """
    residues = uploads.read_groups(key, rows, first, count)
    blocks = scheme.strong_open(trapdoor, residues[:, 1:])
    good = scheme.well_formed(key, residues, blocks, exponents)
    malformed = [first + int(index) for index in np.flatnonzero(~good)]
    return blocks.reshape(-1, blocks.shape[-1]), malformed


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text: 0-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
