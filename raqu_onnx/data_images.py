"""Samples from a folder of pictures.

A picture is brought to RGB or grey (ITU-R 601 luma), resized (bilinear) and cropped at its centre the way torchvision's
`Resize` and `CenterCrop` do it, then turned into `(pixel * scale - mean) / std` per channel. Pictures are decoded batch
by batch; EXIF rotation is ignored, as training pipelines do.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from raqu_onnx.data_base import Batch, IndexedDataset, InputSpec
from raqu_onnx.data_checks import fixed_batch, one_line
from raqu_onnx.errors import DataError, RaquError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["PictureDataset", "PictureOptions"]

_log = logging.getLogger(__name__)

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_LABELS = "labels.csv"

_Positive = Annotated[int, Field(gt=0)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PictureOptions(BaseModel):
    """How pictures become model inputs.

    Attributes:
        size: Height and width of the crop that the model gets; None takes the model's own.
        resize: Length of a picture's shorter side before the crop; None resizes so that the crop just fits in.
        scale: Factor on the pixels, which are 0..255.
        mean: Subtracted after scaling; one value for all channels, or one per channel.
        std: Divided by after that; one value, or one per channel.
        layout: Where the model has its channels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[_Positive, _Positive] | None = None
    resize: _Positive | None = None
    scale: _PositiveFinite = 1 / 255
    mean: Annotated[tuple[_Finite, ...], Field(min_length=1)] = (0.0,)
    std: Annotated[tuple[_PositiveFinite, ...], Field(min_length=1)] = (1.0,)
    layout: Literal["nchw", "nhwc"] = "nchw"


class PictureDataset(IndexedDataset):
    """The pictures of a folder and its sub-folders, sorted by path.

    Labels come from a `labels.csv` in the folder (a line `picture,class index` each, with `/` between folders), else
    from the sub-folders where all pictures lie in two or more of them: the class index is the folder's place among the
    sorted names of all sub-folders. Else there are none.

    Args:
        folder: Where the pictures are.
        inputs: The model's inputs; it must have one, of rank 4 with 1 or 3 channels.
        options: Size, normalisation and layout.

    Raises:
        DataError: Pillow is missing, the folder holds no picture, one cannot be read, or the options do not fit the
            model.
    """

    def __init__(self, folder: Path, inputs: Sequence[InputSpec], options: PictureOptions) -> None:
        fixed_batch(inputs)
        self._where = str(folder)
        self._target = _Target.build(self._where, inputs, options)
        self._options = options
        with _readable(folder):
            self._paths = _pictures(folder)
        if not self._paths:
            raise DataError(f"{folder}: holds no picture; known are {', '.join(sorted(_SUFFIXES))}")
        self._labels = _labels(folder, self._paths)
        for path in self._paths:
            with _readable(path), _pillow(self._where).open(path) as picture:
                _check_depth(path, picture)
        super().__init__(
            folder.resolve().name or "pictures",
            self._digest(folder),
            inputs,
            size=len(self._paths),
            has_labels=self._labels is not None,
        )
        self._note_labels(self._labels)

    def load(self, where: slice | NDArray[np.intp]) -> Batch:
        """Decode the pictures at the given positions."""
        positions = np.arange(self.size)[where]
        stacked = np.stack([self._decode(self._paths[position]) for position in positions])
        labels = None if self._labels is None else self._labels[where]
        return Batch({self.inputs[0].name: stacked}, labels)

    def _decode(self, path: Path) -> NDArray[Any]:
        target = self._target
        with _readable(path), _pillow(self._where).open(path) as picture:
            _check_depth(path, picture)
            fitted = _fit(picture.convert(target.mode), target.size, self._options.resize)
            pixels = np.asarray(fitted, np.uint8).reshape(*target.size, target.channels)
        if target.dtype != np.uint8:
            options = self._options
            scaled = pixels * np.float32(options.scale) - np.asarray(options.mean, np.float32)
            pixels = (scaled / np.asarray(options.std, np.float32)).astype(target.dtype)
        return pixels if self._options.layout == "nhwc" else pixels.transpose(2, 0, 1)

    def _digest(self, folder: Path) -> str:
        digest = hashlib.sha256(b"pictures\0")
        settings = self._options.model_dump(mode="json")
        settings |= {
            "size": self._target.size,
            "mode": self._target.mode,
            "dtype": str(self._target.dtype),
        }
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for position, path in enumerate(self._paths):
            label = None if self._labels is None else int(self._labels[position])
            with _readable(path):
                line = [path.relative_to(folder).as_posix(), path.stat().st_size, label]
            digest.update(json.dumps(line).encode())
        return digest.hexdigest()


class _Target:
    """What one picture becomes: crop size, channels and element type, checked against the model."""

    def __init__(self, size: tuple[int, int], channels: int, dtype: np.dtype[Any]) -> None:
        self.size = size
        self.channels = channels
        self.dtype = dtype
        self.mode = "L" if channels == 1 else "RGB"

    @classmethod
    def build(cls, where: str, inputs: Sequence[InputSpec], options: PictureOptions) -> _Target:
        spec = inputs[0]
        if len(inputs) != 1 or len(spec.fixed_shape) != 4:
            listed = ", ".join(str(i) for i in inputs)
            raise DataError(
                f"{where}: a folder of pictures feeds one input of rank 4, the model has {listed}; "
                "give an .npz or a Python function"
            )
        axes = (1, 2, 3) if options.layout == "nchw" else (3, 1, 2)
        channels, height, width = (spec.fixed_shape[axis] for axis in axes)
        if channels not in (1, 3):
            raise DataError(
                f"{where}: layout {options.layout} gives model input {spec} "
                f"{channels or 'unknown'} channels, pictures have 1 or 3; "
                "set the other layout or give an .npz"
            )
        size = _crop_size(where, spec, options, (height, width))
        for name, values in (("mean", options.mean), ("std", options.std)):
            if len(values) not in (1, channels):
                raise DataError(
                    f"{where}: picture option {name} has {len(values)} values, the model has "
                    f"{channels} channels; give 1 or {channels}"
                )
        _check_element_type(where, spec, options)
        return cls(size, channels, spec.dtype)


def _crop_size(
    where: str,
    spec: InputSpec,
    options: PictureOptions,
    model: tuple[int | None, int | None],
) -> tuple[int, int]:
    height, width = options.size or model
    if height is None or width is None:
        raise DataError(
            f"{where}: model input {spec} leaves height or width free; give the picture option size (height, width)"
        )
    for have, want in zip((height, width), model, strict=True):
        if want is not None and have != want:
            raise DataError(
                f"{where}: picture option size is {height} x {width}, which model input {spec} "
                "does not take; leave it out or give the model's own"
            )
    if options.resize is not None and options.resize < max(height, width):
        raise DataError(
            f"{where}: picture option resize is {options.resize}, below the crop of "
            f"{height} x {width}; give at least {max(height, width)}"
        )
    return height, width


def _check_element_type(where: str, spec: InputSpec, options: PictureOptions) -> None:
    if spec.dtype.kind == "f":
        return
    if spec.dtype != np.uint8:
        raise DataError(
            f"{where}: model input {spec} takes no pictures (float or uint8 does); give an .npz or a Python function"
        )
    if options.model_fields_set & {"scale", "mean", "std"}:
        raise DataError(
            f"{where}: model input {spec} takes pixels as they are; leave out the picture options scale, mean and std"
        )


def _pictures(folder: Path) -> list[Path]:
    found = (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _labels(folder: Path, paths: Sequence[Path]) -> NDArray[np.int64] | None:
    table = folder / _LABELS
    if table.is_file():
        return _table_labels(table, [path.relative_to(folder).as_posix() for path in paths])
    groups = [path.relative_to(folder).parts[:-1] for path in paths]
    if len({group[0] for group in groups if group}) < 2:
        return None
    if not all(groups):
        loose = paths[groups.index(())]
        raise DataError(
            f"{folder}: some pictures lie in class folders, but {loose.name!r} lies in none; "
            f"move it, or give the classes in {_LABELS}"
        )
    with _readable(folder):
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if any(name.isdecimal() and int(name) != place for place, name in enumerate(classes)):
        _log.warning(
            "%s: class indices are the places of the sorted folder names, not the numbers in them; "
            "give %s if that is not meant",
            folder,
            _LABELS,
        )
    return np.array([classes.index(group[0]) for group in groups], np.int64)


def _table_labels(table: Path, names: Sequence[str]) -> NDArray[np.int64]:
    labels: dict[str, int] = {}
    with _readable(table):
        rows = list(csv.reader(table.read_text(encoding="utf-8-sig").splitlines()))
    for line, row in enumerate(rows, start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (line == 1 and cells == ["name", "label"]):
            continue
        if len(cells) != 2 or not cells[1].isdecimal():
            raise DataError(
                f"{table}: line {line} is {','.join(row)!r}, expected a picture's name and its "
                "class index (0 or more) with a comma between"
            )
        if cells[0] in labels:
            raise DataError(f"{table}: line {line} names {cells[0]!r} again; keep one of the two")
        labels[cells[0]] = int(cells[1])
    for name in names:
        if name not in labels:
            raise DataError(f"{table}: no label for picture {name!r}; add a line for it")
    known = set(names)
    for name in labels:
        if name not in known:
            raise DataError(f"{table}: names {name!r}, which is no picture here; remove the line")
    return np.array([labels[name] for name in names], np.int64)


def _fit(picture: Image, size: tuple[int, int], resize: int | None) -> Image:
    """Resize so that the shorter side is `resize` (or the crop just fits in), and crop the centre."""
    from PIL.Image import Resampling

    height, width = size
    shorter = min(picture.size)
    if resize is not None:
        wide, high = (resize * side // shorter for side in picture.size)
    else:
        ratio = max(width / picture.width, height / picture.height)
        wide, high = int(picture.width * ratio), int(picture.height * ratio)
    resized = (max(wide, width), max(high, height))
    if resized != picture.size:
        picture = picture.resize(resized, Resampling.BILINEAR)
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def _check_depth(path: Path, picture: Image) -> None:
    # Pillow would clip deeper pixels at 255 and say nothing.
    if picture.mode[0] in "IF":
        raise DataError(f"{path}: has more than 8 bits per channel (mode {picture.mode}); convert it to 8 bits")


def _pillow(where: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{where}: reading pictures needs Pillow; install it with pip install 'raqu-onnx[images]'"
        ) from error
    return Image


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what Pillow and the file system raise on a damaged file into one line that names it."""
    try:
        yield
    except RaquError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds on damaged bytes.
        raise DataError(f"{path}: cannot be read ({one_line(error)}); repair or remove it") from error
