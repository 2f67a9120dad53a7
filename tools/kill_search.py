"""Kill a search at random moments, go on with it, and compare what it ends with with a run that nobody disturbed.

    python tools/kill_search.py                         # a small model, 20 kills
    python tools/kill_search.py --model resnet20        # the bundled ResNet-20
    python tools/kill_search.py -- --workers 2          # with further options of `raqu-onnx optimize`

A run is killed (SIGKILL) after a random part of the time that the undisturbed one took, and gone on with by `--resume`,
which is killed again, until one comes to its end before its time; then the next run starts. Every result must be that
of the undisturbed run byte for byte, and nothing else may be left. Exit code 1 if one is not.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["compare", "main", "write_small"]

#: Files that must be the same.
_FILES = ("model.onnx", "manifest.json", "cells.npz", "report.json")
_DATA = {"calibration": 64, "selection": 256, "test": 64}
_OPTIONS = ("calibration", "selection", "eval")
_SMALL = ["--max-crossbars", "16", "--evaluations", "40", "--activation-bits", "4-8", "--fit-samples", "64"]
_RESNET = ["--max-crossbars", "14", "--evaluations", "6", "--sensitivity-samples", "64", "--fit-samples", "64"]


def main() -> int:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["small", "resnet20"], default="small")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("options", nargs="*", help="further options of `raqu-onnx optimize`, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-search-") as folder:
        return _compare_runs(Path(folder), args)


def _compare_runs(folder: Path, args: argparse.Namespace) -> int:
    command = [*_prepare(folder, args.model), *args.options]
    start = time.perf_counter()
    subprocess.run([*command, "-o", str(folder / "undisturbed")], check=True, capture_output=True)
    duration = time.perf_counter() - start
    print(f"{args.model}: the undisturbed run took {duration:.1f} s", flush=True)
    moments = random.Random(args.seed)  # noqa: S311 - no secret
    kills = runs = wrong = 0
    while kills < args.kills:
        output = folder / f"run{runs}"
        start = time.perf_counter()
        done = _run_with_kills(command, output, duration, moments, args.kills - kills)
        if not done:
            # The machine is busier at some times than at others.
            duration = time.perf_counter() - start
        said = compare(folder / "undisturbed", output)
        said += [f"left behind: {path.name}" for path in folder.iterdir() if _is_litter(path)]
        print(f"run {runs}: killed after {', '.join(done) or 'nothing'}: {'; '.join(said) or 'same bytes'}", flush=True)
        kills, runs, wrong = kills + len(done), runs + 1, wrong + bool(said)
    print(f"{kills} kills in {runs} runs, {runs - wrong} of which ended with the bytes of the undisturbed one")
    return 1 if wrong else 0


def _run_with_kills(command: list[str], output: Path, duration: float, moments: random.Random, most: int) -> list[str]:
    """Start, kill and go on until a run comes to its end; returns when it was killed, with what was judged by then."""
    done: list[str] = []
    while True:
        resume = ["--resume"] if done else []
        arguments = [*command, *resume, "-o", str(output)]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            moment = moments.uniform(0, duration) if len(done) < most else None
            _, said = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            journal = output.with_name(f"{output.name}.journal.jsonl")
            lines = journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0
            done.append(f"{moment:.1f} s ({max(0, lines)} answers)")
            continue
        if process.returncode:
            raise SystemExit(f"the run failed with exit code {process.returncode}: {said}")
        return done


def compare(expected: Path, found: Path) -> list[str]:
    """What differs between two result folders, in words."""
    return [
        f"{name} differs"
        for name in _FILES
        if not (found / name).is_file() or (expected / name).read_bytes() != (found / name).read_bytes()
    ]


def _is_litter(path: Path) -> bool:
    return path.name.endswith((".part", ".journal.jsonl"))


def _prepare(folder: Path, model: str) -> list[str]:
    """Write model and data; returns the command without its output folder."""
    if model == "small":
        write_small(folder)
        options = [*_SMALL]
    else:
        from raqu_onnx.bundled import bundled_arrays, bundled_model

        (folder / "model.onnx").write_bytes(bundled_model(model))
        for part, count in _DATA.items():
            arrays = {name: array[:count] for name, array in bundled_arrays(part).items()}
            np.savez(folder / f"{part}.npz", **arrays)  # type: ignore[arg-type]
        options = [*_RESNET]
    options += [f"--{option}={folder / part}.npz" for option, part in zip(_OPTIONS, _DATA, strict=True)]
    tool = [sys.executable, "-m", "raqu_onnx", "optimize", str(folder / "model.onnx")]
    # What a cache knows need not be judged again: the journal alone is to be tried.
    return [*tool, *options, "--cells", "--no-cache", "-q", "--format", "json"]


def write_small(folder: Path) -> None:
    """Write a convolutional network with random weights, and random data."""
    rng = np.random.default_rng(0)
    nodes, weights, channels, value = [], [], 3, "input"
    for index, width in enumerate((16, 16, 32, 32)):
        kernels = rng.normal(0, 0.5 / channels**0.5, (width, channels, 3, 3))
        weights += [_tensor(kernels, f"w{index}"), _tensor(rng.normal(0, 0.1, width), f"b{index}")]
        operands, strides = [value, f"w{index}", f"b{index}"], [1 + index % 2] * 2
        nodes += [
            helper.make_node("Conv", operands, [f"c{index}"], f"conv{index}", pads=[1] * 4, strides=strides),
            helper.make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}"),
        ]
        channels, value = width, f"r{index}"
    weights.append(_tensor(rng.normal(0, 0.3, (channels, 10)), "w"))
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w"], ["logits"], "fc"),
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 16, 16])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])]
    graph = helper.make_graph(nodes, "small", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    for part, count in _DATA.items():
        np.savez(folder / f"{part}.npz", input=rng.normal(size=(count, 3, 16, 16)).astype("f4"))


def _tensor(values: NDArray[np.float64], name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(values.astype(np.float32), name)


if __name__ == "__main__":
    sys.exit(main())
