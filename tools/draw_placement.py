"""Draw the crossbars of a result folder to scale, coloured by node, beside those of the best uniform width.

    pip install -e '.[docs]'
    python tools/draw_placement.py raqu-onnx-demo/mobilenetv2/result -o docs/images/mobilenetv2_crossbars.png

Three panels at one scale keep what packing gains apart from what the bits gain: one width for the whole model with one
node per crossbar, the same width packed, and the result's own widths. The first two are placed anew from the shapes in
the manifest; the third is the manifest's placement.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raqu_onnx import Manifest, RaquError, read_manifest
from raqu_onnx.errors import ConfigError, DataError, OutputError
from raqu_onnx.manifest_view import layout_of
from raqu_onnx.placement import Placement, place
from raqu_onnx.tiling import Matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Grid", "Panel", "Rectangle", "draw", "read_panels"]

_BEST_UNIFORM = "best uniform"
_GAP = 0.09  # between crossbars, as a share of the widest one
_PANEL_INCHES = 3.35
_UNUSED, _FRAME = "#eceff1", "#78909c"
_LEGEND_COLUMNS = 4
_LEGEND_CHARACTERS = 130


@dataclass(frozen=True)
class Rectangle:
    """Cells of one node in one crossbar; unit columns are left out.

    Attributes:
        node: Name of the node.
        array: Crossbar type, then the crossbar's number among those of its type.
        row: First wordline.
        col: First bitline.
        height: Wordlines.
        width: Bitlines.
    """

    node: str
    array: tuple[int, int]
    row: int
    col: int
    height: int
    width: int


@dataclass(frozen=True)
class Panel:
    """A whole model on a chip.

    Attributes:
        title: What it shows.
        crossbars: Crossbars in use per crossbar type.
        cells_used: Programmed cells over cells of all of them.
        top1: Accuracy on the evaluation data, None where unknown.
        rectangles: What lies where.
    """

    title: str
    crossbars: tuple[int, ...]
    cells_used: float
    top1: float | None
    rectangles: tuple[Rectangle, ...]


@dataclass(frozen=True)
class Grid:
    """Where crossbars stand in a panel, in cells, each type on lines of its own.

    Attributes:
        sizes: Rows and columns of a crossbar, per type.
        width: Width of a panel.
    """

    sizes: tuple[tuple[int, int], ...]
    width: float

    @classmethod
    def around(cls, sizes: Sequence[tuple[int, int]], crossbars: Sequence[int]) -> Grid:
        """A grid in which so many crossbars of each type fill about a square."""
        widest = max(cols for _, cols in sizes)
        cells = sum(rows * cols * count for (rows, cols), count in zip(sizes, crossbars, strict=True))
        abreast = max(1, math.ceil(math.sqrt(cells) / widest))
        return cls(tuple(sizes), widest * (abreast + (abreast - 1) * _GAP))

    @property
    def gap(self) -> float:
        """Room between crossbars."""
        return _GAP * max(cols for _, cols in self.sizes)

    def corners(self, crossbars: Sequence[int]) -> tuple[dict[tuple[int, int], tuple[float, float]], float]:
        """Upper left corner (x, y) of every crossbar by type and number, and the height of the whole."""
        found: dict[tuple[int, int], tuple[float, float]] = {}
        top = 0.0
        for kind, ((rows, cols), count) in enumerate(zip(self.sizes, crossbars, strict=True)):
            abreast = max(1, math.floor((self.width + self.gap + 1e-6) / (cols + self.gap)))
            for index in range(count):
                line, place_in_line = divmod(index, abreast)
                found[kind, index] = (place_in_line * (cols + self.gap), top + line * (rows + self.gap))
            top += math.ceil(count / abreast) * (rows + self.gap)
        return found, top - self.gap


def read_panels(folder: Path, uniform_bits: int | None = None) -> tuple[Manifest, list[Panel]]:
    """Read a result folder.

    Args:
        folder: What `raqu-onnx optimize` wrote.
        uniform_bits: Width of the uniform model, default the best one of the folder's report.

    Returns:
        The manifest, and the panels from left to right.

    Raises:
        RaquError: A file cannot be read, or the report names no best uniform width.
    """
    manifest = read_manifest(folder / "manifest.json")
    figures = _read_figures(folder / "report.json")
    if uniform_bits is None:
        best = [item["weight_bits"] for item in figures if _BEST_UNIFORM in item["label"]]
        if not best:
            raise ConfigError(f"{folder / 'report.json'}: names no best uniform width; give one with --uniform-bits")
        uniform_bits = int(best[0])
    matrices = {node.name: Matrix.of(layout_of(node.matrix), uniform_bits) for node in manifest.nodes}
    top1 = _top1(figures, lambda item: "uniform" in item["label"] and item["weight_bits"] == uniform_bits)
    panels = [
        _placed(
            f"All layers {uniform_bits} bits, one layer per crossbar",
            place(matrices, manifest.chip, sharing="exclusive", ignore_counts=True),
            top1,
        ),
        _placed(f"All layers {uniform_bits} bits, packed", place(matrices, manifest.chip, ignore_counts=True), top1),
        _from_manifest(manifest, _top1(figures, lambda item: item["label"] == "ours")),
    ]
    return manifest, panels


def _read_figures(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        figures: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: is not a readable report: {error}") from error
    return figures


def _top1(figures: list[dict[str, Any]], wanted: Any) -> float | None:
    scores = [item["evaluation"] for item in figures if wanted(item)]
    return scores[0]["top1"] if scores and scores[0] else None


def _placed(title: str, placement: Placement, top1: float | None) -> Panel:
    rectangles = []
    for item in placement.blocks:
        geometry = placement.geometries[item.crossbar_type]
        width = item.block.width - int(geometry.unit_column)
        arrays = geometry.encoding.arrays_per_placement
        rectangles += [
            Rectangle(
                item.node,
                (item.crossbar_type, item.crossbar * arrays + array),
                item.row,
                item.col,
                item.block.height,
                width,
            )
            for array in range(arrays)
        ]
    return Panel(title, placement.crossbars_by_type, placement.cell_utilization, top1, tuple(rectangles))


def _from_manifest(manifest: Manifest, top1: float | None) -> Panel:
    rectangles = []
    for node in manifest.nodes:
        for item in node.placements:
            last = item.cols[1] if item.unit_column is None else item.unit_column
            rectangles.append(
                Rectangle(
                    node.name,
                    (item.type, item.crossbar),
                    item.rows[0],
                    item.cols[0],
                    item.rows[1] - item.rows[0],
                    last - item.cols[0],
                )
            )
    used = manifest.totals.cell_utilization
    crossbars = tuple(kind.allocated for kind in manifest.totals.crossbars)
    return Panel(
        "raqu-onnx: bits per kernel, packed", crossbars, used.numerator / used.denominator, top1, tuple(rectangles)
    )


def draw(manifest: Manifest, panels: Sequence[Panel]) -> Figure:
    """Draw panels side by side at one scale, with a legend of the nodes and their bits."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sizes = [(kind.rows, kind.cols) for kind in manifest.chip.crossbars]
    grid = Grid.around(sizes, panels[0].crossbars)
    colours = _colours([node.name for node in manifest.nodes])
    tallest = max(grid.corners(panel.crossbars)[1] for panel in panels)
    # Long names need the width of the whole figure for fewer columns.
    longest = max(len(_legend_label(node)) for node in manifest.nodes)
    columns = max(1, min(_LEGEND_COLUMNS, _LEGEND_CHARACTERS // longest))
    lines = math.ceil((len(manifest.nodes) + 1) / columns)
    top, bottom = 1.05, 0.2 * (lines + 1) + 0.3
    body = _PANEL_INCHES * tallest / grid.width
    height = top + body + bottom
    figure = Figure(figsize=(_PANEL_INCHES * len(panels) * 1.06, height), facecolor="white")
    for index, panel in enumerate(panels):
        left = (index + 0.03) / len(panels)
        axes = figure.add_axes((left, bottom / height, 0.94 / len(panels), body / height))
        _draw_panel(axes, panel, grid, colours, tallest)
    patches = [Patch(facecolor=colours[node.name], label=_legend_label(node)) for node in manifest.nodes]
    patches.append(Patch(facecolor=_UNUSED, edgecolor=_FRAME, linewidth=0.5, label="not used"))
    figure.legend(
        handles=patches,
        title="Layers, with their bits in the right panel",
        loc="lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        columnspacing=1.6,
    )
    return figure


def _draw_panel(
    axes: Axes, panel: Panel, grid: Grid, colours: dict[str, tuple[float, float, float]], tallest: float
) -> None:
    from matplotlib.patches import Rectangle as Box

    corners, _ = grid.corners(panel.crossbars)
    for (kind, _index), corner in corners.items():
        rows, cols = grid.sizes[kind]
        axes.add_patch(Box(corner, cols, rows, facecolor=_UNUSED, linewidth=0))
    for item in panel.rectangles:
        x, y = corners[item.array]
        axes.add_patch(
            Box(
                (x + item.col, y + item.row),
                item.width,
                item.height,
                facecolor=colours[item.node],
                edgecolor="white",
                linewidth=0.4,
            )
        )
    # Frames last: a block that fills its crossbar would hide them.
    for (kind, _index), corner in corners.items():
        rows, cols = grid.sizes[kind]
        axes.add_patch(Box(corner, cols, rows, fill=False, edgecolor=_FRAME, linewidth=0.6))
    margin = grid.gap / 4
    axes.set_xlim(-margin, grid.width + margin)
    axes.set_ylim(tallest + margin, -margin)
    axes.set_aspect("equal", anchor="NW")
    axes.axis("off")
    facts = f"{panel.cells_used:.1%} of cells used"
    if panel.top1 is not None:
        facts += f", {panel.top1:.2%} accuracy"
    for text, lift, style in (
        (panel.title, 53, {"fontsize": 12}),
        (f"{sum(panel.crossbars)} crossbars", 28, {"fontsize": 17, "fontweight": "bold"}),
        (facts, 10, {"fontsize": 11, "color": "#455a64"}),
    ):
        axes.annotate(text, (0, 1), (2, lift), xycoords="axes fraction", textcoords="offset points", **style)


def _colours(names: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """A colour per node: hues in the order of the network, light and dark in turn so that neighbours differ."""
    from colorsys import hls_to_rgb

    found = {}
    for index, name in enumerate(names):
        hue = 0.80 * index / max(1, len(names) - 1)
        found[name] = hls_to_rgb(hue, (0.44, 0.60, 0.74)[index % 3], (0.62, 0.60, 0.62)[index % 3])
    return found


def _legend_label(node: Any) -> str:
    """The node's path without its type, and its bits."""
    name = re.sub(rf"/{node.op_type}$", "", node.name).strip("/")
    counts: Counter[int] = Counter()
    for bits, count in node.bits:
        counts[bits] += count
    mean = sum(bits * count for bits, count in counts.items()) / counts.total()
    return f"{name}, {mean:.3g} bits"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("result", type=Path, metavar="DIR", help="folder that raqu-onnx optimize wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="picture, .svg or .png")
    parser.add_argument(
        "--uniform-bits", type=int, choices=range(2, 9), help="width of the uniform model (default: the report's best)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        _save(draw(*read_panels(args.result, args.uniform_bits)), args.output)
    except RaquError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    # Equal placements give equal bytes: no date, no random ids.
    matplotlib.rcParams["svg.hashsalt"] = "raqu-onnx"
    metadata = {"Date": None} if path.suffix == ".svg" else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata=metadata)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
