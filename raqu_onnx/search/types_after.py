"""Bits chosen without regard to the sizes of the chip's crossbars, which are assigned after them.

On a chip with crossbars of several sizes the search allocates bits for these, and what it judges differs by a few
kernels from what it would judge on a chip of one size. A few kernels more or less change how all that follow are
rounded, so that either may end with the smaller loss. Both are therefore sought, and the better candidate that can be
placed is taken: choosing sizes and bits together is then never worse than assigning sizes after bits for that one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raqu_onnx.errors import ChipError
from raqu_onnx.search.budget import Budget
from raqu_onnx.search.strategy import best_within

if TYPE_CHECKING:
    from collections.abc import Callable

    from raqu_onnx.hardware import Chip
    from raqu_onnx.search.problem import Problem
    from raqu_onnx.search.result import Evaluation
    from raqu_onnx.search.stages import Stage

__all__ = ["ORIGIN", "chips_of_one_size", "search_types_after"]

#: Where the candidates of the search come from that does not see the sizes.
ORIGIN = "types after the bits"


def chips_of_one_size(chip: Chip) -> list[tuple[Chip, int]]:
    """Chips that differ from one with several sizes in having as many of one of them as its cells are enough for.

    Args:
        chip: The chip.

    Returns:
        The chips, each with any number of crossbars, and how many of these hold as many cells; first the one that
        leaves fewest cells over, the larger size of two. None where there is one size, or any number of one, or where
        cells hold different bits.
    """
    kinds = chip.crossbars
    counts = [kind.count for kind in kinds if kind.count is not None]
    sizes, bits = {(kind.rows, kind.cols) for kind in kinds}, {kind.cell_bits for kind in kinds}
    if len(sizes) < 2 or len(counts) < len(kinds) or len(bits) > 1:
        return []
    cells = sum(kind.cells * count for kind, count in zip(kinds, counts, strict=True))
    order = sorted(kinds, key=lambda kind: (cells % kind.cells, -kind.cells))
    alone = [kind.model_copy(update={"count": None}) for kind in order]
    return [(chip.model_copy(update={"crossbars": (kind,)}), cells // kind.cells) for kind in alone]


def search_types_after(problem: Problem, prepare: Callable[[Problem], Stage], found: Evaluation) -> Evaluation:
    """Search once more, for one size of crossbars.

    Args:
        problem: The search so far, on a chip with several sizes; gets the candidates that can be placed there.
        prepare: Judges the baselines of a problem and gives what is searched.
        found: The best candidate so far.

    Returns:
        The candidate of least loss.
    """
    for chip, crossbars in chips_of_one_size(problem.chip):
        if problem.clock.is_over():
            break
        try:
            other = problem.on(chip, crossbars)
            stage = prepare(other)
            if not problem.clock.is_over():
                best_within(other, stage, Budget(crossbars=crossbars))
        except ChipError:
            # A kernel is too wide for this size, or as many cells of it are too few: others may do.
            continue
        known = {item.bits for item in problem.evaluations}
        placed = [item.bits for item in other.evaluations if problem.measure(item.bits) is not None]
        if placed:
            new = [bits for bits in placed if bits not in known]
            return min([found, *problem.evaluate_many(new, ORIGIN)], key=lambda item: item.score.loss)
    return found
