"""Bits for every kernel where a crossbar serves one node: what counts are whole crossbars, not cells.

A node then takes (row blocks) x (column blocks) crossbars, and nothing is saved until one of the two falls. From the
widest widths on, the budget is reached in steps, each the one that loses least per crossbar saved: either a node is
fitted into fewer columns (`best_within_columns`), or so many kernels are dropped that a reader needs one row block
less. Each step changes one node: kernels of two nodes that would save a row block only together, as where both feed the
same reader, are never dropped at once. Pairs would have to be tried in all their shares, and every trial prunes the
whole model. Columns that are left in the crossbars that remain get bits again ("fill"). Fitting is exact for the
columns that it fills; where whole kernels end a block early, it has that many fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.kernel_allocation import best_within_columns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from raqu_onnx.channel_flow import Reader
    from raqu_onnx.dropping import DropRules
    from raqu_onnx.kernel_allocation import KernelAllocator, KernelBits, Taste
    from raqu_onnx.tiling import ArrayGeometry

__all__ = ["ExclusiveAllocator"]

Counts = Callable[["KernelBits"], Mapping[str, int]]
"""Crossbars that each node takes."""


class ExclusiveAllocator:
    """Brings an allocation into a number of crossbars, each of which serves one node.

    Args:
        allocator: Losses, and the groups of kernels that share a width.
        rules: What follows from dropped kernels.
        geometry: Rows, columns and encoding of the crossbars.
        counts: Crossbars that each node takes.
    """

    def __init__(self, allocator: KernelAllocator, rules: DropRules, geometry: ArrayGeometry, counts: Counts) -> None:
        self._allocator = allocator
        self._rules = rules
        self._geometry = geometry
        self._counts = counts
        self._nodes = {node.name: node for node in allocator.nodes}
        # A step changes one node, the fits of all others are asked for again at the next one.
        self._known: dict[tuple[str, bytes, int], NDArray[np.int64] | None] = {}

    def within(self, crossbars: int, taste: Taste) -> KernelBits | None:
        """Bits of least loss found within a number of crossbars, None where no step leads there."""
        self._known.clear()
        bits = {name: self._widest(name, taste) for name in self._nodes}
        bits = {name: self._filled(name, bits, taste) for name in bits}
        while True:
            counts = self._counts(bits)
            total = sum(counts.values())
            if total <= crossbars:
                return bits
            loss = self._allocator.loss(bits, taste)
            best: tuple[float, KernelBits] | None = None
            for trial in self._steps(bits, counts, taste):
                saved = total - sum(self._counts(trial).values())
                if saved > 0:
                    rate = (self._allocator.loss(trial, taste) - loss) / min(saved, total - crossbars)
                    if best is None or rate < best[0]:
                        best = rate, trial
            if best is None:
                return None
            bits = best[1]

    def _widest(self, name: str, taste: Taste) -> NDArray[np.int64]:
        table = self._allocator.table(name, taste)
        return np.asarray(8 - np.argmax(np.isfinite(table[:, :0:-1]), axis=1), np.int64)

    def _steps(self, bits: KernelBits, counts: Mapping[str, int], taste: Taste) -> Iterator[KernelBits]:
        """Allocations that take fewer crossbars in one node: fewer columns there, or fewer rows from those it reads."""
        for name in self._nodes:
            if counts[name] > 1:
                narrower = self._narrower(name, bits, taste)
                if narrower is not None:
                    yield {**bits, name: narrower}
            for dropped in self._drops(name, bits, taste):
                trial = {**bits, name: dropped}
                # Kernels that stay may use the columns of those that went.
                yield {**trial, name: self._filled(name, trial, taste)}

    def _columns(self, name: str, bits: NDArray[np.int64]) -> int:
        """Columns of the widest group of a node."""
        taken = np.array([self._geometry.encoding.columns(b) if b != 1 else 0 for b in range(9)])
        return int(taken[bits][self._nodes[name].layout.channel_index()].sum(axis=1).max())

    def _narrower(self, name: str, bits: KernelBits, taste: Taste) -> NDArray[np.int64] | None:
        """The node in one column block less, None where it has one only or several groups share a block."""
        limit = self._geometry.weight_cols
        blocks = -(-self._columns(name, bits[name]) // limit)
        if blocks < 2 or self._nodes[name].layout.groups > 1:
            return None
        return self._fitted(name, bits[name], (blocks - 1) * limit, taste)

    def _filled(self, name: str, bits: KernelBits, taste: Taste) -> NDArray[np.int64]:
        """The widest bits in the column blocks that the node has."""
        node, limit = self._nodes[name], self._geometry.weight_cols
        if node.layout.groups > 1:
            return bits[name]
        blocks = max(1, -(-self._columns(name, bits[name]) // limit))
        found = self._fitted(name, bits[name], blocks * limit, taste)
        return bits[name] if found is None else found

    def _fitted(self, name: str, current: NDArray[np.int64], budget: int, taste: Taste) -> NDArray[np.int64] | None:
        """Best widths of the kernels that are not dropped within whole column blocks, None where none fit."""
        key = name, current.tobytes(), budget
        if key not in self._known:
            self._known[key] = self._fit(name, current, budget, taste)
        return self._known[key]

    def _fit(self, name: str, current: NDArray[np.int64], budget: int, taste: Taste) -> NDArray[np.int64] | None:
        table = self._allocator.table(name, taste)
        groups, firsts = self._allocator.members(name)
        live = [index for index, first in enumerate(firsts) if current[first]]
        sizes = np.bincount(groups)[live]
        choices = [b for b in range(2, 9) if np.isfinite(table[:, b]).any()]
        taken = np.array([self._geometry.encoding.columns(b) for b in choices])
        loss = np.stack([table[groups == index][:, choices].sum(axis=0) for index in live])
        # Kernels stay whole, so that blocks may end early: less is tried until they fit.
        for spare in range(int(taken.max()) * -(-budget // self._geometry.weight_cols) + 1):
            try:
                widths, _ = best_within_columns(loss, sizes[:, None] * taken, budget - spare)
            except ValueError:
                return None
            found = current.copy()
            for index, width in zip(live, widths.tolist(), strict=True):
                found[groups == index] = choices[width]
            if self._blocks(name, found) * self._geometry.weight_cols <= budget:
                return found
        return None

    def _blocks(self, name: str, bits: NDArray[np.int64]) -> int:
        """Column blocks of a node of one group."""
        from raqu_onnx.tiling import Matrix, tile

        return len(tile(Matrix.of(self._nodes[name].layout, bits, np.ones(1, np.int64)), self._geometry, where=name))

    def _drops(self, name: str, bits: KernelBits, taste: Taste) -> Iterator[NDArray[np.int64]]:
        """So many groups of kernels dropped, in order of loss, that a reader stores one row block less."""
        groups, firsts = self._allocator.members(name)
        losses = np.bincount(groups, self._allocator.table(name, taste)[:, 0])
        order = [k for k in np.argsort(losses, kind="stable").tolist() if math.isfinite(losses[k])]
        left = [k for k in order if bits[name][firsts[k]]]
        flow = self._rules.flows[name]
        if not left or not flow.absorbable:
            return
        pruned = self._rules.apply(bits)
        for reader in flow.readers:
            rows = pruned.row_counts(self._nodes[reader.name])
            stored = self._nodes[reader.name].layout.rows if rows is None else int(rows.max())
            over = stored - (-(-stored // self._geometry.weight_rows) - 1) * self._geometry.weight_rows
            fed = self._fed(name, reader, groups)
            needed = int(np.searchsorted(np.cumsum(fed[left]), over)) + 1
            if needed < len(left) and reader.keeps_zero:
                yield np.where(np.isin(groups, left[:needed]), 0, bits[name])

    def _fed(self, name: str, reader: Reader, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Most rows of one of a reader's groups that each group of kernels feeds, shape (groups of kernels,)."""
        member = groups[self._nodes[name].layout.channel_index().reshape(-1)]
        counts = [np.bincount(member[own[own >= 0]], minlength=int(groups.max()) + 1) for own in reader.owner]
        return np.asarray(np.max(counts, axis=0), np.int64)
