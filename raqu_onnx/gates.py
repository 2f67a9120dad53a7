"""Which values of a tensor matter to what reads it: those that Relu or Clip let through."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx
from onnx import numpy_helper

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["open_range"]


def open_range(
    name: str, readers: Mapping[str, Sequence[onnx.NodeProto | None]], constants: Mapping[str, onnx.TensorProto]
) -> tuple[float, float] | None:
    """The range within which changes of a value reach its readers, all of which cut off what lies outside.

    Args:
        name: The value.
        readers: Who reads each value.
        constants: Initializers by name.

    Returns:
        The widest range of any reader; None where one lets everything through, or is not known.
    """
    ranges = [_passed(item, name, constants) for item in readers.get(name, ())]
    known = [item for item in ranges if item is not None]
    if not known or len(known) < len(ranges):
        return None
    low, high = min(item[0] for item in known), max(item[1] for item in known)
    return (low, high) if low < high and (low, high) != (-math.inf, math.inf) else None


def _passed(
    item: onnx.NodeProto | None, name: str, constants: Mapping[str, onnx.TensorProto]
) -> tuple[float, float] | None:
    """What one reader lets through."""
    if item is None or item.domain not in ("", "ai.onnx") or item.input[0] != name or name in item.input[1:]:
        return None
    if item.op_type == "Relu":
        return 0.0, math.inf
    if item.op_type != "Clip":
        return None
    low, high = (_bound(item, place, constants) for place in (1, 2))
    return None if low is None or high is None else (low, high)


def _bound(item: onnx.NodeProto, place: int, constants: Mapping[str, onnx.TensorProto]) -> float | None:
    """The lower (1) or upper (2) bound of a Clip, None where it is computed."""
    # Before opset 11 bounds were attributes.
    for attribute in item.attribute:
        if attribute.name == ("min", "max")[place - 1]:
            return float(attribute.f)
    if len(item.input) <= place or not item.input[place]:
        return (-math.inf, math.inf)[place - 1]
    constant = constants.get(item.input[place])
    return None if constant is None else float(numpy_helper.to_array(constant).reshape(-1)[0])
