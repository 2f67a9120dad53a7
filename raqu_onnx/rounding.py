"""Rounding weights to codes so that the error of the output is small, not that of the weights.

The expected squared error of a kernel's output is `d^T H d`, with `d` the error of its weights and `H` the second
moments of its inputs. All functions work on G groups at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DAMPING", "Rounder"]

#: Share of the mean input power that is added to every row's, so that `H` can be inverted.
DAMPING = 0.01

_BLOCK = 64
_SWEEPS = 4


class Rounder:
    """Rounds one node's weights; what does not depend on scales and widths is computed once.

    Args:
        weight: Real weights, shape (G, K, M).
        second: Second moments of the inputs, shape (G, K, K).
        damping: Share of the mean input power that is added to every row's. The more, the less an error is spread over
            the rows that follow.
    """

    def __init__(self, weight: NDArray[np.float64], second: NDArray[np.float64], *, damping: float = DAMPING) -> None:
        factors = [_inverse_factor(group, damping) for group in second]
        # Everything below is in order of falling input power.
        self._order = np.stack([order for order, _, _ in factors])
        self._moments = np.stack([moments for _, moments, _ in factors])
        self._factor = np.stack([factor for _, _, factor in factors])
        self._weight = np.take_along_axis(weight, self._order[:, :, None], axis=1)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self._moments.nbytes + self._factor.nbytes + self._weight.nbytes

    def round(
        self, scale: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Round rows one after the other, spreading each error over the rows that follow, in blocks of rows.

        Source: Frantar et al., "GPTQ", ICLR 2023, algorithm 1.

        Args:
            scale: Scale per kernel, shape (G, M).
            low: Smallest code, shape (G, M).
            high: Largest code, shape (G, M).

        Returns:
            Codes, shape (G, K, M), and the error `d^T H d` of every kernel, shape (G, M), with the damping in `H`.
        """
        left = self._weight.copy()
        codes = np.empty_like(left)
        # With H^-1 = U^T U the scaled errors are U^-T d, so that their squares add up to d^T H d.
        total = np.zeros(scale.shape)
        rows = left.shape[1]
        for start in range(0, rows, _BLOCK):
            stop = min(start + _BLOCK, rows)
            errors = np.empty((left.shape[0], stop - start, left.shape[2]))
            for row in range(start, stop):
                codes[:, row] = np.clip(np.rint(left[:, row] / scale), low, high)
                error = (left[:, row] - codes[:, row] * scale) / self._factor[:, row, row, None]
                errors[:, row - start] = error
                left[:, row + 1 : stop] -= self._factor[:, row, row + 1 : stop, None] * error[:, None, :]
            left[:, stop:] -= self._factor[:, start:stop, stop:].transpose(0, 2, 1) @ errors
            total += np.square(errors).sum(1)
        return self._restored(codes), total

    def polish(
        self,
        codes: NDArray[np.float64],
        scale: NDArray[np.float64],
        low: NDArray[np.float64],
        high: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Move each code to where the error is least with all others as they are, row by row, while that helps.

        The error never grows: this is coordinate descent on `d^T H d` over integers.

        Args:
            codes: Codes to start from, shape (G, K, M).
            scale: Scale per kernel, shape (G, M).
            low: Smallest code, shape (G, M).
            high: Largest code, shape (G, M).

        Returns:
            Codes, shape (G, K, M).
        """
        current = self._sorted(codes)
        slope = self._moments @ (self._weight - current * scale[:, None, :])
        rows = current.shape[1]
        for _ in range(_SWEEPS):
            moved = False
            for start in range(0, rows, _BLOCK):
                block = slice(start, min(start + _BLOCK, rows))
                steps = self._descend(block, current, slope, scale, low, high)
                if steps.any():
                    moved = True
                    # Rows of other blocks hear of the steps together: that is a matrix product, and quick.
                    slope -= self._moments[:, :, block] @ (steps * scale[:, None, :])
            if not moved:
                break
        return self._restored(current)

    def _descend(
        self,
        block: slice,
        current: NDArray[np.float64],
        slope: NDArray[np.float64],
        scale: NDArray[np.float64],
        low: NDArray[np.float64],
        high: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Move the codes of a block of rows, in place; returns the steps."""
        moments = self._moments[:, block, block]
        local = slope[:, block].copy()
        steps = np.zeros_like(local)
        for row in range(local.shape[1]):
            codes = current[:, block.start + row]
            wanted = codes + local[:, row] / (moments[:, row, row, None] * scale)
            step = np.clip(np.rint(wanted), low, high) - codes
            if step.any():
                steps[:, row] = step
                codes += step
                local -= moments[:, :, row, None] * (step * scale)[:, None, :]
        return steps

    def projections(self, codes: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`q^T H w` and `q^T H q` of every kernel, each of shape (G, M); their ratio is the best scale of the codes."""
        current = self._sorted(codes)
        pulled = self._moments @ current
        along = np.einsum("gkm,gkm->gm", pulled, self._weight)
        return np.asarray(along), np.asarray(np.einsum("gkm,gkm->gm", pulled, current))

    def _sorted(self, codes: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.take_along_axis(codes, self._order[:, :, None], axis=1)

    def _restored(self, codes: NDArray[np.float64]) -> NDArray[np.float64]:
        restored = np.empty_like(codes)
        np.put_along_axis(restored, self._order[:, :, None], codes, axis=1)
        return restored


def _inverse_factor(
    second: NDArray[np.float64], damping: float
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Rows by falling power, and in that order the damped moments and the upper Cholesky factor of their inverse.

    With rows reversed, the lower factor of the moments themselves is the reversed inverse of that factor: this needs no
    inverse of the moments, takes a quarter of the time and loses fewer digits.
    """
    from scipy.linalg import lapack

    order = np.argsort(-np.diagonal(second), kind="stable")
    reverse = order[::-1]
    moments = second[np.ix_(reverse, reverse)]
    mean = float(np.trace(moments)) / len(moments)
    added = damping * (mean if mean > 0 else 1.0)
    while True:
        moments[np.diag_indices_from(moments)] += added
        factor, failed = lapack.dpotrf(moments, lower=1)
        if not failed:
            break
        added *= 10
    inverse, _ = lapack.dtrtri(factor, lower=1)
    return order, moments[::-1, ::-1].copy(), np.ascontiguousarray(np.tril(inverse)[::-1, ::-1])
