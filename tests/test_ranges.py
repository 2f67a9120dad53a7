"""Ranges of activations: what each method promises, on histograms whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.ranges import RANGE_METHODS, RangeMethod, activation_quantizer
from raqu_onnx.statistics import Histogram


def histogram_of(x: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.update(x.astype(np.float32))
    return histogram


def top(x: np.ndarray, bits: int, method: RangeMethod) -> float:
    """Largest value that the chosen codes can stand for."""
    found = activation_quantizer(histogram_of(x), bits, method)
    return (found.levels - found.zero_point) * found.scale


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    bits=st.integers(2, 8),
    method=st.sampled_from(RANGE_METHODS),
    shift=st.floats(-3, 3),
    scale=st.floats(1e-4, 1e4),
)
def test_zero_has_a_code_and_ranges_stay_inside_what_was_seen(
    seed: int, bits: int, method: RangeMethod, shift: float, scale: float
) -> None:
    x = (np.random.default_rng(seed).normal(shift, 1, 4000) * scale).astype(np.float32)
    found = activation_quantizer(histogram_of(x), bits, method)
    assert 0 <= found.zero_point <= found.levels
    assert found.fake_quantize(np.zeros(1, np.float32))[0] == 0.0
    span = max(0.0, float(x.max())) - min(0.0, float(x.min()))
    assert found.scale * found.levels <= span * (1 + 1e-5)


@pytest.mark.parametrize("method", RANGE_METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_tensor_that_is_never_negative_gets_zero_point_0(method: RangeMethod, bits: int) -> None:
    x = np.maximum(np.random.default_rng(1).normal(size=20000), 0)
    assert activation_quantizer(histogram_of(x), bits, method).zero_point == 0


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_a_few_outliers_are_clipped(method: RangeMethod) -> None:
    """A thousandth of a tensor must not take away the codes of the rest."""
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.uniform(0, 1, 100_000), np.full(20, 8.0)])
    assert top(x, 4, "min-max") == pytest.approx(8.0)
    assert top(x, 4, method) < 4.0


def test_entropy_keeps_all_of_what_codes_tell_wholly() -> None:
    """Sixteen values, sixteen codes: the divergence is 0 at the full range and nowhere else."""
    x = np.repeat(np.arange(16) / 15, np.arange(100, 1700, 100))
    assert top(x, 4, "entropy") == pytest.approx(1.0)
    assert top(x * 5, 4, "entropy") == pytest.approx(5.0)


def test_entropy_and_mse_differ_on_long_tails() -> None:
    """The squared error cares for the tail, the divergence for where most values are."""
    x = np.abs(np.random.default_rng(3).standard_t(3, 200_000))
    assert top(x, 4, "entropy") < top(x, 4, "min-max") / 4
    assert top(x, 8, "mse") > top(x, 4, "mse")


@pytest.mark.parametrize("bits", [3, 4])
def test_mse_chooses_the_ends_apart(bits: int) -> None:
    """Far outliers on one side must not cost the other side its range."""
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.uniform(-1, 0, 50_000), rng.uniform(0, 1, 50_000), np.full(10, 20.0)])
    assert -x.min() / x.max() < 0.06
    found = activation_quantizer(histogram_of(x), bits, "mse")
    error = np.square(found.fake_quantize(x.astype(np.float32)) - x).sum()
    shared = min(
        np.square(np.clip(np.rint(x / s) + z, 0, 2**bits - 1) * s - z * s - x).sum()
        for share in np.linspace(1, 0.1, 91)
        for s in [(x.max() - x.min()) * share / (2**bits - 1)]
        for z in [np.rint(share / s)]
    )
    assert error < shared


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_a_tensor_of_zeros_has_a_quantizer(method: RangeMethod) -> None:
    found = activation_quantizer(histogram_of(np.zeros(100)), 8, method)
    assert found.scale > 0
    assert found.zero_point == 0
