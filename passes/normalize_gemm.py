"""Gemm in the one form that the rest of the pipeline knows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from raqu_onnx.already_quantized import excluded_names
from raqu_onnx.graph_edit import (
    Names,
    add_initializer,
    all_finite,
    append_node,
    constant_array,
    constant_tensor,
    drop_unused_initializers,
    graph_of,
    is_float,
    nodes_of_type,
    replace_constant,
    require_opset,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NormalizeGemmPass"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NormalizeGemmPass(ir.passes.InPlacePass):
    """Leave `Y = A' * B' + c` of every Gemm with a constant operand: alpha = beta = 1, `c` a constant per column.

    Before::

        y = Gemm <alpha = 2.0, beta = 0.5> (x, W, C)

    After, where `C` is constant and varies along the columns at most::

        y = Gemm (x, 2 * W, 0.5 * C as a vector)

    A `C` that varies along the rows, or is no constant, is added by a node of its own::

        y_gemm = Gemm (x, 2 * W)
        y = Add (y_gemm, Mul (C, 0.5))

    A Gemm with the constant on the left becomes a MatMul that keeps the node's name and metadata::

        y_matmul = MatMul (2 * transposed A, Transpose (B))
        y = Add (y_matmul, ...)

    A Gemm of two variables stays, and so does one whose folded weight its type cannot hold.

    Attributes:
        exclude: Patterns of nodes that stay as they are.
    """

    exclude: tuple[str, ...] = ()

    name: ClassVar[str] = "normalize-gemm"

    def requires(self, model: ir.Model) -> None:
        """Needs opset 11, from which on Gemm may go without C.

        Raises:
            PreconditionError: If the model's opset is older.
        """
        require_opset(model, 11, self.name)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        excluded = excluded_names(model, self.exclude)
        names = Names(model)
        modified = False
        for node in nodes_of_type(model, "Gemm"):
            modified |= node.name not in excluded and _normalize(node, names)
        return ir.passes.PassResult(model, modified)


def _normalize(gemm: ir.Node, names: Names) -> bool:
    left, right = gemm.inputs[:2]
    weight = constant_tensor(right)
    if weight is not None:
        return is_float(weight) and _constant_right(gemm, weight.numpy(), names)
    weight = constant_tensor(left)
    if weight is not None and right is not None:
        return is_float(weight) and _constant_left(gemm, weight.numpy(), right, names)
    return False


def _constant_right(gemm: ir.Node, weight: NDArray[Any], names: Names) -> bool:
    alpha = gemm.attributes.get_float("alpha", 1.0)
    beta = gemm.attributes.get_float("beta", 1.0)
    scaled = _scaled(weight, alpha)
    if scaled is None:
        _logger.info("%s stays: alpha times its weight overflows %s", gemm.name, weight.dtype)
        return False
    addend = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    columns = weight.shape[0 if gemm.attributes.get_int("transB", 0) else 1]
    vector = _column_vector(addend, beta, columns)
    settled = addend is None or (vector is not None and addend.shape == vector.shape)
    if alpha == 1.0 and beta == 1.0 and settled:
        return False
    stem = gemm.name or gemm.outputs[0].name or "gemm"
    if alpha != 1.0:
        _replace(gemm, 1, scaled, names, f"{stem}.weight")
    if addend is not None and beta != 0.0 and vector is not None:
        if beta != 1.0 or addend.shape != vector.shape:
            _replace(gemm, 2, vector, names, f"{stem}.bias")
    elif addend is not None:
        gemm.resize_inputs(2)
        _add(gemm, addend, beta, weight.dtype, names)
    for key in ("alpha", "beta"):
        gemm.attributes.pop(key, None)
    return True


def _constant_left(gemm: ir.Node, weight: NDArray[Any], other: ir.Value, names: Names) -> bool:
    alpha = gemm.attributes.get_float("alpha", 1.0)
    beta = gemm.attributes.get_float("beta", 1.0)
    scaled = _scaled(weight, alpha)
    if scaled is None:
        _logger.info("%s stays: alpha times its weight overflows %s", gemm.name, weight.dtype)
        return False
    stem = gemm.name or gemm.outputs[0].name or "gemm"
    transposed = bool(gemm.attributes.get_int("transA", 0))
    if transposed or alpha != 1.0:
        array = np.ascontiguousarray(scaled.T) if transposed else scaled
        _replace(gemm, 0, array, names, f"{stem}.weight")
    if gemm.attributes.get_int("transB", 0):
        gemm.replace_input_with(1, _transposed(gemm, other, names, stem))
    addend = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    gemm.resize_inputs(2)
    gemm.op_type = "MatMul"
    gemm.attributes.clear()
    if addend is not None:
        _add(gemm, addend, beta, weight.dtype, names)
    return True


def _scaled(array: NDArray[Any], factor: float) -> NDArray[Any] | None:
    """`factor * array` by way of double precision; None where the array's type cannot hold it."""
    if factor == 1.0:
        return array
    with np.errstate(over="ignore"):
        result = (array.astype(np.float64) * factor).astype(array.dtype)
    return result if all_finite(result) else None


def _column_vector(addend: ir.Value | None, beta: float, columns: int) -> NDArray[Any] | None:
    """`beta * C` as a vector of one number per column, shape (N,); None where C varies or varies along the rows."""
    array = constant_array(addend)
    if array is None or array.ndim > 2:
        return None
    if array.ndim == 2 and array.shape[0] != 1:
        return None
    scaled = _scaled(array, beta)
    return None if scaled is None else np.broadcast_to(scaled.reshape(-1), (columns,)).copy()


def _replace(node: ir.Node, index: int, array: NDArray[Any], names: Names, wanted: str) -> None:
    old = node.inputs[index]
    replace_constant(node, index, array, names, wanted)
    drop_unused_initializers([old])


def _transposed(gemm: ir.Node, value: ir.Value, names: Names, stem: str) -> ir.Value:
    """The value behind a Transpose node put in front of the Gemm."""
    permutation = ir.AttrInt64s("perm", [1, 0])
    node = ir.Node("", "Transpose", [value], [permutation], name=names.fresh(f"{stem}_transpose"))
    output = node.outputs[0]
    output.name = names.fresh(f"{value.name}_transposed")
    output.type = value.type
    if value.shape is not None and len(value.shape) == 2:
        output.shape = ir.Shape([value.shape[1], value.shape[0]])
    graph_of(gemm).insert_before(gemm, node)
    return output


def _add(product: ir.Node, addend: ir.Value, beta: float, dtype: np.dtype[Any], names: Names) -> None:
    """Add `beta * C` behind the product; nothing where beta is 0. C was taken off the product already."""
    if beta == 0.0:
        drop_unused_initializers([addend])
        return
    graph = graph_of(product)
    stem = product.name or product.outputs[0].name or "gemm"
    array = constant_array(addend)
    scaled = None if array is None else _scaled(array, beta)
    added = append_node(product, "Add", [addend], names, f"{stem}_add")
    if beta == 1.0:
        return
    if scaled is not None:
        _replace(added, 1, scaled, names, f"{stem}.bias")
        return
    factor = np.asarray(beta, dtype)
    scale = ir.Node(
        "",
        "Mul",
        [addend, add_initializer(graph, names.fresh(f"{stem}_beta"), factor)],
        name=names.fresh(f"{stem}_scale"),
    )
    scale.outputs[0].name = names.fresh(f"{stem}_scaled")
    scale.outputs[0].type = addend.type
    scale.outputs[0].shape = addend.shape
    graph.insert_before(added, scale)
    added.replace_input_with(1, scale.outputs[0])
