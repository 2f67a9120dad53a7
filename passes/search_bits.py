"""The widths of every mapped node, by search on a selection set."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from raqu_onnx.annotations import BITS, HISTOGRAM, INPUT, KEPT, MAPPED, QUANTIZER, SEARCH, NodeBits, mapped_nodes
from raqu_onnx.manifest_stages import execution_order
from raqu_onnx.partitioning import Parts, place_in_parts, without_counts
from raqu_onnx.passes.quantize_weights import build_quantizer
from raqu_onnx.quantizer import QuantizerSettings
from raqu_onnx.ranges import RangeMethod
from raqu_onnx.search import Goal, Problem, SearchResult, SearchRun, SearchSettings, no_progress, search
from raqu_onnx.weights import FitPart, WeightMethod

if TYPE_CHECKING:
    from raqu_onnx.data import Dataset
    from raqu_onnx.hardware import Chip
    from raqu_onnx.search import ProgressCallback
    from raqu_onnx.search.problem import InParts

__all__ = ["SearchBitsPass"]


@dataclass(frozen=True)
class SearchBitsPass(ir.passes.InPlacePass):
    """Choose weight and activation bits of every mapped node for a chip.

    Before and after: the same graph. Every mapped node gains `NodeBits`, the model a `SearchResult`. Nodes that are
    kept get 8 bits and take no part in the search.

    Attributes:
        chip: The chip, whose crossbars are the cost.
        selection: Data that candidates are judged on; it must not be the evaluation data.
        goal: The budget, or the loss allowed.
        settings: Ranges of widths, evaluations, seed, threads.
        weight_method: ``nearest``, ``mse``, ``gptq`` or ``sequential``.
        activation_range: ``min-max``, ``percentile``, ``entropy`` or ``mse``.
        fit_samples: Most calibration samples that ``sequential`` fits on.
        fit_without: Parts of the weight method to leave out, see `raqu_onnx.weights`.
        partitions: Most parts of the model that are programmed one after the other, `auto` for as few as will do; None
            where all has to fit at once.
        progress: Told of every step.
        run: How the search is carried out: its journal, its cache, its time.
    """

    name: ClassVar[str] = "search-bits"

    chip: Chip
    selection: Dataset
    goal: Goal = field(default_factory=Goal)
    settings: SearchSettings = field(default_factory=SearchSettings)
    weight_method: WeightMethod = "sequential"
    activation_range: RangeMethod = "mse"
    fit_samples: int = 512
    fit_without: frozenset[FitPart] = frozenset()
    partitions: Parts | None = None
    progress: ProgressCallback = no_progress
    run: SearchRun = field(default_factory=SearchRun)

    def requires(self, model: ir.Model) -> None:
        """Nodes are mapped and calibrated."""
        for node in mapped_nodes(model):
            HISTOGRAM.require(node)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Search; the graph itself does not change.

        Raises:
            DoesNotFitError: Even the smallest widths exceed the chip or the budget.
        """
        result = self.run.known or self._search(model)
        SEARCH.set(model, result)
        chosen = result.chosen.bits
        activations = chosen.activations or (None,) * len(chosen.weights)
        widths = dict(zip(result.nodes, zip(chosen.weights, activations, strict=True), strict=True))
        for node in mapped_nodes(model):
            BITS.set(node, NodeBits(*widths[MAPPED.require(node).name]))
        return ir.passes.PassResult(model, modified=True)

    def _search(self, model: ir.Model) -> SearchResult:
        quantizer = QUANTIZER.get(model) or build_quantizer(
            model,
            self.chip.encoding,
            QuantizerSettings(
                self.weight_method, self.activation_range, self.fit_without, self.fit_samples, self.settings.threads
            ),
        )
        # The quantizer's order is that of the graph.
        nodes = mapped_nodes(model)
        settings = replace(
            self.settings,
            kept=frozenset(index for index, node in enumerate(nodes) if KEPT.get(node) is not None),
            inputs=frozenset(index for index, node in enumerate(nodes) if INPUT.get(node)),
        )
        budget = self.goal.max_crossbars
        problem = Problem(
            model,
            quantizer,
            self.chip if self.partitions is None else without_counts(self.chip),
            self.selection,
            settings,
            self.progress,
            max_crossbars=budget,
            in_parts=None if self.partitions is None else self._in_parts(model, self.partitions),
            run=self.run,
        )
        return search(problem, self.goal)

    def _in_parts(self, model: ir.Model, parts: Parts) -> InParts:
        """How `place-crossbars` will place the model."""
        order, _ = execution_order(model, (MAPPED.require(node).name for node in mapped_nodes(model)))
        return lambda matrices: place_in_parts(matrices, self.chip, order, parts)
