"""How good a candidate is: quantized as it would be emitted, and run."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.annotations import NodeBits
from raqu_onnx.data_base import Batch
from raqu_onnx.evaluation import Reference, Score, make_session
from raqu_onnx.metrics import parse_metric
from raqu_onnx.session_model import session_model
from raqu_onnx.simulation import Simulator
from raqu_onnx.spool import Spool, SpoolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.data import Dataset
    from raqu_onnx.quantizer import ModelQuantizer
    from raqu_onnx.search.journal import Answer, Kind
    from raqu_onnx.search.result import Bits, SearchSettings

__all__ = ["Judge"]


class Judge:
    """Judges candidates of one model on one set of data; the same candidate gets the same floats every time.

    Args:
        model: The tidied, mapped and calibrated float model.
        quantizer: Its quantizer.
        selection: Data that candidates are judged on.
        settings: Threads, batch size, task and sensitivity samples.

    Attributes:
        reference: Score of the float model.
    """

    def __init__(
        self, model: ir.Model, quantizer: ModelQuantizer, selection: Dataset, settings: SearchSettings
    ) -> None:
        self._quantizer = quantizer
        self._samples = settings.sensitivity_samples
        self._batches = _Batches(selection, settings.batch_size)
        session = make_session(session_model(model), threads=settings.threads)
        self._reference = Reference(
            session, selection, settings.batch_size, settings.task, parse_metric(settings.metric)
        )
        self.reference = self._reference.score
        nodes = [source.node for source in quantizer.sources.values()]
        self._simulator = Simulator(
            model, nodes, threads=settings.threads, float_activations=settings.activation_bits is None
        )

    def answer(self, kind: Kind, bits: Bits) -> Answer:
        """What a search asks, by its kind."""
        return self.score(bits) if kind == "score" else self.quick_fidelity(bits)

    def score(self, bits: Bits) -> Score:
        """Score on the whole selection set, quantized as the emitted model would be."""
        quantized = self._quantizer.quantize_model(self._widths(bits))
        return self._reference.judge(self._simulator.stream(quantized, self._batches))

    def quick_fidelity(self, bits: Bits) -> float:
        """KL divergence (or noise over signal) on the sensitivity samples, which is smooth in every width."""
        # Node by node, from memory: the sequential fit of every entry of a sensitivity table would take too long.
        quantized = {name: self._quantizer.quantize(name, width) for name, width in self._widths(bits).items()}
        places = self._batches.spread(self._samples)
        reach = islice(self._batches, max(places, default=-1) + 1)
        batches = (batch for place, batch in enumerate(reach) if place in places)
        found = self._reference.judge(self._simulator.stream(quantized, batches), places=places)
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
