"""The plots of what the search found: the Pareto front, and how it went."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bokeh.models import BasicTicker, ColumnDataSource, HoverTool, Range1d

from raqu_onnx.html.palette import ACCENT, MUTED, OTHERS
from raqu_onnx.html.plot_style import legend_below, new_plot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raqu_onnx.html.content import Point

__all__ = ["cost_plot", "front_plot", "progress_plot"]

_HEIGHT = 360
# Points below float that nobody would give away.
_MOST_POINTS = 5.0


def _point_tips(metric: str) -> list[tuple[str, str]]:
    return [
        ("", "@label"),
        ("crossbars", "@crossbars{0,0}"),
        ("loss", "@loss{0.0000[00]}"),
        (metric, "@quality"),
    ]


def _points(points: Sequence[Point], top: float | None = None) -> ColumnDataSource:
    """The columns of a plot; `shown` is where a point stands that lies above `top`."""
    keys = ("crossbars", "loss", "quality", "points", "label", "order", "latency", "energy")
    columns: dict[str, list[Any]] = {key: [getattr(point, key) for point in points] for key in keys}
    return ColumnDataSource({**columns, "shown": [top] * len(points)})


def front_plot(
    front: Sequence[Point],
    evaluations: Sequence[Point],
    uniform: Sequence[Point],
    chosen: Point | None,
    *,
    y: str,
    label: str,
    metric: str,
) -> Any:
    """Crossbars against what is lost: every candidate, uniform widths, the front and the chosen point.

    Args:
        front: Candidates that no other beats.
        evaluations: All candidates.
        uniform: One width for all layers.
        chosen: The result.
        y: `loss` or `points`.
        label: Of the y axis.
        metric: What quality is counted in.
    """
    everything = [*front, *evaluations, *uniform]
    positive = all((getattr(point, y) or 0) > 0 for point in everything)
    scale = "log" if y == "loss" and positive else "linear"
    plot = new_plot("pan,box_zoom,wheel_zoom,reset", height=_HEIGHT, y_axis_type=scale, x_axis_label="crossbars")
    plot.yaxis.axis_label = label
    if y == "points":
        plot.y_range = _points_range(everything)
    top = plot.y_range.end if y == "points" else None
    layers = []

    def scatter(points: Sequence[Point], text: str, **style: Any) -> None:
        within = [point for point in points if not _beyond(point, top)]
        if within:
            layers.append(plot.scatter("crossbars", y, source=_points(within), legend_label=text, **style))

    scatter(uniform, "one width for all layers, packed", marker="square", size=8, color=OTHERS[0])
    scatter(evaluations, "candidates", size=6, color=MUTED, alpha=0.6)
    if chosen is not None:
        scatter([chosen], "chosen", marker="star", size=24, color=ACCENT)
    if front and y == "loss":
        plot.step("crossbars", y, source=_points(_steps(front)), mode="after", color=OTHERS[1], line_width=2)
    # Over the star, which would hide the points beside the chosen one.
    scatter(front, "Pareto front", size=8, color=OTHERS[1])
    for points, colour in ((evaluations, MUTED), (uniform, OTHERS[0]), (front, OTHERS[1])):
        beyond = [point for point in points if _beyond(point, top)]
        if beyond:
            style = {"marker": "triangle", "size": 9, "color": colour, "legend_label": "beyond the axis"}
            layers.append(plot.scatter("crossbars", "shown", source=_points(beyond, top), **style))
    plot.add_tools(HoverTool(renderers=layers, tooltips=_point_tips(metric)))
    legend_below(plot, 2)
    return plot


def _steps(front: Sequence[Point]) -> list[Point]:
    """The points at which fewer crossbars cost loss.

    Where the goal speaks of latency or accuracy too, the front also holds points that are better in these alone.
    """
    found: list[Point] = []
    for point in sorted(front, key=lambda point: (point.crossbars, math.inf if point.loss is None else point.loss)):
        if point.loss is not None and (not found or point.loss < (found[-1].loss or 0.0)):
            found.append(point)
    return found


def _beyond(point: Point, top: float | None) -> bool:
    return top is not None and point.points is not None and point.points > top


def cost_plot(front: Sequence[Point], *, x: str, label: str, metric: str) -> Any:
    """Latency or energy of the points of the front against the points that they lie below float.

    Args:
        front: Candidates that no other beats.
        x: `latency` or `energy`, which every one of them knows.
        label: Of the x axis.
        metric: What quality is counted in.
    """
    plot = new_plot("pan,box_zoom,wheel_zoom,reset", height=_HEIGHT, x_axis_label=label)
    plot.yaxis.axis_label = "points below float"
    layers = []
    chosen = [point for point in front if point.chosen]
    if chosen:
        star = {"marker": "star", "size": 24, "color": ACCENT, "legend_label": "chosen"}
        layers.append(plot.scatter(x, "points", source=_points(chosen), **star))
    layers.append(
        plot.scatter(x, "points", source=_points(front), size=8, color=OTHERS[1], legend_label="Pareto front")
    )
    plot.add_tools(HoverTool(renderers=layers, tooltips=[*_point_tips(metric), (label, f"@{x}{{0,0.[00]}}")]))
    legend_below(plot, 2)
    return plot


def _points_range(points: Sequence[Point]) -> Range1d:
    """Around the points that somebody might choose: the narrowest widths may lose ten times as much."""
    known = [point.points for point in points if point.points is not None] or [0.0]
    low, high = min(*known, 0.0), min(max(known), max(_MOST_POINTS, 2 * min(known)))
    margin = 0.08 * max(high - low, 0.1)
    return Range1d(start=low - margin, end=high + margin)


def progress_plot(evaluations: Sequence[Point], *, y: str, label: str, metric: str) -> Any:
    """What each candidate gave, in the order in which they were judged.

    Args:
        evaluations: The candidates.
        y: `loss` or `crossbars`.
        label: Of the y axis.
        metric: What quality is counted in.
    """
    values = [getattr(point, y) or 0 for point in evaluations]
    scale = "log" if y == "loss" and min(values) > 0 else "linear"
    plot = new_plot("pan,box_zoom,wheel_zoom,reset", height=_HEIGHT - 80, y_axis_type=scale, x_axis_label="candidate")
    plot.yaxis.axis_label = label
    plot.line("order", y, source=_points(evaluations), color=MUTED, alpha=0.5)
    layers = []
    for met, colour, text in ((True, OTHERS[1], "meets the goal"), (False, MUTED, "does not")):
        chosen = [point for point in evaluations if (point.met is not False) == met and not point.chosen]
        if chosen:
            layers.append(plot.scatter("order", y, source=_points(chosen), size=7, color=colour, legend_label=text))
    best = [point for point in evaluations if point.chosen]
    if best:
        layers.append(
            plot.scatter("order", y, source=_points(best), marker="star", size=18, color=ACCENT, legend_label="chosen")
        )
    plot.add_tools(HoverTool(renderers=layers, tooltips=_point_tips(metric)))
    plot.xaxis.ticker = BasicTicker(min_interval=1)
    legend_below(plot, 3)
    return plot
