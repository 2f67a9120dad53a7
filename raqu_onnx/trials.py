"""Ways to place nodes on crossbar types of one encoding, one after the other."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

from raqu_onnx.cutting import fill
from raqu_onnx.packing import Packer, new_packer
from raqu_onnx.placement_problem import Job, MixedPlacement, Problem, Spot, by_area, pack, renumbered
from raqu_onnx.regions import cut_for, cut_regions
from raqu_onnx.tiling import Block

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Trials"]

# So many spare slots beyond the cells that are needed do not help where none of the trials before fitted.
_MOST_SPARE = 64


class Trials:
    """Ways to place some nodes on types of one encoding."""

    def __init__(self, problem: Problem, kinds: list[int], nodes: list[int], *, fewest_crossbars: bool) -> None:
        self._problem = problem
        self._kinds = kinds
        self._nodes = nodes
        self._fewest_crossbars = fewest_crossbars

    def best(self) -> MixedPlacement | None:
        """The best of all that fit."""
        if not self._nodes:
            return MixedPlacement((), (0,) * len(self._problem.shapes))
        if any(all(self._problem.tiles(kind, node) is None for kind in self._kinds) for node in self._nodes):
            return None
        several, in_time = len(self._kinds) > 1, self._problem.mode == "time"
        # Filling comes close to the bound, which spares most of the other trials.
        best = self._filled(None) if several and in_time else None
        for found in self._run(best):
            if best is None or self._key(found) < self._key(best):
                best = found
        return self._filled(best) if in_time else best

    def _key(self, found: MixedPlacement) -> tuple[int, int]:
        return self._key_of(found.opened)

    def _key_of(self, opened: Sequence[int]) -> tuple[int, int]:
        cells, crossbars = self._problem.cost(opened)
        return (crossbars, cells) if self._fewest_crossbars else (cells, crossbars)

    def _run(self, best: MixedPlacement | None) -> Iterator[MixedPlacement]:
        if len(self._kinds) == 1:
            jobs = self._on_type(self._kinds[0])
            found = None if jobs is None else self._packed([(self._kinds[0], job) for job in jobs])
            if found is not None:
                yield found
            return
        least = None if best is None else self._key(best)
        # Where blocks may be cut at will, filling is better than any cut planned node by node.
        for found in self._on_several() if best is None else ():
            least = self._key(found) if least is None else min(least, self._key(found))
            yield found
        for kind in self._kinds:
            bound = self._bound(kind)
            if bound is None or (least is not None and self._key_of(bound) >= least):
                continue
            alone = Trials(self._problem, [kind], self._nodes, fewest_crossbars=self._fewest_crossbars).best()
            for found in self._with_smaller(alone):
                least = self._key(found) if least is None else min(least, self._key(found))
                yield found

    def _on_several(self) -> Iterator[MixedPlacement]:
        for shared in (False, True):
            parts = self._regions(shared=shared)
            if parts is not None:
                yield from self._with_smaller(self._packed(parts))
        if any(self._problem.limits[kind] is not None for kind in self._kinds):
            yield from self._with_smaller(self._spilled())

    def _bound(self, kind: int) -> list[int] | None:
        """Slots per type of which no placement on one type alone opens fewer, None where a kernel is too wide."""
        slots = self._problem.fewest_slots(kind, self._nodes)
        return None if slots is None else [slots if other == kind else 0 for other in range(len(self._problem.shapes))]

    def _on_type(self, kind: int) -> list[Job] | None:
        jobs: list[Job] = []
        for node in self._nodes:
            found = self._problem.tiles(kind, node)
            if found is None:
                return None
            jobs.extend(found)
        return jobs

    def _regions(self, *, shared: bool) -> list[tuple[int, Job]] | None:
        parts: list[tuple[int, Job]] = []
        for node in self._nodes:
            found = cut_regions(self._problem.matrix(node), self._problem.shapes, self._kinds, shared=shared)
            if found is None:
                return None
            parts.extend((kind, (node, block)) for kind, block in found)
        return parts

    def _packers(self) -> list[Packer]:
        problem = self._problem
        return [
            new_packer(problem.mode, shape.rows, shape.cols, limit)
            for shape, limit in zip(problem.shapes, problem.limits, strict=True)
        ]

    def _packed(self, parts: Sequence[tuple[int, Job]]) -> MixedPlacement | None:
        packers = self._packers()
        spots: list[Spot] = []
        for kind in self._kinds:
            found = pack([job for chosen, job in parts if chosen == kind], kind, packers[kind])
            if found is None:
                return None
            spots.extend(found)
        return MixedPlacement(tuple(spots), tuple(packer.opened for packer in packers))

    def _spilled(self) -> MixedPlacement | None:
        """Blocks of the largest type; where a type is full, they are cut for the next smaller one."""
        packers = self._packers()
        spots: list[Spot] = []
        regions: list[Job] = []
        for node in self._nodes:
            for group, rows in enumerate(self._problem.matrix(node).row_counts.tolist()):
                last = int(self._problem.edges(self._kinds[0], node, group)[-1])
                if rows and last:
                    regions.append((node, Block(group, (0, rows), (0, last), 0, 0)))
        for kind in self._kinds:
            jobs, regions = regions, []
            for node, block in by_area(list(self._cut(jobs, kind, regions))):
                spot = packers[kind].place(block.height, block.width, node)
                if spot is None:
                    regions.append((node, block))
                else:
                    spots.append((node, block, kind, spot))
        return None if regions else MixedPlacement(tuple(spots), tuple(packer.opened for packer in packers))

    def _cut(self, regions: Sequence[Job], kind: int, too_wide: list[Job]) -> Iterator[Job]:
        shape = self._problem.shapes[kind]
        for node, region in regions:
            edges = self._problem.edges(kind, node, region.group)
            found = cut_for(region.rows, region.columns, edges, shape)
            if found is None:
                too_wide.append((node, region))
                continue
            for rows, columns in found:
                height = (rows[1] - rows[0]) * shape.encoding.rows_per_weight
                width = columns[1] - columns[0] + int(shape.unit_column)
                yield node, Block(region.group, rows, columns, height, width)

    # --- improvements -------------------------------------------------------------------------------------------

    def _with_smaller(self, found: MixedPlacement | None) -> Iterator[MixedPlacement]:
        """A placement, and the same with each crossbar's content on the smallest type that holds it."""
        if found is None:
            return
        yield found
        yield self._shrunk(found)

    def _shrunk(self, found: MixedPlacement) -> MixedPlacement:
        shapes, limits = self._problem.shapes, self._problem.limits
        extents: dict[tuple[int, int], tuple[int, int]] = {}
        for _, block, kind, (slot, row, col) in found.spots:
            rows, cols = extents.get((kind, slot), (0, 0))
            extents[kind, slot] = max(rows, row + block.height), max(cols, col + block.width)
        opened = list(found.opened)
        moved: dict[tuple[int, int], tuple[int, int]] = {}
        for (kind, slot), (rows, cols) in extents.items():
            for other in reversed(self._kinds):
                shape, limit = shapes[other], limits[other]
                smaller = shape.cells < shapes[kind].cells and shape.rows >= rows and shape.cols >= cols
                if smaller and (limit is None or opened[other] < limit):
                    # New numbers lie beyond all old ones until `renumbered`.
                    moved[kind, slot] = other, found.opened[other] + len(extents) + len(moved)
                    opened[other] += 1
                    opened[kind] -= 1
                    break
        spots = [
            (node, block, *moved.get((kind, at[0]), (kind, at[0])), at[1:]) for node, block, kind, at in found.spots
        ]
        return renumbered([(n, b, kind, (slot, *rest)) for n, b, kind, slot, rest in spots], len(shapes))

    def _filled(self, best: MixedPlacement | None) -> MixedPlacement | None:
        """The same or a better placement, in as few cells (or crossbars) as cutting blocks can reach."""
        worked, failed, step = math.inf, -1, 0
        while step < worked:
            inventory = self._inventory(step)
            if inventory is None or (best is not None and self._key_of(inventory) >= self._key(best)):
                break
            found = self._fill(inventory)
            if found is None:
                failed, step = step, max(1, 2 * step)
                if best is None and step > _MOST_SPARE:
                    return None
            else:
                best, worked = found, step
        if worked is math.inf and best is None:
            return None
        top = min(worked, step)
        while failed + 1 < top:
            middle = (failed + int(top)) // 2
            inventory = self._inventory(middle)
            found = None if inventory is None else self._fill(inventory)
            if found is not None and (best is None or self._key(found) < self._key(best)):
                best, top = found, middle
            else:
                failed = middle
        return best

    def _fill(self, inventory: Sequence[int]) -> MixedPlacement | None:
        kinds = [kind for kind in self._kinds if inventory[kind]]
        jobs = self._on_type(kinds[0]) if kinds else []
        if jobs is None:
            return None
        shapes, first = self._problem.shapes, self._kinds[0]
        ordered = by_area(jobs)
        for reserve in (0, self._least_cells // 50, self._least_cells // 12):
            spots = fill(
                ordered,
                shapes,
                inventory,
                lambda node, group: self._problem.edges(first, node, group),
                reserve=reserve,
            )
            if spots is not None:
                return renumbered(spots, len(shapes))
        return None

    def _inventory(self, step: int) -> list[int] | None:
        """Slots per type that hold all cells and so many of the smallest type's more; None where there are not so many.

        For the fewest cells, large types are filled and the smallest takes the rest; for the fewest crossbars, the
        largest takes the rest too.
        """
        problem = self._problem
        usable = [kind for kind in self._kinds if problem.limits[kind] != 0 and problem.shapes[kind].weight_rows]
        sizes = {kind: problem.shapes[kind].rows * problem.shapes[kind].cols for kind in usable}
        if not usable:
            return None
        left = self._least_cells + step * sizes[usable[0 if self._fewest_crossbars else -1]]
        inventory = [0] * len(problem.shapes)
        for kind in usable:
            round_up = self._fewest_crossbars or kind == usable[-1]
            wanted = -(-left // sizes[kind]) if round_up else left // sizes[kind]
            limit = problem.limits[kind]
            inventory[kind] = wanted if limit is None else min(wanted, limit)
            left = max(0, left - inventory[kind] * sizes[kind])
        for kind in reversed(usable):
            limit = problem.limits[kind]
            more = min(-(-left // sizes[kind]), 10**9 if limit is None else limit - inventory[kind])
            inventory[kind] += more
            left = max(0, left - more * sizes[kind])
        return None if left else inventory

    @cached_property
    def _least_cells(self) -> int:
        """Cells of one array that the nodes program."""
        encoding = self._problem.shapes[self._kinds[0]].encoding
        return sum(self._problem.matrix(node).cells(encoding) for node in self._nodes) // encoding.arrays_per_placement
