"""Fashion-MNIST: read its IDX files, split the training images, write the package's data file."""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

#: Fixed, and not the training seed: the data file must not change when a model is trained again.
SPLIT_SEED = 2020
SELECTION_COUNT = 2_000
CALIBRATION_COUNT = 1_024

_IDX_UINT8 = 0x08


class DataError(Exception):
    """A data file is missing or is not what it should be."""


@dataclass(frozen=True)
class LabelledImages:
    """Images ``[N, 28, 28]`` and their class indices ``[N]``, both uint8."""

    images: Bytes
    labels: Bytes

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Indices) -> "LabelledImages":
        """Return the images at `indices`, in that order."""
        return LabelledImages(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Splits:
    """The four sets; `calibration` lies inside `training`, the other two are never trained on."""

    training: LabelledImages
    calibration: LabelledImages
    selection: LabelledImages
    test: LabelledImages


def read_idx(path: Path) -> Bytes:
    """Read one gzipped IDX file of unsigned bytes, of any rank.

    Raises:
        DataError: the file is missing, not IDX, or not of the size that its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as gzip ({error}); apt-get install dataset-fashion-mnist") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, _IDX_UINT8)):
        raise DataError(f"{path}: not an IDX file of unsigned bytes")
    rank = content[3]
    header_size = 4 + 4 * rank
    if len(content) < header_size:
        raise DataError(f"{path}: the IDX header is cut short")
    shape = struct.unpack(f">{rank}I", content[4:header_size])
    values = np.frombuffer(content, dtype=np.uint8, offset=header_size)
    if values.size != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path}: {values.size} bytes where the header says {shape}")
    return values.reshape(shape)


def read_fashion_mnist(data_dir: Path) -> tuple[LabelledImages, LabelledImages]:
    """Return the 60,000 training and the 10,000 test images of the IDX files in `data_dir`."""
    train, test = (
        LabelledImages(
            read_idx(data_dir / f"{prefix}-images-idx3-ubyte.gz"),
            read_idx(data_dir / f"{prefix}-labels-idx1-ubyte.gz"),
        )
        for prefix in ("train", "t10k")
    )
    for name, part, count in (("training", train, 60_000), ("test", test, 10_000)):
        if part.images.shape != (count, 28, 28) or part.labels.shape != (count,):
            raise DataError(f"{data_dir}: {name} set has shapes {part.images.shape} and {part.labels.shape}")
    return train, test


def balanced_order(labels: Bytes, rng: np.random.Generator) -> Indices:
    """Return all indices in random order, dealt out class by class.

    Every prefix is class-balanced to within one, until the smallest class is used up.
    """
    shuffled = rng.permutation(len(labels))
    round_of = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels[shuffled] == label)
        round_of[members] = np.arange(len(members))
    return shuffled[np.lexsort((labels[shuffled], round_of))]


def split(data_dir: Path) -> Splits:
    """Split the training images: the selection set, and the rest, of which a part calibrates."""
    train, test = read_fashion_mnist(data_dir)
    order = balanced_order(train.labels, np.random.default_rng(SPLIT_SEED))
    selection, trained = order[:SELECTION_COUNT], order[SELECTION_COUNT:]
    return Splits(
        training=train.take(trained),
        calibration=train.take(trained[:CALIBRATION_COUNT]),
        selection=train.take(selection),
        test=test,
    )


def write_data_file(splits: Splits, path: Path) -> None:
    """Write calibration, selection and test set as one npz; the same bytes for the same zlib."""
    arrays: dict[str, Bytes] = {}
    for name in ("calibration", "selection", "test"):
        part: LabelledImages = getattr(splits, name)
        arrays[f"{name}_images"] = part.images
        arrays[f"{name}_labels"] = part.labels
    temporary = path.with_name(f".{path.name}.partial.npz")
    np.savez_compressed(temporary, allow_pickle=False, **arrays)
    temporary.replace(path)
