"""Generated inputs, for a run without data.

They have the amplitude spectrum of natural pictures, so that convolutions see smooth structure and not white noise.
They are no substitute for data: whoever uses them says so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.data_base import Batch, IndexedDataset, InputSpec
from raqu_onnx.data_checks import fixed_batch
from raqu_onnx.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SyntheticDataset", "synthetic_dataset"]

# Token ids, positions and the like: small enough for nearly every table that they index.
_INTEGERS_BELOW = 8


class SyntheticDataset(IndexedDataset):
    """Seeded random samples, each of which depends on the seed and its position only."""

    def __init__(self, inputs: Sequence[InputSpec], samples: int, seed: int) -> None:
        if samples < 1:
            raise ValueError(f"samples is {samples}, must be at least 1")
        unit = fixed_batch(inputs) or 1
        self._shapes = [_sample_shape(spec) for spec in inputs]
        recipe = f"synthetic\0{seed}\0{samples}\0" + "\0".join(str(spec) for spec in inputs)
        super().__init__(
            "synthetic",
            hashlib.sha256(recipe.encode()).hexdigest(),
            inputs,
            size=-(-samples // unit) * unit,
            has_labels=False,
            synthetic=True,
        )
        self._seed = seed

    def load(self, where: slice | NDArray[np.intp]) -> Batch:
        """Generate the samples at the given positions."""
        positions = np.arange(self.size)[where]
        feeds = {}
        for number, (spec, shape) in enumerate(zip(self.inputs, self._shapes, strict=True)):
            array = np.empty((len(positions), *shape), spec.dtype)
            for row, position in enumerate(positions):
                rng = np.random.default_rng((self._seed, number, int(position)))
                array[row] = _sample(rng, spec.dtype, shape)
            feeds[spec.name] = array
        return Batch(feeds)


def synthetic_dataset(inputs: Sequence[InputSpec], samples: int, seed: int) -> SyntheticDataset:
    """Seeded random inputs for a model, with zero mean and about unit variance.

    Float inputs have a 1/f amplitude spectrum over all their dimensions (plain Gaussian where a sample has fewer than
    two), with contrast and brightness that vary from sample to sample; uint8 inputs of rank 4 are pictures of the same
    kind in 0..255; other integers are 0..7, booleans fair coins.

    Args:
        inputs: The model's inputs.
        samples: Number of samples; rounded up to whole batches where the model fixes the batch.
        seed: Non-negative seed.

    Raises:
        DataError: A dimension other than the first is not fixed, or an element type cannot be generated.
        ValueError: `samples` is below 1.
    """
    return SyntheticDataset(inputs, samples, seed)


def _sample_shape(spec: InputSpec) -> tuple[int, ...]:
    if spec.dtype.kind not in "fiub" and not _is_extension_float(spec.dtype):
        raise DataError(f"model input {spec.name!r} is {spec.dtype}, which cannot be generated; give calibration data")
    shape: list[int] = []
    for axis, size in enumerate(spec.fixed_shape):
        if axis and size is None:
            raise DataError(
                f"model input {spec.name!r} has no fixed size in dimension {axis} "
                f"(shape {spec.shape_text}), so no input can be generated; give calibration data "
                "or fix the dimension in the model"
            )
        shape.append(size or 0)
    return tuple(shape[1:])


def _is_extension_float(dtype: np.dtype[Any]) -> bool:
    """Whether it is bfloat16 or a float8, which numpy knows only through ml_dtypes."""
    return "float" in dtype.name


def _sample(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu" and not (dtype == np.uint8 and len(shape) == 3):
        return rng.integers(0, _INTEGERS_BELOW, shape).astype(dtype)
    contrast, brightness = rng.uniform(0.5, 1.5), rng.normal(0.0, 0.25)
    field = contrast * _field(rng, shape) + brightness
    if dtype.kind == "u":
        return np.clip(np.rint(127.5 + 64.0 * field), 0, 255).astype(dtype)
    return field.astype(dtype)


def _field(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A Gaussian field of zero mean and unit variance whose amplitude falls as 1/f.

    Source: Field, "Relations between the statistics of natural images and the response properties of cortical cells",
    JOSA A 4(12), 1987: the amplitude spectra of natural pictures fall about as 1/f.
    """
    noise = rng.standard_normal(shape)
    if len(shape) < 2 or math.prod(shape) < 2:
        return noise
    square = np.zeros(())
    for axis, size in enumerate(shape):
        axis_frequency = np.fft.fftfreq(size) if axis + 1 < len(shape) else np.fft.rfftfreq(size)
        square = square + (axis_frequency**2).reshape((-1,) + (1,) * (len(shape) - axis - 1))
    frequency = np.maximum(np.sqrt(square), 1 / max(shape))
    axes = tuple(range(len(shape)))
    field = np.fft.irfftn(np.fft.rfftn(noise, axes=axes) / frequency, s=shape, axes=axes)
    field -= field.mean()
    return np.asarray(field / (field.std() or 1.0), dtype=np.float64)
