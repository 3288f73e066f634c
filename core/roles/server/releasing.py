"""The server applies its half and seals the result (protocol, sections 8.3, 9 and 11)."""

import hashlib
import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from dtl.core.ciphers.cipher import spans
from dtl.core.crypto import primitives, release_proof, scheme
from dtl.core.crypto.group import PublicKey
from dtl.core.errors import FormatError, NotAllowedError, UsageError
from dtl.core.files import sealed
from dtl.core.files.atomic import AtomicOutput, check_output
from dtl.core.files.container import (
    BODY,
    RESIDUES,
    SEALED,
    Container,
    ContainerWriter,
    Rows,
)
from dtl.core.files.headers import Grant, ReleaseHeader, ResultHeader, now, read_header
from dtl.core.files.job_file import SERVER, Job
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import AggregateEntry, Ledger, ReleaseEntry
from dtl.core.files.schema import FORMAT
from dtl.core.parallel import DEFAULT_WORK, Work
from dtl.core.public import releases, results, uploads
from dtl.core.public.results import Result


@dataclass(frozen=True)
class Policy:
    """To whom a result is released; without any of it, to all who ever contributed."""

    to: Sequence[str] | None = None
    min_rounds: int | None = None
    min_share: float | None = None
    admit: Sequence[str] = ()
    accept_differencing: bool = False

    def check(self) -> None:
        """Raise UsageError for impossible bounds."""
        if self.min_rounds is not None and self.min_rounds < 1:
            raise UsageError(f"--min-rounds: expected at least 1, found {self.min_rounds}")
        if self.min_share is not None and not 0 < self.min_share <= 1:
            raise UsageError(f"--min-share: expected a share up to 1, found {self.min_share}")


@dataclass(frozen=True)
class ReleaseReport:
    """What `release` did."""

    header: ReleaseHeader
    digest: str


def release(
    key: Key,
    result: Path,
    output: Path,
    policy: Policy,
    force: bool = False,
    work: Work = DEFAULT_WORK,
) -> ReleaseReport:
    """Apply the server's half to a result and seal it for those who contributed.

    Protocol, section 8, step 3, and section 9. NotAllowedError for anybody who neither
    contributed nor can be admitted, and for a second, different result of a round or base.
    """
    key.require(SERVER)
    policy.check()
    check_output(output, force)
    job = key.job
    _check_known(job, policy)
    with ExitStack() as stack:
        opened = results.open_result(job, result, stack, work)
        found, digest = opened.header, opened.digest
        results.check_result(job, opened, work)
        results.check_quorum(job, len(found.contributors), "contributors", found.missing)
        ledger = stack.enter_context(Ledger(key))
        admitted = _admitted(job, found, digest, policy, ledger)
        names = tuple(sorted({*_grants(job, found, digest, policy, ledger), *admitted}))
        _check_only_result(ledger, found, digest, policy.accept_differencing)

        content_key = secrets.token_bytes(primitives.KEY_BYTES)
        encryption_key, commit = sealed.content_keys(content_key)
        core = sealed.release_core(
            found,
            digest,
            releases.tensor_digests(opened.container),
            names,
            job.residue_shape(found.values),
            commit,
        )
        header = ReleaseHeader(
            format=FORMAT,
            kind="release",
            job=job.digest,
            signer=SERVER,
            created=now(),
            round=found.round,
            of=digest,
            manifest=found,
            result_signature=opened.container.signature.hex(),
            grants=tuple(_grant(job, name, content_key, core) for name in names),
            admitted=admitted,
            commit=commit,
        )
        length = primitives.sealed_length(releases.payload_bytes(job, found.values))
        with AtomicOutput(output, force) as file:
            shapes = {SEALED: (length,), **job.result_shapes(found.values)}
            writer = ContainerWriter(file, header.encode(), shapes)
            payload = _payload(key, opened, core, work)
            for chunk in sealed.seal_stream(encryption_key, core, payload):
                writer.write(SEALED, chunk)
            writer.copy(RESIDUES, opened.rows)
            if opened.body is not None:
                writer.copy(BODY, opened.body)
            release_digest = writer.finish(header.kind, key.secrets.sign)
            file.sync()
            ledger.append(
                ReleaseEntry(
                    event="release",
                    round=found.round,
                    base=found.base,
                    result=digest,
                    grants=names,
                    admitted=admitted,
                )
            )
            file.commit()
    return ReleaseReport(header, release_digest.hex())


def newcomers(key: Key, result: Path) -> list[str]:
    """Who has not contributed to a result, and was never admitted: to be let in once."""
    key.require(SERVER)
    with Container(result) as container:
        header = read_header(container, ("model", "sum"), key.job.digest)
        digest = container.digest().hex()
    if not isinstance(header, ResultHeader):
        raise FormatError(f"{result}: expected a sum or a model")
    with Ledger(key) as ledger:
        before = [entry for entry in ledger.find(ReleaseEntry) if entry.result != digest]
    known = {*header.contributions, *(name for entry in before for name in entry.admitted)}
    return [name for name in key.job.names if name not in known]


def _check_known(job: Job, policy: Policy) -> None:
    for option, given in (("--to", policy.to or ()), ("--admit", policy.admit)):
        if unknown := sorted(set(given) - set(job.names)):
            raise UsageError(
                f"{option}: not in this job's roster: {', '.join(unknown)}",
                f"its participants are {', '.join(job.names)}",
            )


def _grants(
    job: Job, found: ResultHeader, digest: str, policy: Policy, ledger: Ledger
) -> tuple[str, ...]:
    """Who gets the result for having contributed to it."""
    least = Fraction(policy.min_rounds or 1)
    if policy.min_share is not None:  # as it was written: 0.28 of 25 rounds are 7
        least = max(least, Fraction(str(policy.min_share)) * _rounds_of(found, digest, ledger))
    eligible = {name for name, rounds in found.contributions.items() if rounds >= least}
    wanted = set(eligible if policy.to is None else policy.to) - set(policy.admit)
    strangers = sorted(wanted - eligible)
    if strangers:
        known = all(name in found.contributions for name in strangers)
        raise NotAllowedError(
            f"{'contributed too little to' if known else 'never contributed to'} this model: "
            f"{', '.join(strangers)}",
            "the model is released only to those who took part; --admit NAME lets somebody in "
            "once who cannot have contributed yet",
        )
    if not wanted and not policy.admit:
        raise NotAllowedError("nobody has contributed enough to get this result")
    return tuple(sorted(wanted))


def _rounds_of(found: ResultHeader, digest: str, ledger: Ledger) -> int:
    """How many rounds a model has behind it: its chain in the server's ledger."""
    rounds, current = 0, digest
    while entries := ledger.find(AggregateEntry, result=current):
        rounds += 1
        base = entries[0].base
        if found.kind == "sum" or base is None:
            break
        current = base
    return max(1, rounds, *found.contributions.values())


def _admitted(
    job: Job, found: ResultHeader, digest: str, policy: Policy, ledger: Ledger
) -> tuple[str, ...]:
    """Who gets the result without having contributed: once, so that it can contribute next."""
    names = sorted(set(policy.admit))
    for name in names:
        if name in found.contributions:
            raise UsageError(f"--admit {name}: has contributed, and needs no admission")
        for entry in ledger.find(ReleaseEntry):
            if name in entry.admitted and entry.result != digest:
                raise NotAllowedError(
                    f"{name} was admitted in round {entry.round} already",
                    "an admission is given once, and lapses without a contribution",
                )
    return tuple(names)


def _check_only_result(
    ledger: Ledger, found: ResultHeader, digest: str, accept_differencing: bool
) -> None:
    for entry in ledger.find(ReleaseEntry):
        if entry.result == digest:
            continue
        if entry.round == found.round:
            raise NotAllowedError(
                f"another result of round {found.round} was released already",
                f"only {entry.result[:16]}... may be released for this round",
            )
        if found.base is not None and entry.base == found.base and not accept_differencing:
            raise NotAllowedError(
                f"another result on the same base was released in round {entry.round}",
                "two results on one base differ by what their contributors differ in; "
                "--accept-differencing releases this one all the same",
            )


def _grant(job: Job, name: str, content_key: bytes, core: bytes) -> Grant:
    participant = job.participant(name)
    if participant is None:
        raise FormatError(f"{name} is not in this job's roster")
    info = sealed.grant_info(core, name, participant.hpke, job.server.sign)
    return Grant(
        participant=name, wrapped=primitives.hpke_wrap(participant.hpke, content_key, info)
    )


def _payload(key: Key, result: Result, core: bytes, work: Work) -> Iterator[bytes]:
    """What is sealed: the components after the server's half, then the proof of that."""
    public, half, rows = key.job.public_key, key.half, result.rows
    groups, state = key.job.codec.groups(result.header.values), hashlib.sha512()
    pieces = spans(groups, releases.HALF_GROUPS)
    tasks = ((public, half, rows, *piece) for piece in pieces)
    for chunk in work.map(
        "apply the server's half", _half_chunk, tasks, len(pieces), values=result.header.values
    ):
        state.update(chunk)
        yield chunk
    of, opened_hash = bytes.fromhex(result.digest), state.digest()
    rho = release_proof.weights(core, of, opened_hash, groups)
    parts = (
        release_proof.base_product(
            public, uploads.read_groups(public, rows, *piece), rho[piece[0] : sum(piece)]
        )
        for piece in pieces
    )
    base = math.prod(parts) % public.n
    seed = key.server_secrets.server_seed
    yield release_proof.prove(public, half, seed, core, of, opened_hash, base)


def _half_chunk(key: PublicKey, half: tuple[int, ...], rows: Rows, first: int, count: int) -> bytes:
    """c'_1..c'_7 of a few groups."""
    residues = uploads.read_groups(key, rows, first, count)
    scheme.check(key, residues)
    return scheme.apply_half(key, residues, half)[:, 1:].tobytes()
