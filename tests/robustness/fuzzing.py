"""Mutated files through the commands themselves, held against one oracle.

Every command reads files of which one was mutated. What may come of it: an exit code that is
documented and blames the file (2 to 7) with one line of error, or success. Never an unforeseen
exception, code 1 (which says that the machine failed), more than 1 GB of memory, more than
10 s, or a secret in what is printed. A command that fails leaves no output, and all other
files as they were. What is signed must not be accepted when it was changed without a new
signature.

`make fuzz SECONDS=600 SEED=1` runs it; a case is named by the seed and its number.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dtl.cli import app
from dtl.core.files.key_file import Key
from tests.robustness import mutations
from tests.robustness.faults import hidden, new_place
from tests.robustness.leaks import Needles
from tests.robustness.mutations import Mutation
from tests.robustness.scenario import EPOCH, Stage, Step, command, play, printed_to
from tests.vectors import make
from tests.vectors.command_lines import DIRECT, LATTICE

MEMORY = 1 << 30  # bytes more than a child has when it starts
TIME = 10  # seconds a case
BATCH = 200  # cases a child
FAILURES = range(2, 8)
UNCHECKED = ("simulate", "inspect")  # made anew, or "not checked" by another job's file
SWAP, UNCHANGED = "swap", "unchanged"
SIGNED_SHARE = 0.4  # of the mutations of signed files
SIGNED = (".upload", ".enc", ".release", ".close", ".reveal", "job.json")


@dataclass(frozen=True)
class Target:
    """A command, the state before it, and the file that is to be mutated."""

    stage: Stage
    words: tuple[str, ...]
    file: Path  # in the folder of the stage
    signing: Mapping[str, bytes]  # the signing secrets of the stage's job, by party

    @property
    def inside(self) -> Path:
        """The file, as seen from the folder."""
        return self.file.relative_to(self.stage.folder)

    def signer(self) -> tuple[str, bytes] | None:
        """The kind of a signed file, and the secret of its signer; None where it has none."""
        if "run" in self.inside.parts:
            return None  # of the simulation's own job
        names = {"job.json": "kgc"} | dict.fromkeys((".enc", ".release", ".close"), "server")
        owner = names.get(self.file.name) or names.get(self.file.suffix)
        if owner is None and self.file.suffix in (".upload", ".reveal"):
            owner = self.file.name.partition("-")[0].partition(".")[0]
        kind = "job" if owner == "kgc" else self.file.suffix[1:]
        return (kind, self.signing[owner]) if owner else None


class Corpus:
    """What there is to mutate: a job, another with the same names, and the test vectors.

    `targets` has, by command, every file that it reads; `vectors` the faulty files of the
    vectors.
    """

    def __init__(self, folder: Path) -> None:
        self.job, self.other = play(folder / "job"), play(folder / "other", until="open-model")
        self.targets: dict[str, list[Target]] = {}
        self.vectors: list[tuple[Target, bytes]] = []
        self.needles = Needles()
        with printed_to(folder / "log"):
            self._add_job(folder)
            for title in (LATTICE, DIRECT):
                self._add_vectors(folder / f"vectors-{title}", title)

    def _add_job(self, folder: Path) -> None:
        signing = self._keys(self.job.end / "job")
        last, seen = Step("end", (), ""), set()
        ran = Stage(len(self.job.stages), last, self.job.end)
        end = Stage(len(self.job.stages), last, folder / "end")
        shutil.copytree(self.job.end, end.folder, ignore=shutil.ignore_patterns("run"))
        for stage in self.job.stages:
            self._add(stage, stage.step.words, signing)
            for words in stage.step.accept:
                if words not in seen and stage.step.name != "simulate":
                    seen.add(words)
                    self._add(end, words, signing)
        for name in ("job/alice.key", "w0.safetensors", "alice-1.grads.npz", "round-1.close"):
            self._add(end, ("inspect", name), signing)
        resume = ("simulate", "--resume", "--rounds", "3", "--out", "run")
        for file in (path for path in (ran.folder / "run").rglob("*") if path.is_file()):
            if file.suffix in (".json", ".jsonl", ".safetensors", ".npz", ".enc", ".release"):
                self.targets.setdefault("resume", []).append(Target(ran, resume, file, signing))

    def _add_vectors(self, scene: Path, title: str) -> None:
        scene.mkdir()
        make.write_files(scene, make.read(f"{title}.json")["files"])
        stage, signing = Stage(0, Step("vectors", (), ""), scene), self._keys(scene / "job")
        for path in sorted(make.HERE.glob("*ed/*.json")):
            case = json.loads(path.read_text())
            if case["job"] != title:
                continue
            words, changes = tuple(case["command"]), case["files"]
            if not changes and not case["exit"]:
                self._add(stage, words, signing)
            if len(changes) == 1 and isinstance(splice := next(iter(changes.values())), dict):
                file = scene / next(iter(changes))
                target = Target(stage, words, file, signing)
                self.vectors.append((target, make.spliced(file.read_bytes(), splice)))

    def _keys(self, folder: Path) -> dict[str, bytes]:
        """Look for the secrets of a job from now on; returns the signing ones."""
        self.needles.add_keys(folder)
        names = [path.stem for path in folder.glob("*.key")]
        job = folder / "job.json"
        keys = {name: Key.load(folder / f"{name}.key", job, lambda: b"") for name in names}
        return {name: key.secrets.sign for name, key in keys.items()}

    def _add(self, stage: Stage, words: tuple[str, ...], signing: Mapping[str, bytes]) -> None:
        for file in _inputs(words, stage.folder):
            self.targets.setdefault(words[0], []).append(Target(stage, words, file, signing))


def _inputs(words: Sequence[str], folder: Path) -> list[Path]:
    """The files that a command reads: those that it names, and what lies beside a key."""
    named = [folder / word for word in words[1:]]
    found = [path for path in named if path.is_file()]
    for path in list(found):
        if path.suffix == ".key" and words[0] != "inspect":
            found += [path.with_name("job.json"), path.with_suffix(".ledger")]
    return [path for path in found if path.is_file()]


def mutate(corpus: Corpus, target: Target, chance: random.Random, data: bytes) -> tuple[str, bytes]:
    """The name of a mutation that fits the target's file, and what it makes of `data`."""
    while True:
        fitting = [*mutations.of_kind(target.file.name, data)] * 3 + [*mutations.BYTES]
        options: list[tuple[str, Mutation]] = [(found.__name__, found) for found in fitting]
        options.append((SWAP, partial(_swapped, corpus, target)))
        name, change = chance.choice(options)
        with suppress(Exception):  # it does not fit this file, or one that was mutated before
            return name, change(chance, data)


def _swapped(corpus: Corpus, target: Target, chance: random.Random, _: bytes) -> bytes:
    """Another file: of the other job under the same name, of the same kind, or any."""
    same = corpus.other.end / target.inside
    alike = list(corpus.job.end.rglob(f"*{target.file.suffix}"))
    every = [path for path in corpus.job.end.rglob("*") if path.is_file()]
    choices = [chance.choice(alike or every), chance.choice(every)]
    return chance.choice([same, *choices] if same.is_file() else choices).read_bytes()


@dataclass(frozen=True)
class Case:
    """One mutated file, and a command that reads it.

    `lies`: the file may carry a valid signature all the same, as it was signed anew, or is
    another file.
    """

    corpus: Corpus
    name: str
    target: Target
    mutation: str
    data: bytes
    lies: bool

    @classmethod
    def by_chance(cls, corpus: Corpus, seed: int, number: int) -> "Case":
        """The case of that number: a target, a mutation and all that it does are drawn."""
        chance = random.Random(f"{seed}-{number}")  # noqa: S311
        kinds = list(corpus.targets)
        weights = [0.3 if kind in ("simulate", "resume") else 1.0 for kind in kinds]
        while True:
            target = chance.choice(corpus.targets[chance.choices(kinds, weights)[0]])
            data = target.file.read_bytes()
            name, changed = mutate(corpus, target, chance, data)
            sign, signed = target.signer(), False
            if sign is not None and name != SWAP and chance.random() < SIGNED_SHARE:
                with suppress(Exception):  # what cannot be signed stays as it is
                    changed, signed = mutations.sign_anew(*sign, changed), True
            if changed != data:
                words = " ".join(target.words)
                named = f"case {number} of seed {seed}: {name} of {target.inside}: dtl {words}"
                mutation = f"{name}, signed" if signed else name
                return cls(corpus, named, target, mutation, changed, signed or name == SWAP)

    def run(self, folder: Path, log: Path) -> tuple[int, list[str]]:
        """Run the command in this process; returns the exit code and what is wrong."""
        self.target.stage.copy(folder)
        (folder / self.target.inside).write_bytes(self.data)
        before = _contents(folder)
        start = time.monotonic()
        os.chdir(folder)
        signal.alarm(TIME + 2)
        try:
            with printed_to(log):
                code: int | None = app.run(command(self.target.words))
        except BaseException as error:
            code, problems = None, [f"{type(error).__name__}: {str(error)[:200]}"]
        else:
            problems = []
        signal.alarm(0)
        os.chdir("/")
        seconds = time.monotonic() - start
        if seconds > TIME:
            problems.append(f"took {seconds:.0f} s")
        if code is not None:
            problems += self._judge(code, log.read_text(errors="replace"), before, folder)
        return -1 if code is None else code, problems

    def _judge(self, code: int, printed: str, before: dict[Path, bytes], folder: Path) -> list[str]:
        problems = []
        words, inside = self.target.words, self.target.inside
        errors = sum(line.startswith("dtl: error: ") for line in printed.splitlines())
        if code and (code not in FAILURES or errors != 1):
            problems.append(f"exit code {code} with {errors} errors")
        if "Traceback" in printed or "unexpected failure" in printed:
            problems.append("a traceback")
        if leaked := self.corpus.needles.find(printed.encode()):
            problems.append(f"printed {leaked}")
        if hidden(folder):
            problems.append(f"left {hidden(folder)}")
        if (
            not code
            and not self.lies
            and inside.name.endswith(SIGNED)
            and words[0] not in UNCHECKED
        ):
            problems.append("a changed signed file was accepted")
        after = _contents(folder)
        for path, data in before.items():
            now = after.get(path, b"")
            grown = path.suffix == ".ledger" and now.startswith(data.removesuffix(b"\n"))
            mended = path == inside and path.suffix == ".ledger" and not code
            tried = words[0] == "open-model" and self.lies and _is_attempt(now[len(data) :])
            may_grow = not code or tried or now == data + b"\n"
            if now != data and not (mended or (grown and may_grow)):
                if "--resume" in words and (grown or path.suffix not in (".key", ".ledger")):
                    continue
                problems.append(f"{path} was changed")
        if code and "--resume" not in words and words[0] != "simulate":
            problems += [f"{path} was written" for path in after.keys() - before.keys()]
        return problems


def _is_attempt(added: bytes) -> bool:
    """Whether a ledger has grown by the line of one attempt to open, which is written before."""
    return added.count(b"\n") == 1 and b'"event":"tried"' in added


def _contents(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@dataclass
class Tally:
    """How many cases ended how, and what went wrong."""

    cases: int
    codes: Counter[int]
    mutations: Counter[str]
    problems: list[str]

    @classmethod
    def empty(cls) -> "Tally":
        """Nothing yet."""
        return cls(0, Counter(), Counter(), [])

    def show(self) -> None:
        """Print the figures, and what went wrong."""
        for problem in self.problems:
            sys.stdout.write(f"FAILED {problem}\n")
        sys.stdout.write(f"exit codes: {dict(sorted(self.codes.items()))}\n")
        sys.stdout.write(f"by kind: {dict(self.mutations.most_common())}\n")
        mutated = self.cases - self.mutations[UNCHANGED]
        sys.stdout.write(f"mutations: {mutated}, failures: {len(self.problems)}\n")

    def add(self, report: Path) -> int:
        """Count what a child reported; returns how many cases that were."""
        lines = report.read_text().splitlines()
        for text in lines:
            code, mutation, *problems = text.split("\t")
            self.cases += 1
            self.codes[int(code)] += 1
            self.mutations[mutation] += 1
            self.problems += problems
        return len(lines)


def run_cases(corpus: Corpus, place: Path, seed: int, numbers: Sequence[int], tally: Tally) -> None:
    """Run cases in a forked child with little memory; what ends the child is a problem too."""
    report = place / "report"
    report.write_text("")
    child = os.fork()
    if not child:
        try:
            prepare_child()
            for number in numbers:
                run_reported(Case.by_chance(corpus, seed, number), place)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    done = tally.add(report)
    if done < len(numbers):
        tally.cases += 1
        dead = Case.by_chance(corpus, seed, numbers[done]).name
        tally.problems.append(f"{dead}: the process ended with {status}")
        run_cases(corpus, place, seed, numbers[done + 1 :], tally)


def prepare_child() -> None:
    """Make this process, for good, one that runs cases: with little memory and little time."""
    os.environ |= {"DTL_DEBUG": "1", "SOURCE_DATE_EPOCH": str(EPOCH)}
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, _too_long)


def run_reported(case: Case, place: Path) -> list[str]:
    """Run a case, and add it to `place`/report; returns what is wrong."""
    code, problems = case.run(place / "case", place / "log")
    texts = [f"{case.name}: {text}".replace("\t", " ").replace("\n", " ") for text in problems]
    with (place / "report").open("a") as out:
        out.write("\t".join([str(code), case.mutation, *texts]) + "\n")
    return texts


def _too_long(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    """Mutate by chance for so many seconds; CASE=N runs one case again."""
    seconds, seed = float(os.environ.get("SECONDS", "60")), int(os.environ.get("SEED", "1"))
    place = new_place()
    try:
        corpus = Corpus(place)
        tally, first, start = Tally.empty(), 0, time.monotonic()
        if one := os.environ.get("CASE"):
            run_cases(corpus, place, seed, [int(one)], tally)
        while not one and time.monotonic() - start < seconds:
            run_cases(corpus, place, seed, range(first, first + BATCH), tally)
            first += BATCH
    finally:
        shutil.rmtree(place)
    tally.show()
    sys.exit(1 if tally.problems else 0)


if __name__ == "__main__":
    main()
