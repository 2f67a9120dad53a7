"""Trained models and real data that the demo and the tests run on."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raqu_onnx.errors import OutputError

__all__ = ["BundledFiles", "bundled_arrays", "bundled_model", "write_bundled"]

_INPUT = "input"


@dataclass(frozen=True)
class BundledFiles:
    """A bundled model and its data in a user's folder."""

    model: Path
    calibration: Path
    selection: Path
    test: Path


def bundled_model(name: str) -> bytes:
    """The bytes of a bundled ONNX model, `resnet20` or `mobilenetv2`."""
    return (files("raqu_onnx.bundled") / f"{name}.onnx").read_bytes()


def bundled_arrays(part: str) -> dict[str, NDArray[Any]]:
    """Images and labels of one part of Fashion-MNIST.

    Args:
        part: `calibration`, `selection` or `test`.

    Returns:
        `input`, float32 in 0..1, shape (N, 1, 28, 28), and `labels`, int64, shape (N,).
    """
    with (files("raqu_onnx.bundled") / "fashion_mnist.npz").open("rb") as stream, np.load(stream) as data:
        images, labels = data[f"{part}_images"], data[f"{part}_labels"]
    return {_INPUT: images[:, None].astype(np.float32) / 255, "labels": labels.astype(np.int64)}


def write_bundled(name: str, folder: Path) -> BundledFiles:
    """Write a bundled model and its data into a folder.

    Raises:
        OutputError: The folder cannot be written.
    """
    paths = BundledFiles(
        folder / f"{name}.onnx", folder / "calibration.npz", folder / "selection.npz", folder / "test.npz"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths.model.write_bytes(bundled_model(name))
        for part, path in (("calibration", paths.calibration), ("selection", paths.selection), ("test", paths.test)):
            arrays = bundled_arrays(part)
            np.savez_compressed(path, input=arrays[_INPUT], labels=arrays["labels"])
    except OSError as error:
        raise OutputError(f"{folder}: cannot write: {error.strerror}; name another folder with -o") from error
    return paths
