"""Paths in a configuration file are relative to the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raqu_onnx.config import load_config
from raqu_onnx.config_paths import resolve_paths

Cli = Callable[..., Any]

SETTINGS = {"model": "m.onnx", "calibration": "../c.npz", "selection": "feeds.py:f", "eval": "/d/e.npz", "seed": 3}


def test_relative_paths_lead_from_the_file() -> None:
    assert resolve_paths(SETTINGS, "runs/a.toml") == {
        "model": "runs/m.onnx",
        "calibration": "runs/../c.npz",
        "selection": "runs/feeds.py:f",
        "eval": "/d/e.npz",
        "seed": 3,
    }


def test_a_file_in_the_current_folder_changes_nothing() -> None:
    assert resolve_paths(SETTINGS, "a.toml") == SETTINGS
    assert resolve_paths(SETTINGS, Path("a.toml")) == SETTINGS


@pytest.mark.parametrize(("hw", "found"), [("isaac", "isaac"), ("chip.toml", "runs/chip.toml"), ("chip", "runs/chip")])
def test_a_built_in_chip_is_no_path(hw: str, found: str) -> None:
    assert resolve_paths({"hw": hw}, "runs/a.toml") == {"hw": found}


def test_wrong_types_are_left_to_the_checks() -> None:
    assert resolve_paths({"model": 3, "output": ""}, "runs/a.toml") == {"model": 3, "output": ""}


def test_options_are_relative_to_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('model = "m.onnx"\nhw = "chip.toml"\neval = "e.npz"\n')
    config = load_config(tmp_path / "a.toml", {"evaluation": None, "eval": "mine.npz"})
    assert config.model == str(tmp_path / "m.onnx")
    assert config.hw == str(tmp_path / "chip.toml")
    assert config.evaluation == "mine.npz"


def test_a_run_is_started_from_another_folder(cli: Cli, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace / "run.toml").write_text(
        'model = "model.onnx"\nhw = "chip.toml"\ncalibration = "calibration.npz"\nselection = "selection.npz"\n'
        'weight_bits = 8\noutput = "here"\n'
    )
    monkeypatch.chdir(workspace.parent)
    ran = cli("optimize", "--config", "work/run.toml", "-q")
    assert ran.code == 0, ran.err
    assert (workspace / "here" / "manifest.json").is_file()
