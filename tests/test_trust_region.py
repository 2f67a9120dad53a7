"""The Bayesian stage over made-up candidates: two widths that stand for themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from raqu_onnx.evaluation import Score
from raqu_onnx.search import Bits, SearchSettings, bayes
from raqu_onnx.search.bayes import TrustRegion
from raqu_onnx.search.budget import Budget, Cost
from raqu_onnx.search.result import Evaluation
from raqu_onnx.search.surrogate import ResidualSurrogate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Space:
    """Vectors of widths; the additive model expects nothing of any."""

    budget = Budget()
    limits = ((2, 8),) * 4

    def vector(self, bits: Bits) -> list[int]:
        return [width for width in bits.weights if isinstance(width, int)]

    def candidate(self, vector: list[int]) -> Bits:
        return Bits(tuple(vector), None)

    def prediction(self, bits: Bits) -> float:  # noqa: ARG002
        return 1.0


class Problem:
    """Scores and glances by formula."""

    def __init__(self, loss: Callable[[Bits], float], glance: Callable[[Bits], float], **settings: Any) -> None:
        self.settings = SearchSettings(**settings)
        self.loss, self.glance = loss, glance
        self.evaluations: list[Evaluation] = []
        self.reference = Score(4, kl=0.0)
        self.looked: list[Bits] = []
        self.glances_first = True
        self.crossbars: Callable[[Bits], int] = lambda _: 1
        self.score: Callable[[Bits], Score] = lambda bits: Score(4, kl=self.loss(bits))

    def glances(self, candidates: Sequence[Bits], most: float = np.inf) -> list[float]:  # noqa: ARG002
        self.looked += [bits for bits in candidates if bits not in self.looked]
        return [self.glance(bits) for bits in candidates]

    def measure(self, bits: Bits) -> Cost:
        return Cost(self.crossbars(bits))

    def evaluate_many(self, candidates: Sequence[Bits], origin: str) -> list[Evaluation]:
        found = [Evaluation(bits, self.crossbars(bits), self.score(bits), origin) for bits in candidates]
        self.evaluations += found
        return found


def loss(bits: Bits) -> float:
    """Least at 5, 5, 5, 5."""
    return 0.1 + sum((width - 5) ** 2 for width in bits.weights if isinstance(width, int))


def region(problem: Problem) -> TrustRegion:
    (start,) = problem.evaluate_many([Bits((2, 8, 2, 8), None)], "start")
    return TrustRegion(problem, Space(), start)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 3])
def test_it_finds_what_is_best_nearby(batch: int) -> None:
    problem = Problem(loss, loss, batch=batch)
    found = region(problem)
    judged = 0
    while judged < 90:
        judged += found.step(90 - judged)
    assert judged == 90
    assert len(problem.looked) == 91
    assert found.incumbent.score.loss == min(item.score.loss for item in problem.evaluations)
    assert found.incumbent.score.loss < 3


def test_what_a_glance_shows_to_be_worse_is_not_looked_at_further() -> None:
    problem = Problem(loss, loss, batch=2)
    found = region(problem)
    judged = sum(found.step() for _ in range(20))
    known = {item.bits for item in problem.evaluations}
    dismissed = [bits for bits in problem.looked if bits not in known]
    assert judged == 20
    assert len(known) + len(dismissed) == 21
    assert dismissed
    best: float = np.inf
    for bits in problem.looked:
        # Nothing near the best so far was dismissed, nothing far above it was looked at.
        assert (bits in dismissed) == (loss(bits) > 1.25 * best), bits
        best = min(best, loss(bits))


def test_where_a_glance_saves_nothing_everything_is_evaluated() -> None:
    problem = Problem(loss, loss)
    problem.glances_first = False
    found = region(problem)
    assert sum(found.step() for _ in range(20)) == 20
    assert len(problem.evaluations) == 21
    assert problem.looked == []


def test_a_glance_alone_makes_no_incumbent() -> None:
    """Glances promise everything, and nothing is better than the start."""
    problem = Problem(lambda bits: 1.0 if bits.weights == (2, 8, 2, 8) else 2.0, lambda _: 0.5)
    found = region(problem)
    assert sum(found.step() for _ in range(6)) == 6
    assert len(problem.evaluations) == 7
    assert found.incumbent.bits.weights == (2, 8, 2, 8)


def test_what_is_cheaper_is_looked_at_whatever_a_glance_says() -> None:
    """It may be on the Pareto front."""
    start = (2, 8, 2, 8)
    problem = Problem(*[lambda bits: 1.0 if bits.weights == start else 9.0] * 2)
    problem.crossbars = lambda bits: 8 if bits.weights == start else 7
    found = region(problem)
    assert sum(found.step() for _ in range(6)) == 6
    assert len(problem.evaluations) == 7
    assert found.incumbent.bits.weights == start


class Listening(ResidualSurrogate):
    """Notes what every surrogate is told."""

    told: ClassVar[list[tuple[list[int], float, bool]]] = []

    def tell(self, vector: list[int], prediction: float, loss: float, *, rival: bool = True) -> None:
        self.told.append((vector, loss, rival))
        super().tell(vector, prediction, loss, rival=rival)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], float, bool]]:
    monkeypatch.setattr(Listening, "told", [])
    monkeypatch.setattr(bayes, "ResidualSurrogate", Listening)
    return Listening.told


def test_the_surrogate_hears_of_those_that_are_dismissed(told: list[tuple[list[int], float, bool]]) -> None:
    """With a metric in percent, losses are below 0."""

    def score(bits: Bits) -> Score:
        return Score(4, kl=loss(bits), measured="percent", value=9000.0)

    problem = Problem(loss, lambda bits: score(bits).loss)
    problem.score = score
    problem.reference = Score(4, kl=0.0, measured="percent", value=9005.0)
    found = region(problem)
    for _ in range(8):
        found.step()
    assert found.incumbent.score.loss < 0
    known = {item.bits for item in problem.evaluations}
    dismissed = [bits for bits in problem.looked if bits not in known]
    assert dismissed
    # How far it is above the float model; whatever comes after a rebuild hears of it again.
    for bits in dismissed:
        heard = [value for vector, value, rival in told if tuple(vector) == bits.weights and rival]
        assert any(value == pytest.approx(loss(bits) + 0.5) for value in heard)
    before = len(told)
    found._radius = 8
    found._rebuild()
    assert {tuple(vector) for vector, *_ in told[before:]} == {bits.weights for bits in (*known, *dismissed)}


def test_losses_of_wider_budgets_are_no_rivals(told: list[tuple[list[int], float, bool]]) -> None:
    problem = Problem(loss, loss)
    problem.crossbars = lambda bits: sum(width for width in bits.weights if isinstance(width, int))
    problem.evaluate_many([Bits((3, 8, 2, 8), None)], "a wider budget")
    (start,) = problem.evaluate_many([Bits((2, 8, 2, 8), None)], "start")
    space = Space()
    space.budget = Budget(crossbars=20)
    TrustRegion(problem, space, start)  # type: ignore[arg-type]
    # What the others are screened by hears nothing of it.
    assert [(vector, rival) for vector, _, rival in told] == [
        ([3, 8, 2, 8], False), ([2, 8, 2, 8], True), ([2, 8, 2, 8], True),
    ]  # fmt: skip
