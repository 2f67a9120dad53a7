"""What a run holds in memory: tensors as arrays, and nothing that was freed."""

from __future__ import annotations

import gc
import sys
from typing import TypeGuard

import onnx_ir as ir

from raqu_onnx.graph_edit import model_graphs

__all__ = ["in_memory", "leave_message", "release_freed"]


def leave_message(model: ir.Model) -> None:
    """Make arrays of all tensors that lie in a protobuf message: each reading of those copies their bytes.

    Args:
        model: A model that was read from a message, which is freed once no tensor lies in it any more.
    """
    for graph in model_graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if _lies_in_message(tensor):
                value.const_value = in_memory(tensor)
        for node in graph:
            for key, attribute in tuple(node.attributes.items()):
                if _lies_in_message(attribute.value):
                    node.attributes[key] = ir.AttrTensor(key, in_memory(attribute.value))


def _lies_in_message(tensor: object) -> TypeGuard[ir.TensorProtocol]:
    return isinstance(tensor, ir.serde.TensorProtoTensor) and tensor.dtype != ir.DataType.STRING


def in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same tensor as an array of its own."""
    return ir.Tensor(
        tensor.numpy(),
        dtype=tensor.dtype,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def release_freed() -> None:
    """Give freed memory back to the system; does nothing where the C library is not glibc.

    Cycles of objects, as models are, are freed first. Once a program has freed a large array, glibc serves arrays of
    that size from its heap, and what is freed there stays with the process: a run then holds several times what is
    alive.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
