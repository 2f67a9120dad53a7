"""The two ways to run a mapped node's matrix-vector products; both give the same integers.

`SlicedNode` does what the chip does, see `raqu_onnx.readout`. `RecombinedNode` reads the slices back from the cells
into one integer weight tensor and lets onnxruntime convolve whole numbers with it, which is right only as long as
nothing between cell and sum loses anything: ideal cells and an ideal ADC.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raqu_onnx.backend.partition import activation_of
from raqu_onnx.cells import decode_node
from raqu_onnx.converters import Conversions
from raqu_onnx.evaluation import make_session
from raqu_onnx.manifest_view import mapped_node_of
from raqu_onnx.patches import from_output_vectors, input_vectors
from raqu_onnx.readout import NodeReadout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import ThreadPoolExecutor

    from numpy.typing import NDArray
    from onnx import NodeProto

    from raqu_onnx.cells import CellSource
    from raqu_onnx.converters import Adc
    from raqu_onnx.manifest import NodeEntry, WindowEntry
    from raqu_onnx.manifest_view import ManifestView
    from raqu_onnx.readout import LevelSource

__all__ = ["Engine", "RecombinedNode", "SlicedNode", "channel_axis", "exact_bits"]

# Whole numbers below this are exact in single precision, and sums of them in any order.
_EXACT = 1 << 24
# Values of cut-out input vectors held at a time.
_VECTOR_VALUES = 1 << 23


class Engine(Protocol):
    """Runs a node's MVMs."""

    def sums(self, codes: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
        """Sums of `(code - zero point) * weight code` in the shape of the node's output."""
        ...


def channel_axis(entry: NodeEntry) -> int:
    """Axis of the node's output that kernels lie on, from the end or, for windows, from the start."""
    if entry.window is not None:
        return 1
    return -2 if entry.constant_left else -1


class SlicedNode:
    """A node on its crossbars, slice by slice.

    Args:
        view: The manifest.
        entry: The node.
        codes: Weight codes in the shape of the ONNX tensor, for the digital correction of the zero point.
        cells: The levels.
        adc: How bitlines are converted.
        read_noise: See `raqu_onnx.cell_errors`.
        rng: Where read noise comes from.
        workers: Threads that vectors are divided among.
        replica: The only copy of the weights to use; positions take turns at all of them where it is None.

    Raises:
        ManifestError: The node's input is float.
    """

    def __init__(
        self,
        view: ManifestView,
        entry: NodeEntry,
        codes: NDArray[np.integer],
        cells: LevelSource,
        *,
        replica: int | None = None,
        adc: Adc | None = None,
        read_noise: float = 0.0,
        rng: np.random.Generator | None = None,
        workers: ThreadPoolExecutor | None = None,
    ) -> None:
        self._node, self._zero_point = mapped_node_of(entry), activation_of(entry).zero_point
        # Padding drives the zero point's code like any other input, so that the correction is the same everywhere.
        sums = self._node.layout.to_matrices(codes).sum(axis=1, dtype=np.int64)
        self._correction = (self._zero_point * sums).astype(np.float64)
        replicas = {placement.replica for placement in entry.placements} or {0} if replica is None else {replica}
        self._copies = [
            NodeReadout(view, entry, cells, replica=number, adc=adc, read_noise=read_noise, rng=rng, workers=workers)
            for number in sorted(replicas)
        ]

    @property
    def conversions(self) -> Conversions:
        """Conversions so far, over all replicas."""
        return sum((copy.conversions for copy in self._copies), Conversions())

    def seen_bits(self) -> int:
        """Fewest bits with which nothing that was run so far would have been clipped."""
        return max(copy.seen_bits() for copy in self._copies)

    def sums(self, codes: NDArray[np.uint8]) -> NDArray[np.float64]:
        """See `Engine.sums`; positions take turns at the replicas."""
        vectors = [self._run(input_vectors(self._node, part, fill=self._zero_point)) for part in self._parts(codes)]
        joined = vectors[0] if len(vectors) == 1 else np.concatenate(vectors)
        return np.asarray(from_output_vectors(self._node, joined, codes.shape), np.float64)

    def _parts(self, codes: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        """Samples whose input vectors are cut out together; an input whose first axis is no batch stays whole."""
        window = self._node.window
        if window is None:
            yield codes
            return
        spread = math.prod(window.kernel) * (math.prod(window.strides) if window.transposed else 1)
        samples = max(1, _VECTOR_VALUES // max(1, math.prod(codes.shape[1:]) * spread))
        # Without samples there is still an output of some shape.
        for start in range(0, max(1, len(codes)), samples):
            yield codes[start : start + samples]

    def _run(self, vectors: NDArray[np.uint8]) -> NDArray[np.float64]:
        result = np.empty((len(vectors), *self._correction.shape))
        for index, copy in enumerate(self._copies):
            turn = slice(index, None, len(self._copies))
            result[turn] = copy.run(vectors[turn])
        result -= self._correction
        return result


class RecombinedNode:
    """A node whose slices were read back from the cells into one integer weight tensor.

    Args:
        view: The manifest.
        entry: The node.
        cells: The levels, ideal ones.
        threads: Threads of onnxruntime.

    Raises:
        ManifestError: The node's input is float.
    """

    def __init__(self, view: ManifestView, entry: NodeEntry, cells: CellSource, threads: int | None = None) -> None:
        self._entry, self._node = entry, mapped_node_of(entry)
        self._act = activation_of(entry)
        weight = decode_node(view, entry, cells)
        top = (1 << self._act.bits) - 1
        largest = max(self._act.zero_point, top - self._act.zero_point)
        self._bits = exact_bits(entry.matrix.rows, largest, int(np.abs(weight).max(initial=0)))
        self._weight = weight.astype(np.float32 if self._bits else np.float64)
        self._session: Any = None
        if entry.window is None:
            self._session = make_session(_product(entry, self._weight), threads=threads)
        elif self._bits:
            self._session = make_session(_convolution(entry, entry.window, self._weight), threads=threads)

    def sums(self, codes: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
        """See `Engine.sums`."""
        if self._session is None:
            return self._wide(codes)
        x = codes.astype(np.int16) - np.int16(self._act.zero_point)
        if self._entry.input_transposed:
            x = np.ascontiguousarray(x.T)
        if not self._bits:
            return self._multiply(x.astype(np.float64))
        parts = list(_pieces(x, self._bits))
        if len(parts) == 1:
            return self._multiply(parts[0][1])
        result = self._multiply(parts[0][1]).astype(np.float64)
        for shift, part in parts[1:]:
            result += self._multiply(part) * float(1 << shift)
        return result

    def _multiply(self, x: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        found: NDArray[np.floating[Any]] = self._session.run(None, {"x": x})[0]
        return found

    def _wide(self, codes: NDArray[np.uint8]) -> NDArray[np.float64]:
        """A convolution with so many rows that single precision could not hold its sums even bit by bit."""
        x = codes.astype(np.float64) - self._act.zero_point
        vectors = input_vectors(self._node, x).swapaxes(0, 1)
        matrices = self._node.layout.to_matrices(self._weight)
        return np.asarray(from_output_vectors(self._node, (vectors @ matrices).swapaxes(0, 1), codes.shape))


def exact_bits(rows: int, largest_input: int, largest_weight: int) -> int:
    """Input bits that single precision can multiply at once without any rounding, in whatever order sums are made.

    No partial sum of K products is larger than `K * max|x| * max|w|`, and whole numbers below 2^24 are exact.

    Args:
        rows: K.
        largest_input: max|x|.
        largest_weight: max|w|.

    Returns:
        9 if inputs need not be cut (8 bits and a sign), else how many bits a piece may have: 8 to 1; 0 if not even one.
    """
    if rows * largest_input * largest_weight < _EXACT:
        return 9
    # A piece reaches from -2^bits (the sign's) to 2^bits - 1.
    return max(0, min(8, ((_EXACT - 1) // (rows * largest_weight)).bit_length() - 1))


def _pieces(x: NDArray[np.int16], bits: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Cut inputs into pieces of some bits, the last with the sign; they add up shifted."""
    if bits > 8:
        yield 0, x.astype(np.float32)
        return
    for shift in range(0, 8, bits):
        last = shift + bits >= 8
        part = x >> shift if last else (x >> shift) & ((1 << bits) - 1)
        yield shift, part.astype(np.float32)


def _product(entry: NodeEntry, weight: NDArray[Any]) -> bytes:
    """A model of one product of the input, as it is or transposed before, with the weight."""
    from onnx import helper

    matrix = weight.T if entry.matrix.kind == "out-in" and not entry.constant_left else weight
    operands = ["w", "x"] if entry.constant_left else ["x", "w"]
    return _lone(helper.make_node("MatMul", operands, ["y"]), np.ascontiguousarray(matrix), None)


def _convolution(entry: NodeEntry, window: WindowEntry, weight: NDArray[Any]) -> bytes:
    """A model of one convolution as the manifest describes it."""
    from onnx import helper

    attributes: dict[str, Any] = {
        "kernel_shape": window.kernel, "strides": window.strides, "dilations": window.dilations,
        "group": entry.matrix.groups, "auto_pad": window.auto_pad,
    }  # fmt: skip
    if window.auto_pad == "NOTSET":
        attributes["pads"] = window.pads
    if window.transposed:
        attributes["output_padding"] = window.output_padding
        if window.output_shape is not None:
            attributes["output_shape"] = window.output_shape
    node = helper.make_node(entry.op_type, ["x", "w"], ["y"], **attributes)
    return _lone(node, weight, [None] * weight.ndim)


def _lone(node: NodeProto, weight: NDArray[Any], shape: list[None] | None) -> bytes:
    """A model of one node with input x, weight w and output y."""
    from onnx import ModelProto, helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = helper.make_graph(
        [node],
        "lone",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()
