"""The ADC at the end of a bitline: its range, what it clips, and the range that would be enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.hardware import Chip

__all__ = ["Adc", "Conversions"]


@dataclass(frozen=True)
class Adc:
    """A converter whose step is one level of one cell driven with an input of 1.

    With n bits it gives `0 .. 2^n - 1`, or `-2^(n-1) .. 2^(n-1) - 1` where it is signed; sums beyond are clipped to the
    nearest end, sums between two steps are rounded to the nearest: the ADC counts levels, as in Shafiee et al., ISAAC,
    ISCA 2016. R wordlines of w-bit cells driven with v bits then take `log2(R) + v + w` bits, one less where v or w is
    1, since no sum exceeds `R * (2^v - 1) * (2^w - 1)` (derived here), and one less again where columns are stored
    flipped. For ISAAC (R = 128, v = 1, w = 2) that is 9 bits, as in CrossSim's `ISAAC.json`, and 8 with flipping, as in
    CiMLoop's model of it.

    Attributes:
        bits: Resolution; None for an ideal converter, which neither clips nor rounds.
        signed: It reads negative sums.
    """

    bits: int | None
    signed: bool = False

    @classmethod
    def of(cls, chip: Chip) -> Adc:
        """The converter of a chip."""
        return cls(chip.adc_bits, chip.adc_signed)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest sum that is not clipped."""
        if self.bits is None:
            return -math.inf, math.inf
        if self.signed:
            return -float(1 << (self.bits - 1)), float(1 << (self.bits - 1)) - 1
        return 0.0, float(1 << self.bits) - 1

    def bits_for(self, low: float, high: float) -> int:
        """Fewest bits, at least 1, with which no sum between two is clipped.

        A converter that is not signed can never hold a sum below 0; one of the next sign is counted for it.
        """
        low, high = math.floor(low), math.ceil(high)
        if self.signed or low < 0:
            return 1 + max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0)
        return max(1, high.bit_length())

    def convert(self, sums: NDArray[np.floating[Any]]) -> int:
        """Convert sums in place.

        Returns:
            How many were clipped.
        """
        if self.bits is None:
            return 0
        np.rint(sums, out=sums)
        low, high = self.range
        clipped = int(np.count_nonzero(sums > high)) + int(np.count_nonzero(sums < low))
        if clipped:
            np.clip(sums, low, high, out=sums)
        return clipped


@dataclass
class Conversions:
    """Conversions counted while a node ran.

    Attributes:
        total: All of them.
        clipped: Those whose sum lay outside the ADC's range.
        low: Smallest sum before the ADC, 0 where there is none below.
        high: Largest sum.
    """

    total: int = 0
    clipped: int = 0
    low: float = 0.0
    high: float = 0.0

    def convert(self, adc: Adc, sums: NDArray[np.floating[Any]]) -> None:
        """Convert sums in place and count them."""
        self.total += sums.size
        if sums.size:
            self.low = min(self.low, float(sums.min()))
            self.high = max(self.high, float(sums.max()))
        self.clipped += adc.convert(sums)

    def __add__(self, other: Conversions) -> Conversions:
        return Conversions(
            self.total + other.total,
            self.clipped + other.clipped,
            min(self.low, other.low),
            max(self.high, other.high),
        )
