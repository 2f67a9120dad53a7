"""A crossbar, a row and a column for every block of every node."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from raqu_onnx.annotations import PLACEMENT, QUANTIZED, mapped_nodes
from raqu_onnx.placement import place

if TYPE_CHECKING:
    from raqu_onnx.hardware import Chip

__all__ = ["PlaceCrossbarsPass"]


@dataclass(frozen=True)
class PlaceCrossbarsPass(ir.passes.InPlacePass):
    """Place the blocks of every quantized node on the chip's crossbars.

    Before and after: the same graph. The model gains a `Placement`; every mapped node gains ``raqu.tiling`` in
    `metadata_props`.

    Attributes:
        chip: The chip.
    """

    name: ClassVar[str] = "place-crossbars"

    chip: Chip

    def requires(self, model: ir.Model) -> None:
        """Every mapped node is quantized."""
        for node in mapped_nodes(model):
            QUANTIZED.require(node)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Place; the graph itself does not change.

        Raises:
            DoesNotFitError: The chip has too few crossbars.
        """
        nodes = {QUANTIZED.require(node).node.name: node for node in mapped_nodes(model)}
        quantized = {name: QUANTIZED.require(node) for name, node in nodes.items()}
        matrices = {name: item.matrix() for name, item in quantized.items()}
        placement = place(matrices, self.chip)
        PLACEMENT.set(model, placement)
        blocks: dict[str, int] = dict.fromkeys(nodes, 0)
        for placed in placement.blocks:
            blocks[placed.node] += 1
        for name, node in nodes.items():
            matrix = matrices[name]
            node.metadata_props["raqu.tiling"] = json.dumps(
                {
                    "groups": matrix.groups,
                    "rows": matrix.rows,
                    "kernels": matrix.bits.shape[1],
                    "blocks": blocks[name],
                    "crossbar_type": self.chip.crossbars[placement.types_by_node.get(name, 0)].name,
                }
            )
        return ir.passes.PassResult(model, modified=True)
