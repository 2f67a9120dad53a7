"""The tiling of a model on a chip, without data, search or reading a single weight."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from raqu_onnx.annotations import MAPPED, mapped_nodes, unmapped_nodes
from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.errors import naming_model
from raqu_onnx.hardware import Chip, load_chip
from raqu_onnx.manifest_stages import execution_order
from raqu_onnx.model_cost import Flow, placement_cost
from raqu_onnx.model_io import load_model
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.placement import DoesNotFitError, Placement, place
from raqu_onnx.tiling import Matrix

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import onnx

    from raqu_onnx.hardware import Sharing
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.manifest_entries import CostEntry
    from raqu_onnx.mapping import UnmappedNode

__all__ = ["Inspection", "NodeTiling", "inspect", "place_anyway"]


@dataclass(frozen=True)
class NodeTiling:
    """One mapped node on a chip, alone in its crossbars.

    Attributes:
        node: The node.
        crossbars: Crossbars that it takes.
        cells: Cells that its weights program.
        utilization: Programmed cells over cells of those crossbars.
        crossbar_type: Name of their type, or names separated by commas.
        cycles: Cycles of one inference at 8-bit activations, None where its MVMs are open.
    """

    node: MappedNode
    crossbars: int
    cells: int
    utilization: float
    crossbar_type: str
    cycles: int | None


@dataclass(frozen=True)
class Inspection:
    """What a model takes on a chip at one width for all weights.

    Attributes:
        chip: The chip.
        weight_bits: The width.
        nodes: Every mapped node, one node per crossbar.
        unmapped: Nodes that multiply by weights and are not mapped, with reasons.
        others: Nodes of all other types, which the chip's digital units compute: how many by type, most first.
        exclusive: All nodes placed with one node per crossbar.
        packed: All nodes placed as the chip allows.
        fits: The packed placement stays within the chip's counts.
        exclusive_cost: Cycles, energy, area and writes of `exclusive`, at 8-bit activations.
        packed_cost: The same of `packed`.
    """

    chip: Chip
    weight_bits: int
    nodes: tuple[NodeTiling, ...]
    unmapped: tuple[UnmappedNode, ...]
    exclusive: Placement
    packed: Placement
    fits: bool
    exclusive_cost: CostEntry
    packed_cost: CostEntry
    others: Mapping[str, int] = field(default_factory=dict)


def inspect(
    model: str | Path | onnx.ModelProto | ir.Model,
    chip: Chip | str = "generic",
    *,
    weight_bits: int = 8,
    exclude: Iterable[str] = (),
) -> Inspection:
    """Tile every Conv, ConvTranspose, Gemm and MatMul of a model.

    Args:
        model: Path, or a model in memory, which is not changed. Weights are not read.
        chip: A chip, the name of a built-in one, or a TOML file.
        weight_bits: Width of all weights, 2 to 8.
        exclude: Patterns of nodes that stay as they are: names, operator types or regular expressions.

    Raises:
        ConfigError: A pattern means no node.
        ModelError: The model cannot be read, is quantized already, or has no node to map.
        ChipError: The chip file is wrong, or one kernel is wider than a crossbar.
    """
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    with naming_model(model):
        loaded = TidyPass(exclude=patterns)(load_model(model, check_weights=False)).model
        AnnotateTilingPass(patterns)(loaded)
    hardware = chip if isinstance(chip, Chip) else load_chip(chip)
    nodes = [MAPPED.require(node) for node in mapped_nodes(loaded)]
    matrices = {node.name: Matrix.of(node.layout, weight_bits) for node in nodes}
    packed, fits = place_anyway(matrices, hardware, hardware.sharing)
    exclusive, _ = place_anyway(matrices, hardware, "exclusive")
    flow = Flow(*execution_order(loaded, matrices))
    mvms = {node.name: node.mvms for node in nodes}
    alone, together = (placement_cost(p, mvms, dict.fromkeys(mvms, MAX_BITS), flow) for p in (exclusive, packed))
    return Inspection(
        chip=hardware,
        weight_bits=weight_bits,
        nodes=tuple(_alone(nodes, exclusive, alone.cycles)),
        unmapped=tuple(unmapped_nodes(loaded)),
        exclusive=exclusive,
        packed=packed,
        fits=fits,
        others=_others(loaded),
        exclusive_cost=alone.total,
        packed_cost=together.total,
    )


def _others(model: ir.Model) -> dict[str, int]:
    listed = {node.name for node in mapped_nodes(model)} | {item.name for item in unmapped_nodes(model)}
    found = Counter(
        node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.name not in listed
    )
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def place_anyway(
    matrices: Mapping[str, Matrix], chip: Chip, sharing: Sharing, max_crossbars: int | None = None
) -> tuple[Placement, bool]:
    """Place a model within a chip's counts, or, where it does not fit, with as many crossbars as it takes.

    Args:
        matrices: Weights by node name.
        chip: The chip.
        sharing: The sharing mode.
        max_crossbars: On a chip with several crossbar types, stay within so many where that can be done.

    Returns:
        The placement, and whether it stays within the counts.

    Raises:
        ChipError: A kernel fits no crossbar type.
    """
    try:
        return place(matrices, chip, sharing=sharing, max_crossbars=max_crossbars), True
    except DoesNotFitError:
        free = place(matrices, chip, sharing=sharing, ignore_counts=True, max_crossbars=max_crossbars)
        return free, False


def _alone(nodes: Sequence[MappedNode], exclusive: Placement, cycles: Mapping[str, int | None]) -> Iterator[NodeTiling]:
    slots: dict[str, set[tuple[int, int]]] = {node.name: set() for node in nodes}
    for block in exclusive.blocks:
        slots[block.node].add((block.crossbar_type, block.crossbar))
    for node in nodes:
        kinds = exclusive.types_by_node[node.name]
        shapes = exclusive.geometries
        cells = exclusive.matrices[node.name].cells(shapes[kinds[0]].encoding)
        taken = [shapes[kind] for kind, _ in slots[node.name]]
        crossbars = sum(shape.encoding.arrays_per_placement for shape in taken)
        names = ",".join(exclusive.chip.crossbars[kind].name for kind in kinds)
        used = cells / sum(shape.cells for shape in taken)
        yield NodeTiling(node, crossbars, cells, used, names, cycles[node.name])
