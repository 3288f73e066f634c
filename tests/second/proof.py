"""Section 6: the proof of an upload."""

import hashlib
from dataclasses import dataclass

from tests.second.bulk import Bulk, exponent_bits
from tests.second.documents import Job
from tests.second.encoding import fields, hashed, require, u32
from tests.second.group import rows


@dataclass
class Proof:
    """d_0..d_7, z, v_1..v_7, and rho_1..rho_T of the upload."""

    d: list[int]
    z: int
    v: list[int]
    rho: list[int]


def read(job: Job, upload: Bulk) -> Proof:
    width = job.group.width
    raw, sent = upload.tensors["proof"].data, upload.tensors["residues"]
    groups = sent.shape[0]
    end = len(raw) - 7 * width // 2
    (d,) = rows(raw[: 8 * width], width, 8)
    (v,) = rows(raw[end:], width // 2, 7)
    h0 = hashed(
        "dtl/v2/upload-proof",
        upload.raw,
        job.sign[upload.header["signer"]],
        u32(groups),
        hashlib.sha512(sent.data).digest(),
        *(raw[at : at + width] for at in range(0, 8 * width, width)),
    )
    stream = hashlib.shake_256(fields("dtl/v2/upload-rho", h0)).digest(16 * groups)
    rho = [row[0] for row in rows(stream, 16, 1)]
    return Proof(d, int.from_bytes(raw[8 * width : end], "little"), v, rho)


def check(job: Job, upload: Bulk) -> Proof:
    """The proof, or it is refused; the residues with it."""
    group = job.group
    proof = read(job, upload)
    residues = group.residues(upload.tensors["residues"].data)
    group.check_residues(proof.d, 4)
    bits = exponent_bits(job, len(residues))
    require(proof.z < 2 ** (bits + 1), 4, "z out of range")
    require(all(v < group.N for v in proof.v), 4, "v out of range")
    group.check_residues((c for row in residues for c in row), 3)
    bases = [group.g, *group.h]
    for k, (base, d) in enumerate(zip(bases, proof.d, strict=True)):
        left = pow(base, proof.z, group.square)
        if k:
            left = left * (1 + proof.v[k - 1] * group.N) % group.square
        right = d
        for row, rho in zip(residues, proof.rho, strict=True):
            right = right * pow(row[k], rho, group.square) % group.square
        require(left in (right, group.square - right), 4, "the proof does not hold")
    return proof
