"""Scales that clip: against the plain search over all shares in double precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.clipping import ScaleLimits, clipped_scales

SHARES = np.linspace(1.0, 0.2, 41)


def weighted_errors(
    weight: np.ndarray, power: np.ndarray, kernels: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Squared error after rounding of all kernels that share an entry, shape (channels,)."""
    group, kernel = np.divmod(kernels, weight.shape[2])
    values, powers = weight[group, :, kernel], power[group]
    step, low, high = (item[:, None, None] for item in (scale, low, high))
    return (powers * np.square(np.clip(np.rint(values / step), low, high) * step - values)).sum((1, 2))


def problem(
    groups: int, rows: int, kernels: int, bits: int, shared: bool, seed: int, size: float = 1.0
) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(3, size=(groups, rows, kernels)) * rng.lognormal(size=(groups, 1, kernels)) * size
    power = rng.gamma(0.5, size=(groups, rows)) * size
    count = groups * kernels
    # With a scale per position in the group, kernel j of all groups shares one.
    members = np.arange(count).reshape(groups, kernels).T if shared else np.arange(count)[:, None]
    low = np.full(len(members), -(2.0 ** (bits - 1)))
    group, kernel = np.divmod(members, kernels)
    values = weight[group, :, kernel].reshape(len(members), -1)
    full = np.maximum(values.max(1) / (-low - 1), values.min(1) / low)
    return weight, power, members, full, low, -low - 1


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(2, 8),
    st.booleans(),
    st.integers(0, 1000),
    st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_no_share_is_better(
    groups: int, rows: int, kernels: int, bits: int, shared: bool, seed: int, size: float
) -> None:
    weight, power, members, full, low, high = problem(groups, rows, kernels, bits, shared, seed, size)
    full = np.where(full > 0, full, size)
    scales = clipped_scales(weight, power, members, full, ScaleLimits(np.zeros(len(full)), low, high))
    found = weighted_errors(weight, power, members, scales, low, high)
    trials = [weighted_errors(weight, power, members, full * share, low, high) for share in SHARES]
    scale_of_errors = (power[np.divmod(members, weight.shape[2])[0]].max((1, 2)) + 1e-300) * full**2
    assert (found <= np.min(trials, axis=0) * (1 + 1e-3) + 1e-6 * scale_of_errors).all()
    assert np.isclose((scales / full)[:, None], SHARES, rtol=1e-9).any(1).all()


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, power, members, full, low, high = problem(2, 30, 8, 3, False, 5)
    whole = clipped_scales(weight, power, members, full, ScaleLimits(np.zeros(16), low, high))
    monkeypatch.setattr("raqu_onnx.clipping._BLOCK", 1)
    np.testing.assert_array_equal(
        clipped_scales(weight, power, members, full, ScaleLimits(np.zeros(16), low, high)), whole
    )
    assert (whole < full).any()


def test_the_floor_holds_and_is_what_errors_are_judged_at() -> None:
    weight, power, members, full, low, high = problem(1, 50, 6, 2, False, 3)
    floor = full * np.array([0.0, 0.5, 0.9, 1.0, 2.0, 10.0])
    scales = clipped_scales(weight, power, members, full, ScaleLimits(floor, low, high))
    assert (scales >= floor).all()
    np.testing.assert_allclose(scales[3:], floor[3:])
    free = clipped_scales(weight, power, members, full, ScaleLimits(np.zeros(6), low, high))
    assert scales[0] == free[0]


def test_a_dropped_kernel_keeps_its_scale() -> None:
    weight, power, members, full, *_ = problem(1, 20, 3, 4, False, 1)
    low, high = np.array([-8.0, 0.0, -8.0]), np.array([7.0, 0.0, 7.0])
    assert clipped_scales(weight, power, members, full, ScaleLimits(np.zeros(3), low, high))[1] == full[1]
