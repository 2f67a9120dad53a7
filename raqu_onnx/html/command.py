"""The command line that makes a result again, from the configuration in its manifest."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from raqu_onnx.hardware import Chip
    from raqu_onnx.report import DataReport, Report

__all__ = ["changed_settings", "chosen_earlier", "command_of", "given_in_memory"]

_BUILT_IN = "generic"
# How pictures become inputs, as only a configuration file can say it.
_ONLY_IN_FILES = {"scale", "resize"}
# Flags that say the opposite of their setting.
_NEGATED = {"drop": "--no-drop"}
# Options that are given once for each of their values; other lists are joined by commas.
_REPEATED = ("exclude", "skip", "dump_after")
# What may be given together with `--choose`; all else is taken from the earlier search.
_WITH_CHOOSE = ("hw", "calibration", "selection", "eval", "dump_after", "cells")
# Numbers of a file or of Python, whose unit an option needs.
_UNITS = {"max_latency": "ns", "max_energy": "pJ"}
# Any of these is a goal, or stands against the default goal of a chip with counts.
_GOALS = (
    "max_crossbars", "max_accuracy_drop", "max_latency", "max_energy", "max_average_bits", "objective", "partitions",
)  # fmt: skip


def changed_settings(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not the default, in the order of the configuration.

    Args:
        configuration: As the manifest holds it, by key of the configuration file.
    """
    from raqu_onnx.config import OptimizeConfig

    defaults = OptimizeConfig().model_dump(mode="json", by_alias=True)
    return {key: value for key, value in configuration.items() if key not in defaults or value != defaults[key]}


def given_in_memory(configuration: Mapping[str, Any], report: Report, chip: Chip) -> list[str]:
    """What a command cannot name, since the run got it as objects: of `model`, `chip`, `calibration data` and so on.

    Args:
        configuration: As the manifest holds it.
        report: Of the same run.
        chip: Of the same run.
    """
    found = [] if isinstance(configuration.get("model"), str) else ["model"]
    if not _names(str(configuration.get("hw", _BUILT_IN)), chip):
        found.append("chip")
    calibration = report.data.get("calibration")
    for role, key in (("calibration", "calibration"), ("selection", "selection"), ("evaluation", "eval")):
        data: DataReport | None = report.data.get(role)  # type: ignore[call-overload]
        if data is None or data.synthetic or configuration.get(key) is not None:
            continue
        # Selection data that nobody gave is calibration data, or a part of it, and has its name.
        if role != "selection" or calibration is None or data.name != calibration.name:
            found.append(f"{role} data")
    return found


def _names(hw: str, chip: Chip) -> bool:
    """Whether `--hw` takes this text for the chip: a chip object leaves its name, which no file may have."""
    from raqu_onnx.hardware import is_builtin_chip, load_chip

    if is_builtin_chip(hw):
        return load_chip(hw) == chip
    return hw != chip.name or hw.endswith(".toml")


def chosen_earlier(report: Report) -> int | None:
    """Number of the point that was written with `--choose`, None where the run's own search chose.

    The option is not recorded, but such a run measures no sensitivity, and its candidates are the points of the front.
    With a single point the search has chosen the same one.
    """
    if report.sensitivity or len(report.front) < 2:
        return None
    tried = [(item.crossbars, item.loss, item.score) for item in report.evaluations]
    return report.chosen if tried == [(item.crossbars, item.loss, item.score) for item in report.front] else None


def command_of(configuration: Mapping[str, Any], chosen: int | None = None) -> str | None:
    """The `raqu-onnx optimize` command for a configuration.

    None where the model was no file, or where a setting has no option and needs a configuration file.

    Paths are as they were given, so that it has to be run in the same folder.

    Args:
        configuration: As the manifest holds it.
        chosen: Number of the point of an earlier search that was written; the folder of that search, which is not
            recorded, is `SEARCH` in the command.
    """
    settings = changed_settings(configuration)
    model = settings.pop("model", None)
    pictures = _changed_pictures(settings.pop("pictures", None))
    words = ["raqu-onnx", "optimize"]
    if chosen is not None:
        words += ["--choose", str(chosen), "--from", "SEARCH"]
        settings, pictures = {key: settings[key] for key in _WITH_CHOOSE if key in settings}, {}
    if not isinstance(model, str) or pictures.keys() & _ONLY_IN_FILES or _fits_unless_told(settings):
        return None
    if not model.startswith("-"):
        words.insert(2, model)
    for key, value in settings.items():
        words += _words(key, value)
    for name, value in pictures.items():
        words += _given(f"--picture-{name}", _joined(value, "x" if name == "size" else ","))
    return shlex.join([*words, "--", model] if model.startswith("-") else words)


def _fits_unless_told(settings: Mapping[str, Any]) -> bool:
    """Whether `fit_chip` is switched off where nothing else does so; no option can."""
    return settings.get("fit_chip") is False and all(settings.get(key) is None for key in _GOALS)


def _words(key: str, value: Any) -> list[str]:
    option = f"--{key.replace('_', '-')}"
    if isinstance(value, bool):
        return [option] if value else [_NEGATED[key]] if key in _NEGATED else []
    if isinstance(value, list | tuple):
        texts = [str(part) for part in value] if key in _REPEATED else [_joined(value, ",")]
        return [word for text in texts for word in _given(option, text)]
    if isinstance(value, int | float) and key in _UNITS:
        return _given(option, f"{value!r}{_UNITS[key]}")
    # All digits of a number, unlike a format: another number is another run.
    return _given(option, repr(value) if isinstance(value, float) else str(value))


def _given(option: str, text: str) -> list[str]:
    """An option with its value, which must not be taken for an option itself."""
    return [f"{option}={text}"] if text.startswith("-") else [option, text]


def _changed_pictures(pictures: Mapping[str, Any] | None) -> dict[str, Any]:
    from raqu_onnx.data import PictureOptions

    defaults = PictureOptions().model_dump(mode="json")
    return {key: value for key, value in (pictures or {}).items() if value != defaults.get(key)}


def _joined(value: Any, separator: str) -> str:
    return separator.join(map(str, value)) if isinstance(value, list | tuple) else str(value)
