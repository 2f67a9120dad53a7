"""A chip of three crossbar sizes filled: bits and types chosen together against types assigned after the bits.

    python tools/bench_fit_chip.py
    python tools/bench_fit_chip.py --counts 8,4,2 --seeds 1 --evaluations 8

The chip is `hetero` with other counts; those of the default, 8 of 64x64, 4 of 128x128 and 2 of 256x256, hold as many
cells as 14 crossbars of 128x128. Together: `fit_chip` on it. After: a run of its own for as many cells in crossbars of
one size; of all candidates that it judged, the one of least loss that can be placed on the chip. `fit_chip` makes that
search too, so that it is never worse; what its search for all sizes finds alone stands beside it. All are held against
each other by what they minimize, the loss on the selection images. Calibration images are drawn by seed from the
bundled ones; accuracy is that of the emitted model in onnxruntime with default settings on Fashion-MNIST's 10,000 test
images, which none has seen.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

import raqu_onnx
from raqu_onnx.annotations import MAPPED, mapped_nodes
from raqu_onnx.bundled import bundled_arrays, bundled_model
from raqu_onnx.channel_flow import channel_flows
from raqu_onnx.dropping import DropRules
from raqu_onnx.errors import RaquError
from raqu_onnx.hardware import Chip, load_chip
from raqu_onnx.model_io import load_model
from raqu_onnx.passes import AnnotateTilingPass, TidyPass
from raqu_onnx.placement import DoesNotFitError, place
from raqu_onnx.search.types_after import ORIGIN, chips_of_one_size
from raqu_onnx.tiling import Matrix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raqu_onnx.results import OptimizeResult
    from raqu_onnx.search import Bits, Evaluation

_CALIBRATION_IMAGES = 512


class Bench:
    """One bundled model, its images and the chip."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self._path = folder / f"{given.model}.onnx"
        self._path.write_bytes(bundled_model(given.model))
        self._given = given
        self._pool = bundled_arrays("calibration")["input"]
        self._test = {key: values[: given.images] for key, values in bundled_arrays("test").items()}
        self.chip = _chip(given.counts)
        model = TidyPass()(load_model(self._path)).model
        AnnotateTilingPass()(model)
        self._nodes = [MAPPED.require(node) for node in mapped_nodes(model)]
        self._rules = DropRules(self._nodes, channel_flows(model))

    @property
    def one_size(self) -> tuple[Chip, int]:
        """The chip with one size of crossbars only, and how many of these hold as many cells."""
        return chips_of_one_size(self.chip)[0]

    def run(self, seed: int, chip: Chip | str, **goal: Any) -> OptimizeResult:
        """Search with calibration images of one seed."""
        chosen = np.random.default_rng(seed).permutation(len(self._pool))[:_CALIBRATION_IMAGES]
        return raqu_onnx.optimize(
            self._path,
            calibration={"input": self._pool[chosen]},
            selection=bundled_arrays("selection"),
            evaluation=self._test,
            chip=chip,
            evaluations=self._given.evaluations,
            threads=self._given.threads,
            seed=seed,
            **goal,
        )

    def types(self, bits: Bits) -> tuple[int, ...] | None:
        """Crossbars of each type that bits take on the chip, None where they do not fit."""
        try:
            return place(self._matrices(bits), self.chip).crossbars_by_type
        except DoesNotFitError:
            return None

    def _matrices(self, bits: Bits) -> Mapping[str, Matrix]:
        widths = {
            node.name: np.broadcast_to(np.asarray(width, np.int64), (node.layout.channels,))
            for node, width in zip(self._nodes, bits.weights, strict=True)
        }
        pruned = self._rules.apply(widths)
        return {n.name: Matrix.of(n.layout, pruned.bits[n.name], pruned.row_counts(n)) for n in self._nodes}

    def assigned_after(self, found: OptimizeResult) -> Evaluation | None:
        """The candidate of least loss of a search that fits the chip."""
        evaluations = () if found.search is None else found.search.evaluations
        fitting = (e for e in sorted(evaluations, key=lambda e: e.score.loss) if self.types(e.bits) is not None)
        return next(fitting, None)


def _chip(counts: str) -> Chip:
    chip = load_chip("hetero")
    pairs = zip(chip.crossbars, map(int, counts.split(",")), strict=True)
    return chip.model_copy(update={"crossbars": tuple(k.model_copy(update={"count": n}) for k, n in pairs)})


def _drop(result: OptimizeResult) -> float:
    """Points of test accuracy below float."""
    ours, float_ = (result.figures[index].evaluation for index in (-1, 0))
    return 100 * (((float_ and float_.top1) or 0.0) - ((ours and ours.top1) or 0.0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("resnet20", "mobilenetv2"), default="resnet20")
    parser.add_argument("--counts", default="8,4,2", help="crossbars of 64x64, 128x128, 256x256 (default: 8,4,2)")
    parser.add_argument("--evaluations", type=int, default=24, help="candidates of the Bayesian stage (default: 24)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--images", type=int, default=10_000, help="test images (default: 10000)")
    parser.add_argument("--threads", type=int, help="threads of onnxruntime (default: all)")
    parser.add_argument("--together-only", action="store_true", help="leave the comparison out")
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measure(Bench(given, Path(folder)), given)
    except (RaquError, ValueError) as error:
        print(f"bench_fit_chip: {error}", file=sys.stderr)
        return 2


def _measure(bench: Bench, given: argparse.Namespace) -> int:
    alone, count = bench.one_size
    print(
        f"{given.model}, {given.counts} crossbars of 64x64, 128x128, 256x256: cells of {count} of "
        f"{alone.crossbars[0].rows}x{alone.crossbars[0].cols}"
    )
    drops, worse = [], 0
    for seed in range(given.seeds):
        started = time.perf_counter()
        together = bench.run(seed, bench.chip, fit_chip=True)
        if together.search is None:
            raise ValueError("nothing was searched")
        chosen = together.search.chosen
        drops.append(_drop(together))
        used = bench.types(chosen.bits)
        own = min(item.score.loss for item in together.search.evaluations if item.origin != ORIGIN)
        text = f"together {used} crossbars, loss {chosen.score.loss:.5f} ({own:.5f} by the search for all sizes alone)"
        text += f", {drops[-1]:.2f} points below float"
        if not given.together_only:
            after = bench.assigned_after(bench.run(seed, alone, max_crossbars=count))
            text += "; types after the bits: "
            text += "nothing fits" if after is None else f"{bench.types(after.bits)}, loss {after.score.loss:.5f}"
            worse += after is not None and after.score.loss < chosen.score.loss
        print(f"  seed {seed}: {text}  [{time.perf_counter() - started:.0f} s]", flush=True)
    print(
        f"  mean: {mean(drops):.3f} points below float" + ("" if given.together_only else f"; worse in {worse} seeds")
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
