"""Whether the QONNX form of a result is what the emitted model and the manifest give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from raqu_onnx.errors import ModelError
from raqu_onnx.graph_edit import constant_array
from raqu_onnx.model_io import load_model
from raqu_onnx.output import QONNX_FILE
from raqu_onnx.qonnx_model import qonnx_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from raqu_onnx.manifest import Manifest
    from raqu_onnx.validate_report import Checklist

__all__ = ["check_qonnx"]

_RULE = "qonnx.model"
_ADVICE = "`optimize --emit qonnx` writes it anew"


def check_qonnx(folder: Path, model: ir.Model, manifest: Manifest, checklist: Checklist) -> None:
    """Make the QONNX form again and hold it against the file, where the run wrote one.

    Args:
        folder: The result.
        model: Its emitted model, with which nothing is wrong.
        manifest: Its manifest, likewise.
        checklist: Gets one check: every node, weight and scale is as it was written.
    """
    path = folder / QONNX_FILE
    if not path.exists():
        asked = manifest.configuration.get("emit")
        if isinstance(asked, list) and "qonnx" in asked:
            checklist.skip(_RULE, f"not checked: {QONNX_FILE} is not there; {_ADVICE}")
        return
    checklist.run(_RULE, [f"{text}; {_ADVICE}" for text in _findings(path, model, manifest)], QONNX_FILE)


def _findings(path: Path, model: ir.Model, manifest: Manifest) -> Iterator[str]:
    try:
        found = load_model(path, check_weights=False)
    except ModelError as error:
        yield str(error)
        return
    yield from (f"{QONNX_FILE}: {text}" for text in _differences(qonnx_model(model, manifest), found))


def _differences(expected: ir.Model, found: ir.Model) -> Iterator[str]:
    """Every way in which one model is not the other."""
    ours, theirs = list(expected.graph), list(found.graph)
    if [_shape_of(node) for node in ours] != [_shape_of(node) for node in theirs]:
        different = (a.name for a, b in zip(ours, theirs, strict=False) if _shape_of(a) != _shape_of(b))
        yield f"its nodes are not those of model.onnx, from node {next(different, 'the end')} on"
        return
    for what in ("inputs", "outputs"):
        names = [[value.name for value in getattr(item.graph, what)] for item in (expected, found)]
        if names[0] != names[1]:
            yield f"its {what} are {names[1]}, those of model.onnx {names[0]}"
    for name, value in expected.graph.initializers.items():
        other = found.graph.initializers.get(name)
        if other is None:
            yield f"initializer {name} is missing"
        elif not _same(value, other):
            yield f"initializer {name} is not what model.onnx holds"


def _shape_of(node: ir.Node) -> tuple[object, ...]:
    """What a node is and what it is connected to."""
    values = [tuple(None if value is None else value.name for value in ends) for ends in (node.inputs, node.outputs)]
    attributes = sorted(ir.serde.serialize_attribute(item).SerializeToString() for item in node.attributes.values())
    return (node.domain, node.op_type, node.name, *values, attributes)


def _same(value: ir.Value, other: ir.Value) -> bool:
    first, second = constant_array(value), constant_array(other)
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
