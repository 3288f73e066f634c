"""The public job file: what a consortium agreed on, signed by its key generation center."""

import logging
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from dtl.core.ciphers import Cipher, make_cipher
from dtl.core.crypto import primitives
from dtl.core.crypto.group import COMPONENTS, PublicKey, security_of
from dtl.core.encoding.fixed_point import FixedPoint
from dtl.core.errors import FormatError, UsageError
from dtl.core.files import canonical_json
from dtl.core.files.atomic import read_file
from dtl.core.files.schema import (
    NAME_PATTERN,
    Base64,
    BigInteger,
    Document,
    Identifier,
    Items,
    Key32,
    Name,
    Signature,
)

logger = logging.getLogger("dtl")

BODY, RESIDUES = "body", "residues"
SERVER: Final = "server"
KGC: Final = "kgc"
MAX_DOCUMENT_BYTES = 16 << 20
MAX_PARTICIPANTS = 4096  # so that all documents of a job stay below that
NAME_HINT = f"names match {NAME_PATTERN}"

HpkePublic = Annotated[
    Base64,
    Field(min_length=primitives.HPKE_PUBLIC_BYTES, max_length=primitives.HPKE_PUBLIC_BYTES),
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

    format: Literal["dtl/v2"]
    id: Identifier
    security: str
    cipher: Literal["lattice", "direct"]
    N: BigInteger
    gamma: BigInteger
    h: Annotated[Items[BigInteger], Field(min_length=COMPONENTS, max_length=COMPONENTS)]
    A: Annotated[Items[BigInteger], Field(min_length=COMPONENTS, max_length=COMPONENTS)]
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
            self.codec  # noqa: B018
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
        try:
            data = read_file(path, MAX_DOCUMENT_BYTES)
        except UsageError as error:
            raise UsageError(error.message, "--job PATH says where the job file is") from None
        job = cls.decode(data, str(path))
        primitives.verify_signature(
            job.kgc.sign, "job", bytes.fromhex(job.digest), job.signature, str(path)
        )
        if job.insecure:
            logger.warning("job %s is %s: for tests only", job.digest[:8], job.security)
        return job

    @cached_property
    def digest(self) -> str:
        """H(fields("dtl/v2/job", canonical JSON without the signature)), in hex."""
        return signed_digest("job", self.plain())

    @cached_property
    def roster_digest(self) -> str:
        """H(fields("dtl/v2/roster", canonical JSON of the participants)), in hex."""
        roster = canonical_json.dumps(self.plain()["participants"])
        return primitives.hash_fields("dtl/v2/roster", roster).hex()

    @cached_property
    def public_key(self) -> PublicKey:
        """N, gamma, h, A."""
        return PublicKey(self.N, self.gamma, self.h, self.A)

    @property
    def insecure(self) -> bool:
        """Whether the modulus is too small for anything but tests."""
        return self.security.startswith("insecure")

    @cached_property
    def fixed_point(self) -> FixedPoint:
        """How reals become integers in this job."""
        return FixedPoint(self.slot_bits, self.fraction_bits, len(self.participants))

    @cached_property
    def codec(self) -> Cipher:
        """How values become a body and blocks, and how they come back: `lattice` or `direct`."""
        return make_cipher(self.cipher, self.public_key, self.fixed_point)

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

    @property
    def group_bytes(self) -> int:
        """Bytes of a group: 8 residues."""
        return (COMPONENTS + 1) * self.public_key.arithmetic.width

    def residue_shape(self, values: int) -> tuple[int, int, int]:
        """Shape of the `residues` tensor that belongs to `values` values."""
        return self.codec.groups(values), COMPONENTS + 1, self.public_key.arithmetic.width

    def body_shapes(self, values: int) -> dict[str, tuple[int, ...]]:
        """The `body` tensor that belongs to `values` values; nothing where there is none."""
        length = self.codec.body_bytes(values)
        return {BODY: (length,)} if length else {}

    def result_shapes(self, values: int) -> dict[str, tuple[int, ...]]:
        """The tensors of an encrypted result: `residues`, and `body` where there is one."""
        return {RESIDUES: self.residue_shape(values), **self.body_shapes(values)}


def signed_digest(kind: str, plain: Mapping[str, Any]) -> str:
    """The digest of a signed JSON document, whether it has its signature yet or not."""
    unsigned = {key: value for key, value in plain.items() if key != "signature"}
    return primitives.hash_fields(f"dtl/v2/{kind}", canonical_json.dumps(unsigned)).hex()


def valid_name(name: str) -> bool:
    """Whether a participant can have this name (`server` and `kgc` aside)."""
    return re.fullmatch(NAME_PATTERN, name) is not None
