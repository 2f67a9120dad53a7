"""The command line that makes a result again, from the configuration in its manifest."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["changed_settings", "command_of"]

# How pictures become inputs, as only a configuration file can say it.
_ONLY_IN_FILES = {"scale", "resize"}
# Flags that say the opposite of their setting.
_NEGATED = {"cache": "--no-cache", "drop": "--no-drop"}
_OTHER_NAMES = {"earlier": "--from"}
# Options that are given once for each of their values; other lists are joined by commas.
_REPEATED = ("exclude", "skip", "dump_after")


def changed_settings(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not the default, in the order of the configuration.

    Args:
        configuration: As the manifest holds it, by key of the configuration file.
    """
    from raqu_onnx.config import OptimizeConfig

    defaults = OptimizeConfig().model_dump(mode="json", by_alias=True)
    return {key: value for key, value in configuration.items() if key not in defaults or value != defaults[key]}


def command_of(configuration: Mapping[str, Any]) -> str | None:
    """The `raqu-onnx optimize` command for a configuration.

    None where the model was no file, or where a setting has no option and needs a configuration file.

    Paths are as they were given, so that it has to be run in the same folder.

    Args:
        configuration: As the manifest holds it.
    """
    settings = changed_settings(configuration)
    model = settings.pop("model", None)
    pictures = _changed_pictures(settings.pop("pictures", None))
    if not isinstance(model, str) or pictures.keys() & _ONLY_IN_FILES:
        return None
    words = ["raqu-onnx", "optimize", model]
    for key, value in settings.items():
        words += _words(key, value)
    for name, value in pictures.items():
        words += [f"--picture-{name}", _joined(value, "x" if name == "size" else ",")]
    return shlex.join(words)


def _words(key: str, value: Any) -> list[str]:
    option = f"--{key.replace('_', '-')}"
    option = _OTHER_NAMES.get(key, option)
    if isinstance(value, bool):
        return [_NEGATED.get(key, option)]
    if isinstance(value, list | tuple):
        texts = [str(part) for part in value]
        return [word for text in texts for word in (option, text)] if key in _REPEATED else [option, ",".join(texts)]
    return [option, f"{value:g}" if isinstance(value, float) else str(value)]


def _changed_pictures(pictures: Mapping[str, Any] | None) -> dict[str, Any]:
    from raqu_onnx.data import PictureOptions

    defaults = PictureOptions().model_dump(mode="json")
    return {key: value for key, value in (pictures or {}).items() if value != defaults.get(key)}


def _joined(value: Any, separator: str) -> str:
    return separator.join(map(str, value)) if isinstance(value, list | tuple) else str(value)
