"""The Python interface: what `import raqu_onnx` gives, and `optimize` on models and chips of every kind."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import raqu_onnx
from raqu_onnx import Chip, OptimizeConfig, OptimizeResult, RaquError, load_chip, optimize, validate
from raqu_onnx.errors import DataError, ModelError, OutputError
from raqu_onnx.hardware import CrossbarType, builtin_chips
from raqu_onnx.placement import DoesNotFitError

Net = Callable[..., onnx.ModelProto]
Data = Callable[..., dict[str, np.ndarray]]

FAST = OptimizeConfig(evaluations=2)
UNIFORM = OptimizeConfig(weight_bits=6)


def unlabelled(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in data.items() if name != "labels"}


def outputs(model: Path | onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


# ------------------------------------------------------------------------------------------------------------ facade


def test_everything_in_the_facade_is_there_and_documented() -> None:
    assert sorted(raqu_onnx.__all__) == raqu_onnx.__all__
    for name in raqu_onnx.__all__:
        item = getattr(raqu_onnx, name)
        assert item.__module__.startswith("raqu_onnx."), name
        assert inspect.getdoc(item), name
        home = importlib.import_module(item.__module__)
        assert name in home.__all__, name
        if inspect.isfunction(item):
            assert "return" in item.__annotations__, name
            assert set(inspect.signature(item).parameters) <= set(item.__annotations__), name
    assert set(raqu_onnx.__all__) <= set(dir(raqu_onnx))
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        raqu_onnx.optimise  # type: ignore[attr-defined]  # noqa: B018


def test_every_module_says_what_is_public() -> None:
    root = Path(raqu_onnx.__file__).parent
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
        assert module.__doc__, path
        if path.stat().st_size > 500:
            assert module.__all__, path
            assert all(hasattr(module, name) for name in module.__all__), path


def test_the_package_is_typed() -> None:
    assert (Path(raqu_onnx.__file__).parent / "py.typed").exists()


# ------------------------------------------------------------------------------------------------ models, data, results


def test_a_result_says_all(workspace: Path) -> None:
    result = optimize(
        "model.onnx", "out", calibration="calibration.npz", selection="selection.npz", evaluation="eval.npz",
        chip="chip.toml", config=OptimizeConfig(evaluations=2, max_crossbars=12),
    )  # fmt: skip
    assert isinstance(result, OptimizeResult)
    assert result.output == Path("out")
    assert result.exit_code == 0
    assert result.search is not None
    assert result.search.goal_met
    assert [item.crossbars for item in result.search.front] == sorted({item.crossbars for item in result.search.front})
    assert result.validation is not None
    assert result.validation.passed
    assert set(result.bits) == {"conv1", "conv2", "fc"}
    assert result.unmapped == ()
    assert result.warnings == ()
    assert [item.name for item in result.timings] == list(raqu_onnx.pipeline.DEFAULT_PIPELINE)
    labels = [item.label for item in result.figures]
    assert labels[0] == "float"
    assert labels[-1] == "ours"
    first, ours = result.figures[0], result.figures[-1]
    assert first.evaluation is not None
    assert first.evaluation.top1 == 1.0  # The labels are what the model itself says.
    assert first.crossbars is None
    assert ours.crossbars is not None
    assert result.lower_bound is not None
    assert result.lower_bound <= ours.crossbars <= 12
    assert ours.evaluation is not None
    assert set(result.levels) == {"disable-all", "enable-all"}
    assert ours.evaluation == result.levels["enable-all"]
    # What the figures say of the emitted file is what a user measures on it.
    with np.load(workspace / "eval.npz") as data:
        said = outputs(workspace / "out" / "model.onnx", {"input": data["input"]})[0].argmax(1)
        assert ours.evaluation.top1 == pytest.approx(np.mean(said == data["labels"]))
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["figures"][-1]["crossbars"] == ours.crossbars


@pytest.mark.parametrize("sharing", ["exclusive", "diagonal", "time"])
@pytest.mark.parametrize("goal", [{"max_accuracy_drop": 100.0}, {"max_crossbars": 13}, {"weight_bits": (8, 8)}])
def test_baselines_stand_in_every_result(workspace: Path, sharing: Any, goal: dict[str, Any]) -> None:
    chip = load_chip(workspace / "chip.toml").model_copy(update={"sharing": sharing})
    config = OptimizeConfig(**({"evaluations": 0, "weight_bits": (4, 8)} | goal))
    result = optimize("model.onnx", calibration="calibration.npz", selection="selection.npz", chip=chip, config=config)
    table = {item.label: item for item in result.figures}
    for kind in ("8-bit", "best uniform"):
        for packing in ("unpacked", " packed"):
            rows = [item for label, item in table.items() if kind in label and label.endswith(packing)]
            assert rows, (kind, packing, list(table))
            assert all(item.crossbars is not None and item.selection is not None for item in rows)
    by_packing = [
        [item.crossbars for label, item in table.items() if label.endswith(packing)]
        for packing in ("unpacked", " packed")
    ]
    for alone, packed in zip(*by_packing, strict=True):
        assert alone is not None
        assert packed is not None
        assert packed == alone if sharing == "exclusive" else packed <= alone


def test_models_may_come_in_three_forms_and_stay_as_they_are(workspace: Path, small_net: Net) -> None:
    proto = small_net()
    text = proto.SerializeToString()
    graph = ir.from_proto(small_net())
    before = ir.to_proto(graph).SerializeToString()
    path = workspace / "model.onnx"
    results = [
        optimize(model, f"out{index}", calibration="calibration.npz", selection="selection.npz", config=UNIFORM)
        for index, model in enumerate((proto, graph, path))
    ]
    assert proto.SerializeToString() == text
    assert ir.to_proto(graph).SerializeToString() == before
    assert path.read_bytes() == text
    written = [(workspace / f"out{index}" / "model.onnx").read_bytes() for index in range(3)]
    assert written[0] == written[1] == written[2]
    assert results[0].figures == results[1].figures == results[2].figures
    manifests = [json.loads((workspace / f"out{index}" / "manifest.json").read_text()) for index in range(3)]
    assert [item["model"]["source_sha256"] is None for item in manifests] == [True, True, False]
    assert [item["configuration"]["model"] for item in manifests] == [None, None, str(path)]


class Reader:
    """An onnxruntime CalibrationDataReader."""

    def __init__(self, arrays: np.ndarray) -> None:
        self._arrays = arrays
        self.rewind()

    def rewind(self) -> None:
        self._feeds = iter(np.split(self._arrays, len(self._arrays) // 8))

    def get_next(self) -> dict[str, np.ndarray] | None:
        found = next(self._feeds, None)
        return None if found is None else {"input": found}


def test_data_may_come_in_every_form(workspace: Path, small_net: Net, small_data: Data) -> None:
    arrays = small_data(48, seed=1)
    np.save(workspace / "calibration.npy", arrays["input"])
    choice = small_data(48, seed=2)
    written = []
    for index, source in enumerate((arrays, unlabelled(arrays), Reader(arrays["input"]), "calibration.npy")):
        optimize(small_net(), f"out{index}", calibration=source, selection=choice, config=UNIFORM)
        written.append((workspace / f"out{index}" / "model.onnx").read_bytes())
    assert len(set(written)) == 1


def test_what_was_run_is_what_is_recorded(workspace: Path, small_data: Data) -> None:
    config = OptimizeConfig(weight_bits=6, hw="isaac", calibration="absent.npz", eval="absent.npz", model="absent.onnx")
    optimize(
        workspace / "model.onnx", "out", calibration=small_data(), selection="selection.npz", evaluation="eval.npz",
        chip="chip.toml", config=config,
    )  # fmt: skip
    manifest = json.loads((workspace / "out" / "manifest.json").read_text())
    found = manifest["configuration"]
    assert (found["hw"], found["eval"], found["selection"]) == ("chip.toml", "eval.npz", "selection.npz")
    assert found["calibration"] is None
    assert found["model"] == str(workspace / "model.onnx")
    assert manifest["chip"]["name"] == "small"
    assert manifest["calibration"]["samples"] == 48


def test_without_output_nothing_is_written(
    workspace: Path, snapshot: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = workspace.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = snapshot(workspace.parent)
    result = optimize("model.onnx", calibration="calibration.npz", config=UNIFORM)
    assert result.output is None
    assert result.validation is not None
    assert result.validation.passed
    assert snapshot(workspace.parent) == before


@pytest.mark.usefixtures("workspace")
def test_data_that_serves_two_purposes_and_labels_that_serve_none_are_told(small_net: Net, small_data: Data) -> None:
    data = small_data(32)
    result = optimize("model.onnx", calibration=data, selection=data, evaluation="eval.npz", config=UNIFORM)
    assert [w for w in result.warnings if "selection data is the calibration data" in w]
    net = small_net()
    logits = net.graph.output[0]
    net.graph.node.append(helper.make_node("ReduceMax", ["logits"], ["largest"], "largest", axes=[1], keepdims=0))
    logits.name = "largest"
    del logits.type.tensor_type.shape.dim[1]
    result = optimize(net, calibration="calibration.npz", selection="selection.npz", config=UNIFORM)
    assert result.figures[0].selection is not None
    assert result.figures[0].selection.top1 is None
    assert [w for w in result.warnings if "labels of selection.npz are not used" in w]


@pytest.mark.usefixtures("workspace")
def test_a_pipeline_that_emits_no_integers_shows_no_figures_of_ours() -> None:
    passes = "tidy,annotate-tiling,calibrate,quantize-weights,place-crossbars"
    result = optimize("model.onnx", calibration="calibration.npz", config=OptimizeConfig(passes=passes))
    assert result.figures == ()
    assert result.levels == {}


def test_settings_may_name_everything(workspace: Path) -> None:
    config = OptimizeConfig(
        output="out", calibration="calibration.npz", selection="selection.npz", eval="eval.npz", hw="chip.toml",
        weight_bits=6,
    )  # fmt: skip
    result = optimize("model.onnx", config=config)
    assert result.output == Path("out")
    assert (workspace / "out" / "manifest.json").exists()
    with pytest.raises(OutputError, match="--force"):
        optimize("model.onnx", config=config)
    optimize("model.onnx", config=config, force=True)


def test_progress_is_told(workspace: Path) -> None:
    told: list[tuple[str, int, int]] = []
    optimize(
        workspace / "model.onnx", calibration="calibration.npz", evaluation="eval.npz", chip="chip.toml", config=FAST,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert len({what for what, _, _ in told}) > 3
    assert all(0 <= done <= max(total, 1) for _, done, total in told)


def test_an_interrupt_passes_through(workspace: Path, snapshot: Callable[[Path], Any]) -> None:
    before = snapshot(workspace)

    def interrupt(what: str, done: int, total: int) -> None:
        del done, total
        if "sensitivity" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize("model.onnx", "out", calibration="calibration.npz", chip="chip.toml", config=FAST, progress=interrupt)
    assert snapshot(workspace) == before


def test_errors_name_models_in_memory_too(small_net: Net) -> None:
    with pytest.raises(DataError, match=r"absent\.npz"):
        optimize(small_net(), calibration="absent.npz")
    empty = helper.make_model(
        helper.make_graph(
            [helper.make_node("Relu", ["x"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    with pytest.raises(ModelError, match=r"^the model has no node"):
        optimize(empty)


# ------------------------------------------------------------------------------------------------- models of all kinds


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
    assert 0 < ours.bit_utilization <= ours.cell_utilization <= 1


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
    for config in (FAST, UNIFORM):
        with pytest.raises(DoesNotFitError, match="one"):
            optimize(small_net(), calibration=small_data(), chip=chip, config=config)
