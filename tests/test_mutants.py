"""The mutants of `make mutants` apply, and SECURITY.md says of them what is so."""

import pytest

from tests.mutants.table import (
    MARKS,
    ROOT,
    DoesNotApplyError,
    Edit,
    Mutant,
    load,
    marked,
    missing_tests,
)


@pytest.mark.parametrize("mutant", load(), ids=lambda mutant: mutant.name)
def test_every_mutant_applies(mutant: Mutant) -> None:
    for name, text in mutant.applied(ROOT).items():
        assert text != (ROOT / name).read_text()
        compile(text, name, "exec")


def test_every_test_that_a_mutant_names_is_there() -> None:
    assert missing_tests(load()) == []


def test_security_md_has_the_table() -> None:
    """Made by `python -m tests.mutants.run --write`."""
    found = MARKS.search((ROOT / "SECURITY.md").read_text())
    assert found is not None
    assert found.group() == marked(load())


def test_a_text_must_be_there_once() -> None:
    for text in ("", "x x"):
        with pytest.raises(DoesNotApplyError):
            Edit("f", "x", "y").applied(text)
    assert Edit("f", "x", "y").applied("a x") == "a y"
