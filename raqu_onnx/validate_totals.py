"""Rules of the figures that a manifest derives from its placements: totals, crossbar counts and stages."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from raqu_onnx.bounds import fewest_cells, fewest_crossbars
from raqu_onnx.errors import ChipError
from raqu_onnx.manifest_stages import clashes
from raqu_onnx.model_cost import Part, manifest_cost, with_costs
from raqu_onnx.placement import geometries
from raqu_onnx.tiling import Matrix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from raqu_onnx.manifest import Manifest, NodeEntry
    from raqu_onnx.manifest_view import ManifestView
    from raqu_onnx.validate_mapping import PlacementTable

__all__ = ["cost_findings", "crossbar_findings", "partition_findings", "stage_findings", "totals_findings"]


def crossbar_findings(table: PlacementTable) -> Iterator[str]:
    """Crossbars in use are numbered from 0, counted right, and no more than the chip has."""
    manifest = table.manifest
    chip, listed = manifest.chip, manifest.totals.crossbars
    if [total.name for total in listed] != [kind.name for kind in chip.crossbars]:
        yield "totals.crossbars: are not the chip's crossbar types in its order"
        return
    for index, (kind, total) in enumerate(zip(chip.crossbars, listed, strict=True)):
        used = np.unique(table.crossbar[table.type == index])
        where = f"totals.crossbars: {kind.name}"
        if used.size and used[-1] != used.size - 1:
            yield f"{where}: {used.size} crossbars are in use, but their numbers reach up to {used[-1]}"
        if total.allocated != used.size:
            yield f"{where}: allocated is {total.allocated}, placements use {used.size}"
        if total.count != kind.count:
            yield f"{where}: count is {total.count}, the chip has {kind.count}"
        if kind.count is not None and used.size > kind.count * len(manifest.partitions):
            yield f"{where}: {used.size} crossbars are in use, the chip has {kind.count}"


def totals_findings(table: PlacementTable, view: ManifestView) -> Iterator[str]:
    """Numerators and denominators follow from bits, placements and the chip."""
    manifest = table.manifest
    totals, chip = manifest.totals, manifest.chip
    programmed, weight_bits, dropped = _weights(view)
    cells = [total.allocated * kind.cells for total, kind in zip(totals.crossbars, chip.crossbars, strict=True)]
    bits = [count * kind.cell_bits for count, kind in zip(cells, chip.crossbars, strict=True)]
    bound, bound_cells = _lower_bounds(view)
    for key, found, expected in (
        ("cell_utilization.numerator", totals.cell_utilization.numerator, programmed),
        ("cell_utilization.denominator", totals.cell_utilization.denominator, sum(cells)),
        ("bit_utilization.numerator", totals.bit_utilization.numerator, weight_bits),
        ("bit_utilization.denominator", totals.bit_utilization.denominator, sum(bits)),
        ("placements", totals.placements, len(table.entries)),
        ("dropped_kernels", totals.dropped_kernels, dropped),
        ("lower_bound", totals.lower_bound, bound),
        ("lower_bound_cells", totals.lower_bound_cells, bound_cells),
    ):
        if found != expected:
            yield f"totals.{key}: is {found}, the placements give {expected}"


def _weights(view: ManifestView) -> tuple[int, int, int]:
    """Programmed cells and weight bits of all replicas, and dropped kernels."""
    programmed = weight_bits = dropped = 0
    for node in view.manifest.nodes:
        own, copies = view.node(node), _copies(node)
        kind = next((placement.type for placement in node.placements), None)
        for group in range(node.matrix.groups):
            rows, bits = len(own.stored_rows(group)), own.bits[group]
            weight_bits += copies * rows * int(bits.sum())
            dropped += int(np.count_nonzero(bits == 0))
            if kind is not None:
                entry = view.encodings[kind]
                per_column = entry.rows_per_weight * entry.arrays_per_placement
                programmed += copies * rows * own.columns(group, kind).count * per_column
    return programmed, weight_bits, dropped


def _copies(node: NodeEntry) -> int:
    return max((placement.replica + 1 for placement in node.placements), default=1)


def _lower_bounds(view: ManifestView) -> tuple[int | None, int | None]:
    """Fewest crossbars and cells, None where the chip is too small for any."""
    manifest = view.manifest
    matrices: list[Matrix] = []
    for node in manifest.nodes:
        own, groups = view.node(node), range(node.matrix.groups)
        stored = np.array([len(own.stored_rows(group)) for group in groups], np.int64)
        matrices.append(Matrix(len(groups), node.matrix.rows, own.bits, stored))
    # Every copy has a placement; a number of copies beyond that is wrong, and found where cells are counted.
    copies = [min(_copies(node), max(1, len(node.placements))) for node in manifest.nodes]
    several = len(manifest.partitions) > 1
    counts = [None if several else kind.count for kind in manifest.chip.crossbars]
    shapes = geometries(manifest.chip)
    try:
        return (
            fewest_crossbars(matrices, shapes, counts, manifest.sharing, copies),
            fewest_cells(matrices, shapes, counts, manifest.sharing, copies),
        )
    except ChipError:
        return None, None


def stage_findings(manifest: Manifest, table: PlacementTable) -> Iterator[str]:
    """Each mapped node has one stage, with the turns and rivals that its placements give it."""
    names = [node.name for node in manifest.nodes]
    listed = [stage.node for stage in manifest.stages]
    if sorted(listed) != sorted(names):
        yield f"stages: {len(listed)} of them are not one for each of the {len(names)} nodes"
        return
    turns = {node.name: max((p.turn + 1 for p in node.placements), default=0) for node in manifest.nodes}
    rivals: dict[str, set[str]] = {name: set() for name in names}
    for members in table.shared_crossbars:
        owners = table.node[members]
        if (owners == owners[0]).all():
            continue
        clash = clashes(table.rows[members], table.cols[members])
        pairs = np.unique(owners[np.argwhere(clash & (owners[:, None] != owners))], axis=0)
        for first, second in pairs.tolist():
            rivals[names[first]].add(names[second])
    for stage in manifest.stages:
        if stage.turns != turns[stage.node]:
            yield f"stages: {stage.node}: turns is {stage.turns}, its placements take {turns[stage.node]}"
        if sorted(stage.shares_with) != sorted(rivals[stage.node]):
            yield f"stages: {stage.node}: shares_with is not the nodes in its rows and columns"


def cost_findings(manifest: Manifest) -> Iterator[str]:
    """Cycles, schedule, energy, area and writes follow from placements, stages and the chip.

    Needs `stage_findings` and `partition_findings` to pass; without a valid order there is nothing to compare with.
    """
    rank = {stage.node: index for index, stage in enumerate(manifest.stages)}
    if any(rank.get(name, len(rank)) >= rank[stage.node] for stage in manifest.stages for name in stage.after):
        return
    parts = [Part(item.nodes, item.crossbars) for item in manifest.partitions]
    try:
        cost = manifest_cost(manifest.chip, manifest.nodes, manifest.stages, parts)
    except ValidationError:
        yield "totals.cost: MVMs and placements give figures that are too large for a manifest"
        return
    for stage, expected in zip(manifest.stages, with_costs(manifest.stages, cost), strict=True):
        for key in ("cycles", "start", "energy_pj"):
            if not _alike(getattr(stage, key), getattr(expected, key)):
                yield f"stages: {stage.node}: {key} is {getattr(stage, key)}, not {getattr(expected, key)}"
    for index, (part, wanted) in enumerate(zip(manifest.partitions, cost.parts, strict=True)):
        for key in type(part).model_fields:
            if not _alike(getattr(part, key), getattr(wanted, key)):
                yield f"partitions: {index}: {key} is {getattr(part, key)}, not {getattr(wanted, key)}"
    found = manifest.totals.cost
    for key in type(found).model_fields:
        if not _alike(getattr(found, key), getattr(cost.total, key)):
            yield f"totals.cost.{key}: is {getattr(found, key)}, placements and chip give {getattr(cost.total, key)}"


def partition_findings(table: PlacementTable) -> Iterator[str]:
    """Partitions hold consecutive stages, each on no more crossbars than the chip has, numbered one after the other.

    Needs `stage_findings` to pass.
    """
    manifest = table.manifest
    kinds, parts = manifest.chip.crossbars, manifest.partitions
    ends = [0] * len(kinds)
    for index, part in enumerate(parts):
        if len(part.crossbars) != len(kinds):
            yield f"partitions: {index}: has {len(part.crossbars)} ranges of crossbars, the chip {len(kinds)} types"
            return
        for kind, (first, last), end in zip(kinds, part.crossbars, ends, strict=True):
            if first != end or last < first:
                yield f"partitions: {index}: {kind.name} [{first}, {last}] does not follow {end}"
            if kind.count is not None and last - first > kind.count:
                yield f"partitions: {index}: {last - first} crossbars of {kind.name}, the chip has {kind.count}"
        ends = [last for _, last in part.crossbars]
    if ends != [total.allocated for total in manifest.totals.crossbars]:
        yield f"partitions: take {ends} crossbars, not those of totals.crossbars"
    listed = [(stage.node, stage.partition) for stage in manifest.stages]
    if listed != [(name, index) for index, part in enumerate(parts) for name in part.nodes]:
        yield "partitions: their nodes are not the stages in their order"
        return
    home = dict(listed)
    for index, (node, p) in enumerate(table.entries):
        first, last = parts[home[node.name]].crossbars[p.type]
        if not first <= p.crossbar < last:
            yield f"{table.where(index)}: it lies outside of the crossbars of its partition, [{first}, {last}]"


def _alike(found: object, expected: object) -> bool:
    """Equal; floats may differ in their last digits, since sums may have run in another order."""
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-9)
    return found == expected
