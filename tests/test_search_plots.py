"""The plots of the search: every point is there to be seen, and no legend lies over one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from bokeh.models import Scatter, Step
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.html.content import Layer, Point
from raqu_onnx.html.layer_plots import sensitivity_plot
from raqu_onnx.html.outcome import costs_of_goal, dropped_sentence, fewest_bits_sentence
from raqu_onnx.html.page import _with_code
from raqu_onnx.html.search_plots import cost_plot, front_plot, progress_plot
from raqu_onnx.search.result import Goal

if TYPE_CHECKING:
    from collections.abc import Sequence


def point(points: float, crossbars: int = 4, **more: Any) -> Point:
    return Point("tried", crossbars, 0.001 + points / 100, f"{90 - points:.2f} %", points, **more)


def heights(plot: Any, y: str) -> dict[str, list[float]]:
    """Where the points of each entry of the legend stand."""
    found: dict[str, list[float]] = {}
    for renderer in plot.renderers:
        if isinstance(renderer.glyph, Scatter):
            [label] = [
                item.label.value for item in plot.legend[0].items if any(one is renderer for one in item.renderers)
            ]
            assert str(renderer.glyph.y) in (y, "shown")
            found.setdefault(label, []).extend(renderer.data_source.data[str(renderer.glyph.y)])
    return found


LOSSES = st.lists(st.floats(-1, 90), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(LOSSES, LOSSES, LOSSES)
def test_every_point_stands_within_the_axis(front: list[float], tried: list[float], uniform: list[float]) -> None:
    first, second, third = ([point(value) for value in values] for values in (front, tried, uniform))
    plot = front_plot(first, second, third, first[0], y="points", label="points below float", metric="accuracy")
    shown = heights(plot, "points")
    low, high = plot.y_range.start, plot.y_range.end
    assert all(low <= value <= high for values in shown.values() for value in values)
    # Each candidate has one mark, and what lies above the axis another one.
    beyond = shown.get("beyond the axis", [])
    assert beyond == [high] * sum(value > high for value in [*front, *tried, *uniform])
    within = sorted(
        value for name, values in shown.items() if name not in ("beyond the axis", "chosen") for value in values
    )
    assert within == sorted(value for value in [*front, *tried, *uniform] if value <= high)


def test_the_front_is_drawn_over_the_chosen_star() -> None:
    front = [point(1, 4, order=1), point(1.1, 4, order=2)]
    plot = front_plot(front, front, [], front[0], y="loss", label="loss", metric="accuracy")
    markers = [item.glyph.marker for item in plot.renderers if isinstance(item.glyph, Scatter)]
    assert markers.index("star") < len(markers) - 1
    assert markers[-1] == "circle"


def test_the_line_of_the_front_never_rises() -> None:
    # The third has fewer points lost, the fourth is faster: neither loses less.
    losses = [(4, 0.5), (4, 0.6), (5, 0.7), (6, 0.3), (8, 0.3), (9, 0.1), (9, None)]
    front = [Point("tried", crossbars, loss, "", 1.0) for crossbars, loss in losses]
    plot = front_plot(front, front, [], None, y="loss", label="loss", metric="accuracy")
    [line] = [item for item in plot.renderers if isinstance(item.glyph, Step)]
    assert line.data_source.data["crossbars"] == [4, 6, 9]
    assert line.data_source.data["loss"] == [0.5, 0.3, 0.1]


def front_of(goal: Goal, energy_pj: float | None = 5e6) -> tuple[Any, list[Point]]:
    items = [SimpleNamespace(latency_ns=3000.0 * k, energy_pj=energy_pj) for k in (1, 2)]
    values = SimpleNamespace(model_dump=lambda: vars(goal))
    points = [point(k, latency=3.0 * k, energy=energy_pj, order=k, chosen=k == 1) for k in (1, 2)]
    return SimpleNamespace(goal=values, front=items), points


def test_what_the_goal_speaks_of_has_a_plot() -> None:
    drop = Goal(max_accuracy_drop=1.0)
    assert list(costs_of_goal(*front_of(drop))) == []
    for goal, names in (
        (replace(drop, objective="latency"), ["latency"]),
        (Goal(None, None, max_energy_pj=1.0), ["energy"]),
        (replace(drop, objective="edp"), ["latency", "energy"]),
    ):
        report, points = front_of(goal)
        found = dict(costs_of_goal(report, points))
        assert list(found) == names
        for name, label in found.items():
            plot = cost_plot(points, x=name, label=label, metric="accuracy")
            assert heights(plot, "points") == {"chosen": [1], "Pareto front": [1, 2]}
            assert plot.renderers[-1].data_source.data[name] == [getattr(item, name) for item in points]
    assert list(costs_of_goal(*front_of(replace(drop, objective="edp"), energy_pj=None))) == [
        ("latency", "latency, µs")
    ]


def test_no_legend_lies_over_a_plot() -> None:
    tried: Sequence[Point] = [point(1, order=1, met=True), point(2, order=2, met=False, chosen=True)]
    plots = [front_plot(tried, tried, tried, tried[0], y=y, label=y, metric="accuracy") for y in ("loss", "points")]
    for plot in [*plots, progress_plot(tried, y="loss", label="loss", metric="accuracy")]:
        assert plot.legend[0] in plot.below
        assert plot.legend[0] not in plot.center


# ------------------------------------------------------------------------------------------------------ the sentences


def layer(name: str, mean: float, kernels: dict[int, int], loss: float, weights: int = 100) -> Layer:
    channels = sum(kernels.values())
    return cast(
        "Layer",
        SimpleNamespace(
            name=name, mean_bits=mean, weights=weights, kernels_by_bits=kernels, kernels=channels,
            dropped=kernels.get(0, 0), least_bits=2, sensitivity={2: loss},
        ),
    )  # fmt: skip


def test_the_fewest_bits_are_told_with_their_reason() -> None:
    wide = layer("wide", 6.0, {6: 8}, 0.5)
    assert fewest_bits_sentence([wide, layer("flat", 3.0, {3: 8}, 0.25)]) == (
        "Fewest bits: flat, 3 per weight. It holds 50.0% of all weights, and giving 2 bits to it alone adds 0.25 to "
        "the loss: the smallest of 2 layers (the median is 0.38)."
    )
    cut = layer("cut", 1.0, {0: 6, 3: 1, 5: 1}, 0.75, 300)
    said = fewest_bits_sentence([wide, cut])
    assert said.startswith(
        "Fewest bits: cut, 1 per weight, since 6 of its 8 kernels are dropped (0 bits); the others have 3 to 5. "
        "It holds 75.0%"
    )
    assert "the 2nd smallest of 2 layers" in said
    assert "since 7 of its 8 kernels are dropped (0 bits); the others have 4. It" in fewest_bits_sentence(
        [wide, layer("one", 0.5, {0: 7, 4: 1}, 0.1)]
    )
    assert "since all its kernels are dropped. It" in fewest_bits_sentence([wide, layer("none", 0.0, {0: 8}, 0.1)])
    assert dropped_sentence([wide]) == ""
    assert "make up for them" in dropped_sentence([wide, cut])


def test_what_stands_between_backticks_is_code_and_nothing_else_is_markup() -> None:
    assert _with_code("`a <b>` or ``") == "<code>a &lt;b&gt;</code> or ``"
    assert _with_code("a <b> & `c`") == "a &lt;b&gt; &amp; <code>c</code>"
    assert _with_code("one ` alone <i>") == "one ` alone &lt;i&gt;"
    assert _with_code("with --reduce-range, or a--b") == "with <code>--reduce-range</code>, or a--b"
    assert "\u202e" not in _with_code("`turned \u202e round`")


def test_sensitivities_of_inputs_have_a_plot_of_their_own() -> None:
    layers = [layer("first", 4.0, {4: 8}, 0.5), layer("second", 4.0, {4: 8}, 0.0)]
    for item, losses in zip(layers, ({2: 0.25, 8: 0.0}, {2: 0.125, 8: 0.0}), strict=True):
        vars(item).update(input_sensitivity=losses, short=item.name)
    plot = sensitivity_plot(layers, of_inputs=True)
    assert plot is not None
    assert plot.renderers[0].data_source.data["loss"] == [0.25, 0.0, 0.125, 0.0]
    assert plot.xaxis.axis_label == "bits of the input of this layer alone"
    weights = sensitivity_plot(layers)
    assert weights is not None
    assert weights.renderers[0].data_source.data["loss"] == [0.5, 0.0]
    for item in layers:
        vars(item).update(input_sensitivity={})
    assert sensitivity_plot(layers, of_inputs=True) is None
