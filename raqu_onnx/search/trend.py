"""Whether a candidate keeps within a drop, or only had luck with the samples that it was judged on.

Of hundreds of candidates judged on a few thousand samples, the one with the best accuracy was mostly lucky: on other
samples it is no better than its neighbours. The KL divergence from the float model hardly depends on luck. What
candidates lose on average at one divergence is therefore asked for as well: the isotonic regression of their drops on
their divergences, which makes no assumption but that more divergence does not help (Barlow, Bartholomew, Bremner,
Brunk, "Statistical Inference under Order Restrictions", 1972).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.search.result import goal_is_met, points_below

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raqu_onnx.evaluation import Score
    from raqu_onnx.search.result import Evaluation, Goal

__all__ = ["keeps_goal", "usual_points"]


def usual_points(judged: Sequence[Evaluation], reference: Score, score: Score) -> float:
    """Points that candidates as far from the float model as one of them lie below it on average.

    Args:
        judged: All candidates judged so far; the float model itself counts as one more.
        reference: Score of the float model on the same data.
        score: The one asked for.
    """
    from scipy.optimize import isotonic_regression

    known = [(item.score.fidelity, points_below(reference, item.score)) for item in judged]
    divergence, points = np.array([(0.0, 0.0), *(pair for pair in known if np.isfinite(pair).all())]).T
    places, which, counts = np.unique(divergence, return_inverse=True, return_counts=True)
    means = np.bincount(which, weights=points) / counts
    trend = isotonic_regression(means, weights=counts.astype(np.float64)).x
    return float(np.interp(score.fidelity, places, trend))


def keeps_goal(goal: Goal, reference: Score, judged: Sequence[Evaluation], found: Evaluation) -> bool:
    """Whether a candidate meets a goal, and would be expected to by its divergence from the float model.

    Args:
        goal: The goal.
        reference: Score of the float model.
        judged: All candidates judged so far.
        found: The candidate, one of them.
    """
    if not goal_is_met(goal, reference, found):
        return False
    most = goal.max_accuracy_drop
    return most is None or usual_points(judged, reference, found.score) <= most + 1e-9
