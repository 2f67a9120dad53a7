"""Cutting a matrix for crossbars of several sizes that store weights alike.

What fills crossbars of a large type whole goes there, and the rest to the sizes where it wastes least: recursively, the
rows (or the columns) that a type takes whole are parted from those that are left over, and the cheapest way is kept.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.tiling import Block, column_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.tiling import ArrayGeometry, Matrix

__all__ = ["borders", "cut_for", "cut_regions"]

_Span = tuple[int, int]
#: Cells, blocks, and either the type that takes all, or the row or column where to cut.
_Option = tuple[int, int, int, int | None, int | None]


def borders(bits: NDArray[np.int64], shape: ArrayGeometry) -> NDArray[np.int64]:
    """Columns at which one group's matrix may be cut, from 0 to the last."""
    starts = column_order(bits, shape.encoding).starts
    return np.arange(starts[-1] + 1) if shape.split_slices else starts


def cut_for(
    rows: _Span, columns: _Span, edges: NDArray[np.int64], shape: ArrayGeometry
) -> Iterator[tuple[_Span, _Span]] | None:
    """Blocks of a region for one type, None where a kernel is too wide for it."""
    if shape.weight_rows < 1 or shape.weight_cols < 1:
        return None
    spans = _column_spans(columns, edges, shape.weight_cols)
    if spans is None:
        return None
    tops = range(rows[0], rows[1], shape.weight_rows)
    return (((top, min(top + shape.weight_rows, rows[1])), span) for top in tops for span in spans)


def _column_spans(columns: _Span, edges: NDArray[np.int64], width: int) -> list[_Span] | None:
    if width < 1:
        return None
    spans = []
    first = columns[0]
    while first < columns[1]:
        last = min(int(edges[np.searchsorted(edges, first + width, side="right") - 1]), columns[1])
        if last <= first:
            return None
        spans.append((first, last))
        first = last
    return spans


def cut_regions(
    matrix: Matrix, shapes: Sequence[ArrayGeometry], kinds: Sequence[int], *, shared: bool
) -> list[tuple[int, Block]] | None:
    """Cut a node for several types of one encoding.

    Args:
        matrix: The node's weights.
        shapes: All crossbar types.
        kinds: Those to use, of one encoding.
        shared: A block costs the part of a crossbar that it keeps others from on the diagonal, not the whole one.

    Returns:
        Type and block, or None where a kernel is too wide for all of them.
    """
    found: list[tuple[int, Block]] = []
    plans: dict[tuple[int, bytes], list[tuple[int, _Span, _Span]] | None] = {}
    encoding, unit = shapes[kinds[0]].encoding, int(shapes[kinds[0]].unit_column)
    for group, rows_stored in enumerate(matrix.row_counts.tolist()):
        key = rows_stored, matrix.bits[group].tobytes()
        if key not in plans:
            edges = borders(matrix.bits[group], shapes[kinds[0]])
            # Groups of one node lie corner to corner in any case.
            cost = _cost(shapes, shared=shared or matrix.groups > 1)
            plans[key] = _Planner(shapes, kinds, edges, cost).plan(rows_stored)
        plan = plans[key]
        if plan is None:
            return None
        for kind, rows, columns in plan:
            height = (rows[1] - rows[0]) * encoding.rows_per_weight
            found.append((kind, Block(group, rows, columns, height, columns[1] - columns[0] + unit)))
    return found


def _cost(shapes: Sequence[ArrayGeometry], *, shared: bool) -> Callable[[int, int, int], int]:
    def cost(kind: int, rows: int, columns: int) -> int:
        shape = shapes[kind]
        if not shared:
            return shape.cells
        height, width = rows * shape.encoding.rows_per_weight, columns + int(shape.unit_column)
        return max(height * shape.cols, width * shape.rows) * shape.encoding.arrays_per_placement

    return cost


class _Planner:
    """The cheapest regions of one group's matrix."""

    def __init__(
        self,
        shapes: Sequence[ArrayGeometry],
        kinds: Sequence[int],
        edges: NDArray[np.int64],
        cost: Callable[[int, int, int], int],
    ) -> None:
        self._shapes = shapes
        self._kinds = kinds
        self._edges = edges
        self._block_cost = cost
        self._best = cache(self._search)
        self._spans = cache(lambda kind, columns: _column_spans(columns, edges, shapes[kind].weight_cols))
        self._strip_cost = cache(self._cost_of_strip)

    def plan(self, rows: int) -> list[tuple[int, _Span, _Span]] | None:
        """Type, rows and columns of every block."""
        whole = (0, int(self._edges[-1]))
        if not rows or not whole[1]:
            return []
        found = self._best(rows, whole)
        return None if found is None else list(self._blocks((0, rows), whole))

    def _blocks(self, rows: _Span, columns: _Span) -> Iterator[tuple[int, _Span, _Span]]:
        found = self._best(rows[1] - rows[0], columns)
        if found is None:
            return
        _, _, kind, row, col = found
        if row is not None:
            yield from self._blocks((rows[0], rows[0] + row), columns)
            yield from self._blocks((rows[0] + row, rows[1]), columns)
        elif col is not None:
            yield from self._blocks(rows, (columns[0], col))
            yield from self._blocks(rows, (col, columns[1]))
        else:
            cuts = cut_for(rows, columns, self._edges, self._shapes[kind])
            yield from ((kind, *cut) for cut in cuts or ())

    def _search(self, rows: int, columns: _Span) -> _Option | None:
        """The way with the fewest cells and, among equals, the fewest blocks."""
        options: list[_Option] = []
        for kind in self._kinds:
            shape = self._shapes[kind]
            spans = self._spans(kind, columns)
            if spans is None or shape.weight_rows < 1:
                continue
            full, rest = divmod(rows, shape.weight_rows)
            cells = full * self._strip_cost(kind, shape.weight_rows, columns)
            cells += self._strip_cost(kind, rest, columns) if rest else 0
            options.append((cells, len(spans) * (full + (rest > 0)), kind, None, None))
            row = rows // shape.weight_rows * shape.weight_rows
            if 0 < row < rows:
                options += self._cut(kind, row, None, (row, columns), (rows - row, columns))
            if len(spans) > 1:
                col = spans[-1][0]
                options += self._cut(kind, None, col, (rows, (columns[0], col)), (rows, (col, columns[1])))
        return min(options, key=lambda option: option[:2]) if options else None

    def _cost_of_strip(self, kind: int, rows: int, columns: _Span) -> int:
        """Cells of blocks side by side."""
        return sum(self._block_cost(kind, rows, last - first) for first, last in self._spans(kind, columns) or ())

    def _cut(self, kind: int, row: int | None, col: int | None, *parts: tuple[int, _Span]) -> list[_Option]:
        found = [self._best(*part) for part in parts]
        known = [part for part in found if part is not None]
        if len(known) < len(parts):
            return []
        return [(sum(part[0] for part in known), sum(part[1] for part in known), kind, row, col)]
