"""The QONNX form, run by the qonnx package, beside the QDQ model in onnxruntime.

`.ci/run` calls this in an environment of its own when RAQU_CI_ALL=1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from result_folders import small_chip, write_folder

import raqu_onnx
from raqu_onnx.bundled import bundled_arrays, bundled_model
from raqu_onnx.evaluation import make_session
from raqu_onnx.manifest import read_manifest
from raqu_onnx.model_io import load_model, save_model
from raqu_onnx.output import QONNX_FILE
from raqu_onnx.qonnx_model import qonnx_model

pytest.importorskip("qonnx", reason="runs in an environment of its own: RAQU_CI_ALL=1 .ci/run")


def execute(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every node by the qonnx package: `Quant` by its own code, the others one by one in onnxruntime."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    model = onnx.load(path)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in model.graph.input:
        # The package wants every shape fixed.
        value.type.tensor_type.shape.dim[0].dim_value = len(next(iter(inputs.values())))
    del model.graph.value_info[:]
    wrapped = ModelWrapper(model).transform(InferShapes())
    found: dict[str, Any] = execute_onnx(wrapped, inputs)
    return found


def test_the_bundled_model_gives_the_same_outputs(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(bundled_model("resnet20"))
    result = raqu_onnx.optimize(
        model,
        tmp_path / "out",
        calibration={"input": bundled_arrays("calibration")["input"][:64]},
        weight_bits=(2, 4),
        activation_bits=(4, 8),
        weight_method="mse",
        evaluations=0,
        sensitivity_samples=32,
        emit=("qonnx",),
    )
    assert len({weight for weight, _ in result.bits.values()}) > 2, "the widths differ"
    images = {"input": bundled_arrays("test")["input"][:4]}
    expected = make_session(tmp_path / "out" / "model.onnx", level="disable-all").run(None, images)
    got = execute(tmp_path / "out" / QONNX_FILE, images)
    np.testing.assert_allclose(got[next(iter(got))], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ["offset", "differential-column"])
def test_every_operator_gives_the_same_outputs(tmp_path: Path, encoding: str) -> None:
    write_folder(tmp_path / "out", small_chip(encoding))
    emitted = load_model(tmp_path / "out" / "model.onnx")
    save_model(qonnx_model(emitted, read_manifest(tmp_path / "out" / "manifest.json")), tmp_path / "q.onnx")
    inputs = {"x": np.random.default_rng(3).normal(scale=2, size=(2, 3, 8, 8)).astype(np.float32)}
    session = make_session(tmp_path / "out" / "model.onnx", level="disable-all")
    expected = dict(zip([item.name for item in session.get_outputs()], session.run(None, inputs), strict=True))
    got = execute(tmp_path / "q.onnx", inputs)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-4)
