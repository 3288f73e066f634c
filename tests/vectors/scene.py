"""A finished job from which faulty files are made: each differs from a good one in one thing."""

import base64
import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from math import prod
from typing import Any

from dtl.core.crypto import primitives
from dtl.core.files import canonical_json, ledger
from dtl.core.files.container import TENSOR_LABEL, file_digest
from dtl.core.files.job_file import Job, signed_digest
from dtl.core.files.key_file import Key
from dtl.core.files.safetensors import build_header
from dtl.core.files.tree_hash import TreeHash
from tests.vectors.intermediates import Witnessed
from tests.vectors.published import Published

Json = dict[str, Any]
Edit = Callable[[Json], object]
Tensors = dict[str, tuple[list[int], bytes]]


def outer(raw: bytes) -> tuple[bytes, bytes]:
    """A container's JSON header with its padding, and what follows."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], raw[end:]


def joined(header: bytes, data: bytes) -> bytes:
    """A container with this header, padded as it must be."""
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def tensor_digests(tensors: Tensors) -> dict[str, bytes]:
    """The digest of each tensor, by name."""
    found = {}
    for name, (_, data) in tensors.items():
        tree = TreeHash(TENSOR_LABEL, name)
        tree.update(data)
        found[name] = tree.digest()
    return found


class Scene:
    """The good files that `dtl` made, the secrets, and how to sign anew."""

    def __init__(self, dtl: Published) -> None:
        self.dtl, self.folder = dtl, dtl.folder
        self.job = json.loads(self.read("job/job.json"))
        self.p, self.q = (int(self.key("kgc")[name], 16) for name in "pq")
        self.square = (self.p * self.q) ** 2
        self.width = 2 * (self.p * self.q).bit_length() // 8

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def key(self, name: str) -> Json:
        found: Json = json.loads(self.read(f"job/{name}.key"))
        return found

    def secret(self, name: str) -> bytes:
        return base64.b64decode(self.key(name)["sign"])

    @cached_property
    def witnessed(self) -> Witnessed:
        """The good files as dtl's own functions see them."""
        return Witnessed(self.folder, self.dtl.inputs)

    def loaded_job(self) -> Job:
        return Job.load(self.folder / "job/job.json")

    def loaded_key(self, name: str) -> Key:
        return Key.load(self.folder / f"job/{name}.key", self.folder / "job/job.json", bytes)

    # --- bulk files

    def bulk(self, name: str) -> tuple[Json, Tensors]:
        """The header and tensors of a bulk file."""
        text, data = outer(self.read(name))
        entries = json.loads(text)
        header: Json = json.loads(entries.pop("__metadata__")["dtl"])
        spans = {tensor: entry["data_offsets"] for tensor, entry in entries.items()}
        return header, {
            tensor: (entries[tensor]["shape"], data[begin:end])
            for tensor, (begin, end) in spans.items()
        }

    def signed(self, raw: bytes, tensors: Tensors, signer: str) -> bytes:
        """A bulk file with this raw header, signed."""
        kind = re.search(rb'"kind":"([a-z]*)","(?:layout|manifest|masked|missing)', raw)
        digest = file_digest(raw, tensor_digests(tensors))
        signature = primitives.sign(self.secret(signer), kind[1].decode() if kind else "", digest)
        shapes = [(name, "U8", tensors[name][0]) for name in sorted(tensors)]
        head = build_header({"dtl": raw.decode(), "signature": signature.hex()}, shapes)
        return head + b"".join(tensors[name][1] for name in sorted(tensors))

    def header(self, name: str, edit: Edit, signer: str = "") -> bytes:
        """The file with an edited header, signed by its signer."""
        found, tensors = self.bulk(name)
        owner = str(found["signer"])
        edit(found)
        return self.signed(canonical_json.dumps(found), tensors, signer or owner)

    def text(self, name: str, old: str, new: str) -> bytes:
        """The file with one change in the text of its header, signed."""
        found, tensors = self.bulk(name)
        raw = canonical_json.dumps(found).decode()
        if raw.count(old) < 1:
            raise ValueError(f"{name}: no {old}")
        return self.signed(raw.replace(old, new, 1).encode(), tensors, found["signer"])

    def tensors(self, name: str, edit: Callable[[Tensors], object]) -> bytes:
        """The file with edited tensors, signed."""
        found, tensors = self.bulk(name)
        edit(tensors)
        return self.signed(canonical_json.dumps(found), tensors, found["signer"])

    def number(
        self, name: str, tensor: str, at: int, width: int, edit: Callable[[int], int]
    ) -> bytes:
        """The file with one little-endian number of a tensor edited, signed."""

        def change(tensors: Tensors) -> None:
            shape, data = tensors[tensor]
            edited = edit(int.from_bytes(data[at : at + width], "little"))
            new = edited.to_bytes(width, "little")
            tensors[tensor] = shape, data[:at] + new + data[at + width :]

        return self.tensors(name, change)

    def residue(self, name: str, group: int, k: int, edit: Callable[[int], int]) -> bytes:
        place = (8 * group + k) * self.width
        return self.number(name, "residues", place, self.width, edit)

    def proof(self, name: str, part: str, edit: Callable[[int], int]) -> bytes:
        """One number of the proof edited: d0..d7, z, v1..v7."""
        _, tensors = self.bulk(name)
        total, width = prod(tensors["proof"][0]), self.width
        end = total - 7 * width // 2
        if part == "z":
            return self.number(name, "proof", 8 * width, end - 8 * width, edit)
        index = int(part[1:])
        if part[0] == "d":
            return self.number(name, "proof", index * width, width, edit)
        return self.number(name, "proof", end + (index - 1) * width // 2, width // 2, edit)

    def container(self, name: str, old: str, new: str) -> bytes:
        """The file with one change in the text of its container's header; the same signature."""
        text, data = outer(self.read(name))
        if text.count(old.encode()) < 1:
            raise ValueError(f"{name}: no {old}")
        return joined(text.rstrip().replace(old.encode(), new.encode(), 1), data)

    # --- documents

    def document(self, name: str, edit: Edit, signer: str = "") -> bytes:
        """A signed document, edited and signed anew."""
        body: Json = json.loads(self.read(name))
        owner = str(body.get("signer", "kgc"))
        kind = str(body.get("kind", "job"))
        edit(body)
        digest = bytes.fromhex(signed_digest(kind, body))
        signature = primitives.sign(self.secret(signer or owner), kind, digest)
        return canonical_json.dumps(body | {"signature": base64.b64encode(signature).decode()})

    def plain(self, name: str, edit: Edit) -> bytes:
        """A document or key file, edited; nothing is signed."""
        body: Json = json.loads(self.read(name))
        edit(body)
        return canonical_json.dumps(body)

    # --- ledgers

    def lines(self, name: str) -> list[bytes]:
        return self.read(f"job/{name}.ledger").splitlines(keepends=True)

    def relinked(self, name: str, edit: Callable[[list[Json]], object]) -> bytes:
        """A party's ledger with edited entries and right links."""
        entries = entries_of(self.lines(name))
        edit(entries)
        return b"".join(linked(entries))

    def cut(self, name: str, event: str, **values: object) -> bytes:
        """A party's ledger as it was before the first line of this event with these values."""
        entries = entries_of(self.lines(name))
        wanted = {"event": event, **values}
        at = next(
            i for i, entry in enumerate(entries) if all(entry.get(k) == wanted[k] for k in wanted)
        )
        return b"".join(self.lines(name)[:at])


def entries_of(lines: list[bytes]) -> list[Json]:
    """The entries of a ledger without their links."""
    found = [canonical_json.loads(line.rstrip(b"\n"), "") for line in lines]
    for entry in found:
        del entry["link"]
    return found


def linked(entries: list[Json]) -> list[bytes]:
    """The lines of a ledger with these entries."""
    lines, link = [], ""
    for entry in entries:
        lines.append(ledger._line(entry, link))
        link = ledger._link(entry, link)
    return lines


def put(**values: object) -> Edit:
    """Set fields."""
    return lambda body: body.update(values)


def drop(name: str) -> Edit:
    return lambda body: body.pop(name)


Changes = Mapping[str, bytes | None]
"""What to put in place of good files; None: the file is not there."""
