"""What fuzz and faults have found: small files that took much, and runs that did not go on."""

import io
import json
import os
import resource
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import numpy as np
import pytest
from pydantic import FailFast

from dtl.core.files.safetensors import MAX_HEADER_BYTES, build_header
from dtl.core.files.schema import Document
from dtl.core.files.shards import Shard, encode_shard, load_shard
from tests.helpers import Cli, Round, random_arrays
from tests.robustness.faults import run_child
from tests.robustness.mutations import npy

NewRound = Callable[..., Round]
MEMORY = 200 << 20  # bytes; before they were bounded, most took a gigabyte and more


def _container(header: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _upload(layout: str) -> bytes:
    digest = "0" * 128
    plain: dict[str, object] = {
        "format": "dtl/v2",
        "kind": "upload",
        "job": digest,
        "signer": "alice",
        "layout": "@",
    }
    plain |= {"base": None, "created": "2026-01-01T00:00:00Z", "masked": True, "roster": digest}
    plain |= {"round": 1, "values": 1}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":")).replace('"@"', layout)
    return build_header({"dtl": text, "signature": digest}, [("residues", "U8", (0,))])


def _close(missing: str) -> bytes:
    digest = "0" * 128
    plain: dict[str, object] = {"format": "dtl/v2", "kind": "close", "job": digest, "round": 1}
    plain |= {"roster": digest, "base": None, "created": "2026-01-01T00:00:00Z", "missing": "@"}
    plain |= {"signer": "server", "contributors": [], "signature": "A" * 86 + "=="}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":")).replace('"@"', missing)
    return text.encode()


def _archive(member: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("x.npy", member)
    return out.getvalue()


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _bind(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(here)


MANY = MAX_HEADER_BYTES // 32
ARRAY = "{'descr': '<f8', 'fortran_order': %s, 'shape': (%d,), }\n"
BOMBS: dict[str, Callable[[], bytes]] = {
    "a layout of no tensors": lambda: _upload("[" + "0," * MANY + "0]"),
    "a shape without end": lambda: _upload(
        '[{"dtype":"F32","name":"x","shape":[' + "-1," * (MANY // 2) + "1]}]"
    ),
    "a close file of nobody": lambda: _close("[" + "0," * MANY + "0]"),
    "a roster of nobody": ('{"participants":[' + "{}," * MANY + "{}]}").encode,
    "many seeds": lambda: json.dumps(
        {"mask_seeds": {f"{n:06}": 0 for n in range(MANY // 4)}}, separators=(",", ":")
    ).encode(),
    "long metadata": lambda: _container(
        json.dumps({"__metadata__": {"dtl": "[" + "[]," * MANY + "[]]"}}).encode()
    ),
    "many tensors": lambda: _container(
        json.dumps(
            {
                f"{n:x}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                for n in range((1 << 16) + 1)
            }
        ).encode()
    ),
    "zeros": lambda: _archive(npy(ARRAY % (True, 1 << 24), bytes(1 << 27))),
    "a long header": lambda: _archive(npy(" " * (1 << 26), b"", 2)),
    "an array before a zip": lambda: (
        npy(ARRAY % (False, 1 << 44), b"") + _archive(npy(ARRAY % (False, 9), bytes(72)))
    ),
    "bzip2": lambda: _archive(npy(ARRAY % (False, 9), bytes(72)), zipfile.ZIP_BZIP2),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_do_not_take_much(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "bad.npz").write_bytes(BOMBS[name]())

    ended = run_child(folder, ("inspect", "bad.npz"), prepare=_limit)
    assert ended.code == 3, ended.printed


def test_a_csv_file_that_is_one_long_line(tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    with (folder / "long.csv").open("wb") as file:
        file.truncate(1 << 40)
    words = ("split-data", "long.csv", "--participants", "a,b", "--out", "out")
    ended = run_child(folder, words, prepare=_limit)
    assert ended.code == 3, ended.printed
    assert not (folder / "out").exists()


def test_a_ledger_that_does_not_end(new_round: NewRound) -> None:
    round_ = new_round()
    ledger = round_.keys / "alice.ledger"
    good = ledger.read_bytes()
    for longer in (good + bytes(1 << 20), good.removesuffix(b"\n")):  # torn: cut off, completed
        ledger.write_bytes(longer)
        round_.upload("alice", random_arrays(1))
        (round_.folder / "alice.upload").unlink()
        ledger.write_bytes(good)
    with ledger.open("r+b") as file:
        file.truncate(1 << 40)
    round_.upload("alice", random_arrays(1), code=4)
    assert ledger.stat().st_size == 1 << 40


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, _bind])
def test_a_ledger_that_is_no_file(make: Callable[[Path], None], new_round: NewRound) -> None:
    round_ = new_round()
    ledger = round_.keys / "alice.ledger"
    ledger.unlink()
    make(ledger)
    round_.upload("alice", random_arrays(1), code=2)


def test_sizes_beyond_all_bounds(dtl: Cli, tmp_path: Path) -> None:
    dtl("split-data", "digits", "--participants", "a", "--out", tmp_path / "shards")
    data, out = tmp_path / "shards" / "a.npz", tmp_path / "w.npz"
    dtl("init-model", "--data", data, "--hidden", 1 << 64, "-o", out, code=2)
    dtl("bench", "--values", 1 << 64, code=2)
    dtl("split-data", "digits", "--participants", "a", "--out", tmp_path / ("a" * 300), code=2)


def test_every_list_ends_its_check_at_the_first_bad_item() -> None:
    kinds, lists = [Document], 0
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        for name, field in kind.model_fields.items():
            for found in _tuples(field.rebuild_annotation()):
                lists += 1
                assert found, f"{kind.__name__}.{name}: use Items"
    assert lists > 10


def _tuples(annotation: Any, marks: tuple[object, ...] = ()) -> Iterator[bool]:
    """For every list of any length in a type, whether it is marked to fail fast."""
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        yield from _tuples(inner[0], (*marks, *inner[1:]))
        return
    if get_origin(annotation) is tuple and Ellipsis in inner:
        yield any(isinstance(mark, FailFast) for mark in marks)
    for part in inner:
        if part is not Ellipsis:
            yield from _tuples(part)


@pytest.mark.parametrize("rows", [4_913_961, 9_000_000])  # just too well: the headers count
def test_a_shard_that_packs_too_well_is_stored_as_it_is(rows: int, tmp_path: Path) -> None:
    path = tmp_path / "zeros.npz"
    path.write_bytes(
        encode_shard(Shard(np.zeros((rows, 1)), np.arange(rows) % 2, np.array(["a", "b"])))
    )
    assert len(load_shard(path).x) == rows


@pytest.mark.parametrize(
    "text", ["a,b\n1,x\n2," + "c" * 257, "a,b\n" + "1,1\n" * 3 + "2," + "c" * 120_000]
)
def test_a_long_class_is_refused(text: str, dtl: Cli, tmp_path: Path) -> None:
    source = tmp_path / "long.csv"
    source.write_text(text)
    dtl("split-data", source, "--participants", "a,b", "--out", tmp_path / "out", code=3)
    assert not (tmp_path / "out").exists()


def test_a_pipe_for_a_csv_file(dtl: Cli, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    dtl("split-data", pipe, "--participants", "a,b", "--out", tmp_path / "out", code=2)
