"""What a search is asked for and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raqu_onnx.encodings import MAX_BITS

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
    "pareto_front",
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
    """What the result must satisfy.

    With `max_crossbars` the loss is minimized inside that many crossbars; else the crossbars are minimized inside
    the allowed drop. With neither there is no goal, and nothing to miss: widths are fixed and the result is what it is.

    Attributes:
        max_crossbars: Most crossbars that may be used.
        max_accuracy_drop: Most points (hundredths) of accuracy below float; of agreement with float without labels; of
            noise power over signal power where the model has no class scores.
    """

    max_crossbars: int | None = None
    max_accuracy_drop: float | None = 0.5

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self.max_crossbars is not None or self.max_accuracy_drop is not None


@dataclass(frozen=True)
class SearchSettings:
    """How a search is run.

    Attributes:
        weight_bits: Smallest and largest weight width.
        activation_bits: Smallest and largest activation width, None to leave activations float.
        evaluations: Candidates that the Bayesian stage may judge on the whole selection set.
        group: Kernels of a node that must have the same width; 1 for each its own, None for all.
        drop: Kernels may get 0 bits, where they need not all have the same width.
        sensitivity_samples: Samples on which the effect of each node alone is measured.
        batch_size: Samples per run.
        seed: Seed of everything random.
        batch: Candidates that the Bayesian stage asks for at once.
        threads: Threads for onnxruntime, None for all.
        task: What the model's outputs are, which decides how candidates are judged.
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
    kept: frozenset[int] = frozenset()
    kept_weight_bits: int = MAX_BITS
    inputs: frozenset[int] = frozenset()
    input_bits: int = MAX_BITS

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
        fixed = self.activation_bits is None or self.activation_bits[0] == self.activation_bits[1]
        return fixed and self.weight_bits[0] == self.weight_bits[1]

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
        return tuple(self._fixed_activation(node) or activation for node in range(nodes))

    def _fixed_activation(self, node: int) -> int | None:
        """The activation width that no search changes, None where there is none."""
        if node in self.kept:
            return MAX_BITS
        return self.input_bits if node in self.inputs else None

    def weight_limits(self, node: int) -> tuple[int, int]:
        """Smallest and largest weight width of one node."""
        return (self.kept_weight_bits, self.kept_weight_bits) if node in self.kept else self.weight_bits

    def activation_limits(self, node: int) -> tuple[int, int] | None:
        """Smallest and largest activation width of one node, None where activations stay float."""
        fixed = self._fixed_activation(node)
        return self.activation_bits if fixed is None or self.activation_bits is None else (fixed, fixed)


@dataclass(frozen=True)
class Evaluation:
    """One candidate, judged on the whole selection set.

    Attributes:
        bits: Its widths.
        crossbars: Crossbars that it takes, packed as the chip allows.
        score: Its score.
        origin: What proposed it.
    """

    bits: Bits
    crossbars: int
    score: Score
    origin: str


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
        front: Evaluations that no other beats in both crossbars and loss, by rising crossbars.
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


def points_below(reference: Score, score: Score) -> float:
    """Hundredths of quality that a score lies below the float model's."""
    return 100 * (reference.quality - score.quality)


def pareto_front(evaluations: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    """Evaluations that no other beats in both crossbars and loss, by rising crossbars."""
    front: list[Evaluation] = []
    for item in sorted(evaluations, key=lambda e: (e.crossbars, e.score.loss)):
        if not front or item.score.loss < front[-1].score.loss:
            front.append(item)
    return tuple(front)
