"""What a run of `optimize` answers: figures, baselines and where the files are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from raqu_onnx.evaluation import Score
    from raqu_onnx.pipeline import PassTiming
    from raqu_onnx.search import SearchResult
    from raqu_onnx.validation import ValidationReport

__all__ = ["Figures", "OptimizeResult"]

JSON_VERSION = 1


@dataclass(frozen=True)
class Figures:
    """One line of the table of results.

    Attributes:
        label: What it is.
        weight_bits: Mean bits per weight, None for float.
        activation_bits: Mean bits of activations per node, None for float.
        crossbars: Crossbars allocated, None for float.
        cell_utilization: Programmed cells over allocated cells.
        bit_utilization: Weight bits over bits of allocated cells.
        selection: Score on the data that widths were chosen on.
        evaluation: Score on data that neither calibration nor search has seen, None without such data.
    """

    label: str
    weight_bits: float | None
    activation_bits: float | None
    crossbars: int | None
    cell_utilization: float | None
    bit_utilization: float | None
    selection: Score | None
    evaluation: Score | None


@dataclass(frozen=True)
class OptimizeResult:
    """Result of a run.

    Attributes:
        output: Folder with the files, None after a dry run.
        figures: Float, baselines and ours.
        search: What was searched and found, None where the pipeline has no search.
        validation: Checks of the written files, None where the pipeline has no check.
        levels: Score of the emitted model on the evaluation data by onnxruntime optimization level.
        lower_bound: Fewest crossbars that could hold the chosen weights.
        unmapped: Nodes left in float and why, as (name, type, reason).
        warnings: What a user must know.
        timings: Wall time of every pass.
        bits: Weight and activation bits by node.
    """

    output: Path | None
    figures: tuple[Figures, ...]
    search: SearchResult | None
    validation: ValidationReport | None
    levels: dict[str, Score]
    lower_bound: int | None
    unmapped: tuple[tuple[str, str, str], ...]
    warnings: tuple[str, ...]
    timings: tuple[PassTiming, ...]
    bits: dict[str, tuple[float, int | None]]

    @property
    def exit_code(self) -> int:
        """0 when the goal is met and every check passed, else 1."""
        goal_met = self.search is None or self.search.goal_met
        checked = self.validation is None or self.validation.passed
        return 0 if goal_met and checked else 1

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values; `schema_version` changes when a key changes its meaning.

        JSON knows no infinity: the SQNR of a result without noise is null.
        """
        content = {
            "schema_version": JSON_VERSION,
            "output": None if self.output is None else str(self.output),
            "goal": None if self.search is None else vars(self.search.goal),
            "goal_met": None if self.search is None else self.search.goal_met,
            "figures": [_figures_json(item) for item in self.figures],
            "levels": {name: vars(score) for name, score in self.levels.items()},
            "lower_bound": self.lower_bound,
            "bits": {name: {"weight": w, "activation": a} for name, (w, a) in self.bits.items()},
            "front": [] if self.search is None else [_front_json(item) for item in self.search.front],
            "unmapped": [{"name": n, "op_type": o, "reason": r} for n, o, r in self.unmapped],
            "checks_passed": None if self.validation is None else self.validation.passed,
            "warnings": list(self.warnings),
            "seconds": {item.name: round(item.seconds, 3) for item in self.timings},
        }
        return {key: _finite(value) for key, value in content.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figures_json(item: Figures) -> dict[str, Any]:
    scores = {"selection": item.selection, "evaluation": item.evaluation}
    return {
        **{key: value for key, value in vars(item).items() if key not in scores},
        **{key: None if value is None else vars(value) for key, value in scores.items()},
    }


def _front_json(item: Any) -> dict[str, Any]:
    return {
        "crossbars": item.crossbars,
        "loss": item.score.loss,
        "score": vars(item.score),
        "weights": list(item.bits.weights),
        "activations": None if item.bits.activations is None else list(item.bits.activations),
        "origin": item.origin,
    }
