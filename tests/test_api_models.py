"""Models in and out of `optimize`, in every form that a flow has them in, and its passes beside onnx_ir's own."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common
from onnxruntime.quantization import CalibrationDataReader

from raqu_onnx import OptimizeConfig, optimize
from raqu_onnx.errors import ModelError
from raqu_onnx.passes import AnnotateTilingPass, InsertQDQPass, QuantizeWeightsPass, TidyPass

FAST = OptimizeConfig(weight_bits=4, weight_method="mse", evaluations=0)


def outputs(model: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": inputs})[0])


@pytest.mark.parametrize("output", [None, "out"])
@pytest.mark.parametrize("kind", ["path", "message", "onnx_ir"])
def test_every_form_of_a_model_gives_the_same_model(workspace: Path, kind: str, output: str | None) -> None:
    given = {"path": "model.onnx", "message": onnx.load("model.onnx"), "onnx_ir": ir.load("model.onnx")}[kind]
    expected = optimize("model.onnx", "expected", calibration="calibration.npz", config=FAST).proto
    result = optimize(given, output, calibration="calibration.npz", config=FAST)  # type: ignore[arg-type]
    assert result.proto == expected
    assert ir.to_proto(result.model) == expected
    assert (workspace / "out").exists() is (output is not None)


def test_a_model_in_memory_runs_and_is_a_copy(small_net: Callable[[], Any], small_data: Callable[..., Any]) -> None:
    inputs = small_data()["input"]
    result = optimize(small_net(), calibration={"input": inputs}, config=FAST)
    first = result.model
    first.graph.name = "changed"
    assert result.model.graph.name != "changed"
    error = np.abs(outputs(result.proto, inputs) - outputs(small_net(), inputs)).mean()
    assert 0 < error < 0.2 * np.abs(outputs(small_net(), inputs)).mean()


def test_a_model_that_was_neither_written_nor_kept_is_told(small_net: Callable[[], Any]) -> None:
    result = dataclasses.replace(optimize(small_net(), config=FAST), unwritten=None)
    with pytest.raises(ModelError, match="give `optimize` a folder"):
        _ = result.model


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """What users of onnxruntime's quantizer have already."""

    def __init__(self, inputs: np.ndarray) -> None:
        self.inputs = inputs
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)

    def rewind(self) -> None:
        self.feeds: Iterator[dict[str, np.ndarray]] = ({"input": self.inputs[i : i + 8]} for i in range(0, 48, 8))


def test_onnxruntimes_calibration_reader_gives_what_arrays_do(
    small_net: Callable[[], Any], small_data: Callable[..., Any]
) -> None:
    inputs = small_data()["input"]
    read = optimize(small_net(), calibration=Reader(inputs), config=FAST)
    assert read.proto == optimize(small_net(), calibration={"input": inputs}, config=FAST).proto


def test_passes_run_in_a_sequential_beside_those_of_onnx_ir(small_net: Callable[[], Any]) -> None:
    model = ir.from_proto(small_net())
    pipeline = ir.passes.Sequential(
        common.CommonSubexpressionEliminationPass(),
        TidyPass(),
        AnnotateTilingPass(),
        QuantizeWeightsPass(weight_bits=4, activation_bits=None, weight_method="mse"),
        InsertQDQPass(),
        common.RemoveUnusedNodesPass(),
        common.CheckerPass(),
    )
    result = pipeline(model)
    assert result.modified
    quantized = [node for node in result.model.graph if node.op_type == "DequantizeLinear"]
    assert len(quantized) == sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in result.model.graph)
    inputs = np.zeros((1, 3, 8, 8), np.float32)
    assert outputs(ir.to_proto(result.model), inputs).shape == outputs(small_net(), inputs).shape


def test_a_pass_that_needs_another_says_so_in_a_sequential(small_net: Callable[[], Any]) -> None:
    pipeline = ir.passes.Sequential(common.CheckerPass(), QuantizeWeightsPass())
    with pytest.raises(ir.passes.PassError) as raised:
        pipeline(ir.from_proto(small_net()))
    assert "annotate-tiling" in "".join(traceback.format_exception(raised.value))
