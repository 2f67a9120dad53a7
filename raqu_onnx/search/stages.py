"""What is searched within a budget: one width for each node, or bits for each kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from raqu_onnx.search.allocation import fit_to_budget, solve_integer_program
from raqu_onnx.search.bayes import TrustRegion
from raqu_onnx.search.fitting import repaired
from raqu_onnx.search.result import Bits

if TYPE_CHECKING:
    from raqu_onnx.search.budget import Budget
    from raqu_onnx.search.problem import Problem
    from raqu_onnx.search.result import Evaluation, NodeWidth
    from raqu_onnx.search.sensitivity import Sensitivity

__all__ = ["LayerStage", "Stage", "activation_loss", "searched_activations", "widest_activations"]


class Stage(Protocol):
    """Candidates within budgets."""

    @property
    def fewest_crossbars(self) -> int:
        """No candidate takes fewer."""

    def extremes(self, budget: Budget) -> list[tuple[NodeWidth, ...]]:
        """Weights between which costs lie: the cheapest, and others that may do better in latency."""

    def start(self, budget: Budget) -> Evaluation | None:
        """The best candidate that can be computed for a budget, judged; None where nothing fits."""

    def region(self, budget: Budget, incumbent: Evaluation) -> TrustRegion:
        """A Bayesian search within a budget from a candidate on."""


def widest_activations(problem: Problem) -> tuple[int, ...] | None:
    """The activation widths that a search starts from."""
    activation = problem.settings.widest[1]
    return None if activation is None else problem.settings.activations(len(problem.nodes), activation)


def searched_activations(problem: Problem) -> list[tuple[int, int]]:
    """Limits of the activation widths that are searched, one for each node; none where widths are fixed or float."""
    limits = [problem.settings.activation_limits(node) for node in range(len(problem.nodes))]
    found = [bits for bits in limits if bits is not None]
    return found if any(low < high for low, high in found) else []


def activation_loss(sensitivity: Sensitivity, bits: Bits) -> float:
    """Sum of the losses that inputs of nodes have alone at their widths; 0 where they stay float."""
    if sensitivity.activations is None or bits.activations is None:
        return 0.0
    return float(sum(row[width] for row, width in zip(sensitivity.activations, bits.activations, strict=True)))


class LayerStage:
    """One width for each node.

    Args:
        problem: Costs and scores.
        sensitivity: Additive losses of nodes.
    """

    def __init__(self, problem: Problem, sensitivity: Sensitivity) -> None:
        self._problem = problem
        self._sensitivity = sensitivity

    @property
    def lowest(self) -> tuple[int, ...]:
        """The smallest weight width of every node."""
        limits = (self._problem.settings.weight_limits(node) for node in range(len(self._problem.nodes)))
        return tuple(low for low, _ in limits)

    @property
    def fewest_crossbars(self) -> int:
        """Crossbars of the smallest widths."""
        return self._problem.crossbars(self.lowest) or 1

    def extremes(self, budget: Budget) -> list[tuple[NodeWidth, ...]]:
        """The smallest widths, and the widest within the budget's crossbars, which take fewer turns."""
        settings = self._problem.settings
        widest = tuple(settings.weight_limits(node)[1] for node in range(len(self._problem.nodes)))
        fitted = fit_to_budget(self._problem, widest, self._sensitivity.weights, budget.static)
        return [self.lowest, *([] if fitted is None else [fitted])]

    def start(self, budget: Budget) -> Evaluation | None:
        """The integer program's answer for a budget, filled up, judged."""
        bits = self.widths_within(budget)
        return None if bits is None else self._problem.evaluate(bits, "integer program")

    def widths_within(self, budget: Budget) -> Bits | None:
        """The integer program's answer for a budget, filled up; None where nothing fits."""
        weights = solve_integer_program(self._problem, self._sensitivity.weights, budget) or self.lowest
        return self.fitted(weights, widest_activations(self._problem), budget)

    def fitted(self, weights: tuple[int, ...], activations: tuple[int, ...] | None, budget: Budget) -> Bits | None:
        """Widths brought into a budget, None where that cannot be done."""

        def allocate(part: Budget, bits: tuple[int, ...] | None) -> tuple[int, ...] | None:
            return fit_to_budget(self._problem, weights, self._sensitivity.weights, part, bits)

        return repaired(self._problem, self._sensitivity, allocate, activations, budget)

    def prediction(self, bits: Bits) -> float:
        """What the widest widths lose, and what each node loses beyond that alone, in its weights and in its input."""
        weights = (self._sensitivity.weights[node, width] for node, width in bits.by_node.items())
        return sum(weights, start=self._sensitivity.base) + activation_loss(self._sensitivity, bits)

    def region(self, budget: Budget, incumbent: Evaluation) -> TrustRegion:
        """A search of widths around a candidate."""
        return TrustRegion(self._problem, _LayerSpace(self._problem, self, budget, incumbent), incumbent)


@dataclass
class _LayerSpace:
    """Widths of the nodes, and of their inputs where these are searched."""

    problem: Problem
    stage: LayerStage
    budget: Budget
    incumbent: Evaluation

    @property
    def limits(self) -> list[tuple[int, int]]:
        """Smallest and largest widths."""
        settings = self.problem.settings
        nodes = range(len(self.problem.nodes))
        return [settings.weight_limits(node) for node in nodes] + searched_activations(self.problem)

    def vector(self, bits: Bits) -> list[int] | None:
        """The widths, None where kernels of a node have different ones."""
        widths = bits.by_node
        if len(widths) < len(bits.weights):
            return None
        return [*widths.values(), *(bits.activations or () if searched_activations(self.problem) else ())]

    def candidate(self, vector: list[int]) -> Bits | None:
        """The widths, brought into the budget."""
        nodes = len(self.problem.nodes)
        activations = tuple(vector[nodes:]) or self.incumbent.bits.activations
        return self.stage.fitted(tuple(vector[:nodes]), activations, self.budget)

    def prediction(self, bits: Bits) -> float:
        """Sum of the losses of nodes alone."""
        return self.stage.prediction(bits)
