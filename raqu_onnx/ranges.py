"""Choosing the range of an activation: scale and zero point of a tensor from the histogram of its values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from raqu_onnx.quantized import ActivationQuantizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from raqu_onnx.statistics import Histogram

__all__ = ["RANGE_METHODS", "RangeMethod", "activation_quantizer"]

RangeMethod = Literal["min-max", "percentile", "entropy", "mse"]
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)

_PERCENTILE = 99.99
_SHARES = np.linspace(1.0, 0.1, 91)
# A bin's middle stands for all its values: a gain of less than 2 % may be an artefact of that.
_GAIN = 0.98


@dataclass(frozen=True)
class _Range:
    low: float
    high: float

    def quantizer(self, bits: int) -> ActivationQuantizer:
        """Quantizer whose codes span the range, zero exactly representable."""
        low, high = min(0.0, self.low), max(0.0, self.high)
        levels = (1 << bits) - 1
        span = high - low
        if not span > 0:
            # The bias is stored in steps of this scale: 1.0 would round a small one to nothing.
            return ActivationQuantizer(bits, float(np.float32(1.0 / levels)), 0)
        scale = float(np.float32(max(span / levels, 1e-30)))
        # Rounding moves both ends by at most half a step, which rounding of the values there may cost as well.
        return ActivationQuantizer(bits, scale, min(levels, round(-low / scale)))


def activation_quantizer(histogram: Histogram, bits: int, method: RangeMethod = "mse") -> ActivationQuantizer:
    """Choose scale and zero point of a tensor for one width.

    * ``min-max`` spans all values seen.
    * ``percentile`` leaves out the 0.01 % of them at either end; 0 is never left out.
    * ``entropy`` is the range whose codes tell most of how the values are distributed: the least KL divergence of the
      distribution after quantization from that before, with what is clipped counted at the ends (Migacz, "8-bit
      inference with TensorRT", GTC 2017). Zeros, which every range here represents exactly, are left out.
    * ``mse`` has the least mean squared error over the histogram; the two ends are chosen apart.

    Args:
        histogram: Values seen.
        bits: Width, 2 to 8.
        method: How the range is chosen.
    """
    full = _Range(histogram.low, histogram.high) if math.isfinite(histogram.low) else _Range(0.0, 0.0)
    if method == "min-max" or histogram.limit == 0.0:
        return full.quantizer(bits)
    if method == "percentile":
        tail = (100 - _PERCENTILE) / 100
        return _Range(histogram.quantile(tail) if full.low < 0 else 0.0, histogram.quantile(1 - tail)).quantizer(bits)
    used = np.flatnonzero(histogram.counts > 0)
    values, weights = histogram.centres[used].clip(full.low, full.high), histogram.counts[used]

    def loss(candidate: _Range) -> float:
        measure = _divergence if method == "entropy" else _squared_error
        return measure(candidate.quantizer(bits), values, weights)

    return _least(full, loss).quantizer(bits)


def _least(full: _Range, loss: Callable[[_Range], float]) -> _Range:
    """The range with the least loss: both ends drawn in together, then each by itself."""
    best, least = full, loss(full)
    moves: list[Callable[[_Range, float], _Range]] = [lambda _, share: _Range(full.low * share, full.high * share)]
    if full.low < 0 < full.high:
        moves += [
            lambda now, share: _Range(full.low * share, now.high),
            lambda now, share: _Range(now.low, full.high * share),
        ]
    for move in moves:
        trials = [move(best, share) for share in _SHARES]
        losses = [loss(trial) for trial in trials]
        if min(losses) < _GAIN * least:
            least = min(losses)
            best = trials[losses.index(least)]
    return best


def _codes(quantizer: ActivationQuantizer, values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.clip(np.rint(values / quantizer.scale) + quantizer.zero_point, 0, quantizer.levels))


def _squared_error(quantizer: ActivationQuantizer, values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    decoded = (_codes(quantizer, values) - quantizer.zero_point) * quantizer.scale
    return float(weights @ np.square(decoded - values))


def _divergence(quantizer: ActivationQuantizer, values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """KL divergence, in nats, from the distribution of values to what can be told of it from codes.

    Args:
        quantizer: The quantizer.
        values: Middles of the bins that hold values, rising.
        weights: Values in each.
    """
    low, high = (
        (code - quantizer.zero_point) * quantizer.scale
        for code in (0 if quantizer.zero_point else -1, quantizer.levels)
    )
    inside = (values >= low) & (values <= high)
    if not inside.any():
        return math.inf
    kept = weights[inside]
    reference = kept.copy()
    # What is clipped is found at the ends.
    reference[0] += weights[values < low].sum()
    reference[-1] += weights[values > high].sum()
    # Of the values of one code nothing is known but their number: they are spread over its bins that hold any.
    codes = _codes(quantizer, values[inside]).astype(np.int64)
    mass = np.bincount(codes, kept)
    bins = np.bincount(codes)
    told = (mass / np.maximum(bins, 1))[codes]
    p, q = reference / reference.sum(), told / told.sum()
    return float(np.sum(p * np.log(p / q)))
