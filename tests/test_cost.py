"""Cycles, energy, area and writes: tables worked by hand, and what must hold for any figures."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx.cli.costs import print_costs
from raqu_onnx.cost import (
    ArrayFigures,
    Regions,
    array_area_um2,
    cycle_kind,
    cycle_ns,
    figures_of,
    input_slices,
    missing_area,
    missing_energy,
    mvm_energy_pj,
    node_cycles,
    node_energy_pj,
    read_cycles,
    writes,
)
from raqu_onnx.hardware import Chip, CrossbarType, load_chip
from raqu_onnx.model_cost import Flow, ModelCost, placement_cost
from raqu_onnx.placement import place
from raqu_onnx.tiling import Matrix

#: Groups, rows K, kernels M, MVMs, activation bits.
LAYERS = {
    "conv7x7": (1, 98, 18, 256, 8),
    "conv3x3": (1, 144, 16, 1024, 8),
    "deep": (1, 576, 64, 64, 8),
    "depthwise": (14, 9, 1, 256, 8),
    "linear": (1, 120, 33, 1, 4),
}


def mnsim(encoding: str) -> Chip:
    """MNSIM's default chip with another encoding: 256x256 1-bit cells, 128 wordlines and 128 bitlines at once."""
    figures = load_chip("mnsim").model_dump()
    pair = "pair" if encoding == "differential-column" else "same"
    figures |= {"encoding": encoding, "polarity_arrays": pair, "adc_signed": encoding == "differential-row"}
    return Chip.model_validate(figures)


def cost(chip: Chip, names: tuple[str, ...] = tuple(LAYERS), weight_bits: int = 8) -> ModelCost:
    """The layers one after the other, placed as the chip shares crossbars."""
    matrices = {
        name: Matrix(groups, rows, np.full((groups, kernels), weight_bits))
        for name, (groups, rows, kernels, _, _) in LAYERS.items()
        if name in names
    }
    mvms: dict[str, int | None] = {name: LAYERS[name][3] for name in matrices}
    inputs: dict[str, int | None] = {name: LAYERS[name][4] for name in matrices}
    before = {later: (earlier,) for earlier, later in itertools.pairwise(names)}
    return placement_cost(place(matrices, chip), mvms, inputs, Flow(names, before))


# Cycles = MVMs x input slices (8 bits in 1-bit slices: 8; 4 bits: 4) x cycles of a read of the slowest crossbar,
# ceil(wordlines / 128) x ceil(bitlines / 128). Weights of 8 bits in 1-bit cells take
#   offset: 8 bitlines; differential-column: 7 in each array of a pair; differential-row: 7 on two wordlines.
#
# conv7x7, 98 rows, 18 kernels:
#   offset      98 x 144: 1 x 2 = 2    256 x 8 x 2 = 4096
#   column      98 x 126: 1 x 1 = 1    256 x 8 x 1 = 2048
#   row        196 x 126: 2 x 1 = 2    256 x 8 x 2 = 4096
# conv3x3, 144 rows, 16 kernels:
#   offset     144 x 128: 2 x 1 = 2    1024 x 8 x 2 = 16384
#   column     144 x 112: 2 x 1 = 2    the same
#   row        128 of 144 rows fit: 256 x 112: 2 x 1 = 2 (and 32 x 112 beside it in another crossbar: 1)
# deep, 576 rows, 64 kernels:
#   offset     256 x 256 (32 kernels): 2 x 2 = 4     64 x 8 x 4 = 2048
#   column     256 x 252 (36 kernels): 2 x 2 = 4     the same
#   row        128 rows: 256 x 252:    2 x 2 = 4     the same
# depthwise, 14 groups of 9 rows and 1 kernel, corner to corner in one crossbar:
#   offset     14 x 9 = 126 wordlines at once, 14 x 8 = 112 bitlines: 1    256 x 8 x 1 = 2048
#   column     126 wordlines, 98 bitlines:                            1    the same
#   row        14 x 18 = 252 wordlines: 7 groups at once (126), twice: 2   256 x 8 x 2 = 4096
# linear, 120 rows, 33 kernels, 4-bit inputs:
#   offset     120 x 256 (32 kernels; the last one in a crossbar of its own): 1 x 2 = 2    1 x 4 x 2 = 8
#   column     120 x 231: 1 x 2 = 2                                                        the same
#   row        240 x 231: 2 x 2 = 4                                                        1 x 4 x 4 = 16
BY_HAND = {
    "offset": (4096, 16384, 2048, 2048, 8),
    "differential-column": (2048, 16384, 2048, 2048, 8),
    "differential-row": (4096, 16384, 2048, 4096, 16),
}


@pytest.mark.parametrize("encoding", BY_HAND)
def test_cycles_of_five_layers_by_hand(encoding: str) -> None:
    chip = mnsim(encoding)
    found = cost(chip)
    expected = BY_HAND[encoding]
    assert tuple(found.cycles.values()) == expected
    total = found.total
    assert (total.cycle, total.cycle_ns) == ("column-turn", 14.16)  # DAC 3 + cell read 3.16 + ADC 8 ns
    assert total.latency_cycles == sum(expected) == total.pipeline_latency_cycles
    assert total.interval_cycles == max(expected) == 16384
    assert total.critical_path == tuple(LAYERS)


def test_isaac_reads_whole_arrays_in_one_cycle() -> None:
    # 128x128 arrays of 2-bit cells: 8-bit weights take 4 bitlines, and each region one more for the sum of inputs.
    # All wordlines are driven at once and a cycle of 100 ns converts all 128 bitlines, so that only MVMs and slices
    # count: 256 x 8, 1024 x 8, 64 x 8, 256 x 8, 1 x 4.
    found = cost(load_chip("isaac"))
    assert tuple(found.cycles.values()) == (2048, 8192, 512, 2048, 4)
    assert (found.total.cycle, found.total.cycle_ns) == ("array-read", 100.0)


def test_energy_and_area_of_isaac_by_hand() -> None:
    # conv3x3: 144 rows in blocks of 128 and 16 wordlines; 16 kernels x 4 bitlines + 1 unit column = 65 bitlines.
    # One input slice of one MVM:
    #   cells  30 pJ x (128 x 65 + 16 x 65) / (128 x 128) = 30 x 9360 / 16384 = 17.138671875 pJ
    #   ADCs   65 conversions in each of two arrays x 2 mW / 1.28 GS/s = 130 x 1.5625 = 203.125 pJ
    #   DACs   144 wordlines x 0.0039 mW x 100 ns = 56.16 pJ
    # One inference: 1024 MVMs x 8 slices.
    # Area of one array: 25 + 128 x 0.166 + 1 ADC x 1200 = 1246.248 um2, two are in use.
    found = cost(load_chip("isaac"), ("conv3x3",)).total
    assert found.energy_pj == pytest.approx((17.138671875 + 203.125 + 56.16) * 8192, rel=1e-12)
    assert found.area_um2 == pytest.approx(2 * 1246.248, rel=1e-12)
    assert found.write_cells == 144 * 65
    assert found.write_rows == 128
    assert found.write_ns is None
    assert found.missing == {
        "write_time": ("components.cell_write_ns",),
        "write_energy": ("components.cell_write_energy_pj",),
    }


def test_programming_of_mnsim_by_hand() -> None:
    # 10 ns for each wordline: 144 of them; the energy of a cell is not among its figures.
    found = cost(mnsim("offset"), ("conv3x3",)).total
    assert (found.write_cells, found.write_rows, found.write_ns) == (144 * 128, 144, 1440.0)
    assert found.write_energy_pj is None


def test_no_figure_is_guessed() -> None:
    found = cost(load_chip("generic")).total
    assert (found.cycle_ns, found.energy_pj, found.area_um2, found.write_ns) == (None,) * 4
    assert found.latency_cycles is not None
    assert found.missing == {
        "time": ("cycle_ns",),
        "energy": (
            "components.crossbar_read_energy_pj",
            "components.adc_energy_pj",
            "components.dac_power_mw",
            "cycle_ns",
        ),
        "area": (
            "components.crossbar_area_um2",
            "components.adc_area_um2",
            "components.dac_area_um2",
            "crossbars.main.columns_per_adc",
        ),
        "write_time": ("components.cell_write_ns",),
        "write_energy": ("components.cell_write_energy_pj",),
    }


def test_one_figure_does_not_serve_several_sizes() -> None:
    isaac = load_chip("isaac")
    small = isaac.crossbars[0].model_copy(update={"name": "small", "rows": 64})
    two = isaac.model_copy(update={"crossbars": (*isaac.crossbars, small)})
    assert missing_energy(isaac) == missing_area(isaac, [0]) == ()
    assert missing_energy(two) == ("components.crossbar_read_energy_pj of each crossbar type",)
    assert missing_area(two, [0]) == ("components.crossbar_area_um2 of each crossbar type",)


def test_a_chip_without_figures_has_no_energy_to_ask_for() -> None:
    chip, regions = load_chip("generic"), Regions.of([(0, 0, 0, 0, 0, 4, 4)])
    arrays = [figures_of(chip, chip.crossbars[0])]
    with pytest.raises(ValueError, match=r"generic lacks .*crossbar_read_energy_pj"):
        mvm_energy_pj(regions, chip, arrays)
    with pytest.raises(ValueError, match=r"generic lacks .*crossbar_area_um2"):
        array_area_um2(chip, chip.crossbars[0])


@pytest.mark.parametrize(("unknown", "reason"), [("mvms", "its MVMs are open"), ("input", "its input stays float")])
def test_open_shapes_and_float_inputs_have_no_cycles(unknown: str, reason: str) -> None:
    matrix = {"a": Matrix(1, 9, np.full((1, 4), 8)), "b": Matrix(1, 9, np.full((1, 4), 8))}
    mvms: dict[str, int | None] = {"a": 3, "b": None if unknown == "mvms" else 3}
    inputs: dict[str, int | None] = {"a": 8, "b": None if unknown == "input" else 8}
    found = placement_cost(place(matrix, load_chip("isaac")), mvms, inputs, Flow(("a", "b"), {"b": ("a",)}))
    assert found.cycles == {"a": 24, "b": None}
    total = found.total
    assert (total.latency_cycles, total.interval_cycles, total.pipeline_latency_cycles, total.energy_pj) == (None,) * 4
    assert total.missing["cycles"] == total.missing["energy"] == (f"node b: {reason}",)
    assert total.area_um2 is not None


def test_turns_of_shared_rows_and_columns_add_up() -> None:
    array = ArrayFigures(rows=64, cols=64, rows_active=64, adcs=None, turns=False)
    # Side by side they share rows and take two turns; corner to corner they need one.
    beside = Regions.of([(0, 0, 0, 0, 0, 16, 16), (0, 0, 1, 0, 0, 16, 16)])
    corner = Regions.of([(0, 0, 0, 0, 0, 16, 16), (0, 0, 0, 0, 16, 16, 16)])
    apart = Regions.of([(0, 0, 0, 0, 0, 16, 16), (0, 1, 1, 0, 0, 16, 16)])
    assert [read_cycles(item, [array]) for item in (beside, corner, apart)] == [2, 1, 1]


def test_wordlines_beyond_the_limit_wait() -> None:
    array = ArrayFigures(rows=64, cols=64, rows_active=16, adcs=8, turns=True)
    # In order: 8 + 8 wordlines at once read 16 bitlines in 2 turns; 40 wordlines take 3 x 2; 8 more 1.
    table = [(0, 0, 0, 0, 0, 8, 8), (0, 0, 0, 0, 8, 8, 8), (0, 0, 0, 0, 16, 40, 16), (0, 0, 0, 0, 56, 8, 8)]
    assert read_cycles(Regions.of(table), [array]) == 2 + 3 * 2 + 1


def test_rows_that_two_regions_share_are_written_once() -> None:
    regions = Regions.of(
        [(0, 0, 0, 0, 0, 10, 4), (0, 0, 1, 0, 4, 10, 4), (0, 0, 2, 0, 30, 2, 4), (0, 1, 0, 0, 0, 12, 1)]
    )
    found = writes(regions, load_chip("mnsim"))
    assert (found.cells, found.rows) == (40 + 40 + 8 + 12, 14 + 2)


def test_a_node_that_is_stored_nowhere_costs_nothing() -> None:
    nothing = Regions.of([])
    chip = load_chip("isaac")
    arrays = [figures_of(chip, chip.crossbars[0])]
    assert (nothing.copies, read_cycles(nothing, arrays), node_cycles(100, 0, 8, 0)) == (0, 0, 0)
    assert node_energy_pj(100, 8, nothing, chip, arrays) == 0.0
    assert writes(nothing, chip).rows == 0


def diagonal(rows_active: int | None) -> ModelCost:
    """Two independent nodes, corner to corner in one crossbar of 32 x 32 cells."""
    main = CrossbarType(name="main", rows=32, cols=32, cell_bits=2, rows_active=rows_active)
    chip = Chip(schema_version=1, name="t", encoding="offset", sharing="diagonal", dac_bits=1, crossbars=(main,))
    work = {name: Matrix(1, 16, np.full((1, 4), 8)) for name in ("a", "b")}
    placed = place(work, chip)
    assert placed.crossbars == 1
    return placement_cost(placed, dict.fromkeys(work, 10), dict.fromkeys(work, 8), Flow(("a", "b"), {}))


def test_nodes_wait_for_a_crossbar_that_cannot_drive_all_of_them() -> None:
    free, limited = diagonal(None).total, diagonal(16).total
    assert (free.latency_cycles, free.interval_cycles, free.critical_path) == (80, 80, ("a",))
    assert (limited.latency_cycles, limited.interval_cycles, limited.critical_path) == (160, 160, ("a", "b"))


def test_time_sharing_costs_cycles() -> None:
    # b lies beside a in the same rows, so that they take turns; each has a read of 1 cycle, 10 MVMs and 8 slices.
    main = CrossbarType(name="main", rows=16, cols=32, cell_bits=2)
    work = {name: Matrix(1, 16, np.full((1, 4), 8)) for name in ("a", "b")}
    chip = Chip(schema_version=1, name="t", encoding="offset", sharing="time", dac_bits=1, crossbars=(main,))
    mvms: dict[str, int | None] = dict.fromkeys(work, 10)
    inputs: dict[str, int | None] = dict.fromkeys(work, 8)
    shared = placement_cost(place(work, chip), mvms, inputs, Flow(("a", "b"), {})).total
    apart = placement_cost(place(work, chip, sharing="exclusive"), mvms, inputs, Flow(("a", "b"), {})).total
    assert (shared.latency_cycles, shared.interval_cycles) == (160, 160)
    assert (apart.latency_cycles, apart.interval_cycles) == (80, 80)


# ------------------------------------------------------------------------------------------------ for any figures

sizes = st.integers(1, 300)
region_tables = st.lists(
    st.tuples(st.just(0), st.integers(0, 2), st.integers(0, 2), st.just(0), st.just(0), sizes, sizes),
    min_size=1,
    max_size=8,
)


def array(**changes: Any) -> ArrayFigures:
    return replace(ArrayFigures(rows=300, cols=300, rows_active=300, adcs=300, turns=True), **changes)


@given(region_tables, sizes, sizes, sizes)
def test_fewer_adcs_are_never_faster(table: list[Any], few: int, many: int, rows_active: int) -> None:
    few, many = sorted((few, many))
    slow, fast = (read_cycles(Regions.of(table), [array(adcs=n, rows_active=rows_active)]) for n in (few, many))
    assert slow >= fast >= 1


@given(sizes, sizes, sizes, sizes)
def test_fewer_wordlines_at_once_are_never_faster(rows: int, cols: int, few: int, many: int) -> None:
    few, many = sorted((few, many))
    region = Regions.of([(0, 0, 0, 0, 0, rows, cols)])
    slow, fast = (read_cycles(region, [array(rows_active=n, adcs=64)]) for n in (few, many))
    assert slow >= fast >= 1


@given(region_tables, sizes, sizes)
def test_another_region_never_makes_a_read_faster(table: list[Any], rows_active: int, adcs: int) -> None:
    figures = array(rows_active=rows_active, adcs=adcs)
    assert read_cycles(Regions.of(table), [figures]) >= read_cycles(Regions.of(table[:-1]), [figures])


@given(st.integers(1, 10_000), st.integers(1, 64), st.integers(1, 8), st.integers(1, 100))
def test_replicas_divide_the_work(mvms: int, copies: int, slices: int, read: int) -> None:
    alone, shared = node_cycles(mvms, 1, slices, read), node_cycles(mvms, copies, slices, read)
    assert alone / copies <= shared <= alone
    assert node_cycles(mvms, copies + 1, slices, read) <= shared
    assert shared % (slices * read) == 0


@given(st.integers(2, 8), st.integers(1, 16))
def test_input_slices_hold_all_bits(activation_bits: int, dac_bits: int) -> None:
    slices = input_slices(activation_bits, dac_bits)
    assert (slices - 1) * dac_bits < activation_bits <= slices * dac_bits


@given(st.integers(1, 50), st.integers(1, 4))
def test_replicas_change_no_energy(mvms: int, copies: int) -> None:
    chip = load_chip("isaac")
    arrays = [figures_of(chip, chip.crossbars[0])]
    one = Regions.of([(0, 0, 0, 0, 0, 40, 30)])
    many = Regions.of([(0, copy, 0, copy, 0, 40, 30) for copy in range(copies)])
    first, second = (node_energy_pj(mvms, 8, item, chip, arrays) for item in (one, many))
    assert first == pytest.approx(second)


def test_what_a_cycle_is() -> None:
    assert (cycle_kind(load_chip("isaac")), cycle_ns(load_chip("isaac"))) == ("array-read", 100.0)
    assert (cycle_kind(load_chip("mnsim")), cycle_ns(load_chip("mnsim"))) == ("column-turn", 14.16)
    assert (cycle_kind(load_chip("prime")), cycle_ns(load_chip("prime"))) == ("array-read", None)


def test_a_figure_that_one_row_lacks_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    whole = cost(load_chip("isaac")).total
    part = whole.model_copy(update={"area_um2": None, "latency_cycles": None})
    print_costs([("some", part), ("ours", whole)])
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["some"][1] == lines["some"][2] == lines["some"][6] == "-"
    assert lines["ours"][1:5] == ["12804", "1280", "8192", "819.2"]


def test_no_column_without_a_figure(capsys: pytest.CaptureFixture[str]) -> None:
    print_costs([("ours", cost(load_chip("generic")).total)])
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split() == ["latency", "interval"]
    assert "no energy: the chip does not give components.crossbar_read_energy_pj, " in printed
    print_costs([])
    assert capsys.readouterr().out == ""
