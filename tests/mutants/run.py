"""`make mutants`: remove each defence in a copy of the project, and demand that its tests fail.

    python -m tests.mutants.run [NAME ...] [--workers N]   some mutants, or all
    python -m tests.mutants.run --table                    print the table of SECURITY.md
    python -m tests.mutants.run --write                    bring it up to date there

First, all named tests must pass as the project stands. Then a mutant counts as found if every
test that it names fails, and fails by an assertion: one that cannot be collected or imported
shows nothing. Exit code 1 where anything else happens.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.table import (
    DEFAULT_KERNEL,
    MARKS,
    ROOT,
    DoesNotApplyError,
    Mutant,
    load,
    markdown,
    marked,
    missing_tests,
)

WORKERS = 2
TIMEOUT_SECONDS = 300
PACKAGES = ("cli", "core", "datasets")
BY_ASSERTION = ("AssertionError", "assert ", "Failed: ")
"""How the message of a failure begins that a test itself has found."""


class HarnessError(Exception):
    """The outcome shows nothing of the defence."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant; `problem` is empty where all of its tests failed as they must."""

    mutant: Mutant
    problem: str
    seconds: float


class Copy:
    """A copy of the project, in which one mutant after the other is applied."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._time = int(time.time()) - 10_000_000
        for name in _files():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        links = folder / ".links" / "dtl"
        links.mkdir(parents=True)
        for package in PACKAGES:
            (links / package).symlink_to(folder / package)
        self._check_imports()

    def environment(self, kernel: str) -> dict[str, str]:
        """The environment in which `dtl` is this copy, wherever the project is installed."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DTL_")}
        return kept | {
            "PYTHONPATH": str(self.folder / ".links"),
            "DTL_KERNEL": kernel,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # half of the time that pytest takes to start
        }

    def _check_imports(self) -> None:
        names = ", ".join(f"dtl.{package}" for package in PACKAGES)
        code = f"import {names}; print(*(m.__file__ for m in ({names})), sep='\\n')"
        found = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env=self.environment(DEFAULT_KERNEL),
            capture_output=True,
            text=True,
            check=True,
        )
        for line in found.stdout.splitlines():
            if not Path(line).resolve().is_relative_to(self.folder.resolve()):
                raise HarnessError(f"the copy imports {line}")

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """Apply a mutant, and take it back."""
        changed = mutant.applied(self.folder)
        before = {name: (self.folder / name).read_bytes() for name in changed}
        try:
            for name, text in changed.items():
                self._write(name, text.encode())
            yield
        finally:
            for name, data in before.items():
                self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        """Write a source file with a time of its own: Python knows old bytecode by it."""
        path = self.folder / name
        path.write_bytes(data)
        self._time += 10
        os.utime(path, (self._time, self._time))

    def run(self, tests: Sequence[str], kernel: str, *options: str) -> dict[str, list[str]]:
        """Run tests; returns the results of each test's cases: "passed", or how it failed.

        Raises HarnessError for one that did not run.
        """
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        try:
            done = subprocess.run(
                [*command, f"--junitxml={report}", "-o", "junit_family=xunit1", *options, *tests],
                cwd=self.folder,
                env=self.environment(kernel),
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise HarnessError(f"no end after {TIMEOUT_SECONDS} s") from None
        if done.returncode not in (0, 1) or not report.exists():
            raise HarnessError(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}")
        return _results(report, tests)


def _files() -> list[str]:
    """The project's files as they are now, those that were not added yet too, and kernels."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    kernels = [str(path.relative_to(ROOT)) for path in ROOT.glob("core/*/*.so")]
    return [name for name in [*listed, *kernels] if name and (ROOT / name).is_file()]


def _results(report: Path, tests: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {test: [] for test in tests}
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314
        identity = f"{case.get('file')}::{case.get('name')}"
        result = _result(case, identity)
        named = [test for test in tests if identity == test or identity.startswith(f"{test}[")]
        if not named:
            raise HarnessError(f"{identity} ran, and is not named")
        found[named[0]].append(result)
    return found


def _result(case: ET.Element, identity: str) -> str:
    if (error := case.find("error")) is not None:
        raise HarnessError(f"{identity}: {error.get('message', '')}\n{(error.text or '')[-3000:]}")
    if (skipped := case.find("skipped")) is not None:
        return f"skipped: {skipped.get('message', '')}"
    failure = case.find("failure")
    return "passed" if failure is None else failure.get("message", "") or "failed"


def judge(copy: Copy, mutant: Mutant) -> str:
    """What is wrong with a mutant: empty where all of its tests fail by an assertion."""
    options = ["-x"] if len(mutant.tests) == 1 else []
    with copy.mutated(mutant):
        results = copy.run(mutant.tests, mutant.kernel, *options)
    for test, cases in results.items():
        failures = [case for case in cases if case != "passed" and not case.startswith("skipped")]
        if not failures:
            return f"SURVIVED {test}"
        other = [failure for failure in failures if not failure.startswith(BY_ASSERTION)]
        if len(other) == len(failures):
            return f"{test} fails by no assertion of its own: {other[0][:500]}"
    return ""


def check_unchanged(copy: Copy, mutants: Sequence[Mutant], workers: int) -> dict[str, str]:
    """What is wrong with named tests as the project stands, by the test."""
    problems = dict.fromkeys(missing_tests(list(mutants)), "there is no such test")
    for kernel in sorted({mutant.kernel for mutant in mutants}):
        chosen = [mutant for mutant in mutants if mutant.kernel == kernel]
        tests = sorted({test for mutant in chosen for test in mutant.tests} - set(problems))
        parallel = ["-p", "xdist.plugin", "-n", str(workers), "--dist", "worksteal"]
        for test, cases in copy.run(tests, kernel, *(parallel if workers > 1 else ())).items():
            bad = [case for case in cases if case != "passed"]
            if bad or not cases:
                problems[test] = bad[0][:500] if bad else "did not run"
    return problems


def run(mutants: Sequence[Mutant], workers: int) -> int:
    """Run mutants; prints a line for each and a summary, returns the exit code."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dtl-mutants-") as place:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(workers):
            copies.put(Copy(Path(place) / str(number)))
        copy = copies.get()
        problems = check_unchanged(copy, mutants, workers)
        copies.put(copy)
        for test, problem in problems.items():
            print(f"{test}, as the project stands: {problem}", flush=True)
        print(f"the named tests as the project stands: {_since(started)}", flush=True)
        lock, done = threading.Lock(), 0

        def one(mutant: Mutant) -> Outcome:
            nonlocal done
            own, begun = copies.get(), time.monotonic()
            broken = [test for test in mutant.tests if test in problems]
            try:
                if broken:
                    raise HarnessError(f"{broken[0]} does not pass as the project stands")
                problem = judge(own, mutant)
            except DoesNotApplyError as error:
                problem = f"does not apply any more: {error}"
            except HarnessError as error:
                problem = f"shows nothing: {error}"
            finally:
                copies.put(own)
            seconds = time.monotonic() - begun
            with lock:
                done += 1
                place = f"[{done}/{len(mutants)}]"
                print(f"{place} {mutant.name}: {problem or 'found'} ({seconds:.0f} s)", flush=True)
            return Outcome(mutant, problem, seconds)

        with ThreadPoolExecutor(workers) as pool:
            outcomes = list(pool.map(one, mutants))
    return _summary(outcomes, started)


def _summary(outcomes: Sequence[Outcome], started: float) -> int:
    width = max(len(outcome.mutant.name) for outcome in outcomes)
    print()
    for outcome in outcomes:
        verdict = "NOT FOUND" if outcome.problem else "found"
        print(f"{outcome.mutant.name:{width}}  {verdict:9}  {outcome.mutant.defence}")
    bad = [outcome for outcome in outcomes if outcome.problem]
    for outcome in bad:
        print(f"\n{outcome.mutant.name}: {outcome.problem}")
    print(f"\n{len(outcomes)} mutants, {len(bad)} not found, {_since(started)}")
    return 1 if bad else 0


def _since(started: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return f"{minutes} min {seconds} s"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Remove each defence; its tests must fail.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="some mutants (default: all)")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--table", action="store_true", help="print the table of SECURITY.md")
    parser.add_argument("--write", action="store_true", help="bring it up to date there")
    given = parser.parse_args()
    mutants = load()
    if given.write:
        path = ROOT / "SECURITY.md"
        path.write_text(MARKS.sub(lambda _: marked(mutants), path.read_text(), count=1))
        return 0
    if given.table:
        print(markdown(mutants), end="")
        return 0
    unknown = set(given.names) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"no such mutants: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in mutants if not given.names or mutant.name in given.names]
    try:
        return run(chosen, max(1, given.workers))
    except HarnessError as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
