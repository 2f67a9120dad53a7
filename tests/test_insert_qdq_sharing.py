"""insert-qdq where nodes share inputs, weights and names, and what onnxruntime makes of it at both levels."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from qdq_models import CASES, Emitted, assert_integer, case_model, emit, parsed
from tensors import normal

from raqu_onnx.annotations import EMITTED, QUANTIZED, NodeBits, mapped_nodes
from raqu_onnx.model_io import load_model
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.insert_qdq import InsertQDQPass

if TYPE_CHECKING:
    from pathlib import Path

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
