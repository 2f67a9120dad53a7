"""Rules between the manifest and the ONNX graph as a whole: what is mapped, in which order, how often."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import onnx_ir as ir

from raqu_onnx.graph_edit import infer_shapes, subgraphs_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from raqu_onnx.manifest import NodeEntry
    from raqu_onnx.validate_model import EmittedModel

__all__ = ["mvms_findings", "order_findings", "unmapped_findings"]

_MAPPABLE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_DOMAINS = ("", "ai.onnx")


def mvms_findings(emitted: EmittedModel) -> Iterator[str]:
    """MVMs per inference are what ONNX shape inference gives, where it knows the shapes."""
    infer_shapes(emitted.model)
    for entry, node in emitted.pairs():
        shape = node.outputs[0].shape
        if entry.window is None and not entry.input_transposed and not _starts_with_samples(emitted.model, shape):
            # A Reshape may have put tokens among the rows; how many come from one sample is not in the shape.
            continue
        expected = _mvms(entry, shape)
        if entry.mvms is not None and expected is not None and entry.mvms != expected:
            yield f"node {entry.name}: mvms is {entry.mvms}, the output's shape gives {expected}"


def _starts_with_samples(model: ir.Model, shape: ir.Shape | None) -> bool:
    """Whether the first axis is that of the model's inputs."""
    fed = next((v.shape for v in model.graph.inputs if v.shape and not v.is_initializer()), None)
    if not shape or not fed:
        return False
    return shape[0] == fed[0] and shape[0] != ir.SymbolicDim(None)


def _mvms(entry: NodeEntry, shape: ir.Shape | None) -> int | None:
    if shape is None:
        return None
    sizes = list(shape)
    if entry.window is not None:
        counted = sizes[2:]
    elif entry.constant_left:
        counted = sizes[1:] if len(sizes) == 2 else [*sizes[1:-2], sizes[-1]]
    else:
        counted = sizes[1:-1]
    known = [size for size in counted if isinstance(size, int)]
    return math.prod(known) if len(known) == len(counted) else None


def unmapped_findings(emitted: EmittedModel) -> Iterator[str]:
    """Every node of a mappable type is either mapped or listed with the reason why not."""
    manifest = emitted.manifest
    mapped = Counter((entry.name, str(entry.op_type)) for entry in manifest.nodes)
    listed = Counter((entry.name, entry.op_type) for entry in manifest.unmapped)
    there = Counter(
        (node.name or "", node.op_type)
        for node in ir.traversal.RecursiveGraphIterator(emitted.model.graph)
        if node.op_type in _MAPPABLE and node.domain in _DOMAINS
    )
    for name, op_type in sorted((there - mapped - listed).elements()):
        yield f"{op_type} {name}: stands in the model, but neither in nodes nor in unmapped"
    # A user may have excluded nodes that are quantized already, such as QLinearConv.
    anywhere = Counter(
        (node.name or "", node.op_type) for node in ir.traversal.RecursiveGraphIterator(emitted.model.graph)
    )
    for name, op_type in sorted((listed - (anywhere - mapped)).elements()):
        yield f"unmapped: the model has no {op_type} {name} that is not mapped"
    for item in manifest.unmapped:
        if not item.reason.strip():
            yield f"unmapped: {item.name} has no reason"


def order_findings(emitted: EmittedModel) -> Iterator[str]:
    """Stages follow the data: each names the nearest mapped nodes that it depends on, and comes behind them."""
    wanted = {entry.name for entry in emitted.manifest.nodes}
    needs: dict[str, set[str]] = {}
    for name in wanted & set(emitted.nodes):
        needs[name] = set()
        stack = [value.producer() for value in _reads(emitted.nodes[name])]
        seen: set[ir.Node] = set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name in wanted and emitted.nodes.get(node.name) is node:
                needs[name].add(node.name)
            else:
                stack.extend(value.producer() for value in _reads(node))
    done: set[str] = set()
    for stage in emitted.manifest.stages:
        expected = needs.get(stage.node, set())
        if sorted(stage.after) != sorted(expected):
            yield f"stages: {stage.node}: after is {list(stage.after)}, the model gives {sorted(expected)}"
        late = sorted(expected - done)
        if late:
            yield f"stages: {stage.node}: stands before {late[0]}, whose result it needs"
        done.add(stage.node)


def _reads(node: ir.Node) -> Iterable[ir.Value]:
    """Values that a node reads, those in its bodies included."""
    yield from (value for value in node.inputs if value is not None)
    for body in subgraphs_of(node):
        for inner in body:
            yield from _reads(inner)
