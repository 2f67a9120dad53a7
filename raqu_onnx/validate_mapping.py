"""Rules of placement: everything stored once, nothing overlapping, nothing outside.

All of it is read from the manifest alone. Placements are held as columns of integers, so that tens of thousands of them
are checked in seconds.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.manifest_stages import clashes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from raqu_onnx.manifest import Manifest, NodeEntry, PlacementEntry
    from raqu_onnx.manifest_view import ManifestView

__all__ = [
    "PlacementTable",
    "bounds_findings",
    "coverage_findings",
    "overlap_findings",
    "partial_sum_findings",
    "polarity_findings",
    "shape_findings",
    "sharing_findings",
    "turn_findings",
]

_POLARITIES = (None, "positive", "negative")


class PlacementTable:
    """All placements of a manifest as integer columns."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.entries: list[tuple[NodeEntry, PlacementEntry]] = [
            (node, placement) for node in manifest.nodes for placement in node.placements
        ]
        self.node = np.repeat(np.arange(len(manifest.nodes)), [len(node.placements) for node in manifest.nodes])
        placements = [placement for _, placement in self.entries]
        self.type = self._column([p.type for p in placements])
        self.crossbar = self._column([p.crossbar for p in placements])
        self.polarity = self._column([_POLARITIES.index(p.polarity) for p in placements])
        self.group = self._column([p.group for p in placements])
        self.replica = self._column([p.replica for p in placements])
        self.turn = self._column([p.turn for p in placements])
        self.rows = self._pairs([p.rows for p in placements])
        self.cols = self._pairs([p.cols for p in placements])
        self.weight_rows = self._pairs([p.weight_rows for p in placements])
        self.columns = self._pairs([p.columns for p in placements])

    @staticmethod
    def _column(values: list[int]) -> NDArray[np.int64]:
        return np.array(values, np.int64)

    @staticmethod
    def _pairs(values: list[tuple[int, int]]) -> NDArray[np.int64]:
        return np.array(values, np.int64).reshape(-1, 2)

    def where(self, index: int) -> str:
        """A placement in words."""
        node, placement = self.entries[index]
        number = index - int(np.searchsorted(self.node, self.node[index]))
        return f"node {node.name}: placement {number} (type {placement.type}, crossbar {placement.crossbar})"

    @cached_property
    def shared_crossbars(self) -> list[NDArray[np.int64]]:
        """Indices of the placements of each crossbar that holds several, in manifest order."""
        return [part for part in _grouped(self.type, self.crossbar) if part.size > 1]

    def node_slices(self) -> Iterator[tuple[NodeEntry, slice]]:
        """Each node with the range of its placements."""
        start = 0
        for node in self.manifest.nodes:
            yield node, slice(start, start + len(node.placements))
            start += len(node.placements)


def _grouped(*keys: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Indices of equal keys together, each ascending."""
    if not keys[0].size:
        return []
    order = np.lexsort(keys[::-1])
    ordered = np.stack(keys)[:, order]
    cuts = np.flatnonzero((ordered[:, 1:] != ordered[:, :-1]).any(axis=0)) + 1
    return np.split(order, cuts)


def bounds_findings(table: PlacementTable, view: ManifestView) -> Iterator[str]:
    """Every placement lies in a crossbar that the chip has, and holds rows and columns that its node has."""
    chip = table.manifest.chip
    for index, (node, p) in enumerate(table.entries):
        problem = None
        if p.type not in view.encodings or p.type >= len(chip.crossbars):
            problem = f"crossbar type {p.type} is not on the chip"
        elif p.group >= node.matrix.groups:
            problem = f"group {p.group}, the node has {node.matrix.groups}"
        else:
            kind, own = chip.crossbars[p.type], view.node(node)
            columns = own.columns(p.group, p.type)
            for key, (first, last), limit in (
                ("rows", p.rows, kind.rows),
                ("cols", p.cols, kind.cols),
                ("weight_rows", p.weight_rows, len(own.stored_rows(p.group))),
                ("columns", p.columns, columns.count),
                ("kernels", p.kernels, len(columns.kernels)),
            ):
                if not first < last <= limit:
                    problem = f"{key} [{first}, {last}] is not a range in 0 to {limit}"
                    break
            most = None if kind.count is None else kind.count * len(table.manifest.partitions)
            if problem is None and most is not None and p.crossbar >= most:
                problem = f"the chip has {kind.count} crossbars of type {kind.name}"
        if problem:
            yield f"{table.where(index)}: {problem}"


def shape_findings(table: PlacementTable, view: ManifestView) -> Iterator[str]:
    """Cells, weights, kernels and unit column of each placement agree. Needs `bounds_findings` to pass."""
    split = table.manifest.chip.split_slices
    for index, (node, p) in enumerate(table.entries):
        entry = view.encodings[p.type]
        columns = view.node(node).columns(p.group, p.type)
        height = (p.weight_rows[1] - p.weight_rows[0]) * entry.rows_per_weight
        width = p.columns[1] - p.columns[0] + int(entry.unit_column)
        low, high = p.kernels
        first, last = columns.starts[low], columns.starts[high]
        if p.rows[1] - p.rows[0] != height:
            yield f"{table.where(index)}: {p.rows[1] - p.rows[0]} wordlines for weights that take {height}"
        if p.cols[1] - p.cols[0] != width:
            yield f"{table.where(index)}: {p.cols[1] - p.cols[0]} bitlines for columns that take {width}"
        if p.unit_column != (p.cols[1] - 1 if entry.unit_column else None):
            yield f"{table.where(index)}: unit_column is {p.unit_column}, not the last bitline (or null)"
        if not (first <= p.columns[0] < columns.starts[low + 1] and columns.starts[high - 1] < p.columns[1] <= last):
            yield f"{table.where(index)}: kernels {list(p.kernels)} are not those of columns {list(p.columns)}"
        elif p.first_slice != p.columns[0] - first:
            yield f"{table.where(index)}: first_slice is {p.first_slice}, columns start at {p.columns[0] - first}"
        elif not split and (p.columns[0] != first or p.columns[1] != last):
            yield f"{table.where(index)}: it cuts a kernel, the chip does not split slices"
        if len(p.flipped) > p.columns[1] - p.columns[0] + 1 or sum(p.flipped) > p.columns[1] - p.columns[0]:
            yield f"{table.where(index)}: flipped: run lengths exceed its {p.columns[1] - p.columns[0]} columns"


def polarity_findings(table: PlacementTable, view: ManifestView) -> Iterator[str]:
    """Where arrays come in pairs, both hold the same at the same place; elsewhere no polarity stands."""
    paired = {kind: entry.arrays_per_placement == 2 for kind, entry in view.encodings.items()}
    pairs: dict[tuple[object, ...], list[int]] = {}
    for index, (node, p) in enumerate(table.entries):
        if not paired[p.type]:
            if p.polarity is not None:
                yield f"{table.where(index)}: polarity {p.polarity}, but one array holds both"
            continue
        if p.polarity is None or p.crossbar % 2 != int(p.polarity == "negative"):
            yield f"{table.where(index)}: polarity {p.polarity}, crossbar 2n holds the positive one, 2n + 1 the other"
        what = (node.name, p.type, p.crossbar // 2, p.rows, p.cols, p.group, p.weight_rows, p.columns, p.kernels)
        pairs.setdefault((*what, p.replica, p.partial_sum, p.turn), []).append(index)
    for members in pairs.values():
        if len(members) != 2:
            yield f"{table.where(members[0])}: its other polarity does not lie at the same place of the pair"


def coverage_findings(table: PlacementTable, view: ManifestView) -> Iterator[str]:
    """Every stored weight lies in exactly one placement per replica and polarity."""
    for node, part in table.node_slices():
        own = view.node(node)
        if not node.placements:
            if own.stored_weights():
                yield f"node {node.name}: no placement holds its {own.stored_weights()} weights"
            continue
        indices = np.arange(part.start, part.stop)
        bits = {view.encodings[placement.type].cell_bits for placement in node.placements}
        if len(bits) > 1:
            yield f"node {node.name}: lies on crossbar types whose cells hold {sorted(bits)} bits: one width only"
            continue
        replicas = np.unique(table.replica[part])
        if replicas[-1] != replicas.size - 1:
            yield f"node {node.name}: replicas are numbered {replicas[:8].tolist()}, not from 0 on"
            continue
        for replica in replicas.tolist():
            for polarity in np.unique(table.polarity[part]).tolist():
                chosen = indices[(table.replica[part] == replica) & (table.polarity[part] == polarity)]
                yield from _cover(table, view, node, chosen, f"replica {replica}")


def _cover(
    table: PlacementTable,
    view: ManifestView,
    node: NodeEntry,
    chosen: NDArray[np.int64],
    which: str,
) -> Iterator[str]:
    own = view.node(node)
    by_group = (chosen[part] for part in _grouped(table.group[chosen]))
    groups = {int(table.group[members[0]]): members for members in by_group}
    for group in range(node.matrix.groups):
        rows = len(own.stored_rows(group))
        members = groups.get(group, np.empty(0, np.int64))
        where = f"node {node.name}: {which}: group {group}"
        if not rows or not own.order(group).size:
            continue
        if not members.size:
            yield f"{where}: no placement holds its weights"
            continue
        count = own.columns(group, int(table.type[members[0]])).count
        counts, row_edges, column_edges = _depth(
            table.weight_rows[members], table.columns[members], (0, rows), (0, count)
        )
        wrong = np.argwhere(counts != 1)
        if wrong.size:
            i, j = wrong[0]
            yield (
                f"{where}: weights of rows [{row_edges[i]}, {row_edges[i + 1]}] and columns [{column_edges[j]}, "
                f"{column_edges[j + 1]}] lie in {counts[i, j]} placements"
            )


def _depth(
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    row_span: tuple[int, int] | None = None,
    column_span: tuple[int, int] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """How many rectangles cover each field of the grid that their own edges (and the spans) draw.

    Returns:
        Counts of shape (row edges - 1, column edges - 1), row edges and column edges.
    """
    row_edges = np.unique(np.concatenate([rows.ravel(), np.array(row_span or (), np.int64)]))
    column_edges = np.unique(np.concatenate([columns.ravel(), np.array(column_span or (), np.int64)]))
    r, c = np.searchsorted(row_edges, rows), np.searchsorted(column_edges, columns)
    steps = np.zeros((len(row_edges), len(column_edges)), np.int64)
    for i in (0, 1):
        for j in (0, 1):
            np.add.at(steps, (r[:, i], c[:, j]), 1 if i == j else -1)
    return steps.cumsum(axis=0).cumsum(axis=1)[:-1, :-1], row_edges, column_edges


def overlap_findings(table: PlacementTable) -> Iterator[str]:
    """No two placements share a cell."""
    for members in table.shared_crossbars:
        counts, row_edges, column_edges = _depth(table.rows[members], table.cols[members])
        wrong = np.argwhere(counts > 1)
        if wrong.size:
            i, j = wrong[0]
            row, col = int(row_edges[i]), int(column_edges[j])
            inside = [
                int(m)
                for m in members
                if table.rows[m, 0] <= row < table.rows[m, 1] and table.cols[m, 0] <= col < table.cols[m, 1]
            ]
            yield f"{table.where(inside[0])} and {table.where(inside[1])} share the cell at row {row}, column {col}"


def sharing_findings(table: PlacementTable) -> Iterator[str]:
    """Crossbars are shared as the chip allows; all of this is free under `time`."""
    mode = table.manifest.sharing
    if mode == "time":
        return
    for members in table.shared_crossbars:
        owners = table.node[members]
        if mode == "exclusive" and (owners != owners[0]).any():
            other = int(members[np.flatnonzero(owners != owners[0])[0]])
            yield f"{table.where(other)}: another node lies in this crossbar, sharing is exclusive"
        clash = clashes(table.rows[members], table.cols[members])
        np.fill_diagonal(clash, val=False)
        wrong = np.argwhere(clash)
        if wrong.size:
            yield (
                f"{table.where(int(members[wrong[0, 0]]))} and {table.where(int(members[wrong[0, 1]]))} share rows or "
                f"columns, sharing is {mode}"
            )


def partial_sum_findings(table: PlacementTable) -> Iterator[str]:
    """Placements have equal numbers exactly where they hold the same columns, numbered by first appearance."""
    for node, part in table.node_slices():
        numbers: dict[tuple[int, int, tuple[int, int]], int] = {}
        for offset, p in enumerate(node.placements):
            expected = numbers.setdefault((p.replica, p.group, p.columns), len(numbers))
            if p.partial_sum != expected:
                yield f"{table.where(part.start + offset)}: partial_sum is {p.partial_sum}, its columns have {expected}"


def turn_findings(table: PlacementTable) -> Iterator[str]:
    """Each block computes in the first turn in which no earlier block of its node stands against it."""
    expected = np.zeros(len(table.entries), np.int64)
    for members in table.shared_crossbars:
        for own in (members[part] for part in _grouped(table.node[members])):
            if own.size == 1:
                continue
            clash = clashes(table.rows[own], table.cols[own])
            for n in range(own.size):
                taken = np.unique(expected[own[:n]][clash[n, :n]])
                free = np.flatnonzero(taken != np.arange(taken.size))
                expected[own[n]] = free[0] if free.size else taken.size
    for index in np.flatnonzero(expected != table.turn).tolist():
        yield f"{table.where(index)}: turn is {table.turn[index]}, the first free one is {expected[index]}"
