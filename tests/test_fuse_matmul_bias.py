"""Linear layers written as MatMul and Add, and outputs that onnxruntime's optimizations would change."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from raqu_onnx.graph_edit import infer_shapes, name_nodes
from raqu_onnx.layout import MappedNode
from raqu_onnx.mapping import describe_node
from raqu_onnx.model_io import load_model, to_proto
from raqu_onnx.passes.fuse_matmul_bias import FuseMatMulBiasPass
from raqu_onnx.passes.tidy import TidyPass

CONSTANTS = {
    "w": np.arange(12, dtype=np.float32).reshape(4, 3) - 5,
    "b": np.array([1, -2, 3], np.float32),
    "row": np.array([[1, -2, 3]], np.float32),
    "one": np.array(2, np.float32),
    "rows": np.array([[1], [2]], np.float32),
    "stack": np.array([[[1, 2, 3]]], np.float32),
}


def fused(text: str) -> tuple[ir.Model, onnx.ModelProto, bool]:
    """The model after the pass, as it was before, and whether it says that it changed anything."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in CONSTANTS.items() if k in used)
    model = load_model(proto)
    name_nodes(model)
    infer_shapes(model)
    modified = FuseMatMulBiasPass()(model).modified
    onnx.checker.check_model(to_proto(model), full_check=True)
    return model, proto, modified


def run(proto: onnx.ModelProto, shape: tuple[int, ...]) -> list[np.ndarray]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}))


def same(model: ir.Model, proto: onnx.ModelProto, shape: tuple[int, ...]) -> bool:
    pairs = zip(run(to_proto(model), shape), run(proto, shape), strict=True)
    return all(np.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("bias", ["b", "row", "one"])
@pytest.mark.parametrize("order", ["m, {}", "{}, m"])
@pytest.mark.parametrize("operator", ["Add", "Sum"])
def test_a_matrix_becomes_a_gemm(bias: str, order: str, operator: str) -> None:
    model, proto, modified = fused(
        f"g (float[n, 4] x) => (float[n, 3] y, float[n, 3] z)"
        f"{{ [fc] m = MatMul (x, w) y = {operator} ({order.format(bias)}) z = Relu (y) }}"
    )
    assert modified
    assert [(node.op_type, node.name) for node in model.graph] == [("Gemm", "fc"), ("Relu", "Relu_0")]
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert model.graph[0].inputs[2].shape == (3,)
    assert len(model.graph.initializers) == 2
    assert same(model, proto, (5, 4))
    assert not FuseMatMulBiasPass()(model).modified


def test_a_stack_of_matrices_gets_a_wide_constant() -> None:
    model, proto, modified = fused("g (float[2, 5, 4] x) => (float[2, 5, 3] y) { m = MatMul (x, w) y = Add (m, b) }")
    assert modified
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]
    assert model.graph[1].inputs[1].shape == (1, 1, 3)
    assert same(model, proto, (2, 5, 4))
    assert not FuseMatMulBiasPass()(model).modified


@pytest.mark.parametrize(
    "text",
    [
        "g (float[n, 4] x) => (float[n, 3] y, float[n, 3] m) { m = MatMul (x, w) y = Add (m, b) }",
        "g (float[n, 4] x) => (float[n, 3] y, float[n, 3] z) { m = MatMul (x, w) y = Add (m, b) z = Relu (m) }",
        "g (float[n, 4] x) => (float[n, 3] y) { m = MatMul (x, w) y = Add (m, m) }",
        "g (float[2, 4] x) => (float[2, 3] y) { m = MatMul (x, w) y = Add (m, rows) }",
        "g (float[n, 4] x) => (float[1, n, 3] y) { m = MatMul (x, w) y = Add (m, stack) }",
        "g (float[n, 4] x) => (float[n, 3] y) { m = MatMul (x, w) y = Sub (m, b) }",
        "g (float[n, 4] x) => (float[n, 3] y) { m = MatMul (x, w) y = Sum (m, b, b) }",
        "g (float[4] x) => (float[3] y) { m = MatMul (x, w) y = Add (m, b) }",
        "g (float[3, 4] x) => (float[4, 4] y) { m = MatMul (w, x) y = Add (m, one) }",
    ],
)
def test_anything_else_stays(text: str) -> None:
    model, _, modified = fused(text)
    assert not modified
    assert model.graph[0].op_type == "MatMul"


def test_a_shared_bias_stays_for_the_others() -> None:
    model, proto, _ = fused(
        "g (float[n, 4] x, float[n, 3] v) => (float[n, 3] y, float[n, 3] z)"
        "{ m = MatMul (x, w) y = Add (m, row) z = Add (v, row) }"
    )
    assert [node.op_type for node in model.graph] == ["Gemm", "Add"]
    feeds = {"x": np.ones((2, 4), np.float32), "v": np.ones((2, 3), np.float32)}
    for item in (to_proto(model), proto):
        session = ort.InferenceSession(item.SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(["z"], feeds)[0], feeds["v"] + CONSTANTS["row"])


def test_an_output_that_is_transposed_and_quantized_is_not_quantized_itself() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[n, 4] x) => (float[n, 4] s, float[4, n] y)
        <float scale = {0.25}, uint8 zero = {0}>
        {
            s = Sigmoid (x)
            t = Transpose <perm = [1, 0]> (s)
            q = QuantizeLinear (t, scale, zero)
            y = DequantizeLinear (q, scale, zero)
        }""")
    model = ir.from_proto(proto)
    TidyPass()(model)
    assert [value.name for value in model.graph.outputs] == ["s", "y"]
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    expected = 1 / (1 + np.exp(-x))
    tidied = ort.InferenceSession(to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(tidied.run(["s"], {"x": x})[0], expected, atol=1e-6)
    count = len(model.graph)
    TidyPass()(model)
    assert len(model.graph) == count


@pytest.mark.parametrize("pattern", ["fc", "MatMul", "f.*"])
def test_what_the_user_excludes_stays_two_nodes(pattern: str) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n, 4] x) => (float[n, 3] y)'
        "{ [fc] m = MatMul (x, w) [bias] y = Add (m, b) }"
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(CONSTANTS[name], name) for name in ("w", "b"))
    model = TidyPass(exclude=(pattern,))(load_model(proto)).model
    assert [(node.op_type, node.name) for node in model.graph] == [("MatMul", "fc"), ("Add", "bias")]
    assert [node.op_type for node in TidyPass(exclude=("other",))(load_model(proto)).model.graph] == ["Gemm"]


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
def test_a_layer_of_float16_is_fused_before_it_gets_its_casts(shape: tuple[int, ...]) -> None:
    dims = ", ".join(map(str, shape[:-1]))
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float16[{dims}, 4] x) => (float16[{dims}, 3] y)'
        "{ [fc] m = MatMul (x, w) [bias] y = Add (m, b) }"
    )
    halves = {name: CONSTANTS[name].astype(np.float16) for name in ("w", "b")}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in halves.items())
    model = TidyPass()(load_model(proto)).model
    matrix = len(shape) == 2
    assert [node.op_type for node in model.graph] == (
        ["Cast", "Gemm", "Cast"] if matrix else ["Cast", "MatMul", "Cast", "Add"]
    )
    layer = next(node for node in model.graph if node.name == "fc")
    assert isinstance(describe_node(layer), MappedNode)
    assert [len(value.shape) for value in layer.outputs if value.shape is not None] == [len(shape)]
    onnx.checker.check_model(to_proto(model), full_check=True)
    x = {"x": np.random.default_rng(0).normal(size=shape).astype(np.float16)}
    found, expected = (
        ort.InferenceSession(item.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, x)[0]
        for item in (to_proto(model), proto)
    )
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-2)
    count = len(model.graph)
    assert not TidyPass()(model).modified
    assert len(model.graph) == count
