"""The key generation center: makes the job, hands out the keys, and can open anything."""

import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path

from dtl.core import defaults
from dtl.core.ciphers import check_cipher
from dtl.core.crypto import masks, primitives
from dtl.core.crypto.group import (
    SECURE_SIZES,
    StrongTrapdoor,
    check_modulus_bits,
    choose_trapdoor,
    exponent_bits,
    generate_public_key,
    security_of,
)
from dtl.core.crypto.primes import search_safe_prime
from dtl.core.encoding.fixed_point import FixedPoint
from dtl.core.encoding.packing import Packing
from dtl.core.errors import UsageError
from dtl.core.files import canonical_json, job_file, key_file, ledger
from dtl.core.files.atomic import PRIVATE_MODE, AtomicFolder, check_new_folder, write_file
from dtl.core.files.job_file import KGC, SERVER, Job
from dtl.core.files.key_file import Pins, Secrets
from dtl.core.files.schema import FORMAT
from dtl.core.parallel import DEFAULT_WORK, Work, default_workers

logger = logging.getLogger("dtl")

MIN_CONTRIBUTORS = 2
_FOR_TWO = "--min-contributors 2; each of the two then reads the other's gradient off the sum"
_POOL_FROM_BITS = 1024  # smaller primes are found before worker processes have started


@dataclass(frozen=True)
class JobOptions:
    """What the consortium agreed on."""

    participants: Sequence[str]
    modulus_bits: int
    slot_bits: int
    fraction_bits: int
    min_contributors: int
    masks: bool
    cipher: str = defaults.CIPHER
    insecure: bool = False
    keep_master: bool = True

    def check(self) -> None:
        """Raise UsageError for parameters that cannot work together."""
        names = list(self.participants)
        if not MIN_CONTRIBUTORS <= len(names) <= job_file.MAX_PARTICIPANTS:
            raise UsageError(
                f"expected at least two participants, and at most {job_file.MAX_PARTICIPANTS}, "
                f"found {len(names)}"
            )
        for name in names:
            if not job_file.valid_name(name) or name in (SERVER, KGC):
                raise UsageError(
                    f"participant {name!r}: not a name that can be used",
                    f"{job_file.NAME_HINT}; {SERVER} and {KGC} are taken",
                )
        if len(set(names)) != len(names):
            raise UsageError("a participant is named twice")
        if not MIN_CONTRIBUTORS <= self.min_contributors <= len(names):
            raise UsageError(
                f"min contributors: expected {MIN_CONTRIBUTORS} to {len(names)} "
                f"(the participants), found {self.min_contributors}",
                _FOR_TWO if len(names) == MIN_CONTRIBUTORS else None,
            )
        check_modulus_bits(self.modulus_bits, self.insecure)
        FixedPoint(self.slot_bits, self.fraction_bits, len(names))
        Packing(1 << (self.modulus_bits - 1), self.slot_bits)
        check_cipher(self.cipher)


def generate_job(
    folder: Path,
    options: JobOptions,
    passphrase: bytes | None = None,
    work: Work = DEFAULT_WORK,
) -> Job:
    """Make a job: `job.json`, `kgc.key`, and a key and a ledger for the server and everyone.

    The folder must not exist, or be empty; it appears complete or not at all.
    Protocol, sections 2 and 3.
    """
    options.check()
    if options.insecure and options.modulus_bits not in SECURE_SIZES:
        logger.warning("this job is %s: for tests only", security_of(options.modulus_bits))
    if passphrase is None:
        logger.warning("the key files are written in clear; --passphrase-file boxes them")
    check_new_folder(folder)
    trapdoor = choose_trapdoor(_safe_primes(options.modulus_bits, work))
    job, center, holders = _make_documents(options, trapdoor)

    with AtomicFolder(folder) as staging:
        for name, held in ({KGC: center} | holders).items():
            if name == KGC and not options.keep_master:
                continue
            identifier = None if name == KGC else ledger.new_identifier()
            pins = Pins(
                format=FORMAT, name=name, job=job.digest, kgc=job.kgc.sign, ledger=identifier
            )
            data = key_file.encode_key(pins, held, passphrase)
            write_file(staging.temporary / f"{name}.key", data, True, PRIVATE_MODE)
            if identifier is not None:
                line = ledger.first_line(identifier, name)
                write_file(staging.temporary / f"{name}.ledger", line, True, PRIVATE_MODE)
        write_file(staging.temporary / "job.json", job.encode(), force=True)
        staging.commit()
    return job


def _safe_primes(modulus_bits: int, work: Work) -> Iterator[int]:
    """Safe primes of half the modulus size, as many as are asked for, found on all cores."""
    workers = 1 if modulus_bits < _POOL_FROM_BITS else work.workers or default_workers()
    batch = 2 * workers  # windows at a time: enough to keep every core busy, few to waste
    for tried in count(0, batch):
        work.progress("search safe primes, windows", tried, None)
        tasks = repeat((modulus_bits // 2,), batch)
        windows = Work(workers).map(
            "", search_safe_prime, tasks, batch, serial_below=0, kernel=False
        )
        yield from [prime for prime in windows if prime is not None]


def _make_documents(
    options: JobOptions, trapdoor: StrongTrapdoor
) -> tuple[Job, key_file.KgcSecrets, dict[str, Secrets]]:
    job_id = secrets.token_bytes(16)
    ell = exponent_bits(options.modulus_bits)
    center = key_file.KgcSecrets(
        p=trapdoor.p,
        q=trapdoor.q,
        server_seed=_fresh(),
        participant_seed=_fresh(),
        mask_root=_fresh(),
        sign=_fresh(),
    )
    server = key_file.ServerSecrets(server_seed=center.server_seed, sign=_fresh())
    names = sorted(options.participants)
    held: dict[str, key_file.ParticipantSecrets] = {
        name: key_file.ParticipantSecrets(
            participant_seed=center.participant_seed,
            mask_seeds=_mask_seeds(center.mask_root, job_id, name, names) if options.masks else {},
            audit_seed=masks.audit_seed(center.mask_root, job_id, name),
            sign=_fresh(),
            hpke=primitives.hpke_generate(),
        )
        for name in names
    }
    public = generate_public_key(
        trapdoor,
        key_file.server_half(center.server_seed, job_id, ell),
        key_file.participant_half(center.participant_seed, job_id, ell),
    )
    unsigned = {
        "format": FORMAT,
        "id": job_id.hex(),
        "security": security_of(options.modulus_bits),
        "cipher": options.cipher,
        "N": f"{public.n:x}",
        "gamma": f"{public.gamma:x}",
        "h": [f"{value:x}" for value in public.h],
        "A": [f"{value:x}" for value in public.server],
        "slot_bits": options.slot_bits,
        "fraction_bits": options.fraction_bits,
        "min_contributors": options.min_contributors,
        "masks": options.masks,
        "kem": primitives.KEM_NAME,
        "server": _public(server.sign),
        "participants": [
            {"name": name}
            | _public(key.sign)
            | {"hpke": primitives.encode_base64(primitives.hpke_public_key(key.hpke))}
            for name, key in held.items()
        ],
        "kgc": _public(center.sign),
    }
    digest = bytes.fromhex(job_file.signed_digest("job", unsigned))
    signature = primitives.sign(center.sign, "job", digest)
    plain = unsigned | {"signature": primitives.encode_base64(signature)}
    job = Job.decode(canonical_json.dumps(plain), "job.json")
    return job, center, {SERVER: server, **held}


def _mask_seeds(root: bytes, job_id: bytes, own: str, names: Sequence[str]) -> dict[str, bytes]:
    """The seeds that one participant shares with each of the others."""
    return {
        other: masks.pair_seed(root, job_id, *sorted((own, other)))
        for other in names
        if other != own
    }


def _fresh() -> bytes:
    """A fresh seed or signing secret."""
    return secrets.token_bytes(primitives.KEY_BYTES)


def _public(signing_secret: bytes) -> dict[str, str]:
    return {"sign": primitives.encode_base64(primitives.signing_public_key(signing_secret))}
