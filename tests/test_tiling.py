from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx.encodings import Encoding, SignedEncoding
from raqu_onnx.errors import ChipError
from raqu_onnx.hardware import load_chip
from raqu_onnx.layout import WeightLayout
from raqu_onnx.tiling import ArrayGeometry, Matrix, column_order, tile

OFFSET = Encoding("offset", 2)

encodings = st.builds(Encoding, st.sampled_from(get_args(SignedEncoding)), st.integers(1, 4), st.booleans())


@st.composite
def geometries(draw: st.DrawFn) -> ArrayGeometry:
    encoding = draw(encodings)
    unit = encoding.scheme == "offset" and draw(st.booleans())
    return ArrayGeometry(draw(st.integers(2, 20)), draw(st.integers(2, 40)), encoding, unit, draw(st.booleans()))


@st.composite
def matrices(draw: st.DrawFn) -> Matrix:
    groups, kernels = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    width = st.sampled_from([0, 2, 3, 4, 5, 6, 7, 8])
    bits = draw(st.lists(width, min_size=groups * kernels, max_size=groups * kernels))
    rows = draw(st.integers(0, 50))
    stored = draw(st.none() | st.lists(st.integers(0, rows), min_size=groups, max_size=groups))
    counts = None if stored is None else np.array(stored, np.int64)
    return Matrix(groups, rows, np.array(bits, np.int64).reshape(groups, kernels), counts)


@given(matrix=matrices(), geometry=geometries())
def test_blocks_cut_every_group_without_gap_or_overlap(matrix: Matrix, geometry: ArrayGeometry) -> None:
    orders = [column_order(bits, geometry.encoding) for bits in matrix.bits]
    rows = matrix.row_counts.tolist()
    # A group of which no row is stored needs no crossbar.
    widest = [int(np.diff(order.starts).max(initial=0)) for order, count in zip(orders, rows, strict=True) if count]
    too_wide = [width for width in widest if width > geometry.weight_cols and not geometry.split_slices]
    if too_wide:
        with pytest.raises(
            ChipError, match=rf"^node 7: one kernel takes {too_wide[0]} columns, a crossbar has \d+ for "
        ):
            tile(matrix, geometry, where="node 7")
        return
    covered = [np.zeros((count, int(order.starts[-1])), int) for order, count in zip(orders, rows, strict=True)]
    for block in tile(matrix, geometry):
        (top, bottom), (left, right) = block.rows, block.columns
        covered[block.group][top:bottom, left:right] += 1
        assert top < bottom
        assert left < right
        assert block.height == (bottom - top) * geometry.encoding.rows_per_weight <= geometry.rows
        assert block.width == right - left + geometry.unit_column <= geometry.cols
        if not geometry.split_slices:
            assert {left, right} <= set(orders[block.group].starts.tolist())
    assert all((count == 1).all() for count in covered)
    per_cell = geometry.encoding.rows_per_weight * geometry.encoding.arrays_per_placement
    assert sum(count.size for count in covered) * per_cell == matrix.cells(geometry.encoding)


@given(matrix=matrices(), encoding=encodings)
def test_cells_and_bits_of_a_matrix(matrix: Matrix, encoding: Encoding) -> None:
    groups = [(int(rows), bits.tolist()) for rows, bits in zip(matrix.row_counts, matrix.bits, strict=True)]
    assert matrix.cells(encoding) == sum(rows * encoding.cells_per_weight(b) for rows, bits in groups for b in bits)
    assert matrix.weight_bits == sum(rows * sum(bits) for rows, bits in groups)


@given(bits=st.lists(st.sampled_from([0, *range(2, 9)]), max_size=20), encoding=encodings)
def test_columns_are_in_order_of_bits_then_kernel(bits: list[int], encoding: Encoding) -> None:
    order = column_order(np.array(bits, np.int64), encoding)
    expected = sorted((k for k, b in enumerate(bits) if b), key=lambda k: (-bits[k], k))
    assert order.kernels.tolist() == expected
    assert order.starts[0] == 0
    assert np.diff(order.starts).tolist() == [encoding.columns(bits[k]) for k in expected]


@given(
    rows=st.integers(1, 600),
    kernels=st.integers(1, 300),
    bits=st.integers(2, 8),
    size=st.sampled_from([32, 64, 100, 128]),
    unit=st.booleans(),
    split=st.booleans(),
)
def test_number_of_blocks_of_one_width(rows: int, kernels: int, bits: int, size: int, unit: bool, split: bool) -> None:
    geometry = ArrayGeometry(size, size, OFFSET, unit, split)
    width, limit = OFFSET.columns(bits), size - unit
    across = math.ceil(kernels * width / limit) if split else math.ceil(kernels / (limit // width))
    blocks = tile(Matrix(1, rows, np.full((1, kernels), bits)), geometry)
    assert len(blocks) == math.ceil(rows / size) * across


@given(matrix=matrices(), encoding=encodings, size=st.integers(16, 40))
def test_no_order_of_cuts_takes_fewer_blocks(matrix: Matrix, encoding: Encoding, size: int) -> None:
    """Cutting as late as possible is optimal for kernels in a given order: dynamic programming agrees."""
    geometry = ArrayGeometry(size, size, encoding)
    blocks = tile(matrix, geometry)
    for group in np.flatnonzero(matrix.row_counts).tolist():
        starts = column_order(matrix.bits[group], encoding).starts.tolist()
        fewest = [0] * len(starts)
        for end in range(1, len(starts)):
            fewest[end] = 1 + min(fewest[first] for first in range(end) if starts[end] - starts[first] <= size)
        top_row = [block for block in blocks if block.group == group and block.rows[0] == 0]
        assert len(top_row) == fewest[-1]


@pytest.mark.parametrize("split", [False, True])
def test_a_matrix_of_dropped_kernels_takes_no_block(split: bool) -> None:
    matrix = Matrix(2, 30, np.zeros((2, 5), np.int64))
    assert tile(matrix, ArrayGeometry(8, 8, OFFSET, split_slices=split)) == []
    assert matrix.cells(OFFSET) == 0


def test_a_matrix_without_stored_rows_takes_no_block() -> None:
    assert tile(Matrix(1, 0, np.full((1, 5), 8)), ArrayGeometry(8, 8, OFFSET)) == []


def test_only_groups_with_kernels_left_take_blocks() -> None:
    blocks = tile(Matrix(3, 4, np.array([[0, 0], [8, 0], [0, 0]])), ArrayGeometry(8, 8, OFFSET))
    assert [(block.group, block.rows, block.columns) for block in blocks] == [(1, (0, 4), (0, 4))]


def test_blocks_are_in_order_of_group_row_and_column() -> None:
    matrix = Matrix(2, 10, np.full((2, 4), 8))
    keys = [(block.group, block.rows, block.columns) for block in tile(matrix, ArrayGeometry(8, 8, OFFSET))]
    assert keys == sorted(keys)
    assert len(keys) == 2 * 2 * 2


def test_two_rows_per_weight_halve_what_fits() -> None:
    geometry = ArrayGeometry(9, 16, Encoding("differential-row", 2))
    assert geometry.weight_rows == 4
    heights = [block.height for block in tile(Matrix(1, 10, np.full((1, 2), 4)), geometry)]
    assert heights == [8, 8, 4]


def test_a_pair_of_arrays_counts_both() -> None:
    single = ArrayGeometry(8, 16, Encoding("differential-column", 2))
    pair = ArrayGeometry(8, 16, Encoding("differential-column", 2, True))
    assert (single.cells, pair.cells) == (128, 256)


def test_a_unit_column_takes_one_column_of_every_block() -> None:
    geometry = ArrayGeometry(16, 9, OFFSET, unit_column=True)
    assert geometry.weight_cols == 8
    assert [block.width for block in tile(Matrix(1, 16, np.full((1, 3), 8)), geometry)] == [9, 5]


@pytest.mark.parametrize(
    "geometry",
    [
        ArrayGeometry(1, 8, Encoding("differential-row", 2)),
        ArrayGeometry(8, 1, OFFSET, unit_column=True, split_slices=True),
    ],
)
def test_a_crossbar_too_small_for_any_weight(geometry: ArrayGeometry) -> None:
    with pytest.raises(ChipError, match=r"^stem: a crossbar of \d x \d cells cannot hold one weight$"):
        tile(Matrix(1, 1, np.array([[2]])), geometry, where="stem")


def test_geometry_of_a_chip() -> None:
    prime = load_chip("prime")
    geometry = ArrayGeometry.of(prime, prime.crossbars[0])
    assert (geometry.rows, geometry.cols) == (prime.crossbars[0].rows, prime.crossbars[0].cols)
    assert geometry.encoding == Encoding("differential-column", prime.crossbars[0].cell_bits, True)
    unit = prime.model_copy(update={"encoding": "offset", "polarity_arrays": "same", "offset_sum": "unit-column"})
    assert ArrayGeometry.of(unit, prime.crossbars[0]).unit_column
    split = prime.model_copy(update={"split_slices": True})
    assert ArrayGeometry.of(split, prime.crossbars[0]).split_slices
    assert not geometry.unit_column
    assert not geometry.split_slices


def test_bits_of_channels_reach_their_kernels() -> None:
    conv = WeightLayout("conv", (4, 2, 3, 3), 2)
    assert Matrix.of(conv, np.array([2, 3, 4, 5])).bits.tolist() == [[2, 3], [4, 5]]
    assert Matrix.of(conv, 8).bits.tolist() == [[8, 8], [8, 8]]
    assert Matrix.of(conv, 8).rows == 18
    # Groups of a transposed convolution share the scale axis, and so their widths.
    transposed = WeightLayout("conv-transpose", (4, 2, 3, 3), 2)
    assert Matrix.of(transposed, np.array([2, 3])).bits.tolist() == [[2, 3], [2, 3]]
