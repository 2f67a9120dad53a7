"""What a whole model costs on a chip: the formulas of `cost` and the schedules of `schedule` over all nodes.

The same function serves a placement (for baselines and `inspect`) and a manifest (when it is written and when it is
checked), so that equal placements have equal costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from raqu_onnx.cost import (
    ArrayFigures,
    Regions,
    Writes,
    array_area_um2,
    cycle_kind,
    cycle_ns,
    figures_of,
    input_slices,
    missing_area,
    missing_energy,
    node_cycles,
    node_energy_pj,
    read_cycles,
    writes,
)
from raqu_onnx.manifest_entries import CostEntry, NodeEntry, PartitionEntry, StageEntry
from raqu_onnx.manifest_stages import assign_turns, rivals_of
from raqu_onnx.schedule import Pipeline, Sequential, Stage, pipeline, sequential

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from raqu_onnx.hardware import Chip
    from raqu_onnx.placement import PlacedBlock, Placement

__all__ = [
    "Flow",
    "ModelCost",
    "NodeLoad",
    "Part",
    "block_regions",
    "entry_regions",
    "manifest_cost",
    "model_cost",
    "placement_cost",
    "placement_parts",
    "with_costs",
]


_Figure = Literal["cycles", "time", "energy", "area", "write_time", "write_energy"]


@dataclass(frozen=True)
class NodeLoad:
    """What one node asks of the crossbars.

    Attributes:
        name: Its name.
        mvms: Matrix-vector products per group and sample, None where shapes are open.
        activation_bits: Bits of its input, None where that stays float.
        regions: Where it lies.
    """

    name: str
    mvms: int | None
    activation_bits: int | None
    regions: Regions

    def cycles(self, chip: Chip, arrays: Sequence[ArrayFigures]) -> int | None:
        """Cycles of one inference, None where MVMs or bits are unknown."""
        if self.mvms is None or self.activation_bits is None:
            return None
        slices = input_slices(self.activation_bits, chip.dac_bits)
        return node_cycles(self.mvms, self.regions.copies, slices, read_cycles(self.regions, arrays))


@dataclass(frozen=True)
class Flow:
    """Order and dependencies of the mapped nodes.

    Attributes:
        order: Their names in a valid order of execution.
        after: The nearest mapped nodes that each depends on.
    """

    order: tuple[str, ...]
    after: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class ModelCost:
    """Cost of a model and of its nodes.

    Attributes:
        total: What the manifest and the report tell.
        cycles: Cycles of one inference by node, None where unknown.
        starts: Cycle within the pipeline's interval at which each stage starts; empty where cycles are unknown.
        energy_pj: Energy of one inference by node; empty where figures are missing.
        parts: The partitions with their costs.
    """

    total: CostEntry
    cycles: Mapping[str, int | None]
    starts: Mapping[str, int]
    energy_pj: Mapping[str, float]
    parts: tuple[PartitionEntry, ...]


@dataclass(frozen=True)
class Part:
    """Nodes that are on the chip together.

    Attributes:
        nodes: Their names.
        crossbars: Half-open range of their crossbar numbers, by type.
    """

    nodes: tuple[str, ...]
    crossbars: tuple[tuple[int, int], ...]


def model_cost(
    chip: Chip, loads: Sequence[NodeLoad], flow: Flow, rivals: Mapping[str, Iterable[str]], parts: Sequence[Part]
) -> ModelCost:
    """Cost of all nodes together.

    Args:
        chip: The chip.
        loads: The mapped nodes.
        flow: Their order and dependencies.
        rivals: Nodes with blocks in the same rows or columns, by node.
        parts: Partitions of consecutive nodes, one where all are on the chip at once.
    """
    arrays = [figures_of(chip, kind) for kind in chip.crossbars]
    cycles = {load.name: load.cycles(chip, arrays) for load in loads}
    unknown = tuple(_open(load) for load in loads if cycles[load.name] is None)
    schedules: list[tuple[Sequential, Pipeline]] = []
    if not unknown:
        against = _with_contenders(loads, rivals, arrays)
        schedules = [_schedules(cycles, _within(flow, part.nodes), against) for part in parts]
    lacking = (*unknown, *missing_energy(chip))
    energy = {} if lacking else {load.name: _energy(load, chip, arrays) for load in loads}
    written = [writes(_joined([load for load in loads if load.name in set(part.nodes)]), chip) for part in parts]
    total = _total(chip, parts, schedules, written, None if lacking else float(sum(energy.values())), unknown)
    starts = {name: start for _, piped in schedules for name, start in piped.starts.items()}
    entries = tuple(
        PartitionEntry(
            nodes=part.nodes,
            crossbars=part.crossbars,
            latency_cycles=schedules[index][0].cycles if schedules else None,
            interval_cycles=schedules[index][1].interval if schedules else None,
            write_cells=wrote.cells,
            write_rows=wrote.rows,
            write_ns=wrote.time_ns,
            write_energy_pj=wrote.energy_pj,
        )
        for index, (part, wrote) in enumerate(zip(parts, written, strict=True))
    )
    return ModelCost(total, cycles, starts, energy, entries)


def _within(flow: Flow, names: Sequence[str]) -> Flow:
    """The part of a flow between some of its nodes: what comes from others is there before they start."""
    chosen = set(names)
    after = {name: tuple(item for item in flow.after.get(name, ()) if item in chosen) for name in names}
    return Flow(tuple(name for name in flow.order if name in chosen), after)


def _total(
    chip: Chip,
    parts: Sequence[Part],
    schedules: Sequence[tuple[Sequential, Pipeline]],
    written: Sequence[Writes],
    energy: float | None,
    unknown: tuple[str, ...],
) -> CostEntry:
    """Sums over the partitions; the area is that of the arrays of the largest one, by type."""
    counts = [max(last - first for first, last in ranges) for ranges in zip(*(p.crossbars for p in parts), strict=True)]
    used = [index for index, count in enumerate(counts) if count]
    no_area = missing_area(chip, used)
    areas = [] if no_area else [counts[index] * array_area_um2(chip, chip.crossbars[index]) for index in used]
    times, energies = [item.time_ns for item in written], [item.energy_pj for item in written]
    missing: dict[_Figure, tuple[str, ...]] = {
        "cycles": unknown,
        "time": () if cycle_ns(chip) is not None else ("cycle_ns",),
        "energy": (*unknown, *missing_energy(chip)),
        "area": no_area,
        "write_time": ("components.cell_write_ns",) if None in times else (),
        "write_energy": ("components.cell_write_energy_pj",) if None in energies else (),
    }
    return CostEntry(
        cycle=cycle_kind(chip),
        cycle_ns=cycle_ns(chip),
        latency_cycles=None if unknown else sum(alone.cycles for alone, _ in schedules),
        critical_path=tuple(name for alone, _ in schedules for name in alone.critical_path),
        interval_cycles=None if unknown else sum(piped.interval for _, piped in schedules),
        pipeline_latency_cycles=None if unknown else sum(piped.latency for _, piped in schedules),
        energy_pj=energy,
        area_um2=None if no_area else float(sum(areas)),
        write_cells=sum(item.cells for item in written),
        write_rows=sum(item.rows for item in written),
        write_ns=_sum(times),
        write_energy_pj=_sum(energies),
        missing={key: keys for key, keys in missing.items() if keys},
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(sum(known)) if len(known) == len(values) else None


def _open(load: NodeLoad) -> str:
    return f"node {load.name}: {'its MVMs are open' if load.mvms is None else 'its input stays float'}"


def _with_contenders(
    loads: Sequence[NodeLoad], rivals: Mapping[str, Iterable[str]], arrays: Sequence[ArrayFigures]
) -> dict[str, set[str]]:
    """Rivals, and nodes in one crossbar that does not drive all its wordlines and read all its bitlines in one cycle.

    These could compute at once, but not without slowing each other: derived here, they wait for each other instead.
    """
    found = {load.name: set(rivals.get(load.name, ())) for load in loads}
    tenants: dict[tuple[int, int], set[str]] = {}
    for load in loads:
        for key in set(zip(load.regions.kind.tolist(), load.regions.crossbar.tolist(), strict=True)):
            if arrays[key[0]].is_limited:
                tenants.setdefault(key, set()).add(load.name)
    for names in tenants.values():
        for name in names:
            found[name] |= names - {name}
    return found


def _schedules(
    cycles: Mapping[str, int | None], flow: Flow, rivals: Mapping[str, Iterable[str]]
) -> tuple[Sequential, Pipeline]:
    stages = [
        Stage(name, cycles[name] or 0, tuple(flow.after.get(name, ())), tuple(sorted(rivals.get(name, ()))))
        for name in flow.order
    ]
    return sequential(stages), pipeline(stages)


def _energy(load: NodeLoad, chip: Chip, arrays: Sequence[ArrayFigures]) -> float:
    slices = input_slices(load.activation_bits or 0, chip.dac_bits)
    return node_energy_pj(load.mvms or 0, slices, load.regions, chip, arrays)


def _joined(loads: Sequence[NodeLoad]) -> Regions:
    keys = Regions.__dataclass_fields__
    parts = [load.regions for load in loads]
    return Regions(*(np.concatenate([np.empty(0, np.int64), *(getattr(part, key) for part in parts)]) for key in keys))


# --------------------------------------------------------------------------------------------------------- placements


def block_regions(blocks: Sequence[PlacedBlock], arrays_per_placement: Sequence[int]) -> Regions:
    """Regions of one node's blocks.

    Args:
        blocks: In the order in which they take their turns.
        arrays_per_placement: By crossbar type.
    """
    table = []
    for placed, turn in zip(blocks, assign_turns(blocks), strict=True):
        kind, block = placed.crossbar_type, placed.block
        arrays = arrays_per_placement[kind]
        table += [
            (kind, placed.crossbar * arrays + array, turn, placed.replica, placed.row, block.height, block.width)
            for array in range(arrays)
        ]
    return Regions.of(table)


def placement_cost(
    placement: Placement, mvms: Mapping[str, int | None], activation_bits: Mapping[str, int | None], flow: Flow
) -> ModelCost:
    """Cost of a placement that no manifest describes.

    Args:
        placement: Where every block lies.
        mvms: MVMs per group and sample by node, None where shapes are open.
        activation_bits: Bits of the inputs by node, None where they stay float.
        flow: Order and dependencies of the nodes.
    """
    per_type = [shape.encoding.arrays_per_placement for shape in placement.geometries]
    blocks: dict[str, list[PlacedBlock]] = {name: [] for name in placement.matrices}
    for placed in placement.blocks:
        blocks[placed.node].append(placed)
    loads = [
        NodeLoad(name, mvms[name], activation_bits[name], block_regions(own, per_type)) for name, own in blocks.items()
    ]
    return model_cost(placement.chip, loads, flow, rivals_of(placement.blocks), placement_parts(placement))


def placement_parts(placement: Placement) -> tuple[Part, ...]:
    """Partitions of a placement, in crossbars."""
    sizes = [shape.encoding.arrays_per_placement for shape in placement.geometries]
    return tuple(
        Part(
            part.nodes,
            tuple((f * size, (f + n) * size) for f, n, size in zip(part.first, part.slots, sizes, strict=True)),
        )
        for part in placement.parts
    )


# ---------------------------------------------------------------------------------------------------------- manifests


def entry_regions(node: NodeEntry) -> Regions:
    """Regions of one node of a manifest."""
    return Regions.of(
        [
            (p.type, p.crossbar, p.turn, p.replica, p.rows[0], p.rows[1] - p.rows[0], p.cols[1] - p.cols[0])
            for p in node.placements
        ]
    )


def manifest_cost(
    chip: Chip, nodes: Sequence[NodeEntry], stages: Sequence[StageEntry], parts: Sequence[Part]
) -> ModelCost:
    """Cost of what a manifest's entries describe.

    Args:
        chip: The chip.
        nodes: The mapped nodes.
        stages: One for each, in a valid order of execution.
        parts: The partitions.
    """
    loads = [
        NodeLoad(node.name, node.mvms, None if node.activation is None else node.activation.bits, entry_regions(node))
        for node in nodes
    ]
    flow = Flow(tuple(stage.node for stage in stages), {stage.node: stage.after for stage in stages})
    return model_cost(chip, loads, flow, {stage.node: stage.shares_with for stage in stages}, parts)


def with_costs(stages: Sequence[StageEntry], cost: ModelCost) -> tuple[StageEntry, ...]:
    """The same stages with their cycles, energies and places in the pipeline."""
    return tuple(
        stage.model_copy(
            update={
                "cycles": cost.cycles[stage.node],
                "start": cost.starts.get(stage.node),
                "energy_pj": cost.energy_pj.get(stage.node),
            }
        )
        for stage in stages
    )
