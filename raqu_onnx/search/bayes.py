"""Bayesian search in a trust region around the best candidate known.

Its space is the incumbent's vector plus and minus a radius that grows after successes and shrinks after failures
(TuRBO, Eriksson et al., NeurIPS 2019, section 2). What a vector means is up to a `Space`: widths of nodes, or what the
kernels of nodes are worth. Candidates are brought into the budget before they are judged, never penalised.

They go through ever dearer judgements. Hundreds of vectors are screened by what was judged around them, which takes
milliseconds; a few are brought into the budget and compared by what the additive model, which comes from a few images,
predicts for them and by what it was seen to miss (`raqu_onnx.search.surrogate`); the most promising ones are quantized
and run on a quarter of the selection set, and on all of it if they are not plainly worse there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from raqu_onnx.search.budget import OBJECTIVES, Cost
from raqu_onnx.search.surrogate import ResidualSurrogate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.search.budget import Budget
    from raqu_onnx.search.problem import Problem
    from raqu_onnx.search.result import Bits, Evaluation

__all__ = ["Space", "TrustRegion"]

# How far above the incumbent's loss at a glance another one may lie to be looked at further, as a share of the
# incumbent's KL divergence. Of 50 candidates near the best starts of the bundled models (ResNet-20 at 11 crossbars,
# MobileNetV2 at 4; one calibration set) 11 lie beyond, and their losses are 1.20 to 2.02 times the incumbent's.
_MARGIN = 0.25
_FAILURES_TO_SHRINK = 4
_LARGEST_RADIUS = 3
# Vectors that are screened for each batch, and values that are moved in half of them, on average.
_SCREENED = 512
_MOVED = 4
# Candidates that are brought into the budget for each one that is judged, and vectors that are tried for each of them.
_POOL = 2
_TRIES = 8


class Space(Protocol):
    """Vectors of integers that stand for candidates within one budget."""

    @property
    def budget(self) -> Budget:
        """What candidates may cost."""

    @property
    def limits(self) -> list[tuple[int, int]]:
        """Smallest and largest value of every dimension."""

    def vector(self, bits: Bits) -> list[int] | None:
        """The vector of a candidate, None where it has none in this space."""

    def candidate(self, vector: list[int]) -> Bits | None:
        """The candidate of a vector, brought into the budget; None where that cannot be done."""

    def prediction(self, bits: Bits) -> float:
        """The loss that the additive model predicts for a candidate of this space."""


@dataclass
class TrustRegion:
    """Proposes candidates around the best one known.

    Attributes:
        problem: Costs and scores.
        space: What is searched.
        incumbent: Best candidate so far.
    """

    problem: Problem
    space: Space
    incumbent: Evaluation
    _radius: int = 1
    _failures: int = 0
    _bounds: list[tuple[int, int]] = field(default_factory=list)
    _asked: set[Bits] = field(default_factory=set)
    _left: list[Bits] = field(default_factory=list)
    _dismissed: dict[Bits, float] = field(default_factory=dict)
    _restarts: int = 0
    _surrogate: ResidualSurrogate = field(init=False)
    _screen: ResidualSurrogate = field(init=False)

    def __post_init__(self) -> None:
        if self.space.vector(self.incumbent.bits) is not None:
            self._rebuild()

    def step(self, most: int = 1) -> int:
        """Judge a batch of new candidates.

        Args:
            most: Candidates that may still be judged; a batch has no more.

        Returns:
            How many were judged, 0 when no new one can be found near the incumbent.
        """
        if self.space.vector(self.incumbent.bits) is None:
            return 0
        candidates = self._ask(min(most, self.problem.settings.batch))
        while not candidates and self._radius < _LARGEST_RADIUS:
            # The repair gave one of those that are known for all that is near.
            self._radius += 1
            self._rebuild()
            candidates = self._ask(min(most, self.problem.settings.batch))
        if not candidates:
            return 0
        found = self.problem.evaluate_many(self._promising(candidates), "bayesian search")
        best = min([self.incumbent, *found], key=lambda e: e.score.loss)
        if best is not self.incumbent:
            self.incumbent = best
            self._failures = 0
            self._radius = min(self._radius + 1, _LARGEST_RADIUS)
            self._rebuild()
            return len(candidates)
        # In the order in which they were asked for, whoever was judged first; after those that were dismissed.
        for evaluation in found:
            self._tell_of(evaluation)
        self._failures += len(candidates)
        if self._failures >= _FAILURES_TO_SHRINK:
            self._failures = 0
            self._radius = max(1, self._radius - 1)
            self._rebuild()
        return len(candidates)

    def _promising(self, candidates: list[Bits]) -> list[Bits]:
        """Those that a glance at some of the data does not show to be worse than the incumbent.

        The losses of the others are taken to be as much above the incumbent's as those at a glance are.
        """
        if not self.problem.glances_first:
            return candidates
        (own,) = self.problem.glances([self.incumbent.bits])
        margin = _MARGIN * self.incumbent.score.fidelity
        most = own + margin if margin > 0 and math.isfinite(own + margin) else math.inf
        doubtful = [bits for bits in candidates if not self._is_cheaper(bits)]
        for bits, glance in zip(doubtful, self.problem.glances(doubtful, most), strict=True):
            if glance > most:
                self._dismissed[bits] = self.incumbent.score.loss + glance - own
                self._tell(bits, self._dismissed[bits], rival=True)
        return [bits for bits in candidates if bits not in self._dismissed]

    def _is_cheaper(self, bits: Bits) -> bool:
        """Whether a candidate costs less than the incumbent in what counts: it may be on the Pareto front."""
        cost, own = self.problem.measure(bits), self.incumbent.cost or Cost(self.incumbent.crossbars)
        limited = [kind for kind in OBJECTIVES if kind == "crossbars" or getattr(self.space.budget, kind) < math.inf]
        return cost is not None and any(cost.of(kind) < own.of(kind) for kind in limited)

    def _rebuild(self) -> None:
        """A fresh surrogate around the incumbent, told everything that was judged inside its space."""
        centre = self._centre()
        self._bounds = [
            (max(low, value - self._radius), min(high, value + self._radius))
            for value, (low, high) in zip(centre, self.space.limits, strict=True)
        ]
        self._restarts += 1
        seed = (self.problem.settings.seed + 7919 * self._restarts) % 2**31
        self._left = []
        self._surrogate, self._screen = ResidualSurrogate(seed), ResidualSurrogate(seed)
        for evaluation in self.problem.evaluations:
            self._tell_of(evaluation)
        for bits, loss in self._dismissed.items():
            self._tell(bits, loss, rival=True)

    def _centre(self) -> list[int]:
        centre = self.space.vector(self.incumbent.bits)
        if centre is None:
            raise ValueError("the incumbent has no vector in the space that is searched")
        return centre

    def _tell_of(self, evaluation: Evaluation) -> None:
        # Wider budgets teach how losses differ from their predictions, but their losses cannot be had in this one.
        rival = self.space.budget.allows(evaluation.cost or Cost(evaluation.crossbars))
        self._tell(evaluation.bits, evaluation.score.loss, rival=rival)

    def _tell(self, bits: Bits, loss: float, *, rival: bool) -> None:
        vector = self.space.vector(bits)
        # A candidate that yields infinities or NaN is bad beyond what the surrogate can take.
        if vector is None or not math.isfinite(loss):
            return
        if any(not low <= v <= high for v, (low, high) in zip(vector, self._bounds, strict=True)):
            return
        # Above the float model's, which is what predictions are of; a user's metric may make losses of any size.
        above = loss - self.problem.reference.loss
        self._surrogate.tell(vector, self.space.prediction(bits), above, rival=rival)
        if rival:
            self._screen.tell(vector, 1.0, above)

    def _ask(self, count: int) -> list[Bits]:
        """Candidates inside the budget that have not been judged, as many as can be found up to a number."""
        judged = len(self.problem.evaluations) + len(self._dismissed)
        generator = np.random.default_rng([self.problem.settings.seed, judged, self._restarts])
        pool = self._pool(count, generator)
        vectors = np.array([self.space.vector(bits) for bits in pool])
        predictions = np.array([self.space.prediction(bits) for bits in pool])
        surrogate = self._surrogate.copy()
        found: list[int] = []
        while len(found) < min(count, len(pool)):
            best = next(int(at) for at in surrogate.ranked(vectors, predictions) if at not in found)
            found.append(best)
            surrogate.tell_lie(vectors[best].tolist(), float(predictions[best]))
        chosen = [pool[at] for at in found]
        self._asked.update(chosen)
        return chosen

    def _pool(self, count: int, generator: np.random.Generator) -> list[Bits]:
        """New candidates to choose so many from; fewer where the repair gives the same ones again and again.

        Bringing one into the budget takes much longer than to screen its vector: half of those that are brought there
        promise most by their vectors alone, half are any.
        """
        vectors = self._vectors(generator)
        ranked = self._screen.ranked(vectors, np.ones(len(vectors)))
        order = np.stack([ranked, np.arange(len(vectors))], axis=1).reshape(-1)
        # What was not chosen around the same incumbent may be next time.
        found = {bits: None for bits in self._left if bits not in self._asked}
        enough = len(found) + _POOL * count
        for place in order[: _TRIES * _POOL * count].tolist():
            bits = self.space.candidate(vectors[place].tolist())
            if bits is not None and bits not in self._asked and not self._is_known(bits):
                found[bits] = None
            if len(found) == enough:
                break
        self._left = list(found)
        return self._left

    def _vectors(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """Half of them anywhere in the trust region, half the incumbent's with a few values moved.

        Good moves of many dimensions are rare in a sample of all (Regis, Shoemaker, "Combining radial basis function
        surrogates and dynamic coordinate search", Engineering Optimization 45(5), 2013).
        """
        low, high = np.array(self._bounds).T
        vectors = generator.integers(low, high + 1, (_SCREENED, len(low)))
        kept = generator.random(vectors.shape) >= min(1.0, _MOVED / len(low))
        kept[: _SCREENED // 2] = False
        return generator.permutation(np.where(kept, self._centre(), vectors))

    def _is_known(self, bits: Bits) -> bool:
        return any(bits == evaluation.bits for evaluation in self.problem.evaluations)
