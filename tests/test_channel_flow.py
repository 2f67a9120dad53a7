"""Who reads the channels of a mapped node: told from the graph, and checked by running it with kernels dropped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from tensors import normal

from raqu_onnx.annotations import MAPPED, mapped_nodes
from raqu_onnx.channel_flow import ChannelFlow, Reader, channel_flows
from raqu_onnx.evaluation import make_session
from raqu_onnx.model_io import load_model, to_proto
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.patches import input_vectors

if TYPE_CHECKING:
    import onnx_ir as ir

Weights = Mapping[str, Sequence[int] | np.ndarray]


def mapped_model(text: str, weights: Weights, opset: int = 18) -> ir.Model:
    """A tidied model; weights are given as arrays, or by their shapes."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    for output in proto.graph.output:
        output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for seed, (name, given) in enumerate(weights.items()):
        array = normal(*given, seed=seed) if isinstance(given, tuple) else np.asarray(given)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model: ir.Model = TidyPass()(load_model(proto)).model
    AnnotateTilingPass()(model)
    return model


def flow_of(model: ir.Model, output: str = "a") -> ChannelFlow:
    """Flow of the node with the given output."""
    name = next(MAPPED.require(n).name for n in mapped_nodes(model) if MAPPED.require(n).output_name == output)
    return channel_flows(model)[name]


def single_reader(model: ir.Model, output: str = "a") -> Reader:
    flow = flow_of(model, output)
    assert flow.absorbable, flow.escapes
    (reader,) = flow.readers
    return reader


def vectors(model: ir.Model, feeds: dict[str, np.ndarray], reader: str, dropped: int | None) -> np.ndarray:
    """What drives a reader's wordlines, with a kernel of the first mapped node dropped."""
    first = MAPPED.require(mapped_nodes(model)[0])
    node = next(MAPPED.require(n) for n in mapped_nodes(model) if MAPPED.require(n).name == reader)
    proto = to_proto(model)
    for item in proto.graph.initializer:
        if dropped is not None and item.name in (first.weight_name, first.bias_name):
            array = onnx.numpy_helper.to_array(item).copy()
            if item.name == first.bias_name:
                array[dropped] = 0
            else:
                matrices = first.layout.to_matrices(array).copy()
                matrices[divmod(dropped, first.layout.kernels)[0], :, dropped % first.layout.kernels] = 0
                array = first.layout.from_matrices(matrices)
            item.CopyFrom(onnx.numpy_helper.from_array(array, item.name))
    proto.graph.output.append(onnx.ValueInfoProto(name=node.input_name))
    session = make_session(proto.SerializeToString(), level="disable-all", threads=1)
    return input_vectors(node, session.run([node.input_name], feeds)[0])


def check(model: ir.Model, feeds: dict[str, np.ndarray]) -> Reader:
    """The rows that change when a kernel is dropped are those told, and are 0 where that is told."""
    reader = single_reader(model)
    whole = vectors(model, feeds, reader.name, None)
    kernels = MAPPED.require(mapped_nodes(model)[0]).layout
    for kernel in range(kernels.groups * kernels.kernels):
        seen = vectors(model, feeds, reader.name, kernel)
        mine = reader.owner == kernel
        assert mine.any()
        np.testing.assert_array_equal((seen != whole).any(0), mine)
        assert not seen[:, mine].any() or not reader.keeps_zero
        assert seen[:, mine].any() or reader.keeps_zero
    return reader


CONV = "a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)"
SHAPES: Weights = {"w1": (4, 3, 3, 3), "b1": (4,)}
X = {"x": normal(3, 3, 6, 6, seed=9)}


def between(steps: str, weights: Weights, *, last: str = "y = Conv (s, w2)", opset: int = 18) -> ir.Model:
    return mapped_model(f"g (float[n, 3, 6, 6] x) => (y) {{ {CONV} {steps} {last} }}", {**SHAPES, **weights}, opset)


SQUARE: Weights = {"w2": (5, 4, 3, 3)}
POINT: Weights = {"w2": (5, 4, 1, 1)}


ALL, ABOVE = (-math.inf, math.inf), (0, math.inf)
SPATIAL_PADS = np.array([0, 0, 1, 2, 0, 0, 1, 0])
NORM: Weights = {**SQUARE, "i": (4,), "j": (4,), "v": np.ones(4, np.float32)}
LAST = "Transpose <perm = [0, 2, 3, 1]>"
FIRST = "Transpose <perm = [0, 3, 1, 2]>"


@pytest.mark.parametrize(
    ("steps", "weights", "keeps_zero", "passing", "positions"),
    [
        ("s = Relu (a)", SQUARE, True, ABOVE, 1),
        ("s = LeakyRelu (a)", SQUARE, True, ALL, 1),
        ("s = Sigmoid (a)", SQUARE, False, ALL, 1),
        ("s = HardSwish (a)", SQUARE, True, ABOVE, 1),
        ("s = PRelu (a, p)", {**SQUARE, "p": (4, 1, 1)}, True, ALL, 1),
        ("s = Clip (a, lo, hi)", {**SQUARE, "lo": np.float32(-1), "hi": np.float32(2)}, True, (-1, 2), 1),
        ("s = Clip (a, lo)", {**SQUARE, "lo": np.float32(0.5)}, False, (0.5, math.inf), 1),
        ("t = Sigmoid (a) s = Mul (t, a)", SQUARE, True, ABOVE, 1),
        # What Clip cuts off is no longer in units of the node's output.
        ("u = Mul (a, k) s = Clip (u, lo)", {**SQUARE, "k": (4, 1, 1), "lo": np.float32(0)}, True, ALL, 1),
        ("s = Add (a, k)", {**SQUARE, "k": (4, 1, 1)}, False, ALL, 1),
        ("s = MaxPool <kernel_shape = [2, 2], pads = [1, 1, 1, 1]> (a)", SQUARE, True, ALL, 1),
        ("t = Relu (a) s = AveragePool <kernel_shape = [2, 3]> (t)", SQUARE, True, ABOVE, 6),
        ("t = Relu (a) s = GlobalAveragePool (t)", POINT, True, ABOVE, 36),
        ("s = ReduceMean (a, ax)", {**POINT, "ax": np.array([-1, 2])}, True, ALL, 36),
        ("s = Pad (a, p)", {**SQUARE, "p": SPATIAL_PADS}, True, ALL, 1),
        ("s = Pad (a, p, c)", {**SQUARE, "p": SPATIAL_PADS, "c": np.float32(1)}, False, ALL, 1),
        ("s = Resize (a, , f)", {**SQUARE, "f": np.array([1, 1, 2, 2], np.float32)}, True, ALL, 1),
        (f"t = {LAST} (a) u = Abs (t) s = {FIRST} (u)", SQUARE, True, ALL, 1),
        ("s = InstanceNormalization (a, i, j)", NORM, False, ALL, 1),
        ("t = Relu (a) s = BatchNormalization (t, i, j, i, v)", NORM, False, ABOVE, 1),
    ],
)
def test_channels_stay_apart(
    steps: str, weights: Weights, keeps_zero: bool, passing: tuple[float, float], positions: float
) -> None:
    reader = check(between(steps, weights), X)
    assert reader.keeps_zero is keeps_zero
    assert reader.passing == passing
    assert reader.positions == positions


TOKENS = np.array([0, 4, 36])
SHUFFLE = "r = Reshape (a, t) q = Transpose <perm = [0, 2, 1, 3, 4]> (r) s = Reshape (q, u)"
SHUFFLED: Weights = {**POINT, "t": np.array([0, 2, 2, 6, 6]), "u": np.array([0, 4, 6, 6])}
CUT: Weights = {"w2": (5, 6, 1, 1), "o": np.array([1]), "e": np.array([3]), "c": np.array([1])}


@pytest.mark.parametrize(
    ("steps", "weights", "last"),
    [
        ("s = Flatten (a)", {"w2": (144, 5), "b2": (5,)}, "y = Gemm (s, w2, b2)"),
        ("s = Reshape (a, t)", {"w2": (144, 5), "t": np.array([0, -1])}, "y = MatMul (s, w2)"),
        # The channels as the last axis: kernel k feeds every fourth row.
        (f"t = {LAST} (a) s = Flatten (t)", {"w2": (5, 144)}, "y = Gemm <transB = 1> (s, w2)"),
        ("p = GlobalMaxPool (a) s = Squeeze (p, x2)", {"w2": (4, 5), "x2": np.array([2, 3])}, "y = MatMul (s, w2)"),
        # Tokens: positions by channels, and the other way round.
        ("r = Reshape (a, t) s = Transpose <perm = [0, 2, 1]> (r)", {"w2": (4, 5), "t": TOKENS}, "y = MatMul (s, w2)"),
        ("s = Reshape (a, t)", {"w2": (5, 4), "t": TOKENS}, "y = MatMul (w2, s)"),
        ("s = ConvTranspose <strides = [2, 2], group = 2> (a, w2)", {"w2": (4, 3, 2, 2)}, "y = Abs (s)"),
        ("s = Relu (a)", {"w2": (8, 2, 3, 3)}, "y = Conv <group = 2> (s, w2)"),
        ("s = Relu (a)", {"w2": (8, 1, 3, 3)}, "y = Conv <group = 4> (s, w2)"),
        # ShuffleNet's shuffle: groups become the inner axis.
        (SHUFFLE, SHUFFLED, "y = Conv (s, w2)"),
        ("t = Relu (a) s = Concat <axis = 1> (x, t, a)", {"w2": (5, 11, 1, 1)}, "y = Conv (s, w2)"),
        ("u, v = Split <axis = 1, num_outputs = 2> (a) s = Concat <axis = 1> (v, u)", POINT, "y = Conv (s, w2)"),
        ("u = Slice (a, o, e, c) s = Concat <axis = 1> (u, a)", CUT, "y = Conv (s, w2)"),
    ],
)
def test_rows_of_every_kind_of_reader(steps: str, weights: Weights, last: str) -> None:
    assert check(between(steps, weights, last=last), X).keeps_zero


def test_rows_of_a_reader_behind_flatten_and_in_groups() -> None:
    gemm = single_reader(between("s = Flatten (a)", {"w2": (144, 5)}, last="y = Gemm (s, w2)"))
    ((group, rows),) = gemm.rows(2)
    assert group == 0
    np.testing.assert_array_equal(rows, np.arange(72, 108))
    depthwise = single_reader(between("s = Relu (a)", {"w2": (8, 1, 3, 3)}, last="y = Conv <group = 4> (s, w2)"))
    ((group, rows),) = depthwise.rows(3)
    assert group == 3
    np.testing.assert_array_equal(rows, np.arange(9))
    assert depthwise.owner.shape == (4, 9)
    both = single_reader(
        between("s = Concat <axis = 1> (a, a)", {"w2": (4, 4, 1, 1)}, last="y = Conv <group=2> (s, w2)")
    )
    assert [(group, list(rows)) for group, rows in both.rows(1)] == [(0, [1]), (1, [1])]


@pytest.mark.parametrize(
    ("steps", "last", "weights", "reason"),
    [
        ("c = Conv (a, w2) d = Conv (a, w3)", "y = Add (c, d)", {"w2": (4, 4, 1, 1), "w3": (4, 4, 1, 1)}, None),
        ("c = Conv (a, w2) s = Add (a, c)", "y = Conv (s, w3)", {"w2": (4, 4, 1, 1), "w3": (4, 4, 1, 1)}, "Add"),
        ("s = Softmax <axis = 1> (a)", "y = Conv (s, w2)", POINT, "Softmax"),
        ("s = LayerNormalization <axis = 1> (a, k)", "y = Conv (s, w2)", {**POINT, "k": (4, 6, 6)}, "LayerNorm"),
        ("r = Softmax <axis = 1> (a) s = Mul (a, r)", "y = Conv (s, w2)", POINT, "Softmax"),
        ("s = Pad (a, p)", "y = Conv (s, w2)", {"w2": (5, 6, 1, 1), "p": np.array([0, 1, 0, 0, 0, 1, 0, 0])}, "pads"),
        ("s = ReduceMean (a, c)", "y = Conv (s, w2)", {"w2": (5, 1, 1, 1), "c": np.array([1])}, "adds up"),
        ("s = Reshape (a, t)", "y = MatMul (s, w2)", {"w2": (36, 5), "t": np.array([0, 4, 36])}, "side by side"),
        ("s = Reshape (a, t)", "y = MatMul (s, w2)", {"w2": (36, 5), "t": np.array([-1, 36])}, "across samples"),
    ],
)
def test_what_cannot_be_absorbed(steps: str, last: str, weights: Weights, reason: str | None) -> None:
    flow = flow_of(between(steps, weights, last=last))
    assert flow.absorbable is (reason is None)
    assert reason is None or any(reason in escape for escape in flow.escapes), flow.escapes
    assert not flow.reaches_output
    assert all("\n" not in escape for escape in flow.escapes)


def test_a_block_with_a_gate_reads_its_channels_twice() -> None:
    model = between(
        "s = Relu (a) p = GlobalAveragePool (s) q = Conv (p, w2) g = Sigmoid (q) m = Mul (s, g)",
        {"w2": (4, 4, 1, 1), "w3": (5, 4, 1, 1)},
        last="y = Conv (m, w3)",
    )
    flow = flow_of(model)
    assert flow.absorbable
    assert [(reader.keeps_zero, reader.positions) for reader in flow.readers] == [(True, 36), (True, 1)]
    # The gate is 1/2 where its kernel is dropped, and the product is not 0.
    (reader,) = flow_of(model, "q").readers
    assert not reader.keeps_zero


def test_outputs_of_the_model_are_the_end() -> None:
    model = mapped_model(
        "g (float[n, 3] x) => (y, z, v) { a = Gemm (x, w1, b1) y = Relu (a) c = Gemm (y, w2) z = Softmax (c) "
        "e = Gemm (c, w3) v = Neg (e) }",
        {"w1": (3, 4), "b1": (4,), "w2": (4, 4), "w3": (4, 2)},
    )
    for output, readers in (("a", 1), ("c", 1), ("e", 0)):
        flow = flow_of(model, output)
        assert flow.reaches_output
        assert not flow.absorbable
        assert len(flow.readers) == readers


def test_bodies_and_shapes() -> None:
    model = between(
        "h = Shape (a) i = Cast <to = 1> (h) m = ReduceMax <keepdims = 0> (i) k = Greater (m, c0) "
        "t = If (k) <then_branch = g1 () => (float[n, 4, 6, 6] o1) { o1 = Relu (a) }, "
        "else_branch = g2 () => (float[n, 4, 6, 6] o2) { o2 = Neg (x4) }> s = Relu (a)",
        {**POINT, "c0": np.float32(1), "x4": (1, 4, 6, 6)},
        last="c = Conv (s, w2) y = Add (c, t)",
    )
    flow = flow_of(model)
    assert [reader.keeps_zero for reader in flow.readers] == [True]
    assert flow.reaches_output
    assert len(flow.escapes) == 1
    assert "control-flow" in flow.escapes[0]
    # Its shape alone is no use of a channel.
    shape_only = between(
        "h = Shape (a) u = Expand (k, h)", {**POINT, "k": np.float32([1])}, last="c = Conv (a, w2) y = Mul (u, u)"
    )
    assert flow_of(shape_only).absorbable


def test_positions_of_unknown_number() -> None:
    model = mapped_model(
        "g (float[n, 3, h, w] x) => (y) { a = Conv (x, w1) p = GlobalAveragePool (a) y = Conv (p, w2) }",
        {"w1": (4, 3, 1, 1), "w2": (2, 4, 1, 1)},
    )
    assert math.isnan(single_reader(model).positions)


def test_flows_keep_the_order_of_the_graph() -> None:
    model = between("s = Relu (a)", SQUARE)
    flows: dict[str, Any] = channel_flows(model)
    assert list(flows) == [MAPPED.require(node).name for node in mapped_nodes(model)]
    assert all(flow.name == name for name, flow in flows.items())
