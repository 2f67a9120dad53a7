"""The model's ONNX opset: raised where it is too old, lowered where the runtime has no kernels for it yet.

onnxruntime's CPU provider runs QuantizeLinear and DequantizeLinear with a scale per channel from opset 13, and has no
kernels for those of opset 28.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnx
import onnx.version_converter
import onnx_ir as ir

from raqu_onnx.errors import ModelError
from raqu_onnx.graph_edit import all_graphs, model_graphs, name_nodes, one_line, skeleton

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ensure_opset", "inline_functions"]

# The IR version that came with opset 12 and 13.
_IR_VERSION = 7
# For a model that imports no default domain at all: the opset that introduced packed INT4.
_USUAL = 21


def ensure_opset(model: ir.Model, minimum: int = 13, maximum: int = 27) -> bool:
    """Bring the version of the default ONNX domain into `minimum .. maximum`, in place.

    An older model goes through `onnx.version_converter`. A newer one is declared to be of opset `maximum` where none of
    its operators changed since, and goes through the converter where one did. Other domains' versions, names, metadata,
    documentation, initializers, inputs and outputs with their dynamic dimensions stay as they are.

    Returns:
        Whether the model was changed.

    Raises:
        ModelError: If the converter cannot bring the model there.
    """
    if "" not in model.opset_imports:
        model.opset_imports[""] = min(max(_USUAL, minimum), maximum)
        return True
    version = model.opset_imports[""]
    if version < minimum:
        inline_functions(model)
        _convert(model, minimum, f"export it with opset {minimum} or later")
    owners = [model.graph, *(function.graph for function in model.functions.values())]
    if all(owner.opset_imports.get("", 0) <= maximum for owner in owners):
        return version < minimum
    newer = _first_newer(owners, maximum)
    if newer is not None:
        inline_functions(model)
        where = newer.name or newer.outputs[0].name
        _convert(model, maximum, f"node '{where}' ({newer.op_type}) needs it: export it with opset {maximum}")
    for owner in owners:
        if owner.opset_imports.get("", 0) > maximum:
            owner.opset_imports[""] = maximum
    return True


def inline_functions(model: ir.Model) -> bool:
    """Put the bodies of local functions where they are called, in place.

    Returns:
        Whether there was a call.

    Raises:
        ModelError: If functions call each other in a circle, or cannot be inlined.
    """
    from onnx_ir.passes.common import InlinePass

    if not model.functions:
        return False
    called = {node.op_identifier() for graph in model_graphs(model) for node in graph}
    for key in called.intersection(model.functions):
        _own_outputs(model.functions[key])
        _align_opsets(model.functions[key], model)
    try:
        return InlinePass()(model).modified
    except (ValueError, ir.passes.InvariantError) as error:
        raise ModelError(f"local functions cannot be inlined: {one_line(error)}") from error


def _own_outputs(function: ir.Function) -> None:
    """Let every output of a function be a value of its own.

    The inliner renames what comes out of a call; a function input handed through, or one value that is two outputs,
    would take the name from its other role.
    """
    seen: set[ir.Value] = set(function.inputs)
    for index, output in enumerate(function.outputs):
        if output in seen:
            identity = ir.Node("", "Identity", [output], name=f"{function.name}_output_{index}")
            identity.outputs[0].name = f"{output.name}_output_{index}"
            function.append(identity)
            function.outputs[index] = identity.outputs[0]
        seen.add(function.outputs[index])


def _align_opsets(function: ir.Function, model: ir.Model) -> None:
    """Declare a function to be of the model's opset where no operator in it differs between the two."""
    version, target = function.opset_imports.get(""), model.opset_imports.get("")
    if version is None or target is None or version == target:
        return
    changed = sorted({node.op_type for node in _nodes(function.graph) if _since(node, version) != _since(node, target)})
    if changed:
        raise ModelError(
            f"local function '{function.name}' is of opset {version} and the model of opset {target}, which "
            f"define {', '.join(changed)} differently: export both with one opset"
        )
    function.opset_imports[""] = target


def _nodes(owner: ir.Graph) -> Iterator[ir.Node]:
    for graph in all_graphs(owner):
        yield from graph


def _since(node: ir.Node, opset: int) -> int:
    """The opset that defined a default-domain operator as `opset` has it; 0 for any other or unknown operator."""
    if node.domain != "":
        return 0
    try:
        return int(onnx.defs.get_schema(node.op_type, opset, "").since_version)
    except onnx.defs.SchemaError:
        return 0


def _first_newer(owners: list[ir.Graph], maximum: int) -> ir.Node | None:
    """The first node whose operator was changed or added after opset `maximum`."""
    for owner in owners:
        version = owner.opset_imports.get("", 0)
        for node in _nodes(owner):
            if _since(node, version) > maximum:
                return node
    return None


def _convert(model: ir.Model, target: int, advice: str) -> None:
    """Bring a model without function calls to another opset through `onnx.version_converter`."""
    source = model.opset_imports[""]
    if source == 8 and any(node.op_type == "Scan" and not node.domain for node in _nodes(model.graph)):
        # The converter drops the batch dimension that Scan had in opset 8 only.
        raise ModelError(f"the model is of opset 8, whose Scan later opsets do not have; {advice}")
    name_nodes(model)  # so that each is found again after the conversion
    proto, removed = skeleton(model)
    # Before IR version 4 the converter may not add initializers of its own.
    proto.ir_version = max(proto.ir_version, _IR_VERSION)
    try:
        converted = onnx.version_converter.convert_version(proto, target)
        onnx.checker.check_model(converted)
        if _infers(proto) and not _infers(converted):
            raise ValueError("shapes do not fit any more after the conversion")
        graph = ir.serde.deserialize_model(converted).graph
    except Exception as error:
        raise ModelError(
            f"the model is of opset {source} and cannot be brought to {target}: {_reason(error)}; {advice}"
        ) from error
    _restore(graph, model.graph, removed)
    model.graph = graph
    model.ir_version = max(model.ir_version, _IR_VERSION)


def _reason(error: BaseException) -> str:
    """What the converter says, without the place in its C++ source that a failed assertion names."""
    return re.sub(r"^\S+: Assertion `.*` failed: *", "", one_line(error))


def _infers(proto: onnx.ModelProto) -> bool:
    """Whether strict shape inference finds no contradiction."""
    try:
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except Exception:  # noqa: BLE001 - the C++ binding raises whatever an operator's function throws
        return False
    return True


def _restore(graph: ir.Graph, original: ir.Graph, removed: set[str]) -> None:
    """Give a converted graph back what the converter dropped: weights, metadata, declared inputs and outputs."""
    inputs = {value.name: value for value in graph.inputs}
    declared = {value.name for value in original.inputs}
    for value in tuple(graph.inputs):
        if value.name not in declared:
            graph.inputs.remove(value)
    for name in original.initializers:
        if name in removed:
            inputs[name].const_value = original.initializers[name].const_value
            graph.register_initializer(inputs[name])
    before = {value.name: value for value in (*original.inputs, *original.outputs)}
    for value in (*graph.inputs, *graph.outputs):
        old = before[value.name]
        value.type = old.type
        value.shape = None if old.shape is None else old.shape.copy()
    graph.name, graph.doc_string = original.name, original.doc_string
    graph.metadata_props.update(original.metadata_props)
    graph.opset_imports.update({k: v for k, v in original.opset_imports.items() if k})
    _restore_metadata(graph, original)


def _restore_metadata(graph: ir.Graph, original: ir.Graph) -> None:
    nodes = {node.name: node for node in _nodes(original)}
    values = {value.name: value for value in _values(original)}
    for node in _nodes(graph):
        if node.name in nodes:
            before = nodes[node.name]
            node.metadata_props.update(before.metadata_props)
            node.meta.update(before.meta)
    for value in _values(graph):
        old = values.get(value.name)
        if old is not None:
            value.metadata_props.update(old.metadata_props)
            value.doc_string = old.doc_string
            value.meta.update(old.meta)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    for inner in all_graphs(graph):
        yield from inner.inputs
        yield from inner.initializers.values()
        for node in inner:
            yield from node.outputs
