"""Bits for every kernel of a model at a price per cell, and at a budget.

Choosing widths so that the sum of losses is least within a number of cells is a multiple-choice knapsack. With a price
per cell every kernel decides for itself, and the answer is optimal for the cells that it takes (Everett, "Generalized
Lagrange multiplier method", Operations Research 11(3), 1963, theorem 1): the convex relaxation of the knapsack
(Sinha, Zoltners, "The multiple-choice knapsack problem", Operations Research 27(3), 1979). The price is found by
bisection, and what is left of the budget then goes to the kernels that gain most per cell.

Dropping a kernel also saves the rows that it feeds, whose cells depend on the widths of the reader's kernels in turn:
the prices of rows and the choice of widths are brought into agreement by turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.dropping import DropRules
    from raqu_onnx.encodings import Encoding
    from raqu_onnx.kernel_losses import NodeLosses
    from raqu_onnx.layout import MappedNode

__all__ = ["KernelAllocator", "KernelBits", "Taste", "best_within_columns"]

KernelBits = dict[str, "NDArray[np.int64]"]
"""Bits per entry of the scale axis by node name, shape (channels,)."""

Fits = Callable[[KernelBits], bool]
"""Whether an allocation is within the budget."""

# Turns after which prices of rows and widths agree, or never will.
_TURNS = 12
# Ratio of prices at which the bisection ends.
_CLOSE = 1.001
_FILL_ROUNDS = 3


@dataclass(frozen=True)
class Taste:
    """What a search changes about the losses that kernels are allocated by.

    Attributes:
        nodes: Factor on the losses of a node, by name; 1 where absent.
        dropping: Factor on the losses of dropped kernels; infinite to drop none.
    """

    nodes: Mapping[str, float] = field(default_factory=dict)
    dropping: float = 1.0


class KernelAllocator:
    """Allocates bits to the kernels of one model.

    Args:
        nodes: The mapped nodes, in graph order; also an attribute.
        losses: Losses of their kernels.
        rules: What follows from dropped kernels.
        encoding: How weights are stored, which gives the cells of a width.
        groups: Entries of each node's scale axis that must have the same bits, as a number per entry; all apart where
            a node is absent.
    """

    def __init__(
        self,
        nodes: Sequence[MappedNode],
        losses: Mapping[str, NodeLosses],
        rules: DropRules,
        encoding: Encoding,
        groups: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> None:
        self.nodes = list(nodes)
        self._losses = losses
        self._rules = rules
        self._groups = groups or {}
        self._index = {node.name: node.layout.channel_index() for node in nodes}
        self._followers = {name: item.followers_by_node() for name, item in losses.items()}
        self._fed = {node.name: list(self._rows_fed(node)) for node in nodes}
        widths = [encoding.cells_per_weight(bits) if bits != 1 else 0 for bits in range(9)]
        self._cells = dict.fromkeys(self._index, np.array(widths, np.float64))

    def priced(self, cells: Mapping[str, NDArray[np.float64]]) -> KernelAllocator:
        """The same allocator where nodes lie on crossbar types with cells of different bits.

        Args:
            cells: Cells that a weight of each node takes at every width, shape (9,), by name.
        """
        other = copy(self)
        other._cells = dict(cells)
        return other

    def cells(self, bits: KernelBits) -> int:
        """Cells that an allocation programs."""
        pruned = self._rules.apply(bits)
        rows = {node.name: self._rows(node, pruned.row_counts(node)) for node in self.nodes}
        return round(sum(float(count @ self._cells[name][pruned.bits[name]]) for name, count in rows.items()))

    def loss(self, bits: KernelBits, taste: Taste) -> float:
        """Sum of the losses of all kernels; those that only follow a dropped one are counted with it."""
        total = 0.0
        gone: set[tuple[str, int]] = set()
        for node in self.nodes:
            table = self.table(node.name, taste)
            found = table[np.arange(len(table)), bits[node.name]]
            found[[channel for name, channel in gone if name == node.name]] = 0.0
            total += float(found[np.isfinite(found)].sum())
            for entry in np.flatnonzero(bits[node.name] == 0).tolist():
                gone |= {(item.name, item.channel) for item in self._losses[node.name].followers.get(entry, ())}
        return total

    def at_price(self, price: float, taste: Taste) -> KernelBits:
        """Bits with the least sum of losses and cells at a price in loss per cell."""
        tables = {node.name: self.table(node.name, taste) for node in self.nodes}
        bits = {name: np.argmin(np.where(np.arange(9) > 0, table, np.inf), axis=1) for name, table in tables.items()}
        seen: set[bytes] = set()
        for _ in range(_TURNS):
            bits = self._turn(bits, tables, price)
            key = b"".join(found.tobytes() for found in bits.values())
            if key in seen:
                break
            seen.add(key)
        return bits

    def _turn(self, bits: KernelBits, tables: Mapping[str, NDArray[np.float64]], price: float) -> KernelBits:
        """Widths at the row prices that the widths before give."""
        pruned = self._rules.apply(bits)
        chosen: KernelBits = {}
        kept: dict[str, NDArray[np.float64]] = {}
        credit: dict[str, NDArray[np.float64]] = {}
        for node in reversed(self.nodes):
            name = node.name
            rows = self._rows(node, pruned.row_counts(node))
            alone = tables[name] + price * rows[:, None] * self._cells[name]
            alone[:, 0] = np.inf
            wide = np.argmin(self._together(name, alone), axis=1)
            kept[name] = alone[np.arange(len(alone)), wide]
            credit[name] = self._credit(node, pruned.bits)
            for entries, reader, channels in self._followers[name]:
                np.add.at(kept[name], entries, kept[reader][channels])
                np.add.at(credit[name], entries, credit[reader][channels])
            gain = kept[name] - tables[name][:, 0] + price * credit[name]
            gain = self._together(name, gain[:, None])[:, 0]
            chosen[name] = np.where(gain > 0, 0, wide)
            if not chosen[name].any():
                # A node that computes nothing at all is no longer the same model.
                best = np.flatnonzero(self._group(name) == self._group(name)[np.argmin(gain)])
                chosen[name][best] = wide[best]
        return {node.name: chosen[node.name] for node in self.nodes}

    def _group(self, name: str) -> NDArray[np.int64]:
        return self._groups.get(name, np.arange(len(self._losses[name].loss)))

    def _together(self, name: str, costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Costs of each entry's whole group, shape as given."""
        if name not in self._groups:
            return costs
        index = self._groups[name]
        total = np.zeros((int(index.max()) + 1, costs.shape[1]))
        np.add.at(total, index, costs)
        return total[index]

    def members(self, name: str) -> tuple[NDArray[np.int64], list[int]]:
        """Number of the group of every entry of a node's scale axis, from 0 on, and the first entry of each group."""
        _, firsts, groups = np.unique(self._group(name), return_index=True, return_inverse=True)
        return groups, firsts.tolist()

    def table(self, name: str, taste: Taste) -> NDArray[np.float64]:
        """Losses of a node's kernels at every width under a taste, shape (channels, 9)."""
        table = self._losses[name].loss * taste.nodes.get(name, 1.0)
        table[:, 0] = np.inf if math.isinf(taste.dropping) else table[:, 0] * taste.dropping
        return table

    def _rows(self, node: MappedNode, counts: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """Stored rows under each entry of the scale axis, over all groups that share it, shape (channels,)."""
        index = self._index[node.name]
        per_group = np.full(len(index), node.layout.rows) if counts is None else counts
        rows = np.bincount(index.reshape(-1), np.repeat(per_group, index.shape[1]), node.layout.channels)
        return rows.astype(np.int64)

    def _credit(self, node: MappedNode, bits: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float64]:
        """Cells of the rows that each entry of a node's scale axis feeds, shape (channels,)."""
        index = self._index[node.name].reshape(-1)
        saved = np.zeros(index.size)
        for reader, owners, groups in self._fed[node.name]:
            per_row = self._cells[reader][bits[reader]][self._index[reader]].sum(axis=1)
            saved += np.bincount(owners, per_row[groups], index.size)
        return np.asarray(np.bincount(index, saved, node.layout.channels), np.float64)

    def _rows_fed(self, node: MappedNode) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.int64]]]:
        """Readers of a node that need not store rows of its dropped kernels: name, owner and group of each row."""
        flow = self._rules.flows[node.name]
        for reader in flow.readers if flow.absorbable else ():
            if reader.keeps_zero:
                groups, rows = np.nonzero(reader.owner >= 0)
                yield reader.name, reader.owner[groups, rows], groups

    # --- a budget -----------------------------------------------------------------------------------------------

    def within(self, fits: Fits, taste: Taste, cells: float = math.inf) -> KernelBits | None:
        """Bits of least loss that fit, None where nothing does.

        Args:
            fits: Whether an allocation is within the budget; more cells never fit where fewer do not.
            taste: Factors on the losses.
            cells: More cells than these never fit, which is quicker to tell.

        Returns:
            Bits, None where nothing fits.
        """
        low, high = self._prices(taste)

        def small(bits: KernelBits) -> bool:
            return self.cells(bits) <= cells

        if math.isfinite(cells):
            best, _ = self._dearest(small, low, high, taste)
            # Most placements use nearly every cell: then that is the answer but for the last few.
            if best is not None and fits(best):
                return self._fill(best, small, fits, taste)
        best, above = self._dearest(lambda bits: small(bits) and fits(bits), low, high, taste)
        if best is None or above is None:
            return best
        return self._fill(best, small, fits, taste)

    def dearest(self, taste: Taste) -> KernelBits:
        """Bits at a price above any loss: no allocation takes fewer cells, or hardly any."""
        return self.at_price(self._prices(taste)[1], taste)

    def _dearest(
        self, fits: Fits, low: float, high: float, taste: Taste
    ) -> tuple[KernelBits | None, KernelBits | None]:
        """Bits that fit at the lowest price at which any do, None where none do; and those just too large, if any."""
        best = self.at_price(high, taste)
        if not fits(best):
            return None, None
        above = self.at_price(low, taste)
        if fits(above):
            return above, None
        # Between closer prices hardly a kernel changes its mind, and what is left over is filled by gain per cell.
        while high > low * _CLOSE:
            middle = math.sqrt(low * high)
            found = self.at_price(middle, taste)
            if fits(found):
                best, high = found, middle
            else:
                above, low = found, middle
        return best, above

    def _prices(self, taste: Taste) -> tuple[float, float]:
        """Prices at which cells cost next to nothing, and more than any loss."""
        tables = [self.table(node.name, taste) for node in self.nodes]
        losses = np.concatenate([table[np.isfinite(table) & (table > 0)] for table in tables])
        most = float(losses.max(initial=1e-12))
        return most * 1e-14, most * 1e3

    def _fill(self, bits: KernelBits, small: Fits, fits: Fits, taste: Taste) -> KernelBits:
        """Spend what is left of the budget on the widths that gain most per cell."""
        for _ in range(_FILL_ROUNDS):
            taken = 0
            # Crossbars whose cells hold other bits may have room where these have none.
            for steps in self._by_prices(self._upgrades(bits, taste)):
                bits, low = self._filled(bits, steps, small, fits)
                taken += low
            if not taken:
                break
        return bits

    def _by_prices(self, steps: Sequence[_Step]) -> list[list[_Step]]:
        """Steps of nodes whose weights take the same cells, in their order."""
        found: dict[bytes, list[_Step]] = {}
        for step in steps:
            found.setdefault(self._cells[step.name].tobytes(), []).append(step)
        return list(found.values())

    def _filled(self, bits: KernelBits, steps: Sequence[_Step], small: Fits, fits: Fits) -> tuple[KernelBits, int]:
        """As many of the first steps as fit, and a few of the smaller ones behind them; how many are of the first."""
        low = high = _most(len(steps), lambda count: small(_upgraded(bits, steps[:count])))
        # Most placements use nearly every cell: trying all that cells allow first saves most of them.
        if not fits(_upgraded(bits, steps[:high])):
            low = _most(high - 1, lambda count: fits(_upgraded(bits, steps[:count])))
        bits = _upgraded(bits, steps[:low])
        if low < len(steps):
            # The next one is too large; smaller ones behind it may still go in.
            rest = [step for step in steps[low + 1 :] if step.cells < steps[low].cells]
            bits = self._fill_singly(bits, rest[:_FILL_ROUNDS], lambda bits: small(bits) and fits(bits))
        return bits, low

    def _fill_singly(self, bits: KernelBits, steps: Sequence[_Step], fits: Fits) -> KernelBits:
        for step in steps:
            trial = _upgraded(bits, [step])
            if fits(trial):
                bits = trial
        return bits

    def _upgrades(self, bits: KernelBits, taste: Taste) -> list[_Step]:
        """The next width of every group of kernels, by falling gain per cell."""
        pruned = self._rules.apply(bits)
        steps: list[_Step] = []
        for node in self.nodes:
            table = self._together(node.name, self.table(node.name, taste))
            own_rows = self._rows(node, pruned.row_counts(node)).astype(np.float64)
            rows = self._together(node.name, own_rows[:, None])[:, 0]
            group, firsts = self.members(node.name)
            current, cells = bits[node.name], self._cells[node.name]
            wider = np.isfinite(table) & (np.arange(9) > current[:, None]) & (current[:, None] > 0)
            taken = rows[:, None] * (cells - cells[current][:, None])
            saved = table[np.arange(len(table)), current][:, None] - np.where(wider, table, 0.0)
            gains = np.where(wider, saved / np.maximum(taken, 1e-9), -np.inf)
            best = np.argmax(gains, axis=1)
            for entry in (first for first in firsts if gains[first, best[first]] > 0):
                width = int(best[entry])
                members = np.flatnonzero(group == group[entry])
                steps.append(_Step(float(gains[entry, width]), node.name, members, width, float(taken[entry, width])))
        return sorted(steps, key=lambda step: -step.gain)


@dataclass(frozen=True)
class _Step:
    """One group of kernels made wider."""

    gain: float
    name: str
    entries: NDArray[np.int64]
    bits: int
    cells: float


def _most(count: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `count` for which something holds that holds for all smaller ones, and for 0."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _upgraded(bits: KernelBits, steps: Sequence[_Step]) -> KernelBits:
    changed = {step.name: bits[step.name].copy() for step in steps}
    for step in steps:
        changed[step.name][step.entries] = step.bits
    return {**bits, **changed}


def best_within_columns(
    loss: NDArray[np.float64], columns: NDArray[np.int64], budget: int
) -> tuple[NDArray[np.int64], float]:
    """Widths of one node's kernels with the least sum of losses within a number of columns: exact.

    Dynamic programming over columns, `O(kernels * widths * budget)`.

    Args:
        loss: Loss of every kernel at every width, shape (kernels, widths); infinite where a width is not allowed.
        columns: Columns that each width takes, shape (widths,), or of every kernel, shape (kernels, widths).
        budget: Most columns.

    Returns:
        Index of the width of each kernel, shape (kernels,), and the sum of losses.

    Raises:
        ValueError: No choice fits.
    """
    kernels = len(loss)
    columns = np.broadcast_to(columns, loss.shape)
    best = np.zeros(budget + 1)
    choice = np.zeros((kernels, budget + 1), np.int8)
    for kernel in range(kernels):
        found = np.full(budget + 1, np.inf)
        for width, taken in enumerate(columns[kernel].tolist()):
            if taken > budget or not math.isfinite(loss[kernel, width]):
                continue
            trial = best[: budget + 1 - taken] + loss[kernel, width]
            better = trial < found[taken:]
            found[taken:][better] = trial[better]
            choice[kernel, taken:][better] = width
        best = found
    if not math.isfinite(best[budget]):
        raise ValueError(f"{kernels} kernels do not fit {budget} columns at any width")
    widths = np.empty(kernels, np.int64)
    left = budget
    for kernel in range(kernels - 1, -1, -1):
        widths[kernel] = choice[kernel, left]
        left -= int(columns[kernel, widths[kernel]])
    return widths, float(best[budget])
