"""What the search learns beyond the additive model, with numbers that can be worked out otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.search.surrogate import ResidualSurrogate, expected_improvement


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 20), st.floats(-4, 4), st.floats(0.05, 2))
def test_the_expected_improvement_is_the_mean_over_the_distribution(best: float, location: float, scale: float) -> None:
    steps = np.linspace(-12, 12, 200_001)
    density = np.exp(-(steps**2) / 2) / math.sqrt(2 * math.pi)
    gains = np.maximum(best - np.exp(location + scale * steps), 0.0)
    mean = float(np.trapezoid(gains * density, steps))
    found = expected_improvement(best, np.array([location]), np.array([scale]))
    assert found.shape == (1,)
    assert found[0] == pytest.approx(mean, rel=1e-4, abs=1e-9)


def test_without_anything_judged_the_additive_model_decides() -> None:
    surrogate = ResidualSurrogate(0)
    vectors = np.array([[0, 0], [1, 0], [0, 1]])
    assert surrogate.ranked(vectors, np.array([3.0, 1.0, 2.0])).tolist() == [1, 2, 0]


def test_the_same_factor_everywhere_changes_no_order() -> None:
    """A model that is wrong by one factor ranks as if it were right."""
    vectors = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    predictions = np.array([4.0, 1.0, 3.0, 2.0])
    surrogate = ResidualSurrogate(0)
    surrogate.tell([5, 5], 1.0, 0.25)
    surrogate.tell([-5, 5], 8.0, 2.0)
    assert surrogate.ranked(vectors, predictions).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_it_learns_in_which_direction_the_additive_model_errs(axis: int) -> None:
    """The loss falls along one axis, which the prediction does not see."""
    rng = np.random.default_rng(axis)
    surrogate = ResidualSurrogate(0)
    for vector in rng.integers(-3, 4, (30, 3)).tolist():
        surrogate.tell(vector, 1.0, math.exp(-0.3 * vector[axis]))
    vectors = np.zeros((3, 3), np.int64)
    vectors[:, axis] = [-2, 0, 4]
    assert surrogate.ranked(vectors, np.ones(3)).tolist() == [2, 1, 0]


def test_lies_keep_the_next_candidate_away_and_a_copy_keeps_them_to_itself() -> None:
    """The additive model promises most near the origin, where the lies say that nothing comes of it."""
    rng = np.random.default_rng(0)
    surrogate = ResidualSurrogate(0)
    for vector in rng.integers(-9, 10, (12, 2)).tolist():
        surrogate.tell(vector, 1.0, 1.0)
    vectors, predictions = np.array([[0, 0], [0, 1], [9, 9]]), np.array([0.5, 0.5, 0.6])
    lying = surrogate.copy()
    for vector in ([0, 0], [1, 0], [0, -1]):
        lying.tell_lie(vector, 0.5)
    assert lying.ranked(vectors, predictions)[0] == 2
    assert surrogate.ranked(vectors, predictions)[2] == 2


def test_what_costs_too_much_teaches_the_factor_and_is_no_rival() -> None:
    """One candidate is certain to lose 0.9, one may lose anything about 1.3; only the latter may beat 0.6."""
    rng = np.random.default_rng(0)
    vectors, predictions = np.array([[0, 0], [9, 9]]), np.array([0.9, 1.3])
    plain, wider = ResidualSurrogate(0), ResidualSurrogate(0)
    for surrogate, rival in ((plain, True), (wider, False)):
        for vector in rng.integers(-2, 3, (12, 2)).tolist():
            surrogate.tell(vector, 1.0, 1.0)
        for step, vector in enumerate(rng.integers(7, 12, (12, 2)).tolist()):
            surrogate.tell(vector, 1.0, 0.4 if step % 2 else 1.6, rival=rival)
    assert plain.ranked(vectors, predictions)[0] == 1
    assert wider.ranked(vectors, predictions)[0] == 0
