"""Bits of the mapped nodes of a quantized model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.annotations import QUANTIZED, mapped_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["bits_by_node", "dropped_by_node", "mean_bits"]


def dropped_by_node(model: ir.Model) -> dict[str, int]:
    """Kernels with 0 bits, of the nodes that have any."""
    found = {item.node.name: item for node in model.graph if (item := QUANTIZED.get(node)) is not None}
    counts = {name: int(np.count_nonzero(item.matrix().bits == 0)) for name, item in found.items()}
    return {name: count for name, count in counts.items() if count}


def bits_by_node(model: ir.Model) -> dict[str, tuple[float, int | None]]:
    """Mean weight bits per kernel and activation bits, by node."""
    found: dict[str, tuple[float, int | None]] = {}
    for node in model.graph:
        quantized = QUANTIZED.get(node)
        if quantized is not None:
            activation = None if quantized.activation is None else quantized.activation.bits
            found[quantized.node.name] = (float(quantized.bits.mean()), activation)
    return found


def mean_bits(model: ir.Model) -> tuple[float, float | None]:
    """Mean bits per weight, and mean bits of the inputs of mapped nodes."""
    quantized = [QUANTIZED.require(node) for node in mapped_nodes(model)]
    sizes = [item.matrix() for item in quantized]
    weights = sum(matrix.weight_bits for matrix in sizes) / sum(matrix.rows * matrix.bits.size for matrix in sizes)
    activations = [item.activation.bits for item in quantized if item.activation is not None]
    return weights, sum(activations) / len(activations) if activations else None
