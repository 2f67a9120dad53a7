"""What the page is made of: the floor plan, the command that makes a result again, names beside plots."""

from __future__ import annotations

import argparse
import shlex
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.cli.optimize import _overrides, add_parser
from raqu_onnx.config import OptimizeConfig, load_config
from raqu_onnx.data import PictureOptions
from raqu_onnx.front import ScoreReport
from raqu_onnx.hardware import load_chip
from raqu_onnx.html.command import changed_settings, command_of, given_in_memory
from raqu_onnx.html.content import quality
from raqu_onnx.html.floor_plan import floor_plan, ranges_text
from raqu_onnx.html.outcome import data_sentence, evaluation_metric, loss_sentence
from raqu_onnx.html.palette import layer_colours
from raqu_onnx.manifest import Manifest, read_manifest
from raqu_onnx.manifest_view import to_ranges
from raqu_onnx.node_names import short_names
from raqu_onnx.report import DataReport
from raqu_onnx.scoring import Score

if TYPE_CHECKING:
    from raqu_onnx.report import Report

# ---------------------------------------------------------------------------------------------------- the floor plan


def cells_drawn(manifest: Manifest) -> dict[str, int]:
    plan = floor_plan(manifest)
    areas = (plan.blocks[:, 2] - plan.blocks[:, 0]) * (plan.blocks[:, 3] - plan.blocks[:, 1])
    return {node.name: int(areas[plan.nodes == index].sum()) for index, node in enumerate(manifest.nodes)}


@pytest.mark.parametrize("kind", ["isaac", "pairs"])
@pytest.mark.parametrize("most", [60_000, 0])
def test_every_programmed_cell_is_drawn_once_in_its_crossbar(
    sound: dict[str, Path], kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raqu_onnx.html.floor_plan._MOST_RECTANGLES", most)
    folder = next(path for path in sound.values() if path.name == kind)
    manifest = read_manifest(folder / "manifest.json")
    plan = floor_plan(manifest)
    assert plan.split == (most > 0)
    assert len(plan.crossbars) == sum(total.allocated for total in manifest.totals.crossbars)
    assert sum(cells_drawn(manifest).values()) == manifest.totals.cell_utilization.numerator
    canvas: dict[tuple[int, int], np.ndarray] = {}
    for index in range(len(plan.blocks)):
        key = (int(plan.types[index]), int(plan.arrays[index]))
        chip = manifest.chip.crossbars[key[0]]
        (top, bottom), (left, right) = plan.rows[index], plan.cols[index]
        assert 0 <= top < bottom <= chip.rows
        assert 0 <= left < right <= chip.cols
        area = canvas.setdefault(key, np.zeros((chip.rows, chip.cols), int))[top:bottom, left:right]
        area += 1
        # To scale, and inside one of the crossbars that are drawn.
        x0, y0, x1, y1 = plan.blocks[index]
        assert (x1 - x0, y1 - y0) == (right - left, bottom - top)
        assert any(b[0] <= x0 and b[1] <= y0 and x1 <= b[2] and y1 <= b[3] for b in plan.crossbars)
    assert max(int(area.max()) for area in canvas.values()) == 1


def test_blocks_name_the_kernels_and_their_width(sound: dict[str, Path]) -> None:
    manifest = read_manifest(sound["isaac" if "isaac" in sound else next(iter(sound))] / "manifest.json")
    plan = floor_plan(manifest)
    for index, node in enumerate(manifest.nodes):
        widths = np.repeat([bits for bits, _ in node.bits], [count for _, count in node.bits])
        seen: set[int] = set()
        for place in np.flatnonzero(plan.nodes == index):
            for part in plan.kernels[place].split(", "):
                first, _, last = part.partition("–")
                channels = range(int(first), int(last or first) + 1)
                # A ConvTranspose has one width for the same kernel of all its groups.
                assert {int(widths[channel % len(widths)]) for channel in channels} == {int(plan.bits[place])}
                seen.update(channels)
        dropped = {c for c in range(node.matrix.groups * node.matrix.kernels) if widths[c % len(widths)] == 0}
        assert seen == set(range(node.matrix.groups * node.matrix.kernels)) - dropped


def test_crossbars_do_not_overlap(sound: dict[str, Path]) -> None:
    for folder in sound.values():
        boxes = floor_plan(read_manifest(folder / "manifest.json")).crossbars
        for index, (x0, y0, x1, y1) in enumerate(boxes):
            apart = [b[2] <= x0 or b[0] >= x1 or b[3] <= y0 or b[1] >= y1 for b in np.delete(boxes, index, axis=0)]
            assert all(apart)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_name_all_or_count_them(numbers: set[int]) -> None:
    ordered = np.array(sorted(numbers))
    text = ranges_text(ordered)
    if len(to_ranges(ordered)) > 4:
        assert text.endswith(f"({len(numbers)} in all)")
        return
    bounds = [[int(end) for end in part.split("–")] for part in text.split(", ")]
    assert {n for bound in bounds for n in range(bound[0], bound[-1] + 1)} == numbers


# ------------------------------------------------------------------------------------------------------- the command

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
NAMES = TEXT | TEXT.map("-{}".format)
PATTERNS = st.lists(st.from_regex(r"[A-Za-z/._]{1,10}", fullmatch=True), min_size=1, max_size=3, unique=True)
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "hw": NAMES,
    "calibration": NAMES,
    "selection": NAMES,
    "eval": NAMES,
    "max_crossbars": st.integers(1, 10**6),
    "max_accuracy_drop": st.floats(0, 100),
    "max_latency": st.sampled_from(["2.5us", "40000cycles"]),
    "max_energy": st.sampled_from(["3pJ", "0.5uJ"]),
    "weight_bits": st.sampled_from(["2-8", "4", "3-6"]),
    "activation_bits": st.sampled_from(["float", "4-8", 8]),
    "replicate": st.sampled_from(["chip", 7]),
    "partitions": st.sampled_from(["auto", 3]),
    "granularity": st.sampled_from(["layer", "group:8"]),
    "fit_chip": st.just(True),
    "drop": st.booleans(),
    "equalize": st.booleans(),
    "cells": st.booleans(),
    "reduce_range": st.booleans(),
    "exclude": PATTERNS,
    "keep": PATTERNS,
    "skip": st.just(["equalize", "check"]),
    "fit_without": st.just(["bias", "polish"]),
    "dump_after": st.just(["tidy", "calibrate"]),
    "passes": st.just("tidy,quantize-weights{weight_bits=4}"),
    "seed": st.integers(0, 99),
    "batch_size": st.integers(1, 99),
    "pictures": st.fixed_dictionaries({}, optional={"size": st.just([32, 48]), "mean": st.just([-0.5, 1 / 3, 0.125])}),
}


@settings(max_examples=60, deadline=None)
@given(NAMES, st.fixed_dictionaries({}, optional=SETTINGS))
def test_the_command_gives_the_same_configuration(model: str, given_settings: dict[str, Any]) -> None:
    config = OptimizeConfig.model_validate({"model": model, **given_settings})
    command = command_of(config.recorded)
    assert command is not None
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(shlex.split(command)[1:])
    again = load_config(None, _overrides(args))
    # Pictures with nothing set are read as pictures without a word on them.
    assert again.model_copy(update={"pictures": config.pictures}) == config
    assert (again.pictures or PictureOptions()) == (config.pictures or PictureOptions())


def test_every_setting_has_an_option() -> None:
    parser = argparse.ArgumentParser()
    optimize = parser.add_subparsers()
    add_parser(optimize)
    options = {name for action in optimize.choices["optimize"]._actions for name in action.option_strings}
    for key, value in OptimizeConfig().recorded.items():
        if key in ("model", "pictures"):
            continue
        changed = not value if isinstance(value, bool) else "x"
        command = command_of({"model": "m.onnx", key: changed})
        assert command is not None
        assert command.split()[3] in options, key


def test_what_only_a_file_can_say_has_no_command() -> None:
    configuration = OptimizeConfig(model="m.onnx", pictures=PictureOptions(resize=256))
    assert command_of(configuration.model_dump(mode="json", by_alias=True)) is None


def test_a_flag_that_is_off_is_not_printed_as_its_opposite() -> None:
    configuration = OptimizeConfig(model="m.onnx", fit_chip=False, max_crossbars=7).recorded
    assert command_of(configuration) == "raqu-onnx optimize m.onnx --max-crossbars 7"
    # Without a goal, a chip with counts would be filled: only a file can say that it must not.
    assert command_of(OptimizeConfig(model="m.onnx", fit_chip=False).recorded) is None


def test_numbers_have_all_their_digits() -> None:
    command = command_of(OptimizeConfig(model="m.onnx", max_accuracy_drop=0.123456789).recorded)
    assert command == "raqu-onnx optimize m.onnx --max-accuracy-drop 0.123456789"


def test_numbers_get_the_unit_that_an_option_needs() -> None:
    config = OptimizeConfig(model="m.onnx", max_latency=2500, max_energy=0.5)
    command = command_of(config.recorded)
    assert command == "raqu-onnx optimize m.onnx --max-latency 2500.0ns --max-energy 0.5pJ"


def test_a_chosen_point_names_its_search_and_nothing_that_is_taken_from_it() -> None:
    pictures = PictureOptions(resize=256)
    config = OptimizeConfig(model="m.onnx", hw="chip.toml", seed=3, cells=True, fit_chip=False, pictures=pictures)
    command = command_of(config.recorded, 2)
    assert command == "raqu-onnx optimize m.onnx --choose 2 --from SEARCH --hw chip.toml --cells"


def data(name: str, *, synthetic: bool = False) -> DataReport:
    return DataReport(name=name, samples=8, labels=False, synthetic=synthetic, fitted=False)


@pytest.mark.parametrize(
    ("given_settings", "used", "missing"),
    [
        ({}, ("synthetic", "synthetic", None), []),
        ({"calibration": "c.npz"}, ("c.npz", "c.npz", None), []),
        ({}, ("arrays", "arrays", None), ["calibration data"]),
        ({"calibration": "c.npz"}, ("c.npz", "arrays", "arrays"), ["selection data", "evaluation data"]),
        ({"model": None}, ("synthetic", "arrays", None), ["model", "selection data"]),
    ],
)
def test_what_was_given_in_memory_is_named(
    given_settings: dict[str, Any], used: tuple[str | None, ...], missing: list[str]
) -> None:
    roles = dict(zip(("calibration", "selection", "evaluation"), used, strict=True))
    held = {role: None if name is None else data(name, synthetic=name == "synthetic") for role, name in roles.items()}
    report = cast("Report", SimpleNamespace(data=held))
    recorded = OptimizeConfig.model_validate({"model": "m.onnx", **given_settings}).recorded
    assert given_in_memory(recorded, report, load_chip("generic")) == missing


@pytest.mark.parametrize(
    ("hw", "changes", "named"),
    [
        ("isaac", {}, True),
        ("isaac", {"dac_bits": 2}, False),
        ("own", {"name": "own"}, False),
        ("own.toml", {"name": "own"}, True),
        ("own.toml", {"name": "own.toml"}, True),
    ],
)
def test_a_chip_object_has_no_name_that_a_command_could_give(hw: str, changes: dict[str, Any], named: bool) -> None:
    chip = load_chip("isaac").model_copy(update=changes)
    report = cast("Report", SimpleNamespace(data={}))
    recorded = OptimizeConfig(model="m.onnx", hw=hw).recorded
    assert given_in_memory(recorded, report, chip) == ([] if named else ["chip"])


def test_a_model_in_memory_has_no_command() -> None:
    configuration = OptimizeConfig(seed=3).model_dump(mode="json", by_alias=True)
    assert command_of(configuration) is None
    assert changed_settings(configuration) == {"seed": 3}


# --------------------------------------------------------------------------------------------- the loss and quality

NOTHING = ScoreReport(samples=8, top1=None, agreement=None, kl=None, sqnr_db=20.0, measured=None, value=None)
CLASSES = NOTHING.model_copy(update={"agreement": 0.75, "kl": 0.5})
LABELLED = CLASSES.model_copy(update={"top1": 0.5})


def measured(score: ScoreReport, name: str, value: float | None) -> ScoreReport:
    return score.model_copy(update={"measured": name, "value": value})


@pytest.mark.parametrize(
    ("score", "divergence", "counted"),
    [
        (NOTHING, False, ""),
        (CLASSES, True, ""),
        (LABELLED, True, ""),
        (measured(LABELLED, "top-5", 0.875), True, "what top-5 lacks to 1"),
        (measured(LABELLED, "top-1", 0.5), True, "the share of wrong answers"),
        (measured(LABELLED, "agreement", 0.75), True, "the share of answers that are not the float model's"),
        (measured(LABELLED, "KL", -0.5), True, ""),
        (measured(LABELLED, "1 - noise/signal", 0.99), False, ""),
        (measured(CLASSES, "m.py:f", 0.25), True, "what m.py:f lacks to 1"),
        (measured(NOTHING, "m.py:f", 0.25), False, "what m.py:f lacks to 1"),
    ],
)
def test_the_loss_is_told_as_it_is_added_up(score: ScoreReport, divergence: bool, counted: str) -> None:
    said = loss_sentence(cast("Report", SimpleNamespace(evaluations=[SimpleNamespace(score=score)])))
    assert ("KL divergence" in said) is divergence
    assert ("power of the noise" in said) is not divergence
    assert said.endswith(f" plus a tenth of {counted}." if counted else ("outputs." if divergence else "signal."))
    # The words are those of the sum.
    loss = Score(**score.model_dump()).loss
    lacking = 1 - (score.value if score.value is not None else score.top1 or 0.0)
    assert loss == pytest.approx((0.5 if divergence else 0.01) + (0.1 * lacking if counted else 0.0))


@pytest.mark.parametrize(("tried", "says"), [(3, "widths were chosen on c.npz"), (1, "figures are of c.npz")])
def test_nothing_is_chosen_at_fixed_widths(tried: int, says: str) -> None:
    held = {"calibration": data("c.npz"), "selection": data("c.npz"), "evaluation": None}
    report = cast("Report", SimpleNamespace(data=held, evaluations=[object()] * tried))
    assert data_sentence(report) == f"Ranges were measured on c.npz (8 samples); {says} (8 samples)."


def figures(selection: ScoreReport | None, evaluation: ScoreReport | None) -> Any:
    return SimpleNamespace(selection=selection, evaluation=evaluation)


@pytest.mark.parametrize(
    ("selection", "evaluation", "said"),
    [
        (LABELLED, LABELLED, ""),
        (LABELLED, CLASSES, "agreement with the float model"),
        (CLASSES, LABELLED, "accuracy"),
        (LABELLED, None, ""),
        (NOTHING, NOTHING, ""),
        (measured(CLASSES, "agreement", 0.75), measured(LABELLED, "agreement", 0.75), ""),
    ],
)
def test_unseen_data_without_labels_is_told_apart(
    selection: ScoreReport, evaluation: ScoreReport | None, said: str
) -> None:
    report = SimpleNamespace(figures=[figures(selection, evaluation)] * 2)
    assert evaluation_metric(cast("Report", report)) == said


def test_an_infinite_divergence_is_no_agreement() -> None:
    assert quality(measured(LABELLED, "KL", None)) is None
    assert quality(measured(LABELLED, "KL", -0.5)) == -0.5
    assert quality(LABELLED) == 0.5
    assert quality(CLASSES) == 0.75
    assert quality(NOTHING) == pytest.approx(0.99)


# --------------------------------------------------------------------------------------------------- names, colours


def test_names_lose_what_says_nothing() -> None:
    names = ["/net/stem/conv/Conv", "/net/head/fc/Gemm", "/net/head/" + 30 * "x" + "/MatMul", "/net/head/gate/Sigmoid"]
    assert short_names(names, ["Conv", "Gemm", "MatMul", "Conv"]) == [
        "stem", "head/fc", "head/" + 7 * "x" + "…" + 11 * "x", "head/gate/Sigmoid",
    ]  # fmt: skip
    assert short_names(["", "a"], ["Conv", "Conv"]) == ["Conv", "a"]
    assert short_names(["/only/Conv"], ["Conv"]) == ["only"]
    assert short_names(["Conv"], ["Conv"]) == ["Conv"]
    assert short_names([], []) == []


@given(st.lists(st.text("ab/", min_size=1, max_size=60)), st.sampled_from(["a", "b"]))
def test_short_names_fit_and_are_never_empty(names: list[str], op_type: str) -> None:
    found = short_names(names, [op_type] * len(names))
    assert len(found) == len(names)
    assert all(0 < len(name) <= 24 for name in found)


def test_neighbouring_layers_differ_in_colour() -> None:
    for count in (1, 2, 3, 50, 200):
        colours = layer_colours(count)
        assert len(colours) == count
        assert all(len(colour) == 7 for colour in colours)
        assert all(one != other for one, other in pairwise(colours))
