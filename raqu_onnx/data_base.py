"""What every kind of data source shares: model inputs, batches, and the dataset they make up.

The first dimension of every model input counts samples. Where the model fixes it to `n` (which may be a batch, or an
axis that is no batch at all, such as the channels of a picture without a batch axis), `n` consecutive samples form a
unit that stays together: batches, `take` and `split` work in whole units, and an incomplete unit at the end is left
out and logged.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.data_checks import fixed_batch
from raqu_onnx.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Batch",
    "Dataset",
    "IndexedDataset",
    "InputSpec",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputSpec:
    """A model input that needs feeding.

    Attributes:
        name: The input's name in the model.
        dtype: Element type that onnxruntime expects.
        shape: Dimensions, the first of which counts samples; a string, None or a negative number is a free
            dimension. None as a whole: the rank is unknown, and no data can be opened for the model.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None

    @property
    def fixed_shape(self) -> tuple[int | None, ...]:
        """The shape with None at every free dimension; `()` where the rank is unknown."""
        return tuple(d if isinstance(d, int) and d >= 0 else None for d in self.shape or ())

    @property
    def shape_text(self) -> str:
        """The shape as users read it, such as `[batch, 3, 224, 224]`."""
        return "[" + ", ".join("?" if d is None else str(d) for d in self.shape or ()) + "]"

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype}{self.shape_text}"


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that go through the model together.

    The arrays may be views of the source: do not write to them.

    Attributes:
        feeds: Array by model input name, in the order of the model's inputs; equal first dimensions.
        labels: Class index per sample, int64 of shape (samples,), or None where the source has no labels.
    """

    feeds: dict[str, NDArray[Any]]
    labels: NDArray[np.int64] | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(next(iter(self.feeds.values())))

    def select(self, where: slice | NDArray[np.intp]) -> Batch:
        """The samples at the given positions; a view for a slice, a copy for an index array."""
        return Batch(
            {name: array[where] for name, array in self.feeds.items()},
            None if self.labels is None else self.labels[where],
        )


class Dataset(ABC):
    """Samples that can be read any number of times, in batches, with bounded memory, always in the same order.

    Attributes:
        name: Short name for messages and the manifest: a file name, never a path.
        digest: SHA-256 (hexadecimal) of what the samples are made from.
        inputs: The model inputs that the samples feed.
        has_labels: Whether every batch carries class indices.
        synthetic: Whether the samples are generated and not real data.
        unit: Consecutive samples that stay together: the model's fixed first dimension, else 1.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        inputs: Sequence[InputSpec],
        *,
        has_labels: bool,
        synthetic: bool = False,
    ) -> None:
        fixed = fixed_batch(inputs)
        self.name = name
        self.digest = digest
        self.inputs = tuple(inputs)
        self.has_labels = has_labels
        self.synthetic = synthetic
        self.unit = fixed or 1
        self._fixed = fixed
        self._top_label: int | None = None

    @property
    def top_label(self) -> int | None:
        """Largest class index of what was read so far, for files that of all samples; None without labels."""
        return self._top_label

    def _note_labels(self, labels: NDArray[np.integer] | None) -> None:
        if labels is not None and labels.size:
            self._top_label = max(int(labels.max()), -1 if self._top_label is None else self._top_label)

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Number of samples, an incomplete last unit included; None while a stream was never read to its end."""

    @abstractmethod
    def read(self, most: int, indices: NDArray[np.intp] | None = None) -> Iterator[Batch]:
        """Yield checked samples in order, in pieces of any size; `batches` cuts them to size.

        Args:
            most: Samples that are wanted at once; a source that decides for itself may yield more or fewer.
            indices: Positions of the samples wanted, strictly ascending; None for all. Positions behind the end of
                a stream are left out.
        """

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield all samples in batches.

        Args:
            batch_size: Samples per batch (the last one may be smaller); a model with a fixed first dimension gets
                exactly that many instead. Where the other dimensions change from sample to sample, a batch ends.

        Raises:
            DataError: The source is damaged, does not fit the model, or holds less than one unit.
            ValueError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        return self._batches(self._fixed or batch_size)

    def _batches(self, size: int) -> Iterator[Batch]:
        left_out = 0
        empty = True
        for batch in _rechunk(self.read(size), size):
            if self._fixed and batch.size < size:
                left_out += batch.size
                continue
            empty = False
            yield batch
        if empty:
            raise self._too_few(left_out)
        if left_out:
            _log.info("%s: left out %d samples that do not fill a batch of %d", self.name, left_out, size)

    def require_unit(self, samples: int) -> None:
        """Refuse a source with no sample, or with fewer than the model's fixed first dimension.

        Raises:
            DataError: `samples` is below `unit`.
        """
        if samples < self.unit:
            raise self._too_few(samples)

    def _too_few(self, samples: int) -> DataError:
        need = f"the model takes exactly {self.unit} of one shape at a time" if self._fixed else "need one"
        return DataError(f"{self.name}: holds {samples} samples, {need}; give more data")


class IndexedDataset(Dataset):
    """A dataset that knows its size and reaches every sample directly."""

    def __init__(
        self,
        name: str,
        digest: str,
        inputs: Sequence[InputSpec],
        *,
        size: int,
        has_labels: bool,
        synthetic: bool = False,
    ) -> None:
        super().__init__(name, digest, inputs, has_labels=has_labels, synthetic=synthetic)
        self.require_unit(size)
        self._size = size

    @property
    def size(self) -> int:
        """Number of samples."""
        return self._size

    @abstractmethod
    def load(self, where: slice | NDArray[np.intp]) -> Batch:
        """The samples at the given positions."""

    def read(self, most: int, indices: NDArray[np.intp] | None = None) -> Iterator[Batch]:
        """Yield the samples in pieces of `most`."""
        if indices is None:
            for start in range(0, self._size, most):
                yield self.load(slice(start, min(start + most, self._size)))
        else:
            for start in range(0, len(indices), most):
                yield self.load(indices[start : start + most])


def _rechunk(pieces: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Cut and join pieces to `size` samples each, except before a change of shape and at the end."""
    held: list[Batch] = []
    room = size
    for piece in pieces:
        if held and _sample_shapes(piece) != _sample_shapes(held[0]):
            yield _join(held)
            held, room = [], size
        start = 0
        while piece.size - start >= room:
            yield _join([*held, piece.select(slice(start, start + room))])
            start += room
            held, room = [], size
        if start < piece.size:
            # A copy: the source may write its next piece into the same memory.
            held.append(piece.select(np.arange(start, piece.size)))
            room -= piece.size - start
    if held:
        yield _join(held)


def _sample_shapes(batch: Batch) -> list[tuple[int, ...]]:
    return [array.shape[1:] for array in batch.feeds.values()]


def _join(parts: Sequence[Batch]) -> Batch:
    labels = [part.labels for part in parts if part.labels is not None]
    return Batch(
        {name: _concatenate([p.feeds[name] for p in parts]) for name in parts[0].feeds},
        _concatenate(labels) if labels else None,
    )


def _concatenate(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.ascontiguousarray(arrays[0]) if len(arrays) == 1 else np.concatenate(arrays)
