"""`raqu-onnx simulate` and `raqu_onnx.simulate`: scores over repeats, what is printed, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raqu_onnx import SimulationReport, builtin_chips, load_chip, simulate

RUN = (
    "optimize",
    "model.onnx",
    "--calibration",
    "calibration.npz",
    "--weight-bits",
    "5",
    "--hw",
    "chip.toml",
    "--quiet",
)
Cli = Callable[..., Any]


@pytest.fixture
def result(workspace: Path, cli: Cli) -> Path:
    """The small model, optimized into `model-raqu`."""
    assert cli(*RUN, "--cells").code == 0
    return workspace


@pytest.mark.usefixtures("result")
def test_ideal_crossbars_say_what_the_model_says(cli: Cli) -> None:
    report = simulate("model-raqu", "eval.npz", threads=1)
    validated = json.loads(cli("validate", "model-raqu", "--data", "eval.npz", "--format", "json").out)
    assert validated["passed"]
    assert report.metric == "top-1"
    assert report.runs == (report.ideal,)
    assert report.ideal.top1 == validated["scores"]["disable-all"]["top1"]
    assert (report.samples, report.data, report.adc_bits) == (40, "eval.npz", None)
    assert [node.name for node in report.nodes] == ["conv1", "conv2", "fc"]
    assert all(node.lossless_bits >= 2 and node.conversions == 0 for node in report.nodes)


@pytest.mark.usefixtures("result")
def test_the_same_seed_gives_the_same_report() -> None:
    def run(seed: int, threads: int) -> SimulationReport:
        figures = {"variation": 0.3, "stuck": 0.02, "read_noise": 0.05}
        return simulate("model-raqu", "eval.npz", repeats=3, seed=seed, threads=threads, **figures)

    one, two, other = run(1, 1), run(1, 3), run(2, 1)
    assert one == two
    assert one.runs != other.runs
    assert len(one.runs) == 3
    assert len({run.kl for run in one.runs}) == 3
    # Conversions are counted over all repeats.
    single = simulate("model-raqu", "eval.npz", variation=0.3, repeats=1, threads=1)
    assert [node.conversions for node in one.nodes] == [3 * node.conversions for node in single.nodes]


@pytest.mark.usefixtures("result")
def test_the_distribution_is_that_of_the_runs() -> None:
    report = simulate("model-raqu", "eval.npz", variation=0.6, repeats=4, threads=1)
    values = [score.top1 for score in report.runs]
    assert report.distribution == pytest.approx(
        {"mean": np.mean(values), "std": np.std(values), "min": min(values), "max": max(values)}
    )
    assert report.distribution["std"] > 0
    assert report.distribution["mean"] < report.ideal.quality


@pytest.mark.usefixtures("result")
def test_small_errors_hurt_less_than_large_ones() -> None:
    losses = [
        np.mean([run.kl for run in simulate("model-raqu", "eval.npz", repeats=3, threads=1, **figures).runs])
        for figures in ({"variation": 0.01}, {"variation": 0.1}, {"variation": 0.5})
    ]
    assert losses == sorted(losses)
    for name in ("stuck", "read_noise"):
        kl = [simulate("model-raqu", "eval.npz", repeats=1, threads=1, **{name: f}).runs[0].kl for f in (0.005, 0.3)]
        assert kl[0] is not None
        assert kl[1] is not None
        assert kl[0] < kl[1]


@pytest.mark.usefixtures("result")
def test_a_narrow_converter_clips() -> None:
    wide = simulate("model-raqu", "eval.npz", adc_bits=12, threads=1)
    assert wide.runs[0].sqnr_db == float("inf")
    assert not any(node.clipped for node in wide.nodes)
    narrow = simulate("model-raqu", "eval.npz", adc_bits=3, threads=1)
    assert narrow.adc_bits == 3
    assert sum(node.clipped for node in narrow.nodes) > 0
    assert (narrow.runs[0].sqnr_db or 0) < 30
    for one, other in zip(wide.nodes, narrow.nodes, strict=True):
        assert one.lossless_bits == other.lossless_bits
        assert one.seen_bits is not None
        assert one.seen_bits <= one.lossless_bits
    enough = max(node.lossless_bits for node in wide.nodes)
    assert simulate("model-raqu", "eval.npz", adc_bits=enough, threads=1).runs[0].sqnr_db == float("inf")


@pytest.mark.usefixtures("workspace")
def test_the_chip_says_what_its_converters_hold(cli: Cli) -> None:
    chip = Path("chip.toml").read_text()
    Path("chip.toml").write_text(chip.replace("dac_bits = 1", "dac_bits = 1\nadc_bits = 4"))
    assert cli(*RUN).code == 0
    report = simulate("model-raqu", "eval.npz", samples=8, threads=1)
    assert (report.adc_bits, report.adc_signed, report.samples) == (4, False, 8)
    assert sum(node.clipped for node in report.nodes) > 0
    assert simulate("model-raqu", "eval.npz", samples=8, adc_bits="ideal", threads=1).adc_bits is None


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("chip", builtin_chips())
def test_every_built_in_chip_can_be_simulated(cli: Cli, chip: str) -> None:
    """Ideal converters and those said to be lossless lose nothing; cells that vary do."""
    assert cli(*RUN, "--hw", chip).code == 0
    ideal = simulate("model-raqu", "eval.npz", samples=8, adc_bits="ideal", threads=1)
    enough = max(node.lossless_bits for node in ideal.nodes)
    report = simulate("model-raqu", "eval.npz", samples=8, adc_bits=enough, threads=1)
    assert report.runs[0].sqnr_db == float("inf")
    assert not any(node.clipped for node in report.nodes)
    assert all(node.conversions for node in report.nodes)
    # Less than this may vanish where a converter rounds sums of few cells.
    noisy = simulate("model-raqu", "eval.npz", samples=8, variation=0.5, repeats=1, threads=1)
    assert noisy.adc_bits == load_chip(chip).adc_bits
    assert noisy.runs[0].sqnr_db is not None
    assert noisy.runs[0].sqnr_db < 60


@pytest.mark.usefixtures("result")
def test_without_labels_agreement_is_judged() -> None:
    with np.load("eval.npz") as arrays:
        inputs = arrays["input"]
    report = simulate("model-raqu", {"input": inputs}, variation=0.1, repeats=3, threads=1)
    assert report.metric == "agreement"
    assert report.ideal.quality == 1.0
    assert 0 < report.distribution["mean"] < 1


@pytest.mark.usefixtures("result")
def test_a_stream_is_run_batch_by_batch() -> None:
    Path("stream.py").write_text(
        "import numpy as np\n"
        "def batches():\n"
        "    rng = np.random.default_rng(0)\n"
        "    for _ in range(20):\n"
        "        yield {'input': rng.normal(size=(64, 3, 8, 8)).astype(np.float32)}\n"
    )
    report = simulate("model-raqu", "stream.py:batches", adc_bits=12, threads=1)
    assert report.samples == 1280
    assert report.runs[0].agreement == 1.0


@pytest.mark.usefixtures("result")
def test_what_is_printed(cli: Cli) -> None:
    ran = cli("simulate", "model-raqu", "--data", "eval.npz", "--threads", "1")
    assert ran.code == 0
    assert "conv2" in ran.out
    assert "ideal crossbars: accuracy" in ran.out
    assert "ideal crossbars" in ran.err
    options = ("--variation", 0.2, "--stuck", 0.01, "--read-noise", 0.01, "--repeats", 2, "--seed", 3, "--adc-bits", 5)
    ran = cli("simulate", "model-raqu", "--data", "eval.npz", "--threads", "1", *options, "--quiet")
    assert ran.code == 0
    assert ran.err == ""
    assert "ADC: 5 bits, unsigned" in ran.out
    assert "2 chips: accuracy" in ran.out
    assert "clipped" in ran.out
    ran = cli("simulate", "model-raqu", "--data", "eval.npz", "--threads", "1", *options, "--format", "json")
    content = json.loads(ran.out)
    expected = simulate(
        "model-raqu", "eval.npz", variation=0.2, stuck=0.01, read_noise=0.01, repeats=2, seed=3, adc_bits=5, threads=1
    )
    assert content.pop("schema_version") == 1
    assert content == json.loads(json.dumps(expected.to_json()))
    assert content["errors"] == {"variation": 0.2, "stuck": 0.01, "stuck_high": 0.5, "read_noise": 0.01}


def test_misuse_is_refused(result: Path, refused: Callable[..., str]) -> None:
    data = ("--data", "eval.npz")
    for arguments, said in (
        (("simulate", "model-raqu"), "--data"),
        (("simulate", "absent", *data), "manifest.json"),
        (("simulate", "model-raqu", "--data", "absent.npz"), "absent.npz"),
        (("simulate", "model-raqu", *data, "--variation", "-1"), "--variation: must be 0 or more"),
        (("simulate", "model-raqu", *data, "--stuck", "2"), "--stuck: must be a share between 0 and 1, found 2"),
        (("simulate", "model-raqu", *data, "--repeats", "5"), "nothing is drawn"),
        (
            ("simulate", "model-raqu", *data, "--repeats", "0", "--stuck", "0.1"),
            "--repeats: must be at least 1, found 0",
        ),
        (("simulate", "model-raqu", *data, "--adc-bits", "many"), "many"),
        (("simulate", "model-raqu", *data, "--adc-bits", "40"), "--adc-bits: must be 1 to 32"),
        (("simulate", "model-raqu", *data, "--samples", "0"), "--samples: must be at least 1, found 0"),
        (("simulate", "model-raqu", *data, "--threads", "0"), "--threads: must be at least 1, found 0"),
        (("simulate", "model-raqu", *data, "--seed", "-1"), "--seed: must be at least 0, found -1"),
        (("simulate", "model-raqu", *data, "--repeat", "x"), "--repeat"),
    ):
        refused(result, arguments, said)


def test_float_inputs_cannot_be_run(workspace: Path, cli: Cli, refused: Callable[..., str]) -> None:
    assert cli(*RUN, "--activation-bits", "float").code == 0
    refused(
        workspace, ("simulate", "model-raqu", "--data", "eval.npz"), "its input is float", "--activation-bits float"
    )


def test_files_that_do_not_belong_together_are_refused(result: Path, cli: Cli, refused: Callable[..., str]) -> None:
    assert cli(*RUN, "-o", "other", "--weight-bits", "4").code == 0
    Path("model-raqu/model.onnx").write_bytes(Path("other/model.onnx").read_bytes())
    refused(result, ("simulate", "model-raqu", "--data", "eval.npz"), "model.sha256", "raqu-onnx validate")
