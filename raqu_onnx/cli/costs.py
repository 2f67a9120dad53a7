"""The cost of a placement as a table, and why a figure is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raqu_onnx.cli.printing import console, counted, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from raqu_onnx.manifest_entries import CostEntry, PartitionEntry
    from raqu_onnx.placement_problem import ExactOutcome

__all__ = ["bits_column", "bound_text", "number", "print_costs", "print_partitions"]

_CYCLES = {
    "array-read": "a cycle: one read of an array with one input bit-slice",
    "column-turn": "a cycle: one turn of an array's columns at its ADCs with one input bit-slice",
}
_OUTCOMES: dict[ExactOutcome, str] = {
    "at-bound": "proven optimal, at the bound",
    "optimal": "proven optimal for these blocks",
    "optimal-in-shelves": "proven optimal for these blocks in shelves",
    "limit": "not proven optimal, the solver's limit was reached",
    "budget": "as the fast one, since fewer cells would take more crossbars than allowed",
    "too-many-patterns": "not proven optimal, there are too many ways to share crossbars",
}
_FIGURES = {"time": "time", "energy": "energy", "area": "area"}


def number(value: float | None, form: str) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else format(value, form)


def bits_column(values: Sequence[float | None]) -> list[str]:
    """Means of bits in one format: two decimals as soon as one of them is no whole number."""
    form = ".0f" if all(value is None or value == round(value) for value in values) else ".2f"
    return [number(value, form) for value in values]


def bound_text(bound: int, gap: float | None, exact: ExactOutcome | None = None) -> str:
    """The lower bound of a placement, how far above it the placement lies, and what `exact` proved."""
    text = counted(bound, "crossbar")
    text += "" if gap is None else f"; gap of allocated cells {gap:.1%}"
    return text if exact is None else f"{text}; exact placement: {_OUTCOMES[exact]}"


def print_costs(rows: Sequence[tuple[str, CostEntry]]) -> None:
    """Print latency, interval, energy, area and writes.

    Args:
        rows: Labels and costs of placements on one chip; the last is ours.
    """
    if not rows:
        return
    out, last = console(), rows[-1][1]
    columns = (
        ("latency", [number(cost.latency_cycles, "d") for _, cost in rows]),
        ("us", [_scaled(_ns(cost, cost.latency_cycles), 1e3) for _, cost in rows]),
        ("interval", [number(cost.interval_cycles, "d") for _, cost in rows]),
        ("us", [_scaled(_ns(cost, cost.interval_cycles), 1e3) for _, cost in rows]),
        ("uJ", [_scaled(cost.energy_pj, 1e6) for _, cost in rows]),
        ("mm2", [_scaled(cost.area_um2, 1e6) for _, cost in rows]),
    )
    # What no placement has gets no column.
    shown = [(header, cells) for header, cells in columns if set(cells) != {"-"}]
    if shown:
        table = list(zip([label for label, _ in rows], *(cells for _, cells in shown), strict=True))
        headers = ("", *(header for header, _ in shown))
        print_table(out, headers, table, right=range(1, len(headers)), bold="ours")
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


def _ns(cost: CostEntry, cycles: int | None) -> float | None:
    return None if cycles is None or cost.cycle_ns is None else cycles * cost.cycle_ns


def _scaled(value: float | None, unit: float) -> str:
    return number(None if value is None else value / unit, ".4g")


def _legend(cost: CostEntry) -> Iterator[str]:
    yield "latency: cycles of one inference alone; interval: cycles from one to the next in a pipeline of layers"
    yield f"{_CYCLES[cost.cycle]}; only arrays, DACs and ADCs count"
    if cost.energy_pj is not None or cost.area_um2 is not None:
        yield "uJ: energy of one inference; mm2: area of the crossbars in use"
    if cost.critical_path:
        yield f"critical path: {counted(len(cost.critical_path), 'node')}, {_ends(cost.critical_path)}"
    if "cycles" in cost.missing:
        reasons = cost.missing["cycles"]
        more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        yield f"no cycles: {reasons[0]}{more}"
    for key, name in _FIGURES.items():
        keys = [item for item in cost.missing.get(key, ()) if not item.startswith("node ")]  # type: ignore[call-overload]
        if keys:
            yield f"no {name}: the chip does not give {', '.join(keys)}"
    time = (
        ""
        if cost.write_ns is None
        else f" in {_scaled(cost.write_ns, 1e3)} us, wordline by wordline, all crossbars at once"
    )
    yield f"programming: {counted(cost.write_cells, 'cell')}{time}"


def _ends(path: Sequence[str]) -> str:
    return path[0] if len(path) == 1 else f"from {path[0]} to {path[-1]}"
