"""Vectors times matrices are what onnxruntime computes, for every form of node that crossbars take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from raqu_onnx.layout import MappedNode
from raqu_onnx.mapping import describe_node
from raqu_onnx.patches import from_output_vectors, input_vectors, output_vectors

SEEDS = st.integers(0, 2**32 - 1)
# A drawn window that leaves no output is thrown away; a busy machine is no reason to fail.
EXAMPLES = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


def integers(seed: int, *shape: int) -> np.ndarray:
    """Small whole numbers: sums of their products are exact in float32 whatever the order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def one_node(op_type: str, x: np.ndarray, w: np.ndarray, *, left: bool = False, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(op_type, ["w", "x"] if left else ["x", "w"], ["y"], name="node", **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def described(model: onnx.ModelProto) -> MappedNode:
    node = describe_node(next(iter(ir.from_proto(model).graph)))
    assert isinstance(node, MappedNode), node
    return node


def runtime(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def products(node: MappedNode, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What the crossbars compute, shape (vectors, G * M)."""
    vectors = input_vectors(node, x)
    matrices = node.layout.to_matrices(w)
    assert vectors.shape[1:] == matrices.shape[:2] == (node.layout.groups, node.layout.rows)
    return np.einsum("pgk,gkm->pgm", vectors, matrices).reshape(len(vectors), -1)


def assert_outputs(node: MappedNode, x: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
    """Vectors times matrices are the output's vectors, for all of them and for some."""
    np.testing.assert_array_equal(from_output_vectors(node, output_vectors(node, y), x.shape), y)
    # What pads is filled like everything else: with one value all over, all vectors hold it.
    assert (input_vectors(node, np.full(x.shape, 7, np.uint8), fill=7) == 7).all()
    matrices = node.layout.to_matrices(w)
    total = len(input_vectors(node, x))
    for limit in (None, 1, 3, total - 1, total, total + 1):
        expected = np.einsum("pgk,gkm->pgm", input_vectors(node, x, limit=limit), matrices)
        assert len(expected) == (total if limit is None else min(max(1, limit), total))
        np.testing.assert_array_equal(output_vectors(node, y, limit=limit), expected)


def assert_convolves(model: onnx.ModelProto, x: np.ndarray, w: np.ndarray, expected: np.ndarray) -> MappedNode:
    node = described(model)
    found = products(node, x, w)
    # (N, channels, positions...) -> one row per sample and position
    rows = np.moveaxis(expected, 1, -1).reshape(-1, expected.shape[1])
    np.testing.assert_array_equal(found, rows)
    assert_outputs(node, x, w, expected)
    return node


@st.composite
def windows(draw: st.DrawFn, *, auto_pads: tuple[str, ...], dilated: bool = True) -> dict[str, Any]:
    """Attributes of a convolution and the sizes of its input, 1 to 3 spatial dimensions."""
    rank = draw(st.integers(1, 3))
    # Three dimensions stay small: what matters is the order of axes, not the volume.
    per_axis = [
        {
            "kernel": draw(st.integers(1, 3)),
            "stride": draw(st.integers(1, 3)),
            "dilation": draw(st.integers(1, 2 if dilated else 1)),
            "size": draw(st.integers(1, 7 if rank < 3 else 4)),
            "before": draw(st.integers(0, 2)),
            "after": draw(st.integers(0, 2)),
        }
        for _ in range(rank)
    ]
    auto_pad = draw(st.sampled_from(auto_pads))
    attributes: dict[str, Any] = {
        "strides": [axis["stride"] for axis in per_axis],
        "dilations": [axis["dilation"] for axis in per_axis],
    }
    if auto_pad != "NOTSET":
        attributes["auto_pad"] = auto_pad
    elif draw(st.booleans()):
        attributes["pads"] = [axis["before"] for axis in per_axis] + [axis["after"] for axis in per_axis]
    if draw(st.booleans()):
        attributes["kernel_shape"] = [axis["kernel"] for axis in per_axis]
    return {
        "attributes": attributes,
        "kernel": [axis["kernel"] for axis in per_axis],
        "sizes": [axis["size"] for axis in per_axis],
    }


SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))  # N, G, C/G, M


def conv_outputs(sizes: list[int], kernel: list[int], attributes: dict[str, Any]) -> list[int]:
    """Output positions per axis of a Conv without auto_pad; none or fewer where the window is larger than the input."""
    rank = len(sizes)
    pads = attributes.get("pads", [0] * (2 * rank))
    return [
        (sizes[i] + pads[i] + pads[rank + i] - (kernel[i] - 1) * attributes["dilations"][i] - 1)
        // attributes["strides"][i]
        + 1
        for i in range(rank)
    ]


@EXAMPLES
@given(window=windows(auto_pads=("NOTSET", "NOTSET", "VALID")), shapes=SHAPES, seed=SEEDS)
def test_conv(window: dict[str, Any], shapes: tuple[int, ...], seed: int) -> None:
    samples, groups, channels, kernels = shapes
    attributes = window["attributes"]
    assume(min(conv_outputs(window["sizes"], window["kernel"], attributes)) > 0)
    x = integers(seed, samples, groups * channels, *window["sizes"])
    w = integers(seed + 1, groups * kernels, channels, *window["kernel"])
    model = one_node("Conv", x, w, group=groups, **attributes)
    expected = runtime(model, x)
    node = assert_convolves(model, x, w, expected)
    assert node.mvms == math.prod(expected.shape[2:])


@EXAMPLES
@given(window=windows(auto_pads=("SAME_UPPER", "SAME_LOWER"), dilated=False), shapes=SHAPES, seed=SEEDS)
def test_conv_that_keeps_the_size(window: dict[str, Any], shapes: tuple[int, ...], seed: int) -> None:
    samples, groups, channels, kernels = shapes
    x = integers(seed, samples, groups * channels, *window["sizes"])
    w = integers(seed + 1, groups * kernels, channels, *window["kernel"])
    model = one_node("Conv", x, w, group=groups, **window["attributes"])
    expected = runtime(model, x)
    node = assert_convolves(model, x, w, expected)
    assert node.mvms == math.prod(expected.shape[2:])


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize(("size", "stride"), [(7, 1), (8, 1), (8, 2), (9, 3), (2, 1)])
def test_conv_that_keeps_the_size_with_dilation(auto_pad: str, size: int, stride: int) -> None:
    """onnxruntime refuses this form, which ONNX allows."""
    x, w = integers(size, 2, 2, size, 5), integers(stride, 3, 2, 2, 3)
    model = one_node("Conv", x, w, auto_pad=auto_pad, dilations=[2, 2], strides=[stride, stride])
    assert_convolves(model, x, w, ReferenceEvaluator(model).run(None, {"x": x})[0])


@EXAMPLES
@given(window=windows(auto_pads=("NOTSET", "NOTSET", "VALID")), shapes=SHAPES, seed=SEEDS, data=st.data())
def test_conv_transpose(window: dict[str, Any], shapes: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    samples, groups, channels, kernels = shapes
    attributes = window["attributes"]
    if data.draw(st.booleans(), label="output_padding"):
        # onnxruntime wants it below the stride.
        attributes["output_padding"] = [data.draw(st.integers(0, stride - 1)) for stride in attributes["strides"]]
    assume(min(transposed_outputs(window)) > 0)
    x = integers(seed, samples, groups * channels, *window["sizes"])
    w = integers(seed + 1, groups * channels, kernels, *window["kernel"])
    model = one_node("ConvTranspose", x, w, group=groups, **attributes)
    expected = runtime(model, x)
    node = assert_convolves(model, x, w, expected)
    assert node.mvms == math.prod(expected.shape[2:])


def transposed_outputs(window: dict[str, Any]) -> list[int]:
    """Output positions per axis of a ConvTranspose without `output_shape`."""
    attributes, rank = window["attributes"], len(window["sizes"])
    pads = attributes.get("pads", [0] * (2 * rank))
    extra = attributes.get("output_padding", [0] * rank)
    return [
        attributes["strides"][i] * (window["sizes"][i] - 1)
        + extra[i]
        + (window["kernel"][i] - 1) * attributes["dilations"][i]
        + 1
        - pads[i]
        - pads[rank + i]
        for i in range(rank)
    ]


@EXAMPLES
@given(window=windows(auto_pads=("SAME_UPPER", "SAME_LOWER")), shapes=SHAPES, seed=SEEDS)
def test_conv_transpose_that_multiplies_the_size(window: dict[str, Any], shapes: tuple[int, ...], seed: int) -> None:
    samples, groups, channels, kernels = shapes
    x = integers(seed, samples, groups * channels, *window["sizes"])
    w = integers(seed + 1, groups * channels, kernels, *window["kernel"])
    model = one_node("ConvTranspose", x, w, group=groups, **window["attributes"])
    expected = runtime(model, x)
    node = assert_convolves(model, x, w, expected)
    assert node.mvms == math.prod(expected.shape[2:])


@EXAMPLES
@given(
    window=windows(auto_pads=("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")),
    shapes=SHAPES,
    seed=SEEDS,
    data=st.data(),
)
def test_conv_transpose_with_an_output_shape(
    window: dict[str, Any], shapes: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    samples, groups, channels, kernels = shapes
    attributes = window["attributes"]
    attributes.pop("pads", None)
    natural = transposed_outputs(window)
    # onnxruntime takes up to a stride less one more than the natural size.
    attributes["output_shape"] = [
        data.draw(st.integers(max(1, size - 3), size + stride - 1))
        for size, stride in zip(natural, attributes["strides"], strict=True)
    ]
    x = integers(seed, samples, groups * channels, *window["sizes"])
    w = integers(seed + 1, groups * channels, kernels, *window["kernel"])
    model = one_node("ConvTranspose", x, w, group=groups, **attributes)
    expected = runtime(model, x)
    assert list(expected.shape[2:]) == attributes["output_shape"]
    node = assert_convolves(model, x, w, expected)
    assert node.mvms == math.prod(expected.shape[2:])


@EXAMPLES
@given(
    rows=st.integers(1, 5),
    features=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    transposed=st.tuples(st.booleans(), st.booleans()),
    seed=SEEDS,
)
def test_gemm(rows: int, features: tuple[int, int], transposed: tuple[bool, bool], seed: int) -> None:
    x = integers(seed, *((features[0], rows) if transposed[0] else (rows, features[0])))
    w = integers(seed + 1, *(reversed(features) if transposed[1] else features))
    model = one_node("Gemm", x, w, transA=int(transposed[0]), transB=int(transposed[1]))
    node = described(model)
    expected = runtime(model, x)
    np.testing.assert_array_equal(products(node, x, w), expected)
    assert_outputs(node, x, w, expected)
    assert node.mvms == 1


@EXAMPLES
@given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    rows=st.integers(1, 4),
    features=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=SEEDS,
)
def test_matmul(batch: list[int], rows: int, features: tuple[int, int], seed: int) -> None:
    x, w = integers(seed, *batch, rows, features[0]), integers(seed + 1, *features)
    model = one_node("MatMul", x, w)
    node = described(model)
    expected = runtime(model, x)
    np.testing.assert_array_equal(products(node, x, w), expected.reshape(-1, features[1]))
    assert_outputs(node, x, w, expected)
    # The first dimension holds the samples.
    assert node.mvms == math.prod([*batch, rows][1:])


@EXAMPLES
@given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    columns=st.integers(1, 4),
    features=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=SEEDS,
)
def test_matmul_with_the_constant_on_the_left(
    batch: list[int], columns: int, features: tuple[int, int], seed: int
) -> None:
    x, w = integers(seed, *batch, features[0], columns), integers(seed + 1, features[1], features[0])
    model = one_node("MatMul", x, w, left=True)
    node = described(model)
    y = runtime(model, x)
    expected = np.moveaxis(y, -2, -1).reshape(-1, features[1])
    np.testing.assert_array_equal(products(node, x, w), expected)
    assert_outputs(node, x, w, y)
    assert node.mvms == math.prod([*batch, columns][1:] if batch else [columns])


@pytest.mark.parametrize("limit", [1, 2, 7, 31, 32, 33])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose", "MatMul"])
def test_a_limit_keeps_that_many_of_the_vectors(op_type: str, limit: int) -> None:
    if op_type == "MatMul":
        x, w = integers(1, 2, 16, 3), integers(2, 3, 5)
    else:
        x, w = integers(1, 2, 3, 4, 4), integers(2, 3, 3, 1, 1)
    node = described(one_node(op_type, x, w))
    vectors, kept = input_vectors(node, x), input_vectors(node, x, limit=limit)
    assert len(vectors) == 32
    assert len(kept) == min(limit, 32)
    # Evenly spread: the first always, and the last where there are two.
    np.testing.assert_array_equal(kept[0], vectors[0])
    if limit > 1:
        np.testing.assert_array_equal(kept[-1], vectors[-1])
    everything = {vector.tobytes() for vector in vectors}
    assert all(vector.tobytes() in everything for vector in kept)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.int64])
def test_the_type_of_the_input_stays(dtype: type[np.generic]) -> None:
    x, w = integers(1, 1, 2, 4, 4), integers(2, 2, 3, 3, 3)
    node = described(one_node("ConvTranspose", x, w, strides=[2, 2]))
    assert input_vectors(node, x.astype(dtype)).dtype == dtype
