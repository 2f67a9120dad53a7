"""Datasets from arrays, generated datasets, and what all datasets share."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.data import Batch, Dataset, InputSpec, open_dataset, split, synthetic_dataset, take
from raqu_onnx.errors import DataError

F32 = np.dtype(np.float32)
IMAGE = (InputSpec("input", F32, ("batch", 1, 2, 2)),)
FIXED = (InputSpec("input", F32, (4, 1, 2, 2)),)
PAIR = (InputSpec("ids", np.dtype(np.int64), ("n", None)), InputSpec("mask", np.dtype(np.bool_), (None, 3)))


def images(count, start=0):
    """Sample i holds i everywhere, so that a test can tell which samples came."""
    values = np.arange(start, start + count, dtype=np.float32)
    return np.tile(values[:, None, None, None], (1, 1, 2, 2))


def ids(dataset, batch_size=3):
    return [int(v) for batch in dataset.batches(batch_size) for v in batch.feeds["input"][:, 0, 0, 0]]


def refused(source, inputs=IMAGE, **options):
    """The one-line message with which a source is refused, on opening or on the first pass."""
    with pytest.raises(DataError) as info:
        list(open_dataset(source, inputs, **options).batches(4))
    text = str(info.value)
    assert "\n" not in text
    return text


def savez(folder, **arrays):
    path = folder / "calib.npz"
    np.savez(path, **arrays)
    return path


# Reading ------------------------------------------------------------------------------------------------------------


def test_npz_gives_batches_with_labels_again_and_again(tmp_path):
    dataset = open_dataset(savez(tmp_path, input=images(7), labels=np.arange(7, dtype=np.uint8)), IMAGE)
    assert (dataset.name, dataset.size, dataset.has_labels, dataset.synthetic) == ("calib.npz", 7, True, False)
    for _ in range(2):
        batches = list(dataset.batches(3))
        assert [b.size for b in batches] == [3, 3, 1]
        assert batches[1].labels.dtype == np.int64
        assert batches[1].labels.tolist() == [3, 4, 5]
        assert batches[1].feeds["input"].dtype == F32
        assert ids(dataset) == list(range(7))


def test_npy_is_mapped_and_feeds_the_only_input(tmp_path):
    np.save(tmp_path / "x.npy", images(5))
    dataset = open_dataset(str(tmp_path / "x.npy"), IMAGE)
    assert ids(dataset) == [0, 1, 2, 3, 4]
    assert not dataset.has_labels
    labelled = open_dataset(tmp_path / "x.npy", IMAGE, labels=np.arange(5))
    assert [b.labels.tolist() for b in labelled.batches(4)] == [[0, 1, 2, 3], [4]]
    assert labelled.digest != dataset.digest


def test_mapping_feeds_several_inputs_in_the_models_order():
    source = {"mask": np.ones((2, 3), np.bool_), "ids": np.arange(8).reshape(2, 4), "labels": [1, 0]}
    (batch,) = open_dataset(source, PAIR).batches(8)
    assert list(batch.feeds) == ["ids", "mask"]
    assert batch.labels.tolist() == [1, 0]


def test_an_input_called_labels_is_an_input():
    spec = (InputSpec("labels", np.dtype(np.int64), ("n",)),)
    (batch,) = open_dataset({"labels": np.arange(3)}, spec).batches(3)
    assert batch.labels is None
    assert batch.feeds["labels"].tolist() == [0, 1, 2]


def test_an_opened_dataset_passes_through_if_it_fits():
    dataset = open_dataset({"input": images(2)}, IMAGE)
    renamed = (InputSpec("input", F32, (None, 1, 2, 2)),)
    assert open_dataset(dataset, renamed) is dataset
    assert "was opened for inputs 'input' float32[batch, 1, 2, 2]" in refused(dataset, FIXED)
    assert "labels from the source itself" in refused(dataset, labels=np.arange(2))


def test_digest_follows_the_contents(tmp_path):
    first = open_dataset(savez(tmp_path, input=images(3)), IMAGE).digest
    assert open_dataset(savez(tmp_path, input=images(3)), IMAGE).digest == first
    assert open_dataset(savez(tmp_path, input=images(3, start=1)), IMAGE).digest != first
    of_mapping = open_dataset({"input": images(3)}, IMAGE).digest
    assert len(of_mapping) == 64
    assert open_dataset({"input": np.asfortranarray(images(3))}, IMAGE).digest == of_mapping
    assert open_dataset({"input": images(3), "labels": [0, 1, 2]}, IMAGE).digest != of_mapping


# Batches of a fixed size --------------------------------------------------------------------------------------------


def test_a_fixed_batch_is_exact_and_the_rest_left_out(caplog):
    dataset = open_dataset({"input": images(10)}, FIXED)
    with caplog.at_level("INFO"):
        sizes = [b.size for b in dataset.batches(64)]
    assert sizes == [4, 4]
    assert "left out 2 samples" in caplog.text


def test_fewer_samples_than_the_fixed_batch_are_refused():
    assert "holds 3 samples, the model takes exactly 4" in refused({"input": images(3)}, FIXED)


def test_split_and_take_keep_units_of_a_fixed_batch_together():
    dataset = open_dataset({"input": images(20)}, FIXED)
    low, high = split(dataset, 0.4, seed=1)
    units = sorted(tuple(b.feeds["input"][:, 0, 0, 0].astype(int)) for d in (low, high) for b in d.batches(1))
    assert units == [tuple(range(i, i + 4)) for i in range(0, 20, 4)]
    assert take(dataset, 5).size == 8


def test_batch_size_below_one_is_a_callers_mistake():
    with pytest.raises(ValueError, match="batch_size is 0"):
        open_dataset({"input": images(3)}, IMAGE).batches(0)


class Minimal(Dataset):
    """What someone else must write for an own source, without knowing its size."""

    def __init__(self, pieces):
        super().__init__("own", "0" * 64, (InputSpec("input", F32, ("n", None)),), has_labels=False)
        self._pieces = pieces

    @property
    def size(self):
        return None

    def read(self, most, indices=None):
        assert most >= 1
        assert indices is None
        return (Batch({"input": piece}) for piece in self._pieces)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(1, 9))
def test_pieces_of_any_size_become_batches_of_one_size(lengths, batch_size):
    total = sum(lengths)
    column = np.arange(total, dtype=np.float32)[:, None]
    dataset = Minimal(np.split(column, np.cumsum(lengths)[:-1]))
    batches = list(dataset.batches(batch_size))
    assert np.concatenate([b.feeds["input"] for b in batches]).ravel().tolist() == list(range(total))
    assert {b.size for b in batches[:-1]} <= {batch_size}


def test_a_batch_ends_where_a_free_dimension_changes():
    dataset = Minimal([np.zeros((2, 3), F32), np.zeros((2, 5), F32), np.zeros((3, 5), F32)])
    assert [b.feeds["input"].shape for b in dataset.batches(4)] == [(2, 3), (4, 5), (1, 5)]


def test_memory_that_a_source_writes_again_is_not_shared():
    def pieces():
        buffer = np.zeros((2, 1), np.float32)
        for value in range(3):
            buffer[:] = value
            yield buffer

    (batch,) = Minimal(pieces()).batches(6)
    assert batch.feeds["input"].ravel().tolist() == [0, 0, 1, 1, 2, 2]


# What the model must be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((), "the model has no input that data could feed"),
        ((InputSpec("x", F32, None),), "model input 'x' has no known rank"),
        ((InputSpec("x", F32, ()),), "model input 'x' is a scalar and has no sample axis"),
        ((InputSpec("x", F32, ("n", 0)),), "model input 'x' has shape [n, 0], which holds no element"),
        (
            (InputSpec("x", F32, (1, 3)), InputSpec("h", F32, (2, 3)), InputSpec("y", F32, ("n",))),
            "model inputs differ in their first dimension ('x' 1, 'h' 2)",
        ),
    ],
)
def test_models_without_a_sample_axis_are_refused(inputs, text):
    source = {spec.name: np.zeros((2, 3), np.float32) for spec in inputs}
    assert text in refused(source, inputs)
    with pytest.raises(DataError) as info:
        synthetic_dataset(inputs, 4, 0)
    assert text in str(info.value)


# What arrays must be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "inputs", "texts"),
    [
        (
            {"images": images(3)},
            IMAGE,
            ["array 'images' matches no model input", "'input' float32[batch, 1, 2, 2]; rename it to 'input'"],
        ),
        (
            {"input": images(3), "extra": images(3)},
            IMAGE,
            ["array 'extra' matches no model input; the model takes 'input' float32"],
        ),
        (
            {"ids": np.zeros((2, 3), np.int64)},
            PAIR,
            ["no array for model input 'mask' bool[?, 3]", "found 'ids'"],
        ),
        ({}, IMAGE, ["no array for model input 'input'", "found no array"]),
        (
            {"input": images(3).astype(np.float64)},
            IMAGE,
            ["array 'input' is float64, the model takes float32; convert it with array.astype('float32')"],
        ),
        ({"input": images(3).astype(np.uint8)}, IMAGE, ["array 'input' is uint8", "scaled as in training"]),
        ({"input": images(3).astype(">f4")}, IMAGE, ["array 'input' is byte-swapped float32"]),
        ({"input": images(3)[:, 0]}, IMAGE, ["array 'input' has shape [3, 2, 2], the model takes [batch, 1, 2, 2]"]),
        ({"input": np.zeros((3, 1, 2, 4), np.float32)}, IMAGE, ["has shape [3, 1, 2, 4], the model takes"]),
        ({"input": np.float32(1)}, IMAGE, ["array 'input' has shape [], the model takes"]),
        ({"input": images(0)}, IMAGE, ["array 'input' is empty (shape [0, 1, 2, 2])"]),
        (
            {"ids": np.zeros((2, 3), np.int64), "mask": np.ones((5, 3), np.bool_)},
            PAIR,
            ["arrays differ in length ('ids' 2, 'mask' 5)"],
        ),
        ({"input": images(3), "labels": np.arange(4)}, IMAGE, ["4 labels for 3 samples"]),
        ({"input": images(3), "labels": np.zeros(3)}, IMAGE, ["labels are float64, expected integers"]),
        ({"input": images(3), "labels": np.eye(3, dtype=int)}, IMAGE, ["labels have shape [3, 3], expected [3]"]),
        ({"input": images(3), "labels": np.array([0, -1, 2])}, IMAGE, ["a label is -1; class indices start at 0"]),
        (
            {"input": images(1), "labels": np.array([2**63], np.uint64)},
            IMAGE,
            ["a label is 9223372036854775808, which is no class index"],
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused_alike_from_file_and_memory(tmp_path, arrays, inputs, texts):
    path = savez(tmp_path, **arrays)
    for message, where in ((refused(path, inputs), f"{path}: "), (refused(arrays, inputs), "arrays: ")):
        assert message.startswith(where)
        for text in texts:
            assert text in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_place(tmp_path, bad):
    # Larger than one block of the check, so that counting over blocks is under test.
    spec = (InputSpec("x", F32, ("n", 1 << 20)),)
    array = np.zeros((9, 1 << 20), np.float32)
    array[7, 5] = bad
    np.save(tmp_path / "x.npy", array)
    assert "array 'x' holds NaN or infinity, first in sample 7" in refused(tmp_path / "x.npy", spec)


def test_values_that_make_no_array_are_refused():
    assert "array 'input' is a list that makes no array" in refused({"input": [[1.0], [1.0, 2.0]]})
    assert "labels is a list that makes no array" in refused({"input": images(2), "labels": [[1], [1, 2]]})


def test_labels_may_be_given_once_only(tmp_path):
    path = savez(tmp_path, input=images(2), labels=np.arange(2))
    assert "give one of them" in refused(path, labels=np.arange(2))
    assert "labels are object" in refused({"input": images(2)}, labels=np.array([0, None]))


# What files must be -------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a mark when it is unpickled."""

    mark = "unpickled"

    def __init__(self, folder):
        self.path = str(folder / self.mark)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("name", ["input", "labels"])
def test_pickled_arrays_are_never_loaded(tmp_path, name):
    bomb = np.array([Bomb(tmp_path)], dtype=object)
    path = savez(tmp_path, **{"input": images(1), name: bomb})
    message = refused(path)
    assert message.startswith(f"{path}: array '{name}' holds pickled Python objects, which are never loaded")
    np.save(tmp_path / "x.npy", bomb, allow_pickle=True)
    assert "array 'x' holds pickled Python objects" in refused(tmp_path / "x.npy")
    assert not (tmp_path / Bomb.mark).exists()
    # The mark is what loading it would have left.
    np.load(path, allow_pickle=True)[name]
    assert (tmp_path / Bomb.mark).exists()


def test_files_that_are_not_what_their_name_says_are_refused(tmp_path):
    for suffix, text in (("npz", "is not an .npz file, or a truncated one"), ("npy", "is not an .npy file")):
        path = tmp_path / f"x.{suffix}"
        for content in (b"", b"hello", pickle.dumps({"input": 1})):
            path.write_bytes(content)
            message = refused(path)
            assert message.startswith(f"{path}: ")
            assert text in message


def test_every_truncation_and_every_damaged_byte_is_refused_or_harmless(tmp_path):
    good = savez(tmp_path, input=images(4)).read_bytes()
    np.save(tmp_path / "x.npy", images(4))
    plain = (tmp_path / "x.npy").read_bytes()
    damaged = 0
    for path, content in ((tmp_path / "bad.npz", good), (tmp_path / "bad.npy", plain)):
        variants = [content[:cut] for cut in range(0, len(content), 5)]
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 0xFF
            variants.append(bytes(changed))
        for variant in variants:
            path.write_bytes(variant)
            with contextlib.suppress(DataError):
                list(open_dataset(path, IMAGE).batches(4))
                damaged -= 1
            damaged += 1
    assert damaged > (len(good) + len(plain)) // 5  # Every truncation at least.


def test_a_damaged_array_is_named(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, input=images(64))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("input.npy")
    content[info.header_offset + 60 + info.compress_size // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    assert f"{path}: array 'input' is damaged or truncated" in refused(path)


def test_an_npy_needs_a_single_input(tmp_path):
    np.save(tmp_path / "x.npy", images(2))
    assert "an .npy file feeds one input, the model has 2" in refused(tmp_path / "x.npy", PAIR)


def test_sources_that_are_nothing_known_are_refused(tmp_path):
    assert "missing.npz: not found" in refused(tmp_path / "missing.npz")
    (tmp_path / "x.csv").write_text("1,2")
    assert "x.csv: is no kind of data that is known; give an .npz" in refused(tmp_path / "x.csv")
    assert "data of type int is unknown" in refused(3)
    (tmp_path / "dir.npz").mkdir()
    assert "holds no picture" in refused(tmp_path / "dir.npz")
