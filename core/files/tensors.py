"""Plain tensors: gradients and weights as .safetensors or .npz, read piece by piece.

Any framework's arrays will do: named, of dtype float16, bfloat16, float32 or float64. dtl
adds metadata of its own (`PlainMetadata`) where it knows the round and the base: in
.safetensors under the key `dtl`, in .npz as an array `__dtl__`.
"""

import errno
import hashlib
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dtl.core.crypto.primitives import fields, u32
from dtl.core.encoding.fixed_point import Reals
from dtl.core.errors import DtlError, FormatError, NumericError, VerificationError
from dtl.core.files import canonical_json
from dtl.core.files.atomic import open_regular, read_start
from dtl.core.files.headers import Layout, TensorSpec, check_layout
from dtl.core.files.npz import check_archive, read_array_header
from dtl.core.files.safetensors import SafetensorsFile, stamp_of
from dtl.core.files.schema import FORMAT, Digest, Document, Round

SUFFIXES = (".safetensors", ".npz")
METADATA_KEY, METADATA_ARRAY = "dtl", "__dtl__"
READ_VALUES = 1 << 18
MAX_METADATA_BYTES = 1 << 16
BF16 = "BF16"
NUMPY_DTYPES = {"F16": "<f2", BF16: "<u2", "F32": "<f4", "F64": "<f8"}
_ITEM_BYTES = {name: np.dtype(text).itemsize for name, text in NUMPY_DTYPES.items()}
_ZIP_MAGIC, _NPY_MAGIC = b"PK", b"\x93NUMPY"
_BULK_KIND, _BULK_SIGN = re.compile('"kind":"(upload|sum|model|release)"'), '"signer":"'
_BULK_NAMES = {  # what a bulk file is, and what comes before it is plain tensors
    "upload": ("an upload", "it is encrypted already: aggregate takes it"),
    "sum": ("an encrypted sum", "release-model and open-model come first"),
    "model": ("an encrypted model", "release-model and open-model come first"),
    "release": ("a release", "open-model comes first"),
}


class PlainMetadata(Document):
    """What dtl writes into plain files, so that the next command needs no options.

    `round` and `base` are those of the model that the file is, or is based on: an upload of
    gradients names `base`. `opened` is the digest of the opened integers (of the initial
    weights in round 0).
    """

    format: Literal["dtl/v2"]
    kind: Literal["weights", "gradients", "sum"]
    round: Round | Literal[0]
    base: Digest | None
    opened: Digest | None


class TensorFile(Protocol):
    """A plain file of tensors, open for reading."""

    path: Path
    layout: Layout
    metadata: PlainMetadata | None

    def pieces(self, spec: TensorSpec) -> Iterator[bytes]:
        """The little-endian bytes of one tensor in C order, in whole values."""
        ...

    def stamp(self) -> tuple[int, ...]:
        """What changes when the file is written to: see `stamp_of`."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def open_tensors(path: Path) -> TensorFile:
    """Open a plain file of tensors, .safetensors or .npz by its content.

    Raises UsageError when there is none, FormatError when it is malformed or holds
    anything but floats.
    """
    start = read_start(path, len(_NPY_MAGIC))
    if start == _NPY_MAGIC:
        raise FormatError(
            f"{path}: expected .safetensors or .npz, found .npy",
            "numpy.savez keeps the names of the arrays as well",
        )
    return _NpzTensors(path) if start.startswith(_ZIP_MAGIC) else _SafetensorsTensors(path)


def values(tensors: TensorFile) -> Iterator[Reals]:
    """All values in packing order as float64, in pieces.

    Raises NumericError that names the tensor and the index of a NaN or an infinity.
    """
    for spec in tensors.layout:
        start = 0
        for piece in tensors.pieces(spec):
            reals = to_reals(piece, spec.dtype)
            finite = np.isfinite(reals)
            if not finite.all():
                place = start + int(np.argmin(finite))
                index = list(map(int, np.unravel_index(place, spec.shape)))
                raise NumericError(f"{tensors.path}: tensor {spec.name!r} at {index}: not finite")
            start += reals.size
            yield reals


def in_batches(pieces: Iterator[Reals], size: int) -> Iterator[Reals]:
    """Cut pieces of any length anew: all batches have `size` values but the last."""
    held: list[Reals] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += piece.size
        if count >= size:
            joined = np.concatenate(held)
            whole = count // size * size
            yield from joined[:whole].reshape(-1, size)
            held, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(held)


def initial_digest(tensors: TensorFile) -> str:
    """V0 = H(fields("dtl/v2/initial", layout, tensor bytes in packing order)), in hex."""
    total = sum(spec.values * item_bytes(spec.dtype) for spec in tensors.layout)
    pieces = (piece for spec in tensors.layout for piece in tensors.pieces(spec))
    return _initial_hash(tensors.layout, total, pieces)


def _initial_hash(layout: Layout, length: int, pieces: Iterable[bytes]) -> str:
    state = hashlib.sha512(fields("dtl/v2/initial", encode_layout(layout)))
    state.update(u32(_length32(length)))
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()


def weights_metadata(tensors: TensorFile) -> PlainMetadata:
    """What a file of weights says of itself; one without dtl metadata counts as initial weights.

    Raises FormatError for a file that is not weights, VerificationError when it calls itself
    initial weights and its content is not what its metadata names.
    """
    known = tensors.metadata
    if known is not None and known.kind != "weights":
        raise FormatError(f"{tensors.path}: expected weights, found {known.kind}")
    if known is not None and known.round:
        return known
    digest = initial_digest(tensors)
    if known is not None and (known.base, known.opened) != (digest, digest):
        raise VerificationError(
            f"{tensors.path}: the weights are not those that its metadata names",
            "they were changed after init-model; write them without dtl metadata to start anew",
        )
    return PlainMetadata(format=FORMAT, kind="weights", round=0, base=digest, opened=digest)


def checked_initial_digest(tensors: TensorFile) -> str:
    """V0 of a file that must be initial weights; errors as `weights_metadata`."""
    known = weights_metadata(tensors)
    if known.round or known.base is None:
        raise FormatError(f"{tensors.path}: expected initial weights, found an opened model")
    return known.base


def make_initial_digest(arrays: dict[str, NDArray[np.float64]], dtype: str) -> str:
    """V0 of weights before they are written, all in one dtype."""
    layout = make_layout(arrays, dtype)
    data = b"".join(from_reals(arrays[spec.name].ravel(), dtype) for spec in layout)
    return _initial_hash(layout, len(data), [data])


class VectorDigest:
    """V = H(fields("dtl/v2/vector", layout, integers as little-endian i64)), piece by piece."""

    def __init__(self, layout: Layout, count: int) -> None:
        self._state = hashlib.sha512(fields("dtl/v2/vector", encode_layout(layout)))
        self._state.update(u32(_length32(8 * count)))

    def update(self, integers: NDArray[np.int64]) -> None:
        """Add integers."""
        self._state.update(integers.astype("<i8").tobytes())

    def hexdigest(self) -> str:
        """The digest in hex."""
        return self._state.hexdigest()


def _length32(length: int) -> int:
    """A length as it stands in `fields`.

    The encoding's u32 cannot hold 4 GiB and more; there it is the length modulo 2^32, which
    stays unambiguous because the layout before it fixes the true length.
    """
    return length % (1 << 32)


def encode_layout(layout: Layout) -> bytes:
    """A layout as canonical JSON."""
    return canonical_json.dumps([spec.plain() for spec in layout])


def item_bytes(dtype: str) -> int:
    """Bytes of one value."""
    return _ITEM_BYTES[dtype]


def to_reals(data: bytes, dtype: str) -> Reals:
    """Little-endian bytes as float64; exact."""
    if dtype == BF16:
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.frombuffer(data, NUMPY_DTYPES[dtype]).astype(np.float64)


def from_reals(reals: Reals, dtype: str) -> bytes:
    """float64 as little-endian bytes of a dtype, rounded to nearest (bfloat16 by float32)."""
    if dtype != BF16:
        with np.errstate(over="ignore"):
            narrow = reals.astype(NUMPY_DTYPES[dtype])
        if not np.isfinite(narrow).all():
            raise NumericError(
                f"a value does not fit into {dtype}", "choose a wider dtype for the model"
            )
        data: bytes = narrow.tobytes()
        return data
    # bfloat16 is the upper half of float32; the carry of the rounding runs upwards.
    wide = reals.astype("<f4").view("<u4")
    rounded: NDArray[np.uint16] = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype("<u2")
    return rounded.tobytes()


class _PlainSafetensors(SafetensorsFile):
    expected = ".safetensors or .npz"


class _SafetensorsTensors:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _PlainSafetensors(path)
        try:
            text = self._file.metadata.get(METADATA_KEY)
            self.metadata = _read_metadata(text, path)
            specs = [(t.name, t.shape, t.dtype) for t in self._file.tensors.values()]
            self.layout = _make_layout(specs, path)
        except BaseException:
            self.close()
            raise

    def pieces(self, spec: TensorSpec) -> Iterator[bytes]:
        info = self._file.tensors[spec.name]
        step = READ_VALUES * item_bytes(spec.dtype)
        for start in range(0, info.length, step):
            yield self._file.read(info.start + start, min(step, info.length - start))

    def stamp(self) -> tuple[int, ...]:
        return self._file.stamp_now()

    def close(self) -> None:
        self._file.close()


class _NpzTensors:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_regular(path)
        try:
            self._zip = zipfile.ZipFile(os.fdopen(self._descriptor, "rb"))
        except MemoryError:
            raise
        except Exception:
            raise FormatError(f"{path}: expected an .npz file, found a damaged one") from None
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        check_archive(self._zip, self.path)
        names = [name.removesuffix(".npy") for name in self._zip.namelist()]
        if any(name.endswith("/data.pkl") for name in names):
            raise FormatError(
                f"{self.path}: expected .safetensors or .npz, found a pickle that torch.save wrote",
                "save it with safetensors.torch.save_file; dtl never unpickles",
            )
        if len(set(names)) != len(names):
            raise FormatError(f"{self.path}: two arrays have one name")
        self.metadata = None
        self._fortran = set()
        specs = []
        for name in names:
            with self._member(name) as member:
                shape, fortran, dtype = read_array_header(member)
                if name == METADATA_ARRAY:
                    self.metadata = self._metadata(member, shape, dtype)
                else:
                    specs.append((name, shape, _dtype_name(dtype)))
                    if fortran:
                        self._fortran.add(name)
        self.layout = _make_layout(specs, self.path)

    def _metadata(
        self, member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[np.generic]
    ) -> PlainMetadata | None:
        if shape != () or dtype.kind != "U" or dtype.itemsize > MAX_METADATA_BYTES:
            raise FormatError(f"{self.path}: {METADATA_ARRAY}: expected one text")
        data = self._take(member, dtype.itemsize, METADATA_ARRAY)
        return _read_metadata(str(np.frombuffer(data, dtype)[0]), self.path)

    @contextmanager
    def _member(self, name: str) -> Iterator[IO[bytes]]:
        """An array's file; all that can go wrong in reading a bad one is a FormatError."""
        try:
            with self._zip.open(f"{name}.npy") as member:
                yield member
        except (DtlError, MemoryError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EIO:
                raise
            raise FormatError(f"{self.path}: array {name!r} is damaged") from None

    def _take(self, member: IO[bytes], length: int, name: str) -> bytes:
        parts = []
        while length > 0 and (part := member.read(length)):
            parts.append(part)
            length -= len(part)
        if length:
            raise FormatError(f"{self.path}: array {name!r} ends too early")
        return b"".join(parts)

    def pieces(self, spec: TensorSpec) -> Iterator[bytes]:
        width = item_bytes(spec.dtype)
        with self._member(spec.name) as member:
            read_array_header(member)
            if spec.name in self._fortran:  # needs the whole tensor to be turned
                data = np.frombuffer(
                    self._take(member, spec.values * width, spec.name), f"V{width}"
                )
                data = np.ascontiguousarray(data.reshape(spec.shape[::-1]).T)
                yield data.tobytes()
            else:
                for start in range(0, spec.values, READ_VALUES):
                    count = min(READ_VALUES, spec.values - start)
                    yield self._take(member, count * width, spec.name)
            if member.read(1):
                raise FormatError(f"{self.path}: array {spec.name!r} is too long")

    def stamp(self) -> tuple[int, ...]:
        return stamp_of(self._descriptor)

    def close(self) -> None:
        file = self._zip.fp
        self._zip.close()
        if file is not None:
            file.close()


def _dtype_name(dtype: np.dtype[np.generic]) -> str:
    if dtype.str == "|V2" and dtype.fields is None:  # how numpy stores the bfloat16 of ml_dtypes
        return BF16
    known = {text: name for name, text in NUMPY_DTYPES.items() if name != BF16}
    return known.get(dtype.str, str(dtype))


def _make_layout(specs: Sequence[tuple[str, tuple[int, ...], str]], path: Path) -> Layout:
    for name, _, dtype in specs:
        if dtype not in NUMPY_DTYPES:
            raise FormatError(
                f"{path}: tensor {name!r}: expected float16, bfloat16, float32 or float64 "
                f"(little-endian), found {dtype}",
                "leave out what is not trained, such as counters of batch normalisation",
            )
    ordered = sorted(specs, key=lambda item: item[0].encode("utf-8", "surrogatepass"))
    layout = tuple(
        TensorSpec.check({"name": name, "shape": list(shape), "dtype": dtype}, f"{path}: {name!r}")
        for name, shape, dtype in ordered
    )
    check_layout(layout, str(path))
    return layout


def _read_metadata(text: str | None, path: Path) -> PlainMetadata | None:
    if text is None:
        return None
    bulk = _BULK_KIND.search(text)
    if bulk and _BULK_SIGN in text:
        found, hint = _BULK_NAMES[bulk[1]]
        raise FormatError(f"{path}: expected weights or gradients in plain, found {found}", hint)
    if len(text) > MAX_METADATA_BYTES:
        raise FormatError(f"{path}: metadata: expected at most {MAX_METADATA_BYTES} characters")
    return PlainMetadata.decode(text.encode("utf-8", "surrogatepass"), f"{path}: metadata")


def read_arrays(path: Path) -> tuple[dict[str, NDArray[np.float64]], PlainMetadata | None]:
    """Read a whole plain file into arrays of float64 (for models that fit into memory)."""
    tensors = open_tensors(path)
    try:
        flat = np.concatenate(list(values(tensors)))
        arrays, start = {}, 0
        for spec in tensors.layout:
            arrays[spec.name] = flat[start : start + spec.values].reshape(spec.shape)
            start += spec.values
        return arrays, tensors.metadata
    finally:
        tensors.close()


def make_layout(arrays: dict[str, NDArray[np.float64]], dtype: str) -> Layout:
    """The layout of arrays that are to be written in one dtype."""
    return _make_layout(
        [(name, array.shape, dtype) for name, array in arrays.items()], Path("arrays")
    )
