"""What follows when kernels are dropped: rows that need not be stored, and kernels that are dropped with them.

A dropped kernel's output is exactly 0. Up to the mapped nodes that read it, as far as operators in between keep zeros,
so are the inputs of the rows that it feeds: these rows are not stored. Two things follow from that in turn:

* forward: a kernel none of whose rows is stored, as a depthwise kernel behind a dropped one, computes nothing but its
  bias; it is dropped too where all that reads it can make up for a constant;
* backward: a kernel that only dropped kernels read is dropped too: nobody misses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.channel_flow import ChannelFlow, Reader
    from raqu_onnx.layout import MappedNode

__all__ = ["DropRules", "Pruned"]


@dataclass(frozen=True)
class Pruned:
    """Widths of a model with all that follows from its dropped kernels.

    Attributes:
        bits: Bits per entry of the scale axis by node name, shape (channels,).
        stored: Rows that are stored by node name, shape (G, K); nodes that store all rows are absent.
    """

    bits: Mapping[str, NDArray[np.int64]]
    stored: Mapping[str, NDArray[np.bool_]]

    def row_counts(self, node: MappedNode) -> NDArray[np.int64] | None:
        """Stored rows of each group of a node, shape (G,); None where all are stored."""
        found = self.stored.get(node.name)
        return None if found is None else found.sum(axis=1)


class DropRules:
    """The mapped nodes of a model, seen as who reads which kernel.

    Args:
        nodes: The mapped nodes, in graph order.
        flows: What becomes of each node's output.

    Attributes:
        flows: The same.
    """

    def __init__(self, nodes: Sequence[MappedNode], flows: Mapping[str, ChannelFlow]) -> None:
        self._nodes = list(nodes)
        self._by_name = {node.name: node for node in nodes}
        self.flows = {node.name: flows[node.name] for node in nodes}
        self._index = {node.name: node.layout.channel_index() for node in nodes}
        self._absorbing = frozenset(name for name in self.flows if self.absorbs(name))
        self._zero_keepers = {
            name: [(reader.name, reader.owner, reader.owner >= 0) for reader in flow.readers if reader.keeps_zero]
            for name, flow in self.flows.items()
        }

    def absorbs(self, name: str) -> bool:
        """Whether all that reads a node has a bias that takes up a constant in one of its channels."""
        flow = self.flows[name]
        return flow.absorbable and all(self._by_name[reader.name].op_type != "MatMul" for reader in flow.readers)

    def tied(self, names: Iterable[str]) -> frozenset[str]:
        """Nodes none of whose kernels may be dropped where these are to keep all of theirs; they are among them.

        A node of several groups, such as a depthwise one, and a node that it reads are tied: a kernel dropped in
        either can leave one in the other without rows, or unread. In a node of one group all rows would have to go.
        """
        import networkx as nx

        graph: nx.Graph[str] = nx.Graph()
        graph.add_nodes_from(self.flows)
        for name, flow in self.flows.items():
            grouped = (reader.name for reader in flow.readers if self._by_name[reader.name].layout.groups > 1)
            graph.add_edges_from((name, other) for other in grouped)
        return frozenset[str]().union(*(nx.node_connected_component(graph, name) for name in names))

    def apply(self, bits: Mapping[str, NDArray[np.int64]]) -> Pruned:
        """Follow dropped kernels through the model.

        Args:
            bits: Bits per entry of the scale axis by node name, 0 for a dropped kernel.
        """
        widths = {name: np.array(found, np.int64) for name, found in bits.items()}
        stored: dict[str, NDArray[np.bool_]] = {}
        dropped = -1
        # What one direction drops may let the other drop more.
        while (found := sum(int(np.count_nonzero(w == 0)) for w in widths.values())) > max(dropped, 0):
            dropped = found
            self._drop_unread(widths)
            stored = self._follow(widths)
        return Pruned(widths, {name: rows for name, rows in stored.items() if not rows.all()})

    def _follow(self, widths: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[np.bool_]]:
        """Rows stored of nodes that may not store all, in graph order; kernels left without rows drop in `widths`."""
        stored: dict[str, NDArray[np.bool_]] = {}
        for node in self._nodes:
            if node.name in stored and node.name in self._absorbing:
                # Kernels that share an entry of the scale axis are dropped together or not at all.
                live = np.count_nonzero(stored[node.name], axis=1) > 0
                alive = np.bincount(self._index[node.name][live].reshape(-1), minlength=len(widths[node.name]))
                widths[node.name][alive == 0] = 0
            if widths[node.name].all():
                continue
            dropped: NDArray[np.bool_] = self._dropped(widths, node.name)
            for reader, owner, fed in self._zero_keepers[node.name]:
                rows = stored.setdefault(reader, np.ones(owner.shape, np.bool_))
                rows[fed] &= ~dropped[owner[fed]]
        return stored

    def _dropped(self, widths: Mapping[str, NDArray[np.int64]], name: str) -> NDArray[np.bool_]:
        """Whether each kernel is dropped, counted through the groups, shape (G * M,)."""
        zero: NDArray[np.bool_] = widths[name] == 0
        return zero[self._index[name].reshape(-1)]

    def _drop_unread(self, widths: dict[str, NDArray[np.int64]]) -> None:
        """Drop kernels that only dropped kernels read, from the end of the graph to its start."""
        for node in reversed(self._nodes):
            flow = self.flows[node.name]
            if flow.absorbable:
                read = np.zeros(node.layout.groups * node.layout.kernels, np.bool_)
                for reader in flow.readers:
                    read |= self._read_by(reader, widths, read.size)
                unread = np.bincount(self._index[node.name].reshape(-1), read, len(widths[node.name])) == 0
                widths[node.name][unread] = 0

    def _read_by(self, reader: Reader, widths: Mapping[str, NDArray[np.int64]], kernels: int) -> NDArray[np.bool_]:
        """Which of a node's kernels are read by one that is not dropped, shape (kernels,)."""
        owner = reader.owner
        if not widths[reader.name].all():
            dropped = self._dropped(widths, reader.name).reshape(self._index[reader.name].shape)
            owner = owner[~dropped.all(axis=1)]
        read = np.zeros(kernels, np.bool_)
        read[owner[owner >= 0]] = True
        return read
