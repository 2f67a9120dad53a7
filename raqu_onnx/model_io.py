"""Reading and writing ONNX models.

What comes from a file is not trusted: every failure is a `ModelError` of one line, and external data is opened only
after its path proved to lie in the model's own folder. Weights in external files stay on disk until they are needed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from raqu_onnx.data_base import InputSpec
from raqu_onnx.errors import ModelError, OutputError
from raqu_onnx.external_files import external_problem, nearest_file
from raqu_onnx.graph_edit import all_finite, model_graphs, one_line, weight_values
from raqu_onnx.memory import in_memory, leave_message

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "LARGEST_PROTO",
    "internalize",
    "load_model",
    "model_digest",
    "model_inputs",
    "save_model",
    "to_proto",
    "weight_bytes",
]

#: Bytes of weights that one file holds: a protobuf message cannot be larger than 2 GiB, the rest is for the graph.
LARGEST_PROTO = 1_900_000_000
# Tensors up to this size stay in the ONNX file when the others go into a file of their own.
_SMALL_BYTES = 1024
_READ_BYTES = 1 << 20


def load_model(source: str | Path | onnx.ModelProto | ir.Model, *, check_weights: bool = True) -> ir.Model:
    """Read a model and make sure that it is one.

    Args:
        source: An ONNX file, or a model in memory, which is copied and never changed.
        check_weights: Read all weights and refuse NaN and infinity. Without it, no weight is read: a model with
            external data loads at once whatever its size.

    Returns:
        A model of the caller's own; external data is mapped from disk when it is used.

    Raises:
        ModelError: If the file is missing, unreadable, no ONNX model, cut short or invalid; if external data is
            missing, cut short, or not in the model's folder; if weights are not finite.
    """
    if isinstance(source, ir.Model):
        where = "model"
        model = _copy(source)
    elif isinstance(source, onnx.ModelProto):
        where = "model"
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        model = _deserialized(proto, where)
    elif not isinstance(source, str | Path):
        raise ModelError(f"model of type {type(source).__name__}: give a path, an onnx.ModelProto or an onnx_ir.Model")
    else:
        path = Path(source)
        where = str(source)
        model = _deserialized(_read(path), where)
        _set_folder(model, _folder_of(path))
    _check_external_data(model, where, in_memory=isinstance(source, onnx.ModelProto))
    _check_structure(model, where)
    if check_weights:
        _check_weights(model, where)
        leave_message(model)
    return model


def save_model(model: ir.Model, path: str | Path, *, external_data: bool | None = None) -> None:
    """Write a model; the same model gives the same bytes.

    The file appears under its name only when it is complete.

    Args:
        model: Left unchanged.
        path: The ONNX file; its folder must exist.
        external_data: True puts weights into `<path>.data` beside it, False keeps all in one file, None (default)
            chooses one file up to 1.9 GB.

    Raises:
        OutputError: If the file cannot be written, or one file cannot hold the model.
    """
    path = Path(path)
    size = weight_bytes(model)
    if external_data is None:
        external_data = size > LARGEST_PROTO
    if not external_data and size > LARGEST_PROTO:
        raise OutputError(f"{path}: {size:,} bytes of weights do not fit into one ONNX file (2 GiB): use external data")
    try:
        copy = model.clone()
        internalize(copy, initializers=not external_data)
        if external_data:
            ir.external_data.unload_from_model(
                copy, path.parent, f"{path.name}.data", size_threshold_bytes=_SMALL_BYTES
            )
        _write(path, ir.serde.serialize_model(copy).SerializeToString(deterministic=True))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as one protobuf message that refers to no file, so that a runtime can load its bytes.

    Raises:
        ModelError: If the weights are too large for a message.
    """
    size = weight_bytes(model)
    if size > LARGEST_PROTO:
        raise ModelError(f"model: {size:,} bytes of weights do not fit into one message (2 GiB)")
    copy = model.clone()
    internalize(copy, initializers=True)
    return ir.serde.serialize_model(copy)


def model_digest(source: str | Path | onnx.ModelProto, model: ir.Model | None = None) -> str:
    """SHA-256 of a model as hexadecimal digits.

    Of the file's bytes, followed by those of its external data files in the order of their names; for a message, of
    its deterministic serialization.

    Args:
        source: The file or message.
        model: What `load_model` made of the file, where it is at hand: the file is then not parsed again.

    Raises:
        ModelError: If a file cannot be read, or external data lies outside the model's folder.
    """
    digest = hashlib.sha256()
    if isinstance(source, onnx.ModelProto):
        digest.update(source.SerializeToString(deterministic=True))
        return digest.hexdigest()
    path = Path(source)
    if model is None:
        model = _deserialized(_read(path), str(path))
        _set_folder(model, _folder_of(path))
        _check_external_data(model, str(path), in_memory=False)
    files = {t.path for _, t in _tensors(model) if isinstance(t, ir.ExternalTensor)}
    for file in (path, *map(Path, sorted(files))):
        try:
            with file.open("rb") as stream:
                while piece := stream.read(_READ_BYTES):
                    digest.update(piece)
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def model_inputs(model: ir.Model) -> list[InputSpec]:
    """What a caller has to feed: the graph inputs that have no default (initializer), in the model's order.

    Raises:
        ModelError: If an input is no dense tensor.
    """
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if not isinstance(value.type, ir.TensorType):
            raise ModelError(f"input '{value.name}' is {value.type}: only dense tensors can be fed")
        shape = None
        if value.shape is not None:
            shape = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
        specs.append(InputSpec(value.name or "", np.dtype(value.type.dtype.numpy()), shape))
    return specs


# ---------------------------------------------------------------------------------------------------------- reading


def _read(path: Path) -> onnx.ModelProto:
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size:
            return onnx.load(str(path), format="protobuf", load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file{nearest_file(path)}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except Exception as error:  # protobuf's own, which needs no import of protobuf this way
        raise ModelError(f"{path}: is not an ONNX file, or is cut short; give what your exporter wrote") from error
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"{path}: is a folder, not an ONNX file")
    kind = "empty" if stat.S_ISREG(status.st_mode) else "not a regular file"
    raise ModelError(f"{path}: is {kind}, not an ONNX file")


def _deserialized(proto: onnx.ModelProto, where: str) -> ir.Model:
    """The message as onnx_ir model, after the checks that onnx_ir would only warn about."""
    graph = proto.graph
    if not proto.HasField("graph") or not (graph.node or graph.output or graph.input):
        raise ModelError(f"{where}: is not an ONNX model, or is cut short: it holds no graph")
    if not graph.output:
        raise ModelError(f"{where}: the graph has no outputs (the file may be cut short)")
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known.update(name for node in graph.node for name in node.output)
    missing = [output.name for output in graph.output if output.name not in known]
    if missing:
        raise ModelError(f"{where}: nothing produces the graph output '{missing[0]}'")
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise ModelError(f"{where}: initializer '{name}' is sparse: store it as a dense tensor")
    try:
        return ir.serde.deserialize_model(proto)
    except Exception as error:
        raise ModelError(f"{where}: is not a valid ONNX model: {one_line(error)}") from error


def _copy(model: ir.Model) -> ir.Model:
    if not model.graph.outputs:
        raise ModelError("model: the graph has no outputs")
    try:
        return model.clone()
    except Exception as error:
        raise ModelError(f"model: is not a valid ONNX model: {one_line(error)}") from error


def _folder_of(path: Path) -> Path:
    """Where a model's external data has to lie: beside the path given, also where that is a link."""
    return Path(os.path.abspath(path)).parent  # noqa: PTH100 - resolve() would follow the link


def _set_folder(model: ir.Model, folder: Path) -> None:
    for _, tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = str(folder)


def _tensors(model: ir.Model, *, data_only: bool = False) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Stored tensors with words that say which one it is: initializers and Constant nodes, or really all."""
    for graph in model_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield f"initializer '{value.name}'", value.const_value
        for node in graph:
            if data_only and node.op_type != "Constant":
                continue
            for tensor in _attribute_tensors(node):
                kind = "constant" if node.op_type == "Constant" else f"attribute of {node.op_type}"
                yield f"{kind} '{node.outputs[0].name}'", tensor


def weight_bytes(model: ir.Model) -> int:
    """Size of all tensors of a model, wherever they lie."""
    return sum(tensor.nbytes for _, tensor in _tensors(model))


def _attribute_tensors(node: ir.Node) -> Iterator[ir.TensorProtocol]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            yield attribute.as_tensor()
        elif attribute.type == ir.AttributeType.TENSORS:
            yield from attribute.as_tensors()


# --------------------------------------------------------------------------------------------------------- checking


def _check_external_data(model: ir.Model, where: str, *, in_memory: bool) -> None:
    for label, tensor in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if in_memory:
            raise ModelError(
                f"{where}: {label} lies in the external file '{tensor.location}', and a message has no folder: "
                "give the path of the ONNX file"
            )
        problem = external_problem(tensor)
        if problem:
            raise ModelError(f"{where}: {label}: external data '{tensor.location}' {problem}")


def _check_structure(model: ir.Model, where: str) -> None:
    """Run onnx.checker on the model without its weights, which may be larger than a message can be."""
    newest = onnx.defs.onnx_opset_version()
    if model.opset_imports.get("", 0) > newest:
        raise ModelError(
            f"{where}: is of opset {model.opset_imports['']}, and the installed onnx package knows {newest}: "
            "upgrade onnx, or export the model with an older opset"
        )
    for label, tensor in _tensors(model):
        if isinstance(tensor, ir.serde.TensorProtoTensor) and not _is_complete(tensor):
            raise ModelError(f"{where}: {label} holds more or less data than its shape needs")
    try:
        copy = model.clone()
        for graph in model_graphs(copy):
            _empty_weights(graph)
        # Runtimes take a graph without a name and values without a shape, the checker does not.
        copy.graph.name = copy.graph.name or "main"
        for value in (*copy.graph.inputs, *copy.graph.outputs):
            if value.shape is None and isinstance(value.type, ir.TensorType):
                value.shape = ir.Shape([])
        onnx.checker.check_model(ir.serde.serialize_model(copy))
    except Exception as error:
        raise ModelError(f"{where}: is not a valid ONNX model: {one_line(error)}") from error


def _is_complete(tensor: ir.serde.TensorProtoTensor) -> bool:
    """Whether a message holds as much data as its shape says."""
    proto = tensor.raw
    if proto.HasField("raw_data"):
        return len(proto.raw_data) == tensor.nbytes
    if tensor.dtype.bitwidth < 8 or tensor.dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return True  # packed or paired, and read by nothing here
    stored = len(proto.float_data) + len(proto.int32_data) + len(proto.int64_data)
    return stored + len(proto.double_data) + len(proto.uint64_data) == tensor.size


def _empty_weights(graph: ir.Graph) -> None:
    """Replace stored tensors by empty ones of their type: the checker looks at each tensor by itself."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) or (tensor is not None and tensor.size > _SMALL_BYTES):
            value.const_value = _empty(tensor)
    for node in graph:
        for key, attribute in tuple(node.attributes.items()):
            if attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
                continue
            node.attributes[key] = ir.AttrTensor(key, _empty(attribute.as_tensor()))


def _empty(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor([], shape=ir.Shape([0]), name=tensor.name)
    return ir.Tensor(np.empty(0, tensor.dtype.numpy()), dtype=tensor.dtype, name=tensor.name)


def _check_weights(model: ir.Model, where: str) -> None:
    weights = {id(tensor) for value in weight_values(model) for tensor in _stored(value)}
    for label, tensor in _tensors(model, data_only=True):
        if not tensor.dtype.is_floating_point():
            continue
        try:
            array = tensor.numpy()
        except Exception as error:
            raise ModelError(f"{where}: {label} cannot be read: {one_line(error)}") from error
        if all_finite(array):
            continue
        # An infinity is at home in masks and limits, never in a weight; NaN is at home nowhere.
        if id(tensor) in weights or _has_nan(array):
            raise ModelError(f"{where}: {label} holds NaN or infinity: train or export the model again")


def _stored(value: ir.Value) -> list[ir.TensorProtocol]:
    """The tensor of an initializer or of a Constant node's output."""
    if value.const_value is not None:
        return [value.const_value]
    producer = value.producer()
    return [] if producer is None else list(_attribute_tensors(producer))


def _has_nan(array: np.ndarray[Any, Any]) -> bool:
    return bool(np.isnan(array).any())


# ---------------------------------------------------------------------------------------------------------- writing


def internalize(model: ir.Model, *, initializers: bool) -> None:
    """Read external tensors into the model: those of nodes, and those of initializers too if asked."""
    for graph in model_graphs(model):
        for value in graph.initializers.values() if initializers else ():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = in_memory(value.const_value)
        for node in graph:
            for key, attribute in tuple(node.attributes.items()):
                if isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[key] = ir.AttrTensor(key, in_memory(attribute.value))


def _write(path: Path, data: bytes) -> None:
    """Write beside the target first, so that the target is never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
