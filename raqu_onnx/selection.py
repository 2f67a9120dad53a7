"""Which nodes a user means: names, operator types and regular expressions, resolved to node names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from raqu_onnx.errors import ConfigError

__all__ = ["FIRST", "LAST", "ends", "excluded_reason", "matching", "select", "split_patterns"]

#: Words of `--keep` for the nodes at either end of the graph.
FIRST = "first"
LAST = "last"

_OPENING, _CLOSING = "([{", ")]}"
# Nodes that an error names before it stops.
_NAMED = 3


def excluded_reason(pattern: str, *, quantized: bool = False) -> str:
    """Why a node that a pattern excludes is not on crossbars.

    Args:
        pattern: What the user gave.
        quantized: Another tool quantized the node, which stays as that left it, where others stay in float.
    """
    return f"excluded by the user ({pattern})" + (", stays quantized as it was" if quantized else "")


def split_patterns(text: str) -> tuple[str, ...]:
    """Patterns of a list separated by commas; a comma inside brackets belongs to a regular expression.

    ``first,layer.{1,2}`` gives ``first`` and ``layer.{1,2}``.
    """
    parts, depth = [""], 0
    for letter in text:
        depth = max(0, depth + (letter in _OPENING) - (letter in _CLOSING))
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts)


def matching(pattern: str, nodes: Mapping[str, str]) -> list[str]:
    """Names of the nodes that one pattern means.

    A node's name comes first, then an operator type, then a regular expression over whole node names.

    Args:
        pattern: The pattern.
        nodes: Operator type by node name.

    Raises:
        ValueError: It is neither a name nor a type, and no regular expression.
    """
    if pattern in nodes:
        return [pattern]
    of_type = [name for name, op_type in nodes.items() if op_type == pattern]
    if of_type:
        return of_type
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{pattern!r} is neither a node nor an operator type, nor a regular expression: {error}"
        ) from (error)
    return [name for name in nodes if expression.fullmatch(name)]


def select(
    option: str,
    patterns: Iterable[str],
    nodes: Mapping[str, str],
    *,
    words: Mapping[str, Sequence[str]] | None = None,
    others: Mapping[str, str] | None = None,
    unfit: str = "",
) -> dict[str, str]:
    """Resolve the patterns of an option.

    Args:
        option: As the user writes it, for messages.
        patterns: What the user gave.
        nodes: Nodes that may be selected: operator type by name.
        words: Patterns with a meaning of their own and the nodes that they stand for; they win over names.
        others: Nodes of the model that cannot be selected.
        unfit: Why they cannot, to follow "nodes that".

    Returns:
        The first pattern that means it, by name of each node selected, in the order of `nodes`.

    Raises:
        ConfigError: A pattern is malformed or means no node that could be selected.
    """
    words = words or {}
    chosen: dict[str, str] = {}
    for pattern in patterns:
        if pattern in words:
            found: Sequence[str] = words[pattern]
        else:
            found = _found(option, pattern, nodes, words, others or {}, unfit)
        for name in found:
            chosen.setdefault(name, pattern)
    return {name: chosen[name] for name in nodes if name in chosen}


def _found(
    option: str,
    pattern: str,
    nodes: Mapping[str, str],
    words: Mapping[str, Sequence[str]],
    others: Mapping[str, str],
    unfit: str,
) -> list[str]:
    if not pattern:
        raise ConfigError(f"{option}: a pattern is empty; give a node name, an operator type or a regular expression")
    try:
        found = matching(pattern, nodes)
        elsewhere = [] if found else matching(pattern, others)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error
    if found:
        return found
    if elsewhere:
        named = ", ".join(f"{name} ({others[name]})" for name in elsewhere[:_NAMED])
        more = f" and {len(elsewhere) - _NAMED} more" if len(elsewhere) > _NAMED else ""
        raise ConfigError(f"{option}: {pattern!r} means only nodes that {unfit}: {named}{more}")
    known = [*words, *nodes, *dict.fromkeys(nodes.values())]
    near = get_close_matches(pattern, known, _NAMED)
    advice = f", did you mean {' or '.join(near)}?" if near else ";"
    raise ConfigError(
        f"{option}: {pattern!r} matches no node{advice} `raqu-onnx inspect MODEL` lists those that can be given"
    )


def ends(predecessors: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The words of `--keep` and what they stand for.

    Args:
        predecessors: Names of the nearest mapped nodes that each mapped node depends on.

    Returns:
        `first`: nodes that depend on no mapped node; `last`: nodes that none depends on.
    """
    needed = {name for names in predecessors.values() for name in names}
    return {
        FIRST: [name for name, names in predecessors.items() if not names],
        LAST: [name for name in predecessors if name not in needed],
    }
