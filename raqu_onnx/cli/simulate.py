"""`raqu-onnx simulate`: run a result folder on virtual crossbars."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Literal

from raqu_onnx.cli.options import add_common, start_logging

if TYPE_CHECKING:
    from collections.abc import Iterator

    from raqu_onnx.backend.simulate import SimulationReport

__all__ = ["add_parser"]

_JSON_VERSION = 1
_METRICS = {
    "top-1": "accuracy",
    "agreement": "agreement with ideal crossbars",
    "1 - noise/signal": "1 - noise/signal against ideal crossbars",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `simulate` to the command line."""
    parser = subparsers.add_parser(
        "simulate",
        help="run a result folder on virtual crossbars, with real converters and cells",
        description=(
            "Run a model from manifest.json, cells.npz and model.onnx on virtual crossbars: input slices, bitlines, "
            "ADCs, shift and add. With ideal cells and converters this gives the quantized model's own integers. "
            "Accuracy is reported with labels, else agreement with ideal crossbars."
        ),
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder that optimize wrote")
    parser.add_argument(
        "--data", metavar="DATA", required=True, help=".npz, .npy, file.py:function, or a folder of pictures"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="run the first N samples only (default: all)")
    parser.add_argument(
        "--adc-bits",
        type=_adc_bits,
        default="chip",
        metavar="N|chip|ideal",
        help="resolution of the converters; an ideal one neither clips nor rounds (default: chip)",
    )
    _add_errors(parser)
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of onnxruntime and of the crossbars (default: all)"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress")
    add_common(parser)
    parser.set_defaults(run=_run)


def _add_errors(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cells")
    group.add_argument(
        "--variation",
        type=float,
        default=0.0,
        metavar="SIGMA",
        help="standard deviation of a programmed level over that level, such as 0.1 (default: 0)",
    )
    group.add_argument("--stuck", type=float, default=0.0, metavar="SHARE", help="share of stuck cells (default: 0)")
    group.add_argument(
        "--stuck-high",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of the stuck cells that give the highest level, the others give 0 (default: 0.5)",
    )
    group.add_argument(
        "--read-noise",
        type=float,
        default=0.0,
        metavar="SIGMA",
        help="standard deviation of each read of a cell over its level (default: 0)",
    )
    group.add_argument(
        "--repeats", type=int, metavar="N", help="chips that are tried, each with errors of its own (default: 10)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of these errors (default: 0)")


def _adc_bits(text: str) -> int | Literal["chip", "ideal"]:
    if text == "chip":
        return "chip"
    if text == "ideal":
        return "ideal"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of bits nor chip or ideal")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    from raqu_onnx.backend.simulate import simulate
    from raqu_onnx.progress import show_progress

    start_logging(args)
    with show_progress(enabled=not (args.quiet or args.no_progress)) as progress:
        report = simulate(
            args.out_dir,
            args.data,
            variation=args.variation,
            stuck=args.stuck,
            stuck_high=args.stuck_high,
            read_noise=args.read_noise,
            repeats=args.repeats,
            seed=args.seed,
            adc_bits=args.adc_bits,
            samples=args.samples,
            threads=args.threads,
            progress=progress,
        )
    if args.format == "json":
        from raqu_onnx.cli.printing import print_json

        print_json({"schema_version": _JSON_VERSION, **report.to_json()})
    else:
        _print(report)
    return 0


def _print(report: SimulationReport) -> None:
    from raqu_onnx.cli.printing import console, print_table

    out = console()
    converted = any(node.conversions for node in report.nodes)
    headers = ("node", "lossless ADC bits", *(("on this data", "conversions", "clipped") if converted else ()))
    rows = []
    for node in report.nodes:
        counted = (str(node.seen_bits or "-"), str(node.conversions), _share(node.clipped, node.conversions))
        rows.append((node.name, str(node.lossless_bits), *(counted if converted else ())))
    print_table(out, headers, rows, right=tuple(range(1, len(headers))))
    for line in _lines(report):
        out.print(line)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.4%}" if whole else "-"


def _lines(report: SimulationReport) -> Iterator[str]:
    from raqu_onnx.cli.printing import counted

    yield "lossless ADC bits: with so many no input at all makes a sum clip; on this data: none of these samples does"
    bits = "ideal" if report.adc_bits is None else f"{report.adc_bits} bits, {'' if report.adc_signed else 'un'}signed"
    yield f"ADC: {bits}"
    yield f"data: {report.data}, {counted(report.samples, 'sample')}"
    metric = _METRICS[report.metric]
    if report.metric == "top-1":
        yield f"ideal crossbars: {metric} {report.ideal.quality:.2%}"
    figures = report.distribution
    if len(report.runs) == 1:
        yield f"these crossbars: {metric} {figures['mean']:.2%}"
        return
    yield (
        f"{len(report.runs)} chips: {metric} {figures['mean']:.2%} on average, standard deviation "
        f"{100 * figures['std']:.2f} points, from {figures['min']:.2%} to {figures['max']:.2%}"
    )
