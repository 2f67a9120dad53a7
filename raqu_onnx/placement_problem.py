"""What is to be placed, and what a placement is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from raqu_onnx.bounds import Demand, demand, fewest_slots
from raqu_onnx.errors import ChipError
from raqu_onnx.regions import borders
from raqu_onnx.tiling import ArrayGeometry, Block, Matrix, tile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from raqu_onnx.hardware import Sharing
    from raqu_onnx.packing import Packer

__all__ = ["ExactOutcome", "Job", "MixedPlacement", "Problem", "Spot", "by_area", "pack", "renumbered"]

#: What `exact` placement proved, from the strongest to the weakest: at the lower bound; the best for these blocks; the
#: best for these blocks in shelves; the solver ended at its limit; a better one takes more crossbars than allowed; too
#: many patterns to try.
ExactOutcome = Literal["at-bound", "optimal", "optimal-in-shelves", "limit", "budget", "too-many-patterns"]
#: Index of the node and its block.
Job = tuple[int, Block]
#: Index of the node, its block, the crossbar type, and (crossbar, row, column).
Spot = tuple[int, Block, int, tuple[int, int, int]]


@dataclass(frozen=True)
class MixedPlacement:
    """Where every block lies.

    Attributes:
        spots: One per block.
        opened: Slots opened per crossbar type; a slot is a crossbar, or a pair of them.
    """

    spots: tuple[Spot, ...]
    opened: tuple[int, ...]


def by_area(jobs: Sequence[Job]) -> list[Job]:
    """By falling area, then height, then node: the order in which blocks are placed."""
    return sorted(jobs, key=lambda job: (-job[1].height * job[1].width, -job[1].height, job[0]))


def pack(jobs: Sequence[Job], kind: int, packer: Packer) -> list[Spot] | None:
    """Place blocks on one type by falling area; None when the type is full.

    Args:
        jobs: Index of the node and block.
        kind: Index of the type.
        packer: Places them.
    """
    spots: list[Spot] = []
    for node, block in by_area(jobs):
        spot = packer.place(block.height, block.width, node)
        if spot is None:
            return None
        spots.append((node, block, kind, spot))
    return spots


def renumbered(spots: Sequence[Spot], kinds: int) -> MixedPlacement:
    """Slots of each type numbered from 0 without a gap, in their order."""
    used = sorted({(kind, at[0]) for _, _, kind, at in spots})
    opened = [0] * kinds
    numbers: dict[tuple[int, int], int] = {}
    for kind, slot in used:
        numbers[kind, slot] = opened[kind]
        opened[kind] += 1
    return MixedPlacement(
        tuple((node, block, kind, (numbers[kind, at[0]], at[1], at[2])) for node, block, kind, at in spots),
        tuple(opened),
    )


@dataclass(frozen=True)
class Problem:
    """What is to be placed.

    Attributes:
        matrices: Weights by node name.
        shapes: The crossbar types.
        limits: Slots of each type, None for any number.
        mode: What may share a crossbar.
    """

    matrices: Mapping[str, Matrix]
    shapes: tuple[ArrayGeometry, ...]
    limits: tuple[int | None, ...]
    mode: Sharing

    @cached_property
    def _tiles(self) -> dict[tuple[int, int], list[Job] | None]:
        return {}

    def tiles(self, kind: int, node: int) -> list[Job] | None:
        """Blocks of a node on a type, None where a kernel is too wide."""
        if (kind, node) not in self._tiles:
            self._tiles[kind, node] = _tiles(self._names[node], node, self.matrix(node), self.shapes[kind])
        return self._tiles[kind, node]

    @cached_property
    def _demands(self) -> dict[tuple[int, int], Demand | None]:
        return {}

    def demand(self, kind: int, node: int) -> Demand | None:
        """What a node takes of a type, None where a kernel is too wide."""
        if (kind, node) not in self._demands:
            self._demands[kind, node] = demand(self.matrix(node), self.shapes[kind])
        return self._demands[kind, node]

    def fewest_slots(self, kind: int, nodes: Sequence[int]) -> int | None:
        """Slots of which no placement of nodes on one type opens fewer, None where a kernel is too wide for it."""
        found = [self.demand(kind, node) for node in nodes]
        known = [part for part in found if part is not None]
        return fewest_slots(known, self.shapes[kind], self.mode) if len(known) == len(found) else None

    @cached_property
    def classes(self) -> list[list[int]]:
        """Types with cells of the same bits, the largest type first."""
        order = sorted(range(len(self.shapes)), key=lambda kind: (-self.shapes[kind].cells, kind))
        bits = dict.fromkeys(self.shapes[kind].encoding for kind in order)
        return [[kind for kind in order if self.shapes[kind].encoding == encoding] for encoding in bits]

    @cached_property
    def cells(self) -> list[list[int]]:
        """Cells of each node on each class."""
        first = [self.shapes[kinds[0]].encoding for kinds in self.classes]
        return [[matrix.cells(encoding) for encoding in first] for matrix in self.matrices.values()]

    @cached_property
    def _borders(self) -> dict[tuple[int, bytes], NDArray[np.int64]]:
        return {}

    @cached_property
    def _names(self) -> list[str]:
        return list(self.matrices)

    @cached_property
    def _by_index(self) -> list[Matrix]:
        return list(self.matrices.values())

    def edges(self, kind: int, node: int, group: int) -> NDArray[np.int64]:
        """Columns at which a group's matrix may be cut on a type."""
        bits = self._by_index[node].bits[group]
        key = (self.shapes[kind].encoding.cell_bits, bits.tobytes())
        if key not in self._borders:
            self._borders[key] = borders(bits, self.shapes[kind])
        return self._borders[key]

    def matrix(self, node: int) -> Matrix:
        """Weights by index."""
        return self._by_index[node]

    def cost(self, opened: Sequence[int]) -> tuple[int, int]:
        """Cells and crossbars of so many slots."""
        cells = sum(n * shape.cells for n, shape in zip(opened, self.shapes, strict=True))
        return cells, sum(n * s.encoding.arrays_per_placement for n, s in zip(opened, self.shapes, strict=True))


def _tiles(name: str, node: int, matrix: Matrix, shape: ArrayGeometry) -> list[Job] | None:
    """Blocks of a node on a type, None where a kernel is too wide for it."""
    try:
        return [(node, block) for block in tile(matrix, shape, where=name)]
    except ChipError:
        return None
