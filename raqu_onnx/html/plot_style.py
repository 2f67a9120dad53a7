"""What all plots of the page have in common."""

from __future__ import annotations

from typing import Any

from bokeh.models import LinearColorMapper
from bokeh.plotting import figure

from raqu_onnx.html.palette import BITS, TEXT

__all__ = ["bits_colours", "legend_below", "new_plot"]


def new_plot(tools: str = "xpan,xwheel_zoom,reset", **settings: Any) -> Any:
    """A plot as wide as the page lets it be, without a background of its own."""
    plot = figure(
        sizing_mode="stretch_width",
        toolbar_location="above",
        tools=tools,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        **settings,
    )
    # Wheel and finger scroll the page until a tool is switched on.
    plot.toolbar.active_scroll = None
    plot.toolbar.active_drag = None
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    return plot


def bits_colours() -> LinearColorMapper:
    """A colour for each number of bits, 0 to 8."""
    return LinearColorMapper(palette=list(BITS), low=-0.5, high=8.5)


def legend_below(plot: Any, columns: int) -> None:
    """Put the legend under the plot, where it hides no point, small and without a frame.

    Args:
        plot: It has one legend.
        columns: Entries side by side, so that they fit the width of a telephone.
    """
    legend = plot.legend[0]
    plot.center.remove(legend)
    plot.add_layout(legend, "below")
    legend.ncols = columns
    legend.location = "center"
    legend.background_fill_color = None
    legend.border_line_color = None
    legend.label_text_font_size = "11px"
    legend.label_text_color = TEXT
    legend.glyph_height = legend.glyph_width = 14
    legend.padding = legend.spacing = legend.margin = 2
