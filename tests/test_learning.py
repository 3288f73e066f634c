"""Local training, against scikit-learn's own gradient and finite differences."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtl.core.errors import FormatError, UsageError
from dtl.core.files.schema import FORMAT
from dtl.core.files.shards import Shard, load_shard
from dtl.core.files.tensor_writer import write_arrays
from dtl.core.files.tensors import PlainMetadata, open_tensors, read_arrays, weights_metadata
from dtl.core.learning import mlp, split
from tests.helpers import Cli, Result

NAMES = ("alice", "bob", "carol")


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, Shard]:
    options = split.SplitOptions(NAMES, seed=3)
    return split.split_data("breast_cancer", tmp_path / "shards", options)


@pytest.mark.parametrize("source", ["digits", "breast_cancer"])
def test_the_gradient_is_that_of_the_loss(source: str, tmp_path: Path) -> None:
    data = split.split_data(source, tmp_path / "s", split.SplitOptions(NAMES))["bob"]
    weights = mlp.init_model(tmp_path / "s" / "bob.npz", tmp_path / "w.npz", (5, 3), seed=1)
    found = mlp.local_update(weights, data, mlp.LocalTraining(), "w")
    generator = np.random.default_rng(0)
    for name in weights:
        flat = generator.integers(weights[name].size, size=4)
        for index in flat:
            step, losses = 1e-5, []
            for sign in (1, -1):
                moved = {n: a.copy() for n, a in weights.items()}
                moved[name].ravel()[index] += sign * step
                losses.append(mlp.score(moved, data, "w")[1])
            numeric = (losses[0] - losses[1]) / (2 * step)
            assert found[name].ravel()[index] == pytest.approx(numeric, abs=1e-6)


def test_local_epochs_lower_the_loss_and_are_repeatable(
    shards: dict[str, Shard], tmp_path: Path
) -> None:
    weights = mlp.init_model(tmp_path / "shards" / "bob.npz", tmp_path / "w.npz", (8,))
    training = mlp.LocalTraining(epochs=5, seed=2)
    first, again = (mlp.local_update(weights, shards["bob"], training, "w") for _ in range(2))
    assert all((first[name] == again[name]).all() for name in weights)
    other = mlp.local_update(weights, shards["bob"], mlp.LocalTraining(epochs=5, seed=3), "w")
    assert any((first[name] != other[name]).any() for name in weights)
    trained = {name: weights[name] - first[name] for name in weights}
    assert mlp.score(trained, shards["bob"], "w")[1] < mlp.score(weights, shards["bob"], "w")[1]


def test_initial_weights_are_repeatable_and_name_themselves(tmp_path: Path) -> None:
    split.split_data("digits", tmp_path / "s", split.SplitOptions(NAMES))
    paths = [tmp_path / name for name in ("a.safetensors", "b.npz")]
    digests = []
    for path in paths:
        mlp.init_model(tmp_path / "s" / "bob.npz", path, (6,), seed=4)
        source = open_tensors(path)
        known = weights_metadata(source)
        source.close()
        assert known.round == 0
        assert known.base == known.opened
        digests.append(known.base)
    assert digests[0] == digests[1], "the digest does not depend on the file format"


def test_shards_are_disjoint_complete_and_seeded(tmp_path: Path) -> None:
    def rows(folder: str, **options: float) -> dict[str, set[bytes]]:
        wanted = split.SplitOptions(NAMES, **options)  # type: ignore[arg-type]
        made = split.split_data("breast_cancer", tmp_path / folder, wanted)
        return {
            name: {row.tobytes() for row in load_shard(tmp_path / folder / f"{name}.npz").x}
            for name in made
        }

    first = rows("1", seed=1)
    assert sum(map(len, first.values())) == len(set.union(*first.values())) == 569
    assert len(first["test"]) == 114
    assert rows("2", seed=1) == first
    assert rows("3", seed=2) != first
    uneven = rows("4", alpha=0.3)
    assert sum(map(len, uneven.values())) == 569


def test_small_alpha_makes_uneven_shards(tmp_path: Path) -> None:
    def spread(alpha: float | None) -> float:
        options = split.SplitOptions(NAMES, alpha=alpha)
        made = split.split_data("digits", tmp_path / f"{alpha}", options)
        shares = [np.bincount(made[n].y, minlength=10) / len(made[n].y) for n in NAMES]
        return float(np.std(shares, axis=0).mean())

    assert spread(0.2) > 3 * spread(None)


def test_own_data_as_csv_and_npz(dtl: Cli, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(60, 3)), np.array(["no", "yes"])[generator.integers(2, size=60)]
    lines = [
        "a,b,c,label",
        *(",".join(map(str, row)) + f",{label}" for row, label in zip(x, y, strict=True)),
    ]
    (tmp_path / "own.csv").write_text("\n".join(lines) + "\n")
    np.savez(tmp_path / "own.npz", X=x, y=y)
    for source in ("own.csv", "own.npz"):
        out = tmp_path / source.replace(".", "-")
        command = ("split-data", tmp_path / source, "--participants", "a,b", "--out", out)
        report = dtl(*command, "--json").json
        assert report["samples"] == {"a": 24, "b": 24, "test": 12}
        assert report["classes"] == ["no", "yes"]
    first, second = (load_shard(tmp_path / f"own-{kind}" / "a.npz").x for kind in ("csv", "npz"))
    assert np.allclose(first, second)


def test_evaluate_and_inspect_tell_what_there_is(dtl: Cli, tmp_path: Path) -> None:
    dtl("split-data", "digits", "--participants", "a,b,c", "--out", tmp_path / "s")
    shard, model = tmp_path / "s" / "test.npz", tmp_path / "w.npz"
    dtl("init-model", "--data", shard, "--hidden", "16,8", "-o", model)
    report = dtl("evaluate", "--model", model, "--data", shard, "--json").json
    assert report["samples"] == 359
    assert 0 <= report["accuracy"] <= 0.5
    assert dtl("inspect", shard, "--json").json["features"] == 64
    described = dtl("inspect", model, "--json").json
    assert described["tensors"]["layer2.weight"] == "F32 [16, 8]"
    assert described["round"] == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"participants": ()}, UsageError),
        ({"participants": ("test",)}, UsageError),
        ({"participants": ("../x",)}, UsageError),
        ({"participants": ("аlice",)}, UsageError),  # its first letter is Cyrillic
        ({"test": 0.0}, UsageError),
        ({"test": float("nan")}, UsageError),
        ({"alpha": -1.0}, UsageError),
        ({"alpha": 1e-9}, UsageError),
        ({"participants": tuple(map(str, range(400)))}, UsageError),
    ],
)
def test_impossible_splits(tmp_path: Path, options: dict[str, object], error: type) -> None:
    wanted = split.SplitOptions(**({"participants": NAMES} | options))  # type: ignore[arg-type]
    with pytest.raises(error):
        split.split_data("breast_cancer", tmp_path / "s", wanted)
    assert not (tmp_path / "s").exists()


def test_a_model_for_other_data_is_refused(dtl: Cli, tmp_path: Path) -> None:
    for name in ("digits", "breast_cancer"):
        dtl("split-data", name, "--participants", "a", "--out", tmp_path / name)
    model = tmp_path / "w.npz"
    dtl("init-model", "--data", tmp_path / "digits" / "a.npz", "-o", model)
    other = tmp_path / "breast_cancer" / "a.npz"
    dtl("evaluate", "--model", model, "--data", other, code=3)
    dtl("compute-grads", "--model", model, "--data", other, "-o", tmp_path / "g.npz", code=3)
    dtl("init-model", "--data", other, "--hidden", "0", "-o", tmp_path / "x.npz", code=2)
    dtl("init-model", "--data", other, "--hidden", "a", "-o", tmp_path / "x.npz", code=2)


@pytest.mark.parametrize(
    "text", ["", "a,b\n", "a,b\n1,x\n1,2,x\n", "a,b\nz,x\nq,y\n", "a,b\n1,x\n2,x\n"]
)
def test_bad_csv(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(FormatError):
        split.load_source(str(path))


def test_shards_appear_together_and_an_interrupted_split_is_completed(
    dtl: Cli, tmp_path: Path
) -> None:
    def again(code: int = 0) -> Result:
        out = tmp_path / "shards"
        return dtl("split-data", "digits", "--participants", "a,b", "--out", out, code=code)

    again()
    shards = {path: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert len(shards) == 3
    again(code=2)
    first = min(shards)
    first.unlink()
    again()
    assert {path: path.read_bytes() for path in (tmp_path / "shards").iterdir()} == shards
    first.write_bytes(b"another one's")
    again(code=2)
    assert first.read_bytes() == b"another one's"


def test_a_step_and_its_state_appear_together(dtl: Cli, tmp_path: Path) -> None:
    dtl("split-data", "digits", "--participants", "a", "--out", tmp_path / "shards")
    data, model, total = (tmp_path / name for name in ("shards/a.npz", "w.npz", "sum.npz"))
    dtl("init-model", "--data", data, "--hidden", 2, "-o", model)
    gradients, metadata = read_arrays(model)
    assert metadata is not None
    write_arrays(total, gradients, "F32", metadata.model_copy(update={"kind": "sum", "round": 1}))
    out, state, other = (tmp_path / name for name in ("out.npz", "state.npz", "other.npz"))

    def step(*more: object, code: int = 0) -> Result:
        words = ("--model", model, "--optimizer", "adam", "--state-out", state, "-o", out)
        return dtl("apply-sum", total, *words, *more, code=code)

    dtl("evaluate", "--model", total, "--data", data, code=3)  # a sum is no model
    for lr in (1e300, 1e308):
        assert "hint: take a smaller --lr" in step("--lr", lr, code=7).err
    step("-o", tmp_path / "out.txt", code=2)
    assert not state.exists()
    step()
    held = state.read_bytes()
    out.unlink()
    os.link(state, tmp_path / ".state.npz.0123456789abcdef.partial")
    step()  # an interrupted run is completed
    assert not list(tmp_path.glob(".*"))
    out.rename(other)
    step("--state", state, code=2)
    held_arrays, _ = read_arrays(state)
    square = next(name for name in held_arrays if name.startswith("square."))
    steps = [{"steps": np.full(1, count)} for count in (-1.0, 0.0, 1.5)]
    changes: list[dict[str, Any]] = [
        *steps,
        {"steps": np.ones(())},
        {square: -1 - held_arrays[square]},
    ]
    wrongs = [{"x": np.ones(1)}, *({**held_arrays, **change} for change in changes)]
    for wrong in wrongs:
        write_arrays(other, wrong, "F64", None, True)
        step("--state", other, "--state-out", tmp_path / "next.npz", code=3)
    name = max(held_arrays)
    write_arrays(other, held_arrays | {name: np.ones((3, 5))}, "F64", None, True)
    step("--state", other, "--state-out", tmp_path / "next.npz", code=3)
    assert (state.read_bytes(), out.exists()) == (held, False)
    step("--state", state, "--force", code=2)  # if it were interrupted, a rerun would step twice
    assert state.read_bytes() == held
    plain = ("apply-sum", total, "--model", model, "--optimizer", "sgd", "-o", out)
    assert "sgd remembers nothing" in dtl(*plain, "--state", state, code=2).err
    dtl(*plain)
    out.unlink()
    step("--state", state, "--state-out", tmp_path / "next.npz")


def test_a_sum_is_applied_once_and_to_a_model(dtl: Cli, tmp_path: Path) -> None:
    weights = {"a": np.ones(3)}
    files = [tmp_path / name for name in ("w0.npz", "sum-1.npz", "sum-2.npz", "w1.npz", "w2.npz")]
    start, first, second, one, two = files
    for path, kind, number in ((start, "weights", 0), (first, "sum", 1), (second, "sum", 2)):
        base = str(number) * 128
        known = {"kind": kind, "round": number, "base": base, "opened": base, "content": None}
        write_arrays(path, weights, "F32", PlainMetadata.check({"format": FORMAT, **known}, ""))

    def step(total: Path, model: Path, out: Path, *more: object, code: int = 0) -> Result:
        return dtl("apply-sum", total, "--model", model, "-o", out, *more, code=code)

    shown = step(first, start, one, "--json")
    assert (shown.json["round"], shown.json["base"]) == (1, "1" * 128)
    again = step(first, one, two, code=3)
    assert "expected a model of a round before 1" in again.err
    step(second, first, two, code=3)  # a sum is no model
    adam = ("--optimizer", "adam", "--state-out", tmp_path / "s2.npz")
    assert "adam begins anew" in step(second, one, two, *adam).err
    step(first, two, tmp_path / "x.npz", code=3)
    plain = tmp_path / "plain.npz"
    write_arrays(plain, weights, "F32", None)
    assert not step(second, plain, tmp_path / "y.npz").err
