"""What calibration learns of tensors, in memory that does not grow with the data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FULL_LIMIT", "Histogram", "InputMoments"]


#: Rows up to which all pairs of rows are summed; the sums take `K * K` floats.
FULL_LIMIT = 4608

_HALF_BINS = 2048
_CHUNK = 1 << 16


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

    def update(self, x: NDArray[np.floating], *, most: int | None = None) -> None:
        """Count the values of a tensor of any shape.

        Args:
            x: The values.
            most: Count only about this many values of each entry of the first axis, evenly spread; the extremes are
                those of all values. Samples lie along that axis, so the split into batches does not matter.

        Raises:
            ValueError: A value is infinite or not a number.
        """
        if not x.size:
            return
        low, high = float(x.min()), float(x.max())
        # Both are NaN where any value is.
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("the tensor holds values that are infinite or not a number")
        self.low, self.high = min(self.low, low), max(self.high, high)
        counted = x.reshape(-1) if most is None else _spread_values(x, most)
        reach = max(-self.low, self.high)
        zeros = int(counted.size - np.count_nonzero(counted))
        self.zeros += zeros
        if reach > 0:
            self._cover(reach)
            self._count(counted)
            # Zero lies on the lower edge of the first bin above the middle.
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
            bins = np.floor(place, out=place).astype(np.intp) + _HALF_BINS
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


def _spread_values(x: NDArray[np.floating], most: int) -> NDArray[np.floating]:
    """About `most` values of each entry of the first axis, flat.

    The step shares no divisor with any dimension: a multiple of the width would meet the same few columns only.
    """
    rows = x.reshape(len(x), -1) if x.ndim else x.reshape(1, 1)
    step = -(-rows.shape[1] // most)
    while any(math.gcd(step, size) > 1 for size in x.shape[1:]):
        step += 1
    return rows[:, ::step].reshape(-1)


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
        # Squares may overflow: whoever reads the sums looks whether they are finite.
        with np.errstate(over="ignore", invalid="ignore"):
            self.gram += x.transpose(0, 2, 1) @ x if self.full else np.square(x).sum(1)

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
