"""Judging bit-widths without writing a model for each.

The float graph is opened once, with the weight, the bias and the activation quantizer of every mapped node as inputs;
a candidate is then a set of feeds. Its values are those of the emitted model at ORT_DISABLE_ALL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from raqu_onnx.evaluation import gather, make_session, run_feeds
from raqu_onnx.session_model import session_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.data import Batch
    from raqu_onnx.evaluation import Outputs
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.quantized import QuantizedNode

__all__ = ["Simulator", "names_in_bodies"]

_PREFIX = "raqu_simulated"


class Simulator:
    """Runs a float model with any of its mapped nodes quantized.

    Args:
        model: The tidied float model.
        nodes: Its mapped nodes.
        threads: Threads for onnxruntime.
        float_activations: Inputs of mapped nodes stay float.
    """

    def __init__(
        self,
        model: ir.Model,
        nodes: Sequence[MappedNode],
        *,
        threads: int | None = None,
        float_activations: bool = False,
    ) -> None:
        self._nodes = list(nodes)
        self._float_activations = float_activations
        source = session_model(model)
        proto = source.proto
        by_name = {node.name: node for node in proto.graph.node}
        order: list[onnx.NodeProto] = []
        chains: dict[str, list[onnx.NodeProto]] = {}
        for index, node in enumerate(self._nodes):
            chains[node.name] = self._rewire(proto, by_name[node.name], index, node)
        for item in proto.graph.node:
            order.extend(chains.get(item.name, []))
            order.append(item)
        kept = [onnx.NodeProto.FromString(item.SerializeToString()) for item in order]
        del proto.graph.node[:]
        proto.graph.node.extend(kept)
        self._remove_unused_initializers(proto)
        self._session = make_session(source, level="simulate", threads=threads)
        self._names = tuple(output.name for output in self._session.get_outputs())

    def _rewire(
        self, proto: onnx.ModelProto, item: onnx.NodeProto, index: int, node: MappedNode
    ) -> list[onnx.NodeProto]:
        """Turn one node's operands into graph inputs; returns the nodes that quantize its activation."""
        slot = 0 if node.constant_left else 1
        weight, bias = f"{_PREFIX}_w{index}", f"{_PREFIX}_b{index}"
        _add_input(proto, weight, onnx.TensorProto.FLOAT, node.layout.shape)
        item.input[slot] = weight
        if node.op_type != "MatMul":
            channels = node.layout.groups * node.layout.kernels
            _add_input(proto, bias, onnx.TensorProto.FLOAT, (channels,))
            del item.input[2:]
            item.input.append(bias)
        if self._float_activations:
            return []
        scale, zero, top = (f"{_PREFIX}_{part}{index}" for part in ("s", "z", "c"))
        _add_input(proto, scale, onnx.TensorProto.FLOAT, ())
        _add_input(proto, zero, onnx.TensorProto.UINT8, ())
        _add_input(proto, top, onnx.TensorProto.UINT8, ())
        source, base = item.input[1 - slot], f"{_PREFIX}_x{index}"
        item.input[1 - slot] = f"{base}_d"
        return [
            helper.make_node("QuantizeLinear", [source, scale, zero], [f"{base}_q"], name=f"{base}_q"),
            helper.make_node("Clip", [f"{base}_q", "", top], [f"{base}_c"], name=f"{base}_c"),
            helper.make_node("DequantizeLinear", [f"{base}_c", scale, zero], [f"{base}_d"], name=f"{base}_d"),
        ]

    def _remove_unused_initializers(self, proto: onnx.ModelProto) -> None:
        used = {name for item in proto.graph.node for name in item.input}
        used.update(output.name for output in proto.graph.output)
        used.update(names_in_bodies(proto.graph.node))
        kept = [item for item in proto.graph.initializer if item.name in used]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)

    def run(self, quantized: Mapping[str, QuantizedNode], batches: Iterable[Batch]) -> Outputs:
        """Outputs over all batches with every mapped node quantized as given by name.

        Raises:
            DataError: There are no batches, or the model cannot be run on them.
        """
        return gather(self._names, self.stream(quantized, batches), "data")

    def stream(
        self, quantized: Mapping[str, QuantizedNode], batches: Iterable[Batch]
    ) -> Iterator[tuple[Batch, list[NDArray[Any]]]]:
        """The same batch by batch, so that outputs need not be kept.

        Raises:
            DataError: The model cannot be run on a batch.
        """
        outputs = self.runner(quantized)
        for batch in batches:
            yield batch, outputs(batch)

    def runner(self, quantized: Mapping[str, QuantizedNode]) -> Callable[[Batch], list[NDArray[Any]]]:
        """What gives the outputs on a batch; it raises `DataError` where the model cannot be run on it."""
        operands: dict[str, Any] = {}
        for index, node in enumerate(self._nodes):
            operands.update(self._operands(index, quantized[node.name]))
        return lambda batch: run_feeds(self._session, self._names, {**batch.feeds, **operands}, "data")

    def _operands(self, index: int, quantized: QuantizedNode) -> dict[str, NDArray[Any]]:
        feeds: dict[str, NDArray[Any]] = {f"{_PREFIX}_w{index}": quantized.weight()}
        if quantized.node.op_type != "MatMul":
            bias = quantized.real_bias()
            channels = quantized.node.layout.groups * quantized.node.layout.kernels
            feeds[f"{_PREFIX}_b{index}"] = np.zeros(channels, np.float32) if bias is None else bias
        if not self._float_activations:
            if quantized.activation is None:
                raise ValueError(f"{quantized.node.name}: its activation is float, the simulator quantizes it")
            feeds[f"{_PREFIX}_s{index}"] = np.array(quantized.activation.scale, np.float32)
            feeds[f"{_PREFIX}_z{index}"] = np.array(quantized.activation.zero_point, np.uint8)
            feeds[f"{_PREFIX}_c{index}"] = np.array(quantized.activation.levels, np.uint8)
        return feeds


def _add_input(proto: onnx.ModelProto, name: str, kind: int, shape: Sequence[int]) -> None:
    proto.graph.input.append(helper.make_tensor_value_info(name, kind, list(shape)))


def names_in_bodies(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Names that bodies of control-flow nodes read, their own or from around them."""
    names: set[str] = set()
    for node in nodes:
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                names.update(name for inner in graph.node for name in inner.input)
                names.update(output.name for output in graph.output)
                names.update(names_in_bodies(graph.node))
    return names
