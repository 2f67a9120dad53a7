"""Sums over inputs and wanted outputs: equal to sums in double precision, however they are gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.joint_moments import JointMoments

if TYPE_CHECKING:
    pass

GROUPS, ROWS, KERNELS = 2, 7, 3
EXAMPLES = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 1000)
# Means up to a thousand times as large as what varies: summed around 0 in float32, nothing of it would be left.
OFFSETS = st.sampled_from([0.0, 1.0, 1000.0])
Centre = tuple[np.ndarray, np.ndarray]


def pairs(count: int, seed: int = 0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs, and outputs that depend on them but for noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, GROUPS, ROWS)) @ rng.normal(size=(ROWS, ROWS))
    t = x @ rng.normal(size=(ROWS, KERNELS)) + rng.normal(size=(count, GROUPS, KERNELS))
    return (x + offset * np.arange(ROWS)).astype(np.float32), (t - offset * np.arange(KERNELS)).astype(np.float32)


def moments_of(x: np.ndarray, t: np.ndarray, cuts: list[int] | None = None) -> JointMoments:
    """Moments of pairs that come in one batch, or in several."""
    cuts = sorted(cuts or [])
    batches = list(zip(np.split(x, cuts), np.split(t, cuts), strict=True))
    moments = JointMoments(*batches[0])
    for batch in batches:
        moments.update(*batch)
    return moments


def around(x: np.ndarray, t: np.ndarray, centre: Centre) -> Centre:
    """Mean products of what lies around the given points, in double precision."""
    a, b = x.astype(np.float64) - centre[0], t.astype(np.float64) - centre[1]
    return np.einsum("pgi,pgj->gij", a, a) / len(x), np.einsum("pgi,pgm->gim", a, b) / len(x)


def assert_close(found: Centre, expected: Centre) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max() + 1e-6)


def assert_same_sums(one: JointMoments, other: JointMoments) -> None:
    assert one.count == other.count
    for ours, theirs in zip(one.means, other.means, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    for centred in (True, False):
        assert_close(one.covariance(centred=centred), other.covariance(centred=centred))


# ------------------------------------------------------------------------------------------------- equal to the sums


@EXAMPLES
@given(st.integers(1, 60), SEEDS, OFFSETS, st.lists(st.integers(0, 60), max_size=4))
def test_moments_equal_those_in_double_precision_whatever_the_batches(
    count: int, seed: int, offset: float, cuts: list[int]
) -> None:
    x, t = pairs(count, seed, offset)
    moments = moments_of(x, t, [cut for cut in cuts if cut > 0])
    assert moments.count == count
    assert moments.finite
    means = x.mean(0, dtype=np.float64), t.mean(0, dtype=np.float64)
    for found, expected in zip(moments.means, means, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert_close(moments.covariance(centred=True), around(x, t, means))
    zero = np.zeros_like(means[0]), np.zeros_like(means[1])
    assert_close(moments.covariance(centred=False), around(x, t, zero))


@EXAMPLES
@given(st.integers(1, 60), SEEDS, OFFSETS, st.integers(1, 60))
def test_moments_around_any_point(count: int, seed: int, offset: float, cut: int) -> None:
    x, t = pairs(count, seed, offset)
    rng = np.random.default_rng(seed + 1)
    # Near the means: far from them the products of the distances alone are left.
    centre = x.mean(0) + rng.normal(size=(GROUPS, ROWS)), t.mean(0) + rng.normal(size=(GROUPS, KERNELS))
    assert_close(moments_of(x, t, [cut]).around(centre), around(x, t, centre))


@EXAMPLES
@given(st.integers(1, 60), SEEDS, OFFSETS, st.integers(1, 60))
def test_the_error_is_that_of_every_output(count: int, seed: int, offset: float, cut: int) -> None:
    x, t = pairs(count, seed, offset)
    rng = np.random.default_rng(seed + 2)
    weight = rng.normal(size=(GROUPS, ROWS, KERNELS))
    centre = x.mean(0) + rng.normal(size=(GROUPS, ROWS)), t.mean(0) + rng.normal(size=(GROUPS, KERNELS))
    wrong = (t - centre[1]) - np.einsum("pgk,gkm->pgm", x - centre[0], weight)
    found = moments_of(x, t, [cut]).error(weight, centre)
    assert found.shape == (GROUPS, KERNELS)
    power = np.square(np.einsum("pgk,gkm->pgm", x - centre[0], weight)).mean(0)
    np.testing.assert_allclose(found, np.square(wrong).mean(0), rtol=1e-4, atol=1e-5 * power.max())


def test_a_weight_that_gives_the_outputs_leaves_no_error() -> None:
    x, _ = pairs(200, offset=1.0)
    weight = np.random.default_rng(1).normal(size=(GROUPS, ROWS, KERNELS))
    t = np.einsum("pgk,gkm->pgm", x, weight).astype(np.float32)
    moments = moments_of(x, t)
    power = float(np.square(t).mean())
    for centre in (moments.means, (np.zeros((GROUPS, ROWS)), np.zeros((GROUPS, KERNELS)))):
        assert np.abs(moments.error(weight, centre)).max() < 1e-5 * power
        assert (moments.error(weight * 1.1, centre) > 1e-4 * power).all()


# ------------------------------------------------------------------------------------------------- split and merged


@EXAMPLES
@given(st.integers(2, 60), SEEDS, OFFSETS, st.data())
def test_parts_merged_equal_one_go(count: int, seed: int, offset: float, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, count))
    x, t = pairs(count, seed, offset)
    first = JointMoments(x, t)
    rest = first.empty()
    first.update(x[:cut], t[:cut])
    rest.update(x[cut:], t[cut:])
    before = first.covariance(centred=False)
    for merged in (first.merged(rest), rest.merged(first)):
        assert_same_sums(merged, moments_of(x, t))
    # The parts themselves stay.
    assert (first.count, rest.count) == (cut, count - cut)
    for found, expected in zip(first.covariance(centred=False), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(
        first.merged(rest).error(np.zeros((GROUPS, ROWS, KERNELS)), first.means),
        np.square(t - first.means[1]).mean(0),
        rtol=1e-4,
        atol=1e-4,
    )


def test_empty_sums_hold_nothing_of_those_that_they_came_from() -> None:
    x, t = pairs(50, offset=5.0)
    full = moments_of(x, t)
    fresh = full.empty()
    assert fresh.count == 0
    assert fresh.finite
    fresh.update(x[:10], t[:10])
    assert full.count == 50
    assert_same_sums(fresh, moments_of(x[:10], t[:10]))


@pytest.mark.filterwarnings("error")
def test_batches_without_vectors_change_nothing() -> None:
    x, t = pairs(20)
    started_empty = moments_of(x[:0], t[:0])
    assert started_empty.count == 0
    assert started_empty.finite
    for means, products in zip(started_empty.means, started_empty.covariance(centred=True), strict=True):
        assert not means.any()
        assert not products.any()
    started_empty.update(x, t)
    started_empty.update(x[:0], t[:0])
    assert_same_sums(started_empty, moments_of(x, t))


# ------------------------------------------------------------------------------------------------------ odd values


def test_rows_that_never_vary_have_no_moments_at_all() -> None:
    x, t = pairs(200)
    x[:, :, 1], x[:, :, 4] = 1234.5, 0.0
    xx, xt = moments_of(x, t, [50, 100, 150]).covariance(centred=True)
    # A constant must not seem to vary by the rounding of its mean: the fit divides by variances.
    for dead in (xx[:, [1, 4]], xx[:, :, [1, 4]], xt[:, [1, 4]]):
        assert np.abs(dead).max() < 1e-9 * 1234.5


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("size", "finite"), [(1e12, True), (1e17, True), (1e25, False)])
def test_squares_that_overflow_are_told(size: float, finite: bool) -> None:
    x, t = pairs(30)
    assert moments_of(x * np.float32(size), t).finite is finite
    moments = moments_of(x, t)
    moments.update(x * np.float32(size), t)
    assert moments.finite is finite
    both = moments_of(x * np.float32(size), t * np.float32(size))
    assert both.finite is finite


def test_types_of_the_vectors_do_not_matter() -> None:
    x, t = (np.rint(part) for part in pairs(40))
    assert_same_sums(moments_of(x.astype(np.int64), t.astype(np.float64)), moments_of(x, t))
