"""Files that the version before wrote are refused as such, whatever they are."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dtl.core.errors import FormatError
from dtl.core.files import canonical_json, ledger
from dtl.core.files.atomic import AtomicOutput
from dtl.core.files.closing import Close, Reveal
from dtl.core.files.container import BODY, Container, ContainerWriter
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key, Pins, split_key
from dtl.core.files.ledger import LedgerHead
from dtl.core.files.tensors import METADATA_KEY, open_tensors

OLD = "written by an older version of dtl (dtl/v1), expected dtl/v2"
DIGEST = "0" * 128


def text(**fields: object) -> bytes:
    return canonical_json.dumps({"format": "dtl/v1"} | fields)


def refused(read: Callable[[], object], path: Path) -> None:
    with pytest.raises(FormatError) as error:
        read()
    assert error.value.message == f"{path}: {OLD}"
    assert error.value.exit_code == 3
    assert error.value.hint is not None


def test_a_job_file(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_bytes(text(N="f", g="4", h=[], participants=[]))
    refused(lambda: Job.load(path), path)


@pytest.mark.parametrize("rest", [{"sign": ""}, {"box": {"sealed": ""}}])
def test_a_key_file(tmp_path: Path, rest: dict[str, object]) -> None:
    path = tmp_path / "alice.key"
    path.write_bytes(text(name="alice", job=DIGEST, kgc="", ledger="0" * 32, **rest))
    refused(lambda: split_key(path.read_bytes(), str(path)), path)
    refused(lambda: Key.load(path, tmp_path / "job.json", lambda: b""), path)


def test_a_ledger() -> None:
    path = Path("alice.ledger")
    head = text(event="ledger", ledger="0" * 32, name="alice", link=DIGEST)
    refused(lambda: ledger.read_entries(head + b"\n", str(path)), path)


def test_a_ledger_whose_key_is_new(tmp_path: Path) -> None:
    pins = Pins(format="dtl/v2", name="alice", job=DIGEST, kgc=bytes(32), ledger="0" * 32)
    path = tmp_path / "alice.ledger"
    path.write_bytes(text(event="ledger", ledger=pins.ledger, name="alice", link=DIGEST) + b"\n")
    key = Key(tmp_path / "alice.key", pins, None, None)  # type: ignore[arg-type]
    refused(lambda: ledger.Ledger(key), path)


def test_only_the_head_of_a_ledger_has_a_format() -> None:
    first = ledger.first_line("0" * 32, "alice")
    assert isinstance(ledger.read_entries(first, "x")[0], LedgerHead)


@pytest.mark.parametrize("kind", [Close, Reveal])
def test_a_close_file_and_a_reveal(tmp_path: Path, kind: type[Close] | type[Reveal]) -> None:
    path = tmp_path / "closed"
    path.write_bytes(text(kind=kind.__name__.lower(), round=1, job=DIGEST))
    refused(lambda: kind.load(path, None), path)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["upload", "sum", "model", "release"])
def test_bulk_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    with AtomicOutput(path) as output:
        writer = ContainerWriter(output, text(kind=kind, signer="server"), {BODY: (1,)})
        writer.write(BODY, b"x")
        writer.finish(kind, b"k" * 32)
        output.commit()
    refused(lambda: Container(path), path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_the_metadata_of_plain_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    metadata = text(kind="weights", round=1, base=DIGEST, opened=DIGEST).decode()
    array = np.ones(1, np.float32)
    if suffix == ".npz":
        np.savez(path, x=array, __dtl__=np.array(metadata))
    else:
        save_file({"x": array}, path, {METADATA_KEY: metadata})
    refused(lambda: open_tensors(path), path)
