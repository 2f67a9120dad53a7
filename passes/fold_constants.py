"""Constant folding."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from raqu_onnx.already_quantized import protect
from raqu_onnx.annotations import PROTECTED
from raqu_onnx.graph_edit import (
    Names,
    all_graphs,
    constant_tensor,
    default_opset,
    drop_unused_initializers,
    graph_of,
    infer_shapes,
    name_of,
    subgraphs_of,
    weight_values,
)
from raqu_onnx.node_evaluation import evaluate_node, output_bytes
from raqu_onnx.opset import inline_functions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["FoldConstantsPass"]

_logger = logging.getLogger(__name__)

# They draw numbers or depend on more than their inputs.
_NEVER = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "DynamicQuantizeLinear",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
# They say how a tensor is stored, which is information: folded only where a float layer's weight comes out.
_QUANTIZERS = frozenset({"DequantizeLinear", "QuantizeLinear"})
# Rounds of inference and folding; each can turn a Shape into a constant that makes the next one known.
_ROUNDS = 8


@dataclass(frozen=True)
class FoldConstantsPass(ir.passes.InPlacePass):
    """Compute everything that does not depend on an input, once and for all.

    Before::

        q = Constant <value = int8[8, 3, 3, 3] ...>
        s = Constant <value = 0.02>
        f = Cast <to = float> (q)
        w = Mul (f, s)
        y = Conv (x, w)

    After (`w` is an initializer)::

        y = Conv (x, w)

    Local functions are inlined first. Constant nodes become initializers of the graph they stand in; Identity of a
    constant is read through; Shape and Size of a value whose shape is static are constants. Weights stored as integers
    behind DequantizeLinear become float, unless the layer's input is quantized as well; other QuantizeLinear and
    DequantizeLinear stay, and so do random operators, other domains, and control flow itself (its bodies are folded).
    A constant that is a graph output stays the output of its node. Values are computed by onnxruntime, node by node
    without optimization, so the result is what an unfolded model would compute.

    Attributes:
        max_growth_bytes: A result may be this much larger than the constants it replaces (Expand, Tile, ...);
            weights of Conv, ConvTranspose, Gemm, MatMul and BatchNormalization have no limit.
    """

    max_growth_bytes: int = 1 << 20

    name: ClassVar[str] = "fold-constants"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold in place.

        Raises:
            ModelError: If a local function cannot be inlined.
        """
        modified = _allow_plain_initializers(model)
        modified |= inline_functions(model)
        protect(model)
        for _ in range(_ROUNDS):
            if any(_is_shape_query(node) for g in all_graphs(model.graph) for node in g):
                modified |= infer_shapes(model)
            folder = _Folder(model, self.max_growth_bytes)
            folder.fold_graph(model.graph)
            modified |= folder.modified
            if not folder.folded_shape:
                break
        return ir.passes.PassResult(model, modified)


def _allow_plain_initializers(model: ir.Model) -> bool:
    """Before IR version 4 every initializer had to be a graph input too; lift that rule to be able to fold."""
    if model.ir_version >= 4:
        return False
    model.ir_version = 4
    inputs = model.graph.inputs
    kept = [value for value in inputs if not value.is_initializer()]
    inputs.clear()
    inputs.extend(kept)
    return True


def _is_shape_query(node: ir.Node) -> bool:
    return node.op_type in ("Shape", "Size") and node.domain == ""


def _constant_node_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node, whichever attribute holds it; None for a sparse one."""
    name = node.outputs[0].name
    for key, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        match key:
            case "value":
                return _own(attribute.as_tensor(), name)
            case "value_float" | "value_floats":
                return ir.tensor(np.array(attribute.value, np.float32), name=name)
            case "value_int" | "value_ints":
                return ir.tensor(np.array(attribute.value, np.int64), name=name)
            case "value_string" | "value_strings":
                text = attribute.value if key == "value_strings" else [attribute.value]
                shape = ir.Shape([len(text)] if key == "value_strings" else [])
                return ir.StringTensor([t.encode() for t in text], shape=shape, name=name)
    return None


def _own(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
    """A tensor object that can be named without renaming one that somebody else holds; data is not read."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=name or "",
            base_dir=tensor.base_dir,
        )
    if isinstance(tensor, ir.StringTensor):
        return ir.StringTensor(tensor.string_data(), shape=tensor.shape, name=name)
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)


@dataclass
class _Folder:
    """One sweep over a model, in the order of its nodes."""

    model: ir.Model
    max_growth_bytes: int
    modified: bool = False
    folded_shape: bool = False
    names: Names = field(init=False)
    weights: set[ir.Value] = field(init=False)

    def __post_init__(self) -> None:
        self.names = Names(self.model)
        self.weights = weight_values(self.model)

    def fold_graph(self, graph: ir.Graph) -> None:
        for node in tuple(graph):
            if node.graph is not graph:  # removed with something that it fed
                continue
            tensors = self._compute(node)
            if tensors is not None:
                self._replace(node, tensors)
            else:
                for body in subgraphs_of(node):
                    self.fold_graph(body)

    def _compute(self, node: ir.Node) -> Sequence[ir.Value | ir.TensorProtocol] | None:
        """What stands for the node's outputs: tensors, or a constant that exists already; None: keep the node."""
        if node.domain != "" or node.op_type in _NEVER or PROTECTED.get(node) or not _has_readers(node):
            return None
        if node.op_type in _QUANTIZERS and self.weights.isdisjoint(node.outputs):
            return None
        if node.op_type == "Constant":
            tensor = _constant_node_tensor(node)
            return None if tensor is None else [tensor]
        if _is_shape_query(node):
            return _shape_result(node)
        tensors = [constant_tensor(value) for value in node.inputs if value is not None]
        if not tensors or None in tensors or next(subgraphs_of(node), None) is not None:
            return None
        if node.op_type == "Identity":
            source = node.inputs[0]
            return None if source is None else [source]
        if not self._affordable(node):
            return None
        arrays = evaluate_node(node, default_opset(self.model))
        if arrays is None:
            return None
        return [ir.tensor(a, name=o.name) for a, o in zip(arrays, node.outputs, strict=True)]

    def _affordable(self, node: ir.Node) -> bool:
        if not self.weights.isdisjoint(node.outputs):
            return True
        size = output_bytes(node, default_opset(self.model), self.model.ir_version)
        inputs = {value for value in node.inputs if value is not None}
        given = [t for value in inputs if (t := constant_tensor(value)) is not None]
        if size is None:  # inference cannot tell: only where little goes in
            return sum(tensor.nbytes for tensor in given) <= self.max_growth_bytes // 16
        freed = sum(
            t.nbytes for value in inputs if (t := constant_tensor(value)) is not None and _read_only_by(value, node)
        )
        return size - freed <= self.max_growth_bytes

    def _replace(self, node: ir.Node, results: Sequence[ir.Value | ir.TensorProtocol]) -> None:
        graph = graph_of(node)
        self.modified = True
        self.folded_shape |= _is_shape_query(node)
        kept = any(output.is_graph_output() for output in node.outputs)
        inputs = node.inputs
        pending: list[ir.Value] = []
        for output, result in zip(node.outputs, results, strict=True):
            if isinstance(result, ir.Value):
                constant = result
            else:
                constant = self._constant(output, result, rename=kept)
                pending.append(constant)
            for reader, index in tuple(output.uses()):
                reader.replace_input_with(index, constant)
        if not kept:
            graph.remove(node, safe=True)
            _remove_dead(inputs)
        for constant in pending:
            if constant.uses():
                graph.register_initializer(constant)

    def _constant(self, output: ir.Value, tensor: ir.TensorProtocol, *, rename: bool) -> ir.Value:
        name = self.names.fresh(f"{output.name}_value") if rename else name_of(output)
        tensor.name = name
        constant = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            doc_string=output.doc_string,
            const_value=tensor,
            metadata_props=dict(output.metadata_props),
        )
        if output in self.weights:
            self.weights.add(constant)
        return constant


def _has_readers(node: ir.Node) -> bool:
    return any(output.uses() for output in node.outputs)


def _read_only_by(value: ir.Value, node: ir.Node) -> bool:
    return not value.is_graph_output() and all(use.node is node for use in value.uses())


def _shape_result(node: ir.Node) -> list[ir.TensorProtocol] | None:
    """Shape (opset 15: of a slice of the dimensions) or Size of a value whose shape is static."""
    source = node.inputs[0]
    shape = None if source is None else source.shape
    if shape is None or not shape.is_static():
        return None
    dims = shape.numpy()
    name = node.outputs[0].name
    if node.op_type == "Size":
        return [ir.tensor(np.array(np.prod(dims, dtype=np.int64)), name=name)]
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(dims))
    return [ir.tensor(np.array(dims[start:end], np.int64), name=name)]


def _remove_dead(values: Iterable[ir.Value | None]) -> None:
    """Drop initializers and producers that nothing reads since a node was folded, and so on upwards."""
    for value in values:
        if value is None or value.uses() or value.is_graph_output():
            continue
        drop_unused_initializers([value])
        producer = value.producer()
        if producer is None or producer.graph is None or _has_readers(producer):
            continue
        if any(output.is_graph_output() for output in producer.outputs):
            continue
        inputs = producer.inputs
        producer.graph.remove(producer, safe=True)
        _remove_dead(inputs)
