"""Rows that are not stored, and kernels that go with dropped ones, on graphs given as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.annotations import MAPPED, NodeBits, mapped_nodes
from raqu_onnx.channel_flow import channel_flows
from raqu_onnx.data import open_dataset
from raqu_onnx.dropping import DropRules, Pruned
from raqu_onnx.model_io import load_model, model_inputs
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.quantize_weights import build_quantizer
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.quantizer import QuantizerSettings

if TYPE_CHECKING:
    import onnx_ir as ir

    from raqu_onnx.weights import WeightMethod

CHAIN = """g (float[N, 2, 6, 6] x) => (y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    b = Relu (a)
    y = Conv (b, w2, b2)
}"""
DEPTHWISE = """g (float[N, 2, 6, 6] x) => (y) {
    a = Conv (x, w1, b1)
    b = Relu (a)
    c = Conv <group = 4, pads = [1, 1, 1, 1]> (b, wd, bd)
    d = Relu (c)
    y = Conv (d, w2, b2)
}"""
TWICE = """g (float[N, 2, 6, 6] x) => (y) {
    a = Conv (x, w1, b1)
    b = Conv <group = 4, pads = [1, 1, 1, 1]> (a, wd, bd)
    c = Conv <group = 2, pads = [1, 1, 1, 1]> (b, wg, bd)
    y = Conv (c, w2, b2)
}"""
RESIDUAL = """g (float[N, 4, 6, 6] x) => (y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    b = Add (a, x)
    y = Conv (b, w2, b2)
}"""
SHAPES = {
    CHAIN: {"w1": (4, 2, 3, 3), "b1": (4,), "w2": (3, 4, 3, 3), "b2": (3,)},
    DEPTHWISE: {
        "w1": (4, 2, 1, 1), "b1": (4,), "wd": (4, 1, 3, 3), "bd": (4,), "w2": (3, 4, 1, 1), "b2": (3,),
    },
    TWICE: {
        "w1": (4, 2, 1, 1), "b1": (4,), "wd": (4, 1, 3, 3), "bd": (4,), "wg": (4, 2, 3, 3), "w2": (3, 4, 1, 1),
        "b2": (3,),
    },
    RESIDUAL: {"w1": (4, 4, 3, 3), "b1": (4,), "w2": (3, 4, 1, 1), "b2": (3,)},
}  # fmt: skip


def mapped_model(text: str) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 18]> {text}')
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    rng = np.random.default_rng(0)
    for name, shape in SHAPES[text].items():
        array = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model: ir.Model = TidyPass()(load_model(proto)).model
    AnnotateTilingPass()(model)
    return model


def prune(model: ir.Model, **bits: list[int]) -> tuple[Pruned, dict[str, str]]:
    """What follows from bits given by output names; also the names of nodes by these."""
    nodes = [MAPPED.require(node) for node in mapped_nodes(model)]
    names = {node.output_name: node.name for node in nodes}
    widths = {node.name: np.array(bits.get(node.output_name, [4] * node.layout.channels)) for node in nodes}
    return DropRules(nodes, channel_flows(model)).apply(widths), names


def test_nothing_dropped_changes_nothing() -> None:
    pruned, names = prune(mapped_model(CHAIN), a=[2, 4, 8, 3])
    assert pruned.bits[names["a"]].tolist() == [2, 4, 8, 3]
    assert not pruned.stored


def test_a_dropped_kernel_takes_the_rows_that_it_feeds() -> None:
    pruned, names = prune(mapped_model(CHAIN), a=[2, 0, 4, 2])
    (rows,) = pruned.stored[names["y"]]
    assert np.flatnonzero(~rows).tolist() == list(range(9, 18))
    assert set(pruned.stored) == {names["y"]}


def test_a_depthwise_kernel_without_rows_goes_too() -> None:
    pruned, names = prune(mapped_model(DEPTHWISE), a=[4, 0, 4, 4])
    assert pruned.bits[names["c"]].tolist() == [4, 0, 4, 4]
    assert np.flatnonzero(~pruned.stored[names["y"]][0]).tolist() == [1]
    assert (~pruned.stored[names["c"]]).sum(axis=1).tolist() == [0, 9, 0, 0]


def test_a_kernel_that_only_dropped_ones_read_goes_too() -> None:
    pruned, names = prune(mapped_model(DEPTHWISE), c=[0, 4, 4, 0])
    assert pruned.bits[names["a"]].tolist() == [0, 4, 4, 0]
    assert pruned.row_counts(MAPPED.require(mapped_nodes(mapped_model(DEPTHWISE))[2])).tolist() == [2]  # type: ignore[union-attr]


@settings(deadline=None)
@given(st.sampled_from("abcy"), st.data())
def test_a_node_keeps_its_kernels_where_none_of_a_tied_one_is_dropped(kept: str, data: st.DataObject) -> None:
    model = mapped_model(TWICE)
    nodes = {node.output_name: node for node in (MAPPED.require(node) for node in mapped_nodes(model))}
    tied = DropRules(list(nodes.values()), channel_flows(model)).tied([nodes[kept].name])
    assert tied == ({nodes["y"].name} if kept == "y" else {nodes[name].name for name in "abc"})
    bits = {}
    for output, node in nodes.items():
        width = st.just(4) if node.name in tied else st.sampled_from([0, 4])
        # A node that computes nothing at all is never asked for.
        bits[output] = [4, *(data.draw(width) for _ in range(node.layout.channels - 1))]
    pruned, names = prune(model, **bits)
    assert pruned.bits[names[kept]].all()
    counts = pruned.row_counts(nodes[kept])
    assert counts is None or counts.all()


def test_a_channel_that_is_added_to_another_keeps_its_rows() -> None:
    pruned, names = prune(mapped_model(RESIDUAL), a=[0, 4, 4, 4])
    assert pruned.bits[names["a"]].tolist() == [0, 4, 4, 4]
    assert not pruned.stored


@pytest.mark.parametrize("method", ["nearest", "mse", "gptq", "sequential"])
@pytest.mark.parametrize(
    ("text", "first"), [(CHAIN, [2, 0, 4, 0]), (DEPTHWISE, [4, 0, 0, 2]), (RESIDUAL, [0, 0, 8, 2])]
)
def test_codes_and_biases_of_what_is_not_stored_are_zero(text: str, first: list[int], method: WeightMethod) -> None:
    model = mapped_model(text)
    channels = 4 if text == RESIDUAL else 2
    x = np.random.default_rng(1).normal(size=(64, channels, 6, 6)).astype(np.float32)
    CalibratePass(open_dataset({"x": x}, model_inputs(model)), threads=1)(model)
    quantizer = build_quantizer(model, "offset", QuantizerSettings(method, threads=1))
    names = list(quantizer.sources)
    bits = {name: NodeBits(4, 8) for name in names} | {names[0]: NodeBits(tuple(first), 8)}
    found = quantizer.quantize_model(bits)
    pruned = quantizer.pruned(bits)
    stored_somewhere = False
    for name, item in found.items():
        codes = item.node.layout.to_matrices(item.codes)
        dropped = pruned.bits[name] == 0
        assert not codes[:, :, dropped[item.node.layout.channel_index()][0]].any() or item.node.layout.groups > 1
        assert item.bias is not None
        assert not item.bias[dropped].any()
        if item.stored is not None:
            assert np.array_equal(item.stored, pruned.stored[name])
            assert not codes[~item.stored].any()
            stored_somewhere = True
        assert item.matrix().weight_bits == int((item.matrix().row_counts * item.matrix().bits.sum(axis=1)).sum())
    assert stored_somewhere == (text != RESIDUAL)


def test_what_a_dropped_kernel_gave_on_average_goes_into_the_next_bias() -> None:
    model = mapped_model(CHAIN)
    x = np.abs(np.random.default_rng(1).normal(size=(64, 2, 6, 6))).astype(np.float32)
    CalibratePass(open_dataset({"x": x}, model_inputs(model)), threads=1)(model)
    quantizer = build_quantizer(model, "offset", QuantizerSettings("mse", threads=1))
    first, second = quantizer.sources
    bits = {first: NodeBits((8, 8, 0, 8), 8), second: NodeBits(8, 8)}
    found = quantizer.quantize_model(bits)[second].real_bias()
    moments = quantizer.sources[second].moments
    assert found is not None
    assert moments is not None
    weight = quantizer.sources[second].node.layout.to_matrices(quantizer.sources[second].weight)[0]
    gone = slice(18, 27)
    expected = quantizer.sources[second].bias + weight[gone].T @ moments.mean[0, gone]
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())
