"""`raqu-onnx validate`: check a result folder as a stranger would."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from raqu_onnx.cli.options import add_debug

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
        "--data",
        metavar="DATA",
        help="evaluation data: .npz, .npy, file.py:function, or a folder of pictures, which are resized so that the "
        "shorter side fits the model's input, and cropped at the centre (default: random inputs)",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the float model that was optimized, to report fidelity to it (default: none)",
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads of onnxruntime (default: all)")
    parser.add_argument("--no-progress", action="store_true", help="show no progress on a terminal")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="form of the result (default: text)")
    add_debug(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print only what is wrong")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Validate and print; 1 when a check failed."""
    from raqu_onnx.progress import show_progress
    from raqu_onnx.validation import validate

    with show_progress(enabled=not (args.quiet or args.no_progress), lines=False) as progress:
        report = validate(args.out_dir, args.data, reference=args.reference, threads=args.threads, progress=progress)
    if args.format == "json":
        from raqu_onnx.cli.printing import print_json

        print_json({"schema_version": _JSON_VERSION, **report.to_json()})
    else:
        _print(report, quiet=args.quiet)
    return 0 if report.passed else 1


def _print(report: ValidationReport, *, quiet: bool) -> None:
    from rich.text import Text

    from raqu_onnx.cli.printing import console, counted, hanging

    out = console()
    for check in report.checks:
        if quiet and check.passed is not False:
            continue
        style = {True: "green", False: "bold red", None: "yellow"}[check.passed]
        sign = Text(f"{_SIGNS[check.passed]:<5}", style=style)
        name = f"{check.name:<24}"
        out.print(sign, name, hanging(out, check.detail, len(sign) + len(name)), sep="", soft_wrap=True)
    if quiet and report.passed:
        return
    for level, score in report.scores.items():
        out.print(f"{level}: {_score(score)}")
    if any(score.kl is not None for score in report.scores.values()):
        out.print("KL: mean divergence of the class probabilities from float's, in nats; 0 is the same")
    for warning in report.warnings:
        out.print(Text("warning: ", style="yellow"), warning, sep="")
    failed = len(report.failures)
    out.print(f"{counted(failed, 'problem')} found" if failed else f"all {len(report.checks)} checks passed")


def _score(score: Score) -> str:
    from raqu_onnx.cli.printing import counted

    parts = [counted(score.samples, "sample")]
    if score.top1 is not None:
        parts.append(f"accuracy {score.top1:.2%}")
    if score.agreement is not None:
        parts.append(f"top-1 agreement with the float model {score.agreement:.2%}")
    if score.kl is not None:
        parts.append(f"KL {score.kl:.3g}")
    if score.sqnr_db is not None:
        parts.append(f"SQNR {score.sqnr_db:.1f} dB")
    return ", ".join(parts)
