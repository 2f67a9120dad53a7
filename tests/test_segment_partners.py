"""What the output of a mapped node is added to, found where it is known in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from segment_models import check, mapped_model, pictures, runner_of

if TYPE_CHECKING:
    import onnx_ir as ir


def partners(model: ir.Model) -> dict[str, tuple[str, set[str]]]:
    """By output of a mapped node, what is added to it and what that is computed from."""
    steps = check(model, pictures((2, 4, 5, 5), (1, 4, 5, 5))).steps
    return {step.node.output_name: (step.partner, set(step.partner_needs)) for step in steps if step.partner}


def block(text: str, outputs: str = "float[n, 4, 5, 5] y", **shapes: tuple[int, ...]) -> ir.Model:
    """Two convolutions, a of x and b of relu(a), and what the text makes of them."""
    graph = f"""g (float[n, 4, 5, 5] x) => ({outputs})
        {{ a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = Relu (a)  b = Conv (r, w2)  {text} }}"""
    return mapped_model(graph, {"w1": (4, 4, 3, 3), "b1": (4,), "w2": (4, 4, 1, 1), **shapes})


@pytest.mark.parametrize("operator", ["Add", "Sum"])
@pytest.mark.parametrize("order", ["b, r", "r, b"])
def test_a_value_that_is_known_is_found_in_either_order(order: str, operator: str) -> None:
    assert partners(block(f"s = {operator} ({order})  y = Relu (s)")) == {"b": ("r", {"r"})}


@pytest.mark.parametrize("operands", ["b", "b, r, x"])
def test_a_sum_of_one_or_of_three_has_no_partner(operands: str) -> None:
    assert partners(block(f"s = Sum ({operands})  y = Relu (s)")) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = Add (b, x)", ("x", {"x"})),
        ("y = Add (a, b)", ("a", {"a"})),
        ("t = Sigmoid (a)  u = Mul (t, x)  y = Add (u, b)", ("u", {"a", "x"})),
        # An input of the node is taken as it is, and not computed anew.
        ("t = Sigmoid (r)  y = Add (t, b)", ("t", {"r"})),
        # Only one value of the channel: whoever fits has to look at the shapes.
        ("t = GlobalAveragePool (x)  y = Add (t, b)", ("t", {"x"})),
    ],
    ids=["graph input", "earlier node", "digital units between", "own input", "broadcast"],
)
def test_what_the_value_is_computed_from(text: str, expected: tuple[str, set[str]]) -> None:
    found = partners(block(text))
    assert found["b"] == expected
    assert set(found) == {"b"}


def test_of_two_nodes_that_are_added_the_second_knows_the_first() -> None:
    model = block("c = Conv (r, w3)  y = Add (b, c)", w3=(4, 4, 1, 1))
    assert partners(model) == {"c": ("b", {"b"})}


def test_a_value_is_held_until_it_is_added() -> None:
    model = block(
        "t = Relu (b)  c = Conv (t, w3)  u = Relu (c)  d = Conv (u, w4)  y = Add (d, x)",
        w3=(4, 4, 1, 1),
        w4=(4, 4, 1, 1),
    )
    steps = check(model, pictures((2, 4, 5, 5))).steps
    assert [step.partner for step in steps] == [None, None, None, "x"]
    assert ["x" in step.spent for step in steps] == [False, False, False, True]


@pytest.mark.parametrize(
    ("text", "outputs"),
    [
        ("s = Add (b, r)  y = Mul (b, s)", None),
        ("y = Add (b, r)  b2 = Relu (b)", "float[n, 4, 5, 5] y, float[n, 4, 5, 5] b2"),
        ("y = Add (b, r)", "float[n, 4, 5, 5] y, float[n, 4, 5, 5] b"),
        ("y = Add (b, b)", None),
        ("y = Sub (b, r)", None),
        ("y = Mul (b, r)", None),
        ("y = Max (b, r)", None),
        ("t = Relu (b)  y = Add (t, r)", None),
        ("y = Relu (b)", None),
    ],
    ids=["two readers", "other reader", "graph output", "itself", "sub", "mul", "max", "after relu", "alone"],
)
def test_values_that_are_no_partners(text: str, outputs: str | None) -> None:
    assert partners(block(text, outputs or "float[n, 4, 5, 5] y")) == {}


def test_a_value_behind_a_later_node_is_not_known() -> None:
    model = block("c = Conv (r, w3)  t = Relu (c)  u = Sigmoid (t)  s = Add (b, u)  y = Relu (s)", w3=(4, 4, 1, 1))
    assert partners(model) == {}


def test_a_constant_is_no_partner() -> None:
    # Added to the bias where it is one value per channel; here it is not.
    model = block("y = Add (b, kept)", kept=(1, 4, 5, 5))
    assert [node.op_type for node in model.graph] == ["Conv", "Relu", "Conv", "Add"]
    assert partners(model) == {}


def test_a_body_that_reads_the_output_reads_it_too() -> None:
    text = """m = ReduceMax <keepdims = 0> (x)  yes = Greater (m, limit)  s = Add (b, r)
        t = If (yes) < then_branch = one () => (float[n, 4, 5, 5] p) { p = Identity (READ) },
                       else_branch = two () => (float[n, 4, 5, 5] q) { q = Neg (s) } >
        y = Add (t, s)"""
    for read, expected in (("b", {}), ("s", {"b": ("r", {"r"})})):
        assert partners(block(text.replace("READ", read), limit=())) == expected


def test_the_partner_of_a_step_without_one_is_refused() -> None:
    runner = runner_of(block("y = Relu (b)"))
    with pytest.raises(ValueError, match="nothing known is added to its output"):
        runner.partner(runner.steps[0], {}, 1)


def test_a_partner_that_no_input_decides_is_the_same_in_every_batch() -> None:
    text = "made = RandomUniformLike <seed = 1.0> (kept)  y = Add (b, made)"
    runner = runner_of(block(text, kept=(1, 4, 5, 5)))
    step = runner.steps[1]
    assert (step.partner, step.partner_needs) == ("made", ())
    found = runner.partner(step, {}, 3)
    assert [array.shape for array in found] == [(1, 4, 5, 5)] * 3
