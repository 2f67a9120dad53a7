"""Which nodes of a graph crossbars can compute, and why the others cannot.

A mapped node is a Conv, ConvTranspose, Gemm or MatMul whose weight is a constant of float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from raqu_onnx.graph_edit import infer_shapes
from raqu_onnx.layout import MappedNode, WeightLayout, Window

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAPPABLE_OPS", "UnmappedNode", "describe_node", "scan"]

MAPPABLE_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# Other operators that multiply by weights, and why they stay in float.
_RECURRENT = "it multiplies its weights by a state that changes inside the operator"
_OTHER_OPS = {
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "Einsum": "it is no Conv, Gemm or MatMul: export it as MatMul to have it mapped",
    "DeformConv": "its window moves with its input",
}


@dataclass(frozen=True)
class UnmappedNode:
    """A node that multiplies by weights and stays as it is: in float, or as another tool quantized it.

    Attributes:
        name: Node name.
        op_type: Its type.
        reason: Why it stays.
    """

    name: str
    op_type: str
    reason: str


def scan(model: ir.Model) -> tuple[list[tuple[ir.Node, MappedNode]], list[UnmappedNode]]:
    """Sort the nodes of mappable types, in graph order, into those mapped and those left in float.

    Nodes in the bodies of If, Loop and Scan stay in float.
    """
    mapped: list[tuple[ir.Node, MappedNode]] = []
    unmapped: list[UnmappedNode] = []
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        name = node.name or ""
        if node.op_type in _OTHER_OPS and any(_is_matrix(value) for value in node.inputs):
            unmapped.append(UnmappedNode(name, node.op_type, _OTHER_OPS[node.op_type]))
        if node.op_type not in MAPPABLE_OPS:
            continue
        if node.graph is not model.graph:
            unmapped.append(UnmappedNode(name, node.op_type, "it lies in the body of a control-flow node"))
            continue
        found = describe_node(node)
        if isinstance(found, MappedNode):
            mapped.append((node, found))
        else:
            unmapped.append(UnmappedNode(name, node.op_type, found))
    return _with_true_rows(model, mapped), unmapped


def _with_true_rows(model: ir.Model, mapped: list[tuple[ir.Node, MappedNode]]) -> list[tuple[ir.Node, MappedNode]]:
    """Correct the MVMs of matrix products whose first axis is not the samples alone.

    A Reshape to (-1, K) puts tokens there as well. The shapes that the model has for one sample tell how many.
    """
    samples = _samples(model)
    doubtful = {node for node, found in mapped if _mixes_samples(node, found, samples)}
    if not doubtful:
        return mapped
    shapes = _shapes_of_one_sample(model)
    batch = samples if isinstance(samples, int) else 1
    corrected = []
    for node, found in mapped:
        if node in doubtful:
            size = _positions(shapes.get(found.output_name), 0)
            # Each MVM gives one number per kernel.
            mvms = None if size is None else max(1, size // found.layout.kernels // max(1, batch))
            found = replace(found, mvms=mvms)
        corrected.append((node, found))
    return corrected


def _mixes_samples(node: ir.Node, found: MappedNode, samples: int | str | None) -> bool:
    """Whether the first axis of a product's output may hold more than the samples (rows of the left operand do)."""
    if found.window is not None or found.input_transposed:
        return False
    shape = node.outputs[0].shape
    if found.constant_left and shape is not None and len(shape) < 3:
        return False
    return samples is None or _first(shape) != samples


def _first(shape: ir.Shape | None) -> int | str | None:
    if not shape:
        return None
    first = shape[0]
    return first if isinstance(first, int) else first.value


def _samples(model: ir.Model) -> int | str | None:
    """The first axis of what is fed: a number, the name of a dimension, or None where it is unknown."""
    fed = (value.shape for value in model.graph.inputs if not value.is_initializer())
    return next((_first(shape) for shape in fed if shape), None)


def _shapes_of_one_sample(model: ir.Model) -> dict[str, ir.Shape]:
    """Shapes by name of what the nodes of the main graph compute, with one sample fed where the batch is free."""
    copy = model.clone()
    samples = _samples(model)
    for value in copy.graph.inputs:
        if value.shape is not None and not value.is_initializer():
            names = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            free = [not isinstance(name, int) and name == samples for name in names]
            # Without names, only the first axis can be told to be the samples.
            known = [axis == 0 if samples is None else True for axis in range(len(names))]
            value.shape = ir.Shape([1 if f and k else n for n, f, k in zip(names, free, known, strict=True)])
    for node in copy.graph:
        for output in node.outputs:
            output.shape = None
    infer_shapes(copy)
    outputs = (output for node in copy.graph for output in node.outputs)
    return {output.name: output.shape for output in outputs if output.name and output.shape is not None}


def describe_node(node: ir.Node, weight_type: ir.DataType = ir.DataType.FLOAT) -> MappedNode | str:
    """Read one Conv, ConvTranspose, Gemm or MatMul; a string says why it cannot be mapped.

    Args:
        node: A node of one of these types.
        weight_type: The type that its weight has to be of.
    """
    describe: Callable[[ir.Node], MappedNode | str] = {
        "Conv": _describe_conv,
        "ConvTranspose": _describe_conv,
        "Gemm": _describe_gemm,
        "MatMul": _describe_matmul,
    }[node.op_type]
    found = describe(node)
    if isinstance(found, MappedNode):
        slot = 0 if found.constant_left else 1
        tensor = _constant(node.inputs[slot])
        if tensor is not None and tensor.dtype != weight_type:
            what = {"Gemm": "operand B", "MatMul": ("first operand", "second operand")[slot]}.get(
                node.op_type, "weight"
            )
            return f"its {what} is {tensor.dtype.name.lower()}, only float (32 bits) is mapped"
    return found


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no feed can override."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def _is_matrix(value: ir.Value | None) -> bool:
    """Whether a value is a constant that could be a weight."""
    tensor = _constant(value)
    return tensor is not None and len(tensor.shape) > 1


def _weight_problem(value: ir.Value | None, what: str) -> str | None:
    tensor = _constant(value)
    if tensor is None:
        return f"its {what} is not a constant"
    if math.prod(tensor.shape.numpy()) == 0:
        return f"its {what} is empty"
    return None


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return default if attribute is None else tuple(int(v) for v in attribute.as_ints())


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def _value_name(value: ir.Value | None) -> str:
    return value.name or "" if value is not None else ""


def _describe_conv(node: ir.Node) -> MappedNode | str:
    weight = node.inputs[1]
    problem = _weight_problem(weight, "weight")
    if problem or weight is None or weight.const_value is None:
        return problem or "its weight is missing"
    shape = weight.const_value.shape.numpy()
    rank = len(shape) - 2
    if rank < 1:
        return f"its weight has {len(shape)} dimensions, a convolution has at least 3"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and _constant(bias) is None:
        return "its bias is not a constant"
    groups = _int(node, "group", 1)
    transposed = node.op_type == "ConvTranspose"
    if shape[0] % groups:
        return f"its {shape[0]} channels do not divide into {groups} groups"
    auto_pad = node.attributes.get("auto_pad")
    window = Window(
        kernel=tuple(shape[2:]),
        strides=_ints(node, "strides", (1,) * rank),
        dilations=_ints(node, "dilations", (1,) * rank),
        pads=_ints(node, "pads", (0,) * (2 * rank)),
        auto_pad="NOTSET" if auto_pad is None else auto_pad.as_string(),
        output_padding=_ints(node, "output_padding", (0,) * rank) if transposed else (),
        output_shape=_ints(node, "output_shape", ()) or None if transposed else None,
        transposed=transposed,
    )
    if window.output_shape is not None:
        # onnx's shape inference is off where auto_pad is set as well.
        mvms: int | None = math.prod(window.output_shape[-rank:])
    else:
        mvms = _positions(node.outputs[0].shape, 2)
    return MappedNode(
        name=node.name or "",
        op_type=node.op_type,
        input_name=_value_name(node.inputs[0]),
        weight_name=_value_name(weight),
        bias_name=_value_name(bias) or None,
        output_name=_value_name(node.outputs[0]),
        layout=WeightLayout("conv-transpose" if transposed else "conv", tuple(shape), groups),
        window=window,
        mvms=mvms,
    )


def _describe_gemm(node: ir.Node) -> MappedNode | str:
    weight = node.inputs[1]
    problem = _weight_problem(weight, "operand B")
    if problem or weight is None or weight.const_value is None:
        return problem or "its operand B is missing"
    shape = tuple(weight.const_value.shape.numpy())
    layout = WeightLayout("out-in" if _int(node, "transB", 0) else "in-out", shape)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    for name in ("alpha", "beta"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.as_float() != 1.0:
            return f"its {name} is not folded into the constants: run normalize-gemm first"
    if bias is not None:
        constant = _constant(bias)
        if constant is None:
            return "its operand C is not a constant: run normalize-gemm first"
        if constant.shape.numpy() != (layout.kernels,):
            return "its operand C is not a vector: run normalize-gemm first"
    return MappedNode(
        name=node.name or "",
        op_type="Gemm",
        input_name=_value_name(node.inputs[0]),
        weight_name=_value_name(weight),
        bias_name=_value_name(bias) or None,
        output_name=_value_name(node.outputs[0]),
        layout=layout,
        input_transposed=bool(_int(node, "transA", 0)),
        mvms=_rows_per_sample(node),
    )


def _describe_matmul(node: ir.Node) -> MappedNode | str:
    left, right = node.inputs[0], node.inputs[1]
    constant_left = _constant(left) is not None
    if constant_left and _constant(right) is not None:
        return "both operands are constants"
    weight, activation = (left, right) if constant_left else (right, left)
    problem = _weight_problem(weight, "second operand" if not constant_left else "first operand")
    if problem or weight is None or weight.const_value is None:
        return problem or "neither operand is a constant"
    shape = tuple(weight.const_value.shape.numpy())
    if len(shape) > 2:
        return f"its constant has batch dimensions ({len(shape)} dimensions)"
    if len(shape) < 2:
        return "its constant is a vector"
    if activation is not None and activation.shape is not None and len(activation.shape) < 2:
        return "its activation is a vector"
    return MappedNode(
        name=node.name or "",
        op_type="MatMul",
        input_name=_value_name(activation),
        weight_name=_value_name(weight),
        bias_name=None,
        output_name=_value_name(node.outputs[0]),
        layout=WeightLayout("out-in" if constant_left else "in-out", shape),
        constant_left=constant_left,
        mvms=_columns_per_sample(node) if constant_left else _rows_per_sample(node),
    )


def _positions(shape: ir.Shape | None, start: int) -> int | None:
    """Product of the dimensions from `start` on, None where one is unknown."""
    if shape is None:
        return None
    sizes = [size for size in shape[start:] if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(shape) - start else None


def _rows_per_sample(node: ir.Node) -> int | None:
    """Rows of the left operand for one sample: all dimensions but the first (the samples) and the last."""
    shape = node.outputs[0].shape
    return None if shape is None else _positions(ir.Shape(shape[:-1]), 1)


def _columns_per_sample(node: ir.Node) -> int | None:
    """Columns of the right operand: all dimensions but the samples and the constant's rows."""
    shape = node.outputs[0].shape
    if shape is None or len(shape) < 2:
        return None
    if len(shape) == 2:
        return _positions(shape, 1)
    return _positions(ir.Shape([*shape[:-2], shape[-1]]), 1)
