"""A model on a chip that is too small for it: parts that are programmed one after the other.

Parts hold consecutive stages, so that only the tensors between two of them wait while the chip is programmed anew (as
in COMPASS, arXiv 2501.06780, which also partitions a network and rewrites the crossbars between the parts).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from raqu_onnx.errors import ConfigError
from raqu_onnx.placement import DoesNotFitError, Partition, PlacedBlock, Placement, PlacementMethod, place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raqu_onnx.hardware import Chip
    from raqu_onnx.tiling import Matrix

__all__ = ["Parts", "place_in_parts", "require_parts", "too_large_alone", "without_counts"]

#: Most partitions, or as few as will do.
Parts = int | Literal["auto"]


def require_parts(parts: Parts | None, replicate: object) -> None:
    """Make sure that partitions and copies are not wanted together.

    Raises:
        ConfigError: They are: copies need room, and partitions have none.
    """
    if parts is not None and replicate is not None:
        raise ConfigError("--partitions and --replicate: a chip is either too small or too large for a model; give one")


def without_counts(chip: Chip) -> Chip:
    """The same chip with as many crossbars as needed."""
    kinds = tuple(kind.model_copy(update={"count": None}) for kind in chip.crossbars)
    return chip.model_copy(update={"crossbars": kinds, "hierarchy": None})


def place_in_parts(
    matrices: Mapping[str, Matrix],
    chip: Chip,
    order: Sequence[str],
    parts: Parts,
    *,
    method: PlacementMethod = "fast",
    max_crossbars: int | None = None,
) -> Placement:
    """Place a model in as few parts of consecutive stages as fit the chip one after the other.

    Each part takes as many stages as fit. No other cut has fewer parts as long as what fits still does with fewer
    stages: after any number of parts, no other cut can be further in the order (derived here).

    Args:
        matrices: Weights by node name.
        chip: The chip.
        order: Names of the nodes in a valid order of execution.
        parts: Most parts that may be made.
        method: How each part is placed, see `place`; what fits is decided by the fast one, which `exact` starts from.
        max_crossbars: A budget for all parts together: with one, `exact` takes no more crossbars than the fast one.

    Returns:
        The placement; the crossbars of a part are numbered after those of the parts before it.

    Raises:
        DoesNotFitError: One node alone does not fit, or more parts are needed.
    """
    placed: list[tuple[tuple[str, ...], Placement]] = []
    start = 0
    while start < len(order):
        end, found = _furthest(matrices, chip, order, start)
        names = tuple(order[start:end])
        if method != "fast":
            budget = None if max_crossbars is None else found.crossbars
            found = place({name: matrices[name] for name in names}, chip, method=method, max_crossbars=budget)
        placed.append((names, found))
        start = end
    if parts != "auto" and len(placed) > parts:
        raise DoesNotFitError(
            f"--partitions {parts}: on chip {chip.name} the model takes {len(placed)} partitions of consecutive nodes; "
            "allow more, or use fewer bits or a larger chip"
        )
    return _joined(matrices, chip, placed)


def too_large_alone(matrices: Mapping[str, Matrix], chip: Chip) -> str:
    """The first node that does not fit a chip even alone, empty where each does."""
    for name, matrix in matrices.items():
        try:
            place({name: matrix}, chip)
        except DoesNotFitError:
            return name
    return ""


def _furthest(matrices: Mapping[str, Matrix], chip: Chip, order: Sequence[str], start: int) -> tuple[int, Placement]:
    """The end of the longest part that begins at `start` and fits, and its placement."""

    def attempt(end: int) -> Placement | None:
        try:
            return place({name: matrices[name] for name in order[start:end]}, chip)
        except DoesNotFitError:
            return None

    best = attempt(start + 1)
    if best is None:
        raise DoesNotFitError(
            f"node {order[start]} alone is too large for the chip: {_shortage(matrices, chip, order[start])}"
        )
    low, high, step = start + 1, len(order) + 1, 1  # `low` fits; `high` does not, or is behind the end.
    while low + step < high:
        found = attempt(low + step)
        if found is None:
            high = low + step
            break
        best, low, step = found, low + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        found = attempt(middle)
        if found is None:
            high = middle
        else:
            best, low = found, middle
    return low, best


def _shortage(matrices: Mapping[str, Matrix], chip: Chip, name: str) -> str:
    need = place({name: matrices[name]}, chip, ignore_counts=True).crossbars
    have = sum(kind.count or 0 for kind in chip.crossbars)
    return f"it takes {need} crossbars, chip {chip.name} has {have}; use fewer bits or a larger chip"


def _joined(
    matrices: Mapping[str, Matrix], chip: Chip, placed: Sequence[tuple[tuple[str, ...], Placement]]
) -> Placement:
    from raqu_onnx.exact_placement import weakest

    first = (0,) * len(chip.crossbars)
    parts: list[Partition] = []
    blocks: dict[str, list[PlacedBlock]] = {}
    for names, found in placed:
        parts.append(Partition(names, first, found.slots))
        for block in found.blocks:
            moved = replace(block, crossbar=block.crossbar + first[block.crossbar_type])
            blocks.setdefault(block.node, []).append(moved)
        first = tuple(a + b for a, b in zip(first, found.slots, strict=True))
    every = tuple(block for name in matrices for block in blocks.get(name, ()))
    outcomes = [found.exact for _, found in placed if found.exact is not None]
    exact = weakest(outcomes) if outcomes else None
    return Placement(chip, chip.sharing, dict(matrices), every, first, tuple(parts), exact)
