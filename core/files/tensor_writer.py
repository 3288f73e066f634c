"""Write plain tensors piece by piece, as .safetensors or .npz by the name of the file."""

import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple, Self

import numpy as np
from numpy.lib import format as npy

from dtl.core.encoding.fixed_point import Reals
from dtl.core.errors import UsageError
from dtl.core.files.atomic import PRIVATE_MODE, AtomicOutput, machine_errors
from dtl.core.files.headers import Layout, TensorSpec
from dtl.core.files.safetensors import build_header
from dtl.core.files.tensors import (
    BF16,
    METADATA_ARRAY,
    METADATA_KEY,
    NUMPY_DTYPES,
    SUFFIXES,
    Arrays,
    ContentDigest,
    Places,
    PlainMetadata,
    does_not_fit,
    encode_values,
    item_bytes,
    make_layout,
)

WRITE_VALUES = 1 << 18
_NO_CONTENT = "0" * 128


def check_suffix(path: Path) -> None:
    """Raise UsageError unless the name ends in .safetensors or .npz."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: expected a name that ends in .safetensors or .npz")


class TensorWriter:
    """Writes tensors in packing order, values as they come, into a file of either format.

    The metadata may be known only at the end: `finish` takes it, and `draft`, as long when it
    is encoded, keeps its place. A value that is too large for its tensor's dtype is a
    NumericError; where not `strict`, `overflowed` says so, and the caller throws the file away.
    """

    def __init__(
        self,
        output: AtomicOutput,
        layout: Layout,
        draft: PlainMetadata | None,
        strict: bool = True,
    ) -> None:
        sink = _NpzSink if output.path.suffix == ".npz" else _SafetensorsSink
        self._path = output.path
        with machine_errors(self._path):
            self._sink: _NpzSink | _SafetensorsSink = sink(output, layout, draft)
        self._draft_bytes = _length_of(draft)
        self._places, self._written = Places(layout), 0
        self._todo = deque((spec, spec.values * item_bytes(spec.dtype)) for spec in layout)
        self._content = ContentDigest(layout)
        self._strict = strict
        self.overflowed = False

    def write(self, reals: Reals) -> None:
        """Append values."""
        for start in range(0, reals.size, WRITE_VALUES):
            part = reals[start : start + WRITE_VALUES]
            data, misfit = encode_values(self._places, self._written, part)
            if misfit is not None:
                if self._strict:
                    raise does_not_fit(misfit)
                self.overflowed = True
            self.write_encoded(data)

    def write_encoded(self, data: bytes) -> None:
        """Append whole values as `encode_values` made them, perhaps in another thread."""
        self._content.update(data)
        view = memoryview(data)
        while view:
            spec, left = self._todo.popleft()
            part, view = view[:left], view[left:]
            if part:
                with machine_errors(self._path):
                    self._sink.write(spec, part)
            self._written += len(part) // item_bytes(spec.dtype)
            if left > len(part):
                self._todo.appendleft((spec, left - len(part)))

    @property
    def content(self) -> str:
        """The digest of the tensors' bytes so far: see `ContentDigest`."""
        return self._content.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sink.close()

    def finish(self, metadata: PlainMetadata | None) -> None:
        """Complete the file."""
        if any(left for _, left in self._todo):
            raise ValueError("values are missing")
        if _length_of(metadata) != self._draft_bytes:
            raise ValueError("the draft of the metadata had another length")
        with machine_errors(self._path):
            self._sink.finish(metadata)


def _length_of(metadata: PlainMetadata | None) -> int:
    return len(metadata.encode()) if metadata else 0


class _SafetensorsSink:
    def __init__(self, output: AtomicOutput, layout: Layout, draft: PlainMetadata | None) -> None:
        self._output = output
        # Wide dtypes first, as the reference writer does, so that every tensor is aligned.
        ordered = sorted(layout, key=lambda spec: -item_bytes(spec.dtype))
        self._tensors = [(spec.name, spec.dtype, spec.shape) for spec in ordered]
        self._place = {}
        start = len(self._header(draft))
        for spec in ordered:
            self._place[spec.name] = start
            start += spec.values * item_bytes(spec.dtype)

    def _header(self, metadata: PlainMetadata | None) -> bytes:
        texts = {METADATA_KEY: metadata.encode().decode()} if metadata else {}
        return build_header(texts, self._tensors)

    def write(self, spec: TensorSpec, data: memoryview) -> None:
        self._output.write_at(data, self._place[spec.name])
        self._place[spec.name] += len(data)

    def finish(self, metadata: PlainMetadata | None) -> None:
        self._output.write_at(self._header(metadata), 0)

    def close(self) -> None:
        pass


class _NpzSink:
    def __init__(self, output: AtomicOutput, layout: Layout, draft: PlainMetadata | None) -> None:
        self._file = output.stream()
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._member: IO[bytes] | None = None
        self._member_name = ""
        self._empty = [spec for spec in layout if not spec.values]

    def write(self, spec: TensorSpec, data: memoryview) -> None:
        self._member_of(spec).write(data)

    def _member_of(self, spec: TensorSpec) -> IO[bytes]:
        if self._member is not None and self._member_name == spec.name:
            return self._member
        self._close_member()
        self._member = self._zip.open(zipfile.ZipInfo(f"{spec.name}.npy"), "w", force_zip64=True)
        self._member_name = spec.name
        descr = "|V2" if spec.dtype == BF16 else NUMPY_DTYPES[spec.dtype]
        header = {"descr": descr, "fortran_order": False, "shape": spec.shape}
        npy.write_array_header_1_0(self._member, header)
        return self._member

    def _close_member(self) -> None:
        if self._member is not None:
            self._member.close()
            self._member = None

    def finish(self, metadata: PlainMetadata | None) -> None:
        for spec in self._empty:
            self._member_of(spec)
        self._close_member()
        if metadata:
            text = np.array(metadata.encode().decode())
            with self._zip.open(zipfile.ZipInfo(f"{METADATA_ARRAY}.npy"), "w") as member:
                npy.write_array(member, text, allow_pickle=False)
        self._zip.close()

    def close(self) -> None:
        # After a failure the archive is not complete, and nobody will see it.
        with suppress(ValueError, OSError):
            self._close_member()
            self._zip.close()
        with suppress(OSError):
            self._file.close()


def write_arrays(
    path: Path,
    arrays: Arrays,
    dtype: str,
    metadata: PlainMetadata | None,
    force: bool = False,
    mode: int = PRIVATE_MODE,
) -> None:
    """Write arrays to a plain file, all in one dtype; `metadata` as in `unnamed_arrays`."""
    with unnamed_arrays(path, arrays, dtype, metadata, force, mode) as unnamed:
        unnamed.output.commit()


class Unnamed(NamedTuple):
    """A finished file that has no name yet, and the digest of its tensors."""

    output: AtomicOutput
    content: str


@contextmanager
def unnamed_arrays(
    path: Path,
    arrays: Arrays,
    dtype: str,
    metadata: PlainMetadata | None,
    force: bool = False,
    mode: int = PRIVATE_MODE,
) -> Iterator[Unnamed]:
    """As `write_arrays`, but the finished file gets its name only when it is committed.

    The metadata of weights and sums gets the content that was written; that of gradients names
    the content of the model that they are based on, and stays as it is.
    """
    check_suffix(path)
    layout = make_layout(arrays, dtype)
    own = metadata is not None and metadata.kind != "gradients"
    with AtomicOutput(path, force, mode) as output:
        draft = with_content(metadata, _NO_CONTENT) if own else metadata
        with TensorWriter(output, layout, draft) as writer:
            for spec in layout:
                writer.write(arrays[spec.name].ravel())
            writer.finish(with_content(metadata, writer.content) if own else metadata)
        yield Unnamed(output, writer.content)


def with_content(metadata: PlainMetadata | None, content: str) -> PlainMetadata | None:
    """The metadata with another content."""
    return metadata and metadata.model_copy(update={"content": content})
