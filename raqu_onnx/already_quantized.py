"""Models that somebody else has quantized, wholly or in part: what computes on integers, and what is left as it is.

Quantization comes in four shapes: QuantizeLinear and DequantizeLinear around float operators (QDQ), operators on
integers (QLinearConv, QGemm, ...), ranges measured at run time (DynamicQuantizeLinear, ConvInteger, ...), and weights
alone behind DequantizeLinear. The last is a float model whose weights are stored compactly, and no hindrance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from raqu_onnx.annotations import PROTECTED
from raqu_onnx.errors import ModelError
from raqu_onnx.graph_edit import all_graphs, name_nodes
from raqu_onnx.mapping import MAPPABLE_OPS, describe_node
from raqu_onnx.selection import matching

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["check_float", "excluded_names", "is_quantized_node", "protect", "quantized_nodes"]

# Operators that multiply by integer weights.
_INTEGER_OPS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
        "QMoE",
        "QOrderedAttention",
        "QOrderedMatMul",
    }
)
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# Between DequantizeLinear and the node that it feeds: operators that leave values on the quantizer's grid.
_PASSING = frozenset(
    {
        "Cast",
        "Clip",
        "Dropout",
        "Flatten",
        "Identity",
        "MaxPool",
        "Relu",
        "Reshape",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
_DOMAINS = ("", "ai.onnx")
# Nodes that an error names before it counts the rest.
_NAMED = 4


def quantized_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes that multiply by weights and are quantized already, in graph order."""
    return [node for node in _nodes(model) if is_quantized_node(node)]


def is_quantized_node(node: ir.Node) -> bool:
    """Whether a node computes on integers: by its operator, or as its weight and its input are both dequantized."""
    if node.op_type in _INTEGER_OPS:
        return True
    if not _is_mappable(node):
        return False
    sources = [_dequantized(value) for value in node.inputs[:2]]
    # Two activations, as in attention, are no weight.
    return None not in sources and {_is_constant(item) for item in sources if item is not None} == {True, False}


def check_float(model: ir.Model, excluded: Mapping[str, str]) -> None:
    """Refuse a model that is quantized, unless all nodes that are were excluded, which leaves them as they are.

    Args:
        model: The tidied model.
        excluded: Pattern by name of the nodes that the user excludes.

    Raises:
        ModelError: Nodes are quantized that the user did not exclude.
    """
    first = next((node for node in _nodes(model) if _quantizes_activations(node)), None)
    found = quantized_nodes(model)
    left = [node for node in found if (node.name or "") not in excluded]
    if first is None and not left:
        return
    if not left and excluded:
        return  # What is left are float nodes between quantized ones.
    where = "" if first is None else f" (node {first.name}, {first.op_type})"
    advice = "give the float model that it was made from"
    if not left:
        raise ModelError(f"the model is already quantized{where}: {advice}")
    listed = ", ".join(f"{node.name} ({node.op_type})" for node in left[:_NAMED])
    listed += f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    if not any(_could_be_mapped(node) for node in _nodes(model)):
        raise ModelError(
            f"the model is already quantized{where}: {listed} compute on integers, and no node with weights is float; "
            + advice
        )
    options = " ".join(f"--exclude {node.name}" for node in left) if len(left) <= _NAMED else "--exclude"
    raise ModelError(
        f"the model is already quantized in part{where}: {listed} compute on integers; {advice}, or leave those nodes "
        f"as they are with {options}"
    )


def protect(model: ir.Model, exclude: Iterable[str] = ()) -> None:
    """Mark the quantization of weights that must not be folded away.

    That is what feeds nodes that compute on integers, and nodes that the user excludes. Weights alone behind
    DequantizeLinear of other nodes are not marked.

    Args:
        model: The model, changed in its annotations; its nodes are named where patterns are given.
        exclude: Patterns, as `raqu_onnx.selection` reads them; those that mean no node are passed over.
    """
    if not any(node.op_type == _DEQUANTIZE for node in _nodes(model)):
        return
    excluded = excluded_names(model, exclude)
    for node in _nodes(model):
        if is_quantized_node(node) or (_is_mappable(node) and node.name in excluded):
            for value in node.inputs:
                for item in _chain(value):
                    PROTECTED.set(item, True)


def excluded_names(model: ir.Model, patterns: Iterable[str]) -> set[str]:
    """Names of the nodes of mappable types that the user excludes; patterns that mean none are passed over.

    Args:
        model: The model; its nodes are named where there are patterns.
        patterns: As `raqu_onnx.selection` reads them.
    """
    wanted = tuple(patterns)
    if not wanted:
        return set()
    name_nodes(model)
    operators = {node.name or "": node.op_type for node in _nodes(model) if _is_mappable(node)}
    excluded: set[str] = set()
    for pattern in wanted:
        try:
            excluded.update(matching(pattern, operators))
        except ValueError:
            continue  # annotate-tiling tells the user.
    return excluded


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in all_graphs(model.graph):
        yield from graph


def _is_mappable(node: ir.Node) -> bool:
    return node.op_type in MAPPABLE_OPS and node.domain in _DOMAINS


def _could_be_mapped(node: ir.Node) -> bool:
    return _is_mappable(node) and not is_quantized_node(node) and not isinstance(describe_node(node), str)


def _quantizes_activations(node: ir.Node) -> bool:
    if node.op_type == _QUANTIZE:
        return not _is_constant(node)
    return node.op_type == "DynamicQuantizeLinear" or node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OPS


def _chain(value: ir.Value | None) -> Iterator[ir.Node]:
    """The nodes behind a value up to its DequantizeLinear, and the QuantizeLinear behind that; none without one."""
    found: list[ir.Node] = []
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _PASSING and node.inputs and node.inputs[0] is not None:
        found.append(node)
        node = node.inputs[0].producer()
    if node is None or node.op_type != _DEQUANTIZE or not node.inputs or node.inputs[0] is None:
        return
    yield from (*found, node)
    source = node.inputs[0].producer()
    if source is not None and source.op_type == _QUANTIZE:
        yield source


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes out of."""
    return next((node for node in _chain(value) if node.op_type == _DEQUANTIZE), None)


def _is_constant(node: ir.Node) -> bool:
    """Whether nothing that a run feeds reaches a node."""
    pending, seen = [node], {node}
    while pending:
        for value in pending.pop().inputs:
            if value is None or value.is_initializer():
                continue
            producer = value.producer()
            if producer is None:
                return False
            if producer not in seen:
                seen.add(producer)
                pending.append(producer)
    return True
