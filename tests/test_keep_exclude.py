"""`--exclude`, `--keep` and goals of fixed widths, from the command line to the files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import raqu_onnx
from raqu_onnx.errors import ConfigError

Cli = Callable[..., Any]
RUN = (
    "optimize", "model.onnx", "--hw", "chip.toml", "--calibration", "calibration.npz", "--selection", "selection.npz",
    "--threads", "1", "--no-progress", "--evaluations", "3",
)  # fmt: skip


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def widths(folder: Path) -> dict[str, tuple[set[int], int | None]]:
    """Weight and activation bits by node, from the ONNX file."""
    found: dict[str, tuple[set[int], int | None]] = {}
    for node in onnx.load(folder / "model.onnx").graph.node:
        for item in node.metadata_props:
            if item.key == "raqu.bits":
                bits = json.loads(item.value)
                found[node.name] = ({width for width, _ in bits["weight"]}, bits["activation"])
    return found


def test_excluded_nodes_stay_float_and_say_why(cli: Cli, workspace: Path) -> None:
    ran = cli(*RUN, "--weight-bits", "4", "--exclude", "Gemm", "--exclude", ".*v2", "-o", "out")
    assert ran.code == 0, ran.err
    reasons = {"conv2": "excluded by the user (.*v2)", "fc": "excluded by the user (Gemm)"}
    assert "not on crossbars: conv2 (Conv): excluded by the user (.*v2)" in ran.out
    found = manifest(workspace / "out")
    assert {item["name"]: item["reason"] for item in found["unmapped"]} == reasons
    assert [item["name"] for item in found["nodes"]] == ["conv1"]
    assert found["configuration"]["exclude"] == ["Gemm", ".*v2"]
    model = onnx.load(workspace / "out" / "model.onnx")
    tensors = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    before = {item.name: numpy_helper.to_array(item) for item in onnx.load("model.onnx").graph.initializer}
    for name in ("w2", "b2", "w3", "b3"):
        assert np.array_equal(tensors[name], before[name])
    report = json.loads((workspace / "out" / "report.json").read_text())
    assert {item["name"]: item["reason"] for item in report["unmapped"]} == reasons


def test_inspect_leaves_out_what_is_excluded(cli: Cli, workspace: Path) -> None:
    assert workspace.is_dir()
    command = ("inspect", "model.onnx", "--hw", "chip.toml", "--format", "json")
    found, whole = json.loads(cli(*command, "--exclude", "conv2").out), json.loads(cli(*command).out)
    assert [item["name"] for item in found["nodes"]] == ["conv1", "fc"]
    assert [(item["name"], item["reason"]) for item in found["unmapped"]] == [("conv2", "excluded by the user (conv2)")]
    assert found["packed"]["crossbars"] < whole["packed"]["crossbars"]


@pytest.mark.parametrize("command", ["optimize", "optimize --dry-run", "inspect"])
@pytest.mark.parametrize(
    ("pattern", "said"),
    [("conv9", "did you mean conv"), ("Relu", "never go into crossbars: relu1 (Relu)"), ("*", "regular expression")],
)
def test_a_pattern_without_a_node_is_refused(cli: Cli, workspace: Path, command: str, pattern: str, said: str) -> None:
    name, *options = command.split()
    ran = cli(name, "model.onnx", "-q", *options, "--exclude", pattern)
    assert ran.code == 2
    assert ran.err.startswith(f"error: --exclude: '{pattern}' ")
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert not (workspace / "model-raqu").exists()


@pytest.mark.parametrize("skip", [(), ("--skip", "search-bits")])
def test_kept_ends_have_8_bits_at_fixed_widths(cli: Cli, workspace: Path, skip: tuple[str, ...]) -> None:
    ran = cli(
        *RUN,
        "--weight-bits",
        "2",
        "--activation-bits",
        "4",
        "--keep",
        "first,last",
        "--format",
        "json",
        "-o",
        "out",
        *skip,
    )
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["kept"] == [{"name": "conv1", "pattern": "first"}, {"name": "fc", "pattern": "last"}]
    assert widths(workspace / "out") == {"conv1": ({8}, 8), "conv2": ({2}, 4), "fc": ({8}, 8)}
    weights, total = {"conv1": 27 * 8, "conv2": 72 * 8, "fc": 8 * 5}, 27 * 8 + 72 * 8 + 8 * 5
    mean = (8 * weights["conv1"] + 2 * weights["conv2"] + 8 * weights["fc"]) / total
    assert found["figures"][-1]["weight_bits"] == pytest.approx(mean)
    assert manifest(workspace / "out")["configuration"]["keep"] == ["first", "last"]


def test_kept_nodes_are_no_part_of_the_search(cli: Cli, workspace: Path) -> None:
    (workspace / "run.toml").write_text('keep = ["fc"]\nweight_bits = "2-4"\nactivation_bits = "4-6"\n')
    ran = cli(*RUN, "--config", "run.toml", "--max-accuracy-drop", "100", "--format", "json", "-o", "out")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["bits"]["fc"] == {"weight": 8.0, "activation": 8}
    assert max(found["bits"][name]["weight"] for name in ("conv1", "conv2")) <= 4
    assert all((point["weights"][2], point["activations"][2]) == (8, 8) for point in found["front"])
    labels = [item["label"] for item in found["figures"]]
    assert "best uniform 2-bit, kept at 8, packed" in labels
    row = found["figures"][labels.index("best uniform 2-bit, kept at 8, packed")]
    assert row["weight_bits"] == pytest.approx((2 * (27 + 72) * 8 + 8 * 40) / (99 * 8 + 40))
    text = cli(*RUN, "--config", "run.toml", "--weight-bits", "2", "-o", "again").out
    assert "kept at 8 bits: fc (fc)" in text


def test_branches_have_several_ends() -> None:
    """x -> a -> Add -> c, x -> b -> Add; c feeds two heads."""
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "a"),
        helper.make_node("MatMul", ["x", "w"], ["b"], "b"),
        helper.make_node("Add", ["a", "b"], ["s"], "sum"),
        helper.make_node("MatMul", ["s", "w"], ["c"], "c"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w"], ["y1"], "head1"),
        helper.make_node("MatMul", ["r", "w"], ["y2"], "head2"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 4]) for name in ("y1", "y2")],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = {"x": np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)}
    result = raqu_onnx.optimize(model, calibration=data, weight_bits=2, keep=["first", "last"], threads=1)
    assert {name for name, _ in result.kept} == {"a", "b", "head1", "head2"}
    assert {name: weight for name, (weight, _) in result.bits.items()} == {
        "a": 8.0, "b": 8.0, "c": 2.0, "head1": 8.0, "head2": 8.0,
    }  # fmt: skip
    # An excluded node is no end: the next mapped one is.
    result = raqu_onnx.optimize(model, calibration=data, weight_bits=2, keep="first", exclude=["a", "b"], threads=1)
    assert result.kept == (("c", "first"),)


@pytest.mark.parametrize(
    ("pattern", "said"), [("conv9", "did you mean conv"), ("relu1", "not on crossbars: relu1"), ("first,", "is empty")]
)
def test_what_cannot_be_kept_is_told(cli: Cli, workspace: Path, pattern: str, said: str) -> None:
    assert workspace.is_dir()
    for extra in ((), ("--dry-run",)):
        ran = cli(*RUN, "--keep", pattern, *extra)
        assert ran.code == 2
        assert ran.err.startswith("error: --keep: ")
        assert said in ran.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--fit-samples", "64", "--weight-method", "gptq"),
            "--fit-samples: weight method gptq fits on statistics of all",
        ),
        (
            ("--fit-samples", "64", "--weight-method", "nearest"),
            "--fit-samples: weight method nearest fits on no samples",
        ),
        (("--input-bits", "4", "--activation-bits", "float"), "--input-bits: with `--activation-bits float`"),
        (
            ("--input-bits", "4", "--keep", "last,first"),
            "--input-bits: every node that reads the model's own inputs keeps",
        ),
        (("--input-bits", "4", "--keep", "Conv"), "inputs keeps 8 bits (--keep Conv)"),
    ],
)
@pytest.mark.parametrize("extra", [(), ("--dry-run",)])
def test_an_option_that_another_leaves_without_effect_is_refused(
    refused: Callable[..., str], workspace: Path, options: tuple[str, ...], said: str, extra: tuple[str, ...]
) -> None:
    refused(workspace, (*RUN, *options, *extra), said, "leave ")


@pytest.mark.parametrize(
    "options",
    [
        ("--fit-samples", "64"),
        ("--input-bits", "4", "--keep", "last"),
        # What is the default cannot be told from what a replayed configuration gives.
        ("--fit-samples", "512", "--input-bits", "8", "--weight-method", "gptq", "--activation-bits", "float"),
    ],
)
def test_options_that_have_an_effect_or_say_the_default_pass(
    cli: Cli, workspace: Path, options: tuple[str, ...]
) -> None:
    assert workspace.is_dir()
    assert cli(*RUN, *options, "--dry-run").code == 0


def test_fixed_widths_have_no_goal_to_miss(cli: Cli, workspace: Path) -> None:
    assert workspace.is_dir()
    ran = cli(*RUN, "--weight-bits", "2", "--activation-bits", "2", "--format", "json", "-o", "out")
    assert ran.code == 0, ran.err
    assert "goal" not in ran.err
    found = json.loads(ran.out)
    assert found["goal"] is None
    assert found["goal_met"] is None
    assert "no uniform width serves the goal" not in cli(*RUN, "--weight-bits", "2", "-o", "text").out
    dry = cli(*RUN, "--weight-bits", "2", "--dry-run")
    assert dry.code == 0
    assert "goal         none: the widths are fixed" in dry.out
    assert "widths       weights 2 bits; activations 8 bits" in dry.out


def test_a_goal_given_with_fixed_widths_is_judged(cli: Cli, workspace: Path) -> None:
    assert workspace.is_dir()
    fixed = ("--weight-bits", "2", "--activation-bits", "2", "--max-accuracy-drop", "0")
    ran = cli(*RUN, *fixed, "--format", "json", "-o", "out")
    assert ran.code == 1
    assert "the goal was not met" in ran.err
    assert json.loads(ran.out)["goal_met"] is False
    assert "goal         within 0 points of float" in cli(*RUN, *fixed, "--dry-run").out


def test_show_config_shows_the_goal_that_applies(cli: Cli, workspace: Path) -> None:
    shown = cli(*RUN, "--show-config").out
    assert tomllib.loads(shown)["max_accuracy_drop"] == 0.5
    assert tomllib.loads(shown)["output"] == "model-raqu"
    (workspace / "shown.toml").write_text(shown)
    assert cli("optimize", "--config", "shown.toml", "--show-config").out == shown
    fixed = cli(*RUN, "--weight-bits", "4", "--show-config").out
    assert "max_accuracy_drop" not in tomllib.loads(fixed)
    assert "# max_accuracy_drop: none" in fixed


@pytest.mark.parametrize(
    ("options", "advice", "absent"),
    [
        ((), "allow at least 2 crossbars", "smaller width"),
        (("--weight-bits", "4-8"), "or allow a smaller width than 4", "kept"),
        (("--keep", "last"), "or allow fewer nodes kept at 8 bits", "smaller width"),
    ],
)
def test_a_dry_run_sees_that_no_widths_can_fit(
    cli: Cli, workspace: Path, options: tuple[str, ...], advice: str, absent: str
) -> None:
    assert workspace.is_dir()
    run = (*RUN, "--max-crossbars", "1", "--no-drop", *options)
    dry = cli(*run, "--dry-run")
    assert dry.code == 2
    assert dry.err.startswith("error: 1 crossbar is too few: the smallest widths, ")
    assert advice in dry.err
    assert absent not in dry.err
    assert cli(*run, "-o", "out").err.splitlines()[-1] == dry.err.strip()


def test_settings_can_be_given_to_optimize_itself(workspace: Path) -> None:
    data = dict(np.load(workspace / "calibration.npz"))
    config = raqu_onnx.OptimizeConfig(weight_bits=(2, 8), seed=3, threads=1)
    result = raqu_onnx.optimize("model.onnx", calibration=data, config=config, weight_bits=4)
    assert {bits for bits, _ in result.bits.values()} == {4.0}
    assert result.goal_met is None
    assert result.exit_code == 0
    assert config.weight_bits == (2, 8)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"weight_bits": 9}, "weight_bits: 9 is out of range"),
        ({"wight": 4}, "wight is no setting"),
    )
    for wrong, said in cases:
        with pytest.raises(ConfigError, match=said):
            raqu_onnx.optimize("model.onnx", calibration=data, **wrong)


def test_a_float_layer_gives_activations_and_no_inputs_of_the_model(cli: Cli, workspace: Path) -> None:
    run = (*RUN, "--weight-bits", "3", "--activation-bits", "4", "--input-bits", "6")
    assert cli(*run, "-o", "whole").code == 0
    assert widths(workspace / "whole") == {"conv1": ({3}, 6), "conv2": ({3}, 4), "fc": ({3}, 4)}
    assert cli(*run, "--exclude", "conv1", "-o", "part").code == 0
    assert widths(workspace / "part") == {"conv2": ({3}, 4), "fc": ({3}, 4)}


def test_the_method_is_said_where_it_is_not_the_default(cli: Cli, workspace: Path) -> None:
    assert workspace.is_dir()
    options = ("--fit-without", "refit", "--fit-without", "polish", "--equalize", "--activation-range", "min-max")
    said = "--fit-without refit,polish --equalize --activation-range min-max\n"
    assert f"method: {said}" in cli(*RUN, "--weight-bits", "8", *options, "-o", "out").out
    assert f"method       {said}" in cli(*RUN, *options, "--dry-run").out
    assert "method       the default\n" in cli(*RUN, "--dry-run").out
