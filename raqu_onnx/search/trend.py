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

__all__ = ["Trend"]


class Trend:
    """What candidates lose on average, by how far they are from the float model.

    Args:
        reference: Score of the float model, which counts as one more candidate.
        judged: Candidates judged on the same data so far.
    """

    def __init__(self, reference: Score, judged: Sequence[Evaluation]) -> None:
        from scipy.optimize import isotonic_regression

        self._reference = reference
        known = [(item.score.fidelity, points_below(reference, item.score)) for item in judged]
        divergence, points = np.array([(0.0, 0.0), *(pair for pair in known if np.isfinite(pair).all())]).T
        self._places, which, counts = np.unique(divergence, return_inverse=True, return_counts=True)
        means = np.bincount(which, weights=points) / counts
        self._points = isotonic_regression(means, weights=counts.astype(np.float64)).x

    def points(self, score: Score) -> float:
        """Points below float of candidates as far from it as one with this score."""
        return float(np.interp(score.fidelity, self._places, self._points))

    def keeps(self, goal: Goal, found: Evaluation) -> bool:
        """Whether a candidate meets a goal, and would be expected to by its divergence from the float model."""
        if not goal_is_met(goal, self._reference, found):
            return False
        return goal.max_accuracy_drop is None or self.points(found.score) <= goal.max_accuracy_drop + 1e-9

    def meeting(self, goal: Goal, candidates: Sequence[Evaluation]) -> list[Evaluation]:
        """Those candidates that keep a goal; where none does, those whose own figures meet it."""
        kept = [item for item in candidates if self.keeps(goal, item)]
        return kept or [item for item in candidates if goal_is_met(goal, self._reference, item)]
