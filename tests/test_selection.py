"""What patterns of `--exclude` and `--keep` mean, without a model."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx.errors import ConfigError
from raqu_onnx.selection import ends, excluded_reason, matching, select, split_patterns

NODES = {"/conv1": "Conv", "/layer1/conv": "Conv", "/layer2/conv": "Conv", "fc": "Gemm", "Gemm": "MatMul"}


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("fc", ["fc"]),
        ("Conv", ["/conv1", "/layer1/conv", "/layer2/conv"]),
        ("Gemm", ["Gemm"]),  # a node's name wins over an operator type
        ("/layer./conv", ["/layer1/conv", "/layer2/conv"]),
        ("conv", []),  # a regular expression is for the whole name
        (".*conv.*", ["/conv1", "/layer1/conv", "/layer2/conv"]),
        (".*", list(NODES)),
        ("conv[", ValueError),
        ("a{99999999999}", ValueError),
    ],
)
def test_a_pattern_is_a_name_then_a_type_then_an_expression(pattern: str, found: list[str] | type[ValueError]) -> None:
    if isinstance(found, list):
        assert matching(pattern, NODES) == found
    else:
        with pytest.raises(found, match="regular expression"):
            matching(pattern, NODES)


def test_a_name_that_is_no_expression_is_still_a_name() -> None:
    assert matching("conv(1", {"conv(1": "Conv"}) == ["conv(1"]


def test_the_first_pattern_is_the_reason_and_nodes_keep_their_order() -> None:
    found = select("--exclude", ["Gemm", "/layer1.*", "Conv"], NODES)
    assert found == {"/conv1": "Conv", "/layer1/conv": "/layer1.*", "/layer2/conv": "Conv", "Gemm": "Gemm"}
    assert list(found) == ["/conv1", "/layer1/conv", "/layer2/conv", "Gemm"]
    assert excluded_reason("Conv") == "excluded by the user (Conv)"
    assert excluded_reason("Conv", quantized=True) == "excluded by the user (Conv), stays quantized as it was"
    assert select("--exclude", [], NODES) == {}


def test_words_win_over_names() -> None:
    nodes = {"first": "Conv", "b": "Conv"}
    assert select("--keep", ["first"], nodes, words={"first": ["b"]}) == {"b": "first"}


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("/conv2", "'/conv2' matches no node, did you mean /conv1"),
        ("conv", "did you mean /conv1 or Conv?"),
        ("Relu", "'Relu' means only nodes that never go into crossbars: r1 (Relu), r2 (Relu), r3 (Relu) and 1 more"),
        ("r1", "r1 (Relu)"),
        ("zzzzzz", "'zzzzzz' matches no node; `raqu-onnx inspect MODEL` lists those that can be given"),
        ("", "a pattern is empty"),
        ("a(", "regular expression: missing )"),
    ],
)
def test_a_pattern_that_means_nothing_is_told_in_one_line(pattern: str, said: str) -> None:
    others = {f"r{i}": "Relu" for i in range(1, 5)}
    with pytest.raises(ConfigError, match=f"^--exclude: .*{re.escape(said)}") as caught:
        select("--exclude", ["fc", pattern], NODES, others=others, unfit="never go into crossbars")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("first,last", ("first", "last")),
        ("first, last", ("first", "last")),
        ("layer{1,2},fc", ("layer{1,2}", "fc")),
        ("(a,b),[,]", ("(a,b)", "[,]")),
        ("a),b", ("a)", "b")),
        ("a,,b", ("a", "", "b")),
    ],
)
def test_commas_inside_brackets_do_not_separate(text: str, patterns: tuple[str, ...]) -> None:
    assert split_patterns(text) == patterns


@given(st.lists(st.text(st.characters(exclude_characters="()[]{},"), min_size=1), min_size=1))
def test_plain_patterns_come_back(parts: list[str]) -> None:
    assert split_patterns(",".join(parts)) == tuple(part.strip() for part in parts)


def test_ends_of_a_graph_with_branches() -> None:
    """Two inputs join, two heads leave; a lone node stands at both ends."""
    found = ends({"a": [], "b": [], "c": ["a", "b"], "head1": ["c"], "head2": ["c"], "lone": []})
    assert found == {"first": ["a", "b", "lone"], "last": ["head1", "head2", "lone"]}
