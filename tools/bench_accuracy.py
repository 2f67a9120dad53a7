"""Accuracy of the bundled models at given bits, through the public API, against the bars that a release must meet.

    python tools/bench_accuracy.py
    python tools/bench_accuracy.py --model resnet20 --rows W4A4,W2A4 --set fit_without=residuals --seeds 1

Calibration images are drawn by seed from the bundled ones; accuracy is that of the emitted model in onnxruntime with
default settings on Fashion-MNIST's 10,000 test images. `W2A8e8` is a row with 2-bit weights, 8-bit activations and the
first and last node kept at 8 bits (`--keep first,last`); the model's own input has 8 bits in every row. Prints the drop
below float in points, mean and every seed, and exits with 1 where a mean is above its bar.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

import raqu_onnx
from raqu_onnx.bundled import bundled_arrays, bundled_model
from raqu_onnx.data import open_dataset
from raqu_onnx.errors import RaquError
from raqu_onnx.evaluation import collect, make_session, score
from raqu_onnx.model_io import load_model, model_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Most points below float, mean of the seeds.
BARS = {
    "resnet20": {"W4A8": 0.15, "W3A8": 0.3, "W2A8": 1.2, "W2A8e8": 0.5, "W4A4": 0.5, "W2A4": 1.6},
    "mobilenetv2": {"W4A8": 0.6, "W3A8": 2.0},
}

# Bits are given: nothing is searched or placed, and emitting the model is enough.
_SKIPPED = ("search-bits", "place-crossbars", "write-manifest", "check")
_ROW = re.compile(r"W([2-8])A([2-8])(e8)?")


def settings_of(row: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of one row.

    Raises:
        ValueError: The row or an override cannot be read.
    """
    found = _ROW.fullmatch(row)
    if found is None:
        raise ValueError(f"{row!r} is no row: write W4A8, or W2A8e8 with the ends kept at 8 bits")
    settings: dict[str, Any] = {"weight_bits": int(found[1]), "activation_bits": int(found[2]), "skip": _SKIPPED}
    if found[3]:
        settings["keep"] = ["first", "last"]
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"{item!r} is no setting: write KEY=VALUE")
        settings[key] = int(value) if value.isdigit() else value
    return settings


class Bench:
    """One bundled model and its test images."""

    def __init__(self, name: str, images: int, threads: int | None, folder: Path) -> None:
        self._path = folder / f"{name}.onnx"
        self._path.write_bytes(bundled_model(name))
        self._threads = threads
        test = bundled_arrays("test")
        self._data = {key: values[:images] for key, values in test.items()}
        self._pool = bundled_arrays("calibration")["input"]
        self.accuracy = self._top1(self._path)

    def _top1(self, path: Path) -> float:
        inputs = model_inputs(load_model(self._path))
        found = score(collect(make_session(path, threads=self._threads), open_dataset(self._data, inputs))).top1
        return 100 * (found or 0.0)

    def drop(self, settings: dict[str, Any], seed: int) -> float:
        """Points below float with calibration images of one seed.

        Raises:
            RaquError: The settings are refused.
        """
        count = int(settings.get("fit_samples", 512))
        chosen = np.random.default_rng(seed).permutation(len(self._pool))[:count]
        data = {"input": self._pool[chosen]}
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "result"
            # Widths are given, so that nothing is chosen on the selection data.
            raqu_onnx.optimize(
                self._path, output, calibration=data, selection=data, threads=self._threads, seed=seed, **settings
            )
            return self.accuracy - self._top1(output / "model.onnx")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and say whether all bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(BARS), action="append", help="default: both")
    parser.add_argument("--rows", help="rows to measure, separated by commas (default: those with a bar)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--images", type=int, default=10_000, help="test images (default: 10000)")
    parser.add_argument("--threads", type=int, help="threads of onnxruntime (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every row")
    given = parser.parse_args(arguments)
    try:
        missed = [_measure(name, given) for name in given.model or BARS]
    except (RaquError, ValueError) as error:
        print(f"bench_accuracy: {error}", file=sys.stderr)
        return 2
    return int(any(missed))


def _measure(name: str, given: argparse.Namespace) -> bool:
    """Measure and print all rows of one model; returns whether a bar is missed."""
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(name, given.images, given.threads, Path(folder))
        print(f"{name}: float {bench.accuracy:.2f} % on {given.images} test images")
        for row in given.rows.split(",") if given.rows else BARS[name]:
            started = time.perf_counter()
            drops = [bench.drop(settings_of(row, given.set), seed) for seed in range(given.seeds)]
            bar = BARS[name].get(row)
            verdict = "" if bar is None else f"{'met' if mean(drops) <= bar else 'MISSED'}, at most {bar}"
            missed |= bar is not None and mean(drops) > bar
            each = " ".join(f"{value:5.2f}" for value in drops)
            seconds = time.perf_counter() - started
            print(f"  {row:8} {mean(drops):6.3f} points below float ({each})  {verdict}  [{seconds:.0f} s]", flush=True)
    return missed


if __name__ == "__main__":
    raise SystemExit(main())
