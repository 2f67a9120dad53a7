"""How a goal is sought: the least loss within a budget, or the least of an objective within an allowed drop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raqu_onnx.cost import cycle_ns
from raqu_onnx.placement import DoesNotFitError
from raqu_onnx.search.budget import Cost
from raqu_onnx.search.fitting import lowest_activations
from raqu_onnx.search.result import Bits
from raqu_onnx.search.trend import Trend

if TYPE_CHECKING:
    from raqu_onnx.search.bayes import TrustRegion
    from raqu_onnx.search.budget import Budget, Objective
    from raqu_onnx.search.problem import Problem
    from raqu_onnx.search.result import Evaluation, Goal
    from raqu_onnx.search.stages import Stage

__all__ = ["best_within", "budget_of", "least", "require_reachable"]

# Evaluations spent on the loss once no smaller value of the objective serves the goal.
_REFINEMENTS = 8
# Latency, energy and their product are sought to within this ratio, and then pushed down by this share at a time.
_RESOLUTION = 1.03
_PUSH = 0.97


def budget_of(problem: Problem, goal: Goal) -> Budget:
    """The limits of a goal on a chip; all crossbars of a chip that has a number of them are one more limit."""
    budget = goal.budget(cycle_ns(problem.chip)) if goal.speaks_of & {"latency", "energy"} else goal.budget(None)
    counts = [kind.count for kind in problem.chip.crossbars]
    if goal.fit_chip and None not in counts:
        budget = budget.within("crossbars", float(sum(count or 0 for count in counts)))
    return budget


def require_reachable(problem: Problem, stage: Stage, budget: Budget) -> None:
    """Make sure that limits other than crossbars can be kept, before hours are spent.

    Raises:
        DoesNotFitError: One cannot; the message tells the least that can.
    """
    if budget.limits_crossbars_only:
        return
    costs = [problem.measure(Bits(weights, lowest_activations(problem))) for weights in stage.extremes(budget)]
    found = [cost for cost in costs if cost is not None]
    limits: tuple[tuple[str, float, list[float], str], ...] = (
        ("--max-latency", budget.latency, [cost.of("latency") for cost in found], "cycles"),
        ("--max-energy", budget.energy, [cost.of("energy") for cost in found], "pJ"),
        ("--max-average-bits", budget.average_bits, [cost.average_bits for cost in found], "bits"),
    )
    for option, most, reachable, unit in limits:
        least_value = min(reachable, default=math.inf)
        if most < math.inf and least_value > most * (1 + 1e-9):
            nanoseconds = [cost.latency_ns for cost in found if cost.latency_ns is not None]
            more = f" ({min(nanoseconds):g} ns)" if unit == "cycles" and nanoseconds else ""
            raise DoesNotFitError(
                f"{option}: {most:g} {unit} cannot be reached; the least is {least_value:g} {unit}{more} with the "
                "smallest widths allowed; allow at least that, or smaller widths with --weight-bits, --activation-bits "
                "and --input-bits"
            )


def best_within(problem: Problem, stage: Stage, budget: Budget) -> Evaluation:
    """The least loss within a budget.

    Raises:
        DoesNotFitError: No candidate fits.
    """
    stage.start(budget)
    known = _known(problem, budget)
    if not known:
        where = "" if budget.crossbars == math.inf else f"{budget.crossbars:g} crossbars of "
        limits = "" if budget.limits_crossbars_only else " within the limits given"
        raise DoesNotFitError(
            f"no candidate fits {where}chip {problem.chip.name}{limits}; allow more, or use a larger chip"
        )
    region = stage.region(budget, min(known, key=lambda e: e.score.loss))
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


def least(problem: Problem, stage: Stage, goal: Goal) -> Evaluation:
    """The least of the goal's objective within its drop and its limits.

    Bisection over budgets with computed candidates; then the Bayesian stage pushes a little further at a time.
    """
    objective = goal.minimized or "crossbars"
    limits = budget_of(problem, goal)
    best = _first(problem, stage, goal, limits)
    if not _meets(problem, goal, best):
        return best
    low, high = _lowest(problem, stage, limits, best, objective), best.value(objective)
    while _apart(objective, low, high) and not problem.clock.is_over():
        middle = (low + high) // 2 if objective == "crossbars" else math.sqrt(low * high)
        problem.progress(f"allocation to {_words(objective, middle)}", 0, 1)
        found = stage.start(limits.within(objective, middle))
        if found is not None and _meets(problem, goal, found):
            best = min(best, found, key=lambda e: (e.value(objective), e.score.loss))
            high = min(middle, found.value(objective))
        else:
            low = middle + 1 if objective == "crossbars" else middle
    best = _push_further(problem, stage, goal, limits, best)
    # Whatever was judged on the way: the goal asks for the least, not for what led there.
    return _least_known(problem, goal, limits) or best


def _least_known(problem: Problem, goal: Goal, limits: Budget) -> Evaluation | None:
    """The least of the objective, and of the loss there, among candidates that meet the goal; None where none does."""
    objective = goal.minimized or "crossbars"
    trend = Trend(problem.reference, problem.evaluations)
    meeting = trend.meeting(goal, _known(problem, limits))
    return min(meeting, key=lambda e: (e.value(objective), e.score.loss), default=None)


def _first(problem: Problem, stage: Stage, goal: Goal, limits: Budget) -> Evaluation:
    """A candidate that meets the goal, with the least of the objective among those known; else the best there is."""
    if (known := _least_known(problem, goal, limits)) is not None:
        return known
    # No uniform width meets the target: mixed widths on the whole chip may, and lose least in any case.
    counts = [kind.count for kind in problem.chip.crossbars]
    whole = math.inf if None in counts else float(sum(count or 0 for count in counts))
    if whole == math.inf:
        settings = problem.settings
        smallest = settings.bits(len(problem.nodes), settings.weight_bits[0], None).weights
        high = max((e.crossbars for e in problem.evaluations), default=0)
        whole = float(high or problem.packed_crossbars(smallest))
    elif problem.evaluations:
        whole = max(whole, max(e.crossbars for e in problem.evaluations))
    return best_within(problem, stage, limits.within("crossbars", whole))


def _lowest(problem: Problem, stage: Stage, limits: Budget, best: Evaluation, objective: Objective) -> float:
    """No candidate has less of an objective, or hardly any."""
    if objective == "crossbars":
        return float(stage.fewest_crossbars)
    activations = lowest_activations(problem)
    costs = [problem.measure(Bits(weights, activations)) for weights in (*stage.extremes(limits), best.bits.weights)]
    return max(1e-9, min(cost.of(objective) for cost in costs if cost is not None))


def _apart(objective: Objective, low: float, high: float) -> bool:
    return low < high if objective == "crossbars" else low * _RESOLUTION < high


def _words(objective: Objective, value: float) -> str:
    unit = {"crossbars": "crossbars", "latency": "cycles", "energy": "pJ", "edp": "pJ ns"}[objective]
    return f"{value:.0f} {unit}"


def _tighter(objective: Objective, best: Evaluation) -> float:
    """The next smaller value to try."""
    value = best.value(objective)
    return value - max(1, value // 50) if objective == "crossbars" else _PUSH * value


def _push_further(problem: Problem, stage: Stage, goal: Goal, limits: Budget, best: Evaluation) -> Evaluation:
    """Spend the evaluations on budgets below the best one; a budget that is met makes way for a smaller one."""
    objective = goal.minimized or "crossbars"
    left = problem.settings.evaluations
    while left > 0 and not problem.clock.is_over():
        budget = limits.within(objective, _tighter(objective, best))
        start = stage.start(budget) if _tighter(objective, best) > 0 else None
        if start is None:
            break
        region = stage.region(budget, min([*_known(problem, budget), start], key=lambda e: e.score.loss))
        while left > 0 and not _meets(problem, goal, region.incumbent):
            problem.progress("Bayesian search", problem.settings.evaluations - left, problem.settings.evaluations)
            judged = 0 if problem.clock.is_over() else region.step(left)
            left = left - judged if judged else 0
        if not _meets(problem, goal, region.incumbent) or region.incumbent.value(objective) >= best.value(objective):
            break
        best = region.incumbent
    refined = _refine(problem, stage, limits.within(objective, best.value(objective)), best, min(left, _REFINEMENTS))
    if _meets(problem, goal, refined):
        best = refined
    problem.progress("Bayesian search", problem.settings.evaluations, problem.settings.evaluations)
    return best


def _refine(problem: Problem, stage: Stage, budget: Budget, best: Evaluation, evaluations: int) -> Evaluation:
    """Lower the loss at what was reached: what the crossbars have left over gets bits."""
    if not evaluations or problem.clock.is_over():
        return best
    found = [best, stage.start(budget)]
    start = min((e for e in found if e is not None), key=lambda e: e.score.loss)
    region = stage.region(budget, start)
    _spend(problem, region, evaluations, "Bayesian search at what was reached")
    return region.incumbent


def _known(problem: Problem, budget: Budget) -> list[Evaluation]:
    """Candidates within a budget that were judged already."""
    return [e for e in problem.evaluations if budget.allows(e.cost or Cost(e.crossbars))]


def _meets(problem: Problem, goal: Goal, found: Evaluation) -> bool:
    meeting = Trend(problem.reference, problem.evaluations).meeting(goal, problem.evaluations)
    return any(item.bits == found.bits for item in meeting)
