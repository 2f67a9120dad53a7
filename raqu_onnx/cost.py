"""What a node costs on crossbars: cycles, energy, area and writes, as arithmetic on integers and a chip's figures.

Only what happens in and at the arrays counts: cells, DACs and ADCs. Digital units, buffers and the network between
crossbars are in none of these figures.

A cycle is what one input bit-slice takes in one array. On most chips that is a whole read, all turns of the columns at
their ADCs included (`Chip.cycle_ns`). On a chip that gives `column_turn_ns` it is one such turn, and a read takes as
many as its bitlines need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.hardware import Chip, CrossbarType

__all__ = [
    "ArrayFigures",
    "CycleKind",
    "Regions",
    "Writes",
    "array_area_um2",
    "cycle_kind",
    "cycle_ns",
    "figures_of",
    "input_slices",
    "missing_area",
    "missing_energy",
    "mvm_energy_pj",
    "node_cycles",
    "node_energy_pj",
    "read_cycles",
    "writes",
]

CycleKind = Literal["array-read", "column-turn"]


@dataclass(frozen=True)
class ArrayFigures:
    """What the formulas need of one crossbar type.

    Attributes:
        rows: Wordlines R.
        cols: Bitlines C.
        rows_active: Wordlines driven at once.
        adcs: ADCs of one array, None where unknown.
        turns: Bitlines take turns at the ADCs in cycles of their own; else one cycle reads all.
    """

    rows: int
    cols: int
    rows_active: int
    adcs: int | None
    turns: bool

    @property
    def is_limited(self) -> bool:
        """Not all wordlines are driven, or not all bitlines are read, in one cycle."""
        return self.turns or self.rows_active < self.rows

    def row_turns(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """`ceil(rows / rows_active)`: the first factor of MNSIM 2.0's `multiple_time`, see `read_cycles`."""
        return -(-rows // self.rows_active)

    def column_turns(self, cols: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cycles in which the ADCs read so many bitlines: `ceil(cols / adcs)`, or 1 where a cycle reads all."""
        return -(-cols // self.adcs) if self.turns and self.adcs is not None else np.ones_like(cols)


def figures_of(chip: Chip, crossbar: CrossbarType) -> ArrayFigures:
    """Figures of one of a chip's crossbar types; an array has `ceil(C / columns_per_adc)` ADCs."""
    shared = crossbar.columns_per_adc
    return ArrayFigures(
        rows=crossbar.rows,
        cols=crossbar.cols,
        rows_active=crossbar.rows_active or crossbar.rows,
        adcs=None if shared is None else -(-crossbar.cols // shared),
        turns=chip.column_turn_ns is not None,
    )


def cycle_kind(chip: Chip) -> CycleKind:
    """What a cycle of the chip is, see the module docstring."""
    return "array-read" if chip.column_turn_ns is None else "column-turn"


def cycle_ns(chip: Chip) -> float | None:
    """Length of a cycle in ns, None where the chip gives none."""
    return chip.cycle_ns if chip.column_turn_ns is None else chip.column_turn_ns


# ------------------------------------------------------------------------------------------------------------ latency


@dataclass(frozen=True)
class Regions:
    """The rectangles of cells that hold one node, as integer columns of shape (n,).

    Attributes:
        kind: Index of the crossbar type.
        crossbar: Number of the array among those of its type; an array of a pair has a number of its own.
        turn: Turn within one MVM; regions of one crossbar compute at once where the turn is the same.
        replica: Copy of the node that it belongs to.
        row: First wordline.
        rows: Wordlines.
        cols: Bitlines, unit columns included.
    """

    kind: NDArray[np.int64]
    crossbar: NDArray[np.int64]
    turn: NDArray[np.int64]
    replica: NDArray[np.int64]
    row: NDArray[np.int64]
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]

    @classmethod
    def of(cls, table: Sequence[tuple[int, int, int, int, int, int, int]]) -> Regions:
        """Regions from one tuple each, in the order of the attributes."""
        columns = np.array(table, np.int64).reshape(-1, 7).T
        return cls(*columns)

    @property
    def size(self) -> int:
        """Number of regions."""
        return int(self.kind.size)

    @property
    def copies(self) -> int:
        """Replicas of the node; 0 without any region."""
        return int(self.replica.max()) + 1 if self.size else 0


def input_slices(activation_bits: int, dac_bits: int) -> int:
    """Slices in which an input enters the array: `ceil(a / dac_bits)`.

    Source: ISAAC (ISCA 2016): a 16-bit input takes 16 cycles at 1-bit DACs; PRIME (ISCA 2016): a 6-bit
    input in two slices of 3 bits; `ceil(inprecision / DAC_precision)` in MNSIM 2.0's PE_latency.py.
    """
    return -(-activation_bits // dac_bits)


def read_cycles(regions: Regions, arrays: Sequence[ArrayFigures]) -> int:
    """Cycles in which all regions of a node are read once with one input bit-slice.

    One region takes `ceil(rows / rows_active) * ceil(cols / ADCs)`, as in `multiple_time` of MNSIM 2.0's
    PE_latency.py (the second factor is 1 where a cycle reads all columns). Derived here: regions of one crossbar in
    the same turn are read together as far as their wordlines may be driven at once, in their order; turns of a crossbar
    follow each other; crossbars work at the same time, so that the slowest one counts.

    Args:
        regions: The node's regions.
        arrays: Figures by crossbar type.

    Returns:
        Cycles, 0 for a node without regions.
    """
    slowest = 0
    busy: dict[tuple[int, int], int] = {}
    for kind, crossbar, members in _at_once(regions):
        taken = _together(regions.rows[members], regions.cols[members], arrays[kind])
        busy[kind, crossbar] = busy.get((kind, crossbar), 0) + taken
        slowest = max(slowest, busy[kind, crossbar])
    return slowest


def _together(rows: NDArray[np.int64], cols: NDArray[np.int64], array: ArrayFigures) -> int:
    """Cycles of regions of one crossbar that share neither rows nor columns, in the order given."""
    if int(rows.sum()) <= array.rows_active:
        return int(array.column_turns(cols.sum(keepdims=True))[0])
    alone = (array.row_turns(rows) * array.column_turns(cols)).tolist()
    cycles = driven = read = 0
    for height, width, own in zip(rows.tolist(), cols.tolist(), alone, strict=True):
        if driven + height > array.rows_active:
            cycles += int(array.column_turns(np.array([read]))[0]) if driven else 0
            driven = read = 0
        if height > array.rows_active:
            cycles += own
        else:
            driven, read = driven + height, read + width
    return cycles + (int(array.column_turns(np.array([read]))[0]) if driven else 0)


def _at_once(regions: Regions) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """Type, crossbar and indices of the regions that compute at once in one crossbar."""
    if not regions.size:
        return
    keys = np.stack([regions.kind, regions.crossbar, regions.turn])
    order = np.lexsort(keys[::-1])
    cuts = np.flatnonzero((np.diff(keys[:, order], axis=1) != 0).any(axis=0)) + 1
    for members in np.split(order, cuts):
        yield int(regions.kind[members[0]]), int(regions.crossbar[members[0]]), members


def node_cycles(mvms: int, copies: int, slices: int, cycles_per_read: int) -> int:
    """Cycles of one inference: `ceil(MVMs / replicas) * input slices * cycles of a read`.

    Source: ISAAC (ISCA 2016) replicates a layer's kernels so that several of its positions are computed at once and
    the pipeline is balanced; the product is derived here. A node that is stored nowhere takes none.
    """
    return -(-mvms // copies) * slices * cycles_per_read if copies else 0


# ------------------------------------------------------------------------------------------------------------- energy


def missing_energy(chip: Chip) -> tuple[str, ...]:
    """Keys of the figures that an energy needs and the chip does not give; empty when all are there."""
    parts = chip.components
    missing = _missing_of_arrays(chip, "crossbar_read_energy_pj")
    if _adc_energy_pj(chip) is None:
        missing.append("components.adc_energy_pj")
    if parts.dac_power_mw is None:
        missing.append("components.dac_power_mw")
    if cycle_ns(chip) is None:
        missing.append("cycle_ns")
    return tuple(missing)


def _missing_of_arrays(chip: Chip, key: str) -> list[str]:
    """A figure of a whole array, where it is absent; one figure says nothing about arrays of other sizes."""
    sizes = {(kind.rows, kind.cols, kind.cell_bits) for kind in chip.crossbars}
    if len(sizes) > 1:
        return [f"components.{key} of each crossbar type"]
    return [] if getattr(chip.components, key) is not None else [f"components.{key}"]


def _adc_energy_pj(chip: Chip) -> float | None:
    """One conversion: given, or power over rate (mW / GS/s = pJ), as MNSIM 2.0's ADC.py takes power times latency."""
    parts = chip.components
    if parts.adc_energy_pj is not None:
        return parts.adc_energy_pj
    if parts.adc_power_mw is None or parts.adc_rate_gsps is None:
        return None
    return parts.adc_power_mw / parts.adc_rate_gsps


def mvm_energy_pj(regions: Regions, chip: Chip, arrays: Sequence[ArrayFigures]) -> NDArray[np.float64]:
    """Energy of each region for one input bit-slice of one MVM, in pJ.

    - cells: a whole array's read energy times the share `rows * cols / (R * C)` that is read, as `xbar_read_power` of
      a 1T1R array in MNSIM 2.0's Crossbar.py (simulation level 0);
    - ADCs: one conversion for each bitline and row turn (ISAAC, ISCA 2016: every column is converted in every cycle);
    - DACs: power of one wordline's DAC times the time that it drives: the cycles of one read of its columns (derived
      here from MNSIM 2.0's DAC.py, energy = power times latency).

    Needs `missing_energy` to be empty. Returns shape (n,).
    """
    parts, cycle, conversion = chip.components, cycle_ns(chip), _adc_energy_pj(chip)
    read, driver = parts.crossbar_read_energy_pj, parts.dac_power_mw
    if cycle is None or conversion is None or read is None or driver is None:
        raise ValueError(f"chip {chip.name} lacks {', '.join(missing_energy(chip))}")
    energy = np.zeros(regions.size)
    for index in np.unique(regions.kind).tolist():
        chosen, array = regions.kind == index, arrays[index]
        rows, cols = regions.rows[chosen], regions.cols[chosen]
        cells = read * (rows * cols) / (array.rows * array.cols)
        conversions = array.row_turns(rows) * cols * conversion
        energy[chosen] = cells + conversions + rows * driver * array.column_turns(cols) * cycle
    return energy


def node_energy_pj(mvms: int, slices: int, regions: Regions, chip: Chip, arrays: Sequence[ArrayFigures]) -> float:
    """Energy of one inference in pJ: every MVM runs once, on one of the replicas, which take them in turn."""
    copies = regions.copies
    if not copies:
        return 0.0
    share = mvms // copies + (np.arange(copies) < mvms % copies)
    return float((mvm_energy_pj(regions, chip, arrays) * share[regions.replica]).sum() * slices)


# --------------------------------------------------------------------------------------------------------------- area


def missing_area(chip: Chip, used: Sequence[int]) -> tuple[str, ...]:
    """Keys of the figures that an area needs and the chip does not give.

    Args:
        chip: The chip.
        used: Indices of the crossbar types in use.
    """
    missing = _missing_of_arrays(chip, "crossbar_area_um2")
    missing += [f"components.{k}" for k in ("adc_area_um2", "dac_area_um2") if getattr(chip.components, k) is None]
    kinds = [chip.crossbars[index] for index in used]
    missing += [f"crossbars.{kind.name}.columns_per_adc" for kind in kinds if kind.columns_per_adc is None]
    return tuple(missing)


def array_area_um2(chip: Chip, crossbar: CrossbarType) -> float:
    """Area of one array with its converters in um^2: cells, one DAC for each wordline driven at once, and the ADCs.

    Source: the sum over components of ISAAC's (ISCA 2016) area table; the number of DACs and ADCs as `PE_DAC_num` and
    `PE_ADC_num` in MNSIM 2.0's PE.py. Needs `missing_area` to be empty.
    """
    parts, figures = chip.components, figures_of(chip, crossbar)
    cells, dac, adc = parts.crossbar_area_um2, parts.dac_area_um2, parts.adc_area_um2
    if cells is None or dac is None or adc is None or figures.adcs is None:
        raise ValueError(f"chip {chip.name} lacks {', '.join(missing_area(chip, range(len(chip.crossbars))))}")
    return cells + figures.rows_active * dac + figures.adcs * adc


# ------------------------------------------------------------------------------------------------------------- writes


@dataclass(frozen=True)
class Writes:
    """Programming a chip once.

    Attributes:
        cells: Cells written, unit columns included.
        rows: Wordlines written in the array that has most of them.
        time_ns: Time of all, None where the chip gives no `cell_write_ns`.
        energy_pj: Energy of all, None where the chip gives no `cell_write_energy_pj`.
    """

    cells: int
    rows: int
    time_ns: float | None
    energy_pj: float | None


def writes(regions: Regions, chip: Chip) -> Writes:
    """Cost of programming regions once.

    Time: wordline by wordline, the cells of one at once, all arrays at the same time. The first part is
    `calculate_xbar_write_latency` of MNSIM 2.0's Crossbar.py, `write latency * rows`; that arrays do not wait for each
    other is assumed here. Energy: cells times the energy of one. Repeated pulses of program-and-verify are not in it
    unless the chip's figures contain them.
    """
    cells = int((regions.rows * regions.cols).sum())
    rows = _most_rows(regions)
    each_ns, each_pj = chip.components.cell_write_ns, chip.components.cell_write_energy_pj
    return Writes(
        cells, rows, None if each_ns is None else rows * each_ns, None if each_pj is None else cells * each_pj
    )


def _most_rows(regions: Regions) -> int:
    """Wordlines that hold cells, in the array with most of them."""
    order = np.lexsort((regions.row, regions.crossbar, regions.kind))
    most = count = end = 0
    array: tuple[int, int] | None = None
    for index in order.tolist():
        here = int(regions.kind[index]), int(regions.crossbar[index])
        if here != array:
            array, count, end = here, 0, 0
        first, last = int(regions.row[index]), int(regions.row[index] + regions.rows[index])
        count += max(0, last - max(first, end))
        end = max(end, last)
        most = max(most, count)
    return most
