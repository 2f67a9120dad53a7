"""What a run is judged by: class scores or all values, as `--task` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    "optimize", "model.onnx", "--calibration", "calibration.npz", "--selection", "selection.npz", "--hw", "chip.toml",
    "--weight-bits", "4-6", "--evaluations", "0", "--weight-method", "nearest", "--threads", "1", "-o", "out",
)  # fmt: skip


@pytest.mark.usefixtures("workspace")
def test_regression_is_judged_by_noise(cli: Callable[..., Any]) -> None:
    # Noise of 0.1 % of the signal is allowed; the widest widths lose more at 4 to 6 bits.
    strict = cli(*OPTIONS, "--task", "regression", "--max-accuracy-drop", "0.001")
    assert strict.code == 1
    ran = cli(*OPTIONS, "--task", "regression", "--max-accuracy-drop", "20", "--force")
    assert ran.code == 0, ran.err
    figures = json.loads(Path("out/report.json").read_text())["figures"]
    row = next(line for line in ran.out.splitlines() if line.startswith("ours "))
    assert f"{figures[-1]['selection']['sqnr_db']:.2f} dB" in row
    assert "%" not in row.split("dB")[-1]
    assert "SQNR: power of the float model's outputs over" in ran.out
    assert "points: hundredths of 1 - noise/signal" in ran.out
    assert "labels of selection.npz are not used" in ran.err
    report = json.loads(Path("out/report.json").read_text())
    assert report["metric"] == "1 - noise/signal"
    ours = report["figures"][-1]["selection"]
    assert (ours["top1"], ours["agreement"], ours["kl"]) == (None, None, None)
    # 20 points are a noise of 0.2 of the signal.
    assert 10 ** (-ours["sqnr_db"] / 10) <= 0.2
    # Who validates the folder judges alike.
    checked = cli("validate", "out", "--data", "eval.npz", "--reference", "model.onnx", "--format", "json")
    scores = json.loads(checked.out)["scores"].values()
    assert {score["top1"] for score in scores} == {None}
    assert all(score["sqnr_db"] > 0 for score in scores)


@pytest.mark.usefixtures("workspace")
def test_one_table_of_scores_is_a_classifier(cli: Callable[..., Any]) -> None:
    for task in (), ("--task", "classification"):
        ran = cli(*OPTIONS, *task, "--max-accuracy-drop", "50", "--force")
        assert ran.code == 0, ran.err
        assert json.loads(Path("out/report.json").read_text())["metric"] == "top-1"
    assert cli(*OPTIONS, "--task", "detection").code == 2
