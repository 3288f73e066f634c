"""Mutations that know the formats: bytes, JSON, safetensors, npz, CSV, and validly signed lies.

Every function takes a source of chance and a file's bytes, and returns other bytes; any
exception says that the mutation cannot be done with that file (no JSON in it, say).
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from dtl.core.crypto import primitives
from dtl.core.files import canonical_json
from dtl.core.files.container import file_digest
from dtl.core.files.job_file import signed_digest
from dtl.core.files.safetensors import build_header
from tests.forging import digest_of

Mutation = Callable[[Random, bytes], bytes]

NUMBERS = (
    *("-1", "0", "1", "2", "1e3", "1.0", "1e999", "NaN", "Infinity", "-Infinity"),
    *(str(1 << bits) for bits in (31, 32, 47, 48, 63, 64, 128)),
    str((1 << 63) - 1),
    "9" * 4000,
    "9" * 5000,
)
LOOK_ALIKES = {"a": "а", "e": "е", "o": "о", "c": "с", "p": "р", "1": "１", "k": "K"}
PATHS = (
    "../../x",
    "/etc/passwd",
    "a/../../b",
    "..",
    ".",
    "",
    "x\0y",
    "con",
    "~",
    "\ud800",
    "a" * 5000,
)
DTYPES = ("F16", "BF16", "F64", "U8", "I64", "BOOL", "F8_E4M3", "f32", "", "O")


# --- bytes -----------------------------------------------------------------------------------


def flip_bit(chance: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def set_byte(chance: Random, data: bytes) -> bytes:
    changed, place = bytearray(data), chance.randrange(len(data))
    changed[place] = chance.choice([0, 255, *b'"{}[],:0-', (changed[place] + 1) % 256])
    return bytes(changed)


def truncate(chance: Random, data: bytes) -> bytes:
    return data[: chance.choice([0, 1, len(data) - 1, chance.randrange(len(data))])]


def extend(chance: Random, data: bytes) -> bytes:
    more = [b"\0", b"\n", b" ", b"{}", data, chance.randbytes(chance.randrange(1, 300))]
    return data + chance.choice(more)


def cut_out(chance: Random, data: bytes) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.randrange(1, 40) :]


def repeat(chance: Random, data: bytes) -> bytes:
    start = chance.randrange(len(data))
    end = start + chance.randrange(1, 40)
    return data[:end] + data[start:end] + data[end:]


def overwrite(chance: Random, data: bytes) -> bytes:
    start, length = chance.randrange(len(data)), chance.randrange(1, 100)
    filling = chance.choice([bytes(length), b"\xff" * length, chance.randbytes(length)])
    return data[:start] + filling + data[start + length :]


BYTES: tuple[Mutation, ...] = (flip_bit, set_byte, truncate, extend, cut_out, repeat, overwrite)


# --- JSON ------------------------------------------------------------------------------------


class Raw(int):
    """A number that is spelled as it is."""

    def __new__(cls, text: str) -> "Raw":
        made = super().__new__(cls, 0)
        made.text = text
        return made

    text: str


def spell(value: Any, spaces: bool = False) -> str:
    """JSON with keys as they stand, with Raw numbers, and with lists of pairs as objects."""
    comma, colon = (", ", ": ") if spaces else (",", ":")
    match value:
        case Raw():
            return value.text
        case dict():
            items = [
                f"{json.dumps(k, ensure_ascii=False)}{colon}{spell(v)}" for k, v in value.items()
            ]
            return "{" + comma.join(items) + "}"
        case list():
            return "[" + comma.join(map(spell, value)) + "]"
        case Twice():
            key = json.dumps(value.key)
            rest = spell(value.value)[1:-1]
            return "{" + f"{key}:{spell(value.value[value.key])},{rest}" + "}"
        case _:
            return json.dumps(value, ensure_ascii=False)


class Twice:
    """An object with one key twice."""

    def __init__(self, value: dict[str, Any], key: str) -> None:
        self.value, self.key = value, key


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all that is in a JSON value, but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in items:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += _places(item, (*path, key))
    return found


def mutate_json(chance: Random, value: Any) -> str:  # noqa: PLR0912  (a kind a branch)
    """The text of a JSON value with one thing changed."""
    value = json.loads(json.dumps(value))
    places = _places(value)
    if not places:
        raise ValueError("nothing to change")
    *path, key = chance.choice(places)
    holder = value
    for step in path:
        holder = holder[step]
    item = holder[key]
    kinds = ["number", "type", "text", "drop", "add", "deep", "swap", "rename", "twice", "spaces"]
    match chance.choice(kinds):
        case "number":
            holder[key] = Raw(chance.choice(NUMBERS))
        case "type":
            holder[key] = chance.choice([None, True, False, "", [], {}, [item], {"x": item}])
        case "text" if isinstance(item, str):
            holder[key] = _text(chance, item)
        case "drop":
            del holder[key]
        case "add" if isinstance(holder, dict):
            holder[chance.choice(["zz", "__proto__", *PATHS[:2]])] = item
        case "add" if isinstance(holder, list):
            holder.insert(0, item)
        case "deep":
            depth = chance.choice([50, 500, 5000, 200_000])
            holder[key] = Raw("[" * depth + "]" * depth)
        case "swap":
            other = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[key], holder[other] = holder[other], item
        case "rename" if isinstance(holder, dict):
            del holder[key]
            holder[_text(chance, str(key))] = item
        case "twice" if isinstance(holder, dict) and not path:
            return spell(Twice(value, key))
        case "spaces":
            return spell(value, spaces=True)
        case _:
            holder[key] = Raw('"\\u0061"')
    if isinstance(value, dict) and chance.random() < 0.9:
        value = _sorted(value)
    return spell(value)


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def _text(chance: Random, text: str) -> str:
    match chance.randrange(6):
        case 0 if text:
            place = chance.randrange(len(text))
            return text[:place] + LOOK_ALIKES.get(text[place], "é") + text[place + 1 :]
        case 1:
            return chance.choice(PATHS)
        case 2 if text:
            place = chance.randrange(len(text))
            return text[:place] + chance.choice("0f9zA=\n\x00") + text[place + 1 :]
        case 3:
            return text + chance.choice(["\n", " ", "\0", "=", "\u200b", text])
        case 4:
            return text.upper()
        case _:
            return text[:-1]


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def document(chance: Random, data: bytes) -> bytes:
    """One JSON document with one thing changed."""
    return _encode(mutate_json(chance, json.loads(data)))


def line(chance: Random, data: bytes) -> bytes:
    """A file of JSON lines with one line changed, dropped, doubled or moved."""
    lines = data.splitlines(keepends=True)
    place = chance.randrange(len(lines))
    match chance.randrange(4):
        case 0:
            lines[place] = _encode(mutate_json(chance, json.loads(lines[place]))) + b"\n"
        case 1:
            del lines[place]
        case 2:
            lines.insert(place, lines[place])
        case _:
            chance.shuffle(lines)
    return b"".join(lines)


# --- safetensors -----------------------------------------------------------------------------


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header, data[8 + length :]


def _join(header: bytes, body: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def length_field(chance: Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    wrong = chance.choice(
        [0, 1, length - 1, length + 1, length + 8, len(data), (1 << 64) - 1, 1 << 24]
    )
    return wrong.to_bytes(8, "little") + data[8:]


def outer_header(chance: Random, data: bytes) -> bytes:
    header, body = _split(data)
    return _join(_encode(mutate_json(chance, header)), body)


def tensor_entry(chance: Random, data: bytes) -> bytes:
    header, body = _split(data)
    name = chance.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    match chance.randrange(4):
        case 0:
            entry["dtype"] = chance.choice(DTYPES)
        case 1:
            entry["shape"] = chance.choice(
                [[], [0], [1 << 62, 1 << 62, 0], [2] * 33, [-1], [1] * 32, entry["shape"][::-1]]
            )
        case 2:
            start, end = entry["data_offsets"]
            entry["data_offsets"] = chance.choice(
                [[end, start], [start, end + 1], [-1, end], [start + 8, end + 8], [0, 0], [start]]
            )
        case _:
            header[chance.choice(PATHS)] = header.pop(name)
    return _join(_encode(spell(header)), body)


def inner_header(chance: Random, data: bytes) -> bytes:
    header, body = _split(data)
    inner = json.loads(header["__metadata__"]["dtl"])
    header["__metadata__"]["dtl"] = mutate_json(chance, inner)
    return _join(_encode(spell(header)), body)


# --- under a valid signature -----------------------------------------------------------------


def tensor_bytes(chance: Random, data: bytes) -> bytes:
    """A bulk file with one number of a tensor changed, or a tensor of another shape."""
    header, body = _split(data)
    name = chance.choice([name for name in header if name != "__metadata__"])
    start, end = header[name]["data_offsets"]
    shape, content = header[name]["shape"], body[start:end]
    match chance.randrange(2):
        case 0:
            content = (_words if name == "body" else _residues)(chance, content)
        case _:
            shape, content = chance.choice(
                [([len(content)], content), (shape[::-1], content), ([0], b""), ([1], b"x")]
            )
    moved = len(content) - (end - start)
    header[name] |= {"shape": shape, "data_offsets": [start, end + moved]}
    for other, entry in header.items():
        if other not in ("__metadata__", name) and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [place + moved for place in entry["data_offsets"]]
    return _join(_encode(spell(header)), body[:start] + content + body[end:])


def _residues(chance: Random, data: bytes) -> bytes:
    """Residues (or a proof, or a sealed payload) with one number changed."""
    width = 64  # of a residue modulo N^2, for N of 256 bits
    place = chance.randrange(max(1, len(data) // width)) * width
    number = chance.choice([bytes(width), b"\1" + bytes(width - 1), b"\xff" * width, data[:width]])
    return (data[:place] + number + data[place + width :])[: len(data)]


def _words(chance: Random, data: bytes) -> bytes:
    """A body with the low bits of a word changed, or the high bits of four (PROTOCOL, 10)."""
    place = chance.randrange(max(1, len(data) - 6))
    low = chance.choice([bytes(6), b"\xff" * 6, chance.randbytes(6), data[:6]])
    changed = data[:place] + low + data[place + 6 :]
    high = bytes([chance.choice([0, 0xFF, 0x55, 0xAA])])
    return chance.choice([changed, data[:-1] + high, changed[:-1] + high])[: len(data)]


def sign_anew(kind: str, secret: bytes, data: bytes) -> bytes:
    """A bulk file or a document with a valid signature; any exception for what is neither."""
    return _sign_document(kind, secret, data) if data[:1] == b"{" else _sign_file(secret, data)


def _sign_file(secret: bytes, data: bytes) -> bytes:
    header, body = _split(data)
    raw = header.pop("__metadata__")["dtl"]
    contents = {name: body[slice(*entry["data_offsets"])] for name, entry in header.items()}
    hashes = {name: digest_of(name, content) for name, content in contents.items()}
    kind = json.loads(raw)["kind"]
    signature = primitives.sign(secret, kind, file_digest(_encode(raw), hashes))
    ordered = [(name, "U8", header[name]["shape"]) for name in sorted(header)]
    outer = build_header({"dtl": raw, "signature": signature.hex()}, ordered)
    return outer + b"".join(contents[name] for name in sorted(contents))


def _sign_document(kind: str, secret: bytes, data: bytes) -> bytes:
    plain = canonical_json.parse(data, "")
    del plain["signature"]
    digest = bytes.fromhex(signed_digest(kind, plain))
    signature = primitives.encode_base64(primitives.sign(secret, kind, digest))
    return canonical_json.dumps(plain | {"signature": signature})


# --- npz -------------------------------------------------------------------------------------


def _members(data: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise ValueError("no zip") from error


def _archive(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return out.getvalue()


def npy(header: str, body: bytes, version: int = 1) -> bytes:
    """An .npy file with this header text."""
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header.encode("utf-8") + body


SHAPES = ("()", "(0,)", "(0, 3)", "(-1,)", "(1 << 60,)", f"({1 << 60},)", f"({1 << 60}, {1 << 60})")
DESCRS = ("'|O'", "'<f8'", "'<f4'", "'>f8'", "'|V2'", "'<U4'", "'<c16'", "'<M8[s]'", "'|b1'")
DESCRS_OF_OTHERS = (
    "'<u8'",
    "'|S3'",
    "[('a', '<f8')]",
    "'<f16'",
    "('<f8', (2, 2))",
    "'x'",
    "None",
    "'|V0'",
)


def npz_member(chance: Random, data: bytes) -> bytes:
    """An archive with one array's header, name or place changed."""
    members = list(_members(data).items())
    place = chance.randrange(len(members))
    name, content = members[place]
    match chance.randrange(5):
        case 0:
            members[place] = (name, chance.choice(BYTES)(chance, content))
        case 1:
            names = [*PATHS[:5], name.upper(), "__dtl__.npy", "x/data.pkl", "y.npy"]
            members[place] = (chance.choice(names), content)
        case 2:
            members.insert(0, (name, content))
        case 3:
            del members[place]
        case _:
            descr, shape = chance.choice(DESCRS + DESCRS_OF_OTHERS), chance.choice(SHAPES)
            order = chance.choice(["False", "True", "2"])
            text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
            body = content[128:] if len(content) > 128 else bytes(64)
            members[place] = (name, npy(text, body, chance.choice([1, 2, 3, 9])))
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    return _archive(members, chance.choice(methods))


def npz_metadata(chance: Random, data: bytes) -> bytes:
    """An archive whose text `__dtl__` has one thing changed."""
    import numpy as np

    members = _members(data)
    with np.load(io.BytesIO(data)) as arrays:
        if "__dtl__" not in arrays:
            raise ValueError("no metadata")
        text = str(arrays["__dtl__"])
    changed = io.BytesIO()
    np.save(changed, np.array(mutate_json(chance, json.loads(text))))
    members["__dtl__.npy"] = changed.getvalue()
    return _archive(list(members.items()))


def npz_claims(chance: Random, data: bytes) -> bytes:
    """An archive whose own records lie: sizes, flags, methods, checksums."""
    changed = bytearray(data)
    mark = chance.choice([b"PK\1\2", b"PK\3\4", b"PK\5\6"])
    start = data.find(mark)
    place = start + chance.randrange(4, 30)
    if start < 0 or place >= len(data):
        raise ValueError("no such record")
    changed[place] = chance.choice([0, 1, 8, 12, 14, 99, 255])
    return bytes(changed)


# --- CSV and passphrases ---------------------------------------------------------------------

CSV_CELLS = ("nan", "inf", "-inf", "1e308", "1e999", "", "x", '"', "\0", "1,2", "１", "0x10", "1_0")


def csv_cell(chance: Random, data: bytes) -> bytes:
    rows = [row.split(",") for row in data.decode().splitlines()]
    row = chance.choice(rows)
    row[chance.randrange(len(row))] = chance.choice([*CSV_CELLS, "c" * 1000, "9" * 200_000])
    return "\n".join(map(",".join, rows)).encode()


def csv_rows(chance: Random, data: bytes) -> bytes:
    rows = data.decode().splitlines()
    match chance.randrange(5):
        case 0:
            rows = rows[: chance.randrange(8)]
        case 1:
            rows = [row.partition(",")[0] for row in rows]
        case 2:
            rows = [f"{row.rpartition(',')[0]},same" for row in rows]
        case 3:
            rows = [f"{row}{number}" for number, row in enumerate(rows)]
        case _:
            rows.insert(chance.randrange(len(rows)), chance.choice([",", '"', "a,b", "\ufeff"]))
    return "\n".join(rows).encode()


def of_kind(name: str, data: bytes) -> tuple[Mutation, ...]:
    """The mutations that fit a file, by its name and content."""
    if data.startswith(b"PK"):
        return npz_member, npz_metadata, npz_claims
    if name.endswith((".ledger", ".jsonl")):
        return (line,)
    if name.endswith(".csv"):
        return csv_cell, csv_rows
    if data.startswith(b"{"):
        return (document,)
    if data[8:9] == b"{":
        return length_field, outer_header, tensor_entry, inner_header, tensor_bytes
    return BYTES
