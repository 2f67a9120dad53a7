"""What a weight costs in cells on chips whose crossbar types have cells of different bits.

All blocks of a node lie on types with cells of the same bits, so that a node has one price for each width once it is
known where it lies. Before that, types count by what the chip has of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.encodings import MAX_BITS, MIN_BITS
from raqu_onnx.placement import geometries

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from raqu_onnx.encodings import Encoding
    from raqu_onnx.hardware import Chip

__all__ = ["cell_shares", "cells_by_width", "cells_within", "mean_cells", "saves_columns"]


def cell_shares(chip: Chip) -> dict[Encoding, float]:
    """Share of a chip's cells that is of each encoding; they add up to 1.

    Where there is any number of crossbars of some types, the ones among them whose cells hold most bits have it all:
    no weight takes fewer cells anywhere, and there is room for all.
    """
    kinds = list(zip(chip.crossbars, geometries(chip), strict=True))
    free = [shape.encoding for kind, shape in kinds if kind.count is None]
    if free:
        return {max(free, key=lambda encoding: encoding.cell_bits): 1.0}
    cells: dict[Encoding, int] = {}
    for kind, shape in kinds:
        cells[shape.encoding] = cells.get(shape.encoding, 0) + (kind.count or 0) * kind.rows * kind.cols
    total = sum(cells.values())
    return {encoding: count / total for encoding, count in cells.items()}


def cells_within(chip: Chip, crossbars: float) -> float:
    """Cells of the largest crossbars of a chip, so many of them or as many as it has."""
    cells, left = 0.0, crossbars
    for kind in sorted(chip.crossbars, key=lambda kind: -kind.rows * kind.cols):
        taken = left if kind.count is None else min(left, kind.count)
        cells += taken * kind.rows * kind.cols
        left -= taken if taken < math.inf else 0.0
    return cells


def cells_by_width(encoding: Encoding) -> NDArray[np.float64]:
    """Cells that one weight takes at every width, shape (9,); none at 0, and at 1, which no weight has."""
    widths = [encoding.cells_per_weight(bits) if bits >= MIN_BITS else 0 for bits in range(MAX_BITS + 1)]
    return np.array(widths, np.float64)


def mean_cells(shares: dict[Encoding, float]) -> NDArray[np.float64]:
    """Cells that one weight takes at every width, averaged over `cell_shares`, shape (9,)."""
    return np.asarray(sum(share * cells_by_width(encoding) for encoding, share in shares.items()), np.float64)


def saves_columns(encodings: Iterable[Encoding], bits: int) -> bool:
    """Whether a kernel takes fewer columns at a width than with one bit more, in any of the encodings."""
    return any(encoding.columns(bits) < encoding.columns(bits + 1) for encoding in encodings)
