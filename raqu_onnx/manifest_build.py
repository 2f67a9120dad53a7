"""Building the manifest from what quantization and placement decided."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from raqu_onnx.cells import block_levels, flipped_columns
from raqu_onnx.manifest import (
    FORMAT,
    VERSION,
    ActivationEntry,
    CellSlice,
    CrossbarTotal,
    DataProvenance,
    EncodingEntry,
    Manifest,
    MatrixEntry,
    ModelFile,
    NodeEntry,
    PlacementEntry,
    Ratio,
    Tool,
    Totals,
    UnmappedEntry,
    WidthEntry,
    WindowEntry,
)
from raqu_onnx.manifest_stages import assign_turns, stage_entries
from raqu_onnx.manifest_view import ManifestView, flip_runs, to_ranges
from raqu_onnx.model_cost import manifest_cost, placement_parts, with_costs
from raqu_onnx.tiling import ColumnOrder, column_order

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.encodings import Encoding
    from raqu_onnx.front import SearchEntry
    from raqu_onnx.layout import LayoutKind, MappedNode
    from raqu_onnx.manifest_entries import CostEntry, MappedOp
    from raqu_onnx.mapping import UnmappedNode
    from raqu_onnx.placement import PlacedBlock, Placement
    from raqu_onnx.quantized import EmittedNames, QuantizedNode
    from raqu_onnx.tiling import ArrayGeometry

__all__ = ["ROW_ORDERS", "ManifestContext", "build_manifest", "encoding_entry"]

_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "scikit-optimize", "scipy")

#: `MatrixEntry.row_order` of each kind of layout.
ROW_ORDERS: Mapping[LayoutKind, str] = {
    "conv": "row r of group g is weight[g*M + m, c, k...] with r = flatten(c, k...), last index fastest; it takes "
    "channel g*(C_in/G) + c of the padded input at tap k of the window",
    "conv-transpose": "row r of group g is weight[g*(C_in/G) + c, m, flipped k...] with r = flatten(c, k...), last "
    "index fastest; it takes channel g*(C_in/G) + c of the zero-stuffed, padded input at tap k of a window of stride 1",
    "in-out": "row r is weight[r, m]; it takes feature r of the input",
    "out-in": "row r is weight[m, r]; it takes feature r of the input",
}


@dataclass(frozen=True)
class ManifestContext:
    """All that a manifest tells.

    Attributes:
        quantized: The mapped nodes, in graph order.
        emitted: Names in the emitted model by node name.
        placement: Where every block lies.
        unmapped: Nodes of mappable types that stay in float.
        model_sha256: Digest of the emitted model.
        source_sha256: Digest of the source model, None where it was no file.
        configuration: Settings of the run, JSON values.
        seed: Seed of the run.
        order: Names of the mapped nodes in a valid order of execution.
        predecessors: The nearest mapped nodes that each mapped node depends on.
        calibration: Data that ranges come from.
        selection: Data that bit-widths were chosen on.
        model_file: File name of the emitted model.
        search: The front of the search that chose the bits, None without one.
    """

    quantized: tuple[QuantizedNode, ...]
    emitted: Mapping[str, EmittedNames]
    placement: Placement
    unmapped: tuple[UnmappedNode, ...]
    model_sha256: str
    source_sha256: str | None
    configuration: Mapping[str, Any]
    seed: int
    order: tuple[str, ...]
    predecessors: Mapping[str, Sequence[str]]
    calibration: DataProvenance | None = None
    selection: DataProvenance | None = None
    model_file: str = field(default="model.onnx")
    search: SearchEntry | None = None


def build_manifest(context: ManifestContext) -> Manifest:
    """Build the manifest of a run; equal contexts give equal manifests."""
    placement = context.placement
    blocks: dict[str, list[PlacedBlock]] = {item.node.name: [] for item in context.quantized}
    for block in placement.blocks:
        blocks[block.node].append(block)
    nodes = tuple(
        _node(item, context.emitted[item.node.name], blocks[item.node.name], placement) for item in context.quantized
    )
    stages = stage_entries(context.order, context.predecessors, nodes, placement)
    cost = manifest_cost(placement.chip, nodes, stages, placement_parts(placement))
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        digest="",
        tool=_tool(),
        model=ModelFile(file=context.model_file, sha256=context.model_sha256, source_sha256=context.source_sha256),
        seed=context.seed,
        configuration=dict(context.configuration),
        calibration=context.calibration,
        selection=context.selection,
        executable=all(item.activation is not None for item in context.quantized),
        chip=placement.chip,
        sharing=placement.sharing,
        encodings=_encodings(context),
        nodes=nodes,
        stages=with_costs(stages, cost),
        partitions=cost.parts,
        unmapped=tuple(
            UnmappedEntry(name=item.name, op_type=item.op_type, reason=item.reason) for item in context.unmapped
        ),
        totals=_totals(placement, nodes, cost.total),
        search=context.search,
    )
    return (_with_flips(manifest, context) if placement.chip.flip else manifest).sealed()


# ----------------------------------------------------------------------------------------------------------- headings


def _tool() -> Tool:
    libraries = {"python": platform.python_version()}
    libraries.update((name, _version(name)) for name in _LIBRARIES)
    return Tool(name="raqu-onnx", version=_version("raqu-onnx"), libraries=libraries)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _encodings(context: ManifestContext) -> tuple[EncodingEntry, ...]:
    """One entry per crossbar type in use, with the widths that its nodes use."""
    widths: dict[int, set[int]] = {}
    types = context.placement.types_by_node
    for item in context.quantized:
        for kind in types.get(item.node.name, ()):
            widths.setdefault(kind, set()).update(int(b) for b in item.bits if b)
    geometries = context.placement.geometries
    return tuple(encoding_entry(index, geometries[index], sorted(widths[index])) for index in sorted(widths))


def encoding_entry(crossbar_type: int, geometry: ArrayGeometry, widths: Sequence[int]) -> EncodingEntry:
    """How a crossbar type stores weights of the given widths."""
    encoding = geometry.encoding
    signs: tuple[Literal[1, -1], ...] = (1, -1) if encoding.rows_per_weight == 2 else (1,)
    return EncodingEntry(
        crossbar_type=crossbar_type,
        scheme=encoding.scheme,
        cell_bits=encoding.cell_bits,
        rows_per_weight=encoding.rows_per_weight,
        input_signs=signs,
        arrays_per_placement=encoding.arrays_per_placement,
        unit_column=geometry.unit_column,
        widths=tuple(
            WidthEntry(
                bits=bits,
                columns=encoding.columns(bits),
                offset=encoding.offset(bits),
                codes=encoding.code_range(bits),
                slices=_slices(encoding, bits),
            )
            for bits in widths
        ),
    )


def _slices(encoding: Encoding, bits: int) -> tuple[CellSlice, ...]:
    columns = encoding.columns(bits)
    # Where the negative slices have a row or an array of their own, they lie in the same columns as the positive ones.
    return tuple(
        CellSlice(
            column=index % columns,
            row=index // columns if encoding.rows_per_weight == 2 else 0,
            shift=part.shift,
            sign=part.sign,
            polarity=part.polarity,
        )
        for index, part in enumerate(encoding.slices(bits))
    )


# -------------------------------------------------------------------------------------------------------------- nodes


def _node(item: QuantizedNode, names: EmittedNames, blocks: Sequence[PlacedBlock], placement: Placement) -> NodeEntry:
    node, layout = item.node, item.node.layout
    kernel_bits = item.bits[layout.channel_index()]
    if not np.array_equal(kernel_bits, placement.matrices[node.name].bits):
        raise ValueError(f"{node.name}: it was quantized to other bits than it was placed with")
    return NodeEntry(
        name=node.name,
        op_type=cast("MappedOp", node.op_type),
        output=node.output_name,
        weight=names.weight,
        weight_scale=names.weight_scale,
        source_weight=node.weight_name,
        bias=names.bias,
        activation=_activation(item, names),
        constant_left=node.constant_left,
        input_transposed=node.input_transposed,
        matrix=MatrixEntry(
            kind=layout.kind,
            shape=tuple(int(n) for n in layout.shape),
            groups=layout.groups,
            rows=layout.rows,
            kernels=layout.kernels,
            row_order=ROW_ORDERS[layout.kind],
            scale_axis=layout.scale_axis,
        ),
        window=_window(node),
        mvms=node.mvms,
        bits=tuple((int(bits), len(list(run))) for bits, run in groupby(item.bits.tolist())),
        scales=tuple(_shortest(scale) for scale in item.scales),
        kernel_order=_kernel_order(kernel_bits),
        dropped_kernels=to_ranges(np.flatnonzero(item.bits == 0)),
        rows_not_stored=_rows_not_stored(item),
        placements=tuple(_placements(kernel_bits, blocks, placement.geometries)),
    )


def _rows_not_stored(item: QuantizedNode) -> tuple[tuple[int, int, int], ...]:
    if item.stored is None:
        return ()
    missing = (to_ranges(np.flatnonzero(~rows)) for rows in item.stored)
    return tuple((group, first, last) for group, ranges in enumerate(missing) for first, last in ranges)


def _shortest(value: np.float32) -> float:
    """The float32 as the decimal with the fewest digits that reads back as the same float32."""
    return float(str(np.float32(value)))


def _activation(item: QuantizedNode, names: EmittedNames) -> ActivationEntry | None:
    if item.activation is None:
        return None
    if names.activation is None or names.activation_scale is None or names.activation_zero_point is None:
        raise ValueError(f"{item.node.name}: its activation was quantized, but not emitted")
    return ActivationEntry(
        tensor=names.activation,
        scale_name=names.activation_scale,
        zero_point_name=names.activation_zero_point,
        scale=_shortest(np.float32(item.activation.scale)),
        zero_point=item.activation.zero_point,
        bits=item.activation.bits,
    )


def _window(node: MappedNode) -> WindowEntry | None:
    if node.window is None:
        return None
    return WindowEntry(
        kernel=node.window.kernel,
        strides=node.window.strides,
        dilations=node.window.dilations,
        pads=node.window.pads,
        auto_pad=node.window.auto_pad,
        transposed=node.window.transposed,
        output_padding=node.window.output_padding,
        output_shape=node.window.output_shape,
    )


def _kernel_order(bits: NDArray[np.int64]) -> tuple[tuple[tuple[int, int], ...], ...] | None:
    orders = [_stored_order(row) for row in bits]
    whole = ((0, bits.shape[1]),)
    ranges = tuple(to_ranges(order) for order in orders)
    return None if all(r == whole for r in ranges) else ranges


def _stored_order(bits: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(-bits, kind="stable")
    kept: NDArray[np.int64] = order[bits[order] > 0]
    return kept


def _placements(
    bits: NDArray[np.int64], blocks: Sequence[PlacedBlock], geometries: Sequence[ArrayGeometry]
) -> Iterable[PlacementEntry]:
    turns = assign_turns(blocks)
    # All types that a node lies on have cells of the same bits, so that its columns are the same on each.
    orders: dict[bytes, ColumnOrder] = {}
    sums: dict[tuple[int, int, tuple[int, int]], int] = {}
    for placed, turn in zip(blocks, turns, strict=True):
        block, geometry = placed.block, geometries[placed.crossbar_type]
        key = bits[block.group].tobytes()
        if key not in orders:
            orders[key] = column_order(bits[block.group], geometry.encoding)
        starts = orders[key].starts
        low = int(np.searchsorted(starts, block.columns[0], side="right")) - 1
        high = int(np.searchsorted(starts, block.columns[1], side="left"))
        last_col = placed.col + block.width
        arrays = geometry.encoding.arrays_per_placement
        for array in range(arrays):
            yield PlacementEntry(
                type=placed.crossbar_type,
                crossbar=placed.crossbar * arrays + array,
                polarity=None if arrays == 1 else ("positive", "negative")[array],
                group=block.group,
                rows=(placed.row, placed.row + block.height),
                cols=(placed.col, last_col),
                weight_rows=block.rows,
                columns=block.columns,
                kernels=(low, high),
                first_slice=block.columns[0] - int(starts[low]),
                unit_column=last_col - 1 if geometry.unit_column else None,
                replica=placed.replica,
                partial_sum=sums.setdefault((placed.replica, block.group, block.columns), len(sums)),
                turn=turn,
                flipped=(),
            )


def _with_flips(manifest: Manifest, context: ManifestContext) -> Manifest:
    """The same manifest with the columns to flip marked in every placement."""
    view = ManifestView(manifest)
    codes = {item.node.name: item.node.layout.to_matrices(item.codes) for item in context.quantized}
    nodes = []
    for node in manifest.nodes:
        placements = []
        for placement in node.placements:
            levels = block_levels(view, node, placement, codes[node.name])
            runs = flip_runs(flipped_columns(levels, view.encodings[placement.type].cell_bits))
            placements.append(placement.model_copy(update={"flipped": runs}))
        nodes.append(node.model_copy(update={"placements": tuple(placements)}))
    return manifest.model_copy(update={"nodes": tuple(nodes)})


# -------------------------------------------------------------------------------------------------- totals


def _totals(placement: Placement, nodes: Sequence[NodeEntry], cost: CostEntry) -> Totals:
    return Totals(
        crossbars=tuple(
            CrossbarTotal(name=kind.name, allocated=allocated, count=kind.count)
            for kind, allocated in zip(placement.chip.crossbars, placement.crossbars_by_type, strict=True)
        ),
        cell_utilization=Ratio(numerator=placement.programmed_cells, denominator=placement.allocated_cells),
        bit_utilization=Ratio(numerator=placement.weight_bits, denominator=placement.allocated_bits),
        lower_bound=placement.lower_bound,
        lower_bound_cells=placement.lower_bound_cells,
        exact=placement.exact,
        placements=sum(len(node.placements) for node in nodes),
        dropped_kernels=sum(int(np.count_nonzero(m.bits == 0)) for m in placement.matrices.values()),
        cost=cost,
    )
