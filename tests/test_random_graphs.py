"""Random small graphs through the pipeline, each mapped node against an integer reference; see tools/fuzz_graphs.py."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

TOOLS = Path(__file__).parents[1] / "tools"
GRAPHS, PER_TEST = 200, 10


def _load(name: str) -> ModuleType:
    """A module of tools/, which is no package: its files import each other by name, as when they are run."""
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


graph_case = _load("graph_case")
check_nodes = _load("check_nodes")
fuzz_graphs = _load("fuzz_graphs")
random_graphs = _load("random_graphs")
integer_reference = _load("integer_reference")


@pytest.mark.parametrize("first", range(0, GRAPHS, PER_TEST))
def test_random_graphs(first: int, tmp_path: Path) -> None:
    problems, compared = {}, 0
    for seed in range(first, first + PER_TEST):
        folder = tmp_path / str(seed)
        folder.mkdir()
        result = graph_case.run_case(seed, folder, full=seed % 10 == 0)
        compared += sum(result.operators.values())
        if result.problems:
            problems[seed] = result.problems
    assert not problems
    assert compared > PER_TEST // 2


def test_graphs_are_varied_and_valid() -> None:
    graphs = [random_graphs.random_graph(seed) for seed in range(GRAPHS)]
    for graph in graphs[:40]:
        onnx.checker.check_model(graph.model, full_check=True)
    operators = Counter(node.op_type for graph in graphs for node in graph.model.graph.node)
    expected = (
        "Conv ConvTranspose Gemm MatMul BatchNormalization Relu Clip LeakyRelu Sigmoid HardSwish Softmax MaxPool "
        "AveragePool GlobalAveragePool Add Mul Concat Flatten Reshape Transpose Pad Constant Cast Identity"
    )
    assert not [name for name in expected.split() if not operators[name]]
    assert {graph.model.opset_import[0].version for graph in graphs} == set(range(13, 25))
    assert {len(graph.model.graph.input) for graph in graphs} == {1, 2, 3}
    assert {len(graph.model.graph.output) for graph in graphs} >= {1, 2, 3}
    convolutions = [n for graph in graphs for n in graph.model.graph.node if n.op_type == "Conv"]
    attributes = Counter(item.name for node in convolutions for item in node.attribute)
    assert all(attributes[name] for name in ("group", "strides", "dilations", "pads", "auto_pad"))


def test_the_same_seed_gives_the_same_graph() -> None:
    one, other = random_graphs.random_graph(7), random_graphs.random_graph(7)
    assert one.model.SerializeToString() == other.model.SerializeToString()
    assert one.model.SerializeToString() != random_graphs.random_graph(8).model.SerializeToString()
    for name, array in one.feeds.items():
        np.testing.assert_array_equal(array, other.feeds[name])


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A sound emitted model whose nodes end in codes as well as in floats, and inputs to run it on."""
    for seed in range(50):
        folder = tmp_path_factory.mktemp("emitted")
        result = graph_case.run_case(seed, folder)
        graph = random_graphs.random_graph(seed)
        free = graph.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        if free and result.steps and result.share and not result.problems:
            return onnx.load(folder / "model.onnx"), graph.feeds
    raise AssertionError("no such graph among the first")


def _problems(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[str]:
    findings = check_nodes.check_nodes(model, feeds, np.random.default_rng(0))
    return [problem for finding in findings for problem in finding.problems]


def test_a_sound_model_has_no_problems(emitted: tuple[onnx.ModelProto, dict[str, np.ndarray]]) -> None:
    assert _problems(*emitted) == []


@pytest.mark.parametrize("kind", [1, 2])
def test_a_reference_that_is_off_is_noticed(
    emitted: tuple[onnx.ModelProto, dict[str, np.ndarray]], kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = integer_reference.integer_sums

    def wrong(*arguments: object, **options: object) -> np.ndarray:
        sums = right(*arguments, **options)
        return sums * 2 if kind == 1 else -sums

    monkeypatch.setattr(check_nodes, "integer_sums", wrong)
    problems = _problems(*emitted)
    assert any("steps from the integer reference" in text for text in problems)
    assert any("of its range from the integer reference" in text for text in problems)


def test_what_a_graph_dies_of_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_case, "random_graph", lambda seed: seed // 0)
    result = graph_case.run_case(3, tmp_path)
    assert result.problems
    assert "ZeroDivisionError" in result.problems[0]


def test_the_tool_reports(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--graphs", "4", "--start", "5", "--jobs", "1", "--repeat-every", "2", "--report", str(report)]
    ran = subprocess.run(
        [sys.executable, str(TOOLS / "fuzz_graphs.py"), *options], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found == json.loads(report.read_text())
    assert found["graphs"] == 4
    assert found["written_twice"] == 2
    assert found["validated"] == 1
    assert found["failures"] == {}
    assert set(found["largest_end_to_end_difference_in_shares_of_range"]) == {"float", "levels", "simulation"}


def test_the_tool_fails_where_a_graph_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(tasks: list[object], jobs: int) -> list[object]:
        del jobs
        return [graph_case.CaseResult(task.seed, problems=["bad"] if task.seed == 1 else []) for task in tasks]  # type: ignore[attr-defined]

    monkeypatch.setattr(fuzz_graphs, "run_tasks", run)
    assert fuzz_graphs.main(["--graphs", "3"]) == 1
    captured = capsys.readouterr()
    assert "graph 1: bad" in captured.err
    assert json.loads(captured.out)["failures"] == {"1": ["bad"]}


def test_one_graph_can_be_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_graphs.main(["--only", "6", "--save", str(tmp_path / "six")]) == 0
    assert json.loads(capsys.readouterr().out)["validated"]
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {
        "six/float.onnx",
        "six/inputs.npz",
        "six/out/model.onnx",
        "six/out/manifest.json",
        "six/out/cells.npz",
    }
