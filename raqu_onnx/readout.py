"""Matrix-vector products run from programmed cells, slice by slice, as a backend would from the manifest.

Every input code is driven in slices of `dac_bits` bits, least significant first. Every bitline then gives the sum over
its wordlines of input times level, the ADC converts it, and the rest is digital: a flipped column of cells with the
largest level `full` reads `full * sum(x)` minus that; input slices are shifted and added, then weight slices and
polarities; `offset * sum(x)` is subtracted; the results of row blocks are added. `sum(x)` is read from the unit column
where there is one. Where a chip drives fewer wordlines at once, those of a placement take turns from its first one on,
and every turn is converted. Source: Shafiee et al., ISAAC, ISCA 2016, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raqu_onnx.converters import Adc, Conversions
from raqu_onnx.manifest_view import ManifestView, flip_mask

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from concurrent.futures import ThreadPoolExecutor

    from numpy.typing import NDArray

    from raqu_onnx.cells import CellSource
    from raqu_onnx.manifest import EncodingEntry, Manifest, NodeEntry, PlacementEntry

__all__ = ["LevelSource", "NodeReadout", "mvm_from_cells"]

# Sums of integers below this are exact in single precision.
_EXACT = 1 << 24
# Input values that are driven at a time; larger ones leave the processor's caches.
_PIECE = 1 << 17


class LevelSource(Protocol):
    """Where the levels of a physical crossbar come from: whole numbers, or others where cells vary."""

    def crossbar(self, crossbar_type: int, crossbar: int) -> NDArray[Any]:
        """Levels of one crossbar, shape (rows, cols)."""
        ...


@dataclass(frozen=True)
class _Blocks:
    """Placements of B groups that differ in nothing but group, cells, stored rows and flipped columns.

    Attributes:
        groups: Shape (B,).
        rows: Rows of each group's matrix that drive the wordlines, shape (B, k).
        levels: Shape (B, wordlines, bitlines), the unit column last.
        flipped: Shape (B, bitlines without the unit column).
        signs: With which sign each of a weight's wordlines is driven.
        factors: What one step of a bitline adds to its kernel, shape (bitlines without the unit column,).
        offsets: What is subtracted for each of them, times `sum(x)`.
        starts: First bitline of each kernel.
        kernels: Positions of the kernels in their group.
        full: Largest level.
        unit: The last bitline is a unit column.
        active: Wordlines that are driven at once.
    """

    groups: NDArray[np.int64]
    rows: NDArray[np.int64]
    levels: NDArray[Any]
    flipped: NDArray[np.bool_]
    signs: NDArray[np.float64]
    factors: NDArray[np.float64]
    offsets: NDArray[np.float64]
    starts: NDArray[np.int64]
    kernels: NDArray[np.int64]
    full: int
    unit: bool
    active: int

    def pieces(self) -> Iterator[slice]:
        """Wordlines that are driven together."""
        wordlines = self.levels.shape[1]
        return (slice(start, min(start + self.active, wordlines)) for start in range(0, wordlines, self.active))

    def extremes(self, top: int) -> tuple[float, float]:
        """Smallest and largest sum that a conversion may meet, with inputs up to `top`."""
        signs = np.resize(self.signs, self.levels.shape[1])[:, None]
        low = high = 0.0
        for piece in self.pieces():
            levels, sign = self.levels[:, piece].astype(np.float64), signs[piece]
            low = min(low, float((levels * np.minimum(sign, 0)).sum(1).min(initial=0)))
            high = max(high, float((levels * np.maximum(sign, 0)).sum(1).max(initial=0)))
        return low * top, high * top


class NodeReadout:
    """One node on its programmed crossbars.

    Args:
        view: The manifest.
        node: The node.
        cells: The levels.
        replica: Which copy of the weights to use.
        adc: How bitlines are converted; the chip's converter where it is None.
        read_noise: Standard deviation of one read of one cell over its level, see `cell_errors`.
        rng: Where read noise comes from; needed for it.
        workers: Threads that vectors are divided among; what comes out does not depend on them.
    """

    def __init__(
        self,
        view: ManifestView,
        node: NodeEntry,
        cells: LevelSource,
        *,
        replica: int = 0,
        adc: Adc | None = None,
        read_noise: float = 0.0,
        rng: np.random.Generator | None = None,
        workers: ThreadPoolExecutor | None = None,
    ) -> None:
        chip = view.manifest.chip
        self._matrix = node.matrix
        self._bits = 8 if node.activation is None else node.activation.bits
        self._step = min(chip.dac_bits, self._bits)
        self._adc = Adc.of(chip) if adc is None else adc
        self._noise, self._rng, self._workers = read_noise, rng, workers
        chosen = [placement for placement in node.placements if placement.replica == replica]
        self._blocks = [_blocks(view, node, members, cells) for members in _alike(view, node, chosen)]
        self.conversions = Conversions()

    def lossless_bits(self) -> int:
        """Fewest bits of an ADC that clips with no input: every wordline driven with the largest slice at once."""
        found = [blocks.extremes((1 << self._step) - 1) for blocks in self._blocks]
        return self._adc.bits_for(
            min((low for low, _ in found), default=0), max((high for _, high in found), default=0)
        )

    def seen_bits(self) -> int:
        """Fewest bits with which nothing that was run so far would have been clipped."""
        return self._adc.bits_for(self.conversions.low, self.conversions.high)

    def run(self, codes: NDArray[np.integer]) -> NDArray[np.float64]:
        """Run MVMs.

        Args:
            codes: Input codes, shape (P, G, K): P vectors for each group.

        Returns:
            Sums of codes, shape (P, G, M); 0 for dropped kernels. Whole numbers as long as cells hold whole levels
            and are read without noise.
        """
        matrix = self._matrix
        result = np.zeros((len(codes), matrix.groups, matrix.kernels))
        length = max(1, _PIECE // max((blocks.rows.size for blocks in self._blocks), default=1))
        pieces = [slice(start, start + length) for start in range(0, len(codes), length)]
        # A generator for each piece: noise must not depend on which of them comes first.
        rngs = self._rng.spawn(len(pieces)) if self._noise and self._rng is not None else [None] * len(pieces)
        run = map if self._workers is None else self._workers.map
        for counted in run(self._run_piece, (codes[piece] for piece in pieces), (result[p] for p in pieces), rngs):
            self.conversions += counted
        return result

    def _run_piece(
        self, codes: NDArray[np.integer], result: NDArray[np.float64], rng: np.random.Generator | None
    ) -> Conversions:
        """Add the results of some vectors to theirs."""
        counted = Conversions()
        for blocks in self._blocks:
            x = codes[:, blocks.groups[:, None], blocks.rows]
            # (P, B, k) -> (B, P, k), so that each block is one product.
            by_kernel = self._sums(blocks, np.ascontiguousarray(x.swapaxes(0, 1)), counted, rng)
            result[:, blocks.groups[:, None], blocks.kernels] += by_kernel.swapaxes(0, 1)
        return counted

    def _sums(
        self,
        blocks: _Blocks,
        x: NDArray[np.integer],
        counted: Conversions,
        rng: np.random.Generator | None,
    ) -> NDArray[np.float64]:
        """Results of some blocks, shape (B, P, kernels)."""
        bitlines = blocks.factors.size
        sums = np.zeros((*x.shape[:2], blocks.levels.shape[2]))
        totals = np.zeros((*x.shape[:2], 1))
        levels = blocks.levels.astype(self._precision(blocks))
        mask = (1 << self._step) - 1
        for shift in range(0, self._bits, self._step):
            part = (x >> shift) & mask
            sums += self._read(blocks, part, levels, counted, rng) * float(1 << shift)
            if not blocks.unit:
                totals[..., 0] += part.sum(axis=2, dtype=np.int64) * float(1 << shift)
        if blocks.unit:
            totals = sums[..., bitlines:]
        sums = sums[..., :bitlines]
        if blocks.flipped.any():
            sums = np.where(blocks.flipped[:, None, :], blocks.full * totals - sums, sums)
        sums = sums * blocks.factors
        if blocks.offsets.any():
            sums -= totals * blocks.offsets
        return np.asarray(np.add.reduceat(sums, blocks.starts, axis=2))

    def _precision(self, blocks: _Blocks) -> type[np.floating[Any]]:
        """Single precision where it holds every sum of whole levels; levels that vary need no more than that."""
        largest = blocks.levels.shape[1] * ((1 << self._step) - 1) * blocks.full
        return np.float32 if largest < _EXACT else np.float64

    def _read(
        self,
        blocks: _Blocks,
        x: NDArray[np.integer],
        levels: NDArray[np.floating[Any]],
        counted: Conversions,
        rng: np.random.Generator | None,
    ) -> NDArray[np.floating[Any]]:
        """What the ADC gives for one input slice, shape (B, P, bitlines)."""
        driven = x.astype(levels.dtype)
        if blocks.signs.size > 1 or blocks.signs[0] < 0:
            driven = (driven[..., None] * blocks.signs.astype(levels.dtype)).reshape(*x.shape[:2], -1)
        total: NDArray[np.floating[Any]] | None = None
        for piece in blocks.pieces():
            sums: NDArray[np.floating[Any]] = driven[..., piece] @ levels[:, piece]
            if rng is not None:
                # Independent noise of each cell adds up to one normal number for each bitline.
                power = np.square(driven[..., piece]) @ np.square(levels[:, piece])
                sums += self._noise * np.sqrt(power) * rng.standard_normal(sums.shape, np.float32)
            counted.convert(self._adc, sums)
            total = sums if total is None else total + sums
        return np.zeros((*driven.shape[:2], levels.shape[2]), levels.dtype) if total is None else total


def _alike(view: ManifestView, node: NodeEntry, placements: Iterable[PlacementEntry]) -> Iterable[list[PlacementEntry]]:
    """Placements of different groups that can be read at once: a depthwise node has one for each channel."""
    found: dict[tuple[object, ...], list[PlacementEntry]] = {}
    for placement in placements:
        columns = view.node(node).columns(placement.group, placement.type)
        key = (
            placement.type, placement.polarity, placement.weight_rows, placement.columns, placement.kernels,
            placement.unit_column is None, id(columns),
        )  # fmt: skip
        found.setdefault(key, []).append(placement)
    return found.values()


def _blocks(view: ManifestView, node: NodeEntry, members: Sequence[PlacementEntry], cells: LevelSource) -> _Blocks:
    own, first = view.node(node), members[0]
    entry: EncodingEntry = view.encodings[first.type]
    columns = own.columns(first.group, first.type)
    table = own.cells(columns, first.type)
    begin, end = first.columns
    low, high = first.kernels
    signs = np.array(entry.input_signs, np.float64)
    # All cells of one bitline have the same shift; its sign with the input's sign taken out is the bitline's own.
    factors = table.weights[view.array_index(first), 0, begin:end] * signs[0]
    kind = view.manifest.chip.crossbars[first.type]
    return _Blocks(
        groups=np.array([item.group for item in members], np.int64),
        rows=np.stack([own.stored_rows(item.group)[slice(*item.weight_rows)] for item in members]),
        levels=np.stack([_rectangle(item, cells) for item in members]),
        flipped=np.stack([flip_mask(item.flipped, end - begin) for item in members]),
        signs=signs,
        factors=factors,
        offsets=table.offsets[begin:end].astype(np.float64),
        starts=np.maximum(columns.starts[low:high], begin) - begin,
        kernels=columns.kernels[low:high],
        full=(1 << entry.cell_bits) - 1,
        unit=first.unit_column is not None,
        active=kind.rows if kind.rows_active is None else kind.rows_active,
    )


def _rectangle(placement: PlacementEntry, cells: LevelSource) -> NDArray[Any]:
    levels = cells.crossbar(placement.type, placement.crossbar)[slice(*placement.rows)]
    columns = np.arange(*placement.cols)
    if placement.unit_column is not None:
        # The unit column is read last, wherever it lies.
        columns = np.concatenate([columns[columns != placement.unit_column], [placement.unit_column]])
    return levels[:, columns]


def mvm_from_cells(
    node: NodeEntry,
    manifest: Manifest | ManifestView,
    cells: CellSource,
    x_codes: NDArray[np.integer],
    *,
    replica: int = 0,
) -> NDArray[np.int64]:
    """Run one node's MVMs from its cells with an ideal ADC.

    Args:
        node: The node.
        manifest: Its manifest, as such or as arrays.
        cells: The levels.
        x_codes: Input codes, shape (P, G, K): P vectors for each group.
        replica: Which copy of the weights to use.

    Returns:
        Sums of codes, shape (P, G, M); 0 for dropped kernels.
    """
    view = manifest if isinstance(manifest, ManifestView) else ManifestView(manifest)
    readout = NodeReadout(view, node, cells, replica=replica, adc=Adc(None, view.manifest.chip.adc_signed))
    return readout.run(x_codes).astype(np.int64)
