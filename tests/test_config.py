"""Settings: what is accepted, what wins, and what a user is told about the rest."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx.config import (
    OptimizeConfig,
    effective_toml,
    load_config,
    parse_bits,
    to_toml,
)
from raqu_onnx.errors import ConfigError
from raqu_onnx.goals import DEFAULT_ACCURACY_DROP
from raqu_onnx.search import SearchSettings


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        (4, (4, 4)),
        ("4", (4, 4)),
        ("2-8", (2, 8)),
        (" 3 - 5 ", (3, 5)),
        ([2, 6], (2, 6)),
        ((8, 8), (8, 8)),
        ("float", None),
        (None, None),
    ],
)
def test_widths_are_read(text: object, bits: tuple[int, int] | None) -> None:
    assert parse_bits(text) == bits


@pytest.mark.parametrize("text", [1, 9, "1-8", "8-2", "2-9", "", "four", "2-", True, 4.0, [4], "4 bits", "-4"])
def test_what_is_no_width_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="width"):
        parse_bits(text)


def test_weights_cannot_stay_float() -> None:
    with pytest.raises(ConfigError, match="--weight-bits: weights cannot stay float"):
        load_config(None, {"weight_bits": "float"})


def test_defaults_come_without_a_file() -> None:
    config = load_config(None, {})
    assert config == OptimizeConfig()
    assert config.goal.max_accuracy_drop == DEFAULT_ACCURACY_DROP
    assert config.goal.max_crossbars is None


@pytest.mark.parametrize(
    ("values", "goal"),
    [
        ({"max_crossbars": 9}, (9, None)),
        ({"max_accuracy_drop": 0.0}, (None, 0.0)),
        ({"max_crossbars": 9, "max_accuracy_drop": 2.0}, (9, 2.0)),
    ],
)
def test_the_goal_is_what_was_given(values: dict[str, Any], goal: tuple[int | None, float | None]) -> None:
    found = OptimizeConfig(**values).goal
    assert (found.max_crossbars, found.max_accuracy_drop) == goal


def test_options_win_over_the_file_which_wins_over_defaults(tmp_path: Path) -> None:
    text = 'seed = 3\nweight_bits = "3-5"\neval = "file.npz"\n[pictures]\nmean = [0.5]\nstd = [2.0]\n'
    path = written(tmp_path, text)
    config = load_config(path, {"seed": 7, "hw": None, "pictures": {"std": (4.0,), "size": (8, 9)}})
    assert config.seed == 7
    assert config.weight_bits == (3, 5)
    assert config.evaluation == str(tmp_path / "file.npz")
    assert config.hw == OptimizeConfig().hw
    assert config.pictures is not None
    assert (config.pictures.mean, config.pictures.std, config.pictures.size) == ((0.5,), (4.0,), (8, 9))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sede = 1", ["run.toml", "sede", "did you mean seed?"]),
        ("zzz = 1", ["run.toml", "zzz is no setting", "calibration"]),
        ("pictures = {sizes = [8, 8]}", ["run.toml", "pictures.sizes", "did you mean pictures.size?"]),
        ('seed = "1"', ["run.toml: seed", "'1'"]),
        ("seed = true", ["run.toml: seed", "True"]),
        ("seed = 1.0", ["run.toml: seed", "1.0"]),
        ("cells = 1", ["run.toml: cells"]),
        ("max_accuracy_drop = nan", ["run.toml: max_accuracy_drop"]),
        ("max_accuracy_drop = -1", ["run.toml: max_accuracy_drop"]),
        ("max_crossbars = 0", ["run.toml: max_crossbars"]),
        ('skip = "tidy"', ["run.toml: skip"]),
        ("weight_bits = 9", ["run.toml: weight_bits", "2 to 8"]),
        ('weight_method = "best"', ["run.toml: weight_method", "gptq"]),
        ("seed = 1\nseed = 2", ["run.toml: not a TOML file"]),
        ("seed = ", ["run.toml: not a TOML file"]),
        ("x = " + "[" * 5000, ["run.toml: not a TOML file"]),
        ("threads = 0\nseed = -1", ["threads", "seed"]),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text), {})
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message
    assert "--" not in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(ConfigError, match=f"{path}: cannot read"):
            load_config(path, {})
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(binary, {})


def test_a_wrong_option_is_told_from_a_wrong_key(tmp_path: Path) -> None:
    path = written(tmp_path, "seed = 1\n[pictures]\nstd = [1.0]\n")
    with pytest.raises(ConfigError, match=r"^--seed: ") as caught:
        load_config(path, {"seed": -1})
    assert "run.toml" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^--picture-size: "):
        load_config(path, {"pictures": {"size": (8,)}})
    with pytest.raises(ConfigError, match=r"^--batch-size: "):
        load_config(path, {"batch_size": 0})


def test_the_printed_configuration_replays() -> None:
    config = load_config(
        None,
        {
            "model": "a b.onnx",
            "eval": 'x"y.npz',
            "weight_bits": "3",
            "activation_bits": "float",
            "skip": ["check"],
            "pictures": {"size": (8, 9), "layout": "nhwc"},
            "max_accuracy_drop": 1,
        },
    )
    text = to_toml(config)
    assert OptimizeConfig.model_validate(tomllib.loads(text)) == config
    assert tomllib.loads(text)["weight_bits"] == 3


@given(
    st.tuples(st.integers(2, 8), st.integers(2, 8)).map(sorted),
    st.none() | st.tuples(st.integers(2, 8), st.integers(2, 8)).map(sorted),
    st.none() | st.integers(1, 10**6),
    st.none() | st.floats(0, 100),
    st.integers(0, 2**31 - 1),
    st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)
def test_every_configuration_replays(
    weights: list[int],
    activations: list[int] | None,
    crossbars: int | None,
    drop: float | None,
    seed: int,
    model: str | None,
) -> None:
    config = OptimizeConfig(
        model=model,
        weight_bits=tuple(weights),
        activation_bits=None if activations is None else tuple(activations),
        max_crossbars=crossbars,
        max_accuracy_drop=drop,
        seed=seed,
    )
    assert OptimizeConfig.model_validate(tomllib.loads(to_toml(config))) == config


def test_arguments_are_recorded_and_objects_are_not() -> None:
    config = OptimizeConfig(model="old.onnx", calibration="old.npz", eval="old.npz", seed=5)
    given_ = config.given(model=Path("new.onnx"), calibration={"x": 1}, evaluation=None, hw="isaac")
    assert (given_.model, given_.calibration, given_.evaluation, given_.hw) == ("new.onnx", None, "old.npz", "isaac")
    assert given_.seed == 5
    assert config.model == "old.onnx"


@pytest.mark.parametrize(
    "key", ["calibration_samples", "fit_samples", "sensitivity_samples", "evaluations", "batch_size"]
)
def test_counts_are_whole_numbers_and_not_texts(key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace("_", "-")):
        load_config(None, {key: "12"})


def test_patterns_come_as_lists_or_as_text() -> None:
    assert OptimizeConfig(exclude="a{1,2}").exclude == ("a{1,2}",)
    assert OptimizeConfig(exclude=["a", "b"]).exclude == ("a", "b")
    assert OptimizeConfig(keep="first,a{1,2}").keep == ("first", "a{1,2}")
    assert OptimizeConfig(keep=["a,b"]).keep == ("a,b",)


@pytest.mark.parametrize(
    ("values", "goal"),
    [
        ({"weight_bits": 4}, (None, None)),
        ({"weight_bits": 4, "activation_bits": None}, (None, None)),
        ({"weight_bits": 4, "activation_bits": (4, 8)}, (None, DEFAULT_ACCURACY_DROP)),
        ({"weight_bits": 4, "max_accuracy_drop": 1.0}, (None, 1.0)),
        ({"weight_bits": 4, "max_crossbars": 7}, (7, None)),
    ],
)
def test_fixed_widths_have_no_goal_unless_one_is_given(
    values: dict[str, Any], goal: tuple[int | None, float | None]
) -> None:
    config = OptimizeConfig(**values)
    assert (config.goal.max_crossbars, config.goal.max_accuracy_drop) == goal
    assert bool(config.goal) is any(part is not None for part in goal)
    replayed = OptimizeConfig.model_validate(tomllib.loads(effective_toml(config)))
    assert replayed.goal == config.goal


def test_effective_settings_show_the_goal_and_what_stands_for_nothing() -> None:
    text = effective_toml(OptimizeConfig(model="nets/a.onnx"))
    values = tomllib.loads(text)
    assert values["max_accuracy_drop"] == DEFAULT_ACCURACY_DROP
    assert values["output"] == str(Path("nets/a-raqu"))
    assert "# max_crossbars: no limit\n" in text
    assert "# calibration: synthetic inputs\n" in text
    text = effective_toml(OptimizeConfig(weight_bits=4))
    assert "# max_accuracy_drop: none: the widths are fixed" in text
    assert "max_accuracy_drop" not in tomllib.loads(text)
    assert "# max_accuracy_drop: no limit\n" in effective_toml(OptimizeConfig(max_crossbars=3))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"weight_bits": 9}, "weight_bits: 9 is out of range: widths are 2 to 8, the smaller one first"),
        ({"seed": "1"}, "seed: must be a whole number, found '1'"),
        ({"max_crossbars": 0}, "max_crossbars: must be at least 1, found 0"),
        ({"cells": 1}, "cells: must be true or false, found 1"),
        ({"skip": "tidy"}, "skip: must be a list, found 'tidy'"),
        ({"model": 3}, "model: must be a text, found 3"),
        ({"pictures": 3}, "pictures: must be a table of settings, found 3"),
        ({"pictures": {"size": [1]}}, "pictures.size.1: has too few values, found [1]"),
        ({"weight_method": "best"}, "weight_method: must be 'nearest', 'mse', 'gptq' or 'sequential', found 'best'"),
        ({"exclude": [3]}, "exclude.0: must be a text, found 3"),
        ({"sede": 1}, "sede is no setting, did you mean seed?"),
    ],
)
def test_errors_from_python_are_ours_and_in_plain_words(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OptimizeConfig(**values)
    assert str(caught.value) == f"settings: {said}"


def test_defaults_of_the_search_stand_in_one_place() -> None:
    assert OptimizeConfig().search_settings == SearchSettings()


def test_reduced_range_ends_at_seven_bits() -> None:
    def widths(value: object) -> tuple[int, int]:
        settings = OptimizeConfig.model_validate({"weight_bits": value, "reduce_range": True}).search_settings
        assert settings.kept_weight_bits == 7
        return settings.weight_bits

    assert [widths(value) for value in ("2-8", 8, "3-5", 2)] == [(2, 7), (7, 7), (3, 5), (2, 2)]
    assert OptimizeConfig(reduce_range=True).search_settings.activation_bits == (8, 8)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ()),
        ({"weight_bits": 4, "seed": 3}, ()),
        ({"fit_without": "refit,polish", "equalize": True}, ("--fit-without refit,polish", "--equalize")),
        (
            {"activation_range": "entropy", "weight_method": "gptq", "fit_samples": 64, "reduce_range": True},
            ("--weight-method gptq", "--fit-samples 64", "--activation-range entropy", "--reduce-range"),
        ),
    ],
)
def test_settings_of_the_method_other_than_the_default_are_told(
    settings: dict[str, Any], expected: tuple[str, ...]
) -> None:
    assert OptimizeConfig(**settings).method == expected
