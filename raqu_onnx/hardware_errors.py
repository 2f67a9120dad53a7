"""What a chip file got wrong, in the words of its author: `FILE: key: found X, allowed Y`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from raqu_onnx.errors import ChipError

__all__ = ["ChipFileError", "constraint", "explain", "flatten"]

_Loc = tuple[int | str, ...]
_Schema = Mapping[str, Any]
_CONSTRAINT = "constraint"
_UNITS = {"ns": "ns", "pj": "pJ", "mw": "mW", "um2": "um2", "gsps": "10^9 samples per second"}
_OTHER_UNITS = (
    {"s", "ms", "us", "ps", "hz", "khz", "mhz", "ghz", "sps", "ksps", "msps"}
    | {"j", "mj", "uj", "nj", "fj", "kw", "w", "uw", "nw"}
    | {"m2", "mm2", "nm2"}
)
_LONGEST = 60


class ChipFileError(ChipError):
    """A chip file that cannot be used.

    Attributes:
        file: The file as the caller named it.
        problems: One text per error, without the file.
    """

    def __init__(self, file: str, problems: Sequence[str]) -> None:
        self.file = _one_line(file)
        self.problems = tuple(_one_line(problem) for problem in problems)
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """One line per error; a summary before them if there are several."""
        lines = [f"{self.file}: {problem}" for problem in self.problems]
        if len(lines) == 1:
            return lines
        return [f"{self.file}: {len(lines)} errors in the chip description", *lines]


def constraint(allowed: str, found: str = "") -> PydanticCustomError:
    """The error that a validator raises where one value contradicts another.

    Args:
        allowed: What would do.
        found: What there is; the value itself if empty.
    """
    context = {"allowed": allowed, "found": found}
    return PydanticCustomError(_CONSTRAINT, "allowed {allowed}", context)


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tables with their dotted keys."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def explain(error: ValidationError, schema: _Schema, document: Mapping[str, Any]) -> list[str]:
    """Every error of a chip description as `key: found X, allowed Y`.

    Args:
        error: From validating `document`.
        schema: JSON Schema of the model that it was validated against.
        document: The parsed file.
    """
    errors = error.errors(include_url=False)
    return [_explain_one(e, schema, document) for e in errors if not _follows_from_another(e)]


def _follows_from_another(error: ErrorDetails) -> bool:
    # A default that depends on a key which is wrong itself, and an array that is short of entries because those it
    # has are wrong: both are reported where they arise.
    return error["type"] == "default_factory_not_called" or (error["type"] == "too_short" and bool(error["input"]))


def _explain_one(error: ErrorDetails, schema: _Schema, document: Mapping[str, Any]) -> str:
    loc = error["loc"]
    key = _key(loc, document)
    if error["type"] == "extra_forbidden":
        return f"{key}: found an unknown key, allowed {_instead(loc, schema)}"
    if error["type"] == _CONSTRAINT:
        context = error["ctx"]
        return f"{key}: found {context['found'] or _show(error['input'])}, allowed {context['allowed']}"
    node = _node(loc, schema)
    allowed = _allowed(node, str(loc[-1]) if loc else "", schema)
    if error["type"] == "missing":
        return f"{key}: found nothing, allowed {allowed}"
    hint = ""
    if isinstance(error["input"], str) and _kind(node) in {"integer", "number"}:
        hint = " (write the bare number: no quotes, no unit)"
    return f"{key}: found {_show(error['input'])}, allowed {allowed}{hint}"


def _key(loc: _Loc, document: Any) -> str:
    """Dotted key; an entry of an array of tables goes by its name where it has one."""
    parts: list[str] = []
    at = document
    for part in loc:
        if isinstance(part, int):
            names = _names(at)
            name = names[part] if part < len(names) else ""
            at = at[part] if isinstance(at, Sequence) and part < len(at) else None
            if name and names.count(name) == 1:
                parts.append(_bare(name))
            else:
                parts[-1] += f"[{part}]"
        else:
            at = at.get(part) if isinstance(at, Mapping) else None
            parts.append(_bare(part))
    return ".".join(parts) or "the file"


def _names(tables: Any) -> list[str]:
    entries = tables if isinstance(tables, list) else []
    names = [entry.get("name") if isinstance(entry, Mapping) else None for entry in entries]
    return [name if isinstance(name, str) else "" for name in names]


def _bare(key: str) -> str:
    return key if re.fullmatch(r"[\w.-]+", key) else json.dumps(key, ensure_ascii=False)


def _show(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "an array" if value else "an empty array"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _node(loc: _Loc, schema: _Schema) -> _Schema:
    """The schema of the value at `loc`; empty where there is none."""
    node: _Schema = schema
    for part in loc:
        node = _resolved(node, schema)
        if isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part, node.get("additionalProperties") or {})
    return _resolved(node, schema)


def _resolved(node: _Schema, schema: _Schema) -> _Schema:
    """Follow references, and leave out the alternative `null`."""
    options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
    if options:
        node = options[0]
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def _kind(node: _Schema) -> str:
    return str(node.get("type", ""))


def _allowed(node: _Schema, key: str, schema: _Schema) -> str:
    if "const" in node:
        return json.dumps(node["const"])
    if "enum" in node:
        return ", ".join(json.dumps(option) for option in node["enum"])
    kind = _kind(node)
    if kind == "array":
        return f"at least one table, each under its own [[{key}]]"
    if kind == "object":
        known = _resolved(node, schema).get("properties")
        return f"a table [{key}]" + (f" with any of {', '.join(known)}" if known else "")
    if kind == "string":
        named = "pattern" in node
        return "a name of letters, digits, _ and -, at most 64" if named else "a text in quotes"
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}
    unit = _UNITS.get(key.rpartition("_")[2])
    return words.get(kind, "something else") + (f" in {unit}" if unit else "") + _range(node)


def _range(node: _Schema) -> str:
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']} to {node['maximum']}"
    if "exclusiveMinimum" in node:
        return f" above {node['exclusiveMinimum']:g}"
    return ""


def _instead(loc: _Loc, schema: _Schema) -> str:
    """What the author of an unknown key most likely meant."""
    key = str(loc[-1])
    here = list(_node(loc[:-1], schema).get("properties", {}))
    near = _nearest(key, here)
    if near:
        unit = _UNITS.get(near.rpartition("_")[2])
        return f"{near}{f', in {unit}' if unit else ''} (did you mean that?)"
    if len(loc) > 1 and key in schema["properties"]:
        return f"{key} at the top of the file only, above the first [table]"
    for table in ("crossbars", "hierarchy", "components"):
        node = _node((table, 0) if table == "crossbars" else (table,), schema)
        if len(loc) == 1 and key in node.get("properties", {}):
            return f"{key} in the table {'[[crossbars]]' if table == 'crossbars' else f'[{table}]'}"
    return ", ".join(here)


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key that differs in spelling or in its unit only."""
    plain = key.lower().replace("-", "_")
    stem, _, unit = plain.rpartition("_")
    for candidate in known:
        base, _, candidate_unit = candidate.rpartition("_")
        if candidate_unit in _UNITS and (base == plain or (base == stem and unit in _OTHER_UNITS)):
            return candidate
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.75)
    return close[0] if close else None


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)
