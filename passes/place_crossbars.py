"""A crossbar, a row and a column for every block of every node."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from raqu_onnx.annotations import NO_COPIES, PLACEMENT, QUANTIZED, SINGLE, mapped_nodes
from raqu_onnx.manifest_stages import execution_order
from raqu_onnx.partitioning import Parts, place_in_parts
from raqu_onnx.placement import DoesNotFitError, Placement, PlacementMethod, place
from raqu_onnx.replication import Budget, replicate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from raqu_onnx.hardware import Chip
    from raqu_onnx.quantized import QuantizedNode
    from raqu_onnx.tiling import Matrix

__all__ = ["PlaceCrossbarsPass"]


@dataclass(frozen=True)
class PlaceCrossbarsPass(ir.passes.InPlacePass):
    """Place the blocks of every quantized node on the chip's crossbars.

    Before and after: the same graph. The model gains a `Placement`; every mapped node gains ``raqu.tiling`` in
    `metadata_props`.

    Attributes:
        chip: The chip.
        replicate: Most crossbars that copies of the slowest nodes may fill, `chip` for all that it has; None for one
            copy of each node.
        partitions: Most parts that are programmed one after the other where the chip is too small, `auto` for as few
            as will do; None where all has to fit at once.
        method: `exact` improves the fast placement where it leaves a gap.
        max_crossbars: On a chip with several crossbar types, stay within so many even where that takes more cells.
    """

    name: ClassVar[str] = "place-crossbars"

    chip: Chip
    replicate: Budget | None = None
    partitions: Parts | None = None
    method: PlacementMethod = "fast"
    max_crossbars: int | None = None

    def requires(self, model: ir.Model) -> None:
        """Every mapped node is quantized."""
        for node in mapped_nodes(model):
            QUANTIZED.require(node)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Place; the graph itself does not change.

        Raises:
            DoesNotFitError: The chip has too few crossbars.
            ConfigError: Copies are wanted, and the cycles of a node are unknown.
        """
        nodes = {QUANTIZED.require(node).node.name: node for node in mapped_nodes(model)}
        quantized = {name: QUANTIZED.require(node) for name, node in nodes.items()}
        matrices = {name: item.matrix() for name, item in quantized.items()}
        placement = self._place(model, matrices)
        if self.replicate is not None:
            placement = self._with_copies(model, placement, quantized)
        PLACEMENT.set(model, placement)
        blocks: dict[str, int] = dict.fromkeys(nodes, 0)
        for placed in placement.blocks:
            blocks[placed.node] += placed.replica == 0
        for name, node in nodes.items():
            matrix = matrices[name]
            node.metadata_props["raqu.tiling"] = json.dumps(
                {
                    "groups": matrix.groups,
                    "rows": matrix.rows,
                    "kernels": matrix.bits.shape[1],
                    "blocks": blocks[name],
                    "replicas": placement.replicas[name],
                    "crossbar_type": ",".join(
                        self.chip.crossbars[kind].name for kind in placement.types_by_node.get(name, (0,))
                    ),
                }
            )
        return ir.passes.PassResult(model, modified=True)

    def _place(self, model: ir.Model, matrices: Mapping[str, Matrix]) -> Placement:
        """All at once, or in parts where that is allowed and needed."""
        if self.partitions is None:
            return place(matrices, self.chip, max_crossbars=self.max_crossbars, method=self.method)
        order, _ = execution_order(model, matrices)
        return place_in_parts(
            matrices, self.chip, order, self.partitions, method=self.method, max_crossbars=self.max_crossbars
        )

    def _with_copies(self, model: ir.Model, single: Placement, quantized: Mapping[str, QuantizedNode]) -> Placement:
        """The placement with copies; the one without, and the reason, where there is no room for them."""
        mvms = {name: item.node.mvms for name, item in quantized.items()}
        inputs = {name: None if (act := item.activation) is None else act.bits for name, item in quantized.items()}
        try:
            placement = replicate(
                single.matrices, self.chip, mvms, inputs, self.replicate or "chip", method=self.method
            )
        except DoesNotFitError as error:
            NO_COPIES.set(model, str(error))
            return single
        SINGLE.set(model, single)
        return placement
