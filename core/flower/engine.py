"""Start Flower's programs, with everything switched off that would call other machines."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dtl.core.errors import DtlError, UsageError
from dtl.core.flower import SWITCHES

HOME, APP = "FLWR_HOME", "app"
PROGRAMS = {
    # Without the flag it would install the app's dependencies from a package index.
    "superlink": ("flower-superlink", "--disable-runtime-dependency-installation"),
    "supernode": ("flower-supernode",),
    "flwr": ("flwr",),
}
_DONE = "finished:completed"


def environment(home: Path) -> dict[str, str]:
    """The environment for a program of Flower's that keeps its own files in `home`."""
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join((beside, os.environ.get("PATH", "")))
    return {**os.environ, **SWITCHES, HOME: str(home.absolute()), "PATH": path}


def start(part: str, home: Path, options: Sequence[str]) -> None:
    """Become a SuperLink, a SuperNode or flwr: does not return. UsageError without the extra."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    program, *flags = PROGRAMS[part]
    os.execve(_program(program), [program, *flags, *options], environment(home))  # noqa: S606


def run(folder: Path, options: Sequence[str]) -> str:
    """Run the app that `flower-config` wrote into `folder`, to its end; returns the run's id.

    Flower itself ends with code 0 even where a run fails, so its list of runs is asked.
    Raises DtlError unless the run was completed.
    """
    app = folder / APP
    if not (app / "pyproject.toml").is_file():
        raise UsageError(f"{folder}: no app to run", "dtl flower-config writes one")
    flwr, env = _program("flwr"), environment(folder)
    before = {str(found["run-id"]) for found in _runs(flwr, env)}
    command = [flwr, "run", str(app), *options, "--stream"]
    # Its log goes to stderr: stdout is for results.
    code = subprocess.run(command, env=env, stdout=sys.stderr, check=False).returncode
    new = [found for found in _runs(flwr, env) if str(found["run-id"]) not in before]
    if code or len(new) != 1:
        raise DtlError("Flower did not start the run", "what it said stands above")
    if new[0]["status"] != _DONE:
        raise DtlError(f"the run failed: {new[0]['status']}", "what it said stands above")
    return str(new[0]["run-id"])


def _runs(flwr: str, env: dict[str, str]) -> list[dict[str, object]]:
    listed = subprocess.run(
        [flwr, "list", "--format", "json"], env=env, capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(listed.stdout)
        runs: list[dict[str, object]] = found["runs"]
    except (ValueError, KeyError, TypeError):
        raise DtlError("no SuperLink answers there") from None
    return runs


def _program(name: str) -> str:
    found = Path(sys.executable).with_name(name)
    if not found.is_file():
        raise UsageError("Flower is not installed", "pip install 'dtl-toolkit[flower]'")
    return str(found)
