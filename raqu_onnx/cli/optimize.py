"""`raqu-onnx optimize`: the main job."""

from __future__ import annotations

import argparse
import shlex
import sys
import tomllib
from typing import TYPE_CHECKING, Any

from raqu_onnx.cli.data_options import add_data, picture_settings
from raqu_onnx.cli.effort import add_effort
from raqu_onnx.cli.goal_options import add_earlier, add_limits, add_metric
from raqu_onnx.cli.options import add_common, add_exclude, start_logging
from raqu_onnx.cli.printing import counted, print_json, printable, result_is_complete

if TYPE_CHECKING:
    from collections.abc import Iterable

    from raqu_onnx.config import OptimizeConfig

__all__ = ["add_parser", "run_optimize"]

_DESCRIPTION = """\
Choose the bits of every layer so that a chip's crossbars are full and the
accuracy stays; write a QDQ model that any onnxruntime runs, and a manifest that
says which weight sits in which cell.
"""
_EPILOG = """\
With no goal given, the fewest crossbars within 0.5 points of float are sought;
with fixed widths (--weight-bits 4) there is then no goal to miss.
DATA is an .npz (arrays by input name, and `labels`), an .npy, a folder of
pictures, or file.py:function that yields feeds. Pictures are resized so that
the shorter side just fits the model's input (or --picture-size), and cropped at
the centre.

Without --quiet, the stages of the run go to stderr with the seconds so far, as
a bar on a terminal. Warnings are also in report.json.

A search that is stopped, by Ctrl-C or otherwise, leaves what it has judged in
DIR.journal.jsonl; the same command with --resume goes on. The result holds the
finished journal as journal.jsonl.

exit codes: 0 done; 1 ran, but the goal was not met, or stdout could not be
written (the files are complete); 2 bad usage, model, chip or data, no result
was written; 130 interrupted; 141 the reader of a pipe left
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `optimize` to the command line."""
    parser = subparsers.add_parser(
        "optimize",
        help="quantize a model for a chip, map it, write model and manifest",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL.onnx", help="the trained float model")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder for the results (default: MODEL-raqu)")
    parser.add_argument(
        "--config",
        metavar="FILE.toml",
        help="settings; paths in it are relative to its folder; options given here win (default: none)",
    )
    add_earlier(parser)
    parser.add_argument("--show-config", action="store_true", help="print the settings as TOML and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and stop")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier run in the folder")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the search for this folder that was stopped, or with --force make one that ended longer "
        "(--evaluations); the result is that of a run that never stopped",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress")
    add_common(parser)
    add_data(parser.add_argument_group("data"))
    _add_goal(parser.add_argument_group("chip and goal"))
    method = parser.add_argument_group("method")
    _add_granularity(method)
    _add_method(method)
    add_effort(parser.add_argument_group("effort"))
    _add_pipeline(parser.add_argument_group("pipeline"))
    parser.set_defaults(run=_run)


def _add_goal(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hw", metavar="NAME|FILE", help="the chip: a built-in one, or a TOML file (default: generic)")
    group.add_argument(
        "--max-crossbars", type=int, metavar="N", help="lose least within N crossbars (default: no limit)"
    )
    group.add_argument(
        "--max-accuracy-drop",
        type=float,
        metavar="POINTS",
        help="use the fewest crossbars within POINTS of float: hundredths of top-1 accuracy; without labels of "
        "agreement with float; without class scores of noise power over signal power, all outputs together, where 0.5 "
        "is an SQNR of 23 dB (default: 0.5)",
    )
    add_limits(group)
    group.add_argument(
        "--replicate",
        metavar="N|chip",
        help="fill free crossbars, up to N in all or as many as the chip has, with copies of the slowest nodes, so "
        "that a pipeline takes the next inference sooner; nodes that took turns in a crossbar first get places of "
        "their own, since all compute at once then (default: one copy of each node)",
    )
    group.add_argument(
        "--partitions",
        metavar="N|auto",
        help="where the chip is too small, program it up to N times (auto: as few as will do) for one part of the "
        "model after the other (default: all on the chip at once)",
    )
    group.add_argument(
        "--task",
        choices=["auto", "classification", "regression"],
        help="what is judged: classification takes the first float output of shape (samples, classes) as class scores, "
        "regression judges all float outputs by their noise; auto: classification where there is exactly one such "
        "output (default: auto)",
    )
    add_metric(group)
    group.add_argument(
        "--weight-bits", metavar="N|N-M", help="width of weights in bits, 2 to 8; a range is searched (default: 2-8)"
    )
    group.add_argument(
        "--reduce-range",
        action="store_true",
        default=None,
        help="limit weights to 7 bits, whose sums are exact in onnxruntime on x86 CPUs without VNNI too",
    )
    group.add_argument(
        "--activation-bits",
        metavar="N|N-M|float",
        help="width of activations in bits, 2 to 8; a range is searched; float for measurements only, no backend can "
        "run it (default: 8)",
    )
    group.add_argument(
        "--input-bits",
        metavar="N|N-M",
        help="width in bits of the model's own inputs, such as pictures, whatever the other activations get; a range "
        "is searched (default: 8)",
    )
    add_exclude(group)
    group.add_argument(
        "--keep",
        action="append",
        metavar="PATTERN,...",
        help="keep 8-bit weights (7 with --reduce-range) and 8-bit activations in these nodes whatever the others get, "
        "and drop none of their kernels: `first`, `last` (no mapped node before, or after), or patterns as above "
        "(default: none)",
    )


def _add_granularity(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--granularity",
        metavar="layer|group:N|kernel",
        help="what gets a width of its own: every layer, groups of N kernels of a layer, or every kernel (default: "
        "kernel)",
    )
    group.add_argument(
        "--no-drop",
        dest="drop",
        action="store_false",
        default=None,
        help="give every kernel at least the smallest width; by default kernels that carry least may get 0 bits, take "
        "no columns, and the next layer makes up for them",
    )


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--weight-method",
        choices=["nearest", "mse", "gptq", "sequential"],
        help="how weights become codes: rounded to nearest; with scales of least squared error; rounded so that later "
        "rows make up for earlier ones; so, layer after layer, towards what the float model gives "
        "(default: sequential)",
    )
    group.add_argument(
        "--fit-without",
        action="append",
        metavar="PART,...",
        help="leave parts of the weight method out, to see what they give: bias (of all but `nearest`), scales, "
        "polish, refit (of `gptq` and `sequential`), targets, residuals, shrinkage (of `sequential`) (default: "
        "none)",
    )
    group.add_argument(
        "--fit-samples", type=int, metavar="N", help="most samples that `sequential` fits weights on (default: 512)"
    )
    group.add_argument(
        "--equalize",
        action="store_true",
        default=None,
        help="scale channels between layers so that those of an activation use its codes more equally, while the float "
        "model computes what it did (cross-layer equalization); can help at activations of 4 bits and fewer: compare",
    )
    group.add_argument(
        "--activation-range",
        choices=["min-max", "percentile", "entropy", "mse"],
        help="how ranges of activations are chosen: extremes, a percentile, least divergence, least squared error "
        "(default: mse)",
    )
    group.add_argument(
        "--evaluations",
        type=int,
        metavar="N",
        help="candidates that a Bayesian stage judges, those dismissed after a quarter of the data too (default: 24)",
    )
    group.add_argument(
        "--sensitivity-samples",
        type=int,
        metavar="N",
        help="samples that each layer's sensitivity is measured on (default: 256)",
    )
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="samples that onnxruntime runs at once (default: 64)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="seed of everything random (default: 0)")


def _add_pipeline(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--passes",
        metavar="A,B{OPT=VALUE}",
        help="run these passes, which `raqu-onnx passes` lists (default: a whole run)",
    )
    group.add_argument(
        "--skip", action="append", metavar="PASS", help="leave a pass out; may be repeated (default: none)"
    )
    group.add_argument(
        "--dump-after",
        action="append",
        metavar="PASS",
        help="write the model after a pass to dumps/; may be repeated (default: none)",
    )
    group.add_argument("--time-passes", action="store_true", help="print the time of every pass")
    group.add_argument(
        "--placement",
        choices=["fast", "exact"],
        help="exact: where the fast placement leaves a gap, improve it by an integer program (default: fast)",
    )
    group.add_argument("--cells", action="store_true", default=None, help="also write every programmed cell, cells.npz")
    group.add_argument(
        "--emit",
        action="append",
        metavar="FORMAT",
        help="write the emitted model in a further form too: qonnx, with a Quant node of the right width for every "
        "weight, activation and bias, as model.qonnx.onnx (default: none)",
    )


_SETTINGS = (
    "model", "output", "hw", "calibration", "selection", "eval", "calibration_samples", "fit_samples", "max_crossbars",
    "max_accuracy_drop", "max_latency", "max_energy", "max_average_bits", "fit_chip", "objective", "replicate",
    "partitions", "task", "metric", "weight_bits", "reduce_range", "activation_bits", "input_bits", "exclude",
    "granularity", "drop", "weight_method", "equalize", "activation_range", "evaluations", "sensitivity_samples",
    "batch_size", "seed", "threads", "workers", "dask", "batch", "timeout", "cache", "passes", "skip", "dump_after",
    "placement", "cells", "choose", "earlier",
)  # fmt: skip


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    from raqu_onnx.selection import split_patterns

    values = {key: getattr(args, key) for key in _SETTINGS}
    values["pictures"] = picture_settings(args)
    for key in ("keep", "fit_without", "emit"):
        texts = getattr(args, key)
        values[key] = None if texts is None else [part for text in texts for part in split_patterns(text)]
    return values


def _run(args: argparse.Namespace) -> int:
    from raqu_onnx.config import default_output, effective_toml, load_config
    from raqu_onnx.earlier import with_earlier_settings
    from raqu_onnx.errors import ConfigError

    start_logging(args)
    config, _ = with_earlier_settings(load_config(args.config, _overrides(args)))
    if args.show_config:
        text = effective_toml(config)
        if args.format == "json":
            print_json({"schema_version": 1, "settings": tomllib.loads(text)})
        else:
            print(text, end="")
        return 0
    if config.model is None:
        raise ConfigError("no model is given: name an ONNX file, as in `raqu-onnx optimize model.onnx`")
    config = config.model_copy(update={"output": default_output(config)})
    if args.dry_run:
        return _dry_run(config, args)
    return run_optimize(config, args)


def run_optimize(config: OptimizeConfig, args: argparse.Namespace) -> int:
    """Run a configuration whose model and output are set, and print the result.

    Args:
        config: The settings.
        args: Needs `format`, `quiet`, `no_progress`, `force`, `resume` and `time_passes`.
    """
    from raqu_onnx.cli.tables import print_result, print_timings
    from raqu_onnx.optimization import optimize
    from raqu_onnx.progress import show_progress

    with show_progress(enabled=not (args.no_progress or args.quiet)) as progress:
        result = optimize(
            str(config.model), config.output, config=config, force=args.force, resume=args.resume, progress=progress
        )
    _print_warnings(result.warnings, args)
    with result_is_complete(result.output):
        if args.format == "json":
            print_json(result.to_json())
        else:
            print_result(result)
    if args.time_passes:
        print_timings(result)
    if result.exit_code:
        print("the goal was not met; see the figures above", file=sys.stderr)
    return result.exit_code


def _print_warnings(warnings: Iterable[str], args: argparse.Namespace) -> None:
    if not args.quiet:  # They stand in the result as well.
        for warning in warnings:
            print(f"warning: {printable(warning)}", file=sys.stderr)


def _dry_run(config: OptimizeConfig, args: argparse.Namespace) -> int:
    """Open everything, write nothing, say what would be done."""
    from raqu_onnx.planning import plan

    steps = plan(str(config.model), config.output, config=config, force=args.force or args.resume)
    if args.format == "json":
        print_json({"schema_version": 1, **steps})
        return 0
    print(f"model        {config.model}: {steps['mapped_nodes']} nodes on crossbars, {steps['unmapped_nodes']} not")
    crossbars = counted(steps["uniform_8_bit_crossbars"], "crossbar")
    have = ", ".join(f"{'any number' if n is None else n} of {kind}" for kind, n in steps["crossbars"].items())
    print(f"chip         {steps['chip']}: {have}; the model takes {crossbars} at 8 bits, packed")
    print(f"room         {steps['room']}")
    print(f"calibration  {steps['calibration']}")
    print(f"selection    {steps['selection']}")
    print(f"evaluation   {steps['evaluation']}")
    print(f"widths       {steps['widths']}")
    print(f"method       {steps['method']}")
    print(f"goal         {steps['goal']}")
    print(f"passes       {', '.join(steps['passes'])}")
    print(f"output       {shlex.quote(str(config.output))} (not written: dry run)")
    _print_warnings(steps["warnings"], args)
    return 0
