"""`raqu-onnx hw`: list, show and check chip descriptions."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from raqu_onnx.cli.options import add_debug
from raqu_onnx.cli.printing import console
from raqu_onnx.errors import ChipError
from raqu_onnx.hardware import Chip, ChipFileError, builtin_chips, load_chip

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from rich.table import Table

__all__ = ["add_parser"]

_JSON_VERSION = 1
# What a value that the file leaves out means.
_ABSENT = {
    "count": "as many as needed",
    "rows_active": "all",
    "adc_bits": "ideal",
    "column_turn_ns": "a read takes cycle_ns",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `hw list | show | check` to the command line."""
    parser = subparsers.add_parser(
        "hw",
        help="list, show and check chip descriptions",
        description="List the built-in chips, show one with the source of every figure, or check chip files.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list the built-in chips", description="List the built-in chips.")
    listing.set_defaults(run=_list)
    show = actions.add_parser(
        "show",
        help="show every figure of a chip with its source",
        description="Show every figure of a chip with its source.",
    )
    show.add_argument("chip", metavar="NAME|FILE", help="a built-in chip's name, or a TOML file")
    show.set_defaults(run=_show)
    check = actions.add_parser(
        "check",
        help="check chip files",
        description="Check chip files and report every error. Figures without a source are warnings.",
    )
    check.add_argument("chips", metavar="FILE", nargs="+", help="a TOML file, or a built-in chip's name")
    check.set_defaults(run=_check)
    for action in (listing, show, check):
        action.add_argument(
            "--format", choices=["text", "json"], default="text", help="form of the result (default: text)"
        )
        add_debug(action)


def _list(args: argparse.Namespace) -> int:
    chips = [load_chip(name) for name in builtin_chips()]
    if args.format == "json":
        _print_json(chips=[_summary(chip) for chip in chips])
        return 0
    table = _table("name", "crossbars", "bits", "count", "encoding", "sharing", "title")
    for chip in chips:
        approximate = "~" if chip.encoding_is_approximation else ""
        table.add_row(
            chip.name,
            "\n".join(f"{crossbar.rows}x{crossbar.cols}" for crossbar in chip.crossbars),
            "\n".join(str(crossbar.cell_bits) for crossbar in chip.crossbars),
            "\n".join(str(crossbar.count or "any") for crossbar in chip.crossbars),
            approximate + chip.encoding,
            chip.sharing,
            chip.title,
        )
    out = console()
    _print_table(out, table)
    if any(chip.encoding_is_approximation for chip in chips):
        out.print("~ the nearest of the four encodings; `raqu-onnx hw show NAME` says why")
    return 0


def _summary(chip: Chip) -> dict[str, Any]:
    keys = {"name", "title", "encoding", "encoding_is_approximation", "sharing", "crossbars"}
    return {**chip.model_dump(mode="json", include=keys), "total_cells": chip.total_cells()}


def _show(args: argparse.Namespace) -> int:
    chip = load_chip(args.chip)
    if args.format == "json":
        _print_json(
            chip=chip.model_dump(mode="json"),
            total_cells=chip.total_cells(),
            unsourced_figures=list(chip.unsourced_figures()),
        )
        return 0
    out = console()
    for text in (f"{chip.name}: {chip.title}" if chip.title else chip.name, chip.description):
        if text:
            out.print(text, end="\n\n")
    if chip.encoding_is_approximation:
        out.print(f"The encoding is an approximation: {chip.encoding_is_approximation}", end="\n\n")
    _print_figures(out, chip)
    return 0


def _print_figures(out: Console, chip: Chip) -> None:
    """Every figure with its source; where lines would be too long, with a number that stands for the source."""
    # What is told above the table.
    settings = {key: value for key, value in chip.settings().items() if key != "encoding_is_approximation"}
    unknown = [key for key, value in settings.items() if value is None and key.rpartition(".")[2] not in _ABSENT]
    rows = [
        (key, _value(key, value), (chip.source_of(key) or "") if value is not None else "")
        for key, value in settings.items()
        if key not in unknown
    ]
    numbers = {text: f"[{index}]" for index, text in enumerate(dict.fromkeys(row[2] for row in rows if row[2]), 1)}
    notes = sum(max(map(len, column)) + 1 for column in zip(*rows, strict=True)) > out.width
    table = _table("figure", "value", "source")
    for key, value, source in rows:
        table.add_row(key, value, numbers.get(source, "") if notes else source)
    _print_table(out, table)
    if notes and numbers:
        out.print()
        _print_table(out, _sources(numbers))
    if unknown:
        out.print(f"\nNot known: {', '.join(unknown)}")


def _sources(numbers: Mapping[str, str]) -> Table:
    table = _table("", "sources")
    for text, number in numbers.items():
        table.add_row(number, text)
    return table


def _value(key: str, value: object) -> str:
    if value is None:
        return _ABSENT[key.rpartition(".")[2]]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check(args: argparse.Namespace) -> int:
    results = [_checked(name) for name in args.chips]
    if args.format == "json":
        _print_json(files=results)
    else:
        for result in results:
            _print_checked(result)
    return 0 if all(result["ok"] for result in results) else ChipError.exit_code


def _checked(name: str) -> dict[str, Any]:
    try:
        chip = load_chip(name)
    except ChipFileError as error:
        return {"file": name, "ok": False, "errors": error.lines(), "warnings": []}
    except ChipError as error:
        return {"file": name, "ok": False, "errors": [str(error)], "warnings": []}
    warnings = [f"{name}: {key}: no source" for key in chip.unsourced_figures()]
    warnings += [f"{name}: sources.{key}: no such figure here" for key in chip.stray_sources()]
    return {"file": name, "ok": True, "errors": [], "warnings": warnings}


def _print_checked(result: dict[str, Any]) -> None:
    for line in result["errors"]:
        print(f"error: {line}", file=sys.stderr)
    for line in result["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    if result["ok"]:
        print(f"{result['file']}: OK")


def _print_json(**content: object) -> None:
    print(json.dumps({"schema_version": _JSON_VERSION, **content}, indent=2, allow_nan=False))


def _table(*headers: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    # As other tables, but for the prose in the last column.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for header in headers:  # the last column holds prose and wraps
        table.add_column(header, overflow="fold", no_wrap=header != headers[-1])
    return table


def _print_table(out: Console, table: Table) -> None:
    """Print a table without the spaces that fill its last column."""
    with out.capture() as captured:
        out.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())
