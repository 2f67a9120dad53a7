"""The search's view of a model on a chip: what a set of widths costs and how good it is."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.annotations import NodeBits
from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.error_curves import error_curves
from raqu_onnx.errors import ChipError
from raqu_onnx.evaluation import Score
from raqu_onnx.manifest_stages import execution_order
from raqu_onnx.model_cost import Flow
from raqu_onnx.placement import DoesNotFitError, count_crossbars, place
from raqu_onnx.search.cell_prices import cell_shares
from raqu_onnx.search.costs import CostModel
from raqu_onnx.search.judge import Judge
from raqu_onnx.search.questions import QUICK, SCORE, Question, Verdict
from raqu_onnx.search.records import Records
from raqu_onnx.search.result import Bits, Evaluation, NodeWidth
from raqu_onnx.search.run import Clock, SearchRun
from raqu_onnx.shortage import shortage
from raqu_onnx.tiling import Matrix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.data import Dataset
    from raqu_onnx.encodings import Encoding
    from raqu_onnx.error_curves import ErrorCurve
    from raqu_onnx.hardware import Chip, Sharing
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.model_cost import ModelCost
    from raqu_onnx.placement import Placement
    from raqu_onnx.quantizer import ModelQuantizer
    from raqu_onnx.search.budget import Cost
    from raqu_onnx.search.result import SearchSettings

# Placements that are remembered: a candidate is placed to see whether it fits, and measured once it is chosen.
_REMEMBERED = 16

__all__ = ["Problem", "ProgressCallback", "no_progress"]

InParts = Callable[["Mapping[str, Matrix]"], "Placement"]
"""Places weights in parts of the model that are programmed one after the other; raises `DoesNotFitError`."""

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
        run: How the search is carried out.
        in_parts: How the model is placed where the chip is programmed for one part of it after the other; `chip` then
            has any number of crossbars.
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
        run: SearchRun = SearchRun(),  # noqa: B008 - frozen
        in_parts: InParts | None = None,
    ) -> None:
        self.model = model
        self.quantizer = quantizer
        self.chip = chip
        self.settings = settings
        self.max_crossbars = max_crossbars
        self.in_parts = in_parts
        self.progress = progress
        self.nodes: list[MappedNode] = [source.node for source in quantizer.sources.values()]
        self.names = tuple(node.name for node in self.nodes)
        self.evaluations: list[Evaluation] = []
        self.watch: Callable[[Evaluation], None] = lambda _evaluation: None
        self._evaluated: set[Bits] = set()
        self.clock = Clock(run.timeout)
        self._judge = Judge(model, quantizer, selection, settings)
        self.reference = self._judge.reference
        self.glances_first = self._judge.glances_first
        self._cache = run.begin(model, quantizer, selection, settings)
        self._workers = 1 if run.pool is None else run.pool.workers
        judges = run.judges(self._judge, model, quantizer, selection, settings)
        self._records = Records(judges, run.journal, self._cache)
        self._counts: dict[tuple[Sharing, tuple[NodeWidth, ...] | bytes], int | None] = {}
        self._placements: OrderedDict[tuple[Sharing, bytes], Placement] = OrderedDict()
        self._matrices: dict[tuple[int, int], Matrix] = {}
        self._curves: dict[tuple[int, ...], Mapping[str, ErrorCurve]] = {}
        self._flow = Flow(*execution_order(model, self.names))
        self._costs = CostModel(self.nodes, chip, self._flow)
        self.cell_cost = self._linear_costs()

    def on(self, chip: Chip, max_crossbars: int | None) -> Problem:
        """The same model, data and judgements on another chip, with no candidate judged there yet.

        Args:
            chip: The other chip, whose cells hold as many bits.
            max_crossbars: The budget there.
        """
        other = copy(self)
        other.chip, other.max_crossbars = chip, max_crossbars
        other.watch = lambda _evaluation: None
        other.progress = lambda what, done, total: self.progress(f"{what}, for one crossbar size", done, total)
        other.evaluations, other._evaluated = [], set()
        other._counts, other._placements = {}, OrderedDict()
        other._costs = CostModel(self.nodes, chip, self._flow)
        other.cell_cost = other._linear_costs()
        return other

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
            return self.place(weights, mode).crossbars
        except DoesNotFitError:
            return None

    def place(self, weights: tuple[NodeWidth, ...], sharing: Sharing | None = None) -> Placement:
        """Place the model at these weight widths as it will be in the end.

        Raises:
            DoesNotFitError: The chip is too small.
        """
        mode = sharing or self.chip.sharing
        key = (mode, _digest(weights))
        if key not in self._placements:
            self._placements[key] = self._place(weights, mode)
            if len(self._placements) > _REMEMBERED:
                self._placements.popitem(last=False)
        return self._placements[key]

    def _place(self, weights: tuple[NodeWidth, ...], mode: Sharing) -> Placement:
        matrices = self.matrices(weights)
        if self.in_parts is not None and mode == self.chip.sharing:
            return self.in_parts(matrices)
        return place(matrices, self.chip, sharing=mode, max_crossbars=self.max_crossbars)

    def encodings(self, weights: tuple[NodeWidth, ...]) -> dict[str, Encoding]:
        """How each node is stored on the crossbar types that it lies on; on the chip's first one if nothing is stored.

        Raises:
            DoesNotFitError: The chip is too small for these widths.
        """
        found = self.place(weights)
        return {name: found.geometries[found.types_by_node.get(name, (0,))[0]].encoding for name in self.names}

    def measure(self, bits: Bits) -> Cost | None:
        """Crossbars, latency, energy and average bits of a candidate, None when the chip is too small."""
        return self._costs.measure(_digest(bits.weights), lambda: self.place(bits.weights), bits.activations)

    def costs_of_nodes(self, bits: Bits) -> ModelCost | None:
        """Cycles and energy of every node of a candidate, None when the chip is too small."""
        return self._costs.by_node(_digest(bits.weights), lambda: self.place(bits.weights), bits.activations)

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
        return self.evaluate_many([bits], origin)[0]

    def evaluate_many(self, candidates: Sequence[Bits], origin: str) -> list[Evaluation]:
        """Judge candidates that fit the chip, at the same time where there are workers.

        Raises:
            DoesNotFitError: One does not fit the chip.
        """
        costs = [cost for bits in candidates if (cost := self.measure(bits)) is not None]
        if len(costs) < len(candidates):
            raise DoesNotFitError(f"the candidate does not fit chip {self.chip.name}")
        found: list[Evaluation] = []
        for bits, cost, score in zip(candidates, costs, self.score_many(candidates), strict=True):
            found.append(Evaluation(bits, cost.crossbars, score, origin, cost))
            if bits not in self._evaluated:
                self._evaluated.add(bits)
                self.evaluations.append(found[-1])
                self.watch(found[-1])
        return found

    def score(self, bits: Bits) -> Score:
        """Score on the whole selection set."""
        return self.score_many([bits])[0]

    def score_many(self, candidates: Sequence[Bits]) -> list[Score]:
        """Scores on the whole selection set."""
        found = self._records.answers(SCORE, candidates)
        answers = (found[bits] for bits in candidates)
        return [item.score for item in answers if isinstance(item, Verdict) and item.score is not None]

    def glances(self, candidates: Sequence[Bits], most: float = math.inf) -> list[float]:
        """Losses on a quarter of the selection set.

        Args:
            candidates: The candidates.
            most: Those up to here are judged on the whole set too, which is then known when they are evaluated.
        """
        found = self._records.answers(Question("score", most), candidates)
        return [answer.glance for bits in candidates if isinstance(answer := found[bits], Verdict)]

    def judge_ahead(self, candidates: Sequence[Bits], what: str) -> None:
        """Judge candidates at the same time that will be evaluated one by one; nothing without workers.

        Args:
            candidates: Those that will be evaluated unless time is up.
            what: What progress says is being done.
        """
        if self._workers > 1:
            total = len(candidates)
            self._records.answers(
                SCORE, candidates, until=self.clock.is_over, told=lambda done: self.progress(what, done, total)
            )

    def quick_fidelity(self, bits: Bits) -> float:
        """KL divergence (or noise over signal) on the sensitivity samples, which is smooth in every width."""
        (found,) = self._records.answers(QUICK, [bits]).values()
        return found.glance if isinstance(found, Verdict) else found

    def quick_many(self, candidates: Sequence[Bits], what: str) -> list[float | None]:
        """The same for many candidates.

        Args:
            candidates: The candidates.
            what: What progress says is being done.

        Returns:
            One for each, None where time was up before.
        """
        total = len(candidates)
        self.progress(what, 0, total)
        found = self._records.answers(
            QUICK, candidates, until=self.clock.is_over, told=lambda done: self.progress(what, done, total)
        )
        self.progress(what, total, total)
        self._records.keep_sensitivities()
        return [value if isinstance(value := found.get(bits), float) else None for bits in candidates]

    def curves(self, widths: Sequence[int]) -> Mapping[str, ErrorCurve]:
        """Error curves of all nodes at some widths."""
        key = tuple(widths)
        if key not in self._curves:
            known = None if self._cache is None else self._cache.curves(widths, self.names)
            found = known or error_curves(self.model, self.quantizer, widths=widths)
            if self._cache is not None and known is None:
                self._cache.keep_curves(widths, found)
            self._curves[key] = found
        return self._curves[key]


def _digest(weights: tuple[NodeWidth, ...]) -> bytes:
    """Stands for the widths of all kernels, of which a search tries thousands."""
    return hashlib.blake2b(repr(weights).encode(), digest_size=16).digest()
