"""Fitting integer weights: ranges, scales, dropped kernels, and what data buys."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.encodings import SignedEncoding, code_range
from raqu_onnx.layout import MappedNode, WeightLayout, Window
from raqu_onnx.statistics import InputMoments
from raqu_onnx.weights import FittedWeights, WeightFitter

if TYPE_CHECKING:
    pass

SCHEMES = get_args(SignedEncoding)
METHODS = ("nearest", "mse", "gptq")
DATA_METHODS = ("mse", "gptq")
LAYOUTS = {
    "gemm": WeightLayout("in-out", (12, 5)),
    "gemm-transposed": WeightLayout("out-in", (5, 12)),
    "conv": WeightLayout("conv", (6, 3, 2, 2)),
    "grouped": WeightLayout("conv", (6, 3, 2), 2),
    "depthwise": WeightLayout("conv", (5, 1, 3, 3), 5),
    "deconv": WeightLayout("conv-transpose", (6, 4, 2, 2), 3),
}


def node_of(layout: WeightLayout) -> MappedNode:
    window = None
    if layout.kind.startswith("conv"):
        rank = len(layout.shape) - 2
        ones = (1,) * rank
        window = Window(layout.shape[2:], ones, ones, (0,) * 2 * rank, transposed=layout.kind == "conv-transpose")
    return MappedNode("n", "Conv" if window else "Gemm", "x", "w", None, "y", layout, window)


def correlated(rng: np.random.Generator, layout: WeightLayout, count: int = 400, mean: float = 0.5) -> np.ndarray:
    mixing = rng.normal(size=(layout.groups, layout.rows, layout.rows)) / np.sqrt(layout.rows)
    x = np.einsum("pgk,gkj->pgj", rng.normal(size=(count, layout.groups, layout.rows)), mixing)
    return (x + mean * rng.normal(size=layout.rows)).astype(np.float32)


def moments_of(layout: WeightLayout, x: np.ndarray, **options: int) -> InputMoments:
    moments = InputMoments(layout.groups, layout.rows, **options)
    moments.update(x)
    return moments


def outputs(layout: WeightLayout, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Outputs of shape (P, G, M) for vectors (P, G, K) and a weight as ONNX stores it."""
    return np.einsum("pgk,gkm->pgm", x.astype(np.float64), layout.to_matrices(weight.astype(np.float64)))


def decoded(layout: WeightLayout, fit: FittedWeights) -> np.ndarray:
    return fit.codes * fit.scales.astype(np.float64)[layout.channel_index()][:, None, :]


def assert_sound(layout: WeightLayout, fit: FittedWeights, bits: np.ndarray, scheme: SignedEncoding) -> None:
    assert fit.codes.shape == (layout.groups, layout.rows, layout.kernels)
    assert fit.codes.dtype == np.int8
    assert fit.scales.shape == (layout.channels,)
    assert fit.scales.dtype == np.float32
    assert (fit.scales > 0).all()
    assert np.isfinite(fit.scales).all()
    assert np.isfinite(fit.bias_shift).all()
    for (g, m), channel in np.ndenumerate(layout.channel_index()):
        low, high = code_range(scheme, int(bits[channel]))
        assert low <= fit.codes[g, :, m].min()
        assert fit.codes[g, :, m].max() <= high


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYOUTS)),
    scheme=st.sampled_from(SCHEMES),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    data=st.data(),
)
def test_codes_stay_within_the_range_of_their_kernel(
    name: str, scheme: SignedEncoding, method: str, seed: int, size: float, data: st.DataObject
) -> None:
    layout = LAYOUTS[name]
    widths = st.sampled_from([0, 2, 3, 4, 5, 6, 7, 8])
    bits = np.array(data.draw(st.lists(widths, min_size=layout.channels, max_size=layout.channels)))
    rng = np.random.default_rng(seed)
    # Heavy tails: some weights are clipped.
    weight = (rng.standard_t(2, size=layout.shape) * size).astype(np.float32)
    moments = moments_of(layout, correlated(rng, layout, 60))
    fit = WeightFitter(node_of(layout), weight, moments, scheme, method=method).fit(bits)  # type: ignore[arg-type]
    assert_sound(layout, fit, bits, scheme)
    # An ordinary kernel uses its range: it is not all zeros, and 8 bits lose little of it.
    for (g, m), channel in np.ndenumerate(layout.channel_index()):
        kernel = layout.to_matrices(weight)[g, :, m]
        alone = layout.kind != "conv-transpose"
        if bits[channel] and alone:
            assert fit.codes[g, :, m].any()
        if bits[channel] == 8 and method == "nearest" and alone:
            np.testing.assert_allclose(decoded(layout, fit)[g, :, m], kernel, atol=np.abs(kernel).max() / 250)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["conv", "depthwise", "deconv", "gemm"])
def test_dropped_kernels_are_zero_and_leave_the_others_alone(name: str, method: str) -> None:
    layout = LAYOUTS[name]
    rng = np.random.default_rng(3)
    weight = rng.normal(size=layout.shape).astype(np.float32)
    fitter = WeightFitter(node_of(layout), weight, moments_of(layout, correlated(rng, layout)), "offset", method=method)  # type: ignore[arg-type]
    bits = np.full(layout.channels, 4)
    whole = fitter.fit(bits)
    bits[[0, 2]] = 0
    fit = fitter.fit(bits)
    dropped = np.isin(layout.channel_index(), [0, 2])
    assert not fit.codes.transpose(0, 2, 1)[dropped].any()
    ordinary = whole.scales.min() / 20, whole.scales.max() * 20
    assert ((ordinary[0] < fit.scales) & (fit.scales < ordinary[1])).all()
    np.testing.assert_array_equal(fit.codes.transpose(0, 2, 1)[~dropped], whole.codes.transpose(0, 2, 1)[~dropped])
    np.testing.assert_array_equal(np.delete(fit.scales, [0, 2]), np.delete(whole.scales, [0, 2]))


@pytest.mark.parametrize("method", METHODS)
def test_kernels_of_zeros_get_an_ordinary_scale(method: str) -> None:
    layout = LAYOUTS["conv"]
    rng = np.random.default_rng(4)
    weight = rng.normal(size=layout.shape).astype(np.float32)
    weight[1] = 0
    moments = moments_of(layout, correlated(rng, layout))
    fit = WeightFitter(node_of(layout), weight, moments, "offset", method=method).fit(4)  # type: ignore[arg-type]
    assert not fit.codes[0, :, 1].any()
    others = np.delete(fit.scales, 1)
    assert others.min() / 20 < fit.scales[1] < others.max() * 20
    nothing = WeightFitter(node_of(layout), weight * 0, moments, "offset", method=method).fit(4)  # type: ignore[arg-type]
    assert not nothing.codes.any()
    assert_sound(layout, nothing, np.full(6, 4), "offset")


@pytest.mark.parametrize("method", METHODS)
def test_scale_floors_hold(method: str) -> None:
    layout = LAYOUTS["conv"]
    rng = np.random.default_rng(5)
    weight = rng.normal(size=layout.shape).astype(np.float32)
    weight[2] = 1e-9
    floor = np.array([0, 0.5, 1e-3, 0, 100.0, 0])
    moments = moments_of(layout, correlated(rng, layout))
    fitters = [
        WeightFitter(node_of(layout), weight, moments, "offset", method=method, scale_floor=limit)  # type: ignore[arg-type]
        for limit in (None, floor)
    ]
    free, fit = (fitter.fit(6) for fitter in fitters)
    assert (fit.scales >= floor.astype(np.float32)).all()
    np.testing.assert_array_equal(fit.scales[[0, 3, 5]], free.scales[[0, 3, 5]])
    # With few rows the scale is chosen by the error that rounding leaves: a larger one may be better.
    assert fit.scales[1] == np.float32(0.5) or (method == "gptq" and fit.scales[1] < 1)
    assert fit.codes[0, :, 1].any()
    assert not fit.codes[0, :, [2, 4]].any()
    assert_sound(layout, fit, np.full(6, 6), "offset")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_nearest_is_plain_rounding_over_the_full_range(scheme: SignedEncoding, bits: int) -> None:
    layout = LAYOUTS["gemm"]
    weight = np.random.default_rng(6).normal(size=layout.shape).astype(np.float32)
    fit = WeightFitter(node_of(layout), weight, None, scheme, method="nearest").fit(bits)
    low, high = code_range(scheme, bits)
    # The smallest scale that needs no clipping.
    scale = np.maximum(weight.max(0) / high, weight.min(0) / low)
    np.testing.assert_allclose(fit.scales, scale, rtol=1e-6)
    np.testing.assert_array_equal(fit.codes[0], np.clip(np.rint(weight / fit.scales.astype(float)), low, high))
    assert np.abs(decoded(layout, fit)[0] - weight).max() <= scale.max() / 2 * (1 + 1e-6)
    assert np.isnan(fit.error).all()
    assert not fit.bias_shift.any()


def test_without_data_gptq_falls_back_to_mse() -> None:
    layout = LAYOUTS["conv"]
    weight = np.random.default_rng(7).standard_t(3, size=layout.shape).astype(np.float32)
    fits = [WeightFitter(node_of(layout), weight, None, "offset", method=m).fit(3) for m in DATA_METHODS]  # type: ignore[arg-type]
    np.testing.assert_array_equal(fits[0].codes, fits[1].codes)
    plain = WeightFitter(node_of(layout), weight, None, "offset", method="nearest").fit(3)
    lost = [np.square(decoded(layout, f) - layout.to_matrices(weight)).sum(1) for f in (fits[0], plain)]
    assert (lost[0] <= lost[1]).all()
    assert lost[0].sum() < 0.9 * lost[1].sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("absorb_mean", [True, False])
def test_gptq_beats_rounding_on_correlated_inputs(bits: int, absorb_mean: bool) -> None:
    # More rows than one block of them, so that errors travel between blocks.
    layout = WeightLayout("out-in", (12, 150))
    better, sums = [], np.zeros(3)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        moments = moments_of(layout, correlated(rng, layout))
        weight = rng.normal(size=layout.shape).astype(np.float32)
        errors = [
            WeightFitter(node_of(layout), weight, moments, "offset", method=m, absorb_mean=absorb_mean).fit(bits).error  # type: ignore[arg-type]
            for m in ("gptq", "mse", "nearest")
        ]
        better.append(np.mean(errors[0] <= errors[1]))
        sums += [error.sum() for error in errors]
    assert np.mean(better) > 0.8
    assert sums[0] < 0.75 * sums[1]
    assert sums[1] < 1.05 * sums[2]


@pytest.mark.parametrize("full_limit", [64, 1])
@pytest.mark.parametrize("method", DATA_METHODS)
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_error_is_that_of_the_outputs(name: str, method: str, full_limit: int) -> None:
    layout = LAYOUTS[name]
    rng = np.random.default_rng(8)
    x = correlated(rng, layout)
    if full_limit == 1:
        # Only squares are known: exact for rows that do not vary together, here one at a time.
        x *= np.arange(len(x))[:, None, None] % layout.rows == np.arange(layout.rows)
    weight = rng.normal(size=layout.shape).astype(np.float32)
    moments = moments_of(layout, x, full_limit=full_limit)
    for absorb_mean in (True, False):
        if full_limit == 1 and absorb_mean:
            continue
        fitter = WeightFitter(node_of(layout), weight, moments, "offset", method=method, absorb_mean=absorb_mean)  # type: ignore[arg-type]
        fit = fitter.fit(3)
        wrong = outputs(layout, x, weight) - np.einsum("pgk,gkm->pgm", x, decoded(layout, fit)) - fit.bias_shift
        np.testing.assert_allclose(fit.error, np.square(wrong).mean(0), rtol=1e-3)


@pytest.mark.parametrize("method", DATA_METHODS)
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_bias_keeps_the_mean_output(name: str, method: str) -> None:
    layout = LAYOUTS[name]
    rng = np.random.default_rng(9)
    x = correlated(rng, layout, mean=3.0)
    weight = rng.normal(size=layout.shape).astype(np.float32)
    bits = rng.choice([0, 2, 4], layout.channels)
    moments = moments_of(layout, x)
    fit = WeightFitter(node_of(layout), weight, moments, "offset", method=method).fit(bits)  # type: ignore[arg-type]
    found = np.einsum("pgk,gkm->pgm", x, decoded(layout, fit)) + fit.bias_shift
    expected = outputs(layout, x, weight)
    np.testing.assert_allclose(found.mean(0), expected.mean(0), atol=1e-5 * np.abs(expected).max())
    assert np.abs(fit.bias_shift).max() > 1e-3
    plain = WeightFitter(node_of(layout), weight, moments, "offset", method=method, absorb_mean=False).fit(bits)  # type: ignore[arg-type]
    assert not plain.bias_shift.any()


def test_groups_of_a_deconvolution_share_scales_and_others_do_not() -> None:
    rng = np.random.default_rng(10)
    deconv = LAYOUTS["deconv"]
    weight = rng.normal(size=deconv.shape).astype(np.float32)
    weight[:2] *= 4  # the first group has the largest weights, and sets the scale for all
    moments = moments_of(deconv, correlated(rng, deconv))
    for method in METHODS:
        fit = WeightFitter(node_of(deconv), weight, moments, "offset", method=method).fit(8)  # type: ignore[arg-type]
        assert fit.scales.shape == (4,)
        matrices = deconv.to_matrices(weight)
        for m in range(4):
            reach = np.abs(matrices[:, :, m]).max() / 127
            assert 0.2 * reach <= fit.scales[m] <= (1.5 if method == "gptq" else 1.01) * reach
        np.testing.assert_allclose(decoded(deconv, fit), matrices, atol=2 * fit.scales.max())
    depthwise = LAYOUTS["depthwise"]
    weight = rng.normal(size=depthwise.shape).astype(np.float32) * 10.0 ** np.arange(5).reshape(-1, 1, 1, 1)
    moments = moments_of(depthwise, correlated(rng, depthwise))
    fit = WeightFitter(node_of(depthwise), weight, moments, "offset").fit(8)
    ratios = fit.scales[1:] / fit.scales[:-1]
    assert ((ratios > 2) & (ratios < 50)).all()


@pytest.mark.parametrize("case", ["dead rows", "all dead", "few vectors", "one vector", "constant", "copies"])
@pytest.mark.parametrize("method", DATA_METHODS)
@pytest.mark.parametrize("absorb_mean", [True, False])
def test_singular_moments_give_sound_weights(case: str, method: str, absorb_mean: bool) -> None:
    layout = WeightLayout("in-out", (40, 6))
    rng = np.random.default_rng(11)
    x = rng.normal(size=(200, 1, 40)).astype(np.float32)
    if case == "dead rows":
        x[:, :, 5:30] = 0
    elif case == "all dead":
        x[:] = 0
    elif case == "few vectors":
        x = x[:7]
    elif case == "one vector":
        x = x[:1]
    elif case == "constant":
        x[:] = x[:1] * 1000
    else:
        x[:] = x[:, :, :1]
    weight = rng.normal(size=layout.shape).astype(np.float32)
    moments = moments_of(layout, x)
    fitter = WeightFitter(node_of(layout), weight, moments, "offset", method=method, absorb_mean=absorb_mean)  # type: ignore[arg-type]
    for bits in (2, 8):
        fit = fitter.fit(bits)
        assert_sound(layout, fit, np.full(6, bits), "offset")
        assert np.isfinite(fit.error).all()
        assert (fit.error >= -1e-6).all()
    # Weights of rows that say nothing stay near their values, so that unseen inputs are not thrown away.
    assert np.corrcoef(decoded(layout, fit).reshape(-1), weight.reshape(-1))[0, 1] > 0.95


@pytest.mark.parametrize("method", DATA_METHODS)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_inputs_whose_squares_overflow_are_fitted_without_them(method: str) -> None:
    layout = LAYOUTS["gemm"]
    rng = np.random.default_rng(12)
    weight = rng.normal(size=layout.shape).astype(np.float32)
    moments = moments_of(layout, correlated(rng, layout) * np.float32(1e25))
    fit = WeightFitter(node_of(layout), weight, moments, "offset", method=method).fit(8)  # type: ignore[arg-type]
    assert_sound(layout, fit, np.full(5, 8), "offset")
    np.testing.assert_allclose(decoded(layout, fit)[0], weight, atol=2 * fit.scales.max())


def test_a_fitter_gives_the_same_weights_every_time() -> None:
    layout = LAYOUTS["conv"]
    rng = np.random.default_rng(13)
    weight = rng.normal(size=layout.shape).astype(np.float32)
    moments = moments_of(layout, correlated(rng, layout))
    fitter = WeightFitter(node_of(layout), weight, moments, "offset")
    first, _, again = fitter.fit(3), fitter.fit(7), fitter.fit(np.full(6, 3))
    fresh = WeightFitter(node_of(layout), weight.copy(), moments, "offset").fit(3)
    for other in (again, fresh):
        np.testing.assert_array_equal(first.codes, other.codes)
        np.testing.assert_array_equal(first.scales, other.scales)
