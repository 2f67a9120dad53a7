"""Bits chosen without regard to the chip's crossbar types, which are assigned after them.

On a chip with crossbars of several sizes the search allocates bits for these, and what it judges differs by a few
kernels from what it would judge on a chip of one size. A few kernels more or less change how all that follow are
rounded, so that either may end with the smaller loss. Both are therefore sought, and the better one that can be placed
is taken: choosing types and bits together is never worse than assigning types after the bits.
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

__all__ = ["ORIGIN", "of_one_type", "search_types_after"]

#: Where the candidates of the search come from that does not see the types.
ORIGIN = "types after the bits"


def of_one_type(chip: Chip) -> tuple[Chip, int] | None:
    """A chip that differs from one with several types in having as many of one of them as its cells are enough for.

    Args:
        chip: The chip.

    Returns:
        The chip, with any number of crossbars, and how many of these hold as many cells; the type is the one that
        leaves fewest cells over, the larger one of two. None where there is one type, or any number of one, or where
        cells of types hold different bits.
    """
    kinds = chip.crossbars
    counts = [kind.count for kind in kinds if kind.count is not None]
    if len(kinds) < 2 or len(counts) < len(kinds) or len({kind.cell_bits for kind in kinds}) > 1:
        return None
    cells = sum(kind.cells * count for kind, count in zip(kinds, counts, strict=True))
    chosen = min(kinds, key=lambda kind: (cells % kind.cells, -kind.cells))
    return chip.model_copy(update={"crossbars": (chosen.model_copy(update={"count": None}),)}), cells // chosen.cells


def search_types_after(
    problem: Problem, prepare: Callable[[Problem], Stage], found: Evaluation, *, what: str
) -> Evaluation:
    """Search once more without the types.

    Args:
        problem: The search so far, on a chip with several types; gets the candidates that can be placed there.
        prepare: Judges the baselines of a problem and gives what is searched.
        found: The best candidate so far.
        what: What progress says is being done.

    Returns:
        The candidate of least loss.
    """
    other = of_one_type(problem.chip)
    if other is None or problem.clock.is_over():
        return found
    chip, crossbars = other
    try:
        blind = problem.on(chip, crossbars)
        best_within(blind, prepare(blind), Budget(crossbars=crossbars), what)
    except ChipError:
        # A kernel is too wide for this type, or the cells of that type alone are too few.
        return found
    placed = [item.bits for item in blind.evaluations if problem.crossbars(item.bits.weights) is not None]
    return min([found, *problem.evaluate_many(placed, ORIGIN)], key=lambda item: item.score.loss)
