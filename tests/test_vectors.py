"""The vectors: dtl makes them anew, accepts and refuses what it must; so does a second reader."""

import ast
import contextlib
import sys
from pathlib import Path

import pytest

from tests.helpers import Cli
from tests.second import commands
from tests.second.encoding import Refused
from tests.second.intermediates import Witnessed
from tests.vectors import make

SCENARIOS = ("three-rounds", "full-size")
CASES = sorted(
    f"{folder}/{path.stem}"
    for folder in ("accepted", "refused")
    for path in (make.HERE / folder).glob("*.json")
)
OUTPUTS = {"out", "out.safetensors"}


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="session")
def good_files() -> dict[str, str]:
    found: dict[str, str] = make.read("three-rounds.json")["files"]
    return found


def test_the_second_implementation_shares_no_code_with_dtl() -> None:
    allowed = {*sys.stdlib_module_names, "cryptography", "tests.second"}
    paths = sorted(Path(__file__).with_name("second").glob("**/*.py"))
    assert len(paths) > 10
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module or ""]
            elif isinstance(node, ast.Name):
                assert node.id not in ("__import__", "exec", "eval"), path
            for name in names:
                top = "tests.second" if name.startswith("tests.second") else name.split(".")[0]
                assert top in allowed - {"importlib"}, f"{path}: {name}"


def test_dtl_makes_the_vectors_anew() -> None:
    assert make.differences(make.make(), make.stored()) == []


@pytest.mark.full
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_second_implementation_computes_every_intermediate(
    scenario: str, tmp_path: Path
) -> None:
    vector = make.read(f"{scenario}.json")
    make.write_files(tmp_path, vector["files"])
    assert Witnessed(tmp_path).everything() == vector["intermediates"]


def second(command: list[str]) -> int:
    try:
        commands.run(command)
    except Refused as refused:
        return refused.code
    return 0


@pytest.mark.parametrize("case", CASES)
def test_both_give_the_exit_code_of_the_vector(
    case: str, dtl: Cli, tmp_path: Path, good_files: dict[str, str]
) -> None:
    vector = make.read(f"{case}.json")
    assert (vector["exit"] == 0) == case.startswith("accepted/")
    make.write_files(tmp_path, good_files)
    make.write_files(tmp_path, vector["files"])
    before = content(tmp_path)
    with contextlib.chdir(tmp_path):
        assert second(vector["command"]) == vector["exit"]
        assert content(tmp_path) == before
        dtl(*vector["command"], code=vector["exit"])
    if vector["exit"]:
        assert content(tmp_path) == before  # no output, no ledger line, nothing left behind
    else:
        outputs = OUTPUTS & set(vector["command"])
        assert outputs <= content(tmp_path).keys()


def test_every_command_of_a_refused_vector_does_work() -> None:
    """Otherwise a vector might be refused for something else than what it says."""
    vectors = {case: make.read(f"{case}.json") for case in CASES}
    good = {" ".join(v["command"]) for v in vectors.values() if not v["exit"] and not v["files"]}
    boxed = {" ".join(v["command"]) for v in vectors.values() if not v["exit"] and v["files"]}
    odd = {
        case
        for case, vector in vectors.items()
        if vector["exit"] and vector["files"] and " ".join(vector["command"]) not in good | boxed
    }
    assert odd == set()
    for vector in vectors.values():  # with good files, it is the command that is at fault
        if vector["exit"] and not vector["files"]:
            assert " ".join(vector["command"]) not in good
