"""The search from start to end: baselines, sensitivity, integer program, Bayesian stage, choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.encodings import MAX_BITS, MIN_BITS
from raqu_onnx.placement import DoesNotFitError
from raqu_onnx.search.best import BestSoFar
from raqu_onnx.search.kernel_stage import KernelStage
from raqu_onnx.search.result import (
    Bits,
    Evaluation,
    Goal,
    SearchResult,
    UniformBaseline,
    pareto_front,
    points_below,
)
from raqu_onnx.search.sensitivity import Sensitivity, measure_sensitivity
from raqu_onnx.search.stages import LayerStage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raqu_onnx.evaluation import Score
    from raqu_onnx.hardware import Chip
    from raqu_onnx.search.bayes import TrustRegion
    from raqu_onnx.search.problem import Problem
    from raqu_onnx.search.result import NodeWidth, SearchSettings
    from raqu_onnx.search.stages import Stage

__all__ = ["check_room", "search"]

# Evaluations spent on the loss once no smaller number of crossbars serves the goal.
_REFINEMENTS = 8


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
        if goal.max_crossbars is not None:
            chosen = _best_within(problem, stage, goal.max_crossbars)
        else:
            chosen = _fewest_crossbars(problem, stage, goal.max_accuracy_drop or 0.0)
        chosen = _narrow_activations(problem, sensitivity, goal, chosen)
    return SearchResult(
        goal=goal,
        chosen=chosen,
        goal_met=_meets(problem, goal, chosen.score, chosen.crossbars) if goal else None,
        reference=problem.reference,
        baselines=tuple(baselines),
        best_uniform=_best_uniform(problem, goal, baselines) if goal else None,
        front=pareto_front(problem.evaluations),
        evaluations=tuple(problem.evaluations),
        nodes=problem.names,
        timed_out=problem.clock.stopped,
        sensitivity=sensitivity,
    )


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
    )


def check_room(chip: Chip, goal: Goal, settings: SearchSettings, *, need: int, fits: bool, short: str = "") -> None:
    """Make sure that the smallest widths fit: no other widths could.

    Args:
        chip: The chip.
        goal: May name a budget of crossbars.
        settings: The smallest width, and the nodes that are kept.
        need: Crossbars that the model takes at the smallest widths.
        fits: That is within what the chip has.
        short: Which crossbar types run short, where the chip has several.

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
        where = f", {short}" if short else f" where it has {_have(chip)}"
        raise DoesNotFitError(
            f"chip {chip.name} cannot hold the model even at {smallest} per weight, which takes {need} crossbars"
            f"{where}; use a larger chip{also}, or program it several times with --partitions auto"
        )
    if goal.max_crossbars is not None and need > goal.max_crossbars:
        raise DoesNotFitError(
            f"{goal.max_crossbars} crossbars are too few: the smallest widths, {smallest}, take {need}; allow at least "
            f"{need} crossbars{also}"
        )


def _have(chip: Chip) -> str:
    return ", ".join(f"{'any number' if kind.count is None else kind.count} of {kind.name}" for kind in chip.crossbars)


def _lowest(problem: Problem) -> tuple[NodeWidth, ...]:
    """The smallest weight width of every node."""
    return problem.settings.bits(len(problem.nodes), problem.settings.weight_bits[0], None).weights


def _meets(problem: Problem, goal: Goal, score: Score, crossbars: int) -> bool:
    if goal.max_crossbars is not None and crossbars > goal.max_crossbars:
        return False
    return goal.max_accuracy_drop is None or points_below(problem.reference, score) <= goal.max_accuracy_drop + 1e-9


def _best_uniform(problem: Problem, goal: Goal, baselines: Sequence[UniformBaseline]) -> UniformBaseline | None:
    """The uniform width that serves the goal best: least loss in the budget, else fewest crossbars in the drop.

    With both a budget and a drop, a width that stays in the budget but not in the drop is no answer.
    """
    # Counts of baselines that the chip cannot hold are for comparison only.
    held = [b for b in baselines if problem.crossbars(b.bits.weights) is not None]
    if goal.max_crossbars is not None:
        fitting = [b for b in held if _meets(problem, goal, b.score, b.packed_crossbars)]
        return min(fitting, key=lambda b: b.score.loss, default=None)
    fitting = [b for b in held if _meets(problem, goal, b.score, 0)]
    return min(fitting, key=lambda b: (b.packed_crossbars, b.score.loss), default=None)


def _stage(problem: Problem, sensitivity: Sensitivity) -> Stage:
    """What is searched: widths of nodes, or of their kernels."""
    return LayerStage(problem, sensitivity) if problem.settings.group is None else KernelStage(problem, sensitivity)


def _best_within(problem: Problem, stage: Stage, crossbars: int) -> Evaluation:
    start = stage.start(crossbars)
    known = [e for e in problem.evaluations if e.crossbars <= crossbars]
    if start is None and not known:
        raise DoesNotFitError(
            f"no candidate fits {crossbars} crossbars of chip {problem.chip.name}; allow more, or use a larger chip"
        )
    region = stage.region(crossbars, min(known, key=lambda e: e.score.loss))
    _spend(problem, region, problem.settings.evaluations, "Bayesian search")
    problem.progress("Bayesian search", problem.settings.evaluations, problem.settings.evaluations)
    return region.incumbent


def _spend(problem: Problem, region: TrustRegion, evaluations: int, what: str) -> None:
    """Judge so many candidates of a region, or as many as there are, or is time for."""
    done = 0
    while done < evaluations and not problem.clock.is_over():
        problem.progress(what, done, evaluations)
        judged = region.step(evaluations - done)
        if not judged:
            break
        done += judged


def _fewest_crossbars(problem: Problem, stage: Stage, allowed: float) -> Evaluation:
    """Bisect over budgets with computed candidates, then let the Bayesian stage push one crossbar further at a time."""
    goal = Goal(None, allowed)
    low = stage.fewest_crossbars
    high = max((e.crossbars for e in problem.evaluations), default=0)
    best = min(
        (e for e in problem.evaluations if _meets(problem, goal, e.score, 0)),
        key=lambda e: (e.crossbars, e.score.loss),
        default=None,
    )
    if best is None:
        # No uniform width meets the target: mixed widths on the whole chip may, and lose least in any case.
        counts = [kind.count for kind in problem.chip.crossbars]
        whole = sum(count or 0 for count in counts)
        if None in counts:
            high = high or problem.packed_crossbars(_lowest(problem))
        best = _best_within(problem, stage, high if None in counts else max(high, whole))
        if not _meets(problem, goal, best.score, 0):
            return best
    high = best.crossbars
    while low < high and not problem.clock.is_over():
        middle = (low + high) // 2
        problem.progress(f"allocation to {middle} crossbars", 0, 1)
        found = stage.start(middle)
        if found is not None and _meets(problem, goal, found.score, 0):
            best = min(best, found, key=lambda e: (e.crossbars, e.score.loss))
            high = min(middle, found.crossbars)
        else:
            low = middle + 1
    return _push_further(problem, stage, goal, best)


def _push_further(problem: Problem, stage: Stage, goal: Goal, best: Evaluation) -> Evaluation:
    """Spend the evaluations on budgets below the best one; a budget that is met makes way for a smaller one."""
    left = problem.settings.evaluations
    while left > 0 and not problem.clock.is_over():
        budget = best.crossbars - max(1, best.crossbars // 50)
        known = [e for e in problem.evaluations if e.crossbars <= budget]
        start = stage.start(budget) if budget > 0 else None
        if start is None:
            break
        region = stage.region(budget, min([*known, start], key=lambda e: e.score.loss))
        while left > 0 and not _meets(problem, goal, region.incumbent.score, 0):
            problem.progress("Bayesian search", problem.settings.evaluations - left, problem.settings.evaluations)
            judged = 0 if problem.clock.is_over() else region.step(left)
            left = left - judged if judged else 0
        if not _meets(problem, goal, region.incumbent.score, 0):
            break
        if region.incumbent.crossbars >= best.crossbars:
            break
        best = region.incumbent
    refined = _refine(problem, stage, best, min(left, _REFINEMENTS))
    if _meets(problem, goal, refined.score, 0):
        best = refined
    problem.progress("Bayesian search", problem.settings.evaluations, problem.settings.evaluations)
    return best


def _refine(problem: Problem, stage: Stage, best: Evaluation, evaluations: int) -> Evaluation:
    """Lower the loss at the crossbars that were reached: what they have left over gets bits."""
    if not evaluations or problem.clock.is_over():
        return best
    found = [best, stage.start(best.crossbars)]
    start = min((e for e in found if e is not None), key=lambda e: e.score.loss)
    region = stage.region(best.crossbars, start)
    _spend(problem, region, evaluations, "Bayesian search, same crossbars")
    return region.incumbent


def _narrow_activations(problem: Problem, sensitivity: Sensitivity, goal: Goal, chosen: Evaluation) -> Evaluation:
    """Take activation bits, which cost cycles but no crossbars, while the goal holds and the loss allows it.

    Bits go in order of the loss they carry; halves of what is left are tried at once, as in a binary search.
    """
    widths = problem.settings.activation_bits
    if widths is None or widths[0] == widths[1] or chosen.bits.activations is None or sensitivity.activations is None:
        return chosen
    allowed = (
        goal.max_accuracy_drop if goal.max_accuracy_drop is not None else points_below(problem.reference, chosen.score)
    )
    best = chosen
    steps = _activation_steps(problem, sensitivity, chosen.bits.activations)
    taken, reach = 0, len(steps)
    while taken < reach and not problem.clock.is_over():
        middle = (taken + reach + 1) // 2
        problem.progress("narrowing activations", taken, len(steps))
        trial = problem.evaluate(Bits(chosen.bits.weights, steps[middle - 1]), "narrower activations")
        if points_below(problem.reference, trial.score) <= allowed + 1e-9:
            best, taken = trial, middle
        else:
            reach = middle - 1
    problem.progress("narrowing activations", len(steps), len(steps))
    return best


def _activation_steps(problem: Problem, sensitivity: Sensitivity, start: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Ever narrower activation widths: each step takes the bit whose loss per MVM saved is least."""
    table = sensitivity.activations
    if table is None:
        return []
    mvms = [float(node.mvms or 1) for node in problem.nodes]
    lowest = [(problem.settings.activation_limits(i) or (width,))[0] for i, width in enumerate(start)]
    current, steps = list(start), []
    while movable := [i for i, width in enumerate(current) if width > lowest[i]]:
        best = min(movable, key=lambda i: (float(table[i, current[i] - 1] - table[i, current[i]]) / mvms[i], i))
        current[best] -= 1
        steps.append(tuple(current))
    return steps
