"""What data must be to feed a model; every refusal says what was found, what is expected and how to mend it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.errors import DataError
from raqu_onnx.mapped_pages import forget_pages

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.data_base import InputSpec

__all__ = [
    "as_array",
    "check_classes",
    "check_feeds",
    "check_label_top",
    "check_labels",
    "check_names",
    "fixed_batch",
    "hash_array",
    "one_line",
]

# Arrays are checked and hashed in blocks of this size, so that memory-mapped files never come in whole.
_BLOCK_BYTES = 1 << 24


def fixed_batch(inputs: Sequence[InputSpec]) -> int | None:
    """The first dimension that the model fixes for all its inputs, or None where it is free.

    Raises:
        DataError: There is no input, or one has no usable sample axis, or they disagree about it.
    """
    if not inputs:
        raise DataError("the model has no input that data could feed")
    leading: dict[str, int] = {}
    for spec in inputs:
        if spec.shape is None:
            raise DataError(
                f"model input {spec.name!r} has no known rank, so its sample axis is unknown; "
                "give it a shape in the model (dimensions may be symbolic)"
            )
        if not spec.shape:
            raise DataError(
                f"model input {spec.name!r} is a scalar and has no sample axis; make it a constant of the model"
            )
        if 0 in spec.fixed_shape:
            raise DataError(
                f"model input {spec.name!r} has shape {spec.shape_text}, which holds no element; mend the model"
            )
        first = spec.fixed_shape[0]
        if first is not None:
            leading[spec.name] = first
    if len(set(leading.values())) > 1:
        listed = ", ".join(f"{name!r} {first}" for name, first in leading.items())
        raise DataError(
            f"model inputs differ in their first dimension ({listed}), which must count samples "
            "in each; give the model one batch dimension"
        )
    return next(iter(leading.values()), None)


def check_names(where: str, names: Iterable[str], inputs: Sequence[InputSpec]) -> None:
    """Refuse arrays that match no model input, and model inputs without an array.

    Raises:
        DataError: Says which name is wrong and which are expected.
    """
    found = list(names)
    expected = [spec.name for spec in inputs]
    missing = [spec for spec in inputs if spec.name not in found]
    strangers = [name for name in found if name not in expected]
    if strangers:
        advice = f"; rename it to {missing[0].name!r}" if len(missing) == len(strangers) == 1 else ""
        listed = ", ".join(str(spec) for spec in inputs)
        raise DataError(f"{where}: array {strangers[0]!r} matches no model input; the model takes {listed}{advice}")
    if missing:
        holds = ", ".join(repr(name) for name in found) or "no array"
        raise DataError(f"{where}: no array for model input {missing[0]}; found {holds}")


def check_feeds(where: str, feeds: Mapping[str, NDArray[Any]], inputs: Sequence[InputSpec]) -> int:
    """Refuse arrays that do not fit the model or each other; the names are known to match.

    Returns:
        The number of samples.

    Raises:
        DataError: Says what was found, what is expected and how to mend it.
    """
    for spec in inputs:
        _check_array(where, spec, feeds[spec.name])
    return _check_lengths(where, feeds)


def _check_array(where: str, spec: InputSpec, array: NDArray[Any]) -> None:
    """Refuse an array that the model cannot take or that holds NaN or infinity.

    Raises:
        DataError: Says what was found, what is expected and how to mend it.
    """
    if array.dtype != spec.dtype:
        raise DataError(
            f"{where}: array {spec.name!r} is {_dtype_text(array.dtype)}, the model takes "
            f"{spec.dtype}; convert it with array.astype('{spec.dtype}'), scaled as in training"
        )
    expected = spec.fixed_shape
    if array.ndim != len(expected) or any(
        want is not None and have != want for have, want in zip(array.shape[1:], expected[1:], strict=True)
    ):
        raise DataError(
            f"{where}: array {spec.name!r} has shape {list(array.shape)}, the model takes "
            f"{spec.shape_text}, where the first dimension counts samples; reshape the data"
        )
    if array.size == 0:
        raise DataError(f"{where}: array {spec.name!r} is empty (shape {list(array.shape)}); give data")
    _check_finite(where, spec.name, array)


def _check_lengths(where: str, feeds: Mapping[str, NDArray[Any]]) -> int:
    """The common first dimension of all arrays.

    Raises:
        DataError: The arrays differ in length.
    """
    lengths = {name: len(array) for name, array in feeds.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
        raise DataError(
            f"{where}: arrays differ in length ({listed}); the first dimension counts samples "
            "and must be the same in all"
        )
    return next(iter(lengths.values()))


def check_labels(where: str, labels: object, samples: int) -> NDArray[np.int64]:
    """Class indices as int64 of shape (samples,).

    Raises:
        DataError: The labels are not one integer of 0 or more per sample.
    """
    array = as_array(where, "labels", labels)
    if array.dtype.kind not in "iu":
        raise DataError(
            f"{where}: labels are {_dtype_text(array.dtype)}, expected integers (class indices); convert them"
        )
    if array.ndim != 1:
        raise DataError(
            f"{where}: labels have shape {list(array.shape)}, expected [{samples}], one class "
            "index per sample; flatten them or take the argmax"
        )
    if len(array) != samples:
        raise DataError(f"{where}: {len(array)} labels for {samples} samples; give one per sample")
    if samples and int(array.min()) < 0:
        raise DataError(f"{where}: a label is {int(array.min())}; class indices start at 0")
    if samples and int(array.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{where}: a label is {int(array.max())}, which is no class index")
    return array.astype(np.int64)


def check_classes(where: str, labels: NDArray[np.integer], classes: int) -> None:
    """Refuse labels that no class score stands for.

    Args:
        where: Names the data.
        labels: Class indices.
        classes: Class scores per sample.

    Raises:
        DataError: A label is `classes` or more.
    """
    check_label_top(where, int(labels.max(initial=-1)), classes)


def check_label_top(where: str, top: int, classes: int) -> None:
    """As `check_classes`, for the largest label alone.

    Raises:
        DataError: It is `classes` or more.
    """
    if top >= classes:
        raise DataError(
            f"{where}: a label is {top}, but the model has {classes} classes (0 to {classes - 1}); subtract 1 if the "
            "labels count from 1, else give labels of this model's classes"
        )


def hash_array(digest: hashlib._Hash, name: str, array: NDArray[Any]) -> None:
    """Feed an array's name, type, shape and bytes (in C order) to a running hash."""
    digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
    for block in _blocks(array):
        digest.update(np.ascontiguousarray(block).view(np.uint8).data)


def _dtype_text(dtype: np.dtype[Any]) -> str:
    return str(dtype) if dtype.isnative else f"byte-swapped {dtype.newbyteorder('=')}"


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    step = max(1, _BLOCK_BYTES // max(1, array.nbytes // max(1, len(array))))
    for start in range(0, len(array), step):
        yield array[start : start + step]


def _check_finite(where: str, name: str, array: NDArray[Any]) -> None:
    if array.dtype.kind in "biuOSU":
        return
    seen = 0
    for block in _blocks(array):
        good = np.isfinite(block)
        if not good.all():
            first = seen + int(np.flatnonzero(~good.reshape(len(block), -1).all(axis=1))[0])
            raise DataError(
                f"{where}: array {name!r} holds NaN or infinity, first in sample {first}; repair or remove such samples"
            )
        seen += len(block)
        forget_pages(array)


def as_array(where: str, what: str, value: object) -> NDArray[Any]:
    """A value as an array, without a copy where it is one.

    Raises:
        DataError: The value is no array, such as a ragged list.
    """
    try:
        return np.asarray(value)
    except Exception as error:  # Any type may bring its own conversion, and that may raise anything.
        raise DataError(
            f"{where}: {what} is a {type(value).__name__} that makes no array ({one_line(error)}); give a numpy array"
        ) from error


def one_line(error: BaseException) -> str:
    """An exception's text on one line; its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
