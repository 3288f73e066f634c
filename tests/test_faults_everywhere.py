"""A sample of what `make faults` and `make fuzz` do, and the faults that have their own story."""

import fcntl
import os
import random
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtl.core.ciphers.direct import DirectCipher
from dtl.core.ciphers.lattice import LatticeCipher
from dtl.core.encoding.fixed_point import Stochastic
from dtl.core.files import atomic, ledger
from dtl.core.files.job_file import Job
from dtl.core.files.ledger import ReleaseEntry
from dtl.core.files.tensors import read_arrays
from dtl.core.lattice import ring as door
from tests.robustness import faults
from tests.robustness.faults import check_case, check_recovers, run_child
from tests.robustness.fuzzing import Corpus, Tally, run_cases
from tests.robustness.leaks import Needles, plaintext_runs, plaintext_values
from tests.robustness.scenario import EPOCH, SUFFIXES, Scenario

SAMPLE = 20  # fault points
CASES = 60  # mutations


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    import shutil

    made = faults.new_place()
    os.environ["SOURCE_DATE_EPOCH"] = str(EPOCH)
    yield made
    del os.environ["SOURCE_DATE_EPOCH"]
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def corpus(place: Path) -> Corpus:
    return Corpus(place / "corpus")


@pytest.fixture(scope="module")
def job(corpus: Corpus) -> Scenario:
    return corpus.job


def test_mutated_files_end_as_documented(corpus: Corpus, place: Path) -> None:
    tally = Tally.empty()
    run_cases(corpus, place, 0, range(CASES), tally)
    assert not tally.problems, "\n".join(tally.problems)
    assert tally.cases == CASES
    assert tally.codes[3] > CASES // 4, "most mutations are noticed"


@pytest.mark.slow
def test_a_sample_of_all_fault_points(job: Scenario, place: Path) -> None:
    chance = random.Random(0)  # noqa: S311
    commands = [stage for stage in faults.distinct(job) if stage.step.name != "simulate"]
    count = cache(lambda stage, kind: len(faults.boundaries(stage, place / "case", kind)))
    for _ in range(SAMPLE):
        stage, mode = chance.choice(commands), chance.choice(list(faults.MODES))
        last = count(stage, "denied" if mode == "denied" else "kill")  # all others count alike
        check_case(stage, place / "case", mode, chance.randint(1, last))


@pytest.mark.parametrize("mode", ["memory", "interrupt"])
def test_the_harness_notices_an_output_whose_name_may_not_last(
    mode: str, job: Scenario, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(finished: Path, path: Path, force: bool) -> None:
        os.link(finished, path)
        atomic.fsync_folder(path.parent)
        finished.unlink()

    stage = job.stage("aggregate")
    monkeypatch.setattr(atomic, "place", careless)
    calls = faults.boundaries(stage, place / "case", mode)
    named = calls.index(f"link:{stage.step.output}") + 1
    assert calls[named] == "fsync"
    with pytest.raises(AssertionError, match="left its output"):
        check_case(stage, place / "case", mode, named + 1)
    monkeypatch.undo()
    check_case(stage, place / "case", mode, named + 1)
    check_case(stage, place / "case", mode, named + 2)  # it is there for good: it may stay


def test_the_harness_notices_what_is_lost(job: Scenario, place: Path) -> None:
    stage = job.stage("aggregate")
    folder = stage.copy(place / "case")
    (folder / "job/server.ledger").write_bytes(b"")
    with pytest.raises(AssertionError, match="shorter"):
        check_recovers(stage, folder, faults.Ended(faults.KILLED, ""), "cut")
    stage.copy(folder)
    (folder / stage.step.output).write_bytes(b"half")
    with pytest.raises(AssertionError, match="rerun failed"):
        check_recovers(stage, folder, faults.Ended(faults.KILLED, ""), "half")


def _limit(kind: int, size: int) -> Callable[[], object]:
    return lambda: resource.setrlimit(kind, (size, size))


@pytest.mark.parametrize("name", ["encrypt-grads", "open-model"])
def test_a_limit_on_the_size_of_files(name: str, job: Scenario, place: Path) -> None:
    stage = job.stage(name)
    for size in (0, 700):
        folder = stage.copy(place / "case")

        def prepare(size: int = size) -> None:
            _silence()  # the log of the child is a file, too
            _limit(resource.RLIMIT_FSIZE, size)()

        ended = run_child(folder, stage.step.words, prepare=prepare)
        if (folder / stage.step.output).exists():
            assert size, name
            continue
        assert ended.code == 1
        check_recovers(stage, folder, ended, f"{name} with files up to {size} bytes")


def test_an_output_that_grows_too_large_is_named(job: Scenario, place: Path) -> None:
    given = next(stage for stage in job.stages if stage.step.output == "dave-w1.npz")
    for suffix in SUFFIXES:
        output = f"dave-w1.{suffix}"
        words = (*given.step.words[:-1], output)
        stage = replace(given, step=replace(given.step, words=words, output=output, accept=()))
        folder = stage.copy(place / "case")
        # Enough for the ledger, which is longer by the line that says that it was tried.
        ended = run_child(folder, stage.step.words, prepare=_limit(resource.RLIMIT_FSIZE, 780))
        assert ended.code == 1
        assert f"dtl: error: {stage.step.output}: file too large" in ended.printed
        check_recovers(stage, folder, ended, f"{suffix} files up to 780 bytes")


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nothing, number)


@pytest.mark.parametrize("name", ["encrypt-grads", "aggregate", "open-model"])
def test_little_memory(name: str, job: Scenario, place: Path) -> None:
    stage, ends = job.stage(name), set()
    for more in (1 << 18, 1 << 30):
        folder = stage.copy(place / "case")

        def limit(more: int = more) -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + more)()

        ended = run_child(folder, stage.step.words, prepare=limit)
        assert ended.code in (0, 1), ended.printed
        ends.add(ended.code)
        check_recovers(stage, folder, ended, f"{name} with {more} bytes of memory")
    assert 0 in ends


INPUTS = {
    "encrypt-grads": "bob-1.grads.safetensors",  # an .npz file is not read by os.pread
    "aggregate": "alice-1.upload",
    "release-model": "model-1.enc",
    "open-model": "model-1.release",
    "audit": "model-1.enc",
}


@pytest.mark.parametrize(("name", "change"), [*zip(INPUTS, cycle(["cut", "flip"]), strict=False)])
def test_an_input_that_changes_while_it_is_read(
    name: str, change: str, job: Scenario, place: Path
) -> None:
    stage = next(s for s in job.stages if s.step.words[0] == name and INPUTS[name] in s.step.words)
    folder = place / "case"
    whole = (stage.folder / INPUTS[name]).read_bytes()

    def install(at: int) -> None:
        original, count = os.pread, 0
        victim = Path(INPUTS[name])

        def pread(descriptor: int, *rest: Any) -> bytes:
            nonlocal count
            count += os.fstat(descriptor).st_ino == victim.stat().st_ino
            if count == at:
                middle = len(whole) * 2 // 3
                flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
                victim.write_bytes(flipped if change == "flip" else whole[:middle])
                count += 1
            return original(descriptor, *rest)

        os.pread = pread

    refused = 0
    for at in (1, 2, 5):
        stage.copy(folder)
        ended = run_child(folder, stage.step.words, prepare=partial(install, at))
        assert ended.code in (0, 3, 4), ended.printed
        refused += ended.code != 0
        (folder / INPUTS[name]).write_bytes(whole)
        if ended.code:
            assert not (folder / stage.step.output).exists()
            assert not faults.hidden(folder)
        check_recovers(stage, folder, ended, f"{name}: {change} at read {at}")
    assert refused


def _racing(folder: Path, *commands: tuple[str, ...]) -> list[int]:
    """Run commands at once, each in a child of its own; their exit codes."""
    children = []
    for number, words in enumerate(commands):
        child = os.fork()
        if not child:
            faults._in_child([words], folder, folder.parent / f"race{number}", lambda: None)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_two_servers_race_on_one_ledger(job: Scenario, place: Path) -> None:
    for name in ("aggregate", "release-model"):
        stage = job.stage(name)
        folder = stage.copy(place / "case")
        others = [(*stage.step.words[:-1], f"copy-{number}") for number in range(3)]
        assert _racing(folder, *others) == [0, 0, 0]
        faults.check_ledger(folder / "job/server.ledger", name)
        if name == "aggregate":
            made = {(folder / words[-1]).read_bytes() for words in others}
            assert len(made) == 1, "the same result made again is the same file"


def test_two_different_releases_race(job: Scenario, place: Path) -> None:
    # Beside the model, the bare sum of the same uploads: two results of one round.
    stage = job.stage("release-model")
    folder = stage.copy(place / "case")
    model = job.stage("aggregate").step.words
    start = model.index("--initial")
    assert run_child(folder, (*model[:start], *model[start + 2 : -1], "sum.enc")).code == 0
    words = stage.step.words
    other = ("release-model", "sum.enc", *words[2:-1], "sum.release")
    assert sorted(_racing(folder, words, other)) == [0, 5]
    assert len([p for p in folder.glob("*.release") if p.is_file()]) == 1
    entries = ledger.read_entries((folder / "job/server.ledger").read_bytes(), "")
    assert len([entry for entry in entries if isinstance(entry, ReleaseEntry)]) == 1


@pytest.mark.parametrize("epoch", ["0"])
def test_a_clock_that_goes_backwards(epoch: str, job: Scenario, place: Path) -> None:
    for stage in faults.distinct(job):
        if stage.step.name in ("simulate", "keygen"):
            continue
        folder = stage.copy(place / "case")

        def back() -> None:
            os.environ["SOURCE_DATE_EPOCH"] = epoch

        ended = run_child(folder, stage.step.words, *stage.step.accept, prepare=back)
        assert ended.code == 0, ended.printed


# --- secrets ---------------------------------------------------------------------------------

PUBLIC = (".upload", ".enc", ".release", ".close", ".reveal", "job.json", "w0.safetensors")
FLOWER = ("pyproject.toml", "config.toml")
RUN = ("simulation.json", "round.json", "report.json", "report.html", "commands.sh")


def _watch_modes() -> None:
    """Under umask 000, print the mode of every file that is created, as it is created."""
    os.umask(0)
    original = os.open

    def open_(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & os.O_CREAT:
            os.write(1, f"created {mode:o} {path}\n".encode())
        return original(path, flags, mode, **more)

    os.open = open_


@pytest.mark.slow
def test_nothing_secret_is_ever_readable_by_others(job: Scenario, place: Path) -> None:
    for stage in faults.distinct(job):
        folder = stage.copy(place / "case")
        ended = run_child(folder, stage.step.words, prepare=_watch_modes)
        assert ended.code == 0, ended.printed
        created = [line.split() for line in ended.printed.splitlines() if line[:8] == "created "]
        assert created
        for _, mode, path in created:
            name = path.rpartition("/")[2].strip(".").rsplit(".", 2)[0]
            if not name.endswith((*PUBLIC, *RUN, *FLOWER)):
                assert mode == "600", f"{stage.step.words}: {path}"
    simulated = [p for p in (place / "case" / "run").rglob("*") if p.is_file()]
    assert simulated
    assert (place / "case" / "run").stat().st_mode & 0o77 == 0


def test_no_secret_stands_in_a_public_file(job: Scenario, corpus: Corpus) -> None:
    needles = corpus.needles
    values = plaintext_values(job.end / "alice-1.grads.npz")
    for name in ("alice-1.grads.npz", "alice-w1.safetensors", "alice-sum-2.npz"):
        values += plaintext_runs(job.end / name, Job.load(job.end / "job/job.json"))
    searched = 0
    for path in job.end.rglob("*"):
        if not path.is_file() or path.suffix in (".key", ".npz", ".safetensors"):
            continue
        data = path.read_bytes()
        assert not needles.find(data), path
        if "run" not in path.parts and path.suffix != ".csv":
            assert not [value for value in values if value in data], path
        searched += 1
    assert searched > 20
    found = needles.find((job.end / "job/alice.key").read_bytes())
    assert "sign of alice" in found, "the search finds what is there"
    assert "mask_seeds" in " ".join(found)


@pytest.mark.parametrize("cipher", [LatticeCipher, DirectCipher])
def test_the_search_finds_a_vector_that_is_not_encrypted(
    cipher: type[LatticeCipher] | type[DirectCipher], job: Scenario
) -> None:
    found, file = Job.load(job.end / "job/job.json"), job.end / "alice-1.grads.npz"
    codec = cipher(found.public_key, found.fixed_point)
    runs = plaintext_runs(file, found, codec)
    values = np.concatenate([array.ravel() for array in read_arrays(file)[0].values()])
    clear = [file.read_bytes(), values.tobytes(), values[5:].astype("<f4").tobytes()]
    for seed, weight in product(range(4), (1, 1 / 4)):
        rounding = Stochastic(bytes([seed] * 32))
        steps, _ = found.fixed_point.encode_step(values, weight, rounding, 0)
        clear += [steps.tobytes(), steps.astype("<i4").tobytes()]
        if isinstance(codec, LatticeCipher):
            arithmetic, shape = door.arithmetic(codec.ring), codec.shape(len(steps))
            clear.append(arithmetic.encode_public(steps, shape, 0).tobytes())
            continue
        # The sign of the last value is that of its block.
        signs = {np.sign(steps[k - 1]): codec.packing.pack(steps[:k], 1) for k in range(5, 11)}
        clear += [block.tobytes() for block in signs.values()]
        assert {-1, 1} <= signs.keys()
    for data in clear:
        assert [run for run in runs if run in data]
    assert not [run for run in runs if run in (-values).tobytes()]


@pytest.mark.slow
def test_no_secret_is_printed_by_failing_commands(
    job: Scenario, corpus: Corpus, place: Path
) -> None:
    values = plaintext_values(job.end / "alice-1.grads.npz")
    for stage in faults.distinct(job):
        for mode, at in (("memory", 3), ("broken", 4), ("full", 2)):
            if stage.step.name == "simulate":
                continue
            folder = stage.copy(place / "case")
            fault = faults.Fault(mode, at)

            def prepare(fault: faults.Fault = fault) -> faults.Fault:
                faults.install(fault)
                return fault

            printed = run_child(folder, stage.step.words, prepare=prepare).printed.encode()
            assert not corpus.needles.find(printed), printed
            assert not [value for value in values if value in printed], printed


def test_the_content_key_of_a_release_stays_inside(
    job: Scenario, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtl.cli import app
    from dtl.core.files import sealed
    from tests.robustness.scenario import command

    stage = job.stage("release-model")
    folder = stage.copy(place / "case")
    needles, original = Needles(), sealed.content_keys

    def seen(content_key: bytes) -> tuple[bytes, bytes]:
        needles.add("content key", content_key)
        keys = original(content_key)
        needles.add("encryption key", keys[0])
        return keys

    monkeypatch.setattr(sealed, "content_keys", seen)
    monkeypatch.chdir(folder)
    assert app.run(command(stage.step.words)) == 0
    assert not [p for p in folder.rglob("*") if p.is_file() and needles.find(p.read_bytes())]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill", "full", "broken", "interrupt"])
def test_what_force_replaces_stays_until_it_is_replaced(
    mode: str, job: Scenario, place: Path
) -> None:
    stage, folder, old = job.stage("open-model"), place / "case", b"what was there"
    words, out = (*stage.step.words, "--force"), folder / stage.step.output

    def begin() -> None:
        stage.copy(folder)
        out.write_bytes(old)

    begin()
    counted = run_child(folder, words, prepare=lambda: faults._installed(faults.Fault(mode, 0)))
    assert counted.code == 0, counted.printed
    whole, last = out.read_bytes(), len(counted.calls)
    assert whole != old
    for at in range(last - 8, last + 1):
        begin()
        fault = faults.Fault(mode, at)
        ended = run_child(folder, words, prepare=partial(faults._installed, fault))
        assert out.read_bytes() in (old, whole), f"{mode} at {at}"
        if mode in ("full", "broken"):
            assert (out.read_bytes() == whole) == (ended.code == 0), f"{mode} at {at}"
        again = run_child(folder, words, *stage.step.accept)
        assert again.code == 0, again.printed
        assert out.read_bytes() == whole
        assert not faults.hidden(folder)


def test_two_commands_with_one_output_do_not_clean_each_other_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fcntl.flock
    met: list[int] = []

    def flock(descriptor: int, kind: int) -> None:
        if not met:  # another command comes before the lock
            met.append(descriptor)
            atomic._remove_leftovers(tmp_path / "out")
        original(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    atomic.write_file(tmp_path / "out", b"whole")
    assert (tmp_path / "out").read_bytes() == b"whole"
    met.clear()
    with atomic.AtomicFolder(tmp_path / "folder") as staging:
        (staging.temporary / "file").write_bytes(b"whole")
        staging.commit()
    assert (tmp_path / "folder" / "file").read_bytes() == b"whole"
    assert not faults.hidden(tmp_path)


def test_force_completes_a_sealed_output_whose_two_names_are_left(tmp_path: Path) -> None:
    digest = bytes(range(64))
    pending = atomic.pending_path(tmp_path / "out", digest)
    pending.write_bytes(b"whole")
    os.link(pending, tmp_path / "out")
    assert atomic.finish(tmp_path / "out", digest, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
