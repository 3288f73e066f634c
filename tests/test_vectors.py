"""The vectors: dtl makes them anew, accepts and refuses what it must; so does a second reader."""

import ast
import contextlib
import struct
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import pytest

from dtl.core.crypto import primitives
from dtl.core.errors import VerificationError
from dtl.core.files import sealed, tensors
from tests.helpers import Cli
from tests.second import commands, documents, releases, values
from tests.second.encoding import Refused
from tests.second.intermediates import Witnessed
from tests.vectors import faults, intermediates, make, scenarios

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


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good files, which every test puts back."""
    folder = tmp_path_factory.mktemp("scene")
    make.write_files(folder, make.read("three-rounds.json")["files"])
    return folder


@pytest.fixture
def folder(scene: Path) -> Iterator[Path]:
    good = content(scene)
    yield scene
    found = content(scene)
    for name in found.keys() - good.keys():
        (scene / name).unlink()
    for name, data in good.items():
        if found.get(name) != data:
            (scene / name).write_bytes(data)


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


def test_the_second_implementation_computes_every_intermediate(folder: Path) -> None:
    known = make.read("three-rounds.json")["intermediates"]
    assert Witnessed(folder).everything() == known


@pytest.mark.full
def test_the_second_implementation_computes_them_at_full_size(tmp_path: Path) -> None:
    """The result here, all the rest in `make vectors`: plain Python takes its time."""
    vector = make.read("full-size.json")
    make.write_files(tmp_path, vector["files"])
    found, known = Witnessed(tmp_path), vector["intermediates"]
    assert found.job.body["security"] == "128"
    assert found.halves() == known["halves"]
    assert found.result(tmp_path / "sum-1.enc") == known["results"]["sum-1.enc"]


def as_written(integers: list[int]) -> bytes:
    """The bytes of an opened file: 20 fraction bits, in the dtype of each tensor."""
    codes = "".join(scenarios.CODES[kind] * prod(shape) for _, kind, shape in scenarios.SPECS)
    return struct.pack(f"<{codes}", *(integer / 2**20 for integer in integers))


def test_the_second_implementation_agrees_on_a_fresh_job(
    dtl: Cli, tmp_path: Path, fixed_primes: None
) -> None:
    """Masks, a missing participant, an admission; every file, with both trapdoors."""
    with contextlib.chdir(tmp_path):
        scenarios.three_rounds(tmp_path, dtl)
        found = Witnessed(tmp_path).everything()
        assert found == intermediates.Witnessed(tmp_path).everything()
        job = documents.read_job(tmp_path / "job/job.json")
        at = values.initial_integers(job, values.read_plain(tmp_path / "w0.safetensors"))
        for number, stem in enumerate(("sum-1", "model-2", "model-3"), 1):
            uploads = [u for name, u in found["uploads"].items() if f"-{number}." in name]
            steps = [sum(e) for e in zip(*(u["integers"] for u in uploads), strict=True)]
            if number > 1:
                at = [w - e for w, e in zip(at, steps, strict=True)]
            result = found["results"][f"{stem}.enc"]
            assert result["integers"] == (at if number > 1 else steps)
            for name in scenarios.FOUR if number != 2 else scenarios.PRESENT:
                opened = values.read_plain(tmp_path / f"{name}.{stem}.safetensors")
                assert opened.metadata["opened"] == result["opened"]
                assert opened.data == as_written(result["integers"])
        for command in (faults.SUM, faults.MODEL_OUT, faults.FIRST, faults.VERIFY):
            commands.run(command.split())


@pytest.mark.full
def test_the_second_implementation_agrees_on_a_fresh_job_at_full_size(
    dtl: Cli, tmp_path: Path, fixed_primes: None
) -> None:
    with contextlib.chdir(tmp_path):
        scenarios.full_size(tmp_path, dtl)
    mine, other = Witnessed(tmp_path), intermediates.Witnessed(tmp_path)
    upload, release = tmp_path / "bob-1.upload", tmp_path / "sum-1.release"
    assert mine.upload(upload) == other.upload(upload)
    assert mine.release(release, "carol") == other.release(release)


def test_the_second_implementation_reads_npz(tmp_path: Path) -> None:
    text = '{"base":null,"format":"dtl/v2","kind":"gradients","opened":null,"round":7}'
    path = tmp_path / "gradients.npz"
    arrays = {
        "ä": np.arange(24, dtype="<f8").reshape(2, 3, 4),
        "fortran": np.asfortranarray(np.arange(6, dtype="<f2").reshape(2, 3) / 8),
        "b": np.array([0x3F80, 0xC000], "<u2").view("V2"),
        "__dtl__": np.array(text),
    }
    np.savez(path, allow_pickle=False, **arrays)
    found, known = values.read_plain(path), tensors.open_tensors(path)
    assert found.floats() == np.concatenate(list(tensors.values(known))).tolist()
    assert found.digest.hex() == tensors.initial_digest(known)
    assert known.metadata is not None
    assert found.metadata == known.metadata.plain()
    known.close()


def test_chunks_of_a_release_keep_their_places() -> None:
    """A vector of several chunks would be larger than all the others together."""
    key, core = bytes(range(32)), bytes(range(64))
    payload = b"".join(index.to_bytes(4, "little") for index in range(5 << 17))  # 2.5 MiB
    chunks = list(sealed.seal_stream(key, core, [payload[:7], payload[7:]]))
    assert [len(chunk) for chunk in chunks] == [2**20 + 16, 2**20 + 16, 2**19 + 16]
    assert releases.open_chunks(b"".join(chunks), key, core) == payload
    for wrong in (
        [chunks[1], chunks[0], chunks[2]],  # out of order
        [chunks[0], chunks[0], chunks[2]],  # one twice
        [chunks[0], chunks[1]],  # the last one cut off
        [chunks[0], chunks[2]],  # one left out
    ):
        with pytest.raises(Refused) as refused:
            releases.open_chunks(b"".join(wrong), key, core)
        assert refused.value.code == 4
        last = len(wrong) - 1
        with pytest.raises(VerificationError):
            _ = [primitives.open_chunk(key, i, i == last, c, core) for i, c in enumerate(wrong)]


def second(command: list[str]) -> int:
    try:
        commands.run(command)
    except Refused as refused:
        return refused.code
    return 0


@pytest.mark.parametrize("case", CASES)
def test_both_give_the_exit_code_of_the_vector(case: str, dtl: Cli, folder: Path) -> None:
    vector = make.read(f"{case}.json")
    assert (vector["exit"] == 0) == case.startswith("accepted/")
    make.write_files(folder, vector["files"])
    with contextlib.chdir(folder):
        before = content(folder)
        assert second(vector["command"]) == vector["exit"]
        dtl(*vector["command"], code=vector["exit"])
    after = content(folder)
    if vector["exit"]:
        assert after == before  # no output, no ledger line, nothing left behind
    else:
        assert OUTPUTS & set(vector["command"]) <= after.keys()


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
