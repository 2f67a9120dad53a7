"""Which kernel of a mapped node each position of a tensor comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from raqu_onnx.graph_edit import constant_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "NOBODY",
    "Channels",
    "States",
    "Step",
    "constant_inputs",
    "fits",
    "integers_of",
    "product_of",
    "single_input",
    "sizes_of",
    "together",
]

#: Kernel of a position that no kernel of the node feeds.
NOBODY = -1


@dataclass(frozen=True)
class Channels:
    """Which kernel the positions of a tensor come from.

    Attributes:
        owner: Kernel of every position of one sample, -1 for none; one axis for each of the tensor's but the first,
            of length 1 where the kernel does not change along it.
        zero: A kernel whose output is 0 everywhere gives exactly 0 at all its positions.
        low: Below this value of the kernel's output, changes of it are cut off (0 behind Relu).
        high: Above this value they are.
        positions: Positions of the kernel's output that are averaged into one; NaN for all of an unknown number.
        plain: Values so far are those of the kernel's output, cut off at most.
    """

    owner: NDArray[np.int64]
    zero: bool
    low: float = -math.inf
    high: float = math.inf
    positions: float = 1.0
    plain: bool = True


States = Mapping["ir.Value | None", Channels]
"""Channels by value; values that are not in it come from elsewhere."""

Step = Callable[[ir.Node, States], "tuple[Channels, ...] | str"]
"""Gives the channels of a node's outputs, or why they can no longer be told apart."""


def together(parts: list[Channels]) -> Channels:
    """Several values of one kernel as one: 0 if all are; of the rest, what lets most of a change through."""
    return Channels(
        parts[0].owner,
        zero=all(part.zero for part in parts),
        low=min(part.low for part in parts),
        high=max(part.high for part in parts),
        positions=float(np.fmin.reduce([part.positions for part in parts])),
        plain=all(part.plain for part in parts),
    )


def fits(owner: NDArray[np.int64], value: ir.Value) -> bool:
    """Whether every axis along which the kernel changes has its length in the value's shape."""
    sizes = sizes_of(value)
    if sizes is None or len(sizes) != owner.ndim:
        return False
    return all(length in (1, size) for length, size in zip(owner.shape, sizes, strict=True))


def sizes_of(value: ir.Value | None) -> list[int | None] | None:
    """Sizes of all axes but the first, None for those that are not fixed; None where nothing is known."""
    if value is None or value.shape is None or len(value.shape) < 1:
        return None
    return [size if isinstance(size, int) else None for size in value.shape[1:]]


def single_input(node: ir.Node, states: States) -> Channels | None:
    """Channels of the first input, if no other input has any."""
    others = any(value in states for value in node.inputs[1:])
    return None if others else states.get(node.inputs[0])


def constant_inputs(node: ir.Node, start: int) -> list[NDArray[np.generic]] | None:
    """The inputs from one on that are there; None where one is no constant."""
    arrays = [constant_array(value) for value in node.inputs[start:] if value is not None]
    found = [array for array in arrays if array is not None]
    return found if len(found) == len(arrays) else None


def integers_of(node: ir.Node, name: str, slot: int) -> list[int] | None:
    """Integers that newer opsets have as an input and older ones as an attribute."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return [int(item) for item in attribute.as_ints()]
    array = constant_array(node.inputs[slot]) if len(node.inputs) > slot else None
    return None if array is None else [int(item) for item in array.reshape(-1)]


def product_of(sizes: list[int | None] | None, start: int) -> float:
    """Product of sizes from one on, NaN where one is not known."""
    if sizes is None:
        return math.nan
    return math.prod(math.nan if size is None else float(size) for size in sizes[start:])
