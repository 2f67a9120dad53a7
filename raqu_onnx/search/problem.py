"""The search's view of a model on a chip: what a set of widths costs and how good it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.annotations import NodeBits
from raqu_onnx.data_base import Batch
from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.errors import ChipError
from raqu_onnx.evaluation import Reference, Score, make_session
from raqu_onnx.placement import DoesNotFitError, count_crossbars, place
from raqu_onnx.search.cell_prices import cell_shares
from raqu_onnx.search.result import Bits, Evaluation, NodeWidth
from raqu_onnx.session_model import session_model
from raqu_onnx.shortage import shortage
from raqu_onnx.simulation import Simulator
from raqu_onnx.spool import Spool, SpoolError
from raqu_onnx.tiling import Matrix

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.data import Dataset
    from raqu_onnx.encodings import Encoding
    from raqu_onnx.hardware import Chip, Sharing
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.quantizer import ModelQuantizer
    from raqu_onnx.search.result import SearchSettings

__all__ = ["Problem", "ProgressCallback", "no_progress"]

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
        max_crossbars: The budget; on a chip with several crossbar types, placements stay within it where they can.
    """

    def __init__(
        self,
        model: ir.Model,
        quantizer: ModelQuantizer,
        chip: Chip,
        selection: Dataset,
        settings: SearchSettings,
        progress: ProgressCallback = no_progress,
        *,
        max_crossbars: int | None = None,
    ) -> None:
        self.model = model
        self.quantizer = quantizer
        self.chip = chip
        self.settings = settings
        self.max_crossbars = max_crossbars
        self.progress = progress
        self.nodes: list[MappedNode] = [source.node for source in quantizer.sources.values()]
        self.names = tuple(node.name for node in self.nodes)
        self.evaluations: list[Evaluation] = []
        self._batches = _Batches(selection, settings.batch_size)
        session = make_session(session_model(model), threads=settings.threads)
        self._reference = Reference(session, selection, settings.batch_size, settings.task)
        self.reference = self._reference.score
        self._simulator = Simulator(
            model, self.nodes, threads=settings.threads, float_activations=settings.activation_bits is None
        )
        self._scores: dict[Bits, Score] = {}
        self._counts: dict[tuple[Sharing, tuple[NodeWidth, ...] | bytes], int | None] = {}
        self._matrices: dict[tuple[int, int], Matrix] = {}
        self.cell_cost = self._linear_costs()

    # --- cost -------------------------------------------------------------------------------------------------

    def matrix(self, node: int, bits: int) -> Matrix:
        """Weights of one node at one width."""
        if (node, bits) not in self._matrices:
            self._matrices[node, bits] = Matrix.of(self.nodes[node].layout, bits)
        return self._matrices[node, bits]

    def matrices(self, weights: tuple[NodeWidth, ...]) -> dict[str, Matrix]:
        """Weights of all nodes by name, with what follows from dropped kernels."""
        widths = [width for width in weights if isinstance(width, int)]
        if len(widths) == len(weights):
            return {name: self.matrix(node, widths[node]) for node, name in enumerate(self.names)}
        bits = {name: NodeBits(width, None) for name, width in zip(self.names, weights, strict=True)}
        pruned = self.quantizer.pruned(bits)
        return {n.name: Matrix.of(n.layout, pruned.bits[n.name], pruned.row_counts(n)) for n in self.nodes}

    def crossbars(self, weights: tuple[NodeWidth, ...], sharing: Sharing | None = None) -> int | None:
        """Crossbars that the model takes at these weight widths, None when the chip is too small."""
        mode = sharing or self.chip.sharing
        key = (mode, weights if all(isinstance(width, int) for width in weights) else _digest(weights))
        if key not in self._counts:
            self._counts[key] = self._count(weights, mode)
        return self._counts[key]

    def _count(self, weights: tuple[NodeWidth, ...], mode: Sharing) -> int | None:
        try:
            found = place(self.matrices(weights), self.chip, sharing=mode, max_crossbars=self.max_crossbars)
            return found.crossbars
        except DoesNotFitError:
            return None

    def encodings(self, weights: tuple[NodeWidth, ...]) -> dict[str, Encoding]:
        """How each node is stored on the crossbar types that it lies on; on the chip's first one if nothing is stored.

        Raises:
            DoesNotFitError: The chip is too small for these widths.
        """
        found = place(self.matrices(weights), self.chip, max_crossbars=self.max_crossbars)
        return {name: found.geometries[found.types_by_node.get(name, (0,))[0]].encoding for name in self.names}

    def packed_crossbars(self, weights: tuple[NodeWidth, ...]) -> int:
        """Crossbars packed as the chip allows, its counts ignored."""
        found = self.crossbars(weights)
        if found is not None:
            return found
        return sum(self._uncounted(weights))

    def shortage(self, weights: tuple[NodeWidth, ...]) -> str:
        """Which crossbar types run short at these weight widths, in words."""
        return shortage(self.chip, self._uncounted(weights))

    def _uncounted(self, weights: tuple[NodeWidth, ...]) -> tuple[int, ...]:
        """Crossbars of each type, the chip's counts ignored."""
        found = place(self.matrices(weights), self.chip, ignore_counts=True, max_crossbars=self.max_crossbars)
        return found.crossbars_by_type

    def exclusive_crossbars(self, weights: tuple[NodeWidth, ...]) -> int:
        """Crossbars with one node in each, the chip's counts ignored."""
        return sum(count_crossbars(matrix, self.chip, "exclusive") for matrix in self.matrices(weights).values())

    def _linear_costs(self) -> NDArray[np.float64]:
        """Cost of each node at each width, which sums to the whole: crossbars if exclusive, else cells."""
        low = self.settings.weight_bits[0]
        costs = np.full((len(self.nodes), MAX_BITS + 1), np.inf)
        for node in range(len(self.nodes)):
            # Uniform baselines go beyond the range that is searched.
            for bits in range(low, MAX_BITS + 1):
                costs[node, bits] = self._linear_cost(self.matrix(node, bits))
        for node, cost in enumerate(costs):
            first, last = self.settings.weight_limits(node)
            if not np.isfinite(cost[first : last + 1]).any():
                raise ChipError(f"{self.names[node]}: one kernel is wider than every crossbar of chip {self.chip.name}")
        return costs

    def _linear_cost(self, matrix: Matrix) -> float:
        try:
            alone = count_crossbars(matrix, self.chip, "exclusive")
        except ChipError:
            return np.inf
        if self.chip.sharing == "exclusive":
            return float(alone)
        return sum(share * matrix.cells(encoding) for encoding, share in cell_shares(self.chip).items())

    def cost(self, weights: Sequence[int]) -> float:
        """Sum of the linear costs of a candidate with one width for each node."""
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
        found = self._reference.judge(self._simulator.stream(quantized, self._first_batches()))
        return replace(found, top1=None).loss

    def _first_batches(self) -> Iterator[Batch]:
        """Batches, which a model with a fixed batch makes itself, up to the sensitivity samples."""
        seen = 0
        for batch in self._batches:
            yield batch
            seen += batch.size
            if seen >= self.settings.sensitivity_samples:
                return

    def _judge(self, bits: Bits) -> Score:
        """Quantize as the emitted model would be, and run it."""
        quantized = self.quantizer.quantize_model(self._widths(bits))
        return self._reference.judge(self._simulator.stream(quantized, self._batches))

    def _widths(self, bits: Bits) -> dict[str, NodeBits]:
        activations = bits.activations or (None,) * len(self.names)
        return {
            name: NodeBits(weight, activation)
            for name, weight, activation in zip(self.names, bits.weights, activations, strict=True)
        }


def _digest(weights: tuple[NodeWidth, ...]) -> bytes:
    """Stands for the widths of all kernels, of which a search tries thousands."""
    return hashlib.blake2b(repr(weights).encode(), digest_size=16).digest()


class _Batches:
    """The batches of a dataset, which every candidate reads again: decoded once, with bounded memory."""

    def __init__(self, dataset: Dataset, batch_size: int) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._labels: list[NDArray[np.int64] | None] = []
        self._names: list[str] = []
        self._spool: Spool | None = None
        spool = Spool()
        try:
            for batch in dataset.batches(batch_size):
                self._names = list(batch.feeds)
                self._labels.append(batch.labels)
                # Copies: a source may fill the same arrays again.
                spool.append([np.array(array) for array in batch.feeds.values()])
        except SpoolError:
            # No room for a copy: the source is read each time.
            return
        self._spool = spool

    def __iter__(self) -> Iterator[Batch]:
        if self._spool is None:
            yield from self._dataset.batches(self._batch_size)
            return
        for labels, arrays in zip(self._labels, self._spool, strict=True):
            yield Batch(dict(zip(self._names, arrays, strict=True)), labels)
