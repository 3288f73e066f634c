"""The key generation center as auditor: the strong trapdoor opens any upload, sum or model.

Source: PROTOCOL.md, sections 4 (strong opening, audit check) and 7 (masks).
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtl.core.ciphers.cipher import Decoding, Opened, spans
from dtl.core.crypto import masks, scheme
from dtl.core.crypto.group import PublicKey, StrongTrapdoor
from dtl.core.crypto.residues import Bytes
from dtl.core.errors import DtlError, FormatError, UsageError
from dtl.core.files import tensors
from dtl.core.files.atomic import PRIVATE_MODE, AtomicOutput, check_output, read_start
from dtl.core.files.closing import Reveal, kind_of
from dtl.core.files.container import BODY, PROOF, RESIDUES, Container, Rows, is_container
from dtl.core.files.headers import ResultHeader, UploadHeader, read_header
from dtl.core.files.job_file import KGC, Job
from dtl.core.files.key_file import Key, KgcSecrets
from dtl.core.files.schema import FORMAT
from dtl.core.files.tensor_writer import TensorWriter, check_suffix
from dtl.core.files.tensors import PlainMetadata, VectorDigest
from dtl.core.lattice.parameters import BOUND, MAX_UPLOADS
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.public import releases, uploads
from dtl.core.public.uploads import Upload
from dtl.core.roles.verdicts import Measurement, Verdict, ranges

AUDIT_GROUPS = 4  # groups a task
_KINDS = ("upload", "sum", "model", "release")
_JSON_START = b"{"


@dataclass(frozen=True)
class AuditOptions:
    """What is needed besides the files: the base to take masks off, where plaintext goes."""

    model: Path | None = None
    reveals: Sequence[Path] = ()
    plaintext: Path | None = None
    unsigned: bool = False
    force: bool = False


@dataclass(frozen=True)
class _Subject:
    """A file under audit."""

    path: Path
    header: UploadHeader | ResultHeader
    digest: str
    container: Container

    @property
    def body(self) -> Rows | None:
        """Where its body lies, if it has one."""
        return self.container.bytes_of(BODY) if BODY in self.container.tensors else None


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
        auditor.learn_bases(model, bulk, [reveal for _, reveal in reveals], given)
        verdicts = {
            subject.path: auditor.judge(subject, options.plaintext, options.force)
            for subject in bulk
        }
        _judge_server(bulk, verdicts)
        return [*verdicts.values(), *(auditor.judge_reveal(*reveal) for reveal in reveals)]


def _judge_server(bulk: Sequence[_Subject], verdicts: dict[Path, Verdict]) -> None:
    """Name the server where it signed two results of one round."""
    results = [subject for subject in bulk if isinstance(subject.header, ResultHeader)]
    for subject in results:
        others = [
            str(other.path)
            for other in results
            if _excludes(subject.header, other.header) and other.digest != subject.digest
        ]
        if others:
            verdicts[subject.path].problems.append(
                f"the server signed another result of round {subject.header.round}: "
                f"{', '.join(others)}"
            )


def _excludes(one: UploadHeader | ResultHeader, other: UploadHeader | ResultHeader) -> bool:
    """Whether an honest server cannot have signed both: one round and base, other contents.

    A sum and a model of one round can both be honest, and so can two results with different
    uploads where there are no masks.
    """
    if not (isinstance(one, ResultHeader) and isinstance(other, ResultHeader)):
        return False
    same = ("kind", "round", "parent", "initial", "contributors")
    return all(getattr(one, name) == getattr(other, name) for name in same)


def _is_json(path: Path) -> bool:
    return read_start(path, 1) == _JSON_START


def _subject(job: Job, path: Path, unsigned: bool, stack: ExitStack, work: Work) -> _Subject:
    with Container(path) as container:
        kind = read_header(container, _KINDS, job.digest).kind
    if kind == "release":  # the signed result inside it is what is judged
        inside = releases.open_release(job, path, stack, work)
        return _Subject(path, inside.header.manifest, inside.header.of, inside.container)
    if kind == "upload" and not unsigned:
        upload = uploads.open_upload(job, path, stack, work)
        return _Subject(path, upload.header, upload.digest, upload.container)
    container = stack.enter_context(Container(path))
    header = read_header(container, _KINDS, job.digest)
    if not isinstance(header, UploadHeader | ResultHeader):
        raise FormatError(f"{path}: expected an upload, sum, model or release")
    for name, shape in job.result_shapes(header.values).items():
        found = container.tensors.get(name)
        if found is None or found.shape != shape:
            raise FormatError(f"{path}: expected {name} {list(shape)}")
    if unsigned:
        digest = container.digest(work.progress, work.lanes)
    else:
        digest = container.verify(header.kind, job.server.sign, work.progress, work.lanes)
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
        self._certain: set[str] = set()  # bases whose vector is no claim of a plain file
        # (name, round, base) where the participant's own tag says that it used that vector.
        self._confirmed: set[tuple[str, int, str]] = set()

    def learn_bases(
        self,
        model: Path | None,
        bulk: Sequence[_Subject],
        reveals: Sequence[Reveal],
        given: _Subject | None,
    ) -> None:
        """Find out what the bases of uploads and reveals opened to: masks depend on it.

        Only what the center computes itself counts as certain: an encrypted base that it opens,
        and initial weights that it reads. That a manifest names its base as initial weights is
        a claim of the server's, who would have participants accused by it. Raises FormatError
        when `model` is the base of none of the files.
        """
        needed = {s.header.base for s in bulk if isinstance(s.header, UploadHeader)}
        needed |= {reveal.base for reveal in reveals}
        for subject in [*bulk, *([given] if given else [])]:
            if isinstance(subject.header, ResultHeader) and subject.digest in needed:
                self._vectors[subject.digest] = self._opened_digest(subject)
                self._certain.add(subject.digest)
        base = given.digest if given else None
        if model is not None and given is None:
            source = tensors.open_tensors(model)
            try:
                known = tensors.weights_metadata(source)
            finally:
                source.close()
            base = known.base
            if known.base and known.opened:
                self._vectors.setdefault(known.base, known.opened)
                if known.initial:  # V0 was computed from the tensors
                    self._certain.add(known.base)
        if model is not None and base not in needed:
            raise FormatError(f"{model}: not what any of the uploads or reveals is based on")

    def _opened_digest(self, subject: _Subject) -> str:
        """V of what a model opens to."""
        header = subject.header
        state = VectorDigest(header.layout, header.values, self._job.slot_bits)
        for integers in self._decode(subject, []):
            state.update(integers)
        return state.hexdigest()

    def judge(self, subject: _Subject, plaintext: Path | None, force: bool) -> Verdict:
        """The verdict on an upload, a sum or a model, in one pass over it."""
        header = subject.header
        verdict = Verdict(str(subject.path), header.kind, header.signer)
        groups = self._job.codec.groups(header.values)
        verdict.facts |= {"round": header.round, "groups": groups}
        if isinstance(header, UploadHeader):
            self._judge_proof(subject, header, verdict)
            self._judge_tag(header, verdict)
        uploads.check_body(self._job, subject.body, header.values, self._work)
        measured, malformed = Measurement(self._job, header), list[int]()
        decoding = self._decode(subject, malformed)
        if plaintext is None:
            for integers in decoding:
                measured.add(integers)
        else:
            self._write_plaintext(subject, decoding, measured, plaintext, force, verdict)
        verdict.facts["malformed_groups"] = malformed
        if malformed:
            verdict.problems.append(f"malformed groups: {ranges(malformed)}")
        if isinstance(header, UploadHeader) and not decoding.good:
            decoding, measured = self._judge_pad(subject, decoding, measured, verdict)
        self._judge_masks(header, decoding, verdict)
        self._judge_values(header, decoding, measured, verdict)
        return verdict

    def _judge_pad(
        self, subject: _Subject, strict: Decoding, measured: Measurement, verdict: Verdict
    ) -> tuple[Decoding, Measurement]:
        """Tell a secret or errors beyond their bound from an upload that does not open at all.

        What opens where the widest bound is allowed was made with coefficients out of range.
        Returns what to judge the rest of the upload by.
        """
        if not self._job.codec.body_bytes(subject.header.values):
            return strict, measured
        wide, values = (
            self._decode(subject, [], MAX_UPLOADS),
            Measurement(self._job, subject.header),
        )
        for integers in wide:
            values.add(integers)
        if wide.bad_groups:
            return strict, measured
        secret = strict.bad_groups
        # With a secret out of range, the strict decoding says nothing of the errors.
        errors = [] if secret else sorted({*strict.bad_polynomials} - {*wide.bad_polynomials})
        if secret:
            verdict.facts["secret_out_of_range"] = secret
            verdict.problems.append(f"the secret is beyond +-{BOUND} in groups {ranges(secret)}")
        if errors:
            verdict.facts["errors_out_of_range"] = errors
            verdict.problems.append(
                f"errors are beyond +-{BOUND} in polynomials {ranges(errors)} of the body"
            )
        return wide, values

    def _write_plaintext(
        self,
        subject: _Subject,
        decoding: Decoding,
        measured: Measurement,
        plaintext: Path,
        force: bool,
        verdict: Verdict,
    ) -> None:
        """Measure all values and write them; nothing is left of a file that does not open."""
        layout, draft = subject.header.layout, secrets.token_hex(64)
        metadata = self._metadata(subject, draft, draft)
        with AtomicOutput(plaintext, force, PRIVATE_MODE) as output:
            with TensorWriter(output, layout, metadata) as writer:
                for integers in decoding:
                    measured.add(integers)
                    writer.write(self._job.fixed_point.decode(integers))
                if decoding.good:
                    opened = measured.state.hexdigest()
                    writer.finish(self._metadata(subject, opened, writer.content))
            if decoding.good:
                output.commit()
                verdict.facts["plaintext"] = str(plaintext)

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
            doubt = self._doubt(reveal.signer, reveal.round, reveal.base)
            (verdict.doubts if doubt else verdict.problems).append(problem + doubt)
        return verdict

    def _decode(
        self, subject: _Subject, malformed: list[int], uploads_in_it: int | None = None
    ) -> Decoding:
        """The integers of a file without its masks; groups that are not well-formed are noted.

        Secrets and errors may be as large as those of `uploads_in_it` uploads, by default as
        many as are in the file.
        """
        header, body = subject.header, subject.body
        if uploads_in_it is None:
            uploads_in_it = header.uploads if isinstance(header, ResultHeader) else 1
        return self._job.codec.decode(
            bytes.fromhex(self._job.digest),
            header.values,
            uploads_in_it,
            self._open(subject, malformed),
            body.read if body else None,
            self._mask_keys(header),
            lambda function, tasks, total: self._work.map(
                f"open {subject.path.name}", function, tasks, total, threads=True
            ),
        )

    def _open(self, subject: _Subject, malformed: list[int]) -> Iterator[Opened]:
        """The blocks of a file, opened with the strong trapdoor, a few groups at a time."""
        rows = subject.container.rows(RESIDUES)
        pieces = spans(self._job.codec.groups(subject.header.values), AUDIT_GROUPS)
        common = (self._job.public_key, self._trapdoor, self._exponents, rows)
        tasks = ((*common, *piece, str(subject.path)) for piece in pieces)
        step = f"open {subject.path.name}"
        # The strong trapdoor's powers are gmpy2's.
        for blocks, bad in self._work.map(step, _open_chunk, tasks, len(pieces), kernel=False):
            malformed += bad
            yield blocks, np.ones(len(blocks), np.bool_)

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

    def _judge_tag(self, header: UploadHeader, verdict: Verdict) -> None:
        """Whether the participant's base opened, for it, to what was really released."""
        if header.base is None:
            return
        seed = masks.audit_seed(self._secrets.mask_root, bytes.fromhex(self._job.id), header.signer)
        base, opened = header.base, self._assumed(header.base)
        tag = masks.opened_tag(seed, header.round, bytes.fromhex(base), bytes.fromhex(opened))
        if tag.hex() == header.opened_tag:
            self._confirmed.add((header.signer, header.round, base))
            verdict.facts["base_opened_to"] = (
                "what was released" if base in self._certain else "what is assumed of it"
            )
            return
        if base not in self._vectors:
            return
        if base not in self._certain:
            verdict.facts["base_opened_to"] = "something else than --model says"
            return
        verdict.facts["base_opened_to"] = "something else"
        verdict.problems.append(
            f"worked on another model than the one that {base[:16]}... opens to; the fault is "
            f"{header.signer}'s own, unless it shows a release by the server that opens to "
            "something else"
        )

    def _judge_masks(
        self, header: UploadHeader | ResultHeader, decoding: Decoding, verdict: Verdict
    ) -> None:
        if not isinstance(header, UploadHeader):
            return
        if not header.masked:
            verdict.facts["masks"] = "none"
        elif decoding.good:
            verdict.facts["masks"] = "as they should be"
        else:
            doubt = self._doubt(header.signer, header.round, header.base)
            verdict.facts["masks"] = "unknown" if doubt else "wrong"
            found = verdict.doubts if doubt else verdict.problems
            found.append(f"wrong masks in {_places(decoding)}{doubt}")

    def _judge_values(
        self,
        header: UploadHeader | ResultHeader,
        decoding: Decoding,
        measured: Measurement,
        verdict: Verdict,
    ) -> None:
        verdict.facts["opens"] = decoding.good
        if decoding.good:
            measured.judge(verdict)
            return
        verdict.facts["undecodable_groups"] = decoding.bad_groups
        if self._job.codec.body_bytes(header.values):
            verdict.facts["undecodable_polynomials"] = decoding.bad_polynomials
        found = verdict.doubts if verdict.doubts else verdict.problems
        found.append(f"cannot be opened: {_places(decoding)}")
        if isinstance(header, ResultHeader):
            verdict.problems.append(
                "masks do not cancel, or an upload is spoiled: audit the uploads and reveals "
                "of the round to see whose"
            )

    def _doubt(self, name: str, number: int, base: str | None) -> str:
        """What to add to an accusation that rests on a guess, or a claim, about the base.

        There is no doubt where the participant's own tag names what the audit assumes. That
        somebody else's masks are as assumed shows nothing: it may have been the liar.
        """
        if base is None or base in self._certain or (name, number, base) in self._confirmed:
            return ""
        if base in self._vectors:
            return ", or --model is not what was released: give the encrypted model instead"
        return ", or a base that the audit does not know: add --model"

    def _assumed(self, base: str) -> str:
        """What a base opened to, as far as is known; others count as initial weights."""
        return self._vectors.get(base, base)

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
        opened = self._assumed(base) if base else None
        return masks.round_key(
            seed,
            bytes.fromhex(self._job.digest),
            number,
            bytes.fromhex(base) if base else None,
            bytes.fromhex(opened) if opened else None,
            bytes.fromhex(self._job.roster_digest),
        )

    def _metadata(self, subject: _Subject, opened: str, content: str) -> PlainMetadata | None:
        if subject.header.kind != "model":
            return None
        return PlainMetadata(
            format=FORMAT,
            kind="weights",
            round=subject.header.round,
            base=subject.digest,
            opened=opened,
            content=content,
        )


def _open_chunk(
    key: PublicKey,
    trapdoor: StrongTrapdoor,
    exponents: tuple[int, ...],
    rows: Rows,
    first: int,
    count: int,
    what: str,
) -> tuple[Bytes, list[int]]:
    """Strongly opened blocks [G, 7, block width], and the groups that are not well-formed.

    The audit check of a group: (c_j (1 + m_j N)^-1)^2 = lift(c_0)^(2 (a_j + b_j)).
    """
    residues = uploads.read_groups(key, rows, first, count)
    try:
        scheme.check(key, residues)
    except FormatError as error:
        raise FormatError(f"{what}: {error.message}") from None
    blocks = scheme.strong_open(trapdoor, residues[:, 1:])
    good = scheme.well_formed(key, residues, blocks, exponents)
    malformed = [first + int(index) for index in np.flatnonzero(~good)]
    return blocks, malformed


def _places(decoding: Decoding) -> str:
    """Where a vector does not open, as text."""
    parts = []
    if decoding.bad_groups:
        parts.append(f"groups {ranges(decoding.bad_groups)}")
    if decoding.bad_polynomials:
        parts.append(f"polynomials {ranges(decoding.bad_polynomials)} of the body")
    return " and ".join(parts)
