"""The Pareto front of a search as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raqu_onnx.cli.costs import number
from raqu_onnx.cli.printing import console, counted, print_table
from raqu_onnx.search.budget import Cost
from raqu_onnx.search.result import points_below

if TYPE_CHECKING:
    from raqu_onnx.search import SearchResult

__all__ = ["print_front"]

# Lines of the table; a longer front stands in report.json.
_MOST = 16
_ALONE = (
    "the front: this point alone, as no candidate within the limits takes less or loses less; wider limits, or "
    "--max-accuracy-drop in their place, show what other budgets would give"
)


def print_front(search: SearchResult) -> None:
    """Print the points of a front with their numbers, the written one marked; a sentence where there is one.

    Args:
        search: The search.
    """
    front = search.front
    out = console()
    if len(front) < 2:
        if len(search.evaluations) > 1:
            out.print(_ALONE)
        return
    shown = _around(len(front), search.chosen_number)
    rows = [_cells(search, k) for k in shown]
    metric = search.reference.metric
    headers = ("K", "crossbars", "W", "latency", "us", "uJ", "points below", "loss", "")
    filled = [i for i in range(len(headers)) if headers[i] == "" or any(row[i] != "-" for row in rows)]
    table = [[row[i] for i in filled] for row in rows]
    print_table(out, [headers[i] for i in filled], table, right=range(len(filled) - 1))
    more = f"{counted(len(front), 'point')}, those near the one written; " if len(front) > len(shown) else ""
    out.print(
        f"the front: {more}points below float in {metric}, on the selection data; `--choose K --from DIR` writes "
        "another point"
    )
    if search.goal.max_accuracy_drop is not None and search.goal.minimized is not None:
        out.print(
            "a point within the drop is passed over where candidates as far from float as it lose more on average: its "
            "own figure is luck"
        )


def _around(points: int, chosen: int) -> range:
    """Numbers of the points that are shown."""
    first = max(1, min(chosen - _MOST // 2, points - _MOST + 1))
    return range(first, min(points, first + _MOST - 1) + 1)


def _cells(search: SearchResult, k: int) -> list[str]:
    item = search.front[k - 1]
    cost = item.cost or Cost(item.crossbars)
    return [
        str(k),
        str(item.crossbars),
        "-" if item.cost is None else f"{cost.average_bits:.2f}",
        number(cost.latency_cycles, "d"),
        number(None if cost.latency_ns is None else cost.latency_ns / 1e3, ".4g"),
        number(None if cost.energy_pj is None else cost.energy_pj / 1e6, ".4g"),
        f"{points_below(search.reference, item.score):.2f}",
        f"{item.score.loss:.4f}",
        "written" if k == search.chosen_number else "",
    ]
