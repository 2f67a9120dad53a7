"""Placements that are optimal for their blocks, by an integer program over the patterns that one crossbar can hold.

A pattern says how many blocks of each size a crossbar holds (Gilmore and Gomory, Operations Research 9(6), 1961). All
of them are listed, and `scipy.optimize.milp` picks how often each is used, so that every block is covered and the cells
of all crossbars, and among equals their number, are least. For `exclusive` and `diagonal` sharing a set of blocks fits
a crossbar exactly where its heights and its widths each add up to at most the crossbar's, so that the result is optimal
for the blocks of the fast placement. For `time` the patterns are of blocks side by side in shelves, and shelves on top
of each other: optimal among those; other arrangements of the blocks are left to the fast packer. Where there are too
many patterns, or the program ends at its limit, the best placement known stands; the fast one is never made worse.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np

from raqu_onnx.native_output import no_native_output
from raqu_onnx.placement_problem import ExactOutcome, MixedPlacement, Problem, renumbered

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from raqu_onnx.hardware import Sharing
    from raqu_onnx.placement_problem import Job, Spot

__all__ = ["improve", "weakest"]

# More patterns than this are not listed; the program would take minutes.
_MOST_PATTERNS = 20_000
_MOST_STEPS = 3_000_000
_MOST_BLOCKS = 500
# Branch and bound ends after so many nodes, which is the same on every machine. Seconds are a safety only.
_NODE_LIMIT = 20_000
_TIME_LIMIT = 60.0

_Size = tuple[int, int]
#: Counts of the sizes in each shelf; on the diagonal every block is a shelf of its own.
_Shelves = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Pattern:
    kind: int
    shelves: _Shelves


def improve(problem: Problem, found: MixedPlacement) -> tuple[MixedPlacement, ExactOutcome]:
    """The same placement or a better one of the same blocks, and what is proven of it.

    Args:
        problem: What is placed.
        found: The fast placement.

    Returns:
        The placement; the weakest of what was proven for any program.
    """
    outcomes: list[ExactOutcome] = ["optimal-in-shelves" if problem.mode == "time" else "optimal"]
    parts: dict[tuple[int, ...], list[Spot]] = defaultdict(list)
    for spot in found.spots:
        # Nodes that do not share crossbars are programs of their own.
        owner = spot[0] if problem.mode == "exclusive" else -1
        parts[problem.shapes[spot[2]].encoding.cell_bits, owner].append(spot)
    best: list[Spot] = []
    total, offset = list(found.opened), 0
    for spots in parts.values():
        before = _opened(problem, spots)
        spare = [
            None if limit is None else limit - all_ + own
            for limit, all_, own in zip(problem.limits, total, before, strict=True)
        ]
        better, outcome = _solve(problem, spots, spare)
        outcomes += [outcome] if outcome else []
        after = before if better is None else _opened(problem, better)
        if better is None or problem.cost(after) >= problem.cost(before):
            better, after = spots, before
        # Numbers that no other part has, until all are numbered anew.
        best += [(node, block, kind, (at[0] + offset, at[1], at[2])) for node, block, kind, at in better]
        offset += 1 + max(at[0] for _, _, _, at in better)
        total = [all_ - old + new for all_, old, new in zip(total, before, after, strict=True)]
    return renumbered(best, len(problem.shapes)), weakest(outcomes)


def weakest(outcomes: Iterable[ExactOutcome]) -> ExactOutcome:
    """What is proven of a whole of which each part is proven this much."""
    order = get_args(ExactOutcome)
    return max(outcomes, key=order.index, default="at-bound")


def _opened(problem: Problem, spots: Sequence[Spot]) -> list[int]:
    used = {(kind, at[0]) for _, _, kind, at in spots}
    return [sum(own == kind for own, _ in used) for kind in range(len(problem.shapes))]


def _solve(
    problem: Problem, spots: Sequence[Spot], limits: Sequence[int | None]
) -> tuple[list[Spot] | None, ExactOutcome | None]:
    """Another placement of the same blocks, None where none is found; and why it may not be the best one."""
    jobs: dict[_Size, list[Job]] = defaultdict(list)
    for node, block, _, _ in spots:
        jobs[block.height, block.width].append((node, block))
    sizes = sorted(jobs, reverse=True)
    bits = problem.shapes[spots[0][2]].encoding.cell_bits
    patterns: list[_Pattern] = []
    for kind, shape in enumerate(problem.shapes):
        if shape.encoding.cell_bits == bits and limits[kind] != 0:
            found = _patterns(sizes, [len(jobs[size]) for size in sizes], (shape.rows, shape.cols), problem.mode)
            if found is None:
                return None, "too-many-patterns"
            patterns += [_Pattern(kind, shelves) for shelves in found]
    counts, ended = _program(problem, patterns, [len(jobs[size]) for size in sizes], limits)
    outcome: ExactOutcome | None = None if ended else "limit"
    return None if counts is None else list(_placed(patterns, counts, sizes, jobs, problem.mode)), outcome


def _program(
    problem: Problem, patterns: Sequence[_Pattern], demands: Sequence[int], limits: Sequence[int | None]
) -> tuple[list[int] | None, bool]:
    """How often each pattern is used, None where no solution is known; whether there is no better one."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not patterns:
        return None, True
    slots = sum(demands)
    unit = np.gcd.reduce([shape.cells for shape in problem.shapes])
    # Fewest cells first: all crossbars that could be saved together weigh less than one unit of cells.
    costs = [s.cells // unit * (2 * slots + 1) + s.encoding.arrays_per_placement for s in problem.shapes]
    covers = np.array([np.sum(p.shelves, axis=0) for p in patterns], np.float64).T
    constraints = [LinearConstraint(covers, demands, np.inf)]
    for kind, limit in enumerate(limits):
        if limit is not None:
            constraints.append(LinearConstraint([[float(p.kind == kind) for p in patterns]], 0, limit))
    with no_native_output():
        result = milp(
            np.array([costs[p.kind] for p in patterns], np.float64),
            integrality=np.ones(len(patterns), np.int64),
            bounds=Bounds(0, slots),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "node_limit": _NODE_LIMIT, "time_limit": _TIME_LIMIT},
        )
    # 0: solved; 2: these patterns cannot cover all blocks within the limits, so that none of them is better.
    counts = None if result.x is None else np.rint(result.x).astype(int).tolist()
    return counts, result.status in (0, 2)


def _placed(
    patterns: Sequence[_Pattern],
    counts: Sequence[int],
    sizes: Sequence[_Size],
    jobs: dict[_Size, list[Job]],
    mode: Sharing,
) -> Iterator[Spot]:
    """The blocks in the crossbars of the chosen patterns; what a pattern covers twice is placed once."""
    waiting = {size: list(reversed(found)) for size, found in jobs.items()}
    for slot, pattern in enumerate(p for p, count in zip(patterns, counts, strict=True) for _ in range(count)):
        row = col = 0
        for shelf in pattern.shelves:
            # Shelves start at the left; on the diagonal each block starts where the one before ends.
            col = 0 if mode == "time" else col
            height = 0
            for size, count in zip(sizes, shelf, strict=True):
                for _ in range(min(count, len(waiting[size]))):
                    yield (*waiting[size].pop(), pattern.kind, (slot, row, col))
                    col, height = col + size[1], max(height, size[0])
            row += height


# ----------------------------------------------------------------------------------------------------------- patterns


def _patterns(sizes: Sequence[_Size], counts: Sequence[int], room: _Size, mode: Sharing) -> list[_Shelves] | None:
    """All patterns to which no further block can be added, None where there are too many."""
    if mode != "time":
        found = _fillings(list(sizes), list(counts), room)
        return None if found is None else [_corners(filling) for filling in found]
    shelves = _shelves(sizes, counts, room)
    if shelves is None:
        return None
    heights = [max(size[0] for size, count in zip(sizes, shelf, strict=True) if count) for shelf in shelves]
    stacks = _fillings([(height, 0) for height in heights], [room[0]] * len(shelves), room)
    if stacks is None:
        return None
    return [tuple(s for s, n in zip(shelves, stack, strict=True) for _ in range(n)) for stack in stacks]


def _shelves(sizes: Sequence[_Size], counts: Sequence[int], room: _Size) -> list[tuple[int, ...]] | None:
    """Blocks side by side: for each height, all fillings with blocks up to that height."""
    found: dict[tuple[int, ...], None] = {}
    for height in sorted({size[0] for size in sizes if size[0] <= room[0]}):
        low = [n if size[0] <= height else 0 for size, n in zip(sizes, counts, strict=True)]
        fillings = _fillings([(0, size[1]) for size in sizes], low, room)
        if fillings is None:
            return None
        found.update(dict.fromkeys(fillings))
    return list(found)


def _corners(filling: tuple[int, ...]) -> _Shelves:
    one = np.eye(len(filling), dtype=int)
    return tuple(tuple(one[index].tolist()) for index, count in enumerate(filling) for _ in range(count))


def _fillings(sizes: list[_Size], counts: list[int], room: _Size) -> list[tuple[int, ...]] | None:
    """Counts of each size that fit together and leave no room for another one, None where there are too many."""
    found: list[tuple[int, ...]] = []
    picked = [0] * len(sizes)
    steps = 0

    def fits(index: int, rows: int, cols: int) -> bool:
        return picked[index] < counts[index] and sizes[index][0] <= rows and sizes[index][1] <= cols

    def search(first: int, rows: int, cols: int) -> bool:
        nonlocal steps
        steps += len(sizes)
        if len(found) > _MOST_PATTERNS or steps > _MOST_STEPS or sum(picked) > _MOST_BLOCKS:
            return False
        for index in range(first, len(sizes)):
            if fits(index, rows, cols):
                picked[index] += 1
                done = search(index, rows - sizes[index][0], cols - sizes[index][1])
                picked[index] -= 1
                if not done:
                    return False
        if any(picked) and not any(fits(other, rows, cols) for other in range(len(sizes))):
            found.append(tuple(picked))
        return True

    return found if search(0, *room) else None
