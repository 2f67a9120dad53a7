"""`report.json`: the figures of a run in a typed form, from which its JSON Schema is generated.

What `optimize --format json` prints is the same with two keys more, `output` and `seconds`, which differ from run to
run where the report must not.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raqu_onnx.front import FrontReport, GoalReport, ScoreReport
from raqu_onnx.manifest_entries import CostEntry
from raqu_onnx.placement_problem import ExactOutcome

__all__ = [
    "VERSION",
    "DataReport",
    "EvaluationReport",
    "FiguresReport",
    "FrontReport",
    "GoalReport",
    "KeptReport",
    "PartitionReport",
    "Report",
    "ScoreReport",
    "SensitivityReport",
    "UniformReport",
    "UnmappedReport",
    "WidthsReport",
    "report_schema",
]

VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataReport(_Part):
    """Data that a run used."""

    name: str = Field(description="file name, without its folder")
    samples: int | None = Field(description="samples, null for a stream that was not read to its end")
    labels: bool = Field(description="it has labels")
    synthetic: bool = Field(description="it is generated, not real")
    fitted: bool = Field(description="ranges and weights were fitted to it, so that scores on it are too good")


class FiguresReport(_Part):
    """One line of the table of results."""

    label: str = Field(description="`float`, a baseline, or `ours`")
    weight_bits: float | None = Field(description="mean bits per weight, null for float")
    activation_bits: float | None = Field(description="mean bits of the inputs of mapped nodes, null for float")
    crossbars: int | None = Field(description="crossbars allocated, null for float")
    cell_utilization: float | None = Field(description="programmed weight cells over cells of allocated crossbars")
    bit_utilization: float | None = Field(description="weight bits over bits of the cells of allocated crossbars")
    selection: ScoreReport | None = Field(
        description="score on the data that widths were chosen on; where widths are fixed and no selection data is "
        "given, on the calibration data"
    )
    evaluation: ScoreReport | None = Field(
        description="score on data that neither calibration nor search has seen, null without such data"
    )
    cost: CostEntry | None = Field(description="cycles, energy, area and writes, null for float")


class WidthsReport(_Part):
    """Bits of one mapped node."""

    weight: float = Field(description="mean bits per kernel")
    activation: int | None = Field(description="bits of its input, null where that stays in float")


class EvaluationReport(_Part):
    """A candidate that was judged on the whole selection data."""

    crossbars: int
    loss: float | None = Field(description="what the search minimizes, as in `front`")
    score: ScoreReport = Field(description="on the selection data")
    origin: str = Field(description="what proposed it")
    met: bool | None = Field(None, description="it meets the goal, null without one")
    chosen: bool = Field(description="it is the result")


class UniformReport(_Part):
    """One width for the whole model, but for nodes that are kept at 8 bits."""

    weight_bits: int = Field(description="the width")
    activation_bits: int | None = Field(description="null for float")
    unpacked: int = Field(description="crossbars with one node in each, whatever the chip has")
    packed: int = Field(description="crossbars packed as the chip allows, whatever it has")
    widths: list[str] = Field(description="weight bits by node, as in `front`")
    activations: list[int] | None = Field(description="activation bits by node, null for float")
    loss: float | None = Field(description="as in `front`")
    score: ScoreReport = Field(description="on the selection data")


class SensitivityReport(_Part):
    """What a mapped node alone adds to the loss on some selection samples, all others at their widest."""

    weights: dict[int, float] = Field(
        description="by weight bits; never falls as bits get fewer, and a width that saves nothing on the chip, which "
        "is not measured, has the loss of the next wider one"
    )
    activations: dict[int, float] | None = Field(description="by activation bits, likewise; null where they are fixed")


class UnmappedReport(_Part):
    """A node of a type that crossbars compute and that stays as it is: in float, or as another tool quantized it."""

    name: str
    op_type: str
    reason: str


class KeptReport(_Part):
    """A node that kept 8 bits."""

    name: str
    pattern: str = Field(description="the pattern of `keep` that asked for it")


class PartitionReport(_Part):
    """Nodes that are on the chip together."""

    nodes: list[str] = Field(description="in the order of execution")
    crossbars: list[tuple[int, int]] = Field(description="half-open range of the manifest's crossbar numbers, by type")
    latency_cycles: int | None = Field(description="one inference alone, through these nodes")
    interval_cycles: int | None = Field(description="from one inference to the next, through these nodes")
    write_cells: int = Field(description="cells that are programmed")
    write_rows: int = Field(description="wordlines to program in the crossbar that has most of them")
    write_ns: float | None = Field(description="time for it, null where the chip gives no figure")
    write_energy_pj: float | None = Field(description="energy for it, null likewise")


class Report(_Part):
    """What a run of `raqu-onnx optimize` gave."""

    schema_version: Literal[1] = Field(description="changes when a key changes its meaning")
    goal: GoalReport | None = Field(description="null where widths are fixed and nothing was asked for")
    goal_met: bool | None = Field(description="whether the goal is met on the selection data, null without one")
    metric: str | None = Field(
        description="`top-1`, `agreement`, `1 - noise/signal` or the metric that was named: what points are counted in "
        "on the selection data, null without a search"
    )
    data: dict[Literal["calibration", "selection", "evaluation"], DataReport | None] = Field(
        description="what ranges were measured on, widths were chosen on, and the result is reported on"
    )
    figures: list[FiguresReport] = Field(
        description="float first, then baselines, ours last; with copies of nodes, ours with one copy of each before it"
    )
    levels: dict[str, ScoreReport] = Field(
        description="score of the emitted model on the evaluation data by onnxruntime optimization level"
    )
    lower_bound: int | None = Field(
        description="fewest crossbars that any placement of these bits could use, copies of nodes included"
    )
    gap: float | None = Field(
        description="allocated cells over the fewest that any placement of these bits could take, less 1; copies of "
        "nodes included"
    )
    exact: ExactOutcome | None = Field(
        None, description="what `--placement exact` proved of the placement, null where it was not asked for"
    )
    nodes: list[str] = Field(description="names of the mapped nodes in graph order, empty without a search")
    bits: dict[str, WidthsReport] = Field(description="by mapped node")
    dropped: dict[str, int] = Field(description="kernels with 0 bits by mapped node, of the nodes that have any")
    replicas: dict[str, int] = Field(description="copies on the chip by mapped node")
    partitions: list[PartitionReport] = Field(
        description="parts that are programmed one after the other, one where all is on the chip at once"
    )
    cycles: dict[str, int | None] = Field(
        description="cycles of one inference by mapped node, null where its MVMs or input bits are unknown"
    )
    front: list[FrontReport] = Field(description="by rising crossbars")
    chosen: int | None = Field(None, description="`k` of the point of the front that was written")
    evaluations: list[EvaluationReport] = Field(
        [], description="every candidate that can be placed, in the order in which it was judged"
    )
    uniform: list[UniformReport] = Field([], description="one width for the whole model, by falling width")
    best_uniform: int | None = Field(
        None, description="width of the one of `uniform` that serves the same goal best, null where none does"
    )
    sensitivity: dict[str, SensitivityReport] = Field({}, description="by mapped node, empty without a search")
    lossless_adc_bits: dict[str, int] = Field(
        {},
        description="by mapped node, fewest bits of an ADC that clips with no input at all, from the cells as stored",
    )
    kept: list[KeptReport]
    unmapped: list[UnmappedReport]
    checks_passed: bool | None = Field(description="whether every check of the written files passed, null without any")
    warnings: list[str] = Field(description="what a user must know")


def report_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of `report.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema()}
