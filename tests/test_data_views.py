"""Datasets that are parts of others: split in two, or thinned out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.data import InputSpec, open_dataset, split, take
from raqu_onnx.errors import DataError

IMAGE = (InputSpec("input", np.dtype(np.float32), ("batch", 1, 2, 2)),)


def images(count, start=0):
    """Sample i holds i everywhere, so that a test can tell which samples came."""
    values = np.arange(start, start + count, dtype=np.float32)
    return np.tile(values[:, None, None, None], (1, 1, 2, 2))


def ids(dataset, batch_size=3):
    return [int(v) for batch in dataset.batches(batch_size) for v in batch.feeds["input"][:, 0, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.floats(0.01, 0.99), st.integers(0, 5), st.integers(1, 50))
def test_split_is_disjoint_complete_and_repeatable(count, share, seed, batch_size):
    dataset = open_dataset({"input": images(count), "labels": np.arange(count)}, IMAGE)
    low, high = split(dataset, share, seed)
    got = [ids(low, batch_size), ids(high, batch_size)]
    assert sorted(got[0] + got[1]) == list(range(count))
    assert len(got[0]) == low.size == min(max(round(share * count), 1), count - 1)
    assert [b.labels.tolist() for b in low.batches(99)] == [got[0]]
    again = split(dataset, share, seed)
    assert [ids(d) for d in again] == got
    assert [d.digest for d in again] == [low.digest, high.digest]
    assert low.digest != high.digest != dataset.digest


def test_split_depends_on_the_seed_and_needs_two_samples():
    dataset = open_dataset({"input": images(30)}, IMAGE)
    assert ids(split(dataset, 0.5, 0)[0]) != ids(split(dataset, 0.5, 1)[0])
    with pytest.raises(DataError, match="holds 1 sample, too few to split"):
        split(take(dataset, 1), 0.5, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(dataset, 1.0, 0)


def test_take_spreads_samples_over_the_data_and_views_nest():
    dataset = open_dataset({"input": images(9)}, IMAGE)
    low, middle, high = ids(take(dataset, 3))
    assert low < 3 <= middle < 6 <= high
    assert ids(take(dataset, 3)) == [low, middle, high]
    assert ids(take(dataset, 99)) == list(range(9))
    first, _ = split(take(dataset, 6), 0.5, 3)
    assert set(ids(take(first, 2))) < set(ids(first)) < set(ids(take(dataset, 6)))
    with pytest.raises(ValueError, match="samples is 0"):
        take(dataset, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(1, 30), st.integers(1, 300))
def test_take_draws_one_sample_of_every_stretch(classes, each, wanted):
    dataset = open_dataset({"input": images(classes * each)}, IMAGE)
    drawn = np.array(ids(take(dataset, wanted)))
    assert len(drawn) == min(wanted, classes * each)
    assert (np.diff(drawn) > 0).all()
    # No stretch of the data is left out, and so no class of data that lies class by class.
    assert np.bincount(drawn // each, minlength=classes).min() >= min(1, wanted // (2 * classes))


def test_take_does_not_follow_classes_that_take_turns():
    dataset = open_dataset({"input": images(1000)}, IMAGE)
    drawn = np.array(ids(take(dataset, 100)))
    assert len(set(drawn % 10)) == 10
