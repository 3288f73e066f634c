"""Fixtures: the command line in this process, and jobs from fixed primes."""

from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest

from dtl.cli import app
from dtl.core.roles import key_center
from tests.helpers import PRIMES, THREE, Cli, Result, Round


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

    def primes(modulus_bits: int, work: object) -> Iterator[int]:
        return cycle(PRIMES[modulus_bits])

    monkeypatch.setattr(key_center, "_safe_primes", primes)


@pytest.fixture
def new_round(dtl: Cli, tmp_path: Path, fixed_primes: None) -> Callable[..., Round]:
    """Make a job; names and keygen options as arguments."""

    def make(
        names: tuple[str, ...] = THREE, *options: object, folder: str = "", masks: bool = False
    ) -> Round:
        place = tmp_path / folder if folder else tmp_path
        place.mkdir(exist_ok=True)
        return Round(dtl, place, names, *options, *(() if masks else ("--no-masks",)))

    return make
