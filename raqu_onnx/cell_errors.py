"""What real cells do: they are programmed imprecisely, some are stuck, and every read of them is noisy.

The level of a cell stands for its conductance above that of level 0. Errors are relative to it:

* Programming variation: `level * (1 + variation * n)` with n standard normal, drawn once for each cell of each repeat,
  and never below 0. Source: the device model `NormalProportionalDevice` of CrossSim (Sandia National Laboratories),
  whose magnitude is the standard deviation of the random conductance error, normalized to the target conductance.
* Stuck cells: each cell with the given probability, unused ones too; of those a share gives the highest level, the
  others 0, whatever is programmed. Source: the stuck-at faults, spread at random over a crossbar, of "Assessment and
  improvement of the pattern recognition performance of memdiode-based cross-point arrays with randomly distributed
  stuck-at-faults", Electronics 10(19), 2427, 2021; it tells of test chips with around a tenth of their devices faulty.
* Read noise: as variation, but drawn anew at each read. Over the cells of a bitline, driven with x, independent normal
  errors add up to one with the standard deviation `noise * sqrt(sum((x * level)^2))`, which is what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.cells import LevelCache
from raqu_onnx.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.cells import CellSource
    from raqu_onnx.manifest import Manifest

__all__ = ["CellErrors", "DisturbedCells"]

# Keeps the draws of cells apart from those of reads.
_CELLS, _READS = 0, 1


@dataclass(frozen=True)
class CellErrors:
    """How far cells are from ideal.

    Attributes:
        variation: Standard deviation of a programmed level over that level.
        stuck: Probability that a cell is stuck.
        stuck_high: Share of the stuck cells that give the highest level; the others give 0.
        read_noise: Standard deviation of one read of a cell over its level.

    Raises:
        ConfigError: A figure is out of range.
    """

    variation: float = 0.0
    stuck: float = 0.0
    stuck_high: float = 0.5
    read_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("variation", "read_noise"):
            value = getattr(self, name)
            if not 0 <= value < np.inf:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option}: must be 0 or more, a standard deviation over the level, found {value}")
        for name in ("stuck", "stuck_high"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"--{name.replace('_', '-')}: must be a share between 0 and 1, found {value}")

    @property
    def any(self) -> bool:
        """Whether anything differs from ideal cells."""
        return bool(self.variation or self.stuck or self.read_noise)

    def read_rng(self, seed: int, repeat: int) -> np.random.Generator:
        """Where the read noise of one repeat comes from."""
        return np.random.default_rng([_READS, seed, repeat])


class DisturbedCells:
    """Crossbars with variation and stuck cells; the same cell has the same error each time it is asked for.

    Args:
        cells: The levels as programmed.
        manifest: Tells how many bits a cell holds.
        errors: What goes wrong.
        seed: Seed of all repeats.
        repeat: Which of them: another chip with other errors.
    """

    def __init__(self, cells: CellSource, manifest: Manifest, errors: CellErrors, seed: int, repeat: int) -> None:
        self._cells, self._manifest, self._errors = cells, manifest, errors
        self._seed, self._repeat = seed, repeat
        self._cache = LevelCache()

    def crossbar(self, crossbar_type: int, crossbar: int) -> NDArray[Any]:
        """Levels of one crossbar, shape (rows, cols): whole numbers unless they vary."""
        key = (crossbar_type, crossbar)
        found = self._cache.get(key)
        if found is None:
            found = self._disturbed(crossbar_type, crossbar)
            self._cache.put(key, found)
        return found

    def _disturbed(self, crossbar_type: int, crossbar: int) -> NDArray[Any]:
        levels: NDArray[Any] = self._cells.crossbar(crossbar_type, crossbar)
        rng = np.random.default_rng([_CELLS, self._seed, self._repeat, crossbar_type, crossbar])
        full = (1 << self._manifest.chip.crossbars[crossbar_type].cell_bits) - 1
        if self._errors.variation:
            factors = 1 + self._errors.variation * rng.standard_normal(levels.shape, np.float32)
            levels = levels * np.maximum(factors, np.float32(0))
        if self._errors.stuck:
            draws = rng.random((2, *levels.shape))
            values = np.where(draws[1] < self._errors.stuck_high, full, 0)
            levels = np.where(draws[0] < self._errors.stuck, values, levels).astype(levels.dtype)
        return levels
