"""Packing blocks into crossbars.

Three rules for what may share a crossbar, set by the chip:

* ``exclusive``: blocks of one node, with disjoint rows and disjoint columns.
* ``diagonal``: blocks of any nodes, with disjoint rows and disjoint columns, so that all can compute at once.
* ``time``: blocks of any nodes that do not overlap; those that share rows or columns take turns.

Packers place one block after another; what was placed on trial can be taken back, at a cost of what was placed only.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from raqu_onnx.hardware import Sharing

__all__ = ["DiagonalPacker", "FreeList", "GuillotinePacker", "Packer", "new_packer"]


class Packer(abc.ABC):
    """Places blocks in crossbars of one size.

    Args:
        rows: Wordlines of a crossbar.
        cols: Bitlines of a crossbar.
        limit: Most crossbars that may be opened, None for no limit.
        fields: Numbers that describe one free rectangle.
    """

    def __init__(self, rows: int, cols: int, limit: int | None = None, *, fields: int) -> None:
        self.rows = rows
        self.cols = cols
        self.limit = limit
        self.opened = 0
        self._opened_before = 0
        self._free = FreeList(fields)

    def place(self, height: int, width: int, owner: int) -> tuple[int, int, int] | None:
        """Place a block of `height` by `width` cells of the node `owner`.

        Returns:
            (crossbar, row, column) of its first cell, or None when all crossbars that may be opened are full.
        """
        # A block as large as a crossbar finds no room in one that is in use; most blocks of large models are.
        is_full = height == self.rows and width == self.cols
        spot = None if is_full else self._reuse(height, width, owner)
        if spot is not None:
            return spot
        if self.limit is not None and self.opened >= self.limit:
            return None
        crossbar = self.opened
        self.opened += 1
        self._open(crossbar, height, width, owner)
        return crossbar, 0, 0

    def begin(self) -> None:
        """From here on, `rollback` takes back every block that is placed; those placed before stay for good."""
        self._opened_before = self.opened
        self._free.begin()

    def rollback(self) -> None:
        """Return to the state at the last `begin`, and trial placing starts anew."""
        self.opened = self._opened_before
        self._free.rollback()

    @abc.abstractmethod
    def _reuse(self, height: int, width: int, owner: int) -> tuple[int, int, int] | None:
        """Place a block in a crossbar that is already open."""

    @abc.abstractmethod
    def _open(self, crossbar: int, height: int, width: int, owner: int) -> None:
        """Record a block at the first cell of a new crossbar."""


class FreeList:
    """Growing table of integer rows with a mask of those in use; lets numpy search it as a whole."""

    def __init__(self, fields: int) -> None:
        self.rows = np.zeros((64, fields), np.int64)
        self.used = np.zeros(64, bool)
        self.top = 0
        self._holes: list[int] = []
        # What undoes each change since `begin`: index, values popped or None, whether it filled a hole.
        self._journal: list[tuple[int, list[int] | None, bool]] | None = None

    def add(self, *values: int) -> None:
        """Put a row in use."""
        from_hole = bool(self._holes)
        if from_hole:
            index = self._holes.pop()
        else:
            index = self.top
            self.top += 1
            if index == len(self.rows):
                self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
                self.used = np.concatenate([self.used, np.zeros_like(self.used)])
        self.rows[index] = values
        self.used[index] = True
        if self._journal is not None:
            self._journal.append((index, None, from_hole))

    def pop(self, index: int) -> list[int]:
        """Take a row out of use and return its values."""
        self.used[index] = False
        self._holes.append(index)
        values: list[int] = self.rows[index].tolist()
        if self._journal is not None:
            self._journal.append((index, values, False))
        return values

    def begin(self) -> None:
        """From here on, `rollback` undoes every change."""
        self._journal = []

    def rollback(self) -> None:
        """Return to the state at the last `begin`."""
        for index, popped, from_hole in reversed(self._journal or []):
            self.used[index] = popped is not None
            if popped is not None:
                self.rows[index] = popped
                self._holes.pop()
            elif from_hole:
                self._holes.append(index)
            else:
                self.top -= 1
        self._journal = []


class GuillotinePacker(Packer):
    """Non-overlapping rectangles: best short side fit, split along the shorter leftover axis.

    Source: J. Jylaenki, "A Thousand Ways to Pack the Bin", 2010, sections 2.2 (GUILLOTINE) and 2.2.3 (SAS).
    """

    def __init__(self, rows: int, cols: int, limit: int | None = None) -> None:
        super().__init__(rows, cols, limit, fields=5)  # crossbar, row, column, height, width

    def _reuse(self, height: int, width: int, owner: int) -> tuple[int, int, int] | None:  # noqa: ARG002
        free = self._free
        spare_rows = free.rows[: free.top, 3] - height
        spare_cols = free.rows[: free.top, 4] - width
        fits = np.flatnonzero(free.used[: free.top] & (spare_rows >= 0) & (spare_cols >= 0))
        if not fits.size:
            return None
        short_side = np.minimum(spare_rows[fits], spare_cols[fits])
        best = fits[np.lexsort((free.rows[fits, 0], short_side))[0]]
        crossbar, row, col, free_height, free_width = free.pop(int(best))
        self._split(crossbar, row, col, free_height, free_width, height, width)
        return crossbar, row, col

    def _open(self, crossbar: int, height: int, width: int, owner: int) -> None:  # noqa: ARG002
        self._split(crossbar, 0, 0, self.rows, self.cols, height, width)

    def _split(
        self, crossbar: int, row: int, col: int, free_height: int, free_width: int, height: int, width: int
    ) -> None:
        spare_rows, spare_cols = free_height - height, free_width - width
        # The cut runs so that the larger leftover stays whole.
        horizontal = spare_cols < spare_rows
        below = free_width if horizontal else width
        beside = height if horizontal else free_height
        if spare_rows:
            self._free.add(crossbar, row + height, col, spare_rows, below)
        if spare_cols:
            self._free.add(crossbar, row, col + width, beside, spare_cols)


class DiagonalPacker(Packer):
    """Blocks corner to corner, so that no two share a row or a column.

    Args:
        rows: Wordlines of a crossbar.
        cols: Bitlines of a crossbar.
        limit: Most crossbars that may be opened, None for no limit.
        exclusive: A crossbar takes blocks of one node only.
    """

    def __init__(self, rows: int, cols: int, limit: int | None = None, *, exclusive: bool = False) -> None:
        super().__init__(rows, cols, limit, fields=4)  # crossbar, rows left, columns left, owner
        self.exclusive = exclusive

    def _reuse(self, height: int, width: int, owner: int) -> tuple[int, int, int] | None:
        free = self._free
        table = free.rows[: free.top]
        spare_rows, spare_cols = table[:, 1] - height, table[:, 2] - width
        fits = free.used[: free.top] & (spare_rows >= 0) & (spare_cols >= 0)
        if self.exclusive:
            fits &= table[:, 3] == owner
        candidates = np.flatnonzero(fits)
        if not candidates.size:
            return None
        left = np.minimum(spare_rows[candidates] / self.rows, spare_cols[candidates] / self.cols)
        best = int(candidates[np.lexsort((table[candidates, 0], left))[0]])
        crossbar, rows_left, cols_left, _ = free.pop(best)
        self._keep(crossbar, rows_left - height, cols_left - width, owner)
        return crossbar, self.rows - rows_left, self.cols - cols_left

    def _open(self, crossbar: int, height: int, width: int, owner: int) -> None:
        self._keep(crossbar, self.rows - height, self.cols - width, owner)

    def _keep(self, crossbar: int, rows_left: int, cols_left: int, owner: int) -> None:
        if rows_left and cols_left:
            self._free.add(crossbar, rows_left, cols_left, owner)


def new_packer(sharing: Sharing, rows: int, cols: int, limit: int | None = None) -> Packer:
    """The packer for a chip's sharing mode."""
    if sharing == "time":
        return GuillotinePacker(rows, cols, limit)
    return DiagonalPacker(rows, cols, limit, exclusive=sharing == "exclusive")
