"""A float graph run step by step equals the graph run at once, and keeps nothing longer than it is needed."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from segment_models import check, mapped_model, pictures, runner_of
from tensors import normal

from raqu_onnx import segments
from raqu_onnx.evaluation import make_session
from raqu_onnx.segments import NodeRunner

if TYPE_CHECKING:
    pass


def needs(runner: NodeRunner) -> dict[str, set[str]]:
    return {step.node.output_name: set(step.needs) for step in runner.steps}


def test_a_residual_sum_and_a_skip_over_the_whole_net() -> None:
    model = mapped_model(
        """g (float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] y)
        { a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = Relu (a)
          b = Conv <pads = [1, 1, 1, 1]> (r, w2, b2)  s = Add (b, r)  t = Relu (s)
          c = Conv (t, w3, b3)  u = Add (c, s)  v = Concat <axis = 1> (u, x)
          y = Conv (v, w4) }""",
        {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 4, 3, 3), "b2": (4,), "w3": (4, 4, 1, 1), "b3": (4,)}
        | {"w4": (4, 7, 1, 1)},
    )
    runner = check(model, pictures((3, 3, 6, 6), (2, 3, 6, 6)))
    # What lies between is computed anew from the nearest known values: r, an input, is not computed from a again.
    assert needs(runner) == {"a": {"x"}, "b": {"a"}, "c": {"b", "r"}, "y": {"c", "b", "r", "x"}}
    spent = {step.node.output_name: set(step.spent) for step in runner.steps}
    assert spent["b"] == {"a"}
    assert "x" in spent["y"]


def test_nodes_that_share_an_input_that_one_alone_also_reads_later() -> None:
    model = mapped_model(
        """g (float[n, 4] x) => (float[n, 3] y)
        { r = Relu (x)  a = MatMul (r, w1)  b = Gemm (r, w2, b2)  s = Add (a, b)  c = MatMul (s, w3)
          t = Sigmoid (r)  u = Add (c, t)  y = Gemm <transB = 1> (u, w4) }""",
        {"w1": (4, 4), "w2": (4, 4), "b2": (4,), "w3": (4, 4), "w4": (3, 4)},
    )
    runner = check(model, pictures((5, 4)))
    assert needs(runner) == {"a": {"x"}, "b": {"r"}, "c": {"a", "b"}, "y": {"c", "r"}}


def test_graph_inputs_that_feed_nodes_directly_and_one_that_feeds_none() -> None:
    model = mapped_model(
        """g (float[n, 4] x, float[n, 4] z, float[n, 4] idle) => (float[n, 3] y, float[n, 4] other)
        { a = MatMul (x, w1)  b = MatMul (z, w2)  s = Mul (a, b)  y = MatMul (s, w3)  other = Relu (idle) }""",
        {"w1": (4, 5), "w2": (4, 5), "w3": (5, 3)},
    )
    feeds = [{name: normal(n, 4, seed=n + i, size=0.5) for i, name in enumerate(("x", "z", "idle"))} for n in (3, 1)]
    runner = check(model, feeds)
    assert "idle" in runner.steps[0].spent


def test_integer_and_boolean_inputs() -> None:
    model = mapped_model(
        """g (int64[n, 5] tokens, bool[n, 5] mask) => (float[n, 5, 3] y)
        < int64[1] last = {-1}, float zero = {0.0} >
        { e = Gather (table, tokens)  m = Unsqueeze (mask, last)  f = Where (m, e, zero)
          a = MatMul (f, w1)  r = Relu (a)  k = Cast <to = 1> (m)  s = Mul (r, k)  y = MatMul (s, w2) }""",
        {"table": (7, 4), "w1": (4, 6), "w2": (6, 3)},
    )
    rng = np.random.default_rng(0)
    feeds = [{"tokens": rng.integers(0, 7, (n, 5)), "mask": rng.random((n, 5)) < 0.7} for n in (4, 2)]
    assert needs(check(model, feeds)) == {"a": {"tokens", "mask"}, "y": {"a", "mask"}}


@pytest.mark.parametrize(
    ("text", "weights", "shape"),
    [
        ("(float[n, 4, 5] x) => (float[n, 3, 5] y) { r = Relu (x) y = MatMul (w, r) }", {"w": (3, 4)}, (2, 4, 5)),
        ("(float[n, 4, 5] x) => (float[n, 4, 3] y) { r = Relu (x) y = MatMul (r, w) }", {"w": (5, 3)}, (2, 4, 5)),
        ("(float[n, 4] x) => (float[n, 3] y) { y = Gemm <transB = 1> (x, w, b) }", {"w": (3, 4), "b": (3,)}, (2, 4)),
        ("(float[4, n] x) => (float[n, 3] y) { y = Gemm <transA = 1> (x, w) }", {"w": (4, 3)}, (4, 6)),
        ("(float[n, 4] x) => (float[n, 3] y) { y = Gemm <alpha = 0.5> (x, w, b) }", {"w": (4, 3), "b": (1, 3)}, (2, 4)),
        (
            """(float[n, 4, 5, 5] x) => (float[n, c, h, w] y)
            { y = Conv <group = 4, strides = [2, 2], auto_pad = "SAME_UPPER"> (x, w) }""",
            {"w": (8, 1, 3, 3)},
            (2, 4, 5, 5),
        ),
        (
            """(float[n, 4, 5, 5] x) => (float[n, c, h, w] y)
            { y = ConvTranspose <group = 2, strides = [2, 2], output_padding = [1, 1]> (x, w, b) }""",
            {"w": (4, 3, 3, 3), "b": (6,)},
            (2, 4, 5, 5),
        ),
        ("(float[n, 2, 9] x) => (float[n, c, l] y) { y = Conv <dilations = [2]> (x, w) }", {"w": (3, 2, 3)}, (2, 2, 9)),
    ],
    ids=["left", "right", "transB", "transA", "alpha", "depthwise", "transposed", "dilated"],
)
def test_every_kind_of_mapped_node(text: str, weights: dict[str, tuple[int, ...]], shape: tuple[int, ...]) -> None:
    check(mapped_model(f"g {text}", weights), pictures(shape, shape))


def test_everything_that_may_lie_between() -> None:
    model = mapped_model(
        """g (float[n, 2, 8, 8] x) => (float[n, 6] y, float[n, 4, 4, 4] early, float[n, 3] scores)
        < float low = {0.0}, float high = {6.0}, int64[1] one = {1}, int64[1] zero = {0}, int64[1] rest = {-1},
          int64[2] parts = {1, 3} >
        { a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  k = Clip (a, low, high)
          early = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (k)
          l, h = Split <axis = 1> (early, parts)  joined = Concat <axis = 1> (h, l)
          b = Conv (joined, w2)  mean = GlobalAveragePool (b)
          all = Shape (x)  rows = Slice (all, zero, one)  shape = Concat <axis = 0> (rows, rest)
          flat = Reshape (mean, shape)  y = Gemm (flat, w3, b3)
          soft = Softmax <axis = 1> (y)  scores = MatMul (soft, w4) }""",
        {"w1": (4, 2, 3, 3), "b1": (4,), "w2": (5, 4, 1, 1), "w3": (5, 6), "b3": (6,), "w4": (6, 3)},
    )
    runner = check(model, pictures((3, 2, 8, 8), (1, 2, 8, 8)))
    # The shape of x is read after everything else: x is held until then.
    assert needs(runner)["y"] == {"b", "x"}


@pytest.mark.parametrize("sign", [1, -1])
def test_bodies_of_if_read_values_of_every_kind_from_around_them(sign: int) -> None:
    model = mapped_model(
        """g (float[n, 4] x, float[n, 4] only_in_body, float[n, 4] nested) => (float[n, 3] y)
        < float limit = {0.0}, int64[2] axes = {0, 1} >
        { a = MatMul (x, w1)  r = Relu (a)  b = MatMul (r, w2)
          sum = ReduceSum <keepdims = 0> (x, axes)  yes = Greater (sum, limit)
          t = If (yes) <
            then_branch = one () => (float[n, 4] p)
              { p1 = Add (a, only_in_body)  p2 = Add (p1, shift)  p = Add (p2, r) },
            else_branch = two () => (float[n, 4] q) {
              q1 = Sub (b, r)
              q = If (yes) <
                then_branch = three () => (float[n, 4] u) { u = Identity (a) },
                else_branch = four () => (float[n, 4] v) { v1 = Mul (q1, nested) v = Add (v1, b) }
              > } >
          y = MatMul (t, w3) }""",
        {"w1": (4, 4), "w2": (4, 4), "w3": (4, 3), "shift": (4,)},
    )
    x = np.abs(normal(3, 4, size=0.5)) * sign
    feeds = [{"x": x, "only_in_body": normal(3, 4, seed=7, size=0.5), "nested": normal(3, 4, seed=8, size=0.5)}]
    runner = check(model, feeds)
    assert needs(runner)["y"] == {"x", "a", "b", "r", "only_in_body", "nested"}


def test_a_model_with_a_fixed_batch() -> None:
    model = mapped_model(
        """g (float[1, 2, 4, 4] x) => (float[1, 3] y) < int64[2] shape = {1, 64} >
        { a = Conv <pads = [1, 1, 1, 1]> (x, w1)  r = Relu (a)  f = Reshape (r, shape)  y = Gemm (f, w2) }""",
        {"w1": (4, 2, 3, 3), "w2": (64, 3)},
    )
    check(model, pictures(*[(1, 2, 4, 4)] * 5))


def test_batches_of_different_sizes_in_every_dimension() -> None:
    model = mapped_model(
        """g (float[n, 2, h, w] x) => (float[n, 3] y)
        { a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w1)  r = Relu (a)  b = Conv (r, w2)
          s = Add (b, r)  p = GlobalAveragePool (s)  f = Flatten (p)  y = Gemm (f, w3) }""",
        {"w1": (4, 2, 3, 3), "w2": (4, 4, 1, 1), "w3": (4, 3)},
    )
    check(model, pictures((3, 2, 8, 8), (2, 2, 5, 9), (1, 2, 1, 1)))


def test_nodes_whose_input_is_constant() -> None:
    model = mapped_model(
        """g (float[n, 4] x) => (float[n, 3] y, float[2, 3] fixed)
        { a = MatMul (x, w1)  made = RandomUniformLike <seed = 1.0> (table)  b = MatMul (made, w2)
          m = ReduceMean <keepdims = 0> (b)  s = Add (a, m)  y = MatMul (s, w3)  fixed = MatMul (made, w4) }""",
        {"table": (2, 4), "w1": (4, 3), "w2": (4, 3), "w3": (3, 3), "w4": (4, 3)},
    )
    runner = runner_of(model)
    assert needs(runner)["b"] == set()
    step = runner.steps[1]
    made = runner.prepare(step, {}, 3)
    assert [array.shape for array in made] == [(2, 4)] * 3


def test_a_node_that_reads_an_initializer() -> None:
    # Folding would remove it, had the product not grown over its limit.
    model = mapped_model(
        """g (float[n, 4] x) => (float[n, 3] y)
        { a = MatMul (x, w1)  s = Sub (a, kept)  y = MatMul (s, w2) }""",
        {"w1": (4, 4), "w2": (4, 3), "kept": (4,)},
    )
    for node in model.graph:
        if node.op_type == "Sub":
            node.replace_input_with(0, model.graph.initializers["kept"])
    runner = runner_of(model)
    assert [array.shape for array in runner.prepare(runner.steps[1], {}, 2)] == [(4,)] * 2


def test_outputs_that_nobody_reads_are_dropped_at_once() -> None:
    model = mapped_model(
        """g (float[n, 4] x) => (float[n, 3] y)
        { a = MatMul (x, w1)  y = MatMul (x, w2) }""",
        {"w1": (4, 5), "w2": (4, 3)},
    )
    runner = check(model, pictures((2, 4)))
    assert runner.steps[0].spent == ("a",)


def test_weights_of_other_values_give_other_outputs() -> None:
    model = mapped_model("g (float[n, 4] x) => (float[n, 3] y) { y = Gemm (x, w, b) }", {"w": (4, 3), "b": (3,)})
    runner = runner_of(model)
    x, weight, bias = normal(5, 4, size=0.5), normal(4, 3, seed=9, size=0.5), normal(3, seed=10, size=0.5)
    found = runner.run(runner.steps[0], [x, x[:2]], weight, bias)
    np.testing.assert_allclose(found[0], x @ weight + bias, rtol=1e-5, atol=1e-6)
    assert found[1].shape == (2, 3)
    np.testing.assert_allclose(runner.run(runner.steps[0], [x], weight * 0, bias)[0], np.tile(bias, (5, 1)))


def test_no_session_outlives_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each would hold on to its activations and threads.
    opened: list[weakref.ref[Any]] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        session = make_session(*arguments, **options)
        opened.append(weakref.ref(session))
        return session

    monkeypatch.setattr(segments, "make_session", spy)
    model = mapped_model(
        "g (float[n, 4] x) => (float[n, 3] y) { r = Relu (x)  a = MatMul (r, w1)  s = Relu (a)  y = MatMul (s, w2) }",
        {"w1": (4, 5), "w2": (5, 3)},
    )
    check(model, pictures((2, 4)))
    gc.collect()
    assert len(opened) == 4
    assert not [session for session in opened if session() is not None]
