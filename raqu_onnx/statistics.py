"""What calibration learns of tensors, in memory that does not grow with the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raqu_onnx.quantized import ActivationQuantizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FULL_LIMIT", "CrossMoments", "Histogram", "InputMoments", "RangeMethod", "activation_quantizer"]

RangeMethod = Literal["min-max", "percentile", "mse"]

#: Rows up to which all pairs of rows are summed; the sums take `K * K` floats.
FULL_LIMIT = 4608

_HALF_BINS = 2048
_CHUNK = 1 << 16
_PERCENTILE = 99.99


class Histogram:
    """Histogram of one tensor over a range that doubles when a value falls outside it.

    Bins are symmetric around 0, closed at their lower ends, and the limit is a power of two above every value;
    doubling merges neighbours, so nothing is lost but resolution, and batches in any split give the same counts.
    Exact zeros are counted apart, since every quantizer here represents them exactly.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(2 * _HALF_BINS)
        self.limit = 0.0
        self.zeros = 0
        self.low = math.inf
        self.high = -math.inf

    def update(self, x: NDArray[np.floating]) -> None:
        """Count the values of a tensor of any shape; it must be finite."""
        if not x.size:
            return
        flat = x.reshape(-1)
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))
        reach = max(-self.low, self.high)
        if reach > 0:
            self._cover(reach)
            self._count(flat)
        zeros = int(flat.size - np.count_nonzero(flat))
        self.zeros += zeros
        # Zero lies on the lower edge of the first bin above the middle.
        if reach > 0:
            self.counts[_HALF_BINS] -= zeros

    def _cover(self, reach: float) -> None:
        if self.limit == 0.0:
            self.limit = math.ldexp(1.0, math.frexp(reach)[1])
        while reach >= self.limit:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros_like(self.counts)
            self.counts[_HALF_BINS // 2 : _HALF_BINS // 2 + _HALF_BINS] = merged
            self.limit *= 2

    def _count(self, flat: NDArray[np.floating]) -> None:
        # Doubles hold every quotient of a float by a power of two exactly; chunks of them stay in the cache.
        for start in range(0, flat.size, _CHUNK):
            place = flat[start : start + _CHUNK].astype(np.float64) * (_HALF_BINS / self.limit)
            bins = np.floor(place).astype(np.int64) + _HALF_BINS
            self.counts += np.bincount(bins, minlength=2 * _HALF_BINS)

    @property
    def centres(self) -> NDArray[np.float64]:
        """Middle of each bin."""
        width = self.limit / _HALF_BINS
        middles: NDArray[np.float64] = np.arange(2 * _HALF_BINS, dtype=np.float64) + 0.5
        return -self.limit + width * middles

    def quantile(self, share: float) -> float:
        """Smallest value below which `share` of all samples lie, to the width of a bin."""
        counts = self.counts.copy()
        counts[_HALF_BINS] += self.zeros
        cumulative = np.cumsum(counts)
        index = int(np.searchsorted(cumulative, share * cumulative[-1]))
        return float(np.clip(self.centres[min(index, len(counts) - 1)], self.low, self.high))


class InputMoments:
    """Sums over the vectors that drive a node's wordlines.

    Sums are taken around the first mean seen, so that a mean far from 0 costs the float32 sums no digits.

    Attributes:
        count: Vectors seen.
        full: Whether all pairs of rows are summed, or (K above `full_limit`) only squares.
        origin: What sums are taken around, shape (G, K); None before the first vector.
        total: Sum of `x - origin`, shape (G, K).
        gram: Sum of `(x - origin) (x - origin)^T`, shape (G, K, K), or of its diagonal, shape (G, K).
    """

    def __init__(self, groups: int, rows: int, *, full_limit: int = FULL_LIMIT) -> None:
        self.count = 0
        self.total = np.zeros((groups, rows))
        self.full = rows <= full_limit
        self.origin: NDArray[np.float32] | None = None
        self.gram = np.zeros((groups, rows, rows) if self.full else (groups, rows), np.float32)

    def update(self, vectors: NDArray[Any]) -> None:
        """Add vectors of shape (P, G, K)."""
        x = np.ascontiguousarray(vectors.transpose(1, 0, 2), np.float32)
        if not x.shape[1]:
            return
        if self.origin is None:
            self.origin = x.mean(1, dtype=np.float64).astype(np.float32)
        x = x - self.origin[:, None, :]
        self.count += x.shape[1]
        self.total += x.sum(1, dtype=np.float64)
        if self.full:
            self.gram += x.transpose(0, 2, 1) @ x
        else:
            self.gram += np.square(x).sum(1)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean vector, shape (G, K)."""
        drift = self.total / max(1, self.count)
        return drift if self.origin is None else self.origin + drift

    def covariance(self, *, centred: bool = True) -> NDArray[np.float64]:
        """Second moments per vector, around the mean if `centred`; shape as `gram`."""
        moments = self.gram.astype(np.float64) / max(1, self.count) - self._square(self.total / max(1, self.count))
        return moments if centred else moments + self._square(self.mean)

    def _square(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(x[:, :, None] * x[:, None, :] if self.full else np.square(x))


class CrossMoments:
    """Sums over pairs of vectors: what a node's inputs were in float, and what arrives.

    Attributes:
        count: Pairs seen.
        gram: Sum of `(f - origin_f) (q - origin_q)^T`, shape (G, K, K), around the first batch's means.
    """

    def __init__(self, groups: int, rows: int) -> None:
        self.count = 0
        self.gram = np.zeros((groups, rows, rows))
        self._origins: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        self._totals = np.zeros((2, groups, rows))

    def update(self, reference: NDArray[Any], arriving: NDArray[Any]) -> None:
        """Add pairs of vectors, each of shape (P, G, K)."""
        f, q = (np.ascontiguousarray(x.transpose(1, 0, 2), np.float32) for x in (reference, arriving))
        if not f.shape[1]:
            return
        if self._origins is None:
            self._origins = (
                f.mean(1, dtype=np.float64).astype(np.float32),
                q.mean(1, dtype=np.float64).astype(np.float32),
            )
        f, q = f - self._origins[0][:, None, :], q - self._origins[1][:, None, :]
        self.count += f.shape[1]
        self._totals += np.stack([f.sum(1, dtype=np.float64), q.sum(1, dtype=np.float64)])
        self.gram += f.transpose(0, 2, 1) @ q

    @property
    def reference_mean(self) -> NDArray[np.float64]:
        """Mean of the float vectors, shape (G, K)."""
        return self._means()[0]

    def _means(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        drift = self._totals / max(1, self.count)
        if self._origins is None:
            return drift[0], drift[1]
        return self._origins[0] + drift[0], self._origins[1] + drift[1]

    def covariance(self, *, centred: bool = True) -> NDArray[np.float64]:
        """Mean of `f q^T`, around both means if `centred`, shape (G, K, K)."""
        drift = self._totals / max(1, self.count)
        moments: NDArray[np.float64] = self.gram / max(1, self.count) - drift[0][:, :, None] * drift[1][:, None, :]
        if centred:
            return moments
        means = self._means()
        return moments + means[0][:, :, None] * means[1][:, None, :]


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

    ``min-max`` spans all values seen, ``percentile`` the middle 99.99 %, ``mse`` the range with the least mean
    squared error over the histogram.

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
    return _least_squares(histogram, full, bits)


def _least_squares(histogram: Histogram, full: _Range, bits: int) -> ActivationQuantizer:
    used = np.flatnonzero(histogram.counts > 0)
    values, weights = histogram.centres[used].clip(full.low, full.high), histogram.counts[used]
    trials = [_Range(full.low * share, full.high * share).quantizer(bits) for share in np.linspace(1.0, 0.1, 91)]
    errors = [_squared_error(trial, values, weights) for trial in trials]
    best = int(np.argmin(errors))
    # A bin's middle stands for all its values: a gain of less than 2 % may be an artefact of that.
    return trials[best if errors[best] < 0.98 * errors[0] else 0]


def _squared_error(quantizer: ActivationQuantizer, values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    codes = np.clip(np.rint(values / quantizer.scale) + quantizer.zero_point, 0, quantizer.levels)
    return float(weights @ np.square((codes - quantizer.zero_point) * quantizer.scale - values))
