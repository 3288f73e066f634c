"""`dtl simulate`: a whole training run, held against independent arithmetic and by hand."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dtl.core.errors import UsageError
from dtl.core.learning import optimizers
from dtl.core.learning.simulation import options
from dtl.core.learning.simulation import run as simulation_run
from dtl.core.learning.simulation.journal import Journal, Step
from dtl.core.roles import participant
from tests.helpers import Arrays, Cli

Simulate = Callable[..., Path]
SMALL = ("--modulus-bits", 512, "--insecure", "--hidden", 6)


@pytest.fixture
def simulate(dtl: Cli, tmp_path: Path, fixed_primes: None) -> Simulate:
    """Run a simulation at insecure size; returns its folder."""

    def run(source: str, *wanted: object, out: str = "run", code: int = 0) -> Path:
        folder = tmp_path / out
        dtl("simulate", source, *SMALL, *wanted, "--out", folder, "--quiet", code=code)
        return folder

    return run


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def file_of(folder: Path, number: int, name: str) -> Path:
    return folder / "rounds" / f"{number:03}" / name


def integers(arrays: Arrays, bits: int = 16) -> dict[str, list[int]]:
    """Values as plain Python integers, which they must be exactly."""
    scaled = {name: array.astype(np.float64).ravel() * 2**bits for name, array in arrays.items()}
    assert all((values == np.rint(values)).all() for values in scaled.values())
    return {name: [int(value) for value in values] for name, values in scaled.items()}


@pytest.mark.parametrize(
    ("source", "cipher"),
    [("digits", "lattice"), ("digits", "direct"), ("breast_cancer", "lattice")],
)
def test_every_round_is_exact_by_independent_arithmetic(
    source: str, cipher: str, simulate: Simulate
) -> None:
    wanted = ("--participants", 4, "--rounds", 3, "--rounding", "nearest", "--cipher", cipher)
    folder = simulate(source, *wanted)
    report = report_of(folder)
    shares = {
        name: count / sum(report["samples"].values()) for name, count in report["samples"].items()
    }
    weights = {
        name: [round(float(value) * 2**16) for value in array.ravel()]
        for name, array in load_file(folder / "w0.safetensors").items()
    }
    for number in (1, 2, 3):
        for name, share in shares.items():
            sent = load_file(file_of(folder, number, f"{name}.grads.safetensors"))
            for tensor, array in sent.items():
                for place, value in enumerate(array.ravel()):
                    weights[tensor][place] -= round(float(value) * share * 2**16)
        for name in shares:
            opened = file_of(folder, number, f"{name}.model.safetensors")
            assert integers(load_file(opened)) == weights
    assert integers(load_file(folder / "model.safetensors")) == weights
    assert report["summary"]["rounds_identical_to_twin"] == 3
    assert report["twin"] == [record["opened"] for record in report["rounds"]]


@pytest.mark.parametrize("wanted", [("--lr", 0.05), ("--local-epochs", 0, "--weights", "equal")])
def test_the_scores_are_those_of_the_models(
    wanted: tuple[object, ...], simulate: Simulate, dtl: Cli
) -> None:
    folder = simulate("digits", "--rounds", 2, "--alpha", 0.5, *wanted)
    report = report_of(folder)
    test = folder / "shards" / "test.npz"
    for model, scores in (
        (folder / "w0.safetensors", report["scores"][0]),
        (file_of(folder, 1, "bob.model.safetensors"), report["scores"][1]),
        (folder / "model.safetensors", report["scores"][2]),
    ):
        found = dtl("evaluate", "--model", model, "--data", test, "--json").json
        assert found["accuracy"] == pytest.approx(scores["encrypted"]["accuracy"])
        assert found["loss"] == pytest.approx(scores["encrypted"]["loss"])


def gradient(weights: Arrays, x: Any, y: Any) -> tuple[Arrays, float, float]:
    """The gradient of a network with one hidden layer, its accuracy and loss, in plain numpy."""
    w1, b1, w2, b2 = (weights[f"layer{n}.{kind}"] for n in (1, 2) for kind in ("weight", "bias"))
    hidden = np.maximum(0, x @ w1 + b1)
    scores = hidden @ w2 + b2
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    right = chances[np.arange(len(y)), y]
    wrong = chances.copy()
    wrong[np.arange(len(y)), y] -= 1
    wrong /= len(y)
    back = (wrong @ w2.T) * (hidden > 0)
    found = {
        "layer1.weight": x.T @ back,
        "layer1.bias": back.sum(axis=0),
        "layer2.weight": hidden.T @ wrong,
        "layer2.bias": wrong.sum(axis=0),
    }
    accuracy = float(np.mean(chances.argmax(axis=1) == y))
    return found, accuracy, float(-np.log(right).mean())


@pytest.mark.parametrize("weights", ["equal", "samples"])
def test_what_it_is_held_against_by_plain_numpy(weights: str, simulate: Simulate) -> None:
    wanted = ("--local-epochs", 0, "--lr", 0.7, "--alpha", 0.5, "--weights", weights)
    folder = simulate("digits", *wanted, "--participants", 3, "--rounds", 4)
    report, names = report_of(folder), ("alice", "bob", "carol")
    shards = {name: np.load(folder / "shards" / f"{name}.npz") for name in (*names, "test")}
    data = {name: (shard["x"], shard["y"]) for name, shard in shards.items()}
    sizes = {name: len(data[name][1]) for name in names}
    assert len(set(sizes.values())) > 1, "with equal shards both weights are the same"
    shares = {
        name: 1 / 3 if weights == "equal" else sizes[name] / sum(sizes.values()) for name in names
    }
    pooled = tuple(np.concatenate([data[name][k] for name in names]) for k in (0, 1))
    start = {n: a.astype(np.float64) for n, a in load_file(folder / "w0.safetensors").items()}

    def moved(at: Arrays, along: Arrays) -> Arrays:
        return {name: at[name] - 0.7 * along[name] for name in at}

    together, central, alone = start, start, dict.fromkeys(names, start)
    for number in range(5):
        expected = {"float": together, "central": central, **alone}
        scores = report["scores"][number]
        for name, at in expected.items():
            found = scores[name] if name in scores else scores["alone"][name]
            _, accuracy, loss = gradient(at, *data["test"])
            assert found["accuracy"] == pytest.approx(accuracy)
            assert found["loss"] == pytest.approx(loss, abs=1e-7)
        steps = {name: gradient(together, *data[name])[0] for name in names}
        total = {
            t: np.sum([shares[name] * steps[name][t] for name in names], axis=0) for t in start
        }
        together = moved(together, total)
        central = moved(central, gradient(central, *pooled)[0])
        alone = {name: moved(alone[name], gradient(alone[name], *data[name])[0]) for name in names}


@pytest.mark.slow
def test_thirty_rounds_train_as_well_as_in_the_clear(simulate: Simulate) -> None:
    wanted = ("--participants", 5, "--rounds", 30, "--alpha", 0.3, "--hidden", 32)
    found = report_of(simulate("digits", *wanted))["summary"]
    assert found["rounds_identical_to_twin"] == 30
    assert found["accuracy"] >= 95
    assert abs(found["points_below_float"]) <= 0.5
    assert found["points_above_alone"] >= 10


def test_bytes_and_views_are_those_of_the_files(simulate: Simulate, dtl: Cli) -> None:
    folder = simulate("digits", "--participants", 4, "--rounds", 4, "--drop", 0.2, "--seed", 0)
    report = report_of(folder)
    parties = {party["name"]: party for party in report["parties"]}
    names = report["options"]["participants"]
    uploads = {name: list(folder.glob(f"rounds/*/{name}.upload")) for name in names}
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    sent_by_server = 0
    for name in names:
        reveals = list(folder.glob(f"rounds/*/{name}.reveal"))
        opened = list(folder.glob(f"rounds/*/{name}.model.safetensors"))
        received = [path.parent / "model.release" for path in opened]
        received += [path.parent / "round.close" for path in reveals]
        party = parties[name]
        assert party["sent_bytes"] == sum(p.stat().st_size for p in (*uploads[name], *reveals))
        assert party["received_bytes"] == sum(path.stat().st_size for path in received)
        sent_by_server += party["received_bytes"]
        own = dtl("inspect", folder / "job" / f"{name}.ledger", "--json").out
        assert party["saw"] == {
            "encrypted_uploads": len(uploads[name]),
            "encrypted_results": 0,
            "own_gradients": len(list(folder.glob(f"rounds/*/{name}.grads.safetensors"))),
            "opened_results": len(opened),
            "gradients_of_others": 0,
        }, own
        times = {step["step"]: step["times"] for step in party["steps"]}
        assert times.get("encrypt-grads", 0) == len(uploads[name])
        for step in party["steps"]:
            own_steps = [j for j in journal if (j["party"], j["step"]) == (name, step["step"])]
            assert step["seconds"] == pytest.approx(sum(j["seconds"] for j in own_steps), abs=1e-3)
    server = parties["server"]
    assert server["sent_bytes"] == sent_by_server
    assert server["received_bytes"] == sum(parties[name]["sent_bytes"] for name in names)
    assert server["saw"]["encrypted_uploads"] == sum(map(len, uploads.values()))
    assert server["saw"]["encrypted_results"] == len(list(folder.glob("rounds/*/model.enc")))
    assert server["saw"]["opened_results"] == server["saw"]["own_gradients"] == 0


def test_with_two_contributors_each_saw_the_others_gradient(simulate: Simulate) -> None:
    wanted = ("--participants", 2, "--min-contributors", 2, "--rounds", 3)
    parties = report_of(simulate("digits", *wanted))["parties"]
    counts = {party["name"]: party["saw"]["gradients_of_others"] for party in parties}
    assert counts == {"kgc": 0, "server": 0, "alice": 3, "bob": 3}


def test_nothing_in_the_folder_is_taken_on_trust(simulate: Simulate, dtl: Cli) -> None:
    folder = simulate("digits", "--participants", 3, "--rounds", 2)
    model = file_of(folder, 2, "alice.model.safetensors")
    before, report = model.read_bytes(), report_of(folder)
    model.write_bytes(file_of(folder, 1, "alice.model.safetensors").read_bytes())
    dtl("simulate", "--resume", "--out", folder, code=4)
    arrays = load_file(file_of(folder, 1, "alice.model.safetensors"))
    with safe_open(file_of(folder, 2, "bob.model.safetensors"), "np") as file:
        model.unlink()
        save_file(arrays, model, file.metadata())  # it claims to be round 2's
    dtl("simulate", "--resume", "--out", folder, code=4)
    model.write_bytes(before)
    (folder / "journal.jsonl").unlink()
    dtl("simulate", "--resume", "--out", folder, "--quiet")
    again = report_of(folder)
    assert [step["command"] for step in again["steps"]] == [s["command"] for s in report["steps"]]
    assert all(step["seconds"] is None for step in again["steps"])
    same = ("sent_bytes", "received_bytes", "saw")
    for old, new in zip(report["parties"], again["parties"], strict=True):
        assert [old[what] for what in same] == [new[what] for what in same]


@pytest.mark.parametrize("lr", ["1e6", "1e100", "1e308"])
def test_training_that_diverges_says_so(lr: str, simulate: Simulate, dtl: Cli) -> None:
    folder = simulate("digits", "--participants", 3, "--rounds", 3, "--lr", lr, code=7)
    error = dtl("simulate", "--resume", "--out", folder, code=7).err
    assert "diverged" in error or "headroom" in error


@pytest.mark.parametrize(
    "wanted",
    [
        ("--drop", 0.2, "--seed", 0),
        pytest.param(("--drop", 0.2, "--seed", 0, "--cipher", "direct"), marks=pytest.mark.slow),
        ("--optimizer", "adam"),
    ],
)
def test_the_commands_of_a_run_do_the_same_by_hand(
    wanted: tuple[object, ...],
    simulate: Simulate,
    dtl: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = simulate("digits", "--participants", 4, "--rounds", 4, *wanted)
    report = report_of(folder)
    if "--drop" in wanted:
        assert any(record["missing"] for record in report["rounds"])
        assert not all(record["released"] for record in report["rounds"])
    by_hand = tmp_path / "by-hand"
    by_hand.mkdir()
    monkeypatch.chdir(by_hand)
    for line in (folder / "commands.sh").read_text().splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["mkdir"]:
            Path(words[-1]).mkdir(parents=True)
        elif words[:1] == ["dtl"]:
            dtl(*words[1:], "--quiet")
    last = max(record["round"] for record in report["rounds"] if record["released"])
    (opened, *_) = Path(f"rounds/{last:03}").glob("*.model.safetensors")
    by_hand_arrays, arrays = load_file(opened), load_file(folder / "model.safetensors")
    assert all((by_hand_arrays[name] == arrays[name]).all() for name in arrays)


def test_missing_participants_are_named_and_admitted_once(simulate: Simulate, dtl: Cli) -> None:
    wanted = ("--rounds", 6, "--drop", 0.3, "--seed", 19)  # with this seed, everything happens
    folder = simulate("digits", "--participants", 7, *wanted)
    report, outcomes = report_of(folder), set()
    roster = set(report["options"]["participants"])
    granted, contributed, admitted = set(roster), set[str](), set[str]()
    for record in report["rounds"]:
        able = set(record["present"]) & granted
        if not record["released"]:
            assert 3 * len(able) <= 2 * len(roster)
            outcomes.add("void")
            continue
        release = file_of(folder, record["round"], "model.release")
        told = dtl("inspect", release, "--job", folder / "job" / "job.json", "--json").json
        assert set(told["manifest"]["contributors"]) == set(record["contributors"]) == able
        assert set(told["manifest"]["missing"]) == roster - able
        contributed |= able
        granted = set(told["may_open"])
        assert granted == contributed | set(told["admitted"])
        assert not admitted & set(told["admitted"]), "admitted a second time"
        assert not (admitted - contributed) & granted, "an admission did not lapse"
        outcomes |= {"lapsed"} if admitted - contributed else set()
        admitted |= set(told["admitted"])
        outcomes |= {"contributed after admission"} if admitted & contributed else set()
    assert outcomes == {"void", "lapsed", "contributed after admission"}
    assert report["summary"]["rounds_void"] + report["summary"]["rounds_released"] == 6
    losses = [scores["encrypted"]["loss"] for scores in report["scores"]]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("after", ["rounds/001/round.json", "rounds/003"])
def test_a_killed_run_is_resumed_to_the_same_bytes(after: str, tmp_path: Path) -> None:
    def command(name: str, *wanted: str) -> list[str]:
        small = ["--modulus-bits", "512", "--insecure", "--hidden", "4", "--participants", "4"]
        drop = ["--rounds", "5", "--drop", "0.15", "--seed", "5", "--quiet"]
        start = ["digits", *small, *drop] if not wanted else list(wanted)
        code = "import sys; from dtl.cli.app import main; sys.argv[0] = 'dtl'; main()"
        return [sys.executable, "-c", code, "simulate", *start, "--out", str(tmp_path / name)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    process = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / after).exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command("killed", "--resume", "-q"), check=True, capture_output=True)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert models[0] == models[1]
    whole, killed = (report_of(tmp_path / name) for name in ("whole", "killed"))
    opened = [[record["opened"] for record in report["rounds"]] for report in (whole, killed)]
    assert opened[0] == opened[1]
    assert whole["scores"] == killed["scores"]
    assert [(s["party"], s["step"]) for s in whole["steps"]] == [
        (s["party"], s["step"]) for s in killed["steps"]
    ]


class _Stop(BaseException):
    """Nothing in the product catches this."""


@pytest.mark.slow
def test_any_step_can_be_the_last_one_done(
    simulate: Simulate, dtl: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each step in turn, before it was noted, a run goes on to the same model."""
    wanted = ("--participants", 4, "--rounds", 4, "--drop", 0.2, "--seed", 0)
    whole = (simulate("digits", *wanted) / "model.safetensors").read_bytes()
    folder = simulate("digits", *wanted, "--rounds", 1, out="stopped")
    note = Journal._note
    stopped: set[tuple[int, str, str]] = set()

    def stop_once(journal: Journal, step: Step) -> None:
        place = (step.round, step.party, step.step)
        if place not in stopped | journal._known:
            stopped.add(place)
            raise _Stop
        note(journal, step)

    monkeypatch.setattr(Journal, "_note", stop_once)
    while True:
        try:
            dtl("simulate", "--resume", "--rounds", 4, "--out", folder, "--quiet")
            break
        except _Stop:
            continue
    steps = {step for _, _, step in stopped}
    assert steps >= {"encrypt-grads", "close-round", "reveal-masks", "aggregate", "release-model"}
    assert (folder / "model.safetensors").read_bytes() == whole


def test_a_run_can_have_more_rounds_later(simulate: Simulate, dtl: Cli) -> None:
    whole = simulate("digits", "--rounds", 4, "--participants", 3)
    shorter = simulate("digits", "--rounds", 2, "--participants", 3, out="shorter")
    dtl("simulate", "digits", "--resume", "--rounds", 4, "--out", shorter, "--quiet")
    both = [(folder / "model.safetensors").read_bytes() for folder in (whole, shorter)]
    assert both[0] == both[1]
    error = dtl("simulate", "--resume", "--rounds", 3, "--out", shorter, code=2).err
    assert "--rounds: the run in" in error
    dtl("simulate", "--resume", "--alpha", 0.5, "--out", shorter, code=2)
    dtl("simulate", "breast_cancer", "--resume", "--out", shorter, code=2)
    dtl("simulate", "digits", "--out", shorter, code=2)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_participants_keep_the_model_and_the_server_adds_up(
    optimizer: str, epochs: int, simulate: Simulate, dtl: Cli
) -> None:
    wanted = ("--optimizer", optimizer, "--local-epochs", epochs, "--lr", 0.02, "--rounds", 3)
    folder = simulate("digits", *wanted, "--participants", 3)
    report = report_of(folder)
    assert report["summary"]["rounds_identical_to_twin"] == 3
    told = dtl("inspect", file_of(folder, 2, "sum.enc"), "--json").json
    assert told["file"] == "sum"
    assert not list(folder.glob("rounds/*/model.enc"))
    weights = {n: a.astype(np.float64) for n, a in load_file(folder / "w0.safetensors").items()}
    first: Arrays = {name: np.zeros_like(array) for name, array in weights.items()}
    second: Arrays = {name: np.zeros_like(array) for name, array in weights.items()}
    for number in (1, 2, 3):
        total = load_file(file_of(folder, number, "carol.sum.safetensors"))
        for name, array in total.items():
            g = array.astype(np.float64)
            if optimizer == "momentum":
                first[name] = 0.9 * first[name] + g
                step = 0.02 * first[name]
            else:
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                m, v = first[name] / (1 - 0.9**number), second[name] / (1 - 0.999**number)
                step = 0.02 * m / (np.sqrt(v) + 1e-8)
            weights[name] = (weights[name] - step).astype(np.float32).astype(np.float64)
        for party in ("alice", "carol"):
            kept = load_file(file_of(folder, number, f"{party}.model.safetensors"))
            assert all(np.allclose(kept[n], weights[n], atol=1e-6) for n in weights)
            weights = {n: a.astype(np.float64) for n, a in kept.items()}


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_optimisers_agree_with_pytorch(name: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    generator = np.random.default_rng(3)
    start, gradients = generator.normal(size=5), generator.normal(size=(6, 5))
    parameter = torch.nn.Parameter(torch.tensor(start))
    made = {
        "momentum": lambda: torch.optim.SGD([parameter], lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam([parameter], lr=0.1),
    }[name]()
    own, weights = optimizers.make_optimizer(name, 0.1), {"w": start}
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        made.step()
        weights = own.step(weights, {"w": gradient})
        assert np.allclose(weights["w"], parameter.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("cipher", ["lattice", "direct"])
def test_training_out_of_range_stops_at_open_model(
    cipher: str, simulate: Simulate, dtl: Cli
) -> None:
    """What open-model says of it is what it says of every result that does not open."""
    folder = simulate(
        "digits",
        *("--participants", 3, "--slot-bits", 10, "--fraction-bits", 8, "--rounds", 30),
        *("--lr", 0.3, "--cipher", cipher),
        code=4,
    )
    released = sorted(folder.glob("rounds/*/model.release"))
    assert released
    last = released[-1].parent
    assert not list(last.glob("*.model.safetensors")), "no wrong model is ever written"
    assert not (folder / "report.html").exists()
    command = ("open-model", released[-1], "--key", folder / "job" / "alice.key")
    error = dtl(*command, "-o", folder / "x.safetensors", code=4).err
    assert "the result cannot be opened" in error
    assert "left the range of the job" in error
    assert not (folder / "x.safetensors").exists()
    dtl("simulate", "--resume", "--out", folder, code=4)


def test_a_model_that_is_not_the_twins_is_an_error(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = participant.encrypt_gradients

    def another_share(key: Any, grads: Any, out: Any, wanted: Any, **rest: Any) -> Any:
        changed = type(wanted)(**{**vars(wanted), "weight": wanted.weight * 1.001})
        return original(key, grads, out, changed, **rest)

    monkeypatch.setattr(participant, "encrypt_gradients", another_share)
    folder = simulate("digits", "--participants", 3, "--rounds", 2, code=4)
    assert not (folder / "report.json").exists()


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        (("--rounds", 0), 2),
        (("--drop", 1), 2),
        (("--drop", 0.1, "--optimizer", "adam"), 2),
        (("--lr", 0), 2),
        (("--local-lr", 0.1), 2),
        (("--optimizer", "adam", "--local-epochs", 0, "--local-lr", 0.1), 2),
        (("--optimizer", "lion"), 2),
        (("--participants", 2), 2),
        (("--participants", "alice,bob,alice"), 2),
        (("--participants", "alice,test,carol"), 2),
        (("--participants", 0), 2),
        (("--participants", 4097), 2),
        (("--participants", "9" * 5000), 2),
        (("--hidden", "x"), 2),
        (("--hidden", "0"), 2),
        (("--seed", -1), 2),
        (("--batch-size", 0), 2),
        (("--test", 2), 2),
        (("--alpha", -1), 2),
        (("--slot-bits", 99), 2),
    ],
)
def test_impossible_simulations(wanted: tuple[object, ...], code: int, simulate: Simulate) -> None:
    assert not simulate("digits", *wanted, code=code).exists()


def test_a_rate_at_which_nothing_stays_finite(simulate: Simulate) -> None:
    simulate("digits", "--participants", 3, "--rounds", 1, "--lr", 1e308, code=7)


def test_odd_folders(simulate: Simulate, dtl: Cli, tmp_path: Path) -> None:
    dtl("simulate", "--out", tmp_path / "x", code=2)
    dtl("simulate", "--resume", "--out", tmp_path / "x", code=2)
    dtl("simulate", "nowhere.csv", "--out", tmp_path / "x", code=2)
    assert not (tmp_path / "x").exists()
    folder = simulate("digits", "--participants", 3, "--rounds", 1)
    assert folder.stat().st_mode & 0o777 == 0o700
    with simulation_run._only_one(folder):
        error = dtl("simulate", "--resume", "--out", folder, code=5).err
    assert "running there already" in error
    for name in ("simulation.json", "journal.jsonl", "rounds/001/round.json"):
        before = (folder / name).read_bytes()
        for damage in (b"{}\n", b"\xff\n", b"[1]\n"):
            (folder / name).write_bytes(damage)
            dtl("simulate", "--resume", "--out", folder, code=3)
        (folder / name).write_bytes(before)
    (folder / "rounds" / "001" / "round.json").unlink()
    dtl("simulate", "--resume", "--out", folder)


def test_names_for_a_number_of_participants() -> None:
    assert options.participant_names("3") == ("alice", "bob", "carol")
    assert options.participant_names("b, a") == ("b", "a")
    many = options.participant_names("120")
    assert many[:2] == ("p001", "p002")
    assert list(many) == sorted(set(many))
    with pytest.raises(UsageError):
        optimizers.make_optimizer("lion", 0.1)


TINY = ("--participants", 3, "--rounds", 1, *SMALL)


CHANGES = [
    ("simulation.json", '"alice"', '"../x"', 2),
    ("simulation.json", '"rounds": 1', '"rounds": "x"', 3),
    ("rounds/001/round.json", '"alice"', '"../x"', 4),
    ("rounds/001/round.json", '"round": 1', '"round": 2', 4),
    ("rounds/001/round.json", "{", "[", 3),
    ("journal.jsonl", '"bytes": ', '"bytes": "x', 3),
    ("journal.jsonl", "{", "", 3),
]


def test_a_changed_run_is_not_resumed(dtl: Cli, tmp_path: Path, fixed_primes: None) -> None:
    run = tmp_path / "run"
    dtl("simulate", "breast_cancer", *TINY, "--out", run)
    for file, old, new, code in CHANGES:
        text = (run / file).read_text()
        assert old in text
        (run / file).write_text(text.replace(old, new))
        dtl("simulate", "--resume", "--out", run, code=code)
        (run / file).write_text(text)
    assert not (tmp_path / "x").exists()
    dtl("simulate", "--resume", "--out", run)


def test_the_state_of_an_optimizer_is_not_lost(
    simulate: Simulate, dtl: Cli, tmp_path: Path
) -> None:
    run = simulate("breast_cancer", "--participants", 3, "--rounds", 1, "--optimizer", "adam")
    total = file_of(run, 1, "alice.sum.safetensors")
    first, kept, model = run / "w0.safetensors", tmp_path / "s.npz", tmp_path / "w.npz"
    step = ("apply-sum", total, "--model", first, "--optimizer", "adam")
    dtl(*step, "--state-out", kept, "-o", model)
    whole, stepped = kept.read_bytes(), model.read_bytes()

    model.unlink()  # an interrupted step is completed
    dtl(*step, "--state-out", kept, "-o", model)
    assert (kept.read_bytes(), model.read_bytes()) == (whole, stepped)

    again = ("--state", kept, "-o", tmp_path / "w2.npz")  # another step has another state
    for clash in (kept, tmp_path / "w2.npz", model):
        dtl(*step, *again, "--state-out", clash, code=2)
    for clash in (kept, tmp_path / "w2.npz"):
        dtl(*step, *again, "--state-out", clash, "--force", code=2)
    assert kept.read_bytes() == whole
    assert not (tmp_path / "w2.npz").exists()


def test_a_torn_journal_is_cut_in_place(
    dtl: Cli, tmp_path: Path, fixed_primes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    dtl("simulate", "breast_cancer", *TINY, "--out", run)
    whole = (run / "journal.jsonl").read_bytes()
    (run / "journal.jsonl").write_bytes(whole + b'{"round": 1')

    def killed(path: Path, size: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", killed)
        dtl("simulate", "--resume", "--out", run, code=1)
    assert (run / "journal.jsonl").read_bytes().startswith(whole)
    dtl("simulate", "--resume", "--out", run)
    assert (run / "journal.jsonl").read_bytes() == whole
