from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx import exact_placement
from raqu_onnx.hardware import Chip, Sharing
from raqu_onnx.partitioning import place_in_parts
from raqu_onnx.placement import Placement, place
from raqu_onnx.tiling import Matrix


def chip_of(*sizes: tuple[int, int], sharing: Sharing, counts: tuple[int | None, ...] = ()) -> Chip:
    kinds = [
        {"name": f"t{i}", "rows": rows, "cols": cols, "cell_bits": 8, "count": counts[i] if counts else None}
        for i, (rows, cols) in enumerate(sizes)
    ]
    values = {"schema_version": 1, "name": "test", "encoding": "offset", "sharing": sharing, "dac_bits": 1}
    return Chip.model_validate({**values, "crossbars": kinds})


def nodes_of(*sizes: tuple[int, int]) -> dict[str, Matrix]:
    """Nodes of so many rows and columns: a kernel of 8 bits takes one cell."""
    return {f"n{i}": Matrix(1, rows, np.full((1, cols), 8)) for i, (rows, cols) in enumerate(sizes)}


def fewest_on_the_diagonal(sizes: list[tuple[int, int]], rows: int, cols: int) -> int:
    """Every way to share blocks among crossbars, tried."""
    for count in itertools.count(1):
        for owners in itertools.product(range(count), repeat=len(sizes)):
            sums = np.zeros((count, 2), int)
            for owner, size in zip(owners, sizes, strict=True):
                sums[owner] += size
            if (sums <= (rows, cols)).all():
                return count
    raise AssertionError


def overlaps(placement: Placement) -> int:
    """Cells that blocks share, or that lie outside of their crossbars."""
    cells: dict[tuple[int, int], np.ndarray] = {}
    outside = 0
    for placed in placement.blocks:
        shape, block = placement.geometries[placed.crossbar_type], placed.block
        array = cells.setdefault((placed.crossbar_type, placed.crossbar), np.zeros((shape.rows, shape.cols), int))
        part = array[placed.row : placed.row + block.height, placed.col : placed.col + block.width]
        outside += block.height * block.width - part.size
        part += 1
    return outside + sum(int((array > 1).sum()) for array in cells.values())


def stored(placement: Placement) -> int:
    return sum(placed.block.height * placed.block.width for placed in placement.blocks)


@given(sizes=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_diagonal_is_optimal(sizes: list[tuple[int, int]]) -> None:
    placement = place(nodes_of(*sizes), chip_of((8, 8), sharing="diagonal"), method="exact")
    assert placement.crossbars == fewest_on_the_diagonal(sizes, 8, 8)


def test_exact_is_better_where_best_fit_fails() -> None:
    # Sums of 6 + 4, 5 + 3 + 2 and so on fill three crossbars; by falling size, a fourth is opened.
    sizes = [(n, 1) for n in (6, 5, 5, 4, 4, 2, 2, 2)]
    chip = chip_of((10, 10), sharing="diagonal")
    fast, exact = (place(nodes_of(*sizes), chip, method=method) for method in ("fast", "exact"))
    assert exact.crossbars == exact.lower_bound == 3
    assert fast.crossbars >= exact.crossbars


@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6),
    arrays=st.sampled_from([((6, 6),), ((6, 6), (3, 6)), ((5, 8), (8, 5), (3, 3))]),
    sharing=st.sampled_from(["exclusive", "diagonal", "time"]),
    limited=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_exact_is_sound_and_never_worse(
    sizes: list[tuple[int, int]], arrays: tuple[tuple[int, int], ...], sharing: Sharing, limited: bool
) -> None:
    nodes, free = nodes_of(*sizes), chip_of(*arrays, sharing=sharing)
    fast = place(nodes, free)
    counts = tuple(max(1, count) for count in fast.crossbars_by_type) if limited else ()
    chip = chip_of(*arrays, sharing=sharing, counts=counts)
    exact = place(nodes, chip, method="exact")
    assert exact.lower_bound_cells <= exact.allocated_cells <= fast.allocated_cells
    assert overlaps(exact) == 0
    assert stored(exact) == stored(fast) == sum(rows * cols for rows, cols in sizes)
    if counts:
        assert all(used <= count for used, count in zip(exact.crossbars_by_type, counts, strict=True))
    assert exact == place(nodes, chip, method="exact")


def test_shelves_of_one_block_each_start_at_the_left() -> None:
    chip = chip_of((5, 8), (8, 5), (3, 3), sharing="time")
    placement = place(nodes_of((1, 1), (1, 1), (1, 12), (4, 11), (8, 9)), chip, method="exact")
    assert overlaps(placement) == 0


def test_too_many_patterns_leave_the_fast_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(n, 1) for n in (6, 5, 5, 4, 4, 2, 2, 2)]
    chip = chip_of((10, 10), sharing="diagonal")
    monkeypatch.setattr(exact_placement, "_MOST_PATTERNS", 2)
    assert place(nodes_of(*sizes), chip, method="exact") == place(nodes_of(*sizes), chip)


def test_a_budget_of_crossbars_holds_for_the_exact_placement() -> None:
    chip = chip_of((6, 6), (3, 6), sharing="diagonal")
    nodes: Any = nodes_of((7, 5), (4, 4), (9, 2))
    free = place(nodes, chip, method="exact")
    within = place(nodes, chip, method="exact", max_crossbars=free.crossbars)
    assert within.crossbars <= free.crossbars
    assert within.allocated_cells <= place(nodes, chip, max_crossbars=free.crossbars).allocated_cells


def test_what_is_proven_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(n, 1) for n in (6, 5, 5, 4, 4, 2, 2, 2)]
    chip = chip_of((10, 10), sharing="diagonal")
    assert place(nodes_of(*sizes), chip).exact is None
    # Three crossbars are the lower bound; where it cannot be met, the program's end is the proof.
    assert place(nodes_of(*sizes), chip, method="exact").exact == "at-bound"
    apart = nodes_of((6, 6), (6, 6), (5, 5))
    assert place(apart, chip, method="exact").exact == "optimal"
    monkeypatch.setattr(exact_placement, "_MOST_PATTERNS", 0)
    assert place(apart, chip, method="exact").exact == "too-many-patterns"


def test_a_program_that_ends_at_its_limit_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = chip_of((10, 10), sharing="diagonal")
    apart = nodes_of((6, 6), (6, 6), (5, 5))
    monkeypatch.setattr("scipy.optimize.milp", lambda *_, **__: SimpleNamespace(x=None, status=1))
    found = place(apart, chip, method="exact")
    assert found.exact == "limit"
    assert found == place(apart, chip)


def test_a_whole_is_proven_as_far_as_its_weakest_part() -> None:
    assert exact_placement.weakest(["optimal", "at-bound"]) == "optimal"
    assert exact_placement.weakest(["limit", "optimal-in-shelves", "optimal"]) == "limit"
    nodes, chip = nodes_of((6, 6), (6, 6), (5, 5)), chip_of((10, 10), sharing="diagonal", counts=(2,))
    parts = place_in_parts(nodes, chip, list(nodes), "auto", method="exact")
    assert parts.exact == "at-bound"


@pytest.mark.parametrize("more", [(), ("--partitions", "auto")])
def test_the_method_leaves_a_trace(cli: Any, workspace: Any, more: tuple[str, ...]) -> None:
    run = ("optimize", "model.onnx", "--calibration", "calibration.npz", "--weight-bits", "4", "-o", "out", "--force")
    assert workspace.is_dir()
    assert "exact placement" not in cli(*run, "--hw", "chip.toml").out
    ran = cli(*run, "--hw", "chip.toml", "--placement", "exact", *more)
    lines = [line for line in ran.out.splitlines() if "; exact placement: " in line]
    assert [line.partition(":")[0] for line in lines] == ["lower bound for these bits"]
    said = lines[0].partition("; exact placement: ")[2]
    assert said.startswith(("proven optimal", "not proven"))
    shown = cli("manifest", "show", "out").out
    assert f"; exact placement: {said}\n" in shown
    assert cli("validate", "out").code == 0
