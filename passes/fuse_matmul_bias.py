"""A MatMul and the bias that is added behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from raqu_onnx.already_quantized import excluded_names
from raqu_onnx.graph_edit import (
    Names,
    add_initializer,
    constant_array,
    constant_tensor,
    drop_unused_initializers,
    graph_of,
    is_float,
    name_of,
    nodes_of_type,
    require_opset,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FuseMatMulBiasPass"]


@dataclass(frozen=True)
class FuseMatMulBiasPass(ir.passes.InPlacePass):
    """Make a linear layer of a MatMul and the constant vector that is added to its columns.

    Before, with a constant `W` and matrices `x`::

        y = Add (MatMul (x, W), b)

    After, under the MatMul's name::

        y = Gemm (x, W, b)

    The layer then has a bias, which takes up the mean error of its quantized weights. Stacks of matrices have no Gemm:
    there the vector gets as many dimensions as the sum has. onnxruntime makes a Gemm of either pair itself, and once
    the operands are integers it rounds a vector `b` to steps of input scale times weight scale, which destroys a bias
    that is small against them, or so large that 32 bits do not hold it.

    Attributes:
        exclude: Patterns of nodes that stay as they are.
    """

    exclude: tuple[str, ...] = ()

    name: ClassVar[str] = "fuse-matmul-bias"

    def requires(self, model: ir.Model) -> None:
        """Needs opset 7, from which on Gemm broadcasts its bias by itself.

        Raises:
            PreconditionError: If the model's opset is older.
        """
        require_opset(model, 7, self.name)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        names = Names(model)
        excluded = excluded_names(model, self.exclude)
        modified = False
        for node in tuple(nodes_of_type(model, "MatMul")):
            modified |= node.name not in excluded and _fuse(node, names)
        return ir.passes.PassResult(model, modified)


def _fuse(product: ir.Node, names: Names) -> bool:
    x, weight = product.inputs
    inner = product.outputs[0]
    tensor = constant_tensor(weight)
    if x is None or x.shape is None or tensor is None or not is_float(tensor) or len(tensor.shape) != 2:
        return False
    readers = list(inner.uses())
    if len(readers) != 1 or inner.is_graph_output() or len(x.shape) < 2:
        return False
    added, slot = readers[0]
    # A Sum of two is an Add.
    if added.op_type not in ("Add", "Sum") or len(added.inputs) != 2 or added.domain != "":
        return False
    if graph_of(added) is not graph_of(product):
        return False
    addend = added.inputs[1 - slot]
    vector = _column_vector(constant_array(addend), tensor.numpy())
    if addend is None or vector is None:
        return False
    if len(x.shape) == 2:
        _make_gemm(product, added, addend, vector, names)
        return True
    return _widen(added, 1 - slot, addend, len(x.shape), names)


def _column_vector(array: NDArray[Any] | None, weight: NDArray[Any]) -> NDArray[Any] | None:
    """One number per column, shape (N,); None where the constant varies along the rows, or adds dimensions."""
    columns = weight.shape[1]
    if array is None or array.ndim > 2 or array.dtype != weight.dtype or array.size not in (1, columns):
        return None
    if array.ndim > 0 and array.shape[-1] != array.size:
        return None
    return np.broadcast_to(array.reshape(-1), (columns,)).copy()


def _make_gemm(product: ir.Node, added: ir.Node, addend: ir.Value, vector: NDArray[Any], names: Names) -> None:
    graph = graph_of(product)
    bias = addend
    if addend.shape != vector.shape:
        bias = add_initializer(graph, names.fresh(f"{product.name or 'gemm'}.bias"), vector)
    inner, outer = product.outputs[0], added.outputs[0]
    name = name_of(outer)
    for reader, index in tuple(outer.uses()):
        reader.replace_input_with(index, inner)
    for index, output in enumerate(graph.outputs):
        if output is outer:
            graph.outputs[index] = inner
    inner.shape, inner.type, inner.doc_string = outer.shape or inner.shape, outer.type or inner.type, outer.doc_string
    inner.metadata_props.update(outer.metadata_props)
    product.op_type = "Gemm"
    product.resize_inputs(3)
    product.replace_input_with(2, bias)
    graph.remove(added, safe=True)
    inner.name = name
    drop_unused_initializers([addend])


def _widen(added: ir.Node, slot: int, addend: ir.Value, rank: int, names: Names) -> bool:
    array = constant_array(addend)
    if array is None or array.ndim != 1:
        return False
    wide = array.reshape((1,) * (rank - 1) + array.shape)
    added.replace_input_with(slot, add_initializer(graph_of(added), names.fresh(f"{addend.name}_wide"), wide))
    drop_unused_initializers([addend])
    return True
