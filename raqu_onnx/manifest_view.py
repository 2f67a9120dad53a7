"""The manifest's run lengths, ranges and tables as arrays.

Everything here follows from the manifest alone; what decodes cells or runs MVMs reads nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.layout import MappedNode, WeightLayout, Window

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.manifest import EncodingEntry, Manifest, MatrixEntry, NodeEntry, PlacementEntry

__all__ = [
    "CellTable",
    "GroupColumns",
    "ManifestView",
    "NodeView",
    "cell_table",
    "expand_ranges",
    "flip_mask",
    "flip_runs",
    "layout_of",
    "mapped_node_of",
    "to_ranges",
]


def expand_ranges(ranges: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """The numbers that half-open ranges hold, one after the other."""
    parts = [np.arange(first, last, dtype=np.int64) for first, last in ranges]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def to_ranges(numbers: NDArray[np.integer]) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of consecutive numbers, in the order given."""
    if not numbers.size:
        return ()
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    firsts = numbers[np.concatenate([[0], cuts])]
    lasts = numbers[np.concatenate([cuts - 1, [numbers.size - 1]])] + 1
    return tuple(zip(firsts.tolist(), lasts.tolist(), strict=True))


def flip_runs(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """Run lengths of a mask: False, True, False, ...; a last run of False is left out."""
    if not mask.any():
        return ()
    last = int(np.flatnonzero(mask)[-1]) + 1
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask[:last], [False]]).astype(np.int8)))
    return tuple(np.diff(edges, prepend=0).tolist())


def flip_mask(runs: Sequence[int], length: int) -> NDArray[np.bool_]:
    """Inverse of `flip_runs`."""
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.concatenate([values, np.zeros(length - values.size, bool)])


def layout_of(matrix: MatrixEntry) -> WeightLayout:
    """The weight layout that a manifest describes."""
    return WeightLayout(matrix.kind, matrix.shape, matrix.groups)


def mapped_node_of(entry: NodeEntry) -> MappedNode:
    """The node as the manifest describes it; its float weight and bias have no name there."""
    return MappedNode(
        name=entry.name,
        op_type=entry.op_type,
        input_name="" if entry.activation is None else entry.activation.tensor,
        weight_name=entry.weight,
        bias_name=None,
        output_name=entry.output,
        layout=layout_of(entry.matrix),
        window=None if entry.window is None else Window(**entry.window.model_dump()),
        input_transposed=entry.input_transposed,
        constant_left=entry.constant_left,
    )


@dataclass(frozen=True)
class GroupColumns:
    """The columns of one group in one crossbar type's encoding.

    Attributes:
        kernels: Stored kernels in column order.
        bits: Width of each of them.
        starts: First column of each and, last, the number of columns.
    """

    kernels: NDArray[np.int64]
    bits: NDArray[np.int64]
    starts: NDArray[np.int64]

    @property
    def count(self) -> int:
        """Number of columns."""
        return int(self.starts[-1])


@dataclass(frozen=True)
class CellTable:
    """What one level of a cell adds to its weight, for kernels of one width.

    Attributes:
        weights: `sign * 2**shift`, shape (arrays, rows per weight, columns); 0 where no cell is.
        offsets: Subtracted together with each column, shape (columns,): the width's offset at the first, else 0.
    """

    weights: NDArray[np.int64]
    offsets: NDArray[np.int64]


def cell_table(encoding: EncodingEntry) -> dict[int, CellTable]:
    """Cell tables by width."""
    tables = {}
    for width in encoding.widths:
        weights = np.zeros((encoding.arrays_per_placement, encoding.rows_per_weight, width.columns), np.int64)
        for part in width.slices:
            array = int(encoding.arrays_per_placement == 2 and part.polarity == "negative")
            weights[array, part.row, part.column] += part.sign << part.shift
        offsets = np.zeros(width.columns, np.int64)
        offsets[0] = width.offset
        tables[width.bits] = CellTable(weights, offsets)
    return tables


@dataclass(frozen=True)
class NodeView:
    """One node of a manifest as arrays."""

    entry: NodeEntry
    tables: dict[int, dict[int, CellTable]]

    @cached_property
    def layout(self) -> WeightLayout:
        """How the ONNX tensor is read as matrices."""
        return layout_of(self.entry.matrix)

    @cached_property
    def channel_bits(self) -> NDArray[np.int64]:
        """Bits along the scale axis."""
        widths = [bits for bits, _ in self.entry.bits]
        return np.repeat(np.array(widths, np.int64), [count for _, count in self.entry.bits])

    @cached_property
    def bits(self) -> NDArray[np.int64]:
        """Bits of every kernel, shape (G, M)."""
        return self.channel_bits[self.layout.channel_index()]

    def order(self, group: int) -> NDArray[np.int64]:
        """Stored kernels of a group in column order."""
        order = self.entry.kernel_order
        return self._all_kernels if order is None else expand_ranges(order[group])

    @cached_property
    def _all_kernels(self) -> NDArray[np.int64]:
        return np.arange(self.entry.matrix.kernels)

    @cached_property
    def _all_rows(self) -> NDArray[np.int64]:
        return np.arange(self.entry.matrix.rows)

    @cached_property
    def _skipped(self) -> dict[int, list[tuple[int, int]]]:
        skipped: dict[int, list[tuple[int, int]]] = {}
        for group, first, last in self.entry.rows_not_stored:
            skipped.setdefault(group, []).append((first, last))
        return skipped

    def stored_rows(self, group: int) -> NDArray[np.int64]:
        """Rows of a group's matrix that are stored, ascending."""
        skipped = self._skipped.get(group)
        return self._all_rows if skipped is None else np.setdiff1d(self._all_rows, expand_ranges(skipped))

    @cached_property
    def _by_group(self) -> dict[tuple[int, int], GroupColumns]:
        return {}

    @cached_property
    def _by_widths(self) -> dict[tuple[int, bytes, bytes], GroupColumns]:
        return {}

    @cached_property
    def _cell_tables(self) -> dict[tuple[int, int], CellTable]:
        return {}

    def columns(self, group: int, crossbar_type: int) -> GroupColumns:
        """The columns of a group on a crossbar type."""
        found = self._by_group.get((group, crossbar_type))
        if found is None:
            kernels = self.order(group)
            bits = self.bits[group, kernels]
            # Groups with the same widths share one object: a depthwise node has thousands of groups.
            key = (crossbar_type, kernels.tobytes(), bits.tobytes())
            if key not in self._by_widths:
                tables = self.tables[crossbar_type]
                widths = [tables[b].offsets.size for b in bits.tolist()]
                starts = np.concatenate([[0], np.cumsum(np.array(widths, np.int64))])
                self._by_widths[key] = GroupColumns(kernels, bits, starts)
            found = self._by_group[group, crossbar_type] = self._by_widths[key]
        return found

    def cells(self, columns: GroupColumns, crossbar_type: int) -> CellTable:
        """The cell tables of all kernels of a group side by side, in column order."""
        key = (crossbar_type, id(columns))
        if key not in self._cell_tables:
            parts = [self.tables[crossbar_type][b] for b in columns.bits.tolist()]
            self._cell_tables[key] = CellTable(
                np.concatenate([part.weights for part in parts], axis=2),
                np.concatenate([part.offsets for part in parts]),
            )
        return self._cell_tables[key]

    def stored_weights(self) -> int:
        """Weights that crossbars hold, once per replica."""
        groups = range(self.entry.matrix.groups)
        return sum(len(self.stored_rows(g)) * int(np.count_nonzero(self.bits[g])) for g in groups)


class ManifestView:
    """A manifest as arrays, computed when asked for.

    Args:
        manifest: A manifest whose numbers agree with each other; `validate` checks that they do.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.encodings = {entry.crossbar_type: entry for entry in manifest.encodings}
        tables = {index: cell_table(entry) for index, entry in self.encodings.items()}
        self.nodes = {entry.name: NodeView(entry, tables) for entry in manifest.nodes}

    def node(self, entry: NodeEntry) -> NodeView:
        """The view of one node."""
        return self.nodes[entry.name]

    @cached_property
    def by_crossbar(self) -> dict[tuple[int, int], list[tuple[NodeEntry, PlacementEntry]]]:
        """Placements by (crossbar type, crossbar), both ascending."""
        found: dict[tuple[int, int], list[tuple[NodeEntry, PlacementEntry]]] = {}
        for node in self.manifest.nodes:
            for placement in node.placements:
                found.setdefault((placement.type, placement.crossbar), []).append((node, placement))
        return dict(sorted(found.items()))

    def array_index(self, placement: PlacementEntry) -> int:
        """First axis of `CellTable.weights` for a placement."""
        paired = self.encodings[placement.type].arrays_per_placement == 2
        return int(paired and placement.polarity == "negative")
