"""Which crossbar, row and column every block of every node gets.

`place` decides it for a whole chip; `Placement` answers what users ask of the result: crossbars per type, programmed
cells, utilization and the lower bound. Counts are of physical arrays: a pair of arrays counts as two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from raqu_onnx.errors import ChipError
from raqu_onnx.mixed_placement import MixedPlacement, pack, place_mixed
from raqu_onnx.native_output import no_native_output
from raqu_onnx.packing import new_packer
from raqu_onnx.tiling import ArrayGeometry, Block, Matrix, tile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raqu_onnx.hardware import Chip, Sharing

__all__ = [
    "DoesNotFitError",
    "Partition",
    "PlacedBlock",
    "Placement",
    "count_crossbars",
    "geometries",
    "lower_bound",
    "place",
]


class DoesNotFitError(ChipError):
    """The chip has fewer crossbars than the model needs."""


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block and where it lies.

    Attributes:
        node: Name of its node.
        block: Rows and columns of the weight matrix that it holds.
        crossbar_type: Index into the chip's crossbar types.
        crossbar: Index of the placement slot among those of its type; a slot is a crossbar, or a pair of them.
        row: First wordline.
        col: First bitline.
        replica: Copy of the node that it belongs to.
    """

    node: str
    block: Block
    crossbar_type: int
    crossbar: int
    row: int
    col: int
    replica: int = 0


@dataclass(frozen=True)
class Partition:
    """Nodes that are on the chip together, where they are programmed part after part.

    Attributes:
        nodes: Their names.
        first: Number of the part's first slot, by crossbar type; the chip's first slot of that type holds it.
        slots: Slots that the part opens, by crossbar type.
    """

    nodes: tuple[str, ...]
    first: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """A whole model on a chip.

    Attributes:
        chip: The chip.
        sharing: The sharing mode that it was made for.
        matrices: Weights by node name.
        blocks: Every block, in the order of nodes.
        slots: Slots opened per crossbar type, over all partitions.
        partitions: Parts that are programmed one after the other; empty where all is on the chip at once.
    """

    chip: Chip
    sharing: Sharing
    matrices: Mapping[str, Matrix]
    blocks: tuple[PlacedBlock, ...]
    slots: tuple[int, ...]
    partitions: tuple[Partition, ...] = ()

    @cached_property
    def parts(self) -> tuple[Partition, ...]:
        """The partitions; all as one where there are none."""
        return self.partitions or (Partition(tuple(self.matrices), (0,) * len(self.slots), self.slots),)

    @cached_property
    def geometries(self) -> tuple[ArrayGeometry, ...]:
        """Geometry of each crossbar type."""
        return geometries(self.chip)

    @cached_property
    def types_by_node(self) -> dict[str, int]:
        """The crossbar type that each node lies on."""
        return {placed.node: placed.crossbar_type for placed in self.blocks}

    @cached_property
    def replicas(self) -> dict[str, int]:
        """Copies of each node."""
        found = dict.fromkeys(self.matrices, 1)
        for placed in self.blocks:
            found[placed.node] = max(found[placed.node], placed.replica + 1)
        return found

    @cached_property
    def crossbars_by_type(self) -> tuple[int, ...]:
        """Physical crossbars allocated per type, over all partitions."""
        return tuple(n * g.encoding.arrays_per_placement for n, g in zip(self.slots, self.geometries, strict=True))

    @property
    def crossbars(self) -> int:
        """Physical crossbars allocated."""
        return sum(self.crossbars_by_type)

    @cached_property
    def allocated_cells(self) -> int:
        """Cells of all allocated crossbars."""
        return sum(n * g.cells for n, g in zip(self.slots, self.geometries, strict=True))

    @cached_property
    def allocated_bits(self) -> int:
        """Cells of all allocated crossbars times the bits that each holds."""
        return sum(n * g.cells * g.encoding.cell_bits for n, g in zip(self.slots, self.geometries, strict=True))

    @cached_property
    def programmed_cells(self) -> int:
        """Cells that hold weights, in all copies; unit columns and padding do not count."""
        types = self.types_by_node
        return sum(
            self.replicas[name] * matrix.cells(self.geometries[types[name]].encoding)
            for name, matrix in self.matrices.items()
            if name in types
        )

    @cached_property
    def weight_bits(self) -> int:
        """`sum(K * b_k)` over all kernels, in all copies."""
        return sum(self.replicas[name] * matrix.weight_bits for name, matrix in self.matrices.items())

    @property
    def cell_utilization(self) -> float:
        """Programmed cells over cells of all allocated crossbars."""
        return self.programmed_cells / self.allocated_cells if self.allocated_cells else 0.0

    @property
    def bit_utilization(self) -> float:
        """Weight bits over the bits that all allocated crossbars can hold."""
        return self.weight_bits / self.allocated_bits if self.allocated_bits else 0.0

    @cached_property
    def lower_bound(self) -> int:
        """Fewest crossbars that any placement of these weights, copies included, could use on this chip.

        Where the placement uses more than the chip has, the bound leaves the chip's counts out too.
        """
        counts = [kind.count for kind in self.chip.crossbars]
        over = any(have is not None and used > have for used, have in zip(self.crossbars_by_type, counts, strict=True))
        if over or len(self.partitions) > 1:
            counts = [None] * len(counts)
        copies = [matrix for name, matrix in self.matrices.items() for _ in range(self.replicas[name])]
        return lower_bound(copies, self.geometries, counts)


def geometries(chip: Chip) -> tuple[ArrayGeometry, ...]:
    """Geometry of each of a chip's crossbar types."""
    return tuple(ArrayGeometry.of(chip, crossbar) for crossbar in chip.crossbars)


def place(
    matrices: Mapping[str, Matrix], chip: Chip, *, sharing: Sharing | None = None, ignore_counts: bool = False
) -> Placement:
    """Place every node of a model on a chip.

    Blocks are placed by falling area. Where the chip has several crossbar types, each node goes to one of them, so
    that the model takes the fewest crossbars and, among equals, the fewest cells of several assignments tried.

    Args:
        matrices: Weights by node name.
        chip: The chip.
        sharing: Overrides the chip's sharing mode, for baselines.
        ignore_counts: Use as many crossbars as needed, to say how many are missing.

    Raises:
        DoesNotFitError: The chip has too few crossbars.
        ChipError: A kernel fits no crossbar type.
    """
    mode = sharing or chip.sharing
    shapes = geometries(chip)
    limits = [
        None if ignore_counts or kind.count is None else kind.count // shape.encoding.arrays_per_placement
        for shape, kind in zip(shapes, chip.crossbars, strict=True)
    ]
    if len(shapes) == 1:
        found = _place_alike(matrices, shapes[0], limits[0], mode)
    else:
        found = place_mixed(matrices, shapes, limits, mode)
    if found is None:
        _raise_shortage(matrices, chip, mode)
    names = list(matrices)
    by_node: list[list[PlacedBlock]] = [[] for _ in names]
    for node, block, kind, spot in found.spots:
        by_node[node].append(PlacedBlock(names[node], block, kind, *spot))
    for blocks in by_node:
        blocks.sort(key=lambda item: (item.block.group, item.block.rows, item.block.columns))
    return Placement(chip, mode, dict(matrices), tuple(block for blocks in by_node for block in blocks), found.opened)


def _place_alike(
    matrices: Mapping[str, Matrix], shape: ArrayGeometry, limit: int | None, mode: Sharing
) -> MixedPlacement | None:
    """All nodes' blocks on the only crossbar type."""
    tiled = [tile(matrix, shape, where=name) for name, matrix in matrices.items()]
    packer = new_packer(mode, shape.rows, shape.cols, limit)
    spots = pack([(node, block) for node, blocks in enumerate(tiled) for block in blocks], 0, packer)
    return None if spots is None else MixedPlacement(tuple(spots), (packer.opened,))


def _raise_shortage(matrices: Mapping[str, Matrix], chip: Chip, mode: Sharing) -> NoReturn:
    for name, matrix in matrices.items():
        if all(_too_wide(name, matrix, shape) for shape in geometries(chip)):
            raise ChipError(f"{name}: one kernel is wider than every crossbar type of chip {chip.name}")
    need = place(matrices, chip, sharing=mode, ignore_counts=True)
    if len(chip.crossbars) == 1:
        problem = f"has {chip.crossbars[0].count} crossbars, the model needs {need.crossbars} under {mode} sharing"
    else:
        # A node lies on one type, so that the sum over types can be large enough and still not serve.
        have = ", ".join(f"{kind.name}: {'any' if kind.count is None else kind.count}" for kind in chip.crossbars)
        free = zip(chip.crossbars, need.crossbars_by_type, strict=True)
        wanted = ", ".join(f"{kind.name}: {count}" for kind, count in free if count)
        problem = f"has too few crossbars ({have}) under {mode} sharing, without limits the model takes {wanted}"
    raise DoesNotFitError(f"chip {chip.name} {problem}; use fewer bits or a larger chip")


def _too_wide(name: str, matrix: Matrix, shape: ArrayGeometry) -> bool:
    try:
        tile(matrix, shape, where=name)
    except ChipError:
        return True
    return False


def count_crossbars(matrix: Matrix, chip: Chip, sharing: Sharing | None = None) -> int:
    """Crossbars that one node takes alone, on the type where it takes the fewest.

    Raises:
        ChipError: One kernel is wider than every crossbar.
    """
    mode = sharing or chip.sharing
    best: int | None = None
    error: ChipError | None = None
    for shape in geometries(chip):
        try:
            jobs = [(0, block) for block in tile(matrix, shape)]
        except ChipError as exc:
            error = exc
            continue
        packer = new_packer(mode, shape.rows, shape.cols)
        pack(jobs, 0, packer)
        crossbars = packer.opened * shape.encoding.arrays_per_placement
        best = crossbars if best is None else min(best, crossbars)
    if best is None:
        raise error or ChipError(f"chip {chip.name} has no crossbar type")
    return best


def lower_bound(matrices: Sequence[Matrix], shapes: Sequence[ArrayGeometry], counts: Sequence[int | None]) -> int:
    """Fewest crossbars that could hold the programmed cells, whatever the placement.

    With one crossbar type: programmed cells over cells per crossbar, rounded up. With several: an integer program in
    which every node's cells may be split freely over the types.

    Raises:
        DoesNotFitError: Several types together have fewer cells than the weights.
    """
    if len(shapes) == 1:
        cells = sum(matrix.cells(shapes[0].encoding) for matrix in matrices)
        return math.ceil(cells / shapes[0].cells) * shapes[0].encoding.arrays_per_placement
    return _mixed_lower_bound(matrices, shapes, counts)


def _mixed_lower_bound(
    matrices: Sequence[Matrix], shapes: Sequence[ArrayGeometry], counts: Sequence[int | None]
) -> int:
    from scipy.optimize import Bounds, LinearConstraint, milp

    nodes, types = len(matrices), len(shapes)
    # Variables: slots n[t], then the share x[node, t] of every node on every type.
    cost = np.concatenate([[s.encoding.arrays_per_placement for s in shapes], np.zeros(nodes * types)])
    upper = np.concatenate(
        [
            [
                np.inf if c is None else c // s.encoding.arrays_per_placement
                for c, s in zip(counts, shapes, strict=True)
            ],
            np.ones(nodes * types),
        ]
    )
    capacity = np.zeros((types, types + nodes * types))
    whole = np.zeros((nodes, types + nodes * types))
    for t, shape in enumerate(shapes):
        capacity[t, t] = 1
        for n, matrix in enumerate(matrices):
            capacity[t, types + n * types + t] = -matrix.cells(shape.encoding) / shape.cells
            whole[n, types + n * types + t] = 1
    with no_native_output():
        result = milp(
            cost,
            integrality=np.concatenate([np.ones(types, np.int64), np.zeros(nodes * types, np.int64)]),
            bounds=Bounds(np.zeros_like(upper), upper),
            constraints=[LinearConstraint(capacity, 0, np.inf), LinearConstraint(whole, 1, 1)],
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        raise DoesNotFitError("the weights have more cells than the chip; use fewer bits or a larger chip")
    # The solver's own bound, not its solution: only that one is never too high.
    return math.ceil(result.mip_dual_bound - 1e-6)
