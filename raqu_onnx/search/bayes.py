"""Bayesian search in a trust region around the best candidate known.

The surrogate is scikit-optimize's extra-trees regressor, asked and told one candidate at a time. Its space is the
incumbent's vector plus and minus a radius that grows after successes and shrinks after failures (TuRBO, Eriksson et
al., NeurIPS 2019, section 2). What a vector means is up to a `Space`: widths of nodes, or what the kernels of nodes are
worth. Candidates are brought into the budget before they are judged, never penalised.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from raqu_onnx.search.problem import Problem
    from raqu_onnx.search.result import Bits, Evaluation

__all__ = ["Space", "TrustRegion"]

_FAILURES_TO_SHRINK = 4
_LARGEST_RADIUS = 3
_TRIES = 8


class Space(Protocol):
    """Vectors of integers that stand for candidates within one budget."""

    @property
    def limits(self) -> list[tuple[int, int]]:
        """Smallest and largest value of every dimension."""

    def vector(self, bits: Bits) -> list[int] | None:
        """The vector of a candidate, None where it has none in this space."""

    def candidate(self, vector: list[int]) -> Bits | None:
        """The candidate of a vector, brought into the budget; None where that cannot be done."""


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
    _optimizer: Any = None
    _bounds: list[tuple[int, int]] = field(default_factory=list)
    _asked: set[Bits] = field(default_factory=set)
    _restarts: int = 0

    def step(self, most: int = 1) -> int:
        """Judge a batch of new candidates.

        Args:
            most: Candidates that may still be judged; a batch has no more.

        Returns:
            How many were judged, 0 when no new one can be found near the incumbent.
        """
        if self.space.vector(self.incumbent.bits) is None:
            return 0
        if self._optimizer is None:
            self._rebuild()
        candidates = self._ask(min(most, self.problem.settings.batch))
        if not candidates:
            return 0
        found = self.problem.evaluate_many(candidates, "bayesian search")
        best = min(found, key=lambda e: e.score.loss)
        if best.score.loss < self.incumbent.score.loss:
            self.incumbent = best
            self._failures = 0
            self._radius = min(self._radius + 1, _LARGEST_RADIUS)
            self._rebuild()
            return len(found)
        # In the order in which they were asked for, whoever was judged first.
        for evaluation in found:
            self._tell(evaluation)
        self._failures += len(found)
        if self._failures >= _FAILURES_TO_SHRINK:
            self._failures = 0
            self._radius = max(1, self._radius - 1)
            self._rebuild()
        return len(found)

    def _rebuild(self) -> None:
        """A fresh surrogate around the incumbent, told everything that was judged inside its space."""
        from skopt import Optimizer
        from skopt.learning import ExtraTreesRegressor

        centre = self._centre()
        self._bounds = [
            (max(low, value - self._radius), min(high, value + self._radius))
            for value, (low, high) in zip(centre, self.space.limits, strict=True)
        ]
        seed = (self.problem.settings.seed + 7919 * self._restarts) % 2**31
        self._restarts += 1
        with warnings.catch_warnings():
            # Dimensions in which a width is already at both of its limits have one value only; skopt warns of it.
            warnings.simplefilter("ignore")
            self._optimizer = Optimizer(
                # A width that cannot move still needs two values for skopt; the repair puts it back.
                [(low, high if high > low else low + 1) for low, high in self._bounds],
                base_estimator=ExtraTreesRegressor(n_estimators=60, min_samples_leaf=2, random_state=seed, n_jobs=1),
                acq_func="EI",
                acq_optimizer="sampling",
                acq_optimizer_kwargs={"n_points": 500, "n_jobs": 1},
                n_initial_points=1,
                random_state=seed,
            )
        for evaluation in self.problem.evaluations:
            self._tell(evaluation, fit=False)
        self._tell(self.incumbent)

    def _centre(self) -> list[int]:
        centre = self.space.vector(self.incumbent.bits)
        if centre is None:
            raise ValueError("the incumbent has no vector in the space that is searched")
        return centre

    def _tell(self, evaluation: Evaluation, *, fit: bool = True) -> None:
        vector, loss = self.space.vector(evaluation.bits), evaluation.score.loss
        # A candidate that yields infinities or NaN is bad beyond what the surrogate can take.
        if vector is None or not math.isfinite(loss):
            return
        if any(not low <= v <= high for v, (low, high) in zip(vector, self._bounds, strict=True)):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._optimizer.tell(vector, loss, fit=fit)

    def _ask(self, count: int) -> list[Bits]:
        """Candidates inside the budget that have not been judged, as many as can be found up to a number."""
        generator = np.random.default_rng([self.problem.settings.seed, len(self.problem.evaluations), self._restarts])
        found = (self._new_candidate(vector, generator) for vector in self._asked_vectors(count))
        return [bits for bits in found if bits is not None]

    def _asked_vectors(self, count: int) -> list[list[int]]:
        """Vectors that the surrogate proposes.

        Of several, each is proposed as if those before it had turned out as well as the best known: the constant liar
        (Ginsbourger, Le Riche, Carraro, "Kriging is well-suited to parallelize optimization", 2010, section 4.2) keeps
        them apart.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if count == 1:
                return [self._optimizer.ask()]
            return list(self._optimizer.ask(n_points=count, strategy="cl_min"))

    def _new_candidate(self, vector: list[int], generator: np.random.Generator) -> Bits | None:
        """The candidate of a vector; where it is known, another one near the incumbent, None where none is found."""
        for attempt in range(_TRIES):
            moved = self._mutate(generator) if attempt else vector
            bits = self.space.candidate(
                [int(np.clip(int(v), *bounds)) for v, bounds in zip(moved, self._bounds, strict=True)]
            )
            if bits is not None and bits not in self._asked and not self._is_known(bits):
                self._asked.add(bits)
                return bits
        return None

    def _mutate(self, generator: np.random.Generator) -> list[int]:
        """The incumbent with a few values moved: what remains when the surrogate repeats itself."""
        vector = np.array(self._centre())
        moved = generator.choice(len(vector), size=min(len(vector), int(generator.integers(2, 5))), replace=False)
        vector[moved] += generator.choice([-1, 1], size=len(moved))
        return [int(v) for v in vector]

    def _is_known(self, bits: Bits) -> bool:
        return any(bits == evaluation.bits for evaluation in self.problem.evaluations)
