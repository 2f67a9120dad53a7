"""What a run of `optimize` answers: figures, baselines and where the files are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raqu_onnx.encodings import MAX_BITS, MIN_BITS
from raqu_onnx.errors import ModelError
from raqu_onnx.json_values import finite
from raqu_onnx.points import baseline_values, front_values
from raqu_onnx.report import VERSION, Report
from raqu_onnx.search.result import goal_is_met

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.evaluation import Score
    from raqu_onnx.manifest_entries import CostEntry, PartitionEntry
    from raqu_onnx.pipeline import PassTiming
    from raqu_onnx.placement_problem import ExactOutcome
    from raqu_onnx.search import Goal, SearchResult
    from raqu_onnx.search.sensitivity import Sensitivity
    from raqu_onnx.validation import ValidationReport

_MINIMIZED = {
    "crossbars": "fewest crossbars",
    "latency": "least latency",
    "energy": "least energy",
    "edp": "least energy times latency",
}

__all__ = ["DataSummary", "Figures", "OptimizeResult", "describe_goal", "in_memory"]


@dataclass(frozen=True)
class DataSummary:
    """Data that a run used.

    Attributes:
        name: File name, without its folder.
        samples: How many, None for a stream that was not read to its end.
        labels: Whether it has labels.
        synthetic: Whether it is generated.
        fitted: Whether ranges and weights were fitted to it.
    """

    name: str
    samples: int | None
    labels: bool
    synthetic: bool
    fitted: bool = False


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
        selection: Score on the data that widths were chosen on; where widths are fixed and no selection data is given,
            on the calibration data.
        evaluation: Score on data that neither calibration nor search has seen, None without such data.
        cost: Cycles, energy, area and writes, None for float.
    """

    label: str
    weight_bits: float | None
    activation_bits: float | None
    crossbars: int | None
    cell_utilization: float | None
    bit_utilization: float | None
    selection: Score | None
    evaluation: Score | None
    cost: CostEntry | None = None


@dataclass(frozen=True)
class OptimizeResult:
    """Result of a run.

    Attributes:
        output: Folder with the files, None after a dry run.
        figures: Float, baselines and ours.
        search: What was searched and found, None where the pipeline has no search.
        validation: Checks of the written files, None where the pipeline has no check.
        levels: Score of the emitted model on the evaluation data by onnxruntime optimization level.
        lower_bound: Fewest crossbars that could hold the chosen weights, copies included, as the manifest says.
        gap: Allocated cells over their lower bound, less 1, likewise.
        exact: What `--placement exact` proved of the placement, None where it was not asked for.
        unmapped: Nodes that are not on crossbars and why, as (name, type, reason).
        warnings: What a user must know.
        timings: Wall time of every pass.
        bits: Weight and activation bits by node.
        dropped: Kernels with 0 bits, by node, of the nodes that have any.
        replicas: Copies on the chip by node.
        partitions: Parts that are programmed one after the other, one where all is on the chip at once.
        cycles: Cycles of one inference by node, None where its MVMs or input bits are unknown.
        kept: Nodes that kept 8 bits and the pattern that asked for it.
        data: What ranges were measured on, widths were chosen on and the result is reported on, by these roles:
            `calibration`, `selection`, `evaluation`.
        method: Settings of the method that were not the default, as options of the command line.
        unwritten: The emitted model where no folder was given and it fits into a message; see `model` and `proto`.
        lossless_adc_bits: Fewest bits of an ADC that clips with no input, by node.
        picked: The point was named by the user, whatever the goal of the search was.
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
    dropped: Mapping[str, int] = field(default_factory=dict)
    replicas: Mapping[str, int] = field(default_factory=dict)
    partitions: tuple[PartitionEntry, ...] = ()
    cycles: Mapping[str, int | None] = field(default_factory=dict)
    kept: tuple[tuple[str, str], ...] = ()
    gap: float | None = None
    exact: ExactOutcome | None = None
    data: Mapping[str, DataSummary | None] = field(default_factory=dict)
    method: tuple[str, ...] = ()
    unwritten: onnx.ModelProto | None = None
    picked: bool = False

    @property
    def proto(self) -> onnx.ModelProto:
        """The emitted model as a message: for onnxruntime, onnx and whatever else takes one.

        Raises:
            ModelError: Its file is gone, or too large for a message.
        """
        from raqu_onnx.model_io import to_proto

        return to_proto(self.model) if self.unwritten is None else self.unwritten

    @property
    def model(self) -> ir.Model:
        """The emitted model for further onnx_ir passes, read from the folder, or from memory where none was written.

        Raises:
            ModelError: Its file is gone.
        """
        from raqu_onnx.model_io import load_model
        from raqu_onnx.passes.write_manifest import MODEL_FILE

        source = self.unwritten if self.output is None else self.output / MODEL_FILE
        if source is None:
            raise ModelError("the emitted model was neither written nor kept: give `optimize` a folder")
        return load_model(source, check_weights=False)

    lossless_adc_bits: Mapping[str, int] = field(default_factory=dict)

    @property
    def goal_met(self) -> bool | None:
        """Whether the goal is met on the selection data; None without a goal or a search."""
        return None if self.search is None else self.search.goal_met

    @property
    def metric(self) -> str | None:
        """What the goal's points are counted in: `top-1`, `agreement` or `1 - noise/signal`; None without a search."""
        return None if self.search is None else self.search.reference.metric

    @property
    def exit_code(self) -> int:
        """1 when a goal is missed or a check failed, else 0; a point that the user named cannot miss a goal."""
        checked = self.validation is None or self.validation.passed
        return 0 if (self.picked or self.goal_met is not False) and checked else 1

    @property
    def report(self) -> Report:
        """What `report.json` holds."""
        search = self.search
        content = {
            "schema_version": VERSION,
            "goal": vars(search.goal) if search is not None and search.goal else None,
            "goal_met": self.goal_met,
            "metric": self.metric,
            "data": {role: None if item is None else vars(item) for role, item in self.data.items()},
            "figures": [_figures_json(item) for item in self.figures],
            "levels": {name: vars(score) for name, score in self.levels.items()},
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "exact": self.exact,
            "nodes": [] if search is None else list(search.nodes),
            "bits": {name: {"weight": w, "activation": a} for name, (w, a) in self.bits.items()},
            "dropped": dict(self.dropped),
            "replicas": dict(self.replicas),
            "partitions": [item.model_dump() for item in self.partitions],
            "cycles": dict(self.cycles),
            "front": [] if search is None else front_values(search.front),
            **({} if search is None else _search_json(search)),
            "lossless_adc_bits": dict(self.lossless_adc_bits),
            "kept": [{"name": name, "pattern": pattern} for name, pattern in self.kept],
            "unmapped": [{"name": n, "op_type": o, "reason": r} for n, o, r in self.unmapped],
            "checks_passed": None if self.validation is None else self.validation.passed,
            "warnings": list(self.warnings),
        }
        return Report.model_validate(finite(content))

    def to_json(self) -> dict[str, Any]:
        """The report with `output`, the folder, and `seconds` by pass, as JSON values.

        JSON knows no infinity: the SQNR of a result without noise is null.
        """
        return {
            **self.report.model_dump(mode="json"),
            "output": None if self.output is None else str(self.output),
            "seconds": {item.name: round(item.seconds, 3) for item in self.timings},
        }


def in_memory(path: Path) -> onnx.ModelProto | None:
    """An emitted model that no folder keeps; None where it is too large for a message."""
    from raqu_onnx.model_io import LARGEST_PROTO, load_model, to_proto, weight_bytes

    model = load_model(path, check_weights=False)
    return to_proto(model) if weight_bytes(model) <= LARGEST_PROTO else None


def describe_goal(goal: Goal, *, fixed: bool = False, metric: str = "") -> str:
    """A goal in a few words.

    Args:
        goal: The goal.
        fixed: Widths are given, so that nothing is sought.
        metric: What points are counted in, such as `top-1`.
    """
    if not goal:
        return "none: the widths are fixed"
    limits = list(_limits(goal, metric))
    within = f"within {' and '.join(limits)}" if limits else ""
    if fixed:
        return within
    what = "least loss" if goal.minimized is None else _MINIMIZED[goal.minimized]
    return f"{what} {within}".strip()


def _limits(goal: Goal, metric: str) -> Iterator[str]:
    """The limits of a goal, each in a few words."""
    if goal.fit_chip:
        yield "the chip's crossbars"
    if goal.max_crossbars is not None:
        yield "1 crossbar" if goal.max_crossbars == 1 else f"{goal.max_crossbars} crossbars"
    if goal.max_latency_ns is not None:
        yield f"{goal.max_latency_ns:g} ns"
    if goal.max_latency_cycles is not None:
        yield f"{goal.max_latency_cycles} cycles"
    if goal.max_energy_pj is not None:
        yield f"{goal.max_energy_pj:g} pJ"
    if goal.max_average_bits is not None:
        yield f"{goal.max_average_bits:g} bits per weight"
    if goal.max_accuracy_drop is not None:
        drop = goal.max_accuracy_drop
        reference = f"float's {metric}" if metric else "float"
        yield f"{drop:g} {'point' if drop == 1 else 'points'} of {reference}"


def _figures_json(item: Figures) -> dict[str, Any]:
    scores = {"selection": item.selection, "evaluation": item.evaluation}
    return {
        **{key: value for key, value in vars(item).items() if key not in scores},
        **{key: None if value is None else vars(value) for key, value in scores.items()},
    }


def _search_json(search: SearchResult) -> dict[str, Any]:
    """What the search tried, and what it knew of each node."""
    return {
        "evaluations": [
            {
                "crossbars": item.crossbars,
                "loss": item.score.loss,
                "score": vars(item.score),
                "origin": item.origin,
                "met": goal_is_met(search.goal, search.reference, item) if search.goal else None,
                "chosen": item.bits == search.chosen.bits,
            }
            for item in search.evaluations
        ],
        "chosen": search.chosen_number,
        "uniform": [baseline_values(item) for item in search.baselines],
        "best_uniform": None if search.best_uniform is None else search.best_uniform.weight_bits,
        "sensitivity": {} if search.sensitivity is None else _sensitivity_json(search, search.sensitivity),
    }


def _sensitivity_json(search: SearchResult, table: Sensitivity) -> dict[str, Any]:
    searched = table.activations is not None and bool(table.activations.any())
    return {
        name: {
            "weights": _by_width(table.weights[index]),
            "activations": _by_width(table.activations[index]) if searched and table.activations is not None else None,
        }
        for index, name in enumerate(search.nodes)
    }


def _by_width(losses: NDArray[np.float64]) -> dict[int, float]:
    return {width: float(losses[width]) for width in range(MIN_BITS, MAX_BITS + 1)}
