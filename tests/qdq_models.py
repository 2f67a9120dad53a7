"""Models that are mapped and quantized, ready for insert-qdq."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from tensors import normal

from raqu_onnx.annotations import BITS, EMITTED, MAPPED, QUANTIZED, NodeBits, mapped_nodes
from raqu_onnx.data import open_dataset
from raqu_onnx.evaluation import make_session
from raqu_onnx.graph_edit import infer_shapes, name_nodes
from raqu_onnx.model_io import load_model, model_inputs, to_proto
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.insert_qdq import InsertQDQPass
from raqu_onnx.passes.quantize_weights import QuantizeWeightsPass
from raqu_onnx.patches import input_vectors

if TYPE_CHECKING:
    pass


HEADER = '<ir_version: 10, opset_import: ["": 18]>'


def parsed(text: str, header: str = HEADER, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f"{header} {text}")
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


@dataclass
class Emitted:
    """A quantized model with the data that it was calibrated on."""

    model: ir.Model
    proto: onnx.ModelProto
    x: dict[str, np.ndarray]

    def ops(self) -> Counter[str]:
        return Counter(node.op_type for node in self.proto.graph.node)

    def node(self, op_type: str, index: int = 0) -> ir.Node:
        return [node for node in self.model.graph if node.op_type == op_type][index]

    def run(self, names: list[str], level: str = "disable-all", x: dict[str, np.ndarray] | None = None) -> list[Any]:
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        present = {value.name for value in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
        session = make_session(proto.SerializeToString(), level=level, threads=1)  # type: ignore[arg-type]
        return list(session.run(names, self.x if x is None else x))

    def levels(self, names: list[str]) -> tuple[list[Any], list[Any]]:
        return self.run(names), self.run(names, "enable-all")

    def outputs(self) -> list[str]:
        return [value.name for value in self.proto.graph.output]


def emit(
    proto: onnx.ModelProto,
    x: dict[str, np.ndarray],
    *,
    weight: int = 7,
    activation: int | None = 8,
    bits: dict[str, NodeBits] | None = None,
    method: str = "gptq",
) -> Emitted:
    model = load_model(proto)
    name_nodes(model)
    infer_shapes(model)
    dataset = open_dataset(x, model_inputs(model))
    AnnotateTilingPass()(model)
    CalibratePass(dataset, threads=1)(model)
    for node in mapped_nodes(model):
        if node.name in (bits or {}):
            BITS.set(node, bits[node.name])  # type: ignore[index]
    quantize = QuantizeWeightsPass(weight_bits=weight, activation_bits=activation, weight_method=method)  # type: ignore[arg-type]
    replace(quantize, input_bits=activation or 8)(model)
    assert InsertQDQPass()(model).modified
    emitted = to_proto(model)
    onnx.checker.check_model(emitted, full_check=True)
    found = Emitted(model, emitted, x)
    for level in ("disable-all", "enable-all"):
        found.run(found.outputs(), level)  # loads and runs with default options too
    return found


@dataclass
class Case:
    """A model of one mapped node."""

    text: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    b: int | None
    kernels: int  # entries of the scale axis


def conv(x: str, y: str, attributes: str = "", *, bias: bool = True, op: str = "Conv") -> str:
    operands = "x, w, b" if bias else "x, w"
    return f"g (float[n, {x}] x) => (float[n, {y}] y) {{ [m] y = {op} {attributes} ({operands}) }}"


CASES = {
    "conv1d": Case(conv("3, 9", "4, 9", "<pads = [1, 1]>"), (5, 3, 9), (4, 3, 3), 4, 4),
    "conv2d": Case(conv("3, 7, 6", "4, 4, 6", "<pads=[2,1,0,1], strides=[2,1]>"), (5, 3, 7, 6), (4, 3, 3, 3), 4, 4),
    "dilated": Case(conv("2, 9, 8", "4, 5, 6", "<dilations=[2,1]>"), (4, 2, 9, 8), (4, 2, 3, 3), 4, 4),
    "same": Case(
        conv("2, 7, 6", "3, 4, 3", '<auto_pad="SAME_LOWER", strides=[2,2]>'), (4, 2, 7, 6), (3, 2, 3, 2), 3, 3
    ),
    "conv3d": Case(conv("2, 4, 5, 4", "3, 4, 4, 3", "<pads=[1,0,0,0,0,0]>"), (3, 2, 4, 5, 4), (3, 2, 2, 2, 2), 3, 3),
    "grouped": Case(conv("4, 6, 6", "6, 6, 6", "<group=2, pads=[1,1,1,1]>"), (5, 4, 6, 6), (6, 2, 3, 3), 6, 6),
    "depthwise": Case(conv("5, 6, 6", "5, 6, 6", "<group=5, pads=[1,1,1,1]>"), (5, 5, 6, 6), (5, 1, 3, 3), 5, 5),
    "no-bias": Case(conv("3, 5, 5", "4, 3, 3", bias=False), (5, 3, 5, 5), (4, 3, 3, 3), None, 4),
    "deconv": Case(
        conv("4, 4, 5", "3, 9, 8", "<strides=[2,2], pads=[0,1,0,1], output_padding=[0,0]>", op="ConvTranspose").replace(
            "9, 8]", "9, 9]"
        ),
        (4, 4, 4, 5),
        (4, 3, 3, 3),
        3,
        3,
    ),
    "deconv-grouped": Case(
        conv("4, 4", "6, 8", "<group=2, strides=[2], output_padding=[1], pads=[1,1]>", op="ConvTranspose"),
        (6, 4, 4),
        (4, 3, 3),
        6,
        3,
    ),
    "gemm": Case("g (float[n, 8] x) => (float[n, 5] y) { [m] y = Gemm (x, w, b) }", (9, 8), (8, 5), 5, 5),
    "gemm-no-c": Case("g (float[n, 8] x) => (float[n, 5] y) { [m] y = Gemm (x, w) }", (9, 8), (8, 5), None, 5),
    "gemm-transB": Case(
        "g (float[n, 8] x) => (float[n, 5] y) { [m] y = Gemm <transB = 1> (x, w, b) }", (9, 8), (5, 8), 5, 5
    ),
    "gemm-transA": Case(
        "g (float[n, 8] x) => (float[n, 5] y) { t = Transpose (x) [m] y = Gemm <transA = 1> (t, w, b) }",
        (9, 8),
        (8, 5),
        5,
        5,
    ),
    "matmul": Case("g (float[n, 8] x) => (float[n, 5] y) { [m] y = MatMul (x, w) }", (9, 8), (8, 5), None, 5),
    "matmul-3d": Case(
        "g (float[n, 3, 8] x) => (float[n, 3, 5] y) { [m] y = MatMul (x, w) }", (6, 3, 8), (8, 5), None, 5
    ),
    "matmul-left": Case(
        "g (float[n, 8, 3] x) => (float[n, 5, 3] y) { [m] y = MatMul (w, x) }", (6, 8, 3), (5, 8), None, 5
    ),
}


def case_model(case: Case) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    weights = {"w": normal(*case.w, seed=2)}
    if case.b:
        weights["b"] = normal(case.b, seed=3)
    # Values on both sides of 0, more of them above.
    return parsed(case.text, **weights), {"x": normal(*case.x) + np.float32(0.7)}


def integer_reference(emitted: Emitted, node: ir.Node, codes: np.ndarray) -> np.ndarray:
    """Outputs of shape (P, G, M) by integer arithmetic on the codes alone, times the scales."""
    quantized = QUANTIZED.require(node)
    assert quantized.activation is not None
    names, mapped = EMITTED.require(node), quantized.node
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in emitted.proto.graph.initializer}
    assert names.activation_scale is not None
    assert names.activation_zero_point is not None
    np.testing.assert_array_equal(stored[names.weight], quantized.codes)
    zero_point = int(stored[names.activation_zero_point])
    vectors = input_vectors(mapped, codes.astype(np.int64) - zero_point)
    sums = np.einsum("pgk,gkm->pgm", vectors, mapped.layout.to_matrices(stored[names.weight].astype(np.int64)))
    if names.bias is not None:
        sums += stored[names.bias].astype(np.int64).reshape(mapped.layout.groups, -1)
    scales = stored[names.weight_scale].astype(np.float64)[mapped.layout.channel_index()]
    return sums * scales * float(stored[names.activation_scale])


def as_vectors(mapped: Any, y: np.ndarray) -> np.ndarray:
    """A node's output as (P, G, M)."""
    layout = mapped.layout
    if mapped.window is not None:
        y = np.moveaxis(y, 1, -1)
    elif mapped.constant_left:
        y = np.moveaxis(y, -2, -1)
    return y.reshape(-1, layout.groups, layout.kernels)


def assert_integer(emitted: Emitted, level: str = "disable-all", tolerance: float = 1e-4) -> None:
    """Every mapped node computes what its codes say."""
    nodes = mapped_nodes(emitted.model)
    names = [name for node in nodes for name in (EMITTED.require(node).activation, MAPPED.require(node).output_name)]
    values = emitted.run(names, level)  # type: ignore[arg-type]
    for node, codes, y in zip(nodes, values[::2], values[1::2], strict=True):
        assert codes.dtype == np.uint8
        quantizer = QUANTIZED.require(node).activation
        assert quantizer is not None
        assert codes.max() <= quantizer.levels
        expected = integer_reference(emitted, node, codes)
        found = as_vectors(MAPPED.require(node), y)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
        dropped = QUANTIZED.require(node).bits[MAPPED.require(node).layout.channel_index()] == 0
        assert not found[:, dropped].any()
