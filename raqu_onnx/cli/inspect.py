"""`raqu-onnx inspect`: the tiling of a model on a chip, without search."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from raqu_onnx.cli.options import add_common, add_exclude, start_logging
from raqu_onnx.cli.printing import print_json

if TYPE_CHECKING:
    from raqu_onnx.inspection import Inspection
    from raqu_onnx.manifest_entries import CostEntry

__all__ = ["add_parser"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `inspect` to the command line."""
    parser = subparsers.add_parser(
        "inspect",
        help="show the tiling of a model on a chip, without search",
        description="Show how every Conv, ConvTranspose, Gemm and MatMul is cut into crossbars at one width, and why a "
        "node is not mapped. No data is needed and no weight is read.",
    )
    parser.add_argument("model", metavar="MODEL.onnx", help="the model")
    parser.add_argument("--hw", default="generic", metavar="NAME|FILE", help="chip or TOML file (default: generic)")
    parser.add_argument("--weight-bits", default=8, type=int, metavar="N", help="width of all weights (default: 8)")
    add_exclude(parser)
    add_common(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from raqu_onnx.errors import ConfigError
    from raqu_onnx.inspection import inspect

    start_logging(args)
    if not 2 <= args.weight_bits <= 8:
        raise ConfigError(f"--weight-bits: {args.weight_bits} is out of range: widths are 2 to 8")
    result = inspect(args.model, args.hw, weight_bits=args.weight_bits, exclude=args.exclude or ())
    if args.format == "json":
        print_json(_to_json(result))
    else:
        from raqu_onnx.cli.tables import print_inspection

        print_inspection(result)
    return 0


def _to_json(result: Inspection) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "chip": result.chip.name,
        "weight_bits": result.weight_bits,
        "nodes": [
            {
                "name": item.node.name,
                "op_type": item.node.op_type,
                "groups": item.node.layout.groups,
                "rows": item.node.layout.rows,
                "kernels": item.node.layout.kernels,
                "mvms": item.node.mvms,
                "crossbar_type": item.crossbar_type,
                "crossbars": item.crossbars,
                "cells": item.cells,
                "utilization": item.utilization,
                "cycles": item.cycles,
            }
            for item in result.nodes
        ],
        "unmapped": [vars(node) for node in result.unmapped],
        "others": dict(result.others),
        "exclusive": _totals(result.exclusive, result.exclusive_cost),
        "packed": _totals(result.packed, result.packed_cost),
        "fits": result.fits,
    }


def _totals(placement: Any, cost: CostEntry) -> dict[str, Any]:
    return {
        "crossbars": placement.crossbars,
        "crossbars_by_type": list(placement.crossbars_by_type),
        "cell_utilization": placement.cell_utilization,
        "bit_utilization": placement.bit_utilization,
        "gap": _gap(placement),
        "cost": cost.model_dump(mode="json"),
    }


def _gap(placement: Any) -> float | None:
    """Allocated cells over their lower bound, less 1; None where the chip has too few cells for any placement."""
    from raqu_onnx.placement import DoesNotFitError

    try:
        return float(placement.gap)
    except DoesNotFitError:
        return None
