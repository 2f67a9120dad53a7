"""When mapped nodes compute: order, dependencies, and what must take turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.manifest_entries import StageEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.manifest_entries import NodeEntry
    from raqu_onnx.placement import PlacedBlock, Placement

__all__ = ["assign_turns", "clashes", "execution_order", "rivals_of", "stage_entries"]


def execution_order(model: ir.Model, names: Iterable[str]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Order of the mapped nodes of a graph, and the nearest mapped nodes that each depends on.

    Args:
        model: A model whose nodes are in topological order.
        names: Names of its mapped nodes.
    """
    from raqu_onnx.graph_edit import subgraphs_of

    wanted = set(names)
    behind: dict[ir.Value, frozenset[str]] = {}
    order: list[str] = []
    found: dict[str, tuple[str, ...]] = {}

    def read_by(node: ir.Node) -> Iterable[ir.Value | None]:
        yield from node.inputs
        for body in subgraphs_of(node):
            for inner in body:
                yield from read_by(inner)

    for node in model.graph:
        sources = frozenset().union(*(behind.get(value, frozenset()) for value in read_by(node) if value is not None))
        if node.name in wanted:
            found[node.name] = tuple(sorted(sources, key=order.index))
            order.append(node.name)
            sources = frozenset({node.name})
        behind.update(dict.fromkeys(node.outputs, sources))
    return tuple(order), found


def assign_turns(blocks: Sequence[PlacedBlock]) -> list[int]:
    """First turn of each block in which no earlier block of the node stands against it (greedy colouring)."""
    turns = [0] * len(blocks)
    by_crossbar: dict[tuple[int, int], list[int]] = {}
    for index, placed in enumerate(blocks):
        by_crossbar.setdefault((placed.crossbar_type, placed.crossbar), []).append(index)
    for members in by_crossbar.values():
        if len(members) == 1:
            continue
        clash = clashes(
            np.array([(blocks[i].row, blocks[i].row + blocks[i].block.height) for i in members]),
            np.array([(blocks[i].col, blocks[i].col + blocks[i].block.width) for i in members]),
        )
        chosen = np.full(len(members), -1)
        for n, index in enumerate(members):
            taken = set(chosen[:n][clash[n, :n]].tolist())
            chosen[n] = turns[index] = next(turn for turn in range(n + 1) if turn not in taken)
    return turns


def clashes(rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rectangles share rows or columns, shape (n, n)."""
    shared = [
        (lines[:, None, 0] < lines[None, :, 1]) & (lines[None, :, 0] < lines[:, None, 1]) for lines in (rows, cols)
    ]
    return np.asarray(shared[0] | shared[1])


def stage_entries(
    order: Sequence[str],
    predecessors: Mapping[str, Sequence[str]],
    nodes: Sequence[NodeEntry],
    placement: Placement,
) -> tuple[StageEntry, ...]:
    """One stage per mapped node, without its costs.

    Args:
        order: Names of the mapped nodes in a valid order of execution.
        predecessors: The nearest mapped nodes that each depends on.
        nodes: Their entries, with turns assigned.
        placement: Where everything lies.
    """
    rivals = rivals_of(placement.blocks)
    part = {name: index for index, partition in enumerate(placement.parts) for name in partition.nodes}
    turns = {node.name: max((p.turn + 1 for p in node.placements), default=0) for node in nodes}
    rank = {name: index for index, name in enumerate(order)}
    return tuple(
        StageEntry(
            node=name,
            partition=part[name],
            after=tuple(predecessors.get(name, ())),
            turns=turns[name],
            shares_with=tuple(sorted(rivals.get(name, ()), key=rank.__getitem__)),
            cycles=None,
            start=None,
            energy_pj=None,
        )
        for name in order
    )


def rivals_of(blocks: Sequence[PlacedBlock]) -> dict[str, set[str]]:
    """Nodes with blocks in the same rows or columns of a crossbar as a node."""
    by_crossbar: dict[tuple[int, int], list[PlacedBlock]] = {}
    for placed in blocks:
        by_crossbar.setdefault((placed.crossbar_type, placed.crossbar), []).append(placed)
    rivals: dict[str, set[str]] = {}
    for members in by_crossbar.values():
        if len({placed.node for placed in members}) == 1:
            continue
        clash = clashes(
            np.array([(p.row, p.row + p.block.height) for p in members]),
            np.array([(p.col, p.col + p.block.width) for p in members]),
        )
        for first, second in np.argwhere(np.triu(clash, 1)).tolist():
            one, other = members[first].node, members[second].node
            if one != other:
                rivals.setdefault(one, set()).add(other)
                rivals.setdefault(other, set()).add(one)
    return rivals
