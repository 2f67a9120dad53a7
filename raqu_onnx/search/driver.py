"""The search from start to end: baselines, sensitivity, integer program, Bayesian stage, choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.encodings import MAX_BITS, MIN_BITS
from raqu_onnx.partitioning import too_large_alone
from raqu_onnx.placement import DoesNotFitError
from raqu_onnx.search.best import BestSoFar
from raqu_onnx.search.budget import OBJECTIVES, Cost
from raqu_onnx.search.fitting import activation_steps
from raqu_onnx.search.kernel_stage import KernelStage
from raqu_onnx.search.result import (
    Bits,
    Evaluation,
    Goal,
    SearchResult,
    UniformBaseline,
    costs_and_loss,
    goal_is_met,
    pareto_front,
    points_below,
)
from raqu_onnx.search.sensitivity import Sensitivity, measure_sensitivity
from raqu_onnx.search.stages import LayerStage, searched_activations
from raqu_onnx.search.strategy import best_within, budget_of, least, require_reachable
from raqu_onnx.search.trend import Trend
from raqu_onnx.search.types_after import search_types_after

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raqu_onnx.hardware import Chip
    from raqu_onnx.search.budget import Objective
    from raqu_onnx.search.problem import Problem
    from raqu_onnx.search.result import NodeWidth, SearchSettings
    from raqu_onnx.search.stages import Stage

__all__ = ["check_room", "search"]


def search(problem: Problem, goal: Goal) -> SearchResult:
    """Find widths that serve a goal.

    Raises:
        DoesNotFitError: Even the smallest widths do not fit the chip or the crossbars allowed.
    """
    _require_room(problem, goal)
    problem.watch = BestSoFar(problem.reference, goal, problem.progress).see
    baselines = _uniform_baselines(problem, goal)
    sensitivity = None
    if problem.settings.is_uniform:
        chosen = problem.evaluate(problem.settings.bits(len(problem.nodes), *problem.settings.widest), "uniform")
    else:
        sensitivity = measure_sensitivity(problem)
        stage = _stage(problem, sensitivity)
        budget = budget_of(problem, goal)
        require_reachable(problem, stage, budget)
        chosen = best_within(problem, stage, budget) if goal.minimized is None else least(problem, stage, goal)
        if goal.fills_chip:
            chosen = search_types_after(problem, lambda other: _prepared(other, goal), chosen)
        if goal.speaks_of == {"crossbars"}:
            # What costs no crossbars is taken as far as it is free.
            chosen = _narrow_activations(problem, sensitivity, goal, chosen)
    return SearchResult(
        goal=goal,
        chosen=chosen,
        goal_met=goal_is_met(goal, problem.reference, chosen) if goal else None,
        reference=problem.reference,
        baselines=tuple(baselines),
        best_uniform=_best_uniform(problem, goal, baselines) if goal else None,
        front=_front(problem, goal, chosen),
        evaluations=tuple(problem.evaluations),
        nodes=problem.names,
        timed_out=problem.clock.stopped,
        sensitivity=sensitivity,
    )


def _front(problem: Problem, goal: Goal, chosen: Evaluation) -> tuple[Evaluation, ...]:
    """The Pareto front, with the answer on it even where another point beats it: it may serve the goal better."""
    told: set[Objective] = {"crossbars", *goal.speaks_of}
    if searched_activations(problem):
        told.add("latency")
    axes = [kind for kind in OBJECTIVES if kind in told]
    front = pareto_front(problem.evaluations, axes)
    if all(item.bits != chosen.bits for item in front):
        front = (*front, chosen)
    return tuple(sorted(front, key=lambda item: costs_and_loss(item, axes)))


def _uniform_baselines(problem: Problem, goal: Goal) -> list[UniformBaseline]:
    """Uniform widths from 8 down to the smallest one allowed that save something; those that fit are candidates.

    Where widths are fixed and nothing is asked for, 8 bits are all that the result is held against.
    """
    activation = problem.settings.widest[1]
    widths = _uniform_widths(problem, goal)
    problem.judge_ahead(list(widths.values()), "judging uniform widths")
    baselines: list[UniformBaseline] = []
    for step, (width, bits) in enumerate(widths.items()):
        if baselines and problem.clock.is_over():
            break
        problem.progress("judging uniform widths", step, len(widths))
        packed = problem.crossbars(bits.weights)
        if packed is not None and _is_candidate(problem, bits):
            problem.evaluate(bits, f"uniform {width} bits")
        baselines.append(
            UniformBaseline(
                weight_bits=width,
                activation_bits=activation,
                bits=bits,
                exclusive_crossbars=problem.exclusive_crossbars(bits.weights),
                packed_crossbars=problem.packed_crossbars(bits.weights),
                score=problem.score(bits),
            )
        )
    problem.progress("judging uniform widths", len(widths), len(widths))
    return baselines


def _uniform_widths(problem: Problem, goal: Goal) -> dict[int, Bits]:
    """Uniform widths that are worth a look, by falling width, with those of all nodes."""
    settings, nodes, activation = problem.settings, len(problem.nodes), problem.settings.widest[1]
    lowest = settings.weight_bits[0]
    found: dict[int, Bits] = {}
    for width in range(MAX_BITS, lowest - 1, -1) if goal or not settings.is_uniform else (MAX_BITS,):
        bits = settings.bits(nodes, width, activation)
        if not np.isfinite(problem.cost(list(bits.by_node.values()))):
            # A kernel of this width is wider than every crossbar.
            continue
        if bits in found.values():
            # Every node is kept at 8 bits.
            continue
        if lowest < width < MAX_BITS and _costs_as_much(problem, bits, settings.bits(nodes, width + 1, activation)):
            # Nobody would take 3 bits where 4 take the same cells.
            continue
        found[width] = bits
    return found


def _costs_as_much(problem: Problem, bits: Bits, wider: Bits) -> bool:
    """Every node takes at one width what it takes at another."""
    return all(
        problem.cell_cost[node, width] == problem.cell_cost[node, wider.by_node[node]]
        for node, width in bits.by_node.items()
    )


def _is_candidate(problem: Problem, bits: Bits) -> bool:
    """Whether every node's width may be chosen; 8 bits may where all nodes are kept there."""
    limits = (problem.settings.weight_limits(node) for node in bits.by_node)
    return all(low <= width <= high for width, (low, high) in zip(bits.by_node.values(), limits, strict=True))


def _require_room(problem: Problem, goal: Goal) -> None:
    if problem.settings.drops:
        # Dropped kernels take no room: the allocation finds out.
        return
    smallest = _lowest(problem)
    if problem.in_parts:
        # Its own message says how many parts are needed, or which node alone is too large.
        problem.place(smallest)
    need = problem.crossbars(smallest)
    check_room(
        problem.chip,
        goal,
        problem.settings,
        need=problem.packed_crossbars(smallest) if need is None else need,
        fits=need is not None,
        short="" if need is not None else problem.shortage(smallest),
        alone="" if need is not None else too_large_alone(problem.matrices(smallest), problem.chip),
    )


def check_room(
    chip: Chip, goal: Goal, settings: SearchSettings, *, need: int, fits: bool, short: str = "", alone: str = ""
) -> None:
    """Make sure that the smallest widths fit: no other widths could.

    Args:
        chip: The chip.
        goal: May name a budget of crossbars.
        settings: The smallest width, and the nodes that are kept.
        need: Crossbars that the model takes at the smallest widths.
        fits: That is within what the chip has.
        short: Which crossbar types run short, where the chip has several.
        alone: A node that does not fit even alone, if there is one.

    Raises:
        DoesNotFitError: They do not fit the chip or the crossbars allowed.
    """
    lowest = settings.weight_bits[0]
    kept = f"{len(settings.kept)} node{'s' if len(settings.kept) > 1 else ''} kept at {settings.kept_weight_bits}"
    smallest = f"{lowest} bits" + (f" with {kept}" if settings.kept else "")
    ways = [f"a smaller width than {lowest}"] if lowest > MIN_BITS else []
    ways += [f"fewer nodes kept at {settings.kept_weight_bits} bits"] if settings.kept else []
    also = f", or allow {' or '.join(ways)}" if ways else ""
    if not fits:
        parts = f"; node {alone} alone is too large for it, so that --partitions is no way out"
        parts = parts if alone else ", or program it several times with --partitions auto"
        where = f", {short}" if short else f" where it has {_have(chip)}"
        raise DoesNotFitError(
            f"chip {chip.name} cannot hold the model even at {smallest} per weight, which takes {need} crossbars"
            f"{where}; use a larger chip{also}{parts}"
        )
    if goal.max_crossbars is not None and need > goal.max_crossbars:
        raise DoesNotFitError(
            f"{_crossbars_are(goal.max_crossbars)} too few: the smallest widths, {smallest}, take {need}; allow at "
            f"least {need} crossbars{also}"
        )


def _crossbars_are(count: int) -> str:
    return "1 crossbar is" if count == 1 else f"{count} crossbars are"


def _have(chip: Chip) -> str:
    return ", ".join(f"{'any number' if kind.count is None else kind.count} of {kind.name}" for kind in chip.crossbars)


def _lowest(problem: Problem) -> tuple[NodeWidth, ...]:
    """The smallest weight width of every node."""
    return problem.settings.bits(len(problem.nodes), problem.settings.weight_bits[0], None).weights


def _best_uniform(problem: Problem, goal: Goal, baselines: Sequence[UniformBaseline]) -> UniformBaseline | None:
    """The uniform width that serves the goal best: least loss in the budget, else fewest crossbars in the drop.

    With both a budget and a drop, a width that stays in the budget but not in the drop is no answer.
    """
    # Counts of baselines that the chip cannot hold are for comparison only.
    held = [(b, cost) for b in baselines if (cost := _cost(problem, goal, b.bits)) is not None]
    judged = [(b, Evaluation(b.bits, cost.crossbars, b.score, "uniform", cost)) for b, cost in held]
    fitting = [(b, found) for b, found in judged if goal_is_met(goal, problem.reference, found)]
    objective = goal.minimized

    def rank(item: tuple[UniformBaseline, Evaluation]) -> tuple[float, float]:
        return (item[1].value(objective) if objective else 0.0), item[1].score.loss

    return min(fitting, key=rank, default=(None, None))[0]


def _cost(problem: Problem, goal: Goal, bits: Bits) -> Cost | None:
    """What a candidate costs in what a goal speaks of, None where the chip cannot hold it."""
    if goal.speaks_of == {"crossbars"} and goal.max_average_bits is None:
        crossbars = problem.crossbars(bits.weights)
        return None if crossbars is None else Cost(crossbars)
    return problem.measure(bits)


def _prepared(problem: Problem, goal: Goal) -> Stage:
    """What is searched on another chip, with uniform widths among the candidates as on the first."""
    _uniform_baselines(problem, goal)
    # Which widths are of use, and so are measured, depends on the chip.
    return _stage(problem, measure_sensitivity(problem))


def _stage(problem: Problem, sensitivity: Sensitivity) -> Stage:
    """What is searched: widths of nodes, or of their kernels."""
    return LayerStage(problem, sensitivity) if problem.settings.group is None else KernelStage(problem, sensitivity)


def _narrow_activations(problem: Problem, sensitivity: Sensitivity, goal: Goal, chosen: Evaluation) -> Evaluation:
    """Take activation bits, which cost cycles but no crossbars, while the goal holds and the loss allows it.

    Bits go in order of the loss they carry; halves of what is left are tried at once, as in a binary search.
    """
    if not searched_activations(problem):
        return chosen
    allowed = (
        goal.max_accuracy_drop if goal.max_accuracy_drop is not None else points_below(problem.reference, chosen.score)
    )
    best = chosen
    steps = activation_steps(problem, sensitivity, chosen.bits)
    taken, reach = 0, len(steps)
    while taken < reach and not problem.clock.is_over():
        middle = (taken + reach + 1) // 2
        problem.progress("narrowing activations", taken, len(steps))
        trial = problem.evaluate(Bits(chosen.bits.weights, steps[middle - 1]), "narrower activations")
        # What the drops of others say of it may be no worse than what they say of the one chosen.
        trend = Trend(problem.reference, problem.evaluations)
        usual = max(allowed, trend.points(chosen.score))
        if points_below(problem.reference, trial.score) <= allowed + 1e-9 and trend.points(trial.score) <= usual + 1e-9:
            best, taken = trial, middle
        else:
            reach = middle - 1
    problem.progress("narrowing activations", len(steps), len(steps))
    return best
