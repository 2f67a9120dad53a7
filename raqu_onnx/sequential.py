"""Quantizing node after node, each on the inputs that the quantized part before it produces.

A node's error is then not added to those before it: it is fitted to give the float output from the inputs that it will
really see. With float inputs `Xf`, quantized inputs `Xq` (vectors as columns) and weight `W`, all centred:

1. `W' = W (Xf Xq^T + r I) (Xq Xq^T + r I)^-1`, the ridge regression of the float output on the inputs that arrive;
2. `Q` = GPTQ of `W'` on the centred moments of `Xq`;
3. the bias takes up `W mean(Xf) - Q mean(Xq)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.data import take
from raqu_onnx.patches import input_vectors
from raqu_onnx.segments import NodeRunner, Step
from raqu_onnx.statistics import FULL_LIMIT, CrossMoments, InputMoments
from raqu_onnx.weights import Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.annotations import NodeBits
    from raqu_onnx.data import Dataset
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.quantized import QuantizedNode
    from raqu_onnx.quantizer import ModelQuantizer

__all__ = ["SequentialQuantizer"]

# Share of the mean input power: enough to keep the regression from chasing directions that few samples carry.
_RIDGE = 0.05
# Vectors that a node is fitted on: enough for its second moments to be known, few enough to be quick.
_VECTORS_PER_ROW = 12
_FEWEST_VECTORS = 4096
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
        samples: Most samples to fit on; fewer where their activations would not fit into memory.
        threads: Threads for onnxruntime, None for all.
        memory_bytes: What activations may take.
    """

    def __init__(
        self,
        model: ir.Model,
        quantizer: ModelQuantizer,
        dataset: Dataset,
        *,
        samples: int = 256,
        threads: int | None = None,
        memory_bytes: int = _MEMORY_BYTES,
    ) -> None:
        self._quantizer = quantizer
        nodes = [source.node for source in quantizer.sources.values()]
        self._runner = NodeRunner(model, nodes, threads=threads)
        self._feeds = _feeds(take(dataset, 1))
        alive, total = self._bytes_per_unit()
        units = min(-(-samples // dataset.unit), max(_FEWEST_SAMPLES, memory_bytes // (2 * max(1, alive))))
        self._feeds = _feeds(take(dataset, units * dataset.unit))
        self._kept = list(self._float_inputs()) if total * units <= memory_bytes // 2 else None

    @property
    def _batches(self) -> int:
        return len(next(iter(self._feeds.values())))

    def _bytes_per_unit(self) -> tuple[int, int]:
        """Bytes of activations alive at once, and of the inputs of all mapped nodes, for what is fed now."""
        values: Values = dict(self._feeds)
        alive = total = 0
        for step in self._runner.steps:
            self._float_step(step, values)
            alive = max(alive, sum(array.nbytes for batches in values.values() for array in batches))
            total += sum(array.nbytes for array in values[step.node.input_name])
            _forget(values, step)
        return alive, total

    def _float_step(self, step: Step, values: Values) -> list[NDArray[Any]]:
        """Run one node in float; its input and output join the values."""
        source = self._quantizer.sources[step.node.name]
        x = self._runner.prepare(step, values, self._batches)
        values[step.node.input_name] = x
        bias = _bias_or_zeros(source.bias, step.node) if source.takes_bias else None
        values[step.node.output_name] = self._runner.run(step, x, source.weight, bias)
        return x

    def _float_inputs(self) -> Iterator[list[NDArray[Any]]]:
        """Input of every mapped node in the float model, in graph order."""
        values: Values = dict(self._feeds)
        for step in self._runner.steps:
            yield self._float_step(step, values)
            _forget(values, step)

    def quantize(self, bits: Mapping[str, NodeBits]) -> dict[str, QuantizedNode]:
        """Quantize every mapped node at the given widths."""
        values: Values = dict(self._feeds)
        done: dict[str, QuantizedNode] = {}
        reference = iter(self._kept) if self._kept is not None else self._float_inputs()
        for step, float_x in zip(self._runner.steps, reference, strict=True):
            name = step.node.name
            x = self._runner.prepare(step, values, self._batches)
            values[step.node.input_name] = x
            width = bits[name].activation
            if width is not None:
                quantizer = self._quantizer.activation(name, width)
                x = [quantizer.fake_quantize(batch) for batch in x]
            target = self._target(step.node, float_x, x)
            if target is None:
                quantized = self._quantizer.quantize(name, bits[name])
            else:
                quantized = self._quantizer.quantize_to(name, bits[name], target)
            done[name] = quantized
            bias = _bias_or_zeros(quantized.real_bias(), step.node) if step.node.op_type != "MatMul" else None
            values[step.node.output_name] = self._runner.run(step, x, quantized.weight(), bias)
            _forget(values, step)
        return done

    def _target(self, node: MappedNode, reference: list[NDArray[Any]], arriving: list[NDArray[Any]]) -> Target | None:
        """What a node is fitted to; None where it has too many rows, or inputs whose squares overflow (above 1e19)."""
        if node.layout.rows > FULL_LIMIT:
            return None
        source = self._quantizer.sources[node.name]
        groups, rows = node.layout.groups, node.layout.rows
        moments, cross = InputMoments(groups, rows), CrossMoments(groups, rows)
        wanted = max(_FEWEST_VECTORS, _VECTORS_PER_ROW * rows)
        samples = sum(len(batch) for batch in arriving)
        for xf, xq in zip(reference, arriving, strict=True):
            # In proportion: a last batch of one sample must not weigh as much as a whole one.
            limit = -(-wanted * len(xq) // samples)
            vf, vq = input_vectors(node, xf, limit=limit), input_vectors(node, xq, limit=limit)
            moments.update(vq)
            cross.update(vf, vq)
        weight = node.layout.to_matrices(source.weight.astype(np.float64))
        centred = source.takes_bias
        sums = cross.covariance(centred=centred), moments.covariance(centred=centred)
        if not all(np.isfinite(item).all() for item in sums):
            return None
        fitted = _regress(weight, *sums)
        return Target(fitted, np.einsum("gkm,gk->gm", weight, cross.reference_mean), moments)


def _regress(
    weight: NDArray[np.float64], cross: NDArray[np.float64], second: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Ridge regression of the float output on the quantized inputs, shape (G, K, M)."""
    ridge = _RIDGE * np.trace(second, axis1=1, axis2=2) / second.shape[1]
    ridge = np.where(ridge > 0, ridge, 1.0)[:, None, None] * np.eye(second.shape[1])
    # Rows of `cross` belong to the float inputs: (Xq Xq^T + r I) W' = (Xf Xq^T + r I)^T W, W as (K, M).
    return np.linalg.solve(second + ridge, (cross + ridge).transpose(0, 2, 1) @ weight)


def _bias_or_zeros(bias: NDArray[np.float32] | None, node: MappedNode) -> NDArray[np.float32]:
    if bias is not None:
        return bias
    return np.zeros(node.layout.groups * node.layout.kernels, np.float32)


def _feeds(dataset: Dataset) -> Values:
    batches = list(dataset.batches(_BATCH))
    return {name: [batch.feeds[name] for batch in batches] for name in (batches[0].feeds if batches else {})}


def _forget(values: Values, step: Step) -> None:
    for name in step.spent:
        values.pop(name, None)
