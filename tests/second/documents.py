"""Signed documents (job.json, close files, reveals) and key files."""

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from tests.second import encoding
from tests.second.encoding import (
    FORMAT,
    Refused,
    dumps,
    exactly,
    fields,
    from_base64,
    from_hex,
    hashed,
    hkdf,
    integer,
    number_from_hex,
    require,
)
from tests.second.group import Group
from tests.second.lattice import FULL, SMALL, Shape

HEADER = "format kind job signer created"
JOB = (
    "format id security cipher N gamma h A slot_bits fraction_bits min_contributors masks kem "
    "server participants kgc signature"
)


def verify(public: bytes, kind: str, digest: bytes, signature: bytes) -> None:
    try:
        signed = fields("dtl/v2/" + kind, digest)
        Ed25519PublicKey.from_public_bytes(public).verify(signature, signed)
    except (InvalidSignature, ValueError) as error:
        raise Refused(4, "the signature does not verify") from error


def name(value: Any) -> str:
    require(isinstance(value, str), 3, "a name must be a text")
    require(re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", value), 3, "not a name")
    return str(value)


def names(value: Any) -> list[str]:
    """Names in order, none twice."""
    require(isinstance(value, list), 3, "not a list of names")
    found = [name(item) for item in value]
    require(found == sorted(set(found)), 3, "names out of order")
    return found


@dataclass
class Job:
    """job.json; what the other files are held against."""

    body: dict[str, Any]
    digest: bytes
    roster: bytes
    group: Group
    names: list[str]
    sign: dict[str, bytes]
    hpke: dict[str, bytes]

    @property
    def lattice(self) -> bool:
        return bool(self.body["cipher"] == "lattice")

    @property
    def block_slot(self) -> int:
        """b: the bits of a slot of a block."""
        return 28 if self.lattice else int(self.body["slot_bits"])

    @property
    def block_slots(self) -> int:
        """S."""
        return (self.group.bits - 2) // self.block_slot

    def shape(self, values: int) -> Shape:
        """How the body of so many values is laid out."""
        ring = SMALL if self.body["security"].startswith("insecure-") else FULL
        return Shape(ring, self.body["slot_bits"], values)

    def block_count(self, values: int) -> int:
        """How many integers are in the blocks of a vector of so many values."""
        return self.shape(values).ring.degree if self.lattice else values

    def groups(self, values: int) -> int:
        """T."""
        return -(-self.block_count(values) // (7 * self.block_slots))

    @property
    def largest(self) -> int:
        """Of the integers of a model."""
        return int(2 ** (self.body["slot_bits"] - 2)) - 1

    @property
    def e_max(self) -> int:
        """Of the integers of a contribution."""
        return self.largest // len(self.names)


def read_job(path: Path) -> Job:
    return _job(path.read_bytes())


@cache
def _job(raw: bytes) -> Job:
    body = exactly(encoding.loads(raw), JOB)
    require(body["format"] == FORMAT, 3, "another format")
    identity = from_hex(body["id"], 16)
    require(type(body["masks"]) is bool, 3, "masks must be true or false")
    require(body["kem"] == "ML-KEM-768+X25519", 3, "another KEM")
    require(body["cipher"] in ("lattice", "direct"), 3, "another cipher")
    for field in ("h", "A"):
        require(isinstance(body[field], list) and len(body[field]) == 7, 3, f"not seven {field}")
    require(isinstance(body["participants"], list), 3, "no participants")
    require(len(body["participants"]) <= 4096, 3, "too many participants")
    people = [exactly(entry, "name sign hpke") for entry in body["participants"]]
    roster = names([entry["name"] for entry in people])
    require(not {"server", "kgc"} & set(roster), 3, "a name that is taken")
    slot = integer(body["slot_bits"], 3, 52)
    integer(body["fraction_bits"], 0, slot - 2)
    integer(body["min_contributors"], 2, len(roster))
    sign = {entry["name"]: from_base64(entry["sign"], 32) for entry in people}
    for role in ("server", "kgc"):
        sign[role] = from_base64(exactly(body[role], "sign")["sign"], 32)
    hpke = {entry["name"]: from_base64(entry["hpke"], 1184 + 32) for entry in people}
    signature = from_base64(body["signature"], 64)
    modulus = number_from_hex(body["N"])
    bits = modulus.bit_length()
    group = Group(
        identity,
        bits,
        modulus,
        number_from_hex(body["gamma"]),
        [number_from_hex(h) for h in body["h"]],
        [number_from_hex(a) for a in body["A"]],
    )
    group.check()
    security = {3072: "128", 2048: "112"}.get(bits, f"insecure-{bits}")
    require(body["security"] == security, 3, "the security is not that of N")
    unsigned = {key: value for key, value in body.items() if key != "signature"}
    digest = hashed("dtl/v2/job", dumps(unsigned))
    roster_digest = hashed("dtl/v2/roster", dumps(body["participants"]))
    job = Job(body, digest, roster_digest, group, roster, sign, hpke)
    require(job.block_slots >= 1, 3, "a slot does not fit into a block")
    require(job.e_max >= 1, 3, "no room for a contribution")
    verify(sign["kgc"], "job", digest, signature)
    return job


def check_common(header: dict[str, Any], kind: str) -> None:
    """The fields that every header has."""
    require(header["format"] == FORMAT and header["kind"] == kind, 3, f"not a {kind}")
    from_hex(header["job"], 64)
    name(header["signer"])
    created = encoding.text(header["created"])
    require(re.fullmatch(r"[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z", created), 3, created)


def contributors(value: Any) -> dict[str, bytes]:
    """Names and the digests of their uploads, in order."""
    require(isinstance(value, list), 3, "no contributors")
    entries = [exactly(entry, "participant upload") for entry in value]
    found = names([entry["participant"] for entry in entries])
    digests = [from_hex(entry["upload"], 64) for entry in entries]
    return dict(zip(found, digests, strict=True))


def can_close(job: Job, present: int) -> bool:
    """Whether so many may go on without the others."""
    return present >= int(job.body["min_contributors"]) and 3 * present > 2 * len(job.names)


@dataclass
class Document:
    """A close file or a reveal."""

    body: dict[str, Any]
    digest: bytes


def _document(path: Path, kind: str, names_of_fields: str) -> tuple[Document, bytes]:
    body = exactly(encoding.loads(path.read_bytes()), f"{HEADER} {names_of_fields} signature")
    check_common(body, kind)
    integer(body["round"], 1, 2**32 - 1)
    encoding.digest_or_null(body["base"])
    signature = from_base64(body["signature"], 64)
    unsigned = {key: value for key, value in body.items() if key != "signature"}
    return Document(body, hashed(f"dtl/v2/{kind}", dumps(unsigned))), signature


def read_close(path: Path, job: Job) -> Document:
    found, signature = _document(path, "close", "round base contributors missing")
    body = found.body
    present, missing = contributors(body["contributors"]), names(body["missing"])
    require(missing and not present.keys() & set(missing), 3, "it contradicts itself")
    require(body["signer"] == "server", 3, "not by the server")
    require(body["job"] == job.digest.hex(), 3, "of another job")
    verify(job.sign["server"], "close", found.digest, signature)
    return found


def kind_of(path: Path) -> Any:
    """The `kind` of a document; None for a job file."""
    body = encoding.loads(path.read_bytes())
    return body.get("kind") if isinstance(body, dict) else None


def read_reveal(path: Path, job: Job) -> Document:
    found, signature = _document(path, "reveal", "round base close keys")
    body = found.body
    from_hex(body["close"], 64)
    require(isinstance(body["keys"], dict), 3, "no keys")
    for missing, key in body["keys"].items():
        name(missing)
        from_base64(key, 32)
    require(body["job"] == job.digest.hex(), 3, "of another job")
    require(body["signer"] in job.names, 3, "not by a participant")
    verify(job.sign[body["signer"]], "reveal", found.digest, signature)
    return found


def read_document(path: Path, job: Job) -> Document:
    """A close file or a reveal, whichever it is."""
    return read_close(path, job) if kind_of(path) == "close" else read_reveal(path, job)


@dataclass
class Key:
    """A key file; the secret part with bytes, and p and q as integers."""

    name: str
    ledger: str
    secret: dict[str, Any]


PUBLIC = "format name job kgc"
SECRET = {
    "kgc": "p q server_seed participant_seed mask_root sign",
    "server": "server_seed sign",
}


def _secret(owner: str, value: Any) -> dict[str, Any]:
    body = exactly(value, SECRET.get(owner, "participant_seed mask_seeds audit_seed sign hpke"))
    found: dict[str, Any] = {}
    for field, item in body.items():
        if field in ("p", "q"):
            found[field] = number_from_hex(item)
        elif field == "mask_seeds":
            require(isinstance(item, dict), 3, "mask seeds")
            found[field] = {name(other): from_base64(seed, 32) for other, seed in item.items()}
        else:
            found[field] = from_base64(item, 96 if field == "hpke" else 32)
    return found


@cache
def _stretched(salt: bytes, passphrase: bytes) -> bytes:
    return Scrypt(salt=salt, length=32, n=2**17, r=8, p=1).derive(passphrase)


def _unbox(public: dict[str, Any], box: Any, passphrase: bytes) -> bytes:
    parts = exactly(box, "salt commit sealed")
    salt, commit = from_base64(parts["salt"], 32), from_base64(parts["commit"], 32)
    derived = hkdf(_stretched(salt, passphrase), fields("dtl/v2/box"), 64)
    require(derived[32:] == commit, 5, "a wrong passphrase")
    aad = fields("dtl/v2/key", dumps(public))
    try:
        sealed = from_base64(parts["sealed"])
        return ChaCha20Poly1305(derived[:32]).decrypt(bytes(11) + b"\1", sealed, aad)
    except InvalidTag as error:
        raise Refused(4, "the box has been changed") from error


def _raw(private: Ed25519PrivateKey | X25519PrivateKey | MLKEM768PrivateKey) -> bytes:
    return private.public_key().public_bytes_raw()


def _belongs(job: Job, owner: str, secret: dict[str, Any]) -> bool:
    """Whether the secrets are those of the public keys in the job."""
    if _raw(Ed25519PrivateKey.from_private_bytes(secret["sign"])) != job.sign[owner]:
        return False
    if "hpke" in secret:
        kem = MLKEM768PrivateKey.from_seed_bytes(secret["hpke"][:64])
        exchange = X25519PrivateKey.from_private_bytes(secret["hpke"][64:])
        others = set(job.names) - {owner} if job.body["masks"] else set()
        if _raw(kem) + _raw(exchange) != job.hpke[owner] or secret["mask_seeds"].keys() != others:
            return False
    if owner == "kgc" and secret["p"] * secret["q"] != job.group.N:
        return False
    return _has_halves(job, secret)


def _has_halves(job: Job, secret: dict[str, Any]) -> bool:
    """Whether the halves that a key holds are those of h and A."""
    group = job.group
    if "server_seed" in secret:
        a = group.half(secret["server_seed"], "server-half")
        if not group.are_powers(group.A, [1] * 7, a):
            return False
    if "participant_seed" in secret:
        b = group.half(secret["participant_seed"], "participant-half")
        return group.are_powers(group.h, group.A, b)
    return True


def read_key(path: Path, job_path: Path, passphrase: bytes = b"") -> tuple[Key, Job]:
    """A key with its job; every check, in order."""
    return _key(path.read_bytes(), job_path.read_bytes(), passphrase)


@cache
def _key(raw: bytes, job_raw: bytes, passphrase: bytes) -> tuple[Key, Job]:
    body = encoding.loads(raw)
    require(isinstance(body, dict), 3, "not a key")
    require(body.get("format") == FORMAT, 3, "another format")
    owner = name(body.get("name"))
    pinned = PUBLIC if owner == "kgc" else PUBLIC + " ledger"
    public = exactly({key: body[key] for key in pinned.split() if key in body}, pinned)
    from_hex(public["job"], 64)
    from_base64(public["kgc"], 32)
    if "ledger" in public:
        from_hex(public["ledger"], 16)
    rest = {key: value for key, value in body.items() if key not in public}
    job = _job(job_raw)
    require(public["job"] == job.digest.hex(), 4, "of another job")
    require(from_base64(public["kgc"]) == job.sign["kgc"], 4, "of another center")
    if "box" in rest:
        exactly(rest, "box")
        rest = encoding.loads(_unbox(public, rest["box"], passphrase))
    secret = _secret(owner, rest)
    require(owner in job.sign, 4, "not in the job")
    require(_belongs(job, owner, secret), 4, "the secrets are of other keys")
    return Key(owner, public.get("ledger", ""), secret), job


def bits_of(number: int) -> int:
    return math.ceil(math.log2(number)) if number > 1 else 0
