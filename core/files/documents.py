"""The job file and the key files: strict JSON, signed, pinned, boxed on request."""

import logging
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from dtl.core.crypto import primitives
from dtl.core.crypto.group import (
    COMPONENTS,
    PublicKey,
    StrongTrapdoor,
    expand_half,
    has_halves,
    security_of,
)
from dtl.core.encoding.fixed_point import FixedPoint
from dtl.core.encoding.packing import Packing
from dtl.core.errors import FormatError, NotAllowedError, UsageError, VerificationError
from dtl.core.files import canonical_json
from dtl.core.files.atomic import read_file
from dtl.core.files.schema import (
    NAME_PATTERN,
    Base64,
    BigInteger,
    Digest,
    Document,
    Identifier,
    Items,
    Key32,
    Name,
    Signature,
)

logger = logging.getLogger("dtl")

SERVER: Final = "server"
KGC: Final = "kgc"
MAX_DOCUMENT_BYTES = 16 << 20
MAX_PARTICIPANTS = 4096  # so that all documents of a job stay below that
MAX_PASSPHRASE_BYTES = 4096
NAME_HINT = f"names match {NAME_PATTERN}"

HpkePublic = Annotated[
    Base64,
    Field(min_length=primitives.HPKE_PUBLIC_BYTES, max_length=primitives.HPKE_PUBLIC_BYTES),
]
HpkePrivate = Annotated[
    Base64,
    Field(min_length=primitives.HPKE_PRIVATE_BYTES, max_length=primitives.HPKE_PRIVATE_BYTES),
]


class SigningParty(Document):
    """A party known by its signing key: the server, the key generation center."""

    sign: Key32


class Participant(Document):
    """A participant of the roster: its name and public keys."""

    name: Name
    sign: Key32
    hpke: HpkePublic


class Job(Document):
    """The public job file: parameters, public key, and who takes part."""

    format: Literal["dtl/v1"]
    id: Identifier
    security: str
    N: BigInteger
    g: BigInteger
    h: Annotated[Items[BigInteger], Field(min_length=COMPONENTS, max_length=COMPONENTS)]
    slot_bits: int
    fraction_bits: int
    min_contributors: Annotated[int, Field(ge=2)]
    masks: bool
    kem: Literal["ML-KEM-768+X25519"]
    server: SigningParty
    participants: Annotated[Items[Participant], Field(max_length=MAX_PARTICIPANTS)]
    kgc: SigningParty
    signature: Signature

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = list(self.names)
        if names != sorted(set(names)) or {SERVER, KGC} & set(names):
            raise ValueError("expected unique participants sorted by name")
        if self.min_contributors > len(names):
            raise ValueError("min_contributors is larger than the roster")
        try:
            bits = self.public_key.modulus_bits
            self.fixed_point  # noqa: B018  (both raise for parameters that cannot work)
            self.packing  # noqa: B018
        except (FormatError, UsageError) as error:
            raise ValueError(error.message) from None
        if self.security != security_of(bits):
            raise ValueError("the security label does not fit the modulus")
        return self

    @classmethod
    def load(cls, path: Path) -> "Job":
        """Read a job file and check its own signature.

        Raises FormatError or VerificationError. That the signature is the right center's is
        checked against the pin in a key file, by `Key.load`.
        """
        job = cls.decode(read_file(path, MAX_DOCUMENT_BYTES), str(path))
        primitives.verify_signature(
            job.kgc.sign, "job", bytes.fromhex(job.digest), job.signature, str(path)
        )
        if job.insecure:
            logger.warning("job %s is %s: for tests only", job.id[:8], job.security)
        return job

    @cached_property
    def digest(self) -> str:
        """H(fields("dtl/v1/job", canonical JSON without the signature)), in hex."""
        return signed_digest("job", self.plain())

    @cached_property
    def roster_digest(self) -> str:
        """H(fields("dtl/v1/roster", canonical JSON of the participants)), in hex."""
        roster = canonical_json.dumps(self.plain()["participants"])
        return primitives.hash_fields("dtl/v1/roster", roster).hex()

    @cached_property
    def public_key(self) -> PublicKey:
        """N, g, h."""
        return PublicKey(self.N, self.g, self.h)

    @property
    def insecure(self) -> bool:
        """Whether the modulus is too small for anything but tests."""
        return self.security.startswith("insecure")

    @cached_property
    def fixed_point(self) -> FixedPoint:
        """How reals become integers in this job."""
        return FixedPoint(self.slot_bits, self.fraction_bits, len(self.participants))

    @cached_property
    def packing(self) -> Packing:
        """How integers become blocks in this job."""
        return Packing(self.N, self.slot_bits)

    @property
    def names(self) -> tuple[str, ...]:
        """The roster, in order."""
        return tuple(participant.name for participant in self.participants)

    def participant(self, name: str) -> Participant | None:
        """The participant of that name."""
        return next((p for p in self.participants if p.name == name), None)

    def signing_key(self, signer: str) -> bytes | None:
        """The public signing key of the server or of a participant."""
        if signer == SERVER:
            return self.server.sign
        participant = self.participant(signer)
        return participant.sign if participant else None

    def groups(self, values: int) -> int:
        """Groups that hold `values` values."""
        return -(-values // (COMPONENTS * self.packing.slots))

    @property
    def group_bytes(self) -> int:
        """Bytes of a group: 8 residues."""
        return (COMPONENTS + 1) * self.public_key.arithmetic.width

    def residue_shape(self, values: int) -> tuple[int, int, int]:
        """Shape of the `residues` tensor that holds `values` values."""
        return self.groups(values), COMPONENTS + 1, self.public_key.arithmetic.width


def signed_digest(kind: str, plain: Mapping[str, Any]) -> str:
    """The digest of a signed JSON document, whether it has its signature yet or not."""
    unsigned = {key: value for key, value in plain.items() if key != "signature"}
    return primitives.hash_fields(f"dtl/v1/{kind}", canonical_json.dumps(unsigned)).hex()


# --- key files -------------------------------------------------------------------------------


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
    sign: Key32 = Field(repr=False)
    hpke: HpkePrivate = Field(repr=False)


Secrets = KgcSecrets | ServerSecrets | ParticipantSecrets


class Pins(Document):
    """The public part of a key file: whose it is, and what it belongs to."""

    format: Literal["dtl/v1"]
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


def valid_name(name: str) -> bool:
    """Whether a participant can have this name (`server` and `kgc` aside)."""
    return re.fullmatch(NAME_PATTERN, name) is not None


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
    aad = primitives.fields("dtl/v1/key", canonical_json.dumps(public))
    salt, commit, sealed = primitives.box(passphrase, secrets.encode(), aad)
    box = Box(salt=salt, commit=commit, sealed=sealed)
    return canonical_json.dumps(public | {_BOX: box.plain()})


def split_key(data: bytes, what: str) -> tuple[Pins, dict[str, Any]]:
    """The pins of a key file, and the rest of it, unread."""
    parsed = canonical_json.loads(data, what)
    if not isinstance(parsed, dict):
        raise FormatError(f"{what}: expected a key file")
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
        _warn_if_readable(path)
        pins, rest = split_key(data, what)
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
            case ParticipantSecrets():
                known = self.job.participant(self.name)
                good = known is not None and (known.sign, known.hpke) == (
                    public,
                    primitives.hpke_public_key(self.secrets.hpke),
                )
                others = set(self.job.names) - {self.name} if self.job.masks else set()
                good = good and set(self.secrets.mask_seeds) == others
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
    aad = primitives.fields("dtl/v1/key", canonical_json.dumps(public))
    try:
        opened = primitives.open_box(passphrase(), box.salt, box.commit, box.sealed, aad)
    except NotAllowedError as error:
        raise NotAllowedError(f"{what}: {error.message}") from None
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
