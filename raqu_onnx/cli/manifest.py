"""`raqu-onnx manifest`: the manifest's JSON Schema, or a manifest's summary."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raqu_onnx.manifest import Manifest, NodeEntry, Ratio

__all__ = ["add_parser"]

_JSON_VERSION = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `manifest schema | show` to the command line."""
    parser = subparsers.add_parser(
        "manifest",
        help="print the manifest's JSON Schema, or a manifest's summary",
        description="Print the JSON Schema that every manifest obeys, or the summary of one.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    schema = actions.add_parser("schema", help="print the JSON Schema", description="Print the JSON Schema.")
    schema.set_defaults(run=_schema)
    show = actions.add_parser("show", help="summarize a manifest", description="Summarize a manifest.")
    show.add_argument("out_dir", metavar="OUT_DIR", help="folder that optimize wrote, or a manifest file")
    show.add_argument("--format", choices=["text", "json"], default="text", help="form of the result (default: text)")
    show.set_defaults(run=_show)


def _schema(_: argparse.Namespace) -> int:
    import json

    from raqu_onnx.manifest import manifest_schema

    print(json.dumps(manifest_schema(), indent=2))
    return 0


def _show(args: argparse.Namespace) -> int:
    from raqu_onnx.manifest import read_manifest

    path = Path(args.out_dir)
    manifest = read_manifest(path / "manifest.json" if path.is_dir() else path)
    if args.format == "json":
        import json

        print(json.dumps({"schema_version": _JSON_VERSION, **_summary(manifest)}, indent=1))
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
        "nodes": [_node(node) for node in manifest.nodes],
        "unmapped": [item.model_dump() for item in manifest.unmapped],
    }


def _node(node: NodeEntry) -> dict[str, Any]:
    matrix = node.matrix
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
        "crossbars": len({(placement.type, placement.crossbar) for placement in node.placements}),
    }


def _print(manifest: Manifest) -> None:
    from raqu_onnx.cli.options import console, new_table

    out = console()
    totals = manifest.totals
    used = ", ".join(
        f"{total.allocated} {total.name}" + ("" if total.count is None else f" of {total.count}")
        for total in totals.crossbars
    )
    out.print(f"{manifest.model.file} on {manifest.chip.name}, {manifest.sharing} sharing")
    out.print(f"crossbars: {used} (lower bound {totals.lower_bound}), {totals.placements} placements")
    out.print(f"cell utilization {_share(totals.cell_utilization)}, bit {_share(totals.bit_utilization)}")
    if manifest.calibration is not None and manifest.calibration.synthetic:
        out.print("calibrated on generated inputs, not on real data")
    headers = ("node", "type", "G", "K", "M", "w bits", "a bits", "MVMs", "crossbars")
    table = new_table(*headers, right=tuple(range(2, len(headers))))
    for node in map(_node, manifest.nodes):
        bits = ",".join(map(str, node["weight_bits"]))
        activation, mvms = (str("?" if node[k] is None else node[k]) for k in ("activation_bits", "mvms"))
        sizes = (str(node[key]) for key in ("groups", "rows", "kernels"))
        table.add_row(node["name"], node["op_type"], *sizes, bits, activation, mvms, str(node["crossbars"]))
    out.print(table)
    for item in manifest.unmapped:
        out.print(f"in float: {item.op_type} {item.name}: {item.reason}")


def _share(ratio: Ratio) -> str:
    if not ratio.denominator:
        return "0/0"
    return f"{ratio.numerator / ratio.denominator:.1%} ({ratio.numerator}/{ratio.denominator})"
