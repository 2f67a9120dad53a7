"""Sizes and bits chosen together are never worse than sizes assigned after the bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judging import judge_parts

from raqu_onnx.hardware import Chip, CrossbarType
from raqu_onnx.search import Goal, search, types_after
from raqu_onnx.search.problem import Problem
from raqu_onnx.search.sensitivity import measure_sensitivity
from raqu_onnx.search.stages import LayerStage
from raqu_onnx.search.types_after import ORIGIN, chips_of_one_size, search_types_after

FILL = Goal(max_accuracy_drop=None, fit_chip=True)


def chip_of(*kinds: tuple[int, int, int | None], cell_bits: tuple[int, ...] = (2, 2, 2), sharing: str = "time") -> Chip:
    """A chip of types given by rows, columns and count."""
    types = tuple(
        CrossbarType(name=f"type{index}", rows=rows, cols=cols, cell_bits=bits, count=count)
        for index, ((rows, cols, count), bits) in enumerate(zip(kinds, cell_bits, strict=False))
    )
    return Chip.model_validate(
        {"schema_version": 1, "name": "sizes", "encoding": "offset", "sharing": sharing, "dac_bits": 1}
        | {"crossbars": types}
    )


SIZES = chip_of((16, 16, 4), (32, 16, 2))


def problem_on(chip: Chip, net: Any, data: Any, max_crossbars: int | None = None, **settings: Any) -> Problem:
    model, quantizer, dataset, chosen = judge_parts(net, data, **settings)
    return Problem(model, quantizer, chip, dataset, chosen, max_crossbars=max_crossbars)


def watched(problem: Problem) -> list[str]:
    """What the problem's progress is told."""
    told: list[str] = []
    problem.progress = lambda what, _done, _total: told.append(what)
    return told


def layers(problem: Problem) -> LayerStage:
    return LayerStage(problem, measure_sensitivity(problem))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_contains_the_one_that_does_not_see_the_sizes(small_net: Any, small_data: Any, seed: int) -> None:
    options = {"seed": seed, "evaluations": 6}
    together = problem_on(SIZES, small_net(), small_data(48), **options)
    told = watched(together)
    found = search(together, FILL)
    alone, crossbars = chips_of_one_size(SIZES)[0]
    assert (alone.crossbars[0].rows, crossbars) == (32, 4)
    after = search(
        problem_on(alone, small_net(), small_data(48), crossbars, **options),
        Goal(max_crossbars=crossbars, max_accuracy_drop=None),
    )
    fitting = [item for item in after.evaluations if together.crossbars(item.bits.weights) is not None]
    assert any(item.origin == "bayesian search" for item in fitting)
    assert found.chosen.score.loss <= min(item.score.loss for item in fitting)
    assert {item.bits for item in fitting} <= {item.bits for item in found.evaluations}
    # The crossbars do limit the bits, and all that was judged can be placed.
    assert ORIGIN in {item.origin for item in found.evaluations}
    assert found.chosen.bits.weights != (8, 8, 8)
    assert all(together.crossbars(item.bits.weights) == item.crossbars for item in found.evaluations)
    # Of the second search nothing is told as the best so far, which only what can be placed is.
    assert "Bayesian search, for one crossbar size" in told
    assert not any(what.startswith("best") and what.endswith("size") for what in told)


def test_the_better_candidate_is_taken(small_net: Any, small_data: Any) -> None:
    problem = problem_on(SIZES, small_net(), small_data(48), evaluations=1)
    worst = problem.evaluate(problem.settings.bits(3, 2, 8), "uniform 2 bits")
    better = search_types_after(problem, layers, worst)
    assert (better.origin, better in problem.evaluations) == (ORIGIN, True)
    assert better.score.loss < worst.score.loss
    again = problem_on(SIZES, small_net(), small_data(48), evaluations=1)
    assert search_types_after(again, layers, better) is better


@pytest.mark.parametrize(
    ("chip", "goal"),
    [
        (SIZES, Goal(max_crossbars=6, max_accuracy_drop=None)),
        (SIZES, Goal(max_accuracy_drop=50.0)),
        (SIZES, Goal(max_accuracy_drop=50.0, fit_chip=True)),
        (SIZES, Goal(max_accuracy_drop=None, fit_chip=True, max_average_bits=3.0)),
        (chip_of((32, 16, 4)), FILL),
    ],
)
def test_there_is_one_search_where_sizes_do_not_matter_or_more_is_asked_for(
    small_net: Any, small_data: Any, chip: Chip, goal: Goal
) -> None:
    problem = problem_on(chip, small_net(), small_data(48), evaluations=1)
    told = watched(problem)
    search(problem, goal)
    assert told
    assert not any("for one crossbar size" in what for what in told)


def test_another_size_is_tried_where_one_does_not_hold_the_model(small_net: Any, small_data: Any) -> None:
    """Kernels of 4 bits take two columns; the size that leaves no cell over has one."""
    chip = chip_of((64, 1, 7), (32, 16, 4))
    assert [(alone.crossbars[0].cols, count) for alone, count in chips_of_one_size(chip)] == [(1, 39), (16, 4)]
    problem = problem_on(chip, small_net(), small_data(48), evaluations=1, weight_bits=(4, 8))
    worst = problem.evaluate(problem.settings.bits(3, 4, 8), "uniform 4 bits")
    assert search_types_after(problem, layers, worst).origin == ORIGIN


def test_another_size_is_tried_where_crossbars_are_too_few(small_net: Any, small_data: Any) -> None:
    chip = chip_of((8, 8, 8), (16, 16, 3), sharing="exclusive")
    problem = problem_on(chip, small_net(), small_data(48), group=None, evaluations=1)
    needed = [(problem.on(*other).crossbars((2, 2, 2)), other[1]) for other in chips_of_one_size(chip)]
    assert needed == [(8, 5), (14, 20)]
    told = watched(problem)
    search(problem, FILL)
    assert "Bayesian search, for one crossbar size" in told


def test_sensitivities_are_those_of_the_other_chip(
    small_net: Any, small_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every layer has a large crossbar to itself narrow widths save nothing, and are not measured."""
    chip = chip_of((8, 8, 40), (64, 64, 1), sharing="exclusive")
    seen: list[Any] = []

    def noted(problem: Problem, prepare: Any, found: Any) -> Any:
        other = problem.on(*chips_of_one_size(problem.chip)[0])
        seen.append((other, prepare(other)))
        return found

    monkeypatch.setattr("raqu_onnx.search.driver.search_types_after", noted)
    search(problem_on(chip, small_net(), small_data(48), evaluations=0, group=None), FILL)
    ((other, stage),) = seen
    assert (stage._sensitivity.weights == measure_sensitivity(other).weights).all()
    assert stage._sensitivity.weights.any()


def test_no_second_search_is_begun_once_the_time_is_up(small_net: Any, small_data: Any) -> None:
    problem = problem_on(SIZES, small_net(), small_data(48))
    found = problem.evaluate(problem.settings.bits(3, 2, 8), "uniform 2 bits")
    problem.clock.seconds = 0.0

    def prepare(_: Problem) -> LayerStage:
        raise AssertionError("there is no time for it")

    assert search_types_after(problem, prepare, found) is found
    assert problem.clock.stopped


def test_the_second_search_ends_where_its_preparation_takes_the_time(
    small_net: Any, small_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_on(SIZES, small_net(), small_data(48))
    found = problem.evaluate(problem.settings.bits(3, 2, 8), "uniform 2 bits")
    monkeypatch.setattr(types_after, "best_within", lambda *_: pytest.fail("there is no time for it"))

    def prepare(other: Problem) -> Any:
        other.clock.seconds = 0.0
        return SimpleNamespace()

    assert search_types_after(problem, prepare, found) is found


SIDES = st.integers(1, 64)


@given(st.lists(st.tuples(SIDES, SIDES, st.integers(1, 50)), min_size=2, max_size=3))
def test_as_many_cells_as_whole_crossbars_of_one_size_can_have(kinds: list[tuple[int, int, int]]) -> None:
    chip = chip_of(*kinds)
    found = chips_of_one_size(chip)
    if len({kind[:2] for kind in kinds}) == 1:
        assert not found
        return
    cells = sum(rows * cols * count for rows, cols, count in kinds)
    left = []
    for alone, crossbars in found:
        (kind,) = alone.crossbars
        assert kind.count is None
        assert (alone.name, alone.encoding, alone.sharing) == (chip.name, chip.encoding, chip.sharing)
        left.append(cells - crossbars * kind.cells)
        assert 0 <= left[-1] < kind.cells
    assert left == sorted(left)
    assert sorted(alone.crossbars[0].name for alone, _ in found) == sorted(kind.name for kind in chip.crossbars)


@pytest.mark.parametrize(
    "chip",
    [
        chip_of((16, 16, 4)),
        chip_of((16, 16, 4), (32, 16, None)),
        chip_of((16, 16, 4), (16, 16, 2)),
        chip_of((16, 16, 4), (32, 16, 2), cell_bits=(1, 2)),
    ],
)
def test_one_size_any_number_or_mixed_cells_have_no_other_chip(chip: Chip) -> None:
    assert chips_of_one_size(chip) == []
