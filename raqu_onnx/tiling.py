"""Cutting weight matrices into the blocks that fit a crossbar, exact to the cell.

A group's matrix is cut into row blocks of at most the rows of a crossbar (half of them for `differential-row`) and
column blocks of whole kernels, or of single columns where the chip may split a kernel's slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.encodings import Encoding
from raqu_onnx.errors import ChipError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.hardware import Chip, CrossbarType
    from raqu_onnx.layout import WeightLayout

__all__ = ["ArrayGeometry", "Block", "ColumnOrder", "Matrix", "column_cuts", "column_order", "tile"]


@dataclass(frozen=True)
class ArrayGeometry:
    """What tiling needs to know of one crossbar type under a chip's encoding.

    Attributes:
        rows: Wordlines.
        cols: Bitlines.
        encoding: How weights are stored in it.
        unit_column: Every block ends in one extra column of ones, which yields `sum(x)` for `offset`.
        split_slices: A kernel's slices may lie in different blocks.
    """

    rows: int
    cols: int
    encoding: Encoding
    unit_column: bool = False
    split_slices: bool = False

    @classmethod
    def of(cls, chip: Chip, crossbar: CrossbarType) -> ArrayGeometry:
        """Geometry of one of a chip's crossbar types."""
        return cls(
            rows=crossbar.rows,
            cols=crossbar.cols,
            encoding=Encoding(chip.encoding, crossbar.cell_bits, chip.polarity_arrays == "pair"),
            unit_column=chip.offset_sum == "unit-column",
            split_slices=chip.split_slices,
        )

    @property
    def weight_rows(self) -> int:
        """Rows of a weight matrix that fit: `R`, or `R/2` for `differential-row`."""
        return self.rows // self.encoding.rows_per_weight

    @property
    def weight_cols(self) -> int:
        """Columns that hold weights: `C`, less the unit column."""
        return self.cols - int(self.unit_column)

    @property
    def cells(self) -> int:
        """Cells of everything that one placement's crossbar stands for: twice as many where arrays come in pairs."""
        return self.rows * self.cols * self.encoding.arrays_per_placement


@dataclass(frozen=True)
class Matrix:
    """The weights of one node as the mapping sees them.

    Attributes:
        groups: `G`.
        rows: `K`, rows of one group.
        bits: Bits of every kernel, shape (G, M); 0 for a dropped one.
        stored: Rows of each group that are stored, shape (G,); None for all.
    """

    groups: int
    rows: int
    bits: NDArray[np.int64]
    stored: NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls,
        layout: WeightLayout,
        channel_bits: NDArray[np.integer] | int | tuple[int, ...],
        stored: NDArray[np.int64] | None = None,
    ) -> Matrix:
        """Matrix of a weight layout with bits per entry of its scale axis, or one width for all."""
        per_channel = np.broadcast_to(np.asarray(channel_bits, np.int64), (layout.channels,))
        return cls(layout.groups, layout.rows, per_channel[layout.channel_index()], stored)

    @property
    def row_counts(self) -> NDArray[np.int64]:
        """Stored rows of each group, shape (G,)."""
        return np.full(self.groups, self.rows, np.int64) if self.stored is None else self.stored

    @property
    def weight_bits(self) -> int:
        """`sum(K * b_k)` over stored rows."""
        return int(self.row_counts @ self.bits.sum(axis=1))

    def cells(self, encoding: Encoding) -> int:
        """Cells that its weights program."""
        table = np.array([encoding.cells_per_weight(b) for b in range(int(self.bits.max(initial=0)) + 1)], np.int64)
        return int(self.row_counts @ table[self.bits].sum(axis=1))


@dataclass(frozen=True)
class ColumnOrder:
    """The columns of one group, kernel after kernel.

    Attributes:
        kernels: Stored kernels in column order; dropped ones are absent.
        starts: First column of each kernel and, last, the number of columns; one longer than `kernels`.
    """

    kernels: NDArray[np.int64]
    starts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of one group's matrix that one crossbar holds.

    Attributes:
        group: The group.
        rows: Half-open range of stored weight rows.
        columns: Half-open range of the group's columns, see `ColumnOrder`.
        height: Wordlines that it takes.
        width: Bitlines that it takes, unit column included.
    """

    group: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    height: int
    width: int


def column_order(bits: NDArray[np.int64], encoding: Encoding) -> ColumnOrder:
    """Order one group's kernels by falling bits, then by index, and lay their columns side by side.

    Args:
        bits: Bits of each kernel, shape (M,).
        encoding: Gives the columns of one kernel.
    """
    order = np.argsort(-bits, kind="stable")
    kept = order[bits[order] > 0]
    table = np.array([encoding.columns(b) for b in range(int(bits.max(initial=0)) + 1)], np.int64)
    starts = np.concatenate([[0], np.cumsum(table[bits[kept]])])
    return ColumnOrder(kept, starts)


def tile(matrix: Matrix, geometry: ArrayGeometry, *, where: str = "matrix") -> list[Block]:
    """Cut a node's matrices into blocks for one crossbar type.

    Args:
        matrix: The node's weights.
        geometry: The crossbar type.
        where: Named in the error.

    Returns:
        Blocks in order of group, row and column.

    Raises:
        ChipError: One kernel is wider than a crossbar and the chip does not split slices, or a crossbar has no row
            for a weight.
    """
    if geometry.weight_rows < 1 or geometry.weight_cols < 1:
        raise ChipError(f"{where}: a crossbar of {geometry.rows} x {geometry.cols} cells cannot hold one weight")
    unit = int(geometry.unit_column)
    blocks: list[Block] = []
    seen: dict[bytes, list[tuple[int, int]]] = {}
    counts = matrix.row_counts
    for group in np.flatnonzero(counts).tolist():
        key = matrix.bits[group].tobytes()
        if key not in seen:
            seen[key] = column_cuts(column_order(matrix.bits[group], geometry.encoding), geometry, where)
        for first, last in _cuts(int(counts[group]), geometry.weight_rows):
            height = (last - first) * geometry.encoding.rows_per_weight
            blocks.extend(
                Block(group, (first, last), columns, height, columns[1] - columns[0] + unit) for columns in seen[key]
            )
    return blocks


def _cuts(length: int, limit: int) -> list[tuple[int, int]]:
    return [(start, min(start + limit, length)) for start in range(0, length, limit)]


def column_cuts(order: ColumnOrder, geometry: ArrayGeometry, where: str) -> list[tuple[int, int]]:
    """The fewest column ranges that a crossbar can hold, from the first column on.

    Raises:
        ChipError: One kernel is wider than a crossbar and the chip does not split slices.
    """
    limit = geometry.weight_cols
    if geometry.split_slices:
        return _cuts(int(order.starts[-1]), limit)
    widest = int(np.diff(order.starts).max(initial=0))
    if widest > limit:
        raise ChipError(
            f"{where}: one kernel takes {widest} columns, a crossbar has {limit} for weights; "
            "use fewer bits or a chip with split_slices"
        )
    edges = [0]
    while edges[-1] < order.starts[-1]:
        # The last kernel border within reach of one crossbar.
        edges.append(int(order.starts[np.searchsorted(order.starts, edges[-1] + limit, side="right") - 1]))
    return list(pairwise(edges))
