"""Quantizing node after node, each on the inputs that the quantized part before it produces.

A node's error is then not added to those before it: it is fitted to give the float output from the inputs that it will
really see, see `raqu_onnx.targets`. Where its output is only added to a value that is known by then, as at the end of a
residual block, it is fitted to the float sum: it makes up for what it can of the error on that other path as well.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.annotations import NodeBits
from raqu_onnx.data import take
from raqu_onnx.joint_moments import JointMoments
from raqu_onnx.patches import input_vectors, output_vectors
from raqu_onnx.rounding import DAMPING
from raqu_onnx.segments import NodeRunner, Step
from raqu_onnx.statistics import FULL_LIMIT
from raqu_onnx.targets import CLEAR_GAIN, DAMPINGS, Shrinkage, choose_shrinkage, default_shrinkage, make_target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.data import Dataset
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.quantized import QuantizedNode
    from raqu_onnx.quantizer import ModelQuantizer, NodeSource
    from raqu_onnx.weights import FittedWeights, Target

__all__ = ["SequentialQuantizer"]

# Vectors that a node is fitted on: enough for its second moments to be known, few enough to be quick.
_VECTORS_PER_ROW = 12
_FEWEST_VECTORS = 4096
# With fewer vectors per row than this, vectors are held out to see how far moments can be trusted: one sample in four.
_FEW_PER_ROW = 6
_HELD_OUT = 4
# Width at which damping is compared, and rows up to which it stays as it is: with crops of 16 photographs hardly a node
# of EfficientNet-Lite0 with 32 rows or fewer would gain by more.
_TRIAL = NodeBits(4, None)
_FEW_ROWS = 32
_BATCH = 32
_FEWEST_SAMPLES = 8
_MEMORY_BYTES = 2 << 30

Values = dict[str, list[Any]]


class SequentialQuantizer:
    """Quantizes a whole model in graph order.

    Args:
        model: The tidied float model.
        quantizer: Ranges of activations, and the weights and biases to start from.
        dataset: Calibration inputs.
        samples: Most samples to fit on, spread over the data; fewer where their activations would not fit into memory.
        threads: Threads for onnxruntime, None for all.
        memory_bytes: What activations may take.
        whole: The dataset is what another one chose: take all of it.

    Attributes:
        dataset: The inputs that are fitted on.
    """

    def __init__(
        self,
        model: ir.Model,
        quantizer: ModelQuantizer,
        dataset: Dataset,
        *,
        samples: int = 512,
        threads: int | None = None,
        memory_bytes: int = _MEMORY_BYTES,
        whole: bool = False,
    ) -> None:
        self._quantizer = quantizer
        nodes = [source.node for source in quantizer.sources.values()]
        self._runner = NodeRunner(model, nodes, threads=threads)
        self._feeds, _ = _feeds(take(dataset, 1))
        alive, total = self._bytes_per_unit()
        units = min(-(-samples // dataset.unit), max(_FEWEST_SAMPLES, memory_bytes // (2 * max(1, alive))))
        self.dataset = dataset if whole else take(dataset, units * dataset.unit)
        self._feeds, count = _feeds(self.dataset)
        self._shrinkage = default_shrinkage(max(1, count))
        self._damping: dict[str, float] = {}
        units = min(units, -(-count // dataset.unit))
        self._kept = list(self._float_targets()) if total * units <= memory_bytes // 2 else None

    @property
    def _batches(self) -> int:
        return len(next(iter(self._feeds.values())))

    def _bytes_per_unit(self) -> tuple[int, int]:
        """Bytes of activations alive at once, and of the outputs wanted of all mapped nodes, for what is fed now."""
        values: Values = dict(self._feeds)
        alive = total = 0
        for step in self._runner.steps:
            total += sum(array.nbytes for array in self._float_step(step, values))
            alive = max(alive, sum(array.nbytes for batches in values.values() for array in batches))
            _forget(values, step)
        return alive, total

    def _float_step(self, step: Step, values: Values) -> list[NDArray[Any]]:
        """Run one node in float; its input and output join the values. Returns what it is to give."""
        source = self._quantizer.sources[step.node.name]
        x = self._runner.prepare(step, values, self._batches)
        values[step.node.input_name] = x
        bias = _bias_or_zeros(source.bias, step.node) if source.takes_bias else None
        y = self._runner.run(step, x, source.weight, bias)
        values[step.node.output_name] = y
        return [a if b is None else a + b for a, b in zip(y, self._partner(step, values, y), strict=True)]

    def _partner(self, step: Step, values: Values, outputs: list[NDArray[Any]]) -> Sequence[NDArray[Any] | None]:
        """What is added to each batch of a node's output, None where nothing is that has its shape."""
        if step.partner is None or "residuals" in self._quantizer.without:
            return [None] * len(outputs)
        partner = self._runner.partner(step, values, self._batches)
        return [value if value.shape == y.shape else None for value, y in zip(partner, outputs, strict=True)]

    def _float_targets(self) -> Iterator[list[NDArray[Any]]]:
        """What every mapped node is to give, together with what is added to it, in graph order."""
        values: Values = dict(self._feeds)
        for step in self._runner.steps:
            wanted = self._float_step(step, values)
            if step.node.name not in self._damping:
                x, y = values[step.node.input_name], values[step.node.output_name]
                self._damping[step.node.name] = self._choose_damping(step.node, x, y)
            yield wanted
            _forget(values, step)

    def _choose_damping(self, node: MappedNode, inputs: list[NDArray[Any]], outputs: list[NDArray[Any]]) -> float:
        """How much a node's moments are damped; the same whatever widths are asked for, and whoever asks first."""
        # Where vectors are few the error at the widths asked for decides, see `_fit`.
        known = node.layout.rows <= _FEW_ROWS or _are_few(node, outputs)
        if "shrinkage" in self._quantizer.without or known:
            return DAMPING
        source = self._quantizer.sources[node.name]
        sums = self._sums(source, inputs, outputs, hold_out=True)
        used, held_out = sums or (None, None)
        if used is None or held_out is None:
            return DAMPING
        target = self._target(source, used, Shrinkage(math.inf))

        def fit(shrinkage: Shrinkage) -> FittedWeights:
            damped = replace(target, damping=shrinkage.damping)
            return self._quantizer.fit_to(node.name, _TRIAL, damped, without=("scales", "refit", "polish"))

        centred = self._quantizer.absorbs_mean(source)
        least, channels = Shrinkage(math.inf), node.layout.channel_index()
        return choose_shrinkage(
            fit, used, held_out, channels, least, centred=centred, ladder=DAMPINGS, gain=CLEAR_GAIN
        ).damping

    def quantize(
        self, bits: Mapping[str, NodeBits], stored: Mapping[str, NDArray[np.bool_]] | None = None
    ) -> dict[str, QuantizedNode]:
        """Quantize every mapped node at the given widths.

        Args:
            bits: Widths by node name.
            stored: Rows that are stored by node name, shape (G, K); a node that is absent stores all.
        """
        values: Values = dict(self._feeds)
        done: dict[str, QuantizedNode] = {}
        targets = iter(self._kept) if self._kept is not None else self._float_targets()
        for step, total in zip(self._runner.steps, targets, strict=True):
            name = step.node.name
            x = self._runner.prepare(step, values, self._batches)
            values[step.node.input_name] = x
            width = bits[name].activation
            if width is not None:
                quantizer = self._quantizer.activation(name, width)
                x = [quantizer.fake_quantize(batch) for batch in x]
            # What is added to the output is quantized too: what is wanted of the node is the rest.
            partner = self._partner(step, values, total)
            wanted = [a if b is None else a - b for a, b in zip(total, partner, strict=True)]
            quantized = self._fit(name, bits[name], x, wanted, (stored or {}).get(name))
            done[name] = quantized
            bias = _bias_or_zeros(quantized.real_bias(), step.node) if step.node.op_type != "MatMul" else None
            values[step.node.output_name] = self._runner.run(step, x, quantized.weight(), bias)
            _forget(values, step)
        return done

    def _fit(
        self,
        name: str,
        bits: NodeBits,
        arriving: list[NDArray[Any]],
        wanted: list[NDArray[Any]],
        stored: NDArray[np.bool_] | None,
    ) -> QuantizedNode:
        source = self._quantizer.sources[name]
        sums = self._sums(source, arriving, wanted)
        if sums is None:
            return self._quantizer.quantize(name, bits, stored)
        used, held_out = sums
        if held_out is None:
            usual = replace(self._shrinkage, damping=self._damping[name])
            return self._quantizer.quantize_to(name, bits, self._target(source, used, usual), stored)

        def fit(shrinkage: Shrinkage) -> FittedWeights:
            return self._quantizer.fit_to(name, bits, self._target(source, used, shrinkage), stored)

        channels = source.node.layout.channel_index()
        centred = self._quantizer.absorbs_mean(source)
        shrinkage = choose_shrinkage(fit, used, held_out, channels, self._shrinkage, centred=centred)
        return self._quantizer.quantize_to(name, bits, self._target(source, used.merged(held_out), shrinkage), stored)

    def _target(self, source: NodeSource, moments: JointMoments, shrinkage: Shrinkage) -> Target:
        weight = source.node.layout.to_matrices(source.weight.astype(np.float64))
        if "targets" in self._quantizer.without:
            shrinkage = replace(shrinkage, ridge=math.inf)
        return make_target(weight, moments, shrinkage, centred=self._quantizer.absorbs_mean(source))

    def _sums(
        self, source: NodeSource, arriving: list[NDArray[Any]], wanted: list[NDArray[Any]], *, hold_out: bool = False
    ) -> tuple[JointMoments, JointMoments | None] | None:
        """Sums over the vectors to fit on, and over those of the last samples, held out if asked or if all are few.

        None where the node has too many rows, no inputs, or values whose squares overflow.
        """
        node = source.node
        if node.layout.rows > FULL_LIMIT:
            return None
        enough = max(_FEWEST_VECTORS, _VECTORS_PER_ROW * node.layout.rows)
        # Weights are fitted to what is wanted of them alone.
        bias = _bias_or_zeros(source.bias, node).reshape(node.layout.groups, node.layout.kernels)
        samples = sum(len(batch) for batch in arriving)
        if not samples:
            # A selection that the data decides may leave nothing.
            return None
        # Data that comes in groups, such as crops of one photograph, mostly comes group by group: the end is the best
        # guess at what other data looks like.
        few = "shrinkage" not in self._quantizer.without and _are_few(node, wanted)
        first = samples - samples // _HELD_OUT if few or hold_out else samples
        used: JointMoments | None = None
        held_out: JointMoments | None = None
        seen = 0
        for x, t in zip(arriving, wanted, strict=True):
            # In proportion: a last batch of one sample must not weigh as much as a whole one.
            limit = -(-enough * len(x) // samples)
            vectors, outputs = input_vectors(node, x, limit=limit), output_vectors(node, t, limit=limit) - bias
            if used is None or held_out is None:
                used = JointMoments(vectors, outputs)
                held_out = used.empty()
            # Vectors lie in the order of their samples.
            cut = len(vectors) * min(len(x), max(0, first - seen)) // max(1, len(x))
            used.update(vectors[:cut], outputs[:cut])
            held_out.update(vectors[cut:], outputs[cut:])
            seen += len(x)
        if used is None or not used.finite or held_out is None or not held_out.finite:
            return None
        return used, held_out if used.count and held_out.count else None


def _are_few(node: MappedNode, outputs: list[NDArray[Any]]) -> bool:
    """Whether all vectors that drive a node, over all batches, are few for its rows."""
    vectors = sum(batch.size for batch in outputs) // (node.layout.groups * node.layout.kernels)
    return vectors < _FEW_PER_ROW * node.layout.rows


def _bias_or_zeros(bias: NDArray[np.float32] | None, node: MappedNode) -> NDArray[np.float32]:
    if bias is not None:
        return bias
    return np.zeros(node.layout.groups * node.layout.kernels, np.float32)


def _feeds(dataset: Dataset) -> tuple[Values, int]:
    """All inputs by name, batch by batch, and the number of samples."""
    batches = list(dataset.batches(_BATCH))
    names = batches[0].feeds if batches else {}
    return {name: [batch.feeds[name] for batch in batches] for name in names}, sum(batch.size for batch in batches)


def _forget(values: Values, step: Step) -> None:
    for name in step.spent:
        values.pop(name, None)
