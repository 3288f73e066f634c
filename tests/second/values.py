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

from tests.second import encoding
from tests.second.bulk import LONGEST_HEADER, check_layout
from tests.second.documents import Job
from tests.second.encoding import dumps, require
from tests.second.group import Blocks

SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
NPZ = {"<f2": "F16", "|V2": "BF16", "<f4": "F32", "<f8": "F64"}


def unpack(job: Job, blocks: Blocks, values: int) -> list[int]:
    """The integers of blocks."""
    group = job.group
    slot, N = group.slot_bits, group.N
    lift = sum(2 ** (slot - 1 + slot * i) for i in range(group.slots))
    found = []
    for m in (m for row in blocks for m in row):
        lifted = (m if m <= N // 2 else m - N) + lift
        require(0 <= lifted < 2 ** (slot * group.slots), 4, "a block out of range")
        for i in range(group.slots):
            found.append((lifted >> slot * i) % 2**slot - 2 ** (slot - 1))
    require(not any(found[values:]), 4, "padding is not zero")
    return found[:values]


def pack(job: Job, integers: list[int]) -> Blocks:
    group = job.group
    per_group = 7 * group.slots
    padded = integers + [0] * (-len(integers) % per_group)
    numbers = [
        sum(e << group.slot_bits * i for i, e in enumerate(padded[at : at + group.slots])) % group.N
        for at in range(0, len(padded), group.slots)
    ]
    return [numbers[at : at + 7] for at in range(0, len(numbers), 7)]


def check_headroom(job: Job, integers: list[int], kind: str) -> None:
    """The bound of an opened model, or of a sum."""
    bound = job.largest if kind == "model" else len(job.names) * job.e_max
    require(all(abs(e) <= bound for e in integers), 7, "headroom exhausted")


def vector_digest(layout: Any, integers: list[int]) -> bytes:
    """V."""
    raw = struct.pack(f"<{len(integers)}q", *integers)
    return encoding.hashed("dtl/v2/vector", dumps(layout), raw)


@dataclass
class Plain:
    """Named arrays: layout, bytes in packing order, and dtl's metadata."""

    layout: list[dict[str, Any]]
    data: bytes
    metadata: dict[str, Any]

    @property
    def digest(self) -> bytes:
        """V0."""
        return encoding.hashed("dtl/v2/initial", dumps(self.layout), self.data)

    def floats(self) -> list[float]:
        found: list[float] = []
        at = 0
        for entry in self.layout:
            count, size = prod(entry["shape"]), SIZES[entry["dtype"]]
            raw = self.data[at : at + count * size]
            at += count * size
            if entry["dtype"] == "BF16":
                raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
            code = {"F16": "e", "BF16": "f", "F32": "f", "F64": "d"}[entry["dtype"]]
            found.extend(struct.unpack(f"<{count}{code}", raw))
        return found

    def integers(self, job: Job) -> list[int]:
        """In fixed point, rounded to nearest, ties to even."""
        return [round(x * 2 ** job.body["fraction_bits"]) for x in self.floats()]


def read_plain(path: Path) -> Plain:
    raw = path.read_bytes()
    layout, parts, text = _npz(raw) if raw[:2] == b"PK" else _safetensors(raw)
    metadata: dict[str, Any] = {}
    if text is not None:
        metadata = encoding.exactly(encoding.loads(text), "format kind round base opened")
        require(metadata["format"] == "dtl/v2", 3, "another format")
        require(metadata["kind"] in ("weights", "gradients", "sum"), 3, "another kind")
        encoding.integer(metadata["round"], 0, 2**32 - 1)
        encoding.digest_or_null(metadata["base"])
        encoding.digest_or_null(metadata["opened"])
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


def read_weights(path: Path) -> tuple[Plain, int, bytes]:
    """Weights, their round, and the base that they are; those of round 0 are checked."""
    found = read_plain(path)
    known = found.metadata
    require(not known or known["kind"] == "weights", 3, "not weights")
    if known and known["round"]:
        return found, known["round"], bytes.fromhex(known["base"] or "")
    digest = found.digest
    if known:
        stated = (known["base"], known["opened"])
        require(stated == (digest.hex(), digest.hex()), 4, "not the weights of the metadata")
    return found, 0, digest


def is_finite(value: float) -> bool:
    return math.isfinite(value)


def initial_integers(job: Job, weights: Plain) -> list[int]:
    """Public initial weights in fixed point."""
    require(all(map(is_finite, weights.floats())), 7, "not finite")
    integers = weights.integers(job)
    check_headroom(job, integers, "model")
    return integers
