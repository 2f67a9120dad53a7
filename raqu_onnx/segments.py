"""Running a float graph one mapped node at a time.

Between two mapped nodes lies what the chip's digital units do: activations, additions, pooling. A `NodeRunner` cuts the
graph there, so that each mapped node can be run with any weight on any input, and everything before it is run once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from raqu_onnx.evaluation import make_session, run_feeds
from raqu_onnx.session_model import SessionModel, session_model
from raqu_onnx.simulation import names_in_bodies

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx_ir as ir
    import onnxruntime as ort
    from numpy.typing import NDArray

    from raqu_onnx.layout import MappedNode

__all__ = ["NodeRunner", "Step"]


@dataclass(frozen=True)
class Step:
    """One mapped node and what stands between it and those before it.

    Attributes:
        node: The mapped node.
        needs: Known values that its input is computed from; the input itself where it is known already.
        spent: Known values that no later step needs.
        partner: The value that is added to the node's output and nothing else, where it is known before the node
            runs, as at the end of a residual block; None where there is no such value.
        partner_needs: Known values that the partner is computed from.
    """

    node: MappedNode
    needs: tuple[str, ...]
    spent: tuple[str, ...]
    partner: str | None = None
    partner_needs: tuple[str, ...] = ()


class NodeRunner:
    """A float graph cut at its mapped nodes.

    Values are lists of arrays, one per batch, so that memory is bounded by what is alive between two steps.

    Args:
        model: The tidied float model.
        nodes: Its mapped nodes, in graph order.
        threads: Threads for onnxruntime.
    """

    def __init__(self, model: ir.Model, nodes: Sequence[MappedNode], *, threads: int | None = None) -> None:
        source = session_model(model)
        self._proto, self._weights = source.proto, source.weights
        self._threads = threads
        self._producers = {name: item for item in self._proto.graph.node for name in item.output}
        self._order = {item.name: index for index, item in enumerate(self._proto.graph.node)}
        self._initializers = {item.name: item for item in self._proto.graph.initializer}
        self._inputs = {item.name: item for item in self._proto.graph.input if item.name not in self._initializers}
        self._mapped_outputs = {node.output_name for node in nodes}
        self.steps = self._plan(nodes)

    def _plan(self, nodes: Sequence[MappedNode]) -> tuple[Step, ...]:
        known = set(self._inputs)
        readers = self._readers()
        plans: list[tuple[tuple[str, ...], str | None, tuple[str, ...]]] = []
        for node in nodes:
            needs = tuple(sorted(self._cut(node.input_name, known)))
            known.add(node.input_name)
            partner = self._partner(node, known, readers)
            behind = () if partner is None else tuple(sorted(self._cut(partner, known)))
            plans.append((needs, partner, behind))
            known.add(node.output_name)
        # A graph input that no step needs is dropped after the first.
        last: dict[str, int] = dict.fromkeys(self._inputs, 0)
        for index, (node, (needs, _, behind)) in enumerate(zip(nodes, plans, strict=True)):
            last.update(dict.fromkeys((*needs, *behind, node.input_name), index))
            last.setdefault(node.output_name, index)
        return tuple(
            Step(node, needs, tuple(sorted(name for name, step in last.items() if step == i)), partner, behind)
            for i, (node, (needs, partner, behind)) in enumerate(zip(nodes, plans, strict=True))
        )

    def _readers(self) -> dict[str, list[onnx.NodeProto | None]]:
        """Who reads each value; None stands for the graph's outputs and the bodies of control-flow nodes."""
        readers: dict[str, list[onnx.NodeProto | None]] = {}
        for item in self._proto.graph.node:
            for name in item.input:
                readers.setdefault(name, []).append(item)
            for name in names_in_bodies([item]):
                readers.setdefault(name, []).append(None)
        for output in self._proto.graph.output:
            readers.setdefault(output.name, []).append(None)
        return readers

    def _partner(
        self, node: MappedNode, known: set[str], readers: Mapping[str, Sequence[onnx.NodeProto | None]]
    ) -> str | None:
        """What is added to a node's output, if that is all that becomes of it and is known without further nodes."""
        match readers.get(node.output_name, []):
            # A Sum of two is an Add; one of more has no single partner.
            case [onnx.NodeProto(op_type="Add" | "Sum", domain="" | "ai.onnx") as add] if len(add.input) == 2:
                first, second = add.input
            case _:
                return None
        partner = second if first == node.output_name else first
        if partner == node.output_name or partner in self._initializers:
            return None
        behind = set(self._walk(partner, known)) - known
        return None if behind & self._mapped_outputs else partner

    def _cut(self, target: str, known: set[str]) -> set[str]:
        """Known values that a value is computed from."""
        found: set[str] = set()
        for name in self._walk(target, known):
            if name in known:
                found.add(name)
        return found

    def _walk(self, target: str, known: set[str]) -> Iterator[str]:
        """A value and all behind it, up to known ones."""
        pending, seen = [target], set()
        while pending:
            name = pending.pop()
            if not name or name in seen or name in self._initializers:
                continue
            seen.add(name)
            yield name
            if name not in known:
                item = self._producers[name]
                # Names of a body's own values are not among those of the graph.
                outer = (n for n in names_in_bodies([item]) if n in self._producers or n in self._inputs)
                pending.extend((*item.input, *outer))

    def prepare(self, step: Step, values: Mapping[str, Sequence[NDArray[Any]]], batches: int) -> list[NDArray[Any]]:
        """The input of a step's node, batch by batch, from known values by name.

        Args:
            step: The step.
            values: What is known, at least what the step needs.
            batches: Number of batches; an input that depends on no known value is the same in each.
        """
        return self._compute(step.node.input_name, step.needs, values, batches, step.node.name)

    def partner(self, step: Step, values: Mapping[str, Sequence[NDArray[Any]]], batches: int) -> list[NDArray[Any]]:
        """The value that a step's output is added to, batch by batch.

        Raises:
            ValueError: The step has no partner.
        """
        if step.partner is None:
            raise ValueError(f"{step.node.name}: nothing known is added to its output")
        return self._compute(step.partner, step.partner_needs, values, batches, step.node.name)

    def _compute(
        self,
        target: str,
        needs: tuple[str, ...],
        values: Mapping[str, Sequence[NDArray[Any]]],
        batches: int,
        before: str,
    ) -> list[NDArray[Any]]:
        if needs == (target,):
            return list(values[target])
        session = self._open(self._segment(target, needs))
        where = f"the graph before {before}"
        if not needs:
            return run_feeds(session, [target], {}, where) * batches
        feeds = [{name: values[name][batch] for name in needs} for batch in range(batches)]
        return [run_feeds(session, [target], item, where)[0] for item in feeds]

    def run(
        self, step: Step, inputs: Sequence[NDArray[Any]], weight: NDArray[np.float32], bias: NDArray[np.float32] | None
    ) -> list[NDArray[Any]]:
        """The output of a step's node with a given weight and bias, batch by batch."""
        session = self._open(self._single(step.node))
        feeds = {"raqu_w": weight} if bias is None else {"raqu_w": weight, "raqu_b": bias}
        return [run_feeds(session, None, {"raqu_x": batch, **feeds}, step.node.name)[0] for batch in inputs]

    def _open(self, model: onnx.ModelProto) -> ort.InferenceSession:
        # A session holds on to its activations and threads as long as it lives, so none is kept: opening one takes a
        # few milliseconds, hundreds of them take gigabytes and thousands of threads.
        return make_session(SessionModel(model, self._weights), threads=self._threads)

    def _segment(self, target: str, needs: tuple[str, ...]) -> onnx.ModelProto:
        names = set(self._walk(target, set(needs))) - set(needs)
        items = {self._producers[name].name: self._producers[name] for name in names}
        ordered = sorted(items.values(), key=lambda item: self._order[item.name])
        used = {name for item in ordered for name in item.input} | names_in_bodies(ordered)
        graph = helper.make_graph(
            ordered,
            "segment",
            [self._inputs.get(name, onnx.ValueInfoProto(name=name, type=_FLOAT)) for name in needs],
            [onnx.ValueInfoProto(name=target)],
            [item for name, item in self._initializers.items() if name in used],
        )
        return self._model(graph)

    def _single(self, node: MappedNode) -> onnx.ModelProto:
        item = onnx.NodeProto()
        item.CopyFrom(self._producers[node.output_name])
        takes_bias = node.op_type != "MatMul"
        del item.input[:]
        item.input.extend(["raqu_w", "raqu_x"] if node.constant_left else ["raqu_x", "raqu_w"])
        item.input.extend(["raqu_b"] if takes_bias else [])
        names = ["raqu_x", "raqu_w", "raqu_b"] if takes_bias else ["raqu_x", "raqu_w"]
        inputs = [onnx.ValueInfoProto(name=name, type=_FLOAT) for name in names]
        return self._model(helper.make_graph([item], "node", inputs, [onnx.ValueInfoProto(name=node.output_name)]))

    def _model(self, graph: onnx.GraphProto) -> onnx.ModelProto:
        model = helper.make_model(graph, opset_imports=self._proto.opset_import)
        model.ir_version = self._proto.ir_version
        return model


_FLOAT = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
