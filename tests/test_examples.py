"""The examples run as a newcomer runs them: real processes, commands and files only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dtl.core.encoding.fixed_point import Stochastic
from tests.helpers import THREE
from tests.test_readme import ROOT, environment

EXAMPLE = ROOT / "cli" / "examples" / "pytorch_cnn.py"
ROUNDS = 2


def flat(path: Path) -> NDArray[np.float64]:
    """All values in packing order."""
    arrays = load_file(path)
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)]).astype(np.float64)


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dtl.cli.examples.pytorch_cnn", str(folder), *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


def test_the_example_is_short_and_imports_nothing_of_dtl() -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) < 80
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "dtl" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert (node.module or "").split(".")[0] != "dtl"


def test_the_pytorch_example_learns_exactly_what_the_files_say(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is an optional extra")
    folder = tmp_path / "out"
    options = ("--rounds", str(ROUNDS), "--modulus-bits", "512", "--insecure")
    done = run(folder, *options)
    assert done.returncode == 0, done.stderr
    scores = [float(score) for score in re.findall(r"accuracy ([0-9.]+)", done.stdout)]
    assert len(scores) == ROUNDS
    assert scores[-1] > max(0.9, scores[0])

    current = np.rint(flat(folder / "w0.safetensors") * 2**16)
    for number in range(1, ROUNDS + 1):
        for name in THREE:
            assert (folder / f"{name}-{number}.upload").exists()
            rounding = Stochastic.from_text(f"{name}-{number}")
            gradients = flat(folder / f"{name}-{number}.grads.safetensors")
            current -= rounding(gradients * (1 / 3) * 2**16, 0)
        for name in THREE:
            opened = flat(folder / f"{name}-{number}.safetensors")
            assert (opened * 2**16 == current).all()

    again = run(folder, *options)  # never overwrites: dtl's own message, no traceback
    assert again.returncode == 2
    assert "dtl: error:" in again.stderr
    assert "Traceback" not in again.stderr
