"""Samples from arrays: an `.npz` file, an `.npy` file, or a mapping in memory.

Arrays of an `.npz` are decompressed into memory once, in the type they are stored in. An `.npy` is memory-mapped, so it
may be larger than memory. Pickled arrays are never loaded.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.data_base import Batch, IndexedDataset, InputSpec
from raqu_onnx.data_checks import (
    as_array,
    check_feeds,
    check_labels,
    check_names,
    hash_array,
    one_line,
)
from raqu_onnx.errors import DataError, RaquError
from raqu_onnx.mapped_pages import forget_pages

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ArrayDataset", "open_mapping", "open_npy", "open_npz"]

_LABELS = "labels"


class ArrayDataset(IndexedDataset):
    """Samples that lie in arrays, one array per model input.

    Args:
        name: Short name for messages and the manifest.
        digest: Running SHA-256 of the source's bytes, to which labels are added; None hashes the arrays.
        inputs: The model's inputs.
        feeds: One array per model input.
        labels: One class index per sample, or None.
        where: How messages name the source.

    Raises:
        DataError: An array does not fit the model, or the arrays do not fit each other.
    """

    def __init__(
        self,
        name: str,
        digest: hashlib._Hash | None,
        inputs: Sequence[InputSpec],
        feeds: Mapping[str, NDArray[Any]],
        labels: object = None,
        *,
        where: str,
    ) -> None:
        check_names(where, feeds, inputs)
        size = check_feeds(where, feeds, inputs)
        self._samples = Batch(
            {spec.name: feeds[spec.name] for spec in inputs},
            None if labels is None else check_labels(where, labels, size),
        )
        text = _digest(self._samples, digest)
        super().__init__(name, text, inputs, size=size, has_labels=labels is not None)
        self._note_labels(self._samples.labels)

    def load(self, where: slice | NDArray[np.intp]) -> Batch:
        """The samples at the given positions; views for a slice."""
        for array in self._samples.feeds.values():
            forget_pages(array)
        return self._samples.select(where)


def open_mapping(arrays: Mapping[str, Any], inputs: Sequence[InputSpec], labels: object = None) -> ArrayDataset:
    """Samples from arrays in memory, by input name; `labels` may be among them.

    Raises:
        DataError: The arrays do not fit the model or each other.
    """
    where = "arrays"
    feeds, found = _take_labels(where, arrays, inputs, labels)
    held = {name: as_array(where, f"array {name!r}", value) for name, value in feeds.items()}
    return ArrayDataset(where, None, inputs, held, found, where=where)


def open_npz(path: Path, inputs: Sequence[InputSpec], labels: object = None) -> ArrayDataset:
    """Samples from an `.npz` file with arrays by input name and, if wanted, `labels`.

    Raises:
        DataError: The file is no `.npz`, is damaged, holds pickled arrays, or does not fit the model.
    """
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            # Before anything is decompressed.
            check_names(where, _take_labels(where, members, inputs, labels)[0], inputs)
            arrays = {name: _read_member(where, archive, name, members[name]) for name in members}
        digest = _hash_file(path)
    except RaquError:
        raise
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # zipfile raises all kinds on damaged bytes.
        raise DataError(
            f"{where}: is not an .npz file, or a truncated one ({one_line(error)}); write it with np.savez"
        ) from error
    feeds, labels = _take_labels(where, arrays, inputs, labels)
    return ArrayDataset(path.name, digest, inputs, feeds, labels, where=where)


def open_npy(path: Path, inputs: Sequence[InputSpec], labels: object = None) -> ArrayDataset:
    """Samples from an `.npy` file, memory-mapped, for a model with one input.

    Raises:
        DataError: The file is no `.npy`, is damaged, holds pickled objects, or does not fit the model.
    """
    where = str(path)
    if len(inputs) != 1:
        listed = ", ".join(str(spec) for spec in inputs)
        raise DataError(
            f"{where}: an .npy file feeds one input, the model has {len(inputs)} ({listed}); "
            "give an .npz with arrays by these names"
        )
    feeds = {inputs[0].name: _map_npy(where, path)}
    return ArrayDataset(path.name, _hash_file(path), inputs, feeds, labels, where=where)


def _take_labels(
    where: str, arrays: Mapping[str, Any], inputs: Sequence[InputSpec], labels: object
) -> tuple[dict[str, Any], object]:
    """Take `labels` from among the arrays, unless the model has an input of that name."""
    feeds = {str(name): array for name, array in arrays.items()}
    if _LABELS not in feeds or any(spec.name == _LABELS for spec in inputs):
        return feeds, labels
    if labels is not None:
        raise DataError(f"{where}: holds labels, and labels were given as well; give one of them")
    found = feeds.pop(_LABELS)
    return feeds, found


def _read_member(where: str, archive: zipfile.ZipFile, name: str, member: str) -> NDArray[Any]:
    try:
        with archive.open(member) as stream:
            array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
            if stream.read(1):
                raise ValueError("bytes are left over")
    except MemoryError as error:
        raise DataError(
            f"{where}: array {name!r} does not fit in memory; give an .npy file (memory-mapped) or a Python function"
        ) from error
    except Exception as error:  # numpy's header parser and the decompressors raise all kinds on damaged bytes.
        if "allow_pickle" in str(error):
            raise _pickled(where, name) from error
        raise DataError(
            f"{where}: array {name!r} is damaged or truncated ({one_line(error)}); write the file again"
        ) from error
    return array


def _map_npy(where: str, path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as stream:
            if stream.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                raise DataError(f"{where}: is not an .npy file; write it with np.save")
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except RaquError:
        raise
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # numpy's header parser raises all kinds on damaged bytes.
        if "Python objects" in str(error):
            raise _pickled(where, path.stem) from error
        raise DataError(f"{where}: is damaged, truncated or empty ({one_line(error)}); write it again") from error
    return array


def _pickled(where: str, name: str) -> DataError:
    return DataError(
        f"{where}: array {name!r} holds pickled Python objects, which are never loaded; "
        "save it as a plain numeric array"
    )


def _hash_file(path: Path) -> hashlib._Hash:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256")


def _digest(samples: Batch, source: hashlib._Hash | None) -> str:
    digest = source or hashlib.sha256(b"arrays\0")
    if source is None:
        for name, array in samples.feeds.items():
            hash_array(digest, name, array)
    if samples.labels is not None:
        hash_array(digest, _LABELS, samples.labels)
    return digest.hexdigest()
