"""Settings: what is accepted, what wins, and what a user is told about the rest."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx.config import DEFAULT_ACCURACY_DROP, OptimizeConfig, load_config, parse_bits, to_toml
from raqu_onnx.errors import ConfigError


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
    assert config.evaluation == "file.npz"
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
