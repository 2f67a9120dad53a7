"""Everything that this package raises on purpose.

Each message is one line that says what is wrong, where (file, key or node) and what to do. The command line prints it
and exits with `exit_code`; a traceback means a defect in this package.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CheckError",
    "ChipError",
    "ConfigError",
    "DataError",
    "ManifestError",
    "ModelError",
    "OutputError",
    "RaquError",
    "WorkerError",
    "naming_model",
]


class RaquError(Exception):
    """Root of every error that a user can cause and mend."""

    exit_code: ClassVar[int] = 2

    def lines(self) -> list[str]:
        """What to print: one line, or one for each of several errors."""
        return ["; ".join(str(self).splitlines())]


class ModelError(RaquError):
    """The ONNX model cannot be read, or cannot be handled."""


class ChipError(RaquError):
    """A chip description is malformed, or a chip cannot hold the model."""


class DataError(RaquError):
    """Calibration, selection or evaluation data does not fit the model."""


class ConfigError(RaquError):
    """An option or a configuration file is wrong."""


class OutputError(RaquError):
    """The output folder cannot be written."""


class ManifestError(RaquError):
    """A manifest or cells file cannot be read."""


class CheckError(RaquError):
    """What was made failed its own check."""

    exit_code: ClassVar[int] = 1


class WorkerError(RaquError):
    """Workers that judge candidates cannot be reached, do not fit, or die."""


@contextmanager
def naming_model(source: object) -> Iterator[None]:
    """Name the model's file in the errors of the block: passes do not know which file a model came from.

    Args:
        source: The path as the user gave it; anything but a text or a path, such as a model in memory, names none.
    """
    try:
        yield
    except (ModelError, DataError) as error:
        message = str(error)
        if not isinstance(source, str | os.PathLike) or str(source) in message:
            raise
        if isinstance(error, DataError) and not message.startswith(("model ", "the model ")):
            raise  # It names the data, which is the culprit.
        raise type(error)(f"{source}: {message}") from error
