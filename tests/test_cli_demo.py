"""The demo and the bundled models and data that it runs on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

Cli = Callable[..., Any]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_demo_prints_the_command_to_edit(
    cli: Cli, workspace: Path, monkeypatch: pytest.MonkeyPatch, small_data: Callable[..., dict[str, np.ndarray]]
) -> None:
    """With the small net in the place of the bundled one, whose run takes minutes."""
    import raqu_onnx.bundled

    monkeypatch.setattr(raqu_onnx.bundled, "bundled_model", lambda _name: (workspace / "model.onnx").read_bytes())
    monkeypatch.setattr(raqu_onnx.bundled, "bundled_arrays", lambda part: small_data(seed=len(part)))
    ran = cli("demo", "-o", "a demo")
    assert ran.code == 0, ran.err
    folder = workspace / "a demo" / "resnet20"
    assert sorted(path.name for path in folder.iterdir()) == [
        "calibration.npz", "resnet20.onnx", "result", "selection.npz", "test.npz",
    ]  # fmt: skip
    line = ran.out.splitlines()[-1].strip()
    assert line.startswith("raqu-onnx optimize 'a demo/resnet20/resnet20.onnx'")
    before = digests(folder / "result")
    import shlex

    assert cli(*shlex.split(line)[1:]).code == 0
    assert digests(folder / "result") == before
    again = cli("demo", "-o", "a demo")
    assert (again.code, len(again.err.splitlines())) == (2, 1)
    assert "--force" in again.err


@pytest.mark.parametrize("part", ["calibration", "selection", "test"])
def test_the_bundled_data_fits_the_bundled_models(part: str) -> None:
    from raqu_onnx.bundled import bundled_arrays, bundled_model

    arrays = bundled_arrays(part)
    assert arrays["input"].dtype == np.float32
    assert arrays["input"].shape == (len(arrays["labels"]), 1, 28, 28)
    assert 0 <= arrays["input"].min() < arrays["input"].max() <= 1
    assert set(np.unique(arrays["labels"])) == set(range(10))
    assert part != "test" or len(arrays["labels"]) == 10_000
    model = onnx.load_from_string(bundled_model("resnet20"))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims][1:] == [1, 28, 28]
    assert [item.name for item in model.graph.input] == ["input"]
