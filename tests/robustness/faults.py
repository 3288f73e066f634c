"""Faults at every boundary: each command that writes is broken at each of its system calls.

A child is forked for every case. In it, the functions of `os` that change anything on disk
(and the writes of file objects) are counted; at the n-th call the child is killed, or the
call fails: the disk is full, broken or read-only, the file may not be opened, memory is out,
somebody presses Ctrl-C. Then the same command must do its work. Run all of it with
`make faults`.
"""

import errno
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtl.cli import app
from dtl.core.files import ledger
from dtl.core.files.ledger import LedgerHead
from tests.robustness.scenario import EPOCH, Scenario, Stage, command, play

CHANGES = ("ftruncate", "truncate", "fsync", "link", "rename", "replace", "unlink", "rmdir")
NAMING = ("link", "rename", "replace")
TAKES_SPACE = ("open", "write", "pwrite", "mkdir", "link")
KILLED = -signal.SIGKILL
ESCAPED = 99  # the exit code of a child that an unforeseen exception ended
Call = Callable[..., Any]


@dataclass
class Fault:
    """What happens at the `at`-th boundary: see MODES. `at` 0 only counts.

    `names` are the calls so far; one that gives a file its name says which: `link:NAME`.
    """

    mode: str
    at: int
    count: int = 0
    names: list[str] = field(default_factory=list)

    def reached(self, name: str, write: Call | None = None, named: str = "") -> None:
        """Count a call; do what the mode says when it is its turn.

        `write` writes the first half of what the call was to write; `named` is what the call
        names.
        """
        self.count += 1
        self.names.append(f"{name}:{named}" if named else name)
        if self.count < self.at or not self.at:
            return
        first = self.count == self.at
        match self.mode:
            case "kill" if first:
                os.kill(os.getpid(), signal.SIGKILL)
            case "torn" if first:
                if write:
                    write()
                os.kill(os.getpid(), signal.SIGKILL)
            case "full" if name in TAKES_SPACE:
                if write and first:
                    write()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "broken" if first:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            case "read-only":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            case "memory" if first:
                raise MemoryError
            case "interrupt" if first:
                raise KeyboardInterrupt

    def opened(self) -> None:
        """Count an opening of a file, for reading or writing, in the mode `denied`."""
        self.count += 1
        self.names.append("open")
        if self.count == self.at:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))


MODES = {
    "kill": "SIGKILL before the call",
    "torn": "SIGKILL after half of a write",
    "full": "ENOSPC from then on, after half of a write",
    "broken": "EIO, once",
    "read-only": "EROFS from then on, in cleaning up too",
    "memory": "MemoryError, once",
    "interrupt": "KeyboardInterrupt, as by Ctrl-C or SIGTERM",
    "denied": "EACCES for the n-th file that is opened, to read or to write",
}
_PERSISTENT = ("read-only",)  # what was begun cannot be cleaned away by the command itself
_LATE = ("read-only", "memory", "interrupt")  # may come when the output is there for good
USAGE = 2


def install(fault: Fault) -> None:
    """Hook the functions of `os` and the files of `io` in this process; for good."""
    real_open, real_io_open = os.open, io.open

    def open_(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if fault.mode == "denied":
            fault.opened()
        elif flags & os.O_CREAT:
            fault.reached("open")
        return real_open(path, flags, *rest, **more)

    def hook(name: str) -> None:
        original = getattr(os, name)

        def hooked(*arguments: Any, **more: Any) -> Any:
            if fault.mode != "denied":
                named = Path(arguments[1]).name if name in NAMING else ""
                fault.reached(name, named=named)
            return original(*arguments, **more)

        setattr(os, name, hooked)

    def hook_write(name: str) -> None:
        original = getattr(os, name)

        def hooked(descriptor: int, data: Any, *place: int) -> Any:
            if fault.mode != "denied":
                half = bytes(data[: len(data) // 2])
                fault.reached(name, lambda: original(descriptor, half, *place))
            return original(descriptor, data, *place)

        setattr(os, name, hooked)

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            if fault.mode != "denied":
                half = bytes(data)[: len(data) // 2]
                fault.reached("write", lambda: super(File, self).write(half))
            return super().write(data)

    def fdopen(descriptor: int, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode == "r+b":
            return io.BufferedRandom(File(descriptor, "r+"))
        return real_io_open(descriptor, mode, *rest, **more)

    def io_open(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if isinstance(file, int):
            return real_io_open(file, mode, *rest, **more)
        if fault.mode == "denied":
            fault.opened()
        if "r" in mode and "+" not in mode:
            return real_io_open(file, mode, *rest, **more)
        if fault.mode != "denied":
            fault.reached("open")
        buffered = io.BufferedWriter(File(file, mode.replace("b", "")))
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

    for name in (*CHANGES, "mkdir"):
        hook(name)
    for name in ("write", "pwrite"):
        hook_write(name)
    os.open, os.fdopen, io.open = open_, fdopen, io_open  # type: ignore[assignment]


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (a signal as a negative number), and what it printed."""

    code: int
    printed: str
    calls: tuple[str, ...] = ()


def run_child(
    folder: Path, *commands: tuple[str, ...], prepare: Callable[[], object] = lambda: None
) -> Ended:
    """Run commands in a forked child, in `folder`, up to the first that fails.

    `prepare` runs in the child before them.
    """
    log = folder.with_suffix(".log")
    child = os.fork()
    if not child:
        _in_child(commands, folder, log, prepare)
    _, status = os.waitpid(child, 0)
    printed, _, calls = log.read_text(errors="replace").partition("\0")
    return Ended(os.waitstatus_to_exitcode(status), printed, tuple(calls.split()))


def _in_child(commands: Sequence[tuple[str, ...]], folder: Path, log: Path, prepare: Call) -> None:
    code, leave = ESCAPED, os._exit
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        os.environ |= {"DTL_DEBUG": "1", "SOURCE_DATE_EPOCH": str(EPOCH)}
        os.chdir(folder)
        fault = prepare()
        try:
            code = next(filter(None, (app.run(command(words)) for words in commands)), 0)
        except KeyboardInterrupt:
            code = 1
        if isinstance(fault, Fault):
            fault.at = 0  # what follows is not the command's
            sys.stdout.write("\0" + " ".join(fault.names))
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = ESCAPED
    finally:
        leave(code)


def boundaries(stage: Stage, folder: Path, mode: str) -> tuple[str, ...]:
    """The boundaries of a command, in an undisturbed run."""
    stage.copy(folder)
    ended = run_child(folder, stage.step.words, prepare=lambda: _installed(Fault(mode, 0)))
    if ended.code:
        raise AssertionError(f"{stage.step.words}: {ended.printed}")
    return ended.calls


def _installed(fault: Fault) -> Fault:
    install(fault)
    return fault


def check_case(stage: Stage, folder: Path, mode: str, at: int) -> None:
    """Break a command at one boundary; AssertionError unless all that must hold holds."""
    stage.copy(folder)
    ended = run_child(folder, stage.step.words, prepare=lambda: _installed(Fault(mode, at)))
    what = f"{stage.step.name}, {mode} at call {at}"
    print_ = f"{what}: exit {ended.code}\n{ended.printed}"
    if mode in ("kill", "torn"):
        assert ended.code == KILLED, print_
    else:
        assert ended.code in (0, 1), print_
    late = mode in _LATE and _is_named(stage, ended.calls[: at - 1], mode not in _PERSISTENT)
    check_recovers(stage, folder, ended, print_, cleaned=mode not in _PERSISTENT, late=late)


def _is_named(stage: Stage, done: Sequence[str], removable: bool) -> bool:
    """Whether these calls have made an output, and its name durable.

    One whose name is not durable yet must be taken back, where anything can be removed.
    """
    name = Path(stage.step.output).name
    naming = [place for place, call in enumerate(done) if call.partition(":")[2] == name]
    return bool(naming) and (not removable or "fsync" in done[naming[-1] :])


def check_recovers(
    stage: Stage, folder: Path, ended: Ended, what: str, cleaned: bool = True, late: bool = False
) -> None:
    """After a fault: nothing lost, nothing half, and the same command does its work."""
    out = folder / stage.step.output
    simulation = stage.step.name == "simulate"
    _check_untouched(stage, folder, what)
    there = out.exists()
    if ended.code == 1 and not simulation:
        assert late or not there, f"{what}: a failed command left its output"
        if cleaned:
            left = [p for p in hidden(folder) if p.suffix != ".pending"]
            assert not left, f"{what}: {left}"
    words = stage.step.words
    if simulation and there:
        words = ("simulate", "--resume", "--out", stage.step.output)
        there = False
    if there:  # complete: it stays, and what is left of the command goes
        before = out.read_bytes() if out.is_file() else b""
        again = run_child(folder, words)
        assert again.code == USAGE, f"{what}: a complete output was made anew: {again.printed}"
        assert not out.is_file() or out.read_bytes() == before, what
        again = run_child(folder, *stage.step.accept)
    else:
        again = run_child(folder, words, *stage.step.accept)
    assert again.code == 0, f"{what}: the rerun failed: {again.printed}"
    assert not hidden(folder), f"{what}: {hidden(folder)} left after the rerun"
    _check_untouched(stage, folder, what)


def hidden(folder: Path) -> list[Path]:
    """Temporary files and folders, at any depth."""
    return list(folder.rglob(".*"))


def _check_untouched(stage: Stage, folder: Path, what: str) -> None:
    """Inputs are what they were; ledgers have only grown, and do not contradict themselves."""
    for path in stage.folder.rglob("*"):
        if path.is_dir():
            continue
        now = folder / path.relative_to(stage.folder)
        if path.suffix == ".ledger":
            assert now.read_bytes().startswith(path.read_bytes()), f"{what}: {path.name} is shorter"
            check_ledger(now, what)
        else:
            assert now.read_bytes() == path.read_bytes(), f"{what}: {path.name} was changed"


def check_ledger(path: Path, what: str) -> None:
    """Raise unless the ledger is whole (but for a torn last line), and says nothing twice."""
    entries = ledger.read_entries(path.read_bytes(), str(path))
    assert isinstance(entries[0], LedgerHead), what
    said = [entry.plain() for entry in entries[1:]]
    once = [(e["event"], e["round"], e.get("content")) for e in said if e["event"] != "release"]
    twice = [key for key, times in Counter(once).items() if times > 1]
    assert not twice, f"{what}: {path.name}: {twice}"
    for event, fact in (("release", "result"), ("aggregate", "uploads")):
        facts = {(e["round"], str(e[fact])) for e in said if e["event"] == event}
        assert len(facts) == len({number for number, _ in facts}), f"{what}: {path.name}: {facts}"


def distinct(scenario: Scenario) -> list[Stage]:
    """One stage a command, open-model to both kinds of file, and encrypt-grads --own-step."""
    found: dict[tuple[str, str], Stage] = {}
    for stage in scenario.stages:
        suffix = Path(stage.step.output).suffix if stage.step.name == "open-model" else ""
        suffix += "--own-step" if "--own-step" in stage.step.words else ""
        found.setdefault((stage.step.name, suffix), stage)
    return list(found.values())


def cases(stage: Stage, folder: Path) -> Iterator[tuple[str, int]]:
    """Every (mode, call) of a command."""
    for mode in MODES:
        for at in range(1, len(boundaries(stage, folder, mode)) + 1):
            yield mode, at


def new_place() -> Path:
    """A folder for many small files, in memory where there is such a place."""
    memory = Path("/dev/shm")  # noqa: S108
    return Path(tempfile.mkdtemp(prefix="dtl-", dir=memory if memory.is_dir() else None))


def main() -> None:
    """Every fault point of every command (or of those named): `make faults`."""
    os.environ["SOURCE_DATE_EPOCH"] = str(EPOCH)
    place = new_place()
    failed = total = 0
    start = time.monotonic()
    try:
        scenario = play(place / "scenario")
        for stage in distinct(scenario):
            if sys.argv[1:] and stage.step.name not in sys.argv[1:]:
                continue
            points: Counter[str] = Counter()
            for mode, at in cases(stage, place / "case"):
                if stage.step.name == "simulate" and mode != "kill" and at % 10 != 1:
                    continue  # its steps are those of the other commands
                points[mode] += 1
                try:
                    check_case(stage, place / "case", mode, at)
                except AssertionError as error:
                    failed += 1
                    sys.stdout.write(f"FAILED {error}\n")
            total += points.total()
            figures = ", ".join(f"{mode} {count}" for mode, count in points.items())
            sys.stdout.write(f"{stage.step.name:14} {points.total():5}  {figures}\n")
            sys.stdout.flush()
    finally:
        with suppress(OSError):
            shutil.rmtree(place)
    seconds = time.monotonic() - start
    sys.stdout.write(f"fault points: {total}, failures: {failed}, {seconds:.0f} s\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
