"""The widths of every mapped node, by search on a selection set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from raqu_onnx.annotations import BITS, HISTOGRAM, MAPPED, QUANTIZER, SEARCH, NodeBits, mapped_nodes
from raqu_onnx.passes.quantize_weights import build_quantizer
from raqu_onnx.search import Goal, Problem, SearchSettings, no_progress, search
from raqu_onnx.statistics import RangeMethod
from raqu_onnx.weights import WeightMethod

if TYPE_CHECKING:
    from raqu_onnx.data import Dataset
    from raqu_onnx.hardware import Chip
    from raqu_onnx.search import ProgressCallback

__all__ = ["SearchBitsPass"]


@dataclass(frozen=True)
class SearchBitsPass(ir.passes.InPlacePass):
    """Choose weight and activation bits of every mapped node for a chip.

    Before and after: the same graph. Every mapped node gains `NodeBits`, the model a `SearchResult`.

    Attributes:
        chip: The chip, whose crossbars are the cost.
        selection: Data that candidates are judged on; it must not be the evaluation data.
        goal: The budget, or the loss allowed.
        settings: Ranges of widths, evaluations, seed, threads.
        weight_method: ``nearest``, ``mse``, ``gptq`` or ``sequential``.
        activation_range: ``min-max``, ``percentile`` or ``mse``.
        fit_samples: Most calibration samples that ``sequential`` fits on.
        progress: Told of every step.
    """

    name: ClassVar[str] = "search-bits"

    chip: Chip
    selection: Dataset
    goal: Goal = field(default_factory=Goal)
    settings: SearchSettings = field(default_factory=SearchSettings)
    weight_method: WeightMethod = "sequential"
    activation_range: RangeMethod = "mse"
    fit_samples: int = 256
    progress: ProgressCallback = no_progress

    def requires(self, model: ir.Model) -> None:
        """Nodes are mapped and calibrated."""
        for node in mapped_nodes(model):
            HISTOGRAM.require(node)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Search; the graph itself does not change.

        Raises:
            DoesNotFitError: Even the smallest widths exceed the chip or the budget.
        """
        quantizer = QUANTIZER.get(model) or build_quantizer(
            model,
            self.chip.encoding,
            weight_method=self.weight_method,
            range_method=self.activation_range,
            fit_samples=self.fit_samples,
            threads=self.settings.threads,
        )
        problem = Problem(model, quantizer, self.chip, self.selection, self.settings, self.progress)
        result = search(problem, self.goal)
        SEARCH.set(model, result)
        chosen = result.chosen.bits
        activations = chosen.activations or (None,) * len(chosen.weights)
        widths = dict(zip(result.nodes, zip(chosen.weights, activations, strict=True), strict=True))
        for node in mapped_nodes(model):
            BITS.set(node, NodeBits(*widths[MAPPED.require(node).name]))
        return ir.passes.PassResult(model, modified=True)
