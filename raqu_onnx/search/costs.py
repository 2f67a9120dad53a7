"""Costs of candidates from the cost model that the manifest reports, so that what is judged is what is told."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raqu_onnx.manifest_stages import rivals_of
from raqu_onnx.model_cost import NodeLoad, block_regions, model_cost, placement_parts
from raqu_onnx.placement import DoesNotFitError
from raqu_onnx.search.budget import Cost

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from raqu_onnx.cost import Regions
    from raqu_onnx.hardware import Chip
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.model_cost import Flow, ModelCost, Part
    from raqu_onnx.placement import PlacedBlock, Placement

__all__ = ["CostModel"]

# Placements that are remembered: steps of a repair ask for the costs of the same weights again and again.
_REMEMBERED = 32


@dataclass(frozen=True)
class _Placed:
    """What costs need of a placement."""

    crossbars: int
    average_bits: float
    regions: Mapping[str, Regions]
    rivals: Mapping[str, set[str]]
    parts: tuple[Part, ...]


class CostModel:
    """Costs of weights and activation bits on a chip, one copy of each node.

    Args:
        nodes: The mapped nodes, in graph order.
        chip: The chip.
        flow: Order and dependencies of the nodes.
    """

    def __init__(self, nodes: Sequence[MappedNode], chip: Chip, flow: Flow) -> None:
        self._mvms = {node.name: node.mvms for node in nodes}
        self._weights = sum(node.weights for node in nodes)
        self._chip = chip
        self._flow = flow
        self._placed: OrderedDict[object, _Placed] = OrderedDict()

    def measure(self, key: object, place: Callable[[], Placement], activations: Sequence[int] | None) -> Cost | None:
        """Cost of a candidate, None where the chip is too small.

        Args:
            key: Stands for the weights.
            place: Places the weights; called where the placement is not remembered.
            activations: Bits of the inputs in the order of the nodes, None where they stay float.
        """
        found = self._run(key, place, activations)
        if found is None:
            return None
        placed, cost = found
        total = cost.total
        nanoseconds = (
            None if total.latency_cycles is None or total.cycle_ns is None else total.latency_cycles * total.cycle_ns
        )
        return Cost(placed.crossbars, placed.average_bits, total.latency_cycles, nanoseconds, total.energy_pj)

    def by_node(
        self, key: object, place: Callable[[], Placement], activations: Sequence[int] | None
    ) -> ModelCost | None:
        """Cycles and energies of the nodes, None where the chip is too small."""
        found = self._run(key, place, activations)
        return None if found is None else found[1]

    def _run(
        self, key: object, place: Callable[[], Placement], activations: Sequence[int] | None
    ) -> tuple[_Placed, ModelCost] | None:
        if key not in self._placed:
            placed = self._placed_by(place)
            if placed is None:
                return None
            self._placed[key] = placed
            if len(self._placed) > _REMEMBERED:
                self._placed.popitem(last=False)
        self._placed.move_to_end(key)
        placed = self._placed[key]
        bits = activations or (None,) * len(self._mvms)
        loads = [
            NodeLoad(name, mvms, own, placed.regions[name])
            for (name, mvms), own in zip(self._mvms.items(), bits, strict=True)
        ]
        return placed, model_cost(self._chip, loads, self._flow, placed.rivals, placed.parts)

    def _placed_by(self, place: Callable[[], Placement]) -> _Placed | None:
        try:
            found = place()
        except DoesNotFitError:
            return None
        per_type = [shape.encoding.arrays_per_placement for shape in found.geometries]
        blocks: dict[str, list[PlacedBlock]] = {name: [] for name in found.matrices}
        for placed in found.blocks:
            blocks[placed.node].append(placed)
        return _Placed(
            found.crossbars,
            found.weight_bits / self._weights,
            {name: block_regions(own, per_type) for name, own in blocks.items()},
            rivals_of(found.blocks),
            placement_parts(found),
        )
