"""Kills, leftovers and races, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtl.core.crypto import native
from dtl.core.files import ledger
from dtl.core.files.atomic import AtomicFolder, AtomicOutput, write_file
from dtl.core.roles.participant import producing
from tests.helpers import THREE, Cli, Round, random_arrays

NewRound = Callable[..., Round]
# A shell's background jobs inherit that SIGINT is ignored; these commands must not.
DTL = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from dtl.cli.app import main; main()",
]

SLOW = (THREE, "--cipher", "direct")
KERNELS = [
    "gmpy2",
    pytest.param(
        "native", marks=pytest.mark.skipif(native.unavailable() is not None, reason="no kernel")
    ),
]


def start(*arguments: object, kernel: str = "gmpy2") -> "subprocess.Popen[bytes]":
    """Start a command, by default on gmpy2: slow enough to be caught in the middle."""
    command = [*DTL, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"DTL_KERNEL": kernel},
    )


def test_json_is_json_whatever_the_terminal_can_show(tmp_path: Path) -> None:
    job = tmp_path / "grüße\u2028"
    words = ("keygen", job, "--participants", "a,b,c", "--modulus-bits", 512, "--insecure")
    printed = subprocess.run(
        [*DTL, *map(str, words), "--json", "--quiet"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=True,
        capture_output=True,
    ).stdout
    assert json.loads(printed)["folder"] == str(job)


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_kill_at_any_time_leaves_the_output_absent_or_complete(new_round: NewRound) -> None:
    round_ = new_round(*SLOW)
    arrays = {"x": np.random.default_rng(0).normal(0, 0.1, 40000).astype(np.float32)}
    uploads = [round_.upload(p, arrays) for p in round_.names]
    sums = round_.aggregate(uploads)
    release = round_.release(sums)
    opened = round_.open(release, "carol")
    gradients = round_.folder / "alice.grads.safetensors"
    server, alice = round_.key("server"), round_.key("alice")
    commands: dict[str, tuple[object, ...]] = {
        "kill.upload": ("encrypt-grads", gradients, "--round", 2, "--key", alice),
        "kill.enc": ("aggregate", *uploads, "--key", server),
        "kill.release": ("release-model", sums, "--key", server),
        "kill.safetensors": ("open-model", release, "--key", alice),
    }
    sizes = {
        "kill.upload": uploads[0].stat().st_size,
        "kill.enc": sums.stat().st_size,
        "kill.release": release.stat().st_size,
        "kill.safetensors": opened.stat().st_size,
    }
    killed = 0
    for name, arguments in commands.items():
        out = round_.folder / name
        whole = time.monotonic()
        for delay in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.4, None):
            process = start(*arguments, "-o", out, "--workers", 1)
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            process.wait()
            if out.exists():
                assert out.stat().st_size == sizes[name]
                if process.returncode >= 0:  # not killed between the output's two names
                    break
        assert out.exists(), "the same command works again after a kill"
        assert time.monotonic() - whole < 60
        assert not hidden(round_.folder), "what a killed command left is cleaned up"
    assert killed


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_command_cleans_up(
    new_round: NewRound, sig: signal.Signals, kernel: str
) -> None:
    round_ = new_round(*SLOW)
    arrays = {"x": np.ones(300_000 if kernel == "gmpy2" else 3_000_000, np.float32)}
    gradients = round_.save("g.safetensors", arrays)
    out = round_.folder / "u"
    process = start(
        *("encrypt-grads", gradients, "--round", 1, "--key", round_.key("alice"), "-o", out),
        kernel=kernel,
    )
    while not hidden(round_.folder):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(sig)
    assert process.wait(20) == 1
    assert not out.exists()
    assert not hidden(round_.folder)
    assert (round_.keys / "alice.ledger").read_bytes().count(b"\n") == 1


def test_an_interruption_before_all_is_imported_shows_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"sys.path.insert(0, {str(tmp_path)!r}); from dtl.cli.entry import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")


@pytest.mark.parametrize("place", ["show_error", "show_result"])
def test_a_second_interruption_and_a_late_one_show_no_traceback(place: str) -> None:
    code = (
        "import os, signal, dtl.cli.app as app;"
        "stop = lambda *_: [os.kill(os.getpid(), signal.SIGTERM), None][1];"
        f"app.terminal.{place} = stop; {'app.run = stop;' if place == 'show_error' else ''}"
        "app.main()"
    )
    words = [sys.executable, "-c", code, "evaluate", "--model", "nowhere", "--data", "nowhere"]
    ended = subprocess.run(words, capture_output=True, check=False)
    assert ended.returncode in (1, 2)
    assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize(("where", "json"), [("full", ()), ("gone", ("--json",))])
def test_streams_that_cannot_be_written(
    json: tuple[str, ...], where: str, new_round: NewRound
) -> None:
    round_ = new_round()
    gradients = round_.save("g.safetensors", random_arrays(1))
    stream = os.open("/dev/full", os.O_WRONLY)
    if where == "gone":
        reader, stream = os.pipe()
        os.close(reader)

    def run(
        name: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
    ) -> "subprocess.CompletedProcess[bytes]":
        out = round_.folder / f"{name}.upload"
        words = ("encrypt-grads", gradients, "--round", 1, "--key", round_.key(name), "-o", out)
        command = [*DTL, *map(str, words), *json]
        ended = subprocess.run(command, check=False, stdout=stdout, stderr=stderr)
        assert name == "dave" or out.exists()
        return ended

    unprinted = run("alice", stdout=stream)
    assert unprinted.returncode == 1
    said = [line for line in unprinted.stderr.splitlines() if not line.startswith(b"dtl: warning")]
    assert len(said) == 2
    assert said[0].startswith(b"dtl: error: stdout: ")
    unheard = run("bob", stderr=stream)
    assert unheard.returncode == 0
    assert b"upload" in unheard.stdout
    assert run("dave", stderr=stream).returncode == 2
    os.close(stream)


def test_a_crash_between_ledger_and_rename_is_completed(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()

    def crash(self: AtomicOutput) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AtomicOutput, "commit", crash)
        with pytest.raises(KeyboardInterrupt):
            round_.upload("alice", random_arrays(1))
    out = round_.folder / "alice.upload"
    assert not out.exists()
    assert len(hidden(round_.folder)) == 1
    assert round_.upload("alice", random_arrays(1)) == out
    assert out.exists()
    assert not hidden(round_.folder)
    others = [round_.upload(p, random_arrays(1)) for p in ("bob", "carol")]
    round_.aggregate([out, *others])


def test_a_crash_before_the_ledger_leaves_everything_as_it_was(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()

    def full_disk(self: ledger.Ledger, entry: object) -> None:
        raise OSError(28, "No space left on device", str(self.path))

    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "append", full_disk)
        round_.upload("alice", random_arrays(1), code=1)
    assert not hidden(round_.folder)
    round_.upload("alice", random_arrays(1))


@pytest.mark.parametrize(
    ("cipher", "step"), [("lattice", "run"), ("direct", "run"), ("direct", "again")]
)
def test_gradients_that_change_while_they_are_read(
    cipher: str, step: str, new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round(THREE, "--cipher", cipher)
    original = getattr(producing._Encryption, step)
    if cipher == "direct":
        monkeypatch.setattr(producing, "KEEP_BYTES", 0)  # as with many values: it is read again
    arrays = random_arrays(1)
    path = round_.save("alice.grads.safetensors", arrays)

    def in_place(*arguments: object) -> object:
        with path.open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            file.write(b"\x11")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(producing._Encryption, step, in_place)
        round_.upload("alice", arrays, code=3)
    assert not (round_.folder / "alice.upload").exists()
    round_.upload("alice", arrays)


def test_commands_on_one_ledger_wait_for_each_other(new_round: NewRound) -> None:
    round_ = new_round()
    gradients = round_.save("g.safetensors", {"x": np.ones(20000, np.float32)})
    common = ("encrypt-grads", gradients, "--round", 1, "--key", round_.key("alice"))
    racing = [start(*common, "-o", round_.folder / f"{n}.upload") for n in range(4)]
    assert sorted(process.wait(60) for process in racing) == [0, 5, 5, 5]
    assert len(list(round_.folder.glob("*.upload"))) == 1


def test_keys_are_private_from_the_first_instant(
    dtl: Cli, tmp_path: Path, fixed_primes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = os.open

    def watch(path: object, flags: int, mode: int = 0o777, **more: object) -> int:
        if flags & os.O_CREAT and ".key" in str(path):
            seen.append(mode)
            assert flags & os.O_EXCL
        return original(path, flags, mode, **more)  # type: ignore[arg-type]

    before = os.umask(0)
    try:
        monkeypatch.setattr(os, "open", watch)
        round_ = Round(dtl, tmp_path, THREE)
    finally:
        os.umask(before)
    assert seen == [0o600] * 5
    for path in round_.keys.iterdir():
        private = path.suffix in (".key", ".ledger")
        assert path.stat().st_mode & 0o777 == (0o600 if private else 0o666), path
    assert round_.keys.stat().st_mode & 0o777 == 0o700


def test_a_readable_key_gets_a_warning(new_round: NewRound) -> None:
    round_ = new_round()
    round_.key("alice").chmod(0o644)
    gradients = round_.save("g.safetensors", random_arrays(1))
    options = ("--round", 1, "--key", round_.key("alice"), "-o", round_.folder / "u")
    assert "chmod 600" in round_.dtl("encrypt-grads", gradients, *options).err


def test_leftovers_of_the_living_are_left_alone(tmp_path: Path) -> None:
    with AtomicOutput(tmp_path / "out") as living:
        living.write(b"one")
        with AtomicOutput(tmp_path / "out") as other:
            other.write(b"two")
            other.commit()
        assert len(hidden(tmp_path)) == 1
    assert not hidden(tmp_path)
    assert (tmp_path / "out").read_bytes() == b"two"


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    from dtl.core.errors import UsageError

    with AtomicOutput(tmp_path / "out") as output:
        output.write(b"mine")
        write_file(tmp_path / "out", b"theirs")
        with pytest.raises(UsageError):
            output.commit()
    assert (tmp_path / "out").read_bytes() == b"theirs"
    assert not hidden(tmp_path)


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    with AtomicFolder(tmp_path / "job") as folder:
        (folder.temporary / "file").write_text("x")
    assert not list(tmp_path.iterdir())
    with AtomicFolder(tmp_path / "job") as folder:
        (folder.temporary / "file").write_text("x")
        folder.commit()
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["file"]


def test_an_interrupt_while_the_ledger_is_written_loses_nothing(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()
    original = ledger.Ledger.append

    def interrupted(self: ledger.Ledger, entry: Any) -> None:
        original(self, entry)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            round_.upload("alice", random_arrays(1))
    out = round_.folder / "alice.upload"
    assert not out.exists()
    gradients = round_.save("other.safetensors", {"x": np.ones(3, np.float32)})
    options = ("--round", 1, "--key", round_.key("alice"), "-o", out, "--json")
    told = round_.dtl("encrypt-grads", gradients, *options).json
    assert told["values"] == 335, "what is told is what was written"
    assert out.exists()
    assert not hidden(round_.folder)


def test_a_kill_before_the_ledger_is_written_leaves_no_second_upload(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()

    def killed(self: ledger.Ledger, entry: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            round_.upload("alice", random_arrays(1))
    assert len(hidden(round_.folder)) == 1
    round_.upload("alice", random_arrays(1))
    assert not hidden(round_.folder)


def test_a_torn_line_is_cut_and_a_changed_one_is_not(new_round: NewRound) -> None:
    round_ = new_round()
    round_.upload("alice", random_arrays(1))
    path = round_.keys / "alice.ledger"
    whole = path.read_bytes()
    from dtl.cli import app

    gradients = round_.folder / "alice.grads.safetensors"
    common = ("encrypt-grads", gradients, "--round", 1, "--key", round_.key("alice"), "-o", "x")
    command = [str(argument) for argument in common]
    for place in (*range(0, len(whole), 5), len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 4
        path.write_bytes(changed)
        assert app.run(command) == 4, place
    last = whole.rfind(b"\n", 0, -1) + 1
    path.write_bytes(whole[:-1])  # only the line end is gone: the upload stands
    assert app.run(command) == 5
    assert path.read_bytes() == whole
    for cut in (last + 1, (last + len(whole)) // 2, len(whole) - 2):
        path.write_bytes(whole[:cut])
        round_.upload("alice", random_arrays(1), "--round", 2, out=f"{cut}.upload")
    for cut in (20, whole.find(b"\n") - 1):  # the head came with the key: never torn
        path.write_bytes(whole[:cut])
        assert app.run(command) == 4
        assert app.run(["inspect", str(path)]) == 4
        assert path.read_bytes() == whole[:cut]


def test_workers_end_with_a_killed_command(new_round: NewRound) -> None:
    round_ = new_round(*SLOW)
    gradients = round_.save("g.safetensors", {"x": np.ones(1_000_000, np.float32)})
    out = round_.folder / "u"
    key = round_.key("alice")
    process = start(
        "encrypt-grads", gradients, "--round", 1, "--key", key, "-o", out, "--workers", 2
    )

    def children(pid: int) -> list[int]:
        listed = Path(f"/proc/{pid}/task/{pid}/children")
        return list(map(int, listed.read_text().split())) if listed.exists() else []

    workers: list[int] = []
    while len(workers) < 2:
        assert process.poll() is None
        workers = [p for p in children(process.pid) if b"LokyProcess" in cmdline(p)]
        time.sleep(0.05)
    # A worker watches its parent from its first task on: wait for the first results.
    while not any(path.stat().st_size > 1 << 16 for path in hidden(round_.folder)):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(cmdline(pid) for pid in workers):
        assert time.monotonic() < end, "a worker lives on"
        time.sleep(0.1)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_inputs_that_are_replaced_while_they_are_used(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtl.core.public import uploads as checks

    round_ = new_round()
    w0 = round_.save("w0.safetensors", random_arrays(9))
    uploads = [round_.upload(p, random_arrays(1), "--model", w0) for p in round_.names]
    original = checks.check_only
    other = (round_.save("w.safetensors", random_arrays(8)).read_bytes(), uploads[1].read_bytes())

    for victim, content in ((w0, other[0]), (uploads[0], other[1])):
        before = victim.read_bytes()

        def swap(*arguments: Any, victim: Path = victim, content: bytes = content) -> None:
            original(*arguments)
            status = victim.stat()
            with victim.open("r+b") as file:
                file.write(content)
            os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))

        with monkeypatch.context() as patch:
            patch.setattr(checks, "check_only", swap)
            round_.aggregate(uploads, "--initial", w0, code=3)
        victim.write_bytes(before)
    round_.aggregate(uploads, "--initial", w0)


def test_a_pending_upload_of_somebody_else_is_left_alone(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = new_round()

    def crash(self: AtomicOutput) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AtomicOutput, "commit", crash)
        with pytest.raises(KeyboardInterrupt):
            round_.upload("alice", random_arrays(1), out="out.upload")
    out = round_.upload("bob", random_arrays(2), out="out.upload")
    out.rename(round_.folder / "bob.upload")
    round_.upload("alice", random_arrays(3), "--round", 2, out="out.upload").unlink()
    assert len(hidden(round_.folder)) == 1
    round_.upload("alice", random_arrays(1), out="out.upload")
    assert not hidden(round_.folder)


@pytest.mark.parametrize("ending", ["0123456789abcdef.partial", "0" * 32 + ".pending"])
def test_the_second_name_of_a_finished_output_goes(new_round: NewRound, ending: str) -> None:
    round_ = new_round()
    upload = round_.upload("alice", random_arrays(1))
    second = upload.with_name(f".{upload.name}.{ending}")
    os.link(upload, second)  # as after a kill between giving the name and taking the other
    round_.upload("alice", random_arrays(1), code=2)
    assert not second.exists()
    assert upload.exists()


def test_a_name_that_cannot_be_made_durable_is_taken_back(
    new_round: NewRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtl.core.files import atomic

    round_ = new_round()
    calls = 0
    original = atomic.fsync_folder

    def broken(folder: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first is that of the sealed upload
            raise OSError(5, "Input/output error")
        original(folder)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "fsync_folder", broken)
        upload = round_.upload("alice", random_arrays(1), code=1)
    assert not upload.exists()
    round_.upload("alice", random_arrays(1))
    assert upload.exists()
