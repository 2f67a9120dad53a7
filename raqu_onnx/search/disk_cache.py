"""Sensitivities and error curves of models that were searched before, in the user's cache folder.

Files are named by a digest of everything that their numbers depend on (`raqu_onnx.search.identity`), so a file is
either right or never looked at. They are written whole or not at all, read without executing anything, and the ones not
used for longest go when all take more than `MOST_BYTES`. A cache that cannot be read or written costs time, never the
run.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.error_curves import ErrorCurve
from raqu_onnx.errors import RaquError
from raqu_onnx.search.identity import identity_digest
from raqu_onnx.search.journal import journal_lines, read_answers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from raqu_onnx.search.identity import Identity
    from raqu_onnx.search.result import Bits

__all__ = ["MOST_BYTES", "DiskCache", "cache_folder"]

logger = logging.getLogger(__name__)

#: Bytes that all files may take; the curves of a ResNet-20 take 60 kB, its sensitivities 20 kB.
MOST_BYTES = 256 << 20

# A file that is being written is half-written for seconds; after a day whoever wrote it was killed.
_MOST_WRITING_S = 24 * 3600
_WAITING = (".", ".part")

# What sensitivities depend on and error curves do not.
_JUDGING = ("selection data", "sensitivity samples", "float activations", "batch size", "task", "metric")


def cache_folder() -> Path | None:
    """Where caches of this package lie: `raqu-onnx` in XDG_CACHE_HOME, or in the user's cache folder.

    Returns:
        None where nothing tells the user's folder, as in a container for a user without an entry in its passwd.
    """
    named = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return (Path(named) if named else Path.home() / ".cache") / "raqu-onnx"
    except RuntimeError:
        return None


class DiskCache:
    """What is known of one model on one set of data.

    Args:
        identity: What the numbers depend on.
        folder: Where the files lie; without one and without a folder of the user, nothing is kept or found.
        most_bytes: Bytes that all files there may take.
    """

    def __init__(self, identity: Identity, folder: Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        self._identity = identity
        self._curves = {name: value for name, value in identity.items() if name not in _JUDGING}
        self._folder = folder or cache_folder()
        self._most = most_bytes

    def sensitivities(self) -> dict[Bits, float]:
        """Losses on the sensitivity samples that were measured before."""
        path = self._path("sensitivities", self._identity, "jsonl")
        if path is None:
            return {}
        try:
            identity, answers = read_answers(path)
        except RaquError:
            return {}
        _touch(path)
        same = identity == self._identity
        return {bits: value for (_, bits), value in answers.items() if same and isinstance(value, float)}

    def keep_sensitivities(self, found: Mapping[Bits, float]) -> None:
        """Write measured losses, all of a search at once."""
        lines = journal_lines(self._identity, {("quick", bits): value for bits, value in found.items()})
        self._write(self._path("sensitivities", self._identity, "jsonl"), lambda stream: stream.write(lines))

    def curves(self, widths: Sequence[int], names: Sequence[str]) -> dict[str, ErrorCurve] | None:
        """Error curves of all nodes at some widths, None where they are not known.

        Args:
            widths: The widths.
            names: The nodes.
        """
        path = self._path("curves", self._at(widths), "npz")
        if path is None:
            return None
        try:
            with np.load(path, allow_pickle=False) as held:
                found = {
                    name: ErrorCurve(name, held[f"e{i}"], held[f"g{i}"], bool(held["absorbed"][i]))
                    for i, name in enumerate(names)
                }
        except Exception as error:  # noqa: BLE001 - numpy and zipfile raise all kinds on damaged bytes
            if not isinstance(error, FileNotFoundError):
                logger.info("%s: cannot be used: %s", path, error)
            return None
        _touch(path)
        return found

    def keep_curves(self, widths: Sequence[int], curves: Mapping[str, ErrorCurve]) -> None:
        """Write the error curves of all nodes."""
        items = list(curves.values())
        arrays: dict[str, Any] = {"absorbed": np.array([item.absorbed for item in items], bool)}
        for index, item in enumerate(items):
            arrays |= {f"e{index}": item.errors, f"g{index}": item.gains}
        self._write(self._path("curves", self._at(widths), "npz"), lambda stream: np.savez(stream, **arrays))

    def _at(self, widths: Sequence[int]) -> Identity:
        return {**self._curves, "widths": " ".join(map(str, widths))}

    def _path(self, what: str, identity: Identity, suffix: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{what}-{identity_digest(identity)}.{suffix}"

    def _write(self, path: Path | None, write: Callable[[IO[bytes]], object]) -> None:
        """A file that is there as a whole or not at all."""
        if path is None:
            return
        waiting = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, waiting = tempfile.mkstemp(prefix=_WAITING[0], suffix=_WAITING[1], dir=path.parent)
            with os.fdopen(handle, "wb") as stream:
                write(stream)
            Path(waiting).replace(path)
            self._bound(path.parent)
        except OSError as error:
            logger.info("%s: not written: %s", path, error)
            if waiting:
                with suppress(OSError):
                    Path(waiting).unlink(missing_ok=True)

    def _bound(self, folder: Path) -> None:
        """Remove what was not used for longest, and what runs that were killed left half-written."""
        files = []
        for path in folder.iterdir():
            with suppress(OSError):
                found = path.stat()
                if _is_waiting(path) and time.time() - found.st_mtime > _MOST_WRITING_S:
                    path.unlink(missing_ok=True)
                else:
                    files.append((found.st_mtime, found.st_size, path))
        files.sort(reverse=True)
        total = 0
        for _, size, path in files:
            total += size
            if total > self._most:
                with suppress(OSError):
                    path.unlink(missing_ok=True)


def _is_waiting(path: Path) -> bool:
    return path.name.startswith(_WAITING[0]) and path.name.endswith(_WAITING[1])


def _touch(path: Path) -> None:
    with suppress(OSError):
        os.utime(path)
