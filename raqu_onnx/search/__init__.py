"""Search for the widths of every node: baselines, sensitivity, integer program, Bayesian trust region."""

from raqu_onnx.search.driver import search
from raqu_onnx.search.problem import Problem, ProgressCallback, no_progress
from raqu_onnx.search.result import (
    Bits,
    Evaluation,
    Goal,
    SearchResult,
    SearchSettings,
    UniformBaseline,
    pareto_front,
    points_below,
)

__all__ = [
    "Bits",
    "Evaluation",
    "Goal",
    "Problem",
    "ProgressCallback",
    "SearchResult",
    "SearchSettings",
    "UniformBaseline",
    "no_progress",
    "pareto_front",
    "points_below",
    "search",
]
