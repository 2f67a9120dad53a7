"""Types and bits chosen together are never worse than types assigned after the bits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judging import judge_parts

from raqu_onnx.hardware import Chip, CrossbarType
from raqu_onnx.search import Goal, SearchResult, search
from raqu_onnx.search.problem import Problem
from raqu_onnx.search.types_after import ORIGIN, of_one_type

FILL = Goal(max_accuracy_drop=None, fit_chip=True)


def chip_of(*kinds: tuple[int, int, int | None], cell_bits: tuple[int, ...] = (2, 2, 2)) -> Chip:
    """A chip of types given by rows, columns and count."""
    types = tuple(
        CrossbarType(name=f"type{index}", rows=rows, cols=cols, cell_bits=bits, count=count)
        for index, ((rows, cols, count), bits) in enumerate(zip(kinds, cell_bits, strict=False))
    )
    return Chip(schema_version=1, name="sizes", encoding="offset", sharing="time", dac_bits=1, crossbars=types)


def problem_on(chip: Chip, net: Any, data: Any, max_crossbars: int | None = None, **settings: Any) -> Problem:
    model, quantizer, dataset, chosen = judge_parts(net, data, **settings)
    return Problem(model, quantizer, chip, dataset, chosen, max_crossbars=max_crossbars)


def origins(result: SearchResult) -> set[str]:
    return {item.origin for item in result.evaluations}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_contains_the_one_that_does_not_see_the_types(small_net: Any, small_data: Any, seed: int) -> None:
    options = {"seed": seed, "evaluations": 6}
    chip = chip_of((16, 16, 4), (32, 16, 2))
    together = problem_on(chip, small_net(), small_data(48), **options)
    found = search(together, FILL)
    alone, crossbars = of_one_type(chip) or (chip, 0)
    assert (alone.crossbars[0].rows, crossbars) == (32, 4)
    after = search(
        problem_on(alone, small_net(), small_data(48), crossbars, **options),
        Goal(max_crossbars=crossbars, max_accuracy_drop=None),
    )
    fitting = [item for item in after.evaluations if together.crossbars(item.bits.weights) is not None]
    assert any(item.origin != "uniform 2 bits" for item in fitting)
    assert found.chosen.score.loss <= min(item.score.loss for item in fitting)
    assert {item.bits for item in fitting} <= {item.bits for item in found.evaluations}
    # The crossbars do limit the bits, and all that was judged can be placed.
    assert ORIGIN in origins(found)
    assert found.chosen.bits.weights != (8, 8, 8)
    assert all(together.crossbars(item.bits.weights) == item.crossbars for item in found.evaluations)


@pytest.mark.parametrize(
    ("chip", "goal"),
    [
        (chip_of((32, 16, 4)), FILL),
        (chip_of((16, 16, 4), (32, 16, 2)), Goal(max_crossbars=6, max_accuracy_drop=None)),
        (chip_of((16, 16, 4), (32, 16, 2)), Goal(max_accuracy_drop=50.0)),
        (chip_of((16, 16, 4), (32, 16, 2)), Goal(max_accuracy_drop=None, fit_chip=True, max_average_bits=3.0)),
        (chip_of((16, 16, 4), (32, 16, 2), cell_bits=(1, 2)), FILL),
    ],
)
def test_there_is_one_search_where_types_do_not_matter_or_more_is_asked_for(
    small_net: Any, small_data: Any, chip: Chip, goal: Goal
) -> None:
    assert ORIGIN not in origins(search(problem_on(chip, small_net(), small_data(48), evaluations=1), goal))


def test_a_type_that_holds_no_kernel_gives_no_other_search(small_net: Any, small_data: Any) -> None:
    """Kernels of 4 bits take two columns; the type that leaves no cell over has one."""
    chip = chip_of((64, 1, 9), (32, 16, 4))
    assert (of_one_type(chip) or (chip, 0))[0].crossbars[0].cols == 1
    found = search(problem_on(chip, small_net(), small_data(48), evaluations=1, weight_bits=(4, 8)), FILL)
    assert ORIGIN not in origins(found)
    assert found.chosen.crossbars <= 13


def test_no_time_is_left_for_another_search(small_net: Any, small_data: Any) -> None:
    problem = problem_on(chip_of((16, 16, 4), (32, 16, 2)), small_net(), small_data(48), evaluations=1)
    problem.clock.seconds = 0.0
    found = search(problem, FILL)
    assert found.timed_out
    assert ORIGIN not in origins(found)


SIDES = st.integers(1, 64)


@given(st.lists(st.tuples(SIDES, SIDES, st.integers(1, 50)), min_size=2, max_size=3))
def test_as_many_cells_as_whole_crossbars_of_one_type_can_have(kinds: list[tuple[int, int, int]]) -> None:
    chip = chip_of(*kinds)
    cells = sum(rows * cols * count for rows, cols, count in kinds)
    alone, crossbars = of_one_type(chip) or (chip, 0)
    (kind,) = alone.crossbars
    assert kind.count is None
    assert kind.name in {item.name for item in chip.crossbars}
    left = cells - crossbars * kind.cells
    assert 0 <= left < kind.cells
    assert left == min(cells % (rows * cols) for rows, cols, _ in kinds)
    assert (alone.name, alone.encoding, alone.sharing) == (chip.name, chip.encoding, chip.sharing)


@pytest.mark.parametrize("chip", [chip_of((16, 16, 4)), chip_of((16, 16, 4), (32, 16, None))])
def test_one_type_or_any_number_of_crossbars_has_no_other_chip(chip: Chip) -> None:
    assert of_one_type(chip) is None
