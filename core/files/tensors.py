"""Plain tensors: gradients and weights as .safetensors or .npz, read piece by piece.

Any framework's arrays will do: named, of dtype float16, bfloat16, float32 or float64. dtl
adds metadata of its own (`PlainMetadata`) where it knows the round and the base: in
.safetensors under the key `dtl`, in .npz as an array `__dtl__`.
"""

import errno
import os
import re
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dtl.core.encoding.fixed_point import Reals, Values
from dtl.core.errors import DtlError, FormatError, NumericError, VerificationError
from dtl.core.files import canonical_json
from dtl.core.files.atomic import open_regular, read_start
from dtl.core.files.headers import Layout, TensorSpec, check_layout
from dtl.core.files.npz import check_archive, read_array_header
from dtl.core.files.safetensors import SafetensorsFile, stamp_of
from dtl.core.files.schema import FORMAT, Digest, Document, Round, refuse_older
from dtl.core.files.tree_hash import TreeHash

Arrays = dict[str, NDArray[np.float64]]
SUFFIXES = (".safetensors", ".npz")
METADATA_KEY, METADATA_ARRAY = "dtl", "__dtl__"
READ_VALUES = 1 << 18
MAX_METADATA_BYTES = 1 << 16
BF16 = "BF16"
NUMPY_DTYPES = {"F16": "<f2", BF16: "<u2", "F32": "<f4", "F64": "<f8"}
_ITEM_BYTES = {name: np.dtype(text).itemsize for name, text in NUMPY_DTYPES.items()}
_I32_BITS = 32
_BF16_INFINITE = 0x7F80  # the exponent of what is not finite
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
    weights in round 0), `content` that of the tensors' bytes (see `ContentDigest`).
    """

    format: Literal["dtl/v2"]
    kind: Literal["weights", "gradients", "sum"]
    round: Round | Literal[0]
    base: Digest | None
    opened: Digest | None
    content: Digest | None

    @property
    def initial(self) -> bool:
        """Whether this is said of initial weights: of round 0, or of what is its own base.

        Either is enough, so that nobody passes off other weights by changing one of them.
        """
        return self.round == 0 or (self.base is not None and self.base == self.opened)


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


class ContentDigest:
    """The digest of tensors' bytes: H(fields("dtl/v2/content", layout, u64(length), pieces)).

    The bytes are those of the layout's dtypes, little-endian, in packing order.
    """

    def __init__(self, layout: Layout) -> None:
        self._tree = TreeHash("dtl/v2/content", encode_layout(layout))

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        self._tree.update(data)

    def hexdigest(self) -> str:
        """The digest in hex."""
        return self._tree.digest().hex()

    def initial(self) -> str:
        """V0 of the same bytes, in hex: as the content, under the label "dtl/v2/initial"."""
        return self._tree.digest("dtl/v2/initial").hex()


def raw_pieces(
    tensors: TensorFile, content: ContentDigest | None = None
) -> Iterator[tuple[TensorSpec, bytes]]:
    """All tensors' bytes in packing order, in whole values; `content` digests them on the way."""
    for spec in tensors.layout:
        for piece in tensors.pieces(spec):
            if content is not None:
                content.update(piece)
            yield spec, piece


def values(tensors: TensorFile, content: ContentDigest | None = None) -> Iterator[Reals]:
    """All values in packing order as float64, in pieces; `content` digests them on the way.

    Raises NumericError that names the tensor and the index of a NaN or an infinity.
    """
    start = 0
    for spec, piece in raw_pieces(tensors, content):
        reals = to_reals(piece, spec.dtype)
        finite = np.isfinite(reals)
        if not finite.all():
            raise not_finite(tensors, start + int(np.argmin(finite)))
        start += reals.size
        yield reals


def batches(
    tensors: TensorFile, size: int, content: ContentDigest | None = None
) -> Iterator[Values]:
    """All values in packing order, `size` at a time but for the last batch, each exact.

    They are float32 where no tensor is wider than that, else float64. Whether they are finite
    is the caller's to check: see `not_finite`. `content` digests their bytes on the way.
    """
    narrow = all(item_bytes(spec.dtype) <= item_bytes("F32") for spec in tensors.layout)
    dtype = np.dtype(np.float32 if narrow else np.float64)
    left = sum(spec.values for spec in tensors.layout)
    batch, filled = np.empty(min(size, left), dtype), 0
    for spec, piece in raw_pieces(tensors, content):
        read = _widen(piece, spec.dtype)
        while read.size:
            part = read[: batch.size - filled]
            with np.errstate(invalid="ignore"):  # numpy warns of a signalling NaN
                batch[filled : filled + part.size] = part
            filled += part.size
            read = read[part.size :]
            if filled == batch.size:
                left -= filled
                yield batch
                batch, filled = np.empty(min(size, left), dtype), 0


def not_finite(tensors: TensorFile, index: int) -> NumericError:
    """The error for a NaN or an infinity that stands at `index` of the whole vector."""
    name, place = describe_place(tensors.layout, index)
    return NumericError(f"{tensors.path}: tensor {name!r} at {place}: not finite")


def describe_place(layout: Layout, index: int) -> tuple[str, list[int]]:
    """(tensor, index in it) of the value at `index` of the whole vector."""
    spec, start, _ = next(Places(layout).runs(index, 1))
    return spec.name, list(map(int, np.unravel_index(start, spec.shape)))


class Places:
    """Where the values of a vector lie: one tensor after the other, in packing order."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._starts = list(accumulate((spec.values for spec in layout), initial=0))

    def runs(self, first: int, count: int) -> Iterator[tuple[TensorSpec, int, int]]:
        """The tensors that hold these values: (tensor, index of the first in it, how many)."""
        if not 0 <= first <= first + count <= self._starts[-1]:
            raise ValueError("there are no such values")
        while count:
            # The last tensor that starts there: those before it are empty.
            number = bisect_right(self._starts, first) - 1
            here = min(count, self._starts[number + 1] - first)
            yield self._layout[number], first - self._starts[number], here
            first, count = first + here, count - here


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


def content_digest(tensors: TensorFile) -> str:
    """The digest of a file's tensors, whatever its format: see `ContentDigest`."""
    return _digest_all(tensors).hexdigest()


def initial_digest(tensors: TensorFile) -> str:
    """V0 of a file's tensors, in hex."""
    return _digest_all(tensors).initial()


def _digest_all(tensors: TensorFile) -> ContentDigest:
    content = ContentDigest(tensors.layout)
    for _ in raw_pieces(tensors, content):
        pass
    return content


def weights_metadata(tensors: TensorFile) -> PlainMetadata:
    """What a file of weights says of itself; one without dtl metadata counts as initial weights.

    Initial weights are read for it. Raises FormatError for a file that is not weights,
    VerificationError when it calls itself initial weights and its content is not what its
    metadata names.
    """
    known = _known_weights(tensors)
    if known is not None and not known.initial:
        return known
    return _initial_metadata(tensors, _digest_all(tensors))


def _known_weights(tensors: TensorFile) -> PlainMetadata | None:
    known = tensors.metadata
    if known is not None and known.kind != "weights":
        raise FormatError(f"{tensors.path}: expected weights, found {known.kind}")
    return known


def _initial_metadata(tensors: TensorFile, content: ContentDigest) -> PlainMetadata:
    """The metadata of initial weights whose bytes were digested."""
    made = initial_metadata(content)
    if tensors.metadata is not None and tensors.metadata != made:
        raise VerificationError(
            f"{tensors.path}: the weights are not those that its metadata names",
            "they were changed after init-model; write them without dtl metadata to start anew",
        )
    return made


def initial_metadata(content: ContentDigest) -> PlainMetadata:
    """What initial weights say of themselves, from the digest of their bytes."""
    digest = content.initial()
    return PlainMetadata(
        format=FORMAT,
        kind="weights",
        round=0,
        base=digest,
        opened=digest,
        content=content.hexdigest(),
    )


def checked_initial_digest(tensors: TensorFile) -> str:
    """V0 of a file that must be initial weights; errors as `weights_metadata`."""
    known = weights_metadata(tensors)
    if known.round or known.base is None:
        raise FormatError(f"{tensors.path}: expected initial weights, found an opened model")
    return known.base


def make_initial_metadata(arrays: Arrays, dtype: str) -> PlainMetadata:
    """What initial weights will say of themselves, before they are written, all in one dtype."""
    layout = make_layout(arrays, dtype)
    content = ContentDigest(layout)
    for spec in layout:
        content.update(from_reals(arrays[spec.name].ravel(), dtype))
    return initial_metadata(content)


class VectorDigest:
    """V = H(fields("dtl/v2/vector", layout, u64(length), pieces)) of `count` opened integers.

    They count as little-endian i32 where `slot_bits` <= 32, else as i64.
    """

    def __init__(self, layout: Layout, count: int, slot_bits: int) -> None:
        self._dtype = np.dtype("<i4" if slot_bits <= _I32_BITS else "<i8")
        self._length = count * self._dtype.itemsize
        self._tree = TreeHash("dtl/v2/vector", encode_layout(layout))

    def update(self, integers: NDArray[np.int64]) -> None:
        """Add integers."""
        self._tree.update(np.ascontiguousarray(integers, self._dtype).data)

    def hexdigest(self) -> str:
        """The digest in hex, once all integers were added."""
        if self._tree.length != self._length:
            raise ValueError("integers are missing, or too many")
        return self._tree.digest().hex()


def encode_layout(layout: Layout) -> bytes:
    """A layout as canonical JSON."""
    return canonical_json.dumps([spec.plain() for spec in layout])


def item_bytes(dtype: str) -> int:
    """Bytes of one value."""
    return _ITEM_BYTES[dtype]


def _widen(data: bytes, dtype: str) -> Values:
    """Little-endian bytes as float64 if they are, else as float32; exact."""
    if dtype == BF16:
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    read = np.frombuffer(data, NUMPY_DTYPES[dtype])
    return read.astype(np.float32) if dtype == "F16" else read


def to_reals(data: bytes, dtype: str) -> Reals:
    """Little-endian bytes as float64; exact."""
    with np.errstate(invalid="ignore"):  # numpy warns of a signalling NaN
        return _widen(data, dtype).astype(np.float64)


def from_reals(reals: Reals, dtype: str) -> bytes:
    """float64 as little-endian bytes of a dtype, rounded to nearest (bfloat16 by float32).

    Raises NumericError for a value that is too large for the dtype.
    """
    data, fits = narrow(reals, dtype)
    if not fits:
        raise does_not_fit(dtype)
    return data


def narrow(reals: Reals, dtype: str) -> tuple[bytes, bool]:
    """As `from_reals`, and whether all values fit; one that does not becomes an infinity."""
    with np.errstate(over="ignore"):
        if dtype != BF16:
            found = reals.astype(NUMPY_DTYPES[dtype])
            return found.tobytes(), bool(np.isfinite(found).all())
        wide = reals.astype("<f4").view("<u4")
    # bfloat16 is the upper half of float32; the carry of the rounding runs upwards.
    rounded: NDArray[np.uint16] = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype("<u2")
    return rounded.tobytes(), bool(((rounded & _BF16_INFINITE) != _BF16_INFINITE).all())


def does_not_fit(dtype: str) -> NumericError:
    """The error for a value that is too large for a dtype."""
    return NumericError(f"a value does not fit into {dtype}", "choose a wider dtype for the model")


def encode_values(places: Places, first: int, reals: Reals) -> tuple[bytes, str | None]:
    """Values from place `first` of a vector on, each in the dtype of its tensor.

    Besides, a dtype into which a value did not fit, if there is one.
    """
    parts, misfit = [], None
    for spec, _, count in places.runs(first, reals.size):
        data, fits = narrow(reals[:count], spec.dtype)
        parts.append(data)
        misfit = misfit if fits else spec.dtype
        reals = reals[count:]
    return parts[0] if len(parts) == 1 else b"".join(parts), misfit


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
    parsed = canonical_json.loads(text.encode("utf-8", "surrogatepass"), f"{path}: metadata")
    refuse_older(parsed, str(path))
    return PlainMetadata.check(parsed, f"{path}: metadata")


class Loaded(NamedTuple):
    """A whole plain file: arrays of float64, its metadata, and the digests of what was read.

    `initial` is V0: the digest that the tensors have as initial weights.
    """

    path: Path
    arrays: Arrays
    metadata: PlainMetadata | None
    content: str
    initial: str

    def check_content(self) -> None:
        """Raise VerificationError unless the tensors are those that the metadata names."""
        known = self.metadata
        if known and known.content is not None and known.content != self.content:
            raise VerificationError(
                f"{self.path}: the tensors are not those that its metadata names",
                "they were changed after dtl wrote the file: take the file as it was written",
            )


def load_arrays(path: Path) -> Loaded:
    """Read a whole plain file (for models that fit into memory)."""
    with closing(open_tensors(path)) as tensors:
        arrays, content = _read_all(tensors)
        return Loaded(path, arrays, tensors.metadata, content.hexdigest(), content.initial())


def read_arrays(path: Path) -> tuple[Arrays, PlainMetadata | None]:
    """As `load_arrays`, without the digest."""
    loaded = load_arrays(path)
    return loaded.arrays, loaded.metadata


def load_weights(path: Path) -> tuple[Arrays, PlainMetadata]:
    """A whole file of weights, and its metadata with the content that was read.

    Errors as `weights_metadata`.
    """
    with closing(open_tensors(path)) as tensors:
        known = _known_weights(tensors)
        arrays, content = _read_all(tensors)
        if known is None or known.initial:
            return arrays, _initial_metadata(tensors, content)
        return arrays, known.model_copy(update={"content": content.hexdigest()})


def _read_all(tensors: TensorFile) -> tuple[Arrays, ContentDigest]:
    content = ContentDigest(tensors.layout)
    flat = np.concatenate(list(values(tensors, content)))
    arrays, start = {}, 0
    for spec in tensors.layout:
        arrays[spec.name] = flat[start : start + spec.values].reshape(spec.shape)
        start += spec.values
    return arrays, content


def make_layout(arrays: Arrays, dtype: str) -> Layout:
    """The layout of arrays that are to be written in one dtype."""
    return _make_layout(
        [(name, array.shape, dtype) for name, array in arrays.items()], Path("arrays")
    )
