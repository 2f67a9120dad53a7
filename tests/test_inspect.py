"""`inspect`: the tiling of a model on a chip, from the command line and from Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import raqu_onnx
from raqu_onnx import Chip, load_chip
from raqu_onnx.bundled import bundled_model
from raqu_onnx.hardware import builtin_chips

Cli = Callable[..., Any]
Net = Callable[..., onnx.ModelProto]

CHIP = """schema_version = 1
name = "square{size}"
encoding = "{encoding}"
sharing = "{sharing}"
dac_bits = 1
[[crossbars]]
name = "main"
rows = {size}
cols = {size}
cell_bits = {cell_bits}
"""


def chip_file(folder: Path, size: int, cell_bits: int, *, encoding: str = "offset", sharing: str = "exclusive") -> Path:
    path = folder / f"chip{size}.toml"
    path.write_text(CHIP.format(size=size, cell_bits=cell_bits, encoding=encoding, sharing=sharing))
    return path


def inspected(cli: Cli, *arguments: object) -> dict[str, Any]:
    ran = cli("inspect", *arguments, "--format", "json")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    found = json.loads(ran.out)
    assert found["schema_version"] == 1
    return dict(found)


@pytest.mark.parametrize(
    ("name", "size", "cell_bits", "weight_bits", "crossbars", "percent"),
    [
        ("resnet20-cifar", 128, 2, 8, 87, 75.3),
        ("resnet20-cifar", 128, 1, 8, 160, 81.9),
        ("resnet20-cifar", 256, 2, 8, 36, 45.5),
        ("resnet20-cifar", 512, 2, 8, 25, 16.4),
        ("resnet20-cifar", 128, 2, 4, 59, 55.5),
        ("alexnet", 128, 2, 8, 14948, 99.8),
        ("vgg16-imagenet", 256, 1, 8, 16912, 99.9),
        ("resnet50", 512, 2, 8, 452, 86.1),
    ],
)
def test_well_known_networks_take_the_crossbars_that_they_must(
    cli: Cli,
    tmp_path: Path,
    reference_models: ModuleType,
    name: str,
    size: int,
    cell_bits: int,
    weight_bits: int,
    crossbars: int,
    percent: float,
) -> None:
    model = reference_models.write_reference_model(name, tmp_path)
    found = inspected(cli, model, "--hw", chip_file(tmp_path, size, cell_bits), "--weight-bits", weight_bits)
    assert found["exclusive"]["crossbars"] == crossbars
    assert found["exclusive"]["cell_utilization"] == pytest.approx(percent / 100, abs=0.0006)
    assert sum(node["crossbars"] for node in found["nodes"]) == crossbars
    assert found["packed"] == found["exclusive"]  # The chip allows no sharing.
    assert found["unmapped"] == []
    assert found["weight_bits"] == weight_bits
    assert found["fits"] is True


def test_one_node_can_be_counted_by_hand(cli: Cli, workspace: Path) -> None:
    """conv2: 72 rows, 8 kernels of 3 slices (5 bits in 2-bit cells): 3 blocks of 32 rows, 2 of 5 kernels a crossbar."""
    found = inspected(cli, "model.onnx", "--hw", "chip.toml", "--weight-bits", 5)
    nodes = {node["name"]: node for node in found["nodes"]}
    assert nodes["conv2"] == {
        "name": "conv2", "op_type": "Conv", "groups": 1, "rows": 72, "kernels": 8, "mvms": 16, "crossbar_type": "main",
        "crossbars": 6, "cells": 72 * 8 * 3, "utilization": pytest.approx(72 * 8 * 3 / (6 * 32 * 16)),
        "cycles": 16 * 8,  # MVMs by 1-bit slices of 8-bit inputs
    }  # fmt: skip
    assert nodes["fc"]["crossbars"] == 1
    assert nodes["fc"]["mvms"] == 1
    assert nodes["conv1"]["mvms"] == 64
    packed = found["packed"]
    cells = sum(node["cells"] for node in nodes.values())
    assert packed["cell_utilization"] == pytest.approx(cells / (packed["crossbars"] * 32 * 16))
    assert packed["bit_utilization"] == pytest.approx(
        (27 * 8 + 72 * 8 + 8 * 5) * 5 / (packed["crossbars"] * 32 * 16 * 2)
    )
    assert packed["crossbars"] <= found["exclusive"]["crossbars"]
    assert workspace.is_dir()


def test_wider_weights_take_more_cells(cli: Cli, workspace: Path) -> None:
    cells = [
        sum(node["cells"] for node in inspected(cli, "model.onnx", "--weight-bits", bits)["nodes"])
        for bits in range(2, 9)
    ]
    weights = 27 * 8 + 72 * 8 + 8 * 5
    assert cells == [weights * -(-bits // 2) for bits in range(2, 9)]
    assert workspace.is_dir()


@pytest.mark.parametrize(
    ("encoding", "columns", "rows"),
    [("offset", 4, 1), ("differential-column", 8, 1), ("differential-row", 4, 2), ("twos-complement", 5, 1)],
)
def test_encodings_cost_what_they_must(cli: Cli, workspace: Path, encoding: str, columns: int, rows: int) -> None:
    found = inspected(cli, "model.onnx", "--hw", chip_file(workspace, 64, 2, encoding=encoding, sharing="time"))
    assert sum(node["cells"] for node in found["nodes"]) == (27 * 8 + 72 * 8 + 8 * 5) * columns * rows


def test_the_table_says_the_same(cli: Cli, workspace: Path) -> None:
    found = inspected(cli, "model.onnx", "--hw", "chip.toml")
    ran = cli("inspect", "model.onnx", "--hw", "chip.toml")
    assert ran.code == 0
    assert ran.err == ""
    lines = {line.split()[0]: line.split() for line in ran.out.splitlines() if line.strip()}
    for node in found["nodes"]:
        assert lines[node["name"]][1:7] == [
            str(node[key]) for key in ("op_type", "groups", "rows", "kernels", "mvms", "crossbars")
        ]
    assert f"one node per crossbar: {found['exclusive']['crossbars']} crossbars" in ran.out
    assert f"packed: {found['packed']['crossbars']} crossbars" in ran.out
    assert "32x16 of 2-bit cells, offset; all weights 8 bits" in ran.out
    assert "time sharing: nodes share a crossbar" in ran.out
    assert "G groups of K rows" in ran.out
    assert workspace.is_dir()


def test_every_node_left_in_float_has_a_reason(cli: Cli, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "mapped"),
        helper.make_node("Transpose", ["a"], ["t"]),
        helper.make_node("MatMul", ["a", "t"], ["b"], "two_activations"),
        helper.make_node("MatMul", ["b", "stack"], ["y"], "batched"),
    ]
    weights = {"w": np.ones((4, 6), np.float32), "stack": np.ones((2, 3, 5), np.float32)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    found = inspected(cli, path)
    assert [node["name"] for node in found["nodes"]] == ["mapped"]
    assert {node["name"] for node in found["unmapped"]} == {"two_activations", "batched"}
    assert all(node["reason"] for node in found["unmapped"])
    text = cli("inspect", path).out
    for node in found["unmapped"]:
        assert f"not on crossbars: {node['name']} (MatMul): " in " ".join(text.split())


def test_all_other_operators_are_counted(cli: Cli, workspace: Path) -> None:
    assert workspace.is_dir()
    found = inspected(cli, "model.onnx")
    assert list(found["others"].items()) == [("Relu", 2), ("Flatten", 1), ("GlobalAveragePool", 1)]
    said = "other operators, computed beside the crossbars: 2 Relu, 1 Flatten, 1 GlobalAveragePool\n"
    assert said in cli("inspect", "model.onnx").out
    # What is excluded is listed by name, and not counted here.
    assert inspected(cli, "model.onnx", "--exclude", "fc")["others"] == found["others"]


def test_free_sizes_leave_mvms_open(cli: Cli, tmp_path: Path, small_net: Net) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(small_net(size="S"), path)
    assert [node["mvms"] for node in inspected(cli, path)["nodes"]] == [None, None, 1]
    assert "?" in cli("inspect", path).out


def test_a_heterogeneous_chip_uses_several_types(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "resnet20.onnx"
    path.write_bytes(bundled_model("resnet20"))
    found = inspected(cli, path, "--hw", "hetero")
    for key in ("exclusive", "packed"):
        by_type = found[key]["crossbars_by_type"]
        assert len(by_type) == 3
        assert sum(by_type) == found[key]["crossbars"]
    assert found["fits"] is True
    assert sum(node["crossbars"] for node in found["nodes"]) == found["exclusive"]["crossbars"]
    assert all(0 < node["utilization"] <= 1 for node in found["nodes"])
    counts = [kind.count for kind in load_chip("hetero").crossbars]
    assert all(
        count is not None and used <= count
        for used, count in zip(found["packed"]["crossbars_by_type"], counts, strict=True)
    )
    out = cli("inspect", path, "--hw", "hetero").out
    assert "small 64x64 of 2-bit cells, medium 128x128 of 2-bit cells, large 256x256 of 2-bit cells" in out
    kinds = {node["name"]: node["crossbar_type"] for node in found["nodes"]}
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert {name: lines[name][6] for name in kinds} == kinds
    assert len(set(kinds.values())) > 1
    assert ", ".join(f"{n} {t}" for n, t in zip(by_type, ("small", "medium", "large"), strict=True)) in out


@pytest.mark.parametrize("name", builtin_chips())
def test_every_built_in_chip_takes_the_bundled_network_or_says_why_not(cli: Cli, tmp_path: Path, name: str) -> None:
    path = tmp_path / "resnet20.onnx"
    path.write_bytes(bundled_model("resnet20"))
    found = inspected(cli, path, "--hw", name)
    assert len(found["nodes"]) == 22
    chip = load_chip(name)
    used = found["packed"]["crossbars_by_type"]
    fits = all(kind.count is None or have <= kind.count for kind, have in zip(chip.crossbars, used, strict=True))
    assert found["fits"] is fits
    assert 0 < found["packed"]["bit_utilization"] <= found["packed"]["cell_utilization"] <= 1
    ran = cli("inspect", path, "--hw", name)
    assert ("does not fit" in ran.out) is not fits
    assert "lower bound: " in ran.out


def test_a_chip_that_is_too_small_is_told(cli: Cli, workspace: Path) -> None:
    chip = (workspace / "chip.toml").read_text().replace("cell_bits = 2", "cell_bits = 2\ncount = 3")
    (workspace / "three.toml").write_text(chip)
    assert inspected(cli, "model.onnx", "--hw", "three.toml")["fits"] is False
    assert "the chip has 3 crossbars: at this width the model does not fit" in " ".join(
        cli("inspect", "model.onnx", "--hw", "three.toml").out.split()
    )


def test_the_size_that_runs_short_is_named(cli: Cli, workspace: Path) -> None:
    """The model has more weights than the large crossbar has cells; small ones hold the rest in the least cells."""
    first, table = (workspace / "chip.toml").read_text().split("[[crossbars]]")
    large = table.replace("cell_bits = 2", "cell_bits = 2\ncount = 1").replace("main", "large")
    small = large.replace("large", "small").replace("rows = 32", "rows = 4").replace("cols = 16", "cols = 4")
    (workspace / "two.toml").write_text(f"{first}[[crossbars]]{large}[[crossbars]]{small}")
    found = inspected(cli, "model.onnx", "--hw", "two.toml", "--weight-bits", 2)
    assert found["fits"] is False
    taken = found["packed"]["crossbars_by_type"]
    assert taken[1] > 1 >= taken[0]
    short = f"{taken[1]} small where it has 1"
    text = cli("inspect", "model.onnx", "--hw", "two.toml", "--weight-bits", 2).out
    assert f"packed it takes {short}: at this width the model does not fit" in text
    run = (
        "optimize",
        "model.onnx",
        "--no-drop",
        "--hw",
        "two.toml",
        "--calibration",
        "calibration.npz",
        "--no-progress",
        "-q",
    )
    for extra in ((), ("--dry-run",)):
        ran = cli(*run, *extra)
        assert ran.code == 2
        assert f"at 2 bits per weight, which takes {sum(taken)} crossbars, {short}; use a larger chip" in ran.err


def test_from_python_with_a_chip_of_ones_own(small_net: Net, workspace: Path) -> None:
    model = small_net()
    before = model.SerializeToString()
    chip: Chip = load_chip(workspace / "chip.toml")
    found = raqu_onnx.inspect(model, chip, weight_bits=4)
    assert model.SerializeToString() == before
    assert found.chip is chip
    assert [item.node.name for item in found.nodes] == ["conv1", "conv2", "fc"]
    assert found.exclusive.crossbars == sum(item.crossbars for item in found.nodes)
    assert found.packed.crossbars >= found.packed.lower_bound


def test_no_weight_is_read(workspace: Path, cli: Cli, small_net: Net) -> None:
    """A model whose weights are NaN has the tiling of any other."""
    model = small_net()
    for tensor in model.graph.initializer:
        array = np.full_like(numpy_helper.to_array(tensor), np.nan)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, workspace / "nan.onnx")
    assert inspected(cli, "nan.onnx") == inspected(cli, "model.onnx")
