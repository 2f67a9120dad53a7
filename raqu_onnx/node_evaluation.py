"""Computing one node of a graph whose inputs are all constants."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx_ir as ir

from raqu_onnx.graph_edit import constant_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["evaluate_node", "output_bytes"]

_logger = logging.getLogger(__name__)

# Inputs up to this many elements are shown to shape inference as data: they are shapes, axes, repeats.
_SHAPE_DATA = 1024


def _one_node(node: ir.Node) -> onnx.NodeProto:
    """The node with inputs renamed to i0, i1, ... and outputs to o0, o1, ...: some names occur twice or not at all."""
    proto = ir.serde.serialize_node(node)
    del proto.input[:], proto.output[:]
    proto.input.extend("" if value is None else f"i{k}" for k, value in enumerate(node.inputs))
    proto.output.extend(f"o{k}" for k in range(len(node.outputs)))
    return proto


def output_bytes(node: ir.Node, opset: int, ir_version: int) -> int | None:
    """Size of all outputs as ONNX shape inference tells it, None where it cannot."""
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for k, value in enumerate(node.inputs):
        tensor = constant_tensor(value)
        if tensor is None:
            continue
        shape = tensor.shape.numpy()
        types[f"i{k}"] = onnx.helper.make_tensor_type_proto(tensor.dtype.value, shape)
        if tensor.size <= _SHAPE_DATA:
            data[f"i{k}"] = ir.serde.serialize_tensor(tensor)
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, opset, ""),
            _one_node(node),
            types,
            data,
            opset_imports=[onnx.helper.make_opsetid("", opset)],
            ir_version=ir_version,
        )
    except Exception as error:  # noqa: BLE001 - the C++ binding raises whatever the operator's function throws
        _logger.debug("%s: no shape inferred: %s", node.name, error)
        return None
    total = 0
    for k in range(len(node.outputs)):
        kind = inferred.get(f"o{k}", onnx.TypeProto())
        shape_ = ir.serde.deserialize_type_proto_for_shape(kind)
        if shape_ is None or not shape_.is_static() or not kind.tensor_type.elem_type:
            return None
        element = ir.DataType(kind.tensor_type.elem_type)
        total += int(np.prod(shape_.numpy(), dtype=np.float64) * element.itemsize)
    return total


def evaluate_node(node: ir.Node, opset: int) -> list[NDArray[Any]] | None:
    """Run one node whose inputs are all constants; None where onnxruntime cannot.

    Returns:
        One array per output.
    """
    import onnxruntime as ort

    feeds: dict[str, Any] = {}
    inputs: list[onnx.ValueInfoProto] = []
    packed: list[onnx.TensorProto] = []
    for k, value in enumerate(node.inputs):
        tensor = constant_tensor(value)
        if tensor is None:
            continue
        if tensor.dtype == ir.DataType.STRING:
            return None  # text is no weight
        if tensor.dtype.bitwidth < 8:  # packed integers cannot be fed
            packed.append(ir.serde.serialize_tensor(tensor))
            packed[-1].name = f"i{k}"
            continue
        feeds[f"i{k}"] = _ort_value(tensor)
        inputs.append(onnx.helper.make_tensor_value_info(f"i{k}", tensor.dtype.value, list(tensor.shape.numpy())))
    proto = _one_node(node)
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output]
    graph = onnx.helper.make_graph([proto], "constant", inputs, outputs, packed)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    quiet = ort.RunOptions()
    quiet.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        results = session.run_with_ort_values(None, feeds, quiet)
        arrays = [result.numpy() for result in results]
    except Exception as error:  # noqa: BLE001 - onnxruntime's errors share no public base class
        _logger.info("%s (%s) is constant but was not folded: %s", node.name, node.op_type, error)
        return None
    plain = all(isinstance(a, np.ndarray) and _is_plain(a.dtype) for a in arrays)
    return cast("list[NDArray[Any]]", arrays) if plain else None


def _ort_value(tensor: ir.TensorProtocol) -> Any:
    from onnxruntime import OrtValue

    array = np.ascontiguousarray(tensor.numpy()).reshape(tensor.shape.numpy())
    if _is_plain(array.dtype):
        return OrtValue.ortvalue_from_numpy(array)
    # bfloat16 and the 8-bit floats, which numpy knows through ml_dtypes only.
    bits = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)
    return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, tensor.dtype.value)


def _is_plain(dtype: np.dtype[Any]) -> bool:
    # 2 stands for types that others registered, as ml_dtypes does; one float of 8 bits among them says kind "f".
    return dtype.isbuiltin != 2 and dtype.kind in "biufc"
