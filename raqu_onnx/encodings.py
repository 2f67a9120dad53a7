"""How a signed weight code is stored in unsigned crossbar cells, and read back.

A code `w` of `b` bits becomes `slices` cells of `c` bits each, least significant slice first. With `v[s]` the level of
slice `s`, every encoding reads back as `w = sum(sign[s] * 2**shift[s] * v[s]) - offset`; only the tables differ:

* ``offset`` (ISAAC, Shafiee et al., ISCA 2016, section 5): stores `w + 2**(b-1)`, reads back minus `2**(b-1)`.
* ``differential-column`` (PRIME, Chi et al., ISCA 2016): `max(w, 0)` and `max(-w, 0)` in columns of their own.
* ``differential-row`` (NeuRRAM, Wan et al., Nature 2022): the same two magnitudes in two rows; the second is driven
  with `-x`.
* ``twos-complement``: the low `b-1` bits in slices of `c`, then one cell with the sign bit that weighs `-2**(b-1)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MAX_BITS", "MIN_BITS", "Encoding", "Polarity", "SignedEncoding", "Slice"]

SignedEncoding = Literal["offset", "differential-column", "differential-row", "twos-complement"]
Polarity = Literal["positive", "negative"]

MIN_BITS = 2
MAX_BITS = 8


@dataclass(frozen=True)
class Slice:
    """One cell of a weight: the weight is the sum of `sign * 2**shift * level` over its slices."""

    shift: int
    sign: Literal[1, -1]
    polarity: Polarity | None = None


@dataclass(frozen=True)
class Encoding:
    """One of the four signed encodings on cells of a given number of bits.

    Args:
        scheme: Which encoding.
        cell_bits: Bits that one cell holds, 1 to 8.
        paired_arrays: The two polarities of `differential-column` sit in two arrays, at the same place in both.

    Raises:
        ValueError: `scheme` is unknown or `cell_bits` is out of range.
    """

    scheme: SignedEncoding
    cell_bits: int
    paired_arrays: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in get_args(SignedEncoding):
            raise ValueError(f"unknown encoding {self.scheme!r}")
        if not 1 <= self.cell_bits <= 8:
            raise ValueError(f"cell_bits is {self.cell_bits}, allowed are 1 to 8")

    @cached_property
    def rows_per_weight(self) -> int:
        """Wordlines that one stored row of the weight matrix takes."""
        return 2 if self.scheme == "differential-row" else 1

    @cached_property
    def arrays_per_placement(self) -> int:
        """Physical arrays that one placement occupies at the same coordinates."""
        return 2 if self.scheme == "differential-column" and self.paired_arrays else 1

    def columns(self, bits: int) -> int:
        """Columns that one kernel of `bits` takes in each array it occupies; 0 for a dropped kernel."""
        if bits == 0:
            return 0
        magnitude = -(-(bits - 1) // self.cell_bits)
        match self.scheme:
            case "offset":
                return -(-bits // self.cell_bits)
            case "differential-column":
                return magnitude if self.paired_arrays else 2 * magnitude
            case "differential-row":
                return magnitude
            case "twos-complement":
                return 1 + magnitude

    def cells_per_weight(self, bits: int) -> int:
        """Programmed cells that one weight of `bits` takes, over all rows, columns and arrays."""
        return self.columns(bits) * self.rows_per_weight * self.arrays_per_placement

    def code_range(self, bits: int) -> tuple[int, int]:
        """Smallest and largest code of `bits`; (0, 0) for a dropped kernel."""
        return code_range(self.scheme, bits)

    def slices(self, bits: int) -> tuple[Slice, ...]:
        """The cells of one weight in storage order, see the module docstring.

        For `differential-column` in one array: all positive slices, then all negative ones. For paired arrays and
        for `differential-row` the tuple holds the positive slices, then the negative ones, which lie in the other
        array or in the second row.
        """
        if bits == 0:
            return ()
        c = self.cell_bits
        match self.scheme:
            case "offset":
                return tuple(Slice(s * c, 1) for s in range(self.columns(bits)))
            case "twos-complement":
                low = tuple(Slice(s * c, 1) for s in range(-(-(bits - 1) // c)))
                return (*low, Slice(bits - 1, -1))
            case _:
                count = -(-(bits - 1) // c)
                return (
                    *(Slice(s * c, 1, "positive") for s in range(count)),
                    *(Slice(s * c, -1, "negative") for s in range(count)),
                )

    def offset(self, bits: int) -> int:
        """What is subtracted from the read-out of one weight: `2**(b-1)` for `offset`, else 0."""
        return 1 << (bits - 1) if self.scheme == "offset" and bits else 0

    def to_levels(self, codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
        """Cell levels of codes of one width.

        Args:
            codes: Integers of any shape.
            bits: Width of every code, 2 to 8.

        Returns:
            Levels, shape `(len(slices(bits)), *codes.shape)`.

        Raises:
            ValueError: A code lies outside `code_range(bits)`.
        """
        low, high = self.code_range(bits)
        wide = codes.astype(np.int64)
        if wide.size and (wide.min() < low or wide.max() > high):
            raise ValueError(f"codes reach from {wide.min()} to {wide.max()}, {bits} bits hold {low} to {high}")
        mask = (1 << self.cell_bits) - 1
        levels = np.empty((len(self.slices(bits)), *codes.shape), np.uint8)
        for index, part in enumerate(self.slices(bits)):
            levels[index] = self._magnitude(wide, bits, part) >> part.shift & mask
        return levels

    def _magnitude(self, codes: NDArray[np.int64], bits: int, part: Slice) -> NDArray[np.int64]:
        match self.scheme:
            case "offset":
                return codes + self.offset(bits)
            case "twos-complement":
                unsigned = codes & ((1 << bits) - 1)
                # The sign cell holds one bit; the slices below it must not see it.
                return unsigned if part.sign < 0 else unsigned & ((1 << (bits - 1)) - 1)
            case _:
                return np.maximum(codes * part.sign, 0)

    def from_levels(self, levels: NDArray[np.integer], bits: int) -> NDArray[np.int64]:
        """Codes behind cell levels, the inverse of `to_levels`.

        Args:
            levels: Shape `(len(slices(bits)), ...)`.
            bits: Width of every code.
        """
        codes = np.full(levels.shape[1:], -self.offset(bits), np.int64)
        for level, part in zip(levels, self.slices(bits), strict=True):
            codes += part.sign * (level.astype(np.int64) << part.shift)
        return codes


def code_range(scheme: SignedEncoding, bits: int) -> tuple[int, int]:
    """Smallest and largest code of `bits` under `scheme`; (0, 0) when `bits` is 0."""
    if bits == 0:
        return 0, 0
    high = (1 << (bits - 1)) - 1
    return (-high if scheme.startswith("differential") else -high - 1), high
