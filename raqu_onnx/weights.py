"""Fitting integer weights to what a node computes.

Methods, from plain to strong:

* ``nearest``: symmetric scale over the full range of each kernel, rounding to nearest.
* ``mse``: the scale of each kernel clips where that lowers the error, weighted by the power of each input.
* ``gptq``: rounds row after row and lets the rows that follow make up for the error, on the second moments of the
  inputs (Frantar et al., "GPTQ", ICLR 2023, algorithm 1), with rows in order of falling input power. Scales are those
  of ``mse``, at 4 bits and less the multiples of them that leave the least error; then single codes are moved as long
  as that lowers the error.
* ``sequential``: GPTQ node after node in graph order, each fitted to give the float output from the inputs that the
  quantized nodes before it produce; see `raqu_onnx.sequential`.

With a bias and data, all work on centred moments: the mean error of each kernel is taken up by the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from raqu_onnx.encodings import code_range
from raqu_onnx.rounding import Rounder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.encodings import SignedEncoding
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.statistics import InputMoments

__all__ = ["FittedWeights", "Target", "WeightFitter", "WeightMethod"]

WeightMethod = Literal["nearest", "mse", "gptq", "sequential"]

_CLIP_STEPS = np.linspace(1.0, 0.2, 41)
_SCALE_SHARES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)
# Largest code up to which scales are refined: that of 4 bits. With more codes nothing is left to gain.
_FINE_CODES = 7
_TINY = 1e-12


@dataclass(frozen=True)
class FittedWeights:
    """Codes and scales of one node.

    Attributes:
        codes: Shape (G, K, M).
        scales: Scale per entry of the scale axis, float32, shape (channels,).
        bias_shift: What the bias must take up so that the mean output stays, shape (G, M).
        error: Expected squared error of each kernel's output per vector, shape (G, M); NaN without moments.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    bias_shift: NDArray[np.float64]
    error: NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """What a node's weights are fitted to, where that is not the float weight itself.

    Attributes:
        weight: Weight that gives the float output best from the inputs that arrive, shape (G, K, M).
        output_mean: Mean output of the float node without its bias, shape (G, M).
        moments: Second moments of the inputs that arrive.
    """

    weight: NDArray[np.float64]
    output_mean: NDArray[np.float64]
    moments: InputMoments


class WeightFitter:
    """Fits one node's weights to any width; what does not depend on the width is computed once.

    Args:
        node: The mapped node.
        weight: Its float weight in the shape of the ONNX tensor.
        moments: Second moments of its inputs, None to fit without data.
        scheme: The signed encoding, which sets the range of codes.
        method: How codes are chosen.
        absorb_mean: The node has a bias that takes up the mean error.
        scale_floor: Smallest scale allowed per entry of the scale axis, shape (channels,), so that the INT32 bias
            does not overflow.
        target: Replaces weight and moments by those of the inputs that really arrive.
    """

    def __init__(
        self,
        node: MappedNode,
        weight: NDArray[np.floating],
        moments: InputMoments | None,
        scheme: SignedEncoding,
        *,
        method: WeightMethod = "gptq",
        absorb_mean: bool = True,
        scale_floor: NDArray[np.float64] | None = None,
        target: Target | None = None,
    ) -> None:
        self._node = node
        self._scheme = scheme
        moments = moments if target is None else target.moments
        self._weight = node.layout.to_matrices(np.asarray(weight, np.float64)) if target is None else target.weight
        self._channels = node.layout.channel_index()
        self._floor = np.full(node.layout.channels, _TINY) if scale_floor is None else np.maximum(scale_floor, _TINY)
        self._mean = moments.mean if moments is not None and absorb_mean else None
        self._output_mean = self._mean_output(target)
        self._second = None if moments is None else _finite(moments.covariance(centred=absorb_mean))
        self._method = method if self._second is not None or method == "nearest" else "mse"
        self._rounder: Rounder | None = None

    def fit(self, bits: NDArray[np.integer] | int) -> FittedWeights:
        """Fit all kernels.

        Args:
            bits: Width per entry of the scale axis, shape (channels,), or one for all; 0 drops a kernel.
        """
        widths = np.broadcast_to(np.asarray(bits, np.int64), self._floor.shape)
        low, high = self._limits(widths)
        scales, codes = self._codes(low, high)
        per_kernel = scales.astype(np.float64)[self._channels]
        rounded = codes * per_kernel[:, None, :]
        shift = np.zeros(per_kernel.shape)
        if self._mean is not None and self._output_mean is not None:
            shift = self._output_mean - np.einsum("gkm,gk->gm", rounded, self._mean)
        return FittedWeights(codes.astype(np.int8), scales, shift, self._error(self._weight - rounded))

    def _mean_output(self, target: Target | None) -> NDArray[np.float64] | None:
        if self._mean is None:
            return None
        return np.einsum("gkm,gk->gm", self._weight, self._mean) if target is None else target.output_mean

    def _limits(self, widths: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        table = np.array([code_range(self._scheme, int(b)) for b in range(9)], np.float64)
        return table[widths, 0], table[widths, 1]

    def _power(self) -> NDArray[np.float64]:
        """Mean square of each input row, shape (G, K); ones without data."""
        if self._second is None:
            return np.ones(self._weight.shape[:2])
        diagonal = np.diagonal(self._second, axis1=1, axis2=2) if self._second.ndim == 3 else self._second
        return np.asarray(np.maximum(diagonal, 1e-6 * diagonal.mean(1, keepdims=True) + 1e-30))

    def _scales(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float32]:
        """Scale per entry of the scale axis; kernels that share an entry are fitted together."""
        # (channels, rows of all kernels that share the entry)
        order = np.argsort(self._channels.reshape(-1), kind="stable")
        rows = self._weight.transpose(0, 2, 1).reshape(-1, self._weight.shape[1])[order]
        rows = rows.reshape(len(low), -1)
        power = np.repeat(self._power(), self._weight.shape[2], axis=0)[order].reshape(len(low), -1)
        full = np.maximum(rows.max(1) / np.maximum(high, 1), rows.min(1) / np.minimum(low, -1))
        full = np.maximum(full, 0)
        positive = full > 0
        ordinary = float(np.median(full[positive])) if positive.any() else 2.0**-10
        scale = np.where(positive & (high > 0), full, ordinary)
        if self._method != "nearest":
            scale = self._clipped(rows, power, scale, low, high)
        return np.maximum(scale, self._floor).astype(np.float32)

    def _clipped(
        self,
        rows: NDArray[np.float64],
        power: NDArray[np.float64],
        full: NDArray[np.float64],
        low: NDArray[np.float64],
        high: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        best, best_error = full.copy(), np.full(full.shape, np.inf)
        for share in _CLIP_STEPS:
            scale = np.maximum(full * share, self._floor)[:, None]
            error = (power * np.square(np.clip(np.rint(rows / scale), low[:, None], high[:, None]) * scale - rows)).sum(
                1
            )
            better = error < best_error
            best[better], best_error[better] = scale[better, 0], error[better]
        return best

    def _codes(
        self, low: NDArray[np.float64], high: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Scale per entry of the scale axis, and codes of shape (G, K, M)."""
        scales = self._scales(low, high)
        limits = low[self._channels], high[self._channels]
        if self._method != "gptq" or self._second is None or self._second.ndim == 2:
            per_kernel = scales.astype(np.float64)[self._channels][:, None, :]
            return scales, np.clip(np.rint(self._weight / per_kernel), limits[0][:, None, :], limits[1][:, None, :])
        if self._rounder is None:
            self._rounder = Rounder(self._weight, self._second)
        if high.max() <= _FINE_CODES:
            scales = self._refined(scales, limits)
        per_kernel = scales.astype(np.float64)[self._channels]
        return scales, self._rounder.polish(self._rounder.round(per_kernel, *limits), per_kernel, *limits)

    def _refined(
        self, scales: NDArray[np.float32], limits: tuple[NDArray[np.float64], NDArray[np.float64]]
    ) -> NDArray[np.float32]:
        """The multiples of the scales with the least error after rounding; with few codes the guess is often off."""
        if self._rounder is None:
            return scales
        best, best_error = scales, np.full(scales.shape, np.inf)
        for share in _SCALE_SHARES:
            trial = np.maximum(scales * share, self._floor).astype(np.float32)
            per_kernel = trial.astype(np.float64)[self._channels]
            errors = self._rounder.errors(self._rounder.round(per_kernel, *limits), per_kernel)
            total = np.zeros(scales.shape)
            np.add.at(total, self._channels, errors)
            best = np.where(total < best_error, trial, best)
            best_error = np.minimum(total, best_error)
        return best

    def _error(self, difference: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._second is None:
            return np.full((difference.shape[0], difference.shape[2]), np.nan)
        if self._second.ndim == 2:
            return np.asarray(np.einsum("gk,gkm->gm", self._second, np.square(difference)))
        return np.asarray(np.einsum("gkm,gkm->gm", self._second @ difference, difference))


def _finite(second: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Second moments, or None where inputs are so large (above 1e19) that their squares overflow."""
    return second if np.isfinite(second).all() else None
