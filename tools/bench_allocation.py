"""Bits per kernel against bits per layer at the same crossbars, on the bundled models, through the public API.

    python tools/bench_allocation.py --budgets 24,18,14,11
    python tools/bench_allocation.py --budgets 18,21,24 --granularity layer,kernel
    python tools/bench_allocation.py --array 256x256 --sharing exclusive --budgets 32

Calibration images are drawn by seed from the bundled ones; widths are chosen on the bundled selection images. Accuracy
and the KL divergence to the float model are those of the emitted model in onnxruntime with default settings on
Fashion-MNIST's 10,000 test images, which neither has seen. Both sides of a comparison run in the same command on the
same images; with two granularities the last column is the ratio of the mean KL divergences. Crossbars are those of the
chip `generic` with the array and sharing given.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np

import raqu_onnx
from raqu_onnx.bundled import bundled_arrays, bundled_model
from raqu_onnx.data import open_dataset
from raqu_onnx.errors import RaquError
from raqu_onnx.evaluation import collect, make_session, score
from raqu_onnx.hardware import Chip, load_chip
from raqu_onnx.model_io import load_model, model_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raqu_onnx.evaluation import Score

_CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        crossbars: Crossbars allocated.
        cells: Programmed cells over allocated cells.
        bits: Weight bits over the bits that allocated cells can hold.
        drop: Points of test accuracy below float.
        kl: KL divergence from the float model's softmax on the test images, in nats.
        seconds: Wall time of the run.
    """

    crossbars: int
    cells: float
    bits: float
    drop: float
    kl: float
    seconds: float


class Bench:
    """One bundled model and its test images."""

    def __init__(self, name: str, chip: Chip, given: argparse.Namespace, folder: Path) -> None:
        self._path = folder / f"{name}.onnx"
        self._path.write_bytes(bundled_model(name))
        self._chip, self._given = chip, given
        self._test = {key: values[: given.images] for key, values in bundled_arrays("test").items()}
        self._pool = bundled_arrays("calibration")["input"]
        self._inputs = model_inputs(load_model(self._path))
        session = make_session(self._path, threads=given.threads)
        self._reference = collect(session, open_dataset(self._test, self._inputs))
        self.float = score(self._reference).top1 or 0.0

    def run(self, budget: int, granularity: str, seed: int) -> Measured:
        """Optimize for a budget with calibration images of one seed.

        Raises:
            RaquError: Nothing fits the budget.
        """
        chosen = np.random.default_rng(seed).permutation(len(self._pool))[:_CALIBRATION_IMAGES]
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "result"
            result = raqu_onnx.optimize(
                self._path,
                output,
                calibration={"input": self._pool[chosen]},
                selection=bundled_arrays("selection"),
                chip=self._chip,
                max_crossbars=budget,
                granularity=granularity,
                drop=not self._given.no_drop,
                evaluations=self._given.evaluations,
                threads=self._given.threads,
                seed=seed,
            )
            found = self._score(output / "model.onnx")
        ours = result.figures[-1]
        return Measured(
            crossbars=ours.crossbars or 0,
            cells=ours.cell_utilization or 0.0,
            bits=ours.bit_utilization or 0.0,
            drop=100 * (self.float - (found.top1 or 0.0)),
            kl=found.kl or 0.0,
            seconds=time.perf_counter() - started,
        )

    def _score(self, path: Path) -> Score:
        session = make_session(path, threads=self._given.threads)
        return score(collect(session, open_dataset(self._test, self._inputs)), self._reference)


def _chip(given: argparse.Namespace) -> Chip:
    rows, cols = (int(part) for part in given.array.split("x"))
    chip = load_chip("generic")
    array = chip.crossbars[0].model_copy(update={"rows": rows, "cols": cols})
    return chip.model_copy(update={"crossbars": (array,), "sharing": given.sharing})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("resnet20", "mobilenetv2"), default="resnet20")
    parser.add_argument("--array", default="128x128", help="rows x columns of a crossbar (default: 128x128)")
    parser.add_argument("--sharing", choices=("exclusive", "diagonal", "time"), default="time")
    parser.add_argument("--budgets", default="24,18,14,11", help="crossbars allowed, separated by commas")
    parser.add_argument("--granularity", default="kernel", help="separated by commas (default: kernel)")
    parser.add_argument("--no-drop", action="store_true", help="kernels keep at least 2 bits")
    parser.add_argument("--evaluations", type=int, default=24, help="candidates of the Bayesian stage (default: 24)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--images", type=int, default=10_000, help="test images (default: 10000)")
    parser.add_argument("--threads", type=int, help="threads of onnxruntime (default: all)")
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(given.model, _chip(given), given, Path(folder))
            print(f"{given.model}, {given.array}, {given.sharing}: float {100 * bench.float:.2f} %")
            for budget in given.budgets.split(","):
                _measure(bench, int(budget), given)
    except (RaquError, ValueError) as error:
        print(f"bench_allocation: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(bench: Bench, budget: int, given: argparse.Namespace) -> None:
    """Measure and print one budget at every granularity."""
    first = 0.0
    for granularity in given.granularity.split(","):
        runs = [bench.run(budget, granularity, seed) for seed in range(given.seeds)]
        kl = mean(run.kl for run in runs)
        each = " ".join(f"{run.drop:5.2f}" for run in runs)
        ratio = f"  KL {kl / first:.2f} of {given.granularity.split(',')[0]}'s" if first else ""
        first = first or kl
        print(
            f"  {budget:4} {granularity:8} {max(run.crossbars for run in runs)} crossbars, cells "
            f"{min(run.cells for run in runs):.1%}, bits {min(run.bits for run in runs):.1%}, "
            f"{mean(run.drop for run in runs):6.3f} points below float ({each}), KL {kl:.5f}{ratio}  "
            f"[{sum(run.seconds for run in runs):.0f} s]",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
