"""What weights are fitted to: ridge regression, the bias's part, and how far few vectors are trusted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.joint_moments import JointMoments
from raqu_onnx.rounding import DAMPING
from raqu_onnx.targets import CLEAR_GAIN, DAMPINGS, Shrinkage, choose_shrinkage, default_shrinkage, make_target
from raqu_onnx.weights import FittedWeights

if TYPE_CHECKING:
    pass

GROUPS, ROWS, KERNELS = 2, 20, 3


def moments_of(x: np.ndarray, t: np.ndarray) -> JointMoments:
    moments = JointMoments(x, t)
    moments.update(x, t)
    return moments


def pairs(count: int = 300, seed: int = 0, offset: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight, inputs as they arrive, and the outputs that the weight gives for other inputs."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(GROUPS, ROWS, KERNELS))
    f = rng.normal(size=(count, GROUPS, ROWS)) @ rng.normal(size=(ROWS, ROWS)) / np.sqrt(ROWS) + offset
    x = f + 0.3 * rng.normal(size=f.shape) + 0.2
    return weight, x, np.einsum("pgk,gkm->pgm", f, weight)


# -------------------------------------------------------------------------------------------------------- regression


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 80), st.integers(0, 1000), st.floats(1e-3, 10), st.sampled_from([0.0, 0.5, 20.0]), st.booleans())
def test_the_weight_is_that_of_ridge_regression(
    count: int, seed: int, strength: float, offset: float, centred: bool
) -> None:
    weight, x, t = pairs(count, seed, offset)
    found = make_target(weight, moments_of(x, t), Shrinkage(strength), centred=centred)
    if centred:
        x, t = x - x.mean(0), t - t.mean(0)
    for g in range(GROUPS):
        ridge = strength * np.square(x[:, g]).sum(1).mean() / ROWS
        # Least squares of |t - W' x|^2 / P + ridge |W - W'|^2, with the ridge as further rows.
        rows = np.vstack([x[:, g] / np.sqrt(count), np.sqrt(ridge) * np.eye(ROWS)])
        wanted = np.vstack([t[:, g] / np.sqrt(count), np.sqrt(ridge) * weight[g]])
        expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        # The moments are summed in float32.
        np.testing.assert_allclose(found.weight[g], expected, atol=3e-3 * np.abs(expected).max())


def test_the_regression_gives_the_output_better_than_the_weight_does() -> None:
    weight, x, t = pairs(2000)
    moments = moments_of(x, t)
    target = make_target(weight, moments, Shrinkage(0.05), centred=True)
    errors = [moments.error(candidate, moments.means).sum() for candidate in (target.weight, weight)]
    assert errors[0] < 0.9 * errors[1]


def test_an_infinite_ridge_gives_the_weight_itself() -> None:
    weight, x, t = pairs()
    moments = moments_of(x, t)
    found = make_target(weight, moments, Shrinkage(math.inf, 0.3), centred=True)
    np.testing.assert_array_equal(found.weight, weight)
    nearly = make_target(weight, moments, Shrinkage(1e9), centred=True)
    np.testing.assert_allclose(nearly.weight, weight, rtol=1e-6)
    assert (make_target(weight, moments, Shrinkage(0.05), centred=True).weight != weight).any()
    # What the bias takes up does not depend on the weight.
    np.testing.assert_array_equal(found.output_mean, nearly.output_mean)


@pytest.mark.parametrize("rank", [0, 1, 10, 20])
@pytest.mark.parametrize("centred", [True, False])
def test_equal_inputs_give_the_weight_itself_however_singular(rank: int, centred: bool) -> None:
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(GROUPS, ROWS, KERNELS))
    x = rng.normal(size=(50, GROUPS, rank)) @ rng.normal(size=(rank, ROWS))
    target = make_target(weight, moments_of(x, np.einsum("pgk,gkm->pgm", x, weight)), Shrinkage(0.05), centred=centred)
    np.testing.assert_allclose(target.weight, weight, atol=1e-4)


def test_one_vector_and_constant_inputs_leave_a_sound_weight() -> None:
    weight, x, t = pairs(40)
    x[:, 0] = 1e4 * x[:1, 0]
    for count in (1, 40):
        target = make_target(weight, moments_of(x[:count], t[:count]), Shrinkage(0.05), centred=True)
        # Nothing is known of how the output varies with a constant.
        np.testing.assert_allclose(target.weight[0], weight[0], atol=1e-6)
        assert np.isfinite(target.weight).all()


# -------------------------------------------------------------------------------------------------------------- bias


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(0, 1000), st.sampled_from([0.0, 5.0, 300.0]))
def test_the_means_are_those_of_the_pairs(count: int, seed: int, size: float) -> None:
    weight, x, t = pairs(count, seed)
    bias = size * np.random.default_rng(seed).normal(size=(GROUPS, KERNELS))
    without, target = (
        make_target(weight, moments_of(x, outputs), Shrinkage(0.1), centred=True) for outputs in (t, t + bias)
    )
    np.testing.assert_allclose(target.output_mean, (t + bias).mean(0), atol=1e-5 + 1e-6 * size)
    np.testing.assert_allclose(target.input_mean, x.mean(0), atol=1e-5)
    # A constant is the bias's to give: weights do not learn it.
    np.testing.assert_allclose(target.weight, without.weight, atol=2e-3)


def test_without_a_bias_the_weights_give_the_mean() -> None:
    weight, x, t = pairs(2000, offset=1.0)
    t += 3
    moments = moments_of(x, t)
    zero = np.zeros((GROUPS, ROWS)), np.zeros((GROUPS, KERNELS))
    errors = [
        float(moments.error(make_target(weight, moments, Shrinkage(0.05), centred=centred).weight, zero).sum())
        for centred in (False, True)
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("centred", [True, False])
def test_the_rest_of_the_target_is_what_arrives(centred: bool) -> None:
    weight, x, t = pairs()
    moments = moments_of(x, t)
    target = make_target(weight, moments, Shrinkage(0.1, 0.7), centred=centred)
    np.testing.assert_array_equal(target.second, moments.covariance(centred=centred)[0])
    assert target.damping == 0.7


# --------------------------------------------------------------------------------------------------------- shrinkage


def fitted(weight: np.ndarray) -> FittedWeights:
    """Weights as 8-bit codes, with a scale fine enough to tell all of them apart."""
    top = np.abs(weight).max((0, 1))
    scales = (top / 127).astype(np.float32)
    codes = np.rint(weight / scales).astype(np.int8)
    nothing = np.zeros((GROUPS, KERNELS))
    return FittedWeights(codes, scales, nothing, nothing)


CHANNELS = np.tile(np.arange(KERNELS), (GROUPS, 1))


def choice(used: JointMoments, held_out: JointMoments, weight: np.ndarray, default: Shrinkage) -> Shrinkage:
    def fit(shrinkage: Shrinkage) -> FittedWeights:
        return fitted(make_target(weight, used, shrinkage, centred=True).weight)

    return choose_shrinkage(fit, used, held_out, CHANNELS, default, centred=True)


DEFAULT = Shrinkage(0.05)


def split(x: np.ndarray, t: np.ndarray, at: int) -> tuple[JointMoments, JointMoments]:
    used = JointMoments(x, t)
    held_out = used.empty()
    used.update(x[:at], t[:at])
    held_out.update(x[at:], t[at:])
    return used, held_out


def test_many_vectors_are_trusted() -> None:
    weight, x, t = pairs(4000)
    assert choice(*split(x, t, 3000), weight, DEFAULT) is DEFAULT


@pytest.mark.parametrize("seed", range(5))
def test_few_vectors_that_mislead_are_not(seed: int) -> None:
    # The outputs are noise but for what the weight gives: five vectors know nothing of it that holds for others.
    rng = np.random.default_rng(seed)
    weight, x, _ = pairs(600, seed)
    t = np.einsum("pgk,gkm->pgm", x, weight) + 5 * rng.normal(size=(600, GROUPS, KERNELS))
    few = choice(*split(x, t, 5), weight, DEFAULT)
    assert few.ridge >= 1.0
    assert few.damping > DEFAULT.damping


def test_it_is_the_error_on_vectors_held_out_that_decides() -> None:
    weight, x, t = pairs(400)
    used, held_out = split(x, t, 200)
    # Whatever the vectors used say: the fit at one rung is that of the others.
    best = make_target(weight, held_out, Shrinkage(1e-6), centred=True).weight
    asked = []

    def fit(shrinkage: Shrinkage) -> FittedWeights:
        asked.append(shrinkage)
        return fitted(best if shrinkage.ridge == 1.0 else weight)

    found = choose_shrinkage(fit, used, held_out, CHANNELS, DEFAULT, centred=True)
    assert found.ridge == 1.0
    assert asked[0] == DEFAULT
    assert len(asked) == len(set(asked)) > 3
    assert all(item.ridge >= DEFAULT.ridge for item in asked)


@pytest.mark.parametrize(("gain", "moves"), [(0.005, False), (0.015, False), (0.03, True), (0.2, True)])
def test_a_small_gain_proves_nothing(gain: float, moves: bool) -> None:
    weight, x, t = pairs(400)
    used, held_out = split(x, t, 200)
    power = float(held_out.error(np.zeros_like(weight), used.means).sum())
    best = float(held_out.error(weight, used.means).sum())
    assert best < (1 - gain) * power

    def fit(shrinkage: Shrinkage) -> FittedWeights:
        """The default gives nothing; the others, so much of the output that the error is less by the gain."""
        if shrinkage == DEFAULT:
            return fitted_exactly(0.0)
        low, high = 0.0, 1.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            enough = held_out.error(middle * weight, used.means).sum() < (1 - gain) * power
            low, high = (low, middle) if enough else (middle, high)
        return fitted_exactly(high)

    def fitted_exactly(share: float) -> FittedWeights:
        scales = np.full(KERNELS, max(share, 1e-9), np.float32)
        nothing = np.zeros((GROUPS, KERNELS))
        # Codes need not be whole for the error to be measured.
        codes: np.ndarray = weight if share else np.zeros_like(weight)
        return FittedWeights(codes, scales, nothing, nothing)

    found = choose_shrinkage(fit, used, held_out, CHANNELS, DEFAULT, centred=True)
    assert (found != DEFAULT) is moves


def test_every_kernel_is_judged_at_its_own_scale() -> None:
    weight, x, t = pairs(300)
    weight *= np.array([1e-3, 1.0, 1e3])
    t = np.einsum("pgk,gkm->pgm", x, weight)
    used, held_out = split(x, t, 200)

    def fit(shrinkage: Shrinkage) -> FittedWeights:
        return fitted(weight * (1.0 if shrinkage.ridge == 1.0 else 0.5))

    assert choose_shrinkage(fit, used, held_out, CHANNELS, DEFAULT, centred=True).ridge == 1.0


def test_means_count_as_errors_only_where_no_bias_takes_them_up() -> None:
    weight, x, _ = pairs(400)
    # One weight is far off in what hardly varies but has a large mean, the other a little in all.
    x[:, :, 0] = 10 + 0.01 * x[:, :, 0]
    used, held_out = split(x, np.einsum("pgk,gkm->pgm", x, weight), 200)
    shifted = weight.copy()
    shifted[:, 0] += 3
    off = weight * 0.8

    def fit(shrinkage: Shrinkage) -> FittedWeights:
        nothing = np.zeros((GROUPS, KERNELS))
        codes: np.ndarray = shifted if shrinkage == DEFAULT else off
        return FittedWeights(codes, np.ones(KERNELS, np.float32), nothing, nothing)

    for centred in (True, False):
        found = choose_shrinkage(fit, used, held_out, CHANNELS, DEFAULT, centred=centred)
        assert (found == DEFAULT) is centred


def test_fewer_samples_are_trusted_less() -> None:
    ridges = [default_shrinkage(samples).ridge for samples in (1, 2, 8, 64, 256, 512, 10_000, 10**6)]
    assert ridges == sorted(ridges, reverse=True)
    assert ridges[0] == 0.5
    assert ridges[4] > ridges[5] == ridges[-1] > 0
    assert {default_shrinkage(samples).damping for samples in (1, 512)} == {DAMPING}


@pytest.mark.parametrize(("gain", "damping"), [(0.05, DAMPING), (0.08, DAMPING), (0.12, 0.2), (0.5, 0.2)])
def test_moments_are_damped_more_only_where_that_gains_clearly(gain: float, damping: float) -> None:
    weight, x, _ = pairs(400)
    used, held_out = split(x, np.einsum("pgk,gkm->pgm", x, weight), 200)
    asked = []

    def fit(shrinkage: Shrinkage) -> FittedWeights:
        """Errors of vectors held out are squares of what is left of the weight."""
        asked.append(shrinkage)
        left = np.sqrt(1 - gain) if shrinkage.damping == 0.2 else 1.0
        nothing = np.zeros((GROUPS, KERNELS))
        codes: np.ndarray = weight * (1 - 0.1 * left)
        return FittedWeights(codes, np.ones(KERNELS, np.float32), nothing, nothing)

    least = Shrinkage(math.inf)
    found = choose_shrinkage(fit, used, held_out, CHANNELS, least, centred=True, ladder=DAMPINGS, gain=CLEAR_GAIN)
    assert found.damping == damping
    # Rounding is compared for the float weight, whatever a regression would make of it.
    assert all(np.isinf(item.ridge) for item in asked)
    assert [item.damping for item in asked] == [DAMPING, 0.05, 0.2, 0.5]
