"""Fewest crossbars, and fewest cells, that any placement of a model could take.

Every way of cutting the matrices into blocks is allowed for, so that no tiling beats these bounds. Per node and
crossbar type, with `K` stored rows and `N` columns of a group, `R` and `C` lines of a crossbar, they rest on three sums
over its blocks:

* cells: at least `K * N`, with one more column per column block where blocks end in a unit column;
* rows: every row of the matrix runs through at least as many blocks as its columns need, `ceil(N / C)` (more where
  whole kernels leave columns over), so that heights add up to at least `K * ceil(N / C)`;
* columns: in the same way, widths add up to at least `N * ceil(K / R)`.

Blocks in a crossbar do not overlap (`time`: its cells bound the first sum), or share neither rows nor columns
(`diagonal`: its lines bound the other two as well; `exclusive`: the same for every node by itself, rounded up node by
node). With several crossbar types an integer program splits every group freely over the types.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.errors import ChipError
from raqu_onnx.native_output import no_native_output
from raqu_onnx.tiling import Matrix, column_cuts, column_order

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.hardware import Sharing
    from raqu_onnx.tiling import ArrayGeometry

__all__ = ["Demand", "DoesNotFitError", "demand", "fewest_cells", "fewest_crossbars", "fewest_slots"]


class DoesNotFitError(ChipError):
    """The chip has fewer crossbars than the model needs."""


@dataclass(frozen=True)
class Demand:
    """What the blocks of a node take at least of one crossbar type's slots, summed over all of them.

    Attributes:
        cells: Cells of one array, unit columns included.
        rows: Wordlines.
        cols: Bitlines.
        thin_cells: Cells per whole node where only a share of it lies on the type: a fraction, at most `cells`.
        thin_rows: Wordlines in the same case.
        thin_cols: Bitlines in the same case.
    """

    cells: int = 0
    rows: int = 0
    cols: int = 0
    thin_cells: float = 0.0
    thin_rows: float = 0.0
    thin_cols: float = 0.0

    def __add__(self, other: Demand) -> Demand:
        return Demand(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, count: int) -> Demand:
        """The demand of `count` such groups."""
        return Demand(*(count * value for value in astuple(self)))


def demand(matrix: Matrix, geometry: ArrayGeometry, *, partly: bool = False) -> Demand | None:
    """What a node takes of a crossbar type.

    Args:
        matrix: The node's weights.
        geometry: The type.
        partly: Kernels that are too wide for this type lie on another one.

    Returns:
        The demand; only its fractions mean anything with `partly`. None where a kernel is too wide, or all are.
    """
    if geometry.weight_rows < 1 or geometry.weight_cols < 1:
        return None if matrix.cells(geometry.encoding) else Demand()
    # Groups that store as many rows and have the same bits are alike; those without stored rows take nothing.
    patterns, counts = np.unique(np.column_stack([matrix.row_counts, matrix.bits]), axis=0, return_counts=True)
    total = None if patterns[:, 0].any() else Demand()
    for (rows, *bits), count in zip(patterns.tolist(), counts.tolist(), strict=True):
        if not rows:
            continue
        order = column_order(np.array(bits, np.int64), geometry.encoding)
        widths = np.diff(order.starts)
        if partly and (geometry.split_slices or not widths.size or widths.min() <= geometry.weight_cols):
            cuts = 0
        else:
            try:
                cuts = len(column_cuts(order, geometry, "matrix"))
            except ChipError:
                if partly:
                    continue
                return None
        found = _of_group(rows, int(order.starts[-1]), cuts, geometry).times(count)
        total = found if total is None else total + found
    return total


def _of_group(rows: int, columns: int, cuts: int, geometry: ArrayGeometry) -> Demand:
    if not rows or not columns:
        return Demand()
    height = rows * geometry.encoding.rows_per_weight
    blocks_down = math.ceil(rows / geometry.weight_rows)
    unit = int(geometry.unit_column)
    return Demand(
        cells=height * (columns + unit * cuts),
        rows=height * cuts,
        cols=blocks_down * (columns + unit * cuts),
        thin_cells=height * columns * (1 + unit / geometry.weight_cols),
        thin_rows=height * columns / min(columns, geometry.weight_cols),
        thin_cols=rows * columns / min(rows, geometry.weight_rows),
    )


def fewest_crossbars(
    nodes: Sequence[Matrix],
    shapes: Sequence[ArrayGeometry],
    counts: Sequence[int | None],
    sharing: Sharing = "time",
    copies: Sequence[int] | None = None,
) -> int:
    """Fewest physical crossbars that could hold the weights under a sharing mode.

    Args:
        nodes: Weights of every node.
        shapes: The crossbar types.
        counts: Crossbars of each type, None for any number.
        sharing: What may share a crossbar.
        copies: Copies of each node, None for one.

    Raises:
        DoesNotFitError: The crossbars of several types together are too few by this bound.
    """
    if len(shapes) == 1:
        return _slots(_by_node(nodes, shapes, copies), shapes[0], sharing) * shapes[0].encoding.arrays_per_placement
    costs = [shape.encoding.arrays_per_placement for shape in shapes]
    return _several_types(_by_group(nodes, shapes, copies), shapes, counts, sharing, costs)


def fewest_cells(
    nodes: Sequence[Matrix],
    shapes: Sequence[ArrayGeometry],
    counts: Sequence[int | None],
    sharing: Sharing = "time",
    copies: Sequence[int] | None = None,
) -> int:
    """Fewest cells of allocated crossbars that could hold the weights; see `fewest_crossbars`."""
    if len(shapes) == 1:
        return _slots(_by_node(nodes, shapes, copies), shapes[0], sharing) * shapes[0].cells
    costs = [shape.cells for shape in shapes]
    return _several_types(_by_group(nodes, shapes, copies), shapes, counts, sharing, costs)


#: Demand of a node, or of one of its groups, on each type, and how many of it there are.
_Demands = list[tuple[tuple[Demand | None, ...], int]]


def _by_node(nodes: Sequence[Matrix], shapes: Sequence[ArrayGeometry], copies: Sequence[int] | None) -> _Demands:
    """What each node takes; nodes that are alike count as copies, and those that take nothing are left out."""
    found: dict[tuple[Demand | None, ...], int] = {}
    for matrix, count in zip(nodes, (1,) * len(nodes) if copies is None else copies, strict=True):
        own = tuple(demand(matrix, shape) for shape in shapes)
        if any(part is None or part.cells for part in own):
            found[own] = found.get(own, 0) + count
    return list(found.items())


def _by_group(
    nodes: Sequence[Matrix], shapes: Sequence[ArrayGeometry], copies: Sequence[int] | None
) -> list[tuple[_Demands, int]]:
    """What the groups of each node take, and how many copies of the node there are.

    Groups of one node may differ in shape, and so in how many lines a share of their cells takes: each is split by
    itself.
    """
    found: dict[tuple[tuple[tuple[Demand | None, ...], int], ...], int] = {}
    for matrix, count in zip(nodes, (1,) * len(nodes) if copies is None else copies, strict=True):
        rows = np.column_stack([matrix.row_counts, matrix.bits])
        patterns, numbers = np.unique(rows, axis=0, return_counts=True)
        groups = tuple(
            (own, int(number))
            for pattern, number in zip(patterns, numbers, strict=True)
            if pattern[0] and pattern[1:].any()
            for own in [tuple(demand(Matrix(1, int(pattern[0]), pattern[None, 1:]), s, partly=True) for s in shapes)]
        )
        if groups:
            found[groups] = found.get(groups, 0) + count
    return [(list(groups), count) for groups, count in found.items()]


def _slots(demands: _Demands, shape: ArrayGeometry, sharing: Sharing) -> int:
    """Slots of one type."""
    fitting = [(own[0], count) for own, count in demands if own[0] is not None]
    if len(fitting) < len(demands):
        raise ChipError(f"one kernel is wider than a crossbar of {shape.rows} x {shape.cols} cells")
    if sharing == "exclusive":
        return sum(count * fewest_slots([part], shape, sharing) for part, count in fitting)
    return fewest_slots([part.times(count) for part, count in fitting], shape, sharing)


def fewest_slots(demands: Sequence[Demand], shape: ArrayGeometry, sharing: Sharing) -> int:
    """Fewest slots of one type (a slot is a crossbar, or a pair of them) for nodes that lie on it alone."""
    if sharing == "exclusive":
        return sum(_alone(part, shape, lines=True) for part in demands)
    return _alone(sum(demands, Demand()), shape, lines=sharing == "diagonal")


def _alone(part: Demand, shape: ArrayGeometry, *, lines: bool) -> int:
    # An odd row of a crossbar is of no use where a weight takes two.
    rows = shape.weight_rows * shape.encoding.rows_per_weight
    if not part.cells:
        return 0
    cells = math.ceil(part.cells / (rows * shape.cols))
    return max(cells, math.ceil(part.rows / rows), math.ceil(part.cols / shape.cols)) if lines else cells


def _several_types(
    nodes: Sequence[tuple[_Demands, int]],
    shapes: Sequence[ArrayGeometry],
    counts: Sequence[int | None],
    sharing: Sharing,
    costs: Sequence[int],
) -> int:
    """Least cost; every group's cells may be split freely over the types."""
    if not nodes:
        return 0
    demands = [(own, number * count) for groups, count in nodes for own, number in groups]
    limits = [
        None if count is None else count // shape.encoding.arrays_per_placement
        for count, shape in zip(counts, shapes, strict=True)
    ]
    together = _program(demands, shapes, limits, costs, lines=sharing != "time")
    if sharing != "exclusive":
        return together
    # Crossbars serve one node each; what one takes by itself is rounded up by itself.
    alone = (count * _program(groups, shapes, limits, costs, lines=True) for groups, count in nodes)
    return max(together, sum(alone))


def _program(
    demands: _Demands,
    shapes: Sequence[ArrayGeometry],
    limits: Sequence[int | None],
    costs: Sequence[int],
    *,
    lines: bool,
) -> int:
    from scipy.optimize import Bounds, LinearConstraint, milp

    nodes, types = len(demands), len(shapes)
    # Costs are whole multiples of this unit, and so is the least of them.
    unit = math.gcd(*costs)
    # Variables: slots n[t], then how much x[node, t] of every node, all copies together, lies on every type. Copies
    # are alike, so that what serves all together serves each with an equal part of it.
    cost = np.concatenate([np.array(costs) / unit, np.zeros(nodes * types)])
    possible = [float(count if part is not None else 0) for own, count in demands for part in own]
    upper = np.concatenate([[np.inf if limit is None else limit for limit in limits], possible])
    whole = np.zeros((nodes, types + nodes * types))
    for n in range(nodes):
        whole[n, types + n * types : types + (n + 1) * types] = 1
    amounts = [float(count) for _, count in demands]
    capacity = np.concatenate(list(_capacities(demands, shapes, lines=lines)))
    with no_native_output():
        result = milp(
            cost,
            integrality=np.concatenate([np.ones(types, np.int64), np.zeros(nodes * types, np.int64)]),
            bounds=Bounds(np.zeros_like(upper), upper),
            constraints=[LinearConstraint(capacity, 0, np.inf), LinearConstraint(whole, amounts, amounts)],
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        raise DoesNotFitError("the weights have more cells than the chip; use fewer bits or a larger chip")
    # The solver's own bound, not its solution: only that one is never too high.
    return math.ceil(result.mip_dual_bound - 1e-6) * unit


def _capacities(demands: _Demands, shapes: Sequence[ArrayGeometry], *, lines: bool) -> Iterable[NDArray[np.float64]]:
    """Rows of constraints: slots of a type, less what the nodes' shares take of them, are not negative."""
    types = len(shapes)
    for t, shape in enumerate(shapes):
        rows = shape.weight_rows * shape.encoding.rows_per_weight
        if not rows:
            continue
        parts = [own[t] or Demand() for own, _ in demands]
        takes = [[part.thin_cells / (rows * shape.cols) for part in parts]]
        if lines:
            takes.append([part.thin_rows / rows for part in parts])
            takes.append([part.thin_cols / shape.cols for part in parts])
        table = np.zeros((len(takes), types + len(demands) * types))
        table[:, t] = 1
        table[:, types + t :: types] = -np.array(takes)
        yield table
