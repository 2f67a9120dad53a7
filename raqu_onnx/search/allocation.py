"""Widths that fit a budget: an integer program on additive sensitivities, and the repair of any candidate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.native_output import no_native_output
from raqu_onnx.placement import geometries
from raqu_onnx.search.cell_prices import cells_within, saves_columns
from raqu_onnx.search.fitting import within
from raqu_onnx.search.result import Bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from raqu_onnx.search.budget import Budget
    from raqu_onnx.search.problem import Problem

__all__ = ["cheapest_loss", "fit_to_budget", "kernel_widths", "solve_integer_program", "useful_widths"]


def cheapest_loss(
    loss: NDArray[np.float64], costs: Sequence[tuple[NDArray[np.float64], float]], widths: range
) -> tuple[int, ...] | None:
    """Widths with the least sum of losses whose costs stay within budgets: a multiple-choice knapsack.

    Args:
        loss: Loss of each node at each width, shape (nodes, widths.stop).
        costs: Each a cost of each node at each width, same shape, infinite where a width is impossible, and the largest
            total.
        widths: Widths that may be chosen.

    Returns:
        One width per node, or None when no choice fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron

    nodes, choices = len(loss), len(widths)
    flat_loss = loss[:, widths].reshape(-1)
    flat = [(cost[:, widths].reshape(-1), most) for cost, most in costs]
    possible = np.all([np.isfinite(cost) for cost, _ in flat], axis=0)
    scale = max(float(np.abs(flat_loss).max()), 1e-30)
    one_each = csr_array(kron(np.eye(nodes), np.ones((1, choices))))
    limits = []
    for cost, most in flat:
        unit = max(float(cost[possible].max(initial=0.0)), 1e-30)
        limits.append(LinearConstraint(np.where(possible, cost, 0.0)[None, :] / unit, -np.inf, most / unit))
    with no_native_output():
        result = milp(
            flat_loss / scale,
            integrality=np.ones(nodes * choices, np.int64),
            bounds=Bounds(0, possible.astype(float)),
            constraints=[LinearConstraint(one_each, 1, 1), *limits],
            # A limit on nodes, not on time: the answer must not depend on how busy the machine is.
            options={"mip_rel_gap": 1e-6, "node_limit": 20_000},
        )
    if result.x is None:
        return None
    return tuple(int(widths[int(i)]) for i in result.x.reshape(nodes, choices).argmax(1))


def solve_integer_program(problem: Problem, loss: NDArray[np.float64], budget: Budget) -> tuple[int, ...] | None:
    """Weight widths of least additive loss that really fit a number of crossbars and bits on average.

    The program counts cells (crossbars where each serves one node) and, where they are limited, bits; where packing
    cannot use every cell, its budget of cells shrinks until the placement fits.

    Args:
        problem: Costs.
        loss: Additive loss of each node at each width, shape (nodes, 9).
        budget: The budget, of which latency and energy are left to others.
    """
    limits = [problem.settings.weight_limits(node) for node in range(len(problem.nodes))]
    widths = range(min(low for low, _ in limits), max(high for _, high in limits) + 1)
    cost = problem.cell_cost.copy()
    for node, (low, high) in enumerate(limits):
        cost[node, :low] = cost[node, high + 1 : MAX_BITS + 1] = np.inf
    linear = _linear_budget(problem, budget.crossbars)
    others: list[tuple[NDArray[np.float64], float]] = []
    if budget.average_bits < np.inf:
        sizes = np.array([float(node.weights) for node in problem.nodes])
        others = [(sizes[:, None] * np.arange(MAX_BITS + 1), budget.average_bits * float(sizes.sum()))]
    for _ in range(12):
        weights = cheapest_loss(loss, [(cost, linear), *others], widths)
        if weights is None:
            return None
        if within(problem, Bits(weights, None), budget.static):
            return weights
        linear = min(linear, float(cost[np.arange(len(weights)), list(weights)].sum())) * 0.985 - 1e-9
    return None


def _linear_budget(problem: Problem, crossbars: float) -> float:
    if problem.chip.sharing == "exclusive":
        return float(crossbars)
    return cells_within(problem.chip, crossbars)


def useful_widths(problem: Problem) -> list[list[int]]:
    """Widths of each node, rising, without those that cost as much as a wider one (3 bits in 2-bit cells)."""
    choices: list[list[int]] = []
    for node, cost in enumerate(problem.cell_cost):
        low, high = problem.settings.weight_limits(node)
        choices.append(
            [b for b in range(low, high + 1) if np.isfinite(cost[b]) and (b == high or not cost[b] >= cost[b + 1])]
        )
    return choices


def kernel_widths(problem: Problem) -> list[list[int]]:
    """Widths of each node's kernels, rising, without those that take as many columns as a wider one everywhere.

    Widths at which a kernel is wider than every crossbar are left out, as in `useful_widths`.
    """
    encodings = {shape.encoding for shape in geometries(problem.chip)}
    choices: list[list[int]] = []
    for node, cost in enumerate(problem.cell_cost):
        low, high = problem.settings.weight_limits(node)
        possible = [b for b in range(low, high + 1) if np.isfinite(cost[b])]
        choices.append([b for b in possible if b == possible[-1] or saves_columns(encodings, b)])
    return choices


def fit_to_budget(
    problem: Problem,
    weights: tuple[int, ...],
    loss: NDArray[np.float64],
    budget: Budget,
    activations: tuple[int, ...] | None = None,
) -> tuple[int, ...] | None:
    """Bring any candidate into the budget, then use what is left of it.

    Bits that the cells hold anyway are taken first. Then bits are taken where the additive loss grows least per cost
    saved, and given where it falls most per cost added.

    Returns:
        Weight widths that fit, or None when even the smallest do not.
    """
    choices = useful_widths(problem)
    # Positions in each node's list of useful widths.
    current = [
        next((i for i, b in enumerate(widths) if b >= width), len(widths) - 1)
        for widths, width in zip(choices, weights, strict=True)
    ]

    def fits() -> bool:
        found = tuple(widths[i] for widths, i in zip(choices, current, strict=True))
        return within(problem, Bits(found, activations), budget)

    while not fits():
        step = _best_step(problem, choices, current, loss, -1, set())
        if step is None:
            return None
        current[step] -= 1
    blocked: set[int] = set()
    while (step := _best_step(problem, choices, current, loss, 1, blocked)) is not None:
        current[step] += 1
        if not fits():
            current[step] -= 1
            blocked.add(step)
    return tuple(widths[i] for widths, i in zip(choices, current, strict=True))


def _best_step(
    problem: Problem,
    choices: list[list[int]],
    current: list[int],
    loss: NDArray[np.float64],
    direction: int,
    blocked: set[int],
) -> int | None:
    """The node that should move to its next useful width, None when none can."""
    best: tuple[float, int] | None = None
    for node, (widths, position) in enumerate(zip(choices, current, strict=True)):
        if node in blocked or not 0 <= position + direction < len(widths):
            continue
        here, there = widths[position], widths[position + direction]
        gain = loss[node, here] - loss[node, there]
        if direction > 0 and gain <= 0:
            continue
        rate = gain / abs(problem.cell_cost[node, there] - problem.cell_cost[node, here])
        if best is None or rate > best[0]:
            best = (rate, node)
    return None if best is None else best[1]
