"""The crossbars of a manifest and what lies in them, as rectangles in units of cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.manifest_view import ManifestView, to_ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.manifest import Manifest, NodeEntry, PlacementEntry
    from raqu_onnx.manifest_view import GroupColumns

__all__ = ["Band", "FloorPlan", "floor_plan", "ranges_text"]

# Between crossbars, as a share of the widest one.
_GAP = 0.08
# Width of the whole over its height.
_ASPECT = 1.7
# Rectangles up to which those of several widths are split; more would make the page large and slow.
_MOST_RECTANGLES = 60_000
# Ranges of kernels that are named one by one.
_MOST_RANGES = 4


@dataclass(frozen=True)
class Band:
    """Crossbars of one type in one partition, which stand together.

    Attributes:
        partition: Index of the partition.
        type: Index of the crossbar type.
        first: First crossbar number.
        count: How many there are.
        top: Vertical place of its first line.
    """

    partition: int
    type: int
    first: int
    count: int
    top: float


@dataclass(frozen=True)
class FloorPlan:
    """Rectangles as left, top, right, bottom, shape (N, 4), y downwards.

    Attributes:
        bands: From top to bottom.
        crossbars: Rectangles of the crossbars.
        blocks: Rectangles of weights; unit columns are left out.
        nodes: Index of each block's node.
        bits: Bits of its weights; a mean where blocks are not split by width.
        types: Its crossbar's type.
        arrays: Its crossbar's number among those of the type.
        rows: Its wordlines, half-open, shape (N, 2).
        cols: Its bitlines, likewise.
        weight_rows: Its rows in the sequence of the group's stored rows, likewise.
        kernels: Its output channels, as text.
        slices: Bitlines that one of its kernels takes, as text.
        copies: Which copy of the node it belongs to.
        split: Blocks are split where the width changes.
    """

    bands: tuple[Band, ...]
    crossbars: NDArray[np.float32]
    blocks: NDArray[np.float32]
    nodes: NDArray[np.int32]
    bits: NDArray[np.float32]
    types: NDArray[np.int32]
    arrays: NDArray[np.int32]
    rows: NDArray[np.int32]
    cols: NDArray[np.int32]
    weight_rows: NDArray[np.int32]
    kernels: tuple[str, ...]
    slices: tuple[str, ...]
    copies: NDArray[np.int32]
    split: bool

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the whole, in cells."""
        if not len(self.crossbars):
            return 1.0, 1.0
        return float(self.crossbars[:, 2].max()), float(self.crossbars[:, 3].max())


@dataclass(frozen=True)
class _Run:
    """Neighbouring kernels of one width in a block: columns from the block's first on."""

    first: int
    last: int
    bits: float
    kernels: NDArray[np.int64]
    widths: tuple[int, ...]


def floor_plan(manifest: Manifest) -> FloorPlan:
    """Lay out the crossbars of a manifest, to scale."""
    view = ManifestView(manifest)
    bands, corners, crossbars = _corners(manifest)
    runs = _Runs(view)
    split = sum(runs.count(node, item) for node, item in _placements(manifest)) <= _MOST_RECTANGLES
    boxes: list[tuple[float, ...]] = []
    facts: list[tuple[float, ...]] = []
    kernels: list[str] = []
    slices: list[str] = []
    for index, node in enumerate(manifest.nodes):
        for item in node.placements:
            left, top = corners[item.type, item.crossbar]
            first = item.cols[0] + (item.unit_column == item.cols[0])
            for run in runs.of(node, item, split=split):
                cols = (first + run.first, first + run.last)
                boxes.append((left + cols[0], top + item.rows[0], left + cols[1], top + item.rows[1]))
                where = (item.type, item.crossbar, *item.rows, *cols)
                facts.append((index, run.bits, *where, *item.weight_rows, item.replica))
                kernels.append(runs.text(run, item.group * node.matrix.kernels))
                slices.append(_span(run.widths))
    table = np.array(facts, np.float64).reshape(-1, 11)
    whole = table.astype(np.int32)
    return FloorPlan(
        bands=bands,
        crossbars=crossbars,
        blocks=np.array(boxes, np.float32).reshape(-1, 4),
        nodes=whole[:, 0],
        bits=table[:, 1].astype(np.float32),
        types=whole[:, 2],
        arrays=whole[:, 3],
        rows=whole[:, 4:6],
        cols=whole[:, 6:8],
        weight_rows=whole[:, 8:10],
        kernels=tuple(kernels),
        slices=tuple(slices),
        copies=whole[:, 10],
        split=split,
    )


def _placements(manifest: Manifest) -> Iterator[tuple[NodeEntry, PlacementEntry]]:
    return ((node, item) for node in manifest.nodes for item in node.placements)


def _corners(
    manifest: Manifest,
) -> tuple[tuple[Band, ...], dict[tuple[int, int], tuple[int, int]], NDArray[np.float32]]:
    """Bands, upper left corners by crossbar type and number, and the rectangles of all crossbars."""
    kinds = manifest.chip.crossbars
    used = [
        (part, kind, first, last)
        for part, partition in enumerate(manifest.partitions)
        for kind, (first, last) in enumerate(partition.crossbars)
        if last > first
    ]
    # Whole cells: single precision holds every corner exactly.
    gap = max(1, round(_GAP * max(kind.cols for kind in kinds)))
    cells = sum((kinds[k].rows + gap) * (kinds[k].cols + gap) * (last - first) for _, k, first, last in used)
    width = max([math.sqrt(cells * _ASPECT), *(kinds[k].cols for _, k, _, _ in used)])
    bands, boxes, corners, top = [], [], {}, 0
    for part, kind, first, last in used:
        rows, cols = kinds[kind].rows, kinds[kind].cols
        abreast = max(1, min(last - first, round((width + gap) / (cols + gap))))
        bands.append(Band(part, kind, first, last - first, top))
        for number in range(first, last):
            line, place = divmod(number - first, abreast)
            x, y = place * (cols + gap), top + line * (rows + gap)
            corners[kind, number] = (x, y)
            boxes.append((x, y, x + cols, y + rows))
        # Room for a caption above the next band.
        top += math.ceil((last - first) / abreast) * (rows + gap) + 2 * gap
    return tuple(bands), corners, np.array(boxes, np.float32).reshape(-1, 4)


class _Runs:
    """How the columns of placements fall into kernels of one width; placements with the same columns share them."""

    def __init__(self, view: ManifestView) -> None:
        self._view = view
        self._found: dict[tuple[int, int, int, bool], tuple[_Run, ...]] = {}
        self._texts: dict[tuple[int, int], str] = {}

    def count(self, node: NodeEntry, item: PlacementEntry) -> int:
        return len(self.of(node, item, split=True))

    def of(self, node: NodeEntry, item: PlacementEntry, *, split: bool) -> tuple[_Run, ...]:
        """The runs of one placement; with `split` false all of it is one."""
        columns = self._view.node(node).columns(item.group, item.type)
        key = (id(columns), *item.columns, split)
        if key not in self._found:
            self._found[key] = tuple(_runs(columns, item, split=split))
        return self._found[key]

    def text(self, run: _Run, offset: int) -> str:
        """The output channels of a run whose group starts at an offset."""
        key = (id(run), offset)
        if key not in self._texts:
            self._texts[key] = ranges_text(run.kernels + offset)
        return self._texts[key]


def _runs(columns: GroupColumns, item: PlacementEntry, *, split: bool) -> Iterator[_Run]:
    low, high = item.kernels
    bits = columns.bits[low:high]
    begin, end = item.columns
    edges = np.clip(columns.starts[low : high + 1], begin, end) - begin
    cuts = np.flatnonzero(np.diff(bits)) + 1 if split else np.empty(0, np.int64)
    bounds = [0, *cuts.tolist(), len(bits)]
    for first, last in pairwise(bounds):
        widths = np.diff(columns.starts[low + first : low + last + 1])
        yield _Run(
            int(edges[first]),
            int(edges[last]),
            float(np.average(bits[first:last], weights=np.diff(edges[first : last + 1]))),
            np.sort(columns.kernels[low + first : low + last]),
            (int(widths.min()), int(widths.max())),
        )


def ranges_text(numbers: NDArray[np.integer]) -> str:
    """Ascending numbers as a few ranges, and how many there are where there are more."""
    ranges = to_ranges(numbers)
    shown = ", ".join(_span((first, last - 1)) for first, last in ranges[:_MOST_RANGES])
    return f"{shown}, … ({len(numbers)} in all)" if len(ranges) > _MOST_RANGES else shown


def _span(bounds: Sequence[int]) -> str:
    first, last = bounds
    return str(first) if first == last else f"{first}–{last}"
