"""The integers of every mapped node, written into the graph as QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from raqu_onnx.annotations import EMITTED, QUANTIZED, mapped_nodes
from raqu_onnx.graph_edit import Names
from raqu_onnx.quantized import EmittedNames

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.quantized import ActivationQuantizer, QuantizedNode

__all__ = ["InsertQDQPass"]


@dataclass(frozen=True)
class InsertQDQPass(ir.passes.InPlacePass):
    """Replace the operands of every mapped node by dequantized integers.

    Before: ``y = Conv(x, w, b)``

    After::

        xq = QuantizeLinear(x, sx, zx)              # UINT8
        xc = Clip(xq, 0, 2**a - 1)                  # only when a < 8
        xd = DequantizeLinear(xc, sx, zx)
        wd = DequantizeLinear(w_codes, sw, 0, axis) # INT8 codes, one scale per kernel
        bd = DequantizeLinear(b_codes, sx * sw)     # INT32
        y  = Conv(xd, wd, bd)

    This form fuses in onnxruntime and saturates at every width. Nodes that read the same tensor with the same
    quantizer share one chain. The node gains ``raqu.bits`` in `metadata_props`.
    """

    name: ClassVar[str] = "insert-qdq"

    def requires(self, model: ir.Model) -> None:
        """Every mapped node is quantized."""
        for node in mapped_nodes(model):
            QUANTIZED.require(node)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the operands of all mapped nodes."""
        writer = _Writer(model.graph, Names(model))
        for node in mapped_nodes(model):
            quantized = QUANTIZED.require(node)
            EMITTED.set(node, writer.rewrite(node, quantized))
            node.metadata_props["raqu.bits"] = json.dumps(
                {
                    "weight": [[int(bits), len(list(run))] for bits, run in groupby(quantized.bits.tolist())],
                    "activation": None if quantized.activation is None else quantized.activation.bits,
                }
            )
        return ir.passes.PassResult(model, modified=True)


@dataclass
class _Chain:
    """One quantized activation: the names and the value that its readers take."""

    code: str
    scale: str
    zero_point: str
    value: ir.Value


@dataclass
class _Writer:
    graph: ir.Graph
    names: Names
    chains: dict[tuple[str, ActivationQuantizer], _Chain] = field(default_factory=dict)
    clip_bounds: dict[int, ir.Value] = field(default_factory=dict)

    def rewrite(self, node: ir.Node, quantized: QuantizedNode) -> EmittedNames:
        mapped = quantized.node
        slot = 0 if mapped.constant_left else 1
        old_operands = [node.inputs[slot], node.inputs[2] if len(node.inputs) > 2 else None]
        chain = None
        if quantized.activation is not None:
            chain = self._activation(node, 1 - slot, quantized.activation)
            node.replace_input_with(1 - slot, chain.value)
        codes, scale = self._weight(node, slot, quantized)
        bias = self._bias(node, quantized)
        for old in old_operands:
            self._drop_if_unused(old)
        return EmittedNames(
            weight=codes,
            weight_scale=scale,
            bias=bias,
            activation=chain.code if chain else None,
            activation_scale=chain.scale if chain else None,
            activation_zero_point=chain.zero_point if chain else None,
        )

    def _activation(self, node: ir.Node, slot: int, quantizer: ActivationQuantizer) -> _Chain:
        source = node.inputs[slot]
        if source is None:
            raise ValueError(f"{node.name}: its activation is missing")
        key = (source.name or "", quantizer)
        if key not in self.chains:
            self.chains[key] = self._new_chain(node, source, quantizer)
        return self.chains[key]

    def _new_chain(self, node: ir.Node, source: ir.Value, quantizer: ActivationQuantizer) -> _Chain:
        base = f"{source.name}_a{quantizer.bits}"
        scale = self._initializer(f"{base}_scale", np.array(quantizer.scale, np.float32))
        zero_point = self._initializer(f"{base}_zero_point", np.array(quantizer.zero_point, np.uint8))
        code = self._append(node, "QuantizeLinear", [source, scale, zero_point], base + "_quantized", source, np.uint8)
        if quantizer.bits < 8:
            bounds = [self._bound(0), self._bound(quantizer.levels)]
            code = self._append(node, "Clip", [code, *bounds], base + "_clipped", source, np.uint8)
        value = self._append(
            node, "DequantizeLinear", [code, scale, zero_point], base + "_dequantized", source, np.float32
        )
        return _Chain(code.name or "", scale.name or "", zero_point.name or "", value)

    def _bound(self, level: int) -> ir.Value:
        if level not in self.clip_bounds:
            self.clip_bounds[level] = self._initializer(f"raqu_code_{level}", np.array(level, np.uint8))
        return self.clip_bounds[level]

    def _weight(self, node: ir.Node, slot: int, quantized: QuantizedNode) -> tuple[str, str]:
        mapped = quantized.node
        old = node.inputs[slot]
        # A weight that several nodes share gets codes of its own in each.
        shared = old is not None and len(old.uses()) > 1
        base = f"{mapped.weight_name}_{mapped.name}" if shared else mapped.weight_name
        codes = self._initializer(f"{base}_quantized", quantized.codes)
        scale = self._initializer(f"{base}_scale", quantized.scales)
        zero_point = self._initializer(f"{base}_zero_point", np.zeros(quantized.scales.shape, np.int8))
        value = self._append(
            node,
            "DequantizeLinear",
            [codes, scale, zero_point],
            f"{base}_dequantized",
            old,
            np.float32,
            axis=mapped.layout.scale_axis,
        )
        node.replace_input_with(slot, value)
        return codes.name or "", scale.name or ""

    def _bias(self, node: ir.Node, quantized: QuantizedNode) -> str | None:
        if quantized.node.op_type == "MatMul":
            return None
        base = quantized.node.bias_name or f"{quantized.node.name}_bias"
        if quantized.bias is None:
            if quantized.float_bias is None:
                return None
            self._set_bias(node, self._initializer(f"{base}_corrected", quantized.float_bias))
            return None
        codes = self._initializer(f"{base}_quantized", quantized.bias)
        scale = self._initializer(f"{base}_scale", quantized.bias_scales())
        value = self._append(node, "DequantizeLinear", [codes, scale], f"{base}_dequantized", None, np.float32, axis=0)
        value.shape = ir.Shape(quantized.bias.shape)
        self._set_bias(node, value)
        return codes.name

    def _set_bias(self, node: ir.Node, value: ir.Value) -> None:
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, value)

    def _drop_if_unused(self, value: ir.Value | None) -> None:
        if value is not None and value.is_initializer() and not value.uses() and not value.is_graph_output():
            self.graph.initializers.pop(value.name or "", None)

    def _initializer(self, wanted: str, array: NDArray[Any]) -> ir.Value:
        name = self.names.fresh(wanted)
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _append(
        self,
        before: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        wanted: str,
        like: ir.Value | None,
        dtype: type[np.generic],
        **attributes: int,
    ) -> ir.Value:
        name = self.names.fresh(wanted)
        node = ir.node(op_type, inputs, attributes, name=self.names.fresh(f"{name}_node"))
        output = node.outputs[0]
        output.name = name
        output.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
        if like is not None and like.shape is not None:
            output.shape = like.shape.copy()
        self.graph.insert_before(before, node)
        return output
