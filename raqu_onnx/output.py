"""Writing a result folder whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from raqu_onnx.errors import OutputError, RaquError
from raqu_onnx.file_lock import can_lock, lock_file

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["QONNX_FILE", "RESULT_FILES", "check_output", "staged_folder"]

logger = logging.getLogger(__name__)

#: The emitted model in the QONNX form, written on request.
QONNX_FILE = "model.qonnx.onnx"

#: What a run may write at the top of its folder; those that a new run does not write would contradict it.
RESULT_FILES = (
    "model.onnx",
    "model.onnx.data",
    "manifest.json",
    "cells.npz",
    "report.json",
    "report.html",
    "journal.jsonl",
    QONNX_FILE,
    f"{QONNX_FILE}.data",
)
# What names of temporary folders begin and end with.
_STAGING = (".raqu-", ".part")
# Likewise below it: models dumped after a pass, such as dumps/00-tidy.onnx, and their weights.
_RESULT_PATTERNS = ("dumps/[0-9][0-9]-*.onnx", "dumps/[0-9][0-9]-*.onnx.data")


def check_output(folder: Path, *, force: bool, source: Path | None = None) -> None:
    """Refuse early what could not be written at the end.

    Args:
        folder: Where the results will go.
        force: Files of an earlier run may be replaced.
        source: The model that is read, which must not be replaced.

    Raises:
        OutputError: The folder exists and `force` is not given, or it is a file, or it cannot be written, or writing
            would replace the source model.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: it is a file; name a folder with -o")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise OutputError(f"{folder}: it exists; name another folder with -o, or replace its files with --force")
    if source is not None and source.resolve() in {folder.resolve() / name for name in RESULT_FILES}:
        raise OutputError(f"{folder}: the results would replace the model {source}; name another folder with -o")
    parent = _nearest_folder(folder)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: {parent} is not writable; name another folder with -o")


def _nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    absolute = path.absolute()
    for parent in (absolute, *absolute.parents):
        if parent.exists():
            if not parent.is_dir():
                raise OutputError(f"{path}: {parent} is a file; name another folder with -o")
            return parent
    return Path(absolute.anchor)


@contextmanager
def staged_folder(folder: Path | None) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` when the block ends without an error.

    It lies in the target, or beside it where there is none yet: on the same disk, so that moving is renaming. Files of
    an earlier run that have no counterpart are removed; others stay. Without a target nothing is kept.

    Raises:
        OutputError: The disk is full or a folder cannot be written; the target is as it was.
    """
    parent = Path(tempfile.gettempdir()) if folder is None else _nearest_folder(folder)
    where = folder or parent
    _remove_abandoned(parent)
    try:
        staging, lock = _locked_folder(parent)
    except OSError as error:
        raise OutputError(
            f"{where}: cannot write in {parent}: {error.strerror}; name another folder with -o"
        ) from error
    fresh = staging / "new"
    try:
        fresh.mkdir()
        yield fresh
        if folder is not None:
            _Publication(fresh, staging / "old", folder).publish()
    except OSError as error:
        raise OutputError(f"{where}: cannot write: {error.strerror or error}; free some room or use -o") from error
    except RaquError as error:
        if str(fresh) not in str(error):
            raise
        # The user knows the target, not where files wait.
        raise type(error)(str(error).replace(str(fresh), str(where))) from error
    finally:
        if not _files(staging / "old"):
            shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(parent: Path) -> tuple[Path, int | None]:
    """A new temporary folder, and the descriptor that keeps others from taking it for abandoned.

    Raises:
        OSError: It cannot be made.
    """
    while True:
        staging = Path(tempfile.mkdtemp(prefix=_STAGING[0], suffix=_STAGING[1], dir=parent))
        lock = _open_folder(staging)
        # Before it was locked another run may have taken it for abandoned, and removed it.
        if (lock is None or lock_file(lock) is not False) and staging.is_dir():
            return staging, lock
        if lock is not None:
            os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove temporary folders of runs that were killed: their locks are free.

    Where the disk knows no locks they stay, for they may be those of runs that go on. What a run had set aside when it
    was killed while it published goes back first; the folder stays while something else has the place of a file.
    """
    for staging in parent.glob(_STAGING[0] + "*" + _STAGING[1]):
        lock = _open_folder(staging)
        if lock is not None:
            if lock_file(lock) is True and not staging.is_symlink():
                if _put_back(staging / "old", parent):
                    shutil.rmtree(staging, ignore_errors=True)
                else:
                    logger.warning("%s: holds files of an earlier result that a killed run was replacing", staging)
            os.close(lock)


def _put_back(kept: Path, folder: Path) -> bool:
    """Move what was set aside back to where nothing has its place; whether all of it went."""
    for path in _files(kept):
        target = folder / path.relative_to(kept)
        with suppress(OSError):
            if not os.path.lexists(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
    return not _files(kept)


def _files(folder: Path) -> list[Path]:
    """The files below a folder, links among them."""
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _open_folder(path: Path) -> int | None:
    """A descriptor of a folder, None where the system gives none or the folder is not there or not ours."""
    if not can_lock():
        return None
    try:
        # Others write in the folder for temporary files, too: what they left there is theirs.
        return os.open(path, os.O_RDONLY) if path.lstat().st_uid == os.geteuid() else None
    except OSError:
        return None


class _Publication:
    """Moves files into a folder; what they replace is kept until all have arrived."""

    def __init__(self, fresh: Path, kept: Path, folder: Path) -> None:
        self._fresh = fresh
        self._kept = kept
        self._folder = folder
        self._undo: list[tuple[Path, Path | None]] = []
        self._made: list[Path] = []

    def publish(self) -> None:
        try:
            self._move_all()
            if self._kept.exists():
                # All has arrived: from here on what was set aside is no longer wanted back.
                self._kept.rename(self._kept.with_name("replaced"))
        except BaseException as error:
            self._restore()
            if _files(self._kept):
                raise OutputError(
                    f"{self._folder}: cannot write, and what was replaced cannot be put back: it is in {self._kept}; "
                    "the next run there tries again"
                ) from error
            raise

    def _move_all(self) -> None:
        self._make(self._folder)
        items = sorted(self._fresh.rglob("*"))
        names = {item.relative_to(self._fresh) for item in items}
        for stale in self._earlier():
            if stale not in names:
                self._set_aside(stale)
        for item in items:
            name = item.relative_to(self._fresh)
            if item.is_dir():
                self._make(self._folder / name)
            else:
                self._set_aside(name)
                self._undo.append((self._folder / name, None))
                item.rename(self._folder / name)

    def _earlier(self) -> list[Path]:
        """Files of an earlier run, relative to the folder."""
        dumps = (path.relative_to(self._folder) for glob in _RESULT_PATTERNS for path in self._folder.glob(glob))
        return [name for name in (*map(Path, RESULT_FILES), *dumps) if (self._folder / name).is_file()]

    def _make(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir()
            self._made.append(path)
        if not folder.is_dir():
            raise OutputError(f"{folder}: it is a file where a folder must be; name another folder with -o")

    def _set_aside(self, name: Path) -> None:
        target, kept = self._folder / name, self._kept / name
        if target.is_dir() and not target.is_symlink():
            raise OutputError(f"{target}: it is a folder where a file must be; name another folder with -o")
        if os.path.lexists(target):
            kept.parent.mkdir(parents=True, exist_ok=True)
            self._undo.append((target, kept))
            target.rename(kept)

    def _restore(self) -> None:
        for target, kept in reversed(self._undo):
            # One that fails keeps no other from going back.
            with suppress(OSError):
                if kept is None:
                    target.unlink(missing_ok=True)
                elif os.path.lexists(kept):
                    kept.rename(target)
        for path in reversed(self._made):
            with suppress(OSError):
                path.rmdir()
