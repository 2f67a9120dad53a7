"""Histograms, moments and the quantizers chosen from them: the arithmetic behind every activation."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from threadpoolctl import threadpool_limits

from raqu_onnx.quantized import ActivationQuantizer
from raqu_onnx.ranges import activation_quantizer
from raqu_onnx.statistics import Histogram, InputMoments

METHODS = ("min-max", "percentile", "mse")
LARGEST = float(np.finfo(np.float32).max)

ordinary = hnp.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.one_of(st.floats(-300, 300, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 256.0])),
)
any_size = st.floats(-LARGEST, LARGEST, width=32)
bits_strategy = st.integers(2, 8)


def histogram_of(*batches: np.ndarray) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


# ------------------------------------------------------------------------------------------------------- histograms


@settings(max_examples=80, deadline=None)
@given(ordinary, st.data())
def test_any_split_gives_the_counts_of_numpy_over_all_values(values: np.ndarray, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    histogram = histogram_of(*np.split(values, cuts))
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    assert histogram.zeros == np.sum(values == 0)
    assert histogram.counts.sum() + histogram.zeros == len(values)
    reach = np.abs(values).max()
    if reach == 0:
        assert histogram.limit == 0
        return
    assert reach < histogram.limit <= 2 * reach
    assert np.log2(histogram.limit) % 1 == 0
    edges = np.linspace(-histogram.limit, histogram.limit, len(histogram.counts) + 1)
    expected, _ = np.histogram(values[values != 0].astype(np.float64), edges)
    np.testing.assert_array_equal(histogram.counts, expected)
    np.testing.assert_allclose(histogram.centres, (edges[:-1] + edges[1:]) / 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(any_size, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_order_does_not_matter_at_any_magnitude(values: list[float], random: object) -> None:
    one = histogram_of(np.array(values, np.float32))
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    many = histogram_of(*(np.array([value], np.float32) for value in shuffled))
    assert (one.limit, one.zeros, one.low, one.high) == (many.limit, many.zeros, many.low, many.high)
    np.testing.assert_array_equal(one.counts, many.counts)


def test_the_range_doubles_until_it_holds_every_value() -> None:
    histogram = histogram_of(np.array([0.3, -0.2], np.float32))
    assert histogram.limit == 0.5
    histogram.update(np.array([5.0], np.float32))
    assert histogram.limit == 8.0
    width = 8.0 / 2048
    for value in (0.3, -0.2, 5.0):
        assert np.sum(histogram.counts[np.abs(histogram.centres - value) <= width]) == 1
    assert len(histogram.counts) == 4096


def test_shape_and_emptiness_do_not_matter() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    flat, shaped = histogram_of(values.reshape(-1)), histogram_of(values, values[:0])
    np.testing.assert_array_equal(flat.counts, shaped.counts)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 40), st.data())
def test_values_are_thinned_sample_by_sample(samples: int, width: int, most: int, data: st.DataObject) -> None:
    x = np.random.default_rng(most).normal(size=(samples, 3, width, width)).astype(np.float32)
    whole, parts = Histogram(), Histogram()
    whole.update(x, most=most)
    cuts = sorted(data.draw(st.lists(st.integers(0, samples), max_size=3)))
    for part in np.split(x, cuts):
        parts.update(part, most=most)
    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert (whole.low, whole.high) == (x.min(), x.max())
    counted = whole.counts.sum() + whole.zeros
    assert counted % samples == 0
    assert 1 <= counted / samples <= max(most, 1)
    if most >= x[0].size:
        assert counted == x.size


def test_thinning_meets_every_column() -> None:
    # 16 of 256 values: every sixteenth one would be the first column alone.
    x = np.tile(np.arange(1, 17, dtype=np.float32), (1, 16, 1))
    histogram = Histogram()
    histogram.update(x, most=16)
    assert np.count_nonzero(histogram.counts) > 12


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    histogram = histogram_of(np.ones(4, np.float32))
    before = histogram.counts.copy()
    with pytest.raises(ValueError, match="infinite or not a number"):
        histogram.update(np.array([0.5, value, 2.0], np.float32))
    np.testing.assert_array_equal(histogram.counts, before)


@settings(max_examples=60, deadline=None)
@given(ordinary, st.floats(0, 1))
def test_a_quantile_is_that_of_the_sorted_values_to_the_width_of_a_bin(values: np.ndarray, share: float) -> None:
    histogram = histogram_of(values)
    # A share that hits a sample only but for rounding may choose either neighbour.
    places = np.array([share - 1e-9, share + 1e-9]).clip(0, 1) * len(values)
    low, high = np.sort(values)[np.maximum(np.ceil(places).astype(int) - 1, 0)]
    width = histogram.limit / 2048
    found = histogram.quantile(share)
    assert low - width <= found <= high + width
    assert values.min() <= found <= values.max()


def test_quantiles_of_a_known_distribution() -> None:
    histogram = histogram_of(np.linspace(-2, 2, 10001).astype(np.float32))
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert histogram.quantile(share) == pytest.approx(-2 + 4 * share, abs=0.003)


# ---------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("full_limit", [64, 2])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_equal_numpy_whatever_the_batches(full_limit: int, offset: float) -> None:
    rng = np.random.default_rng(1)
    # The first rows vary together and lie far from 0: what is lost to cancellation would show.
    x = rng.normal(size=(500, 2, 7)) @ rng.normal(size=(7, 7)) + offset * np.arange(7)
    x = x.astype(np.float32)
    moments = InputMoments(2, 7, full_limit=full_limit)
    with threadpool_limits(1):
        for batch in np.split(x, [0, 3, 200, 201]):
            moments.update(batch)
    assert moments.count == 500
    wide = x.astype(np.float64).transpose(1, 0, 2)
    np.testing.assert_allclose(moments.mean, wide.mean(1), rtol=1e-6, atol=1e-5)
    for centred in (True, False):
        part = wide - wide.mean(1, keepdims=True) if centred else wide
        expected = np.einsum("gpi,gpj->gij", part, part) / 500
        if full_limit < 7:
            expected = np.diagonal(expected, axis1=1, axis2=2)
        found = moments.covariance(centred=centred)
        assert found.shape == moments.gram.shape
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(np.diagonal(expected)).max())


def test_rows_that_never_vary_have_no_variance_at_all() -> None:
    moments = InputMoments(1, 3)
    x = np.random.default_rng(0).normal(size=(200, 1, 3)).astype(np.float32)
    x[:, 0, 1], x[:, 0, 2] = 0.0, 1234.5
    for batch in np.split(x, 4):
        moments.update(batch)
    covariance = moments.covariance()
    assert (covariance[0, 1:] == 0).all()
    assert (covariance[0, :, 1:] == 0).all()
    np.testing.assert_allclose(moments.covariance(centred=False)[0, 2, 2], 1234.5**2)


def test_no_vectors_give_zeros() -> None:
    moments = InputMoments(2, 3)
    moments.update(np.empty((0, 2, 3), np.float32))
    assert not moments.mean.any()
    assert not moments.covariance().any()


def test_memory_does_not_grow_with_samples() -> None:
    histogram, moments = Histogram(), InputMoments(1, 8)
    sizes = []
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(400, 1, 8)).astype(np.float32) * 10**seed
        histogram.update(x)
        moments.update(x)
        held = [*vars(histogram).values(), *vars(moments).values()]
        sizes.append(sum(item.nbytes for item in held if isinstance(item, np.ndarray)))
        assert all(isinstance(item, np.ndarray | int | float | bool) for item in held)
    assert len(set(sizes)) == 1


# ------------------------------------------------------------------------------------------------------- quantizers


def squared_error(histogram: Histogram, quantizer: ActivationQuantizer) -> float:
    values = histogram.centres.clip(histogram.low, histogram.high)
    codes = np.clip(np.rint(values / quantizer.scale) + quantizer.zero_point, 0, quantizer.levels)
    return float(histogram.counts @ np.square((codes - quantizer.zero_point) * quantizer.scale - values))


@settings(max_examples=80, deadline=None)
@given(ordinary, bits_strategy, st.sampled_from(METHODS))
def test_every_quantizer_is_sound(values: np.ndarray, bits: int, method: str) -> None:
    quantizer = activation_quantizer(histogram_of(values), bits, method)  # type: ignore[arg-type]
    assert quantizer.levels == 2**bits - 1
    assert 0 <= quantizer.zero_point <= quantizer.levels
    assert np.isfinite(quantizer.scale)
    assert quantizer.scale > 0
    assert np.float32(quantizer.scale) == quantizer.scale
    assert quantizer.fake_quantize(np.zeros(1, np.float32))[0] == 0
    codes = quantizer.quantize(values)
    assert codes.dtype == np.uint8
    assert codes.max() <= quantizer.levels
    if values.min() >= 0:
        assert quantizer.zero_point == 0


@settings(max_examples=80, deadline=None)
@given(ordinary, bits_strategy)
def test_min_max_covers_the_range(values: np.ndarray, bits: int) -> None:
    quantizer = activation_quantizer(histogram_of(values), bits, "min-max")
    error = np.abs(quantizer.fake_quantize(values) - values)
    assert error.max() <= quantizer.scale / 2 * (1 + 1e-4) + 1e-30


@settings(max_examples=50, deadline=None)
@given(ordinary, bits_strategy)
def test_mse_is_never_worse_than_min_max(values: np.ndarray, bits: int) -> None:
    histogram = histogram_of(values)
    least, full = (activation_quantizer(histogram, bits, method) for method in ("mse", "min-max"))
    assert squared_error(histogram, least) <= squared_error(histogram, full) * (1 + 1e-9)


def test_outliers_are_clipped_where_that_pays() -> None:
    values = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    values[0], values[1] = 40, -40
    histogram = histogram_of(values)
    full, least, most = (activation_quantizer(histogram, 4, method) for method in ("min-max", "mse", "percentile"))
    assert least.scale < full.scale / 3
    assert most.scale < full.scale / 3
    errors = [np.square(q.fake_quantize(values) - values).mean() for q in (full, least)]
    assert errors[1] < errors[0] / 2


def test_few_negative_values_do_not_cost_a_level() -> None:
    values = np.append(np.linspace(0, 3, 300), -0.01).astype(np.float32)
    quantizer = activation_quantizer(histogram_of(values), 2, "min-max")
    assert (quantizer.zero_point, quantizer.quantize(values).max()) == (0, 3)
    assert quantizer.scale == pytest.approx(3.01 / 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0, 0.0],
        [3.0],
        [3.0, 3.0, 3.0],
        [-3.0],
        [-1.0, -2.0, -3.0],
        [-5.0, 0.0],
        [1e-30],
        [-1e-30, 1e-30],
        [1e-45, -1e-45],
        [1e30],
        [-1e30, 1e30],
        [1e38, -1e38],
        [1e-30, 1e30],
    ],
)
def test_odd_tensors_give_finite_positive_scales(values: list[float], bits: int, method: str) -> None:
    array = np.array(values, np.float32)
    quantizer = activation_quantizer(histogram_of(array), bits, method)  # type: ignore[arg-type]
    assert 0 < quantizer.scale < np.inf
    assert 0 <= quantizer.zero_point <= quantizer.levels
    assert np.isfinite(quantizer.fake_quantize(array)).all()
    if values and min(values) == max(values) != 0:
        found = quantizer.fake_quantize(array)
        np.testing.assert_allclose(found, array, rtol=1e-2)
    if values and max(values) < 0:
        assert quantizer.zero_point == quantizer.levels


# ------------------------------------------------------------------------------------------- agreement with runtime


def runtime_chain(values: np.ndarray, quantizer: ActivationQuantizer) -> list[np.ndarray]:
    """Codes and values that onnxruntime gives: QuantizeLinear, Clip, DequantizeLinear."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Clip", ["q", "", "top"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ]
    scalar = [("s", TensorProto.FLOAT), ("z", TensorProto.UINT8), ("top", TensorProto.UINT8)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
            *(helper.make_tensor_value_info(n, t, []) for n, t in scalar),
        ],
        [helper.make_tensor_value_info("c", TensorProto.UINT8, None), helper.make_empty_tensor_value_info("y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feeds = {
        "x": values,
        "s": np.array(quantizer.scale, np.float32),
        "z": np.array(quantizer.zero_point, np.uint8),
        "top": np.array(quantizer.levels, np.uint8),
    }
    if "session" not in _CHAIN:
        _CHAIN["session"] = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(_CHAIN["session"].run(["c", "y"], feeds))


_CHAIN: dict[str, ort.InferenceSession] = {}


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32)),
    bits_strategy,
    st.floats(2.0**-20, 2.0**10, width=32),
    st.data(),
)
def test_codes_equal_those_of_onnxruntime(values: np.ndarray, bits: int, scale: float, data: st.DataObject) -> None:
    quantizer = ActivationQuantizer(bits, scale, data.draw(st.integers(0, 2**bits - 1)))
    # Halves of steps, where rounding has to choose.
    ties = (np.arange(-20, 280) + 0.5).astype(np.float32) * np.float32(scale)
    values = np.concatenate([values, ties])
    codes, decoded = runtime_chain(values, quantizer)
    np.testing.assert_array_equal(quantizer.quantize(values), codes)
    np.testing.assert_array_equal(quantizer.fake_quantize(values), decoded)


def test_ties_go_to_even_codes() -> None:
    quantizer = ActivationQuantizer(4, 0.5, 0)
    values = np.array([0.25, 0.75, 1.25, 1.75, 7.25, 100.0, -1.0], np.float32)
    np.testing.assert_array_equal(quantizer.quantize(values), [0, 2, 2, 4, 14, 15, 0])
