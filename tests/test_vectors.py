"""The vectors: dtl makes them anew, accepts and refuses what it must; so does a second reader."""

import ast
import contextlib
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtl.core.crypto import primitives
from dtl.core.errors import VerificationError
from dtl.core.files import sealed, tensors
from tests.helpers import Cli
from tests.second import commands, documents, lattice, releases, results, values
from tests.second.encoding import Refused
from tests.second.intermediates import Witnessed
from tests.vectors import command_lines as lines
from tests.vectors import intermediates, make, scenarios
from tests.vectors.published import Published

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


@dataclass
class GoodFiles:
    """A folder with the good files of a job, which every test puts back."""

    folder: Path
    files: dict[str, bytes]

    def restore(self, found: dict[str, bytes]) -> None:
        """Put back what differs in `found`, the files that there are."""
        for name in found.keys() - self.files.keys():
            (self.folder / name).unlink()
        for name, data in self.files.items():
            if found.get(name) != data:
                (self.folder / name).write_bytes(data)


Scenes = dict[str, GoodFiles]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    """The good files of each job."""
    found = {}
    for title in (lines.LATTICE, lines.DIRECT):
        folder = tmp_path_factory.mktemp(title)
        make.write_files(folder, make.read(f"{title}.json")["files"])
        found[title] = GoodFiles(folder, content(folder))
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


@pytest.mark.slow
def test_dtl_makes_the_vectors_anew() -> None:
    assert make.differences(make.make(), make.stored()) == []


@pytest.mark.parametrize("title", [lines.LATTICE, lines.DIRECT])
def test_the_second_implementation_computes_every_intermediate(title: str, scenes: Scenes) -> None:
    """It makes secrets, errors, randomness, witnesses and commitments anew, too."""
    vector = make.read(f"{title}.json")
    found = Witnessed(scenes[title].folder, vector["inputs"]).everything()
    assert found == vector["intermediates"]


@pytest.mark.slow
@pytest.mark.full
def test_the_second_implementation_opens_a_sum_at_full_size(tmp_path: Path) -> None:
    """n = 8192 and 3072 bits. All the rest is in `make vectors`: plain Python takes its time."""
    vector = make.read("full-size.json")
    make.write_files(tmp_path, vector["files"])
    found, known = Witnessed(tmp_path, vector["inputs"]), vector["intermediates"]
    assert found.job.body["security"] == "128"
    assert make.shortened(found.halves()) == known["halves"]
    result = results.read_result(tmp_path / "sum-1.enc", found.job)
    secret = found.center.secret
    blocks = found.job.group.strong_open(result.residues(found.job), secret["p"], secret["q"])
    decoded = values.decode(found.job, blocks, result.body(found.job), 5, 2)
    assert len(decoded.secret) == 8192
    assert decoded.integers == known["results"]["sum-1.enc"]["integers"]


def as_written(integers: list[int]) -> bytes:
    """The bytes of an opened file: 16 fraction bits, in the dtype of each tensor."""
    codes = "".join(scenarios.CODES[kind] * prod(shape) for _, kind, shape in scenarios.SPECS)
    return struct.pack(f"<{codes}", *(integer / 2**16 for integer in integers))


def played(folder: Path, play: Callable[[Path, Published], None]) -> Published:
    """A fresh job: all that is random follows from bytes of the operating system."""
    dtl = Published(folder, os.urandom(16).hex(), {})
    play(folder, dtl)
    return dtl


def agreed(folder: Path, dtl: Published) -> dict[str, Any]:
    """What both implementations compute from a job, which must be the same."""
    found = Witnessed(folder, dtl.inputs).everything()
    assert found == intermediates.Witnessed(folder, dtl.inputs).everything()
    return found


def total(found: dict[str, Any], number: int) -> list[int]:
    """The sum of the integers of all uploads of a round."""
    uploads = [u for name, u in found["uploads"].items() if f"-{number}." in name]
    return [sum(e) for e in zip(*(u["integers"] for u in uploads), strict=True)]


def test_the_second_implementation_agrees_on_a_fresh_lattice_job(tmp_path: Path) -> None:
    """Masks, a missing participant, an admission, a sum; every file, with both trapdoors."""
    found = agreed(tmp_path, played(tmp_path, scenarios.three_rounds))
    job = documents.read_job(tmp_path / "job/job.json")
    at = values.initial_integers(job, values.read_plain(tmp_path / "w0.safetensors"))
    for number, stem in enumerate(("model-1", "model-2", "sum-3"), 1):
        steps = total(found, number)
        at = [w - e for w, e in zip(at, steps, strict=True)] if number < 3 else steps
        result = found["results"][f"{stem}.enc"]
        assert result["integers"] == at
        for path in tmp_path.glob(f"*.{stem}.safetensors"):
            opened = values.read_plain(path)
            assert opened.metadata["opened"] == result["opened"]
            assert opened.content == opened.metadata["content"] == result["content"]
            assert opened.data == as_written(result["integers"])
    with contextlib.chdir(tmp_path):
        for command in (lines.SUM, lines.MODEL_OUT, lines.FIRST, lines.VERIFY):
            commands.run(command.split())


def test_the_second_implementation_agrees_on_a_fresh_direct_job(tmp_path: Path) -> None:
    """A sum and a model of initial weights; steps along the sum, and an upload on it."""
    found = agreed(tmp_path, played(tmp_path, scenarios.sums))
    job = documents.read_job(tmp_path / "job/job.json")
    at = values.initial_integers(job, values.read_plain(tmp_path / "w0.safetensors"))
    steps = total(found, 1)
    assert found["results"]["sum-1.enc"]["integers"] == steps
    model = [w - e for w, e in zip(at, steps, strict=True)]
    assert found["results"]["model-1.enc"]["integers"] == model
    with contextlib.chdir(tmp_path):
        for command in (lines.DIRECT_MODEL, lines.DIRECT_VERIFY, lines.DIRECT_RECOMPUTED):
            commands.run(command.split())


@pytest.mark.parametrize("slot_bits", [4, 52])
def test_the_second_implementation_agrees_on_several_polynomials(
    slot_bits: int, tmp_path: Path
) -> None:
    """Three polynomials, of which the last is short; other slots, and V of 8 bytes a value."""
    count = 2 * 256 * (171 // slot_bits) + 19

    def play(folder: Path, dtl: Published) -> None:
        options = f"--slot-bits {slot_bits} --fraction-bits 0 --min-contributors 2"
        dtl(*f"keygen job --participants a,b {scenarios.INSECURE} {options}".split())
        specs = (("w", "F64", (count,)),)
        for name in "ab":
            (folder / f"{name}.grads").write_bytes(scenarios.tensors(name, 4.0, specs))
            words = f"{name}.grads --key job/{name}.key --round 1 -o {name}-1.upload"
            dtl("encrypt-grads", *words.split())
        words = "a-1.upload b-1.upload --key job/server.key -o sum-1.enc"
        dtl("aggregate", *words.split())
        dtl(*["release-model", "sum-1.enc", "--key", "job/server.key", "-o", "sum-1.release"])
        dtl(*["open-model", "sum-1.release", "--key", "job/a.key", "-o", "a.sum-1.safetensors"])

    found = agreed(tmp_path, played(tmp_path, play))
    assert found["results"]["sum-1.enc"]["integers"] == total(found, 1)
    opened = values.read_plain(tmp_path / "a.sum-1.safetensors")
    assert opened.floats() == list(map(float, total(found, 1)))
    assert any(total(found, 1))


def test_the_transform_of_the_second_implementation_is_what_its_document_says() -> None:
    """Word k is the polynomial's value at psi^(2 brv(k) + 1); psi and check values, section 10."""
    prime, degree = lattice.SMALL.primes[0], 256
    assert lattice.root(degree, prime) == 593322175005649
    assert [lattice.root(8192, p) for p in lattice.FULL.primes] == [
        *(951222983339009, 289445935094760, 988397239582577, 385061221388457)
    ]
    polynomial = lattice.sample(bytes(32), lattice.SMALL)
    words = lattice.transform(polynomial, prime)
    assert lattice.coefficients(words, prime) == [c % prime for c in polynomial]
    for k in (0, 1, 77, 255):
        point = pow(lattice.root(degree, prime), 2 * int(f"{k:08b}"[::-1], 2) + 1, prime)
        value = sum(c * pow(point, i, prime) for i, c in enumerate(polynomial)) % prime
        assert words[k] == value
    key = lattice.public_key(bytes(64))
    assert key.hex() == "f53884bb19b6ebfb4d6153aa3bceb799c5fdfaeed84265f9df9319e4240000ab"
    assert lattice.public(key, lattice.SMALL, 1)[3][-1] == 382418257937691
    assert lattice.public(key, lattice.FULL, 0)[0][:2] == [1035089198663063, 1044287120873006]


def test_the_second_implementation_reads_npz(tmp_path: Path) -> None:
    text = (
        '{"base":null,"content":null,"format":"dtl/v2","kind":"gradients","opened":null,"round":7}'
    )
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
def test_both_give_the_exit_code_of_the_vector(case: str, dtl: Cli, scenes: Scenes) -> None:
    vector = make.read(f"{case}.json")
    assert (vector["exit"] == 0) == case.startswith("accepted/")
    scene = scenes[vector["job"]]
    changed = make.changed(scene.files, vector["files"])
    before = {name: data for name, data in (scene.files | changed).items() if data is not None}
    with contextlib.chdir(scene.folder):
        make.write_files(scene.folder, vector["files"])
        try:
            assert second(vector["command"]) == vector["exit"]
            done = dtl(*vector["command"], code=vector["exit"])
        finally:
            after = content(scene.folder)
            scene.restore(after)
    if "/older-" in case:
        assert "dtl/v1" in done.err
    if "tried" in vector:  # half b was used, and the ledger says so before
        line = after[vector["tried"]].removeprefix(before[vector["tried"]])
        assert line.count(b"\n") == 1
        assert b'"event":"tried"' in line
        assert "the result cannot be opened" in done.err
        del before[vector["tried"]], after[vector["tried"]]
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
