"""Fitting node after node: what is kept exactly, what it gains, and what must not break it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from tensors import normal

from raqu_onnx import OptimizeConfig, optimize, sequential
from raqu_onnx.annotations import BITS, MAPPED, QUANTIZED, NodeBits, mapped_nodes
from raqu_onnx.bundled import bundled_arrays, bundled_model
from raqu_onnx.data import Dataset, open_dataset
from raqu_onnx.evaluation import Score, collect, make_session, score
from raqu_onnx.model_io import load_model, model_inputs, to_proto
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.insert_qdq import InsertQDQPass
from raqu_onnx.passes.quantize_weights import QuantizeWeightsPass, build_quantizer
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.quantizer import QuantizerSettings
from raqu_onnx.segments import NodeRunner, Step
from raqu_onnx.sequential import SequentialQuantizer
from raqu_onnx.simulation import Simulator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raqu_onnx.quantized import QuantizedNode

HEADER = '<ir_version: 10, opset_import: ["": 18]>'


def loaded(text: str, weights: Mapping[str, Sequence[int] | np.ndarray]) -> ir.Model:
    """A tidied model; weights are given as arrays, or by shapes for the size that keeps the signal's power."""
    proto = onnx.parser.parse_model(f"{HEADER} {text}")
    for seed, (name, given) in enumerate(weights.items()):
        if isinstance(given, np.ndarray):
            array = given
        else:
            array = normal(*given, seed=50 + seed) * np.float32(np.sqrt(2 / max(1, np.prod(given[1:]))))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return prepared(proto)


def prepared(proto: onnx.ModelProto) -> ir.Model:
    model: ir.Model = TidyPass()(load_model(proto)).model
    AnnotateTilingPass()(model)
    return model


class Case:
    """A calibrated model with its per-node and its sequential quantizer."""

    def __init__(self, model: ir.Model, feeds: Mapping[str, np.ndarray], **options: Any) -> None:
        self.model = model
        self.data: Dataset = open_dataset(feeds, model_inputs(model))
        CalibratePass(self.data, threads=1)(model)
        self.quantizer = build_quantizer(model, "offset", QuantizerSettings("gptq", threads=1))
        self.names = list(self.quantizer.sources)
        self.sequential = SequentialQuantizer(model, self.quantizer, self.data, threads=1, **options)

    def bits(self, weight: int | tuple[int, ...], activation: int | None = 8) -> dict[str, NodeBits]:
        return dict.fromkeys(self.names, NodeBits(weight, activation))

    def one_by_one(self, bits: Mapping[str, NodeBits]) -> dict[str, QuantizedNode]:
        return {name: self.quantizer.quantize(name, bits[name]) for name in self.names}

    def score(self, quantized: Mapping[str, QuantizedNode], data: Dataset | None = None) -> Score:
        data = data or self.data
        reference = collect(make_session(to_proto(self.model).SerializeToString(), threads=1), data)
        nodes = [source.node for source in self.quantizer.sources.values()]
        first = next(iter(quantized.values()))
        simulator = Simulator(self.model, nodes, threads=1, float_activations=first.activation is None)
        return score(simulator.run(quantized, data.batches(64)), reference)


def assert_equal(one: Mapping[str, QuantizedNode], other: Mapping[str, QuantizedNode]) -> None:
    assert list(one) == list(other)
    for a, b in zip(one.values(), other.values(), strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.scales, b.scales)
        for left, right in ((a.bias, b.bias), (a.float_bias, b.float_bias)):
            assert (left is None) == (right is None)
            if left is not None:
                np.testing.assert_array_equal(left, right)
        assert a.activation == b.activation


def assert_sound(quantized: Mapping[str, QuantizedNode]) -> None:
    for name, node in quantized.items():
        assert np.isfinite(node.weight()).all(), name
        assert (node.scales > 0).all(), name
        bias = node.real_bias()
        assert bias is None or np.isfinite(bias).all(), name


def outputs(proto: onnx.ModelProto, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values of a graph by name."""
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = make_session(proto.SerializeToString(), level="disable-all", threads=1)
    return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))


# Grouped and depthwise convolutions, a residual sum, ConvTranspose whose groups share scales, Gemm and MatMul with the
# constant on either side.
EVERYTHING = """g (float[n, 3, 8, 8] x) => (float[n, 5] logits, float[n, 3, 64] side)
< int64[2] flat = {0, -1}, int64[3] rows = {0, 6, 64} >
{ a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = Relu (a)
  b = Conv <pads = [1, 1, 1, 1], group = 2> (r, w2)  s1 = Add (b, r)  s = Relu (s1)
  c = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = 6> (s, w3, b3)  t = Relu (c)
  d = ConvTranspose <strides = [2, 2], group = 3> (t, w4, b4)  u = Relu (d)
  m = Reshape (u, rows)  side = MatMul (w5, m)
  p = GlobalAveragePool (u)  f = Reshape (p, flat)  h = Gemm <transB = 1> (f, w6, b6)  i = Relu (h)
  logits = MatMul (i, w7) }"""
EVERYTHING_WEIGHTS = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 3, 3, 3), "w3": (6, 1, 3, 3), "b3": (6,)} | {
    "w4": (6, 2, 2, 2), "b4": (6,), "w5": (3, 6), "w6": (16, 6), "b6": (16,), "w7": (16, 5)
}  # fmt: skip


def everything(**options: Any) -> Case:
    return Case(loaded(EVERYTHING, EVERYTHING_WEIGHTS), {"x": normal(40, 3, 8, 8)}, **options)


@pytest.fixture(scope="module")
def shared() -> Case:
    """For tests that change nothing."""
    return everything()


def images(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy pictures of ten smooth patterns, and which one each shows."""
    patterns = np.repeat(np.repeat(normal(10, 3, 3, 3, seed=0), 3, 2), 3, 3)
    labels = np.random.default_rng(seed).integers(0, 10, samples)
    return np.maximum(patterns[labels] + 0.5 * normal(samples, 3, 9, 9, seed=seed), 0), labels


def classifier(layers: int = 4, width: int = 16, samples: int = 192) -> Case:
    """Convolutions in a row, where errors add up, and a last layer that is fitted to tell the patterns apart."""
    steps = "".join(
        f"c{i} = Conv <pads = [1, 1, 1, 1]> (r{i}, w{i}, b{i}) r{i + 1} = Relu (c{i}) " for i in range(layers)
    )
    text = f"""g (float[n, 3, 9, 9] r0) => (float[n, 10] y)
        {{ {steps} p = MaxPool <kernel_shape = [3, 3], strides = [3, 3]> (r{layers})
           f = Flatten (p) y = Gemm (f, w, b) }}"""
    weights: dict[str, Any] = {"w": np.zeros((width * 9, 10)), "b": (10,)}
    for i in range(layers):
        weights |= {f"w{i}": (width, width if i else 3, 3, 3), f"b{i}": (width,)}
    x, labels = images(512, 1)
    features = outputs(to_proto(loaded(text, weights)), ["f"], {"r0": x})["f"]
    second = features.T @ features
    second += 0.01 * np.trace(second) / len(second) * np.eye(len(second))
    weights["w"] = 8 * np.linalg.solve(second, features.T @ np.eye(10)[labels])
    return Case(loaded(text, weights), {"r0": images(samples, 2)[0]})


# --------------------------------------------------------------------------------------------------------- the same


def test_the_same_data_gives_the_same_bytes_whatever_was_quantized_before(shared: Case) -> None:
    first = shared.sequential.quantize(shared.bits(3))
    shared.sequential.quantize(shared.bits(5, 4))
    assert_equal(first, shared.sequential.quantize(shared.bits(3)))
    assert_equal(first, everything().sequential.quantize(shared.bits(3)))
    assert_sound(first)


def test_a_first_node_whose_input_stays_float_is_fitted_to_its_own_weight(shared: Case) -> None:
    first = shared.names[0]
    bits = shared.bits(4, None)
    np.testing.assert_array_equal(
        shared.sequential.quantize(bits)[first].codes, shared.quantizer.quantize(first, bits[first]).codes
    )
    # Further on inputs differ, and so do the codes.
    apart = shared.quantizer.quantize(shared.names[1], bits[shared.names[1]])
    assert (shared.sequential.quantize(bits)[shared.names[1]].codes != apart.codes).any()


def test_eight_bits_are_almost_float(shared: Case) -> None:
    found = shared.score(shared.sequential.quantize(shared.bits(8, 8)))
    assert found.sqnr_db is not None
    assert found.sqnr_db > 33
    assert found.kl is not None
    assert found.kl < 1e-3
    weights_only = shared.score(shared.sequential.quantize(shared.bits(8, None)))
    assert weights_only.sqnr_db is not None
    assert weights_only.sqnr_db > 38


def test_nodes_without_room_for_a_bias_get_none(shared: Case) -> None:
    for node in shared.sequential.quantize(shared.bits(2)).values():
        assert (node.real_bias() is None) == (node.node.op_type == "MatMul")
        assert node.codes.shape == node.node.layout.shape
        assert node.scales.shape == (node.node.layout.channels,)


def test_the_mean_output_of_every_node_with_a_bias_stays() -> None:
    case = everything()
    for node in mapped_nodes(case.model):
        BITS.set(node, NodeBits(2, 6))
    # Of the node whose output is only added to a value, it is the sum whose mean stays.
    names = [{"b": "s1"}.get(name, name) for name in (MAPPED.require(n).output_name for n in mapped_nodes(case.model))]
    assert "s1" in names
    before = to_proto(case.model)
    case.quantizer.fit_sequentially(case.model, case.data)
    emitted = QuantizeWeightsPass(threads=1)(case.model).model
    quantized = [QUANTIZED.require(node) for node in mapped_nodes(emitted)]
    emitted = InsertQDQPass()(emitted).model
    expected, found = (outputs(proto, names, {"x": normal(40, 3, 8, 8)}) for proto in (before, to_proto(emitted)))
    for name, node in zip(names, quantized, strict=True):
        if node.bias is None:
            continue
        axes = tuple(i for i in range(expected[name].ndim) if i != 1)
        varies = np.abs(expected[name] - expected[name].mean(axes, keepdims=True)).mean()
        assert np.abs(found[name] - expected[name]).mean() > 0.05 * varies, "the outputs themselves do not stay"
        difference = np.abs(found[name].mean(axes) - expected[name].mean(axes))
        # The bias itself is rounded to its step.
        assert (difference <= 0.5 * node.bias_scales() + 1e-4 * np.abs(expected[name]).max()).all(), name


# ------------------------------------------------------------------------------------------------------- what it gains


@pytest.mark.parametrize("bits", [2, 3])
def test_low_widths_lose_less_than_node_by_node(bits: int) -> None:
    case = classifier()
    x, labels = images(256, 3)
    unseen = open_dataset({"r0": x, "labels": labels}, model_inputs(case.model))
    reference = collect(make_session(to_proto(case.model).SerializeToString(), threads=1), unseen)
    assert (score(reference).top1 or 0) > 0.9
    alone = case.score(case.one_by_one(case.bits(bits)), unseen)
    together = case.score(case.sequential.quantize(case.bits(bits)), unseen)
    assert together.kl is not None
    assert alone.kl is not None
    assert together.kl < 0.7 * alone.kl
    assert (together.top1 or 0) >= (alone.top1 or 0)


def test_dropped_kernels_are_made_up_for() -> None:
    case = classifier(layers=3)
    bits = case.bits(8)
    bits[case.names[0]] = NodeBits((0,) * 3 + (8,) * 13, 8)
    found = case.sequential.quantize(bits)
    assert not found[case.names[0]].codes[:3].any()
    assert not found[case.names[0]].bias[:3].any()  # type: ignore[index]
    alone, together = (case.score(quantized).kl for quantized in (case.one_by_one(bits), found))
    assert alone is not None
    assert together is not None
    assert together < 0.5 * alone


def test_a_node_without_a_bias_makes_up_for_the_mean_error_with_its_weights() -> None:
    model = loaded(
        "g (float[n, 12] x) => (float[n, 6] y) { a = MatMul (x, w1)  y = MatMul (a, w2) }",
        {"w1": normal(12, 20), "w2": normal(20, 6)},
    )
    x = 5 * normal(1, 12, seed=5) + 0.2 * normal(200, 12)
    case = Case(model, {"x": x})
    bits = {case.names[0]: NodeBits(2, None), case.names[1]: NodeBits(8, None)}
    w1, w2 = (case.quantizer.sources[name].weight for name in case.names)

    def mean_error(quantized: Mapping[str, QuantizedNode]) -> float:
        first, second = (quantized[name].weight() for name in case.names)
        return float(np.abs((x @ first @ second - x @ w1 @ w2).mean(0)).max())

    assert mean_error(case.sequential.quantize(bits)) < 0.1 * mean_error(case.one_by_one(bits))


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
def test_bundled_nets_lose_less_than_node_by_node(name: str) -> None:
    proto = onnx.ModelProto.FromString(bundled_model(name))
    case = Case(prepared(proto), {"input": bundled_arrays("calibration")["input"][:32]})
    test = bundled_arrays("test")
    unseen = open_dataset({"input": test["input"][:192], "labels": test["labels"][:192]}, model_inputs(case.model))
    bits = case.bits(2)
    for end in (case.names[0], case.names[-1]):
        bits[end] = NodeBits(8, 8)
    alone = case.score(case.one_by_one(bits), unseen)
    together = case.score(case.sequential.quantize(bits), unseen)
    assert together.kl is not None
    assert alone.kl is not None
    assert together.top1 is not None
    assert together.kl < 0.4 * alone.kl
    assert together.top1 > 0.82


# ---------------------------------------------------------------------------------------------------- memory and size


def test_a_node_with_too_many_rows_is_fitted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    case = everything()
    bits = case.bits(3)
    rows = {name: source.node.layout.rows for name, source in case.quantizer.sources.items()}
    monkeypatch.setattr(sequential, "FULL_LIMIT", 0)
    assert_equal(case.sequential.quantize(bits), case.one_by_one(bits))
    monkeypatch.setattr(sequential, "FULL_LIMIT", 15)
    found = case.sequential.quantize(bits)
    for name in case.names:
        same = (found[name].codes == case.quantizer.quantize(name, bits[name]).codes).all()
        assert same or rows[name] <= 15, name
    assert any(
        rows[name] <= 15 and (found[name].codes != case.quantizer.quantize(name, bits[name]).codes).any()
        for name in case.names
    )


def test_too_little_memory_to_keep_float_inputs_changes_nothing(shared: Case) -> None:
    expected = shared.sequential.quantize(shared.bits(3))
    assert shared.sequential._kept is not None
    for quarter in range(96, 56, -1):
        tight = everything(memory_bytes=round(2 ** (quarter / 4)))
        if tight.sequential._kept is None:
            break
    assert tight.sequential._kept is None
    assert sum(len(batch) for batch in tight.sequential._feeds["x"]) == 40
    assert_equal(expected, tight.sequential.quantize(shared.bits(3)))
    assert_equal(expected, tight.sequential.quantize(shared.bits(3)))


def test_less_memory_means_fewer_samples_but_never_too_few() -> None:
    tight = everything(memory_bytes=1)
    assert sum(len(batch) for batch in tight.sequential._feeds["x"]) == 8
    few = everything(samples=8)
    assert few.sequential._kept is not None
    assert_equal(tight.sequential.quantize(tight.bits(4)), few.sequential.quantize(few.bits(4)))


def test_nothing_is_held_longer_than_a_later_step_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = everything()
    prepare = NodeRunner.prepare
    held = []

    def spy(self: NodeRunner, step: Step, values: Mapping[str, Any], batches: int) -> Any:
        later = self.steps[self.steps.index(step) :]
        held.append(set(values) - {name for item in later for name in (*item.needs, *item.partner_needs)})
        return prepare(self, step, values, batches)

    monkeypatch.setattr(NodeRunner, "prepare", spy)
    case.sequential.quantize(case.bits(4))
    assert held == [set()] * len(case.names)


def test_a_small_last_batch_weighs_no_more_than_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "_FEWEST_VECTORS", 66)
    monkeypatch.setattr(sequential, "_VECTORS_PER_ROW", 0)
    x = np.abs(normal(33, 2, 6, 6))
    x[-1] += 10
    model = loaded(
        "g (float[n, 2, 6, 6] x) => (float[n, 4, 6, 6] y) { y = Conv (x, w, b) }", {"w": (4, 2, 1, 1), "b": (4,)}
    )
    case = Case(model, {"x": x})
    # At two bits the error of the mean is large unless the bias is measured on a fair choice of vectors.
    quantized = case.sequential.quantize(case.bits(2))[case.names[0]]
    source = case.quantizer.sources[case.names[0]]
    assert quantized.activation is not None
    arriving = quantized.activation.fake_quantize(x).mean((0, 2, 3))
    found = quantized.weight().reshape(4, 2) @ arriving + quantized.real_bias()
    expected = source.weight.reshape(4, 2) @ x.mean((0, 2, 3)) + source.bias
    np.testing.assert_allclose(found, expected, atol=0.1)


# ------------------------------------------------------------------------------------------------------ hard inputs


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_fewer_vectors_than_rows(samples: int) -> None:
    model = loaded(
        """g (float[n, 200] x) => (float[n, 10] y)
        { a = Gemm (x, w1, b1)  r = Relu (a)  b = MatMul (r, w2)  s = Relu (b)  y = Gemm <transB = 1> (s, w3) }""",
        {"w1": normal(200, 60) / 14, "b1": (60,), "w2": normal(60, 80) / 8, "w3": normal(10, 80) / 9},
    )
    case = Case(model, {"x": normal(samples, 200)})
    for bits in (2, 8):
        assert_sound(case.sequential.quantize(case.bits(bits)))
    # Weights stay near the float ones where the data says nothing of them: unseen data is not destroyed.
    unseen = open_dataset({"x": normal(64, 200, seed=9)}, model_inputs(model))
    found = case.score(case.sequential.quantize(case.bits(8, None)), unseen)
    alone = case.score(case.one_by_one(case.bits(8, None)), unseen)
    assert found.sqnr_db is not None
    assert alone.sqnr_db is not None
    assert found.sqnr_db > max(30, alone.sqnr_db - 1)


def test_inputs_that_are_always_zero() -> None:
    model = loaded(
        """g (float[n, 4, 6, 6] x) => (float[n, 3] y)
        { a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = Relu (a)  b = Conv (r, w2, b2)  e = Exp (b)
          z = Sub (b, e)  k = Relu (z)  c = Conv (k, w3, b3)  p = GlobalAveragePool (c)  f = Flatten (p)
          y = Gemm (f, w4) }""",
        {"w1": (6, 4, 3, 3), "b1": np.array([-1e4, 0, -1e4, 0, 0, 0]), "w2": (5, 6, 3, 3), "b2": (5,)}
        | {"w3": (4, 5, 1, 1), "b3": np.array([1.0, -2.0, 0.5, 3.0]), "w4": normal(4, 3)},
    )
    x = normal(16, 4, 6, 6)
    x[:, 1] = 0
    case = Case(model, {"x": x})
    # b - exp(b) is never positive: all inputs of the third convolution are 0.
    for bits in (2, 8):
        found = case.sequential.quantize(case.bits(bits))
        assert_sound(found)
        dead = found[case.names[2]]
        error = np.abs(dead.real_bias() - np.float32([1.0, -2.0, 0.5, 3.0]))
        assert (error <= 0.5 * dead.bias_scales() + 1e-6).all()
        assert dead.codes.any()
    assert case.score(found).loss < 1e-3


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e25])
def test_inputs_of_any_size(size: float) -> None:
    model = loaded(
        "g (float[n, 6] x) => (float[n, 4] y) { a = Gemm (x, w1)  r = Relu (a)  y = Gemm (r, w2) }",
        {"w1": normal(6, 8), "w2": normal(8, 4)},
    )
    case = Case(model, {"x": normal(50, 6) * np.float32(size)})
    with np.errstate(over="ignore", invalid="ignore"):
        found = case.sequential.quantize(case.bits(8))
    assert_sound(found)
    x = normal(50, 6) * np.float32(size)
    one, two = (found[name] for name in case.names)
    w1, w2 = (case.quantizer.sources[name].weight for name in case.names)
    expected = np.maximum(x @ w1, 0) @ w2
    y = np.maximum(x @ one.weight() + one.real_bias(), 0) @ two.weight() + two.real_bias()
    assert np.abs(y - expected).max() < 0.1 * np.abs(expected).max()


def test_a_node_whose_input_is_constant_and_one_that_nobody_reads() -> None:
    model = loaded(
        """g (float[n, 4] x) => (float[n, 3] y, float[n, 3] alone)
        { a = MatMul (x, w1)  s = Max (a, kept)  b = Gemm (s, w2, b2)  t = Mul (a, b)  y = MatMul (t, w3)
          alone = Gemm (x, w4, b4) }""",
        {"w1": (4, 4), "kept": normal(1, 4), "w2": (4, 4), "b2": (4,), "w3": (4, 3), "w4": (4, 3), "b4": (3,)},
    )
    most = next(node for node in model.graph if node.op_type == "Max")
    most.replace_input_with(0, model.graph.initializers["kept"])
    for value in model.graph.outputs:
        value.shape = None
    case = Case(model, {"x": normal(5, 4)})
    for weight, activation in ((2, 8), (8, 8), (3, None)):
        found = case.sequential.quantize(case.bits(weight, activation))
        assert_sound(found)
    assert case.score(case.sequential.quantize(case.bits(8))).sqnr_db > 30  # type: ignore[operator]


def test_integer_inputs() -> None:
    model = loaded(
        """g (int64[n, 5] tokens) => (float[n, 3] y)
        { e = Gather (table, tokens)  a = MatMul (e, w1)  r = Relu (a)  p = ReduceMean <keepdims = 0> (r, axis)
          y = Gemm (p, w2, b2) }""".replace("{ e", "< int64[1] axis = {1} > { e"),
        {"table": normal(9, 8), "w1": (8, 12), "w2": normal(12, 3), "b2": (3,)},
    )
    case = Case(model, {"tokens": np.random.default_rng(0).integers(0, 9, (70, 5))})
    assert case.score(case.sequential.quantize(case.bits(8))).sqnr_db > 30  # type: ignore[operator]


def test_a_model_with_a_fixed_batch() -> None:
    text = "{ a = Conv (x, w1, b1)  r = Relu (a)  p = GlobalAveragePool (r)  f = Flatten (p)  y = Gemm (f, w2, b2) }"
    weights = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": normal(6, 4), "b2": (4,)}
    x = {"x": normal(12, 3, 6, 6)}
    free = Case(loaded(f"g (float[n, 3, 6, 6] x) => (float[n, 4] y) {text}", weights), x)
    for batch in (1, 4):
        fixed = Case(loaded(f"g (float[{batch}, 3, 6, 6] x) => (float[{batch}, 4] y) {text}", weights), x, samples=12)
        assert sum(len(part) for part in fixed.sequential._feeds["x"]) == 12
        found, expected = fixed.sequential.quantize(fixed.bits(4)), free.sequential.quantize(free.bits(4))
        for name in free.names:
            close = np.abs(found[name].codes.astype(int) - expected[name].codes) <= 1
            assert close.mean() > 0.98


# ------------------------------------------------------------------------------------------------------- the emitted


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("activation", [(8, 8), (3, 8), None])
def test_the_search_judges_what_is_emitted(activation: tuple[int, int] | None) -> None:
    config = OptimizeConfig(
        weight_bits=(2, 8), activation_bits=activation, evaluations=3, max_crossbars=3, max_accuracy_drop=5.0, threads=1
    )
    data = {"calibration": "calibration.npz", "selection": "selection.npz", "evaluation": "selection.npz"}
    result = optimize("model.onnx", "out", **data, chip="chip.toml", config=config)
    assert result.search is not None
    chosen = result.search.chosen
    assert min(chosen.bits.weights) < 5
    selection = open_dataset("selection.npz", model_inputs(load_model("model.onnx")))
    reference = collect(make_session("model.onnx", threads=1), selection)
    found = score(collect(make_session("out/model.onnx", level="disable-all", threads=1), selection), reference)
    assert found.kl is not None
    assert found.kl > 1e-4
    report = json.loads(Path("out/report.json").read_text())
    ours = next(row for row in report["figures"] if row["label"] == "ours")
    for judged in (vars(chosen.score), ours["selection"], report["levels"]["disable-all"]):
        assert (judged["top1"], judged["agreement"]) == (found.top1, found.agreement)
        assert judged["kl"] == pytest.approx(found.kl, rel=1e-3)
        assert judged["sqnr_db"] == pytest.approx(found.sqnr_db, abs=1e-2)
    assert [row["weight"] for row in report["bits"].values()] == list(chosen.bits.weights)
