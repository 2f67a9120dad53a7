"""Channels that can be scaled without changing what a model computes, and by how much.

A mapped node may give channel c divided by s_c > 0 if all nodes that read the channel multiply the rows that it feeds
by s_c, and everything in between is positively homogeneous, f(s x) = s f(x) (Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1). Weights have a scale for each kernel and gain
nothing from it; activations have one for the whole tensor, whose codes the channel with the largest values takes for
itself (as in Xiao et al., "SmoothQuant", ICML 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.annotations import MAPPED
from raqu_onnx.channel_flow import first_channels, reader_rows
from raqu_onnx.channel_steps import advance
from raqu_onnx.channels import NOBODY, Channels

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.layout import MappedNode

__all__ = ["ScalableChannels", "channel_scales", "scalable_channels"]

# fmt: off
# f(s x) = s f(x) for all s > 0, entry by entry or within a channel, under the conditions that `advance` checks.
_HOMOGENEOUS = frozenset({
    "Abs", "AveragePool", "Concat", "Dropout", "Flatten", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool",
    "Identity", "LeakyRelu", "LpPool", "MaxPool", "Neg", "PRelu", "Pad", "ReduceL1", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze", "Upsample",
})
# Homogeneous in all their inputs together: these must share their scales.
_JOINS = frozenset({"Add", "Max", "Min", "Sub", "Sum"})
# Homogeneous in one factor, if the other one is not scaled as well.
_PRODUCTS = frozenset({"Div", "Mul"})
# They tell the size of a tensor, whatever is in it.
_SIZES = frozenset({"Shape", "Size"})
# fmt: on
# Channels whose values are this much smaller than the largest channel's carry nothing.
_DEAD = 1e-6


@dataclass(frozen=True)
class ScalableChannels:
    """The output channels of all mapped nodes, numbered through, and what is known of each.

    Attributes:
        produced: Numbers of the output channels by node, shape (G, M).
        read: Numbers of the channels that feed the rows of a node, shape (G, K); -1 where none does.
        observed: Numbers of the channels in the input of each reader, by the name of the value; the shape is that of
            one sample, 1 along axes where the channel does not change.
        shared: Class of every channel: those of one class must have one scale, shape (channels,).
        together: Group of every class: those whose channels lie in one tensor, shape (classes,).
        free: Whether a class may be scaled, shape (classes,).
    """

    produced: Mapping[str, NDArray[np.int64]]
    read: Mapping[str, NDArray[np.int64]]
    observed: Mapping[str, NDArray[np.int64]]
    shared: NDArray[np.int64]
    together: NDArray[np.int64]
    free: NDArray[np.bool_]


def scalable_channels(model: ir.Model) -> ScalableChannels:
    """Find the channels that only mapped nodes and homogeneous operators see.

    Args:
        model: The tidied and mapped model; it is not changed.
    """
    walk = _Walk(model.graph)
    for node in model.graph:
        walk.visit(node)
    return walk.result()


def channel_scales(
    ranges: NDArray[np.float64],
    together: NDArray[np.int64],
    free: NDArray[np.bool_],
    *,
    strength: float = 0.5,
    limit: float = 16.0,
) -> NDArray[np.float64]:
    """What each class of channels is divided by: ``s_c = (r_c / g)^strength`` with g the geometric mean of its group.

    With `strength` 1 all channels of a tensor would reach equally far, and the weights that read them would differ by
    what the activations did; 0.5 shares the spread between both (SmoothQuant's alpha, there its equation 4).

    Args:
        ranges: Largest magnitude r of each class, shape (classes,).
        together: Group of each class.
        free: Classes that may be scaled; the others count for the mean and get 1, as do those without values.
        strength: From 0 (no scaling) to 1.
        limit: Scales stay within ``1 / limit .. limit``.

    Returns:
        Scales, shape (classes,).
    """
    groups = int(together.max(initial=-1)) + 1
    largest = np.zeros(groups)
    finite = np.where(np.isfinite(ranges), ranges, 0.0)
    np.maximum.at(largest, together, finite)
    alive = (finite > _DEAD * largest[together]) & (finite > 0)
    logs = np.log(np.where(alive, finite, 1.0))
    counts = np.bincount(together, weights=alive, minlength=groups)
    means = np.bincount(together, weights=logs, minlength=groups) / np.maximum(counts, 1)
    scales: NDArray[np.float64] = np.exp(strength * (logs - means[together])).clip(1 / limit, limit)
    return np.where(alive & free, scales, 1.0)


@dataclass
class _Walk:
    """Follows all channels through a graph at once."""

    graph: ir.Graph
    states: dict[ir.Value | None, Channels] = field(default_factory=dict)
    produced: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    read: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    observed: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    channels: int = 0
    # Pairs of channels that must have one scale, and channels that must not be scaled.
    pairs: list[NDArray[np.int64]] = field(default_factory=list)
    fixed: list[NDArray[np.int64]] = field(default_factory=list)

    def visit(self, node: ir.Node) -> None:
        mapped = MAPPED.get(node)
        if mapped is not None:
            self._read(node, mapped)
            self._produce(node, mapped)
        elif any(value in self.states for value in node.inputs):
            found = self._follow(node)
            if found is None:
                self._fix(*(self.states[value].owner for value in node.inputs if value in self.states))
            else:
                self.states.update(zip(node.outputs, found, strict=False))
        for value in node.outputs:
            if value in self.states and self._is_seen_outside(value):
                self._fix(self.states[value].owner)

    def _is_seen_outside(self, value: ir.Value) -> bool:
        """Whether the value is an output of the model, or read in the body of a control-flow node."""
        return value.is_graph_output() or any(use.node.graph is not self.graph for use in value.uses())

    def _fix(self, *owners: NDArray[np.int64]) -> None:
        self.fixed.extend(owner[owner != NOBODY] for owner in owners)

    def _produce(self, node: ir.Node, mapped: MappedNode) -> None:
        output = node.outputs[0]
        start = first_channels(mapped, output)
        if start is None:
            return
        numbers = self.channels + start.owner
        self.channels += numbers.size
        self.states[output] = Channels(numbers, zero=True)
        self.produced[mapped.name] = numbers.reshape(mapped.layout.groups, mapped.layout.kernels)
        # The groups of a ConvTranspose share one scale for each kernel: its weights would lose by it.
        shares_scales = mapped.layout.kind == "conv-transpose" and mapped.layout.groups > 1
        if shares_scales or not all(self._is_its_own(value) for value in _constants(node, mapped)):
            self._fix(numbers)

    def _read(self, node: ir.Node, mapped: MappedNode) -> None:
        value = node.inputs[1 if mapped.constant_left else 0]
        channels = self.states.get(value)
        if channels is None or value is None:
            return
        rows = reader_rows(mapped, channels.owner)
        if rows is None or not self._is_its_own(node.inputs[0 if mapped.constant_left else 1]):
            self._fix(channels.owner)
            return
        self.read[mapped.name] = rows
        self.observed[mapped.input_name] = channels.owner

    def _is_its_own(self, value: ir.Value | None) -> bool:
        """Whether nobody else reads a constant."""
        return value is None or (len(value.uses()) == 1 and not value.is_graph_output())

    def _follow(self, node: ir.Node) -> tuple[Channels, ...] | None:
        """Channels of a node's outputs, scaled as its inputs are; None where they are not."""
        if node.op_type in _JOINS and node.domain in ("", "ai.onnx"):
            return self._join(node)
        if node.op_type not in _HOMOGENEOUS | _PRODUCTS | _SIZES:
            return None
        if node.op_type in _PRODUCTS and all(value in self.states for value in node.inputs):
            return None
        found = advance(node, self.states)
        # What does not turn 0 into 0, such as padding with ones, is not homogeneous.
        return found if not isinstance(found, str) and all(channels.zero for channels in found) else None

    def _join(self, node: ir.Node) -> tuple[Channels, ...] | None:
        """Let the channels that a sum puts on top of each other share their scales."""
        states = [self.states.get(value) for value in node.inputs]
        owners = [state.owner for state in states if state is not None]
        first = owners[0]
        if len(owners) < len(states) or any(owner.shape != first.shape for owner in owners):
            return None
        for owner in owners[1:]:
            if ((owner == NOBODY) != (first == NOBODY)).any():
                return None
            known = first != NOBODY
            self.pairs.append(np.stack([first[known], owner[known]]))
        return (Channels(first, zero=True),)

    def result(self) -> ScalableChannels:
        shared = _components(self.pairs, self.channels)
        classes = int(shared.max(initial=-1)) + 1
        free = np.ones(classes, np.bool_)
        for numbers in self.fixed:
            free[shared[numbers]] = False
        tensors = []
        for owner in self.observed.values():
            found = shared[np.unique(owner[owner != NOBODY])]
            tensors.append(np.stack([found[:-1], found[1:]]))
        return ScalableChannels(self.produced, self.read, self.observed, shared, _components(tensors, classes), free)


def _constants(node: ir.Node, mapped: MappedNode) -> list[ir.Value | None]:
    slot = 0 if mapped.constant_left else 1
    return [value for index, value in enumerate(node.inputs) if index != 1 - slot]


def _components(pairs: list[NDArray[np.int64]], size: int) -> NDArray[np.int64]:
    """Number of the connected component of each of `size` items, from pairs of shape (2, n)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate([np.empty((2, 0), np.int64), *pairs], axis=1)
    matrix = coo_array((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=(size, size))
    return np.asarray(connected_components(matrix, directed=False)[1], np.int64)
