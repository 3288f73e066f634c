"""Builds a kernel against tests/emulated/immintrin.h, and loads it as a module."""

import fcntl
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
FLAGS = ("-std=c11", "-O1", "-fPIC", "-Wno-psabi", "-DDTL_EMULATED", f"-I{HERE}")


class NoCompiler(Exception):
    """There is no C compiler, or it cannot build this."""


def compiler() -> str:
    """The path of the C compiler; NoCompiler where there is none."""
    found = shutil.which(os.environ.get("CC", "gcc"))
    if found is None:
        raise NoCompiler("no compiler")
    return found


def compile_object(source: Path, target: Path, options: Sequence[str] = ()) -> None:
    """Compile one source; NoCompiler where that fails."""
    include = f"-I{sysconfig.get_paths()['include']}"
    _run([compiler(), *FLAGS, *options, include, "-c", str(source), "-o", str(target)])


def link(objects: Sequence[Path], target: Path, options: Sequence[str] = ()) -> None:
    """Make a shared library of compiled sources."""
    _run([compiler(), "-shared", *map(str, objects), *options, "-o", str(target)])


def build(sources: Sequence[Path], target: Path) -> None:
    """Compile sources into the shared library `target`, once for all processes that want it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        objects = [target.parent / f"{source.stem}.o" for source in sources]
        for source, made in zip(sources, objects, strict=True):
            compile_object(source, made)
        partial = target.with_suffix(".partial")
        link(objects, partial)
        partial.rename(target)


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise NoCompiler(f"{' '.join(command)}: {result.stderr[-2000:]}")


def load(name: str, library: Path) -> ModuleType:
    """The extension module `name` from a library; it is not entered into sys.modules."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
