"""Calibration, selection and evaluation data, from wherever the user has it.

A dataset can be read any number of times, in batches, with bounded memory, and always gives the same samples in the
same order:

    inputs = [InputSpec("input", np.dtype("float32"), ("batch", 1, 28, 28))]
    dataset = open_dataset("calibration.npz", inputs)
    for batch in dataset.batches(64):
        session.run(None, batch.feeds)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.data_arrays import open_mapping, open_npy, open_npz
from raqu_onnx.data_base import Batch, Dataset, InputSpec
from raqu_onnx.data_checks import fixed_batch
from raqu_onnx.data_images import PictureDataset, PictureOptions
from raqu_onnx.data_python import CalibrationReader, StreamDataset, open_function, open_reader
from raqu_onnx.data_synthetic import synthetic_dataset
from raqu_onnx.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Batch",
    "CalibrationReader",
    "DataSource",
    "Dataset",
    "InputSpec",
    "PictureOptions",
    "open_dataset",
    "split",
    "synthetic_dataset",
    "take",
]

DataSource = str | Path | Mapping[str, Any] | CalibrationReader | Dataset
"""A path or `file.py:function`, arrays by input name, a calibration data reader, or an opened dataset."""

_KINDS = "an .npz or .npy file, a folder of pictures, or file.py:function"


def open_dataset(
    source: DataSource,
    inputs: Sequence[InputSpec],
    *,
    labels: NDArray[Any] | None = None,
    pictures: PictureOptions | None = None,
) -> Dataset:
    """Open data for a model and check that it fits.

    Args:
        source: One of
            an `.npz` file: arrays by model input name, and `labels` if there are any (decompressed into memory);
            an `.npy` file: the samples of a model with one input (memory-mapped);
            a folder of pictures, in class folders or with a `labels.csv` if there are labels;
            `file.py:function`: a function that returns feeds, or (feeds, labels) pairs, and is called for each pass;
            a mapping from input names to arrays, `labels` among them if there are any;
            an onnxruntime `CalibrationDataReader`;
            a dataset that was opened for the same inputs, which is returned as it is.
        inputs: The model's inputs that need feeding; the first dimension of each counts samples.
        labels: Class index per sample, for arrays (file or mapping) that hold none themselves.
        pictures: How pictures become inputs; used for folders only, defaults where it is None.

    Raises:
        DataError: The source cannot be read or does not fit the model, or the model has an input without a sample axis.
    """
    specs = tuple(inputs)
    fixed_batch(specs)  # A model that no data could feed is refused before its data is.
    if isinstance(source, Mapping):
        return open_mapping(source, specs, labels)
    if isinstance(source, str | Path):
        return _open_path(str(source), specs, labels, pictures or PictureOptions())
    if labels is not None:
        raise DataError(f"{_name(source)}: takes its labels from the source itself, not as well")
    if isinstance(source, Dataset):
        return _reuse(source, specs)
    if callable(getattr(source, "get_next", None)):
        return open_reader(source, specs)
    raise DataError(
        f"data of type {type(source).__name__} is unknown; give {_KINDS}, a dict of arrays by "
        "model input, or a CalibrationDataReader"
    )


def take(dataset: Dataset, samples: int) -> Dataset:
    """Samples spread over a whole dataset, or all where it has no more than are wanted.

    Data often lies class by class, or scene by scene: its first samples would be those of a few. From each of as many
    stretches of equal length as samples are wanted, one is drawn, always the same; every n-th sample would follow
    data whose classes take turns. Of a stream, whose length is known only once it was read, the first are taken.

    Args:
        dataset: Where to take them from.
        samples: How many; rounded up to whole units where the model fixes the first dimension.

    Raises:
        ValueError: `samples` is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}, must be at least 1")
    wanted = -(-samples // dataset.unit)
    if dataset.size is None or _is_stream(dataset):
        return _View(dataset, np.arange(wanted * dataset.unit))
    dataset.require_unit(dataset.size)
    units = dataset.size // dataset.unit
    if wanted >= units:
        return _View(dataset, np.arange(units * dataset.unit))
    edges = np.arange(wanted + 1) * units // wanted
    drawn = np.random.default_rng(wanted).integers(edges[:-1], edges[1:])
    return _View(dataset, _samples_of_units(drawn, dataset.unit))


def split(dataset: Dataset, first: float, seed: int) -> tuple[Dataset, Dataset]:
    """Two datasets that share no sample and together hold all whole units.

    Which sample goes where depends on the seed and the number of samples only. A stream is read once to count it;
    nothing of it is kept.

    Args:
        dataset: What to split.
        first: Share of the samples that go to the first, between 0 and 1; each side gets one unit at least.
        seed: Non-negative seed.

    Raises:
        DataError: There are fewer than two units.
        ValueError: `first` is not between 0 and 1.
    """
    if not 0 < first < 1:
        raise ValueError(f"first is {first}, must be between 0 and 1")
    total = _count(dataset)
    units = total // dataset.unit
    if units < 2:
        raise DataError(
            f"{dataset.name}: holds {total} sample{'' if total == 1 else 's'}, too few to split; give more data"
        )
    order = np.random.default_rng(seed).permutation(units)
    cut = min(max(round(units * first), 1), units - 1)
    sides = (np.sort(side) for side in (order[:cut], order[cut:]))
    low, high = (_View(dataset, _samples_of_units(side, dataset.unit)) for side in sides)
    return low, high


class _View(Dataset):
    """Some samples of another dataset, in its order."""

    def __init__(self, base: Dataset, indices: NDArray[np.intp]) -> None:
        digest = hashlib.sha256(f"view\0{base.digest}\0".encode() + indices.astype("<i8").tobytes())
        super().__init__(
            base.name,
            digest.hexdigest(),
            base.inputs,
            has_labels=base.has_labels,
            synthetic=base.synthetic,
        )
        self.base = base
        self._indices = indices
        if base.size is not None:
            self.require_unit(len(indices))

    @property
    def size(self) -> int | None:
        """Number of samples; None while the stream behind it was never read to its end."""
        total = self.base.size
        return None if total is None else int(np.searchsorted(self._indices, total))

    @property
    def top_label(self) -> int | None:
        """That of the dataset behind."""
        return self.base.top_label

    def read(self, most: int, indices: NDArray[np.intp] | None = None) -> Iterator[Batch]:
        """Yield the wanted samples of the dataset behind."""
        mine = self._indices
        wanted = mine if indices is None else mine[indices[indices < len(mine)]]
        return self.base.read(most, wanted)

    def count(self) -> int:
        """Number of samples, by reading the stream behind where that is needed."""
        return int(np.searchsorted(self._indices, _count(self.base)))


def _is_stream(dataset: Dataset) -> bool:
    """Whether it is read from a stream, even if that was read before and its length is known by now."""
    return isinstance(dataset, StreamDataset) or (isinstance(dataset, _View) and _is_stream(dataset.base))


def _count(dataset: Dataset) -> int:
    if isinstance(dataset, StreamDataset | _View):
        return dataset.count()
    return dataset.size if dataset.size is not None else sum(b.size for b in dataset.read(1))


def _samples_of_units(units: NDArray[np.intp], unit: int) -> NDArray[np.intp]:
    return (units[:, None] * unit + np.arange(unit)).reshape(-1)


def _open_path(
    source: str,
    inputs: tuple[InputSpec, ...],
    labels: NDArray[Any] | None,
    pictures: PictureOptions,
) -> Dataset:
    file, colon, function = source.rpartition(":")
    path = Path(source)
    is_function = bool(colon) and file.lower().endswith(".py")
    if labels is not None and (is_function or path.is_dir()):
        raise DataError(f"{source}: takes its labels from the source itself, not as well")
    if is_function:
        return open_function(Path(file), function, inputs)
    if path.is_dir():
        return PictureDataset(path, inputs, pictures)
    if not path.exists():
        raise DataError(f"{source}: not found; give {_KINDS}")
    match path.suffix.lower():
        case ".npz":
            return open_npz(path, inputs, labels)
        case ".npy":
            return open_npy(path, inputs, labels)
        case ".py":
            raise DataError(f"{source}: say which function to call, as {source}:function")
        case _:
            raise DataError(f"{source}: is no kind of data that is known; give {_KINDS}")


def _reuse(dataset: Dataset, inputs: tuple[InputSpec, ...]) -> Dataset:
    """Hand a dataset on where its inputs are the model's; what free dimensions are called does not matter."""

    def shape(specs: Sequence[InputSpec]) -> list[tuple[str, np.dtype[Any], object]]:
        return sorted((s.name, s.dtype, s.fixed_shape) for s in specs)

    if shape(dataset.inputs) != shape(inputs):
        have, want = (", ".join(map(str, specs)) for specs in (dataset.inputs, inputs))
        raise DataError(f"{dataset.name}: was opened for inputs {have}, the model takes {want}; open it again")
    return dataset


def _name(source: object) -> str:
    return source.name if isinstance(source, Dataset) else type(source).__name__
