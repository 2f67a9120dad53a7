"""Layers of float16 that compute in float."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from raqu_onnx.already_quantized import excluded_names
from raqu_onnx.graph_edit import Names, append_node, drop_unused_initializers, graph_of, name_of
from raqu_onnx.layout import MappedNode
from raqu_onnx.mapping import MAPPABLE_OPS, describe_node

__all__ = ["WidenHalfPass"]


@dataclass(frozen=True)
class WidenHalfPass(ir.passes.InPlacePass):
    """Put Casts around every layer with a constant weight of float16, so that it can be quantized like any other.

    Before, all float16::

        y = Conv (x, w, b)

    After, with `w` and `b` widened to float::

        x_float = Cast <to = float> (x)
        y_float = Conv (x_float, w, b)
        y = Cast <to = float16> (y_float)

    QuantizeLinear takes float16 too, but then scales are float16 as well, and the scale of a bias, a product of two
    small numbers, falls below what float16 can hold. onnxruntime's CPU provider computes such layers in float anyhow.
    Names, inputs and outputs stay; layers that share an input share its Cast. A second run finds nothing to do.

    Attributes:
        exclude: Patterns of nodes that stay as they are.
    """

    exclude: tuple[str, ...] = ()

    name: ClassVar[str] = "widen-half"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the Casts in place."""
        layers: list[tuple[ir.Node, MappedNode]] = []
        excluded = excluded_names(model, self.exclude)
        for node in model.graph:
            if node.op_type in MAPPABLE_OPS and node.domain == "" and node.name not in excluded:
                found = describe_node(node, ir.DataType.FLOAT16)
                if isinstance(found, MappedNode):
                    layers.append((node, found))
        writer = _Writer(Names(model), {node for node, _ in layers})
        for node, found in layers:
            writer.widen(node, 1 if found.constant_left else 0)
        return ir.passes.PassResult(model, bool(layers))


@dataclass
class _Writer:
    names: Names
    layers: set[ir.Node]
    casts: dict[ir.Value, ir.Value] = field(default_factory=dict)
    constants: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def widen(self, layer: ir.Node, activation_slot: int) -> None:
        for slot, value in enumerate(layer.inputs):
            if value is not None:
                wide = self._cast(layer, value) if slot == activation_slot else self._constant(layer, value)
                layer.replace_input_with(slot, wide)
                drop_unused_initializers([value])
        append_node(layer, "Cast", [], self.names, f"{layer.name}_to_half", [_to(ir.DataType.FLOAT16)])
        layer.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)

    def _cast(self, layer: ir.Node, value: ir.Value) -> ir.Value:
        if value not in self.casts:
            cast = ir.Node(
                "", "Cast", [value], [_to(ir.DataType.FLOAT)], name=self.names.fresh(f"{value.name}_to_float")
            )
            wide = cast.outputs[0]
            wide.name = self.names.fresh(f"{value.name}_float")
            wide.type = ir.TensorType(ir.DataType.FLOAT)
            wide.shape = None if value.shape is None else value.shape.copy()
            graph_of(layer).insert_before(layer, cast)
            self.casts[value] = wide
        return self.casts[value]

    def _constant(self, layer: ir.Node, value: ir.Value) -> ir.Value:
        if value not in self.constants:
            tensor = value.const_value
            if tensor is None:
                raise ValueError(f"{layer.name}: {value.name} is no constant")
            self.constants[value] = self._widened(layer, value, tensor)
        return self.constants[value]

    def _widened(self, layer: ir.Node, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        """The constant itself where only these layers read it, else one of its own for them."""
        alone = not value.is_graph_output() and all(use.node in self.layers for use in value.uses())
        name = name_of(value) if alone else self.names.fresh(f"{value.name}_float")
        # Read when it is needed: a look at a model's shapes must not read its weights.
        wide = ir.LazyTensor(
            lambda: ir.Tensor(tensor.numpy().astype(np.float32), name=name),
            ir.DataType.FLOAT,
            ir.Shape(tensor.shape.numpy()),
            cache=True,
            name=name,
        )
        if not alone:
            value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), const_value=wide)
            graph_of(layer).register_initializer(value)
        value.const_value, value.type = wide, ir.TensorType(ir.DataType.FLOAT)
        return value


def _to(kind: ir.DataType) -> ir.Attr:
    return ir.AttrInt64("to", kind.value)
