"""The first pass: a model in the form that all later passes expect."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from raqu_onnx.already_quantized import protect
from raqu_onnx.graph_edit import (
    Names,
    all_graphs,
    append_node,
    infer_shapes,
    name_nodes,
    weight_values,
)
from raqu_onnx.opset import ensure_opset, inline_functions
from raqu_onnx.passes.fold_batchnorm import FoldBatchNormPass
from raqu_onnx.passes.fold_constants import FoldConstantsPass
from raqu_onnx.passes.fuse_matmul_bias import FuseMatMulBiasPass
from raqu_onnx.passes.normalize_gemm import NormalizeGemmPass
from raqu_onnx.passes.widen_half import WidenHalfPass

__all__ = ["TidyPass"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TidyPass(ir.passes.InPlacePass):
    """Fold what is constant, so that every layer is one node with its weight and bias as initializers.

    Before (opset 11)::

        w  = Constant <value = float[9, 8]>
        wt = Transpose (w)
        c  = Gemm <alpha = 0.5> (x, wt, b)
        i  = Identity (c)
        y  = BatchNormalization (i, scale, B, mean, var)

    After (opset 13)::

        y  = Gemm (x, W, b')

    In this order: weights stop being optional inputs, local functions are inlined, the opset is raised or lowered,
    constants are folded, Identity nodes are read through, every node gets a name of its own, Gemm is normalized,
    BatchNormalization is folded, shapes are inferred, a MatMul takes up the bias behind it, and layers of float16
    compute in float. What the user sees stays: names, types and dynamic dimensions of the inputs to feed and of the
    outputs, metadata, and the nodes that nothing was folded into.

    Attributes:
        minimum_opset: An older model is raised to this opset.
        maximum_opset: A newer model is lowered to this opset, or refused.
        max_growth_bytes: See `FoldConstantsPass`.
        exclude: Patterns of nodes that stay as they are: weights behind their DequantizeLinear, a Gemm of any form, a
            BatchNormalization behind a layer, layers of float16, a MatMul with a bias behind it.
    """

    minimum_opset: int = 13
    maximum_opset: int = 27
    max_growth_bytes: int = 1 << 20
    exclude: tuple[str, ...] = ()

    name: ClassVar[str] = "tidy"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Tidy in place.

        Raises:
            ModelError: If a local function cannot be inlined or the opset cannot be changed.
        """
        modified = _fix_weights_that_are_inputs(model)
        modified |= inline_functions(model)
        modified |= ensure_opset(model, self.minimum_opset, self.maximum_opset)
        protect(model, self.exclude)
        modified |= FoldConstantsPass(self.max_growth_bytes)(model).modified
        modified |= _read_through_identities(model)
        # Before nodes change their type: what they are called must not depend on what is excluded.
        modified |= name_nodes(model)
        modified |= NormalizeGemmPass(self.exclude)(model).modified
        modified |= FoldBatchNormPass(self.exclude)(model).modified
        # Only shapes tell a stack of matrices from a matrix.
        modified |= infer_shapes(model)
        # While nothing stands between a MatMul and its bias, as the Casts of a layer of float16 will.
        modified |= FuseMatMulBiasPass(self.exclude)(model).modified
        modified |= WidenHalfPass(self.exclude)(model).modified
        modified |= _set_outputs_apart(model)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """The opset is in range and node names are unique.

        Raises:
            PostconditionError: If not.
        """
        if not self.minimum_opset <= model.opset_imports[""] <= self.maximum_opset:
            raise ir.passes.PostconditionError(f"opset {model.opset_imports['']} is out of range")
        names = [node.name for graph in all_graphs(model.graph) for node in graph]
        if len(set(names)) != len(names) or not all(names):
            raise ir.passes.PostconditionError("node names are not unique")


def _fix_weights_that_are_inputs(model: ir.Model) -> bool:
    """Take weights out of the list of graph inputs, where old exporters put them.

    Before IR version 4 every initializer had to be listed there; later, one that is listed may be overridden by the
    caller, so only those that end as weights are taken out: what goes into crossbars cannot change between runs.
    """
    inputs = model.graph.inputs
    defaults = [value for value in inputs if value.is_initializer()]
    if not defaults:
        return False
    fixed = set(defaults) if model.ir_version < 4 else weight_values(model).intersection(defaults)
    if not fixed:
        return False
    kept = [value for value in inputs if value not in fixed]
    inputs.clear()
    inputs.extend(kept)
    model.ir_version = max(model.ir_version, 4)
    _logger.info("%d weights are no longer optional graph inputs", len(fixed))
    return True


def _read_through_identities(model: ir.Model) -> bool:
    """Remove Identity nodes, except those that give a graph output its name."""
    modified = False
    for graph in tuple(all_graphs(model.graph)):
        for node in tuple(graph):
            if node.op_type != "Identity" or node.domain != "" or len(node.inputs) != 1:
                continue
            source, output = node.inputs[0], node.outputs[0]
            if source is None or output.is_graph_output():
                continue
            output.replace_all_uses_with(source)
            graph.remove(node, safe=True)
            modified = True
    return modified


def _set_outputs_apart(model: ir.Model) -> bool:
    """Let an Identity give a graph output that is also one side of a sum of two convolutions.

    onnxruntime fuses such a sum into one of the convolutions and then misses the output: the model would not load.
    The same for an output that a Transpose reads: where the transposed values are quantized, onnxruntime moves the
    quantizer in front of the Transpose, and the output comes out quantized as well.
    """
    names = Names(model)
    modified = False
    for value in tuple(model.graph.outputs):
        layer = value.producer()
        transposes = [(reader, index) for reader, index in value.uses() if reader.op_type == "Transpose"]
        if layer is not None and value is layer.outputs[0] and transposes:
            append_node(layer, "Identity", [], names, f"{layer.name}_output")
            for reader, index in transposes:
                reader.replace_input_with(index, value)
            modified = True
    for add in tuple(model.graph):
        if add.op_type != "Add" or add.domain != "":
            continue
        layers = [None if value is None else value.producer() for value in add.inputs]
        if any(layer is None or layer.op_type != "Conv" for layer in layers):
            continue
        for layer in dict.fromkeys(layers):
            if layer is not None and layer.outputs[0].is_graph_output():
                append_node(layer, "Identity", [], names, f"{layer.name}_output")
                modified = True
    return modified
