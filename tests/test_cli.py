"""The command line from end to end: exit codes, what goes to stdout and stderr, and what is written."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from raqu_onnx.hardware import builtin_chips

Cli = Callable[..., Any]
Snapshot = Callable[[Path], dict[str, Any]]

DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz", "--hw", "chip.toml")
#: A whole run in a fraction of a second.
RUN = ("optimize", "model.onnx", *DATA, "--evaluations", "2")
FILES = ["manifest.json", "model.onnx", "report.json"]
ANSI = re.compile(r"\x1b")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def one_object(text: str) -> dict[str, Any]:
    """The only thing on stdout is one strict JSON object."""

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no JSON")

    found = json.loads(text, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


# -------------------------------------------------------------------------------------------------------- exit codes


def test_a_run_writes_its_files_and_says_what_was_gained(cli: Cli, workspace: Path) -> None:
    ran = cli(*RUN)
    assert ran.code == 0, ran.err
    assert ran.err == ""
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


def test_a_goal_that_is_missed_gives_1_and_still_writes(cli: Cli, workspace: Path) -> None:
    need = json.loads(cli(*RUN, "--weight-bits", "2", "--format", "json", "-o", "two").out)["figures"][-1]["crossbars"]
    ran = cli(*RUN, "--max-crossbars", need, "--max-accuracy-drop", "0", "-o", "out")
    assert ran.code == 1
    assert "the goal was not met" in ran.err
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
    assert found["goal"] == {"max_crossbars": wide - 3, "max_accuracy_drop": None}


def test_help_and_version_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    from raqu_onnx.cli import main

    for arguments, said in (
        (["--help"], "COMMAND"),
        (["--version"], "raqu-onnx "),
        (["optimize", "--help"], "exit codes"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert said in capsys.readouterr().out
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["optimize", "inspect", "validate", "demo", "hw", "passes", "manifest"])
def test_every_command_has_help_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from raqu_onnx.cli import main

    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80


def test_help_starts_without_heavy_imports() -> None:
    code = (
        "import sys\n"
        "from raqu_onnx.cli import main\n"
        "try:\n    main(['optimize', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'scipy', 'skopt', 'rich', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "raqu_onnx", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3


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


def test_quiet_and_verbose(cli: Cli, workspace: Path) -> None:
    run = ("optimize", "model.onnx", "--evaluations", "1", "--hw", "chip.toml", "--weight-bits", "8", "--force")
    plain, verbose, debug = cli(*run), cli(*run, "-v"), cli(*run, "-vv")
    assert "INFO" not in plain.err
    assert "INFO: pass search-bits" in verbose.err
    assert len(debug.err) >= len(verbose.err)
    quiet = cli(*run, "-q")
    # What makes a result worthless is said even then.
    assert quiet.err.startswith("warning: no calibration data")
    assert quiet.out == plain.out
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
        "quantize-weights{weight_bits=3 activation_bits=5 weight_method=nearest},insert-qdq,place-crossbars,"
        "write-manifest{cells=true},check"
    )
    ran = cli(*RUN, "--passes", passes, "--format", "json")
    assert ran.code == 0, ran.err
    assert one_object(ran.out)["bits"] == {name: {"weight": 3.0, "activation": 5} for name in ("conv1", "conv2", "fc")}
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


# ---------------------------------------------------------------------------------------------------- data and models


def test_without_data_it_runs_and_says_so_loudly(cli: Cli, workspace: Path) -> None:
    ran = cli("optimize", "model.onnx", "--evaluations", "1", "--hw", "chip.toml", "--weight-bits", "8")
    assert ran.code in (0, 1)
    assert "synthetic inputs" in ran.err
    assert "give real inputs with --calibration" in ran.err
    manifest = json.loads((workspace / "model-raqu" / "manifest.json").read_text())
    assert manifest["calibration"]["synthetic"] is True
    assert manifest["selection"]["synthetic"] is True
    assert "not on real data" in cli("manifest", "show", "model-raqu").out
    assert cli(*RUN, "-o", "real").code == 0
    assert json.loads((workspace / "real" / "manifest.json").read_text())["calibration"]["synthetic"] is False


@pytest.mark.parametrize("same", ["calibration.npz", "selection.npz"])
def test_judging_on_data_already_seen_is_told(cli: Cli, workspace: Path, same: str) -> None:
    ran = cli(*RUN, "--weight-bits", "8", "--eval", same)
    assert "too good to be true" in ran.err
    ran = cli("optimize", "model.onnx", "--calibration", same, "--eval", same, "--dry-run", "-o", "other")
    assert "too good to be true" in ran.err
    assert "half of" in ran.err
    assert workspace.is_dir()


def test_pictures_and_functions_feed_it_too(cli: Cli, workspace: Path) -> None:
    from PIL import Image

    (workspace / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(workspace / "pictures" / f"{index}.png")
    (workspace / "feeds.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    rng = np.random.default_rng(1)\n"
        "    for _ in range(4):\n"
        "        yield {'input': rng.normal(size=(2, 3, 8, 8)).astype(np.float32)}\n"
    )
    run = ("optimize", "model.onnx", "--hw", "chip.toml", "--weight-bits", "8", "--format", "json")
    pictures = ("--picture-size", "8x8", "--picture-mean", "0.5", "--picture-std", "0.2,0.2,0.3")
    ran = cli(*run, "--calibration", "pictures", "--selection", "feeds.py:feeds", *pictures)
    assert ran.code in (0, 1), ran.err
    manifest = json.loads((workspace / "model-raqu" / "manifest.json").read_text())
    assert manifest["calibration"]["samples"] == 6
    assert manifest["selection"]["samples"] == 8
    assert manifest["configuration"]["pictures"]["std"] == [0.2, 0.2, 0.3]


# ------------------------------------------------------------------------------------------- terminal, pipe, signals


def test_a_pipe_gets_no_escape_codes(workspace: Path) -> None:
    command = [sys.executable, "-m", "raqu_onnx", *RUN, "--weight-bits", "8"]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm-256color"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=workspace)
    assert ran.returncode == 0
    assert ran.stderr == ""
    assert not ANSI.search(ran.stdout)
    assert "ours" in ran.stdout


def on_terminal(command: list[str], **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout (a pipe) and stderr (a terminal)."""
    leader, follower = pty.openpty()
    variables = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=follower, text=True, env=variables | {"TERM": "xterm"} | environment
    )
    os.close(follower)
    drawn = b""
    while True:
        ready, _, _ = select.select([leader], [], [], 60)
        assert ready, "the command says nothing for a minute"
        try:
            piece = os.read(leader, 65536)
        except OSError:  # The other end is closed.
            break
        if not piece:
            break
        drawn += piece
    os.close(leader)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, drawn.decode()


def test_progress_is_drawn_on_a_terminal_only_and_on_stderr(workspace: Path) -> None:
    assert workspace.is_dir()
    code, out, drawn = on_terminal([sys.executable, "-m", "raqu_onnx", *RUN, "--weight-bits", "8"])
    assert code == 0
    assert ANSI.search(drawn)
    assert "starting" in drawn
    assert "ours" in out
    assert not ANSI.search(out)


COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|38|9[0-7])[;m]")


@pytest.mark.parametrize(
    ("arguments", "variables", "drawn", "coloured"),
    [
        ((), {}, True, True),
        ((), {"NO_COLOR": "1"}, True, False),
        (("--no-progress",), {}, False, False),
        (("-q",), {}, False, False),
    ],
)
def test_progress_may_be_plain_or_off(
    cli: Cli,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    drawn: bool,
    coloured: bool,
) -> None:
    assert workspace.is_dir()
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "", **variables}.items():
        monkeypatch.setenv(name, value)
    if "NO_COLOR" not in variables:
        monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ran = cli(*RUN, "--weight-bits", "8", *arguments)
    assert ran.code == 0
    assert ("starting" in ran.err) is drawn
    assert bool(COLOUR.search(ran.err)) is coloured
    assert not ANSI.search(ran.out)


SLEEPER = """
import pathlib, time
import numpy as np

reads = 0

def feeds():
    global reads
    rng = np.random.default_rng(1)
    yield {"input": rng.normal(size=(8, 3, 8, 8)).astype(np.float32)}
    reads += 1
    if reads == %d:
        pathlib.Path("asleep").touch()
        time.sleep(60)
    yield {"input": rng.normal(size=(8, 3, 8, 8)).astype(np.float32)}
"""


@pytest.mark.parametrize(
    ("number", "code", "exists"), [(signal.SIGINT, 130, False), (signal.SIGINT, 130, True), (signal.SIGTERM, 143, True)]
)
def test_an_interrupted_run_leaves_nothing(
    snapshot: Snapshot, workspace: Path, number: signal.Signals, code: int, exists: bool
) -> None:
    # The second whole read of the selection data is the search's.
    (workspace / "feeds.py").write_text(SLEEPER % 2)
    if exists:
        (workspace / "out").mkdir()
        (workspace / "out" / "model.onnx").write_bytes(b"old")
    command = [sys.executable, "-B", "-m", "raqu_onnx", "optimize", "model.onnx", "--hw", "chip.toml", "-o", "out"]
    data = ["--calibration", "calibration.npz", "--selection", "feeds.py:feeds", "--force"]
    before = snapshot(workspace)
    process = subprocess.Popen([*command, *data], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (workspace / "asleep").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # The run has begun to write, somewhere.
    assert any(path.suffix == ".part" for path in workspace.rglob("*"))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    (workspace / "asleep").unlink()
    assert process.returncode == code
    assert out == ""
    assert err.endswith("ted; no result was written\n")
    assert len(err.splitlines()) == 1
    assert snapshot(workspace) == before


def test_a_reader_that_leaves_early_is_no_error(workspace: Path) -> None:
    assert workspace.is_dir()
    command = f"{sys.executable} -m raqu_onnx manifest schema | head -c 10"
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)  # noqa: S607
    assert ran.stderr == ""
    assert len(ran.stdout) == 10


# -------------------------------------------------------------------------------------------------------------- demo


def test_the_demo_prints_the_command_to_edit(
    cli: Cli, workspace: Path, monkeypatch: pytest.MonkeyPatch, small_data: Callable[..., dict[str, np.ndarray]]
) -> None:
    """With the small net in the place of the bundled one, whose run takes minutes."""
    import raqu_onnx.bundled

    monkeypatch.setattr(raqu_onnx.bundled, "bundled_model", lambda _name: (workspace / "model.onnx").read_bytes())
    monkeypatch.setattr(raqu_onnx.bundled, "bundled_arrays", lambda part: small_data(seed=len(part)))
    ran = cli("demo", "-o", "a demo")
    assert ran.code == 0, ran.err
    folder = workspace / "a demo" / "resnet20"
    assert sorted(path.name for path in folder.iterdir()) == [
        "calibration.npz", "resnet20.onnx", "result", "selection.npz", "test.npz",
    ]  # fmt: skip
    line = ran.out.splitlines()[-1].strip()
    assert line.startswith("raqu-onnx optimize 'a demo/resnet20/resnet20.onnx'")
    before = digests(folder / "result")
    import shlex

    assert cli(*shlex.split(line)[1:]).code == 0
    assert digests(folder / "result") == before
    again = cli("demo", "-o", "a demo")
    assert (again.code, len(again.err.splitlines())) == (2, 1)
    assert "--force" in again.err


@pytest.mark.parametrize("part", ["calibration", "selection", "test"])
def test_the_bundled_data_fits_the_bundled_models(part: str) -> None:
    from raqu_onnx.bundled import bundled_arrays, bundled_model

    arrays = bundled_arrays(part)
    assert arrays["input"].dtype == np.float32
    assert arrays["input"].shape == (len(arrays["labels"]), 1, 28, 28)
    assert 0 <= arrays["input"].min() < arrays["input"].max() <= 1
    assert set(np.unique(arrays["labels"])) == set(range(10))
    assert part != "test" or len(arrays["labels"]) == 10_000
    model = onnx.load_from_string(bundled_model("resnet20"))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims][1:] == [1, 28, 28]
    assert [item.name for item in model.graph.input] == ["input"]


def test_hw_lists_every_built_in_chip(cli: Cli) -> None:
    names = {chip["name"] for chip in one_object(cli("hw", "list", "--format", "json").out)["chips"]}
    assert names == set(builtin_chips())
