"""Cell levels: programming crossbars from weight codes, the file that holds them, and codes back from cells.

Programming follows `encodings.Encoding`; decoding follows nothing but the manifest, so that it proves that a backend
can rebuild every weight.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raqu_onnx.encodings import Encoding
from raqu_onnx.errors import ManifestError, OutputError
from raqu_onnx.manifest_view import ManifestView, flip_mask

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from raqu_onnx.manifest import Manifest, NodeEntry, PlacementEntry

__all__ = [
    "CellSource",
    "CellsFile",
    "LevelCache",
    "ProgrammedCells",
    "block_levels",
    "cell_key",
    "decode",
    "decode_node",
    "flipped_columns",
    "placed_levels",
    "program",
    "write_cells",
]

# Crossbars kept in memory, in cells.
_CACHE_CELLS = 1 << 26
_FIXED_TIME = (1980, 1, 1, 0, 0, 0)


class CellSource(Protocol):
    """Where the levels of a physical crossbar come from."""

    def crossbar(self, crossbar_type: int, crossbar: int) -> NDArray[np.uint8]:
        """Levels of one crossbar, shape (rows, cols)."""
        ...


class LevelCache:
    """The crossbars used last, as many as a fixed number of cells allows."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()
        self._cells = 0

    def get(self, key: tuple[int, int]) -> NDArray[Any] | None:
        """Levels of a crossbar by (type, number), if they are still there."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: tuple[int, int], levels: NDArray[Any]) -> None:
        """Keep the levels of a crossbar, at the price of those that were used longest ago."""
        self._kept[key] = levels
        self._cells += levels.size
        while self._cells > _CACHE_CELLS and len(self._kept) > 1:
            self._cells -= self._kept.popitem(last=False)[1].size


def flipped_columns(levels: NDArray[np.uint8], cell_bits: int) -> NDArray[np.bool_]:
    """Columns to store inverted: those whose levels add up to more than half of what they could.

    Source: Shafiee et al., ISAAC, ISCA 2016, section 5: a column is stored in its flipped form where its sum would
    otherwise set the ADC's most significant bit, which saves that bit.

    Args:
        levels: Shape (rows, columns).
        cell_bits: Bits of one cell.
    """
    full = levels.shape[0] * ((1 << cell_bits) - 1)
    return np.asarray(2 * levels.sum(axis=0, dtype=np.int64) > full)


def block_levels(
    view: ManifestView, node: NodeEntry, placement: PlacementEntry, matrices: NDArray[np.integer]
) -> NDArray[np.uint8]:
    """Levels of one placement's weight cells before any column is flipped.

    Args:
        view: The manifest; `flipped` is not read.
        node: The placement's node.
        placement: The rectangle.
        matrices: The node's codes, shape (G, K, M).

    Returns:
        Shape (wordlines, bitlines without the unit column).

    Raises:
        ValueError: A code lies outside the range of its width.
    """
    entry = view.encodings[placement.type]
    encoding = Encoding(entry.scheme, entry.cell_bits, entry.arrays_per_placement == 2)
    columns = view.node(node).columns(placement.group, placement.type)
    low, high = placement.kernels
    stored = view.node(node).stored_rows(placement.group)[slice(*placement.weight_rows)]
    codes = matrices[placement.group, stored[:, None], columns.kernels[low:high]]
    starts = columns.starts[low:high] - columns.starts[low]
    levels = np.zeros((len(stored) * entry.rows_per_weight, int(columns.starts[high] - columns.starts[low])), np.uint8)
    for width in entry.widths:
        chosen = np.flatnonzero(columns.bits[low:high] == width.bits)
        if not chosen.size:
            continue
        parts = _encode(encoding, codes[:, chosen], width.bits)
        for part, cells in zip(width.slices, parts, strict=True):
            if entry.arrays_per_placement == 1 or part.polarity == placement.polarity:
                levels[part.row :: entry.rows_per_weight, starts[chosen] + part.column] = cells
    first = placement.first_slice
    return levels[:, first : first + placement.columns[1] - placement.columns[0]]


def _encode(encoding: Encoding, codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """`Encoding.to_levels` by table: a model has millions of weights and a few hundred codes."""
    low, high = encoding.code_range(bits)
    if codes.min(initial=low) < low or codes.max(initial=high) > high:
        raise ValueError(f"codes reach from {codes.min()} to {codes.max()}, {bits} bits hold {low} to {high}")
    levels: NDArray[np.uint8] = _levels_of_codes(encoding, bits)[:, codes.astype(np.int16) - low]
    return levels


@lru_cache(maxsize=64)
def _levels_of_codes(encoding: Encoding, bits: int) -> NDArray[np.uint8]:
    low, high = encoding.code_range(bits)
    return encoding.to_levels(np.arange(low, high + 1), bits)


def placed_levels(
    view: ManifestView, node: NodeEntry, placement: PlacementEntry, matrices: NDArray[np.integer]
) -> NDArray[np.uint8]:
    """Levels of one placement as they are programmed: columns flipped, unit column in place."""
    levels = block_levels(view, node, placement, matrices).copy()
    flipped = flip_mask(placement.flipped, levels.shape[1])
    full = (1 << view.encodings[placement.type].cell_bits) - 1
    levels[:, flipped] = full - levels[:, flipped]
    if placement.unit_column is not None:
        ones = np.ones((levels.shape[0], 1), np.uint8)
        levels = np.concatenate([levels, ones], axis=1)
    return levels


class ProgrammedCells:
    """Crossbars programmed from weight codes when they are asked for.

    Args:
        view: The manifest, as such or as arrays.
        codes: Integer codes in the shape of the ONNX tensor, by node name.
    """

    def __init__(self, view: ManifestView | Manifest, codes: Mapping[str, NDArray[np.integer]]) -> None:
        self._view = view if isinstance(view, ManifestView) else ManifestView(view)
        self._matrices = {
            name: node.layout.to_matrices(codes[name]) for name, node in self._view.nodes.items() if name in codes
        }
        self._cache = LevelCache()

    def crossbar(self, crossbar_type: int, crossbar: int) -> NDArray[np.uint8]:
        """Levels of one crossbar, shape (rows, cols).

        Raises:
            ValueError: A code lies outside the range of its width.
        """
        key = (crossbar_type, crossbar)
        found = self._cache.get(key)
        if found is None:
            kind = self._view.manifest.chip.crossbars[crossbar_type]
            found = np.zeros((kind.rows, kind.cols), np.uint8)
            for node, placement in self._view.by_crossbar[key]:
                found[slice(*placement.rows), slice(*placement.cols)] = placed_levels(
                    self._view, node, placement, self._matrices[node.name]
                )
            self._cache.put(key, found)
        return found


def program(
    manifest: Manifest, codes: Mapping[str, NDArray[np.integer]]
) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """Program all crossbars, one at a time.

    Args:
        manifest: Where everything goes.
        codes: Integer codes in the shape of the ONNX tensor, by node name.

    Yields:
        (crossbar type, crossbar, levels of shape (rows, cols)), in ascending order.

    Raises:
        ValueError: A code lies outside the range of its width.
    """
    view = ManifestView(manifest)
    source = ProgrammedCells(view, codes)
    for crossbar_type, crossbar in view.by_crossbar:
        yield crossbar_type, crossbar, source.crossbar(crossbar_type, crossbar)


def cell_key(manifest: Manifest, crossbar_type: int, crossbar: int) -> str:
    """Name of a crossbar's array in the cells file."""
    return f"{manifest.chip.crossbars[crossbar_type].name}/{crossbar:06d}"


def write_cells(path: str | Path, manifest: Manifest, codes: Mapping[str, NDArray[np.integer]]) -> None:
    """Write the cells file: one uint8 array per physical crossbar, under `type/number`.

    `numpy.load` reads it; equal manifests and codes give equal bytes.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for crossbar_type, crossbar, levels in program(manifest, codes):
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, levels, version=(1, 0), allow_pickle=False)
                member = zipfile.ZipInfo(cell_key(manifest, crossbar_type, crossbar) + ".npy", _FIXED_TIME)
                member.compress_type = zipfile.ZIP_DEFLATED
                member.external_attr = 0o644 << 16
                archive.writestr(member, buffer.getvalue())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


class CellsFile:
    """A cells file, read crossbar by crossbar.

    Args:
        path: The `.npz` file.
        manifest: Names the crossbar types.

    Raises:
        ManifestError: The file is missing or no `.npz` archive.
    """

    def __init__(self, path: str | Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._cache = LevelCache()
        try:
            self._archive: Any = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ManifestError(f"{path}: is not a readable .npz file: {error}") from error
        if not isinstance(self._archive, np.lib.npyio.NpzFile):
            raise ManifestError(f"{path}: is not an .npz file")

    def __enter__(self) -> CellsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._archive.close()

    @property
    def keys(self) -> frozenset[str]:
        """Names of the arrays that it holds."""
        return frozenset(self._archive.files)

    def array(self, key: str) -> NDArray[Any]:
        """One array as it stands in the file.

        Raises:
            ManifestError: It is missing or damaged.
        """
        try:
            return np.asarray(self._archive[key])
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise ManifestError(f"{self._path}: array {key} cannot be read: {error}") from error

    def crossbar(self, crossbar_type: int, crossbar: int) -> NDArray[np.uint8]:
        """Levels of one crossbar, shape (rows, cols).

        Raises:
            ManifestError: The array is missing, damaged, or has another shape or type.
        """
        found = self._cache.get((crossbar_type, crossbar))
        if found is None:
            kind = self._manifest.chip.crossbars[crossbar_type]
            key = cell_key(self._manifest, crossbar_type, crossbar)
            found = self.array(key)
            if found.shape != (kind.rows, kind.cols) or found.dtype != np.uint8:
                raise ManifestError(
                    f"{self._path}: array {key} is {found.dtype}{list(found.shape)}, "
                    f"the crossbar is uint8[{kind.rows}, {kind.cols}]"
                )
            self._cache.put((crossbar_type, crossbar), found)
        return found


def decode_node(view: ManifestView, node: NodeEntry, cells: CellSource, *, replica: int = 0) -> NDArray[np.int32]:
    """Weight codes of one node, rebuilt from its cells.

    Weights that are not stored come back as 0.

    Args:
        view: The manifest.
        node: One of its nodes.
        cells: The levels.
        replica: Which copy to read.

    Returns:
        Codes in the shape of the ONNX tensor. They lie in the range of their width unless cells are damaged.
    """
    own = view.node(node)
    matrix = node.matrix
    codes = np.zeros((matrix.groups, matrix.rows, matrix.kernels), np.int32)
    for placement in node.placements:
        if placement.replica != replica:
            continue
        entry = view.encodings[placement.type]
        columns = own.columns(placement.group, placement.type)
        first, last = placement.columns
        table = own.cells(columns, placement.type)
        weights = table.weights[view.array_index(placement), :, first:last].astype(np.int32)
        levels = cells.crossbar(placement.type, placement.crossbar)[slice(*placement.rows), slice(*placement.cols)]
        levels = levels[:, : last - first].astype(np.int32)
        flipped = flip_mask(placement.flipped, last - first)
        levels[:, flipped] = (1 << entry.cell_bits) - 1 - levels[:, flipped]
        values = sum(weights[row] * levels[row :: entry.rows_per_weight] for row in range(entry.rows_per_weight))
        values = np.asarray(values, np.int32) - table.offsets[first:last].astype(np.int32)
        low, high = placement.kernels
        pieces = np.add.reduceat(values, np.maximum(columns.starts[low:high], first) - first, axis=1)
        stored = own.stored_rows(placement.group)[slice(*placement.weight_rows)]
        codes[placement.group, stored[:, None], columns.kernels[low:high]] += pieces
    decoded: NDArray[np.int32] = own.layout.from_matrices(codes)
    return decoded


def decode(manifest: Manifest, cells: CellSource) -> dict[str, NDArray[np.int32]]:
    """Weight codes of all nodes, rebuilt from the first replica's cells; see `decode_node`."""
    view = ManifestView(manifest)
    return {node.name: decode_node(view, node, cells) for node in manifest.nodes}
