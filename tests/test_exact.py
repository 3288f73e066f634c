"""What is opened equals plain Python integers, in both ciphers: random jobs, and full size."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from phe.paillier import PaillierPrivateKey, PaillierPublicKey
from safetensors.numpy import load_file

from dtl.core.crypto import residues, scheme
from tests.exact import Plan, run
from tests.helpers import CIPHERS, ONE, THREE, Cli, Round, residues_of

JOBS = 6  # of each cipher; `make exact` plays two hundred, with up to 40 participants
MOST = 12


@pytest.mark.parametrize(
    "number", [0, 1, *(pytest.param(number, marks=pytest.mark.slow) for number in range(2, JOBS))]
)
@pytest.mark.parametrize("cipher", CIPHERS)
def test_random_jobs_open_to_the_integers_of_plain_arithmetic(
    cipher: str, number: int, dtl: Cli, tmp_path: Path, fixed_primes: None
) -> None:
    chance = random.Random(f"exact {cipher} {number}")  # noqa: S311
    assert run(dtl, tmp_path, chance, Plan.drawn(chance, cipher, MOST))


@pytest.mark.full
@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_round_of_full_size(cipher: str, dtl: Cli, tmp_path: Path, fixed_primes: None) -> None:
    """Two rounds in a lattice job; in a direct one, a few groups."""
    size = ("--modulus-bits", 3072, "--cipher", cipher)
    round_ = Round(dtl, tmp_path, THREE, *size)
    values = 60_000 if cipher == "lattice" else 2000  # two polynomials; three groups
    generator = np.random.default_rng(5)
    w0 = round_.save("w0.safetensors", {"x": generator.normal(0, 1, values).astype(np.float32)})
    current = np.rint(load_file(w0)["x"].astype(np.float64) * ONE).astype(np.int64)
    source: tuple[object, ...] = ("--initial", w0)
    plain, model = w0, w0
    for number in (1, 2) if cipher == "lattice" else (1,):
        uploads = []
        for name in THREE:
            gradients = generator.normal(0, 0.1, values).astype(np.float32)
            options = ("--model", plain, "--rounding", "nearest")
            uploads.append(round_.upload(name, {"x": gradients}, *options, out=f"{name}.{number}"))
            # In the order of the protocol: times the weight, then times 2^16.
            current -= np.rint(gradients.astype(np.float64) * (1 / 3) * ONE).astype(np.int64)
        model = round_.aggregate(uploads, *source, out=f"{number}.enc")
        source = ("--model", model)
        release = round_.release(model, out=f"{number}.release")
        names = THREE if (number, cipher) == (1, "lattice") else ("alice",)
        plain = round_.open_all(release, names, out=f"w{number}.safetensors")
        assert (load_file(plain)["x"].astype(np.float64) * ONE == current).all()
    recovered = tmp_path / "recovered.safetensors"
    round_.dtl("audit", model, "--key", round_.key("kgc"), "--plaintext", recovered)
    assert recovered.read_bytes() == plain.read_bytes()
    # Any c_j of any file is a Paillier ciphertext of the block that both halves open.
    secret = json.loads(round_.key("kgc").read_bytes())
    p, q = int(secret["p"], 16), int(secret["q"], 16)
    private = PaillierPrivateKey(PaillierPublicKey(p * q), p, q)
    key = round_.job.public_key
    ciphertext = residues_of(model)[:1]
    opened = ciphertext
    for holder in ("server", "alice"):
        opened = scheme.apply_half(key, opened, round_.opened_key(holder).half)
    strong = [private.raw_decrypt(c) for c in residues.to_integers(ciphertext[:, 1:])]
    assert strong == residues.to_integers(scheme.open_blocks(key, opened))


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_job_without_master_key_works_as_any_other(
    cipher: str, dtl: Cli, tmp_path: Path, fixed_primes: None
) -> None:
    chance = random.Random(3)  # noqa: S311
    plan = Plan(cipher, 20, 10, THREE, True, True, True, 100, "float32")
    assert run(dtl, tmp_path, chance, plan, "--discard-master") == 200
    assert not (tmp_path / "job" / "kgc.key").exists()
