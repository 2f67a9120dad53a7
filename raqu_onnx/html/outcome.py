"""The outcome in the words and figures that stand at the top of the page."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from raqu_onnx.html.content import quality_text
from raqu_onnx.results import describe_goal
from raqu_onnx.scoring import KL, NOISE
from raqu_onnx.search.result import Goal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from raqu_onnx.front import ScoreReport
    from raqu_onnx.html.content import Layer, Point
    from raqu_onnx.manifest import CostEntry, Manifest
    from raqu_onnx.report import FiguresReport, Report

__all__ = [
    "Card",
    "Row",
    "adc_sentence",
    "cards",
    "costs_of_goal",
    "data_sentence",
    "dropped_sentence",
    "evaluation_metric",
    "fewest_bits_sentence",
    "goal_sentence",
    "loss_sentence",
    "rows",
]

_METRIC_WORDS = {
    "top-1": "accuracy",
    "agreement": "agreement with the float model",
    "1 - noise/signal": "signal to noise",
}


@dataclass(frozen=True)
class Card:
    """One figure that stands out.

    Attributes:
        title: What it is.
        value: The figure.
        note: What it compares with.
    """

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Row:
    """One line of the table of results; empty where something does not apply.

    Attributes:
        label: Float, a baseline or ours.
        ours: It is the result.
        weight_bits: Mean bits.
        activation_bits: Mean bits.
        crossbars: How many.
        share: Crossbars as a share of the largest number in the table, from 0 to 1.
        cells: Cell utilization.
        bits: Bit utilization.
        evaluation: Quality on unseen data.
        selection: Quality on the data that widths were chosen on.
        latency: Of one inference.
        interval: Between inferences.
        energy: Of one inference.
        area: Of the crossbars.
    """

    label: str
    ours: bool
    weight_bits: str
    activation_bits: str
    crossbars: str
    share: float
    cells: str
    bits: str
    evaluation: str
    selection: str
    latency: str
    interval: str
    energy: str
    area: str


def rows(report: Report) -> list[Row]:
    """The table of results, float first and ours last."""
    most = max((item.crossbars or 0 for item in report.figures), default=0) or 1
    return [_row(item, most, last=item is report.figures[-1]) for item in report.figures]


def _row(item: FiguresReport, most: int, *, last: bool) -> Row:
    cost = item.cost
    return Row(
        label=item.label,
        ours=last and item.label != "float",
        weight_bits=_number(item.weight_bits, ".3g"),
        activation_bits=_number(item.activation_bits, ".3g"),
        crossbars="" if item.crossbars is None else f"{item.crossbars:,}",
        share=(item.crossbars or 0) / most,
        cells=_number(item.cell_utilization, ".1%"),
        bits=_number(item.bit_utilization, ".1%"),
        evaluation="" if item.evaluation is None else quality_text(item.evaluation, _told(item.evaluation)),
        selection="" if item.selection is None else quality_text(item.selection, _told(item.selection)),
        latency="" if cost is None else _time(cost, cost.latency_cycles),
        interval="" if cost is None else _time(cost, cost.interval_cycles),
        energy="" if cost is None or cost.energy_pj is None else f"{cost.energy_pj / 1e6:,.4g} µJ",
        area="" if cost is None or cost.area_um2 is None else f"{cost.area_um2 / 1e6:,.4g} mm²",
    )


def evaluation_metric(report: Report) -> str:
    """What the figures on unseen data are, where it is not what those on the selection data are; else empty.

    Data without labels has agreements only.
    """
    judged = next((item.evaluation for item in report.figures if item.evaluation is not None), None)
    chosen = next((item.selection for item in report.figures if item.selection is not None), None)
    if judged is None or chosen is None:
        return ""
    names = [_told(score) for score in (judged, chosen)]
    return "" if names[0] == names[1] else _METRIC_WORDS.get(names[0], names[0])


def _told(score: ScoreReport) -> str:
    """What a score is counted in, as `Score.metric`: what was named, else the best that the data has labels for."""
    if score.measured is not None:
        return score.measured
    return "top-1" if score.top1 is not None else "agreement" if score.agreement is not None else "1 - noise/signal"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _time(cost: CostEntry, cycles: int | None) -> str:
    """Cycles, and the time that they take where the chip tells the length of one."""
    if cycles is None:
        return ""
    if cost.cycle_ns is None:
        return f"{cycles:,} cycles"
    nanoseconds = cycles * cost.cycle_ns
    return f"{nanoseconds / 1e6:,.4g} ms" if nanoseconds >= 1e6 else f"{nanoseconds / 1e3:,.4g} µs"


def cards(report: Report, manifest: Manifest) -> Iterator[Card]:
    """The figures that stand out: crossbars, quality, utilization, bits, latency and energy where they are known."""
    table = rows(report)
    ours = table[-1] if table and table[-1].ours else None
    if ours is None:
        total = sum(kind.allocated for kind in manifest.totals.crossbars)
        yield Card("crossbars", f"{total:,}", f"at least {manifest.totals.lower_bound:,} by any placement")
        return
    yield Card("crossbars", ours.crossbars, _against(table[1:-1]))
    score = report.figures[-1].evaluation or report.figures[-1].selection
    if score is not None:
        floating = table[0].evaluation or table[0].selection
        metric = _told(score)
        name = _METRIC_WORDS.get(metric, metric)
        yield Card(name, ours.evaluation or ours.selection, f"float {floating}" if floating else "")
    yield Card("cells in use", ours.cells, f"{ours.bits} of their bits")
    yield Card("bits per weight", ours.weight_bits, f"{ours.activation_bits or 'float'} per activation")
    if ours.latency:
        yield Card("latency", ours.latency, f"next inference after {ours.interval}" if ours.interval else "")
    if ours.energy:
        yield Card("energy", ours.energy, "of one inference, in arrays and converters")


def _against(baselines: Sequence[Row]) -> str:
    packed = [row for row in baselines if row.label.endswith(", packed")]
    return " · ".join(f"{row.crossbars} {row.label.removesuffix(', packed')}, packed" for row in reversed(packed))


def goal_sentence(report: Report) -> str:
    """What was asked for, and what was reached on which data."""
    if report.goal is None:
        return "Widths were given, and nothing was asked for."
    goal = Goal(**report.goal.model_dump())
    return f"Asked for: {describe_goal(goal, metric=report.metric or '')}."


def costs_of_goal(report: Report, front: Sequence[Point]) -> Iterator[tuple[str, str]]:
    """What the goal speaks of besides crossbars and every point of the front knows, with the unit that it is in."""
    if report.goal is None or len(front) < 2:
        return
    speaks_of = Goal(**report.goal.model_dump()).speaks_of
    timed = all(item.latency_ns is not None for item in report.front)
    labels = {"latency": f"latency, {'µs' if timed else 'cycles'}", "energy": "energy, µJ"}
    for name, label in labels.items():
        if {name, "edp"} & speaks_of and all(getattr(point, name) is not None for point in front):
            yield name, label


def data_sentence(report: Report) -> str:
    """What the figures were measured on."""
    parts = []
    words = {
        "calibration": "ranges were measured on",
        # At fixed widths, nothing was chosen.
        "selection": "widths were chosen on" if len(report.evaluations) > 1 else "figures are of",
        "evaluation": "the result was judged on",
    }
    for role, does in words.items():
        item = report.data.get(role)  # type: ignore[call-overload]
        if item is not None:
            count = "" if item.samples is None else f" ({item.samples:,} samples)"
            parts.append(f"{does} {'generated inputs' if item.synthetic else item.name}{count}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def loss_sentence(report: Report) -> str:
    """What the search minimizes, in words: see `Score.loss`; empty where no candidate was judged."""
    if not report.evaluations:
        return ""
    score = report.evaluations[0].score
    # A divergence that JSON could not hold is infinite, but there are class scores, and so there is an agreement.
    noise = score.agreement is None or score.measured == NOISE
    basis = "power of the noise over that of the signal" if noise else "KL divergence from the float model's outputs"
    return f"The loss that is minimized is the {basis}{_counted(score)}."


def _counted(score: ScoreReport) -> str:
    """What a metric that was named adds to the loss."""
    named = score.measured
    if named is None or named in (KL, NOISE):
        return ""
    words = {"top-1": "the share of wrong answers", "agreement": "the share of answers that are not the float model's"}
    return f" plus a tenth of {words.get(named, f'what {named} lacks to 1')}"


def fewest_bits_sentence(layers: Sequence[Layer]) -> str:
    """Which layer got the fewest bits, and what made it cheap."""
    if len(layers) < 2 or len({layer.mean_bits for layer in layers}) == 1:
        return ""
    least = min(layers, key=lambda layer: layer.mean_bits)
    share = least.weights / sum(layer.weights for layer in layers)
    text = f"Fewest bits: {least.name}, {least.mean_bits:.3g} per weight{_dropped(least)}. "
    text += f"It holds {share:.1%} of all weights"
    width = least.least_bits
    ranked = sorted(layer.sensitivity[width] for layer in layers if width is not None and width in layer.sensitivity)
    if width is None or not ranked:
        return f"{text}."
    loss = least.sensitivity[width]
    place = 1 + sum(other < loss for other in ranked)
    return (
        f"{text}, and giving {width} bits to it alone adds {loss:.2g} to the loss: "
        f"{_ordinal(place)} smallest of {len(ranked)} layers (the median is {median(ranked):.2g})."
    )


def _dropped(layer: Layer) -> str:
    """How many kernels have 0 bits, which lowers the mean, and what is left to the others."""
    others = sorted(bits for bits in layer.kernels_by_bits if bits)
    if not layer.dropped or not others:
        return ", since all its kernels are dropped" if layer.dropped else ""
    span = f"{others[0]}" if len(others) == 1 else f"{others[0]} to {others[-1]}"
    return f", since {layer.dropped} of its {layer.kernels} kernels are dropped (0 bits); the others have {span}"


def dropped_sentence(layers: Sequence[Layer]) -> str:
    """What dropping is, where any kernel was."""
    if not any(layer.dropped for layer in layers):
        return ""
    return (
        "Dropped are the kernels that carry least for the cells that they take: they and the rows that they alone feed "
        "in the next layer are stored nowhere, and the layers that follow make up for them as far as they can."
    )


def _ordinal(number: int) -> str:
    if number == 1:
        return "the"
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"the {number}{ending}"


def adc_sentence(layers: Sequence[Layer], chip_bits: int | None) -> str:
    """Whether the chip's converters may clip."""
    known = [layer.lossless_bits for layer in layers if layer.lossless_bits is not None]
    if not known:
        return "It is not known which resolution would be lossless: inputs are float, or the report is an old one."
    if chip_bits is None:
        return (
            f"The chip file gives its ADCs no resolution, so that they count as ideal and nothing clips. Converters of "
            f"{max(known)} bits would be lossless on any input."
        )
    short = sum(bits > chip_bits for bits in known)
    if not short:
        return f"The chip's ADCs of {chip_bits} bits clip with no input at all."
    return (
        f"The chip's ADCs have {chip_bits} bits; {short} of {len(known)} layers could need more, up to {max(known)}. "
        f"Whether real inputs get there, `raqu-onnx simulate` counts; the accuracy above takes converters to be ideal."
    )
