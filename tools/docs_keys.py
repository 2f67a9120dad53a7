"""Fills the tables of keys into the pages of docs/, from the typed models, and the example files that they show.

    python tools/docs_keys.py            # write them again
    python tools/docs_keys.py --check    # exit with 1 if a page is not current; tests do the same

A table stands between ``<!-- keys: NAME -->`` and ``<!-- /keys -->``, where NAME is `chip`, `manifest` or `settings`; a
file is the fenced block that follows ``<!-- file: PATH -->``. Both stand in the pages, since these are read in the
repository as well as on the site.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raqu_onnx.config import OptimizeConfig
from raqu_onnx.hardware import Chip, Components, CrossbarType, Hierarchy
from raqu_onnx.manifest import manifest_schema

__all__ = ["CHIP_PARTS", "PAGES", "filled", "tables"]

_ROOT = Path(__file__).parents[1]
#: Pages that are filled.
PAGES = tuple(sorted((_ROOT / "docs").glob("*.md")))
_KEYS = re.compile(r"(<!-- keys: (\w+) -->)\n.*?(<!-- /keys -->)", re.DOTALL)
_FILE = re.compile(r"(<!-- file: (\S+) -->\n+```[^\n]*\n).*?(```\n)", re.DOTALL)
_ATTRIBUTE = re.compile(r"^(\w+): (.*)$")
#: Parts of the manifest's schema that the chip file's own page tells of.
CHIP_PARTS = ("Chip", "Components", "CrossbarType", "Hierarchy", "JsonValue")
# Headings of the chip file's tables, which are not named like the model.
_ANCHORS = {"CrossbarType": "crossbars"}
# Numbers that JSON readers with doubles can hold: no limit that a reader must know.
_LARGEST = 2**53 - 1


def main() -> None:
    """Write all pages again, or say which are not current."""
    parser = argparse.ArgumentParser(description="fill tables of keys and example files into the pages of docs/")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not current")
    check = parser.parse_args().check
    stale = [page for page in PAGES if page.read_text(encoding="utf-8") != filled(page.read_text(encoding="utf-8"))]
    for page in stale:
        print(page.relative_to(_ROOT))
        if not check:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    if check and stale:
        sys.exit("these pages are not current: run tools/docs_keys.py")


def filled(markdown: str) -> str:
    """A page with its tables and example files as they are now."""
    markdown = _KEYS.sub(lambda found: f"{found[1]}\n\n{tables(found[2])}\n\n{found[3]}", markdown)
    return _FILE.sub(lambda found: f"{found[1]}{_example(found[2])}{found[3]}", markdown)


def _example(path: str) -> str:
    return (_ROOT / path).read_text(encoding="utf-8")


def tables(name: str) -> str:
    """All tables of one kind of file.

    Raises:
        ValueError: There is no such kind.
    """
    match name:
        case "chip":
            return _chip_tables()
        case "manifest":
            return _manifest_tables()
        case "settings":
            return _settings_table()
        case _:
            raise ValueError(f"no keys are known by the name {name!r}")


def _chip_tables() -> str:
    schema = Chip.model_json_schema()
    parts = [_table(schema["properties"], _attributes(Chip), schema.get("required", []))]
    for key, model, title in (
        ("CrossbarType", CrossbarType, "`[[crossbars]]`"),
        ("Hierarchy", Hierarchy, "`[hierarchy]`"),
        ("Components", Components, "`[components]`"),
    ):
        part = schema["$defs"][key]
        table = _table(part["properties"], _attributes(model), part.get("required", []))
        parts.append(f"### {title}\n\n{_first_line(model)}\n\n{table}")
    return "\n\n".join(parts)


def _manifest_tables() -> str:
    schema = manifest_schema()
    parts = [_table(schema["properties"], _described(schema), None)]
    for name, part in schema["$defs"].items():
        if name in CHIP_PARTS:
            continue
        text = str(part["description"]).split("\n\n")
        parts.append(
            f"### {name}\n\n"
            + "\n\n".join(text)
            + "\n\n"
            + _table(part["properties"], _described({**part, "$defs": schema["$defs"]}), None)
        )
    return "\n\n".join(parts)


def _settings_table() -> str:
    schema = OptimizeConfig.model_json_schema(mode="serialization", by_alias=True)
    defaults = OptimizeConfig().model_dump(mode="json", by_alias=True)
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, part in schema["properties"].items():
        rows.append(f"| `{key}` | {_value(defaults[key])} | {_escaped(part['description'])} |")
    return "\n".join(rows)


def _table(properties: dict[str, Any], meanings: dict[str, str], required: list[str] | None) -> str:
    """One row a key; the column of defaults is left out where `required` is None: then all keys always stand there."""
    heads = ["key", "value", *([] if required is None else ["default"]), "meaning"]
    rows = [heads, ["---"] * len(heads)]
    for key, item in properties.items():
        # TOML has no null: what can be null is left out.
        part = item if required is None else _without_null(item)
        default = [] if required is None else ["required" if key in required else _default(part)]
        rows.append([f"`{key}`", _kind(part), *default, _escaped(meanings[key])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _without_null(part: dict[str, Any]) -> dict[str, Any]:
    kinds = [item for item in part.get("anyOf", ()) if item.get("type") != "null"]
    return {**part, "anyOf": kinds} if kinds else part


def _default(part: dict[str, Any]) -> str:
    if "$ref" in part:
        return "empty"
    if "default" not in part:
        return "see there"
    return _value(part["default"])


def _value(value: object) -> str:
    if value is None:
        return "none"
    if value in ("", {}, [], ()):
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _kind(part: dict[str, Any]) -> str:
    """A JSON Schema in a few words."""
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        return (
            "any JSON value"
            if name == "JsonValue"
            else f"[{name}](#{_ANCHORS.get(name, name.lower())})"
            if name != "Chip"
            else "[chip](chip-file.md)"
        )
    if "anyOf" in part:
        kinds = [_kind(item) for item in part["anyOf"]]
        return " or ".join(kinds)
    if "const" in part or "enum" in part:
        return ", ".join(f"`{item}`" for item in part.get("enum", [part.get("const")]))
    match part.get("type"):
        case "array" if "prefixItems" in part:
            return f"[{', '.join(_kind(item) for item in part['prefixItems'])}]"
        case "array":
            return f"list of {_kind(part['items'])}"
        case "object" if "additionalProperties" in part:
            return (
                f"object of {_kind(part['additionalProperties'])}"
                if part["additionalProperties"] is not True
                else "object"
            )
        case "integer" | "number":
            return _number(part)
        case kind:
            return {"boolean": "true or false", "null": "null"}.get(str(kind), str(kind))


def _number(part: dict[str, Any]) -> str:
    low, high, above = part.get("minimum"), part.get("maximum"), part.get("exclusiveMinimum")
    name = "integer" if part["type"] == "integer" else "number"
    if above is not None:
        return f"{name} above {above}"
    bounded = high is not None and high < _LARGEST
    if low is not None and abs(low) < _LARGEST:
        return f"{name} {low} to {high}" if bounded else f"{name} from {low}"
    return f"{name} up to {high}" if bounded else name


def _described(part: dict[str, Any]) -> dict[str, str]:
    """What a schema says of each key; of one without words of its own, what its type says."""
    return {key: item.get("description") or _of_type(item, part["$defs"]) for key, item in part["properties"].items()}


def _of_type(item: dict[str, Any], definitions: dict[str, Any]) -> str:
    for found in (item, *item.get("anyOf", ()), item.get("items", {})):
        if "$ref" in found:
            return str(definitions[found["$ref"].rpartition("/")[2]].get("description", "")).split("\n")[0]
    return ""


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """What a Google docstring says of each attribute."""
    text = inspect.getdoc(model) or ""
    section = textwrap.dedent(text.partition("Attributes:\n")[2])
    found: dict[str, str] = {}
    key = ""
    for line in section.splitlines():
        if start := _ATTRIBUTE.match(line):
            key = start[1]
            found[key] = start[2]
        elif line.strip():
            found[key] += f" {line.strip()}"
    # A chip file knows no None: what has no value is left out.
    return {key: text.replace("None ", "left out ") for key, text in found.items()}


def _first_line(model: type[BaseModel]) -> str:
    return (inspect.getdoc(model) or "").splitlines()[0]


def _escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("[", "\\[").replace("*", "\\*")


if __name__ == "__main__":
    main()
