"""What the inputs of mapped nodes look like on real data."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from raqu_onnx.annotations import CALIBRATION, HISTOGRAM, MAPPED, MOMENTS, mapped_nodes
from raqu_onnx.errors import DataError
from raqu_onnx.evaluation import make_session, run_batches
from raqu_onnx.model_io import to_proto
from raqu_onnx.patches import input_vectors
from raqu_onnx.statistics import Histogram, InputMoments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.data import Dataset
    from raqu_onnx.layout import MappedNode

__all__ = ["CalibratePass"]

logger = logging.getLogger(__name__)

# Values of im2col that one batch of one node may take, which bounds memory and time.
_VALUES_PER_BATCH = 8_000_000


@dataclass(frozen=True)
class CalibratePass(ir.passes.InPlacePass):
    """Run the float model once over the calibration data and keep what quantization needs.

    Before and after: the same graph. Every mapped node gains a `Histogram` of its input, and `InputMoments` of the
    vectors that drive its wordlines; a node whose MVMs are not known for certain learns them from the shapes seen.

    Attributes:
        dataset: Calibration data.
        batch_size: Samples per run.
        threads: Threads for onnxruntime, None for all.
        moments: Also gather second moments, which fitting weights to the data needs.
    """

    name: ClassVar[str] = "calibrate"

    dataset: Dataset
    batch_size: int = 32
    threads: int | None = None
    moments: bool = True

    def requires(self, model: ir.Model) -> None:
        """Nodes are mapped."""
        mapped_nodes(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Gather statistics in one pass over the data."""
        nodes = {node: MAPPED.require(node) for node in mapped_nodes(model)}
        histograms = {node.input_name: Histogram() for node in nodes.values()}
        moments = {
            node.name: InputMoments(node.layout.groups, node.layout.rows) for node in nodes.values() if self.moments
        }
        counts = self._observe(model, list(nodes.values()), histograms, moments)
        CALIBRATION.set(model, self.dataset)
        for node, mapped in nodes.items():
            HISTOGRAM.set(node, histograms[mapped.input_name])
            if self.moments:
                MOMENTS.set(node, moments[mapped.name])
            MAPPED.set(node, replace(mapped, mvms=counts.get(mapped.name, mapped.mvms)))
        return ir.passes.PassResult(model, modified=True)

    def _observe(
        self,
        model: ir.Model,
        nodes: list[MappedNode],
        histograms: dict[str, Histogram],
        moments: dict[str, InputMoments],
    ) -> dict[str, int]:
        watched = list(histograms)
        # The first axis of a matrix need not be the samples': a Reshape before it may have put tokens there as well.
        unsized = [node for node in nodes if node.mvms is None or node.window is None]
        fetched = [*watched, *dict.fromkeys(node.output_name for node in unsized if node.output_name not in watched)]
        session = make_session(_with_outputs(model, fetched), threads=self.threads)
        counts: dict[str, int] = {}
        seen = 0
        feeds_by_name: dict[str, NDArray[Any]]
        inputs = {item.name for item in session.get_inputs()}
        # onnxruntime takes an empty list for all outputs.
        internal = [name for name in fetched if name not in inputs] or [session.get_outputs()[0].name]
        for batch, values in run_batches(session, self.dataset, self.batch_size, internal):
            feeds_by_name = {**batch.feeds, **dict(zip(internal, values, strict=True))}
            for name in watched:
                self._check_finite(name, feeds_by_name[name])
                histograms[name].update(feeds_by_name[name])
            for node in nodes if self.moments else ():
                limit = max(1, _VALUES_PER_BATCH // (node.layout.rows * node.layout.groups))
                moments[node.name].update(input_vectors(node, feeds_by_name[node.input_name], limit=limit))
            for node in unsized:
                counts[node.name] = _vectors_per_sample(node, feeds_by_name[node.output_name], batch.size)
            seen += batch.size
        if not seen:
            raise DataError(f"{self.dataset.name}: it holds no samples to calibrate on")
        logger.info("calibrated on %d samples", seen)
        return counts

    def _check_finite(self, name: str, values: NDArray[Any]) -> None:
        if not np.isfinite(values).all():
            raise DataError(
                f"{self.dataset.name}: tensor {name!r} becomes infinite or not a number on this data; "
                "check how the inputs are scaled"
            )


def _vectors_per_sample(node: MappedNode, output: NDArray[Any], samples: int) -> int:
    if node.window is not None:
        return math.prod(output.shape[2:])
    kernels = output.shape[-2] if node.constant_left else output.shape[-1]
    return max(1, int(output.size) // int(kernels) // max(1, samples))


def _with_outputs(model: ir.Model, names: list[str]) -> bytes:
    """The serialized model with more values as outputs."""
    import onnx

    proto = to_proto(model)
    present = {value.name for value in (*proto.graph.output, *proto.graph.input)}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return proto.SerializeToString()
