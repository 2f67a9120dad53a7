"""Candidates brought into a budget of latency or energy: activation bits go where they cost least per cost saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raqu_onnx.cost import input_slices
from raqu_onnx.search.result import Bits

if TYPE_CHECKING:
    from collections.abc import Callable

    from raqu_onnx.search.budget import Budget
    from raqu_onnx.search.problem import Problem
    from raqu_onnx.search.result import NodeWidth
    from raqu_onnx.search.sensitivity import Sensitivity

__all__ = ["activation_steps", "lowest_activations", "narrowed", "repaired", "within"]

Weights = tuple["NodeWidth", ...]


def within(problem: Problem, bits: Bits, budget: Budget) -> bool:
    """Whether a candidate fits the chip and a budget."""
    count = problem.crossbars(bits.weights)
    if count is None or count > budget.crossbars:
        return False
    if budget.limits_crossbars_only:
        return True
    cost = problem.measure(bits)
    return cost is not None and budget.allows(cost)


def lowest_activations(problem: Problem) -> tuple[int, ...] | None:
    """The smallest activation widths, None where activations stay float."""
    limits = [problem.settings.activation_limits(node) for node in range(len(problem.nodes))]
    found = tuple(low for low, _ in (item for item in limits if item is not None))
    return found if len(found) == len(limits) else None


def repaired(
    problem: Problem,
    sensitivity: Sensitivity,
    allocate: Callable[[Budget, tuple[int, ...] | None], Weights | None],
    activations: tuple[int, ...] | None,
    budget: Budget,
) -> Bits | None:
    """A candidate within a budget, None where there is none.

    Weights take what crossbars and average bits allow, and activations are narrowed until latency and energy fit. Where
    the narrowest do not suffice, weights are allocated beside these within the whole budget.

    Args:
        problem: Costs.
        sensitivity: Additive losses.
        allocate: Gives weights within a budget at activation bits, None where none fit.
        activations: Activation bits to start from, None where they stay float.
        budget: The budget.
    """
    weights = allocate(budget.static, activations)
    if weights is None or not budget.limits_runs:
        return None if weights is None else Bits(weights, activations)
    found = narrowed(problem, sensitivity, Bits(weights, activations), budget)
    if found is not None:
        return found
    weights = allocate(budget, lowest_activations(problem))
    return None if weights is None else narrowed(problem, sensitivity, Bits(weights, activations), budget)


def narrowed(problem: Problem, sensitivity: Sensitivity, bits: Bits, budget: Budget) -> Bits | None:
    """The same weights with activations narrowed as far as the budget asks, None where the narrowest do not fit.

    What the last step leaves of the budget goes to the activations that gain most by it.
    """
    if within(problem, bits, budget):
        return _filled(problem, sensitivity, bits, budget)
    steps = activation_steps(problem, sensitivity, bits, budget)
    if not steps or not within(problem, Bits(bits.weights, steps[-1]), budget):
        return None
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        if within(problem, Bits(bits.weights, steps[middle]), budget):
            high = middle
        else:
            low = middle + 1
    return _filled(problem, sensitivity, Bits(bits.weights, steps[low]), budget)


def _filled(problem: Problem, sensitivity: Sensitivity, bits: Bits, budget: Budget) -> Bits:
    """Activations widened while the budget allows it: where it is free, then where the loss falls most per cost."""
    table, dac_bits = sensitivity.activations, problem.chip.dac_bits
    if table is None or bits.activations is None:
        return bits
    slice_costs = _slice_costs(problem, bits, budget)
    limits = [problem.settings.activation_limits(i) or (width, width) for i, width in enumerate(bits.activations)]
    current = [
        max(width, min(high, input_slices(width, dac_bits) * dac_bits))
        for width, (_, high) in zip(bits.activations, limits, strict=True)
    ]
    open_nodes = {node for node, width in enumerate(current) if width < limits[node][1]}

    def gain(node: int) -> tuple[float, int]:
        return float(table[node, current[node]] - table[node, wider(node)]) / max(slice_costs[node], 1e-30), -node

    def wider(node: int) -> int:
        return min(limits[node][1], current[node] + dac_bits)

    while open_nodes:
        best = max(open_nodes, key=gain)
        trial = [*current[:best], wider(best), *current[best + 1 :]]
        if gain(best)[0] > 0 and within(problem, Bits(bits.weights, tuple(trial)), budget):
            current = trial
        else:
            open_nodes.discard(best)
        if current[best] >= limits[best][1]:
            open_nodes.discard(best)
    return Bits(bits.weights, tuple(current))


def activation_steps(
    problem: Problem, sensitivity: Sensitivity, bits: Bits, budget: Budget | None = None
) -> list[tuple[int, ...]]:
    """Ever narrower activation widths: each step takes the bits whose loss per cost saved is least.

    Widths that take as many input slices as a wider one are passed over once the first slice is saved.

    Args:
        problem: Costs.
        sensitivity: Additive losses.
        bits: Where to start.
        budget: What it limits is what is saved; cycles without one.
    """
    table = sensitivity.activations
    if table is None or bits.activations is None:
        return []
    dac_bits = problem.chip.dac_bits
    slice_costs = _slice_costs(problem, bits, budget)
    limits = [problem.settings.activation_limits(i) or (width, width) for i, width in enumerate(bits.activations)]
    current, steps = list(bits.activations), []

    def rate(node: int) -> tuple[float, int]:
        here, there = current[node], _next_width(current[node], limits[node][0], dac_bits)
        saved = slice_costs[node] * (input_slices(here, dac_bits) - input_slices(there, dac_bits))
        return float(table[node, there] - table[node, here]) / max(saved, 1e-30), node

    while movable := [i for i, width in enumerate(current) if _next_width(width, limits[i][0], dac_bits) < width]:
        best = min(movable, key=rate)
        current[best] = _next_width(current[best], limits[best][0], dac_bits)
        steps.append(tuple(current))
    return steps


def _next_width(width: int, lowest: int, dac_bits: int) -> int:
    """The widest width with fewer input slices, the same where that is below the lowest one."""
    fewer = (input_slices(width, dac_bits) - 1) * dac_bits
    return fewer if fewer >= lowest else width


def _slice_costs(problem: Problem, bits: Bits, budget: Budget | None) -> list[float]:
    """What one input slice of each node costs, as shares of the whole: of cycles, of energy, or of both together."""
    found = problem.costs_of_nodes(bits)
    if found is None:
        return [float(node.mvms or 1) for node in problem.nodes]
    slices = [input_slices(width, problem.chip.dac_bits) for width in bits.activations or ()]
    names = [node.name for node in problem.nodes]
    cycles = [float(found.cycles[name] or 0) for name in names]
    energies = [found.energy_pj.get(name, 0.0) for name in names]
    parts = [cycles] if budget is None or budget.limits_latency or not budget.limits_energy else []
    parts += [energies] if budget is not None and budget.limits_energy else []
    shares = [[value / max(sum(part), 1e-30) for value in part] for part in parts]
    return [sum(share[i] for share in shares) / slices[i] for i in range(len(names))]
