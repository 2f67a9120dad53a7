"""Points of a Pareto front as JSON values, and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.front import SearchEntry
from raqu_onnx.json_values import finite
from raqu_onnx.scoring import Score
from raqu_onnx.search.budget import Cost
from raqu_onnx.search.result import Bits, Evaluation, UniformBaseline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raqu_onnx.front import FrontReport, ScoreReport
    from raqu_onnx.report import UniformReport
    from raqu_onnx.search.result import NodeWidth, SearchResult

__all__ = [
    "baseline_values",
    "front_values",
    "read_baseline",
    "read_point",
    "read_score",
    "read_widths",
    "search_entry",
    "widths_text",
]


def widths_text(width: NodeWidth) -> str:
    """Weight bits of a node: one digit for all kernels, or one for each entry of its scale axis."""
    return str(width) if isinstance(width, int) else "".join(map(str, width))


def read_widths(text: str) -> NodeWidth:
    """Inverse of `widths_text`; a single kernel has the width of its node."""
    return int(text) if len(text) == 1 else tuple(map(int, text))


def _point(item: Evaluation, k: int) -> dict[str, Any]:
    """JSON values of one point."""
    cost = item.cost or Cost(item.crossbars)
    found = {
        "k": k,
        "crossbars": item.crossbars,
        "average_bits": None if item.cost is None else cost.average_bits,
        "latency_cycles": cost.latency_cycles,
        "latency_ns": cost.latency_ns,
        "energy_pj": cost.energy_pj,
        "loss": item.score.loss,
        "score": dict(vars(item.score)),
        "weights": [float(np.mean(width)) for width in item.bits.weights],
        "widths": [widths_text(width) for width in item.bits.weights],
        "activations": _listed(item.bits.activations),
        "origin": item.origin,
    }
    values: dict[str, Any] = finite(found)
    return values


def front_values(front: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """JSON values of all points, numbered from 1."""
    return [_point(item, k) for k, item in enumerate(front, 1)]


def search_entry(found: SearchResult) -> SearchEntry:
    """What a manifest holds of a search."""
    goal = dict(vars(found.goal)) if found.goal else None
    values = {"goal": goal, "chosen": found.chosen_number, "front": front_values(found.front)}
    return SearchEntry.model_validate(values)


def baseline_values(item: UniformBaseline) -> dict[str, Any]:
    """JSON values of a uniform width."""
    values: dict[str, Any] = finite(
        {
            "weight_bits": item.weight_bits,
            "activation_bits": item.activation_bits,
            "widths": [widths_text(width) for width in item.bits.weights],
            "activations": _listed(item.bits.activations),
            "unpacked": item.exclusive_crossbars,
            "packed": item.packed_crossbars,
            "loss": item.score.loss,
            "score": dict(vars(item.score)),
        }
    )
    return values


def read_baseline(item: UniformReport) -> UniformBaseline:
    """Inverse of `baseline_values`."""
    return UniformBaseline(
        weight_bits=item.weight_bits,
        activation_bits=item.activation_bits,
        bits=_bits(item.widths, item.activations),
        exclusive_crossbars=item.unpacked,
        packed_crossbars=item.packed,
        score=read_score(item.score),
    )


def _bits(widths: Sequence[str], activations: Sequence[int] | None) -> Bits:
    return Bits(tuple(map(read_widths, widths)), None if activations is None else tuple(activations))


def _listed(activations: tuple[int, ...] | None) -> list[int] | None:
    return None if activations is None else list(activations)


def read_score(item: ScoreReport) -> Score:
    """A score, its infinities back where JSON has null.

    Args:
        item: A score against the float model, as those of every search are.
    """
    kl = math.inf if item.kl is None and item.agreement is not None else item.kl
    sqnr_db = item.sqnr_db
    if sqnr_db is None:
        sqnr_db = -math.inf if kl == math.inf else math.inf
    value = -math.inf if item.value is None and item.measured is not None else item.value
    return Score(item.samples, item.top1, item.agreement, kl, sqnr_db, item.measured, value)


def read_point(item: FrontReport) -> Evaluation:
    """Inverse of what `front_values` makes of a point."""
    cost = (
        None
        if item.average_bits is None
        else Cost(item.crossbars, item.average_bits, item.latency_cycles, item.latency_ns, item.energy_pj)
    )
    return Evaluation(_bits(item.widths, item.activations), item.crossbars, read_score(item.score), item.origin, cost)
