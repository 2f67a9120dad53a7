"""Which crossbar type of a chip runs short, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raqu_onnx.hardware import Chip

__all__ = ["shortage"]


def shortage(chip: Chip, used: Sequence[int]) -> str:
    """The types of which a placement takes more crossbars than there are, such as ``5 large where it has 3``.

    Blocks are not cut at will, and a node lies on types with cells of the same bits only, so that one type can run
    short while crossbars of another are left.

    Args:
        chip: The chip.
        used: Crossbars that the placement takes of each type, the chip's counts ignored.

    Returns:
        The types in the chip's order; empty where none runs short, and where the chip has only one.
    """
    if len(chip.crossbars) == 1:
        return ""
    pairs = zip(chip.crossbars, used, strict=True)
    short = [(kind, count) for kind, count in pairs if kind.count is not None and count > kind.count]
    return ", ".join(f"{count} {kind.name} where it has {kind.count}" for kind, count in short)
