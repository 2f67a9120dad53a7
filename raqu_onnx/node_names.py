"""Names of nodes, which strangers chose, where they are shown."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["printable", "short_names", "shortened"]

# Controls, formats such as those that turn text around, and separators that some terminals break lines at.
_STEERING = {"Cc", "Cf", "Zl", "Zp"}


def printable(text: str) -> str:
    """A text without characters that steer a terminal or turn its line around, as names in a stranger's model may hold.

    Each stands as its escape, as in Python's strings; line ends and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) not in _STEERING else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shortened(names: Sequence[str], width: int, mark: str = "…") -> list[str]:
    """Names without their middle where they are longer than `width`.

    Both ends stay. How much of each is chosen for all names together, so that as many as possible still differ.
    """
    if all(len(name) <= width for name in names):
        return list(names)
    kept = max(width - len(mark), 2)

    def cut(head: int) -> list[str]:
        return [name if len(name) <= width else name[:head] + mark + name[head - kept :] for name in names]

    # The even split first, of those that tell apart as many names.
    heads = sorted(range(1, kept), key=lambda head: (abs(2 * head - kept), -head))
    return cut(max(heads, key=lambda head: len(set(cut(head)))))


def short_names(names: Sequence[str], types: Sequence[str], width: int = 24) -> list[str]:
    """Names of layers without what says nothing: folders that all share, and their own operator at the end.

    Two different names may still look the same where they are very long.

    Args:
        names: Node names.
        types: Their operator types.
        width: Longest name.
    """
    named = [name for name in names if name]
    # The first and the last in order of the alphabet share what all share.
    first, last = (min(named), max(named)) if len(named) > 1 else ("", "")
    same = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    shared = first[:same][: first[:same].rfind("/") + 1]
    bare = []
    for name, op_type in zip(names, types, strict=True):
        # Exporters of modules repeat it: /block1/expand/conv/Conv.
        without = re.sub(rf"(/{re.escape(op_type)})+$", "", name.removeprefix(shared), flags=re.IGNORECASE)
        bare.append(without.strip("/") or name or op_type)
    return shortened(bare, width)
