"""Second moments of a node's inputs together with what its outputs should be: all that least squares needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["JointMoments"]


class JointMoments:
    """Sums over pairs of an input vector `x` and the output `t` that is wanted for it.

    Sums are taken around the means of the first vectors, so that means far from 0 cost the float32 sums no digits.

    Args:
        x: The first input vectors, shape (P, G, K).
        t: The outputs wanted for them, shape (P, G, M).

    Attributes:
        count: Pairs seen.
    """

    def __init__(self, x: NDArray[Any], t: NDArray[Any]) -> None:
        self.count = 0
        self._origins = _first_mean(x), _first_mean(t)
        groups, rows, kernels = x.shape[1], x.shape[2], t.shape[2]
        self._totals = np.zeros((groups, rows)), np.zeros((groups, kernels))
        self._xx = np.zeros((groups, rows, rows), np.float32)
        self._xt = np.zeros((groups, rows, kernels), np.float32)
        self._tt = np.zeros((groups, kernels))

    def update(self, x: NDArray[Any], t: NDArray[Any]) -> None:
        """Add pairs, of shapes (P, G, K) and (P, G, M)."""
        parts = [
            np.ascontiguousarray(part.transpose(1, 0, 2), np.float32) - origin[:, None, :]
            for part, origin in zip((x, t), self._origins, strict=True)
        ]
        for total, part in zip(self._totals, parts, strict=True):
            total += part.sum(1, dtype=np.float64)
        left = parts[0].transpose(0, 2, 1)
        # Squares may overflow, which `finite` tells.
        with np.errstate(over="ignore", invalid="ignore"):
            self._xx += left @ parts[0]
            self._xt += left @ parts[1]
            self._tt += np.square(parts[1]).sum(1, dtype=np.float64)
        self.count += len(x)

    def merged(self, other: JointMoments) -> JointMoments:
        """Sums over the pairs of both, which were taken around the same means."""
        both = object.__new__(JointMoments)
        both.count = self.count + other.count
        both._origins = self._origins
        both._totals = self._totals[0] + other._totals[0], self._totals[1] + other._totals[1]
        both._xx, both._xt, both._tt = self._xx + other._xx, self._xt + other._xt, self._tt + other._tt
        return both

    def empty(self) -> JointMoments:
        """Sums over no pairs yet, around the same means."""
        fresh = object.__new__(JointMoments)
        fresh.count, fresh._origins = 0, self._origins
        fresh._totals = np.zeros_like(self._totals[0]), np.zeros_like(self._totals[1])
        fresh._xx, fresh._xt = np.zeros_like(self._xx), np.zeros_like(self._xt)
        fresh._tt = np.zeros_like(self._tt)
        return fresh

    @property
    def finite(self) -> bool:
        """False where values are so large (above 1e19) that their squares overflow."""
        return all(bool(np.isfinite(sums).all()) for sums in (self._xx, self._xt, self._tt))

    @property
    def means(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Means of inputs and of outputs, shapes (G, K) and (G, M)."""
        x, t = (origin + total / max(1, self.count) for origin, total in zip(self._origins, self._totals, strict=True))
        return x, t

    def around(
        self, centre: tuple[NDArray[np.float64], NDArray[np.float64]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean of `x x^T` and of `x t^T` around given points, shapes (G, K, K) and (G, K, M)."""
        count = max(1, self.count)
        x, t = (total / count for total in self._totals)
        # How far the centre lies from the origins of the sums.
        a, b = (point - origin for point, origin in zip(centre, self._origins, strict=True))
        xx = self._xx / np.float64(count) - _outer(x, a) - _outer(a, x) + _outer(a, a)
        xt = self._xt / np.float64(count) - _outer(x, b) - _outer(a, t) + _outer(a, b)
        return xx, xt

    def error(
        self, weight: NDArray[np.float64], centre: tuple[NDArray[np.float64], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Mean of `(t - W^T x)^2` for a weight of shape (G, K, M), both taken around given points, shape (G, M)."""
        xx, xt = self.around(centre)
        count = max(1, self.count)
        shift = centre[1] - self._origins[1]
        power = self._tt / count - 2 * shift * self._totals[1] / count + np.square(shift)
        return np.asarray(power + np.einsum("gkm,gkm->gm", xx @ weight - 2 * xt, weight))

    def covariance(self, *, centred: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean of `x x^T` and of `x t^T`, around their means if `centred`, else around 0."""
        means = self.means
        return self.around(means if centred else (np.zeros_like(means[0]), np.zeros_like(means[1])))


def _first_mean(vectors: NDArray[Any]) -> NDArray[np.float32]:
    # Zero where the first batch is empty, as a data-dependent selection may be.
    return np.asarray(vectors.sum(0, dtype=np.float64) / max(1, len(vectors)), np.float32)


def _outer(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(a[:, :, None] * b[:, None, :])
