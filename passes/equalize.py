"""Channels of an activation brought closer together, with the model computing what it did."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from raqu_onnx.annotations import HISTOGRAM, MAPPED, mapped_nodes
from raqu_onnx.data import take
from raqu_onnx.equalization import channel_scales, scalable_channels
from raqu_onnx.errors import ConfigError
from raqu_onnx.evaluation import make_session, run_feeds
from raqu_onnx.session_model import with_outputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from raqu_onnx.data import Batch, Dataset
    from raqu_onnx.equalization import ScalableChannels
    from raqu_onnx.layout import MappedNode

__all__ = ["EqualizePass"]

_logger = logging.getLogger(__name__)

# Samples read at once; they are run one by one, since the inputs of all nodes are fetched.
_READ_SAMPLES = 16


@dataclass(frozen=True)
class EqualizePass(ir.passes.InPlacePass):
    """Scale channels so that those of an activation use its codes more equally (cross-layer equalization).

    Before: ``r = Relu (Conv (x, w, b))``, ``y = Conv (r, v, c)``

    After: the same nodes and the same y, with ``w / s`` and ``b / s`` for w and b, kernel by kernel, and ``v * s`` for
    v, input channel by input channel. Where branches are added, all that feed the sum share s. Values that anything
    but a mapped node or a positively homogeneous operator reads stay as they are, and so do weights that several nodes
    share; see `raqu_onnx.equalization` for the rules and the source.

    It runs behind annotate-tiling, which says what is mapped, and before calibrate, which measures the new ranges.

    Attributes:
        dataset: Calibration data.
        samples: Most samples that ranges of channels are measured on.
        strength: 0 changes nothing, 1 makes all channels of an activation reach equally far.
        threads: Threads for onnxruntime, None for all.
    """

    name: ClassVar[str] = "equalize"

    dataset: Dataset
    samples: int = 64
    strength: float = 0.5
    threads: int | None = None

    def requires(self, model: ir.Model) -> None:
        """Nodes are mapped, and nothing is measured yet.

        Raises:
            PreconditionError: The model is calibrated already.
        """
        if any(HISTOGRAM.get(node) is not None for node in mapped_nodes(model)):
            raise ir.passes.PreconditionError("it changes the ranges that calibrate measures: run equalize before it")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Scale weights and biases.

        Raises:
            ConfigError: An option is out of range.
            DataError: There is no data, or the model cannot be run on it.
        """
        self._check()
        found = scalable_channels(model)
        if not found.observed or not found.free.any():
            return ir.passes.PassResult(model, modified=False)
        classes = channel_scales(self._ranges(model, found), found.together, found.free, strength=self.strength)
        # One more for the rows that no channel feeds, whose number is -1.
        scales = np.append(classes[found.shared], 1.0).astype(np.float32)
        changed = [_scale(node, MAPPED.require(node), found, scales) for node in mapped_nodes(model)]
        _logger.info("equalized %d channels, weights of %d nodes", np.count_nonzero(scales != 1), sum(changed))
        return ir.passes.PassResult(model, modified=any(changed))

    def _check(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"equalize: samples is {self.samples}, must be at least 1")
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"equalize: strength is {self.strength}, must be from 0 to 1")

    def _ranges(self, model: ir.Model, found: ScalableChannels) -> NDArray[np.float64]:
        """Largest magnitude of each class of channels in all inputs of mapped nodes that it reaches."""
        ranges = np.zeros(found.free.size)
        names = list(found.observed)
        session = make_session(with_outputs(model, names), threads=self.threads)
        for batch in self._units():
            for name, array in zip(names, run_feeds(session, names, batch.feeds, self.dataset.name), strict=True):
                owner = found.observed[name]
                known = owner >= 0
                np.maximum.at(ranges, found.shared[owner[known]], _largest(array, owner.shape)[known])
        return ranges

    def _units(self) -> Iterator[Batch]:
        """The first samples, as few at a time as the model takes."""
        unit = self.dataset.unit
        for batch in take(self.dataset, self.samples).batches(_READ_SAMPLES):
            for start in range(0, batch.size, unit):
                yield batch.select(slice(start, start + unit))


def _largest(array: NDArray[np.floating], shape: tuple[int, ...]) -> NDArray[np.floating]:
    """Largest magnitudes over the samples and over the axes that have length 1 in `shape`."""
    axes = (0, *(axis for axis, size in enumerate(shape, 1) if size == 1))
    largest: NDArray[np.floating] = np.abs(array).max(axis=axes, initial=0.0).reshape(shape)
    return largest


def _scale(node: ir.Node, mapped: MappedNode, found: ScalableChannels, scales: NDArray[np.float32]) -> bool:
    """Multiply what a node reads by its scales, and divide what it produces; tells whether anything changed."""
    read, produced = found.read.get(mapped.name), found.produced.get(mapped.name)
    rows = np.ones(1, np.float32) if read is None else scales[read]
    kernels = np.ones(1, np.float32) if produced is None else scales[produced]
    if (rows == 1).all() and (kernels == 1).all():
        return False
    weight = node.inputs[0 if mapped.constant_left else 1]
    matrices = mapped.layout.to_matrices(_array(weight))
    _set(weight, mapped.layout.from_matrices(matrices * rows[..., None] / kernels[..., None, :]))
    bias = node.inputs[2] if mapped.bias_name is not None else None
    if bias is not None and produced is not None and (kernels != 1).any():
        _set(bias, _array(bias) / kernels.reshape(-1))
    return True


def _array(value: ir.Value | None) -> NDArray[np.float32]:
    if value is None or value.const_value is None:
        raise ValueError("a mapped node has a constant weight")
    return np.asarray(value.const_value.numpy(), np.float32)


def _set(value: ir.Value | None, array: NDArray[np.float32]) -> None:
    if value is not None:
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
