"""Models, shapes and chips of every kind, through the Python interface."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from raqu_onnx import Chip, OptimizeConfig, RaquError, optimize, validate
from raqu_onnx.errors import DataError
from raqu_onnx.hardware import CrossbarType, builtin_chips
from raqu_onnx.placement import DoesNotFitError

Net = Callable[..., onnx.ModelProto]
Data = Callable[..., dict[str, np.ndarray]]

FAST = OptimizeConfig(evaluations=2)
UNIFORM = OptimizeConfig(weight_bits=6)


def outputs(model: Path | onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def made(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    inputs: dict[str, list[int | str]],
    result: str,
    *,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(result, kind, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def two_inputs() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    nodes = [
        helper.make_node("Conv", ["picture", "wc"], ["c"], "conv"),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("MatMul", ["side", "wm"], ["m"], "side_matmul"),
        helper.make_node("Concat", ["f", "m"], ["j"], axis=1),
        helper.make_node("Gemm", ["j", "wg", "bg"], ["y"], "head", transB=1),
    ]
    weights = {
        "wc": normal(0, 4, 2, 3, 3), "wm": normal(1, 6, 8), "wg": normal(2, 3, 4 * 4 * 4 + 8), "bg": normal(3, 3),
    }  # fmt: skip
    model = made(nodes, weights, {"picture": ["N", 2, 6, 6], "side": ["N", 6]}, "y")
    return model, {"picture": normal(4, 16, 2, 6, 6), "side": normal(5, 16, 6)}


def sequence() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "conv1d", pads=[1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MatMul", ["wl", "r"], ["l"], "left"),
        helper.make_node("Transpose", ["l"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "wr"], ["y"], "right"),
    ]
    weights = {"w1": normal(0, 6, 4, 3), "wl": normal(1, 5, 6), "wr": normal(2, 5, 7)}
    return made(nodes, weights, {"x": ["N", 4, 10]}, "y"), {"x": normal(3, 16, 4, 10)}


def volume() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], "conv3d", strides=[1, 2, 1]),
        helper.make_node("Sigmoid", ["c"], ["s"]),
        helper.make_node("ConvTranspose", ["s", "w2", "b2"], ["y"], "up", group=2, strides=[2, 1, 1]),
    ]
    weights = {
        "w1": normal(0, 4, 2, 2, 2, 2), "b1": normal(1, 4), "w2": normal(2, 4, 3, 2, 1, 2), "b2": normal(3, 6),
    }  # fmt: skip
    return made(nodes, weights, {"x": ["N", 2, 5, 6, 4]}, "y"), {"x": normal(4, 12, 2, 5, 6, 4)}


def shared_weight() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """One weight in two layers, a layer without a name, and one product of two activations."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], "first"),
        helper.make_node("Tanh", ["a"], ["t"]),
        helper.make_node("Gemm", ["t", "w", "b"], ["g"], alpha=0.5, beta=2.0),
        helper.make_node("Transpose", ["g"], ["gt"]),
        helper.make_node("MatMul", ["g", "gt"], ["y"], "gram"),
    ]
    return made(nodes, {"w": normal(0, 6, 6), "b": normal(1, 6)}, {"x": [4, 6]}, "y"), {"x": normal(2, 16, 6)}


def with_batchnorm() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", group=4),
        helper.make_node("BatchNormalization", ["c", "s", "o", "m", "v"], ["n"]),
        helper.make_node("Clip", ["n", "low", "high"], ["y"]),
    ]
    weights = {
        "w": normal(0, 8, 1, 3, 3), "s": normal(1, 8), "o": normal(2, 8), "m": normal(3, 8),
        "v": normal(4, 8) ** 2 + 0.5, "low": np.array(0, np.float32), "high": np.array(6, np.float32),
    }  # fmt: skip
    return made(nodes, weights, {"x": ["N", 4, 6, 6]}, "y"), {"x": normal(5, 16, 4, 6, 6)}


def two_outputs() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Two convolutions of one tensor; the result of the first is read and is an output, too."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "left"),
        helper.make_node("Conv", ["x", "w2"], ["b"], "right"),
        helper.make_node("Concat", ["a", "b"], ["y"], axis=1),
    ]
    model = made(nodes, {"w1": normal(0, 4, 3, 3, 3), "w2": normal(1, 4, 3, 3, 3)}, {"x": ["N", 3, 6, 6]}, "y")
    model.graph.output.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, None))
    return model, {"x": normal(2, 12, 3, 6, 6)}


def tokens() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Whole numbers in, names with spaces, and a layer whose inputs are all 0 for the padding token."""
    nodes = [
        helper.make_node("Gather", ["table of words", "token ids"], ["e"]),
        helper.make_node("MatMul", ["e", "w é"], ["y"], "[bold]projection"),
    ]
    table = normal(0, 10, 6)
    table[0] = 0
    graph = made(nodes, {"table of words": table, "w é": normal(1, 6, 4)}, {"token ids": ["N", 5]}, "y")
    graph.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    return graph, {"token ids": np.random.default_rng(0).integers(0, 10, (12, 5))}


@pytest.mark.parametrize("build", [two_inputs, sequence, volume, shared_weight, with_batchnorm, two_outputs, tokens])
def test_models_of_every_kind(
    tmp_path: Path, build: Callable[[], tuple[onnx.ModelProto, dict[str, np.ndarray]]]
) -> None:
    model, feeds = build()
    config = OptimizeConfig(evaluations=1, activation_bits=(6, 8), cells=True, max_accuracy_drop=3.0)
    result = optimize(model, tmp_path / "out", calibration=feeds, selection=feeds, evaluation=feeds, config=config)
    assert result.validation is not None
    assert result.validation.passed
    assert len(result.bits) == sum(
        node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") for node in model.graph.node
    ) - len(result.unmapped)
    assert all(reason for _, _, reason in result.unmapped)
    assert validate(tmp_path / "out", feeds).passed
    wide = OptimizeConfig(weight_bits=8)
    optimize(model, tmp_path / "wide", calibration=feeds, selection=feeds, config=wide)
    batch = {name: array[:4] for name, array in feeds.items()}
    expected, found = outputs(model, batch)[0], outputs(tmp_path / "wide" / "model.onnx", batch)[0]
    noise = np.linalg.norm(expected - found) / np.linalg.norm(expected)
    assert noise < 0.05


@pytest.mark.parametrize(
    "shape", [(1, 8), (4, 8), ("N", "S"), (1, "S")], ids=["batch-1", "batch-4", "free-size", "batch-1-free-size"]
)
def test_fixed_batches_and_free_sizes(
    tmp_path: Path, small_net: Net, small_data: Data, shape: tuple[int | str, int | str]
) -> None:
    model = small_net(*shape)
    result = optimize(
        model, tmp_path / "out", calibration=small_data(), selection=small_data(seed=2), evaluation=small_data(20, 3),
        config=FAST,
    )  # fmt: skip
    assert result.exit_code in (0, 1)
    assert result.validation is not None
    assert result.validation.passed
    # The emitted model was run at both levels, also where no input could be generated.
    assert {"run.disable-all", "run.enable-all", "run.levels-agree"} <= {
        check.name for check in result.validation.checks if check.passed
    }
    written = onnx.load(tmp_path / "out" / "model.onnx")
    assert written.graph.input[0] == model.graph.input[0]
    assert written.graph.output[0].name == "logits"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [node["mvms"] for node in manifest["nodes"]] == [64, 16, 1]


def test_no_data_for_a_free_size_is_told(small_net: Net) -> None:
    with pytest.raises(DataError, match="give calibration data"):
        optimize(small_net(size="S"), config=UNIFORM)


def test_no_data_at_all_still_runs(tmp_path: Path, small_net: Net) -> None:
    for index, batch in enumerate(("N", 1, 7)):
        result = optimize(small_net(batch), tmp_path / str(index), config=UNIFORM)
        assert "synthetic" in result.warnings[0]
        manifest = json.loads((tmp_path / str(index) / "manifest.json").read_text())
        assert manifest["calibration"]["synthetic"] is True
        assert manifest["selection"]["synthetic"] is True


# --------------------------------------------------------------------------------------------------- chips of all kinds


def chips() -> list[Any]:
    kinds: dict[str, dict[str, Any]] = {
        "offset": {"encoding": "offset"},
        "unit-column": {"encoding": "offset", "offset_sum": "unit-column"},
        "flip": {"encoding": "offset", "offset_sum": "unit-column", "flip": True, "adc_bits": 8},
        "column": {"encoding": "differential-column"},
        "pair": {"encoding": "differential-column", "polarity_arrays": "pair"},
        "row": {"encoding": "differential-row"},
        "twos": {"encoding": "twos-complement"},
        "split": {"encoding": "offset", "split_slices": True},
    }
    cases = []
    for number, (name, extra) in enumerate(kinds.items()):
        for turn, sharing in enumerate(("exclusive", "diagonal", "time")):
            # Depthwise layers, and a second type of crossbars, meet every encoding and every sharing in turn.
            depthwise = (number + turn) % 2 == 0
            cases.append(pytest.param({"sharing": sharing, **extra}, depthwise, id=f"{name}-{sharing}"))
    return cases


@pytest.mark.parametrize(("settings", "depthwise"), chips())
def test_every_encoding_and_sharing(
    tmp_path: Path, small_net: Net, small_data: Data, settings: dict[str, Any], depthwise: bool
) -> None:
    crossbars = (
        CrossbarType(name="main", rows=40, cols=24, cell_bits=2),
        CrossbarType(name="wide", rows=64, cols=36, cell_bits=1, count=40),
    )
    chip = Chip(schema_version=1, name="any", dac_bits=1, crossbars=crossbars[: 1 + depthwise], **settings)
    config = OptimizeConfig(evaluations=0, cells=True, weight_bits=(3, 6), sensitivity_samples=16)
    out = tmp_path / "out"
    result = optimize(
        small_net(depthwise=depthwise), out, calibration=small_data(16), selection=small_data(16, 2), chip=chip,
        config=config,
    )  # fmt: skip
    assert result.validation is not None
    assert result.validation.passed
    assert result.exit_code in (0, 1)
    report = validate(out)
    assert report.passed, [check for check in report.checks if check.passed is False]
    ours = result.figures[-1]
    assert ours.crossbars is not None
    assert ours.cell_utilization is not None
    assert ours.bit_utilization is not None
    assert 0 < ours.bit_utilization <= 1
    assert 0 < ours.cell_utilization <= 1
    if len(chip.crossbars) == 1:
        # Where types hold different bits per cell, the two shares weigh them differently.
        assert ours.bit_utilization <= ours.cell_utilization


@pytest.mark.parametrize("name", builtin_chips())
def test_every_built_in_chip(tmp_path: Path, small_net: Net, small_data: Data, name: str) -> None:
    model = small_net(depthwise=name in ("hetero", "prime", "isaac"))
    try:
        result = optimize(
            model, tmp_path / "out", calibration=small_data(), selection=small_data(seed=2), chip=name, config=FAST
        )
    except RaquError as error:
        pytest.fail(f"{name}: {error}")
    assert result.exit_code in (0, 1)
    assert validate(tmp_path / "out").passed


def test_a_chip_without_room_is_told(small_net: Net, small_data: Data) -> None:
    chip = Chip(
        schema_version=1,
        name="one",
        encoding="offset",
        sharing="time",
        dac_bits=1,
        crossbars=(CrossbarType(name="main", rows=16, cols=16, cell_bits=2, count=1),),
    )
    for config in (FAST.model_copy(update={"drop": False}), UNIFORM):
        with pytest.raises(DoesNotFitError, match="one"):
            optimize(small_net(), calibration=small_data(), chip=chip, config=config)
