"""Small tools for reading and rewriting an onnx_ir graph, shared by the passes.

A *constant* here is a value that no run of the model can change: an initializer that is not a graph input as well
(such a one is only a default that the caller may override).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

__all__ = [
    "WEIGHT_OPS",
    "Names",
    "add_initializer",
    "all_finite",
    "all_graphs",
    "append_node",
    "constant_array",
    "constant_tensor",
    "default_opset",
    "drop_unused_initializers",
    "graph_of",
    "infer_shapes",
    "is_float",
    "model_graphs",
    "name_nodes",
    "name_of",
    "nodes_of_type",
    "one_line",
    "replace_constant",
    "require_opset",
    "skeleton",
    "subgraphs_of",
    "weight_values",
]

_logger = logging.getLogger(__name__)

#: Operators that multiply by a weight, or whose parameters are folded into one.
WEIGHT_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"})

#: Elements looked at together by `all_finite`: a few MiB of temporary memory.
_PIECE = 1 << 20

# An initializer larger than this many bytes holds weights, never the axes, shapes or limits that inference and
# conversion look at.
_SMALL_BYTES = 1024

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind a constant initializer, without reading its data; None for anything else."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def constant_array(value: ir.Value | None) -> NDArray[Any] | None:
    """The data of a constant initializer, None for anything else."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_float(tensor: ir.TensorProtocol) -> bool:
    """Whether the tensor's type is one that weights are folded in (float16, bfloat16, float32, float64)."""
    return tensor.dtype in _FLOATS


def all_finite(array: NDArray[Any]) -> bool:
    """Whether an array holds neither NaN nor infinity; reads it in pieces, so that a mapped file stays on disk."""
    flat = array.reshape(-1)
    pieces = range(0, flat.size, _PIECE)
    return all(bool(np.isfinite(flat[start : start + _PIECE]).all()) for start in pieces)


def default_opset(model: ir.Model) -> int:
    """Version of the default ONNX domain that the model imports, 0 when it imports none."""
    return model.opset_imports.get("", 0)


def nodes_of_type(model: ir.Model, op_type: str) -> Iterator[ir.Node]:
    """Nodes of a type of the default domain, in the graph and its bodies; the graph may be changed meanwhile."""
    for graph in tuple(all_graphs(model.graph)):
        for node in tuple(graph):
            if node.op_type == op_type and node.domain == "" and node.graph is graph:
                yield node


def require_opset(model: ir.Model, minimum: int, name: str) -> None:
    """What the pass `name` calls first where it knows operators only as of opset `minimum`.

    Raises:
        PreconditionError: The model is older.
    """
    if 0 < default_opset(model) < minimum:
        raise ir.passes.PreconditionError(
            f"{name} needs opset {minimum} or later, the model has {default_opset(model)}: "
            "raise it first (raqu_onnx.opset.ensure_opset)"
        )


def subgraphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies that a control-flow node holds in its attributes."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def all_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph and every body below it, outer ones first."""
    yield graph
    for node in graph:
        for body in subgraphs_of(node):
            yield from all_graphs(body)


def model_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Every graph of a model: the main one, the bodies of its local functions, and all bodies below them."""
    yield from all_graphs(model.graph)
    for function in model.functions.values():
        yield from all_graphs(function.graph)


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that a node stands in.

    Raises:
        ValueError: If it was taken out of its graph.
    """
    if node.graph is None:
        raise ValueError(f"node '{node.name}' stands in no graph")
    return node.graph


def name_of(value: ir.Value) -> str:
    """The name of a value in a graph, where each has one.

    Raises:
        ValueError: If it has none.
    """
    if not value.name:
        raise ValueError(f"a value of node '{getattr(value.producer(), 'name', None)}' has no name")
    return value.name


class Names:
    """Gives out names that no node or value of a model bears yet."""

    def __init__(self, model: ir.Model) -> None:
        self._used: set[str] = set()
        for graph in all_graphs(model.graph):
            self._used.update(value.name or "" for value in graph.inputs)
            self._used.update(graph.initializers)
            for node in graph:
                self._used.add(node.name or "")
                self._used.update(value.name or "" for value in node.outputs)

    def fresh(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, `wanted_2`, ... where that is taken."""
        name, count = wanted, 0
        while name in self._used:
            count += 1
            name = f"{wanted}_{count}"
        self._used.add(name)
        return name


def name_nodes(model: ir.Model) -> bool:
    """Give every node of the graph and its bodies a name that is not empty and not another's.

    A name that is unique stays; of several nodes with one name the first keeps it, the others get a suffix.
    """
    nodes = [node for graph in all_graphs(model.graph) for node in graph]
    used = {node.name for node in nodes if node.name}
    seen: set[str] = set()
    modified = False
    for node in nodes:
        if not node.name or node.name in seen:
            stem, count = node.name or node.op_type, 0 if not node.name else 1
            while f"{stem}_{count}" in used:
                count += 1
            node.name = f"{stem}_{count}"
            used.add(node.name)
            modified = True
        seen.add(node.name)
    return modified


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Register `array` as a new initializer; `name` must be free (see `Names`)."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def replace_constant(node: ir.Node, index: int, array: NDArray[Any], names: Names, wanted: str) -> None:
    """Give `node` the constant `array` as input `index`.

    A constant that only this node reads keeps its name and gets the new data; a shared one stays as it is, and the
    node gets an initializer of its own under the name `wanted`.
    """
    old = node.inputs[index] if index < len(node.inputs) else None
    alone = old is not None and len(old.uses()) == 1 and not old.is_graph_output()
    if old is not None and old.name and alone and constant_tensor(old) is not None:
        old.const_value = ir.tensor(array, name=old.name)
        old.shape = ir.Shape(array.shape)
        return
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, add_initializer(graph_of(node), names.fresh(wanted), array))


def append_node(
    node: ir.Node,
    op_type: str,
    others: Sequence[ir.Value],
    names: Names,
    wanted: str,
    attributes: Sequence[ir.Attr] = (),
) -> ir.Node:
    """Insert `op_type(node's output, *others)` behind a node; the new node takes over the output's name and readers.

    Shape and type are taken over too, so `op_type` must not change them; a Cast's caller corrects the type of what goes
    into it.
    """
    inner = node.outputs[0]
    added = ir.Node("", op_type, [inner, *others], attributes, name=names.fresh(wanted))
    outer = added.outputs[0]
    outer.type = inner.type
    outer.shape = None if inner.shape is None else inner.shape.copy()
    outer.doc_string = inner.doc_string
    outer.metadata_props.update(inner.metadata_props)
    name, inner.name = name_of(inner), names.fresh(f"{inner.name}_{node.op_type.lower()}")
    outer.name = name
    inner.metadata_props.clear()
    inner.doc_string = None
    readers = [use for use in inner.uses() if use.node is not added]
    for reader, index in readers:
        reader.replace_input_with(index, outer)
    graph_of(node).insert_after(node, added)
    outputs = graph_of(node).outputs
    for index, output in enumerate(outputs):
        if output is inner:
            outputs[index] = outer
    return added


def drop_unused_initializers(values: Iterable[ir.Value | None]) -> None:
    """Remove those of `values` that are initializers which nothing reads any more."""
    for value in values:
        if value is None or constant_tensor(value) is None:
            continue
        if not value.uses() and not value.is_graph_output() and value.graph is not None:
            value.graph.initializers.pop(value.name or "", None)


def weight_values(model: ir.Model) -> set[ir.Value]:
    """Every value that is known without inputs and ends as a weight or parameter of one of `WEIGHT_OPS`.

    Followed backwards through operators whose inputs are all known (Cast, Transpose, Mul of constants, ...). An
    initializer that is also a graph input counts as known here: old exporters list every weight as an input.
    """
    nodes = [node for graph in all_graphs(model.graph) for node in graph]
    known: set[ir.Value] = set()

    def is_known(value: ir.Value | None) -> bool:
        return value is None or value in known or value.is_initializer()

    derived: list[ir.Node] = []
    for node in nodes:
        has_body = next(subgraphs_of(node), None) is not None
        if has_body or (not node.inputs and node.op_type != "Constant"):
            continue
        if all(is_known(value) for value in node.inputs):
            derived.append(node)
            known.update(node.outputs)

    weights: set[ir.Value] = set()
    for node in nodes:
        if node.op_type in WEIGHT_OPS and node.domain == "" and not known.issuperset(node.outputs):
            weights.update(v for v in node.inputs if v is not None and is_known(v))
    for node in reversed(derived):
        if not weights.isdisjoint(node.outputs):
            weights.update(value for value in node.inputs if value is not None)
    return weights


def skeleton(model: ir.Model) -> tuple[onnx.ModelProto, set[str]]:
    """A copy for the ONNX library without the large weights, which may exceed what a message can hold.

    Returns:
        The message, in which those weights are graph inputs, and their names.
    """
    copy = model.clone()
    graph = copy.graph
    removed: set[str] = set()
    for name, value in tuple(graph.initializers.items()):
        tensor = value.const_value
        small = tensor is None or (tensor.dtype == ir.DataType.STRING or tensor.nbytes <= _SMALL_BYTES)
        if tensor is None or (small and not isinstance(tensor, ir.ExternalTensor)):
            continue
        removed.add(name)
        graph.initializers.pop(name)
        if not value.is_graph_input():
            value.type = ir.TensorType(tensor.dtype)
            value.shape = ir.Shape(tensor.shape.numpy())
            graph.inputs.append(value)
    ir.external_data.load_to_model(copy)  # what bodies of If and Loop hold: a message has no folder
    graph.name = graph.name or "main"
    return ir.serde.serialize_model(copy), removed


def infer_shapes(model: ir.Model) -> bool:
    """Run ONNX shape inference; True if it learnt anything.

    What the user declared for graph inputs and outputs stays as it is, and operators that inference does not know
    (other domains) are passed over. Unlike onnx_ir's own pass, sequences stay sequences.
    """
    proto, _ = skeleton(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
        graph = ir.serde.deserialize_model(inferred).graph
    except Exception as error:  # noqa: BLE001 - the C++ binding raises whatever an operator's function throws
        _logger.info("shape inference failed: %s", one_line(error))
        return False
    modified = False
    for ours, theirs in zip(all_graphs(model.graph), all_graphs(graph), strict=True):
        known = {value.name: value for node in theirs for value in node.outputs}
        for value in (output for node in ours for output in node.outputs):
            if value.name in known:
                modified |= _learn(value, known[value.name])
    return modified


def _learn(value: ir.Value, inferred: ir.Value) -> bool:
    """Take over an inferred type and shape; of a graph output only where nothing is declared."""
    modified = False
    if value.type is None and inferred.type is not None:
        value.type = inferred.type
        modified = True
    declared = value.shape is not None and value.is_graph_output()
    if inferred.shape is not None and not declared and value.shape != inferred.shape:
        value.shape = inferred.shape
        modified = True
    return modified


def one_line(error: BaseException) -> str:
    """The innermost cause of an error, on one line: libraries wrap and break their messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
