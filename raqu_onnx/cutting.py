"""Filling a given set of crossbars under `time` sharing, with blocks cut where they do not fit whole.

A block may be cut at any row and at any border between kernels (at any column where the chip splits slices): partial
sums of row blocks are added anyway, and column blocks do not depend on each other. So the cells that whole blocks leave
over can be used down to slivers narrower than a kernel. Cuts cost turns, and are made only where they save a crossbar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.packing import FreeList
from raqu_onnx.tiling import Block

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.placement_problem import Spot
    from raqu_onnx.tiling import ArrayGeometry

__all__ = ["fill"]

# Where that many cuts do not do, the rest would only be crumbs.
_MOST_CUTS = 8
# Blocks that may be cut; so many that are left over do not fit by cutting.
_MOST_WAITING = 2000


def fill(
    jobs: Sequence[tuple[int, Block]],
    shapes: Sequence[ArrayGeometry],
    inventory: Sequence[int],
    edges: Callable[[int, int], NDArray[np.int64]],
    *,
    reserve: int = 0,
) -> list[Spot] | None:
    """Place blocks in a given number of crossbars, whole where they fit, else cut.

    Args:
        jobs: Index of the node and block, by falling area.
        shapes: The crossbar types; those with slots have the same encoding.
        inventory: Slots of each type.
        edges: Columns at which blocks of a node's group may be cut.
        reserve: Cells in blocks of the narrowest kernels that are kept for the slivers that others leave.

    Returns:
        Where every block or piece lies, or None where something found no room.
    """
    floor = _Floor(shapes, inventory)
    spots: list[Spot] = []
    waiting = _narrowest(jobs, edges, reserve)
    kept = {id(block) for _, block in waiting}
    for node, block in jobs:
        if id(block) in kept:
            continue
        spot = floor.whole(block.height, block.width)
        if spot is None:
            waiting.append((node, block))
        else:
            spots.append((node, block, *spot))
    if len(waiting) > _MOST_WAITING:
        return None
    floor.open_all()
    # Narrow kernels come last: slivers have room for nothing else.
    pieces = _Pieces(waiting, shapes, edges)
    for _ in range(_MOST_CUTS * (len(jobs) + 8)):
        piece = pieces.next()
        if piece is None:
            return spots
        cut = floor.best_cut(piece)
        if cut is None:
            return None
        index, height, columns = cut
        block = pieces.take(piece, height, columns)
        spots.append((piece.node, block, *floor.take(index, block.height, block.width)))
    return None


def _narrowest(
    jobs: Sequence[tuple[int, Block]], edges: Callable[[int, int], NDArray[np.int64]], cells: int
) -> list[tuple[int, Block]]:
    """Blocks that end in the narrowest kernels, up to so many cells."""
    found: list[tuple[int, Block]] = []
    if not cells:
        return found
    for node, block in sorted(jobs, key=lambda job: _last_width(edges(job[0], job[1].group), job[1])):
        if cells <= 0:
            break
        cells -= block.height * block.width
        found.append((node, block))
    return found


def _last_width(borders: NDArray[np.int64], block: Block) -> int:
    at = int(np.searchsorted(borders, block.columns[1]))
    return int(borders[at] - borders[at - 1])


@dataclass(frozen=True, slots=True)
class _Piece:
    node: int
    block: Block
    borders: NDArray[np.int64]
    rows_per_weight: int
    unit: int


class _Pieces:
    """What is left to place, the widest kernels first."""

    def __init__(
        self,
        waiting: Sequence[tuple[int, Block]],
        shapes: Sequence[ArrayGeometry],
        edges: Callable[[int, int], NDArray[np.int64]],
    ) -> None:
        encoding = shapes[0].encoding
        found = [
            _Piece(node, block, edges(node, block.group), encoding.rows_per_weight, int(shapes[0].unit_column))
            for node, block in waiting
        ]
        found.sort(key=lambda piece: (_kernel_width(piece), piece.block.height * piece.block.width))
        self._stack = found

    def next(self) -> _Piece | None:
        return self._stack.pop() if self._stack else None

    def take(self, piece: _Piece, height: int, columns: int) -> Block:
        """Cut a block off a piece's first corner; what is left comes next."""
        block, rows = piece.block, height // piece.rows_per_weight
        (top, bottom), (left, right) = block.rows, block.columns
        row, col = top + rows, left + columns
        below, beside = (bottom - row) * (right - left), (bottom - top) * (right - col)
        # One of the two rests keeps the corner, the larger one.
        wide = below >= beside
        rests = (
            ((row, bottom), (left, right if wide else col)),
            ((top, row if wide else bottom), (col, right)),
        )
        for span, cols in rests:
            if span[0] < span[1] and cols[0] < cols[1]:
                self._stack.append(
                    _Piece(piece.node, _block(piece, span, cols), piece.borders, piece.rows_per_weight, piece.unit)
                )
        return _block(piece, (top, row), (left, col))


def _block(piece: _Piece, rows: tuple[int, int], columns: tuple[int, int]) -> Block:
    height = (rows[1] - rows[0]) * piece.rows_per_weight
    return Block(piece.block.group, rows, columns, height, columns[1] - columns[0] + piece.unit)


def _kernel_width(piece: _Piece) -> int:
    at = int(np.searchsorted(piece.borders, piece.block.columns[0]))
    return int(piece.borders[at + 1] - piece.borders[at])


class _Floor:
    """Free rectangles of crossbars of several types; none overlaps another."""

    def __init__(self, shapes: Sequence[ArrayGeometry], inventory: Sequence[int]) -> None:
        self._shapes = shapes
        self._closed = list(inventory)
        self._opened = [0] * len(shapes)
        self._by_size = sorted(range(len(shapes)), key=lambda kind: shapes[kind].cells)
        self._free = FreeList(6)  # type, crossbar, row, column, height, width

    def whole(self, height: int, width: int) -> tuple[int, tuple[int, int, int]] | None:
        """Place a block in the tightest free rectangle, else in a new crossbar of the smallest type that serves."""
        table = self._free.rows[: self._free.top]
        spare_rows, spare_cols = table[:, 4] - height, table[:, 5] - width
        fits = np.flatnonzero(self._free.used[: self._free.top] & (spare_rows >= 0) & (spare_cols >= 0))
        if fits.size:
            short_side = np.minimum(spare_rows[fits], spare_cols[fits])
            return self.take(int(fits[np.argmin(short_side)]), height, width)
        for kind in self._by_size:
            shape = self._shapes[kind]
            if self._closed[kind] and shape.rows >= height and shape.cols >= width:
                self._closed[kind] -= 1
                self._opened[kind] += 1
                self._split((kind, self._opened[kind] - 1, 0, 0, shape.rows, shape.cols), height, width)
                return kind, (self._opened[kind] - 1, 0, 0)
        return None

    def open_all(self) -> None:
        """Every crossbar that is still empty becomes a free rectangle."""
        for kind, count in enumerate(self._closed):
            for _ in range(count):
                shape = self._shapes[kind]
                self._free.add(kind, self._opened[kind], 0, 0, shape.rows, shape.cols)
                self._opened[kind] += 1
            self._closed[kind] = 0

    def best_cut(self, piece: _Piece) -> tuple[int, int, int] | None:
        """The free rectangle that takes most cells of a piece: its index, and wordlines and columns to cut off."""
        table = self._free.rows[: self._free.top]
        block = piece.block
        heights = np.minimum(table[:, 4], block.height) // piece.rows_per_weight * piece.rows_per_weight
        reach = block.columns[0] + np.minimum(table[:, 5] - piece.unit, block.columns[1] - block.columns[0])
        cuts = piece.borders[np.maximum(np.searchsorted(piece.borders, reach, side="right") - 1, 0)]
        columns = np.maximum(cuts - block.columns[0], 0)
        cells = np.where(self._free.used[: self._free.top], heights * columns, 0)
        if not cells.size or not cells.max():
            return None
        best = np.flatnonzero(cells == cells.max())
        index = int(best[np.argmin(table[best, 4] * table[best, 5])])
        return index, int(heights[index]), int(columns[index])

    def take(self, index: int, height: int, width: int) -> tuple[int, tuple[int, int, int]]:
        """Use the first corner of a free rectangle."""
        kind, crossbar, row, col, free_height, free_width = self._free.pop(index)
        self._split((kind, crossbar, row, col, free_height, free_width), height, width)
        return kind, (crossbar, row, col)

    def _split(self, free: tuple[int, int, int, int, int, int], height: int, width: int) -> None:
        kind, crossbar, row, col, free_height, free_width = free
        spare_rows, spare_cols = free_height - height, free_width - width
        # The cut runs so that the larger leftover stays whole, as in `GuillotinePacker`.
        horizontal = spare_cols < spare_rows
        if spare_rows:
            self._free.add(kind, crossbar, row + height, col, spare_rows, free_width if horizontal else width)
        if spare_cols:
            self._free.add(kind, crossbar, row, col + width, height if horizontal else free_height, spare_cols)
