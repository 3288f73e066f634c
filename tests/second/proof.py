"""Section 6: the proof of an upload."""

import hashlib
from dataclasses import dataclass
from math import prod

from tests.second.bulk import Bulk, exponent_bits, tensor_digest
from tests.second.documents import Job
from tests.second.encoding import fields, hashed, keystream, numbers, require, u32
from tests.second.group import Residues


@dataclass
class Proof:
    """d_0..d_7, z, v_1..v_7, and rho_1..rho_T of the upload."""

    d: list[int]
    z: int
    v: list[int]
    rho: list[int]


def read(job: Job, upload: Bulk) -> Proof:
    width = job.group.width
    raw = upload.tensors["proof"].data
    groups = upload.tensors["residues"].shape[0]
    end = len(raw) - 7 * width // 2
    body = upload.tensors.get("body")
    h0 = hashed(
        "dtl/v2/upload-proof",
        upload.raw,
        job.sign[upload.header["signer"]],
        u32(groups),
        tensor_digest("residues", upload.tensors["residues"].data),
        tensor_digest("body", body.data) if body else None,
        *(raw[at : at + width] for at in range(0, 8 * width, width)),
    )
    rho = hashlib.shake_256(fields("dtl/v2/upload-rho", h0)).digest(16 * groups)
    return Proof(
        numbers(raw[: 8 * width], width),
        int.from_bytes(raw[8 * width : end], "little"),
        numbers(raw[end:], width // 2),
        numbers(rho, 16),
    )


_checked: dict[bytes, Proof] = {}


def check(job: Job, upload: Bulk) -> Proof:
    """The proof, or it is refused; the residues with it. What holds is not computed again."""
    if upload.digest not in _checked:  # the digest binds the job, too
        _checked[upload.digest] = _check(job, upload)
    return _checked[upload.digest]


def _check(job: Job, upload: Bulk) -> Proof:
    group = job.group
    proof = read(job, upload)
    residues = upload.residues(job)
    group.check_groups([proof.d], 4)
    bits = exponent_bits(job, len(residues))
    require(proof.z < 2 ** (bits + 1), 4, "z out of range")
    require(all(v < group.N for v in proof.v), 4, "v out of range")
    group.check_groups(residues, 3)
    bases = [group.gamma, *group.h]
    for k, (base, d, modulus) in enumerate(zip(bases, proof.d, group.moduli, strict=True)):
        left = pow(base, proof.z, modulus)
        if k:
            left = left * (1 + proof.v[k - 1] * group.N) % modulus
        right = d * weighted(residues, k, proof.rho, modulus) % modulus
        require(left in (right, modulus - right), 4, "the proof does not hold")
    return proof


def weighted(residues: Residues, k: int, rho: list[int], modulus: int) -> int:
    """prod c_{k,i}^rho_i."""
    return (
        prod(pow(row[k], weight, modulus) for row, weight in zip(residues, rho, strict=True))
        % modulus
    )


def randomness(job: Job, key: bytes, groups: int) -> list[int]:
    """r of each group, from k_r."""
    size = job.group.ell // 8
    return numbers(keystream(key, bytes(12), size * groups), size)


def commitments(job: Job, key: bytes, groups: int) -> list[int]:
    """d_0..d_7, from k_w."""
    group, bits = job.group, exponent_bits(job, groups)
    first, size = -(-bits // 8), group.bits // 8 + 16
    stream = keystream(key, bytes(12), first + 7 * size)
    w = int.from_bytes(stream[:first], "little") % 2**bits
    powers = [
        pow(h, w, group.square) * (1 + s % group.N * group.N) % group.square
        for h, s in zip(group.h, numbers(stream[first:], size), strict=True)
    ]
    return [pow(group.gamma, w, group.N), *powers]
