"""Structures that exported graphs hold, each as a small model through the whole pipeline at 8 bits, without a search.

A graph lists its weights by type and shape alone, as `< float[8, 4, 3, 3] w >`: their numbers are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from raqu_onnx import optimize
from raqu_onnx.config import OptimizeConfig
from raqu_onnx.evaluation import make_session

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from raqu_onnx.results import OptimizeResult

# In dB: what 8 bits give at least on inputs that calibration has not seen; a wrong operand gives less than 10.
BAR = 25.0
DIMENSIONS = {"N": 48, "T": 5, "H": 9, "W": 8}


@dataclass(frozen=True)
class Case:
    """A graph and what becomes of it.

    `mapped` names the nodes that must be computed by crossbars, `left` those that must not, with a part of the reason.
    """

    text: str
    mapped: str
    left: Mapping[str, str] = field(default_factory=dict)
    opset: int = 18
    domains: str = ""
    constant_nodes: bool = False


CASES: dict[str, Case] = {
    # ------------------------------------------------------------------------------------------ where weights come from
    "constant-nodes": Case(
        "g (float[N,3,H,W] x) => (float[N,5] y) < float[8,3,3,3] w, float[8] b, float[8,5] v, float[5] c >"
        "{ [one] a = Conv (x, w, b) p = GlobalAveragePool (a) f = Flatten (p) [two] y = Gemm (f, v, c) }",
        "one two",
        constant_nodes=True,
    ),
    "one-weight-for-several-nodes": Case(
        "g (float[N,4,H,W] x) => (float[N,4,h,w] y) < float[4,4,3,3] w, float[4] b >"
        "{ [one] a = Conv <pads = [1,1,1,1]> (x, w, b) r = Relu (a) [two] c = Conv <pads = [1,1,1,1]> (r, w, b)"
        "  s = Add (c, x) [three] y = Conv <strides = [2,2]> (s, w) }",
        "one two three",
    ),
    "one-weight-in-several-layouts": Case(
        "g (float[N,6] x, float[N,6,T] z, float[N,6,H,W] i) => (float[N,6] y, float[N,6,T] u, float[N,3,h,w] v)"
        "< float[6,6] w, float[6,1,3,3] k >"
        "{ [one] a = Gemm (x, w) r = Relu (a) [two] b = Gemm <transB = 1, alpha = 0.5> (r, w) [three] y = MatMul (b, w)"
        "  [four] u = MatMul (w, z) [five] c = Conv <group = 6> (i, k) d = Relu (c)"
        "  [six] v = ConvTranspose <pads = [1,1,1,1], group = 3> (d, k) }",
        "one two three four five six",
    ),
    "conv-relu-batchnorm": Case(
        "g (float[N,3,H,W] x) => (float[N,5,h,w] y)"
        "< float[8,3,3,3] w, float[8] scale, float[8] shift, float[8] mean, float[8] var, float[5,8,1,1] v >"
        "{ [one] a = Conv (x, w) r = Relu (a) [norm] n = BatchNormalization (r, scale, shift, mean, var)"
        "  [two] y = Conv (n, v) }",
        "one two",
    ),
    "int8-decoded-by-cast-and-mul": Case(
        "g (float[N,3,H,W] x) => (float[N,4,h,w] y)"
        "< int8[6,3,3,3] q, float[6,1,1,1] s, uint8[4,6,1,1] u, float zero = {128.0}, float step = {0.01} >"
        "{ f = Cast <to = 1> (q) w = Mul (f, s) [one] a = Conv (x, w) r = Relu (a)"
        "  g1 = Cast <to = 1> (u) g2 = Sub (g1, zero) v = Mul (g2, step) [two] y = Conv (r, v) }",
        "one two",
    ),
    "float16-behind-cast": Case(
        "g (float[N,3,H,W] x) => (float[N,4,h,w] y) < float16[4,3,3,3] h, float16[4] c >"
        "{ w = Cast <to = 1> (h) b = Cast <to = 1> (c) [one] y = Conv (x, w, b) }",
        "one",
    ),
    "behind-transpose-reshape-identity": Case(
        "g (float[N,6] x) => (float[N,7] y) < float[5,6] p, float[5,4] q, float[28] r, int64[2] shape = {4, 7} >"
        "{ w1 = Transpose (p) [one] a = MatMul (x, w1) i = Identity (q) [two] b = MatMul (a, i)"
        "  w3 = Reshape (r, shape) [three] y = MatMul (b, w3) }",
        "one two three",
    ),
    "behind-concat-split-slice": Case(
        "g (float[N,6] x) => (float[N,5] y, float[N,4] z) < float[6,2] p, float[6,3] q, float[6,9] r, "
        "int64[2] parts = {5, 4}, int64[1] from = {0}, int64[1] to = {4}, int64[1] axis = {1} >"
        "{ w1 = Concat <axis = 1> (p, q) [one] a = MatMul (x, w1) w2, w3 = Split <axis = 1> (r, parts)"
        "  [two] b = MatMul (x, w2) y = Add (a, b) w4 = Slice (w3, from, to, axis) [three] z = MatMul (x, w4) }",
        "one two three",
    ),
    "behind-dequantizelinear": Case(
        "g (float[N,3,H,W] x) => (float[N,4,h,w] y) < int8[4,3,3,3] q, float[4] s, int8[4] z >"
        "{ w = DequantizeLinear <axis = 0> (q, s, z) [one] y = Conv (x, w) }",
        "one",
    ),
    # -------------------------------------------------------------------------------------------------------- windows
    "auto-pad": Case(
        "g (float[N,3,H,W] x) => (float[N,4,h,w] y) < float[8,3,3,3] w1, float[8,8,2,2] w2, float[4,8,3,3] w3 >"
        '{ [one] a = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, w1) r = Relu (a)'
        '  [two] b = Conv <auto_pad = "SAME_LOWER"> (r, w2) [three] y = Conv <auto_pad = "VALID"> (b, w3) }',
        "one two three",
    ),
    "explicit-pad": Case(
        "g (float[N,3,H,W] x) => (float[N,4,h,w] y) < float[4,3,3,3] w, int64[8] pads = {0,0,0,1,0,0,1,2} >"
        "{ p = Pad (x, pads) [one] y = Conv <strides = [2,2]> (p, w) }",
        "one",
    ),
    "conv-transpose": Case(
        "g (float[N,4,H,W] x) => (float[N,4,h,w] y, float[N,2,18,16] z, float[N,3,h2,w2] u)"
        "< float[4,2,3,3] w1, float[2] b, float[4,2,4,4] w2, float[4,3,2,2] w3 >"
        "{ [one] y = ConvTranspose <group = 2, strides = [2,2], pads = [1,1,1,1], output_padding = [1,0]> (x, w1)"
        "  [two] z = ConvTranspose <strides = [2,2], output_shape = [18,16]> (x, w2, b)"
        '  [three] u = ConvTranspose <auto_pad = "SAME_UPPER", dilations = [2,2]> (x, w3) }',
        "one two three",
    ),
    "groups-depthwise-dilations": Case(
        "g (float[N,6,H,W] x) => (float[N,12,h,w] y) < float[9,2,3,3] w1, float[9,1,3,3] w2, float[12,3,2,2] w3 >"
        "{ [one] a = Conv <group = 3, dilations = [2,1], pads = [2,1,2,1]> (x, w1) r = Relu (a)"
        "  [two] b = Conv <group = 9> (r, w2) [three] y = Conv <group = 3> (b, w3) }",
        "one two three",
    ),
    "one-dimension": Case(
        "g (float[N,3,H] x) => (float[N,4,h] y) < float[6,3,3] w1, float[6,4,3] w2 >"
        "{ [one] a = Conv <pads = [2,0], dilations = [2]> (x, w1) r = Relu (a)"
        "  [two] y = ConvTranspose <strides = [2]> (r, w2) }",
        "one two",
    ),
    "three-dimensions": Case(
        "g (float[N,2,T,T,T] x) => (float[N,3,a,b,c] y) < float[4,2,2,3,2] w1, float[4,3,2,1,2] w2 >"
        "{ [one] e = Conv <pads = [0,1,0,1,1,1]> (x, w1) r = Relu (e) [two] y = ConvTranspose (r, w2) }",
        "one two",
    ),
    # ------------------------------------------------------------------------------------------------ matrix products
    "gemm": Case(
        "g (float[N,6] x, float[N,4] offset) => (float[N,3] y)"
        "< float[6,5] w1, float[1,5] c1, float[8,5] w2, float c2, float[8,4] w3, float[4,3] w4, float[3] c4 >"
        "{ [one] a = Gemm <alpha = 0.5, beta = 2.0> (x, w1, c1) r = Relu (a) [two] b = Gemm <transB = 1> (r, w2, c2)"
        "  t = Transpose (b) [three] d = Gemm <transA = 1, beta = 0.25> (t, w3, offset)"
        "  [four] y = Gemm <beta = 0.0> (d, w4, c4) }",
        "one two three four",
    ),
    "gemm-with-the-constant-on-the-left": Case(
        "g (float[N,6] x) => (float[N,4] y) < float[6,4] w, float[4,1] c >"
        "{ [one] a = Gemm <transA = 1, transB = 1, beta = 0.5> (w, x, c) y = Transpose (a) }",
        "one",
    ),
    "matmul": Case(
        "g (float[N,T,6] x, float[N,6,T] z) => (float[N,T,5] y, float[N,3,T] u, float[N,T] v, float[N,T,T] s)"
        "< float[6,5] w1, float[3,6] w2, float[6] w3, float[5,6,2] w4 >"
        "{ [one] y = MatMul (x, w1) [two] u = MatMul (w2, z) [three] v = MatMul (x, w3) [four] s = MatMul (x, z) }",
        "one two",
        {"three": "its constant is a vector", "four": "its second operand is not a constant"},
    ),
    "matmul-with-a-batch-of-constants": Case(
        "g (float[N,1,T,6] x) => (float[N,2,T,4] y) < float[2,6,5] w1, float[5,4] w2 >"
        "{ [one] a = MatMul (x, w1) [two] y = MatMul (a, w2) }",
        "two",
        {"one": "batch dimensions"},
    ),
    # ---------------------------------------------------------------------------------------------------- other layers
    "nhwc-between-transposes": Case(
        "g (float[N,H,W,3] x) => (float[N,4] y) < float[8,3,3,3] w1, float[8] b1, float[8,4] w2, float[4] b2 >"
        '{ n = Transpose <perm = [0,3,1,2]> (x) [one] a = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (n, w1)'
        "  t = Transpose <perm = [0,2,3,1]> (a) s = Add (t, b1) r = Relu (s)"
        "  m = ReduceMean <axes = [1,2], keepdims = 0> (r) [two] l = MatMul (m, w2) y = Add (l, b2) }",
        "one two",
        opset=15,
    ),
    "lstm-and-gru": Case(
        "g (float[T,N,4] x) => (float[N,3] y) < float[1,24,4] w, float[1,24,6] r, float[1,18,6] w2, float[1,18,6] r2,"
        "float[6,3] v, int64[1] axis = {1}, int64[1] first = {0} >"
        "{ [long] s = LSTM <hidden_size = 6> (x, w, r) q = Squeeze (s, axis)"
        "  [gated] o, h = GRU <hidden_size = 6> (q, w2, r2)"
        "  l = Squeeze (h, first) [one] y = MatMul (l, v) }",
        "one",
        {"long": "state that changes inside", "gated": "state that changes inside"},
    ),
    "reshape-before-matmul": Case(
        "g (float[N,T,6] x) => (float[N,T,4] y) < float[6,4] w, int64[2] flat = {-1, 6}, int64[3] back = {-1, 5, 4} >"
        "{ f = Reshape (x, flat) [one] a = MatMul (f, w) y = Reshape (a, back) }",
        "one",
    ),
    "another-domain": Case(
        "g (float[N,6] x) => (float[N,4] y) < float[6,5] w1, float[5,4] w2 >"
        "{ [one] a = MatMul (x, w1) b = com.microsoft.Gelu (a) [two] y = MatMul (b, w2) }",
        "one two",
        domains=', "com.microsoft": 1',
    ),
    # --------------------------------------------------------------------------------------------------------- bodies
    "if": Case(
        "g (float[N,3,H,W] x) => (float[N,3,H,W] y) < float[3,3,3,3] w, float[3,3,3,3] w2, float limit = {0.0} >"
        "{ [one] a = Conv <pads = [1,1,1,1]> (x, w) m = ReduceMean <keepdims = 0> (x) yes = Greater (m, limit)"
        "  y = If (yes) < then_branch = yes () => (float[N,3,H,W] p)"
        "  { [inside] p = Conv <pads = [1,1,1,1]> (a, w2) }, else_branch = no () => (float[N,3,H,W] q)"
        "  { [other] q = Conv <pads = [1,1,1,1]> (a, w) } > }",
        "one",
        {"inside": "body of a control-flow node", "other": "body of a control-flow node"},
    ),
    "loop": Case(
        "g (float[N,4] x) => (float[N,4] y) < float[4,4] w, float[4,4] w2, int64 times = {3}, bool go = {1} >"
        "{ [one] a = MatMul (x, w) y = Loop (times, go, a) < body = b (int64 i, bool c, float[N,4] s) =>"
        "  (bool c2, float[N,4] s3) { c2 = Identity (c) [inside] s2 = MatMul (s, w2) s3 = Tanh (s2) } > }",
        "one",
        {"inside": "body of a control-flow node"},
    ),
    "scan": Case(
        "g (float[N,T,4] x) => (float[N,T,4] z) < float[4,4] w, float[4,4] w2 >"
        "{ [one] a = MatMul (x, w) z = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1],"
        "  body = b (float[N,4] s) => (float[N,4] t) { [inside] t = MatMul (s, w2) }> (a) }",
        "one",
        {"inside": "body of a control-flow node"},
    ),
    # ---------------------------------------------------------------------------------------------- inputs and outputs
    "several-inputs-and-outputs": Case(
        "g (int64[N,T] tokens, float[N,6] state, bool[N] mask) => (float[N,6] next, float[N,3] y, int64[N] best)"
        "< float[10,6] table, float[6,6] w1, float[6,6] w2, float[6,3] w3, int64[1] axis = {1}, float off = {-9.0} >"
        "{ e = Gather (table, tokens) s = ReduceSum <keepdims = 0> (e, axis) [one] a = MatMul (s, w1)"
        "  [two] b = MatMul (state, w2) c = Add (a, b) next = Tanh (c) [three] l = MatMul (next, w3)"
        "  k = Unsqueeze (mask, axis) y = Where (k, l, off) best = ArgMax <axis = 1, keepdims = 0> (y) }",
        "one two three",
    ),
    "batch-of-one": Case(
        "g (float[1,3,8,8] x) => (float[1,5] y) < float[4,3,3,3] w, float[144,5] v, int64[2] shape = {1, 144} >"
        "{ [one] a = Conv (x, w) r = Relu (a) f = Reshape (r, shape) [two] y = MatMul (f, v) }",
        "one two",
    ),
    "batch-of-four": Case(
        "g (float[4,3,8,8] x) => (float[4,5] y) < float[4,3,3,3] w, float[144,5] v, int64[2] shape = {4, 144} >"
        "{ [one] a = Conv (x, w) r = Relu (a) f = Reshape (r, shape) [two] y = MatMul (f, v) }",
        "one two",
    ),
    "every-dimension-free": Case(
        "g (float[N,3,H,W] x) => (float[N,c,h,w] y) < float[4,3,3,3] w1, float[4,4,3,3] w2 >"
        "{ [one] a = Conv (x, w1) r = Relu (a) s = Shape <start = 2> (x) n = Shape <end = 2> (r)"
        '  both = Concat <axis = 0> (n, s) p = Resize <mode = "nearest"> (r, , , both) [two] y = Conv (p, w2) }',
        "one two",
    ),
    "sum-of-two-convolutions-one-of-which-is-an-output": Case(
        "g (float[N,3,H,W] x) => (float[N,4,h,w] c, float[N,4,h,w] y) < float[4,3,3,3] w1, float[4,3,3,3] w2 >"
        "{ [one] c = Conv (x, w1) [two] e = Conv (x, w2) y = Add (c, e) }",
        "one two",
    ),
    # ------------------------------------------------------------------------------------------------ types of numbers
    "float16": Case(
        "g (float16[N,3,H,W] x) => (float16[N,5] y, float16[N,4,h,w] r)"
        "< float16[4,3,3,3] w1, float16[4] b1, float16[4,4,3,3] w2, float16[4,5] w3, float16[5] b3, float16[5,5] w4 >"
        "{ [one] a = Conv (x, w1, b1) r = Relu (a) [two] b = Conv (r, w2) p = GlobalAveragePool (b) f = Flatten (p)"
        "  [three] g1 = Gemm <alpha = 0.5> (f, w3, b3) [four] y = MatMul (g1, w4) }",
        "one two three four",
    ),
    "float16-shared-and-read-by-others": Case(
        "g (float16[N,4] x) => (float16[N,4] y, float16[N,4] z) < float16[4,4] w >"
        "{ [one] a = MatMul (x, w) [two] b = MatMul (x, w) s = Add (a, b) m = ReduceMean <keepdims = 0> (w)"
        "  y = Mul (s, m) t = Transpose (x) [three] u = MatMul (w, t) z = Transpose (u) }",
        "one two three",
    ),
    "float64": Case(
        "g (float[N,6] x) => (float[N,4] y) < float[6,5] w1, double[5,4] w2 >"
        "{ [one] a = MatMul (x, w1) d = Cast <to = 11> (a) [two] e = MatMul (d, w2) y = Cast <to = 1> (e) }",
        "one",
        {"two": "its second operand is double"},
    ),
}


def graph_of(case: Case) -> onnx.ModelProto:
    """The model of a case, with metadata that has to survive."""
    header = f'<ir_version: 9, producer_name: "exporter", opset_import: ["": {case.opset}{case.domains}]>'
    proto = onnx.parser.parse_model(f"{header} {case.text}")
    graph = proto.graph
    rng = np.random.default_rng(7)
    for info in graph.value_info:
        graph.initializer.append(onnx.numpy_helper.from_array(drawn(info, rng), info.name))
    del graph.value_info[:]
    if case.constant_nodes:
        nodes = [onnx.helper.make_node("Constant", [], [item.name], value=item) for item in graph.initializer]
        nodes.extend(graph.node)
        del graph.initializer[:], graph.node[:]
        graph.node.extend(nodes)
    proto.doc_string, graph.doc_string = "about the model", "about the graph"
    graph.input[0].doc_string, graph.output[0].doc_string = "what goes in", "what comes out"
    onnx.helper.set_model_props(proto, {"author": "somebody", "classes": "a,b"})
    return proto


def drawn(info: onnx.ValueInfoProto, rng: np.random.Generator) -> np.ndarray:
    kind = info.type.tensor_type
    shape = [dim.dim_value for dim in kind.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)
    if info.name.startswith("var") or info.name == "s":
        return rng.uniform(0.5, 1.5, shape).astype(dtype)
    return (rng.normal(size=shape) / max(1.0, np.prod(shape[1:])) ** 0.5).astype(dtype)


def inputs_of(proto: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    """Random inputs."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in proto.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value or DIMENSIONS[dim.dim_param] for dim in kind.shape.dim]
        if kind.shape.dim[0].dim_value:
            shape[0] = DIMENSIONS["N"]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype == np.bool_:
            feeds[value.name] = rng.random(shape) < 0.8
        elif np.issubdtype(dtype, np.integer):
            feeds[value.name] = rng.integers(0, 10, shape).astype(dtype)
        else:
            feeds[value.name] = rng.uniform(-1.5, 1.5, shape).astype(dtype)
    return feeds


def outputs_of(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs; a model of a fixed batch is run once for each."""
    fixed = session.get_inputs()[0].shape[0]
    step = fixed if isinstance(fixed, int) else DIMENSIONS["N"]
    runs = [
        session.run(None, {name: array[start : start + step] for name, array in feeds.items()})
        for start in range(0, DIMENSIONS["N"], step)
    ]
    return [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*runs, strict=True)]


def sqnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    signal, got = expected.astype(np.float64), found.astype(np.float64)
    return float(10 * np.log10(np.mean(signal**2) / max(np.mean((signal - got) ** 2), 1e-30)))


def quantized(proto: onnx.ModelProto, folder: Path, **settings: Any) -> tuple[OptimizeResult, onnx.ModelProto]:
    """The model at 8 bits: what was found, and the model emitted."""
    config = OptimizeConfig(weight_bits=8, activation_bits=8, evaluations=0, threads=1, **settings)  # type: ignore[arg-type]
    calibration, selection = inputs_of(proto, 1), inputs_of(proto, 2)
    result = optimize(proto, folder, calibration=calibration, selection=selection, config=config)
    return result, onnx.load(folder / "model.onnx")


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_float_model_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    proto = graph_of(case)
    result, emitted = quantized(proto, tmp_path / "out")
    onnx.checker.check_model(emitted, full_check=True)
    assert set(result.bits) == set(case.mapped.split())
    reasons = {node: reason for node, _, reason in result.unmapped}
    assert set(reasons) == set(case.left)
    for node, part in case.left.items():
        assert part in reasons[node]
    assert_same_interface(proto, emitted)
    assert set(case.mapped.split()) <= {node.name for node in emitted.graph.node}
    feeds = inputs_of(proto, 3)
    plain = ort.SessionOptions()
    plain.log_severity_level = 4
    original = ort.InferenceSession(proto.SerializeToString(), plain, providers=["CPUExecutionProvider"])
    expected = outputs_of(original, feeds)
    for level in ("disable-all", "enable-all"):
        session = make_session(tmp_path / "out" / "model.onnx", level=level, threads=1)  # type: ignore[arg-type]
        for output, before, after in zip(proto.graph.output, expected, outputs_of(session, feeds), strict=True):
            assert after.dtype == before.dtype
            assert after.shape == before.shape
            if before.dtype.kind == "f":
                assert sqnr_db(before, after) > BAR, (output.name, level)
            else:
                assert np.mean(before == after) > 0.8


def assert_same_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Names, types, dimensions, documentation and metadata of all that a user sees."""
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    for key in ("producer_name", "doc_string"):
        assert getattr(after, key) == getattr(before, key)
    assert (after.graph.name, after.graph.doc_string) == (before.graph.name, before.graph.doc_string)
    props = {item.key: item.value for item in after.metadata_props}
    assert {item.key: item.value for item in before.metadata_props}.items() <= props.items()
    opsets = {item.domain: item.version for item in after.opset_import}
    assert {item.domain: item.version for item in before.opset_import if item.domain}.items() <= opsets.items()
