"""Plain files from other programs, and to them: what they may hold, and who may read them."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from dtl.core.files.tensors import load_arrays, read_arrays
from tests.helpers import THREE, Cli, Round, random_arrays

NewRound = Callable[..., Round]


def test_a_model_that_another_program_saved_again_is_noticed(new_round: NewRound) -> None:
    round_ = new_round(("a", "b", "c", "d"))
    w0 = round_.save("w0.safetensors", random_arrays(7, 0.5))
    uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate("abc")}, "--model", w0)
    release = round_.release(round_.aggregate(uploads, "--initial", w0), "--admit", "d")
    opened = round_.open(release, "d")
    again = round_.save("again.safetensors", load_file(opened))
    gradients = round_.save("g.safetensors", random_arrays(1))
    command = ("encrypt-grads", gradients, "--key", round_.key("d"), "-o", round_.folder / "x")
    error = round_.dtl(*command, "--model", again, code=5).err
    assert "has opened round 1 already" in error
    assert "open-model wrote" in error
    round_.dtl(*command, "--model", opened)


def test_a_file_of_torch_save_is_named_as_such(new_round: NewRound, tmp_path: Path) -> None:
    round_ = new_round()
    path = tmp_path / "g.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("g/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("g/version", b"3\n")
    command = ("encrypt-grads", path, "--key", round_.key("alice"), "--round", 1)
    error = round_.dtl(*command, "-o", tmp_path / "u", code=3).err
    assert "torch.save" in error
    assert "safetensors.torch.save_file" in error


def test_clamping_is_told_even_when_quiet(new_round: NewRound) -> None:
    round_ = new_round()
    gradients = round_.save("g.safetensors", {"x": np.array([0.1, 100.0, -100.0], np.float32)})
    command = ("encrypt-grads", gradients, "--key", round_.key("alice"), "--round", 1, "--quiet")
    told = round_.dtl(*command, "-o", round_.folder / "u")
    assert not told.out
    assert "2 of 3 values were clamped" in told.err


def test_a_differing_tensor_is_named(new_round: NewRound) -> None:
    round_ = new_round()
    w0 = round_.save("w0.safetensors", {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)})
    for given, found in (
        ({"a": np.zeros(2), "b": np.zeros((3, 1))}, "'b': expected [3], found [3, 1]"),
        ({"a": np.zeros(2)}, "'b': expected [3], found none"),
        ({"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(1)}, "'c': expected none, found [1]"),
    ):
        gradients = round_.save("g.safetensors", given)
        command = ("encrypt-grads", gradients, "--key", round_.key("alice"), "--model", w0)
        assert found in round_.dtl(*command, "-o", round_.folder / "x", code=3).err


def test_plaintext_is_private_and_initial_weights_are_not(
    new_round: NewRound, dtl: Cli, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        round_ = new_round()
        shards, w0, grads = tmp_path / "s", tmp_path / "w0.npz", tmp_path / "g.npz"
        dtl("split-data", "breast_cancer", "--participants", "alice,bob,carol", "--out", shards)
        dtl("init-model", "--data", shards / "bob.npz", "-o", w0)
        dtl("compute-grads", "--model", w0, "--data", shards / "bob.npz", "-o", grads)
        uploads = round_.uploads({p: random_arrays(i) for i, p in enumerate(THREE)})
        result = round_.aggregate(uploads)
        opened = round_.open(round_.release(result), "alice")
        recovered = tmp_path / "recovered.npz"
        dtl("audit", result, "--key", round_.key("kgc"), "--plaintext", recovered)
    finally:
        os.umask(before)
    for path in (shards / "bob.npz", grads, opened, recovered):
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert w0.stat().st_mode & 0o777 == 0o666


def test_gradients_name_the_content_of_the_model_they_were_computed_on(
    dtl: Cli, tmp_path: Path
) -> None:
    shards, w0, grads = tmp_path / "s", tmp_path / "w0.npz", tmp_path / "g.safetensors"
    dtl("split-data", "breast_cancer", "--participants", "alice,bob,carol", "--out", shards)
    shard = shards / "alice.npz"
    dtl("init-model", "--data", shard, "-o", w0)
    model = load_arrays(w0)
    assert model.metadata is not None
    assert model.metadata.content == model.content
    changed = tmp_path / "changed.safetensors"
    arrays = {name: np.nextafter(a, 1, dtype=np.float32) for name, a in model.arrays.items()}
    opened = model.metadata.model_copy(update={"round": 1, "base": "5" * 128})
    save_file(arrays, changed, {"dtl": opened.encode().decode()})
    for path in (w0, changed):
        grads.unlink(missing_ok=True)
        dtl("compute-grads", "--model", path, "--data", shard, "-o", grads)
        _, known = read_arrays(grads)
        assert known is not None
        assert known.content == load_arrays(path).content
