"""`raqu-onnx demo`: the main job on a bundled model and real data."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from raqu_onnx.cli.options import add_common, start_logging

__all__ = ["add_parser"]

_MODELS = ("resnet20", "mobilenetv2")
# Points; tighter than the default, since the bundled selection images are easier than the test images.
_ACCURACY_DROP = 0.25


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="run the main job on a bundled model and real data",
        description="Write a trained model and real data (Fashion-MNIST) into a folder, optimize the model for the "
        "generic chip, and print the `optimize` command that does the same, ready to be edited.",
    )
    parser.add_argument("--model", choices=_MODELS, default="resnet20", help="bundled model (default: resnet20)")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="raqu-onnx-demo",
        help="folder for model, data and result (default: raqu-onnx-demo)",
    )
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier demo")
    parser.add_argument("--resume", action="store_true", help="go on with a demo that was stopped")
    parser.add_argument("--no-progress", action="store_true", help="show no progress")
    parser.add_argument("--time-passes", action="store_true", help="print the time of every pass")
    add_common(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from raqu_onnx.bundled import write_bundled
    from raqu_onnx.cli.optimize import run_optimize
    from raqu_onnx.config import OptimizeConfig
    from raqu_onnx.output import check_output

    start_logging(args)
    folder = Path(args.output) / args.model
    check_output(folder / "result", force=args.force or args.resume)
    files = write_bundled(args.model, folder)
    config = OptimizeConfig(
        model=str(files.model),
        output=str(folder / "result"),
        calibration=str(files.calibration),
        selection=str(files.selection),
        eval=str(files.test),
        max_accuracy_drop=_ACCURACY_DROP,
    )
    command = [
        "raqu-onnx", "optimize", str(files.model), "--calibration", str(files.calibration),
        "--selection", str(files.selection), "--eval", str(files.test), "--hw", config.hw,
        "--max-accuracy-drop", str(config.max_accuracy_drop), "-o", str(folder / "result"), "--force",
    ]  # fmt: skip
    code = run_optimize(config, args)
    stream = sys.stderr if args.format == "json" else sys.stdout
    print(f"\nThe same run, to be edited:\n  {shlex.join(command)}", file=stream)
    return code
