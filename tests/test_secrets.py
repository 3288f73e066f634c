"""Where secrets must not be: core dumps, process lists, temporary files, behind links."""

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dtl.core.parallel import Work
from tests.helpers import THREE, Round, random_arrays
from tests.robustness.leaks import Needles

NewRound = Callable[..., Round]


def test_no_core_dump_of_a_command(tmp_path: Path) -> None:
    code = "import os, dtl.cli.app as app; app.run = os.abort; app.main()"

    def cores() -> None:
        _, most = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (most, most))

    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, preexec_fn=cores)  # noqa: PLW1509
    _, status, _ = os.wait4(process.pid, 0)
    assert os.WIFSIGNALED(status)
    assert not os.WCOREDUMP(status)
    assert not list(tmp_path.iterdir())


def test_a_command_sets_its_limit_of_core_dumps_to_zero() -> None:
    """Seen even where the system makes no core dumps."""
    code = (
        "import resource, dtl.cli.app as app;"
        "app.run = lambda: 40 + sum(resource.getrlimit(resource.RLIMIT_CORE)); app.main()"
    )

    def some() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))

    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    if most == 0 and os.geteuid() != 0:
        pytest.skip("no core dumps are allowed here in any case")
    done = subprocess.run([sys.executable, "-c", code], preexec_fn=some, check=False)
    assert done.returncode == 40


def _dumpable() -> int:
    """What the system would do with this process (1: make a core dump), by prctl(2)."""
    pr_get_dumpable = 3
    return int(ctypes.CDLL(None).prctl(pr_get_dumpable, 0, 0, 0, 0))


@pytest.mark.skipif(sys.platform != "linux", reason="no prctl")
def test_no_core_dump_is_piped_to_a_handler() -> None:
    code = (
        "import dtl.cli.app as app, tests.test_secrets as here;"
        "app.run = lambda: 40 + here._dumpable(); app.main()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 40
    found = Work(2).map("look", _dumpable, [()] * 8, 8, kernel=False)
    assert set(found) == {0}


@pytest.mark.parametrize("target", ["a file", "nothing"])
def test_an_output_that_is_a_link_is_refused(
    target: str, new_round: NewRound, tmp_path: Path
) -> None:
    round_ = new_round()
    gradients, aim = round_.save("g.safetensors", random_arrays(1)), tmp_path / "aim"
    if target == "a file":
        aim.write_bytes(b"precious")
    out = tmp_path / "link"
    out.symlink_to(aim)
    words = ("encrypt-grads", gradients, "--round", 1, "--key", round_.key("alice"), "-o", out)
    for more in ((), ("--force",)):
        round_.dtl(*words, *more, code=2)
    assert aim.exists() == (target == "a file")
    assert out.is_symlink()


def test_a_ledger_that_is_a_link_is_refused(new_round: NewRound) -> None:
    round_ = new_round()
    ledger = round_.keys / "alice.ledger"
    ledger.rename(ledger.with_name("elsewhere"))
    ledger.symlink_to("elsewhere")
    round_.upload("alice", random_arrays(1), code=2)


@pytest.mark.parametrize(("kernel", "cipher"), [("gmpy2", "direct"), ("portable", "lattice")])
def test_no_secret_stands_in_a_process_list(new_round: NewRound, kernel: str, cipher: str) -> None:
    round_ = new_round(THREE, "--cipher", cipher, masks=True)
    needles = Needles.of_keys(round_.keys)
    gradients = round_.save("g.safetensors", {"x": np.ones(60_000, np.float32)})
    out = round_.folder / "u"
    words = ("encrypt-grads", gradients, "--round", 1, "--key", round_.key("alice"), "-o", out)
    command = [sys.executable, "-c", "from dtl.cli.app import main; main()", *map(str, words)]
    temporary = round_.folder / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [*command, "--workers", "2"],
        env=os.environ | {"DTL_KERNEL": kernel, "TMPDIR": str(temporary)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    seen, looked = b"", 0
    while process.poll() is None:
        for pid in {process.pid, *_descendants(process.pid)}:
            for name in ("cmdline", "environ"):
                try:
                    seen += Path(f"/proc/{pid}/{name}").read_bytes()
                    looked += pid != process.pid
                except OSError:
                    continue
        for path in temporary.rglob("*"):
            assert not path.is_file() or not needles.find(path.read_bytes())
        if len(seen) > 1 << 20:
            assert not needles.find(seen)
            seen = b""
    assert process.returncode == 0
    assert not needles.find(seen)
    assert looked or cipher == "lattice", "workers were seen"


def _descendants(pid: int) -> list[int]:
    try:
        found = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []
    return found + [below for child in found for below in _descendants(child)]
