"""Scales that clip where that lowers the error of rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ScaleLimits", "clipped_scales"]

_SHARES = np.linspace(1.0, 0.2, 41)
# Weights that are worked on at once, so that they stay in the cache.
_BLOCK = 1 << 15
# Stands for the largest power where all are zero.
_TINY = 1e-30
# Every code at such a scale, in steps of the full range, is 0 anyway; float32 holds its square too.
_LARGEST = 1e15


@dataclass(frozen=True)
class ScaleLimits:
    """What each entry of the scale axis has to keep to, all of shape (channels,).

    Attributes:
        floor: Smallest scale allowed.
        low: Smallest code.
        high: Largest code.
    """

    floor: NDArray[np.floating]
    low: NDArray[np.floating]
    high: NDArray[np.floating]

    def of(self, part: slice, full: NDArray[np.float64]) -> ScaleLimits:
        """Those of some entries in single precision, the floor in units of their full range."""
        floor = np.minimum(self.floor[part] / full, _LARGEST)
        return ScaleLimits(*(item.astype(np.float32) for item in (floor, self.low[part], self.high[part])))


def clipped_scales(
    weight: NDArray[np.float64],
    power: NDArray[np.float64],
    kernels: NDArray[np.intp],
    full: NDArray[np.float64],
    limits: ScaleLimits,
) -> NDArray[np.float64]:
    """For each entry of the scale axis, the share of the full range with the least weighted squared error.

    Shares go from 1 to 0.2 in steps of 0.02.

    Args:
        weight: Real weights, shape (G, K, M).
        power: Weight of the error of each row, shape (G, K).
        kernels: Kernels that share an entry, counted through all groups, shape (channels, n).
        full: Scale that spans the full range, shape (channels,).
        limits: Smallest scales and codes, and largest codes.

    Returns:
        Scales, shape (channels,).
    """
    channels, shared = kernels.shape
    rows = weight.shape[1]
    best = np.empty(channels)
    step = max(1, _BLOCK // (rows * shared))
    for start in range(0, channels, step):
        part = slice(start, min(start + step, channels))
        group, kernel = np.divmod(kernels[part], weight.shape[2])
        # In units of the full range, which float32 holds whatever the weights' size.
        values = (weight[group, :, kernel] / full[part, None, None]).reshape(len(group), -1).astype(np.float32)
        powers = _normalized(power[group]).reshape(len(group), -1)
        share = _best_share(values, powers, limits.of(part, full[part]))
        best[part] = np.maximum(full[part] * share, limits.floor[part])
    return best


def _normalized(power: NDArray[np.float64]) -> NDArray[np.float32]:
    """Powers relative to the largest of each entry, shape (channels, n, K)."""
    largest = power.max(axis=(1, 2), keepdims=True)
    return np.asarray(power / np.maximum(largest, _TINY), np.float32)


def _best_share(values: NDArray[np.float32], power: NDArray[np.float32], limits: ScaleLimits) -> NDArray[np.float64]:
    """Share with the least error of each row of `values`, which are in steps of the full range."""
    best, least = np.ones(len(values)), np.full(len(values), np.inf, np.float32)
    total = power.sum(1)
    error, codes = np.empty_like(values), np.empty_like(values)
    for share in _SHARES:
        scale = np.maximum(np.float32(share), limits.floor)[:, None]
        np.divide(values, scale, out=codes)
        np.rint(codes, out=codes)
        np.maximum(codes, limits.low[:, None], out=codes)
        np.minimum(codes, limits.high[:, None], out=codes)
        codes *= scale
        np.subtract(codes, values, out=error)
        error *= error
        error *= power
        found = error.sum(1)
        better = found < least
        best[better], least[better] = share, found[better]
        # Rounding costs a quarter of a squared step at most, the rest is clipping, which smaller shares only add to.
        if (found - np.square(scale[:, 0]) / 4 * total > least).all():
            break
    return best
