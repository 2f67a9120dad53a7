"""How much each node alone loses at each width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.search.allocation import kernel_widths, useful_widths
from raqu_onnx.search.result import Bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.search.problem import Problem

__all__ = ["Sensitivity", "measure_sensitivity"]

T = TypeVar("T")

# Times the largest loss measured that a width without a finite loss counts.
_WORSE = 10.0


@dataclass(frozen=True)
class Sensitivity:
    """Loss that each node adds at each width, all others at the widest.

    Attributes:
        weights: Shape (nodes, 9); a width that was not measured has the loss of the next wider one that was.
        activations: Likewise, None where activations stay float.
        base: Loss with all nodes at the widest, 0 where there was no time to measure it.
    """

    weights: NDArray[np.float64]
    activations: NDArray[np.float64] | None
    base: float = 0.0


def measure_sensitivity(problem: Problem) -> Sensitivity:
    """Fill the table with forward passes: one per node and width.

    Widths that save nothing over the next one on this chip, such as 3 bits in 2-bit cells, are not measured. Noise can
    make a narrower width look better than a wider one; losses are made to fall with the width.
    """
    settings = problem.settings
    nodes = len(problem.nodes)
    weight, activation = settings.widest
    widest = settings.bits(nodes, weight, activation)
    choices = useful_widths(problem)
    if settings.group is not None:
        # Crossbars that a whole node would not save may still be saved by some of its kernels.
        choices = [sorted({*own, *kernels}) for own, kernels in zip(choices, kernel_widths(problem), strict=True)]
    jobs = [(node, b, True) for node, widths in enumerate(choices) for b in widths if b < weight]
    for node in range(nodes):
        low, high = settings.activation_limits(node) or (0, 0)
        jobs += [(node, b, False) for b in range(low, high)]
    trials = [widest, *(_trial(widest, *job) for job in jobs)]
    base, *losses = problem.quick_many(trials, "measuring sensitivity")
    weights = np.zeros((nodes, MAX_BITS + 1))
    activations = None if activation is None else np.zeros((nodes, MAX_BITS + 1))
    for is_weight, table in ((True, weights), (False, activations)):
        if table is not None:
            pairs = zip(jobs, losses, strict=True)
            _fill(table, [(node, bits, loss) for (node, bits, kind), loss in pairs if kind == is_weight], base)
    floor = base if base is not None and np.isfinite(base) else 0.0
    return Sensitivity(_falling(weights), None if activations is None else _falling(activations), floor)


def _trial(widest: Bits, node: int, bits: int, is_weight: bool) -> Bits:
    """All nodes at the widest but one, in its weights or in its input."""
    if is_weight or widest.activations is None:
        return Bits(_changed(widest.weights, node, bits), widest.activations)
    return Bits(widest.weights, _changed(widest.activations, node, bits))


def _fill(table: NDArray[np.float64], found: list[tuple[int, int, float | None]], base: float | None) -> None:
    """Losses above the base; what there was no time to measure is taken from the other nodes.

    Args:
        table: Shape (nodes, 9).
        found: Nodes, widths and losses, None where there was no time.
        base: Loss of the widest widths.
    """
    known: dict[int, list[float]] = {}
    for node, bits, loss in found:
        if loss is not None and base is not None:
            with np.errstate(invalid="ignore"):
                table[node, bits] = np.float64(loss) - base
            if np.isfinite(table[node, bits]):
                known.setdefault(bits, []).append(table[node, bits])
    # Some widths may give infinities: they are worse than all that can be measured, by how much nobody knows.
    finite = table[np.isfinite(table)]
    table[~np.isfinite(table)] = _WORSE * max(float(finite.max(initial=0.0)), 1.0)
    for node, bits, loss in found:
        if loss is None or base is None:
            # The power of rounding falls fourfold with each bit.
            table[node, bits] = float(np.median(known[bits])) if bits in known else 4.0**-bits


def _changed(widths: tuple[T, ...], node: int, bits: T) -> tuple[T, ...]:
    return (*widths[:node], bits, *widths[node + 1 :])


def _falling(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each entry at least as large as every entry to its right, and none below 0."""
    flipped = np.maximum(table, 0.0)[:, ::-1]
    return np.maximum.accumulate(flipped, axis=1)[:, ::-1].copy()
