"""The mutants: what each removes, and which tests must fail without it.

A mutant replaces texts of source files. Each old text must occur exactly once in its file, so
that a mutant that no longer applies is noticed. The tables are the .toml files beside this one:

    [[mutant]]
    name = "proof-without-d"
    defence = "What the proof of an upload hashes: its commitments"   # as SECURITY.md says it
    file = "core/crypto/proof.py"
    old = '...'
    new = '...'
    tests = ["tests/test_crypto.py::test_..."]
    kernel = "gmpy2"            # DTL_KERNEL, unless another is needed

Where several texts have to go, `edits = [{ file = ..., old = ..., new = ... }, ...]`.
"""

import ast
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MARKS = re.compile(r"<!-- mutants -->\n(.*)<!-- /mutants -->", re.DOTALL)
"""Between them stands the table in SECURITY.md."""
DEFAULT_KERNEL = "gmpy2"  # nothing compiled: the same on every machine


class DoesNotApplyError(Exception):
    """A text that a mutant replaces is not in its file, or not exactly once."""


@dataclass(frozen=True)
class Edit:
    """A text of a source file, and what stands there instead."""

    file: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        """The file's text with the edit; DoesNotApplyError."""
        found = text.count(self.old)
        if found != 1 or self.old == self.new:
            raise DoesNotApplyError(f"{self.file}: the old text occurs {found} times")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Mutant:
    """A defence that is removed, and the tests that must fail then."""

    group: str
    name: str
    defence: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    kernel: str

    def applied(self, root: Path) -> dict[str, str]:
        """The new text of every file that it changes, by the file's path under `root`."""
        changed: dict[str, str] = {}
        for edit in self.edits:
            before = changed.get(edit.file)
            text = (root / edit.file).read_text() if before is None else before
            try:
                changed[edit.file] = edit.applied(text)
            except DoesNotApplyError as error:
                raise DoesNotApplyError(f"{self.name}: {error}") from None
        return changed


def load() -> list[Mutant]:
    """All mutants, in the order of the tables."""
    mutants: list[Mutant] = []
    for path in sorted(HERE.glob("*.toml")):
        parsed = tomllib.loads(path.read_text())
        mutants += [_mutant(parsed["title"], plain) for plain in parsed["mutant"]]
    names = [mutant.name for mutant in mutants]
    if len(set(names)) != len(names):
        raise ValueError(f"a mutant's name is used twice: {sorted(names)}")
    return mutants


def _mutant(group: str, plain: dict[str, Any]) -> Mutant:
    plain = dict(plain)
    name, tests = plain.pop("name"), tuple(plain.pop("tests"))
    defence, kernel = plain.pop("defence"), plain.pop("kernel", DEFAULT_KERNEL)
    edits = tuple(Edit(**edit) for edit in plain.pop("edits", None) or [plain])
    if not tests:
        raise ValueError(f"{name}: names no test")
    return Mutant(group, name, defence, edits, tests, kernel)


def missing_tests(mutants: list[Mutant]) -> list[str]:
    """The tests that mutants name, and that are no functions of their files."""
    named = sorted({test for mutant in mutants for test in mutant.tests})
    functions: dict[str, set[str]] = {}
    for test in named:
        file = test.partition("::")[0]
        if file not in functions:
            path = ROOT / file
            tree = ast.parse(path.read_text() if path.exists() else "")
            functions[file] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    return [test for test in named if _function_of(test) not in functions[test.partition("::")[0]]]


def _function_of(test: str) -> str:
    """The name of a test's function, without its parameters."""
    return test.partition("[")[0].rpartition("::")[2]


def markdown(mutants: list[Mutant]) -> str:
    """The table of SECURITY.md: defences, and the tests that fail without them."""
    lines = ["| defence | fails without it | mutant |", "|---|---|---|"]
    group = ""
    for mutant in mutants:
        if mutant.group != group:
            group = mutant.group
            lines.append(f"| **{group}** | | |")
        tests = ", ".join(f"`{test.rpartition('::')[2]}`" for test in mutant.tests)
        lines.append(f"| {mutant.defence} | {tests} | `{mutant.name}` |")
    return "\n".join(lines) + "\n"


def marked(mutants: list[Mutant]) -> str:
    """The table between its marks, as it stands in SECURITY.md."""
    return f"<!-- mutants -->\n{markdown(mutants)}<!-- /mutants -->"
