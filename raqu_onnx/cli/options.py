"""Options that several commands share."""

from __future__ import annotations

import argparse
import logging
import sys

__all__ = ["add_common", "add_debug", "add_exclude", "start_logging"]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add `--format`, `-q`, `-v` and `--debug`."""
    parser.add_argument("--format", choices=["text", "json"], default="text", help="form of the result (default: text)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="results and errors only: no warnings, no progress")
    group.add_argument("-v", "--verbose", action="count", default=0, help="log every pass; twice: debug messages")
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add `--debug`."""
    parser.add_argument(
        "--debug",
        action="store_true",
        help="before an error's message, print where it was raised (default: the message)",
    )


def add_exclude(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--exclude`."""
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="NAME|REGEX|OP",
        help="leave nodes as they are: a node name, an operator type, or a regular expression over whole node names"
        "; may be repeated (default: none)",
    )


def start_logging(args: argparse.Namespace) -> None:
    """Log to stderr: warnings, with `-v` every step, with `-q` errors only."""
    level = logging.ERROR if args.quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
