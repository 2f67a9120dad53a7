"""Models on their way into onnxruntime: structure as a message, weights by reference.

A protobuf message cannot be larger than 2 GiB, and turning weights into bytes and back costs time and memory at any
size. So large weights stay where they are (in memory, or mapped from their external file) and are handed to onnxruntime
beside the message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from raqu_onnx.errors import ModelError
from raqu_onnx.model_io import LARGEST_PROTO, internalize, weight_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnxruntime as ort
    from numpy.typing import NDArray

__all__ = ["SessionModel", "session_model", "with_outputs"]

# Smaller tensors stay in the message: optimizers look at their values, and each reference has a cost of its own.
_LARGE_BYTES = 1 << 16
# Stands for the file in external references; nothing ever opens it.
_NOWHERE = "weights-in-memory"


@dataclass(frozen=True)
class SessionModel:
    """A model without its large weights, and those weights.

    Attributes:
        proto: The model; large initializers of its main graph refer to `weights`. It may be changed freely.
        weights: Those tensors by name.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, ir.TensorProtocol]

    def hand_over(self, options: ort.SessionOptions) -> tuple[bytes, list[NDArray[Any]]]:
        """Give the weights that the message still names to a session about to be opened.

        Args:
            options: The session's options, for one session only.

        Returns:
            The bytes to open it from, and arrays that must live at least until then.

        Raises:
            ModelError: A weight cannot be read.
        """
        import numpy as np
        from onnxruntime import OrtValue

        names = [item.name for item in self.proto.graph.initializer if item.name in self.weights]
        try:
            arrays = [np.ascontiguousarray(self.weights[name].numpy()) for name in names]
        except (OSError, ValueError) as error:
            raise ModelError(f"model: its weights cannot be read: {error}") from error
        if names:
            options.add_external_initializers(names, [OrtValue.ortvalue_from_numpy(array) for array in arrays])
        return self.proto.SerializeToString(), arrays


def session_model(model: ir.Model) -> SessionModel:
    """Make a model ready for `raqu_onnx.evaluation.make_session`; the weights are not read.

    Args:
        model: Left unchanged.

    Raises:
        ModelError: What cannot be handed over by reference (bodies of control flow, Constant nodes, types that numpy
            does not have) is too large for a message.
    """
    copy = model.clone()
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in copy.graph.initializers.items():
        if value.const_value is not None and _by_reference(value.const_value):
            weights[name] = value.const_value
            value.const_value = None
    rest = weight_bytes(copy)
    if rest > LARGEST_PROTO:
        raise ModelError(
            f"model: {rest:,} bytes of constants in nodes and bodies do not fit into one message (2 GiB): "
            "store them as initializers of the main graph"
        )
    internalize(copy, initializers=True)
    for name, tensor in weights.items():
        copy.graph.initializers[name].const_value = ir.ExternalTensor(
            _NOWHERE, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    return SessionModel(ir.serde.serialize_model(copy), weights)


def with_outputs(model: ir.Model, names: Iterable[str]) -> SessionModel:
    """Like `session_model`, with more values as outputs; those that are inputs or outputs already stay as they are.

    Raises:
        ModelError: As above.
    """
    source = session_model(model)
    graph = source.proto.graph
    present = {value.name for value in (*graph.output, *graph.input)}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return source


def _by_reference(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8 or tensor.nbytes < _LARGE_BYTES:
        return False
    # Not what numpy knows through ml_dtypes only (2), of which one float of 8 bits says that its kind is "f".
    dtype = tensor.dtype.numpy()
    return dtype.isbuiltin != 2 and dtype.kind in "biuf"
