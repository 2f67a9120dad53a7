"""What a search is asked for and what it answers."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.search.budget import Budget, Cost, Objective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raqu_onnx.evaluation import Score, Task
    from raqu_onnx.search.sensitivity import Sensitivity

__all__ = [
    "Bits",
    "Evaluation",
    "Goal",
    "NodeWidth",
    "SearchResult",
    "SearchSettings",
    "UniformBaseline",
    "costs_and_loss",
    "goal_is_met",
    "pareto_front",
    "points_below",
]


NodeWidth = int | tuple[int, ...]
"""Weight bits of one node: of all its kernels, or per entry of its scale axis."""


@dataclass(frozen=True)
class Bits:
    """Widths of all mapped nodes, in graph order.

    Attributes:
        weights: Weight bits per node.
        activations: Bits of each node's input, None where inputs stay float.
    """

    weights: tuple[NodeWidth, ...]
    activations: tuple[int, ...] | None

    @property
    def by_node(self) -> dict[int, int]:
        """Widths of the nodes whose kernels all have the same one, by position."""
        return {node: width for node, width in enumerate(self.weights) if isinstance(width, int)}

    @classmethod
    def uniform(cls, nodes: int, weight: int, activation: int | None) -> Bits:
        """The same widths everywhere."""
        return cls((weight,) * nodes, None if activation is None else (activation,) * nodes)


@dataclass(frozen=True)
class Goal:
    """What the result must satisfy, and what is made small within that.

    With an objective it is minimized within all limits; without one the loss is, where anything but the accuracy is
    limited, else the crossbars. With nothing given there is no goal, and nothing to miss: widths are fixed and the
    result is what it is.

    Attributes:
        max_crossbars: Most crossbars that may be used.
        max_accuracy_drop: Most points (hundredths) of accuracy below float; of agreement with float without labels; of
            noise power over signal power where the model has no class scores.
        max_latency_ns: Most ns of one inference alone.
        max_latency_cycles: Most cycles of one inference alone.
        max_energy_pj: Most pJ of one inference.
        max_average_bits: Most bits per weight on average; weights that are not stored count with 0.
        objective: What is minimized within the limits.
        fit_chip: The loss is minimized on the whole chip.
    """

    max_crossbars: int | None = None
    max_accuracy_drop: float | None = 0.5
    max_latency_ns: float | None = None
    max_latency_cycles: int | None = None
    max_energy_pj: float | None = None
    max_average_bits: float | None = None
    objective: Objective | None = None
    fit_chip: bool = False

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self.has_limits or self.max_accuracy_drop is not None or self.objective is not None

    @property
    def has_limits(self) -> bool:
        """Whether anything but the accuracy is limited."""
        limits = (
            self.max_crossbars, self.max_latency_ns, self.max_latency_cycles, self.max_energy_pj, self.max_average_bits,
        )  # fmt: skip
        return self.fit_chip or any(limit is not None for limit in limits)

    @property
    def fills_chip(self) -> bool:
        """Whether the least loss on the whole chip is sought, and nothing else asked for."""
        return self == Goal(None, None, fit_chip=True)

    @property
    def minimized(self) -> Objective | None:
        """What is made small, None for the loss."""
        return self.objective or (None if self.has_limits else "crossbars")

    @property
    def speaks_of(self) -> set[Objective]:
        """Costs that are limited or minimized."""
        found: set[Objective] = {self.minimized or "crossbars"}
        if self.max_latency_ns is not None or self.max_latency_cycles is not None:
            found.add("latency")
        if self.max_energy_pj is not None:
            found.add("energy")
        return found

    def budget(self, cycle_ns: float | None) -> Budget:
        """The limits, in cycles where they are of time.

        Args:
            cycle_ns: The chip's cycle time, needed for a limit in ns.
        """
        cycles = math.inf if self.max_latency_cycles is None else float(self.max_latency_cycles)
        if self.max_latency_ns is not None and cycle_ns is not None:
            cycles = min(cycles, self.max_latency_ns / cycle_ns)
        return Budget(
            crossbars=_most(self.max_crossbars),
            average_bits=_most(self.max_average_bits),
            latency=cycles,
            energy=_most(self.max_energy_pj),
        )


def _most(limit: float | None) -> float:
    return math.inf if limit is None else float(limit)


@dataclass(frozen=True)
class SearchSettings:
    """How a search is run.

    Attributes:
        weight_bits: Smallest and largest weight width.
        activation_bits: Smallest and largest activation width, None to leave activations float.
        evaluations: Candidates that the Bayesian stage may judge; those dismissed after a quarter of the selection set
            count too.
        group: Kernels of a node that must have the same width; 1 for each its own, None for all.
        drop: Kernels may get 0 bits, where they need not all have the same width.
        sensitivity_samples: Samples on which the effect of each node alone is measured.
        batch_size: Samples per run.
        seed: Seed of everything random.
        batch: Candidates that the Bayesian stage asks for at once, whoever judges them.
        threads: Threads for onnxruntime, None for all.
        task: What the model's outputs are, which decides how candidates are judged.
        metric: What quality is, see `raqu_onnx.metrics.parse_metric`.
        kept: Positions of the nodes that keep the widest weights and 8-bit activations whatever the others get.
        kept_weight_bits: Width of their weights.
        inputs: Positions of the nodes that read the model's own inputs.
        input_bits: Width of those inputs.
    """

    weight_bits: tuple[int, int] = (2, 8)
    activation_bits: tuple[int, int] | None = (8, 8)
    evaluations: int = 24
    group: int | None = 1
    drop: bool = True
    sensitivity_samples: int = 256
    batch_size: int = 64
    seed: int = 0
    batch: int = 1
    threads: int | None = None
    task: Task = "auto"
    metric: str = "auto"
    kept: frozenset[int] = frozenset()
    kept_weight_bits: int = MAX_BITS
    inputs: frozenset[int] = frozenset()
    input_bits: tuple[int, int] = (MAX_BITS, MAX_BITS)

    @property
    def widest(self) -> tuple[int, int | None]:
        """Largest weight and activation width."""
        return self.weight_bits[1], None if self.activation_bits is None else self.activation_bits[1]

    @property
    def drops(self) -> bool:
        """Whether the search may drop kernels."""
        return self.drop and self.group is not None and not self.is_uniform

    @property
    def is_uniform(self) -> bool:
        """There is nothing to search."""
        pairs = [self.weight_bits, *([] if self.activation_bits is None else [self.activation_bits, self.input_bits])]
        return all(low == high for low, high in pairs)

    def bits(self, nodes: int, weight: int, activation: int | None) -> Bits:
        """The same widths everywhere but at the nodes that are kept, and the model's own inputs.

        Args:
            nodes: Number of mapped nodes.
            weight: Weight bits.
            activation: Activation bits, None for float, which kept nodes then have too.
        """
        return Bits(
            tuple(self.kept_weight_bits if node in self.kept else weight for node in range(nodes)),
            None if activation is None else self.activations(nodes, activation),
        )

    def activations(self, nodes: int, activation: int) -> tuple[int, ...]:
        """Activation bits of every node where all but the kept ones and the model's own inputs have one width."""
        return tuple(activation if (own := self._own_limits(node)) is None else own[1] for node in range(nodes))

    def _own_limits(self, node: int) -> tuple[int, int] | None:
        """Limits of the activation width of a node that is kept or reads an input of the model, else None."""
        if node in self.kept:
            return MAX_BITS, MAX_BITS
        return self.input_bits if node in self.inputs else None

    def weight_limits(self, node: int) -> tuple[int, int]:
        """Smallest and largest weight width of one node."""
        return (self.kept_weight_bits, self.kept_weight_bits) if node in self.kept else self.weight_bits

    def activation_limits(self, node: int) -> tuple[int, int] | None:
        """Smallest and largest activation width of one node, None where activations stay float."""
        return None if self.activation_bits is None else self._own_limits(node) or self.activation_bits


@dataclass(frozen=True)
class Evaluation:
    """One candidate, judged on the whole selection set.

    Attributes:
        bits: Its widths.
        crossbars: Crossbars that it takes, packed as the chip allows.
        score: Its score.
        origin: What proposed it.
        cost: All that it costs; without it only the crossbars are known.
    """

    bits: Bits
    crossbars: int
    score: Score
    origin: str
    cost: Cost | None = None

    def value(self, objective: Objective) -> float:
        """What it costs in terms of an objective; infinite where that is unknown."""
        return (self.cost or Cost(self.crossbars)).of(objective)


@dataclass(frozen=True)
class UniformBaseline:
    """One width for the whole model, but for nodes that are kept at 8 bits.

    Attributes:
        weight_bits: The width.
        activation_bits: Width of activations, None for float.
        bits: The widths of all nodes.
        exclusive_crossbars: Crossbars with one node in each.
        packed_crossbars: Crossbars packed as the chip allows.
        score: Score on the selection set.
    """

    weight_bits: int
    activation_bits: int | None
    bits: Bits
    exclusive_crossbars: int
    packed_crossbars: int
    score: Score


@dataclass(frozen=True)
class SearchResult:
    """Everything that a search found.

    Attributes:
        goal: What was asked for.
        chosen: The answer.
        goal_met: Whether it satisfies the goal on the selection set, None where there is no goal.
        reference: Score of the float model on the selection set.
        baselines: Uniform widths, by falling width.
        best_uniform: The uniform width that serves the same goal best, None when none satisfies it, or without a goal.
        front: Evaluations that no other beats in all of loss, crossbars and what else the goal speaks of, by rising
            crossbars; the answer is always among them.
        evaluations: All of them in the order in which they were made.
        nodes: Names of the mapped nodes, in the order of `Bits`.
        timed_out: Something was left undone for want of time.
        sensitivity: What each node alone loses, None where nothing was searched.
    """

    goal: Goal
    chosen: Evaluation
    goal_met: bool | None
    reference: Score
    baselines: tuple[UniformBaseline, ...]
    best_uniform: UniformBaseline | None
    front: tuple[Evaluation, ...]
    evaluations: tuple[Evaluation, ...]
    nodes: tuple[str, ...]
    timed_out: bool = False
    sensitivity: Sensitivity | None = None

    @property
    def chosen_number(self) -> int:
        """Number of the answer on the front, from 1."""
        return 1 + next(index for index, item in enumerate(self.front) if item.bits == self.chosen.bits)


def points_below(reference: Score, score: Score) -> float:
    """Hundredths of quality that a score lies below the float model's."""
    return 100 * (reference.quality - score.quality)


def goal_is_met(goal: Goal, reference: Score, item: Evaluation) -> bool:
    """Whether a candidate satisfies a goal.

    Args:
        goal: The goal.
        reference: Score of the float model on the same data.
        item: The candidate.
    """
    cost = item.cost or Cost(item.crossbars)
    cycle_ns = None if not cost.latency_cycles or cost.latency_ns is None else cost.latency_ns / cost.latency_cycles
    if not goal.budget(cycle_ns).allows(cost):
        return False
    return goal.max_accuracy_drop is None or points_below(reference, item.score) <= goal.max_accuracy_drop + 1e-9


def pareto_front(
    evaluations: Sequence[Evaluation], axes: Sequence[Objective] = ("crossbars",)
) -> tuple[Evaluation, ...]:
    """Evaluations that no other beats in loss and in every one of some costs.

    Args:
        evaluations: All of them.
        axes: Costs that count beside the loss.

    Returns:
        By rising costs in the order of `axes`, then by loss; the first of those that are alike in all.
    """
    kept: list[Evaluation] = []
    for item in sorted(evaluations, key=lambda item: costs_and_loss(item, axes)):
        own = costs_and_loss(item, axes)
        # Sorted, so that nothing that comes later can beat what is kept.
        if not any(all(map(operator.le, costs_and_loss(other, axes), own)) for other in kept):
            kept.append(item)
    return tuple(kept)


def costs_and_loss(item: Evaluation, axes: Sequence[Objective]) -> tuple[float, ...]:
    """What a point of a front is compared by."""
    return *(item.value(axis) for axis in axes), item.score.loss
