"""The two proofs in numbers: codes rebuilt from cells are the model's, and MVMs run from cells are its convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from raqu_onnx.backend.engines import RecombinedNode, SlicedNode
from raqu_onnx.cells import block_levels, cell_key, decode_node, flipped_columns
from raqu_onnx.converters import Adc
from raqu_onnx.errors import ManifestError, ModelError
from raqu_onnx.evaluation import make_session
from raqu_onnx.graph_edit import one_line
from raqu_onnx.manifest import ActivationEntry
from raqu_onnx.manifest_view import flip_runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from raqu_onnx.backend.engines import Engine
    from raqu_onnx.cells import CellsFile, CellSource
    from raqu_onnx.manifest import Manifest, NodeEntry
    from raqu_onnx.manifest_view import ManifestView
    from raqu_onnx.validate_model import EmittedModel

__all__ = ["cell_array_findings", "flip_findings", "mvm_findings", "stored_code_findings", "unused_cell_findings"]

# Integers up to here are exact in float32.
_EXACT = 1 << 24
# Rows of a Gemm's weight that are widened to float64 at a time.
_PIECE = 4096
# What drives a node whose own input stays float: its weights must be right all the same.
_ANY_INPUT = ActivationEntry(tensor="", scale_name="", zero_point_name="", scale=1.0, zero_point=0, bits=8)


def cell_array_findings(manifest: Manifest, view: ManifestView, cells: CellsFile) -> Iterator[str]:
    """The cells file holds one uint8 array for each crossbar in use, of its size and with levels that fit."""
    expected = {cell_key(manifest, kind, crossbar): kind for kind, crossbar in view.by_crossbar}
    for key in sorted(cells.keys - set(expected)):
        yield f"array {key}: is of no crossbar in use"
    for key, index in expected.items():
        kind = manifest.chip.crossbars[index]
        if key not in cells.keys:
            yield f"array {key}: is missing"
            continue
        try:
            array = cells.array(key)
        except ManifestError as error:
            yield str(error)
            continue
        if array.dtype != np.uint8 or array.shape != (kind.rows, kind.cols):
            yield f"array {key}: is {array.dtype}{list(array.shape)}, not uint8[{kind.rows}, {kind.cols}]"
        elif array.max(initial=0) >> kind.cell_bits:
            row, col = np.argwhere(array >> kind.cell_bits)[0]
            yield f"array {key}: level {array[row, col]} at row {row}, column {col}; cells hold {kind.cell_bits} bits"


def unused_cell_findings(manifest: Manifest, view: ManifestView, cells: CellsFile) -> Iterator[str]:
    """Cells outside every placement are 0, those of unit columns 1. Needs `cell_array_findings` to pass."""
    for (index, crossbar), members in view.by_crossbar.items():
        levels = cells.crossbar(index, crossbar)
        key = cell_key(manifest, index, crossbar)
        free = levels != 0
        for _, placement in members:
            free[slice(*placement.rows), slice(*placement.cols)] = False
            if placement.unit_column is not None and (levels[slice(*placement.rows), placement.unit_column] != 1).any():
                yield f"array {key}: the unit column {placement.unit_column} is not all 1"
        if free.any():
            row, col = np.argwhere(free)[0]
            yield f"array {key}: level {levels[row, col]} at row {row}, column {col}, where no placement lies"


def flip_findings(view: ManifestView, codes: Mapping[str, NDArray[np.int8]]) -> Iterator[str]:
    """Columns are stored inverted exactly where the chip's rule says so."""
    chip = view.manifest.chip
    for node in view.manifest.nodes:
        matrices = view.node(node).layout.to_matrices(codes[node.name])
        for number, placement in enumerate(node.placements):
            expected: tuple[int, ...] = ()
            if chip.flip:
                levels = block_levels(view, node, placement, matrices)
                expected = flip_runs(flipped_columns(levels, chip.crossbars[placement.type].cell_bits))
            if placement.flipped != expected:
                yield (
                    f"node {node.name}: placement {number}: flipped is {list(placement.flipped)[:12]}, "
                    f"the chip's rule gives {list(expected)[:12]}"
                )


def stored_code_findings(view: ManifestView, codes: Mapping[str, NDArray[np.int8]], cells: CellSource) -> Iterator[str]:
    """Codes rebuilt from the cells of every replica equal those in the ONNX file."""
    for node in view.manifest.nodes:
        for replica in sorted({placement.replica for placement in node.placements}):
            decoded = decode_node(view, node, cells, replica=replica)
            wrong = np.argwhere(decoded != codes[node.name])
            if len(wrong):
                index = tuple(wrong[0].tolist())
                yield (
                    f"node {node.name}: {len(wrong)} codes from cells differ, at {list(index)} the cells give "
                    f"{decoded[index]}, {node.weight} holds {codes[node.name][index]}"
                )


def mvm_findings(
    emitted: EmittedModel, view: ManifestView, codes: Mapping[str, NDArray[np.int8]], cells: CellSource, seed: int
) -> Iterator[str]:
    """MVMs from cells equal the integer convolution of the codes to the last bit, on random and on extreme inputs.

    Every replica runs slice by slice, padded with the zero point's code and corrected for it; the recombined slices
    must give the same. The other side is onnxruntime's Conv or ConvTranspose on the ONNX tensor and with the ONNX
    attributes, in float32 with inputs cut into bit-slices that keep every sum below 2^24 and so exact; for Gemm and
    MatMul it is float64.
    """
    for index, (entry, node) in enumerate(emitted.pairs()):
        rng = np.random.default_rng([seed, index])
        act = entry.activation or _ANY_INPUT
        x = _random_input(entry, rng)
        try:
            expected = _reference(entry, node, codes[entry.name], x, act.zero_point)
        except ModelError as error:
            yield f"node {entry.name}: {error}"
            continue
        driven = entry.model_copy(update={"activation": act})
        for how, engine in _engines(view, driven, codes[entry.name], cells):
            got = engine.sums(x.astype(np.uint8))
            if got.shape != expected.shape:
                yield f"node {entry.name}: output {list(got.shape)} from {how}, {list(expected.shape)} from onnxruntime"
                continue
            wrong = np.argwhere(got != expected)
            if len(wrong):
                at = tuple(wrong[0].tolist())
                yield (
                    f"node {entry.name}: {len(wrong)} of {got.size} sums differ, at {list(at)} {how} give "
                    f"{got[at]:.0f}, onnxruntime {expected[at]}"
                )


def _engines(
    view: ManifestView, entry: NodeEntry, codes: NDArray[np.int8], cells: CellSource
) -> Iterator[tuple[str, Engine]]:
    adc = Adc(None, view.manifest.chip.adc_signed)
    for replica in sorted({placement.replica for placement in entry.placements} or {0}):
        yield "the cells", SlicedNode(view, entry, codes, cells, replica=replica, adc=adc)
    yield "recombined cells", RecombinedNode(view, entry, cells, threads=1)


def _random_input(entry: NodeEntry, rng: np.random.Generator) -> NDArray[np.int64]:
    """Input codes in the shape that the node reads: one sample of largest codes, one of random and extreme ones."""
    matrix, window = entry.matrix, entry.window
    top = (1 << (8 if entry.activation is None else entry.activation.bits)) - 1
    if window is not None:
        channels = matrix.shape[0] if window.transposed else matrix.shape[1] * matrix.groups
        shape: tuple[int, ...] = (2, channels, *_input_sizes(entry))
    elif entry.constant_left or entry.input_transposed:
        shape = (matrix.rows, 4)
    else:
        shape = (4, matrix.rows)
    x = rng.integers(0, top + 1, shape)
    x[rng.random(shape) < 0.1] = top
    x[rng.random(shape) < 0.1] = 0
    if window is None and shape[0] == matrix.rows:
        x[:, 0] = top
    else:
        x[0] = top
    return x


def _input_sizes(entry: NodeEntry) -> list[int]:
    """Spatial sizes just large enough for a few positions along each axis."""
    window = entry.window
    if window is None:
        return []
    sizes = []
    for axis, (kernel, stride, dilation) in enumerate(
        zip(window.kernel, window.strides, window.dilations, strict=True)
    ):
        if window.transposed:
            target = None if window.output_shape is None else window.output_shape[axis - len(window.kernel)]
            sizes.append(3 if target is None else max(1, -(-target // stride)))
        else:
            sizes.append((kernel - 1) * dilation + 1 + stride)
    if window.transposed:
        return _large_enough(entry, sizes)
    return sizes


def _large_enough(entry: NodeEntry, sizes: list[int]) -> list[int]:
    """Sizes for which the padding of a ConvTranspose leaves an output."""
    window = entry.window
    if window is None or window.output_shape is not None:
        return sizes
    rank = len(sizes)
    return [
        max(size, 1 - (-(before + after + 1) // stride))
        for size, stride, before, after in zip(
            sizes, window.strides, window.pads[:rank], window.pads[rank:], strict=True
        )
    ]


def _reference(
    entry: NodeEntry, node: ir.Node, codes: NDArray[np.int8], x: NDArray[np.int64], zero_point: int
) -> NDArray[np.int64]:
    """What the ONNX operator gives on integer codes minus their zero point; reads no layout."""
    if node.op_type in ("Conv", "ConvTranspose"):
        y = _convolution(node, codes, x)
        # Padding is 0 after the zero point is taken off, so it is taken off where the input is, not at its borders.
        return y - zero_point * _convolution(node, codes, np.ones_like(x)) if zero_point else y
    x = x - zero_point
    if node.op_type == "Gemm":
        trans_a, trans_b = (
            name in node.attributes and node.attributes[name].as_int() == 1 for name in ("transA", "transB")
        )
        return _product(x.T if trans_a else x, codes.T if trans_b else codes)
    return _product(x.T, codes.T).T if entry.constant_left else _product(x, codes)


def _product(x: NDArray[np.int64], weight: NDArray[np.int8]) -> NDArray[np.int64]:
    """Exact `x @ weight`: sums stay far below 2^53."""
    total = np.zeros((x.shape[0], weight.shape[1]), np.float64)
    for start in range(0, x.shape[1], _PIECE):
        part = slice(start, start + _PIECE)
        total += x[:, part].astype(np.float64) @ weight[part].astype(np.float64)
    return total.astype(np.int64)


def _convolution(node: ir.Node, codes: NDArray[np.int8], x: NDArray[np.int64]) -> NDArray[np.int64]:
    weight = codes.astype(np.float32)
    output_axis = 0 if node.op_type == "Conv" else 1
    others = tuple(axis for axis in range(codes.ndim) if axis != output_axis)
    largest = int(np.abs(codes.astype(np.int64)).sum(axis=others).max(initial=1)) or 1
    # Inputs go in slices of this many bits, so that no partial sum reaches 2^24.
    bits = max(1, min(8, (_EXACT // largest).bit_length() - 1))
    session = make_session(_lone_operator(node, weight), level="disable-all")
    result: NDArray[Any] | None = None
    for shift in range(0, 8, bits):
        part = (x >> shift) & ((1 << bits) - 1)
        try:
            y = session.run(None, {"x": part.astype(np.float32)})[0].astype(np.int64) << shift
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise ModelError(f"onnxruntime cannot run this operator: {one_line(error)}") from error
        result = y if result is None else result + y
    if result is None:
        raise ValueError("an input has no bits")
    return result


def _lone_operator(node: ir.Node, weight: NDArray[np.float32]) -> bytes:
    """A model of this operator alone, with the attributes of the ONNX node and the weight as it stands."""
    from onnx import TensorProto, helper, numpy_helper

    proto = helper.make_node(node.op_type, ["x", "w"], ["y"])
    proto.attribute.extend(ir.serde.serialize_node(node).attribute)
    rank = weight.ndim
    graph = helper.make_graph(
        [proto],
        "lone",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(weight, "w")],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()
