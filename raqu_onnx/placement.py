"""Which crossbar, row and column every block of every node gets.

`place` decides it for a whole chip; `Placement` answers what users ask of the result: crossbars per type, programmed
cells, utilization and the lower bound. Counts are of physical arrays: a pair of arrays counts as two.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NoReturn

from raqu_onnx.bounds import DoesNotFitError, fewest_cells, fewest_crossbars
from raqu_onnx.errors import ChipError
from raqu_onnx.mixed_placement import place_blocks
from raqu_onnx.placement_problem import ExactOutcome, MixedPlacement, Problem
from raqu_onnx.tiling import ArrayGeometry, Block, Matrix, tile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from raqu_onnx.hardware import Chip, Sharing

PlacementMethod = Literal["fast", "exact"]

__all__ = [
    "DoesNotFitError",
    "Partition",
    "PlacedBlock",
    "Placement",
    "PlacementMethod",
    "count_crossbars",
    "geometries",
    "place",
]


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
        exact: What the `exact` method proved, over all partitions; None where the placement is a fast one.
    """

    chip: Chip
    sharing: Sharing
    matrices: Mapping[str, Matrix]
    blocks: tuple[PlacedBlock, ...]
    slots: tuple[int, ...]
    partitions: tuple[Partition, ...] = ()
    exact: ExactOutcome | None = field(default=None, compare=False)

    @cached_property
    def parts(self) -> tuple[Partition, ...]:
        """The partitions; all as one where there are none."""
        return self.partitions or (Partition(tuple(self.matrices), (0,) * len(self.slots), self.slots),)

    @cached_property
    def geometries(self) -> tuple[ArrayGeometry, ...]:
        """Geometry of each crossbar type."""
        return geometries(self.chip)

    @cached_property
    def types_by_node(self) -> dict[str, tuple[int, ...]]:
        """The crossbar types that each node lies on, ascending; all have cells of the same bits."""
        found: dict[str, set[int]] = {}
        for placed in self.blocks:
            found.setdefault(placed.node, set()).add(placed.crossbar_type)
        return {node: tuple(sorted(types)) for node, types in found.items()}

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
            self.replicas[name] * matrix.cells(self.geometries[types[name][0]].encoding)
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
        """Fewest crossbars that any placement of these weights, copies included, could use under this sharing.

        Where the placement uses more than the chip has, or its parts are programmed one after the other, the bound
        leaves the chip's counts out too.
        """
        return fewest_crossbars(*self._bounded)

    @cached_property
    def lower_bound_cells(self) -> int:
        """Fewest cells of allocated crossbars, in the same way."""
        return fewest_cells(*self._bounded)

    @property
    def gap(self) -> float:
        """Allocated cells over their lower bound, less 1: the share by which a better placement could be smaller.

        On a chip with one crossbar type this is the gap of crossbars too.
        """
        return self.allocated_cells / self.lower_bound_cells - 1 if self.lower_bound_cells else 0.0

    @property
    def _bounded(self) -> tuple[list[Matrix], tuple[ArrayGeometry, ...], list[int | None], Sharing, list[int]]:
        """What the bounds ask for."""
        counts = [kind.count for kind in self.chip.crossbars]
        over = any(have is not None and used > have for used, have in zip(self.crossbars_by_type, counts, strict=True))
        if over or len(self.partitions) > 1:
            counts = [None] * len(counts)
        copies = [self.replicas[name] for name in self.matrices]
        return list(self.matrices.values()), self.geometries, counts, self.sharing, copies


def geometries(chip: Chip) -> tuple[ArrayGeometry, ...]:
    """Geometry of each of a chip's crossbar types."""
    return tuple(ArrayGeometry.of(chip, crossbar) for crossbar in chip.crossbars)


def place(
    matrices: Mapping[str, Matrix],
    chip: Chip,
    *,
    sharing: Sharing | None = None,
    ignore_counts: bool = False,
    max_crossbars: int | None = None,
    method: PlacementMethod = "fast",
) -> Placement:
    """Place every node of a model on a chip.

    The cells of all allocated crossbars, which are the area that the weights take, are minimized, and among equals the
    number of crossbars. On a chip with one crossbar type both are the same. On one with several, every block goes to
    the type that serves the whole model best; blocks of one node may lie on different types with cells of the same
    bits.

    Args:
        matrices: Weights by node name.
        chip: The chip.
        sharing: Overrides the chip's sharing mode, for baselines.
        ignore_counts: Use as many crossbars as needed, to say how many are missing.
        max_crossbars: On a chip with several types, stay within so many crossbars if that can be done, even where
            that takes more cells.
        method: `exact` improves a fast placement that has a gap by an integer program, see
            `raqu_onnx.exact_placement`.

    Raises:
        DoesNotFitError: The chip has too few crossbars.
        ChipError: A kernel fits no crossbar type.
    """
    mode = sharing or chip.sharing
    shapes = geometries(chip)
    limits = tuple(
        None if ignore_counts or kind.count is None else kind.count // shape.encoding.arrays_per_placement
        for shape, kind in zip(shapes, chip.crossbars, strict=True)
    )
    problem = Problem(matrices, shapes, limits, mode)
    found = place_blocks(problem, max_crossbars)
    if found is None:
        _raise_shortage(matrices, chip, mode)
    placement = _placement(problem, chip, found)
    if method == "fast":
        return placement
    outcome: ExactOutcome = "at-bound"
    if placement.gap > 0:
        better, outcome = _improved(problem, found, max_crossbars)
        placement = _placement(problem, chip, better)
    return replace(placement, exact="at-bound" if placement.gap <= 0 else outcome)


def _placement(problem: Problem, chip: Chip, found: MixedPlacement) -> Placement:
    names = list(problem.matrices)
    by_node: list[list[PlacedBlock]] = [[] for _ in names]
    for node, block, kind, spot in found.spots:
        by_node[node].append(PlacedBlock(names[node], block, kind, *spot))
    for blocks in by_node:
        blocks.sort(key=lambda item: (item.block.group, item.block.rows, item.block.columns))
    in_order = tuple(block for blocks in by_node for block in blocks)
    return Placement(chip, problem.mode, dict(problem.matrices), in_order, found.opened)


def _improved(problem: Problem, fast: MixedPlacement, max_crossbars: int | None) -> tuple[MixedPlacement, ExactOutcome]:
    from raqu_onnx.exact_placement import improve

    exact, outcome = improve(problem, fast)
    crossbars = problem.cost(exact.opened)[1]
    beyond = max_crossbars is not None and crossbars > max(max_crossbars, problem.cost(fast.opened)[1])
    return (fast, "budget") if beyond else (exact, outcome)


def _raise_shortage(matrices: Mapping[str, Matrix], chip: Chip, mode: Sharing) -> NoReturn:
    if len(chip.crossbars) == 1:
        for name, matrix in matrices.items():
            # Its message says by how much a kernel is too wide.
            tile(matrix, geometries(chip)[0], where=name)
    for name, matrix in matrices.items():
        if all(_too_wide(name, matrix, shape) for shape in geometries(chip)):
            raise ChipError(f"{name}: one kernel is wider than every crossbar type of chip {chip.name}")
    need = place(matrices, chip, sharing=mode, ignore_counts=True)
    if len(chip.crossbars) == 1:
        problem = f"has {chip.crossbars[0].count} crossbars, the model needs {need.crossbars} under {mode} sharing"
    else:
        # Blocks are not cut at will, so that the sum over types can be large enough and still not serve.
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
            tile(matrix, shape)
        except ChipError as exc:
            error = exc
            continue
        found = place_blocks(Problem({"": matrix}, (shape,), (None,), mode))
        if found is None:
            continue
        crossbars = found.opened[0] * shape.encoding.arrays_per_placement
        best = crossbars if best is None else min(best, crossbars)
    if best is None:
        raise error or ChipError(f"chip {chip.name} has no crossbar type")
    return best
