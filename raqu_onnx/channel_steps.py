"""What one operator does to the channels of a tensor, where it keeps them apart.

The channels of a mapped node's output are followed through operators that compute each entry of a channel from entries
of that channel alone. `Channels` says for every position of a tensor which kernel it comes from.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.channel_shapes import SHAPE_STEPS
from raqu_onnx.channels import (
    Channels,
    States,
    constant_inputs,
    fits,
    product_of,
    single_input,
    sizes_of,
    together,
)
from raqu_onnx.graph_edit import constant_array

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.channels import Step

__all__ = ["advance"]


# fmt: off
# f(0) = 0, and the others.
_POINTWISE_ZERO = frozenset({
    "Abs", "Atan", "Cast", "Ceil", "Celu", "Dropout", "Elu", "Erf", "Floor", "Gelu", "HardSwish", "Identity",
    "LeakyRelu", "Mish", "Neg", "Relu", "Round", "Selu", "Sign", "Sin", "Softsign", "Sqrt", "Swish", "Tanh",
    "ThresholdedRelu",
})
_POINTWISE = frozenset({
    "BatchNormalization", "Cos", "Exp", "HardSigmoid", "Log", "Reciprocal", "Sigmoid", "Softplus",
})
# fmt: on
# About as Relu does, these cut off changes below 0.
_RECTIFIERS = frozenset({"Gelu", "HardSwish", "Mish", "Relu", "Swish"})
_PLAIN = frozenset({"Cast", "Dropout", "Identity", "Relu"})
# Over all positions of one channel, which is axis 1.
_SPATIAL_ZERO = frozenset(["AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"])
_BLIND = frozenset({"Shape", "Size"})


def advance(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    """Channels of a node's outputs.

    Args:
        node: Any node that is not mapped and reads a value of `states`.
        states: Channels by value; other values come from elsewhere.

    Returns:
        Channels of each output, none where no output depends on what the tensor holds; or, where channels mix or can
        no longer be followed, the reason.
    """
    if node.domain not in ("", "ai.onnx"):
        return f"{_label(node)} is of domain {node.domain}"
    if node.op_type in _BLIND:
        return ()
    rule = _RULES.get(node.op_type)
    if rule is None:
        return f"{_label(node)} does not keep channels apart"
    found = rule(node, states)
    if isinstance(found, str):
        return f"{_label(node)} {found}"
    if any(output.uses() or output.is_graph_output() for output in node.outputs[len(found) :]):
        return f"{_label(node)} has outputs that do not keep channels apart"
    for channels, output in zip(found, node.outputs, strict=False):
        if not fits(channels.owner, output):
            return f"{_label(node)} gives a shape in which its channels cannot be told"
    return found


def _label(node: ir.Node) -> str:
    return f"{node.op_type} '{node.name}'"


def _pointwise(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    channels = single_input(node, states)
    if channels is None or constant_inputs(node, 1) is None:
        return "mixes it with another value"
    kept = replace(channels, zero=channels.zero and node.op_type in _POINTWISE_ZERO)
    if node.op_type in _RECTIFIERS and channels.plain:
        kept = replace(kept, low=max(kept.low, 0.0))
    return (replace(kept, plain=kept.plain and node.op_type in _PLAIN),)


def _clip(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    channels = single_input(node, states)
    low, high = _clip_limits(node)
    if channels is None or low is None or high is None:
        return "has limits that are no constants"
    kept = replace(channels, zero=channels.zero and low <= 0 <= high)
    return (replace(kept, low=max(kept.low, low), high=min(kept.high, high)) if kept.plain else kept,)


def _clip_limits(node: ir.Node) -> tuple[float | None, float | None]:
    limits: list[float | None] = []
    for slot, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        value = node.inputs[slot] if len(node.inputs) > slot else None
        attribute = node.attributes.get(name)
        if value is not None:
            array = constant_array(value)
            limits.append(None if array is None else float(array.reshape(-1)[0]))
        else:
            limits.append(default if attribute is None else attribute.as_float())
    return limits[0], limits[1]


def _prelu(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    channels = single_input(node, states)
    if channels is None or constant_inputs(node, 1) is None:
        return "has a slope that is no constant"
    return (replace(channels, plain=False),)


def _spatial(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    channels = single_input(node, states)
    if channels is None or channels.owner.size != channels.owner.shape[0]:
        return "works across its channels"
    return (
        replace(
            channels,
            zero=channels.zero and node.op_type in _SPATIAL_ZERO,
            positions=channels.positions * _averaged(node),
            plain=channels.plain and node.op_type in ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"),
        ),
    )


def _averaged(node: ir.Node) -> float:
    """Positions that a pooling node averages into one, NaN where that is not known."""
    if node.op_type == "AveragePool":
        return float(math.prod(node.attributes["kernel_shape"].as_ints()))
    if node.op_type == "GlobalAveragePool":
        return product_of(sizes_of(node.inputs[0]), 1)
    return 1.0


def _resize(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    # That the axes of the channels keep their length is checked for all outputs.
    channels = single_input(node, states)
    mode = node.attributes.get("coordinate_transformation_mode")
    if channels is None or _axes_kept(channels, node) is False:
        return "works across its channels"
    crops = mode is not None and mode.as_string() == "tf_crop_and_resize"
    return (replace(channels, zero=channels.zero and not crops),)


def _axes_kept(channels: Channels, node: ir.Node) -> bool:
    """Whether a node leaves the axes along which the kernel changes as long as they are."""
    before, after = sizes_of(node.inputs[0]), sizes_of(node.outputs[0])
    if before is None or after is None or len(before) != len(after) or len(before) != channels.owner.ndim:
        return False
    # An axis of length 1 that grows by resizing still belongs to one kernel.
    return all(length == 1 or a == b for length, a, b in zip(channels.owner.shape, before, after, strict=True))


def _pad(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    channels = single_input(node, states)
    others = constant_inputs(node, 1)
    if channels is None or others is None or not _axes_kept(channels, node):
        return "pads its channels, or by what is no constant"
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    attribute = node.attributes.get("value")
    array = constant_array(filler)
    value = float(array.reshape(-1)[0]) if array is not None and array.size else 0.0
    value = attribute.as_float() if attribute is not None else value
    return (replace(channels, zero=channels.zero and value == 0),)


def _binary(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    """Add, Sub, Mul, Div, Pow, Max, Min of two values."""
    if len(node.inputs) != 2:
        return "mixes it with other values"
    first, second = (states.get(value) for value in node.inputs)
    if first is not None and second is not None:
        if not np.array_equal(first.owner, second.owner):
            return "mixes channels with others"
        both = replace(together([first, second]), plain=False)
        if node.op_type == "Mul":
            # A value times a gate that is made of it, as exporters write SiLU and HardSwish: both cut off below 0.
            return (replace(both, zero=first.zero or second.zero, low=max(both.low, 0.0)),)
        return (replace(both, zero=both.zero and node.op_type not in ("Div", "Pow")),)
    slot = 0 if first is not None else 1
    channels = first or second
    other = node.inputs[1 - slot]
    array = constant_array(other)
    if channels is None or other is None or other.shape is None or len(other.shape) > channels.owner.ndim + 1:
        return "mixes it with a value of more axes"
    if array is not None:
        return (replace(channels, zero=channels.zero and _keeps_zero(node.op_type, slot, array), plain=False),)
    # A gate, as in squeeze and excitation: a product with 0 is 0, and its readers can make up for what they miss.
    if node.op_type == "Mul" and len(other.shape) == channels.owner.ndim + 1:
        return (replace(channels, plain=False),)
    return "mixes it with another value"


def _keeps_zero(op_type: str, slot: int, other: NDArray[np.generic]) -> bool:
    """Whether 0 in one slot gives 0 with a constant in the other."""
    values = np.asarray(other, np.float64)
    match op_type:
        case "Mul":
            return bool(np.isfinite(values).all())
        case "Div":
            return slot == 0 and bool(values.all())
        case "Pow":
            return slot == 0 and bool((values > 0).all())
        case "Max":
            return bool((values <= 0).all())
        case "Min":
            return bool((values >= 0).all())
        case _:
            return not values.any()


_RULES: dict[str, Step] = {
    **SHAPE_STEPS,
    **dict.fromkeys(_POINTWISE_ZERO | _POINTWISE, _pointwise),
    **dict.fromkeys(_SPATIAL_ZERO | {"InstanceNormalization"}, _spatial),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"), _binary),
    "Clip": _clip,
    "PRelu": _prelu,
    "Pad": _pad,
}
