"""What the page tells of layers and candidates, from the manifest and the report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.manifest_view import ManifestView
from raqu_onnx.node_names import printable, short_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from raqu_onnx.manifest import Manifest, NodeEntry
    from raqu_onnx.report import EvaluationReport, FrontReport, Report, ScoreReport

__all__ = ["Layer", "Point", "candidates", "front_points", "layers_of", "quality", "quality_text", "uniform_points"]


@dataclass(frozen=True)
class Layer:
    """A mapped node.

    Attributes:
        node: Its name.
        name: The same, for people: without characters that would turn a line around.
        short: The same, short enough for an axis.
        op_type: Its operator.
        groups: G.
        rows: K, rows of one group's matrix.
        columns: M, kernels of one group.
        runs: Bits along the scale axis, as run lengths.
        kernels_by_bits: How many entries of that axis have how many bits.
        channels: Entries of that axis.
        weights: Weights in all groups.
        mean_bits: Mean bits of these weights.
        activation_bits: Bits of the input, None where it is float.
        crossbars: Crossbars that hold some of it.
        cells: Programmed cells, over all copies.
        copies: Copies on the chip.
        cycles: Cycles of one inference, None where unknown.
        energy_pj: Energy of one inference, likewise.
        lossless_bits: ADC bits at which no sum can clip, None where unknown.
        sensitivity: Loss that it alone adds, by weight bits; empty without a search.
        input_sensitivity: The same by bits of its input; empty where they are fixed.
        kept: Pattern that kept it at 8 bits, empty if none did.
    """

    node: str
    name: str
    short: str
    op_type: str
    groups: int
    rows: int
    columns: int
    runs: tuple[tuple[int, int], ...]
    kernels_by_bits: Mapping[int, int]
    channels: int
    weights: int
    mean_bits: float
    activation_bits: int | None
    crossbars: int
    cells: int
    copies: int
    cycles: int | None
    energy_pj: float | None
    lossless_bits: int | None
    sensitivity: Mapping[int, float]
    input_sensitivity: Mapping[int, float]
    kept: str

    @property
    def kernels(self) -> int:
        """Entries of the scale axis, which each have bits of their own."""
        return self.channels

    @property
    def dropped(self) -> int:
        """Entries with 0 bits."""
        return self.kernels_by_bits.get(0, 0)

    @property
    def bits_range(self) -> str:
        """Smallest and largest bits of a kernel."""
        low, high = min(self.kernels_by_bits), max(self.kernels_by_bits)
        return str(low) if low == high else f"{low} to {high}"

    @property
    def least_bits(self) -> int | None:
        """The smallest width whose effect is known."""
        return min(self.sensitivity, default=None)


def layers_of(manifest: Manifest, report: Report | None) -> list[Layer]:
    """All mapped nodes in the order in which they compute."""
    order = {stage.node: index for index, stage in enumerate(manifest.stages)}
    nodes = sorted(manifest.nodes, key=lambda node: order.get(node.name, len(order)))
    shorts = short_names([printable(node.name) for node in nodes], [node.op_type for node in nodes])
    view = ManifestView(manifest)
    return [_layer(node, short, manifest, view, report) for node, short in zip(nodes, shorts, strict=True)]


def _layer(node: NodeEntry, short: str, manifest: Manifest, view: ManifestView, report: Report | None) -> Layer:
    stage = next((item for item in manifest.stages if item.node == node.name), None)
    counts: Counter[int] = Counter()
    for bits, count in node.bits:
        counts[bits] += count
    sensitivity = None if report is None else report.sensitivity.get(node.name)
    kept = () if report is None else report.kept
    matrix = node.matrix
    return Layer(
        node=node.name,
        name=printable(node.name),
        short=short,
        op_type=node.op_type,
        groups=matrix.groups,
        rows=matrix.rows,
        columns=matrix.kernels,
        runs=node.bits,
        kernels_by_bits=dict(counts),
        channels=counts.total(),
        weights=matrix.groups * matrix.rows * matrix.kernels,
        mean_bits=float(np.mean(view.node(node).bits)),
        activation_bits=None if node.activation is None else node.activation.bits,
        crossbars=len({(item.type, item.crossbar) for item in node.placements}),
        cells=sum((item.rows[1] - item.rows[0]) * (item.columns[1] - item.columns[0]) for item in node.placements),
        copies=len({item.replica for item in node.placements}) or 1,
        cycles=None if stage is None else stage.cycles,
        energy_pj=None if stage is None else stage.energy_pj,
        lossless_bits=None if report is None else report.lossless_adc_bits.get(node.name),
        sensitivity={} if sensitivity is None else sensitivity.weights,
        input_sensitivity={} if sensitivity is None else sensitivity.activations or {},
        kept=next((item.pattern for item in kept if item.name == node.name), ""),
    )


@dataclass(frozen=True)
class Point:
    """A candidate.

    Attributes:
        label: What proposed it.
        crossbars: What it takes.
        loss: What the search minimizes, None where it is infinite.
        quality: How good it is, with its unit.
        points: Hundredths that it lies below the float model, None where that is unknown.
        met: It meets the goal, None without one.
        chosen: It is the result.
        order: Its number among the candidates, from 1; of a point of the front, the number that `--choose` takes.
        latency: Of one inference alone, in us, or in cycles where the chip gives no time; of points of the front only.
        energy: Of one inference in uJ, likewise; None where it is unknown.
    """

    label: str
    crossbars: int
    loss: float | None
    quality: str
    points: float | None
    met: bool | None = None
    chosen: bool = False
    order: int = 0
    latency: float | None = None
    energy: float | None = None


def quality(score: ScoreReport) -> float | None:
    """What counts as quality, as `Score.quality`; None where JSON could not hold it, as an infinite KL divergence."""
    if score.measured is not None:
        return score.value
    for value in (score.top1, score.agreement):
        if value is not None:
            return value
    # An SQNR that JSON could not hold is infinite.
    return 1.0 if score.sqnr_db is None else 1.0 - min(1.0, 10 ** (-score.sqnr_db / 10))


def quality_text(score: ScoreReport | None, metric: str | None) -> str:
    """The same with its unit; the noise in dB where outputs are no class scores."""
    if score is None:
        return "–"
    if metric == "1 - noise/signal":
        return "no noise" if score.sqnr_db is None else f"{score.sqnr_db:.2f} dB"
    if score.measured == "KL":
        return "infinite" if score.value is None else f"{-score.value:.4f} nats"
    value = quality(score)
    if score.measured is not None and score.measured != "agreement" and not score.measured.startswith("top-"):
        return "–" if value is None else f"{value:.5g}"
    return "–" if value is None else f"{100 * value:.2f} %"


def candidates(report: Report) -> list[Point]:
    """Every candidate in the order in which it was judged."""
    return [
        _point(report, item, item.origin, chosen=item.chosen, order=order)
        for order, item in enumerate(report.evaluations, 1)
    ]


def front_points(report: Report) -> list[Point]:
    """Candidates that no other beats in both crossbars and loss; by rising crossbars."""
    return [
        replace(
            _point(
                report,
                item,
                f"point {item.k} of the front: {item.origin}",
                order=item.k,
                chosen=item.k == report.chosen,
            ),
            latency=item.latency_cycles if item.latency_ns is None else item.latency_ns / 1e3,
            energy=None if item.energy_pj is None else item.energy_pj / 1e6,
        )
        for item in report.front
    ]


def uniform_points(report: Report) -> list[Point]:
    """One width for the whole model, packed."""
    return [
        Point(f"all layers {item.weight_bits} bits", item.packed, item.loss, _text(report, item.score),
              _points_below(report, item.score))
        for item in report.uniform
    ]  # fmt: skip


def _point(
    report: Report, item: EvaluationReport | FrontReport, label: str, *, chosen: bool = False, order: int = 0
) -> Point:
    below = _points_below(report, item.score)
    met = getattr(item, "met", None)
    return Point(label, item.crossbars, item.loss, _text(report, item.score), below, met, chosen, order)


def _text(report: Report, score: ScoreReport) -> str:
    return quality_text(score, report.metric)


def _points_below(report: Report, score: ScoreReport) -> float | None:
    reference = next((item.selection for item in report.figures if item.label == "float"), None)
    mine, best = quality(score), None if reference is None else quality(reference)
    return None if mine is None or best is None else 100 * (best - mine)
