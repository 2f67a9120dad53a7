"""What every width costs every kernel of a model in one common unit, and what it costs to drop it.

`raqu_onnx.error_curves` has the squared error of each kernel's output. Two things make these errors comparable over the
whole model: how much the loss of the model rises when one node alone is quantized (the search's sensitivity), which
gives each node a rate of loss per squared error; and for dropped kernels the error in the nodes that read them
(`raqu_onnx.drop_paths`), at the rates of those nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.drop_paths import drop_costs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.channel_flow import Reader
    from raqu_onnx.dropping import DropRules
    from raqu_onnx.error_curves import ErrorCurve
    from raqu_onnx.quantizer import ModelQuantizer

__all__ = ["Follower", "NodeLosses", "grouped", "kernel_losses"]

_RIDGE = 0.05
# A node whose sensitivity drowns in noise is still not free: share of the largest one that it is given.
_LEAST_SHARE = 1e-3
# Share of what dropping all kernels would lose up to which what rounding loses is noise of the arithmetic.
_EXACT = 1e-12


@dataclass(frozen=True)
class Follower:
    """A kernel that cannot go on without another: the only one to read it, and reading nothing else.

    Attributes:
        name: Node of the kernel that follows.
        channel: Its entry on that node's scale axis.
    """

    name: str
    channel: int


@dataclass(frozen=True)
class NodeLosses:
    """Losses of one node's kernels, per entry of the scale axis.

    Attributes:
        name: The node.
        loss: Loss at each width, shape (channels, 9); infinite where a width was not asked for, and at 0 bits for
            kernels that may not be dropped.
        followers: Kernels that are dropped together with each entry, by entry.
    """

    name: str
    loss: NDArray[np.float64]
    followers: Mapping[int, tuple[Follower, ...]]

    def followers_by_node(self) -> list[tuple[NDArray[np.int64], str, NDArray[np.int64]]]:
        """The followers by their node: entries that they follow, name of their node, and their entries there."""
        found: dict[str, list[tuple[int, int]]] = {}
        for entry, followers in self.followers.items():
            for item in followers:
                found.setdefault(item.name, []).append((entry, item.channel))
        return [(np.array(pairs)[:, 0], name, np.array(pairs)[:, 1]) for name, pairs in found.items()]


def grouped(losses: NodeLosses, size: int) -> NDArray[np.int64]:
    """Groups of kernels alike in loss, so that they can share a width.

    Args:
        losses: Losses of one node's kernels.
        size: Kernels in a group; the last one may have fewer.

    Returns:
        Number of its group for every entry of the scale axis.
    """
    table = np.where(np.isfinite(losses.loss), losses.loss, 0.0)
    rank = np.empty(len(table), np.int64)
    rank[np.argsort(-table[:, 1:].max(axis=1), kind="stable")] = np.arange(len(table))
    return rank // size


def kernel_losses(
    quantizer: ModelQuantizer,
    curves: Mapping[str, ErrorCurve],
    rules: DropRules,
    sensitivity: Mapping[str, NDArray[np.float64]],
    widths: Mapping[str, Sequence[int]],
    *,
    may_drop: frozenset[str],
) -> dict[str, NodeLosses]:
    """Losses of all kernels of a model, by node in graph order.

    Args:
        quantizer: The model's quantizer.
        curves: Error curves of its kernels.
        rules: What follows from dropped kernels.
        sensitivity: Loss of the model when one node alone is at each width, shape (9,), by node.
        widths: Widths that each node may have, rising.
        may_drop: Nodes whose kernels may be dropped.
    """
    rates = _Rates(curves, sensitivity, widths)
    found: dict[str, NodeLosses] = {}
    # From the end: what a dropped kernel costs may be what its follower costs.
    for name in reversed(list(quantizer.sources)):
        table = rates.table(name)
        followers: dict[int, tuple[Follower, ...]] = {}
        if name in may_drop:
            table[:, 0] = _drop(name, quantizer, curves, rules, rates, found, followers)
        found[name] = NodeLosses(name, table, followers)
    return {name: found[name] for name in quantizer.sources}


class _Rates:
    """Loss of the model per squared error of each node."""

    def __init__(
        self,
        curves: Mapping[str, ErrorCurve],
        sensitivity: Mapping[str, NDArray[np.float64]],
        widths: Mapping[str, Sequence[int]],
    ) -> None:
        self._curves = curves
        self._widths = widths
        # Where errors are large; at wider ones the loss drowns in noise.
        measured = {name: float(sensitivity[name][widths[name][0]]) for name in widths}
        least = _LEAST_SHARE * max(measured.values(), default=0.0) or 1.0
        self._loss = {name: max(loss, least) for name, loss in measured.items()}
        self._own = self._per_error(dict.fromkeys(widths, 1.0))
        self._seen = self._per_error({name: curves[name].gains for name in widths})

    def _per_error(self, gains: Mapping[str, NDArray[np.float64] | float]) -> dict[str, float]:
        """Loss over summed error of each node; where rounding loses nothing, what is usual among the others.

        Weights that are ternary already have no error that a loss could be told by.
        """
        known = {}
        for name, gain in gains.items():
            errors = self._curves[name].errors
            rounded, dropped = (float((errors[bits] * gain).sum()) for bits in (self._widths[name][0], 0))
            if rounded > _EXACT * dropped:
                known[name] = self._loss[name] / rounded
        usual = float(np.median(list(known.values()))) if known else 1.0
        return {name: known.get(name, usual) for name in gains}

    def seen(self, name: str) -> float:
        """Loss per squared error as the readers see it: in units of `errors * gains`."""
        return self._seen[name]

    def own(self, name: str) -> float:
        """Loss per squared error of the node's own output."""
        return self._own[name]

    def table(self, name: str) -> NDArray[np.float64]:
        """Loss of every entry of the scale axis at every width, falling with the width, shape (channels, 9)."""
        curve = self._curves[name]
        table = np.full((curve.errors.shape[1], 9), np.inf)
        widths = list(self._widths[name])
        errors = (curve.errors[widths] * curve.gains).T
        # Rounding is not always better with one bit more.
        table[:, widths] = self.seen(name) * np.maximum.accumulate(errors[:, ::-1], axis=1)[:, ::-1]
        return table


def _drop(
    name: str,
    quantizer: ModelQuantizer,
    curves: Mapping[str, ErrorCurve],
    rules: DropRules,
    rates: _Rates,
    later: dict[str, NodeLosses],
    followers: dict[int, tuple[Follower, ...]],
) -> NDArray[np.float64]:
    """Loss when each entry of a node's scale axis is dropped; kernels that go with it are noted."""
    layout = quantizer.sources[name].node.layout
    index = layout.channel_index().reshape(-1)
    flow = rules.flows[name]
    if not flow.absorbable:
        curve = curves[name]
        return np.asarray(rates.seen(name) * curve.errors[0] * curve.gains)
    total = np.zeros(layout.channels)
    for reader in flow.readers:
        followed = _followed(reader, quantizer)
        if followed is not None and rules.absorbs(reader.name) and np.isfinite(later[reader.name].loss[:, 0]).all():
            # Rows of a kernel that computes nothing else: it goes too, and its own readers pay.
            for kernel, channel in followed.items():
                entry = int(index[kernel])
                followers[entry] = (*followers.get(entry, ()), Follower(reader.name, channel))
                total[entry] += later[reader.name].loss[channel, 0]
            later[reader.name].loss[:, 0] = np.inf
            continue
        costs = _reader_costs(reader, quantizer, index.size)
        total += rates.own(reader.name) * np.bincount(index, costs, layout.channels)
    return total


def _reader_costs(reader: Reader, quantizer: ModelQuantizer, kernels: int) -> NDArray[np.float64]:
    source = quantizer.sources[reader.name]
    if source.moments is None:
        return np.full(kernels, np.inf)
    weight = source.node.layout.to_matrices(source.weight.astype(np.float64))
    second = source.moments.covariance(centred=quantizer.absorbs_mean(source))
    return drop_costs(weight, second, reader.owner, kernels, _RIDGE)


def _followed(reader: Reader, quantizer: ModelQuantizer) -> dict[int, int] | None:
    """Entry of the reader's scale axis that reads each kernel alone; None unless all of the reader is like that."""
    layout = quantizer.sources[reader.name].node.layout
    index = layout.channel_index()
    if layout.kernels != 1 or layout.channels != layout.groups:
        return None
    first = reader.owner[:, 0]
    if (reader.owner != first[:, None]).any() or (first < 0).any() or len(np.unique(first)) != len(first):
        return None
    return {int(kernel): int(index[group, 0]) for group, kernel in enumerate(first)}
