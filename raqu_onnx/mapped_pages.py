"""Pages of memory-mapped files, which count as a process's memory once they were read."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["forget_pages"]


def forget_pages(array: NDArray[Any]) -> None:
    """Let go of what was read of a memory-mapped file, so that reading all of it takes no more memory than a part.

    Views stay valid: the system reads a page again when it is used. Does nothing with other arrays, or where the system
    cannot.

    Args:
        array: An array as `numpy.load(..., mmap_mode="r")` gives it.
    """
    mapped = array.base
    advice = getattr(mmap, "MADV_DONTNEED", None)
    # Written pages that no file holds yet would be lost.
    if isinstance(mapped, mmap.mmap) and advice is not None and not array.flags.writeable:
        mapped.madvise(advice)
