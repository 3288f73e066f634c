"""The key files: secrets of one party, pinned to their job, boxed on request."""

import logging
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dtl.core.crypto import primitives
from dtl.core.crypto.group import (
    StrongTrapdoor,
    expand_half,
    has_halves,
    has_participant_half,
    has_server_half,
)
from dtl.core.errors import FormatError, NotAllowedError, UsageError, VerificationError
from dtl.core.files import canonical_json
from dtl.core.files.atomic import read_file
from dtl.core.files.job_file import KGC, MAX_DOCUMENT_BYTES, SERVER, Job
from dtl.core.files.schema import Base64, BigInteger, Digest, Document, Identifier, Key32, Name

logger = logging.getLogger("dtl")

MAX_PASSPHRASE_BYTES = 4096

HpkePrivate = Annotated[
    Base64,
    Field(min_length=primitives.HPKE_PRIVATE_BYTES, max_length=primitives.HPKE_PRIVATE_BYTES),
]


class KgcSecrets(Document):
    """What the key generation center holds: the strong trapdoor, all seeds."""

    p: BigInteger = Field(repr=False)
    q: BigInteger = Field(repr=False)
    server_seed: Key32 = Field(repr=False)
    participant_seed: Key32 = Field(repr=False)
    mask_root: Key32 = Field(repr=False)
    sign: Key32 = Field(repr=False)


class ServerSecrets(Document):
    """What the parameter server holds: its half, its signing key."""

    server_seed: Key32 = Field(repr=False)
    sign: Key32 = Field(repr=False)


class ParticipantSecrets(Document):
    """What a participant holds: its half, pairwise mask seeds, identity keys."""

    participant_seed: Key32 = Field(repr=False)
    mask_seeds: dict[Name, Key32] = Field(repr=False)
    audit_seed: Key32 = Field(repr=False)
    sign: Key32 = Field(repr=False)
    hpke: HpkePrivate = Field(repr=False)


Secrets = KgcSecrets | ServerSecrets | ParticipantSecrets


class Pins(Document):
    """The public part of a key file: whose it is, and what it belongs to."""

    format: Literal["dtl/v2"]
    name: Name
    job: Digest
    kgc: Key32
    ledger: Identifier | None


class Box(Document):
    """The secret part of a key file under a passphrase."""

    salt: Annotated[
        Base64, Field(min_length=primitives.SALT_BYTES, max_length=primitives.SALT_BYTES)
    ]
    commit: Key32
    sealed: Base64


_BOX = "box"
_PINNED = tuple(Pins.model_fields)


def _secrets_of(name: str) -> type[KgcSecrets] | type[ServerSecrets] | type[ParticipantSecrets]:
    match name:
        case "kgc":
            return KgcSecrets
        case "server":
            return ServerSecrets
        case _:
            return ParticipantSecrets


def encode_key(pins: Pins, secrets: Secrets, passphrase: bytes | None) -> bytes:
    """The bytes of a key file; with a passphrase, its secret part is one box."""
    public = pins.plain()
    if pins.ledger is None:
        del public["ledger"]
    if passphrase is None:
        return canonical_json.dumps(public | secrets.plain())
    aad = primitives.fields("dtl/v2/key", canonical_json.dumps(public))
    salt, commit, sealed = primitives.box(passphrase, secrets.encode(), aad)
    box = Box(salt=salt, commit=commit, sealed=sealed)
    return canonical_json.dumps(public | {_BOX: box.plain()})


def split_key(data: bytes, what: str) -> tuple[Pins, dict[str, Any]]:
    """The pins of a key file, and the rest of it, unread."""
    parsed = canonical_json.loads(data, what)
    if not isinstance(parsed, dict):
        raise FormatError(f"{what}: expected a key file")
    if "participants" in parsed:
        raise FormatError(
            f"{what}: expected a key file, found a job file", "--job is for that; keys are NAME.key"
        )
    public = {key: value for key, value in parsed.items() if key in _PINNED}
    pins = Pins.check({"ledger": None} | public, what)
    if ("ledger" in parsed) != (pins.name != KGC):
        raise FormatError(f"{what}: ledger: expected in every key file but the center's")
    return pins, {key: value for key, value in parsed.items() if key not in _PINNED}


def is_boxed(rest: Mapping[str, Any]) -> bool:
    """Whether the secret part of a key file is under a passphrase."""
    return _BOX in rest


Passphrase = Callable[[], bytes]
"""Asks for the passphrase of a boxed key; called only where one is needed."""


@dataclass(frozen=True)
class Key:
    """An opened key file, checked against the job that it belongs to."""

    path: Path
    pins: Pins
    job: Job
    secrets: Secrets = field(repr=False)

    @classmethod
    def load(cls, path: Path, job_path: Path, passphrase: Passphrase) -> "Key":
        """Read a key file and its job.

        Raises UsageError (missing), FormatError (malformed), VerificationError (the job is
        not the one pinned, or was not signed by the pinned center, or the key is not the
        one that the job names), NotAllowedError (wrong passphrase).
        """
        what = str(path)
        data = read_file(path, MAX_DOCUMENT_BYTES)
        pins, rest = split_key(data, what)
        _warn_if_readable(path)
        job = Job.load(job_path)
        if job.kgc.sign != pins.kgc or job.digest != pins.job:
            raise VerificationError(
                f"{job_path}: not the job that {path} belongs to",
                "the job file was changed, or another job's; "
                f"expected job {pins.job[:16]}..., found {job.digest[:16]}...",
            )
        kind = _secrets_of(pins.name)
        if is_boxed(rest):
            rest = _open_box(pins, rest, passphrase, what)
        key = cls(path, pins, job, kind.check(rest, what))
        key._check_identity()
        return key

    @property
    def name(self) -> str:
        """The owner."""
        return self.pins.name

    def require(self, role: str) -> None:
        """Raise NotAllowedError unless the key is of this role: kgc, server or participant."""
        found = self.name if self.name in (SERVER, KGC) else "participant"
        if found != role:
            raise NotAllowedError(f"{self.path}: expected a {role}'s key, found the {found}'s")

    @property
    def participant_secrets(self) -> ParticipantSecrets:
        """The secrets of a participant's key; NotAllowedError for any other key."""
        if not isinstance(self.secrets, ParticipantSecrets):
            raise NotAllowedError(f"{self.path}: expected a participant's key")
        return self.secrets

    @property
    def server_secrets(self) -> ServerSecrets:
        """The secrets of the server's key; NotAllowedError for any other key."""
        if not isinstance(self.secrets, ServerSecrets):
            raise NotAllowedError(f"{self.path}: expected the server's key")
        return self.secrets

    @property
    def ledger_path(self) -> Path:
        """The ledger that belongs to this key."""
        return self.path.with_name(f"{self.name}.ledger")

    @property
    def half(self) -> tuple[int, ...]:
        """This party's half of the weak trapdoor: a_1..a_7 or b_1..b_7."""
        bits, job_id = self.job.public_key.exponent_bits, bytes.fromhex(self.job.id)
        if isinstance(self.secrets, ServerSecrets):
            return server_half(self.secrets.server_seed, job_id, bits)
        return participant_half(self.secrets.participant_seed, job_id, bits)

    @property
    def halves(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both halves of the weak trapdoor (the center's key only)."""
        if not isinstance(self.secrets, KgcSecrets):
            raise NotAllowedError(f"{self.path}: expected the key generation center's key")
        bits, job_id = self.job.public_key.exponent_bits, bytes.fromhex(self.job.id)
        return (
            server_half(self.secrets.server_seed, job_id, bits),
            participant_half(self.secrets.participant_seed, job_id, bits),
        )

    @property
    def trapdoor(self) -> StrongTrapdoor:
        """The strong trapdoor (the center's key only)."""
        if not isinstance(self.secrets, KgcSecrets):
            raise NotAllowedError(f"{self.path}: expected the key generation center's key")
        return StrongTrapdoor(self.secrets.p, self.secrets.q)

    def _check_identity(self) -> None:
        """Raise VerificationError unless the secrets are those that the job knows."""
        public = primitives.signing_public_key(self.secrets.sign)
        match self.secrets:
            case KgcSecrets():
                good = public == self.job.kgc.sign and self.secrets.p * self.secrets.q == self.job.N
                good = good and has_halves(self.job.public_key, *self.halves)
            case ServerSecrets():
                good = public == self.job.server.sign
                good = good and has_server_half(self.job.public_key, self.half)
            case ParticipantSecrets():
                known = self.job.participant(self.name)
                good = known is not None and (known.sign, known.hpke) == (
                    public,
                    primitives.hpke_public_key(self.secrets.hpke),
                )
                others = set(self.job.names) - {self.name} if self.job.masks else set()
                good = good and set(self.secrets.mask_seeds) == others
                good = good and has_participant_half(self.job.public_key, self.half)
        if not good:
            raise VerificationError(f"{self.path}: not the key that the job names for {self.name}")


def server_half(seed: bytes, job_id: bytes, bits: int) -> tuple[int, ...]:
    """a_1..a_7 of the server's seed."""
    return expand_half(seed, "server-half", job_id, bits)


def participant_half(seed: bytes, job_id: bytes, bits: int) -> tuple[int, ...]:
    """b_1..b_7 of the participants' seed."""
    return expand_half(seed, "participant-half", job_id, bits)


def _open_box(
    pins: Pins, rest: dict[str, Any], passphrase: Passphrase, what: str
) -> dict[str, Any]:
    if set(rest) != {_BOX}:
        raise FormatError(f"{what}: expected nothing secret beside the box")
    box = Box.check(rest[_BOX], f"{what}: box")
    public = pins.plain()
    if pins.ledger is None:
        del public["ledger"]
    aad = primitives.fields("dtl/v2/key", canonical_json.dumps(public))
    try:
        opened = primitives.open_box(passphrase(), box.salt, box.commit, box.sealed, aad)
    except NotAllowedError as error:
        raise NotAllowedError(f"{what}: {error.message}") from None
    except UsageError as error:  # there is no passphrase
        raise UsageError(f"{what}: {error.message}", error.hint) from None
    except VerificationError:
        raise VerificationError(f"{what}: the box was changed") from None
    parsed = canonical_json.loads(opened, f"{what}: box")
    if not isinstance(parsed, dict):
        raise FormatError(f"{what}: box: expected an object")
    return parsed


def _warn_if_readable(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("%s: others can read this key (mode %o); chmod 600 it", path, mode)


def read_passphrase(path: Path) -> bytes:
    """Read a passphrase file: its first line, without the line end. Raises UsageError."""
    try:
        data = read_file(path, MAX_PASSPHRASE_BYTES)
    except FormatError as error:
        raise UsageError(error.message) from None
    lines = data.splitlines()
    if not lines or not lines[0]:
        raise UsageError(f"{path}: expected a passphrase in the first line")
    return lines[0]
