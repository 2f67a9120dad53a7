"""Latency of one inference with searched activation bits against 8-bit activations on the same weights.

    python tools/bench_latency.py
    python tools/bench_latency.py --model mobilenetv2 --share 0.5

Weights have one width, so that both sides have the same ones in the same crossbars; the bits of all activations, the
model's input included, are searched within a share of the 8-bit latency. Calibration images are drawn by seed from the
bundled ones, bits are chosen on the bundled selection images, accuracy is that of the emitted model in onnxruntime with
default settings on Fashion-MNIST's 10,000 test images, which neither has seen. Latency, of one inference alone, and the
pipelined interval are those of the manifest's cost model on the chip `generic`, whose inputs enter bit by bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

import raqu_onnx
from raqu_onnx.bundled import bundled_arrays, bundled_model
from raqu_onnx.errors import RaquError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raqu_onnx.results import Figures, OptimizeResult

_CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Side:
    """One run.

    Attributes:
        latency: Cycles of one inference alone.
        interval: Cycles from one inference to the next in a pipeline.
        drop: Points of test accuracy below float.
        activation_bits: Mean bits of activations over nodes.
        input_bits: Bits of the model's input.
    """

    latency: int
    interval: int
    drop: float
    activation_bits: float
    input_bits: int


class Bench:
    """One bundled model and its images."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self._path = folder / f"{given.model}.onnx"
        self._path.write_bytes(bundled_model(given.model))
        self._given = given
        self._pool = bundled_arrays("calibration")["input"]
        self._test = {key: values[: given.images] for key, values in bundled_arrays("test").items()}

    def run(self, seed: int, **settings: Any) -> Side:
        """Optimize with calibration images of one seed."""
        chosen = np.random.default_rng(seed).permutation(len(self._pool))[:_CALIBRATION_IMAGES]
        result = raqu_onnx.optimize(
            self._path,
            calibration={"input": self._pool[chosen]},
            selection=bundled_arrays("selection"),
            evaluation=self._test,
            chip="generic",
            weight_bits=self._given.weight_bits,
            drop=False,
            evaluations=self._given.evaluations,
            threads=self._given.threads,
            seed=seed,
            **settings,
        )
        return _side(result)


def _side(result: OptimizeResult) -> Side:
    ours, float_ = result.figures[-1], result.figures[0]
    cost = ours.cost
    if cost is None or cost.latency_cycles is None or cost.interval_cycles is None:
        raise ValueError("the model's cycles are unknown")
    inputs = [bits for _, bits in result.bits.values() if bits is not None]
    return Side(cost.latency_cycles, cost.interval_cycles, 100 * (_top1(float_) - _top1(ours)), mean(inputs), inputs[0])


def _top1(item: Figures) -> float:
    return (item.evaluation.top1 if item.evaluation is not None else None) or 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("resnet20", "mobilenetv2"), default="resnet20")
    parser.add_argument(
        "--share", type=float, default=0.55, help="of the 8-bit latency that is allowed (default: 0.55)"
    )
    parser.add_argument("--weight-bits", type=int, default=4, help="width of all weights (default: 4)")
    parser.add_argument("--evaluations", type=int, default=24, help="candidates of the Bayesian stage (default: 24)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--images", type=int, default=10_000, help="test images (default: 10000)")
    parser.add_argument("--threads", type=int, help="threads of onnxruntime (default: all)")
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _measure(Bench(given, Path(folder)), given)
    except (RaquError, ValueError) as error:
        print(f"bench_latency: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(bench: Bench, given: argparse.Namespace) -> None:
    print(f"{given.model}, weights of {given.weight_bits} bits, at most {given.share:.0%} of the 8-bit latency")
    pairs = []
    for seed in range(given.seeds):
        started = time.perf_counter()
        whole = bench.run(seed, activation_bits=8)
        found = bench.run(
            seed,
            activation_bits="2-8",
            input_bits="2-8",
            max_latency=f"{int(given.share * whole.latency)}cycles",
        )
        pairs.append((whole, found))
        change = found.latency / whole.latency - 1
        print(
            f"  seed {seed}: latency {whole.latency} -> {found.latency} cycles ({change:+.1%}), interval "
            f"{whole.interval} -> {found.interval}, points below float {whole.drop:.2f} -> {found.drop:.2f}, "
            f"mean activation bits {found.activation_bits:.2f}, the input's {found.input_bits}  "
            f"[{time.perf_counter() - started:.0f} s]",
            flush=True,
        )
    saved = mean(1 - b.latency / a.latency for a, b in pairs)
    interval = mean(1 - b.interval / a.interval for a, b in pairs)
    drop, whole_drop = mean(b.drop for _, b in pairs), mean(a.drop for a, _ in pairs)
    print(
        f"  mean: latency -{saved:.1%}, interval -{interval:.1%}, {drop:.3f} points below float, "
        f"{whole_drop:.3f} with 8 bits"
    )


if __name__ == "__main__":
    raise SystemExit(main())
