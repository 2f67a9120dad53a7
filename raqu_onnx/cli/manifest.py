"""`raqu-onnx manifest`: the schemas of what a run writes, or a manifest's summary."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raqu_onnx.cli.options import add_debug

if TYPE_CHECKING:
    from raqu_onnx.manifest import Manifest, NodeEntry, Ratio

__all__ = ["add_parser"]

_JSON_VERSION = 1


def _manifest_schema() -> dict[str, Any]:
    from raqu_onnx.manifest import manifest_schema

    return manifest_schema()


def _report_schema() -> dict[str, Any]:
    from raqu_onnx.report import report_schema

    return report_schema()


def _cells_format() -> dict[str, Any]:
    from raqu_onnx.cells_format import cells_format

    return cells_format()


_SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {
    "manifest": _manifest_schema,
    "report": _report_schema,
    "cells": _cells_format,
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `manifest schema | show` to the command line."""
    parser = subparsers.add_parser(
        "manifest",
        help="print the manifest's JSON Schema, or a manifest's summary",
        description="Print the schema of a file that `optimize` writes, or the summary of a manifest.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    schema = actions.add_parser(
        "schema",
        help="print the schema of a file that `optimize` writes",
        description="Print the JSON Schema of manifest.json or report.json, or what the arrays of cells.npz are: "
        "names, type, shape, meaning of the levels and of polarity.",
    )
    schema.add_argument(
        "file", nargs="?", choices=list(_SCHEMAS), default="manifest", help="which file (default: manifest)"
    )
    schema.set_defaults(run=_schema)
    show = actions.add_parser("show", help="summarize a manifest", description="Summarize a manifest.")
    show.add_argument("out_dir", metavar="OUT_DIR", help="folder that optimize wrote, or a manifest file")
    show.add_argument("--format", choices=["text", "json"], default="text", help="form of the result (default: text)")
    add_debug(show)
    show.set_defaults(run=_show)


def _schema(args: argparse.Namespace) -> int:
    import json

    print(json.dumps(_SCHEMAS[args.file](), indent=2))
    return 0


def _show(args: argparse.Namespace) -> int:
    from raqu_onnx.manifest import read_manifest

    path = Path(args.out_dir)
    manifest = read_manifest(path / "manifest.json" if path.is_dir() else path)
    if args.format == "json":
        from raqu_onnx.cli.printing import print_json

        print_json({"schema_version": _JSON_VERSION, **_summary(manifest)})
    else:
        _print(manifest)
    return 0


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "model": manifest.model.model_dump(),
        "tool": manifest.tool.version,
        "seed": manifest.seed,
        "chip": manifest.chip.name,
        "sharing": manifest.sharing,
        "executable": manifest.executable,
        "calibration": None if manifest.calibration is None else manifest.calibration.model_dump(),
        "totals": manifest.totals.model_dump(mode="json"),
        "partitions": [part.model_dump(mode="json") for part in manifest.partitions],
        "nodes": [_node(node, manifest) for node in manifest.nodes],
        "unmapped": [item.model_dump() for item in manifest.unmapped],
    }


def _node(node: NodeEntry, manifest: Manifest) -> dict[str, Any]:
    matrix = node.matrix
    cycles = next((stage.cycles for stage in manifest.stages if stage.node == node.name), None)
    types = sorted({placement.type for placement in node.placements})
    return {
        "name": node.name,
        "op_type": node.op_type,
        "groups": matrix.groups,
        "rows": matrix.rows,
        "kernels": matrix.kernels,
        "weight_bits": sorted({bits for bits, _ in node.bits}, reverse=True),
        "activation_bits": None if node.activation is None else node.activation.bits,
        "mvms": node.mvms,
        "placements": len(node.placements),
        "crossbar_types": [manifest.chip.crossbars[index].name for index in types],
        "cycles": cycles,
        "crossbars": len({(placement.type, placement.crossbar) for placement in node.placements}),
    }


def _print(manifest: Manifest) -> None:
    from raqu_onnx.cli.costs import bound_text, number, print_costs, print_partitions
    from raqu_onnx.cli.printing import console, counted, print_table
    from raqu_onnx.cli.tables import MATRIX_LEGEND, SHARING_LEGEND

    out = console()
    totals = manifest.totals
    used = ", ".join(
        f"{total.allocated} {total.name}" + ("" if total.count is None else f" of {total.count}")
        for total in totals.crossbars
    )
    out.print(f"{manifest.model.file} on {manifest.chip.name}")
    gap = totals.cell_utilization.denominator / totals.lower_bound_cells - 1 if totals.lower_bound_cells else 0.0
    out.print(f"crossbars: {used}, {counted(totals.placements, 'placement')}")
    out.print(f"lower bound: {bound_text(totals.lower_bound, gap, totals.exact)}")
    out.print(f"cell utilization {_share(totals.cell_utilization)}, bit {_share(totals.bit_utilization)}")
    if totals.dropped_kernels:
        out.print(f"dropped: {counted(totals.dropped_kernels, 'kernel')} (0 bits)")
    out.print(SHARING_LEGEND[manifest.sharing])
    if manifest.calibration is not None and manifest.calibration.synthetic:
        out.print("calibrated on generated inputs, not on real data")
    several = len(manifest.chip.crossbars) > 1
    headers = [
        "node",
        "op",
        "G",
        "K",
        "M",
        "W",
        "A",
        "MVMs",
        *(["type"] if several else []),
        "crossbars",
        "cycles",
    ]
    rows = []
    for node in (_node(entry, manifest) for entry in manifest.nodes):
        widths = node["weight_bits"]
        bits = str(widths[0]) if len(widths) == 1 else f"{widths[-1]}-{widths[0]}"
        activation, mvms = (str("?" if node[k] is None else node[k]) for k in ("activation_bits", "mvms"))
        sizes = (str(node[key]) for key in ("groups", "rows", "kernels"))
        kinds = [",".join(node["crossbar_types"])] if several else []
        rows.append(
            [
                node["name"],
                node["op_type"],
                *sizes,
                bits,
                activation,
                mvms,
                *kinds,
                str(node["crossbars"]),
                number(node["cycles"], "d"),
            ]
        )
    print_table(out, headers, rows, right=[i for i in range(2, len(headers)) if headers[i] != "type"])
    out.print(f"{MATRIX_LEGEND}; W, A: bits of weights (0: dropped) and of the input")
    print_costs([("one inference", totals.cost)])
    print_partitions(manifest.partitions)
    for item in manifest.unmapped:
        out.print(f"not on crossbars: {item.name} ({item.op_type}): {item.reason}")


def _share(ratio: Ratio) -> str:
    if not ratio.denominator:
        return "0/0"
    return f"{ratio.numerator / ratio.denominator:.1%} ({ratio.numerator}/{ratio.denominator})"
