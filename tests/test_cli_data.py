"""What the command line says of data: synthetic, seen before, of other kinds, with labels that cannot be right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from raqu_onnx.run_data import is_guessing
from raqu_onnx.scoring import Score

Cli = Callable[..., Any]
Refused = Callable[..., str]

DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz", "--hw", "chip.toml")
#: A whole run in a fraction of a second.
RUN = ("optimize", "model.onnx", *DATA, "--evaluations", "2")


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


# ------------------------------------------------------------------------------------------------------------ labels


def relabelled(folder: Path, name: str, labels: np.ndarray) -> None:
    with np.load(folder / "eval.npz") as arrays:
        np.savez(folder / name, input=arrays["input"], labels=labels)


@pytest.mark.parametrize("option", ["--selection", "--eval"])
@pytest.mark.parametrize("extra", [(), ("--dry-run",)])
def test_labels_beyond_the_classes_are_refused(
    refused: Refused, workspace: Path, option: str, extra: tuple[str, ...]
) -> None:
    relabelled(workspace, "bad.npz", np.arange(40) % 5 + 1)
    refused(workspace, (*RUN, option, "bad.npz", *extra), "bad.npz: a label is 5", "5 classes (0 to 4)", "subtract 1")


def test_labels_of_a_split_and_of_a_stream_are_looked_at_too(refused: Refused, workspace: Path) -> None:
    relabelled(workspace, "bad.npz", np.full(40, 7))
    refused(workspace, ("optimize", "model.onnx", "--calibration", "bad.npz", "--dry-run"), "bad.npz: a label is 7")
    (workspace / "feeds.py").write_text(
        "import numpy as np\ndef feeds():\n    yield {'input': np.ones((4, 3, 8, 8), np.float32)}, np.full(4, 5)\n"
    )
    refused(workspace, (*RUN, "--eval", "feeds.py:feeds", "--dry-run"), "feeds.py:feeds: a label is 5")


def test_labels_are_looked_at_when_the_model_does_not_tell_its_classes(
    refused: Refused, workspace: Path, small_net: Callable[[], onnx.ModelProto]
) -> None:
    model = small_net()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    onnx.save(model, workspace / "model.onnx")
    relabelled(workspace, "bad.npz", np.full(40, 5))
    refused(workspace, (*RUN, "--selection", "bad.npz"), "bad.npz: a label is 5", "5 classes")


def test_values_that_are_no_classes_are_not_held_against_labels(cli: Cli, workspace: Path) -> None:
    relabelled(workspace, "values.npz", np.full(40, 9))
    ran = cli(*RUN, "--eval", "values.npz", "--task", "regression", "--dry-run")
    assert ran.code == 0, ran.err


def test_a_float_model_that_only_guesses_is_told(cli: Cli, workspace: Path) -> None:
    with np.load(workspace / "eval.npz") as arrays:
        relabelled(workspace, "shifted.npz", (arrays["labels"] + 1) % 5)
    run = (*RUN, "--weight-bits", "8", "--activation-bits", "8", "--force")
    ran = cli(*run, "--eval", "shifted.npz")
    for said in ("shifted.npz", "0.0% of the 40 samples", "5 classes on 20.0%", "from 0", "mean, std"):
        assert said in ran.err
    assert "guessing" not in cli(*run).err


@pytest.mark.parametrize(
    ("top1", "samples", "classes", "guessing"),
    [
        (0.1, 1000, 10, True),
        (0.1, 10, 10, False),  # too few to tell
        (0.146, 1000, 10, False),  # more than 5 % of the way from 0.1 to 1
        (0.144, 1000, 10, True),
        (0.0, 40, 1000, True),
        (0.0, 5, 1000, False),
        (0.02, 1000, 1000, True),
        (0.5, 1000, 2, True),
        (0.6, 1000, 2, False),
        (0.5, 100, 2, False),
        (0.0, 1000, 1, False),
    ],
)
def test_when_an_accuracy_counts_as_guessing(top1: float, samples: int, classes: int, guessing: bool) -> None:
    assert is_guessing(Score(samples, top1), classes) is guessing


def test_guessing_is_rarely_said_of_a_useful_model() -> None:
    """A model a quarter of the way from chance to perfect is called guessing in less than 1 % of the cases."""
    for classes, samples in ((2, 200), (10, 50), (1000, 20)):
        useful = 1 / classes + 0.25 * (1 - 1 / classes)
        counts = np.random.default_rng(0).binomial(samples, useful, 20_000)
        wrong = sum(is_guessing(Score(samples, count / samples), classes) for count in counts.tolist())
        assert wrong / len(counts) < 0.01


def test_unlabelled_data_is_no_reason_to_doubt() -> None:
    assert not is_guessing(Score(1000, None, agreement=0.1), 10)


# ------------------------------------------------------------------------------------------------- without a search


def test_without_a_search_nothing_is_said_of_widths_chosen(cli: Cli, workspace: Path) -> None:
    passes = "tidy,annotate-tiling,calibrate,quantize-weights,insert-qdq,place-crossbars,write-manifest,check"
    ran = cli("optimize", "model.onnx", "--hw", "chip.toml", "--calibration", "calibration.npz", "--passes", passes)
    assert ran.code == 0, ran.err
    assert "widths" not in ran.err
    assert "no evaluation data" in ran.err
    manifest = json.loads((workspace / "model-raqu" / "manifest.json").read_text())
    assert manifest["calibration"]["samples"] == 48  # No half is set aside.
    assert "half of" in cli("optimize", "model.onnx", "--calibration", "calibration.npz", "--dry-run", "-o", "o").err


FIXED = ("optimize", "model.onnx", "--hw", "chip.toml", "--calibration", "calibration.npz", "--weight-bits", "8")


def test_fixed_widths_calibrate_on_all_data_and_say_that_figures_are_of_it(cli: Cli, workspace: Path) -> None:
    ran = cli(*FIXED)
    assert ran.code == 0, ran.err
    assert "half" not in ran.err
    assert "figures are of calibration.npz, the calibration data, which ranges and weights are fitted to" in ran.err
    assert "; on calibration.npz (48 samples), the calibration data, which ranges and weights were fitted to" in ran.out
    assert "chosen" not in ran.out
    manifest = json.loads((workspace / "model-raqu" / "manifest.json").read_text())
    assert manifest["calibration"]["samples"] == 48
    report = json.loads((workspace / "model-raqu" / "report.json").read_text())
    assert {role: data and data["fitted"] for role, data in report["data"].items()} == {
        "calibration": True, "selection": True, "evaluation": None,
    }  # fmt: skip


def test_a_goal_of_fixed_widths_names_the_calibration_data(cli: Cli, workspace: Path) -> None:
    assert workspace.is_dir()
    ran = cli(*FIXED, "--max-accuracy-drop", "100", "--eval", "eval.npz")
    assert "the goal is judged on calibration.npz, the calibration data" in ran.err
    assert "on calibration.npz (48 samples), the calibration data)" in ran.out
    assert "no evaluation data" not in ran.err
    assert (
        "goal is judged" not in cli(*FIXED, "--max-accuracy-drop", "100", "--selection", "selection.npz", "--force").err
    )


def test_selection_data_of_fixed_widths_is_called_that(cli: Cli, workspace: Path) -> None:
    ran = cli(*FIXED, "--selection", "selection.npz")
    assert "; on selection.npz (48 samples), the selection data" in ran.out
    assert "chosen" not in ran.out + ran.err
    report = json.loads((workspace / "model-raqu" / "report.json").read_text())
    assert report["data"]["selection"]["fitted"] is False
    same = cli(*FIXED, "--selection", "calibration.npz", "--force")
    assert "figures are of what weights are fitted to" in same.err


def test_a_search_still_chooses_on_what_calibration_does_not_see(cli: Cli, workspace: Path) -> None:
    assert workspace.is_dir()
    dry = cli(*FIXED[:-1], "2-8", "--dry-run")
    assert "selection    calibration.npz, 24 samples" in dry.out
    dry = cli(*FIXED, "--dry-run")
    assert "calibration  calibration.npz, 48 samples" in dry.out
    assert "selection    none: the widths are fixed, and figures are of the calibration data" in dry.out
    assert "# selection: the calibration data, as the widths are fixed" in cli(*FIXED, "--show-config").out


# -------------------------------------------------------------------------------------------------------- validate


def test_a_reference_of_other_inputs_or_outputs_is_named(
    cli: Cli, refused: Refused, workspace: Path, small_net: Callable[..., onnx.ModelProto]
) -> None:
    assert cli(*RUN, "--weight-bits", "8").code == 0
    other = small_net(size=9)
    onnx.save(other, workspace / "other.onnx")
    run = ("validate", "model-raqu", "--data", "eval.npz", "--reference")
    refused(workspace, (*run, "other.onnx"), "other.onnx: it takes 'input'", "[N, 3, 9, 9]", "[N, 3, 8, 8]")
    renamed = small_net()
    renamed.graph.node[-1].output[0] = renamed.graph.output[0].name = "scores"
    onnx.save(renamed, workspace / "renamed.onnx")
    refused(workspace, (*run, "renamed.onnx"), "renamed.onnx: it gives scores", "logits", "--reference")
    symbolic = small_net(batch="other")
    onnx.save(symbolic, workspace / "symbolic.onnx")
    ran = cli(*run, "symbolic.onnx")
    assert ran.code == 1  # It runs, and has another hash.
    assert "reference.sha256" in ran.out
