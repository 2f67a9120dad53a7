"""The command line from end to end: exit codes, what goes to stdout and stderr, and what is written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

Cli = Callable[..., Any]
Snapshot = Callable[[Path], dict[str, Any]]

DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz", "--hw", "chip.toml")
#: A whole run in a fraction of a second.
RUN = ("optimize", "model.onnx", *DATA, "--evaluations", "2")
FILES = ["manifest.json", "model.onnx", "report.html", "report.json"]


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the journal, which is there after a search only and tells how it was carried out."""
    files = sorted(path for path in folder.iterdir() if path.name != "journal.jsonl")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def one_object(text: str) -> dict[str, Any]:
    """The only thing on stdout is one strict JSON object."""

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no JSON")

    found = json.loads(text, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


# -------------------------------------------------------------------------------------------------------- exit codes


def test_a_run_writes_its_files_and_says_what_was_gained(cli: Cli, workspace: Path) -> None:
    ran = cli(*RUN, "--no-progress")
    assert ran.code == 0, ran.err
    assert [line for line in ran.err.splitlines() if "saturates" not in line] == []
    assert sorted(digests(workspace / "model-raqu")) == FILES
    for said in ("conv1", "conv2", "fc", "uniform 8-bit", "best uniform", "ours", "packed", "lower bound"):
        assert said in ran.out
    assert "emitted model, onnxruntime disable-all" in ran.out
    assert "written to model-raqu" in ran.out
    assert sorted(path.name for path in workspace.iterdir() if path.name.startswith(".")) == []


def test_validate_agrees_with_what_was_reported(cli: Cli, workspace: Path) -> None:
    assert cli(*RUN, "--cells").code == 0
    ran = cli("validate", "model-raqu", "--data", "eval.npz", "--reference", "model.onnx", "--format", "json")
    assert ran.code == 0, ran.out
    found = one_object(ran.out)
    report = one_object((workspace / "model-raqu" / "report.json").read_text())
    for level in ("disable-all", "enable-all"):
        assert found["scores"][level]["top1"] == report["levels"][level]["top1"]


def test_what_was_asked_judged_and_reached_is_said(cli: Cli, workspace: Path) -> None:
    assert workspace.is_dir()
    out = cli(*RUN, "-q").out
    for said in (
        "top-1: samples whose largest output is the label; on eval.npz (40 samples), the test data",
        "the test data, which the search has not seen",
        "KL: mean divergence",
        "goal: fewest crossbars within 0.5 points of float's top-1",
        "selection.npz (48 samples), the selection data)",
        "the goal is met",
        "top-1 on eval.npz",
    ):
        assert said in out
    found = json.loads(cli(*RUN, "-q", "--format", "json", "--force").out)
    scores = [found["figures"][index]["selection"]["top1"] for index in (0, -1)]
    crossbars = found["figures"][-1]["crossbars"]
    assert f"reached: {crossbars} crossbars, {abs(100 * (scores[0] - scores[1])):.2f} points" in out
    assert f"({scores[0]:.2%} -> {scores[1]:.2%} top-1 on" in out


def test_agreement_is_not_called_accuracy(cli: Cli, workspace: Path) -> None:
    for name in ("selection", "calibration"):
        with np.load(workspace / f"{name}.npz") as arrays:
            np.savez(workspace / f"{name}.npz", input=arrays["input"])
    run = ("optimize", "model.onnx", "--hw", "chip.toml", "--evaluations", "1", "-q", "--selection", "selection.npz")
    out = cli(*run, "--calibration", "calibration.npz", "--max-crossbars", "12").out
    for said in (
        "agreement: samples whose largest output is the float model's, which is fidelity and no accuracy",
        "; on selection.npz (48 samples), on which widths were chosen",
        "goal: least loss within 12 crossbars",
        "% agreement on selection.npz",
        "the goal is met",
    ):
        assert said in out
    assert "top-1" not in out


def test_a_goal_that_is_missed_gives_1_and_still_writes(cli: Cli, workspace: Path) -> None:
    need = json.loads(cli(*RUN, "--weight-bits", "2", "--format", "json", "-o", "two").out)["figures"][-1]["crossbars"]
    ran = cli(*RUN, "--max-crossbars", need, "--max-accuracy-drop", "0", "-o", "out")
    assert ran.code == 1
    assert "the goal was not met" in ran.err
    assert "the goal is NOT met" in ran.out
    assert sorted(digests(workspace / "out")) == FILES
    report = one_object((workspace / "out" / "report.json").read_text())
    assert report["goal_met"] is False
    assert report["figures"][-1]["crossbars"] <= need


def test_a_budget_is_kept_and_the_goal_met(cli: Cli, workspace: Path) -> None:
    assert workspace.is_dir()
    wide = json.loads(cli(*RUN, "--weight-bits", "8", "--format", "json", "-o", "wide").out)["figures"][-1]["crossbars"]
    ran = cli(*RUN, "--max-crossbars", wide - 3, "--format", "json", "-o", "out")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert found["goal_met"] is True
    assert found["figures"][-1]["crossbars"] <= wide - 3
    asked = {key: value for key, value in found["goal"].items() if value not in (None, False)}
    assert asked == {"max_crossbars": wide - 3}


# --------------------------------------------------------------------------------------------------- settings, replay


def test_options_win_over_the_file(cli: Cli, workspace: Path) -> None:
    (workspace / "run.toml").write_text('model = "other.onnx"\nseed = 3\nweight_bits = "3-4"\nskip = ["check"]\n')
    ran = cli("optimize", "model.onnx", "--config", "run.toml", "--seed", "9", "--show-config")
    assert ran.code == 0
    lines = ran.out.splitlines()
    for line in ('model = "model.onnx"', "seed = 9", 'weight_bits = "3-4"', 'hw = "generic"', "evaluations = 24"):
        assert line in lines
    assert not (workspace / "model-raqu").exists()


def test_the_printed_configuration_replays_the_run(cli: Cli, workspace: Path) -> None:
    options = (*RUN, "--activation-bits", "6-8", "--seed", "5", "--cells", "--max-accuracy-drop", "10")
    assert cli(*options, "-o", "first").code == 0
    (workspace / "run.toml").write_text(cli(*options, "-o", "first", "--show-config").out)
    assert cli("optimize", "--config", "run.toml", "-o", "second", "--threads", "1").code == 0
    first = digests(workspace / "first")
    assert sorted(first) == ["cells.npz", *FILES]
    assert digests(workspace / "second") == first


def test_the_seed_is_recorded_and_no_output_path_is(cli: Cli, workspace: Path) -> None:
    assert cli(*RUN, "-o", "here", "--seed", "5", "--threads", "1").code == 0
    text = (workspace / "here" / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["seed"] == 5
    assert manifest["configuration"]["seed"] == 5
    assert manifest["configuration"]["model"] == "model.onnx"
    assert {"output", "threads"}.isdisjoint(manifest["configuration"])
    for content in (text, (workspace / "here" / "report.json").read_text()):
        assert "here" not in content
        assert str(workspace) not in content
        assert ".part" not in content


def test_force_replaces_an_earlier_result_as_a_whole(cli: Cli, workspace: Path) -> None:
    assert cli(*RUN, "--cells").code == 0
    (workspace / "model-raqu" / "notes.txt").write_text("mine")
    before = digests(workspace / "model-raqu")
    assert cli(*RUN, "--force", "--weight-bits", "7").code == 0
    after = digests(workspace / "model-raqu")
    assert sorted(after) == sorted([*FILES, "notes.txt"])  # The old cells.npz would contradict the new manifest.
    assert after["model.onnx"] != before["model.onnx"]
    assert cli("validate", "model-raqu").code == 0


# ----------------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_tells_the_plan_and_writes_nothing(cli: Cli, snapshot: Snapshot, workspace: Path) -> None:
    before = snapshot(workspace)
    ran = cli(*RUN, "--dry-run", "--max-crossbars", "30", "--max-accuracy-drop", "2")
    assert ran.code == 0
    for said in ("3 nodes on crossbars", "small", "48 samples, with labels", "within 30 crossbars", "2 points", "tidy"):
        assert said in ran.out
    assert "not written" in ran.out
    assert snapshot(workspace) == before


def test_a_dry_run_shows_what_the_chip_has_and_whether_that_may_do(cli: Cli, workspace: Path) -> None:
    plan = cli(*RUN, "--dry-run", "--max-crossbars", "30").out
    assert re.search(r"^chip +small: any number of main; the model takes \d+ crossbars at 8 bits, packed$", plan, re.M)
    assert re.search(r"^room +2 bits for every kernel take \d+ crossbars, which fit$", plan, re.M)
    tight = cli(*RUN, "--dry-run", "--max-crossbars", "1").out
    assert "crossbars, more than there are: kernels have to be dropped, or it will not fit" in tight
    with (workspace / "chip.toml").open("a") as chip:
        chip.write("count = 77\n")
    assert ": 77 of main; the model takes " in cli(*RUN, "--dry-run").out


# -------------------------------------------------------------------------------------------------------------- JSON


def test_json_is_one_object_and_warnings_stay_outside(cli: Cli, workspace: Path) -> None:
    ran = cli(
        "optimize", "model.onnx", "--evaluations", "1", "--format", "json", "--hw", "chip.toml", "-v", "--time-passes"
    )
    found = one_object(ran.out)
    assert found["schema_version"] == 1
    assert any("synthetic" in warning for warning in found["warnings"])
    assert "warning: no calibration data" in ran.err
    assert "INFO: pass tidy" in ran.err
    assert "search-bits" in ran.err
    assert found["output"] == "model-raqu"
    assert found["figures"][0]["label"] == "float"
    # A comparison of float with itself has no noise: infinity is no JSON.
    assert found["figures"][0]["selection"]["sqnr_db"] is None
    report = one_object((workspace / "model-raqu" / "report.json").read_text())
    assert {key: value for key, value in found.items() if key not in ("seconds", "output")} == report


@pytest.mark.parametrize(
    "arguments",
    [
        (*RUN, "--dry-run"),
        ("inspect", "model.onnx"),
        ("passes",),
        ("hw", "list"),
        ("hw", "show", "isaac"),
        ("hw", "check", "chip.toml"),
        ("validate", "model-raqu"),
        ("manifest", "show", "model-raqu"),
    ],
)
def test_every_command_speaks_json(cli: Cli, workspace: Path, arguments: tuple[str, ...]) -> None:
    if "model-raqu" in arguments:
        assert cli(*RUN, "--weight-bits", "8").code == 0
    ran = cli(*arguments, "--format", "json")
    assert ran.code == 0
    assert one_object(ran.out)["schema_version"] == 1
    assert workspace.is_dir()


def test_the_schema_is_printed(cli: Cli) -> None:
    from raqu_onnx import manifest_schema

    assert one_object(cli("manifest", "schema").out) == manifest_schema()


# ------------------------------------------------------------------------------------------- what is said


def test_debug_tells_where_an_error_was_raised(cli: Cli, workspace: Path) -> None:
    (workspace / "bad\x1b[2J.onnx").write_text("no model")
    plain, debug = (cli("inspect", "bad\x1b[2J.onnx", *more) for more in ((), ("--debug",)))
    assert plain.code == debug.code == 2
    assert "Traceback" not in plain.err
    assert debug.err.startswith("Traceback (most recent call last):\n")
    assert "model_io.py" in debug.err
    assert debug.err.endswith(plain.err)
    assert "\x1b" not in debug.err
    assert cli("inspect", "model.onnx", "--debug").err == cli("inspect", "model.onnx").err


def test_quiet_and_verbose(cli: Cli, workspace: Path) -> None:
    run = ("optimize", "model.onnx", "--evaluations", "1", "--hw", "chip.toml", "--weight-bits", "8", "--force")
    plain, verbose, debug = cli(*run), cli(*run, "-v"), cli(*run, "-vv")
    assert "INFO" not in plain.err
    assert "INFO: pass search-bits" in verbose.err
    assert len(debug.err) >= len(verbose.err)
    assert "warning: no calibration data" in plain.err
    quiet = cli(*run, "-q")
    assert quiet.err == ""
    assert quiet.out == plain.out
    report = json.loads((workspace / "model-raqu" / "report.json").read_text())
    assert any("no calibration data" in warning for warning in report["warnings"])
    assert workspace.is_dir()


def test_passes_are_timed_and_dumped(cli: Cli, workspace: Path) -> None:
    ran = cli(*RUN, "--weight-bits", "8", "--time-passes", "--dump-after", "tidy", "--dump-after", "insert-qdq")
    assert ran.code == 0
    timed = re.findall(r"^ *\d+\.\d\d s  ([a-z-]+)$", ran.err, re.MULTILINE)
    assert timed[0] == "tidy"
    assert timed[-1] == "check"
    assert len(timed) == 9
    dumps = workspace / "model-raqu" / "dumps"
    assert sorted(path.name for path in dumps.iterdir()) == ["00-tidy.onnx", "05-insert-qdq.onnx"]
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(dumps / "00-tidy.onnx").graph.node}
    final = (workspace / "model-raqu" / "model.onnx").read_bytes()
    assert {node.op_type for node in onnx.load(dumps / "05-insert-qdq.onnx").graph.node} == {
        node.op_type for node in onnx.load_from_string(final).graph.node
    }


@pytest.mark.parametrize(
    "passes", ["tidy", "tidy,annotate-tiling", "tidy{minimum_opset=18}", " tidy , annotate-tiling "]
)
def test_a_partial_pipeline_writes_its_model(cli: Cli, workspace: Path, passes: str) -> None:
    ran = cli(*RUN, "--passes", passes)
    assert ran.code == 0, ran.err
    assert sorted(digests(workspace / "model-raqu")) == ["model.onnx", "report.json"]
    model = onnx.load(workspace / "model-raqu" / "model.onnx")
    assert model.opset_import[0].version == (18 if "18" in passes else 17)
    assert [node.op_type for node in model.graph.node][:2] == ["Conv", "Relu"]


def test_options_of_passes_reach_them(cli: Cli, workspace: Path) -> None:
    passes = (
        "tidy,annotate-tiling,calibrate{batch_size=7 moments=false},"
        "quantize-weights{weight_bits=3 activation_bits=5 input_bits=6 weight_method=nearest},"
        "insert-qdq,place-crossbars,write-manifest{cells=true},check"
    )
    ran = cli(*RUN, "--passes", passes, "--format", "json")
    assert ran.code == 0, ran.err
    widths = {"conv1": 6, "conv2": 5, "fc": 5}
    assert one_object(ran.out)["bits"] == {name: {"weight": 3.0, "activation": bits} for name, bits in widths.items()}
    assert sorted(digests(workspace / "model-raqu")) == ["cells.npz", *FILES]
    assert cli("validate", "model-raqu", "--data", "eval.npz").code == 0


def test_float_activations_are_kept(cli: Cli, workspace: Path) -> None:
    ran = cli(*RUN, "--activation-bits", "float", "--weight-bits", "6", "--format", "json")
    assert ran.code == 0, ran.err
    assert {bits["activation"] for bits in one_object(ran.out)["bits"].values()} == {None}
    model = onnx.load(workspace / "model-raqu" / "model.onnx")
    assert "QuantizeLinear" not in {node.op_type for node in model.graph.node}
    assert "DequantizeLinear" in {node.op_type for node in model.graph.node}


def test_a_pass_may_be_skipped(cli: Cli, workspace: Path) -> None:
    ran = cli(*RUN, "--skip", "search-bits", "--skip", "check", "--format", "json")
    assert ran.code == 0, ran.err
    found = one_object(ran.out)
    assert found["checks_passed"] is None
    assert found["goal_met"] is None
    assert {bits["weight"] for bits in found["bits"].values()} == {8.0}
    assert cli("validate", "model-raqu").code == 0
    assert workspace.is_dir()


def test_passes_are_listed_with_their_options(cli: Cli) -> None:
    from raqu_onnx.passes import PASSES
    from raqu_onnx.pipeline import DEFAULT_PIPELINE

    ran = cli("passes")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].isalpha()][: len(PASSES)] == list(PASSES)
    assert "    minimum_opset = 13" in lines
    assert lines[-1] == f"default pipeline: {','.join(DEFAULT_PIPELINE)}"
    assert "write-qonnx  (with --emit qonnx)" in ran.out
    assert "equalize  (with --equalize)" in ran.out
    found = one_object(cli("passes", "--format", "json").out)
    assert [item["name"] for item in found["passes"]] == list(PASSES)
    assert cli(*RUN[:1], "absent.onnx", "--passes", ",".join(found["default_pipeline"])).code == 2


def test_names_are_not_markup(cli: Cli, workspace: Path, small_net: Callable[[], onnx.ModelProto]) -> None:
    model = small_net()
    for node, name in zip(model.graph.node, ("[bold]a[/]", "b", "[/c]", "d", "e", "f", ":cat:[0]"), strict=True):
        node.name = name
    onnx.save(model, workspace / "model.onnx")
    for command in (RUN, ("inspect", "model.onnx"), ("manifest", "show", "model-raqu"), ("validate", "model-raqu")):
        ran = cli(*command)
        assert ran.code == 0, ran.err
        if command[0] != "validate":
            for name in ("[bold]a[/]", "[/c]", ":cat:[0]"):
                assert name in ran.out
