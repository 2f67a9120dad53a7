"""The plots with one line for each layer.

Names of layers reach a plot as data or as plain text objects, never as markup or formula: Bokeh takes a string between
dollar signs for TeX, and a `PlainText` for what it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LogColorMapper,
    LogTicker,
    NumeralTickFormatter,
    PlainText,
    Range1d,
)
from bokeh.models.annotations import ColorBar, Span

from raqu_onnx.html.palette import ACCENT, BITS, MUTED, OTHERS, TEXT
from raqu_onnx.html.plot_style import bits_colours, new_plot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raqu_onnx.html.content import Layer

__all__ = ["adc_plot", "kernels_plot", "sensitivity_plot", "shares_plot"]

_ROW = 17  # pixels of one layer
_MARGIN = 64  # of axes and toolbar


def _layer_figure(layers: Sequence[Layer], x_label: str, **settings: Any) -> Any:
    """A plot with one line for each layer, the first at the top."""
    count = len(layers)
    plot = new_plot(
        height=_ROW * count + _MARGIN, y_range=Range1d(start=count - 0.5, end=-0.5), x_axis_label=x_label, **settings
    )
    plot.yaxis.ticker = FixedTicker(ticks=list(range(count)))
    plot.yaxis.major_label_overrides = {index: PlainText(text=layer.short) for index, layer in enumerate(layers)}
    plot.yaxis.major_tick_line_color = None
    plot.yaxis.minor_tick_line_color = None
    plot.ygrid.visible = False
    return plot


def shares_plot(layers: Sequence[Layer]) -> Any:
    """How many of each layer's kernels have how many bits, as shares."""
    plot = _layer_figure(layers, "share of kernels", x_range=Range1d(start=0, end=1), tools="")
    columns: dict[str, list[Any]] = {key: [] for key in ("y", "left", "right", "colour", "bits", "count", "name")}
    for index, layer in enumerate(layers):
        start = 0.0
        for bits in sorted(layer.kernels_by_bits, reverse=True):
            count = layer.kernels_by_bits[bits]
            stop = start + count / layer.kernels
            for key, value in zip(
                columns, (index, start, stop, BITS[bits], bits, f"{count} of {layer.kernels}", layer.name), strict=True
            ):
                columns[key].append(value)
            start = stop
    source = ColumnDataSource(columns)
    bars = plot.hbar(
        y="y", left="left", right="right", height=0.78, fill_color="colour", line_color=None, source=source
    )
    plot.add_tools(HoverTool(renderers=[bars], tooltips=[("", "@name"), ("bits", "@bits"), ("kernels", "@count")]))
    plot.xaxis.formatter = NumeralTickFormatter(format="0 %")
    return plot


def kernels_plot(layers: Sequence[Layer]) -> Any:
    """The bits of every kernel in the order of the output channels, each layer drawn over the whole width."""
    plot = _layer_figure(layers, "output channels, first to last", x_range=Range1d(start=0, end=1))
    parts: list[tuple[int, float, float, int, int, int]] = []
    for index, layer in enumerate(layers):
        start = 0
        for bits, count in layer.runs:
            stop = start + count
            parts.append((index, start / layer.channels, stop / layer.channels, bits, start, stop - 1))
            start = stop
    table = np.array(parts, np.float64).reshape(-1, 6)
    source = ColumnDataSource(
        {
            "y": table[:, 0].astype(np.int32),
            "left": table[:, 1].astype(np.float32),
            "right": table[:, 2].astype(np.float32),
            "bits": table[:, 3].astype(np.int32),
            "first": table[:, 4].astype(np.int32),
            "last": table[:, 5].astype(np.int32),
            "name": [layers[int(index)].name for index in table[:, 0]],
        }
    )
    bars = plot.hbar(
        y="y",
        left="left",
        right="right",
        height=0.78,
        fill_color={"field": "bits", "transform": bits_colours()},
        line_color=None,
        source=source,
    )
    plot.add_tools(
        HoverTool(renderers=[bars], tooltips=[("", "@name"), ("bits", "@bits"), ("channels", "@first to @last")])
    )
    plot.xaxis.formatter = NumeralTickFormatter(format="0 %")
    return plot


def sensitivity_plot(layers: Sequence[Layer], *, of_inputs: bool = False) -> Any | None:
    """What each layer alone adds to the loss at each width, None where nothing was measured.

    Args:
        layers: The layers.
        of_inputs: The widths are those of their inputs, else of their weights.
    """
    cells = [
        (index, bits, loss, layer.name)
        for index, layer in enumerate(layers)
        for bits, loss in sorted((layer.input_sensitivity if of_inputs else layer.sensitivity).items())
    ]
    positive = [loss for _, _, loss, _ in cells if loss > 0]
    if not positive:
        return None
    widths = sorted({bits for _, bits, _, _ in cells})
    # Losses below a ten-thousandth of the largest are as good as none.
    low = max(min(positive), max(positive) * 1e-4)
    plot = _layer_figure(
        layers,
        f"bits of {'the input' if of_inputs else 'the weights'} of this layer alone",
        x_range=Range1d(start=widths[0] - 0.5, end=widths[-1] + 0.5),
    )
    source = ColumnDataSource(
        {
            "y": [cell[0] for cell in cells],
            "x": [cell[1] for cell in cells],
            "loss": [cell[2] for cell in cells],
            "shown": [max(cell[2], low) for cell in cells],
            "name": [cell[3] for cell in cells],
        }
    )
    mapper = LogColorMapper(palette="Magma256", low=low, high=max(max(positive), low * 1.01))
    boxes = plot.rect(
        x="x",
        y="y",
        width=0.96,
        height=0.9,
        source=source,
        fill_color={"field": "shown", "transform": mapper},
        line_color=None,
    )
    tips = [("", "@name"), ("bits", "@x"), ("loss added", "@loss{0.0[00000]e+0}")]
    plot.add_tools(HoverTool(renderers=[boxes], tooltips=tips))
    plot.xaxis.ticker = FixedTicker(ticks=widths)
    plot.xgrid.visible = False
    bar = ColorBar(
        color_mapper=mapper,
        ticker=LogTicker(),
        width=10,
        padding=4,
        background_fill_color=None,
        major_label_text_color=TEXT,
    )
    plot.add_layout(bar, "right")
    return plot


def adc_plot(layers: Sequence[Layer], chip_bits: int | None) -> Any | None:
    """The ADC resolution at which no sum of a layer can clip, beside what the chip has; None where it is unknown."""
    known = [(index, layer) for index, layer in enumerate(layers) if layer.lossless_bits is not None]
    if not known:
        return None
    highest = max([layer.lossless_bits or 0 for _, layer in known] + [chip_bits or 0])
    plot = _layer_figure(layers, "ADC bits", x_range=Range1d(start=0, end=highest + 0.6), tools="")
    clipping = [chip_bits is not None and (layer.lossless_bits or 0) > chip_bits for _, layer in known]
    source = ColumnDataSource(
        {
            "y": [index for index, _ in known],
            "bits": [layer.lossless_bits for _, layer in known],
            "name": [layer.name for _, layer in known],
            "colour": [ACCENT if clips else OTHERS[0] for clips in clipping],
            "says": ["may clip" if clips else "never clips" for clips in clipping],
        }
    )
    bars = plot.hbar(y="y", right="bits", height=0.7, fill_color="colour", line_color=None, source=source)
    plot.add_tools(
        HoverTool(renderers=[bars], tooltips=[("", "@name"), ("lossless", "@bits bits"), ("on this chip", "@says")])
    )
    if chip_bits is not None:
        plot.add_layout(
            Span(location=chip_bits, dimension="height", line_color=MUTED, line_dash="dashed", line_width=2)
        )
    plot.xaxis.ticker = BasicTicker(min_interval=1)
    return plot
