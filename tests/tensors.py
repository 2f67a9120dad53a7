"""Random tensors that several test files share."""

from __future__ import annotations

import numpy as np

__all__ = ["normal"]


def normal(*shape: int, seed: int = 1, size: float = 1.0) -> np.ndarray:
    """Normally distributed numbers of standard deviation `size`."""
    return (np.random.default_rng(seed).normal(size=shape) * size).astype(np.float32)
