"""Section 5 and plain files: integers, packing, digests of vectors, weights."""

import ast
import io
import itertools
import math
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tests.second import encoding, lattice
from tests.second.bulk import LONGEST_HEADER, check_layout
from tests.second.documents import Job
from tests.second.encoding import dumps, require
from tests.second.group import Blocks
from tests.second.lattice import Body

SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
CODES = {"F16": "e", "BF16": "f", "F32": "f", "F64": "d"}
NPZ = {"<f2": "F16", "|V2": "BF16", "<f4": "F32", "<f8": "F64"}


def unpack(job: Job, blocks: Blocks, values: int) -> list[int]:
    """The integers of the blocks of a vector of so many values."""
    slot, slots, N = job.block_slot, job.block_slots, job.group.N
    lift = sum(2 ** (slot - 1 + slot * i) for i in range(slots))
    found = []
    for m in (m for row in blocks for m in row):
        lifted = (m if m <= N // 2 else m - N) + lift
        require(0 <= lifted < 2 ** (slot * slots), 4, "a block out of range")
        for i in range(slots):
            found.append((lifted >> slot * i) % 2**slot - 2 ** (slot - 1))
    count = job.block_count(values)
    require(not any(found[count:]), 4, "padding is not zero")
    return found[:count]


def pack(job: Job, integers: list[int]) -> Blocks:
    """Public integers as blocks, in a direct job."""
    padded = integers + [0] * (-len(integers) % (7 * job.block_slots))
    numbers = [
        sum(e << job.block_slot * i for i, e in enumerate(padded[at : at + job.block_slots]))
        % job.group.N
        for at in range(0, len(padded), job.block_slots)
    ]
    return [numbers[at : at + 7] for at in range(0, len(numbers), 7)]


@dataclass
class Decoded:
    """The integers of a vector; in a lattice job also what the pad was made of."""

    integers: list[int]
    secret: list[int]
    errors: list[list[int]]


def decode(job: Job, blocks: Blocks, body: Body, values: int, uploads: int) -> Decoded:
    """Integers from opened blocks and the body, of so many uploads, without masks."""
    found = unpack(job, blocks, values)
    if not job.lattice:
        return Decoded(found, [], [])
    bound = 64 * uploads
    require(all(abs(k) <= bound for k in found), 4, "a secret out of range")
    key = lattice.public_key(job.digest)
    opened = lattice.open_body(key, found, body, job.shape(values))
    require(all(abs(e) <= bound for row in opened.errors for e in row), 4, "an error out of range")
    return Decoded(opened.integers, found, opened.errors)


def limit(job: Job, kind: str) -> int:
    """The largest integer of an opened model, or of a sum."""
    return job.largest if kind == "model" else len(job.names) * job.e_max


def contribution(job: Job, reals: list[float], scale: float, seed: bytes) -> list[int]:
    """Section 5.1: scaled, clipped, rounded stochastically, clamped."""
    stream = encoding.keystream(seed, bytes(12), 4 * len(reals))
    found = []
    for real, u in zip(reals, encoding.numbers(stream, 4), strict=True):
        x = real * scale * 2.0 ** job.body["fraction_bits"]
        x = max(-(2.0**60), min(2.0**60, x))
        floor = math.floor(x)
        e = floor + (u < (x - floor) * 2**32)
        found.append(max(-job.e_max, min(job.e_max, e)))
    return found


def check_range(integers: list[int], most: int, code: int) -> None:
    require(all(abs(e) <= most for e in integers), code, "a value out of range")


def vector_digest(job: Job, layout: Any, integers: list[int]) -> bytes:
    """V."""
    code = "i" if job.body["slot_bits"] <= 32 else "q"
    raw = struct.pack(f"<{len(integers)}{code}", *integers)
    return encoding.tree_hash("dtl/v2/vector", [dumps(layout)], raw)


def as_written(job: Job, layout: Any, integers: list[int]) -> bytes:
    """The tensors of an opened file; refused (4) where a value is not finite in its dtype."""
    parts, at = [], 0
    for entry in layout:
        count = prod(entry["shape"])
        reals = [e / 2 ** job.body["fraction_bits"] for e in integers[at : at + count]]
        at += count
        try:
            raw = struct.pack(f"<{count}{CODES[entry['dtype']]}", *reals)
        except OverflowError as error:
            raise encoding.Refused(4, "a value that is not finite in its dtype") from error
        parts.append(_bfloat16(raw) if entry["dtype"] == "BF16" else raw)
    return b"".join(parts)


def _bfloat16(raw: bytes) -> bytes:
    """float32 to the nearest bfloat16, ties to even; 4 if that is infinite."""
    words = [word for (word,) in struct.iter_unpack("<I", raw)]
    rounded = [word + 0x7FFF + (word >> 16) % 2 >> 16 for word in words]
    require(all(word % 2**15 < 0x7F80 for word in rounded), 4, "a value that is not finite")
    return struct.pack(f"<{len(rounded)}H", *rounded)


def content_digest(layout: Any, data: bytes) -> bytes:
    """The content of a plain file."""
    return encoding.tree_hash("dtl/v2/content", [dumps(layout)], data)


@dataclass
class Plain:
    """Named arrays: layout, bytes in packing order, and dtl's metadata."""

    layout: list[dict[str, Any]]
    data: bytes
    metadata: dict[str, Any]

    @property
    def digest(self) -> bytes:
        """V0."""
        return encoding.tree_hash("dtl/v2/initial", [dumps(self.layout)], self.data)

    @property
    def content(self) -> str:
        return content_digest(self.layout, self.data).hex()

    def floats(self) -> list[float]:
        found: list[float] = []
        at = 0
        for entry in self.layout:
            count, size = prod(entry["shape"]), SIZES[entry["dtype"]]
            raw = self.data[at : at + count * size]
            at += count * size
            if entry["dtype"] == "BF16":
                raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
            found.extend(struct.unpack(f"<{count}{CODES[entry['dtype']]}", raw))
        return found

    def integers(self, job: Job) -> list[int]:
        """In fixed point, rounded to nearest, ties to even."""
        return [round(x * 2 ** job.body["fraction_bits"]) for x in self.floats()]


def read_plain(path: Path) -> Plain:
    raw = path.read_bytes()
    layout, parts, text = _npz(raw) if raw[:2] == b"PK" else _safetensors(raw)
    metadata: dict[str, Any] = {}
    if text is not None:
        metadata = encoding.exactly(encoding.loads(text), "format kind round base opened content")
        require(metadata["format"] == "dtl/v2", 3, "another format")
        require(metadata["kind"] in ("weights", "gradients", "sum"), 3, "another kind")
        encoding.integer(metadata["round"], 0, 2**32 - 1)
        encoding.digest_or_null(metadata["base"])
        encoding.digest_or_null(metadata["opened"])
        encoding.digest_or_null(metadata["content"])
    check_layout(layout, sum(prod(entry["shape"]) for entry in layout))
    return Plain(layout, b"".join(parts), metadata)


def _safetensors(raw: bytes) -> tuple[list[dict[str, Any]], list[bytes], bytes | None]:
    """Any spelling of the header will do, but no gaps, overlaps, floats or keys twice."""
    require(len(raw) >= 8, 3, "no header")
    start = 8 + int.from_bytes(raw[:8], "little")
    require(start <= min(len(raw), 8 + LONGEST_HEADER), 3, "a header of a wrong length")
    try:
        entries = encoding.parse(raw[8:start])
        text = entries.pop("__metadata__", {}).get("dtl")
        layout, parts, spans = [], [], []
        for name in sorted(entries, key=str.encode):
            entry = encoding.exactly(entries[name], "dtype shape data_offsets")
            begin, end = entry["data_offsets"]
            require(entry["dtype"] in SIZES, 3, "not floats")
            require(end - begin == prod(entry["shape"]) * SIZES[entry["dtype"]], 3, "a length")
            layout.append({"name": name, "shape": entry["shape"], "dtype": entry["dtype"]})
            parts.append(raw[start + begin : start + end])
            spans.append((begin, end))
    except (ValueError, AttributeError, TypeError) as error:
        raise encoding.Refused(3, "not a safetensors file") from error
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    require(ends == [*(begin for begin, _ in spans), len(raw) - start], 3, "gaps or overlaps")
    return layout, parts, None if text is None else text.encode()


def _npz(raw: bytes) -> tuple[list[dict[str, Any]], list[bytes], bytes | None]:
    layout, parts, text = [], [], None
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        for member in sorted(archive.namelist(), key=lambda name: name[:-4].encode()):
            array = archive.read(member)
            size = int.from_bytes(array[8:10], "little")
            head = ast.literal_eval(array[10 : 10 + size].decode())
            data, shape = array[10 + size :], list(head["shape"])
            if member == "__dtl__.npy":
                text = data.decode("utf-32-le").encode()
                continue
            require(head["descr"] in NPZ, 3, "not floats")
            dtype = NPZ[head["descr"]]
            require(len(data) == prod(shape) * SIZES[dtype], 3, "a length")
            layout.append({"name": member[:-4], "shape": shape, "dtype": dtype})
            parts.append(_turned(data, shape, SIZES[dtype]) if head["fortran_order"] else data)
    return layout, parts, text


def _turned(data: bytes, shape: list[int], size: int) -> bytes:
    """Fortran order to C order."""
    steps = [prod(shape[:axis]) for axis in range(len(shape))]
    places = itertools.product(*map(range, shape))
    starts = (size * sum(i * step for i, step in zip(p, steps, strict=True)) for p in places)
    return b"".join(data[at : at + size] for at in starts)


@dataclass
class Basis:
    """What gradients are based on."""

    round: int
    base: str | None
    opened: str | None
    content: str | None


def read_weights(path: Path) -> tuple[Plain, Basis]:
    """Weights, and what metadata says of them; those of round 0 are checked."""
    found = read_plain(path)
    known = found.metadata
    require(not known or known["kind"] == "weights", 3, "not weights")
    if known and known["round"]:
        return found, Basis(known["round"], known["base"], known["opened"], found.content)
    digest = found.digest.hex()
    if known:
        stated = (known["base"], known["opened"])
        require(stated == (digest, digest), 4, "not the weights of the metadata")
    return found, Basis(0, digest, digest, found.content)


def is_finite(value: float) -> bool:
    return math.isfinite(value)


def initial_integers(job: Job, weights: Plain) -> list[int]:
    """Public initial weights in fixed point."""
    require(all(map(is_finite, weights.floats())), 7, "not finite")
    integers = weights.integers(job)
    check_range(integers, job.largest, 7)
    return integers
