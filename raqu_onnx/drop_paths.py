"""In which order a node's kernels are best dropped, and what each one costs the nodes that read them.

`raqu_onnx.error_curves` prices every kernel as if it were the only one to be dropped; two that stand in for each other
then both look cheap. Here kernels are removed one after the other, and after each the reader's weights and the inverse
of its moments are brought up to date, as optimal brain surgeon does for groups of weights (Hassibi, Stork, NIPS 1992;
Frantar, Alistarh, "Optimal brain compression", NeurIPS 2022, equations 2 and 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["drop_costs"]

# Kernels up to which moments are brought up to date after each that is dropped; it takes the square of the rows.
_MOST_UPDATES = 1024


@dataclass
class _Group:
    """One group of a reader: its weight, shape (K, M), and the inverse of its damped moments, shape (K, K)."""

    weight: NDArray[np.float64]
    inverse: NDArray[np.float64]


def drop_costs(
    weight: NDArray[np.float64],
    second: NDArray[np.float64],
    owner: NDArray[np.int64],
    kernels: int,
    ridge: float,
) -> NDArray[np.float64]:
    """What dropping each kernel adds to a reader's squared error, in the order in which that is least.

    Args:
        weight: The reader's weight, shape (G, K, M).
        second: Second moments of its inputs, shape (G, K, K); or their diagonals, shape (G, K), and then no row can
            make up for another.
        owner: Kernel that feeds each row, shape (G, K); -1 for rows that something else feeds.
        kernels: Kernels of the node that is read.
        ridge: Share of the mean input power that is added to every row's.

    Returns:
        Squared error per vector, summed over the reader's kernels, shape (kernels,): non-decreasing in the order of
        dropping, 0 for kernels that feed no row.
    """
    if second.ndim == 2:
        return _separate_costs(weight, second, owner, kernels)
    groups = [_damped(w, h, ridge) for w, h in zip(weight, second, strict=True)]
    fed_once = _rows_of_each(owner, kernels)
    if fed_once is not None:
        return _alike(groups[0], fed_once)
    rows = [
        [(group, fed) for group, own in enumerate(owner) if (fed := np.flatnonzero(own == kernel)).size]
        for kernel in range(kernels)
    ]
    costs = np.zeros(kernels)
    left = [kernel for kernel in range(kernels) if rows[kernel]]
    spent = 0.0
    while left:
        found = [sum(_loss(groups[group], fed) for group, fed in rows[kernel]) for kernel in left]
        best = int(np.argmin(found))
        kernel = left.pop(best)
        # Rounding may make a later one look cheaper.
        spent = max(spent, found[best])
        costs[kernel] = spent
        for group, fed in rows[kernel]:
            _remove(groups[group], fed)
    return costs


def _rows_of_each(owner: NDArray[np.int64], kernels: int) -> NDArray[np.int64] | None:
    """Rows that each kernel feeds, shape (kernels, n), where all feed as many rows of a single group."""
    if len(owner) > 1 or (owner < 0).any() or len(owner[0]) % kernels:
        return None
    counts = np.bincount(owner[0], minlength=kernels)
    if len(counts) > kernels or (counts != counts[0]).any():
        return None
    return np.argsort(owner[0], kind="stable").reshape(kernels, -1)


def _alike(group: _Group, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Costs of kernels that feed as many rows each, all compared at once.

    With very many kernels the moments are not brought up to date after each: then every kernel costs what it would cost
    as the only one.
    """
    costs = np.zeros(len(rows))
    left = np.arange(len(rows))
    if len(rows) > _MOST_UPDATES:
        return _losses(group, rows)
    spent = 0.0
    while left.size:
        found = _losses(group, rows[left])
        best = int(np.argmin(found))
        spent = max(spent, float(found[best]))
        costs[left[best]] = spent
        _remove(group, rows[left[best]])
        left = np.delete(left, best)
    return costs


def _losses(group: _Group, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """`_loss` of every kernel, with its rows, shape (kernels, n)."""
    blocks = group.inverse[rows[:, :, None], rows[:, None, :]]
    # Summed over the reader's kernels first: w^T A w = trace(A w w^T).
    parts = group.weight[rows]
    powers = parts @ parts.transpose(0, 2, 1)
    return np.asarray(np.trace(np.linalg.solve(blocks, powers), axis1=1, axis2=2), np.float64)


def _separate_costs(
    weight: NDArray[np.float64], power: NDArray[np.float64], owner: NDArray[np.int64], kernels: int
) -> NDArray[np.float64]:
    lost = power * np.square(weight).sum(axis=2)
    fed = owner >= 0
    return np.asarray(np.bincount(owner[fed], lost[fed], kernels), np.float64)


def _damped(weight: NDArray[np.float64], second: NDArray[np.float64], ridge: float) -> _Group:
    power = float(np.trace(second)) / len(second)
    damped = second + (ridge * power if power > 0 else 1.0) * np.eye(len(second))
    return _Group(weight.copy(), np.asarray(np.linalg.inv(damped), np.float64))


def _loss(group: _Group, rows: NDArray[np.int64]) -> float:
    """`w_B^T ((H^-1)_BB)^-1 w_B`, summed over the reader's kernels."""
    part = group.weight[rows]
    return float(np.vdot(np.linalg.solve(group.inverse[np.ix_(rows, rows)], part), part))


def _remove(group: _Group, rows: NDArray[np.int64]) -> None:
    """Take rows out: the others make up for them, and the inverse is that of the moments without them."""
    across = group.inverse[:, rows] @ np.linalg.inv(group.inverse[np.ix_(rows, rows)])
    group.weight -= across @ group.weight[rows]
    group.inverse -= across @ group.inverse[rows]
    group.weight[rows] = 0.0
    # What is left of these rows is rounding; they must not couple to anything.
    group.inverse[rows] = group.inverse[:, rows] = 0.0
    group.inverse[rows, rows] = 1.0
