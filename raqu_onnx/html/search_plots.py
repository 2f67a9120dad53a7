"""The plots of what the search found: the Pareto front, and how it went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bokeh.models import BasicTicker, ColumnDataSource, HoverTool, Range1d

from raqu_onnx.html.palette import ACCENT, MUTED, OTHERS
from raqu_onnx.html.plot_style import new_plot, style_legend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raqu_onnx.html.content import Point

__all__ = ["front_plot", "progress_plot"]

_HEIGHT = 320
# Points below float that nobody would give away.
_MOST_POINTS = 5.0


def _point_tips(metric: str) -> list[tuple[str, str]]:
    return [
        ("", "@label"),
        ("crossbars", "@crossbars{0,0}"),
        ("loss", "@loss{0.0000[00]}"),
        (metric, "@quality"),
    ]


def _points(points: Sequence[Point]) -> ColumnDataSource:
    keys = ("crossbars", "loss", "quality", "points", "label", "order")
    return ColumnDataSource({key: [getattr(point, key) for point in points] for key in keys})


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
    layers = []
    if uniform:
        layers.append(
            plot.scatter(
                "crossbars", y, source=_points(uniform), marker="square", size=8, color=OTHERS[0],
                legend_label="one width for all layers, packed",
            )
        )  # fmt: skip
    if evaluations:
        layers.append(
            plot.scatter(
                "crossbars", y, source=_points(evaluations), size=6, color=MUTED, alpha=0.6, legend_label="candidates"
            )
        )
    if front:
        source = _points(front)
        if y == "loss":
            plot.step("crossbars", y, source=source, mode="after", color=OTHERS[1], line_width=2)
        layers.append(plot.scatter("crossbars", y, source=source, size=9, color=OTHERS[1], legend_label="Pareto front"))
    if chosen is not None:
        layers.append(
            plot.scatter(
                "crossbars", y, source=_points([chosen]), marker="star", size=20, color=ACCENT, legend_label="chosen"
            )
        )
    plot.add_tools(HoverTool(renderers=layers, tooltips=_point_tips(metric)))
    style_legend(plot, "top_right")
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
    plot = new_plot("pan,box_zoom,wheel_zoom,reset", height=_HEIGHT - 60, y_axis_type=scale, x_axis_label="candidate")
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
    style_legend(plot, "top_right")
    return plot
