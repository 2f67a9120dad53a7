"""Matrix-vector products run from programmed cells with an ideal ADC, as a backend would from the manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.manifest_view import ManifestView, flip_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.cells import CellSource
    from raqu_onnx.manifest import Manifest, NodeEntry, PlacementEntry

__all__ = ["mvm_from_cells"]


def mvm_from_cells(
    node: NodeEntry,
    manifest: Manifest | ManifestView,
    cells: CellSource,
    x_codes: NDArray[np.integer],
    *,
    replica: int = 0,
) -> NDArray[np.int64]:
    """Run one node's MVMs from its cells.

    Every bitline gives the sum over its wordlines of input times level. A flipped column of cells with the largest
    level `full` reads `full * sum(x)` minus that. Slices are shifted, signed and added, `offset * sum(x)` is
    subtracted, and the results of row blocks are added; `sum(x)` is read from the unit column where there is one.

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
    matrix = node.matrix
    result = np.zeros((len(x_codes), matrix.groups, matrix.kernels), np.int64)
    # Sums of integers below 2**53 are exact in float64, and BLAS multiplies it fast.
    inputs = np.asarray(x_codes, np.float64)
    for placement in node.placements:
        if placement.replica == replica:
            _add_placement(view, node, placement, cells, inputs, result)
    return result


def _add_placement(
    view: ManifestView,
    node: NodeEntry,
    placement: PlacementEntry,
    cells: CellSource,
    inputs: NDArray[np.float64],
    result: NDArray[np.int64],
) -> None:
    own, entry = view.node(node), view.encodings[placement.type]
    stored = own.stored_rows(placement.group)[slice(*placement.weight_rows)]
    x = inputs[:, placement.group, stored]
    levels = cells.crossbar(placement.type, placement.crossbar)[slice(*placement.rows), slice(*placement.cols)]
    driven = (x[:, :, None] * np.array(entry.input_signs, np.float64)).reshape(len(x), -1)
    sums = (driven @ levels.astype(np.float64)).astype(np.int64)
    first, last = placement.columns
    if placement.unit_column is None:
        total = x.sum(axis=1).astype(np.int64)[:, None]
    else:
        total = sums[:, placement.unit_column - placement.cols[0], None]
    sums = sums[:, : last - first]
    flipped = flip_mask(placement.flipped, last - first)
    sums[:, flipped] = ((1 << entry.cell_bits) - 1) * total - sums[:, flipped]

    columns = own.columns(placement.group, placement.type)
    table = own.cells(columns, placement.type)
    # All cells of one bitline have the same shift; its sign with the input's sign taken out is the bitline's own.
    signs = np.array(entry.input_signs, np.int64)[:, None]
    factors = table.weights[view.array_index(placement), :, first:last] * signs
    shifted = sums * factors[0] - total * table.offsets[first:last]
    low, high = placement.kernels
    starts = np.maximum(columns.starts[low:high], first) - first
    result[:, placement.group, columns.kernels[low:high]] += np.add.reduceat(shifted, starts, axis=1)
