"""Mutated files through the commands themselves, held against one oracle.

Every command reads files of which one was mutated. What may come of it: an exit code that is
documented and blames the file (2 to 7) with one line of error, or success. Never an unforeseen
exception, code 1 (which says that the machine failed), more than 1 GB of memory, more than
10 s, or a secret in what is printed. A command that fails leaves no output, and all other
files as they were. What is signed must not be accepted when it was changed without a new
signature.

`make fuzz SECONDS=600 SEED=1` runs it; a case is named by the seed and its number.
"""

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dtl.cli import app
from dtl.core.files.documents import Key
from tests.robustness import mutations
from tests.robustness.faults import hidden, new_place
from tests.robustness.leaks import Needles
from tests.robustness.mutations import Mutation
from tests.robustness.scenario import EPOCH, NAMES, Scenario, Stage, Step, command, play

MEMORY = 1 << 30  # bytes more than a child has when it starts
TIME = 10  # seconds a case
BATCH = 200  # cases a child
FAILURES = range(2, 8)
UNCHECKED = ("simulate", "inspect")  # made anew, or "not checked" by another job's file
SIGNED = (".upload", ".enc", ".release", ".close", ".reveal", "job.json")


@dataclass(frozen=True)
class Target:
    """A command, the state before it, and the file that is to be mutated."""

    stage: Stage
    words: tuple[str, ...]
    file: Path  # in the folder of the stage


@dataclass(frozen=True)
class Corpus:
    """What there is to mutate: a job, another job with the same names, and their keys."""

    job: Scenario
    other: Scenario
    targets: dict[str, list[Target]]  # by command
    needles: Needles

    @classmethod
    def make(cls, folder: Path) -> "Corpus":
        """Play two jobs; list every command with every file that it reads."""
        job, other = play(folder / "job"), play(folder / "other", until="open-model")
        targets: dict[str, list[Target]] = {}

        def add(stage: Stage, words: tuple[str, ...]) -> None:
            for file in _inputs(words, stage.folder):
                targets.setdefault(words[0], []).append(Target(stage, words, file))

        seen = set()
        end = Stage(len(job.stages), Step("end", (), ""), job.end)
        for stage in job.stages:
            add(stage, stage.step.words)
            for words in stage.step.accept:
                if words not in seen and stage.step.name != "simulate":
                    seen.add(words)
                    add(end, words)
        for name in ("job/alice.key", "w0.safetensors", "alice-1.grads.npz", "round-1.close"):
            add(end, ("inspect", name))
        run = [path for path in (job.end / "run").rglob("*") if path.is_file()]
        resume = ("simulate", "--resume", "--rounds", "3", "--out", "run")
        for file in run:
            if file.suffix in (".json", ".jsonl", ".safetensors", ".npz", ".enc", ".release"):
                targets.setdefault("resume", []).append(Target(end, resume, file))
        return cls(job, other, targets, Needles.of_keys(job.end / "job"))

    def secret(self, signer: str) -> bytes:
        """The signing secret of a party of the job."""
        keys = self.job.end / "job"
        return Key.load(keys / f"{signer}.key", keys / "job.json", lambda: b"").secrets.sign


def _inputs(words: Sequence[str], folder: Path) -> list[Path]:
    """The files that a command reads: those that it names, and what lies beside a key."""
    named = [folder / word for word in words[1:]]
    found = [path for path in named if path.is_file()]
    for path in list(found):
        if path.suffix == ".key" and words[0] != "inspect":
            found += [path.with_name("job.json"), path.with_suffix(".ledger")]
    return [path for path in found if path.is_file()]


def choose(corpus: Corpus, chance: random.Random) -> tuple[Target, str, bytes]:
    """A target, the name of a mutation, and the mutated bytes."""
    kinds = list(corpus.targets)
    weights = [0.3 if kind in ("simulate", "resume") else 1.0 for kind in kinds]
    while True:
        target = chance.choice(corpus.targets[chance.choices(kinds, weights)[0]])
        data = target.file.read_bytes()
        options: list[tuple[str, Mutation]] = [("swap", partial(_swapped, corpus, target))]
        fitting = [*mutations.of_kind(target.file.name, data)] * 3
        fitting += chance.sample(mutations.BYTES, 3)
        options += [(mutation.__name__, mutation) for mutation in fitting]
        if (signed := _signed(corpus, target.file)) is not None:
            options += [("signed", signed)] * 4
        name, mutate = chance.choice(options)
        with suppress(ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError):
            changed = mutate(chance, data)
            if changed != data:
                return target, name, changed


def _swapped(corpus: Corpus, target: Target, chance: random.Random, _: bytes) -> bytes:
    """Another file: of the other job under the same name, of the same kind, or any."""
    inside = target.file.relative_to(target.stage.folder)
    same = corpus.other.end / inside
    alike = list(corpus.job.end.rglob(f"*{target.file.suffix}"))
    every = [path for path in corpus.job.end.rglob("*") if path.is_file()]
    choices = [chance.choice(alike or every), chance.choice(every)]
    return chance.choice([same, *choices] if same.is_file() else choices).read_bytes()


def _signed(corpus: Corpus, file: Path) -> Mutation | None:
    """How to mutate a file and sign it anew, where it is a signed one."""
    name = file.name
    if "run" in file.parts:
        return None  # of the simulation's own job
    signer = name.partition("-")[0].partition(".")[0]
    if file.suffix == ".upload":
        return mutations.signed_file(corpus.secret(signer))
    if file.suffix in (".enc", ".release"):
        return mutations.signed_file(corpus.secret("server"))
    if file.suffix == ".close":
        return mutations.signed_document("close", corpus.secret("server"))
    if file.suffix == ".reveal" and signer in NAMES:
        return mutations.signed_document("reveal", corpus.secret(signer))
    is_job = name == "job.json"
    return mutations.signed_document("job", corpus.secret("kgc")) if is_job else None


class Case:
    """One mutated file, and a command that reads it."""

    def __init__(self, corpus: Corpus, seed: int, number: int) -> None:
        self.corpus = corpus
        self.chance = random.Random(f"{seed}-{number}")  # noqa: S311
        self.target, self.mutation, self.data = choose(corpus, self.chance)
        self.name = (
            f"case {number} of seed {seed}: {self.mutation} of "
            f"{self.target.file.relative_to(self.target.stage.folder)}: "
            f"dtl {' '.join(self.target.words)}"
        )

    def run(self, folder: Path, log: Path) -> tuple[int, list[str]]:
        """Run in this process; returns the exit code and what is wrong."""
        self.target.stage.copy(folder)
        inside = self.target.file.relative_to(self.target.stage.folder)
        (folder / inside).write_bytes(self.data)
        before = _contents(folder)
        start = time.monotonic()
        os.chdir(folder)
        signal.alarm(TIME + 2)
        try:
            code: int | None = app.run(command(self.target.words))
        except BaseException as error:
            code, problems = None, [f"{type(error).__name__}: {str(error)[:200]}"]
        else:
            problems = []
        signal.alarm(0)
        os.chdir("/")
        seconds = time.monotonic() - start
        sys.stdout.flush()
        sys.stderr.flush()
        if seconds > TIME:
            problems.append(f"took {seconds:.0f} s")
        printed = log.read_text(errors="replace")
        if code is not None:
            problems += self._judge(code, printed, before, folder)
        return -1 if code is None else code, problems

    def _judge(self, code: int, printed: str, before: dict[Path, bytes], folder: Path) -> list[str]:
        problems = []
        words, inside = self.target.words, self.target.file.relative_to(self.target.stage.folder)
        errors = sum(line.startswith("dtl: error: ") for line in printed.splitlines())
        if code and (code not in FAILURES or errors != 1):
            problems.append(f"exit code {code} with {errors} errors")
        if "Traceback" in printed or "unexpected failure" in printed:
            problems.append("a traceback")
        if leaked := self.corpus.needles.find(printed.encode()):
            problems.append(f"printed {leaked}")
        if hidden(folder):
            problems.append(f"left {hidden(folder)}")
        unsigned = self.mutation not in ("signed", "swap")
        if not code and unsigned and inside.name.endswith(SIGNED) and words[0] not in UNCHECKED:
            problems.append("a changed signed file was accepted")
        after = _contents(folder)
        for path, data in before.items():
            now = after.get(path, b"")
            grown = path.suffix == ".ledger" and now.startswith(data.removesuffix(b"\n"))
            mended = path == inside and path.suffix == ".ledger" and not code
            if now != data and not (mended or (grown and (not code or now == data + b"\n"))):
                if "--resume" in words and (grown or path.suffix not in (".key", ".ledger")):
                    continue
                problems.append(f"{path} was changed")
        if code and "--resume" not in words and words[0] != "simulate":
            problems += [f"{path} was written" for path in after.keys() - before.keys()]
        return problems


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


def run_cases(corpus: Corpus, place: Path, seed: int, numbers: Sequence[int], tally: Tally) -> None:
    """Run cases in a forked child with little memory; what ends the child is a problem too."""
    log, report = place / "log", place / "report"
    report.write_text("")
    child = os.fork()
    if not child:
        try:
            _child(corpus, place / "case", log, report, seed, numbers)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    lines = report.read_text().splitlines()
    for text in lines:
        _, code, mutation, *problems = text.split("\t")
        tally.cases += 1
        tally.codes[int(code)] += 1
        tally.mutations[mutation] += 1
        tally.problems += problems
    if len(lines) < len(numbers):
        tally.cases += 1
        dead = Case(corpus, seed, numbers[len(lines)]).name
        tally.problems.append(f"{dead}: the process ended with {status}")
        run_cases(corpus, place, seed, numbers[len(lines) + 1 :], tally)


def _child(
    corpus: Corpus, folder: Path, log: Path, report: Path, seed: int, numbers: Sequence[int]
) -> None:
    os.environ |= {"DTL_DEBUG": "1", "SOURCE_DATE_EPOCH": str(EPOCH)}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, _too_long)
    with report.open("a", buffering=1) as out:
        for number in numbers:
            os.ftruncate(descriptor, 0)
            case = Case(corpus, seed, number)
            code, problems = case.run(folder, log)
            texts = [
                f"{case.name}: {problem}".replace("\t", " ").replace("\n", " ")
                for problem in problems
            ]
            out.write("\t".join([str(number), str(code), case.mutation, *texts]) + "\n")


def _too_long(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    """Mutate for so many seconds: `make fuzz SECONDS=600 SEED=1`; CASE=N runs one case again."""
    seconds, seed = float(os.environ.get("SECONDS", "60")), int(os.environ.get("SEED", "1"))
    place = new_place()
    try:
        corpus = Corpus.make(place)
        tally, first, start = Tally.empty(), 0, time.monotonic()
        if one := os.environ.get("CASE"):
            run_cases(corpus, place, seed, [int(one)], tally)
        while not one and time.monotonic() - start < seconds:
            known = len(tally.problems)
            run_cases(corpus, place, seed, range(first, first + BATCH), tally)
            first += BATCH
            for problem in tally.problems[known:]:
                sys.stdout.write(f"FAILED {problem}\n")
                sys.stdout.flush()
    finally:
        shutil.rmtree(place)
    sys.stdout.write(f"exit codes: {dict(sorted(tally.codes.items()))}\n")
    sys.stdout.write(f"by kind: {dict(tally.mutations.most_common())}\n")
    sys.stdout.write(f"mutations: {tally.cases}, failures: {len(tally.problems)}\n")
    sys.exit(1 if tally.problems else 0)


if __name__ == "__main__":
    main()
