"""Close files and reveals: signed JSON documents of a round in which somebody is missing."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from dtl.core.crypto import primitives
from dtl.core.errors import FormatError
from dtl.core.files import canonical_json
from dtl.core.files.atomic import read_file
from dtl.core.files.headers import Contribution, Header
from dtl.core.files.job_file import MAX_DOCUMENT_BYTES, Job, signed_digest
from dtl.core.files.schema import Digest, Items, Key32, Name, Round, Signature


class SignedDocument(Header):
    """A JSON document with a signature over its digest."""

    round: Round
    base: Digest | None
    signature: Signature

    @property
    def digest(self) -> str:
        """H(fields("dtl/v2/" + kind, canonical JSON without the signature)), in hex."""
        return signed_digest(self.kind, self.plain())

    @classmethod
    def signed(cls, secret: bytes, **values: object) -> Self:
        """Make a document and sign it."""
        unsigned = cls.model_validate(values | {"signature": bytes(64)})
        digest = bytes.fromhex(unsigned.digest)
        signature = primitives.sign(secret, unsigned.kind, digest)
        return unsigned.model_copy(update={"signature": signature})

    @classmethod
    def load(cls, path: Path, job: Job) -> Self:
        """Read a document of this job and check its signature.

        Raises FormatError when it is malformed or of another job, VerificationError for a
        bad signature.
        """
        document = cls.decode(read_file(path, MAX_DOCUMENT_BYTES), str(path))
        if document.job != job.digest:
            raise FormatError(f"{path}: belongs to another job")
        document.check_signature(job, str(path))
        return document

    def check_signature(self, job: Job, what: str) -> None:
        """Raise VerificationError unless the signer that it names has signed it."""
        public = job.signing_key(self.signer)
        if public is None:
            raise FormatError(f"{what}: {self.signer} is not in this job's roster")
        digest = bytes.fromhex(self.digest)
        primitives.verify_signature(public, self.kind, digest, self.signature, what)


class Close(SignedDocument):
    """The server's word on a round: whose uploads are in, and who is missing."""

    kind: Literal["close"]
    signer: Literal["server"]
    contributors: Items[Contribution]
    missing: Items[Name]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = list(self.names)
        if names != sorted(set(names)) or list(self.missing) != sorted(set(self.missing)):
            raise ValueError("expected unique names in order")
        if set(names) & set(self.missing) or not self.missing:
            raise ValueError("the close file contradicts itself")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The participants whose uploads are in."""
        return tuple(item.participant for item in self.contributors)

    @property
    def uploads(self) -> dict[str, str]:
        """Upload digests by participant."""
        return {item.participant: item.upload for item in self.contributors}


class Reveal(SignedDocument):
    """A participant's round keys for the masks that it shares with the missing."""

    kind: Literal["reveal"]
    close: Digest
    keys: dict[Name, Key32]


def load_signed(path: Path, job: Job) -> Close | Reveal:
    """Read a close file or a reveal, whichever it is; errors as `SignedDocument.load`."""
    kind = kind_of(path)
    return Close.load(path, job) if kind == "close" else Reveal.load(path, job)


def kind_of(path: Path) -> str | None:
    """The `kind` of a JSON document, None where it has none."""
    parsed = canonical_json.loads(read_file(path, MAX_DOCUMENT_BYTES), str(path))
    kind = parsed.get("kind") if isinstance(parsed, dict) else None
    return kind if isinstance(kind, str) else None
