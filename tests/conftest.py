"""Fixtures: the command line in this process, and jobs from fixed primes."""

import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest

from dtl.cli import app
from dtl.core.roles import key_center
from tests.helpers import PRIMES, THREE, Cli, Result, Round

# Commands ignore what they were started to ignore, such as SIGHUP under nohup; tests send it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests at full size take longest: start them first."""
    items.sort(key=lambda item: item.get_closest_marker("full") is None)


@pytest.fixture
def dtl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command in this process and expect its exit code, by default 0."""
    for name in ("DTL_JOB", "DTL_KEY", "DTL_PASSPHRASE_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DTL_DEBUG", "1")  # an unforeseen exception fails the test

    def run(*arguments: object, code: int = 0) -> Result:
        capsys.readouterr()
        found = app.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert found == code, f"dtl {' '.join(map(str, arguments))}: {captured.err}"
        errors = [line for line in captured.err.splitlines() if line.startswith("dtl: error: ")]
        assert len(errors) == (1 if code else 0)
        return Result(found, captured.out, captured.err)

    return run


@pytest.fixture
def fixed_primes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make keygen take the fixed primes."""

    monkeypatch.setattr(key_center, "_safe_primes", _fixed_primes)


def _fixed_primes(modulus_bits: int, work: object) -> Iterator[int]:
    return cycle(PRIMES[modulus_bits])


@pytest.fixture(scope="session")
def usual_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job that most tests want, made once: three participants without masks."""
    folder = tmp_path_factory.mktemp("usual") / "job"
    words = ["keygen", str(folder), "--participants", ",".join(THREE), "--no-masks", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_center, "_safe_primes", _fixed_primes)
        assert app.run([*words, "--modulus-bits", "512", "--insecure"]) == 0
    return folder


@pytest.fixture
def new_round(
    dtl: Cli, tmp_path: Path, fixed_primes: None, usual_job: Path
) -> Callable[..., Round]:
    """Make a job; names and keygen options as arguments. The first usual one is a copy."""
    made: list[Path] = []

    def make(
        names: tuple[str, ...] = THREE, *options: object, folder: str = "", masks: bool = False
    ) -> Round:
        place = tmp_path / folder if folder else tmp_path
        place.mkdir(exist_ok=True)
        if (names, options, masks, made) == (THREE, (), False, []):
            shutil.copytree(usual_job, place / "job")
        made.append(place)
        return Round(dtl, place, names, *options, *(() if masks else ("--no-masks",)))

    return make
