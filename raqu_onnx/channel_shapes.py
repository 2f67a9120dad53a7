"""What operators that move positions around do to the channels of a tensor."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.channels import (
    NOBODY,
    Channels,
    States,
    constant_inputs,
    integers_of,
    product_of,
    single_input,
    sizes_of,
    together,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.channels import Step

__all__ = ["SHAPE_STEPS"]


def _reshape(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    """Reshape, Flatten, Squeeze and Unsqueeze: what stays in each sample can be followed position by position."""
    channels = single_input(node, states)
    before, after = sizes_of(node.inputs[0]), sizes_of(node.outputs[0])
    if channels is None or before is None or after is None or None in before:
        return "reshapes what is not of a known size"
    fixed = [size for size in before if size is not None]
    total = math.prod(fixed)
    target = [size for size in after if size is not None]
    # As many values in each sample as before: then samples stay apart.
    if len(target) != len(after) or math.prod(target) != total or len(fixed) != channels.owner.ndim:
        return "reshapes what is not of a known size, or across samples"
    return (replace(channels, owner=_compressed(np.broadcast_to(channels.owner, fixed).reshape(target))),)


def _compressed(owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Axes along which nothing changes cut to length 1."""
    for axis in range(owner.ndim):
        first = np.take(owner, [0], axis)
        if (owner == first).all():
            owner = first
    return np.ascontiguousarray(owner)


def _transpose(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    channels = single_input(node, states)
    order = integers_of(node, "perm", 1)
    if channels is None or order is None or order[0] != 0:
        return "moves the axis of the samples"
    return (replace(channels, owner=channels.owner.transpose([axis - 1 for axis in order[1:]])),)


def _concat(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    parts: list[NDArray[np.int64]] = []
    axis = node.attributes["axis"].as_int()
    rank = next(states[value].owner.ndim for value in node.inputs if value in states)
    place = axis % (rank + 1) - 1
    if place < 0:
        return "joins samples"
    for value in node.inputs:
        sizes = sizes_of(value)
        length = None if sizes is None or len(sizes) != rank else sizes[place]
        if length is None:
            return "joins values of unknown sizes"
        owner = states[value].owner if value in states else np.full((1,) * rank, NOBODY)
        shape = list(owner.shape)
        shape[place] = length
        parts.append(np.broadcast_to(owner, shape))
    common = list(np.broadcast_shapes(*((*part.shape[:place], 1, *part.shape[place + 1 :]) for part in parts)))
    full = [np.broadcast_to(part, [*common[:place], part.shape[place], *common[place + 1 :]]) for part in parts]
    parts_read = [states[value] for value in node.inputs if value in states]
    return (replace(together(parts_read), owner=np.concatenate(full, place)),)


def _split(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    channels = single_input(node, states)
    attribute = node.attributes.get("axis")
    if channels is None:
        return "mixes it with another value"
    owner = channels.owner
    place = (0 if attribute is None else attribute.as_int()) % (owner.ndim + 1) - 1
    if place < 0:
        return "takes samples apart"
    if owner.shape[place] == 1:
        return (channels,) * len(node.outputs)
    lengths = [(sizes_of(output) or [None] * owner.ndim)[place] for output in node.outputs]
    known = [length for length in lengths if length is not None]
    if len(known) != len(lengths) or sum(known) != owner.shape[place]:
        return "splits it at unknown places"
    pieces = np.split(owner, np.cumsum(known)[:-1], axis=place)
    return tuple(replace(channels, owner=piece) for piece in pieces)


def _slice(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    channels = single_input(node, states)
    starts, ends = integers_of(node, "starts", 1), integers_of(node, "ends", 2)
    if channels is None or starts is None or ends is None or constant_inputs(node, 1) is None:
        return "cuts at places that are no constants"
    axes = integers_of(node, "axes", 3) or list(range(len(starts)))
    steps = integers_of(node, "steps", 4) or [1] * len(starts)
    owner = channels.owner
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        place = axis % (owner.ndim + 1) - 1
        if place < 0:
            return "cuts the axis of the samples"
        if owner.shape[place] == 1:
            continue
        if step < 0:
            return "turns its channels round"
        owner = owner[(slice(None),) * place + (slice(start, end, step),)]
    return (replace(channels, owner=owner),)


def _reduce(node: ir.Node, states: States) -> tuple[Channels, ...] | str:
    channels = single_input(node, states)
    axes = integers_of(node, "axes", 1)
    if channels is None or not axes:
        return "reduces all axes, or such as are not known"
    owner = channels.owner
    reduced = {axis % (owner.ndim + 1) for axis in axes}
    if 0 in reduced or any(owner.shape[axis - 1] > 1 for axis in reduced):
        return "adds up its channels"
    positions = channels.positions
    if node.op_type == "ReduceMean":
        sizes = sizes_of(node.inputs[0])
        positions *= product_of(None if sizes is None else [sizes[axis - 1] for axis in sorted(reduced)], 0)
    keep = node.attributes.get("keepdims")
    if keep is not None and not keep.as_int():
        owner = owner.reshape([size for axis, size in enumerate(owner.shape, 1) if axis not in reduced])
    return (replace(channels, owner=owner, positions=positions, plain=channels.plain and node.op_type == "ReduceMean"),)


SHAPE_STEPS: dict[str, Step] = {
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare"), _reduce
    ),
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
