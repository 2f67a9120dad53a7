"""What dropping kernels one after the other costs: against least squares without these rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.drop_paths import drop_costs

RIDGE = 0.05


def case(seed: int, channels: int, taps: int, kernels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight (1, K, M), second moments (1, K, K) and the channel that feeds each row (1, K)."""
    rng = np.random.default_rng(seed)
    rows = channels * taps
    x = rng.normal(size=(4 * rows, rows)) @ rng.normal(size=(rows, rows))
    owner = np.repeat(np.arange(channels), taps)[None]
    return rng.normal(size=(1, rows, kernels)), (x.T @ x / len(x))[None], owner


def least_error(weight: np.ndarray, second: np.ndarray, gone: np.ndarray) -> float:
    """Least `(w' - w)^T (H + r I) (w' - w)` over weights that are 0 in the rows that are gone."""
    damped = second + RIDGE * np.trace(second) / len(second) * np.eye(len(second))
    kept = np.flatnonzero(~gone)
    change = -weight.copy()
    if kept.size:
        change[kept] = (
            np.linalg.solve(damped[np.ix_(kept, kept)], damped[np.ix_(kept, np.flatnonzero(gone))]) @ weight[gone]
        )
    return float(np.vdot(damped @ change, change))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_costs_add_up_to_the_least_error_without_all_rows_dropped(
    seed: int, channels: int, taps: int, kernels: int
) -> None:
    weight, second, owner = case(seed, channels, taps, kernels)
    costs = drop_costs(weight, second, owner, channels, RIDGE)
    assert (costs >= 0).all()
    for most in np.unique(costs):
        # Among equals the order is not known; all of them together are.
        dropped = np.flatnonzero(costs <= most)
        expected = least_error(weight[0], second[0], np.isin(owner[0], dropped))
        # Equal but where a later kernel was cheaper than one before it and is counted as equal to that.
        assert costs[dropped].sum() >= expected * (1 - 1e-6) - 1e-9
    first = min(least_error(weight[0], second[0], owner[0] == channel) for channel in range(channels))
    assert costs.min() == pytest.approx(first, rel=1e-6)


def test_the_second_of_two_alike_costs_what_both_carry() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    x[:, 1] = x[:, 0] + 1e-3 * rng.normal(size=400)
    weight = np.ones((1, 3, 1))
    costs = drop_costs(weight, (x.T @ x / 400)[None], np.array([[0, 1, 2]]), 3, 1e-6)
    # The first of the two is made up for by the other; then that one carries both.
    assert costs[:2].min() < 1e-4
    assert costs[:2].max() > 3


def test_moments_of_squares_alone_let_no_row_make_up_for_another() -> None:
    weight = np.array([[[1.0], [2.0], [3.0]]])
    costs = drop_costs(weight, np.array([[1.0, 1.0, 2.0]]), np.array([[1, 1, 0]]), 3, RIDGE)
    assert costs.tolist() == [18.0, 5.0, 0.0]


def test_kernels_that_feed_no_row_cost_nothing() -> None:
    weight, second, owner = case(1, 2, 2, 2)
    assert drop_costs(weight, second, owner, 4, RIDGE)[2:].tolist() == [0.0, 0.0]
