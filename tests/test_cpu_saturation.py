"""Sums of 8-bit weights on CPUs without VNNI: the rule, and the effect under an emulated CPU."""

from __future__ import annotations

import itertools
import json
import platform
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import raqu_onnx
from raqu_onnx import cpu
from raqu_onnx.cpu import may_saturate, saturates_here, saturation_warning
from raqu_onnx.layout import WeightLayout

LINEAR = WeightLayout("in-out", (4, 2))
INT16 = range(-(1 << 15), 1 << 15)


def codes(*kernels: list[int]) -> np.ndarray:
    """Weights of a Gemm, shape (in, out)."""
    return np.array(kernels, np.int8).T


# ------------------------------------------------------------------------------------------------------------ the rule


@given(
    kernel=st.lists(st.integers(-128, 127), min_size=2, max_size=6),
    levels=st.sampled_from([(1 << bits) - 1 for bits in range(2, 9)]),
)
def test_no_two_weights_leave_16_bits_unnoticed(kernel: list[int], levels: int) -> None:
    inputs = (0, levels)
    sums = [x * a + y * b for a, b in itertools.combinations(kernel, 2) for x in inputs for y in inputs]
    expected = not all(value in INT16 for value in sums)
    layout = WeightLayout("in-out", (len(kernel), 1))
    assert may_saturate(codes(kernel), layout, levels) == expected


def test_seven_bits_on_either_side_are_safe() -> None:
    for weight_bits, activation_bits in itertools.product(range(2, 9), repeat=2):
        low, high = -(1 << weight_bits - 1), (1 << weight_bits - 1) - 1
        found = may_saturate(codes([low] * 4, [high] * 4), LINEAR, (1 << activation_bits) - 1)
        assert found == (weight_bits == activation_bits == 8)


def test_weights_of_different_kernels_are_never_added() -> None:
    assert not may_saturate(codes([127, 0, 0, 0], [0, 127, 0, 0]), LINEAR, 255)
    assert may_saturate(codes([127, 0, 0, 127], [0, 0, 0, 0]), LINEAR, 255)


def test_what_onnxruntime_computes_otherwise_is_safe() -> None:
    largest = np.full((8, 8, 3, 3), 127, np.int8)
    assert may_saturate(largest, WeightLayout("conv", (8, 8, 3, 3)), 255)
    assert not may_saturate(largest, WeightLayout("conv", (8, 8, 3, 3)), None)
    assert not may_saturate(largest, WeightLayout("conv-transpose", (8, 8, 3, 3)), 255)
    assert not may_saturate(largest[:, :1], WeightLayout("conv", (8, 1, 3, 3), 8), 255)
    # Two kernels a channel are no depthwise convolution to onnxruntime.
    assert may_saturate(largest[:, :1], WeightLayout("conv", (8, 1, 3, 3), 4), 255)
    assert not may_saturate(largest[:, :1, :1, :1], WeightLayout("conv", (8, 1, 1, 1)), 255)


@pytest.mark.parametrize("here", [False, True])
def test_the_warning_names_nodes_and_cures(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "saturates_here", lambda: here)
    assert saturation_warning([]) == []
    (text,) = saturation_warning(["a", "b", "c", "d", "e"])
    assert "a, b, c and 2 more" in text
    assert "--reduce-range" in text
    assert "session.x64quantprecision=1" in text
    assert text.startswith("this CPU has no VNNI") == here


# --------------------------------------------------------------------------------------- reports, and the way out of it


def optimized(cli: Callable[..., Any], *options: str, folder: str = "out") -> tuple[Any, dict[str, Any]]:
    ran = cli(
        "optimize", "model.onnx", "--calibration", "calibration.npz", "--hw", "chip.toml", "--weight-bits", "8",
        "--weight-method", "nearest", "--threads", "1", "-o", folder, "--force", *options,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return ran, json.loads(Path(folder, "report.json").read_text())


@pytest.mark.usefixtures("workspace")
def test_reduce_range_limits_weights_to_seven_bits(cli: Callable[..., Any]) -> None:
    ran, report = optimized(cli)
    (warning,) = [text for text in report["warnings"] if "VNNI" in text]
    assert "conv1, conv2, fc" in warning
    assert warning in ran.err
    assert "VNNI" in cli("validate", "out").out
    ran, report = optimized(cli, "--reduce-range", "--keep", "first")
    assert "VNNI" not in ran.err + "".join(report["warnings"])
    assert {item["weight"] for item in report["bits"].values()} == {7}
    assert "VNNI" not in cli("validate", "out").out
    # The widths to search end at 7 too.
    shown = cli("optimize", "model.onnx", "--weight-bits", "2-8", "--reduce-range", "--dry-run").out
    assert "weights 2 to 7 bits" in shown


def test_activations_of_fewer_bits_need_no_warning(workspace: Path, cli: Callable[..., Any]) -> None:
    assert workspace.is_dir()
    assert not [
        text for text in optimized(cli, "--activation-bits", "7", "--input-bits", "7")[1]["warnings"] if "VNNI" in text
    ]


# ------------------------------------------------------------------------------------------------- an emulated CPU

QEMU = shutil.which("qemu-x86_64")
# Runs in the emulator: onnxruntime on each model, plain and with exact sums, and what we say of this CPU.
SCRIPT = """
import sys
import tracemalloc
import numpy as np
from raqu_onnx.cpu import saturates_here
from raqu_onnx.evaluation import make_session
found = {"here": np.array(saturates_here())}
feeds = {"input": np.load("calibration.npz")["input"][:8]}
for name in sys.argv[1:]:
    for exact in (False, True):
        session = make_session(f"{name}/model.onnx", threads=1, exact=exact)
        found[f"{name}-{exact}"] = session.run(None, feeds)[0]
    found[f"{name}-slow"] = make_session(f"{name}/model.onnx", level="disable-all", threads=1).run(None, feeds)[0]
np.savez("found.npz", **found)
"""


def test_this_cpu_is_tried() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if platform.machine() not in ("x86_64", "AMD64") or "vnni" in flags:
        assert not saturates_here()
    elif "avx2" in flags:
        assert saturates_here()


@pytest.mark.skipif(
    QEMU is None or sys.platform != "linux" or platform.machine() != "x86_64", reason="needs qemu-user on x86-64 Linux"
)
@pytest.mark.usefixtures("workspace")
def test_eight_bits_saturate_without_vnni_and_seven_do_not(cli: Callable[..., Any]) -> None:
    # Bright pictures: large codes of activations beside each other.
    pictures = np.random.default_rng(0).uniform(0.7, 1, (32, 3, 8, 8)).astype(np.float32)
    np.savez("calibration.npz", input=pictures)
    optimized(cli, folder="eight")
    optimized(cli, "--reduce-range", folder="seven")
    paths = [str(Path(raqu_onnx.__file__).parents[1]), *(path for path in sys.path if path)]
    subprocess.run(
        # AVX2 without VNNI: without AVX-512 there is none in this emulator.
        [str(QEMU), "-cpu", "max,-avx512f", str(Path(sys.executable).resolve()), "-c", SCRIPT, "eight", "seven"],
        check=True,
        env={"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        timeout=300,
    )
    found = np.load("found.npz")
    assert found["here"]

    def error(name: str) -> float:
        slow, fast = found[f"{name.split('-')[0]}-slow"], found[name]
        return float(np.abs(slow - fast).max() / np.ptp(slow) * 255)

    # In steps of 255 of the output range.
    assert error("seven-False") < 1
    assert error("seven-True") < 1
    assert error("eight-True") < 1
    assert error("eight-False") > 10


def test_looking_at_weights_takes_no_multiple_of_their_memory() -> None:
    weight = np.zeros((256, 1 << 14), np.int8)
    tracemalloc.start()
    may_saturate(weight, WeightLayout("out-in", weight.shape), 255)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * weight.nbytes
