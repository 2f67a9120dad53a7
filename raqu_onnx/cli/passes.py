"""`raqu-onnx passes`: what the pipeline is made of."""

from __future__ import annotations

import argparse

from raqu_onnx.cli.options import add_common, start_logging
from raqu_onnx.cli.printing import console, hanging, print_json

__all__ = ["add_parser"]

# Passes that an option adds to the pipeline.
_OPTIONS = {"equalize": "--equalize", "write-qonnx": "--emit qonnx"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `passes` to the command line."""
    parser = subparsers.add_parser(
        "passes",
        help="list the passes of the pipeline with their options",
        description="List every pass with what it does and the options that `--passes NAME{option=value}` takes.",
    )
    add_common(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from raqu_onnx.passes import PASSES
    from raqu_onnx.pipeline import DEFAULT_PIPELINE, pass_options

    start_logging(args)
    rows = [
        {
            "name": name,
            "summary": (item.__doc__ or "").strip().splitlines()[0],
            "options": pass_options(item),
            "default_pipeline": name in DEFAULT_PIPELINE,
        }
        for name, item in PASSES.items()
    ]
    if args.format == "json":
        print_json({"schema_version": 1, "default_pipeline": list(DEFAULT_PIPELINE), "passes": rows})
        return 0
    out = console()
    parts = list(PASSES)[: list(PASSES).index(DEFAULT_PIPELINE[0])]
    for row in rows:
        out.print(str(row["name"]), style="bold", end="")
        name = str(row["name"])
        where = (
            "" if name in DEFAULT_PIPELINE else "  (part of tidy)" if name in parts else f"  (with {_OPTIONS[name]})"
        )
        out.print(where)
        out.print("  " + hanging(out, str(row["summary"]), 2), soft_wrap=True)
        for key, value in pass_options(PASSES[str(row["name"])]).items():
            out.print(f"    {key} = {'none' if value is None else value}")
    out.print(f"\ndefault pipeline: {','.join(DEFAULT_PIPELINE)}", soft_wrap=True)
    return 0
