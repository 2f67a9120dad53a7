"""Paths in a configuration file, which are relative to the file as in pyproject.toml and Compose files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raqu_onnx.hardware import is_builtin_chip

__all__ = ["resolve_paths"]

_KEYS = ("model", "output", "calibration", "selection", "eval", "earlier")


def resolve_paths(values: dict[str, Any], file: str | Path) -> dict[str, Any]:
    """The values of a configuration file with its relative paths led from the current folder.

    Absolute paths and names of built-in chips stay as they are.

    Args:
        values: By key, as they stand in the file.
        file: The file.
    """
    folder = Path(file).parent
    if folder == Path():
        return values
    found = dict(values)
    for key in (*_KEYS, "hw"):
        value = values.get(key)
        if not isinstance(value, str) or not value or (key == "hw" and is_builtin_chip(value)):
            continue
        found[key] = str(folder / value)
    metric = values.get("metric")
    if isinstance(metric, str) and ".py:" in metric:
        found["metric"] = str(folder / metric)
    return found
