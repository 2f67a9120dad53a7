"""Search for the widths of every node: baselines, sensitivity, integer program, Bayesian trust region."""

from raqu_onnx.search.driver import check_room, search
from raqu_onnx.search.problem import Problem, ProgressCallback, no_progress
from raqu_onnx.search.result import (
    Bits,
    Evaluation,
    Goal,
    NodeWidth,
    SearchResult,
    SearchSettings,
    UniformBaseline,
    pareto_front,
    points_below,
)
from raqu_onnx.search.run import SearchRun

__all__ = [
    "Bits",
    "Evaluation",
    "Goal",
    "NodeWidth",
    "Problem",
    "ProgressCallback",
    "SearchResult",
    "SearchRun",
    "SearchSettings",
    "UniformBaseline",
    "check_room",
    "no_progress",
    "pareto_front",
    "points_below",
    "search",
]
