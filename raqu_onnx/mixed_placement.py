"""Which crossbar type each node goes to on a chip that has several.

A node lies on one type. The fewest crossbars are sought and, among equals, the fewest cells: that is what budgets and
reports count. The problem is a bin packing with bins of several sizes; greedy assignments and whole-type packings are
tried and the best one is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raqu_onnx.errors import ChipError
from raqu_onnx.packing import Packer, new_packer
from raqu_onnx.tiling import ArrayGeometry, Block, Matrix, tile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from raqu_onnx.hardware import Sharing

__all__ = ["MixedPlacement", "Spot", "pack", "place_mixed"]

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


def pack(jobs: Sequence[tuple[int, Block]], kind: int, packer: Packer) -> list[Spot] | None:
    """Place blocks on one type by falling area, then height, then node; None when the type is full.

    Args:
        jobs: Index of the node and block.
        kind: Index of the type.
        packer: Places them.
    """
    spots: list[Spot] = []
    for node, block in sorted(jobs, key=lambda job: (-job[1].height * job[1].width, -job[1].height, job[0])):
        spot = packer.place(block.height, block.width, node)
        if spot is None:
            return None
        spots.append((node, block, kind, spot))
    return spots


def place_mixed(
    matrices: Mapping[str, Matrix], shapes: Sequence[ArrayGeometry], limits: Sequence[int | None], mode: Sharing
) -> MixedPlacement | None:
    """Place every node on the type that serves the whole model best.

    Args:
        matrices: Weights by node name.
        shapes: The crossbar types.
        limits: Slots of each type, None for any number.
        mode: What may share a crossbar.

    Returns:
        The placement with the fewest crossbars and, among equals, the fewest cells of those tried; None when none of
        them fits.
    """
    trials = _Trials(matrices, shapes, limits, mode)
    best: tuple[tuple[int, int], MixedPlacement] | None = None
    for found in trials.run():
        cost = trials.cost(found.opened)
        if best is None or cost < best[0]:
            best = (cost, found)
        if best[0][0] <= trials.bound:
            break
    # A chip that is nearly full may take what fits best node by node, where the fewest crossbars do not.
    return trials.greedy(cells_first=True)[0] if best is None else best[1]


class _Trials:
    """Assignments of nodes to types, one after the other."""

    def __init__(
        self,
        matrices: Mapping[str, Matrix],
        shapes: Sequence[ArrayGeometry],
        limits: Sequence[int | None],
        mode: Sharing,
    ) -> None:
        self._shapes = shapes
        self._limits = limits
        self._mode = mode
        self._jobs = [
            [_tiles(name, index, matrix, shape) for index, (name, matrix) in enumerate(matrices.items())]
            for shape in shapes
        ]
        sizes = [[matrix.cells(shape.encoding) for shape in shapes] for matrix in matrices.values()]
        self._order = sorted(range(len(sizes)), key=lambda node: -sizes[node][0])
        largest = max(shape.cells for shape in shapes)
        fewest = min(shape.encoding.arrays_per_placement for shape in shapes)
        # No placement uses fewer crossbars; reaching it ends the trials.
        self.bound = math.ceil(sum(min(row) for row in sizes) / largest) * fewest

    def cost(self, opened: Sequence[int]) -> tuple[int, int]:
        """Crossbars and cells of so many slots."""
        crossbars = sum(n * s.encoding.arrays_per_placement for n, s in zip(opened, self._shapes, strict=True))
        return crossbars, sum(n * s.cells for n, s in zip(opened, self._shapes, strict=True))

    def run(self) -> Iterator[MixedPlacement]:
        """All trials that fit."""
        found, types = self.greedy(cells_first=False)
        if found is not None and types is not None:
            yield found
            # The same types, but all blocks of a type by falling area: packs tighter than node by node.
            yield from self._together(types)
        for kind in sorted(range(len(self._shapes)), key=lambda kind: -self._shapes[kind].cells):
            yield from self._together([kind] * len(self._order))

    def _packers(self) -> list[Packer]:
        return [
            new_packer(self._mode, shape.rows, shape.cols, limit)
            for shape, limit in zip(self._shapes, self._limits, strict=True)
        ]

    def _together(self, types: Sequence[int]) -> Iterator[MixedPlacement]:
        """All blocks of each type at once; nothing where they do not fit."""
        packers = self._packers()
        spots: list[Spot] = []
        for kind, packer in enumerate(packers):
            jobs: list[tuple[int, Block]] = []
            for node, chosen in enumerate(types):
                if chosen == kind:
                    found = self._jobs[kind][node]
                    if found is None:
                        return
                    jobs.extend(found)
            placed = pack(jobs, kind, packer)
            if placed is None:
                return
            spots.extend(placed)
        yield MixedPlacement(tuple(spots), tuple(packer.opened for packer in packers))

    def greedy(self, *, cells_first: bool) -> tuple[MixedPlacement | None, list[int] | None]:
        """Nodes by falling cells, each on the type on which it opens least."""
        packers = self._packers()
        types = [0] * len(self._order)
        spots: list[Spot] = []
        for node in self._order:
            best: tuple[tuple[int, int], int] | None = None
            for kind, packer in enumerate(packers):
                cost = self._trial_cost(kind, node, packer)
                if cost is None:
                    continue
                key = cost[::-1] if cells_first else cost
                if best is None or key < best[0]:
                    best = (key, kind)
            if best is None:
                return None, None
            types[node] = best[1]
            spots.extend(pack(self._jobs[best[1]][node] or [], best[1], packers[best[1]]) or [])
        return MixedPlacement(tuple(spots), tuple(packer.opened for packer in packers)), types

    def _trial_cost(self, kind: int, node: int, packer: Packer) -> tuple[int, int] | None:
        """Crossbars and cells that a node would open on a type, None where it does not fit."""
        jobs = self._jobs[kind][node]
        if jobs is None:
            return None
        before = packer.opened
        packer.begin()
        fits = pack(jobs, kind, packer) is not None
        opened = packer.opened - before
        packer.rollback()
        shape = self._shapes[kind]
        return (opened * shape.encoding.arrays_per_placement, opened * shape.cells) if fits else None


def _tiles(name: str, node: int, matrix: Matrix, shape: ArrayGeometry) -> list[tuple[int, Block]] | None:
    """Blocks of a node on a type, None where a kernel is too wide for it."""
    try:
        return [(node, block) for block in tile(matrix, shape, where=name)]
    except ChipError:
        return None
