"""The emitted graph: its form, what onnxruntime makes of it at both levels, and the integers behind its numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
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
    from pathlib import Path

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


@pytest.mark.parametrize("activation", [8, 4])
@pytest.mark.parametrize("name", sorted(CASES))
def test_one_node_of_every_kind(name: str, activation: int) -> None:
    case = CASES[name]
    proto, x = case_model(case)
    mixed = (7, 4, 0, 2, 5, 3)[: case.kernels]
    emitted = emit(proto, x, bits={"m": NodeBits(mixed, activation)})
    takes_bias = "MatMul" not in case.text
    ops = emitted.ops()
    assert ops["QuantizeLinear"] == 1
    assert ops["Clip"] == (activation < 8)
    assert ops["DequantizeLinear"] == 2 + takes_bias
    assert (
        len(emitted.proto.graph.node) == len(proto.graph.node) + sum(ops[o] for o in ops if "Linear" in o) + ops["Clip"]
    )
    node = mapped_nodes(emitted.model)[0]
    quantizer = QUANTIZED.require(node).activation
    assert quantizer is not None
    assert quantizer.zero_point > 0
    assert "w" not in emitted.model.graph.initializers
    assert "b" not in emitted.model.graph.initializers
    codes, y = emitted.run([EMITTED.require(node).activation or "", "y"])
    np.testing.assert_array_equal(codes, quantizer.quantize(emitted.run([MAPPED.require(node).input_name])[0]))
    assert y.shape[0] == len(x["x"])
    assert_integer(emitted)
    plain, fused = emitted.levels(["y"])
    np.testing.assert_allclose(fused[0], plain[0], atol=1e-4 * np.abs(plain[0]).max())


@pytest.mark.parametrize("name", sorted(CASES))
def test_eight_bits_are_near_the_float_model(name: str) -> None:
    proto, x = case_model(CASES[name])
    emitted = emit(proto, x, weight=8)
    expected = make_session(proto.SerializeToString(), threads=1).run(None, x)[0]
    found = emitted.run(["y"])[0]
    assert np.abs(found - expected).mean() < 0.015 * np.abs(expected).mean()


def test_a_float_activation_quantizes_weights_only() -> None:
    proto, x = case_model(CASES["conv2d"])
    emitted = emit(proto, x, activation=None, bits={"m": NodeBits((4, 0, 8, 2), None)})
    assert emitted.ops() == {"Conv": 1, "DequantizeLinear": 1}
    names = EMITTED.require(emitted.node("Conv"))
    assert (names.activation, names.activation_scale, names.bias) == (None, None, None)
    y = emitted.run(["y"])[0]
    assert not y[:, 1].any()
    quantized = QUANTIZED.require(emitted.node("Conv"))
    matrices = quantized.node.layout.to_matrices(quantized.weight())
    expected = np.einsum("pgk,gkm->pgm", input_vectors(quantized.node, x["x"]), matrices) + quantized.float_bias
    np.testing.assert_allclose(as_vectors(quantized.node, y), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------- sharing and names

TWO_READERS = """g (float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] p, float[n, 4, 6, 6] q)
    { [one] p = Conv <pads = [1, 1, 1, 1]> (x, v, b) [two] q = Conv <pads = [1, 1, 1, 1]> (x, w, b) }"""


def two_readers(**bits: NodeBits) -> Emitted:
    proto = parsed(TWO_READERS, v=normal(4, 3, 3, 3), w=normal(4, 3, 3, 3, seed=2), b=normal(4))
    return emit(proto, {"x": normal(5, 3, 6, 6)}, bits=bits)


def test_readers_with_the_same_width_share_one_chain() -> None:
    emitted = two_readers(one=NodeBits(4, 6), two=NodeBits(7, 6))
    assert emitted.ops() == {"QuantizeLinear": 1, "Clip": 1, "DequantizeLinear": 5, "Conv": 2}
    first, second = (EMITTED.require(emitted.node("Conv", i)) for i in (0, 1))
    assert first.activation == second.activation
    assert first.weight != second.weight
    assert first.bias != second.bias
    assert_integer(emitted)


def test_readers_with_different_widths_have_chains_of_their_own() -> None:
    emitted = two_readers(one=NodeBits(4, 6), two=NodeBits(7, 3))
    assert emitted.ops() == {"QuantizeLinear": 2, "Clip": 2, "DequantizeLinear": 6, "Conv": 2}
    first, second = (EMITTED.require(emitted.node("Conv", i)) for i in (0, 1))
    assert first.activation != second.activation
    assert_integer(emitted)
    codes = emitted.run([first.activation or "", second.activation or ""])
    assert (codes[0].max() > 7, codes[1].max()) == (True, 7)


def test_the_bounds_of_equal_clips_are_stored_once() -> None:
    proto = parsed(
        "g (float[n, 4] x) => (float[n, 3] z) { y = MatMul (x, v) z = MatMul (y, w) }", v=normal(4, 4), w=normal(4, 3)
    )
    emitted = emit(proto, {"x": normal(6, 4)}, activation=5)
    assert emitted.ops()["Clip"] == 2
    assert sum(t.data_type == onnx.TensorProto.UINT8 for t in emitted.proto.graph.initializer) == 2 + 2


def test_nodes_that_share_a_weight_get_codes_of_their_own() -> None:
    text = """g (float[n, 6] x) => (float[n, 6] z)
        { [one] y = Gemm (x, w, b) r = Relu (y) [two] z = Gemm (r, w, b) }"""
    emitted = emit(
        parsed(text, w=normal(6, 6), b=normal(6)),
        {"x": normal(40, 6)},
        bits={"one": NodeBits(8, 8), "two": NodeBits((0, 2, 3, 4, 5, 6), 8)},
    )
    first, second = (EMITTED.require(emitted.node("Gemm", i)) for i in (0, 1))
    assert len({first.weight, second.weight}) == 2
    assert len({first.bias, second.bias}) == 2
    assert {"w", "b"}.isdisjoint(emitted.model.graph.initializers)
    assert_integer(emitted)


def test_a_weight_that_others_read_stays() -> None:
    text = "g (float[n, 4] x) => (float[n, 4] z, float[4, 4] s) { y = MatMul (x, w) z = Add (y, b) s = Neg (w) }"
    emitted = emit(parsed(text, w=normal(4, 4), b=normal(4)), {"x": normal(9, 4)})
    assert "w" in emitted.model.graph.initializers
    np.testing.assert_array_equal(emitted.run(["s"])[0], -normal(4, 4))


def test_a_tensor_that_others_read_stays_float_for_them() -> None:
    text = """g (float[n, 4] x) => (float[n, 4] z, float[n, 4] r)
        { y = MatMul (x, w) r = Relu (y) z = MatMul (r, w) }"""
    emitted = emit(parsed(text, w=normal(4, 4)), {"x": normal(9, 4)}, activation=2)
    r = emitted.run(["r"])[0]
    assert len(np.unique(r)) > 4 * 3  # not rounded to four levels


def test_names_that_are_taken_are_not_taken_again() -> None:
    text = """g (float[n, 4] x, float[n, 4] x_a6_scale)
        => (float[n, 4] z, float[n, 4] w_quantized, float[n, 4] raqu_code_0)
        { [w_dequantized_node] y = MatMul (x, w)
          [m] x_a6_quantized = Relu (y)
          w_quantized = Neg (y)
          raqu_code_0 = Add (x_a6_scale, x_a6_zero_point)
          z = MatMul (x_a6_quantized, w) }"""
    weights = {"w": normal(4, 4), "x_a6_zero_point": normal(4, seed=5), "w_scale": normal(1)}
    x = {"x": normal(9, 4), "x_a6_scale": normal(9, 4, seed=4)}
    emitted = emit(parsed(text, **weights), x, activation=6)
    assert_integer(emitted)
    np.testing.assert_allclose(emitted.run(["raqu_code_0"])[0], x["x_a6_scale"] + weights["x_a6_zero_point"])
    names = [n.name for n in emitted.proto.graph.node]
    values = [o for n in emitted.proto.graph.node for o in n.output]
    values += [t.name for t in emitted.proto.graph.initializer] + [i.name for i in emitted.proto.graph.input]
    assert len(names) == len(set(names))
    assert len(values) == len(set(values))


def test_names_in_bodies_are_taken_too() -> None:
    body = onnx.parser.parse_graph(
        "b () => (float[n, 4] o) { x_a8_scale = Neg (x) w_scale = Add (x_a8_scale, k) o = MatMul (w_scale, w) }"
    )
    body.initializer.append(onnx.numpy_helper.from_array(np.float32(2), "k"))
    body.initializer.append(onnx.numpy_helper.from_array(np.float32(3), "w_quantized"))
    proto = parsed(
        "g (float[n, 4] x, bool c) => (float[n, 4] y, float[n, 4] z) { y = MatMul (x, w) z = Neg (x) }", w=normal(4, 4)
    )
    node = onnx.helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
    proto.graph.node[1].CopyFrom(node)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "c"))
    del proto.graph.input[1]
    x = {"x": normal(4, 4)}
    emitted = emit(proto, x, weight=8)
    assert {"x_a8_scale", "w_scale", "w_quantized"}.isdisjoint(emitted.model.graph.initializers)
    y, z = emitted.run(["y", "z"])
    # The body reads the float weight, the mapped node its codes.
    np.testing.assert_allclose(z, (2 - x["x"]) @ normal(4, 4), rtol=1e-5)
    np.testing.assert_allclose(y, x["x"] @ normal(4, 4), atol=0.1)
    assert_integer(emitted)


def test_what_the_user_sees_survives() -> None:
    text = """g (float[batch, 3, h, w0] x, float[batch, 4] u) => (float[batch, 4, h, w0] y, float[batch, 2] v)
        { [first] t = Conv <pads = [1, 1, 1, 1]> (x, k, b) y = Relu (t) [last] v = Gemm (u, w, c) }"""
    proto = parsed(text, k=normal(4, 3, 3, 3), b=normal(4), w=normal(4, 2), c=normal(2))
    proto.producer_name, proto.doc_string, proto.graph.doc_string = "somebody", "a model", "a graph"
    proto.metadata_props.add(key="licence", value="free")
    proto.graph.node[0].metadata_props.add(key="layer", value="stem")
    emitted = emit(proto, {"x": normal(5, 3, 6, 6), "u": normal(5, 4)}, bits={"first": NodeBits((2, 2, 0, 4), 5)})
    found = emitted.proto
    assert (found.producer_name, found.doc_string, found.graph.doc_string) == ("somebody", "a model", "a graph")
    assert list(found.opset_import) == list(proto.opset_import)
    assert found.ir_version == proto.ir_version
    assert [(p.key, p.value) for p in found.metadata_props] == [("licence", "free")]
    assert list(found.graph.input) == list(proto.graph.input)
    assert list(found.graph.output) == list(proto.graph.output)
    node = next(n for n in found.graph.node if n.name == "first")
    props = {p.key: p.value for p in node.metadata_props}
    assert props["layer"] == "stem"
    assert props["raqu.bits"] == '{"weight": [[2, 2], [0, 1], [4, 1]], "activation": 5}'
    assert list(node.attribute) == list(proto.graph.node[0].attribute)
    assert list(node.output) == ["t"]
    assert any(n.name == "last" for n in found.graph.node)
    # Spatial dimensions stay free: another size runs at both levels.
    other = {"x": normal(2, 3, 9, 4), "u": normal(2, 4)}
    for level in ("disable-all", "enable-all"):
        assert emitted.run(["y"], level, other)[0].shape == (2, 4, 9, 4)


def test_a_pass_that_did_not_run_is_named() -> None:
    proto, _ = case_model(CASES["gemm"])
    model = load_model(proto)
    AnnotateTilingPass()(model)
    with pytest.raises(ir.passes.PreconditionError) as caught:
        InsertQDQPass()(model)
    assert "run the pass quantize-weights first" in str(caught.value.__cause__ or caught.value)


# ------------------------------------------------------------------------------------------------------- both levels

CHAIN = """g (float[n, 3, 8, 8] x) => (float[n, 5, 8, 8] z)
    { a = Conv <pads = [1, 1, 1, 1]> (x, u, b) r = Relu (a)
      c = Conv <pads = [1, 1, 1, 1]> (r, v, d) s = Relu (c)
      z = Conv (s, w, e) }"""


def chain_weights() -> dict[str, np.ndarray]:
    return {
        "u": normal(4, 3, 3, 3),
        "b": normal(4),
        "v": normal(4, 4, 3, 3, seed=2, size=0.3),
        "d": normal(4, seed=3),
        "w": normal(5, 4, 1, 1, seed=4),
        "e": normal(5, seed=5),
    }


@pytest.mark.parametrize(("weight", "activation"), [(7, 8), (4, 8), (3, 4), (2, 2)])
def test_levels_differ_by_one_step_at_most(weight: int, activation: int) -> None:
    emitted = emit(parsed(CHAIN, **chain_weights()), {"x": normal(8, 3, 8, 8)}, weight=weight, activation=activation)
    names = [EMITTED.require(node).activation or "" for node in mapped_nodes(emitted.model)]
    assert_integer(emitted)
    # The last node's float outputs differ by what one code of its input is worth, times its weights.
    plain, fused = emitted.levels([*names, "z"])
    np.testing.assert_array_equal(plain[0], fused[0])
    differences = np.abs(plain[1].astype(int) - fused[1])
    assert differences.max() <= 1
    assert (differences > 0).mean() < 0.01
    assert_integer(emitted, "enable-all")


@pytest.mark.parametrize("activation", [8, 4])
def test_convolutions_fuse_to_integer_ones(tmp_path: Path, activation: int) -> None:
    emitted = emit(parsed(CHAIN, **chain_weights()), {"x": normal(8, 3, 8, 8)}, weight=5, activation=activation)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(emitted.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    # Both convolutions whose outputs are quantized again; their operands are decoded nowhere.
    assert ops["QLinearConv"] == 2
    assert ops["Conv"] + ops["FusedConv"] == 1
    assert ops["QuantizeLinear"] == 1
    assert ops["Clip"] == (3 if activation < 8 else 0)


def test_gemm_and_matmul_fuse_to_integer_ones(tmp_path: Path) -> None:
    text = "g (float[n, 6] x) => (float[n, 6] z) { y = Gemm (x, w, b) r = Relu (y) z = MatMul (r, v) }"
    emitted = emit(parsed(text, w=normal(6, 6), b=normal(6), v=normal(6, 6)), {"x": normal(40, 6)}, activation=5)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(emitted.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert ops["QGemm"] == 1
    assert ops["Gemm"] + ops["MatMul"] == 0


@pytest.mark.parametrize("method", ["nearest", "mse", "gptq"])
@pytest.mark.parametrize("activation", [8, 5, 2])
@pytest.mark.parametrize("kind", ["Conv", "Gemm"])
def test_a_bias_far_above_its_weights_survives_at_both_levels(kind: str, activation: int, method: str) -> None:
    # Weights of 1e-9 under a bias of 3: in steps of s_x * s_w the bias would be far above 2**31.
    if kind == "Conv":
        text = """g (float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] z)
            { y = Conv <pads=[1,1,1,1]> (x, w, b) r = Relu (y) z = Conv (r, v, c) }"""
        weights = {"w": normal(4, 3, 3, 3), "v": np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1)}
        x = normal(6, 3, 5, 5)
    else:
        text = "g (float[n, 6] x) => (float[n, 4] z) { y = Gemm (x, w, b) r = Relu (y) z = Gemm <transB=1> (r, v, c) }"
        weights = {"w": normal(6, 4), "v": np.eye(4, dtype=np.float32)}
        x = normal(40, 6)
    small = (slice(None), 1) if kind == "Gemm" else 1
    weights["w"][small] *= 1e-9
    weights |= {"b": np.array([0.5, 3.0, -1.0, 0.0], np.float32), "c": np.zeros(4, np.float32)}
    emitted = emit(parsed(text, **weights), {"x": x}, activation=activation, method=method)
    bias = QUANTIZED.require(mapped_nodes(emitted.model)[0]).bias
    assert bias is not None
    assert 2**20 < bias[1] <= 2**30
    assert_integer(emitted)
    steps = [QUANTIZED.require(node).activation for node in mapped_nodes(emitted.model)]
    assert steps[1] is not None
    for (y,) in emitted.levels(["y"]):
        np.testing.assert_allclose(y[:, 1], 3.0, rtol=1e-3)
    # Alone the outputs let the first node fuse; its result is read through the next node's quantizer.
    for (z,) in emitted.levels(["z"]):
        np.testing.assert_allclose(z[:, 1], 3.0, atol=0.6 * steps[1].scale + 0.02)


@pytest.mark.parametrize("activation", [8, 6, 3])
def test_values_beyond_the_calibrated_range_saturate_at_both_levels(activation: int) -> None:
    emitted = emit(parsed(CHAIN, **chain_weights()), {"x": normal(8, 3, 8, 8)}, weight=5, activation=activation)
    names = [EMITTED.require(node).activation or "" for node in mapped_nodes(emitted.model)]
    wild = {"x": normal(8, 3, 8, 8) * 100}
    for level in ("disable-all", "enable-all"):
        for codes in emitted.run(names, level, wild):
            assert codes.max() == 2**activation - 1
