"""The search's view of a model on a chip: what a set of widths costs and how good it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.annotations import NodeBits
from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.errors import ChipError
from raqu_onnx.evaluation import Score, collect, make_session, score
from raqu_onnx.model_io import to_proto
from raqu_onnx.placement import DoesNotFitError, count_crossbars, geometries, place
from raqu_onnx.search.result import Bits, Evaluation
from raqu_onnx.simulation import Simulator
from raqu_onnx.tiling import Matrix

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.data import Batch, Dataset
    from raqu_onnx.evaluation import Outputs
    from raqu_onnx.hardware import Chip, Sharing
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.quantizer import ModelQuantizer
    from raqu_onnx.search.result import SearchSettings

__all__ = ["Problem", "ProgressCallback", "no_progress"]

_MOST_BYTES_KEPT = 1 << 30

ProgressCallback = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done and how many there are."""


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore progress."""


class Problem:
    """Costs and scores of candidates; every answer is computed once.

    Args:
        model: The tidied, mapped and calibrated float model.
        quantizer: Its quantizer.
        chip: The chip.
        selection: Data that candidates are judged on.
        settings: How the search is run.
        progress: Told of every evaluation.
    """

    def __init__(
        self,
        model: ir.Model,
        quantizer: ModelQuantizer,
        chip: Chip,
        selection: Dataset,
        settings: SearchSettings,
        progress: ProgressCallback = no_progress,
    ) -> None:
        self.quantizer = quantizer
        self.chip = chip
        self.settings = settings
        self.progress = progress
        self.nodes: list[MappedNode] = [source.node for source in quantizer.sources.values()]
        self.names = tuple(node.name for node in self.nodes)
        self.evaluations: list[Evaluation] = []
        self._selection = selection
        self._kept = _kept_in_memory(selection, settings.batch_size)
        reference = make_session(to_proto(model).SerializeToString(), threads=settings.threads)
        self._reference = collect(reference, selection, settings.batch_size)
        self.reference = score(self._reference, self._reference)
        self._simulator = Simulator(
            model, self.nodes, threads=settings.threads, float_activations=settings.activation_bits is None
        )
        self._scores: dict[Bits, Score] = {}
        self._counts: dict[tuple[Sharing, tuple[int, ...]], int | None] = {}
        self._matrices: dict[tuple[int, int], Matrix] = {}
        self.cell_cost = self._linear_costs()

    # --- cost -------------------------------------------------------------------------------------------------

    def matrix(self, node: int, bits: int) -> Matrix:
        """Weights of one node at one width."""
        if (node, bits) not in self._matrices:
            self._matrices[node, bits] = Matrix.of(self.nodes[node].layout, bits)
        return self._matrices[node, bits]

    def crossbars(self, weights: tuple[int, ...], sharing: Sharing | None = None) -> int | None:
        """Crossbars that the model takes at these weight widths, None when the chip is too small."""
        mode = sharing or self.chip.sharing
        key = (mode, weights)
        if key not in self._counts:
            self._counts[key] = self._count(weights, mode)
        return self._counts[key]

    def _count(self, weights: tuple[int, ...], mode: Sharing) -> int | None:
        matrices = {name: self.matrix(index, weights[index]) for index, name in enumerate(self.names)}
        try:
            return place(matrices, self.chip, sharing=mode).crossbars
        except DoesNotFitError:
            return None

    def packed_crossbars(self, weights: tuple[int, ...]) -> int:
        """Crossbars packed as the chip allows, its counts ignored."""
        found = self.crossbars(weights)
        if found is not None:
            return found
        matrices = {name: self.matrix(index, weights[index]) for index, name in enumerate(self.names)}
        return place(matrices, self.chip, ignore_counts=True).crossbars

    def exclusive_crossbars(self, weights: tuple[int, ...]) -> int:
        """Crossbars with one node in each, the chip's counts ignored."""
        return sum(count_crossbars(self.matrix(i, bits), self.chip, "exclusive") for i, bits in enumerate(weights))

    def _linear_costs(self) -> NDArray[np.float64]:
        """Cost of each node at each width, which sums to the whole: crossbars if exclusive, else cells."""
        low, high = self.settings.weight_bits
        costs = np.full((len(self.nodes), MAX_BITS + 1), np.inf)
        for node in range(len(self.nodes)):
            # Uniform baselines go beyond the range that is searched.
            for bits in range(low, MAX_BITS + 1):
                costs[node, bits] = self._linear_cost(self.matrix(node, bits))
        if not np.isfinite(costs[:, low : high + 1]).any(1).all():
            node = int(np.flatnonzero(~np.isfinite(costs[:, low : high + 1]).any(1))[0])
            raise ChipError(f"{self.names[node]}: one kernel is wider than every crossbar of chip {self.chip.name}")
        return costs

    def _linear_cost(self, matrix: Matrix) -> float:
        try:
            alone = count_crossbars(matrix, self.chip, "exclusive")
        except ChipError:
            return np.inf
        if self.chip.sharing == "exclusive":
            return float(alone)
        return float(matrix.cells(geometries(self.chip)[0].encoding))

    def cost(self, weights: tuple[int, ...]) -> float:
        """Sum of the linear costs of a candidate."""
        return float(self.cell_cost[np.arange(len(weights)), list(weights)].sum())

    # --- quality ----------------------------------------------------------------------------------------------

    def evaluate(self, bits: Bits, origin: str) -> Evaluation:
        """Judge a candidate that fits the chip on the whole selection set.

        Raises:
            DoesNotFitError: It does not fit the chip.
        """
        crossbars = self.crossbars(bits.weights)
        if crossbars is None:
            raise DoesNotFitError(f"the candidate does not fit chip {self.chip.name}")
        known = bits in self._scores
        evaluation = Evaluation(bits, crossbars, self.score(bits), origin)
        if not known:
            self.evaluations.append(evaluation)
        return evaluation

    def score(self, bits: Bits) -> Score:
        """Score on the whole selection set."""
        if bits not in self._scores:
            self._scores[bits] = self._judge(bits)
        return self._scores[bits]

    def quick_fidelity(self, bits: Bits) -> float:
        """KL divergence (or noise over signal) on the sensitivity samples, which is smooth in every width."""
        # Node by node, from memory: the sequential fit of every entry of a sensitivity table would take too long.
        quantized = {name: self.quantizer.quantize(name, width) for name, width in self._widths(bits).items()}
        outputs = self._simulator.run(quantized, self._first_batches())
        return replace(score(outputs, self._prefix(outputs)), top1=None).loss

    def _first_batches(self) -> Iterator[Batch]:
        """Batches, which a model with a fixed batch makes itself, up to the sensitivity samples."""
        seen = 0
        for batch in self._data():
            yield batch
            seen += batch.size
            if seen >= self.settings.sensitivity_samples:
                return

    def _prefix(self, outputs: Outputs) -> Outputs:
        """What the float model said on the same batches; an output need not have one row per sample."""
        whole = zip(self._reference.outputs, outputs.outputs, strict=True)
        return replace(self._reference, outputs=tuple(array[: len(part)] for array, part in whole))

    def _judge(self, bits: Bits) -> Score:
        """Quantize as the emitted model would be, and run it."""
        return score(
            self._simulator.run(self.quantizer.quantize_model(self._widths(bits)), self._data()), self._reference
        )

    def _widths(self, bits: Bits) -> dict[str, NodeBits]:
        activations = bits.activations or (None,) * len(self.names)
        return {
            name: NodeBits(weight, activation)
            for name, weight, activation in zip(self.names, bits.weights, activations, strict=True)
        }

    def _data(self) -> Iterable[Batch]:
        return self._kept or self._selection.batches(self.settings.batch_size)


def _kept_in_memory(dataset: Dataset, batch_size: int) -> list[Batch] | None:
    """All batches of a small dataset, since every candidate reads them again; None for a large one."""
    batches, held = [], 0
    for batch in dataset.batches(batch_size):
        batches.append(batch)
        held += sum(array.nbytes for array in batch.feeds.values())
        if held > _MOST_BYTES_KEPT:
            return None
    return batches
