"""Section 7: pairwise masks."""

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from tests.second.documents import Job
from tests.second.encoding import fields, hkdf, u32
from tests.second.group import Blocks, rows


def pair_seed(job: Job, mask_root: bytes, one: str, other: str) -> bytes:
    first, second = sorted((one, other))
    info = fields("dtl/v2/mask-seed", job.group.identity, first, second)
    return hkdf(mask_root, info, 32)


def round_key(job: Job, seed: bytes, round_: int, base: bytes | None, opened: bytes) -> bytes:
    """k_ij."""
    info = fields("dtl/v2/mask", job.digest, u32(round_), base, opened, job.roster)
    return hkdf(seed, info, 32)


def pad(job: Job, key: bytes, groups: int) -> Blocks:
    """F(k, t) for every block of so many groups."""
    width = (job.group.bits + 128) // 8
    encryptor = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    stream = encryptor.update(bytes(7 * groups * width))
    return [[number % job.group.N for number in row] for row in rows(stream, width, 7)]


def mask(job: Job, owner: str, keys: dict[str, bytes], groups: int) -> Blocks:
    """What a participant adds to its blocks; `keys` are k_ij, by the other's name."""
    total = [[0] * 7 for _ in range(groups)]
    for other, key in keys.items():
        sign = 1 if other > owner else -1
        total = [
            [(x + sign * y) % job.group.N for x, y in zip(one, two, strict=True)]
            for one, two in zip(total, pad(job, key, groups), strict=True)
        ]
    return total


def subtract(job: Job, left: Blocks, right: Blocks) -> Blocks:
    return [
        [(x - y) % job.group.N for x, y in zip(one, other, strict=True)]
        for one, other in zip(left, right, strict=True)
    ]
