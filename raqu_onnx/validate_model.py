"""Rules between the manifest and the ONNX model: names, attributes, scales, codes and order."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.graph_edit import constant_array, constant_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from raqu_onnx.manifest import Manifest, NodeEntry
    from raqu_onnx.manifest_view import ManifestView

__all__ = [
    "EmittedModel",
    "activation_chain_findings",
    "attribute_findings",
    "bias_findings",
    "codes_findings",
    "node_findings",
    "weight_findings",
]

_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class EmittedModel:
    """The ONNX model that a manifest belongs to."""

    model: ir.Model
    manifest: Manifest

    @cached_property
    def nodes(self) -> dict[str, ir.Node]:
        """Nodes of the main graph by name; of those that share a name, none."""
        names = Counter(node.name for node in self.model.graph)
        return {node.name: node for node in self.model.graph if node.name and names[node.name] == 1}

    def pairs(self) -> Iterator[tuple[NodeEntry, ir.Node]]:
        """Entries of the manifest with their ONNX nodes, where those exist."""
        for entry in self.manifest.nodes:
            node = self.nodes.get(entry.name)
            if node is not None:
                yield entry, node

    def weight_slot(self, entry: NodeEntry) -> int:
        """Input of the node that takes the weight."""
        return 0 if entry.constant_left else 1

    def codes(self, entry: NodeEntry) -> NDArray[np.int8]:
        """Weight codes in the shape of the ONNX tensor. Needs `weight_findings` to pass."""
        array = constant_array(self.model.graph.initializers[entry.weight])
        if array is None:
            raise ValueError(f"{entry.weight} holds no data")
        return np.asarray(array).astype(np.int8)


def node_findings(emitted: EmittedModel) -> Iterator[str]:
    """The ONNX node exists, has the type and output that the manifest says, and reads what it says."""
    for entry in emitted.manifest.nodes:
        node = emitted.nodes.get(entry.name)
        where = f"node {entry.name}"
        if node is None:
            yield f"{where}: the model has no node of this name (or several)"
            continue
        if node.op_type != entry.op_type or node.domain not in _DOMAINS:
            yield f"{where}: op_type is {entry.op_type}, the model has {node.domain}{node.op_type}"
        if node.outputs[0].name != entry.output:
            yield f"{where}: output is {entry.output}, the model has {node.outputs[0].name}"
        if entry.constant_left and entry.op_type != "MatMul":
            yield f"{where}: constant_left is for MatMul only"
        if entry.input_transposed and entry.op_type != "Gemm":
            yield f"{where}: input_transposed is for Gemm only"


def attribute_findings(emitted: EmittedModel) -> Iterator[str]:
    """Kind of layout, groups, window and transpositions are those of the ONNX attributes."""
    for entry, node in emitted.pairs():
        found: dict[str, object] = {
            "matrix.kind": entry.matrix.kind,
            "matrix.groups": entry.matrix.groups,
            "input_transposed": entry.input_transposed,
            "window": None if entry.window is None else entry.window.model_dump(),
        }
        for key, expected in _expected_attributes(entry, node).items():
            if found[key] != expected:
                yield f"node {entry.name}: {key} is {found[key]}, the ONNX node has {expected}"
        if entry.op_type == "Gemm":
            for name in ("alpha", "beta"):
                attribute = node.attributes.get(name)
                if attribute is not None and attribute.as_float() != 1.0:
                    yield f"node {entry.name}: the ONNX node has {name} {attribute.as_float()}, crossbars know only 1"


def _expected_attributes(entry: NodeEntry, node: ir.Node) -> dict[str, object]:
    if node.op_type in ("Conv", "ConvTranspose"):
        transposed = node.op_type == "ConvTranspose"
        return {
            "matrix.kind": "conv-transpose" if transposed else "conv",
            "matrix.groups": _int(node, "group", 1),
            "input_transposed": False,
            "window": _expected_window(entry, node, transposed),
        }
    transposed_weight = bool(_int(node, "transB", 0)) if node.op_type == "Gemm" else entry.constant_left
    return {
        "matrix.kind": "out-in" if transposed_weight else "in-out",
        "matrix.groups": 1,
        "input_transposed": node.op_type == "Gemm" and bool(_int(node, "transA", 0)),
        "window": None,
    }


def _expected_window(entry: NodeEntry, node: ir.Node, transposed: bool) -> dict[str, object]:
    kernel = tuple(entry.matrix.shape[2:])
    rank = len(kernel)
    auto_pad = node.attributes.get("auto_pad")
    return {
        "kernel": _ints(node, "kernel_shape", kernel),
        "strides": _ints(node, "strides", (1,) * rank),
        "dilations": _ints(node, "dilations", (1,) * rank),
        "pads": _ints(node, "pads", (0,) * (2 * rank)),
        "auto_pad": "NOTSET" if auto_pad is None else auto_pad.as_string(),
        "transposed": transposed,
        "output_padding": _ints(node, "output_padding", (0,) * rank) if transposed else (),
        "output_shape": (_ints(node, "output_shape", ()) or None) if transposed else None,
    }


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return default if attribute is None else tuple(int(value) for value in attribute.as_ints())


def _dequantizer(node: ir.Node, slot: int) -> ir.Node | None:
    """The DequantizeLinear that feeds an input."""
    value = node.inputs[slot] if slot < len(node.inputs) else None
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _name(node: ir.Node, slot: int) -> str | None:
    value = node.inputs[slot] if slot < len(node.inputs) else None
    return None if value is None else value.name


def _constant(node: ir.Node, slot: int) -> NDArray[Any] | None:
    return constant_array(node.inputs[slot]) if slot < len(node.inputs) else None


def weight_findings(emitted: EmittedModel) -> Iterator[str]:
    """The weight is the dequantized initializer that the manifest names, with its shape and scales."""
    for entry, node in emitted.pairs():
        where = f"node {entry.name}"
        slot = emitted.weight_slot(entry)
        dequantizer = _dequantizer(node, slot)
        if dequantizer is None:
            yield f"{where}: input {slot} of the ONNX node is no DequantizeLinear"
            continue
        for key, position in (("weight", 0), ("weight_scale", 1)):
            if _name(dequantizer, position) != getattr(entry, key):
                yield f"{where}: {key} is {getattr(entry, key)}, the model dequantizes {_name(dequantizer, position)}"
        tensor = constant_tensor(dequantizer.inputs[0])
        if tensor is None or tensor.dtype not in (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.INT2):
            yield f"{where}: weight {_name(dequantizer, 0)} is no constant of INT8, INT4 or INT2"
            continue
        shape = tuple(tensor.shape.numpy())
        if shape != entry.matrix.shape:
            yield f"{where}: matrix.shape is {list(entry.matrix.shape)}, weight {tensor.name} is {list(shape)}"
            continue
        if _int(dequantizer, "axis", 1) % len(shape) != entry.matrix.scale_axis or _int(dequantizer, "block_size", 0):
            yield f"{where}: the model's scales do not run along axis {entry.matrix.scale_axis}"
        zero_point = _constant(dequantizer, 2)
        if len(dequantizer.inputs) > 2 and (zero_point is None or np.any(zero_point)):
            yield f"{where}: the zero point of its weight is not 0"
        yield from _scale_findings(where, entry, _constant(dequantizer, 1))


def _scale_findings(where: str, entry: NodeEntry, scales: NDArray[Any] | None) -> Iterator[str]:
    if scales is None or scales.dtype != np.float32 or scales.ndim != 1:
        yield f"{where}: weight_scale {entry.weight_scale} is no constant float vector"
    elif len(scales) != len(entry.scales):
        yield f"{where}: scales: {len(entry.scales)} of them, the model has {len(scales)}"
    else:
        wrong = np.flatnonzero(np.array(entry.scales, np.float64).astype(np.float32) != scales)
        if wrong.size:
            k = int(wrong[0])
            yield f"{where}: scales: {wrong.size} differ, at {k} {entry.scales[k]} stands, the model has {scales[k]}"


def activation_chain_findings(emitted: EmittedModel) -> Iterator[str]:
    """The input comes out of QuantizeLinear, Clip where it has less than 8 bits, and DequantizeLinear, as written."""
    for entry, node in emitted.pairs():
        dequantizer = _dequantizer(node, 1 - emitted.weight_slot(entry))
        where = f"node {entry.name}: activation"
        act = entry.activation
        if act is None:
            if dequantizer is not None:
                yield f"{where}: is null, the model has {_name(dequantizer, 0)}"
            continue
        if dequantizer is None:
            yield f"{where}: the model's input is not quantized"
            continue
        for key, position in (("tensor", 0), ("scale_name", 1), ("zero_point_name", 2)):
            if _name(dequantizer, position) != getattr(act, key):
                yield f"{where}.{key}: is {getattr(act, key)}, the model has {_name(dequantizer, position)}"
        value = dequantizer.inputs[0]
        producer = None if value is None else value.producer()
        top = 255
        if producer is not None and producer.op_type == "Clip":
            low, high = _constant(producer, 1), _constant(producer, 2)
            top = 255 if high is None else int(high)
            if low is not None and int(low) != 0:
                yield f"{where}: the model's Clip begins at {int(low)}"
            source = producer.inputs[0]
            producer = None if source is None else source.producer()
        if top != (1 << act.bits) - 1:
            yield f"{where}.bits: is {act.bits}, the model's codes reach to {top}"
        if producer is None or producer.op_type != "QuantizeLinear":
            yield f"{where}: no QuantizeLinear leads to {act.tensor}"
            continue
        for quantizer in (producer, dequantizer):
            yield from _quantizer_findings(where, entry, quantizer)


def _quantizer_findings(where: str, entry: NodeEntry, node: ir.Node) -> Iterator[str]:
    scale, zero_point = _constant(node, 1), _constant(node, 2)
    act = entry.activation
    if act is None:
        return
    if scale is None or scale.dtype != np.float32 or scale.size != 1 or np.float32(act.scale) != scale.reshape(()):
        yield f"{where}.scale: is {act.scale}, the {node.op_type} has {None if scale is None else scale.tolist()}"
    if (
        zero_point is None
        or zero_point.dtype != np.uint8
        or zero_point.tolist()
        not in (
            act.zero_point,
            [act.zero_point],
        )
    ):
        shown = None if zero_point is None else zero_point.tolist()
        yield f"{where}.zero_point: is {act.zero_point}, the {node.op_type} has {shown}"


def bias_findings(emitted: EmittedModel) -> Iterator[str]:
    """The bias is INT32 in steps of input scale times weight scale, and 0 for dropped kernels."""
    for entry, node in emitted.pairs():
        where = f"node {entry.name}: bias"
        value = node.inputs[2] if len(node.inputs) > 2 else None
        dequantizer = _dequantizer(node, 2)
        if entry.bias is None or entry.activation is None:
            # Without an integer input there is no integer bias; a float one is left alone.
            float_bias = value is not None and dequantizer is None and entry.activation is None
            if entry.bias is not None or (value is not None and not float_bias):
                yield f"{where}: is {entry.bias}, the model has {None if value is None else value.name}"
            continue
        codes = None if dequantizer is None else _constant(dequantizer, 0)
        scales = None if dequantizer is None else _constant(dequantizer, 1)
        if dequantizer is None or _name(dequantizer, 0) != entry.bias or codes is None or codes.dtype != np.int32:
            yield f"{where}: {entry.bias} is not the INT32 constant that the model dequantizes"
            continue
        zero_point = _constant(dequantizer, 2)
        if len(dequantizer.inputs) > 2 and (zero_point is None or np.any(zero_point)):
            yield f"{where}: its zero point is not 0"
        outputs = entry.matrix.groups * entry.matrix.kernels
        channel = np.arange(outputs) % len(entry.scales)
        expected = np.float32(entry.activation.scale) * np.array(entry.scales, np.float32)[channel]
        if codes.shape != (outputs,) or scales is None or not np.array_equal(scales.ravel(), expected):
            yield f"{where}: the scales of {entry.bias} are not activation.scale times scales"
            continue
        bits = np.repeat([bits for bits, _ in entry.bits], [count for _, count in entry.bits])
        wrong = np.flatnonzero((bits[channel] == 0) & (codes != 0))
        if wrong.size:
            yield f"{where}: kernel {wrong[0]} is dropped, its bias code is {codes[wrong[0]]}"


def codes_findings(emitted: EmittedModel, view: ManifestView) -> Iterator[str]:
    """Codes lie in the range of their kernel's bits; what is not stored is 0."""
    # Dropped kernels hold nothing; nor do widths that no cell stores, those of kernels without stored rows.
    ranges = dict.fromkeys(range(MAX_BITS + 1), (0, 0))
    for encoding in view.manifest.encodings:
        ranges.update({width.bits: width.codes for width in encoding.widths})
    for entry in view.manifest.nodes:
        own = view.node(entry)
        codes = emitted.codes(entry)
        by_channel = np.moveaxis(codes, entry.matrix.scale_axis, 0).reshape(len(own.channel_bits), -1)
        limits = np.array([ranges[int(bits)] for bits in own.channel_bits], np.int64)
        wrong = np.flatnonzero((by_channel.min(1) < limits[:, 0]) | (by_channel.max(1) > limits[:, 1]))
        if wrong.size:
            k = int(wrong[0])
            yield (
                f"node {entry.name}: codes: those of channel {k} reach from {by_channel[k].min()} to "
                f"{by_channel[k].max()}, {own.channel_bits[k]} bits hold {limits[k, 0]} to {limits[k, 1]}"
            )
        if entry.rows_not_stored:
            matrices = own.layout.to_matrices(codes)
            for group, first, last in entry.rows_not_stored:
                if matrices[group, first:last].any():
                    yield f"node {entry.name}: rows_not_stored: codes in [{group}, {first}, {last}] are not 0"
