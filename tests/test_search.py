"""The search for widths, over made-up losses that cost nothing to judge."""

from __future__ import annotations

import itertools
import math
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.evaluation import Score
from raqu_onnx.native_output import no_native_output
from raqu_onnx.placement import DoesNotFitError
from raqu_onnx.search import Bits, Evaluation, Goal, SearchSettings, pareto_front, points_below, search
from raqu_onnx.search.allocation import cheapest_loss, fit_to_budget, solve_integer_program, useful_widths
from raqu_onnx.search.budget import Budget, Cost
from raqu_onnx.search.run import Clock
from raqu_onnx.search.sensitivity import measure_sensitivity

CELLS_PER_CROSSBAR = 64


class FakeProblem:
    """A chip whose crossbars are filled cell by cell, and a loss with an interaction that no additive table sees."""

    def __init__(self, sizes: list[int], sensitivities: list[float], **options: Any) -> None:
        # Widths of whole nodes; those of kernels need a real model.
        self.settings = SearchSettings(group=None, **options)
        self.nodes = [SimpleNamespace(name=f"n{i}", mvms=1, weights=sizes[i]) for i in range(len(sizes))]
        self.names = tuple(node.name for node in self.nodes)
        kind = SimpleNamespace(rows=8, cols=8, count=None)
        self.chip = SimpleNamespace(
            name="fake", sharing="time", crossbars=(kind,), dac_bits=1, cycle_ns=10.0, column_turn_ns=None
        )
        self.sizes = sizes
        self.sensitivities = sensitivities
        self.reference = Score(1000, top1=1.0, agreement=1.0, kl=0.0)
        self.evaluations: list[Evaluation] = []
        self.scored: list[Bits] = []
        self.glanced: list[float] = []
        self.glances_first = True
        self.clock = Clock()
        self.in_parts = None
        self.cell_cost = np.full((len(sizes), 9), np.inf)
        for node, size in enumerate(sizes):
            for bits in range(self.settings.weight_bits[0], 9):
                self.cell_cost[node, bits] = size * -(-bits // 2)

    def progress(self, what: str, done: int, total: int) -> None:
        assert what
        assert 0 <= done <= total

    def cost(self, weights: tuple[int, ...]) -> float:
        return float(sum(self.cell_cost[i, b] for i, b in enumerate(weights)))

    def crossbars(self, weights: tuple[int, ...]) -> int | None:
        cells = sum(size * -(-bits // 2) for size, bits in zip(self.sizes, weights, strict=True))
        return -(-cells // CELLS_PER_CROSSBAR)

    def measure(self, bits: Bits) -> Cost:
        """Ten cycles an input slice and node; energy of every cell and slice."""
        slices = bits.activations or (8,) * len(self.sizes)
        columns = [size * -(-width // 2) for size, width in zip(self.sizes, bits.weights, strict=True)]
        cycles = 10 * sum(slices)
        mean = sum(s * w for s, w in zip(self.sizes, bits.weights, strict=True)) / sum(self.sizes)
        energy = float(sum(c * s for c, s in zip(columns, slices, strict=True)))
        return Cost(self.crossbars(bits.weights) or 0, mean, cycles, 10.0 * cycles, energy)

    def costs_of_nodes(self, bits: Bits) -> Any:
        slices = bits.activations or (8,) * len(self.sizes)
        columns = [size * -(-width // 2) for size, width in zip(self.sizes, bits.weights, strict=True)]
        energy = {n: float(c * s) for n, c, s in zip(self.names, columns, slices, strict=True)}
        return SimpleNamespace(cycles={n: 10 * s for n, s in zip(self.names, slices, strict=True)}, energy_pj=energy)

    def packed_crossbars(self, weights: tuple[int, ...]) -> int:
        return self.crossbars(weights) or 0

    def exclusive_crossbars(self, weights: tuple[int, ...]) -> int:
        return sum(
            -(-size * -(-bits // 2) // CELLS_PER_CROSSBAR) for size, bits in zip(self.sizes, weights, strict=True)
        )

    def loss(self, bits: Bits) -> float:
        single = sum(s * 4.0**-w for s, w in zip(self.sensitivities, bits.weights, strict=True))
        neighbours = sum(
            2.0 ** -(a + b) for a, b in itertools.pairwise(bits.weights)
        )  # two narrow neighbours hurt more than the sum of both
        inputs = sum(4.0**-a for a in bits.activations or ())
        return single + 0.2 * neighbours + 0.05 * inputs

    def score(self, bits: Bits) -> Score:
        loss = self.loss(bits)
        return Score(1000, top1=max(0.0, 1 - loss / 4), agreement=1 - loss / 4, kl=loss)

    def quick_many(self, candidates: list[Bits], what: str) -> list[float]:
        self.progress(what, len(candidates), len(candidates))
        return [self.quick_fidelity(bits) for bits in candidates]

    def quick_fidelity(self, bits: Bits) -> float:
        return self.loss(bits)

    def judge_ahead(self, candidates: list[Bits], what: str) -> None:
        assert all(isinstance(bits, Bits) for bits in candidates)
        assert what

    def glances(self, candidates: list[Bits], most: float = math.inf) -> list[float]:  # noqa: ARG002
        self.glanced += [self.score(bits).loss for bits in candidates]
        return self.glanced[len(self.glanced) - len(candidates) :]

    def evaluate_many(self, candidates: list[Bits], origin: str) -> list[Evaluation]:
        return [self.evaluate(bits, origin) for bits in candidates]

    def evaluate(self, bits: Bits, origin: str) -> Evaluation:
        found = Evaluation(bits, self.crossbars(bits.weights) or 0, self.score(bits), origin, self.measure(bits))
        if bits not in self.scored:
            self.scored.append(bits)
            self.evaluations.append(found)
        return found


def problem(**options: Any) -> FakeProblem:
    return FakeProblem([40, 200, 90, 300, 16, 120], [3.0, 0.2, 1.0, 0.1, 4.0, 0.5], **options)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_integer_program_is_exact(data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, 4))
    widths = range(2, data.draw(st.integers(3, 5)) + 1)
    numbers = st.floats(0, 10, allow_nan=False, width=32)
    loss = np.array([[data.draw(numbers) for _ in range(widths.stop)] for _ in range(nodes)])
    cost = np.array([[data.draw(st.integers(1, 20)) for _ in range(widths.stop)] for _ in range(nodes)], float)
    budget = float(data.draw(st.integers(1, 40)))
    found = cheapest_loss(loss, [(cost, budget)], widths)
    rows = np.arange(nodes)
    fitting = [c for c in itertools.product(widths, repeat=nodes) if cost[rows, list(c)].sum() <= budget]
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert cost[rows, list(found)].sum() <= budget + 1e-6
    best = min(loss[rows, list(c)].sum() for c in fitting)
    assert loss[rows, list(found)].sum() == pytest.approx(best, rel=1e-4, abs=1e-5)


def test_an_impossible_width_is_never_chosen() -> None:
    loss = np.array([[0, 0, 5.0, 1.0]])
    cost = np.array([[np.inf, np.inf, 3.0, np.inf]])
    assert cheapest_loss(loss, [(cost, 10.0)], range(2, 4)) == (2,)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 8), min_size=6, max_size=6), st.integers(13, 50))
def test_repair_fits_the_budget_and_leaves_no_room(widths: list[int], crossbars: int) -> None:
    fake = problem()
    loss = np.array([[s * 4.0**-b for b in range(9)] for s in fake.sensitivities])
    found = fit_to_budget(fake, tuple(widths), loss, Budget(crossbars))  # type: ignore[arg-type]
    if found is None:
        assert (fake.crossbars((2,) * 6) or 0) > crossbars
        return
    assert (fake.crossbars(found) or 0) <= crossbars
    for node in range(6):
        wider = (*found[:node], found[node] + 1, *found[node + 1 :])
        assert found[node] == 8 or (fake.crossbars(wider) or 0) > crossbars


def test_the_integer_program_fits_real_crossbars() -> None:
    fake = problem()
    table = measure_sensitivity(fake).weights  # type: ignore[arg-type]
    for crossbars in (13, 20, 30):
        found = solve_integer_program(fake, table, Budget(crossbars))  # type: ignore[arg-type]
        assert found is not None
        assert (fake.crossbars(found) or 99) <= crossbars


def test_sensitivity_falls_with_the_width() -> None:
    fake = problem(activation_bits=(4, 8))
    table = measure_sensitivity(fake)  # type: ignore[arg-type]
    assert (np.diff(table.weights[:, 2:], axis=1) <= 0).all()
    assert table.activations is not None
    assert (table.activations[:, 8] == 0).all()
    assert (table.activations[:, 4] > 0).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_search_within_crossbars_beats_the_integer_program(seed: int) -> None:
    fake = problem(evaluations=25, seed=seed)
    result = search(fake, Goal(max_crossbars=16, max_accuracy_drop=None))  # type: ignore[arg-type]
    assert result.chosen.crossbars <= 16
    assert result.goal_met
    program = [e for e in fake.evaluations if e.origin == "integer program"]
    assert result.chosen.score.loss <= min(e.score.loss for e in program)
    assert result.best_uniform is not None
    assert result.chosen.score.loss < result.best_uniform.score.loss


def test_no_candidate_is_judged_twice_and_all_fit() -> None:
    fake = problem(evaluations=30)
    result = search(fake, Goal(max_crossbars=20, max_accuracy_drop=None))  # type: ignore[arg-type]
    assert len(set(fake.scored)) == len(fake.scored) == len(result.evaluations)
    assert all(e.crossbars <= 20 for e in result.evaluations if e.origin == "bayesian search")
    assert sum(e.origin == "bayesian search" for e in result.evaluations) <= 30


def test_the_same_seed_gives_the_same_search() -> None:
    goal = Goal(max_crossbars=18, max_accuracy_drop=None)
    runs = [search(problem(evaluations=12, seed=5), goal) for _ in range(2)]  # type: ignore[arg-type]
    assert runs[0].evaluations == runs[1].evaluations


def test_fewest_crossbars_within_an_allowed_drop() -> None:
    fake = problem(evaluations=20)
    goal = Goal(None, max_accuracy_drop=0.4)
    result = search(fake, goal)  # type: ignore[arg-type]
    assert result.goal_met
    assert points_below(fake.reference, result.chosen.score) <= 0.4
    assert result.best_uniform is not None
    assert result.chosen.crossbars < result.best_uniform.packed_crossbars


def test_an_unreachable_drop_yields_the_best_there_is_and_says_so() -> None:
    fake = problem(evaluations=4, weight_bits=(2, 3))
    result = search(fake, Goal(None, max_accuracy_drop=0.0))  # type: ignore[arg-type]
    assert not result.goal_met
    assert result.best_uniform is None
    assert result.chosen.score.loss == min(e.score.loss for e in fake.evaluations)


def test_candidates_without_a_finite_loss_do_not_stop_the_search() -> None:
    fake = problem(evaluations=12)
    loss = fake.loss
    fake.loss = lambda bits: math.inf if bits.weights[5] == 4 else loss(bits)  # type: ignore[method-assign]
    fake.quick_fidelity = loss  # type: ignore[method-assign]
    result = search(fake, Goal(max_crossbars=20, max_accuracy_drop=None))  # type: ignore[arg-type]
    judged = [e.score.loss for e in result.evaluations if e.origin == "bayesian search"]
    assert math.inf in fake.glanced
    assert math.inf not in judged
    assert math.isfinite(result.chosen.score.loss)


def test_too_few_crossbars_say_how_many_are_needed() -> None:
    need = problem().crossbars((2,) * 6)
    with pytest.raises(DoesNotFitError, match=f"take {need}; allow at least {need} crossbars$"):
        search(problem(), Goal(max_crossbars=3))  # type: ignore[arg-type]


def test_activations_are_narrowed_only_while_the_goal_holds() -> None:
    fake = problem(evaluations=4, activation_bits=(2, 8))
    result = search(fake, Goal(None, max_accuracy_drop=0.4))  # type: ignore[arg-type]
    assert result.goal_met
    assert result.chosen.bits.activations is not None
    assert min(result.chosen.bits.activations) < 8
    narrower = Bits(result.chosen.bits.weights, tuple(max(2, a - 2) for a in result.chosen.bits.activations))
    assert points_below(fake.reference, fake.score(narrower)) > 0.4 or min(result.chosen.bits.activations) <= 4


def test_one_width_needs_no_search() -> None:
    fake = problem(weight_bits=(4, 4))
    result = search(fake, Goal(None, 50.0))  # type: ignore[arg-type]
    assert result.chosen.bits == Bits.uniform(6, 4, 8)
    assert len(result.evaluations) == 1
    assert [b.weight_bits for b in result.baselines] == [8, 6, 4]


def test_the_front_holds_what_nothing_beats() -> None:
    def item(crossbars: int, kl: float) -> Evaluation:
        return Evaluation(Bits((crossbars,), None), crossbars, Score(1, kl=kl), "test")

    points = [item(10, 1.0), item(8, 2.0), item(9, 3.0), item(10, 0.5), item(12, 0.5)]
    assert [(e.crossbars, e.score.kl) for e in pareto_front(points)] == [(8, 2.0), (10, 0.5)]


def test_bits_that_cells_hold_anyway_are_used() -> None:
    fake = problem()
    loss = np.array([[s * 4.0**-b for b in range(9)] for s in fake.sensitivities])
    assert useful_widths(fake) == [[2, 4, 6, 8]] * 6  # type: ignore[arg-type]
    found = fit_to_budget(fake, (3, 5, 7, 2, 3, 3), loss, Budget(99))  # type: ignore[arg-type]
    assert found == (8,) * 6
    tight = fit_to_budget(fake, (3, 3, 3, 3, 3, 3), loss, Budget(15))  # type: ignore[arg-type]
    assert tight is not None
    assert set(tight) <= {2, 4, 6, 8}


def test_a_width_too_wide_for_every_crossbar_is_no_baseline() -> None:
    fake = problem(evaluations=2)
    fake.cell_cost[3, 7:] = np.inf
    result = search(fake, Goal(max_crossbars=16, max_accuracy_drop=None))  # type: ignore[arg-type]
    assert [b.weight_bits for b in result.baselines] == [6, 4, 2]
    assert all(e.bits.weights[3] <= 6 for e in result.evaluations)


def test_the_best_uniform_width_is_one_that_the_chip_holds() -> None:
    fake = problem(evaluations=0)
    most = fake.crossbars((4,) * 6) or 0
    count = fake.crossbars
    fake.crossbars = lambda weights: found if (found := count(weights) or 0) <= most else None  # type: ignore[method-assign]
    fake.packed_crossbars = lambda weights: count(weights) or 0  # type: ignore[method-assign]
    result = search(fake, Goal(max_crossbars=None, max_accuracy_drop=100.0))  # type: ignore[arg-type]
    assert [b.weight_bits for b in result.baselines] == [8, 6, 4, 2]
    strict = search(fake, Goal(max_crossbars=1000, max_accuracy_drop=None))  # type: ignore[arg-type]
    assert strict.best_uniform is not None
    assert strict.best_uniform.packed_crossbars <= most
    assert result.best_uniform is not None
    assert result.best_uniform.weight_bits == 2


def test_native_libraries_cannot_write_into_results(capfd: pytest.CaptureFixture[str]) -> None:
    with no_native_output():
        os.write(1, b"from below")
    os.write(1, b"ours")
    assert capfd.readouterr().out == "ours"


@pytest.mark.parametrize("goal", [Goal(26, None), Goal(None, 6.0)])
@pytest.mark.parametrize("widths", [(2, 8), (2, 4)])
def test_kept_nodes_have_8_bits_in_everything_that_is_judged(goal: Goal, widths: tuple[int, int]) -> None:
    fake = problem(weight_bits=widths, activation_bits=(4, 6), evaluations=10, kept=frozenset({0, 5}))
    result = search(fake, goal)  # type: ignore[arg-type]
    assert {e.origin for e in result.evaluations} >= {"bayesian search", "integer program"}
    for bits in [e.bits for e in result.evaluations] + [b.bits for b in result.baselines]:
        assert bits.activations is not None
        assert (bits.weights[0], bits.weights[5], bits.activations[0], bits.activations[5]) == (8, 8, 8, 8)
    for evaluation in result.evaluations:
        assert all(widths[0] <= evaluation.bits.weights[node] <= 8 for node in range(1, 5))
    found = result.chosen.bits
    assert min(found.weights[1:5]) < 8
    assert found.activations is not None
    assert max(found.activations[1:5]) <= 6
    lowest = fake.settings.bits(6, 2, None).weights
    assert result.baselines[-1].packed_crossbars == fake.crossbars(lowest)


def test_the_integer_program_is_exact_with_kept_nodes() -> None:
    fake = problem(weight_bits=(2, 4), kept=frozenset({3}))
    table = measure_sensitivity(fake).weights  # type: ignore[arg-type]
    for crossbars in (28, 32, 99):
        found = solve_integer_program(fake, table, Budget(crossbars))  # type: ignore[arg-type]
        assert found is not None
        assert found[3] == 8
        assert (fake.crossbars(found) or 999) <= crossbars
        assert max(found[:3] + found[4:]) <= 4
    assert useful_widths(fake)[3] == [8]  # type: ignore[arg-type]
    assert useful_widths(fake)[0] == [2, 4]  # type: ignore[arg-type]


def test_kept_nodes_count_where_room_is_short() -> None:
    fake = problem(weight_bits=(3, 8), kept=frozenset({3}))
    need = fake.crossbars(fake.settings.bits(6, 3, None).weights)
    said = f"3 bits with 1 node kept at 8, take {need}; .* a smaller width than 3 or fewer nodes kept at 8 bits$"
    with pytest.raises(DoesNotFitError, match=said):
        search(fake, Goal(max_crossbars=3))  # type: ignore[arg-type]


def test_fixed_widths_without_a_goal_are_held_against_8_bits_only() -> None:
    fake = problem(weight_bits=(3, 3), kept=frozenset({1}))
    result = search(fake, Goal(None, None))  # type: ignore[arg-type]
    assert result.goal_met is None
    assert result.best_uniform is None
    assert result.chosen.bits.weights == (3, 8, 3, 3, 3, 3)
    assert [b.weight_bits for b in result.baselines] == [8]
    judged = search(problem(weight_bits=(3, 3)), Goal(None, 0.0))  # type: ignore[arg-type]
    assert judged.goal_met is False


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_a_batch_is_of_candidates_that_differ(batch: int) -> None:
    fake = problem(evaluations=12, batch=batch, activation_bits=(4, 8))
    asked: list[list[Bits]] = []
    evaluate_many = fake.evaluate_many

    def noted(candidates: list[Bits], origin: str) -> list[Evaluation]:
        known = {e.bits for e in fake.evaluations}
        assert len(set(candidates)) == len(candidates)
        assert known.isdisjoint(candidates)
        asked.append(candidates)
        return evaluate_many(candidates, origin)

    fake.evaluate_many = noted  # type: ignore[method-assign]
    result = search(fake, Goal(max_crossbars=20, max_accuracy_drop=None))  # type: ignore[arg-type]
    # Full batches but for the last, and as many evaluations as were asked for.
    assert [len(candidates) for candidates in asked] == [batch] * (12 // batch) + [12 % batch] * (12 % batch > 0)
    start = next(e for e in result.evaluations if e.origin == "integer program")
    assert result.chosen.score.loss <= start.score.loss
    assert all(e.crossbars <= 20 for e in result.evaluations if e.origin == "bayesian search")
