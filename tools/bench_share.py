"""How much of a search's wall time goes into running images and requantizing, and how much into all else.

    python tools/bench_share.py                        # both bundled models, and a network of 50 nodes
    python tools/bench_share.py --cases nodes50 --threads 1

Images are run and weights are fitted to judge candidates, to measure sensitivities and for error curves. All else is
the surrogate, bringing candidates into the budget (allocation and placement), and whatever holds the search together.
The network of 50 nodes has random weights and is run on random data; nobody would want its bits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from raqu_onnx.annotations import INPUT, mapped_nodes
from raqu_onnx.bundled import bundled_arrays, bundled_model
from raqu_onnx.data import open_dataset
from raqu_onnx.hardware import load_chip
from raqu_onnx.model_io import load_model, model_inputs
from raqu_onnx.passes import AnnotateTilingPass, CalibratePass, TidyPass
from raqu_onnx.passes.quantize_weights import build_quantizer
from raqu_onnx.quantizer import QuantizerSettings
from raqu_onnx.search import Goal, Problem, SearchRun, SearchSettings, search

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.error_curves import ErrorCurve
    from raqu_onnx.search.questions import Answer, Question
    from raqu_onnx.search.records import Judges
    from raqu_onnx.search.result import Bits

__all__ = ["main"]

Arrays = dict[str, "NDArray[Any]"]

_BUDGETS = {"resnet20": 14, "mobilenetv2": 6, "nodes50": 20}
_CALIBRATION_IMAGES = 512
_NODES, _CHANNELS, _SIDE = 50, 16, 16


@dataclass
class Stopwatch:
    """Seconds by what was done."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count what happens within."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start


@dataclass
class _Timed:
    """Judges whose time is taken; what is done between two answers is not theirs."""

    judges: Judges
    watch: Stopwatch

    def answers(
        self, question: Question, candidates: Sequence[Bits], until: Callable[[], bool]
    ) -> Iterator[tuple[int, Answer]]:
        """The answers as they come."""
        found = iter(self.judges.answers(question, candidates, until))
        while True:
            with self.watch.on("sensitivities" if question.kind == "quick" else "candidates"):
                answer = next(found, None)
            if answer is None:
                return
            yield answer


@dataclass(frozen=True)
class TimedRun(SearchRun):
    """A search in this process whose judging is timed."""

    watch: Stopwatch = field(default_factory=Stopwatch)

    def judges(self, *args: Any) -> Judges:
        """The judge of this process."""
        return _Timed(super().judges(*args), self.watch)


class TimedProblem(Problem):
    """A problem whose error curves are timed.

    Args:
        stopwatch: Gets their time.
    """

    def __init__(self, stopwatch: Stopwatch, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stopwatch = stopwatch

    def curves(self, widths: Sequence[int]) -> Mapping[str, ErrorCurve]:
        """Error curves of all nodes at some widths."""
        with self._stopwatch.on("error curves"):
            return super().curves(widths)


def chain(nodes: int) -> tuple[onnx.ModelProto, Arrays, Arrays]:
    """A chain of convolutions and a linear layer with random weights; calibration and selection data."""
    rng = np.random.default_rng(0)
    steps, weights, channels, value = [], [], 3, "input"
    for index in range(nodes - 1):
        kernel = rng.normal(0, (2 / (9 * channels)) ** 0.5, (_CHANNELS, channels, 3, 3)).astype(np.float32)
        weights += [numpy_helper.from_array(kernel, f"w{index}")]
        weights += [numpy_helper.from_array(rng.normal(0, 0.1, _CHANNELS).astype(np.float32), f"b{index}")]
        operands = [value, f"w{index}", f"b{index}"]
        steps += [
            helper.make_node("Conv", operands, [f"c{index}"], f"conv{index}", pads=[1] * 4),
            helper.make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}"),
        ]
        channels, value = _CHANNELS, f"r{index}"
    weights.append(numpy_helper.from_array(rng.normal(0, 0.3, (channels, 10)).astype(np.float32), "w"))
    steps += [
        helper.make_node("GlobalAveragePool", [value], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w"], ["logits"], "fc"),
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, _SIDE, _SIDE])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])]
    graph = helper.make_graph(steps, "chain", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    images = rng.normal(size=(_CALIBRATION_IMAGES + 2000, 3, _SIDE, _SIDE)).astype(np.float32)
    return model, {"input": images[:_CALIBRATION_IMAGES]}, {"input": images[_CALIBRATION_IMAGES:]}


def _case(name: str) -> tuple[onnx.ModelProto, Arrays, Arrays]:
    if name == "nodes50":
        return chain(_NODES)
    pool = bundled_arrays("calibration")
    calibration = {key: values[:_CALIBRATION_IMAGES] for key, values in pool.items() if key == "input"}
    return onnx.load_from_string(bundled_model(name)), calibration, bundled_arrays("selection")


def measure(name: str, given: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Seconds of one search, and those that were spent on images and on fits."""
    proto, calibration, selection = _case(name)
    model = TidyPass()(load_model(proto)).model
    AnnotateTilingPass()(model)
    inputs = model_inputs(model)
    CalibratePass(open_dataset(calibration, inputs), threads=given.threads, moments=True, pairs=True)(model)
    chip = load_chip("generic")
    quantizer = build_quantizer(model, chip.encoding, QuantizerSettings(threads=given.threads))
    first = frozenset(index for index, node in enumerate(mapped_nodes(model)) if INPUT.get(node))
    settings = SearchSettings(evaluations=given.evaluations, threads=given.threads, inputs=first)
    watch, crossbars = Stopwatch(), given.budget or _BUDGETS[name]
    problem = TimedProblem(
        watch,
        model,
        quantizer,
        chip,
        open_dataset(selection, inputs),
        settings,
        max_crossbars=crossbars,
        run=TimedRun(watch=watch),
    )
    start = time.perf_counter()
    search(problem, Goal(crossbars, None))
    return time.perf_counter() - start, watch.seconds


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(_BUDGETS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--evaluations", type=int, default=24, help="of the Bayesian stage (default: %(default)s)")
    parser.add_argument("--budget", type=int, help="crossbars (default: 14, 6 and 20)")
    parser.add_argument("--threads", type=int, help="threads of onnxruntime (default: all)")
    given = parser.parse_args()
    for name in given.cases.split(","):
        if name not in _BUDGETS:
            parser.error(f"--cases: {name!r} is none of {', '.join(_BUDGETS)}")
        total, parts = measure(name, given)
        told = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in parts.items())
        known = sum(parts.values())
        print(f"{name}: search {total:.1f} s: {told}, all else {total - known:.1f} s; {known / total:.1%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
