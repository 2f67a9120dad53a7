"""What a configuration got wrong, in the words of its author: an option, or a key of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

__all__ = ["explain"]

# What a value must be, by pydantic's type of error; names in braces are keys of the error's context.
_ALLOWED = {
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "dict_type": "must be a table of settings",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "is too large",
    "int_type": "must be a whole number",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "missing": "has too few values",
    "model_attributes_type": "must be a table of settings",
    "model_type": "must be a table of settings",
    "string_too_short": "must not be empty",
    "string_type": "must be a text",
    "string_unicode": "must be a text",
    "too_long": "must have at most {max_length} values",
    "too_short": "must have at least {min_length} values",
    "tuple_type": "must be a list",
}
_LONGEST = 60


def explain(
    error: ValidationError, known: Mapping[str, Sequence[str] | None], path: str | Path | None, given: Mapping[str, Any]
) -> str:
    """Every problem of a configuration on one line.

    Args:
        error: From validating it.
        known: The settings: None, or for a table the keys in it.
        path: The file that it was read from, or None.
        given: Values that came from options of the command line, by key.
    """
    return "; ".join(_problem(item, known, path, given) for item in error.errors(include_url=False))


def _problem(
    item: ErrorDetails, known: Mapping[str, Sequence[str] | None], path: str | Path | None, given: Mapping[str, Any]
) -> str:
    loc = [str(part) for part in item["loc"]]
    key = ".".join(loc)
    where = str(path or "settings")
    if item["type"] == "extra_forbidden":
        names = [f"{loc[0]}.{name}" for name in known.get(loc[0]) or ()] if len(loc) > 1 else list(known)
        near = get_close_matches(key, names, 1)
        advice = f", did you mean {near[0]}?" if near else f"; settings are {', '.join(names)}"
        return f"{where}: {key} is no setting{advice}"
    where = _option(loc) if _is_given(loc, given) else f"{where}: {key}" if key else where
    message = _message(item)
    found = "" if repr(item["input"]) in message else f", found {_shown(item['input'])}"
    return f"{where}: {message}{found}"


def _is_given(loc: Sequence[str], given: Mapping[str, Any]) -> bool:
    place: Any = given if loc else None
    for part in loc[:2]:
        place = place.get(part) if isinstance(place, Mapping) else place
    return place is not None


def _option(loc: Sequence[str]) -> str:
    """The option that sets a value: keys of the table `pictures` have one each."""
    words = ["picture", *loc[1:2]] if loc[0] == "pictures" else [loc[0]]
    return "--" + "-".join(words).replace("_", "-")


def _message(item: ErrorDetails) -> str:
    words = _ALLOWED.get(item["type"])
    if words is not None:
        return words.format(**item.get("ctx", {}))
    # What is left are our own sentences, behind a prefix of pydantic's.
    return item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
