"""Which candidate is the best so far, for those who watch a search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raqu_onnx.progress import BEST
from raqu_onnx.search.result import points_below
from raqu_onnx.search.trend import Trend

if TYPE_CHECKING:
    from raqu_onnx.evaluation import Score
    from raqu_onnx.search.problem import ProgressCallback
    from raqu_onnx.search.result import Evaluation, Goal

__all__ = ["BestSoFar"]


class BestSoFar:
    """Tells which candidate serves the goal best whenever it is another one than before.

    Args:
        reference: Score of the float model.
        goal: What is sought.
        progress: Is told, with a text that begins with `BEST`.
    """

    def __init__(self, reference: Score, goal: Goal, progress: ProgressCallback) -> None:
        self._reference, self._goal, self._progress = reference, goal, progress
        self._best: Evaluation | None = None
        self._seen: list[Evaluation] = []

    def see(self, evaluation: Evaluation) -> None:
        """Compare one more candidate; what it tells of the others may make one of these the best."""
        self._seen.append(evaluation)
        meeting = Trend(self._reference, self._seen).meeting(self._goal, self._seen) if self._goal else self._seen
        best = min(meeting or self._seen, key=lambda item: self._rank(item, met=bool(meeting)))
        if best is self._best:
            return
        self._best = best
        below = points_below(self._reference, best.score)
        crossbars = "1 crossbar" if best.crossbars == 1 else f"{best.crossbars} crossbars"
        side = "below" if below >= 0 else "above"
        missed = "" if meeting else "; the goal is not met yet"
        self._progress(f"{BEST}{crossbars}, {abs(below):.2f} points {side} float{missed}", 0, 1)

    def _rank(self, evaluation: Evaluation, *, met: bool) -> tuple[float, float]:
        """Smaller is better: what is minimized where the goal is met, then loss."""
        minimized = self._goal.minimized if met else None
        return 0.0 if minimized is None else evaluation.value(minimized), evaluation.score.loss
