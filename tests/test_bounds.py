"""Lower bounds: by hand, and copies and rows that are not stored against the same nodes written out."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.bounds import DoesNotFitError, fewest_cells, fewest_crossbars
from raqu_onnx.encodings import Encoding
from raqu_onnx.hardware import Sharing
from raqu_onnx.tiling import ArrayGeometry, Matrix

OFFSET = Encoding("offset", 2)
shapes = st.builds(
    ArrayGeometry,
    rows=st.integers(2, 12),
    cols=st.integers(5, 20),
    encoding=st.builds(Encoding, st.just("offset"), st.integers(2, 4)),
    unit_column=st.booleans(),
)


def square(size: int) -> ArrayGeometry:
    return ArrayGeometry(size, size, OFFSET)


def uniform(rows: int, kernels: int, bits: int) -> Matrix:
    return Matrix(1, rows, np.full((1, kernels), bits))


@st.composite
def matrices(draw: st.DrawFn) -> Matrix:
    groups, kernels, rows = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 30))
    bits = draw(st.lists(st.sampled_from([0, 2, 5, 8]), min_size=groups * kernels, max_size=groups * kernels))
    stored = draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups))
    return Matrix(groups, rows, np.array(bits).reshape(groups, kernels), np.array(stored, np.int64))


def test_large_counts_are_exact() -> None:
    """The integer program's bound of many crossbars is neither rounded nor off by the solver's gap."""
    types, cells = [square(128), square(64)], 16384 * 33776 + 1
    assert fewest_crossbars([uniform(cells, 1, 2)], types, [None, 7]) == 33777
    assert fewest_crossbars([uniform(cells - 1, 1, 2)], types, [None, 7]) == 33776


def test_copies_by_hand() -> None:
    # 10 x 4 columns of 16: 40 cells a copy; 3 copies are 120 of 256 cells, 30 of 16 rows and 12 of 16 columns.
    for sharing, expected in (("time", 1), ("diagonal", 2), ("exclusive", 3)):
        assert fewest_crossbars([uniform(10, 1, 8)], [square(16)], [None], sharing, [3]) == expected  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    st.lists(st.tuples(matrices(), st.integers(1, 4)), min_size=1, max_size=3),
    st.lists(shapes, min_size=1, max_size=2),
    st.sampled_from(get_args(Sharing)),
)
def test_copies_are_nodes_of_their_own(
    nodes: list[tuple[Matrix, int]], types: list[ArrayGeometry], sharing: Sharing
) -> None:
    """Nodes that differ in a row more are not merged, and cannot take less than copies of the smaller one."""
    alone, counts = [matrix for matrix, _ in nodes], [count for _, count in nodes]
    free = [None] * len(types)
    for bound in (fewest_crossbars, fewest_cells):
        found = bound(alone, types, free, sharing, counts)
        assert found >= bound(alone, types, free, sharing)
        written_out = [
            Matrix(m.groups, m.rows + n, m.bits, m.row_counts + n * (m.row_counts > 0))
            for m, count in nodes
            for n in range(count)
        ]
        assert bound(written_out, types, free, sharing) >= found


@settings(deadline=None)
@given(matrices(), st.lists(shapes, min_size=1, max_size=2), st.sampled_from(get_args(Sharing)))
def test_rows_that_are_not_stored_take_nothing(matrix: Matrix, types: list[ArrayGeometry], sharing: Sharing) -> None:
    """Groups by themselves, cut down to what is stored, take as much where nothing is rounded up node by node."""
    apart = [
        Matrix(1, int(rows), bits[None]) for rows, bits in zip(matrix.row_counts, matrix.bits, strict=True) if rows
    ]
    free = [None] * len(types)
    for bound in (fewest_crossbars, fewest_cells):
        together, alone = bound([matrix], types, free, sharing), bound(apart, types, free, sharing)
        assert together <= alone
        if sharing != "exclusive":
            assert together == alone


def test_a_chip_of_several_types_that_is_too_small() -> None:
    with pytest.raises(DoesNotFitError, match="more cells than the chip"):
        fewest_crossbars([uniform(16, 4, 8)], [square(8), square(4)], [2, 3])
