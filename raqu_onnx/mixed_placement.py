"""Which crossbar type every block goes to, and where.

What is minimized is the cells of all allocated crossbars, which is the area that the weights take, and, among equals,
the number of crossbars. Where a budget of crossbars is given, placements beyond it count as worse than all within it.
On a chip with one type both are the same.

Blocks of one node may lie on different types, as long as their cells hold the same number of bits: only then do columns
mean the same on all of them. The problem is a bin packing with bins of several sizes; several ways are tried
and the best one is kept.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from raqu_onnx.placement_problem import MixedPlacement, Problem, renumbered
from raqu_onnx.trials import Trials

if TYPE_CHECKING:
    from collections.abc import Iterator

    from raqu_onnx.placement_problem import Spot

__all__ = ["place_blocks"]


def place_blocks(problem: Problem, max_crossbars: int | None = None) -> MixedPlacement | None:
    """Place every node on the types that serve the whole model best.

    Args:
        problem: Weights, types and rules.
        max_crossbars: Crossbars within which cells are to be minimized; they are exceeded only where no trial stays
            within them, and then by as little as possible.

    Returns:
        The placement with the fewest cells and, among equals, the fewest crossbars of those tried; None when none of
        them fits.
    """

    def key(found: MixedPlacement) -> tuple[int, int, int]:
        cells, crossbars = problem.cost(found.opened)
        return max(0, crossbars - (max_crossbars or crossbars)), cells, crossbars

    best: MixedPlacement | None = None
    for fewest_crossbars in (False, True):
        for nodes in _assignments(problem):
            found = _place_classes(problem, nodes, fewest_crossbars=fewest_crossbars)
            if found is not None and (best is None or key(found) < key(best)):
                best = found
        if len(problem.shapes) == 1 or (best is not None and not key(best)[0]):
            break
    moved = _without_limits(problem, max_crossbars)
    return moved if moved is not None and (best is None or key(moved) < key(best)) else best


def _without_limits(problem: Problem, max_crossbars: int | None) -> MixedPlacement | None:
    """What is placed with any number of crossbars may stay within the limits in the end."""
    if len(problem.shapes) == 1 or all(limit is None for limit in problem.limits):
        return None
    free = replace(problem, limits=(None,) * len(problem.shapes))
    found = place_blocks(free, max_crossbars)
    if found is None:
        return None
    return _promoted(problem, found)


def _promoted(problem: Problem, found: MixedPlacement) -> MixedPlacement | None:
    """Crossbars beyond the limit of their type become larger ones; None where there are not enough."""
    shapes, opened = problem.shapes, list(found.opened)
    moved: dict[tuple[int, int], tuple[int, int]] = {}
    for kinds in problem.classes:
        for kind in reversed(kinds):
            limit = problem.limits[kind]
            for slot in range(opened[kind] - 1, opened[kind] - 1 if limit is None else limit - 1, -1):
                larger = (
                    other
                    for other in reversed(kinds)
                    if (shapes[other].rows >= shapes[kind].rows and shapes[other].cols >= shapes[kind].cols)
                    and other != kind
                    and (problem.limits[other] is None or opened[other] < (problem.limits[other] or 0))
                )
                other = next(larger, None)
                if other is None:
                    return None
                moved[kind, slot] = other, opened[other]
                opened[other] += 1
    spots = []
    for node, block, kind, at in found.spots:
        other, slot = moved.get((kind, at[0]), (kind, at[0]))
        spots.append((node, block, other, (slot, at[1], at[2])))
    return renumbered(spots, len(shapes))


def _assignments(problem: Problem) -> Iterator[list[list[int]]]:
    """Nodes of each class of types: all on the class where they take least, then all on one, then as classes fill."""
    nodes, classes = range(len(problem.cells)), range(len(problem.classes))
    if len(classes) == 1:
        yield [list(nodes)]
        return
    possible = [
        [c for c in classes if any(problem.demand(kind, node) is not None for kind in problem.classes[c])]
        for node in nodes
    ]
    if not all(possible):
        return
    cheapest = [sorted(possible[node], key=lambda c: (problem.cells[node][c], c)) for node in nodes]
    yield [[node for node in nodes if cheapest[node][0] == c] for c in classes]
    for c in classes:
        if all(c in possible[node] for node in nodes):
            yield [list(nodes) if c == own else [] for own in classes]
    for share in (0.95, 0.8, 0.6):
        yield _by_room(problem, cheapest, share)


def _by_room(problem: Problem, cheapest: list[list[int]], share: float) -> list[list[int]]:
    """Nodes by falling cells, each on the first of its classes that has a share of its cells left for it."""
    room = [
        math.inf
        if any(problem.limits[kind] is None for kind in kinds)
        else share * sum((problem.limits[kind] or 0) * problem.shapes[kind].cells for kind in kinds)
        for kinds in problem.classes
    ]
    chosen: list[list[int]] = [[] for _ in room]
    for node in sorted(range(len(cheapest)), key=lambda node: -problem.cells[node][cheapest[node][0]]):
        where = next((c for c in cheapest[node] if problem.cells[node][c] <= room[c]), cheapest[node][-1])
        room[where] -= problem.cells[node][where]
        chosen[where].append(node)
    return chosen


def _place_classes(problem: Problem, nodes: list[list[int]], *, fewest_crossbars: bool) -> MixedPlacement | None:
    """Each class of types by itself."""
    spots: list[Spot] = []
    opened = [0] * len(problem.shapes)
    for kinds, own in zip(problem.classes, nodes, strict=True):
        found = Trials(problem, kinds, own, fewest_crossbars=fewest_crossbars).best()
        if found is None:
            return None
        spots.extend(found.spots)
        opened = [a + b for a, b in zip(opened, found.opened, strict=True)]
    return MixedPlacement(tuple(spots), tuple(opened))
