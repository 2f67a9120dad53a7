"""Everything that this package raises on purpose.

Each message is one line that says what is wrong, where (file, key or node) and what to do. The command line prints it
and exits with `exit_code`; a traceback means a defect in this package.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CheckError",
    "ChipError",
    "ConfigError",
    "DataError",
    "ManifestError",
    "ModelError",
    "OutputError",
    "RaquError",
]


class RaquError(Exception):
    """Root of every error that a user can cause and mend."""

    exit_code: ClassVar[int] = 2


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
