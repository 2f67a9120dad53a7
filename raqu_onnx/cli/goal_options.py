"""Options of `optimize` that say what is sought, and which point of an earlier search is written."""

from __future__ import annotations

import argparse

__all__ = ["add_earlier", "add_limits", "add_metric"]


def add_limits(group: argparse._ArgumentGroup) -> None:
    """Add limits other than crossbars, and what is minimized within them."""
    group.add_argument(
        "--max-latency",
        metavar="TIME",
        help="lose least within a latency of one inference alone: 2500ns, 2.5us, 1ms, or cycles: 40000cycles (default: "
        "no limit)",
    )
    group.add_argument(
        "--max-energy", metavar="ENERGY", help="likewise of energy: 300pJ, 12nJ, 0.5uJ or 1mJ (default: no limit)"
    )
    group.add_argument(
        "--max-average-bits",
        type=float,
        metavar="BITS",
        help="likewise of bits per weight, where dropped kernels count with 0 (default: no limit)",
    )
    group.add_argument(
        "--fit-chip",
        action="store_true",
        default=None,
        help="lose least on the whole chip (default where it has a number of crossbars and no goal is given)",
    )
    group.add_argument(
        "--objective",
        choices=["crossbars", "latency", "energy", "edp"],
        help="minimize this within all limits and --max-accuracy-drop; edp: energy times latency (default: the loss "
        "where there are limits, else crossbars)",
    )


def add_metric(group: argparse._ArgumentGroup) -> None:
    """Add what quality is."""
    group.add_argument(
        "--metric",
        metavar="M|FILE.py:FUNCTION",
        help="what --max-accuracy-drop counts hundredths of: top1, top5, topk:K (with labels), agreement, kl, sqnr, or "
        "FUNCTION(outputs, labels) -> number, the higher the better, where outputs is an array, or a dict by output "
        "name; auto: as --task and labels have it (default: auto)",
    )


def add_earlier(parser: argparse.ArgumentParser) -> None:
    """Add the choice of another point of an earlier search."""
    parser.add_argument(
        "--choose",
        type=int,
        metavar="K",
        help="write number K of the points that a finished search found, without searching again (default: search)",
    )
    parser.add_argument(
        "--from",
        "--earlier",
        dest="earlier",
        metavar="DIR",
        help="folder of that search; model, chip, data and settings are taken from it, and must be those if given "
        "(default: none)",
    )
