"""Locks on open files, which the system takes back when their process ends, however it ends."""

from __future__ import annotations

import errno
from importlib.util import find_spec
from typing import IO, Any

__all__ = ["can_lock", "lock_file"]


def can_lock() -> bool:
    """Whether this system has such locks; Windows has not."""
    return find_spec("fcntl") is not None


def lock_file(stream: IO[Any] | int) -> bool | None:
    """Take a file, or a folder given by its descriptor, for this process until it is closed.

    Returns:
        True where it is ours now, False where another one holds it. None where the system or the disk knows no such
        locks: work goes on without, and nothing is known of others.
    """
    if not can_lock():
        return None
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True
