"""The floor plan as a plot on a canvas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh.models import BoxZoomTool, ColumnDataSource, HoverTool, LinearColorMapper

from raqu_onnx.html.palette import UNUSED, layer_colours
from raqu_onnx.html.plot_style import bits_colours, new_plot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from raqu_onnx.html.content import Layer
    from raqu_onnx.html.floor_plan import FloorPlan

__all__ = ["floor_plot"]

# Rectangles up to which lines between them can be seen.
_MOST_LINES = 3_000
# Columns of a source by the edge of a rectangle that they hold, in the order in which plans hold edges.
_EDGES = {"left": "left", "top": "top", "right": "right", "bottom": "bottom"}


def floor_plot(plan: FloorPlan, layers: Sequence[Layer], type_names: Sequence[str]) -> Any:
    """The crossbars to scale; two renderers, `by-layer` and `by-bits`, of which the page shows one."""
    width, height = plan.size
    plot = new_plot("pan,wheel_zoom,reset", aspect_ratio=width / height, match_aspect=True, lod_threshold=None)
    plot.y_range.flipped = True
    plot.axis.visible = False
    plot.grid.visible = False
    plot.min_border = 2
    plot.x_range.range_padding = plot.y_range.range_padding = 0.01
    plot.quad(**_EDGES, fill_color=UNUSED, line_color=None, source=_corners_source(plan.crossbars))
    source = ColumnDataSource(_block_columns(plan, layers, type_names))
    lines = {"line_color": "#ffffff", "line_width": 0.5, "line_alpha": 0.6}
    style = lines if len(plan.blocks) <= _MOST_LINES else {"line_color": None}
    colours = LinearColorMapper(palette=layer_colours(len(layers)) or ["#888888"], low=-0.5, high=len(layers) - 0.5)
    by_layer = plot.quad(
        **_EDGES, fill_color={"field": "layer", "transform": colours}, source=source, **style,
        name="by-layer",
    )  # fmt: skip
    by_bits = plot.quad(
        **_EDGES, fill_color={"field": "bits", "transform": bits_colours()}, source=source, **style,
        name="by-bits", visible=False,
    )  # fmt: skip
    tips = [
        ("", "@name"),
        ("crossbar", "@kind @array"),
        ("output channels", "@kernels"),
        ("bits", "@bits{0.[00]}"),
        ("cells per weight", "@slices side by side"),
        ("weight rows", "@first_row to @last_row of @all_rows"),
        ("wordlines", "@top_line to @bottom_line"),
        ("bitlines", "@left_line to @right_line"),
    ]
    if plan.copies.size and int(plan.copies.max()):
        tips.append(("copy", "@copy"))
    plot.add_tools(HoverTool(renderers=[by_layer, by_bits], tooltips=tips))
    # The page switches it on where there is a mouse; a finger that meets the plan must still scroll the page.
    plot.add_tools(BoxZoomTool(match_aspect=True, name="enlarge"))
    plot.toolbar.autohide = False
    return plot


def _corners_source(boxes: NDArray[np.float32]) -> ColumnDataSource:
    return ColumnDataSource({key: np.ascontiguousarray(boxes[:, index]) for index, key in enumerate(_EDGES)})


def _block_columns(plan: FloorPlan, layers: Sequence[Layer], type_names: Sequence[str]) -> dict[str, Any]:
    """Half-open ranges as people count: from the first to the last, from 0 on."""
    return {
        **{key: np.ascontiguousarray(plan.blocks[:, index]) for index, key in enumerate(_EDGES)},
        "layer": plan.nodes,
        "bits": plan.bits,
        "array": plan.arrays,
        "name": [layers[index].name for index in plan.nodes],
        "kind": [type_names[index] for index in plan.types],
        "kernels": list(plan.kernels),
        "slices": list(plan.slices),
        "first_row": np.ascontiguousarray(plan.weight_rows[:, 0]),
        "last_row": plan.weight_rows[:, 1] - 1,
        "all_rows": np.array([layers[index].rows for index in plan.nodes], np.int32),
        "top_line": np.ascontiguousarray(plan.rows[:, 0]),
        "bottom_line": plan.rows[:, 1] - 1,
        "left_line": np.ascontiguousarray(plan.cols[:, 0]),
        "right_line": plan.cols[:, 1] - 1,
        "copy": plan.copies,
    }
