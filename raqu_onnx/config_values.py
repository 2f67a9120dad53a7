"""How single settings are read: widths, numbers or words, patterns, quantities."""

from __future__ import annotations

import re
from collections.abc import Callable

from raqu_onnx.selection import split_patterns

__all__ = [
    "bits_text",
    "check_granularity",
    "kept_as_written",
    "parse_bits",
    "parse_crossbars",
    "parse_parts",
    "parse_weight_bits",
    "pattern_list",
    "patterns",
]


def parse_bits(value: object) -> tuple[int, int] | None:
    """Read ``4``, ``"2-8"`` or ``"float"``; a pair is taken as it is, and so is None, which is ``"float"``.

    Raises:
        ValueError: It is none of these, or not within 2 to 8.
    """
    if value is None or (isinstance(value, str) and value.strip() == "float"):
        return None
    match value:
        case int() if not isinstance(value, bool):
            low = high = value
        case [int() as low, int() as high]:
            pass
        case str() if found := re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", value):
            low = int(found[1])
            high = int(found[2] or found[1])
        case _:
            raise ValueError(f"{value!r} is no width: give a number such as 4 or a range such as 2-8")
    if not 2 <= low <= high <= 8:
        raise ValueError(f"{value!r} is out of range: widths are 2 to 8, the smaller one first")
    return low, high


def parse_weight_bits(value: object) -> tuple[int, int]:
    """Read a width or a range of widths, which cannot be `float`.

    Raises:
        ValueError: It is none.
    """
    parsed = parse_bits(value)
    if parsed is None:
        raise ValueError("weights cannot stay float: give a number such as 4 or a range such as 2-8")
    return parsed


def parse_crossbars(value: object) -> int | str | None:
    """Read a number of crossbars, or `chip` for as many as it has."""
    number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) else value
    if number is None or number == "chip":
        return number
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 2**31:
        raise ValueError(f"{value!r} is no number of crossbars: give one such as 200, or chip for all that it has")
    return number


def parse_parts(value: object) -> int | str | None:
    """Read a number of partitions, or `auto` for as few as will do."""
    number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) else value
    if number is None or number == "auto":
        return number
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 2**31:
        raise ValueError(f"{value!r} is no number of partitions: give one such as 4, or auto for as few as will do")
    return number


def kept_as_written(parse: Callable[[object], object]) -> Callable[[object], object]:
    """A check of a text or number that is kept as it was written."""

    def check(value: object) -> object:
        if value is not None:
            parse(value)
        return value

    return check


def bits_text(value: tuple[int, int] | None) -> str | int:
    """Inverse of `parse_bits`."""
    if value is None:
        return "float"
    return value[0] if value[0] == value[1] else f"{value[0]}-{value[1]}"


def patterns(value: object) -> object:
    """One pattern may stand alone."""
    return (value,) if isinstance(value, str) else value


def pattern_list(value: object) -> object:
    """A text is a list separated by commas."""
    return split_patterns(value) if isinstance(value, str) else value


def check_granularity(value: object) -> object:
    """Check ``layer``, ``kernel`` or ``group:N``."""
    if isinstance(value, str) and re.fullmatch(r"layer|kernel|group:0*[1-9]\d*", value):
        return value
    raise ValueError(f"{value!r} is no granularity: give layer, kernel or group:N, such as group:8")
