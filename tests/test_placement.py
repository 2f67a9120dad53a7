from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raqu_onnx.bounds import fewest_crossbars
from raqu_onnx.encodings import SignedEncoding
from raqu_onnx.errors import ChipError
from raqu_onnx.hardware import Chip, Sharing
from raqu_onnx.placement import DoesNotFitError, Placement, count_crossbars, geometries, place
from raqu_onnx.tiling import Matrix, column_order

SHARINGS = get_args(Sharing)


def chip_of(*crossbars: dict[str, Any], encoding: str = "offset", sharing: str = "exclusive", **more: Any) -> Chip:
    kinds = [{"name": f"t{index}", "cell_bits": 2, **kind} for index, kind in enumerate(crossbars)]
    return Chip.model_validate(
        {
            "schema_version": 1,
            "name": "test",
            "encoding": encoding,
            "sharing": sharing,
            "dac_bits": 1,
            "crossbars": kinds,
            **more,
        }
    )


def uniform(rows: int, kernels: int, bits: int, groups: int = 1) -> Matrix:
    return Matrix(groups, rows, np.full((groups, kernels), bits))


@st.composite
def chips(draw: st.DrawFn, *, counted: bool = True) -> Chip:
    encoding = draw(st.sampled_from(get_args(SignedEncoding)))
    more: dict[str, Any] = {"split_slices": draw(st.booleans())}
    if encoding == "offset" and draw(st.booleans()):
        more["offset_sum"] = "unit-column"
    if encoding == "differential-column" and draw(st.booleans()):
        more["polarity_arrays"] = "pair"
    kinds = [
        {
            "rows": draw(st.integers(2, 20)),
            "cols": draw(st.integers(2, 40)),
            "cell_bits": draw(st.integers(1, 4)),
            "count": draw(st.one_of(st.none(), st.integers(1, 25))) if counted else None,
        }
        for _ in range(draw(st.integers(1, 3)))
    ]
    return chip_of(*kinds, encoding=encoding, sharing=draw(st.sampled_from(SHARINGS)), **more)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Matrix]:
    matrices = {}
    for index in range(draw(st.integers(0, 4))):
        groups, kernels = draw(st.integers(1, 3)), draw(st.integers(1, 8))
        # A fill draws one width for most kernels: all dropped and all the same come up, mixed ones too.
        width = st.sampled_from([0, 2, 3, 4, 5, 6, 7, 8])
        size = groups * kernels
        bits = draw(st.one_of(st.lists(width, min_size=size, max_size=size), width.map(lambda b, n=size: [b] * n)))
        rows = draw(st.integers(0, 30))
        stored = draw(st.none() | st.lists(st.integers(0, rows), min_size=groups, max_size=groups))
        counts = None if stored is None else np.array(stored, np.int64)
        matrices[f"node{index}"] = Matrix(groups, rows, np.array(bits).reshape(groups, kernels), counts)
    return matrices


def fits_a_type(matrix: Matrix, chip: Chip) -> bool:
    """Whether some crossbar type can hold the widest kernel of the groups that are stored."""
    bits = {0, *matrix.bits[matrix.row_counts > 0].flat}
    for shape in geometries(chip):
        widest = max(shape.encoding.columns(int(b)) for b in bits)
        if shape.weight_rows and shape.weight_cols and (chip.split_slices or widest <= shape.weight_cols):
            return True
    return False


def assert_sound(placement: Placement) -> None:
    """Every invariant that a backend relies on, from the blocks alone."""
    chip, shapes = placement.chip, geometries(placement.chip)
    used = {
        (kind, slot): np.zeros((shapes[kind].rows, shapes[kind].cols), int)
        for kind, count in enumerate(placement.slots)
        for slot in range(count)
    }
    lines: dict[tuple[int, int], list[tuple[str, np.ndarray, np.ndarray]]] = {key: [] for key in used}
    covered: dict[tuple[str, int], np.ndarray] = {}
    weight_cells = 0
    for placed in placement.blocks:
        shape, block = shapes[placed.crossbar_type], placed.block
        assert placed.crossbar_type in placement.types_by_node[placed.node]
        assert 0 <= placed.row <= placed.row + block.height <= shape.rows
        assert 0 <= placed.col <= placed.col + block.width <= shape.cols
        cells = np.zeros((shape.rows, shape.cols), int)
        cells[placed.row : placed.row + block.height, placed.col : placed.col + block.width] = 1
        used[placed.crossbar_type, placed.crossbar] += cells
        lines[placed.crossbar_type, placed.crossbar].append((placed.node, cells.any(axis=1), cells.any(axis=0)))
        matrix = placement.matrices[placed.node]
        columns = int(column_order(matrix.bits[block.group], shape.encoding).starts[-1])
        held = covered.setdefault((placed.node, block.group), np.zeros((matrix.row_counts[block.group], columns), int))
        held[slice(*block.rows), slice(*block.columns)] += 1
        weight_cells += block.height * (block.width - shape.unit_column) * shape.encoding.arrays_per_placement
    for key, cells in used.items():
        assert cells.max() == 1, "blocks overlap, or a crossbar is empty"
        if placement.sharing != "time":
            assert sum(rows.astype(int) for _, rows, _ in lines[key]).max() == 1
            assert sum(cols.astype(int) for _, _, cols in lines[key]).max() == 1
        if placement.sharing == "exclusive":
            assert len({node for node, _, _ in lines[key]}) == 1
    assert all((held == 1).all() for held in covered.values())
    for name, matrix in placement.matrices.items():
        stored = {group for group, rows in enumerate(matrix.row_counts) if rows and matrix.bits[group].any()}
        assert {group for node, group in covered if node == name} == stored
    expected = sum(
        int(rows) * sum(shapes[placement.types_by_node[name][0]].encoding.cells_per_weight(int(b)) for b in bits)
        for name, matrix in placement.matrices.items()
        if name in placement.types_by_node
        for rows, bits in zip(matrix.row_counts, matrix.bits, strict=True)
    )
    assert placement.programmed_cells == weight_cells == expected
    physical = [
        slots * shape.encoding.arrays_per_placement for slots, shape in zip(placement.slots, shapes, strict=True)
    ]
    assert placement.crossbars_by_type == tuple(physical)
    assert placement.crossbars == sum(physical)
    assert placement.allocated_cells == sum(
        count * kind.cells for count, kind in zip(physical, chip.crossbars, strict=True)
    )
    assert 0 <= placement.bit_utilization <= 1
    assert 0 <= placement.cell_utilization <= 1
    assert placement.lower_bound <= placement.crossbars
    assert placement.lower_bound_cells <= placement.allocated_cells
    assert placement.gap >= 0


@given(matrices=models(), chip=chips())
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_placement_is_sound(matrices: dict[str, Matrix], chip: Chip) -> None:
    if not all(fits_a_type(matrix, chip) for matrix in matrices.values()):
        with pytest.raises(ChipError, match=r"^node\d: .*(wider than every crossbar|takes \d+ columns|cannot hold)"):
            place(matrices, chip)
        return
    free = place(matrices, chip, ignore_counts=True)
    assert_sound(free)
    limits = [math.inf if kind.count is None else kind.count for kind in chip.crossbars]
    try:
        placement = place(matrices, chip)
    except DoesNotFitError:
        assert any(used > limit for used, limit in zip(free.crossbars_by_type, limits, strict=True))
        return
    assert_sound(placement)
    assert all(used <= limit for used, limit in zip(placement.crossbars_by_type, limits, strict=True))


@given(matrices=models(), chip=chips(counted=False))
@settings(max_examples=60, deadline=None)
def test_one_node_alone(matrices: dict[str, Matrix], chip: Chip) -> None:
    """`count_crossbars` is `place` with that node only, on the type where it takes the fewest."""
    singles = [chip.model_copy(update={"crossbars": (kind,)}) for kind in chip.crossbars]
    for name, matrix in matrices.items():
        if fits_a_type(matrix, chip):
            for sharing in SHARINGS:
                alone = [
                    place({name: matrix}, one, sharing=sharing).crossbars for one in singles if fits_a_type(matrix, one)
                ]
                assert count_crossbars(matrix, chip, sharing) == min(alone)
        else:
            with pytest.raises(ChipError):
                count_crossbars(matrix, chip)


@given(matrices=models(), chip=chips(counted=False))
@settings(max_examples=40, deadline=None)
def test_same_input_gives_the_same_placement(matrices: dict[str, Matrix], chip: Chip) -> None:
    if all(fits_a_type(matrix, chip) for matrix in matrices.values()):
        assert place(matrices, chip).blocks == place(matrices, chip).blocks


@given(
    sizes=st.lists(st.tuples(st.integers(6, 15), st.integers(6, 15)), min_size=2, max_size=3),
    counts=st.lists(st.one_of(st.none(), st.integers(1, 4)), min_size=3, max_size=3),
    bits=st.integers(1, 4),
    matrices=models(),
)
@settings(max_examples=50, deadline=None)
def test_lower_bound_of_a_mixed_chip(
    sizes: list[tuple[int, int]], counts: list[int | None], bits: int, matrices: dict[str, Matrix]
) -> None:
    """With one cell width, trying every inventory finds the same number."""
    kinds = [{"rows": r, "cols": c, "cell_bits": bits, "count": n} for (r, c), n in zip(sizes, counts, strict=False)]
    chip = chip_of(*kinds)
    shapes, limits = geometries(chip), [kind.count for kind in chip.crossbars]
    cells = sum(matrix.cells(shapes[0].encoding) for matrix in matrices.values())
    most = [math.ceil(cells / shape.cells) for shape in shapes]
    ranges = [
        range((high if limit is None else min(high, limit)) + 1) for high, limit in zip(most, limits, strict=True)
    ]
    enough = [
        sum(picked)
        for picked in itertools.product(*ranges)
        if sum(count * shape.cells for count, shape in zip(picked, shapes, strict=True)) >= cells
    ]
    if enough:
        assert fewest_crossbars(list(matrices.values()), shapes, limits) == min(enough)
    else:
        with pytest.raises(DoesNotFitError, match=r"^the weights have more cells than the chip; use fewer bits"):
            fewest_crossbars(list(matrices.values()), shapes, limits)


def test_lower_bound_of_cells_that_differ_in_bits() -> None:
    # 8 bits: eight 1-bit cells, or two 4-bit cells. 1000 weights fill 4 crossbars of the second type, 16 of the first.
    chip = chip_of({"rows": 50, "cols": 10, "cell_bits": 1}, {"rows": 50, "cols": 10, "cell_bits": 4, "count": 3})
    # 750 weights go to the three with 4 bits, the other 250 (2000 cells) to four more.
    assert fewest_crossbars([uniform(100, 10, 8)], geometries(chip), [None, 3]) == 7
    assert fewest_crossbars([uniform(100, 10, 8)], geometries(chip), [None, None]) == 4


@pytest.mark.parametrize(
    ("sharing", "crossbars"),
    # Four blocks of 8 rows by 8 columns in 16 x 16 crossbars, of two nodes.
    [("exclusive", 2), ("diagonal", 2), ("time", 1)],
)
def test_sharing(sharing: Sharing, crossbars: int) -> None:
    chip = chip_of({"rows": 16, "cols": 16})
    nodes = {"a": uniform(8, 2, 8, groups=2), "b": uniform(8, 2, 8, groups=2)}
    assert place(nodes, chip, sharing=sharing).crossbars == crossbars


def test_only_nodes_apart_keep_a_crossbar_for_themselves() -> None:
    chip = chip_of({"rows": 16, "cols": 16})
    nodes = {"a": uniform(8, 2, 8), "b": uniform(8, 2, 8)}
    assert place(nodes, chip).crossbars == 2
    assert place(nodes, chip, sharing="diagonal").crossbars == 1


def test_pairs_of_arrays_count_twice() -> None:
    chip = chip_of({"rows": 16, "cols": 16, "count": 4}, encoding="differential-column", polarity_arrays="pair")
    # 7 magnitude bits in 2-bit cells: 4 columns in each of the two arrays.
    placement = place({"a": uniform(16, 4, 8), "b": uniform(16, 2, 8)}, chip)
    assert placement.slots == (2,)
    assert placement.crossbars_by_type == (4,)
    assert placement.programmed_cells == 16 * 6 * 8
    assert placement.allocated_cells == 4 * 16 * 16
    assert placement.cell_utilization == pytest.approx(0.75)
    assert placement.lower_bound == 4


def test_an_odd_array_of_a_pair_stays_unused() -> None:
    chip = chip_of({"rows": 16, "cols": 16, "count": 3}, encoding="differential-column", polarity_arrays="pair")
    assert place({"a": uniform(16, 4, 8)}, chip).crossbars == 2
    with pytest.raises(DoesNotFitError, match=r"has 3 crossbars, the model needs 4"):
        place({"a": uniform(16, 4, 8), "b": uniform(16, 4, 8)}, chip)


def test_unit_columns_take_room_and_are_not_counted_as_used() -> None:
    plain = chip_of({"rows": 16, "cols": 16})
    unit = chip_of({"rows": 16, "cols": 16}, offset_sum="unit-column")
    nodes = {"a": uniform(16, 4, 8)}
    assert place(nodes, plain).cell_utilization == 1
    assert place(nodes, unit).crossbars == 2
    assert place(nodes, unit).cell_utilization == 0.5


def test_a_wasted_bit_shows_in_the_bit_utilization() -> None:
    placement = place({"a": uniform(16, 8, 3)}, chip_of({"rows": 16, "cols": 16}))
    assert placement.cell_utilization == 1
    assert placement.bit_utilization == 0.75


def test_split_slices_fill_the_last_columns() -> None:
    # 5 kernels of 4 columns on 10 columns: two a crossbar, or all in two crossbars.
    nodes = {"a": uniform(16, 5, 8)}
    assert place(nodes, chip_of({"rows": 16, "cols": 10})).crossbars == 3
    assert place(nodes, chip_of({"rows": 16, "cols": 10}, split_slices=True)).crossbars == 2


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_model_of_dropped_kernels_takes_no_crossbar(sharing: Sharing) -> None:
    for chip in (chip_of({"rows": 8, "cols": 8}), chip_of({"rows": 8, "cols": 8}, {"rows": 4, "cols": 4, "count": 1})):
        placement = place({"a": uniform(9, 9, 0), "b": uniform(0, 9, 8)}, chip, sharing=sharing)
        assert placement.blocks == ()
        assert placement.crossbars == placement.lower_bound == placement.programmed_cells == 0
        assert placement.cell_utilization == placement.bit_utilization == 0
    assert count_crossbars(uniform(9, 9, 0), chip, sharing) == 0


def test_blocks_come_in_the_order_of_nodes() -> None:
    nodes = {name: uniform(rows, 4, 8) for name, rows in (("c", 3), ("a", 40), ("b", 20))}
    for chip in (chip_of({"rows": 16, "cols": 16}), chip_of({"rows": 16, "cols": 16}, {"rows": 8, "cols": 8})):
        names = [placed.node for placed in place(nodes, chip).blocks]
        assert list(dict.fromkeys(names)) == ["c", "a", "b"]
        rows = [placed.block.rows for placed in place(nodes, chip).blocks if placed.node == "a"]
        assert rows == sorted(rows)


def test_a_mixed_chip_gives_every_node_the_size_that_suits() -> None:
    chip = chip_of({"rows": 64, "cols": 64}, {"rows": 8, "cols": 8})
    placement = place({"large": uniform(64, 16, 8), "small": uniform(8, 2, 8)}, chip)
    assert placement.types_by_node == {"large": (0,), "small": (1,)}
    assert placement.crossbars_by_type == (1, 1)
    assert placement.cell_utilization == 1


def test_a_mixed_chip_goes_on_with_another_type_where_one_is_used_up() -> None:
    chip = chip_of({"rows": 8, "cols": 8, "count": 1}, {"rows": 16, "cols": 16, "count": 2})
    placement = place({name: uniform(8, 2, 8) for name in "abc"}, chip)
    assert placement.crossbars_by_type == (1, 2)
    with pytest.raises(
        DoesNotFitError,
        match=r"^chip test has too few crossbars \(t0: 1, t1: 2\) under exclusive sharing, "
        r"without limits the model takes t0: 4; use fewer bits or a larger chip$",
    ):
        place({name: uniform(8, 2, 8) for name in "abcd"}, chip)


def test_a_kernel_too_wide_for_one_type_goes_to_another() -> None:
    chip = chip_of({"rows": 8, "cols": 3}, {"rows": 64, "cols": 64})
    assert place({"a": uniform(8, 1, 8)}, chip).types_by_node == {"a": (1,)}
    assert count_crossbars(uniform(8, 1, 8), chip) == 1


def test_too_many_crossbars_needed() -> None:
    chip = chip_of({"rows": 16, "cols": 16, "count": 2})
    nodes = {"a": uniform(16, 10, 8)}
    with pytest.raises(
        DoesNotFitError,
        match=r"^chip test has 2 crossbars, the model needs 3 under exclusive sharing; "
        r"use fewer bits or a larger chip$",
    ):
        place(nodes, chip)
    beyond = place(nodes, chip, ignore_counts=True)
    assert beyond.crossbars == beyond.lower_bound == 3


def test_the_lower_bound_of_a_placement_beyond_a_mixed_chip() -> None:
    chip = chip_of({"rows": 8, "cols": 8, "count": 1}, {"rows": 16, "cols": 16, "count": 1})
    beyond = place({"a": uniform(64, 16, 8)}, chip, ignore_counts=True)
    assert beyond.crossbars == beyond.lower_bound == 16


def test_a_mixed_chip_takes_the_fewest_crossbars() -> None:
    chip = chip_of({"rows": 8, "cols": 8}, {"rows": 32, "cols": 32, "count": 2}, sharing="time")
    # Each node of 16 x 16 cells fills four small crossbars exactly, or a quarter of a large one.
    nodes = {f"n{index}": uniform(16, 4, 8) for index in range(8)}
    assert place(nodes, chip).crossbars_by_type == (0, 2)
    # When the large ones are full, the rest goes to the small ones.
    nodes["last"] = uniform(16, 4, 8)
    assert place(nodes, chip).crossbars_by_type == (4, 2)
    # Among equals, the fewest cells.
    assert place({"a": uniform(8, 2, 8)}, chip).crossbars_by_type == (1, 0)


def test_a_mixed_chip_cuts_blocks_for_the_size_that_is_left() -> None:
    chip = chip_of({"rows": 16, "cols": 16}, {"rows": 8, "cols": 8}, sharing="time")
    nodes = {"a": uniform(15, 1, 8), "b": uniform(5, 2, 8), "c": uniform(29, 6, 8)}
    placement = place(nodes, chip)
    # 60 + 40 + 696 cells: three large crossbars hold 768 of them.
    assert placement.crossbars_by_type == (3, 1)
    assert placement.allocated_cells == placement.lower_bound_cells == 3 * 256 + 64
    assert_sound(placement)


def test_blocks_of_one_node_lie_on_two_types() -> None:
    chip = chip_of({"rows": 16, "cols": 16}, {"rows": 8, "cols": 16})
    placement = place({"a": uniform(24, 4, 8)}, chip)
    assert placement.types_by_node == {"a": (0, 1)}
    assert placement.crossbars_by_type == (1, 1)
    assert_sound(placement)


def test_a_budget_of_crossbars_goes_before_cells() -> None:
    chip = chip_of({"rows": 16, "cols": 16}, {"rows": 8, "cols": 8}, sharing="exclusive")
    nodes = {"a": uniform(8, 6, 8)}
    assert place(nodes, chip).crossbars_by_type == (0, 3)
    for budget in (1, 2):
        assert place(nodes, chip, max_crossbars=budget).crossbars_by_type == (1, 1)
    assert place(nodes, chip, max_crossbars=3).crossbars_by_type == (0, 3)


def test_a_kernel_wider_than_every_type() -> None:
    with pytest.raises(
        ChipError, match=r"^a: one kernel takes 4 columns, a crossbar has 3 for weights; use fewer bits"
    ):
        place({"a": uniform(1, 1, 8)}, chip_of({"rows": 4, "cols": 3}))
    mixed = chip_of({"rows": 4, "cols": 3}, {"rows": 4, "cols": 2})
    with pytest.raises(ChipError, match=r"^a: one kernel is wider than every crossbar type of chip test$"):
        place({"a": uniform(1, 1, 8)}, mixed)
