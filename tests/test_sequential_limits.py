"""Fitting node after node within memory, and on inputs that are hard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from sequential_cases import (
    Case,
    assert_equal,
    assert_sound,
    everything,
    loaded,
)
from tensors import normal

from raqu_onnx import sequential
from raqu_onnx.data import open_dataset
from raqu_onnx.model_io import model_inputs
from raqu_onnx.segments import NodeRunner, Step

if TYPE_CHECKING:
    from collections.abc import Mapping


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
