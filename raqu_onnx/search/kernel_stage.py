"""The second stage: bits for every kernel, or for groups of kernels, within the budget.

Kernels never enter the Bayesian search: `raqu_onnx.kernel_allocation` gives them their bits, from losses that add up.
What does not add up is learned on the level of nodes: the search moves a factor on the losses of each node, one on the
losses of all dropped kernels, and one that grows from the first node to the last, in half powers of two. The last of
these is there because nodes are quantized in graph order, each making up for those before it: what is lost early is
partly won back, what is lost at the end is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from raqu_onnx.errors import ConfigError
from raqu_onnx.exclusive_allocation import ExclusiveAllocator
from raqu_onnx.kernel_allocation import KernelAllocator, KernelBits, Taste
from raqu_onnx.kernel_losses import grouped, kernel_losses
from raqu_onnx.placement import count_crossbars, geometries
from raqu_onnx.search.allocation import kernel_widths
from raqu_onnx.search.bayes import TrustRegion
from raqu_onnx.search.cell_prices import cell_shares, cells_by_width, cells_within, mean_cells
from raqu_onnx.search.fitting import repaired, within
from raqu_onnx.search.result import Bits
from raqu_onnx.search.stages import LayerStage, activation_loss, searched_activations, widest_activations

if TYPE_CHECKING:
    from raqu_onnx.dropping import DropRules
    from raqu_onnx.encodings import Encoding
    from raqu_onnx.kernel_allocation import Fits
    from raqu_onnx.search.budget import Budget
    from raqu_onnx.search.problem import Problem
    from raqu_onnx.search.result import Evaluation, NodeWidth
    from raqu_onnx.search.sensitivity import Sensitivity
    from raqu_onnx.tiling import ArrayGeometry

__all__ = ["KernelStage"]

# Half powers of two by which the search may change the losses of a node, and of dropped kernels.
_REACH = 8
# Exponents on the losses of dropped kernels that a start tries: the estimate knows nothing of how drops add up.
_DROP_STARTS = (6, 3, 0)
_NO_DROP = 40
# Exponents between the middle node and the last that a start tries, the first one with every exponent on dropping.
# On the bundled ResNet-20 at 18 and at 14 crossbars 2 gave less KL divergence than 0 and 4, on one calibration set.
_TILT_STARTS = (2, 0, 4)
# Times that prices follow a placement, which follows prices.
_PRICE_TURNS = 2
# Mean weight bits that starts within a limit of energy try: what weights do not take is left to activations.
_SHARES = (5.0, 4.0, 3.0, 2.5)
# Crossbars above a budget up to which they are saved one by one where each serves one node. Models so large that there
# are more fill their crossbars anyway: for them cells tell enough.
_MOST_STEPS = 400


class _Start(NamedTuple):
    """Exponents that an allocation is started from."""

    tilt: int
    dropping: int


#: Stands for the integer program's widths of nodes.
_LAYERS = _Start(0, 2 * _NO_DROP)


class KernelStage:
    """Bits for every kernel.

    Args:
        problem: Costs and scores.
        sensitivity: Additive losses of nodes.
    """

    def __init__(self, problem: Problem, sensitivity: Sensitivity) -> None:
        self._problem = problem
        self._sensitivity = sensitivity
        self._layers = LayerStage(problem, sensitivity)
        self._known: dict[Bits, list[int]] = {}
        self._caps: dict[Bits, float] = {}
        self._alone: dict[tuple[str, bytes, bytes], int] = {}
        self._allocator = self._make_allocator(sensitivity)
        # What kernels lose at the widest widths is in the base of the sensitivities already.
        widest = zip(problem.nodes, kernel_widths(problem), strict=True)
        self._least = self._allocator.loss(
            {node.name: np.full(node.layout.channels, widths[-1]) for node, widths in widest}, Taste()
        )
        # From no dropping to ever more.
        self._droppings = [_NO_DROP, *(_DROP_STARTS if problem.settings.drops else ())]
        self._best: _Start | None = None

    def _make_allocator(self, sensitivity: Sensitivity) -> KernelAllocator:
        problem, settings = self._problem, self._problem.settings
        widths = dict(zip(problem.names, kernel_widths(problem), strict=True))
        everything = sorted({bits for choices in widths.values() for bits in choices})
        # What is kept at 8 bits keeps all kernels.
        whole = _rules(problem).tied(problem.names[node] for node in settings.kept)
        losses = kernel_losses(
            problem.quantizer,
            problem.curves(everything),
            _rules(problem),
            dict(zip(problem.names, sensitivity.weights, strict=True)),
            widths,
            may_drop=frozenset(problem.names) - whole if settings.drops else frozenset(),
        )
        size = settings.group or 1
        groups = {name: grouped(item, size) for name, item in losses.items()} if size > 1 else {}
        allocator = KernelAllocator(problem.nodes, losses, _rules(problem), self._geometry.encoding, groups)
        return allocator.priced(dict.fromkeys(problem.names, mean_cells(cell_shares(problem.chip))))

    @property
    def fewest_crossbars(self) -> int:
        """One where kernels can be dropped, else those of the smallest widths."""
        return 1 if self._problem.settings.drops else self._layers.fewest_crossbars

    def extremes(self, budget: Budget) -> list[tuple[NodeWidth, ...]]:
        """Those of whole nodes, and what is left where every kernel is dropped that may be."""
        dearest = self._allocator.dearest(Taste())
        whole = self._weights(dict(_rules(self._problem).apply(dearest).bits))
        return [*self._layers.extremes(budget), *([whole] if self._problem.settings.drops else [])]

    def start(self, budget: Budget) -> Evaluation | None:
        """The best of several allocations for a budget, and of the integer program's widths of nodes.

        Later budgets try what was best before, and a little more dropping: tighter ones want it.
        """
        found: dict[_Start, Evaluation] = {}
        layers = [_LAYERS] if self._best is None or self._best == _LAYERS else []
        if self._best is None:
            self._try(found, budget, layers + [_Start(_TILT_STARTS[0], dropping) for dropping in self._droppings])
            if found and (best := _best_of(found)) != _LAYERS:
                self._try(found, budget, [best._replace(tilt=tilt) for tilt in _TILT_STARTS[1:]])
        else:
            tilt, first = self._best if self._best != _LAYERS else _Start(_TILT_STARTS[0], self._droppings[0])
            later = self._droppings[self._droppings.index(first) :]
            self._try(found, budget, layers + [_Start(tilt, dropping) for dropping in later[:2]])
        if not found:
            return None
        self._best = _best_of(found)
        leader = found[self._best]
        plain = [0] * len(self._problem.nodes) + list(_Start(_TILT_STARTS[0], _NO_DROP))
        shared = self._shares(self._known.get(leader.bits, plain), budget) if budget.limits_energy else []
        return min([leader, *shared], key=lambda item: item.score.loss)

    def _try(self, found: dict[_Start, Evaluation], budget: Budget, starts: list[_Start]) -> None:
        """Judge allocations, unless the time is over and there is something to go on with."""
        candidates: dict[_Start, Bits] = {}
        for start in starts:
            if start == _LAYERS:
                bits = self._layers.widths_within(budget)
            else:
                bits = self.allocate([0] * len(self._problem.nodes) + list(start), budget)
            candidates |= {} if bits is None else {start: bits}
        self._problem.judge_ahead(list(candidates.values()), "judging allocations")
        for start, bits in candidates.items():
            if found and self._problem.clock.is_over():
                return
            origin = "integer program" if start == _LAYERS else "kernel allocation"
            found[start] = self._problem.evaluate(bits, origin)

    def _shares(self, vector: list[int], budget: Budget) -> list[Evaluation]:
        """Narrower weights, which leave more of an energy to activations, judged."""
        if self._problem.clock.is_over():
            return []
        candidates: dict[Bits, None] = {}
        for most in _SHARES:
            bits = self.allocate(vector, replace(budget, average_bits=most)) if most < budget.average_bits else None
            if bits is not None:
                self._caps.setdefault(bits, most)
                candidates[bits] = None
        self._problem.judge_ahead(list(candidates), "judging allocations")
        found = []
        for bits in candidates:
            if self._problem.clock.is_over():
                break
            found.append(self._problem.evaluate(bits, "kernel allocation"))
        return found

    def region(self, budget: Budget, incumbent: Evaluation) -> TrustRegion:
        """A search of the factors around a candidate, or of widths of nodes where that is what is best so far."""
        if incumbent.bits not in self._known:
            return self._layers.region(budget, incumbent)
        budget = replace(budget, average_bits=min(budget.average_bits, self._caps.get(incumbent.bits, math.inf)))
        return TrustRegion(self._problem, _KernelSpace(self, self._problem, budget, incumbent), incumbent)

    def allocate(self, vector: list[int], budget: Budget, activations: tuple[int, ...] | None = None) -> Bits | None:
        """Bits of all kernels for exponents of nodes, of the tilt and of dropping, None where none fit the budget."""
        *nodes, tilt, dropping = vector
        tilted = np.array(nodes) + tilt * np.linspace(-1.0, 1.0, len(nodes))
        taste = Taste(
            {name: _factor(exponent) for name, exponent in zip(self._problem.names, tilted.tolist(), strict=True)},
            math.inf if dropping >= _NO_DROP else _factor(dropping),
        )

        def weights(part: Budget, inputs: tuple[int, ...] | None) -> tuple[tuple[int, ...], ...] | None:
            return self._within(part, inputs, taste)

        start = activations or widest_activations(self._problem)
        bits = repaired(self._problem, self._sensitivity, weights, start, budget)
        if bits is not None:
            self._known.setdefault(bits, vector)
        return bits

    def _within(
        self, budget: Budget, activations: tuple[int, ...] | None, taste: Taste
    ) -> tuple[tuple[int, ...], ...] | None:
        """Weights of least loss within a budget at activation bits, None where none fit."""

        def fits(bits: KernelBits) -> bool:
            return within(self._problem, Bits(self._weights(bits), activations), budget)

        found: KernelBits | None = None
        if self._problem.chip.sharing == "exclusive" and self._steps_to(budget.crossbars) <= _MOST_STEPS:
            exclusive = ExclusiveAllocator(self._allocator, _rules(self._problem), self._geometry, self._counts)
            found = exclusive.within(int(budget.crossbars), taste)
        # Nodes that share a chip of several types, or of few crossbars, may not each get the type that serves it best.
        if found is None or not fits(found):
            found = self._priced(fits, taste, budget.crossbars)
        if found is None:
            return None
        # With what goes with dropped kernels, so that what is reported is what is emitted.
        return self._weights(dict(_rules(self._problem).apply(found).bits))

    def _priced(self, fits: Fits, taste: Taste, crossbars: float) -> KernelBits | None:
        """Bits of least loss found; where cells of types hold other bits, at the prices of where nodes came to lie."""
        found = last = self._allocator.within(fits, taste, self._cells(crossbars))
        if len({shape.encoding for shape in geometries(self._problem.chip)}) == 1:
            return found
        tried: list[dict[str, Encoding]] = []
        while found is not None and last is not None and len(tried) < _PRICE_TURNS:
            encodings = self._problem.encodings(self._weights(last))
            if encodings in tried:
                break
            tried.append(encodings)
            prices = {name: cells_by_width(encoding) for name, encoding in encodings.items()}
            last = self._allocator.priced(prices).within(fits, taste)
            if last is not None and self._allocator.loss(last, taste) < self._allocator.loss(found, taste):
                found = last
        return found

    def _cells(self, crossbars: float) -> float:
        """Cells of the largest crossbars that a budget could take; not known where cells of types hold other bits."""
        mixed = len({kind.cell_bits for kind in self._problem.chip.crossbars}) > 1
        return math.inf if mixed else cells_within(self._problem.chip, crossbars)

    @property
    def _geometry(self) -> ArrayGeometry:
        return geometries(self._problem.chip)[0]

    def _steps_to(self, crossbars: float) -> float:
        """Crossbars that the widest widths take beyond a budget; without one there is nothing to save them for."""
        if crossbars == math.inf:
            return math.inf
        widest = tuple(self._problem.settings.weight_limits(node)[1] for node in range(len(self._problem.nodes)))
        return self._problem.exclusive_crossbars(widest) - crossbars

    def _counts(self, bits: KernelBits) -> dict[str, int]:
        """Crossbars that each node takes alone."""
        found = {}
        for name, matrix in self._problem.matrices(self._weights(bits)).items():
            key = (name, matrix.bits.tobytes(), matrix.row_counts.tobytes())
            if key not in self._alone:
                self._alone[key] = count_crossbars(matrix, self._problem.chip, "exclusive")
            found[name] = self._alone[key]
        return found

    def vector(self, bits: Bits) -> list[int] | None:
        """The exponents that gave an allocation."""
        return self._known.get(bits)

    def prediction(self, bits: Bits) -> float:
        """What the widest widths lose, and what kernels and inputs of nodes lose beyond that, each alone."""
        widths = {name: np.array(own) for name, own in zip(self._problem.names, bits.weights, strict=True)}
        alone = self._allocator.loss(widths, Taste()) - self._least
        return self._sensitivity.base + max(0.0, alone) + activation_loss(self._sensitivity, bits)

    def _weights(self, bits: KernelBits) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(bits[name].tolist()) for name in self._problem.names)


@dataclass
class _KernelSpace:
    """Exponents of nodes, of the tilt and of dropping, then activation widths where these are searched."""

    stage: KernelStage
    problem: Problem
    budget: Budget
    incumbent: Evaluation
    _activations: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self._activations = searched_activations(self.problem)

    @property
    def limits(self) -> list[tuple[int, int]]:
        """Limits of the exponents and widths."""
        dropping = (-_REACH, _NO_DROP) if self.problem.settings.drops else (_NO_DROP, _NO_DROP)
        return [(-_REACH, _REACH)] * (len(self.problem.nodes) + 1) + [dropping] + self._activations

    def vector(self, bits: Bits) -> list[int] | None:
        """Exponents that gave an allocation, and its activation widths."""
        found = self.stage.vector(bits)
        return None if found is None else [*found, *(bits.activations or () if self._activations else ())]

    def candidate(self, vector: list[int]) -> Bits | None:
        """The allocation for these exponents."""
        exponents = len(self.problem.nodes) + 2
        activations = tuple(vector[exponents:]) or self.incumbent.bits.activations
        return self.stage.allocate(vector[:exponents], self.budget, activations)

    def prediction(self, bits: Bits) -> float:
        """Sum of the losses of kernels alone."""
        return self.stage.prediction(bits)


def _best_of(found: dict[_Start, Evaluation]) -> _Start:
    return min(found, key=lambda start: found[start].score.loss)


def _factor(exponent: float) -> float:
    return float(np.exp2(exponent / 2))


def _rules(problem: Problem) -> DropRules:
    if problem.quantizer.rules is None:
        raise ConfigError("bits per kernel need to know what reads each kernel: build the quantizer from the model")
    return problem.quantizer.rules
