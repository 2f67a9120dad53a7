"""What is luck and what is not: drops of candidates against what others as far from the float model lose."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.evaluation import Score
from raqu_onnx.search import Bits, Goal
from raqu_onnx.search.result import Evaluation
from raqu_onnx.search.trend import Trend

FLOAT = Score(samples=2000, top1=0.95, agreement=1.0, kl=0.0, sqnr_db=None)


def judged(kl: float, points: float, crossbars: int = 10) -> Evaluation:
    score = Score(samples=2000, top1=0.95 - points / 100, agreement=0.98, kl=kl, sqnr_db=None)
    return Evaluation(Bits.uniform(1, 4, 8), crossbars, score, "test")


def keeps_goal(goal: Goal, candidates: list[Evaluation], found: Evaluation) -> bool:
    return Trend(FLOAT, candidates).keeps(goal, found)


def test_a_lucky_candidate_among_worse_ones_does_not_keep_the_goal() -> None:
    candidates = [judged(0.001, 0.1), judged(0.01, 0.7), judged(0.0101, 0.0), judged(0.0102, 0.8), judged(0.011, 0.6)]
    lucky = candidates[2]
    goal = Goal(max_accuracy_drop=0.25)
    # By itself, or beside better ones, nothing speaks against it.
    assert keeps_goal(goal, [lucky], lucky)
    assert keeps_goal(goal, [candidates[0], lucky], lucky)
    assert not keeps_goal(goal, candidates, lucky)
    assert Trend(FLOAT, candidates).points(lucky.score) == pytest.approx((0.7 + 0.0) / 2)
    assert keeps_goal(goal, candidates, candidates[0])
    assert keeps_goal(Goal(max_crossbars=10), candidates, lucky)


def test_an_unlucky_candidate_does_not_keep_the_goal_either() -> None:
    candidates = [judged(0.001, 0.4), judged(0.0011, 0.0), judged(0.0012, 0.0), judged(0.0013, 0.0)]
    assert not keeps_goal(Goal(max_accuracy_drop=0.25), candidates, candidates[0])
    assert keeps_goal(Goal(max_accuracy_drop=0.25), candidates, candidates[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.001, 0.002, 0.005, 0.1]), st.floats(-1, 5)), min_size=1, max_size=20))
def test_the_trend_rises_and_keeps_the_sum(pairs: list[tuple[float, float]]) -> None:
    candidates = [judged(*pair) for pair in pairs]
    usual = [Trend(FLOAT, candidates).points(item.score) for item in candidates]
    by_divergence = [points for _, points in sorted(zip((item.score.kl for item in candidates), usual, strict=True))]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(by_divergence))
    # Isotonic regression keeps the sum of what it is fitted to; the float model is one of them.
    at_float = Trend(FLOAT, candidates).points(FLOAT)
    assert sum(usual) + at_float == pytest.approx(sum(points for _, points in pairs), abs=1e-6)


def test_candidates_that_yield_nothing_finite_do_not_count() -> None:
    broken = judged(math.inf, 90.0)
    fine = judged(0.001, 0.1)
    assert Trend(FLOAT, [broken, fine]).points(fine.score) == pytest.approx(0.1)
    assert not keeps_goal(Goal(max_accuracy_drop=0.25), [broken, fine], broken)


def test_where_no_candidate_is_expected_to_meet_the_goal_their_own_figures_count() -> None:
    goal = Goal(max_accuracy_drop=0.5)
    worse, better = judged(0.010, 0.7, 20), judged(0.011, 0.4, 15)
    trend = Trend(FLOAT, [worse, better])
    assert not any(trend.keeps(goal, item) for item in (worse, better))
    assert trend.meeting(goal, [worse, better]) == [better]
    assert Trend(FLOAT, [worse]).meeting(goal, [worse]) == []
