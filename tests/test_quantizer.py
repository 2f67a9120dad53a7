"""Codes, scales and biases of mapped nodes at any width, as the search and the emitted model use them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.annotations import NodeBits
from raqu_onnx.layout import MappedNode, WeightLayout, Window
from raqu_onnx.quantizer import ModelQuantizer, NodeSource, QuantizerSettings
from raqu_onnx.ranges import activation_quantizer
from raqu_onnx.statistics import Histogram, InputMoments

if TYPE_CHECKING:
    pass

CONV = WeightLayout("conv", (4, 3, 2, 2))
DECONV = WeightLayout("conv-transpose", (4, 3, 2, 2), 2)
GEMM = WeightLayout("in-out", (12, 4))


def source_of(
    layout: WeightLayout = GEMM,
    *,
    op_type: str | None = None,
    bias: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    calibrated: bool = True,
    name: str = "n",
    input_name: str = "x",
    size: float = 1.0,
) -> NodeSource:
    window = None
    if layout.kind.startswith("conv"):
        window = Window((2, 2), (1, 1), (1, 1), (0, 0, 0, 0), transposed=layout.kind == "conv-transpose")
    node = MappedNode(
        name, op_type or ("Conv" if window else "Gemm"), input_name, "w", "b" if bias is not None else None, "y", layout
    )
    rng = np.random.default_rng(0)
    if weight is None:
        weight = rng.normal(size=layout.shape).astype(np.float32)
    histogram = moments = None
    if calibrated:
        x = np.abs(rng.normal(size=(100, layout.groups, layout.rows)) * size).astype(np.float32)
        histogram, moments = Histogram(), InputMoments(layout.groups, layout.rows)
        histogram.update(x)
        moments.update(x)
    return NodeSource(node, weight, bias, histogram, moments)


def quantizer_of(*sources: NodeSource, **options: str) -> ModelQuantizer:
    scheme = options.pop("scheme", "offset")
    settings = QuantizerSettings(**options)  # type: ignore[arg-type]
    return ModelQuantizer({s.node.name: s for s in sources}, scheme, settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", [CONV, DECONV, GEMM, WeightLayout("out-in", (4, 12))])
def test_a_quantized_node_decodes_to_what_was_fitted(layout: WeightLayout) -> None:
    outputs = layout.groups * layout.kernels
    bias = np.linspace(-2, 3, outputs).astype(np.float32)
    source = source_of(layout, bias=bias)
    quantizer = quantizer_of(source)
    bits = (0, 2, 3, 8)[: layout.channels]
    node = quantizer.quantize("n", NodeBits(bits, 5))
    fit = quantizer.fit("n", np.array(bits))
    np.testing.assert_array_equal(node.bits, bits)
    assert node.codes.shape == layout.shape
    assert node.codes.dtype == np.int8
    per_kernel = node.scales[layout.channel_index()][:, None, :]
    np.testing.assert_array_equal(layout.to_matrices(node.weight()), (fit.codes * per_kernel).astype(np.float32))
    assert node.bias is not None
    assert node.activation is not None
    assert node.bias.dtype == np.int32
    step = (np.float32(node.activation.scale) * node.scales[layout.channel_index().reshape(-1)]).astype(np.float32)
    np.testing.assert_array_equal(node.bias_scales(), step)
    expected = bias + fit.bias_shift.reshape(-1)
    expected[layout.channel_index().reshape(-1) == 0] = 0  # the dropped kernels
    np.testing.assert_allclose(node.real_bias(), expected, rtol=1e-5, atol=step.max() / 2)
    assert not node.bias[layout.channel_index().reshape(-1) == 0].any()


def test_a_bias_takes_the_mean_error_even_where_there_was_none() -> None:
    quantizer = quantizer_of(source_of(CONV))
    node = quantizer.quantize("n", NodeBits(2, 8))
    shift = quantizer.fit("n", np.full(4, 2)).bias_shift.reshape(-1)
    assert np.abs(shift).max() > 1e-3
    np.testing.assert_allclose(node.real_bias(), shift, atol=node.bias_scales().max())


def test_a_matmul_has_no_bias_and_fits_without_one() -> None:
    node = quantizer_of(source_of(op_type="MatMul")).quantize("n", NodeBits(3, 8))
    assert (node.bias, node.float_bias, node.real_bias()) == (None, None, None)
    with_bias = quantizer_of(source_of(op_type="Gemm")).quantize("n", NodeBits(3, 8))
    assert (node.codes != with_bias.codes).any()


def test_a_float_activation_keeps_the_bias_in_float() -> None:
    bias = np.array([1.5, -2.0, 0.0, 7.0], np.float32)
    node = quantizer_of(source_of(bias=bias), weight_method="nearest").quantize("n", NodeBits((8, 0, 8, 8), None))
    assert node.activation is None
    assert node.bias is None
    assert node.float_bias is not None
    assert node.float_bias[1] == 0
    np.testing.assert_allclose(node.float_bias, [1.5, 0, 0, 7], atol=0.1)
    with pytest.raises(ValueError, match="no integer scale"):
        node.bias_scales()


def test_an_uncalibrated_node_has_no_activation_quantizer() -> None:
    quantizer = quantizer_of(source_of(calibrated=False, bias=np.ones(4, np.float32)))
    assert quantizer.quantize("n", NodeBits(4, None)).float_bias is not None
    with pytest.raises(ValueError, match="n: no calibration data"):
        quantizer.quantize("n", NodeBits(4, 8))


def test_readers_of_one_tensor_share_its_quantizer_and_fits_are_kept() -> None:
    first, second = source_of(name="a", input_name="t"), source_of(name="b", input_name="t")
    quantizer = quantizer_of(first, second)
    assert quantizer.activation("a", 6) is quantizer.activation("b", 6)
    assert quantizer.activation("a", 6) == activation_quantizer(first.histogram, 6, "mse")  # type: ignore[arg-type]
    assert quantizer.activation("a", 6) != quantizer.activation("a", 5)
    widths = np.array([2, 3, 4, 0])
    assert quantizer.fit("a", widths) is quantizer.fit("a", widths.copy())
    assert quantizer.fit("a", widths) is not quantizer.fit("b", widths)
    one, many = quantizer.quantize("a", NodeBits(3, 8)), quantizer.quantize("a", NodeBits((3,) * 4, 8))
    np.testing.assert_array_equal(one.codes, many.codes)


def test_ranges_and_schemes_reach_the_result() -> None:
    source = source_of(size=3.0)
    for method in ("min-max", "percentile", "mse"):
        found = quantizer_of(source, activation_range=method).activation("n", 3)
        assert found == activation_quantizer(source.histogram, 3, method)  # type: ignore[arg-type]
    for scheme, low in (("offset", -2), ("differential-row", -1)):
        codes = quantizer_of(source, scheme=scheme).quantize("n", NodeBits(2, 8)).codes
        assert (codes.min(), codes.max()) == (low, 1)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from([GEMM, DECONV]),
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-9, 1e-3, 1.0, 1e6]), min_size=4, max_size=4),
    biases=st.lists(st.floats(-1e8, 1e8, width=32), min_size=6, max_size=6),
    size=st.sampled_from([1e-30, 1e-6, 1.0, 1e6]),
    bits=st.sampled_from([2, 4, 8]),
    activation=st.integers(2, 8),
    method=st.sampled_from(["nearest", "mse", "gptq"]),
    ranges=st.sampled_from(["min-max", "percentile", "mse"]),
)
def test_a_bias_never_overflows(
    layout: WeightLayout,
    weights: list[float],
    biases: list[float],
    size: float,
    bits: int,
    activation: int,
    method: str,
    ranges: str,
) -> None:
    outputs = layout.groups * layout.kernels
    bias = np.array(biases[:outputs], np.float32)
    shape = [1, -1] if layout is GEMM else [1, -1, 1, 1]
    factors = np.array(weights[: layout.channels]).reshape(shape)
    weight = (np.random.default_rng(1).normal(size=layout.shape) * factors).astype(np.float32)
    source = source_of(layout, bias=bias, weight=weight, size=size)
    quantizer = quantizer_of(source, weight_method=method, activation_range=ranges)
    node = quantizer.quantize("n", NodeBits(bits, activation))
    assert node.bias is not None
    # A factor of two stays free below the limits of INT32.
    assert np.abs(node.bias.astype(np.int64)).max() <= 2**30 * 1.01
    expected = bias + quantizer.fit("n", np.full(layout.channels, bits)).bias_shift.reshape(-1)
    steps = node.bias_scales().astype(np.float64)
    assert (steps > 0).all()
    np.testing.assert_allclose(node.real_bias(), expected, rtol=1e-6, atol=0.51 * steps.max())
    # Steps are no coarser than the bias or the weights need.
    assert (np.abs(node.real_bias() - expected) <= 0.51 * steps + 1e-6 * np.abs(expected)).all()


def test_the_scale_is_raised_only_where_the_bias_would_not_fit() -> None:
    weight = np.random.default_rng(2).normal(size=(12, 4)).astype(np.float32)
    weight[:, 1] *= 1e-9
    bias = np.array([3.0, 3.0, 0.0, 0.0], np.float32)
    free = quantizer_of(source_of(weight=weight)).quantize("n", NodeBits(8, 8))
    held = quantizer_of(source_of(weight=weight, bias=bias)).quantize("n", NodeBits(8, 8))
    np.testing.assert_array_equal(np.delete(held.scales, 1), np.delete(free.scales, 1))
    assert free.scales[1] < 1e-10
    assert held.bias is not None
    assert 2**28 < held.bias[1] <= 2**30
    np.testing.assert_allclose(held.real_bias()[:2], bias[:2], rtol=0.05)  # type: ignore[index]
    assert held.real_bias()[1] == pytest.approx(3.0, rel=1e-6)  # type: ignore[index]
