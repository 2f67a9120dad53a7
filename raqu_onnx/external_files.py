"""External data files of ONNX models, judged by their paths and sizes before anything opens them.

A model file names the files that hold its weights. It may come from anybody, so a name that leads out of the model's
folder (absolute, with "..", through a symbolic or hard link) is refused: it could make a tool read, and write into its
output, any file of the user.
"""

from __future__ import annotations

import os
import stat
from difflib import get_close_matches
from pathlib import Path, PureWindowsPath

import onnx_ir as ir

__all__ = ["external_problem", "nearest_file"]


def external_problem(tensor: ir.ExternalTensor) -> str | None:
    """What is wrong with a tensor's external file, found without opening it."""
    location = os.fspath(tensor.location)
    foreign = PureWindowsPath(location)
    if not location or "\0" in location:
        return "is no file name"
    if Path(location).is_absolute() or foreign.drive or ".." in foreign.parts:
        return "points outside the model's folder and is not followed"
    folder = Path(tensor.base_dir or ".").resolve()
    file = Path(tensor.base_dir or ".", location)
    try:
        if not file.resolve().is_relative_to(folder):
            return "points outside the model's folder and is not followed"
        status = file.stat()
    except FileNotFoundError:
        return "does not exist"
    except (OSError, RuntimeError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_nlink > 1:
        return "has other hard links, so it may be another folder's file: copy it"
    return _extent_problem(tensor, status.st_size)


def _extent_problem(tensor: ir.ExternalTensor, size: int) -> str | None:
    offset = tensor.offset or 0
    needed = tensor.nbytes
    if offset < 0 or (tensor.length is not None and tensor.length < needed):
        return f"gives {tensor.length} bytes at {offset} for a tensor of {needed}"
    if offset + needed > size:
        return f"is too short: {size} bytes, needs {offset + needed}"
    return None


def nearest_file(path: Path) -> str:
    """What to do about a file that is not there: the one beside it whose name is most like it, if there is one."""
    try:
        beside = {item.stem: item for item in path.parent.iterdir() if item.suffix == path.suffix}
    except OSError:
        return f"; there is no folder {path.parent} either"
    near = get_close_matches(path.stem, beside, 1)
    return (
        f"; did you mean {path.with_name(beside[near[0]].name)}?"
        if near
        else "; name a file, as in `raqu-onnx inspect model.onnx`"
    )
