"""Names of layers that fit beside a plot."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["short_names"]

_LONGEST = 24


def short_names(names: Sequence[str], types: Sequence[str]) -> list[str]:
    """Names without the folders that all of them share and without their own operator's name, cut in the middle.

    Two different names may look the same; plots tell them apart by place, and hovering shows them whole.

    Args:
        names: Node names.
        types: Their operator types.
    """
    named = [name for name in names if name]
    # The first and the last in order of the alphabet share what all share.
    first, last = (min(named), max(named)) if len(named) > 1 else ("", "")
    same = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    shared = first[:same][: first[:same].rfind("/") + 1]
    found = []
    for name, op_type in zip(names, types, strict=True):
        short = re.sub(rf"/{re.escape(op_type)}$", "", name.removeprefix(shared)).strip("/") or name or op_type
        half = (_LONGEST - 1) // 2
        found.append(short if len(short) <= _LONGEST else f"{short[:half]}…{short[-half:]}")
    return found
