"""Generated datasets."""

from __future__ import annotations

import numpy as np
import pytest

from raqu_onnx.data import InputSpec, split, synthetic_dataset
from raqu_onnx.errors import DataError

F32 = np.dtype(np.float32)
FIXED = (InputSpec("input", F32, (4, 1, 2, 2)),)


def test_synthetic_data_depends_on_seed_and_position_only():
    spec = (InputSpec("input", F32, ("n", 3, 16, 16)),)
    dataset = synthetic_dataset(spec, 5, seed=7)
    assert (dataset.name, dataset.size, dataset.synthetic, dataset.has_labels) == ("synthetic", 5, True, False)
    whole = np.concatenate([b.feeds["input"] for b in dataset.batches(5)])
    parts = np.concatenate([b.feeds["input"] for b in synthetic_dataset(spec, 5, seed=7).batches(2)])
    np.testing.assert_array_equal(whole, parts)
    other = synthetic_dataset(spec, 5, seed=8)
    assert other.digest != dataset.digest
    assert not np.array_equal(next(other.batches(5)).feeds["input"], whole)
    low, high = split(dataset, 0.5, 0)
    assert low.synthetic
    assert low.size + high.size == 5


def test_synthetic_pictures_are_smooth_and_scaled():
    spec = (InputSpec("input", F32, ("n", 3, 32, 32)),)
    (batch,) = synthetic_dataset(spec, 64, seed=0).batches(64)
    array = batch.feeds["input"]
    assert abs(array.mean()) < 0.15
    assert 0.7 < array.std() < 1.3
    neighbours = np.corrcoef(array[..., :-1].ravel(), array[..., 1:].ravel())[0, 1]
    assert neighbours > 0.5  # White noise has 0.


def test_synthetic_values_follow_the_element_type():
    specs = (
        InputSpec("ids", np.dtype(np.int64), ("n", 40)),
        InputSpec("mask", np.dtype(np.bool_), ("n", 40)),
        InputSpec("half", np.dtype(np.float16), ("n", 40)),
        InputSpec("flag", F32, ("n",)),
        InputSpec("picture", np.dtype(np.uint8), ("n", 16, 16, 3)),
    )
    (batch,) = synthetic_dataset(specs, 16, seed=0).batches(16)
    for spec in specs:
        assert batch.feeds[spec.name].dtype == spec.dtype
        assert batch.feeds[spec.name].shape == (16, *spec.shape[1:])
    assert (batch.feeds["ids"].min(), batch.feeds["ids"].max()) == (0, 7)
    assert set(np.unique(batch.feeds["mask"])) == {False, True}
    assert batch.feeds["picture"].max() > 200
    assert np.unique(batch.feeds["flag"]).size == 16


def test_synthetic_samples_fill_a_fixed_batch():
    assert synthetic_dataset(FIXED, 5, seed=0).size == 8


def test_synthetic_data_needs_known_dimensions_and_types():
    with pytest.raises(DataError, match=r"'x' has no fixed size in dimension 2 \(shape \[n, 3, h, 8\]\)"):
        synthetic_dataset((InputSpec("x", F32, ("n", 3, "h", 8)),), 4, 0)
    with pytest.raises(DataError, match="'s' is object, which cannot be generated"):
        synthetic_dataset((InputSpec("s", np.dtype(object), ("n",)),), 4, 0)
    with pytest.raises(ValueError, match="samples is 0"):
        synthetic_dataset(FIXED, 0, 0)
