"""Keeping native libraries from writing into our results."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["no_native_output"]


@contextmanager
def no_native_output() -> Iterator[None]:
    """Send file descriptor 1 to nowhere: HiGHS, behind `scipy.optimize.milp`, prints debugging lines to it."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:
        # There is no standard output that could be written into.
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)
