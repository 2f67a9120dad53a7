"""What each width costs each kernel: the expected error of its output at 2 to 8 bits, and when it is dropped.

From 2 to 8 bits the error is that of the weights fitted at this width, on the second moments of the inputs. A dropped
kernel is harder to price, since the nodes that follow make up for part of it.

Loss in a reader. Where only mapped nodes read a channel, and each channel apart, they are fitted anew without it. With
the rows `B` that the channel feeds in a reader of weight `w`, and `H` the second moments of the reader's inputs (around
their mean where a bias takes up the mean error), removing these rows and fitting all others by least squares costs

    L = sum over the reader's kernels of w_B^T S w_B,    S = ((H + r I)^-1)_BB^-1 - r I

This is the loss of the optimal brain surgeon for a group of weights (Hassibi, Stork, "Second order derivatives for
network pruning: optimal brain surgeon", NIPS 1992; for groups: Frantar, Alistarh, "Optimal brain compression", NeurIPS
2022) with a ridge `r` on the change of the rows that stay. Without other rows that
know of the channel it is `w_B^T H_BB w_B`: all that the channel contributed, but for its mean.

The same in the node's own output. An error of variance `s^2` there, independent from position to position, gives the
reader `s^2 * gain` with `gain = p / n * |w_B|^2`: `p` is the share of outputs at which changes pass the activation
between (for a normal distribution with the kernel's mean and variance), and `n` the number of positions averaged into
one by pooling. So dropping a kernel is worth an error of `sum of L / sum of gains` over all readers.

Approximations: one kernel is dropped at a time (two that stand in for each other both look cheap); the reader stays in
float; errors of rounded weights are taken as independent from position to position; outputs are taken as normal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.channel_flow import channel_flows
from raqu_onnx.encodings import MAX_BITS, MIN_BITS
from raqu_onnx.errors import ConfigError, DataError

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.channel_flow import ChannelFlow, Reader
    from raqu_onnx.quantizer import ModelQuantizer, NodeSource
    from raqu_onnx.statistics import InputMoments

__all__ = ["ErrorCurve", "ErrorCurves", "error_curves"]

# Of the mean input power.
_RIDGE = 0.05
# Outputs are not quite normal: a kernel that should never pass its activation does at times.
_LEAST_PASSING = 0.01


@dataclass(frozen=True)
class ErrorCurve:
    """Expected squared errors of one node's kernels.

    Attributes:
        name: The node.
        errors: Per MVM, in squared units of the node's output, shape (9, channels): row b for b bits, row 0 for dropped
            kernels, NaN for 1 bit and for widths that were not asked for. Kernels that share an entry of the scale axis
            (ConvTranspose with groups) add up.
        gains: Squared error that the nodes that follow see per squared error of a kernel's output, shape (channels,);
            ones where they cannot be told. `errors * gains` compares kernels by what follows.
        absorbed: Nodes that follow make up for dropped kernels; else all of a kernel's output is lost but its mean, and
            that too where nothing follows.
    """

    name: str
    errors: NDArray[np.float64]
    gains: NDArray[np.float64]
    absorbed: bool

    def at(self, bits: NDArray[np.integer]) -> NDArray[np.float64]:
        """Error of every entry of the scale axis at its own width, shape (channels,)."""
        return np.asarray(self.errors[bits, np.arange(self.errors.shape[1])])


class ErrorCurves(Mapping[str, ErrorCurve]):
    """Error curves by node, each computed when it is first asked for.

    Args:
        model: The tidied, mapped and calibrated model.
        quantizer: Its quantizer, which fits the weights and remembers every fit.
        widths: Widths to fit at.

    Raises:
        ConfigError: A width is not one of 2 to 8.
        DataError: A node was calibrated without second moments, or not at all.
    """

    def __init__(self, model: ir.Model, quantizer: ModelQuantizer, widths: Iterable[int]) -> None:
        self._widths = sorted(set(widths))
        for bits in self._widths:
            if not MIN_BITS <= bits <= MAX_BITS:
                raise ConfigError(f"error curves have widths of {MIN_BITS} to {MAX_BITS} bits, not {bits}")
        for source in quantizer.sources.values():
            _moments(source)
        self._quantizer = quantizer
        self._flows = channel_flows(model)
        self._curves: dict[str, ErrorCurve] = {}
        self._drops: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def __getitem__(self, name: str) -> ErrorCurve:
        if name not in self._curves:
            self._curves[name] = self._curve(name)
        return self._curves[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._quantizer.sources)

    def __len__(self) -> int:
        return len(self._quantizer.sources)

    def _curve(self, name: str) -> ErrorCurve:
        layout = self._quantizer.sources[name].node.layout
        dropped, gains = self._drop(name)
        index = layout.channel_index().reshape(-1)
        errors = np.full((MAX_BITS + 1, layout.channels), np.nan)
        errors[0] = np.bincount(index, dropped, layout.channels)
        for bits in self._widths:
            fitted = self._quantizer.fit(name, np.full(layout.channels, bits))
            errors[bits] = np.bincount(index, fitted.error.reshape(-1), layout.channels)
        shared = np.bincount(index, gains, layout.channels) / np.bincount(index, minlength=layout.channels)
        return ErrorCurve(name, errors, shared, self._flows[name].absorbable)

    def _drop(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Error when each kernel is dropped, and its gain, both of shape (G * M,)."""
        if name not in self._drops:
            source, flow = self._quantizer.sources[name], self._flows[name]
            mean, variance = _output_moments(source)
            if flow.absorbable:
                self._drops[name] = self._absorbed(source, flow, mean, variance)
            else:
                lost = variance + np.square(mean) if flow.reaches_output else variance
                self._drops[name] = lost, np.ones_like(lost)
        return self._drops[name]

    def _absorbed(
        self, source: NodeSource, flow: ChannelFlow, mean: NDArray[np.float64], variance: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        loss, gain = np.zeros_like(mean), np.zeros_like(mean)
        for reader in flow.readers:
            positions = (source.node.mvms or 1) if math.isnan(reader.positions) else reader.positions
            lost, power = self._losses(reader, len(mean))
            loss += lost
            gain += _passing(mean, variance, reader.passing) / positions * power
        # A kernel that nobody listens to costs nothing.
        return np.divide(loss, gain, out=np.zeros_like(loss), where=gain > 0), gain

    def _losses(self, reader: Reader, kernels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The loss in a reader when each kernel is dropped, and the power of the weights that read it."""
        source = self._quantizer.sources[reader.name]
        weight = source.node.layout.to_matrices(source.weight.astype(np.float64))
        loss, power = np.zeros(kernels), np.zeros(kernels)
        groups = _Groups(self._quantizer, source)
        for kernel in range(kernels):
            for group, rows in reader.rows(kernel):
                part = weight[group, rows]
                power[kernel] += np.square(part).sum()
                lost = groups.loss(group, rows, part)
                if len(rows) == weight.shape[1]:
                    # Nothing is left of these kernels but their bias: they are as good as dropped themselves.
                    following = self._drop(reader.name)[0].reshape(weight.shape[0], -1)[group].sum()
                    lost = min(lost, float(following))
                loss[kernel] += lost
        return loss, power


class _Groups:
    """Second moments of a reader's inputs, those of each group inverted once."""

    def __init__(self, quantizer: ModelQuantizer, source: NodeSource) -> None:
        self._second = _moments(source).covariance(centred=quantizer.absorbs_mean(source))
        self._inverses: dict[int, tuple[NDArray[np.float64], float]] = {}

    def loss(self, group: int, rows: NDArray[np.int64], weight: NDArray[np.float64]) -> float:
        """Least squared error when rows are removed, whose weights are of shape (rows, M)."""
        second = self._second[group]
        if second.ndim == 1:
            return float((second[rows, None] * np.square(weight)).sum())
        block = np.ix_(rows, rows)
        left = second[block]
        if len(rows) < len(second):
            inverse, ridge = self._inverse(group)
            left = np.linalg.inv(inverse[block]) - ridge * np.eye(len(rows))
        return max(0.0, float(((left @ weight) * weight).sum()))

    def _inverse(self, group: int) -> tuple[NDArray[np.float64], float]:
        if group not in self._inverses:
            from scipy.linalg import cho_factor, cho_solve

            second = self._second[group]
            power = float(np.trace(second)) / len(second)
            ridge = _RIDGE * power if power > 0 else 1.0
            identity = np.eye(len(second))
            factor = cho_factor(second + ridge * identity, lower=True, overwrite_a=True)
            self._inverses[group] = cho_solve(factor, identity, overwrite_b=True), ridge
        return self._inverses[group]


def error_curves(
    model: ir.Model, quantizer: ModelQuantizer, *, widths: Iterable[int] = range(MIN_BITS, MAX_BITS + 1)
) -> ErrorCurves:
    """Expected error of every kernel at every width, and dropped; computed node by node when asked for.

    Args:
        model: The tidied, mapped and calibrated model.
        quantizer: Its quantizer.
        widths: Widths to fit at, of 2 to 8 bits.

    Raises:
        ConfigError: A width is not one of 2 to 8.
        DataError: A node was calibrated without second moments, or not at all.
    """
    return ErrorCurves(model, quantizer, widths)


def _moments(source: NodeSource) -> InputMoments:
    if source.moments is None or not source.moments.count:
        raise DataError(f"{source.node.name}: no second moments of its input are known: calibrate with moments first")
    return source.moments


def _output_moments(source: NodeSource) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of every kernel's output per MVM, shape (G * M,)."""
    weight = source.node.layout.to_matrices(source.weight.astype(np.float64))
    moments = _moments(source)
    second = moments.covariance()
    pulled = second @ weight if second.ndim == 3 else second[:, :, None] * weight
    variance = np.maximum(np.einsum("gkm,gkm->gm", pulled, weight), 0.0).reshape(-1)
    mean = np.einsum("gkm,gk->gm", weight, moments.mean).reshape(-1)
    return mean if source.bias is None else mean + source.bias.astype(np.float64), variance


def _passing(
    mean: NDArray[np.float64], variance: NDArray[np.float64], interval: tuple[float, float]
) -> NDArray[np.float64]:
    """Share of normal values that lie in an interval, shape as `mean`."""
    spread = np.sqrt(2 * variance) + 1e-30
    low, high = (np.vectorize(math.erf, otypes=[np.float64])((limit - mean) / spread) for limit in interval)
    return np.asarray(np.maximum((high - low) / 2, _LEAST_PASSING))
