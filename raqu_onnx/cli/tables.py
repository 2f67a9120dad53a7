"""Results as tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from raqu_onnx.cli.costs import bits_column, bound_text, number, print_costs, print_partitions
from raqu_onnx.cli.front import print_front
from raqu_onnx.cli.printing import console, counted, print_table
from raqu_onnx.report_files import HTML_FILE
from raqu_onnx.results import describe_goal
from raqu_onnx.scoring import KL, NOISE
from raqu_onnx.shortage import shortage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from raqu_onnx.evaluation import Score
    from raqu_onnx.inspection import Inspection
    from raqu_onnx.results import DataSummary, Figures, OptimizeResult
    from raqu_onnx.search import Goal, SearchResult

__all__ = ["MATRIX_LEGEND", "SHARING_LEGEND", "print_inspection", "print_result", "print_timings"]

MATRIX_LEGEND = "G groups of K rows (wordlines) by M kernels (output channels); MVMs: matrix-vector products a sample"
SHARING_LEGEND = {
    "exclusive": "exclusive sharing: a crossbar serves one node",
    "diagonal": "diagonal sharing: nodes share a crossbar where neither rows nor columns are in common",
    "time": "time sharing: nodes share a crossbar; those that share rows or columns take turns",
}
_METRICS = {
    "top-1": "samples whose largest output is the label",
    "agreement": "samples whose largest output is the float model's, which is fidelity and no accuracy",
    NOISE: "power of the float model's outputs over power of the difference to them, in dB, which is no accuracy",
}
_POINTS_LEGEND = (
    "points: hundredths of 1 - noise/signal, the noise being the difference's power; 20 dB are 1 below float"
)
_KL_LEGEND = "KL: mean divergence of the class probabilities from float's, in nats; 0 is the same"


def print_result(result: OptimizeResult) -> None:
    """Print bits by node, the table of figures, the goal, what was gained and where the files are."""
    out = console()
    if result.bits:
        _print_nodes(result)
        if any(activation is not None for _, activation in result.bits.values()):
            out.print("activation bits: of a node's input; --input-bits sets those of the model's own inputs")
    if result.method:
        out.print(f"method: {' '.join(result.method)}")
    for name, pattern in result.kept:
        out.print(f"kept at {result.bits[name][0]:g} bits: {name} ({pattern})")
    for name, kind, reason in result.unmapped:
        out.print(f"not on crossbars: {name} ({kind}): {reason}")
    if result.figures:
        _print_figures(result)
    if result.validation is not None:
        tried = [check for check in result.validation.checks if check.passed is not None]
        out.print(f"all {len(tried)} checks of the written files passed")
    if result.output is not None:
        out.print(f"written to {result.output}", soft_wrap=True)
        if (page := result.output / HTML_FILE).exists():
            out.print(f"to look at: {page}", soft_wrap=True)


def _print_nodes(result: OptimizeResult) -> None:
    copied = any(count > 1 for count in result.replicas.values())
    headers = ("node", "weight bits", "activation bits", *(["copies"] if copied else []), "cycles")
    rows = []
    means = bits_column([weight for weight, _ in result.bits.values()])
    for mean, (name, (_, activation)) in zip(means, result.bits.items(), strict=True):
        copies = [str(result.replicas[name])] if copied else []
        bits = (mean, "float" if activation is None else str(activation))
        rows.append((name, *bits, *copies, number(result.cycles.get(name), "d")))
    print_table(console(), headers, rows, right=range(1, len(headers)))


def _print_figures(result: OptimizeResult) -> None:
    out = console()
    judged = any(item.evaluation is not None for item in result.figures)
    scores = [item.evaluation if judged else item.selection for item in result.figures]
    metric = next((score.metric for score in scores if score is not None), "quality")
    headers = ("", "W", "A", "crossbars", "cells", "bits", "SQNR" if metric == NOISE else metric, "KL")
    columns = [
        [item.label for item in result.figures],
        bits_column([item.weight_bits for item in result.figures]),
        bits_column([item.activation_bits for item in result.figures]),
        *zip(*(_figure_cells(item, score) for item, score in zip(result.figures, scores, strict=True)), strict=True),
    ]
    rows = list(zip(*columns, strict=True))
    print_table(out, headers, rows, right=tuple(range(1, len(headers))), bold="ours")
    for line in _legend(result, metric, judged=judged):
        out.print(line)
    print_costs([(item.label, item.cost) for item in result.figures if item.cost is not None])
    print_partitions(result.partitions)
    if result.search is not None:
        print_front(result.search)
    for line in ("", *_goal_lines(result), *_summary(result, metric)):
        out.print(line)


def _legend(result: OptimizeResult, metric: str, *, judged: bool) -> Iterator[str]:
    yield "W, A: mean bits of weights and activations; cells, bits: share of the crossbars in use"
    yield "unpacked: one node per crossbar; packed: as the chip shares crossbars"
    if metric in _METRICS:
        name = "SQNR" if metric == NOISE else metric
        yield f"{name}: {_METRICS[metric]}{_judged_on(result, judged=judged)}"
        yield _POINTS_LEGEND if metric == NOISE else _KL_LEGEND
    elif metric != KL:
        yield f"{metric}: the higher the better, points are hundredths of it{_judged_on(result, judged=judged)}"


def _judged_on(result: OptimizeResult, *, judged: bool) -> str:
    """Which samples the rows are of, and what they were used for before."""
    selection, evaluation = (result.data.get(role) for role in ("selection", "evaluation"))
    data = evaluation if judged else selection
    if data is None:
        return ""
    others = {item.name for role, item in result.data.items() if item is not None and role != "evaluation"}
    before = "on which widths were chosen"
    if judged:
        before = "the test data" if data.name in others else "the test data, which the search has not seen"
    elif data.fitted and _is_fixed(result):
        before = "the calibration data, which ranges and weights were fitted to"
    elif _is_fixed(result):
        before = "the selection data"
    return f"; on {_named(data)}, {before}"


def _is_fixed(result: OptimizeResult) -> bool:
    """Whether widths were given, so that nothing was chosen."""
    return result.search is not None and len({item.bits for item in result.search.evaluations}) == 1


def _named(data: DataSummary) -> str:
    kind = "generated inputs" if data.synthetic else data.name
    return kind if data.samples is None else f"{kind} ({counted(data.samples, 'sample')})"


def _figure_cells(item: Figures, score: Score | None) -> list[str]:
    return [
        number(item.crossbars, "d"),
        number(item.cell_utilization, ".1%"),
        number(item.bit_utilization, ".1%"),
        "-" if score is None else _quality(score),
        "-" if score is None or score.kl is None else f"{score.kl:.4f}",
    ]


def _quality(score: Score) -> str:
    """How good a model is: accuracy or agreement in percent, else the noise in dB."""
    if score.metric == NOISE:
        return "-" if score.sqnr_db is None else f"{score.sqnr_db:.2f} dB"
    if score.metric == KL:
        return f"{-score.quality:.4f} nats"
    is_share = score.metric in _METRICS or score.metric.startswith("top-")
    return f"{score.quality:.2%}" if is_share else f"{score.quality:.5g}"


def _goal_lines(result: OptimizeResult) -> Iterator[str]:
    """The goal, what it was judged on, what was reached, and whether that is enough."""
    search = result.search
    if search is None or not search.goal:
        return
    score, reference = search.chosen.score, search.reference
    fixed = _is_fixed(result)
    yield f"goal: {describe_goal(search.goal, fixed=fixed, metric=score.metric)}"
    data = result.data.get("selection")
    role = "calibration" if data is not None and data.fitted else "selection"
    drop = 100 * (reference.quality - score.quality)
    side = "below" if drop >= 0 else "above"
    yield (
        f"reached: {', '.join(_reached(search))}, {abs(drop):.2f} points {side} float "
        f"({_quality(reference)} -> {_quality(score)} {score.metric}"
        f"{'' if data is None else f' on {_named(data)}, the {role} data'})"
    )
    yield f"the goal is {'met' if search.goal_met else 'NOT met'}"
    yield from _overfitting(result)


def _overfitting(result: OptimizeResult) -> Iterator[str]:
    """What the result loses on data that the search has not seen, beside what it loses on those that it chose by."""
    first, ours = result.figures[0], result.figures[-1]
    if _is_fixed(result) or not (first.selection and first.evaluation and ours.selection and ours.evaluation):
        return
    pairs = ((first.selection, ours.selection), (first.evaluation, ours.evaluation))
    chosen, unseen = (
        f"{100 * (reference.quality - score.quality):.2f}{'' if alike else f' in {score.metric}'}"
        for alike in [ours.selection.metric == ours.evaluation.metric]
        for reference, score in pairs
    )
    yield (
        f"points below float: {chosen} on the selection data, {unseen} on the evaluation data, which the search has "
        "not seen"
    )


def _reached(search: SearchResult) -> Iterator[str]:
    """What the result costs, in the terms of the goal."""
    cost, goal = search.chosen.cost, search.goal
    yield counted(search.chosen.crossbars, "crossbar")
    if cost is None:
        return
    if goal.max_average_bits is not None:
        yield f"{cost.average_bits:.3g} bits per weight"
    if goal.speaks_of & {"latency", "edp"} and cost.latency_cycles is not None:
        yield f"{cost.latency_cycles} cycles" + ("" if cost.latency_ns is None else f" ({cost.latency_ns:g} ns)")
    if goal.speaks_of & {"energy", "edp"} and cost.energy_pj is not None:
        yield f"{cost.energy_pj:.6g} pJ"


def _summary(result: OptimizeResult, metric: str) -> Iterator[str]:
    """What quantization gained and what packing gained, kept apart."""
    # Copies are no part of what quantization and packing gained.
    rows = [item for item in result.figures[1:] if not item.label.startswith("ours")]
    ours = result.figures[1 + len(rows)]
    search = result.search
    if search is not None and ours.crossbars:
        for unpacked, packed in zip(rows[::2], rows[1::2], strict=True):
            yield from _gains(search.goal, unpacked, packed, ours)
        if search.goal and search.best_uniform is None:
            yield "no uniform width serves the goal"
    if result.dropped:
        kernels = counted(sum(result.dropped.values()), "kernel")
        yield f"dropped: {kernels} in {counted(len(result.dropped), 'node')}, for which the nodes that follow make up"
    if result.lower_bound is not None:
        copies = " and copies" if any(count > 1 for count in result.replicas.values()) else ""
        yield f"lower bound for these bits{copies}: {bound_text(result.lower_bound, result.gap, result.exact)}"
    data = result.data.get("evaluation")
    for level, score in result.levels.items():
        where = "" if data is None else f" on {data.name}"
        name = "SQNR" if metric == NOISE else metric
        yield f"emitted model, onnxruntime {level}: {_quality(score)} {name}{where}"
    if result.bits and all(activation is None for _, activation in result.bits.values()):
        yield "float activations: for measurements only, no backend can run the manifest; at its default level"
        yield "onnxruntime itself may compute a MatMul or Gemm with 8-bit inputs (MatMulNBits), so the two may differ"


def _gains(goal: Goal, unpacked: Figures, packed: Figures, ours: Figures) -> Iterator[str]:
    """What packing and bits change against a uniform width: crossbars, and what else the goal speaks of."""
    against = f"against {packed.label.removesuffix(', packed')}"
    for unit, told, (first, second, third) in _compared(goal, unpacked, packed, ours):
        if None not in (first, second, third):
            packing, bits = (f"{a:{told}} -> {b:{told}}" for a, b in ((first, second), (second, third)))
            yield f"{against}: packing {packing} {unit}, our bits {bits}"


def _compared(goal: Goal, *rows: Figures) -> Iterator[tuple[str, str, list[float | None]]]:
    """Unit, format and values of what is compared."""
    yield "crossbars", "d", [row.crossbars for row in rows]
    costs = [row.cost for row in rows]
    if goal.speaks_of & {"latency", "edp"}:
        yield "cycles", "d", [None if cost is None else cost.latency_cycles for cost in costs]
    if goal.speaks_of & {"energy", "edp"}:
        yield "pJ", ".6g", [None if cost is None else cost.energy_pj for cost in costs]


def print_timings(result: OptimizeResult) -> None:
    """Print the time of every pass to stderr."""
    for item in result.timings:
        print(f"{item.seconds:8.2f} s  {item.name}", file=sys.stderr)


def print_inspection(result: Inspection) -> None:
    """Print the tiling table and the totals."""
    out = console()
    chip = result.chip
    several = len(chip.crossbars) > 1
    headers = ["node", "op", "G", "K", "M", "MVMs", *(["type"] if several else []), "crossbars", "cells", "cycles"]
    rows = []
    for item in result.nodes:
        layout = item.node.layout
        numbers = (layout.groups, layout.rows, layout.kernels, "?" if item.node.mvms is None else item.node.mvms)
        kind = [item.crossbar_type] if several else []
        cells = [*map(str, numbers), *kind, str(item.crossbars), f"{item.utilization:.1%}", number(item.cycles, "d")]
        rows.append([item.node.name, item.node.op_type, *cells])
    print_table(out, headers, rows, right=[i for i in range(2, len(headers)) if headers[i] != "type"])
    out.print(MATRIX_LEGEND)
    for node in result.unmapped:
        out.print(f"not on crossbars: {node.name} ({node.op_type}): {node.reason}")
    if result.others:
        counts = ", ".join(f"{count} {kind}" for kind, count in result.others.items())
        out.print(f"other operators, computed beside the crossbars: {counts}")
    sizes = ", ".join(
        f"{f'{kind.name} ' if several else ''}{kind.rows}x{kind.cols} of {kind.cell_bits}-bit cells"
        for kind in chip.crossbars
    )
    out.print(f"chip {chip.name}: {sizes}, {chip.encoding}; all weights {result.weight_bits} bits")
    out.print(SHARING_LEGEND[chip.sharing])
    for label, placement in (("one node per crossbar", result.exclusive), ("packed", result.packed)):
        taken = counted(placement.crossbars, "crossbar")
        if several:
            pairs = zip(chip.crossbars, placement.crossbars_by_type, strict=True)
            taken += f" ({', '.join(f'{count} {kind.name}' for kind, count in pairs)})"
        out.print(
            f"{label}: {taken}, cells used {placement.cell_utilization:.1%}, bits used {placement.bit_utilization:.1%}"
        )
    out.print(f"lower bound: {_bound(result)}")
    print_costs([("one node per crossbar", result.exclusive_cost), ("packed", result.packed_cost)])
    out.print("cycles and energy are of 8-bit activations")
    if not result.fits:
        have = counted(sum(kind.count or 0 for kind in chip.crossbars), "crossbar")
        short = shortage(chip, result.packed.crossbars_by_type)
        problem = f"packed it takes {short}" if short else f"the chip has {have}"
        out.print(f"{problem}: at this width the model does not fit")


def _bound(result: Inspection) -> str:
    from raqu_onnx.placement import DoesNotFitError

    try:
        return bound_text(result.packed.lower_bound, result.packed.gap)
    except DoesNotFitError as error:
        return str(error)
