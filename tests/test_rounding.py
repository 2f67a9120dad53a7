"""Rounding codes one after the other: the error that is told is the true one, and moving codes only lowers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.rounding import DAMPING, Rounder, _inverse_factor

if TYPE_CHECKING:
    from collections.abc import Iterator

# Sweeps of `polish` after which it stops though codes may still move.
SWEEPS = 4
SIZES = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 9, 63, 64, 65, 130]), st.integers(1, 5))


@dataclass(frozen=True)
class Problem:
    """Weights to round, with what is needed to judge the codes."""

    weight: np.ndarray
    second: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def rounder(self, damping: float = DAMPING) -> Rounder:
        return Rounder(self.weight, self.second, damping=damping)

    def plain(self) -> np.ndarray:
        codes = np.rint(self.weight / self.scale[:, None])
        return np.asarray(np.clip(codes, self.low[:, None], self.high[:, None]))

    def damped(self, damping: float = DAMPING) -> np.ndarray:
        rows = self.second.shape[1]
        power = np.trace(self.second, axis1=1, axis2=2) / rows
        return np.asarray(self.second + damping * power[:, None, None] * np.eye(rows))

    def error(self, codes: np.ndarray, damping: float = DAMPING) -> np.ndarray:
        """`d^T H d` of every kernel."""
        d = self.weight - codes * self.scale[:, None]
        return np.asarray(np.einsum("gkm,gkl,glm->gm", d, self.damped(damping), d))

    def assert_in_range(self, codes: np.ndarray) -> None:
        assert codes.shape == self.weight.shape
        np.testing.assert_array_equal(codes, np.rint(codes))
        assert (codes >= self.low[:, None]).all()
        assert (codes <= self.high[:, None]).all()


def problem(groups: int = 1, rows: int = 12, kernels: int = 7, bits: int = 3, seed: int = 0) -> Problem:
    """Correlated inputs with a mean; scales that clip a little."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, 2 * rows + 10, rows)) @ rng.normal(size=(groups, rows, rows)) / np.sqrt(rows) + 0.5
    weight = rng.normal(size=(groups, rows, kernels))
    low = np.full((groups, kernels), -(2.0 ** (bits - 1)))
    scale = 0.9 * np.abs(weight).max(1) / 2 ** (bits - 1)
    return Problem(weight, x.transpose(0, 2, 1) @ x / x.shape[1], scale, low, -low - 1)


def descended(given: Problem, codes: np.ndarray, sweeps: int) -> np.ndarray:
    """Coordinate descent without blocks: row by row in order of falling input power, each slope computed anew."""
    codes, damped = codes.copy(), given.damped()
    for g, moments in enumerate(damped):
        order = np.argsort(-np.diagonal(given.second[g]), kind="stable")
        for m in range(codes.shape[2]):
            d = given.weight[g, :, m] - codes[g, :, m] * given.scale[g, m]
            for _ in range(sweeps):
                before = codes[g, :, m].copy()
                for row in order:
                    free = codes[g, row, m] + moments[row] @ d / (moments[row, row] * given.scale[g, m])
                    code = np.clip(np.rint(free), given.low[g, m], given.high[g, m])
                    d[row] -= (code - codes[g, row, m]) * given.scale[g, m]
                    codes[g, row, m] = code
                if (codes[g, :, m] == before).all():
                    break
    return codes


def moved_by_one(given: Problem, codes: np.ndarray) -> Iterator[np.ndarray]:
    """The codes with those of one row moved up or down, where their range allows it."""
    for step in (-1.0, 1.0):
        for row in range(codes.shape[1]):
            moved = codes.copy()
            moved[:, row] = np.clip(moved[:, row] + step, given.low, given.high)
            yield moved


# --------------------------------------------------------------------------------------------------------- rounding


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(2, 8), st.integers(0, 1000), st.sampled_from([1e-4, 0.01, 0.3, 5.0]))
def test_the_error_told_is_that_of_the_codes(size: tuple[int, int, int], bits: int, seed: int, damping: float) -> None:
    given = problem(*size, bits=bits, seed=seed)
    codes, error = given.rounder(damping).round(given.scale, given.low, given.high)
    given.assert_in_range(codes)
    assert error.shape == given.scale.shape
    np.testing.assert_allclose(error, given.error(codes, damping), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rows", [12, 150])
def test_rounding_in_turn_beats_plain_rounding(bits: int, groups: int, rows: int) -> None:
    better, sums = [], np.zeros(2)
    for seed in range(4):
        given = problem(groups, rows, bits=bits, seed=seed)
        errors = given.rounder().round(given.scale, given.low, given.high)[1], given.error(given.plain())
        better.append(np.mean(errors[0] < errors[1]))
        sums += [error.sum() for error in errors]
    assert np.mean(better) > 0.8
    assert sums[0] < 0.7 * sums[1]


@pytest.mark.parametrize("rows", [30, 130])
def test_rounding_is_gptq_row_by_row(rows: int) -> None:
    given = problem(2, rows, 4, seed=3)
    codes, _ = given.rounder().round(given.scale, given.low, given.high)
    for g in range(2):
        order = np.argsort(-np.diagonal(given.second[g]), kind="stable")
        left = given.weight[g][order].copy()
        inverse = np.linalg.inv(given.damped()[g][np.ix_(order, order)])
        expected = np.empty_like(left)
        for row in range(rows):
            # What is left of the inverse once the rows before are fixed: its Schur complement.
            expected[row] = np.clip(np.rint(left[row] / given.scale[g]), given.low[g], given.high[g])
            error = (left[row] - expected[row] * given.scale[g]) / inverse[0, 0]
            left[row + 1 :] -= inverse[1:, :1] * error
            inverse = inverse[1:, 1:] - inverse[1:, :1] @ inverse[:1, 1:] / inverse[0, 0]
        np.testing.assert_array_equal(codes[g][order], expected)


def test_more_damping_is_closer_to_plain_rounding() -> None:
    dampings = (1e-3, 0.05, 1.0, 20.0, 1e4)
    apart = np.zeros(len(dampings))
    for seed in range(6):
        given = problem(rows=80, bits=4, seed=seed)
        for index, damping in enumerate(dampings):
            codes, _ = given.rounder(damping).round(given.scale, given.low, given.high)
            apart[index] += np.mean(codes != given.plain())
    assert (np.diff(apart) <= 0).all()
    assert apart[0] > 2
    assert apart[-1] < 0.02


def test_inputs_that_do_not_vary_together_are_rounded_plainly() -> None:
    given = problem(2, 70)
    given = Problem(given.weight, given.second * np.eye(70), given.scale, given.low, given.high)
    codes, _ = given.rounder().round(given.scale, given.low, given.high)
    np.testing.assert_array_equal(codes, given.plain())
    np.testing.assert_array_equal(given.rounder().polish(codes, given.scale, given.low, given.high), codes)


def test_groups_are_rounded_as_if_each_were_alone() -> None:
    given = problem(3, 70, 4)
    rounder = given.rounder()
    codes, error = rounder.round(given.scale, given.low, given.high)
    polished = rounder.polish(given.plain(), given.scale, given.low, given.high)
    for g in range(3):
        one = slice(g, g + 1)
        limits = given.scale[one], given.low[one], given.high[one]
        alone = Rounder(given.weight[one], given.second[one])
        np.testing.assert_array_equal(codes[one], alone.round(*limits)[0])
        np.testing.assert_allclose(error[one], alone.round(*limits)[1], rtol=1e-9)
        np.testing.assert_array_equal(polished[one], alone.polish(given.plain()[one], *limits))


def test_kernels_without_codes_stay_zero() -> None:
    given = problem(2, 70)
    given.low[:, 2], given.high[:, 2] = 0, 0
    codes, error = given.rounder().round(given.scale, given.low, given.high)
    assert not codes[:, :, 2].any()
    polished = given.rounder().polish(codes, given.scale, given.low, given.high)
    assert not polished[:, :, 2].any()
    zeros = given.error(np.zeros_like(codes))
    np.testing.assert_allclose(error[:, 2], zeros[:, 2], rtol=1e-9)


# -------------------------------------------------------------------------------------------------------- polishing


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(2, 8), st.integers(0, 1000), st.booleans())
def test_polishing_never_raises_the_error(size: tuple[int, int, int], bits: int, seed: int, rounded: bool) -> None:
    given = problem(*size, bits=bits, seed=seed)
    rounder = given.rounder()
    start = rounder.round(given.scale, given.low, given.high)[0] if rounded else given.plain()
    kept = start.copy()
    polished = rounder.polish(start, given.scale, given.low, given.high)
    np.testing.assert_array_equal(start, kept)
    given.assert_in_range(polished)
    before, after = given.error(start), given.error(polished)
    assert (after <= before * (1 + 1e-9) + 1e-12).all()
    changed = (polished != start).any(1)
    np.testing.assert_array_equal(changed & (after >= before), np.zeros_like(changed))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("groups", "rows"), [(1, 12), (5, 12), (2, 100)])
def test_where_polishing_rests_no_single_move_helps(bits: int, groups: int, rows: int) -> None:
    given = problem(groups, rows, bits=bits, seed=16)
    rounder = given.rounder()
    polished, rests = given.plain(), False
    for _ in range(30):
        before = polished
        polished = rounder.polish(polished, given.scale, given.low, given.high)
        rests = rests or bool((polished == before).all())
    assert rests
    assert given.error(polished).sum() < 0.9 * given.error(given.plain()).sum()
    least = given.error(polished)
    for moved in moved_by_one(given, polished):
        assert (given.error(moved) >= least * (1 - 1e-9)).all()


@pytest.mark.parametrize("rows", [20, 64, 65, 150])
@pytest.mark.parametrize("bits", [2, 4])
def test_blocks_give_the_codes_of_plain_coordinate_descent(rows: int, bits: int) -> None:
    given = problem(2, rows, 5, bits=bits, seed=rows)
    start = given.plain()
    expected = descended(given, start, SWEEPS)
    found = given.rounder().polish(start, given.scale, given.low, given.high)
    np.testing.assert_array_equal(found, expected)
    # It does not hold because nothing moves, or all has moved after one sweep.
    assert (expected != start).mean() > 0.05
    assert (descended(given, start, 1) != expected).any()


# ------------------------------------------------------------------------------------------------------ projections


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(0, 1000))
def test_projections_give_the_scale_of_least_squares(size: tuple[int, int, int], seed: int) -> None:
    given = problem(*size, seed=seed)
    codes = given.plain()
    along, power = given.rounder().projections(codes)
    assert along.shape == power.shape == given.scale.shape
    for g, moments in enumerate(given.damped()):
        root = np.linalg.cholesky(moments).T
        for m in range(size[2]):
            q, w = root @ codes[g, :, m], root @ given.weight[g, :, m]
            np.testing.assert_allclose(along[g, m], q @ w, rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(power[g, m], q @ q, rtol=1e-8, atol=1e-9)
            if codes[g, :, m].any():
                best = np.linalg.lstsq(q[:, None], w, rcond=None)[0][0]
                assert along[g, m] / power[g, m] == pytest.approx(best, rel=1e-6)


def test_codes_of_a_representable_weight_keep_their_scale() -> None:
    given = problem(2, 70)
    codes = given.plain()
    exact = Problem(codes * given.scale[:, None], given.second, given.scale, given.low, given.high)
    along, power = exact.rounder().projections(codes)
    np.testing.assert_allclose(along / power, given.scale, rtol=1e-9)
    found, error = exact.rounder().round(given.scale, given.low, given.high)
    np.testing.assert_array_equal(found, codes)
    assert error.max() < 1e-20


# ---------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("rank", [30, 3])
@pytest.mark.parametrize("damping", [DAMPING, 0.5])
def test_the_factor_of_the_inverse_moments(rank: int, damping: float) -> None:
    x = np.random.default_rng(14).normal(size=(200, rank)) @ np.random.default_rng(15).normal(size=(rank, 20))
    second = x.T @ x / 200
    order, moments, factor = _inverse_factor(second.copy(), damping)
    assert (np.diff(np.diagonal(second)[order]) <= 0).all()
    np.testing.assert_array_equal(factor, np.triu(factor))
    damped = second[np.ix_(order, order)] + damping * np.trace(second) / 20 * np.eye(20)
    np.testing.assert_allclose(moments, damped)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(20), atol=1e-9)


@pytest.mark.parametrize("case", ["zero", "one vector", "not quite semidefinite"])
def test_moments_that_say_little_give_sound_codes(case: str) -> None:
    given = problem(1, 20, 4, bits=8)
    if case == "zero":
        second = np.zeros((1, 20, 20))
    elif case == "one vector":
        second = np.ones((1, 20, 20))
    else:
        # Rounded sums: an eigenvalue of -5 % of the mean power, which the damping does not make up for.
        second = np.eye(20)[None].copy()
        second[0, 3, 3] = -0.05
    rounder = Rounder(given.weight, second)
    codes, error = rounder.round(given.scale, given.low, given.high)
    given.assert_in_range(codes)
    assert np.isfinite(error).all()
    assert (error >= 0).all()
    decoded = rounder.polish(codes, given.scale, given.low, given.high) * given.scale[:, None]
    assert np.corrcoef(decoded.reshape(-1), given.weight.reshape(-1))[0, 1] > 0.9


def test_the_bytes_are_those_of_its_arrays() -> None:
    rounder = problem(2, 30, 5).rounder()
    held = sum(item.nbytes for item in vars(rounder).values() if isinstance(item, np.ndarray))
    assert 0.95 * held <= rounder.nbytes <= held
