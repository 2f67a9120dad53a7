"""Cutting the emitted model at its mapped nodes: what lies between runs in onnxruntime, each node of it once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
from onnx import helper

from raqu_onnx.errors import ManifestError, ModelError
from raqu_onnx.evaluation import make_session
from raqu_onnx.session_model import SessionModel, session_model
from raqu_onnx.simulation import names_in_bodies

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx_ir as ir

    from raqu_onnx.manifest import ActivationEntry, NodeEntry

__all__ = ["Segment", "Stage", "activation_of", "cut"]


@dataclass(frozen=True)
class Segment:
    """ONNX nodes that run together.

    Attributes:
        model: A model of these nodes alone.
        needs: Its inputs.
        gives: Its outputs, which later segments, mapped nodes or the user need.
    """

    model: SessionModel
    needs: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A segment and the mapped node that it leads to.

    Attributes:
        segment: What is computed first; None where all that the node needs is known.
        node: The mapped node; None in the last stage, which leads to the model's outputs.
        spent: Values that no later stage needs.
    """

    segment: Segment | None
    node: NodeEntry | None
    spent: tuple[str, ...]


def cut(model: ir.Model, entries: Sequence[NodeEntry]) -> tuple[Stage, ...]:
    """Cut a model.

    Args:
        model: The emitted model; left unchanged.
        entries: Its mapped nodes, with quantized inputs.

    Raises:
        ManifestError: A mapped node has a float input.
        ModelError: A value between two segments has a type that cannot be passed.
    """
    return _Cutter(model, entries).stages()


def activation_of(entry: NodeEntry) -> ActivationEntry:
    """The quantized input of a node.

    Raises:
        ManifestError: Its input is float, which no crossbar can be driven with.
    """
    if entry.activation is None:
        raise ManifestError(
            f"node {entry.name}: its input is float, no crossbar can run it; optimize without --activation-bits float"
        )
    return entry.activation


class _Cutter:
    def __init__(self, model: ir.Model, entries: Sequence[NodeEntry]) -> None:
        source = session_model(_without_weights(model, entries))
        self._weights, self._proto = source.weights, source.proto
        graph = self._proto.graph
        self._constants = {item.name: item for item in graph.initializer}
        self._inputs = {item.name: item for item in graph.input if item.name not in self._constants}
        self._outputs = [item.name for item in graph.output]
        self._producer = {name: index for index, item in enumerate(graph.node) for name in item.output if name}
        # A node whose output nobody reads needs no run.
        read = [entry for entry in entries if entry.output in self._producer]
        self._entries = sorted(read, key=lambda entry: self._producer[entry.output])
        self._mapped = {self._producer[entry.output] for entry in self._entries}

    def stages(self) -> tuple[Stage, ...]:
        groups = self._groups()
        reads = [self._reads(group) for group in groups]
        wanted = self._wanted(reads)
        types = self._types(set().union(*reads), sorted(set().union(*groups)))
        segments = [self._segment(g, r, wanted, types) if g else None for g, r in zip(groups, reads, strict=True)]
        nodes: list[NodeEntry | None] = [*self._entries, None]
        return tuple(
            Stage(segment, node, spent)
            for segment, node, spent in zip(segments, nodes, self._spent(segments), strict=True)
        )

    def _groups(self) -> list[list[int]]:
        """Nodes, as positions in the graph, that run before each mapped node, and those that run last."""
        done: set[int] = set()
        groups = []
        for entry in self._entries:
            groups.append(self._behind([activation_of(entry).tensor], done))
            done.update(groups[-1])
        return [*groups, self._behind(self._outputs, done)]

    def _behind(self, targets: Iterable[str], done: set[int]) -> list[int]:
        """Unmapped nodes behind some values that have not run yet, in graph order."""
        pending, found = list(targets), set[int]()
        while pending:
            index = self._producer.get(pending.pop())
            if index is None or index in found or index in done or index in self._mapped:
                continue
            found.add(index)
            pending.extend(self._operands(index))
        return sorted(found)

    def _operands(self, index: int) -> set[str]:
        node = self._proto.graph.node[index]
        # Names of a body's own values are not among those of the graph.
        outer = {name for name in names_in_bodies([node]) if name in self._producer or name in self._inputs}
        return {*node.input, *outer}

    def _reads(self, group: Sequence[int]) -> set[str]:
        """Values that a group takes from outside."""
        own = {name for index in group for name in self._proto.graph.node[index].output}
        known = self._producer.keys() | self._inputs.keys()
        return {name for index in group for name in self._operands(index) if name in known} - own

    def _wanted(self, reads: Sequence[set[str]]) -> set[str]:
        tensors = {activation_of(entry).tensor for entry in self._entries}
        return set().union(*reads, tensors, self._outputs)

    def _types(self, names: set[str], unmapped: Sequence[int]) -> dict[str, onnx.ValueInfoProto]:
        """What segments declare as inputs; onnxruntime infers the types of all but the mapped nodes' outputs."""
        floats = {
            entry.output: onnx.ValueInfoProto(name=entry.output, type=_tensor("float")) for entry in self._entries
        }
        known = {**self._inputs, **floats}
        others = sorted(names - known.keys())
        if others:
            nodes = [self._proto.graph.node[index] for index in unmapped]
            outputs = [onnx.ValueInfoProto(name=name) for name in others]
            session = make_session(self._model(nodes, [*known.values()], outputs), level="disable-all", threads=1)
            texts = {item.name: item.type for item in session.get_outputs()}
            known |= {name: onnx.ValueInfoProto(name=name, type=_type_of(name, texts[name])) for name in others}
        return known

    def _model(
        self,
        nodes: Sequence[onnx.NodeProto],
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
    ) -> SessionModel:
        """A model of some of the nodes, with what they use of the initializers."""
        used = {name for node in nodes for name in node.input} | names_in_bodies(nodes)
        constants = [item for name, item in self._constants.items() if name in used]
        graph = helper.make_graph(nodes, "segment", inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=self._proto.opset_import, functions=self._proto.functions)
        model.ir_version = self._proto.ir_version
        return SessionModel(model, self._weights)

    def _segment(
        self, group: Sequence[int], reads: set[str], wanted: set[str], types: Mapping[str, onnx.ValueInfoProto]
    ) -> Segment:
        nodes = [self._proto.graph.node[index] for index in group]
        needs = tuple(sorted(reads))
        gives = tuple(name for node in nodes for name in node.output if name in wanted)
        outputs = [onnx.ValueInfoProto(name=name) for name in gives]
        return Segment(self._model(nodes, [types[name] for name in needs], outputs), needs, gives)

    def _spent(self, segments: Sequence[Segment | None]) -> list[tuple[str, ...]]:
        last: dict[str, int] = {}
        for index, segment in enumerate(segments):
            if segment is not None:
                for name in (*segment.needs, *segment.gives):
                    last[name] = index
            if index < len(self._entries):
                entry = self._entries[index]
                last[entry.output] = last[activation_of(entry).tensor] = index
        kept = set(self._outputs)
        return [
            tuple(sorted(name for name, at in last.items() if at == index and name not in kept))
            for index in range(len(segments))
        ]


def _without_weights(model: ir.Model, entries: Sequence[NodeEntry]) -> ir.Model:
    """A copy in which mapped nodes have no weights and biases: the crossbars and the digital side have them."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    copy = model.clone()
    mapped = {entry.output: entry for entry in entries}
    for node in copy.graph:
        entry = mapped.get(str(node.outputs[0].name)) if node.outputs else None
        if entry is not None:
            for slot in (0 if entry.constant_left else 1, *range(2, len(node.inputs))):
                node.replace_input_with(slot, None)
    RemoveUnusedNodesPass()(copy)
    return copy


def _tensor(kind: str) -> onnx.TypeProto:
    names = {"float": "FLOAT", "double": "DOUBLE"}
    return helper.make_tensor_type_proto(onnx.TensorProto.DataType.Value(names.get(kind, kind.upper())), None)


def _type_of(name: str, text: str) -> onnx.TypeProto:
    """The type that onnxruntime writes as `tensor(float)` or `seq(tensor(int64))`."""
    kind, _, rest = text.partition("(")
    if kind == "tensor":
        return _tensor(rest.rstrip(")"))
    if kind == "seq" and rest.startswith("tensor("):
        return helper.make_sequence_type_proto(_type_of(name, rest))
    raise ModelError(f"{name}: a value of type {text} between mapped nodes cannot be passed on by the backend")
