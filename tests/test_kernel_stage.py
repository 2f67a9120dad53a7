"""Bits per kernel from end to end: within the budget, in the granularity asked for, valid to the last cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from raqu_onnx.config import OptimizeConfig
from raqu_onnx.errors import ConfigError
from raqu_onnx.hardware import Chip, CrossbarType
from raqu_onnx.manifest import read_manifest
from raqu_onnx.manifest_view import ManifestView
from raqu_onnx.optimization import optimize
from raqu_onnx.placement import DoesNotFitError
from raqu_onnx.validation import validate

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    Net = Callable[..., onnx.ModelProto]
    Data = Callable[..., dict[str, np.ndarray]]


def chip(sharing: str = "time", rows: int = 16, cols: int = 16) -> Chip:
    return Chip(
        schema_version=1,
        name="small",
        encoding="offset",
        sharing=sharing,  # type: ignore[arg-type]
        dac_bits=1,
        crossbars=(CrossbarType(name="main", rows=rows, cols=cols, cell_bits=2),),
    )


def run(net: onnx.ModelProto, data: Data, out: Path, sharing: str = "time", **settings: Any) -> Any:
    config = OptimizeConfig(evaluations=2, sensitivity_samples=16, seed=3, **settings)
    return optimize(net, out, calibration=data(48), selection=data(32, 2), chip=chip(sharing), config=config)


def kernel_bits(out: Path) -> dict[str, np.ndarray]:
    view = ManifestView(read_manifest(out / "manifest.json"))
    return {name: node.channel_bits for name, node in view.nodes.items()}


@pytest.mark.parametrize("sharing", ["exclusive", "diagonal", "time"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_budgets_below_the_smallest_widths_are_met_by_dropping_kernels(
    tmp_path: Path, small_net: Net, small_data: Data, sharing: str, depthwise: bool
) -> None:
    net = small_net(depthwise=depthwise)
    with pytest.raises(DoesNotFitError, match="too few"):
        run(net, small_data, tmp_path / "none", sharing, max_crossbars=1, drop=False)
    budget = 4 if sharing == "exclusive" else 3
    result = run(net, small_data, tmp_path / "out", sharing, max_crossbars=budget, cells=True)
    assert result.figures[-1].crossbars <= budget
    assert validate(tmp_path / "out").passed
    manifest = read_manifest(tmp_path / "out" / "manifest.json")
    if not depthwise:
        assert manifest.totals.dropped_kernels > 0
        assert any(node.rows_not_stored for node in manifest.nodes)


@pytest.mark.parametrize(("kept", "fewest"), [("conv1", 13), ("conv2", 11)])
def test_a_kept_node_keeps_all_of_its_kernels(
    tmp_path: Path, small_net: Net, small_data: Data, kept: str, fewest: int
) -> None:
    """The depthwise node conv2 would lose kernels with those of conv1, and conv1 those that nobody reads."""
    net = small_net(depthwise=True)
    with pytest.raises(DoesNotFitError, match="no candidate fits"):
        run(net, small_data, tmp_path / "none", "exclusive", max_crossbars=fewest - 1, keep=(kept,))
    result = run(net, small_data, tmp_path / "kept", "exclusive", max_crossbars=fewest, keep=(kept,))
    assert kernel_bits(tmp_path / "kept")[kept].tolist() == [8] * 8
    assert set(result.dropped) <= {"fc"}


@pytest.mark.parametrize("goal", [{"max_crossbars": 6}, {"max_accuracy_drop": 2.0}])
def test_exclusive_crossbars_of_several_types_and_counts_end_in_an_answer(
    tmp_path: Path, small_net: Net, small_data: Data, goal: dict[str, Any]
) -> None:
    """Not every node finds a crossbar of the type on which it would take the fewest."""
    kinds = [CrossbarType(name=f"{n}", rows=n, cols=n, cell_bits=2, count=count) for n, count in ((16, 4), (32, 3))]
    mixed = chip("exclusive").model_copy(update={"crossbars": tuple(kinds)})
    config = OptimizeConfig(evaluations=2, sensitivity_samples=16, **goal)
    result = optimize(small_net(), tmp_path / "out", calibration=small_data(48), chip=mixed, config=config)
    assert result.figures[-1].crossbars <= goal.get("max_crossbars", 7)


def test_groups_of_kernels_share_a_width(tmp_path: Path, small_net: Net, small_data: Data) -> None:
    run(small_net(), small_data, tmp_path / "out", max_crossbars=6, granularity="group:4")
    for name, bits in kernel_bits(tmp_path / "out").items():
        _, counts = np.unique(bits, return_counts=True)
        # Eight kernels in groups of four; the last layer has five classes.
        assert all(count % 4 == 0 for count in counts) or name == "fc", (name, bits)


def test_layers_have_one_width_each(tmp_path: Path, small_net: Net, small_data: Data) -> None:
    run(small_net(), small_data, tmp_path / "out", max_crossbars=8, granularity="layer")
    assert all(len(set(bits.tolist())) == 1 for bits in kernel_bits(tmp_path / "out").values())


def test_a_node_none_of_whose_rows_is_stored_is_written_and_checked(tmp_path: Path) -> None:
    """Two heads read four channels each, and one crossbar has no room for both."""
    rng = np.random.default_rng(0)
    weights = {"w": (8, 3, 3, 3), "w1": (4, 4, 3, 3), "w2": (4, 4, 3, 3)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Split", ["r"], ["s1", "s2"], axis=1),
        helper.make_node("Conv", ["s1", "w1"], ["y1"], "head1"),
        helper.make_node("Conv", ["s2", "w2"], ["y2"], "head2"),
    ]
    graph = helper.make_graph(
        nodes,
        "heads",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4, 6, 6]) for name in ("y1", "y2")],
        [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), name) for name, s in weights.items()],
    )
    net = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    data = {"x": rng.normal(size=(32, 3, 8, 8)).astype(np.float32)}
    config = OptimizeConfig(evaluations=0, sensitivity_samples=16, max_crossbars=1, cells=True)
    optimize(net, tmp_path / "out", calibration=data, chip=chip(), config=config)
    nodes_written = ManifestView(read_manifest(tmp_path / "out" / "manifest.json")).manifest.nodes
    assert any(sum(last - first for _, first, last in node.rows_not_stored) == 36 for node in nodes_written)


@pytest.mark.parametrize("goal", [{"max_crossbars": 40}, {"max_accuracy_drop": 50.0}])
@pytest.mark.parametrize("granularity", ["layer", "kernel"])
def test_a_model_all_of_whose_nodes_are_kept_stays_as_it_is(
    tmp_path: Path, small_net: Net, small_data: Data, granularity: str, goal: dict[str, Any]
) -> None:
    """No width is left to choose, and 8 bits are none of those asked for."""
    kept = ("conv1", "conv2", "fc")
    run(small_net(), small_data, tmp_path / "out", weight_bits=(2, 4), keep=kept, granularity=granularity, **goal)
    assert all((bits == 8).all() for bits in kernel_bits(tmp_path / "out").values())


def test_no_drop_keeps_every_kernel(tmp_path: Path, small_net: Net, small_data: Data) -> None:
    run(small_net(), small_data, tmp_path / "out", max_crossbars=8, drop=False)
    assert all((bits >= 2).all() for bits in kernel_bits(tmp_path / "out").values())


def test_kept_nodes_keep_all_their_kernels(tmp_path: Path, small_net: Net, small_data: Data) -> None:
    run(small_net(), small_data, tmp_path / "out", max_crossbars=7, keep=("first",))
    assert kernel_bits(tmp_path / "out")["conv1"].tolist() == [8] * 8


def test_the_same_seed_gives_the_same_files(tmp_path: Path, small_net: Net, small_data: Data) -> None:
    for name in ("one", "two"):
        run(small_net(), small_data, tmp_path / name, max_crossbars=5)
    for file in ("model.onnx", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert all(len(item["weights"]) == 3 for item in report["front"])


@pytest.mark.parametrize("text", ["group:0", "group:", "groups:3", "channel", "", "group:-1"])
def test_a_granularity_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="layer, kernel or group:N"):
        OptimizeConfig(granularity=text)
