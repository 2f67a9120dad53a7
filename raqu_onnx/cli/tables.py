"""Results as tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from raqu_onnx.cli.options import console, new_table

if TYPE_CHECKING:
    from raqu_onnx.evaluation import Score
    from raqu_onnx.inspection import Inspection
    from raqu_onnx.results import Figures, OptimizeResult

__all__ = ["print_inspection", "print_result", "print_timings"]


def print_result(result: OptimizeResult) -> None:
    """Print bits by node, the table of figures, what was gained and where the files are."""
    out = console()
    if result.bits:
        table = new_table("node", "weight bits", "activation bits", right=(1, 2))
        for name, (weight, activation) in result.bits.items():
            table.add_row(name, f"{weight:g}", "float" if activation is None else str(activation))
        out.print(table)
    for name, kind, reason in result.unmapped:
        out.print(f"left in float: {name} ({kind}): {reason}")
    if result.figures:
        _print_figures(result)
    if result.validation is not None:
        tried = [check for check in result.validation.checks if check.passed is not None]
        out.print(f"all {len(tried)} checks of the written files passed")
    if result.output is not None:
        out.print(f"written to {result.output}", soft_wrap=True)


def _print_figures(result: OptimizeResult) -> None:
    out = console()
    judged = any(item.evaluation is not None for item in result.figures)
    scores = [_score(item, judged) for item in result.figures]
    quality = _quality_name(next((score for score in scores if score is not None), None))
    quality += ", test" if judged else ", selection"
    headers = ("", "W", "A", "crossbars", "cells", "bits", quality, "KL")
    table = new_table(*headers, right=tuple(range(1, len(headers))))
    for item in result.figures:
        style = "bold" if item.label == "ours" else None
        table.add_row(*_figure_cells(item, _score(item, judged)), style=style)
    out.print(table)
    out.print("W, A: mean bits of weights and activations; cells, bits: share of the crossbars in use;")
    out.print("unpacked: one node per crossbar")
    for line in _summary(result):
        out.print(line)


def _quality_name(score: Score | None) -> str:
    """What `Score.quality` says of this model and data."""
    if score is not None and score.top1 is not None:
        return "top-1"
    return "agreement" if score is None or score.agreement is not None else "1 - noise/signal"


def _score(item: Figures, judged: bool) -> Score | None:
    return item.evaluation if judged else item.selection


def _figure_cells(item: Figures, score: Score | None) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    quality = "-" if score is None else f"{100 * score.quality:.2f} %"
    kl = "-" if score is None or score.kl is None else f"{score.kl:.4f}"
    return [
        item.label,
        number(item.weight_bits, ".3g"),
        number(item.activation_bits, ".3g"),
        number(item.crossbars, "d"),
        number(item.cell_utilization, ".1%"),
        number(item.bit_utilization, ".1%"),
        quality,
        kl,
    ]


def _summary(result: OptimizeResult) -> list[str]:
    """What quantization gained and what packing gained, kept apart."""
    lines: list[str] = []
    ours = result.figures[-1]
    search = result.search
    if search is not None and ours.crossbars:
        rows = result.figures[1:-1]
        for unpacked, packed in zip(rows[::2], rows[1::2], strict=True):
            lines.append(
                f"against {packed.label.removesuffix(', packed')}: packing {unpacked.crossbars} -> {packed.crossbars} "
                f"crossbars, bits per layer {packed.crossbars} -> {ours.crossbars}"
            )
        if search.best_uniform is None:
            lines.append("no uniform width serves the goal")
    if result.lower_bound is not None:
        lines.append(f"lower bound for these bits: {result.lower_bound} crossbars")
    for level, score in result.levels.items():
        lines.append(f"emitted model, onnxruntime {level}: {100 * score.quality:.2f} %")
    return lines


def print_timings(result: OptimizeResult) -> None:
    """Print the time of every pass to stderr."""
    for item in result.timings:
        print(f"{item.seconds:8.2f} s  {item.name}", file=sys.stderr)


def print_inspection(result: Inspection) -> None:
    """Print the tiling table and the totals."""
    out = console()
    table = new_table("node", "op", "G", "K", "M", "MVMs", "crossbars", "cells used", right=(2, 3, 4, 5, 6, 7))
    for item in result.nodes:
        layout = item.node.layout
        table.add_row(
            item.node.name,
            item.node.op_type,
            str(layout.groups),
            str(layout.rows),
            str(layout.kernels),
            "?" if item.node.mvms is None else str(item.node.mvms),
            str(item.crossbars),
            f"{item.utilization:.1%}",
        )
    out.print(table)
    for node in result.unmapped:
        out.print(f"left in float: {node.name} ({node.op_type}): {node.reason}")
    chip = result.chip
    sizes = ", ".join(f"{kind.rows}x{kind.cols} of {kind.cell_bits}-bit cells" for kind in chip.crossbars)
    out.print(
        f"chip {chip.name}: {sizes}, {chip.encoding}, {chip.sharing} sharing; all weights {result.weight_bits} bits"
    )
    for label, placement in (("one node per crossbar", result.exclusive), ("packed", result.packed)):
        out.print(
            f"{label}: {placement.crossbars} crossbars, cells used {placement.cell_utilization:.1%}, "
            f"bits used {placement.bit_utilization:.1%}"
        )
    out.print(f"lower bound: {_bound(result)}")
    if not result.fits:
        have = sum(kind.count or 0 for kind in chip.crossbars)
        out.print(f"the chip has {have} crossbars: at this width the model does not fit")


def _bound(result: Inspection) -> str:
    from raqu_onnx.placement import DoesNotFitError

    try:
        return f"{result.packed.lower_bound} crossbars"
    except DoesNotFitError as error:
        return str(error)
