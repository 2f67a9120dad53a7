"""Draws the pictures of the documentation from the mapping's own arithmetic (`pip install -e '.[docs]'`).

`python tools/draw_docs.py docs/images` writes `unrolling.svg`, `encodings.svg` and `sharing.svg` there; equal code and
an equal matplotlib give equal bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from raqu_onnx.encodings import Encoding, SignedEncoding
from raqu_onnx.hardware import Chip, CrossbarType, Sharing
from raqu_onnx.placement import Placement, place
from raqu_onnx.tiling import Matrix, column_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["encodings", "main", "placed", "sharing", "unrolling"]

_ROWS, _COLS, _CELL_BITS = 32, 24, 2
# Kernels of the convolution that the first picture shows: 3 channels, a window of 3x3.
_KERNEL_BITS = (4, 4, 3, 2, 0, 6, 2, 4)
_KERNEL_ROWS = 27
_CODE, _CODE_BITS = -5, 4
_FRAME, _UNUSED = "#455a64", "#eceff1"
_NODES = {
    "conv1": ((14, 3), "#1e88e5"),
    "conv2": ((9, 2), "#43a047"),
    "conv3": ((18, 3), "#fb8c00"),
    "fc": ((20, 2), "#8e24aa"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write all pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder: Path = parser.parse_args(arguments).folder
    import matplotlib

    # Text stays text, and no random ids: equal pictures give equal bytes.
    matplotlib.rcParams.update({"svg.hashsalt": "raqu-onnx", "svg.fonttype": "none", "font.family": "sans-serif"})
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (unrolling, encodings, sharing):
        draw().savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None}, facecolor="white")
    return 0


def unrolling() -> Figure:
    """A convolution's kernels as columns of a matrix, and their slices on the bitlines of a crossbar."""
    figure, (left, right) = _figure(2, (9.6, 5.0))
    bits = np.array([_KERNEL_BITS], np.int64)
    encoding = Encoding("offset", _CELL_BITS)
    order = column_order(bits[0], encoding)
    for kernel, width in enumerate(_KERNEL_BITS):
        _box(left, kernel, 0, 1, _KERNEL_ROWS, _shade(width), f"{width}")
    _frame(left, len(_KERNEL_BITS), _KERNEL_ROWS, "the matrix: 27 rows (3 channels x 3 x 3) by 8 kernels")
    left.set_xlabel("kernels, with their bits; one has none and takes no column")
    _box(right, 0, 0, _COLS, _ROWS, _UNUSED)
    for kernel, start in zip(order.kernels.tolist(), order.starts.tolist(), strict=False):
        for column in range(encoding.columns(_KERNEL_BITS[kernel])):
            _box(right, start + column, 0, 1, _KERNEL_ROWS, _shade(_KERNEL_BITS[kernel]), f"k{kernel}.{column}")
    _frame(right, _COLS, _ROWS, f"the crossbar: {_ROWS} x {_COLS} cells of {_CELL_BITS} bits")
    right.set_xlabel("bitlines: kernel and slice; what is grey is free for other layers")
    return figure


def encodings() -> Figure:
    """One signed weight in the cells of each encoding."""
    schemes = get_args(SignedEncoding)
    figure, all_axes = _figure(len(schemes), (9.6, 2.4))
    for axes, scheme in zip(all_axes, schemes, strict=True):
        encoding = Encoding(scheme, _CELL_BITS)
        levels = encoding.to_levels(np.array([_CODE]), _CODE_BITS)[:, 0].tolist()
        parts = encoding.slices(_CODE_BITS)
        # differential-row has its negative slices in a second wordline, below the positive ones.
        width = encoding.columns(_CODE_BITS)
        for index, (level, part) in enumerate(zip(levels, parts, strict=True)):
            factor = f"{'-' if part.sign < 0 else '+'}{1 << part.shift}"
            colour = "#ffccbc" if part.sign < 0 else "#bbdefb"
            _box(axes, index % width, index // width, 1, 1, colour, f"{level}\n({factor})")
        read = sum(part.sign * level << part.shift for level, part in zip(levels, parts, strict=True))
        offset = encoding.offset(_CODE_BITS)
        said = f"{read} - {offset} = {read - offset}" if offset else f"sum: {read}"
        _frame(axes, width, encoding.rows_per_weight, scheme)
        axes.set_xlim(-0.1, 4.1)
        axes.set_ylim(2.1, -0.1)
        axes.set_xlabel(said)
    figure.suptitle(f"the {_CODE_BITS}-bit code {_CODE} in {_CELL_BITS}-bit cells: level (factor)", fontsize=11)
    return figure


def sharing() -> Figure:
    """The same layers under each sharing mode, as `place` puts them."""
    modes = get_args(Sharing)
    figure, all_axes = _figure(len(modes), (9.6, 4.6))
    for axes, mode in zip(all_axes, modes, strict=True):
        found = placed(mode)
        _draw_placement(axes, found)
        text = "crossbar" if found.crossbars == 1 else "crossbars"
        axes.set_title(f"{mode}: {found.crossbars} {text}, {found.cell_utilization:.0%} of cells used", fontsize=10)
    return figure


def placed(mode: Sharing) -> Placement:
    """The layers of the picture under one sharing mode."""
    kind = CrossbarType(name="main", rows=_ROWS, cols=12, cell_bits=_CELL_BITS)
    chip = Chip(schema_version=1, name="picture", encoding="offset", sharing=mode, dac_bits=1, crossbars=(kind,))
    matrices = {
        name: Matrix(1, rows, np.full((1, kernels), 4, np.int64)) for name, ((rows, kernels), _) in _NODES.items()
    }
    return place(matrices, chip)


def _draw_placement(axes: Axes, found: Placement) -> None:
    kind = found.chip.crossbars[0]
    pitch = kind.rows + 3
    for index in range(found.crossbars):
        _box(axes, (index % 2) * (kind.cols + 2), index // 2 * pitch, kind.cols, kind.rows, _UNUSED)
    for item in found.blocks:
        left, top = item.crossbar % 2 * (kind.cols + 2), item.crossbar // 2 * pitch
        colour = _NODES[item.node][1]
        _box(axes, left + item.col, top + item.row, item.block.width, item.block.height, colour, item.node, "white")
    axes.set_xlim(-1, 2 * kind.cols + 3)
    axes.set_ylim(2 * pitch, -1)
    axes.set_aspect("equal")
    axes.axis("off")


def _figure(panels: int, inches: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, panels)).tolist()


def _box(
    axes: Axes,
    left: float,
    top: float,
    width: float,
    height: float,
    colour: str | tuple[float, float, float],
    text: str = "",
    ink: str = "black",
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), width, height, facecolor=colour, edgecolor=_FRAME, linewidth=0.6))
    if text:
        turned = 90 if height > 3 * width and len(text) > 1 else 0
        axes.text(
            left + width / 2, top + height / 2, text, ha="center", va="center", fontsize=8, color=ink, rotation=turned
        )


def _frame(axes: Axes, width: float, height: float, title: str) -> None:
    axes.set_xlim(-0.5, width + 0.5)
    axes.set_ylim(height + 0.5, -0.5)
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _shade(bits: int) -> tuple[float, float, float]:
    """Darker with more bits."""
    share = bits / 8
    return (0.93 - 0.75 * share, 0.95 - 0.45 * share, 0.98 - 0.12 * share)


if __name__ == "__main__":
    sys.exit(main())
