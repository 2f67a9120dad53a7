"""`raqu-onnx report`: draw the page of a result folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from raqu_onnx.cli.options import add_common, start_logging
from raqu_onnx.cli.printing import print_json

__all__ = ["add_parser"]

_JSON_VERSION = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `report` to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="draw report.html of a result folder",
        description="Draw the page that optimize writes, from manifest.json and report.json of a result folder alone. "
        "It is one file that opens in a browser without a network.",
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder that optimize wrote")
    parser.add_argument("-o", "--output", metavar="FILE", help="where the page goes (default: OUT_DIR/report.html)")
    add_common(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from raqu_onnx.html import write_html
    from raqu_onnx.report_files import HTML_FILE

    start_logging(args)
    path = Path(args.output) if args.output else Path(args.out_dir) / HTML_FILE
    write_html(args.out_dir, path)
    if args.format == "json":
        print_json({"schema_version": _JSON_VERSION, "file": str(path), "bytes": path.stat().st_size})
    elif not args.quiet:
        print(f"written to {path}")
    return 0
