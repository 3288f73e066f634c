"""Tree hashes, and reads that are checked against them: what is used is what was signed."""

import hashlib
import mmap
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dtl.core.crypto import primitives
from dtl.core.errors import FormatError, VerificationError
from dtl.core.files import container as containers
from dtl.core.files.atomic import AtomicOutput
from dtl.core.files.container import (
    BODY,
    PROOF,
    RESIDUES,
    Container,
    ContainerWriter,
    Rows,
    file_digest,
)
from dtl.core.files.headers import TensorSpec
from dtl.core.files.tensors import ContentDigest, VectorDigest, encode_layout
from dtl.core.files.tree_hash import PIECE, TreeHash, piece_hash

SECRET = b"k" * 32
HEADER = b'{"format":"dtl/v2","kind":"upload","round":1}'
WIDTH = 4099  # rows that do not end where pieces do
LAYOUT = (TensorSpec(name="w", shape=(2,), dtype="F32"),)

Write = Callable[..., Path]


def sent_to_a_worker(rows: Rows) -> Rows:
    """Rows as another process gets them."""
    data = pickle.dumps(rows)
    assert len(data) < 1000
    arrived: Rows = pickle.loads(data)  # noqa: S301
    assert arrived == rows
    return arrived


def by_hand(label: str, *items: bytes, data: bytes) -> bytes:
    """The tree hash, spelled out."""
    pieces = [data[at : at + (4 << 20)] for at in range(0, len(data), 4 << 20)]
    parts = [label.encode(), *items, len(data).to_bytes(8, "little")]
    parts += [hashlib.sha256(piece).digest() for piece in pieces]
    return hashlib.sha512(
        b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    ).digest()


def noise(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(length)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a signed container of these tensors."""

    def make(name: str = "u", **tensors: bytes) -> Path:
        path = tmp_path / name
        shapes = {
            name: (len(data) // WIDTH, WIDTH) if name == RESIDUES else (len(data),)
            for name, data in tensors.items()
        }
        with AtomicOutput(path) as output:
            writer = ContainerWriter(output, HEADER, shapes)
            for tensor, data in reversed(tensors.items()):
                writer.write(tensor, data)
            writer.finish("upload", SECRET)
            output.commit()
        return path

    return make


@pytest.mark.parametrize("length", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE])
@pytest.mark.parametrize("step", [999_983, PIECE, 3 * PIECE])
def test_the_tree_hash_is_the_protocol_formula(length: int, step: int) -> None:
    data = noise(length)
    tree = TreeHash("dtl/v2/tensor", "body")
    for start in range(0, length, step):
        tree.update(memoryview(data)[start : start + step])
    assert tree.length == length
    assert tree.digest() == by_hand("dtl/v2/tensor", b"body", data=data)
    assert tree.digest("other") == by_hand("other", b"body", data=data)


def test_content_and_initial_digest_differ_in_the_label_only() -> None:
    content = ContentDigest(LAYOUT)
    content.update(b"12345678")
    layout = encode_layout(LAYOUT)
    for label, found in (("content", content.hexdigest()), ("initial", content.initial())):
        assert found == by_hand(f"dtl/v2/{label}", layout, data=b"12345678").hex()


@pytest.mark.parametrize(("bits", "dtype"), [(3, "<i4"), (32, "<i4"), (33, "<i8"), (52, "<i8")])
def test_opened_integers_count_as_i32_where_they_fit(bits: int, dtype: str) -> None:
    integers = np.array([-(2 ** (bits - 2)) + 1, 0, 2 ** (bits - 2) - 1])
    state = VectorDigest(LAYOUT, 3, bits)
    state.update(integers[:1])
    state.update(integers[1:])
    expected = by_hand(
        "dtl/v2/vector", encode_layout(LAYOUT), data=integers.astype(dtype).tobytes()
    )
    assert state.hexdigest() == expected.hex()


def test_a_vector_digest_wants_all_integers() -> None:
    state = VectorDigest(LAYOUT, 2, 24)
    state.update(np.array([1]))
    with pytest.raises(ValueError, match="missing"):
        state.hexdigest()


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_the_file_digest_is_the_protocol_formula(write: Write, lanes: int) -> None:
    tensors = {BODY: noise(2 * PIECE + 5), PROOF: b"", RESIDUES: noise(3 * WIDTH)}
    path = write(**tensors)
    digests = {
        name: by_hand("dtl/v2/tensor", name.encode(), data=data) for name, data in tensors.items()
    }
    parts = [b"dtl/v2/digest", HEADER]
    parts += [part for name in sorted(digests) for part in (name.encode(), digests[name])]
    encoded = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    expected = hashlib.sha512(encoded).digest()
    assert file_digest(HEADER, digests) == expected
    done: list[int] = []
    with Container(path) as container:
        public = primitives.signing_public_key(SECRET)
        found = container.verify("upload", public, lambda _, n, __: done.append(n), lanes)
        assert found == expected
        assert done == sorted(done)
        assert done[-1] == sum(map(len, tensors.values()))
        for name, data in tensors.items():
            assert container.tensor_digest(name) == digests[name]
            assert container.whole(name) == data
            assert b"".join(container.chunks(name)) == data


def test_any_changed_byte_breaks_the_signature(write: Write) -> None:
    path = write(body=noise(PIECE + 10))
    data = bytearray(path.read_bytes())
    header = data.index(b"1", data.index(b"round"))
    for place in (len(data) - 1, len(data) - PIECE - 10, header):
        data[place] ^= 1
        path.write_bytes(data)
        with Container(path) as container, pytest.raises(VerificationError):
            container.verify("upload", primitives.signing_public_key(SECRET), lanes=2)
        data[place] ^= 1


def test_rows_over_the_borders_of_pieces(write: Write) -> None:
    count = 2 * PIECE // WIDTH + 10
    data = noise(count * WIDTH)
    with Container(write(residues=data)) as container:
        rows, single = container.rows(RESIDUES), container.bytes_of(RESIDUES)
    for first, number in ((0, count), (0, 1), (PIECE // WIDTH - 1, 3), (count - 1, 1), (5, 0)):
        expected = data[first * WIDTH : (first + number) * WIDTH]
        assert rows.read(first, number) == expected
        assert single.read(first * WIDTH, number * WIDTH) == expected
    for first, length in ((PIECE - 1, 2), (PIECE, PIECE), (PIECE - 1, PIECE + 2), (len(data), 0)):
        assert single.read(first, length) == data[first : first + length]
    for first, number in ((0, count + 1), (-1, 1), (count, 1), (2, -1)):
        with pytest.raises(ValueError, match="no such rows"):
            rows.read(first, number)


def test_rows_of_an_empty_tensor(write: Write) -> None:
    with Container(write(proof=b"", residues=b"")) as container:
        assert container.whole(PROOF) == b""
        assert list(container.chunks(PROOF)) == []
        assert container.rows(RESIDUES).read(0, 0) == b""
        assert container.bytes_of(PROOF).read(0, 0) == b""


def test_rows_travel(write: Write) -> None:
    data = noise(PIECE + 100)
    with Container(write(body=data)) as container:
        rows = container.bytes_of(BODY)
    assert rows.read(0, 10) == data[:10]  # keeps the piece
    assert sent_to_a_worker(rows).read(PIECE - 1, 3) == data[PIECE - 1 : PIECE + 2]


def change(path: Path, place: int, through_mmap: bool) -> None:
    """Change a byte of a file, without a trace in its stamp where the mapping does not sync."""
    if not through_mmap:
        with path.open("r+b") as file:
            file.seek(place, os.SEEK_END)
            byte = file.read(1)
            file.seek(place, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        return
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[len(mapped) + place] ^= 1


@pytest.mark.parametrize("through_mmap", [True, False])
@pytest.mark.parametrize("place", [-1, -PIECE, -2 * PIECE - 5])
def test_bytes_that_change_after_the_check_are_refused(
    write: Write, through_mmap: bool, place: int
) -> None:
    data = noise(2 * PIECE + 5)
    path = write(body=data)
    with Container(path) as container:
        container.verify("upload", primitives.signing_public_key(SECRET))
        rows = container.bytes_of(BODY)
        change(path, place, through_mmap)
        for reader in (rows, sent_to_a_worker(rows)):
            with pytest.raises(FormatError, match="u: the file changed while it was read"):
                reader.read(len(data) + place, 1)
        with pytest.raises(FormatError, match="changed while it was read"):
            container.whole(BODY)
        change(path, place, through_mmap)
        assert container.whole(BODY) == data


def test_a_file_that_was_cut_or_replaced_is_refused(write: Write) -> None:
    path = write(body=noise(1000))
    with Container(path) as container:
        rows = container.bytes_of(BODY)
    other = write("other", body=noise(1000, seed=1))
    other.replace(path)
    with pytest.raises(FormatError, match="changed while it was read"):
        rows.read(0, 1)
    os.truncate(path, 900)
    with pytest.raises(FormatError, match="changed while it was read"):
        rows.read(0, 1)


def test_a_file_that_was_only_touched_is_not(write: Write) -> None:
    data = noise(1000)
    path = write(body=data)
    with Container(path) as container:
        rows = container.bytes_of(BODY)
        os.utime(path)
        path.write_bytes(path.read_bytes())
        assert rows.read(0, 1000) == container.whole(BODY) == data


def test_short_reads_are_no_change(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(PIECE + 12_345)
    path = write(body=data)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, at: real(fd, min(length, 1000), at))
    with Container(path) as container:
        container.verify("upload", primitives.signing_public_key(SECRET))
        assert container.bytes_of(BODY).read(5, PIECE + 100) == data[5 : PIECE + 105]
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FormatError, match="changed while it was read"):
            container.bytes_of(BODY).read(PIECE, 1)


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the pieces that are hashed from now on."""
    lengths: list[int] = []

    def counted(data: bytes) -> bytes:
        lengths.append(len(data))
        return piece_hash(data)

    monkeypatch.setattr(containers, "piece_hash", counted)
    return lengths


def test_neighbouring_reads_hash_a_piece_once(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise(3 * PIECE)
    with Container(write(body=data)) as container:
        rows = container.bytes_of(BODY)
    lengths = count_hashes(monkeypatch)
    step = PIECE // 3 + 1
    found = [rows.read(at, min(step, len(data) - at)) for at in range(0, len(data), step)]
    assert b"".join(found) == data
    assert lengths == [PIECE] * 3


def test_few_pieces_are_kept(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "KEPT_PIECES", 2)
    monkeypatch.setattr(containers, "_recent", containers._Recent())
    paths = [write(str(number), body=noise(1000, number)) for number in range(3)]
    files = []
    for path in paths:
        with Container(path) as container:
            files.append(container.bytes_of(BODY))
    lengths = count_hashes(monkeypatch)
    for rows in files:
        rows.read(0, 10)
    files[1].read(10, 10)
    files[2].read(10, 10)
    assert len(lengths) == 3
    files[0].read(10, 10)
    assert len(lengths) == 4


def test_threads_share_rows(write: Write) -> None:
    data = noise(3 * PIECE)
    with Container(write(body=data)) as container:
        rows = container.bytes_of(BODY)
    starts = range(0, len(data), 100_003)
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda at: rows.read(at, min(100_003, len(data) - at)), starts)
        assert b"".join(parts) == data


def test_copying_a_tensor(write: Write, tmp_path: Path) -> None:
    data = noise(PIECE + 77)
    path = write(body=data, proof=b"p")
    with Container(path) as container:
        rows = container.bytes_of(BODY)
        digest = container.tensor_digest(BODY)

    def copy(rows: Rows) -> None:
        with AtomicOutput(tmp_path / "copy", force=True) as output:
            writer = ContainerWriter(output, HEADER, {BODY: (len(data),), PROOF: (2,)})
            writer.write(PROOF, b"a")
            writer.copy(BODY, rows)
            writer.write(PROOF, b"b")
            assert writer.tensor_digest(BODY) == digest
            writer.finish("upload", SECRET)
            output.commit()

    copy(rows)
    with Container(tmp_path / "copy") as container:
        container.verify("upload", primitives.signing_public_key(SECRET))
        assert (container.whole(BODY), container.whole(PROOF)) == (data, b"ab")
        copy(container.bytes_of(BODY))
    change(path, -1 - len(b"p"), True)
    with pytest.raises(FormatError, match="changed while it was read"):
        copy(rows)


def test_a_container_is_not_signed_before_it_is_complete(tmp_path: Path) -> None:
    with AtomicOutput(tmp_path / "u") as output:
        writer = ContainerWriter(output, HEADER, {BODY: (4,)})
        writer.write(BODY, b"123")
        with pytest.raises(ValueError, match="body is not complete"):
            writer.finish("upload", SECRET)
