"""Budgets in users' terms: latency, energy, average bits, the whole chip, and objectives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import FakeProblem, problem

from raqu_onnx.config import OptimizeConfig
from raqu_onnx.errors import ConfigError
from raqu_onnx.evaluation import Score
from raqu_onnx.goals import goal_of, goal_on
from raqu_onnx.hardware import load_chip
from raqu_onnx.manifest import read_manifest
from raqu_onnx.placement import DoesNotFitError
from raqu_onnx.quantities import parse_energy, parse_latency
from raqu_onnx.results import describe_goal
from raqu_onnx.search import Bits, Evaluation, Goal, pareto_front, search
from raqu_onnx.search.budget import Budget, Cost
from raqu_onnx.search.fitting import activation_steps, narrowed, within
from raqu_onnx.search.sensitivity import measure_sensitivity

Cli = Callable[..., Any]
DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz")
RUN = ("optimize", "model.onnx", "--hw", "chip.toml", *DATA, "--evaluations", "3", "-o", "out")
ACTIVATIONS = ("--activation-bits", "2-8", "--input-bits", "2-8")
FIGURES = """
cycle_ns = 50.0
[components]
crossbar_read_energy_pj = 30.0
adc_energy_pj = 2.0
dac_power_mw = 0.01
"""


def searched(goal: Goal, **options: Any) -> tuple[FakeProblem, Any]:
    fake = problem(**{"evaluations": 6, "activation_bits": (2, 8), **options})
    return fake, search(fake, goal)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- quantities


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2500ns", (2500.0, None)),
        ("2.5us", (2500.0, None)),
        (" 1 ms ", (1e6, None)),
        (2500, (2500.0, None)),
        (".5s", (5e8, None)),
        ("40000cycles", (None, 40000)),
        ("1 cycle", (None, 1)),
    ],
)
def test_latencies_are_read(text: object, found: tuple[float | None, int | None]) -> None:
    assert parse_latency(text) == found


@pytest.mark.parametrize(
    "text", ["", "5", "ns", "-3us", "0ns", "3 parsec", "1.5cycles", True, None, math.inf, "1e999ns", []]
)
def test_what_is_no_latency_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"latency|cycles"):
        parse_latency(text)


def test_energies_are_read() -> None:
    assert [parse_energy(text) for text in (300, "300pJ", "12nJ", "0.5uJ", "1mJ")] == [300, 300, 12e3, 5e5, 1e9]
    for text in ("3us", "300", "0", "0pJ", "x", None):
        with pytest.raises(ValueError, match="energy"):
            parse_energy(text)


# --------------------------------------------------------------------------------------------------------------- goals


def test_limits_alone_ask_for_the_least_loss_and_an_objective_goes_with_a_drop() -> None:
    assert goal_of(OptimizeConfig()) == Goal(None, 0.5)
    assert goal_of(OptimizeConfig(max_latency="2us")) == Goal(None, None, max_latency_ns=2000.0)
    assert goal_of(OptimizeConfig(max_latency="9cycles")).minimized is None
    assert goal_of(OptimizeConfig(objective="edp")) == Goal(None, 0.5, objective="edp")
    found = goal_of(OptimizeConfig(objective="crossbars", max_energy="3nJ", max_accuracy_drop=1.0))
    assert (found.minimized, found.max_energy_pj, found.max_accuracy_drop) == ("crossbars", 3000.0, 1.0)
    assert not goal_of(OptimizeConfig(weight_bits=4))


def test_a_chip_with_counts_is_filled_unless_something_else_is_asked_for() -> None:
    counted, free = load_chip("isaac"), load_chip("generic")
    assert all(kind.count is not None for kind in counted.crossbars)
    assert goal_on(OptimizeConfig(), counted) == Goal(None, None, fit_chip=True)
    assert goal_on(OptimizeConfig(), free) == Goal(None, 0.5)
    assert goal_on(OptimizeConfig(max_accuracy_drop=1.0), counted) == Goal(None, 1.0)
    assert goal_on(OptimizeConfig(max_crossbars=9), counted) == Goal(9, None)
    assert not goal_on(OptimizeConfig(weight_bits=4), counted)
    with pytest.raises(ConfigError, match="--fit-chip: chip generic"):
        goal_on(OptimizeConfig(fit_chip=True), free)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_latency": "2us"}, "cycle_ns"),
        ({"max_energy": "2uJ"}, "components.adc_energy_pj"),
        ({"objective": "energy"}, "components.crossbar_read_energy_pj"),
        ({"objective": "edp"}, "--objective edp: chip generic"),
        ({"max_latency": "9cycles", "activation_bits": "float"}, "--activation-bits float"),
        ({"max_latency": "9cycles", "placement": "exact"}, "--placement exact"),
        ({"objective": "latency", "replicate": "chip"}, "--replicate"),
        ({"objective": "latency", "partitions": "auto"}, "--partitions"),
    ],
)
def test_what_a_chip_cannot_tell_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        goal_on(OptimizeConfig(**values), load_chip("generic"))
    assert said in str(caught.value)


def test_goals_in_words() -> None:
    goal = Goal(12, 1.0, max_latency_cycles=400, max_average_bits=3.5, objective="latency")
    said = "least latency within 12 crossbars and 400 cycles and 3.5 bits per weight and 1 point of float's top-1"
    assert describe_goal(goal, metric="top-1") == said
    assert describe_goal(Goal(None, None, fit_chip=True)) == "least loss within the chip's crossbars"


# --------------------------------------------------------------------------------------------------------------- front


COSTS = st.builds(
    lambda crossbars, cycles, kl: Evaluation(
        Bits((2,), None), crossbars, Score(9, kl=kl), "", Cost(crossbars, 2.0, cycles, None, None)
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 4).map(float),
)


@given(st.lists(COSTS, min_size=1, max_size=12))
def test_the_front_over_several_costs_holds_what_nothing_beats(points: list[Evaluation]) -> None:
    def key(item: Evaluation) -> tuple[float, ...]:
        return item.crossbars, item.value("latency"), item.score.loss

    front = {key(item) for item in pareto_front(points, ("crossbars", "latency"))}
    for item in points:
        beaten = any(
            key(other) != key(item) and all(a <= b for a, b in zip(key(other), key(item), strict=True))
            for other in points
        )
        assert (key(item) in front) is not beaten


# -------------------------------------------------------------------------------------------------------------- repair


@settings(max_examples=30, deadline=None)
@given(st.integers(130, 600))
def test_activations_are_narrowed_just_enough(cycles: int) -> None:
    fake = problem(activation_bits=(2, 8))
    table = measure_sensitivity(fake)  # type: ignore[arg-type]
    wide = Bits((4,) * 6, (8,) * 6)
    budget = Budget(latency=cycles)
    found = narrowed(fake, table, wide, budget)  # type: ignore[arg-type]
    assert found is not None
    assert found.weights == wide.weights
    assert within(fake, found, budget)  # type: ignore[arg-type]
    assert found.activations is not None
    for node, width in enumerate(found.activations):
        wider = (*found.activations[:node], width + 1, *found.activations[node + 1 :])
        assert width == 8 or not within(fake, Bits(wide.weights, wider), budget)  # type: ignore[arg-type]


def test_input_slices_are_what_is_saved() -> None:
    fake = problem(activation_bits=(2, 8))
    fake.chip.dac_bits = 2
    table = measure_sensitivity(fake)  # type: ignore[arg-type]
    steps = activation_steps(fake, table, Bits((4,) * 6, (7,) * 6))  # type: ignore[arg-type]
    # 7 bits take four slices of two bits; with three of them, 6 bits are as cheap as 5.
    assert {width for step in steps for width in step} == {7, 6, 4, 2}


# -------------------------------------------------------------------------------------------------------------- search


def test_a_latency_is_kept_by_activations_and_weights_stay_wide() -> None:
    fake, result = searched(Goal(None, None, max_latency_ns=2500.0))
    assert result.goal_met
    assert result.chosen.cost.latency_ns <= 2500.0
    assert result.chosen.bits.weights == (8,) * 6
    flat = fake.evaluate(Bits((8,) * 6, (4,) * 6), "flat")
    assert result.chosen.score.loss <= flat.score.loss
    assert all(e.cost.latency_ns <= 2500.0 for e in result.evaluations if e.origin == "bayesian search")


def test_an_energy_is_shared_between_weights_and_activations() -> None:
    fake = problem()
    whole = fake.measure(Bits((8,) * 6, (8,) * 6)).energy_pj or 0.0
    _, result = searched(Goal(None, None, max_energy_pj=0.4 * whole), evaluations=12)
    assert result.goal_met
    assert result.chosen.cost.energy_pj <= 0.4 * whole


def test_average_bits_are_kept_and_used() -> None:
    fake, result = searched(Goal(None, None, max_average_bits=3.0), activation_bits=(8, 8))
    assert result.goal_met
    assert 2.5 < result.chosen.cost.average_bits <= 3.0
    held = fake.evaluate(Bits((2,) * 6, (8,) * 6), "held")
    assert result.chosen.score.loss < held.score.loss


@pytest.mark.parametrize("objective", ["latency", "energy", "edp"])
def test_an_objective_is_pushed_down_to_the_allowed_drop(objective: Any) -> None:
    fake, result = searched(Goal(None, 2.0, objective=objective))
    assert result.goal_met
    uniform = fake.measure(Bits((8,) * 6, (8,) * 6)).of(objective)
    assert result.chosen.value(objective) < 0.8 * uniform
    tighter = search(problem(evaluations=6, activation_bits=(2, 8)), Goal(None, 0.6, objective=objective))  # type: ignore[arg-type]
    assert tighter.chosen.value(objective) >= result.chosen.value(objective)


def test_an_objective_and_a_limit_hold_together() -> None:
    _, result = searched(Goal(18, 2.0, objective="latency"))
    assert result.goal_met
    assert result.chosen.crossbars <= 18


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (Goal(None, None, max_latency_cycles=100), r"--max-latency: 100 cycles cannot be reached; the least is 120"),
        (Goal(None, None, max_energy_pj=5.0), r"--max-energy: 5 pJ .* the least is 1532 pJ"),
        (Goal(None, None, max_average_bits=1.0), r"--max-average-bits: 1 bits .* the least is 2 bits"),
    ],
)
def test_what_cannot_be_reached_is_told_with_the_least_that_can(goal: Goal, said: str) -> None:
    fake = problem(activation_bits=(2, 8))
    with pytest.raises(DoesNotFitError, match=said):
        search(fake, goal)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- whole runs


def report_of(folder: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "report.json").read_text())
    return found


def with_figures(path: str = "chip.toml") -> None:
    text = Path(path).read_text()
    head, tail = text.split("[[crossbars]]")
    cycle, components = FIGURES.split("[components]")
    Path(path).write_text(f"{head}{cycle}\n[[crossbars]]{tail}columns_per_adc = 4\n[components]{components}")


@pytest.mark.usefixtures("workspace")
def test_the_judged_latency_is_the_reported_one(cli: Cli) -> None:
    with_figures()
    ran = cli(*RUN, *ACTIVATIONS, "--max-latency", "30us")
    assert ran.code == 0, ran
    report, manifest = report_of(), read_manifest("out/manifest.json")
    point = report["front"][report["chosen"] - 1]
    cost = manifest.totals.cost
    assert point["latency_cycles"] == cost.latency_cycles
    assert point["energy_pj"] == pytest.approx(cost.energy_pj)
    assert point["latency_ns"] <= 30_000
    assert report["goal"]["max_latency_ns"] == 30_000
    assert manifest.search is not None
    assert manifest.search.goal is not None
    assert manifest.search.goal.max_latency_ns == 30_000
    assert "within 30000 ns" in ran.out
    assert "least loss within 30000 ns" in Path("out/report.html").read_text(encoding="utf-8")
    assert f"{point['latency_cycles']} cycles ({point['latency_ns']:g} ns)" in ran.out


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("limit", [("--max-energy", "30nJ"), ("--max-average-bits", "3")])
def test_other_limits_are_kept_by_what_is_written(cli: Cli, limit: tuple[str, str]) -> None:
    with_figures()
    assert cli(*RUN, *ACTIVATIONS, *limit).code == 0
    report = report_of()
    assert report["goal_met"]
    if limit[0] == "--max-energy":
        assert report["figures"][-1]["cost"]["energy_pj"] <= 30_000
    else:
        assert report["figures"][-1]["weight_bits"] <= 3


@pytest.mark.usefixtures("workspace")
def test_an_objective_may_be_named(cli: Cli) -> None:
    assert cli(*RUN, *ACTIVATIONS, "--objective", "latency", "--max-accuracy-drop", "3").code == 0
    report = report_of()
    rows = {item["label"]: item["cost"]["latency_cycles"] for item in report["figures"] if item["cost"]}
    assert rows["ours"] < 0.8 * min(cycles for label, cycles in rows.items() if "8-bit" in label)
    assert report["goal"]["objective"] == "latency"


@pytest.mark.usefixtures("workspace")
def test_a_chip_with_counts_is_filled(cli: Cli) -> None:
    text = Path("chip.toml").read_text()
    Path("chip.toml").write_text(text + "count = 4\n")
    ran = cli(*RUN)
    assert ran.code == 0
    report = report_of()
    assert report["goal"]["fit_chip"]
    assert report["figures"][-1]["crossbars"] <= 4
    assert "least loss within the chip's crossbars" in ran.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--max-latency", "10cycles"), "cannot be reached; the least is"),
        (("--max-latency", "3us"), "cycle_ns"),
        (("--max-energy", "3uJ"), "components.adc_energy_pj"),
        (("--max-latency", "soon"), "--max-latency: 'soon' is no latency"),
        (("--max-average-bits", "0"), "--max-average-bits: must be above 0"),
        (("--fit-chip",), "--fit-chip: chip small"),
    ],
)
def test_mistakes_take_one_line(
    refused: Callable[..., str], workspace: Path, arguments: tuple[str, ...], said: str
) -> None:
    refused(workspace, (*RUN, *arguments), said)


def test_of_all_that_meets_the_goal_the_least_is_written(cli: Cli, workspace: Path) -> None:
    assert cli(*RUN, "--max-accuracy-drop", "4").code == 0
    judged = json.loads((workspace / "out" / "report.json").read_text())["evaluations"]
    meeting = [item["crossbars"] for item in judged if item["met"]]
    assert [item["crossbars"] for item in judged if item["chosen"]] == [min(meeting)]
