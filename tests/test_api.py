"""The Python interface: what `import raqu_onnx` gives, and what `optimize` takes and answers."""

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
from onnx import TensorProto, helper

import raqu_onnx
from raqu_onnx import OptimizeConfig, OptimizeResult, load_chip, optimize
from raqu_onnx.errors import DataError, ModelError, OutputError

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
        # What other people's packages are needed for is imported by tests/flows.
        if parts[-1] == "__main__" or "integrations" in parts:
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
    # On every CPU: 8-bit weights are not exact on all of them.
    assert [warning for warning in result.warnings if "VNNI" not in warning] == []
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
@pytest.mark.parametrize(
    "goal", [{"max_accuracy_drop": 100.0}, {"max_crossbars": 13}, {"weight_bits": (8, 8), "max_accuracy_drop": 9.0}]
)
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

    arguments = {"calibration": "calibration.npz", "chip": "chip.toml", "config": FAST}
    with pytest.raises(KeyboardInterrupt):
        optimize("model.onnx", "out", progress=interrupt, **arguments)
    # What was judged is kept for going on; then nothing of it is left.
    assert set(snapshot(workspace)) == {*before, "out.journal.jsonl"}
    resumed = optimize("model.onnx", "out", resume=True, **arguments)
    assert resumed.output == Path("out")
    assert not (workspace / "out.journal.jsonl").exists()


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
