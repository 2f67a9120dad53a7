"""The tool that draws crossbars: everything but the drawing itself, which needs the extra `docs`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import raqu_onnx


def _load() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "draw_placement.py"
    spec = importlib.util.spec_from_file_location("draw_placement", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool: Any = _load()


def _model() -> onnx.ModelProto:
    """Two layers that fill one and a half crossbars of 128x128 each."""
    random = np.random.default_rng(0)
    weights = {"w1": random.normal(size=(192, 32)), "w2": random.normal(size=(32, 48))}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
            helper.make_node("MatMul", ["h", "w2"], ["y"], "last"),
        ],
        "two",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 192])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 48])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draw") / "result"
    config = raqu_onnx.OptimizeConfig(weight_bits="4-8", evaluations=0, max_accuracy_drop=100)
    raqu_onnx.optimize(_model(), folder, config=config)
    return folder


def _areas(panel: Any) -> int:
    return sum(item.height * item.width for item in panel.rectangles)


def _cells(panel: Any, size: int = 128) -> dict[tuple[int, int], np.ndarray]:
    cells: dict[tuple[int, int], np.ndarray] = {}
    for item in panel.rectangles:
        array = cells.setdefault(item.array, np.zeros((size, size), int))
        rows, cols = slice(item.row, item.row + item.height), slice(item.col, item.col + item.width)
        assert array[rows, cols].size == item.height * item.width, "leaves its crossbar"
        array[rows, cols] += 1
    return cells


def test_the_rectangles_are_the_programmed_cells(result: Path) -> None:
    manifest, panels = tool.read_panels(result)
    used = manifest.totals.cell_utilization.numerator
    assert _areas(panels[2]) == used
    assert panels[2].crossbars == (manifest.totals.crossbars[0].allocated,)
    for panel in panels:
        cells = _cells(panel)
        assert max(array.max() for array in cells.values()) == 1, "blocks overlap"
        assert len(cells) == sum(panel.crossbars)
        assert panel.cells_used == pytest.approx(_areas(panel) / (128 * 128 * sum(panel.crossbars)))


def test_left_panel_has_one_node_per_crossbar_and_the_next_does_not(result: Path) -> None:
    _, panels = tool.read_panels(result, uniform_bits=8)
    left, middle, _ = panels
    assert "8 bits" in left.title
    # Blocks of 128x128, 64x128 | 32x128, 32x64: one each, or all but the first together.
    assert left.crossbars == (4,)
    assert middle.crossbars == (2,)
    owners: dict[tuple[int, int], set[str]] = {}
    for item in left.rectangles:
        owners.setdefault(item.array, set()).add(item.node)
    assert all(len(nodes) == 1 for nodes in owners.values())


def test_a_folder_without_a_best_uniform_width_needs_one_to_be_given(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_bytes((result / "manifest.json").read_bytes())
    assert tool.main([str(tmp_path), "-o", str(tmp_path / "out.svg")]) == 2
    assert "--uniform-bits" in capsys.readouterr().err
    assert tool.read_panels(tmp_path, uniform_bits=2)[1][0].top1 is None


@given(
    st.lists(st.tuples(st.sampled_from([16, 64, 128, 512]), st.sampled_from([16, 64, 256])), min_size=1, max_size=3),
    st.lists(st.integers(0, 40), min_size=3, max_size=3),
)
def test_crossbars_in_a_grid_neither_overlap_nor_leave_it(sizes: list[tuple[int, int]], counts: list[int]) -> None:
    counts = [*counts[: len(sizes) - 1], 1 + counts[-1]]
    grid = tool.Grid.around(sizes, counts)
    corners, height = grid.corners(counts)
    assert len(corners) == sum(counts)
    boxes = [(x, y, x + sizes[kind][1], y + sizes[kind][0]) for (kind, _), (x, y) in corners.items()]
    assert max(box[2] for box in boxes) <= grid.width + 1e-6
    assert max(box[3] for box in boxes) <= height + 1e-6
    assert min(min(box[:2]) for box in boxes) >= 0
    for index, a in enumerate(boxes):
        for b in boxes[:index]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_a_picture_is_drawn(result: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra docs")
    for name in ("first.svg", "second.svg"):
        assert tool.main([str(result), "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
