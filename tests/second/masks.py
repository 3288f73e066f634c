"""Section 7: pairwise masks; section 9.2: the keys of one upload."""

import hmac
from dataclasses import dataclass

from tests.second import lattice
from tests.second.documents import Job
from tests.second.encoding import fields, hkdf, keystream, numbers, u32, u64
from tests.second.group import Blocks
from tests.second.lattice import Body, Shape


def pair_seed(job: Job, mask_root: bytes, one: str, other: str) -> bytes:
    """s_ij."""
    first, second = sorted((one, other))
    info = fields("dtl/v2/mask-seed", job.group.identity, first, second)
    return hkdf(mask_root, info, 32)


def audit_seed(job: Job, mask_root: bytes, name: str) -> bytes:
    return hkdf(mask_root, fields("dtl/v2/audit-seed", job.group.identity, name), 32)


def opened_tag(seed: bytes, round_: int, base: bytes, opened: bytes) -> bytes:
    message = fields("dtl/v2/opened", u32(round_), base, opened)
    return hmac.digest(seed, message, "sha512")[:16]


@dataclass
class Context:
    """What the keys of an upload depend on besides the participant's secrets."""

    job: Job
    round: int
    base: bytes | None
    opened: bytes | None

    def info(self, label: str, *more: bytes) -> bytes:
        job = self.job
        return fields(label, job.digest, u32(self.round), self.base, self.opened, job.roster, *more)

    def round_key(self, seed: bytes) -> bytes:
        """k_ij."""
        return hkdf(seed, self.info("dtl/v2/mask"), 32)

    def one_time(self, system: bytes, sign: bytes, time: int, link: bytes) -> list[bytes]:
        """k_s, k_e, k_r, k_w."""
        derived = hkdf(system + sign, self.info("dtl/v2/one-time", u64(time), link), 128)
        return [derived[at : at + 32] for at in range(0, 128, 32)]


def body_key(key: bytes) -> bytes:
    """k'_ij."""
    return hkdf(key, fields("dtl/v2/body-mask"), 32)


def pad(job: Job, key: bytes, groups: int) -> Blocks:
    """F(k, t) for every block of so many groups."""
    width = (job.group.bits + 128) // 8
    found = numbers(keystream(key, bytes(12), 7 * groups * width), width)
    return [[f % job.group.N for f in found[at : at + 7]] for at in range(0, len(found), 7)]


def sign_of(owner: str, other: str) -> int:
    """Of the mask that `owner` adds, which it shares with `other`."""
    return 1 if other > owner else -1


def mask(job: Job, owner: str, keys: dict[str, bytes], groups: int) -> Blocks:
    """What a participant adds to its blocks; `keys` are k_ij, by the other's name."""
    total = [[0] * 7 for _ in range(groups)]
    for other, key in keys.items():
        total = combine(job, total, pad(job, key, groups), sign_of(owner, other))
    return total


def mask_body(owner: str, keys: dict[str, bytes], shape: Shape) -> Body:
    """What a participant adds to its body."""
    total = lattice.zero(shape)
    for other, key in keys.items():
        added = lattice.mask(body_key(key), shape)
        total = lattice.combine(shape.ring, total, added, sign_of(owner, other))
    return total


def combine(job: Job, left: Blocks, right: Blocks, sign: int) -> Blocks:
    return [
        [(x + sign * y) % job.group.N for x, y in zip(one, other, strict=True)]
        for one, other in zip(left, right, strict=True)
    ]
