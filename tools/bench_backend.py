"""What the reference backend costs: the bundled models on virtual crossbars beside onnxruntime's QDQ model.

    python tools/bench_backend.py

For each model, in one process, on the same images and the same threads:

* the path that recombines slices read from the cells before one product, beside onnxruntime at its default level,
  batch by batch in turn, over all test images;
* the path that runs slice by slice, on the first images, which must equal the other bit for bit.

Exit code 1 where the two paths differ, or the first takes more than 20 times onnxruntime's time on the ResNet-20.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["main"]

_MODELS = ("resnet20", "mobilenetv2")
# The bar, for this model.
_MOST_TIMES, _JUDGED = 20.0, "resnet20"
_BATCH = 64


@dataclass
class Clock:
    """A model with the seconds that its runs took."""

    session: Any
    seconds: float = 0.0

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Class scores of one batch."""
        start = time.perf_counter()
        scores: NDArray[np.float32] = self.session.run(None, {"input": x})[0]
        self.seconds += time.perf_counter() - start
        return scores


def main() -> int:
    """Measure and print; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="test images for the recombined path")
    parser.add_argument("--sliced-images", type=int, default=200, help="of which so many run slice by slice")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--hw", default="generic", help="chip")
    parser.add_argument("--model", choices=_MODELS, action="append", help="default: both")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = [_bench(name, Path(folder) / name, args) for name in args.model or _MODELS]
    return 0 if all(good) else 1


def _bench(name: str, folder: Path, args: argparse.Namespace) -> bool:
    from raqu_onnx.backend.folder import open_folder
    from raqu_onnx.backend.session import CrossbarSession, Plan, Setting
    from raqu_onnx.bundled import bundled_arrays
    from raqu_onnx.evaluation import make_session

    _optimize(name, folder, args)
    arrays = bundled_arrays("test")
    images, labels = arrays["input"][: args.images], arrays["labels"][: args.images]
    start = time.perf_counter()
    plan = Plan(open_folder(folder), args.threads)
    ours = Clock(CrossbarSession(plan))
    opened = time.perf_counter() - start
    theirs = Clock(make_session(folder / "model.onnx", threads=args.threads))
    scores = _in_turn(ours, theirs, images)
    ratio = ours.seconds / theirs.seconds
    print(f"{name}: W{args.weight_bits} A{args.activation_bits}, chip {args.hw}, {args.threads} threads")
    print(f"  crossbars read, checked and opened in {opened:.2f} s")
    for what, clock, found in (("recombined", ours, scores[0]), ("onnxruntime, QDQ", theirs, scores[1])):
        accuracy = float((found.argmax(1) == labels).mean())
        print(f"  {what}: {len(images)} images in {clock.seconds:.2f} s, accuracy {accuracy:.2%}")
    print(f"  ratio {ratio:.2f}{f' (bar: {_MOST_TIMES:g})' if name == _JUDGED else ''}")
    sliced = Clock(CrossbarSession(plan, Setting(sliced=True)))
    some = images[: args.sliced_images]
    slices = np.concatenate([sliced.run(some[i : i + _BATCH]) for i in range(0, len(some), _BATCH)])
    equal = bool(np.array_equal(slices, scores[0][: len(some)]))
    print(
        f"  slice by slice: {len(some)} images in {sliced.seconds:.2f} s ({len(some) / sliced.seconds:.0f} a second), "
        f"{'equal bit for bit' if equal else 'NOT EQUAL'}"
    )
    return equal and (name != _JUDGED or ratio <= _MOST_TIMES)


def _optimize(name: str, folder: Path, args: argparse.Namespace) -> None:
    from importlib.resources import files

    from raqu_onnx import optimize
    from raqu_onnx.bundled import bundled_arrays

    calibration, selection = (
        {key: array[:256] for key, array in bundled_arrays(part).items()} for part in ("calibration", "selection")
    )
    optimize(
        Path(str(files("raqu_onnx.bundled") / f"{name}.onnx")),
        folder,
        calibration=calibration,
        selection=selection,
        chip=args.hw,
        weight_bits=args.weight_bits,
        activation_bits=args.activation_bits,
        evaluations=0,
        cells=True,
        threads=args.threads,
    )


def _in_turn(
    ours: Clock, theirs: Clock, images: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores of both, whose batches take turns, so that a busy machine slows down both."""
    for clock in (ours, theirs):
        clock.run(images[:_BATCH])
        clock.seconds = 0.0
    found: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        for clock, scores in zip((ours, theirs), found, strict=True):
            scores.append(clock.run(batch))
    return np.concatenate(found[0]), np.concatenate(found[1])


if __name__ == "__main__":
    sys.exit(main())
