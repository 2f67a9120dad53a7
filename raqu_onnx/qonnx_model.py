"""The emitted model in the QONNX form, whose `Quant` nodes have any width.

QONNX (https://github.com/fastmachinelearning/qonnx, `docs/qonnx-custom-ops/quant_op.md`) states a quantized tensor by
its float values and a node ``Quant(x, scale, zeropt, bitwidth)``, which gives
``(clip(round(x / scale + zeropt)) - zeropt) * scale``. FINN, hls4ml and other tools that read it see a 3-bit weight as
3 bits, where a QDQ model can only say INT8.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from raqu_onnx.encodings import code_range
from raqu_onnx.errors import ManifestError
from raqu_onnx.graph_edit import Names, add_initializer, constant_array, graph_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.manifest import Manifest, NodeEntry

__all__ = ["QONNX_DOMAIN", "qonnx_model"]

#: Domain of the `Quant` operator; its version 1 is the one that is meant.
QONNX_DOMAIN = "qonnx.custom_op.general"

# Width that a bias is stated with: it is an INT32 in the QDQ model.
_BIAS_BITS = 32


def qonnx_model(model: ir.Model, manifest: Manifest) -> ir.Model:
    """Restate an emitted QDQ model with QONNX `Quant` nodes.

    Before: ``wd = DequantizeLinear(w_codes, sw); xd = DequantizeLinear(Clip(QuantizeLinear(x)))``

    After::

        xd = Quant(x, sx, zx, a)         # unsigned
        wd = Quant(w, sw, 0, b)          # signed; w holds codes * scales as floats

    The qonnx package executes only widths that are one number for a whole node. A weight whose kernels differ is
    therefore one `Quant` for each width, a Concat, and a Gather that puts the kernels in their order. A dropped kernel
    has no width, so that it is zeros without a `Quant`.

    Args:
        model: The emitted model, which is not changed.
        manifest: Its manifest.

    Returns:
        A model of the same inputs and outputs. What is not in the manifest, such as nodes that another tool quantized,
        is as it was.

    Raises:
        ManifestError: The manifest names a node or an initializer that the model does not have.
    """
    restated = model.clone()
    nodes = {node.name: node for node in restated.graph}
    writer = _Writer(restated.graph, Names(restated), _narrow(manifest))
    for entry in manifest.nodes:
        node = nodes.get(entry.name)
        if node is None:
            raise ManifestError(f"nodes.{entry.name}: the model has no node of this name")
        writer.restate(node, entry)
    RemoveUnusedNodesPass()(restated)
    restated.opset_imports[QONNX_DOMAIN] = 1
    return restated


def _narrow(manifest: Manifest) -> bool:
    """Whether the chip's codes leave the most negative one out, which QONNX calls narrow."""
    return code_range(manifest.chip.encoding, 8)[0] == -127


@dataclass
class _Writer:
    graph: ir.Graph
    names: Names
    narrow: bool
    activations: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def restate(self, node: ir.Node, entry: NodeEntry) -> None:
        slot = 0 if entry.constant_left else 1
        if entry.activation is not None:
            node.replace_input_with(1 - slot, self._activation(node, 1 - slot, entry))
        node.replace_input_with(slot, self._weight(node, entry))
        if entry.bias is not None:
            node.replace_input_with(2, self._bias(node, entry))

    def _activation(self, node: ir.Node, slot: int, entry: NodeEntry) -> ir.Value:
        old, quantizer = node.inputs[slot], entry.activation
        if old is None or quantizer is None:
            raise ManifestError(f"nodes.{entry.name}: the model's node has no input {slot}")
        if old not in self.activations:
            self.activations[old] = self._quant(
                _before_quantize(old, entry.name),
                np.float32(quantizer.scale),
                quantizer.bits,
                old.name or entry.name,
                before=node,
                zero_point=quantizer.zero_point,
                signed=False,
            )
        return self.activations[old]

    def _weight(self, node: ir.Node, entry: NodeEntry) -> ir.Value:
        codes, axis = self._array(entry, entry.weight), entry.matrix.scale_axis
        bits = np.repeat([run[0] for run in entry.bits], [run[1] for run in entry.bits])
        scales = _along(np.array(entry.scales, np.float32), codes.ndim, axis)
        values = codes.astype(np.float32) * scales
        order = np.argsort(bits, kind="stable")
        pieces: list[ir.Value] = []
        for width in np.unique(bits):
            kernels = np.flatnonzero(bits == width)
            part = self._constant(f"{entry.source_weight}_{width}bit", np.take(values, kernels, axis))
            if width:
                part = self._quant(part, np.take(scales, kernels, axis), int(width), part.name or "", before=node)
            pieces.append(part)
        if len(pieces) == 1:
            return pieces[0]
        joined = self._node("Concat", pieces, f"{entry.source_weight}_by_width", node, codes.shape, axis=axis)
        if np.array_equal(order, np.arange(bits.size)):
            return joined
        place = self._constant(f"{entry.source_weight}_order", np.argsort(order).astype(np.int64))
        return self._node("Gather", [joined, place], f"{entry.source_weight}_quantized", node, codes.shape, axis=axis)

    def _bias(self, node: ir.Node, entry: NodeEntry) -> ir.Value:
        codes, base = self._array(entry, entry.bias or ""), entry.bias or ""
        decoder = None if node.inputs[2] is None else node.inputs[2].producer()
        scale = None if decoder is None or len(decoder.inputs) < 2 else constant_array(decoder.inputs[1])
        if scale is None:
            raise ManifestError(f"nodes.{entry.name}.bias: the model does not decode it")
        value = self._constant(f"{base}_float", codes.astype(np.float32) * scale)
        return self._quant(value, scale, _BIAS_BITS, f"{base}_float", before=node)

    def _array(self, entry: NodeEntry, name: str) -> NDArray[Any]:
        found = self.graph.initializers.get(name)
        if found is None or found.const_value is None:
            raise ManifestError(f"nodes.{entry.name}: the model has no initializer {name!r}")
        return found.const_value.numpy()

    def _quant(
        self,
        value: ir.Value,
        scale: NDArray[np.float32] | np.float32,
        bits: int,
        base: str,
        *,
        before: ir.Node,
        zero_point: int = 0,
        signed: bool = True,
    ) -> ir.Value:
        operands = [
            value,
            self._constant(f"{base}_step", np.asarray(scale, np.float32)),
            self._constant(f"{base}_zeropt", np.array(zero_point, np.float32)),
            self._constant(f"{base}_bitwidth", np.array(bits, np.float32)),
        ]
        attributes = {"signed": int(signed), "narrow": int(signed and self.narrow and bits <= 8)}
        shape = () if value.shape is None else value.shape
        return self._node(
            "Quant", operands, f"{base}_quant", before, shape, domain=QONNX_DOMAIN, rounding_mode="ROUND", **attributes
        )

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        wanted: str,
        before: ir.Node,
        shape: ir.Shape | tuple[int, ...],
        *,
        domain: str = "",
        **attributes: int | str,
    ) -> ir.Value:
        name = self.names.fresh(wanted)
        node = ir.node(op_type, inputs, attributes, domain=domain, name=self.names.fresh(f"{name}_node"))
        output = node.outputs[0]
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
        if inputs[0].shape is not None:
            output.shape = ir.Shape(shape)
        graph_of(before).insert_before(before, node)
        return output

    def _constant(self, wanted: str, array: NDArray[Any]) -> ir.Value:
        return add_initializer(self.graph, self.names.fresh(wanted), array)


def _before_quantize(value: ir.Value, name: str) -> ir.Value:
    """What goes into the QuantizeLinear (and Clip) whose codes `value` decodes."""
    node = value.producer()
    while node is not None and node.op_type in ("DequantizeLinear", "Clip", "QuantizeLinear"):
        source = node.inputs[0]
        if node.op_type == "QuantizeLinear" and source is not None:
            return source
        node = None if source is None else source.producer()
    raise ManifestError(f"nodes.{name}.activation: the model does not quantize this node's input")


def _along(scales: NDArray[np.float32], ndim: int, axis: int) -> NDArray[np.float32]:
    """One scale per kernel, shaped so that it multiplies the weight along its axis."""
    shape = [1] * ndim
    shape[axis] = -1
    return scales.reshape(shape)
