"""How good a candidate is: quantized as it would be emitted, and run."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.annotations import NodeBits
from raqu_onnx.data_base import Batch
from raqu_onnx.evaluation import Reference, Score, make_session
from raqu_onnx.metrics import parse_metric
from raqu_onnx.search.questions import Verdict
from raqu_onnx.session_model import session_model
from raqu_onnx.simulation import Simulator
from raqu_onnx.spool import Spool, SpoolError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.data import Dataset
    from raqu_onnx.quantizer import ModelQuantizer
    from raqu_onnx.search.questions import Answer, Question
    from raqu_onnx.search.result import Bits, SearchSettings

__all__ = ["Judge"]

# A glance is at one out of so many samples, and at no fewer than that: less says little, and takes no time anyway.
_GLANCED = 4
_FEWEST_GLANCED = 256


class Judge:
    """Judges candidates of one model on one set of data; the same candidate gets the same floats every time.

    Args:
        model: The tidied, mapped and calibrated float model.
        quantizer: Its quantizer.
        selection: Data that candidates are judged on.
        settings: Threads, batch size, task and sensitivity samples.

    Attributes:
        reference: Score of the float model.
        glances_first: Whether the data is large enough for a glance at some of it to save anything.
    """

    def __init__(
        self, model: ir.Model, quantizer: ModelQuantizer, selection: Dataset, settings: SearchSettings
    ) -> None:
        self._quantizer = quantizer
        self._samples = settings.sensitivity_samples
        self._batches = _Batches(selection, settings.batch_size)
        metric = parse_metric(settings.metric)
        samples = max(_FEWEST_GLANCED, -(-self._batches.samples // _GLANCED))
        places = self._batches.spread(samples)
        # A user's function may not be made for some of the data.
        self._glanced = frozenset[int]() if metric.kind == "function" or len(places) == len(self._batches) else places
        self.glances_first = bool(self._glanced)
        session = make_session(session_model(model), threads=settings.threads)
        self._reference = Reference(session, selection, settings.batch_size, settings.task, metric)
        self.reference = self._reference.score
        nodes = [source.node for source in quantizer.sources.values()]
        self._simulator = Simulator(
            model, nodes, threads=settings.threads, float_activations=settings.activation_bits is None
        )

    def answer(self, question: Question, bits: Bits) -> Answer:
        """What a search asks."""
        return self.verdict(bits, question.most) if question.kind == "score" else self.quick_fidelity(bits)

    def score(self, bits: Bits) -> Score:
        """Score on the whole selection set, quantized as the emitted model would be."""
        quantized = self._quantizer.quantize_model(self._widths(bits))
        return self._reference.judge(self._simulator.stream(quantized, self._batches))

    def verdict(self, bits: Bits, most: float = math.inf) -> Verdict:
        """The same, after a glance at some of the set where it is large.

        Args:
            bits: The candidate.
            most: Loss at a glance above which the rest is not looked at.
        """
        outputs = self._simulator.runner(self._quantizer.quantize_model(self._widths(bits)))
        kept = Spool() if self._glanced else None

        def first() -> Iterator[tuple[Batch, list[NDArray[Any]]]]:
            nonlocal kept
            for batch in self._batches.at(self._glanced):
                found = outputs(batch)
                kept = None if kept is None else _with(kept, found)
                yield batch, found

        glance = None
        if self._glanced:
            glance = self._reference.judge(first(), places=self._glanced).loss
            if glance > most:
                return Verdict(glance, None)
        known: Iterator[list[NDArray[Any]]] = iter(() if kept is None else kept)

        def all_of_them() -> Iterator[tuple[Batch, list[NDArray[Any]]]]:
            for place, batch in enumerate(self._batches):
                found = next(known, None) if place in self._glanced else None
                yield batch, outputs(batch) if found is None else found

        score = self._reference.judge(all_of_them())
        return Verdict(score.loss if glance is None else glance, score)

    def quick_fidelity(self, bits: Bits) -> float:
        """KL divergence (or noise over signal) on the sensitivity samples, which is smooth in every width."""
        # Node by node, from memory: the sequential fit of every entry of a sensitivity table would take too long.
        quantized = {name: self._quantizer.quantize(name, width) for name, width in self._widths(bits).items()}
        places = self._batches.spread(self._samples)
        return self._fidelity(self._simulator.stream(quantized, self._batches.at(places)), places)

    def _fidelity(self, results: Iterable[tuple[Batch, list[NDArray[Any]]]], places: frozenset[int]) -> float:
        """KL divergence (or noise over signal) on some batches."""
        found = self._reference.judge(results, places=places, measured=False)
        return replace(found, measured=self.reference.measured).fidelity

    def _widths(self, bits: Bits) -> dict[str, NodeBits]:
        activations = bits.activations or (None,) * len(bits.weights)
        pairs = zip(bits.weights, activations, strict=True)
        return {name: NodeBits(*pair) for name, pair in zip(self._quantizer.sources, pairs, strict=True)}


class _Batches:
    """The batches of a dataset, which every candidate reads again: decoded once, with bounded memory."""

    def __init__(self, dataset: Dataset, batch_size: int) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._labels: list[NDArray[np.int64] | None] = []
        self._sizes: list[int] = []
        self._names: list[str] = []
        spool: Spool | None = Spool()
        for batch in dataset.batches(batch_size):
            self._names = list(batch.feeds)
            self._sizes.append(batch.size)
            self._labels.append(batch.labels)
            try:
                # Copies: a source may fill the same arrays again.
                if spool is not None:
                    spool.append([np.array(array) for array in batch.feeds.values()])
            except SpoolError:
                # No room for a copy: the source is read each time.
                spool = None
        self._spool = spool

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return sum(self._sizes)

    def at(self, places: frozenset[int]) -> Iterator[Batch]:
        """The batches at some positions."""
        reach = islice(self, max(places, default=-1) + 1)
        return (batch for place, batch in enumerate(reach) if place in places)

    def spread(self, samples: int) -> frozenset[int]:
        """Positions of batches with so many samples, or a few more, from all over the data: it may lie by classes."""
        total = len(self._sizes)
        places: frozenset[int] = frozenset()
        wanted = -(-samples // max(self._sizes, default=1))
        while len(places) < total and sum(self._sizes[place] for place in places) < samples:
            wanted = min(wanted, total)
            places = frozenset((2 * place + 1) * total // (2 * wanted) for place in range(wanted))
            # Batches may be smaller than the largest one.
            wanted += 1 + wanted // 4
        return places

    def __iter__(self) -> Iterator[Batch]:
        if self._spool is None:
            yield from self._dataset.batches(self._batch_size)
            return
        for labels, arrays in zip(self._labels, self._spool, strict=True):
            yield Batch(dict(zip(self._names, arrays, strict=True)), labels)


def _with(spool: Spool, outputs: list[NDArray[Any]]) -> Spool | None:
    """The spool with outputs added; None where it has no room for them, or they are no plain numbers."""
    arrays = [np.asarray(value) for value in outputs]
    if any(array.dtype.hasobject for array in arrays):
        return None
    try:
        spool.append(arrays)
    except SpoolError:
        return None
    return spool
