"""Weight tensors as matrices; what the matrices compute is tested with the vectors, in test_patches.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx.layout import MappedNode, WeightLayout

SIZES = st.integers(1, 4)


@st.composite
def layouts(draw: st.DrawFn) -> WeightLayout:
    kind = draw(st.sampled_from(["conv", "conv-transpose", "in-out", "out-in"]))
    first, second = draw(SIZES), draw(SIZES)
    if kind in ("in-out", "out-in"):
        return WeightLayout(kind, (first, second))
    groups = draw(SIZES)
    spatial = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    return WeightLayout(kind, (groups * first, second, *spatial), groups)


def numbered(layout: WeightLayout) -> np.ndarray:
    return np.arange(np.prod(layout.shape), dtype=np.float32).reshape(layout.shape)


@given(layouts())
def test_matrices_hold_every_weight_once(layout: WeightLayout) -> None:
    matrices = layout.to_matrices(numbered(layout))
    assert matrices.shape == (layout.groups, layout.rows, layout.kernels)
    np.testing.assert_array_equal(np.sort(matrices, axis=None), np.arange(matrices.size))


@given(layouts())
def test_from_matrices_is_the_inverse(layout: WeightLayout) -> None:
    weight = numbered(layout)
    back = layout.from_matrices(layout.to_matrices(weight))
    assert back.shape == weight.shape
    assert back.dtype == weight.dtype
    np.testing.assert_array_equal(back, weight)
    # The way round too: matrices that were made without a tensor.
    matrices = np.arange(weight.size).reshape(layout.groups, layout.rows, layout.kernels)
    np.testing.assert_array_equal(layout.to_matrices(layout.from_matrices(matrices)), matrices)


@given(layouts())
def test_a_tensor_made_from_matrices_stands_alone(layout: WeightLayout) -> None:
    """It lies in memory as ONNX writes it."""
    assert layout.from_matrices(layout.to_matrices(numbered(layout))).flags.c_contiguous


@given(layouts())
def test_channels_are_where_the_scales_lie(layout: WeightLayout) -> None:
    """Weights marked by their position on the scale axis arrive in the kernels that `channel_index` names."""
    index = np.arange(layout.channels).reshape([-1 if i == layout.scale_axis else 1 for i in range(len(layout.shape))])
    matrices = layout.to_matrices(np.broadcast_to(index, layout.shape))
    expected = np.broadcast_to(layout.channel_index()[:, None, :], matrices.shape)
    np.testing.assert_array_equal(matrices, expected)


def test_rows_of_a_convolution_are_in_the_order_of_the_tensor() -> None:
    weight = np.arange(4 * 3 * 2 * 2).reshape(4, 3, 2, 2)
    matrices = WeightLayout("conv", weight.shape, 2).to_matrices(weight)
    assert matrices.shape == (2, 12, 2)
    np.testing.assert_array_equal(matrices[1], weight[2:4].reshape(2, -1).T)


def test_the_kernel_of_a_transposed_convolution_is_flipped() -> None:
    weight = np.arange(4 * 1 * 3).reshape(4, 1, 3)
    matrices = WeightLayout("conv-transpose", weight.shape, 2).to_matrices(weight)
    np.testing.assert_array_equal(matrices[:, :, 0], [[2, 1, 0, 5, 4, 3], [8, 7, 6, 11, 10, 9]])


def test_groups_of_a_transposed_convolution_share_their_scales() -> None:
    layout = WeightLayout("conv-transpose", (6, 2, 3, 3), 3)
    assert layout.scale_axis == 1
    assert layout.channels == 2
    np.testing.assert_array_equal(layout.channel_index(), [[0, 1], [0, 1], [0, 1]])


@pytest.mark.parametrize(
    ("kind", "rows", "kernels", "axis"), [("in-out", 5, 3, 1), ("out-in", 3, 5, 0)], ids=["in-out", "out-in"]
)
def test_linear_layouts(kind: str, rows: int, kernels: int, axis: int) -> None:
    layout = WeightLayout(kind, (5, 3))
    assert (layout.rows, layout.kernels, layout.scale_axis, layout.groups) == (rows, kernels, axis, 1)


@given(layouts())
def test_a_node_counts_its_weights(layout: WeightLayout) -> None:
    node = MappedNode("n", "Conv", "x", "w", None, "y", layout)
    assert node.weights == np.prod(layout.shape)
