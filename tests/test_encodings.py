from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx.encodings import MAX_BITS, MIN_BITS, Encoding, SignedEncoding, code_range

SCHEMES = get_args(SignedEncoding)
BITS = range(MIN_BITS, MAX_BITS + 1)
CELL_BITS = range(1, 9)

encodings = st.builds(Encoding, st.sampled_from(SCHEMES), st.integers(1, 8), st.booleans())
widths = st.integers(MIN_BITS, MAX_BITS)


def every_code(encoding: Encoding, bits: int) -> np.ndarray:
    low, high = encoding.code_range(bits)
    return np.arange(low, high + 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cell_bits", CELL_BITS)
@pytest.mark.parametrize("bits", BITS)
def test_every_code_comes_back_from_its_cells(scheme: SignedEncoding, cell_bits: int, bits: int) -> None:
    encoding = Encoding(scheme, cell_bits)
    codes = every_code(encoding, bits)
    levels = encoding.to_levels(codes, bits)
    assert levels.dtype == np.uint8
    assert levels.max() < 1 << cell_bits
    np.testing.assert_array_equal(encoding.from_levels(levels, bits), codes)
    # No two codes share a cell pattern.
    assert len(np.unique(levels, axis=1).T) == len(codes)


@given(encoding=encodings, bits=widths, shape=st.lists(st.integers(0, 3), max_size=3), seed=st.integers(0, 2**32 - 1))
def test_codes_of_any_shape(encoding: Encoding, bits: int, shape: list[int], seed: int) -> None:
    low, high = encoding.code_range(bits)
    codes = np.random.default_rng(seed).integers(low, high + 1, shape, dtype=np.int8)
    levels = encoding.to_levels(codes, bits)
    assert levels.shape == (len(encoding.slices(bits)), *shape)
    np.testing.assert_array_equal(encoding.from_levels(levels, bits), codes)


@given(encoding=encodings, bits=widths)
def test_read_out_is_the_documented_sum(encoding: Encoding, bits: int) -> None:
    """w = sum(sign * 2**shift * level) - offset, by hand and not through `from_levels`."""
    codes = every_code(encoding, bits)
    levels = encoding.to_levels(codes, bits).astype(int)
    total = sum(part.sign * 2**part.shift * level for part, level in zip(encoding.slices(bits), levels, strict=True))
    np.testing.assert_array_equal(total - encoding.offset(bits), codes)


@pytest.mark.parametrize(
    ("scheme", "cell_bits", "paired", "columns"),
    [
        # Bits:                        2  3  4  5  6  7  8
        ("offset", 1, False, [2, 3, 4, 5, 6, 7, 8]),
        ("offset", 2, False, [1, 2, 2, 3, 3, 4, 4]),
        ("offset", 3, False, [1, 1, 2, 2, 2, 3, 3]),
        ("offset", 4, False, [1, 1, 1, 2, 2, 2, 2]),
        ("offset", 8, False, [1, 1, 1, 1, 1, 1, 1]),
        ("differential-column", 1, False, [2, 4, 6, 8, 10, 12, 14]),
        ("differential-column", 2, False, [2, 2, 4, 4, 6, 6, 8]),
        ("differential-column", 4, False, [2, 2, 2, 2, 4, 4, 4]),
        ("differential-column", 4, True, [1, 1, 1, 1, 2, 2, 2]),
        ("differential-row", 1, False, [1, 2, 3, 4, 5, 6, 7]),
        ("differential-row", 2, False, [1, 1, 2, 2, 3, 3, 4]),
        ("differential-row", 7, False, [1, 1, 1, 1, 1, 1, 1]),
        ("twos-complement", 1, False, [2, 3, 4, 5, 6, 7, 8]),
        ("twos-complement", 2, False, [2, 2, 3, 3, 4, 4, 5]),
        ("twos-complement", 8, False, [2, 2, 2, 2, 2, 2, 2]),
    ],
)
def test_columns_of_a_kernel(scheme: SignedEncoding, cell_bits: int, paired: bool, columns: list[int]) -> None:
    encoding = Encoding(scheme, cell_bits, paired)
    assert [encoding.columns(bits) for bits in BITS] == columns
    # The two polarities take two columns, two rows or two arrays; any other scheme has one of each.
    copies = 2 if scheme == "differential-row" or paired else 1
    assert [encoding.cells_per_weight(bits) for bits in BITS] == [copies * count for count in columns]


@given(encoding=encodings, bits=widths)
def test_every_cell_of_a_weight_is_one_slice(encoding: Encoding, bits: int) -> None:
    assert encoding.cells_per_weight(bits) == len(encoding.slices(bits))
    copies = encoding.rows_per_weight * encoding.arrays_per_placement
    assert encoding.cells_per_weight(bits) == encoding.columns(bits) * copies


@given(encoding=encodings)
def test_a_dropped_kernel_takes_nothing(encoding: Encoding) -> None:
    assert encoding.columns(0) == encoding.cells_per_weight(0) == encoding.offset(0) == 0
    assert encoding.slices(0) == ()
    assert encoding.code_range(0) == (0, 0)
    levels = encoding.to_levels(np.zeros((2, 3), np.int8), 0)
    assert levels.shape == (0, 2, 3)
    np.testing.assert_array_equal(encoding.from_levels(levels, 0), np.zeros((2, 3)))


@pytest.mark.parametrize("bits", BITS)
def test_code_ranges(bits: int) -> None:
    half = 2 ** (bits - 1)
    assert code_range("offset", bits) == code_range("twos-complement", bits) == (-half, half - 1)
    assert code_range("differential-row", bits) == code_range("differential-column", bits) == (1 - half, half - 1)


@given(encoding=encodings, bits=st.sampled_from([0, *BITS]), beyond=st.integers(1, 300), above=st.booleans())
def test_a_code_outside_the_range_is_refused(encoding: Encoding, bits: int, beyond: int, above: bool) -> None:
    low, high = encoding.code_range(bits)
    code = high + beyond if above else low - beyond
    with pytest.raises(ValueError, match=rf"codes reach from .*, {bits} bits hold {low} to {high}"):
        encoding.to_levels(np.array([0, code]), bits)


def test_slices_of_an_offset_code_from_least_to_most_significant() -> None:
    # -3 + 128 = 125 = 0b01_11_11_01
    np.testing.assert_array_equal(Encoding("offset", 2).to_levels(np.array(-3), 8), [0b01, 0b11, 0b11, 0b01])


def test_slices_of_a_twos_complement_code() -> None:
    # -3 is 1_0_11_01 in six bits: the sign stands alone, and the slice below it holds what is left of five bits.
    encoding = Encoding("twos-complement", 2)
    np.testing.assert_array_equal(encoding.to_levels(np.array(-3), 6), [0b01, 0b11, 0b1, 1])
    assert [(part.shift, part.sign) for part in encoding.slices(6)] == [(0, 1), (2, 1), (4, 1), (5, -1)]


@pytest.mark.parametrize("scheme", ["differential-column", "differential-row"])
def test_slices_of_a_differential_code(scheme: SignedEncoding) -> None:
    # Magnitude 13 = 0b11_01: the positive slices come first, then the negative ones.
    encoding = Encoding(scheme, 2)
    np.testing.assert_array_equal(encoding.to_levels(np.array([13, -13]), 5).T, [[1, 3, 0, 0], [0, 0, 1, 3]])
    assert [(part.shift, part.sign, part.polarity) for part in encoding.slices(5)] == [
        (0, 1, "positive"),
        (2, 1, "positive"),
        (0, -1, "negative"),
        (2, -1, "negative"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gray", 2), "unknown encoding 'gray'"),
        (("offset", 0), "cell_bits is 0, allowed are 1 to 8"),
        (("offset", 9), "cell_bits is 9, allowed are 1 to 8"),
    ],
)
def test_what_is_no_encoding(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoding(*arguments)


def test_only_paired_differential_columns_take_two_arrays() -> None:
    paired = [scheme for scheme in SCHEMES if Encoding(scheme, 2, True).arrays_per_placement == 2]
    assert paired == ["differential-column"]
    assert all(Encoding(scheme, 2).arrays_per_placement == 1 for scheme in SCHEMES)
