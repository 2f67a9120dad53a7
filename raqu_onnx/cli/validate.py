"""`raqu-onnx validate`: check a result folder as a stranger would."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raqu_onnx.evaluation import Score
    from raqu_onnx.validate_report import ValidationReport

__all__ = ["add_parser"]

_JSON_VERSION = 1
_SIGNS = {True: "ok", False: "FAIL", None: "--"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `validate` to the command line."""
    parser = subparsers.add_parser(
        "validate",
        help="check a result folder as a stranger would",
        description=(
            "Re-read model.onnx, manifest.json and cells.npz of a result folder and check every promise: hashes, "
            "placements, cells, integer results, and runs at both onnxruntime optimization levels. Exit code 1 when a "
            "check fails, 2 when a file is missing or unreadable."
        ),
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder that optimize wrote")
    parser.add_argument(
        "--data", metavar="DATA", help="evaluation data (.npz, .npy, folder of pictures, file.py:function)"
    )
    parser.add_argument("--reference", metavar="MODEL", help="the float model, to report fidelity to it")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads of onnxruntime (default: all)")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="form of the result (default: text)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only what is wrong")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Validate and print; 1 when a check failed."""
    from raqu_onnx.validation import validate

    report = validate(args.out_dir, args.data, reference=args.reference, threads=args.threads)
    if args.format == "json":
        import json

        print(json.dumps({"schema_version": _JSON_VERSION, **_finite(report.to_json())}, indent=1, allow_nan=False))
    else:
        _print(report, quiet=args.quiet)
    return 0 if report.passed else 1


def _finite(value: Any) -> Any:
    """JSON knows no infinity: an SQNR without noise becomes null."""
    import math

    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(report: ValidationReport, *, quiet: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for check in report.checks:
        if quiet and check.passed is not False:
            continue
        style = {True: "green", False: "bold red", None: "yellow"}[check.passed]
        console.print(Text(f"{_SIGNS[check.passed]:<5}", style=style), f"{check.name:<24}", check.detail, sep="")
    if quiet and report.passed:
        return
    for level, score in report.scores.items():
        console.print(f"{level}: {_score(score)}")
    failed = len(report.failures)
    console.print(f"{failed} problems found" if failed else f"all {len(report.checks)} checks passed")


def _score(score: Score) -> str:
    parts = [f"{score.samples} samples"]
    if score.top1 is not None:
        parts.append(f"accuracy {score.top1:.2%}")
    if score.agreement is not None:
        parts.append(f"top-1 agreement with the float model {score.agreement:.2%}")
    if score.kl is not None:
        parts.append(f"KL {score.kl:.3g}")
    if score.sqnr_db is not None:
        parts.append(f"SQNR {score.sqnr_db:.1f} dB")
    return ", ".join(parts)
