"""The README's and the demo's commands run as they stand, at full size, from real processes."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from dtl.cli import app
from tests.helpers import Cli
from tests.mutants.table import load, markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECURITY = (ROOT / "SECURITY.md").read_text()


def shell_blocks() -> list[str]:
    return re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def environment() -> dict[str, str]:
    """The environment with the `dtl` beside this Python first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DTL_")}
    return clean | {"PATH": path}


@pytest.mark.slow
@pytest.mark.full
def test_the_tour_runs_as_it_stands(tmp_path: Path) -> None:
    assert shutil.which("dtl", path=environment()["PATH"])
    blocks = [block for block in shell_blocks() if block.lstrip().startswith(("dtl", "for"))]
    tour = [block for block in blocks if "simulate" not in block]
    assert len(tour) == 4
    done = subprocess.run(
        ["sh", "-eux"],
        input="\n".join(tour),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    scores = [float(score) for score in re.findall(r"^accuracy +([0-9.]+)", done.stdout, re.M)]
    assert len(scores) == 2
    assert scores[0] > 0.3
    assert scores[1] > 0.9
    assert "may open" in done.stdout
    assert re.findall(r"^recomputed +(\w+)", done.stdout, re.M) == [
        *["no"] * 4,  # alice; all for round 2
        *("yes", "no"),  # bob with the uploads; dave
        *["yes"] * 2,  # verify
    ]
    assert re.search(r"^rounds recomputed +2 *$", done.stdout, re.M)
    verdicts = re.findall(r"^verdict +(\w+)", done.stdout, re.M)
    assert verdicts == ["good"] * 5


@pytest.mark.slow
@pytest.mark.full
def test_the_simulation_runs_as_it_stands_but_shorter(tmp_path: Path) -> None:
    (command,) = [block for block in shell_blocks() if block.startswith("dtl simulate")]
    subprocess.run(
        shlex.split(command.replace("--rounds 30", "--rounds 2")),
        cwd=tmp_path,
        env=environment(),
        check=True,
        capture_output=True,
    )
    for name in re.findall(r"`run/([\w.]+)`", README):
        assert (tmp_path / "run" / name).is_file(), name


def test_every_make_target_that_is_named_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make (\w+)", README + SECURITY, re.M))
    assert {"demo", "test", "mutants"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_command_is_in_the_readme_and_helps_with_an_example(dtl: Cli) -> None:
    command = typer.main.get_command(app.app)
    commands = list(command.commands)  # type: ignore[attr-defined]
    assert len(commands) >= 14
    for name in commands:
        assert f"`{name}`" in README, name
        shown = dtl(name, "--help").out
        assert "Example:" in shown, name
        assert f"dtl {name} " in shown.split("Example:")[1], name
    assert "Key generation center" in dtl("--help").out


def test_the_bare_command_helps_and_the_shell_completes() -> None:
    clean = environment()
    shown = subprocess.run(["dtl"], env=clean, capture_output=True, text=True, check=True)
    assert "Usage: dtl" in shown.stdout
    assert not shown.stderr
    asked = {"_DTL_COMPLETE": "complete_bash", "COMP_WORDS": "dtl re", "COMP_CWORD": "1"}
    completed = subprocess.run(
        ["dtl"], env=clean | asked, capture_output=True, text=True, check=False
    )
    assert completed.stdout.split() == ["reveal-masks", "release-model"]
    done = subprocess.run(
        ["dtl", "--version"], env=clean, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"dtl \d+\.\d+\.\d+\n", done.stdout)


def test_security_names_tests_that_exist() -> None:
    sources = (path.read_text() for path in ROOT.glob("tests/**/*.py"))
    tests = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    named = re.findall(r"[`:](\.{3}|)(_?\w*?test_\w+|_with_\w+)(\.{3}|)", SECURITY)
    assert len(named) > 20
    for left_out, name, cut in named:
        if not left_out:
            assert name in tests or (cut and any(t.startswith(name) for t in tests)), name
        else:
            assert any(t.endswith(name) for t in tests), name


def test_the_table_of_defences_is_the_one_of_make_mutants() -> None:
    _, _, rest = SECURITY.partition("<!-- mutants -->\n")
    table, _, _ = rest.partition("\n<!-- /mutants -->")
    assert table.strip() == markdown(load()).strip(), (
        "python -m tests.mutants.run --table prints it"
    )


def test_the_changelog_begins_with_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"^## \[(\d[\d.]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == project["version"]


def test_links_lead_somewhere() -> None:
    for document in [d for part in ("", "core/**/", "datasets/") for d in ROOT.glob(f"{part}*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document}: {link}"
