"""Where the output channels of a mapped node are read, and by whom.

A kernel that is dropped leaves one channel of its node's output at 0. Mapped nodes that read this channel can make up
for it with the weights of the other channels, if nothing else sees it; and where the channel is 0 at every position,
they need not store the rows that it feeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.annotations import MAPPED, mapped_nodes
from raqu_onnx.channel_steps import advance
from raqu_onnx.channels import Channels

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.layout import MappedNode

__all__ = ["ChannelFlow", "Reader", "channel_flows", "first_channels", "reader_rows"]


@dataclass(frozen=True)
class Reader:
    """A mapped node that reads channels of another one, each in rows of its own.

    Attributes:
        name: The reader.
        owner: Kernel of the node read, counted through its groups (`g * M + m`), that feeds each row of the reader's
            matrices, shape (G, K) of the reader; -1 for rows that something else feeds.
        keeps_zero: A kernel whose output is 0 everywhere feeds exactly 0 to all its rows.
        passing: Interval of the kernels' outputs in which a small change of them reaches the reader, as far as that is
            known: from 0 on behind Relu.
        positions: Positions of the output that are averaged into one on the way; NaN for all of an unknown number.
    """

    name: str
    owner: NDArray[np.int64]
    keeps_zero: bool
    passing: tuple[float, float] = (-math.inf, math.inf)
    positions: float = 1.0

    def rows(self, kernel: int) -> tuple[tuple[int, NDArray[np.int64]], ...]:
        """Rows that a kernel feeds: each of the reader's groups that has any, with its rows in rising order."""
        groups, rows = np.nonzero(self.owner == kernel)
        return tuple((int(group), rows[groups == group]) for group in np.unique(groups))


@dataclass(frozen=True)
class ChannelFlow:
    """What becomes of a mapped node's output.

    Attributes:
        name: The node.
        readers: Mapped nodes that read its channels through operators that keep them apart, in graph order.
        escapes: Everything else that becomes of the output, in words; nothing makes up for a channel that is missed
            there.
        reaches_output: Part of the output reaches an output of the model without another mapped node in between,
            whose bias could take up a change of its mean.
    """

    name: str
    readers: tuple[Reader, ...]
    escapes: tuple[str, ...]
    reaches_output: bool

    @property
    def absorbable(self) -> bool:
        """Whether all that reads the output can make up for a channel that is missing."""
        return bool(self.readers) and not self.escapes


def channel_flows(model: ir.Model) -> dict[str, ChannelFlow]:
    """Follow the output of every mapped node, by name in graph order.

    Args:
        model: The tidied and mapped model.

    Raises:
        MissingAnnotationError: No node is mapped.
    """
    order = {node: index for index, node in enumerate(model.graph)}
    return {MAPPED.require(node).name: _Walk(node, order).flow() for node in mapped_nodes(model)}


@dataclass
class _Walk:
    """One node's output, followed in graph order."""

    source: ir.Node
    order: Mapping[ir.Node, int]
    states: dict[ir.Value | None, Channels] = field(default_factory=dict)
    # Values in which channels can no longer be told apart.
    mixed: set[ir.Value] = field(default_factory=set)
    readers: list[Reader] = field(default_factory=list)
    escapes: list[str] = field(default_factory=list)
    reaches_output: bool = False

    def flow(self) -> ChannelFlow:
        mapped = MAPPED.require(self.source)
        output = self.source.outputs[0]
        start = first_channels(mapped, output)
        if start is None:
            self.mixed.add(output)
            self.escapes.append(f"the shape of '{output.name}' is not known")
        else:
            self.states[output] = start
        pending = self._readers_of(output)
        while pending:
            # Every node after all those that it reads from.
            node = min(pending, key=self.order.__getitem__)
            pending.remove(node)
            for value in self._visit(node):
                pending |= self._readers_of(value)
        return ChannelFlow(mapped.name, tuple(self.readers), tuple(self.escapes), self.reaches_output)

    def _readers_of(self, value: ir.Value) -> set[ir.Node]:
        """Nodes of the main graph that read a value; what lies elsewhere is noted."""
        if value.is_graph_output():
            self._leave(value, f"'{value.name}' is an output of the model")
        found = {use.node for use in value.uses()}
        inside = {node for node in found if node not in self.order}
        if inside:
            # What a body makes of it may go anywhere.
            self._leave(value, f"the body of a control-flow node reads '{value.name}'")
        return found - inside

    def _leave(self, value: ir.Value, reason: str) -> None:
        self.reaches_output = True
        if value not in self.mixed:
            self.escapes.append(reason)

    def _visit(self, node: ir.Node) -> list[ir.Value]:
        """Note what a node does with the values that it reads; returns its outputs that go on."""
        mapped = MAPPED.get(node)
        if mapped is not None:
            self._read(node, mapped)
            return []
        if any(value in self.mixed for value in node.inputs if value is not None):
            if any(value in self.states for value in node.inputs):
                self.escapes.append(f"{node.op_type} '{node.name}' mixes it with another value")
            return self._mix(node)
        found = advance(node, self.states)
        if isinstance(found, str):
            self.escapes.append(found)
            return self._mix(node)
        outputs = node.outputs[: len(found)]
        self.states.update(zip(outputs, found, strict=True))
        return list(outputs)

    def _mix(self, node: ir.Node) -> list[ir.Value]:
        self.mixed.update(node.outputs)
        return list(node.outputs)

    def _read(self, node: ir.Node, mapped: MappedNode) -> None:
        value = node.inputs[1 if mapped.constant_left else 0]
        channels = self.states.get(value)
        if channels is None:
            return
        owner = reader_rows(mapped, channels.owner)
        if owner is None:
            self.escapes.append(f"{mapped.op_type} '{mapped.name}' reads its channels side by side in the same rows")
        else:
            passing = channels.low, channels.high
            self.readers.append(Reader(mapped.name, owner, channels.zero, passing, channels.positions))


def first_channels(mapped: MappedNode, output: ir.Value) -> Channels | None:
    """Channels of a mapped node's own output, counted through its groups; None where their axis is not known."""
    kernels = mapped.layout.groups * mapped.layout.kernels
    if mapped.window is not None:
        rank, axis = len(mapped.window.kernel) + 2, 1
    elif mapped.op_type == "Gemm":
        rank, axis = 2, 1
    elif output.shape is None:
        return None
    else:
        rank = len(output.shape)
        axis = rank - 2 if mapped.constant_left else rank - 1
    if axis < 1:
        return None
    shape = [1] * (rank - 1)
    shape[axis - 1] = kernels
    return Channels(np.arange(kernels).reshape(shape), zero=True)


def reader_rows(mapped: MappedNode, owner: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Kernel that feeds each row of a reader, shape (G, K); None where one row is fed by several."""
    layout = mapped.layout
    if mapped.window is not None:
        axis = 0
        rows = layout.groups * layout.rows // int(np.prod(mapped.window.kernel))
    else:
        axis = owner.ndim - 2 if mapped.constant_left else owner.ndim - 1
        rows = layout.rows
    if mapped.input_transposed or axis < 0 or owner.shape[axis] != owner.size:
        return None
    # Every channel of a convolution has one row for each position of the window.
    each = np.broadcast_to(owner.reshape(-1), rows)
    return np.ascontiguousarray(
        np.repeat(each, layout.groups * layout.rows // rows).reshape(layout.groups, layout.rows)
    )
