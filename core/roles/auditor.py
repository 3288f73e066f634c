"""The key generation center as auditor: the strong trapdoor opens any upload, sum or model.

Source: PROTOCOL.md, sections 4 (strong opening, audit check) and 7 (masks).
"""

import secrets
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
from dtl.core.files.atomic import PRIVATE_MODE, AtomicOutput, check_output, read_start
from dtl.core.files.closing import Reveal, kind_of
from dtl.core.files.container import PROOF, RESIDUES, Container, Rows, is_container
from dtl.core.files.headers import ResultHeader, UploadHeader, read_header
from dtl.core.files.job_file import KGC, Job
from dtl.core.files.key_file import Key, KgcSecrets
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
        model, given = options.model, None
        if model is not None and model.suffix != ".npz" and is_container(model):
            given = _subject(key.job, model, options.unsigned, stack, work)
        auditor.learn_bases(model, bulk, given)
        verdicts = {
            subject.path: auditor.judge(subject, options.plaintext, options.force)
            for subject in bulk
        }
        # A good upload shows what its base was; look again at those that were in doubt.
        doubtful = [s for s in bulk if verdicts[s.path].facts.get("masks") == "unknown"]
        for subject in doubtful:
            if auditor.knows(subject.header):
                verdicts[subject.path] = auditor.judge(subject, None, False)
        return [*verdicts.values(), *(auditor.judge_reveal(*reveal) for reveal in reveals)]


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
        self._exponents = tuple(a + b for a, b in zip(*key.halves, strict=True))
        self._vectors: dict[str, str] = {}  # digest of a base -> what it opened to

    def learn_bases(
        self, model: Path | None, bulk: Sequence[_Subject], given: _Subject | None
    ) -> None:
        """Find out what the bases of masked uploads opened to: their masks depend on it.

        Raises FormatError when `model` is the base of none of the files.
        """
        needed = {s.header.base for s in bulk if isinstance(s.header, UploadHeader)}
        for subject in [*bulk, *([given] if given else [])]:
            if isinstance(subject.header, ResultHeader):
                if subject.header.initial:  # initial weights are what they open to
                    self._vectors[subject.header.initial] = subject.header.initial
                if subject.digest in needed:
                    self._vectors[subject.digest] = self._opened_digest(subject)
        base = given.digest if given else None
        if model is not None and given is None:
            source = tensors.open_tensors(model)
            try:
                known = tensors.weights_metadata(source)
            finally:
                source.close()
            base = known.base
            if known.base and known.opened:
                self._vectors[known.base] = known.opened
        if model is not None and base not in needed:
            raise FormatError(f"{model}: not what any of the uploads is based on")

    def _opened_digest(self, subject: _Subject) -> str:
        """V of what a model opens to."""
        header = subject.header
        state, left = VectorDigest(header.layout, header.values), header.values
        for _, blocks, _ in self._open(subject):
            here = min(left, len(blocks) * self._job.packing.slots)
            state.update(self._job.packing.unpack(blocks, here))
            left -= here
        return state.hexdigest()

    def judge(self, subject: _Subject, plaintext: Path | None, force: bool) -> Verdict:
        """The verdict on an upload, a sum or a model, in one pass over it."""
        header = subject.header
        verdict = Verdict(str(subject.path), header.kind, header.signer)
        verdict.facts |= {"round": header.round, "groups": self._job.groups(header.values)}
        if isinstance(header, UploadHeader):
            self._judge_proof(subject, header, verdict)
        values = _Values(self._job, header)
        if plaintext is None:
            malformed = self._measure(subject, values, None)
        else:
            metadata = self._metadata(subject, secrets.token_hex(64))
            with AtomicOutput(plaintext, force, PRIVATE_MODE) as output:
                with TensorWriter(output, header.layout, metadata) as writer:
                    malformed = self._measure(subject, values, writer)
                    if not values.undecodable:
                        writer.finish(self._metadata(subject, values.state.hexdigest()))
                if not values.undecodable:
                    output.commit()
                    verdict.facts["plaintext"] = str(plaintext)
        verdict.facts["malformed_groups"] = malformed
        if malformed:
            verdict.problems.append(f"malformed groups: {_ranges(malformed)}")
        self._judge_masks(header, values, verdict)
        values.judge(verdict)
        return verdict

    def knows(self, header: UploadHeader | ResultHeader) -> bool:
        """Whether it is certain what the base of an upload opened to."""
        return isinstance(header, UploadHeader) and not self._doubt(header.base)

    def judge_reveal(self, path: Path, reveal: Reveal) -> Verdict:
        """The verdict on a reveal: are its keys those of the center's seeds?"""
        verdict = Verdict(str(path), reveal.kind, reveal.signer)
        verdict.facts["round"] = reveal.round
        expected = {
            other: self._round_key(reveal.signer, other, reveal.round, reveal.base)
            for other in reveal.keys
        }
        if reveal.keys != expected:
            problem = f"the keys that {reveal.signer} revealed are wrong"
            verdict.problems.append(problem + self._doubt(reveal.base))
        return verdict

    def _open(self, subject: _Subject) -> Iterator[tuple[int, Bytes, list[int]]]:
        """(first group, blocks [7 G, block width], malformed groups), a few groups at a time."""
        rows = subject.container.rows(RESIDUES)
        pieces = uploads.spans(self._job.groups(subject.header.values), AUDIT_GROUPS)
        common = (self._job.public_key, self._trapdoor, self._exponents, rows)
        tasks = ((*common, *piece) for piece in pieces)
        step = f"open {subject.path.name}"
        # The strong trapdoor's powers are gmpy2's.
        results = self._work.map(step, _open_chunk, tasks, len(pieces), kernel=False)
        for (first, _), (blocks, malformed) in zip(pieces, results, strict=True):
            yield first, blocks, malformed

    def _measure(
        self, subject: _Subject, values: "_Values", writer: TensorWriter | None
    ) -> list[int]:
        """Take masks off, decode and measure all values; returns the malformed groups."""
        malformed: list[int] = []
        keys = self._mask_keys(subject.header)
        for first, blocks, bad in self._open(subject):
            malformed += bad
            bare = masks.add_masks(blocks, keys, first * COMPONENTS, self._job.N)
            integers = values.add(first, bare)
            if writer and integers is not None and not values.undecodable:
                writer.write(self._job.fixed_point.decode(integers))
        return malformed

    def _judge_proof(self, subject: _Subject, header: UploadHeader, verdict: Verdict) -> None:
        if PROOF not in subject.container.tensors:
            verdict.facts["proof"] = "none"
            verdict.problems.append("no proof")
            return
        upload = Upload(subject.path, header, subject.digest, subject.container)
        try:
            uploads.check_proof(self._job, upload, self._work)
            verdict.facts["proof"] = "holds"
        except DtlError as error:
            verdict.facts["proof"] = "does not hold"
            verdict.problems.append(error.message.removeprefix(f"{subject.path}: "))

    def _judge_masks(
        self, header: UploadHeader | ResultHeader, values: "_Values", verdict: Verdict
    ) -> None:
        if not isinstance(header, UploadHeader):
            return
        if not header.masked:
            verdict.facts["masks"] = "none"
        elif not values.undecodable:
            verdict.facts["masks"] = "as they should be"
            if header.base:  # so what was assumed of the base is true
                self._vectors.setdefault(header.base, header.base)
        else:
            doubt = self._doubt(header.base)
            verdict.facts["masks"] = "unknown" if doubt else "wrong"
            verdict.facts["wrongly_masked_groups"] = values.undecodable
            where = _ranges(values.undecodable)
            verdict.problems.append(f"wrong masks in groups {where}{doubt}")

    def _doubt(self, base: str | None) -> str:
        """What to add to an accusation that rests on a guess about the base."""
        if base is None or base in self._vectors:
            return ""
        return ", or a base that the audit does not know: add --model"

    def _mask_keys(self, header: UploadHeader | ResultHeader) -> list[masks.Key]:
        """What takes the masks off an upload."""
        if not isinstance(header, UploadHeader) or not header.masked:
            return []
        own = header.signer
        return [
            (-masks.sign_of(own, other), self._round_key(own, other, header.round, header.base))
            for other in self._job.names
            if other != own
        ]

    def _round_key(self, own: str, other: str, number: int, base: str | None) -> bytes:
        first, second = sorted((own, other))
        seed = masks.pair_seed(self._secrets.mask_root, bytes.fromhex(self._job.id), first, second)
        # Initial weights are their own digest; a base that is not known counts as such.
        opened = self._vectors.get(base, base) if base else None
        return masks.round_key(
            seed,
            bytes.fromhex(self._job.digest),
            number,
            bytes.fromhex(base) if base else None,
            bytes.fromhex(opened) if opened else None,
            bytes.fromhex(self._job.roster_digest),
        )

    def _metadata(self, subject: _Subject, opened: str) -> PlainMetadata | None:
        if subject.header.kind != "model":
            return None
        return PlainMetadata(
            format=FORMAT,
            kind="weights",
            round=subject.header.round,
            base=subject.digest,
            opened=opened,
        )


class _Values:
    """The values of a file, measured batch by batch."""

    def __init__(self, job: Job, header: UploadHeader | ResultHeader) -> None:
        fixed_point = job.fixed_point
        limits = {
            "upload": fixed_point.max_step,
            "sum": fixed_point.max_sum,
            "model": fixed_point.max_value,
        }
        self._job, self._header, self._limit = job, header, limits[header.kind]
        self._left = header.values
        self._smallest = self._largest = self._at_limit = self._beyond = 0
        self._squares = 0.0
        self.undecodable: list[int] = []
        self.state = VectorDigest(header.layout, header.values)

    def add(self, first: int, blocks: Bytes) -> Integers | None:
        """Measure the groups from `first` on; None where they do not decode."""
        packing = self._job.packing
        here = min(self._left, len(blocks) * packing.slots)
        self._left -= here
        try:
            integers = packing.unpack(blocks, here)
        except VerificationError:
            step = COMPONENTS * packing.slots
            for number, group in enumerate(blocks.reshape(-1, COMPONENTS, blocks.shape[-1])):
                try:
                    packing.unpack(group, max(0, min(step, here - number * step)))
                except VerificationError:
                    self.undecodable.append(first + number)
            return None
        self._smallest = min(self._smallest, int(integers.min(initial=0)))
        self._largest = max(self._largest, int(integers.max(initial=0)))
        self._squares += float(np.square(integers.astype(np.float64)).sum())
        self._at_limit += int((np.abs(integers) == self._limit).sum())
        self._beyond += int((np.abs(integers) > self._limit).sum())
        self.state.update(integers)
        return integers

    def judge(self, verdict: Verdict) -> None:
        """Add what was measured to a verdict."""
        one = self._job.fixed_point.one
        verdict.facts["opens"] = not self.undecodable
        if self.undecodable:
            verdict.facts["undecodable_groups"] = self.undecodable
            verdict.problems.append(f"cannot be opened: groups {_ranges(self.undecodable)}")
            if isinstance(self._header, ResultHeader):
                verdict.problems.append(
                    "masks do not cancel, or an upload is spoiled: audit the uploads and reveals "
                    "of the round to see whose"
                )
            return
        verdict.facts |= {
            "smallest": self._smallest / one,
            "largest": self._largest / one,
            "norm": self._squares**0.5 / one,
            "share_clamped": self._at_limit / self._header.values,
            "share_out_of_range": self._beyond / self._header.values,
        }
        if self._beyond:
            verdict.problems.append(f"{self._beyond} values beyond +-{self._limit / one:g}")


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
