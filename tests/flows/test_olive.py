"""`RaquOnnxQuantization` in a workflow of Microsoft Olive, behind one of Olive's own passes.

`.ci/run` calls this in an environment of its own when RAQU_CI_ALL=1.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("olive", reason="runs in an environment of its own: RAQU_CI_ALL=1 .ci/run")

USER_SCRIPT = """
import numpy as np
from olive.data.registry import Registry

class Samples:
    def __init__(self, path, labels):
        data = np.load(path)
        self.inputs, self.labels = data["input"], data["labels"] if labels else None

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return {"input": self.inputs[index]}, -1 if self.labels is None else self.labels[index]

@Registry.register_dataset()
def samples(path, labels=True):
    return Samples(path, labels)
"""


def data(name: str, folder: Path, **params: Any) -> dict[str, Any]:
    return {
        "name": name,
        "user_script": str(folder / "user_script.py"),
        "load_dataset_config": {"type": "samples", "params": {"path": str(folder / f"{name}.npz"), **params}},
        "dataloader_config": {"params": {"batch_size": 16}},
    }


def workflow(folder: Path, **settings: Any) -> dict[str, Any]:
    (folder / "user_script.py").write_text(USER_SCRIPT)
    return {
        "input_model": {"type": "ONNXModel", "model_path": str(folder / "model.onnx")},
        "data_configs": [data("calibration", folder), data("selection", folder), data("eval", folder)],
        "passes": {
            "tidy": {"type": "OnnxPeepholeOptimizer"},
            "crossbars": {
                "type": "RaquOnnxQuantization",
                "data_config": "calibration",
                "selection_data_config": "selection",
                "evaluation_data_config": "eval",
                "hw": str(folder / "chip.toml"),
                "weight_method": "mse",
                "evaluations": 0,
                **settings,
            },
        },
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        "no_artifacts": True,
    }


def found(folder: Path, name: str) -> Path:
    files = sorted(folder.rglob(name))
    assert files, f"no {name} in {sorted(str(path) for path in folder.rglob('*'))}"
    return files[0]


def test_the_pass_runs_behind_one_of_olives_own(workspace: Path) -> None:
    from olive.workflows import run

    from raqu_onnx.integrations.olive import package_config

    run(workflow(workspace, max_crossbars=9, emit=["qonnx"]), package_config=package_config())
    manifest = json.loads(found(workspace / "out", "manifest.json").read_text())
    report = json.loads(found(workspace / "out", "report.json").read_text())
    assert report["figures"][-1]["crossbars"] <= 9
    assert report["data"]["selection"]["labels"] is True
    assert report["data"]["evaluation"]["samples"] == len(np.load("eval.npz")["labels"])
    emitted = onnx.load(found(workspace / "out", "model.onnx"))
    names = {tensor.name for tensor in emitted.graph.initializer}
    assert {node["weight"] for node in manifest["nodes"]} <= names
    assert found(workspace / "out", "model.qonnx.onnx")


def test_the_command_line_takes_the_printed_package_configuration(workspace: Path) -> None:
    settings = workflow(workspace, weight_bits=4)
    (workspace / "workflow.json").write_text(json.dumps(settings))
    printed = subprocess.run(
        [sys.executable, "-m", "raqu_onnx.integrations.olive"], check=True, capture_output=True, text=True
    )
    (workspace / "package.json").write_text(printed.stdout)
    command = ["-m", "olive", "run", "--config", "workflow.json", "--package-config", "package.json"]
    subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    bits = json.loads(found(workspace / "out", "report.json").read_text())["bits"]
    assert {item["weight"] for item in bits.values()} <= {4.0}


def test_a_wrong_setting_is_told(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    from olive.workflows import run

    from raqu_onnx.integrations.olive import package_config

    run(workflow(workspace, weight_bits=40), package_config=package_config())
    assert "out of range: widths are 2 to 8" in caplog.text
    assert not list((workspace / "out").rglob("*.onnx"))
