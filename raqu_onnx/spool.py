"""Arrays that are written once and read many times, with bounded memory."""

from __future__ import annotations

import math
import os
import tempfile
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

__all__ = ["MEMORY_BYTES", "Spool", "SpoolError"]

#: Bytes that a spool keeps in memory; what is beyond lies in a temporary file.
MEMORY_BYTES = 256 << 20


class SpoolError(DataError):
    """The temporary file cannot be written."""


class Spool:
    """Lists of arrays in the order in which they were added.

    The first ones stay in memory, the others in a nameless temporary file, which goes away with the spool.

    Args:
        memory_bytes: Most bytes kept in memory.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._room = memory_bytes
        self._held: list[list[NDArray[Any]]] = []
        self._stored: list[list[tuple[np.dtype[Any], tuple[int, ...]]]] = []
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._held) + len(self._stored)

    def append(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Add one list of arrays of plain numbers.

        Raises:
            SpoolError: The temporary file cannot be written.
        """
        size = sum(array.nbytes for array in arrays)
        if self._file is None and size <= self._room:
            self._room -= size
            self._held.append(list(arrays))
            return
        try:
            if self._file is None:
                # Open until the spool goes: it serves many passes over the data.
                self._file = tempfile.TemporaryFile(prefix="raqu-onnx-")  # noqa: SIM115
            # A reader may have moved in the file.
            self._file.seek(0, os.SEEK_END)
            for array in arrays:
                self._file.write(np.ascontiguousarray(array).tobytes())
        except OSError as error:
            raise SpoolError(
                f"no room for data that is read again ({error.strerror or error}); make room in the folder for "
                "temporary files, name another one in TMPDIR, or give less data"
            ) from error
        self._stored.append([(array.dtype, array.shape) for array in arrays])

    def __iter__(self) -> Iterator[list[NDArray[Any]]]:
        yield from self._held
        if self._file is None:
            return
        self._file.flush()
        position = 0
        for item in self._stored:
            # Another reader may have moved in the file.
            self._file.seek(position)
            arrays = []
            for dtype, shape in item:
                content = self._file.read(dtype.itemsize * math.prod(shape))
                arrays.append(np.frombuffer(content, dtype).reshape(shape))
                position += len(content)
            yield arrays

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()
