"""Losses of kernels in one unit over the whole model, from made-up error curves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raqu_onnx.channel_flow import ChannelFlow
from raqu_onnx.dropping import DropRules
from raqu_onnx.error_curves import ErrorCurve
from raqu_onnx.kernel_losses import kernel_losses
from raqu_onnx.layout import MappedNode, WeightLayout

WIDTHS = (2, 4, 8)


def curve(name: str, rounding: float) -> ErrorCurve:
    """Errors of two kernels: dropped ones lose 1, 2-bit ones what is given, wider ones ever less."""
    errors = np.full((9, 2), np.nan)
    errors[0] = 1.0
    for bits in WIDTHS:
        errors[bits] = rounding * 4.0 ** (2 - bits)
    return ErrorCurve(name, errors, np.ones(2), absorbed=False)


@pytest.mark.parametrize("rounding", [0.0, 1e-15])
def test_weights_that_rounding_leaves_as_they_are_have_losses_like_the_others(rounding: float) -> None:
    """Ternary weights have no error at 2 bits that their node's loss could be divided by."""
    names = ("plain", "ternary", "other")
    curves = {name: curve(name, rounding if name == "ternary" else 0.1) for name in names}
    nodes = [
        MappedNode(name, "Conv", f"{name}.x", f"{name}.w", None, f"{name}.y", WeightLayout("conv", (2, 3, 1, 1), 1))
        for name in names
    ]
    flows = {name: ChannelFlow(name, (), ("an output",), reaches_output=True) for name in names}
    quantizer: Any = SimpleNamespace(sources={node.name: SimpleNamespace(node=node) for node in nodes})
    sensitivity = {name: np.full(9, 0.0 if name == "ternary" else 0.02) for name in names}
    widths = dict.fromkeys(names, WIDTHS)
    found = kernel_losses(quantizer, curves, DropRules(nodes, flows), sensitivity, widths, may_drop=frozenset(names))
    # A loss of 0.02 for a summed error of 0.2.
    assert found["plain"].loss[:, 2] == pytest.approx(0.01)
    assert found["plain"].loss[:, 0] == pytest.approx(0.1)
    assert found["ternary"].loss[:, 0] == pytest.approx(0.1)
    assert found["ternary"].loss[:, 2] == pytest.approx(0.0, abs=1e-12)
