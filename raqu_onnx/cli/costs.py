"""The cost of a placement as a table, and why a figure is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raqu_onnx.cli.printing import console, counted, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from raqu_onnx.manifest_entries import CostEntry, PartitionEntry

__all__ = ["number", "print_costs", "print_partitions"]

_CYCLES = {
    "array-read": "a cycle: one read of an array with one input bit-slice",
    "column-turn": "a cycle: one turn of an array's columns at its ADCs with one input bit-slice",
}
_FIGURES = {"time": "time", "energy": "energy", "area": "area"}


def number(value: float | None, form: str) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else format(value, form)


def print_costs(rows: Sequence[tuple[str, CostEntry]]) -> None:
    """Print latency, interval, energy, area and writes.

    Args:
        rows: Labels and costs of placements on one chip; the last is ours.
    """
    if not rows:
        return
    out, last = console(), rows[-1][1]
    headers = ["", "latency", "interval"]
    headers += [] if last.cycle_ns is None else ["latency us", "interval us"]
    headers += [] if last.energy_pj is None else ["energy uJ"]
    headers += [] if last.area_um2 is None else ["area mm2"]
    headers += ["cells written"]
    print_table(out, headers, [_cells(*row) for row in rows], right=range(1, len(headers)), bold="ours")
    for line in _legend(last):
        out.print(line)


def print_partitions(parts: Sequence[PartitionEntry]) -> None:
    """Print what is on the chip after what, where not all is at once."""
    if len(parts) < 2:
        return
    out = console()
    headers = ("partition from", "nodes", "crossbars", "latency", "interval", "cells written", "us")
    rows = [
        [
            f"{index} {part.nodes[0]}",
            str(len(part.nodes)),
            str(sum(last - first for first, last in part.crossbars)),
            number(part.latency_cycles, "d"),
            number(part.interval_cycles, "d"),
            number(part.write_cells, "d"),
            number(None if part.write_ns is None else part.write_ns / 1e3, ".4g"),
        ]
        for index, part in enumerate(parts)
    ]
    print_table(out, headers, rows, right=range(3, len(headers)))
    out.print(
        "the chip is programmed for one partition after the other, which no cycle above contains; us: time for it"
    )
    out.print("inferences between two partitions wait, so that a batch shares the cost of programming")


def _cells(label: str, cost: CostEntry) -> list[str]:
    cycles = [cost.latency_cycles, cost.interval_cycles]
    cells = [label, *(number(value, "d") for value in cycles)]
    if cost.cycle_ns is not None:
        cells += [number(None if value is None else value * cost.cycle_ns / 1e3, ".4g") for value in cycles]
    for figure, unit in ((cost.energy_pj, 1e6), (cost.area_um2, 1e6)):
        cells += [] if figure is None else [format(figure / unit, ".4g")]
    return [*cells, number(cost.write_cells, "d")]


def _legend(cost: CostEntry) -> Iterator[str]:
    yield "latency: cycles of one inference alone; interval: cycles from one to the next in a pipeline of layers"
    yield f"{_CYCLES[cost.cycle]}; only arrays, DACs and ADCs count"
    if cost.critical_path:
        yield f"critical path: {counted(len(cost.critical_path), 'node')}, {_ends(cost.critical_path)}"
    if "cycles" in cost.missing:
        yield f"no cycles: {', '.join(cost.missing['cycles'])}"
    for key, name in _FIGURES.items():
        keys = [item for item in cost.missing.get(key, ()) if not item.startswith("node ")]  # type: ignore[call-overload]
        if keys:
            yield f"no {name}: the chip does not give {', '.join(keys)}"
    if cost.write_ns is not None:
        yield f"programming: {cost.write_ns / 1e3:.4g} us, wordline by wordline in all crossbars at once"


def _ends(path: Sequence[str]) -> str:
    return path[0] if len(path) == 1 else f"from {path[0]} to {path[-1]}"
