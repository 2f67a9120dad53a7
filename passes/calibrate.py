"""What the inputs of mapped nodes look like on real data."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from raqu_onnx.annotations import CALIBRATION, HISTOGRAM, MAPPED, MOMENTS, mapped_nodes
from raqu_onnx.errors import DataError
from raqu_onnx.evaluation import make_session, run_feeds
from raqu_onnx.patches import input_vectors
from raqu_onnx.session_model import with_outputs
from raqu_onnx.statistics import FULL_LIMIT, Histogram, InputMoments

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from raqu_onnx.data import Batch, Dataset
    from raqu_onnx.layout import MappedNode

__all__ = ["CalibratePass"]

logger = logging.getLogger(__name__)

# Bytes of activations that are fetched at once, and of inputs that are read at once.
_FETCHED_BYTES = 8 << 20
_READ_BYTES = 8 << 20
# Values of each sample's tensor that a histogram counts; 4,096 bins need no more, and extremes are those of all values.
_COUNTED_VALUES = 1 << 16
# Vectors that moments are summed over: squares are soon known, pairs of rows want several vectors for each row.
_FEWEST_VECTORS = 4096
_VECTORS_PER_ROW = 16
# Samples to expect of a stream that does not know its length.
_STREAM_SAMPLES = 64
# Values of im2col that one run of one node may take.
_VALUES_PER_RUN = 8_000_000


@dataclass(frozen=True)
class CalibratePass(ir.passes.InPlacePass):
    """Run the float model once over the calibration data and keep what quantization needs.

    Before and after: the same graph. Every mapped node gains a `Histogram` of its input, and `InputMoments` of the
    vectors that drive its wordlines; a node whose MVMs are not known for certain learns them from the shapes seen.

    Time grows with the data, memory does not: only inputs of mapped nodes are fetched, of as few samples at once as
    their size asks for, and of large tensors every n-th value is counted (extremes always are).

    Attributes:
        dataset: Calibration data.
        batch_size: Most samples per run.
        threads: Threads for onnxruntime, None for all.
        moments: Also gather second moments, which fitting weights to the data needs.
        pairs: Second moments are those of all pairs of rows, which GPTQ needs; else squares only.
    """

    name: ClassVar[str] = "calibrate"

    dataset: Dataset
    batch_size: int = 32
    threads: int | None = None
    moments: bool = True
    pairs: bool = True

    def requires(self, model: ir.Model) -> None:
        """Nodes are mapped."""
        mapped_nodes(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Gather statistics in one pass over the data.

        Raises:
            DataError: There is no data, the model cannot be run on it, or a tensor becomes infinite on it.
        """
        nodes = {node: MAPPED.require(node) for node in mapped_nodes(model)}
        statistics = _Statistics(self, list(nodes.values()))
        session = make_session(with_outputs(model, statistics.fetched), threads=self.threads)
        inputs = {item.name for item in session.get_inputs()}
        # onnxruntime takes an empty list for all outputs.
        internal = [name for name in statistics.fetched if name not in inputs] or [session.get_outputs()[0].name]

        def run(batch: Batch) -> dict[str, NDArray[Any]]:
            values = run_feeds(session, internal, batch.feeds, self.dataset.name)
            return {**batch.feeds, **dict(zip(internal, values, strict=True))}

        seen = _run_in_pieces(self.dataset, self.batch_size, lambda batch: statistics.update(run(batch), batch.size))
        if not seen:
            raise DataError(f"{self.dataset.name}: it holds no samples to calibrate on")
        logger.info("calibrated on %d samples", seen)
        CALIBRATION.set(model, self.dataset)
        for node, mapped in nodes.items():
            HISTOGRAM.set(node, statistics.histograms[mapped.input_name])
            if self.moments:
                MOMENTS.set(node, statistics.moments[mapped.name])
            MAPPED.set(node, replace(mapped, mvms=statistics.mvms.get(mapped.name, mapped.mvms)))
        return ir.passes.PassResult(model, modified=True)


class _Statistics:
    """What is gathered, and how a run adds to it."""

    def __init__(self, settings: CalibratePass, nodes: list[MappedNode]) -> None:
        self._nodes = nodes
        self._where = settings.dataset.name
        self._samples = settings.dataset.size or _STREAM_SAMPLES
        self.histograms = {node.input_name: Histogram() for node in nodes}
        limits = {"full_limit": FULL_LIMIT if settings.pairs else 0}
        self.moments = {
            node.name: InputMoments(node.layout.groups, node.layout.rows, **limits)
            for node in nodes
            if settings.moments
        }
        self.mvms: dict[str, int] = {}
        # The first axis of a matrix need not be the samples': a Reshape before it may have put tokens there as well.
        self._unsized = [node for node in nodes if node.mvms is None or node.window is None]
        #: Tensors to fetch: inputs of nodes, and outputs whose shape tells what is not known yet.
        self.fetched = list(dict.fromkeys((*self.histograms, *(node.output_name for node in self._unsized))))

    def update(self, arrays: dict[str, NDArray[Any]], samples: int) -> int:
        """Add the tensors of one run, by name; returns the bytes that they took."""
        for name, histogram in self.histograms.items():
            try:
                histogram.update(arrays[name], most=_COUNTED_VALUES)
            except ValueError as error:
                raise DataError(
                    f"{self._where}: tensor {name!r} becomes infinite or not a number on this data; "
                    "check how the inputs are scaled"
                ) from error
        for node in self._nodes if self.moments else ():
            limit = samples * self._vectors(node)
            limit = max(1, min(limit, _VALUES_PER_RUN // (node.layout.rows * node.layout.groups)))
            self.moments[node.name].update(input_vectors(node, arrays[node.input_name], limit=limit))
        for node in self._unsized:
            self.mvms[node.name] = _vectors_per_sample(node, arrays[node.output_name], samples)
        return sum(array.nbytes for array in arrays.values())

    def _vectors(self, node: MappedNode) -> int:
        """Vectors that moments take from each sample."""
        per_row = _VECTORS_PER_ROW if self.moments[node.name].full else 0
        return -(-max(_FEWEST_VECTORS, per_row * node.layout.rows) // self._samples)


def _run_in_pieces(dataset: Dataset, batch_size: int, run: Callable[[Batch], int]) -> int:
    """Run all data in pieces whose tensors stay within memory.

    Args:
        dataset: The data.
        batch_size: Most samples per piece.
        run: Runs a piece, keeps nothing of its tensors and returns the bytes that they took.

    Returns:
        Samples seen.
    """
    values = [spec.dtype.itemsize * math.prod(d or 1 for d in spec.fixed_shape[1:]) for spec in dataset.inputs]
    seen = heaviest = 0
    for batch in dataset.batches(max(1, min(batch_size, _READ_BYTES // max(1, sum(values))))):
        start = 0
        while start < batch.size:
            # The first piece is as small as can be: it is weighed. Samples of a unit stay together.
            room = _FETCHED_BYTES // heaviest if heaviest else 1
            size = max(1, room // dataset.unit) * dataset.unit
            piece = batch.select(slice(start, start + size))
            heaviest = max(heaviest, -(-run(piece) // piece.size))
            start += piece.size
        seen += batch.size
    return seen


def _vectors_per_sample(node: MappedNode, output: NDArray[Any], samples: int) -> int:
    if node.window is not None:
        return math.prod(output.shape[2:])
    kernels = output.shape[-2] if node.constant_left else output.shape[-1]
    return max(1, int(output.size) // int(kernels) // max(1, samples))
