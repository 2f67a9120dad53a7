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
from raqu_onnx.model_io import to_proto
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
    """

    node: MappedNode
    needs: tuple[str, ...]
    spent: tuple[str, ...]


class NodeRunner:
    """A float graph cut at its mapped nodes.

    Values are lists of arrays, one per batch, so that memory is bounded by what is alive between two steps.

    Args:
        model: The tidied float model.
        nodes: Its mapped nodes, in graph order.
        threads: Threads for onnxruntime.
    """

    def __init__(self, model: ir.Model, nodes: Sequence[MappedNode], *, threads: int | None = None) -> None:
        self._proto = to_proto(model)
        self._threads = threads
        self._producers = {name: item for item in self._proto.graph.node for name in item.output}
        self._order = {item.name: index for index, item in enumerate(self._proto.graph.node)}
        self._initializers = {item.name: item for item in self._proto.graph.initializer}
        self._inputs = {item.name: item for item in self._proto.graph.input if item.name not in self._initializers}
        self.steps = self._plan(nodes)

    def _plan(self, nodes: Sequence[MappedNode]) -> tuple[Step, ...]:
        known = set(self._inputs)
        needs: list[tuple[str, ...]] = []
        for node in nodes:
            needs.append(tuple(sorted(self._cut(node.input_name, known))))
            known.update((node.input_name, node.output_name))
        # A graph input that no step needs is dropped after the first.
        last: dict[str, int] = dict.fromkeys(self._inputs, 0)
        for index, node in enumerate(nodes):
            last.update(dict.fromkeys((*needs[index], node.input_name), index))
            last.setdefault(node.output_name, index)
        return tuple(
            Step(node, needs[i], tuple(sorted(name for name, step in last.items() if step == i)))
            for i, node in enumerate(nodes)
        )

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
        target = step.node.input_name
        if step.needs == (target,):
            return list(values[target])
        session = self._open(self._segment(target, step.needs))
        where = f"the graph before {step.node.name}"
        if not step.needs:
            return run_feeds(session, [target], {}, where) * batches
        feeds = [{name: values[name][batch] for name in step.needs} for batch in range(batches)]
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
        return make_session(model.SerializeToString(), threads=self._threads)

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
