"""What is let through of a value: the open range of Relu and Clip, and nothing said where it is not certain."""

from __future__ import annotations

import math

import onnx
import pytest

from raqu_onnx.gates import open_range

HEADER = '<ir_version: 10, opset_import: ["": 18]>'


def range_of(body: str, *, hidden: bool = False) -> tuple[float, float] | None:
    """The open range of `v` in a graph with the given nodes, and with one more reader that nothing is known of."""
    text = f"{HEADER} g (float[n] v, float m) => (float[n] y) <float zero = {{0}}, float six = {{6}}> {{ {body} }}"
    graph = onnx.parser.parse_model(text).graph
    readers: dict[str, list[onnx.NodeProto | None]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    if hidden:
        readers["v"].append(None)
    return open_range("v", readers, {item.name: item for item in graph.initializer})


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Relu (v)", (0.0, math.inf)),
        ("y = Clip (v, zero, six)", (0.0, 6.0)),
        ("y = Clip (v, zero)", (0.0, math.inf)),
        ("y = Clip (v, , six)", (-math.inf, 6.0)),
        # The widest of several readers.
        ("a = Relu (v) b = Clip (v, , six) y = Add (a, b)", None),
        ("a = Relu (v) b = Clip (v, zero, six) y = Add (a, b)", (0.0, math.inf)),
        # Everything, or nobody knows what.
        ("y = Clip (v)", None),
        ("y = Clip (v, m)", None),
        ("y = Clip (v, six, zero)", None),
        ("y = Sigmoid (v)", None),
        ("a = Relu (v) y = Add (a, v)", None),
        ("y = Clip (zero, v, six)", None),
        ("y = Identity (six)", None),
    ],
)
def test_the_open_range_is_what_all_readers_let_through(body: str, expected: tuple[float, float] | None) -> None:
    assert range_of(body) == expected


def test_a_reader_that_is_not_known_may_see_everything() -> None:
    assert range_of("y = Relu (v)") == (0.0, math.inf)
    assert range_of("y = Relu (v)", hidden=True) is None


def test_bounds_that_are_attributes_count_as_well() -> None:
    node = onnx.helper.make_node("Clip", ["v"], ["y"], min=0.0, max=6.0)
    assert open_range("v", {"v": [node]}, {}) == (0.0, 6.0)
