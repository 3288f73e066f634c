"""One training round and the next, through the command line, against the plaintext computation."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from phe.paillier import PaillierPrivateKey, PaillierPublicKey
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dtl.core.crypto import residues, scheme
from dtl.core.errors import VerificationError
from dtl.core.files.key_file import KgcSecrets
from tests.helpers import CIPHERS, ONE, THREE, Arrays, Cli, Round, random_arrays, residues_of

FIVE = ("a", "b", "c", "d", "e")
NewRound = Callable[..., Round]


def as_integers(arrays: Arrays, weight: float, lr: float = 1.0) -> dict[str, np.ndarray]:
    return {
        name: np.rint(weight * lr * array.astype(np.float64) * ONE)
        for name, array in arrays.items()
    }


def total(parts: list[Arrays]) -> Arrays:
    return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}


@pytest.mark.parametrize("cipher", CIPHERS)
def test_nearest_sum_equals_the_sum_of_integers(new_round: NewRound, cipher: str) -> None:
    round_ = new_round(FIVE, "--cipher", cipher)
    weights = dict(zip(FIVE, (0.1, 0.15, 0.2, 0.25, 0.3), strict=True))
    given = {name: random_arrays(i, 0.5) for i, name in enumerate(FIVE)}
    uploads = [
        round_.upload(name, given[name], "--weight", weights[name], "--rounding", "nearest")
        for name in FIVE
    ]
    opened = round_.opened(round_.release(round_.aggregate(uploads)), "c")
    expected = total([as_integers(given[name], weights[name]) for name in FIVE])
    for name, array in opened.items():
        assert array.dtype == np.float32
        assert (array.astype(np.float64) * ONE == expected[name]).all()


def test_stochastic_sum_is_close_and_unbiased(new_round: NewRound) -> None:
    round_ = new_round(FIVE)
    given = {name: random_arrays(i, 0.3) for i, name in enumerate(FIVE)}
    exact = total([{n: a.astype(np.float64) / 5 for n, a in given[p].items()} for p in FIVE])
    errors = []
    for number in range(1, 13):
        uploads = [round_.upload(p, given[p], "--round", number, out=f"{p}.{number}") for p in FIVE]
        result = round_.aggregate(uploads, out=f"{number}.enc")
        opened = round_.opened(round_.release(result, out=f"{number}.release"), "a")
        errors.append(np.concatenate([(opened[n] - exact[n]).ravel() for n in exact]))
    ulps = np.array(errors) * ONE
    assert np.abs(ulps).max() < 5
    assert abs(ulps.mean()) < 5 * np.sqrt(5 / 4 / ulps.size)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_model_over_three_rounds_is_w_minus_the_sums(new_round: NewRound, cipher: str) -> None:
    round_ = new_round(FIVE, "--cipher", cipher)
    initial = random_arrays(100, 0.5)
    w0 = round_.save("w0.safetensors", initial)
    current = {n: np.rint(a.astype(np.float64) * ONE) for n, a in initial.items()}
    model, plain = w0, w0
    for number in (1, 2, 3):
        given = {p: random_arrays(10 * number + i, 0.2) for i, p in enumerate(FIVE)}
        uploads = round_.uploads(
            given, "--model", plain, "--rounding", "nearest", "--lr", 0.5, tag=f".{number}"
        )
        source = ("--initial", model) if number == 1 else ("--model", model)
        model = round_.aggregate(uploads, *source, out=f"model-{number}.enc")
        release = round_.release(model, out=f"model-{number}.release")
        plain = round_.open_all(release, out=f"w{number}.safetensors")
        step = total([as_integers(given[p], 1 / 5, 0.5) for p in FIVE])
        current = {n: current[n] - step[n] for n in current}
        for name, array in load_file(plain).items():
            assert (array.astype(np.float64) * ONE == current[name]).all()


@pytest.mark.parametrize("cipher", CIPHERS)
def test_every_residue_opens_with_python_paillier(new_round: NewRound, cipher: str) -> None:
    round_ = new_round(THREE, "--cipher", cipher)
    w0 = round_.save("w0.safetensors", random_arrays(7, 0.5))
    given = {p: random_arrays(i) for i, p in enumerate(round_.names)}
    uploads = round_.uploads(given, "--model", w0)
    model = round_.aggregate(uploads, "--initial", w0, out="model.enc")
    plain_sum = round_.aggregate(uploads, out="sum.enc")
    center = round_.opened_key("kgc").secrets
    assert isinstance(center, KgcSecrets)
    private = PaillierPrivateKey(PaillierPublicKey(center.p * center.q), center.p, center.q)
    a, b = round_.opened_key("server").half, round_.opened_key("bob").half
    for path in (*uploads, model, plain_sum):
        ciphertext = residues_of(path)
        half = scheme.apply_half(round_.job.public_key, ciphertext, a)
        weak = scheme.open_blocks(
            round_.job.public_key, scheme.apply_half(round_.job.public_key, half, b)
        )
        strong = [private.raw_decrypt(c) for c in residues.to_integers(ciphertext[:, 1:])]
        assert strong == residues.to_integers(weak)


@pytest.mark.parametrize("holder", ["server", "alice"])
def test_neither_half_opens_an_upload_or_a_model(new_round: NewRound, holder: str) -> None:
    round_ = new_round()
    w0 = round_.save("w0.safetensors", random_arrays(7, 0.5))
    given = {p: random_arrays(i) for i, p in enumerate(round_.names)}
    uploads = round_.uploads(given, "--model", w0)
    model = round_.aggregate(uploads, "--initial", w0)
    half = round_.opened_key(holder).half
    key = round_.job.public_key
    for path in (uploads[0], model):
        left = scheme.apply_half(key, residues_of(path), half)
        with pytest.raises(VerificationError):
            scheme.open_blocks(key, left)
        # Not one of the blocks is bare, so nothing can be read off by leaving out the check.
        assert all(c % key.n not in (1, key.n - 1) for c in residues.to_integers(left[:, 1:]))


@pytest.mark.parametrize("cipher", CIPHERS)
def test_bulk_files_open_with_the_stock_library(new_round: NewRound, cipher: str) -> None:
    round_ = new_round(THREE, "--cipher", cipher)
    w0 = round_.save("w0.safetensors", random_arrays(7))
    given = {p: random_arrays(i) for i, p in enumerate(round_.names)}
    uploads = round_.uploads(given, "--model", w0)
    model = round_.aggregate(uploads, "--initial", w0)
    count, slot_bits = (335, 24) if cipher == "direct" else (256, 28)
    groups = -(-count // (7 * ((512 - 2) // slot_bits)))
    body = {"body"} if cipher == "lattice" else set()
    release = round_.release(model)
    for path, more in ((uploads[0], {"proof"}), (model, set()), (release, {"sealed"})):
        with safe_open(path, "np") as file:
            assert set(file.keys()) == {"residues"} | body | more
            assert file.get_tensor("residues").shape == (groups, 8, 128)
            if body:  # one polynomial: 335 values in 48 coefficients of 7 slots
                assert file.get_tensor("body").shape == (25 * 48,)
            assert set(file.metadata()) == {"dtl", "signature"}
    with safe_open(release, "np") as file:
        proof = 14 * 128 + 7 * -(-(256 + 257) // 8)
        assert file.get_slice("sealed").get_shape() == [groups * 7 * 128 + proof + 16]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_dtypes_and_formats(new_round: NewRound, dtype: str, suffix: str) -> None:
    round_ = new_round()
    arrays = {"x": (np.arange(-50, 50) / 64).astype(dtype), "empty": np.zeros((0, 3), dtype)}
    arrays["scalar"] = np.array(0.25, dtype)
    source = round_.folder / f"g.{suffix}"
    if suffix == "npz":
        np.savez_compressed(source, **arrays)  # type: ignore[arg-type]
    else:
        save_file(arrays, source)
    uploads = []
    for name in round_.names:
        out = round_.folder / f"{name}.upload"
        options = ("--round", 1, "--rounding", "nearest", "--weight", 0.25)
        round_.dtl("encrypt-grads", source, "--key", round_.key(name), "-o", out, *options)
        uploads.append(out)
    release = round_.release(round_.aggregate(uploads))
    out = round_.open(release, "alice", out=f"opened.{suffix}")
    opened = dict(np.load(out)) if suffix == "npz" else load_file(out)
    opened.pop("__dtl__", None)
    assert set(opened) == set(arrays)
    for name, array in opened.items():
        assert array.dtype == np.dtype(dtype)
        assert array.shape == arrays[name].shape
        assert (array.astype(float) == 0.75 * arrays[name].astype(float)).all()


def test_the_models_dtype_wins(new_round: NewRound) -> None:
    round_ = new_round()
    w0 = round_.save("w0.safetensors", {"x": np.ones(5, np.float16)})
    given = {p: {"x": np.full(5, 0.5, np.float64)} for p in round_.names}
    uploads = round_.uploads(given, "--model", w0)
    opened = round_.opened(round_.release(round_.aggregate(uploads, "--initial", w0)), "bob")
    assert opened["x"].dtype == np.float16
    assert (opened["x"] == 0.5).all()


@pytest.mark.parametrize("cipher", CIPHERS)
def test_workers_do_not_change_the_result(new_round: NewRound, cipher: str) -> None:
    round_ = new_round(THREE, "--cipher", cipher)
    generator = np.random.default_rng(3)
    given = {p: {"x": generator.normal(0, 0.1, 60000).astype(np.float32)} for p in round_.names}
    options = ("--rounding-seed", 7)
    uploads = round_.uploads(given, "--workers", 2, *options)
    both = [
        round_.aggregate(uploads, "--workers", workers, out=f"{workers}.enc") for workers in (1, 2)
    ]
    assert both[0].read_bytes() == both[1].read_bytes()
    release = round_.release(both[0], "--workers", 2)
    opened = [
        load_file(round_.open(release, "alice", "--workers", workers, out=f"{workers}.safetensors"))
        for workers in (1, 2)
    ]
    assert (opened[0]["x"] == opened[1]["x"]).all()
    exact = sum(array["x"].astype(np.float64) for array in given.values()) / 3
    assert np.abs(opened[0]["x"] - exact).max() < 3 / ONE


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_fixed_rounding_seed_repeats_the_rounding_and_nothing_else(
    new_round: NewRound, cipher: str
) -> None:
    round_ = new_round(THREE, "--cipher", cipher)
    arrays = random_arrays(5)
    uploads = [
        round_.upload("alice", arrays, "--round", n, "--rounding-seed", "s", out=f"{n}.upload")
        for n in (1, 2)
    ]
    first, second = (residues_of(path) for path in uploads)
    assert not (first == second).all(axis=-1).any()
    opened = []
    for path in uploads:
        out = path.with_suffix(".safetensors")
        round_.dtl("audit", path, "--key", round_.key("kgc"), "--plaintext", out)
        opened.append(load_file(out))
    assert all((opened[0][name] == opened[1][name]).all() for name in arrays)
    assert any((opened[0][name] * 3 != arrays[name]).any() for name in arrays)  # it was rounded


@pytest.mark.parametrize("cipher", CIPHERS)
def test_clamped_values_are_told_to_the_participant_only(
    new_round: NewRound, dtl: Cli, cipher: str
) -> None:
    round_ = new_round(THREE, "--cipher", cipher)
    source = round_.save("g.safetensors", {"x": np.array([0.0, 99.0, -99.0], np.float32)})
    out = round_.folder / "u"
    key = round_.key("alice")
    result = dtl("encrypt-grads", source, "--round", 1, "--key", key, "-o", out, "--json")
    assert result.json["clamped"] == 2
    assert "clamp" not in out.read_bytes().decode("latin-1")


def test_the_same_result_again_is_the_same_file(new_round: NewRound) -> None:
    round_ = new_round()
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(round_.names)})
    first = round_.aggregate(uploads)
    again = round_.aggregate(list(reversed(uploads)), out="again.enc")
    assert first.read_bytes() == again.read_bytes()
    round_.release(first)
    round_.release(again, out="again.release")


def test_gradients_and_models_carry_their_basis(new_round: NewRound, dtl: Cli) -> None:
    round_ = new_round()
    shards = round_.folder / "shards"
    dtl("split-data", "breast_cancer", "--participants", ",".join(round_.names), "--out", shards)
    w0, w1 = round_.folder / "w0.safetensors", round_.folder / "w1.npz"
    dtl("init-model", "--data", shards / "bob.npz", "--hidden", "4", "-o", w0)
    result = None
    for number, model in ((1, w0), (2, w1)):
        uploads = []
        for name in round_.names:
            gradients, upload = (round_.folder / f"{name}{number}{s}" for s in (".npz", ".upload"))
            dtl(
                "compute-grads", "--model", model, "--data", shards / f"{name}.npz", "-o", gradients
            )
            dtl("encrypt-grads", gradients, "--key", round_.key(name), "-o", upload)
            uploads.append(upload)
        source = ("--initial", w0) if result is None else ("--model", result)
        result = round_.aggregate(uploads, *source, out=f"{number}.enc")
        release = round_.release(result, out=f"{number}.release")
        round_.open_all(release, out=f"w{number}.npz")
    before, after = (
        dtl("evaluate", "--model", m, "--data", shards / "test.npz", "--json").json
        for m in (w0, round_.folder / "w2.npz")
    )
    assert after["loss"] < before["loss"]
    described = dtl("inspect", round_.folder / "w2.npz", "--json").json
    assert described["round"] == 2


def test_progress_counts_values_and_tells_the_rate_on_a_terminal(new_round: NewRound) -> None:
    round_ = new_round()
    gradients = round_.save("g.safetensors", {"x": np.ones(60_000, np.float32)})
    command = [
        *(sys.executable, "-c", "from dtl.cli.app import main; main()", "encrypt-grads"),
        *(str(gradients), "--round", "1", "--key", str(round_.key("alice"))),
        *("-o", str(round_.folder / "u")),
    ]
    seen = io.BytesIO()
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stderr=slave, stdout=subprocess.PIPE, env=environment):
        os.close(slave)
        with contextlib.suppress(OSError):  # how a terminal says that nobody is there any more
            while part := os.read(master, 1 << 16):
                seen.write(part)
    os.close(master)
    text = seen.getvalue().decode()
    assert "encrypt" in text
    assert "100%" in text
    assert re.search(r"[0-9.]+ [kM]/s", text)
