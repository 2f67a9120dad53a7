"""Options that several commands share."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["add_common", "console", "new_table", "print_json", "start_logging"]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add `--format`, `-q` and `-v`."""
    parser.add_argument("--format", choices=["text", "json"], default="text", help="form of the result (default: text)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="log errors only, and draw no progress")
    group.add_argument("-v", "--verbose", action="count", default=0, help="log every pass; twice: debug messages")


def start_logging(args: argparse.Namespace) -> None:
    """Log to stderr: warnings, with `-v` every step, with `-q` errors only."""
    level = logging.ERROR if args.quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)


def console() -> Console:
    """Where results are printed; at least 80 columns in a pipe."""
    from rich.console import Console

    # Names of nodes are not markup. A pipe has no width; narrower than this, rich would fold tables.
    width = None if sys.stdout.isatty() else 100
    return Console(highlight=False, markup=False, emoji=False, width=width)


def new_table(*headers: str, title: str | None = None, right: tuple[int, ...] = ()) -> Table:
    """A plain table; columns in `right` are aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index in right else "left", overflow="fold")
    return table


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object."""
    import json

    print(json.dumps(content, indent=1, allow_nan=False))
