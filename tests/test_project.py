"""The house: packaging, floors, and one place for each thing."""

import ast
import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    "dtl.core.errors",
    "dtl.core.progress",
    "dtl.core.defaults",
    "dtl.core.dumps",
    "dtl.core.crypto",
    "dtl.core.encoding",
    "dtl.core.lattice",
    "dtl.core.ciphers",
    "dtl.datasets",
    "dtl.core.files",
    "dtl.core.cluster",
    "dtl.core.parallel",
    "dtl.core.public",
    "dtl.core.roles",
    "dtl.core.learning",
    "dtl.core.flower",
    "dtl.core.benchmark",
    "dtl.cli",
]
SOURCES = sorted([*ROOT.glob("core/**/*.py"), *ROOT.glob("cli/**/*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "dtl." + ".".join(part for part in parts if part != "__init__")


def floor_of(module: str) -> int:
    found = [
        n for n, floor in enumerate(FLOORS) if module == floor or module.startswith(f"{floor}.")
    ]
    return found[0] if found else -1


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward_only(path: Path) -> None:
    own = floor_of(module_of(path))
    for imported in imports_of(path):
        if imported.startswith("dtl.core.") or imported.startswith("dtl.cli"):
            assert floor_of(imported) <= own, imported
        if not module_of(path).startswith("dtl.cli"):
            assert imported.split(".")[0] not in ("typer", "rich", "click"), imported


def role_of(module: str) -> str:
    found = module.split(".")[3]
    return "auditor" if found == "verdicts" else found  # two modules of one role


def test_roles_do_not_import_one_another() -> None:
    for path in ROOT.glob("core/roles/**/*.py"):
        for imported in imports_of(path):
            if imported.startswith("dtl.core.roles."):
                assert role_of(imported) == role_of(module_of(path)), (path, imported)


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("gmpy2", "core/crypto/portable.py"),
        ("dtl.core.crypto._kernel", "core/crypto/native.py"),
        ("dtl.core.lattice._lattice", "core/lattice/native.py"),
        ("rich", "cli/terminal.py"),
        ("joblib", "core/parallel.py"),
        ("dask", "core/cluster.py"),
        ("distributed", "core/cluster.py"),
    ],
)
def test_libraries_live_in_one_place(library: str, allowed: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name == library or name.startswith(f"{library}.") for name in imports_of(path))
    }
    assert users == {allowed}


def test_flower_lives_in_its_apps() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name.split(".")[0] == "flwr" for name in imports_of(path))
    }
    assert users == {f"core/flower/{name}.py" for name in ("client", "payload", "server")}


def test_every_subpackage_is_listed() -> None:
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(configured["tool"]["setuptools"]["packages"])
    folders = {
        module_of(path)
        for top in ("cli", "core", "datasets")
        for path in ROOT.glob(f"{top}/**/__init__.py")
    }
    assert listed == folders


def test_the_base_install_is_no_larger_for_the_engines() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.split(r"[<>=!\[; ]", needed)[0] for needed in project["dependencies"]}
    expected = "cryptography gmpy2 joblib numpy pydantic rich scikit-learn typer"
    assert base == set(expected.split())


def test_heavy_imports_stay_out_of_the_start() -> None:
    code = (
        "import sys, dtl.cli.app;"
        "print([m for m in ('sklearn', 'joblib', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_crypto_commands_do_without_scikit_learn() -> None:
    code = (
        "import sys, dtl.core.roles.participant, dtl.core.roles.server;"
        "print([m for m in ('sklearn', 'joblib') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_data_sets_are_the_ones_described() -> None:
    for line in (ROOT / "datasets" / "SHA256SUMS").read_text().splitlines():
        expected, name = line.split()
        data = (ROOT / "datasets" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == expected
    from sklearn.datasets import load_breast_cancer, load_digits

    from dtl.core.learning.split import load_source

    for name, loaded in (("digits", load_digits()), ("breast_cancer", load_breast_cancer())):
        ours = load_source(name)
        assert (ours.x == loaded.data).all()
        labels = [str(loaded.target_names[label]) for label in loaded.target]
        assert [str(ours.classes[label]) for label in ours.y] == labels


def test_no_assert_guards_input() -> None:
    for path in SOURCES:
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not any(isinstance(node, ast.Assert) for node in nodes), path


def test_randomness_comes_from_secrets() -> None:
    """numpy's generator serves learning only; Python's `random` nobody."""
    for path in SOURCES:
        text = path.read_text()
        assert "random" not in {i.split(".")[0] for i in imports_of(path)}, path
        if "learning" not in path.parts:
            assert not re.search(r"np\.random|default_rng", text), path
