"""Uploads, sums, models and releases: containers and headers."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from tests.second import documents, encoding, lattice
from tests.second.documents import HEADER, Job
from tests.second.encoding import (
    digest_or_null,
    dumps,
    exactly,
    from_base64,
    from_hex,
    hashed,
    integer,
    require,
    tree_hash,
)
from tests.second.group import Residues
from tests.second.lattice import Body

RESULT = "round parent initial contributors missing contributions layout values"
KINDS = {
    "upload": "round base roster masked opened_tag layout values",
    "sum": RESULT,
    "model": RESULT,
    "release": "round of manifest result_signature grants admitted commit",
}
LONGEST_HEADER = 2**24
CHUNK = 2**20
MOST_UPLOADS = 2**21 - 1


@dataclass
class Tensor:
    shape: list[int]
    data: bytes


def tensor_digest(name: str, data: bytes) -> bytes:
    return tree_hash("dtl/v2/tensor", [name], data)


def file_digest(raw: bytes, tensors: dict[str, Tensor]) -> bytes:
    """The digest of a bulk file with this raw header."""
    parts = [
        part
        for name in sorted(tensors)
        for part in (name.encode(), tensor_digest(name, tensors[name].data))
    ]
    return hashed("dtl/v2/digest", raw, *parts)


@dataclass
class Bulk:
    """A bulk file; its form has been checked, not its signature."""

    header: dict[str, Any]
    raw: bytes
    signature: bytes
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        return str(self.header["kind"])

    @cached_property
    def digest(self) -> bytes:
        return file_digest(self.raw, self.tensors)

    @property
    def result(self) -> "Bulk":
        """The result that is inside a release."""
        tensors = {name: item for name, item in self.tensors.items() if name != "sealed"}
        manifest = self.header["manifest"]
        signature = bytes.fromhex(self.header["result_signature"])
        return Bulk(manifest, dumps(manifest), signature, tensors)

    def residues(self, job: Job) -> Residues:
        """Not checked yet."""
        return job.group.residues(self.tensors["residues"].data)

    def body(self, job: Job) -> Body:
        """The words; none in a direct job."""
        if not job.lattice:
            return []
        return lattice.read_body(self.tensors["body"].data, job.shape(self.header["values"]))


def read_container(raw: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors."""
    require(len(raw) >= 8, 3, "no header")
    length = int.from_bytes(raw[:8], "little")
    require(length % 8 == 0 and length <= LONGEST_HEADER, 3, "a header of a wrong length")
    require(8 + length <= len(raw), 3, "the header is cut off")
    padded = raw[8 : 8 + length]
    entries = encoding.loads(padded.rstrip(b" "))
    require(len(padded) - len(padded.rstrip(b" ")) < 8, 3, "too much padding")
    require(isinstance(entries, dict), 3, "not an object")
    require(len(entries) <= 2**16, 3, "too many tensors")
    metadata = exactly(entries.pop("__metadata__", None), "dtl signature")
    tensors, at = {}, 8 + length
    for name in sorted(entries):
        entry = exactly(entries[name], "dtype shape data_offsets")
        require(entry["dtype"] == "U8", 3, "not U8")
        require(isinstance(entry["shape"], list) and len(entry["shape"]) <= 32, 3, "a shape")
        shape = [integer(size, 0, 2**63 - 1) for size in entry["shape"]]
        begin = at - 8 - length
        end = begin + prod(shape)
        require(dumps(entry["data_offsets"]) == dumps([begin, end]), 3, "gaps or overlaps")
        require(8 + length + end <= len(raw), 3, "a tensor is cut off")
        tensors[name] = Tensor(shape, raw[at : 8 + length + end])
        at = 8 + length + end
    require(at == len(raw), 3, "trailing bytes")
    return {key: encoding.text(value) for key, value in metadata.items()}, tensors


def check_layout(layout: Any, values: Any) -> None:
    require(isinstance(layout, list) and len(layout) <= 2**16, 3, "no layout")
    found = []
    for entry in layout:
        exactly(entry, "name shape dtype")
        name = encoding.text(entry["name"])
        require(1 <= len(name) <= 1024, 3, "a name of a wrong length")
        require(not any(ord(c) < 32 or ord(c) == 127 for c in name), 3, "a control character")
        require(name not in ("__metadata__", "__dtl__"), 3, "a reserved name")
        require(entry["dtype"] in ("F16", "BF16", "F32", "F64"), 3, "an unknown dtype")
        require(isinstance(entry["shape"], list) and len(entry["shape"]) <= 32, 3, "a shape")
        found.append((name.encode(), prod(integer(n, 0, 2**48 - 1) for n in entry["shape"])))
    listed = [name for name, _ in found]
    require(listed == sorted(set(listed)), 3, "names out of order, or twice")
    integer(values, 1, 2**48 - 1)
    require(sum(size for _, size in found) == values, 3, "values are not those of the layout")


def _check_result(header: dict[str, Any]) -> None:
    digest_or_null(header["parent"])
    digest_or_null(header["initial"])
    present = documents.contributors(header["contributors"])
    missing = documents.names(header["missing"])
    require(not present.keys() & set(missing), 3, "both there and missing")
    require(isinstance(header["contributions"], dict), 3, "no contributions")
    for name, rounds in header["contributions"].items():
        documents.name(name)
        integer(rounds, 1, 2**32 - 1)
    require(present.keys() <= header["contributions"].keys(), 3, "a contributor without rounds")
    require((header["kind"] == "model") == (header["initial"] is not None), 3, "initial")
    check_layout(header["layout"], header["values"])


def check_header(header: Any, kinds: tuple[str, ...]) -> None:
    require(isinstance(header, dict) and header.get("kind") in kinds, 3, "another kind")
    kind = header["kind"]
    exactly(header, f"{HEADER} {KINDS[kind]}")
    documents.check_common(header, kind)
    require(kind == "upload" or header["signer"] == "server", 3, "not by the server")
    integer(header["round"], 1, 2**32 - 1)
    if kind == "upload":
        digest_or_null(header["base"])
        from_hex(header["roster"], 64)
        require(type(header["masked"]) is bool, 3, "masked must be true or false")
        tag = header["opened_tag"]
        require((tag is None) == (header["base"] is None), 3, "a tag without a base, or none")
        if tag is not None:
            from_hex(tag, 16)
        check_layout(header["layout"], header["values"])
    elif kind == "release":
        from_hex(header["of"], 64)
        from_hex(header["result_signature"], 64)
        check_header(header["manifest"], ("sum", "model"))
        same = all(header[field] == header["manifest"][field] for field in ("job", "round"))
        require(same, 3, "the release contradicts its manifest")
        require(isinstance(header["grants"], list), 3, "no grants")
        grants = [exactly(entry, "participant wrapped") for entry in header["grants"]]
        granted = documents.names([entry["participant"] for entry in grants])
        require(granted, 3, "no grants")
        for entry in grants:
            from_base64(entry["wrapped"])
        require(set(documents.names(header["admitted"])) <= set(granted), 3, "admitted, no grant")
        from_base64(header["commit"], 32)
    else:
        _check_result(header)


def read_form(path: Path, kinds: tuple[str, ...]) -> Bulk:
    metadata, tensors = read_container(path.read_bytes())
    signature = from_hex(metadata["signature"], 64)
    raw = metadata["dtl"].encode()
    header = encoding.loads(raw)
    check_header(header, kinds)
    return Bulk(header, raw, signature, tensors)


def read(path: Path, job: Job, *kinds: str) -> Bulk:
    """A bulk file whose form, job, signer, tensors and signatures are right."""
    found = read_form(path, kinds)
    header, kind = found.header, found.kind
    require(header["job"] == job.digest.hex(), 3, "of another job")
    if kind == "upload":
        require(header["signer"] in job.names, 3, "the signer is not in the roster")
    manifest = header["manifest"] if kind == "release" else header
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    require(shapes == expected_shapes(job, kind, manifest["values"]), 3, "other tensors")
    documents.verify(job.sign[header["signer"]], kind, found.digest, found.signature)
    if kind == "release":
        result = found.result
        require(result.digest.hex() == header["of"], 4, "not the result that it names")
        documents.verify(job.sign["server"], result.kind, result.digest, result.signature)
    if kind != "upload":
        require(uploads_in(manifest) <= MOST_UPLOADS, 7, "too many contributions")
    else:
        require(header["roster"] == job.roster.hex(), 3, "of another roster")
        require(header["masked"] == job.body["masks"], 3, "masked, or not masked")
    return found


def uploads_in(manifest: dict[str, Any]) -> int:
    """U."""
    return sum(manifest["contributions"].values())


def expected_shapes(job: Job, kind: str, values: int) -> dict[str, list[int]]:
    groups, width = job.groups(values), job.group.width
    shapes = {"residues": [groups, 8, width]}
    if job.lattice:
        shapes["body"] = [job.shape(values).length]
    if kind == "upload":
        shapes["proof"] = [proof_length(job, groups)]
    if kind == "release":
        plain = 7 * groups * width + 14 * width + 7 * response_bytes(job)
        shapes["sealed"] = [plain + 16 * -(-plain // CHUNK)]
    return shapes


def exponent_bits(job: Job, groups: int) -> int:
    """ell' of section 6."""
    return job.group.ell + 256 + documents.bits_of(groups)


def proof_length(job: Job, groups: int) -> int:
    width = job.group.width
    return 8 * width + -(-(exponent_bits(job, groups) + 1) // 8) + 7 * width // 2


def response_bytes(job: Job) -> int:
    """Bytes of z_j in the proof of a release."""
    return -(-(job.group.ell + 257) // 8)
