"""Plain tensors: values in batches, digests of what was read and written, narrow dtypes."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from dtl.core.errors import FormatError, NumericError, VerificationError
from dtl.core.files.atomic import AtomicOutput
from dtl.core.files.headers import TensorSpec
from dtl.core.files.tensor_writer import TensorWriter, unnamed_arrays, write_arrays
from dtl.core.files.tensors import (
    ContentDigest,
    Places,
    PlainMetadata,
    batches,
    content_digest,
    describe_place,
    encode_values,
    from_reals,
    initial_digest,
    load_arrays,
    load_weights,
    make_initial_metadata,
    not_finite,
    open_tensors,
    read_arrays,
    values,
    weights_metadata,
)
from dtl.core.files.tree_hash import PIECE

LAYOUT = (
    TensorSpec(name="a", shape=(2, 3), dtype="F16"),
    TensorSpec(name="b", shape=(0,), dtype="F32"),
    TensorSpec(name="c", shape=(4,), dtype="BF16"),
    TensorSpec(name="d", shape=(), dtype="F32"),
    TensorSpec(name="e", shape=(0, 2), dtype="F64"),
)
REALS = np.array([0.5, -1, 2, 3, -4, 5.25, 1, -0.25, 8, 0, 1.1])
OPENED = PlainMetadata(
    format="dtl/v2",
    kind="weights",
    round=3,
    base="1" * 128,
    opened="2" * 128,
    content="3" * 128,
)


def write(path: Path, layout: tuple[TensorSpec, ...], reals: NDArray[np.float64]) -> str:
    """Write values, a few at a time; returns the content."""
    with AtomicOutput(path) as output:
        with TensorWriter(output, layout, None) as writer:
            for start in range(0, len(reals), 3):
                writer.write(reals[start : start + 3])
            writer.finish(None)
        output.commit()
    return writer.content


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("size", [1, 3, 4, 11, 100])
def test_batches_are_all_values_in_packing_order(tmp_path: Path, suffix: str, size: int) -> None:
    path = tmp_path / f"t{suffix}"
    content = write(path, LAYOUT, REALS)
    tensors = open_tensors(path)
    digest = ContentDigest(tensors.layout)
    found = list(batches(tensors, size, digest))
    assert {batch.dtype for batch in found} == {np.dtype(np.float64)}  # `e` is wide
    assert [len(batch) for batch in found[:-1]] == [size] * (len(found) - 1)
    assert len(found[-1]) == len(REALS) - size * (len(found) - 1)
    expected = np.concatenate(list(values(tensors)))
    assert np.concatenate(found).tolist() == expected.tolist()
    assert np.abs(expected - REALS).max() < 1e-7
    assert digest.hexdigest() == content_digest(tensors) == content


def test_narrow_values_come_as_float32(tmp_path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "h": np.array([1.5, -65504], np.float16),
        "s": np.array([3e38, 1e-45], np.float32),
    }
    path = tmp_path / "t.safetensors"
    save_file(arrays, path)
    (batch,) = batches(open_tensors(path), 10)
    assert batch.dtype == np.float32
    assert batch.tolist() == [1.5, -65504, float(np.float32(3e38)), float(np.float32(1e-45))]


def test_batches_over_many_pieces(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(0, 1, 1_000_003).astype(np.float32)
    path = tmp_path / "t.safetensors"
    save_file({"x": array, "y": array[:7]}, path)
    found = list(batches(open_tensors(path), 300_000))
    assert [len(batch) for batch in found] == [300_000] * 3 + [100_010]
    assert (np.concatenate(found) == np.concatenate([array, array[:7]])).all()


def test_what_is_not_finite_is_left_to_the_caller_who_can_name_it(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, x=np.zeros(3), y=np.array([[0, 1, 2], [3, np.nan, -np.inf]]))
    tensors = open_tensors(path)
    (batch,) = batches(tensors, 100)
    places = np.flatnonzero(~np.isfinite(batch)).tolist()
    assert places == [7, 8]
    expected = f"{path}: tensor 'y' at [1, 1]: not finite"
    assert describe_place(tensors.layout, places[0]) == ("y", [1, 1])
    assert not_finite(tensors, places[0]).message == expected
    assert not_finite(tensors, places[1]).message.endswith("'y' at [1, 2]: not finite")
    with pytest.raises(NumericError) as error:
        list(values(tensors))
    assert error.value.message == expected


def test_places() -> None:
    runs = [(spec.name, first, count) for spec, first, count in Places(LAYOUT).runs(4, 7)]
    assert runs == [("a", 4, 2), ("c", 0, 4), ("d", 0, 1)]
    assert list(Places(LAYOUT).runs(11, 0)) == []
    for first, count in ((0, 12), (11, 1), (-1, 2), (3, -1)):
        with pytest.raises(ValueError, match="no such values"):
            list(Places(LAYOUT).runs(first, count))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_encoded_values_are_written_as_they_are(tmp_path: Path, suffix: str) -> None:
    expected = tmp_path / f"one{suffix}"
    write(expected, LAYOUT, REALS)
    path, places = tmp_path / f"other{suffix}", Places(LAYOUT)
    with AtomicOutput(path) as output:
        with TensorWriter(output, LAYOUT, None) as writer:
            writer.write(REALS[:5])
            data, misfit = encode_values(places, 5, REALS[5:])
            assert misfit is None
            writer.write_encoded(data)
            writer.finish(None)
        output.commit()
    assert path.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("dtype", "most", "too_much"),
    [
        ("F16", 65504.0, 65520.0),
        ("BF16", 3.3895313892515355e38, 3.3961775292304957e38),
        ("F32", 3.4028234663852886e38, 3.4028235677973366e38),
    ],
)
def test_a_value_that_does_not_fit(
    tmp_path: Path, dtype: str, most: float, too_much: float
) -> None:
    layout = (
        TensorSpec(name="a", shape=(2,), dtype="F64"),
        TensorSpec.check({"name": "b", "shape": [3], "dtype": dtype}, "b"),
    )
    fitting, reals = np.array([1e300, 1, most, -most, 0]), np.array([1e300, 1, 0, -too_much, 7])
    for strict in (True, False):
        path = tmp_path / f"{strict}.npz"
        with AtomicOutput(path) as output, TensorWriter(output, layout, None, strict) as writer:
            writer.write(fitting)
            assert not writer.overflowed
        with AtomicOutput(path) as output, TensorWriter(output, layout, None, strict) as writer:
            if strict:
                with pytest.raises(NumericError, match=f"a value does not fit into {dtype}"):
                    writer.write(reals)
                continue
            writer.write(reals[:4])
            writer.write(reals[4:])
            assert writer.overflowed
            writer.finish(None)


def test_the_draft_of_the_metadata_must_be_as_long(tmp_path: Path) -> None:
    layout = (TensorSpec(name="a", shape=(1,), dtype="F32"),)
    with AtomicOutput(tmp_path / "t.safetensors") as output:
        draft = OPENED.model_copy(update={"content": None})
        with TensorWriter(output, layout, draft) as writer:
            writer.write(np.ones(1))
            with pytest.raises(ValueError, match="another length"):
                writer.finish(OPENED)


def test_the_content_does_not_depend_on_the_format_but_on_the_dtype(tmp_path: Path) -> None:
    arrays = {"x": np.arange(5.0), "y": np.ones((2, 2))}
    found = {}
    for name, dtype in (("a.npz", "F32"), ("b.safetensors", "F32"), ("c.npz", "F64")):
        write_arrays(tmp_path / name, arrays, dtype, None)
        found[name] = load_arrays(tmp_path / name).content
        assert content_digest(open_tensors(tmp_path / name)) == found[name]
    assert found["a.npz"] == found["b.safetensors"] != found["c.npz"]


def test_written_weights_and_sums_name_their_content_and_gradients_their_base(
    tmp_path: Path,
) -> None:
    arrays = {"x": np.arange(5.0)}
    for kind in ("weights", "sum", "gradients"):
        path = tmp_path / f"{kind}.safetensors"
        metadata = OPENED.model_copy(update={"kind": kind, "content": None})
        with unnamed_arrays(path, arrays, "F32", metadata) as unnamed:
            unnamed.output.commit()
        loaded = load_arrays(path)
        known = loaded.metadata
        assert unnamed.content == loaded.content
        assert loaded.initial == initial_digest(open_tensors(path))
        assert known is not None
        assert known.content == (None if kind == "gradients" else loaded.content)


def test_initial_weights_name_base_opened_and_content(tmp_path: Path) -> None:
    arrays = {"x": np.arange(PIECE // 4 + 3, dtype=np.float64)}
    metadata = make_initial_metadata(arrays, "F32")
    path = tmp_path / "w0.npz"
    write_arrays(path, arrays, "F32", metadata)
    tensors = open_tensors(path)
    assert metadata.base == metadata.opened == initial_digest(tensors)
    assert metadata.content == content_digest(tensors) != metadata.base
    assert tensors.metadata == weights_metadata(tensors) == load_weights(path)[1] == metadata
    np.savez(path, x=arrays["x"].astype(np.float32))  # without metadata
    assert weights_metadata(open_tensors(path)) == load_weights(path)[1] == metadata


@pytest.mark.parametrize("field", ["base", "opened", "content"])
def test_initial_weights_must_be_what_their_metadata_names(tmp_path: Path, field: str) -> None:
    arrays = {"x": np.arange(3.0)}
    metadata = make_initial_metadata(arrays, "F32").model_copy(update={field: "0" * 128})
    path = tmp_path / "w0.safetensors"
    with AtomicOutput(path) as output:
        with TensorWriter(output, open_layout(arrays), metadata) as writer:
            writer.write(arrays["x"])
            writer.finish(metadata)
        output.commit()
    for read in (load_weights, lambda path: weights_metadata(open_tensors(path))):
        with pytest.raises(VerificationError, match="not those that its metadata names"):
            read(path)


def open_layout(arrays: dict[str, NDArray[np.float64]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=name, shape=array.shape, dtype="F32") for name, array in arrays.items()
    )


def test_weights_that_are_loaded_come_with_the_content_that_was_read(tmp_path: Path) -> None:
    """Whatever the metadata of an opened model claims: it is not signed."""
    arrays = {"x": np.arange(3.0)}
    path = tmp_path / "w.safetensors"
    with AtomicOutput(path) as output:
        with TensorWriter(output, open_layout(arrays), OPENED) as writer:
            writer.write(arrays["x"])
            writer.finish(OPENED)
        output.commit()
    found, metadata = load_weights(path)
    assert found["x"].tolist() == [0, 1, 2]
    assert metadata == OPENED.model_copy(update={"content": writer.content})
    assert weights_metadata(open_tensors(path)) == read_arrays(path)[1] == OPENED


def test_gradients_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "g.npz"
    write_arrays(path, {"x": np.ones(1)}, "F32", OPENED.model_copy(update={"kind": "gradients"}))
    with pytest.raises(FormatError, match="expected weights, found gradients"):
        load_weights(path)


def test_bfloat16_rounds_to_nearest_even() -> None:
    reals = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-7])
    found = np.frombuffer(from_reals(reals, "BF16"), "<u2").tolist()
    assert found == [0x3F80, 0x3F80, 0x3F82, 0xBF81]


def test_a_signalling_nan_is_read_without_a_warning(tmp_path: Path) -> None:
    signalling = np.array([0x7F800001], "<u4").view("<f4")
    path = tmp_path / "t.npz"
    np.savez(path, x=signalling, y=np.zeros(1))
    tensors = open_tensors(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = batches(tensors, 2)
        with pytest.raises(NumericError, match=r"'x' at \[0\]: not finite"):
            list(values(tensors))
    assert np.isnan(batch[0])
