"""A finished search, read back from its result folder, so that another point of its front can be written.

Model, chip, data and settings must be those of the search: then what is written is, byte for byte, what the search
would have written had it chosen this point.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from raqu_onnx.config import OptimizeConfig
from raqu_onnx.errors import ConfigError, ManifestError, OutputError
from raqu_onnx.hardware import is_builtin_chip
from raqu_onnx.manifest import read_manifest
from raqu_onnx.points import read_baseline, read_point, read_score
from raqu_onnx.report import Report
from raqu_onnx.search.journal import JOURNAL_FILE
from raqu_onnx.search.result import Goal, SearchResult, goal_is_met

if TYPE_CHECKING:
    from raqu_onnx.hardware import Chip
    from raqu_onnx.manifest import Manifest
    from raqu_onnx.run_data import RunData

__all__ = ["EarlierSearch", "read_search", "with_earlier_settings"]

_MANIFEST_FILE: Final = "manifest.json"
_REPORT_FILE: Final = "report.json"
# Settings that may differ from those of the search: they name things whose content is compared, or change no bits.
_FREE = frozenset(
    {
        "model", "output", "hw", "calibration", "selection", "evaluation", "threads", "workers", "dask", "timeout",
        "cache", "cells", "dump_after", "choose", "earlier",
    }
)  # fmt: skip


# Settings that name files, `metric` and functions of Python files apart.
_FILES: Final = ("model", "hw", "calibration", "selection", "evaluation")
_ALIASES: Final = {"evaluation": "eval"}


@dataclass(frozen=True)
class EarlierSearch:
    """A search whose results lie in a folder.

    Attributes:
        folder: The folder.
        manifest: Its manifest.
        report: Its report.
    """

    folder: Path
    manifest: Manifest
    report: Report

    def settings(self, given: OptimizeConfig) -> OptimizeConfig:
        """The settings of the search, with those given over them that may differ.

        Raises:
            ConfigError: Another setting is given that is not the search's.
        """
        base = OptimizeConfig.model_validate(self.manifest.configuration)
        changes = self._found_paths(base, given)
        for name in given.model_fields_set:
            value = getattr(given, name)
            if name in _FREE:
                changes[name] = value
            elif value != getattr(base, name):
                raise ConfigError(
                    f"{_contradiction(base, given, name, self.folder)}; leave it out, or search again without --choose"
                )
        return base.model_copy(update=changes)

    def _found_paths(self, base: OptimizeConfig, given: OptimizeConfig) -> dict[str, str]:
        """Files that the search named relative to the folder that it was run in, where this is another one.

        They are looked for in the folders above the result. What is found there is held against the search's digests,
        as it would be in the current folder.

        Raises:
            ConfigError: They are in none of these folders.
        """
        named = {
            name: value
            for name in _FILES
            if name not in given.model_fields_set and isinstance(value := getattr(base, name), str)
        }
        lost = {name: value for name, value in named.items() if not _is_there(Path(), name, value)}
        if not lost:
            return {}
        for above in self.folder.resolve().parents:
            if all(_is_there(above, name, value) for name, value in named.items()):
                return {name: _from(above, name, value) for name, value in named.items()}
        [(name, value), *_] = lost.items()
        option = "the model" if name == "model" else f"--{_ALIASES.get(name, name)}"
        raise ConfigError(
            f"{value}: no such file; the search in {self.folder} named it so, relative to the folder that it was run "
            f"in: go there, or say with {option} where it is now"
        )

    def known(self, number: int | None, digest: str | None, chip: Chip, data: RunData) -> SearchResult:
        """The search with another point chosen.

        Args:
            number: The point's number on the front.
            digest: Of the model, None for one in memory.
            chip: The chip.
            data: The data of the run.

        Raises:
            ConfigError: Model, chip or data are not those of the search, or there is no such point.
        """
        if digest is None:
            raise ConfigError(
                "--choose: whether a model in memory is the one of the search cannot be told; give its path"
            )
        if digest != self.manifest.model.source_sha256:
            raise ConfigError(f"--choose: the model is not the one of the search in {self.folder}; give that one")
        if chip != self.manifest.chip:
            raise ConfigError(
                f"--hw: chip {chip.name} is not as it was in the search in {self.folder}; search again without --choose"
            )
        pairs = (
            ("calibration", data.calibration, self.manifest.calibration),
            ("selection", data.selection, self.manifest.selection),
        )
        for role, found, recorded in pairs:
            if recorded is not None and found.digest != recorded.digest:
                raise ConfigError(
                    f"--{role}: {found.name} is not the data of the search in {self.folder}, which was "
                    f"{recorded.name}; give that one"
                )
        return self._chosen(number or 0)

    def copy_journal(self, folder: Path) -> None:
        """Leave the search's journal in a folder too, so that the search can be gone on with from there.

        Raises:
            OutputError: It cannot be copied.
        """
        journal = self.folder / JOURNAL_FILE
        if not journal.is_file():
            return
        try:
            shutil.copyfile(journal, folder / JOURNAL_FILE)
        except OSError as error:
            raise OutputError(
                f"{journal}: the journal of the search cannot be copied: {error.strerror}; make it readable, and free "
                "some room"
            ) from error

    def _chosen(self, number: int) -> SearchResult:
        front = tuple(read_point(item) for item in self.report.front)
        if not 1 <= number <= len(front):
            have = "one point, 1" if len(front) == 1 else f"{len(front)} points, 1 to {len(front)}"
            raise ConfigError(f"--choose {number}: the search in {self.folder} has {have}")
        reference = self.report.figures[0].selection
        if reference is None:
            raise ManifestError(f"{self.folder / _REPORT_FILE}: it has no score of the float model")
        goal = Goal(None, None) if self.report.goal is None else Goal(**self.report.goal.model_dump())
        baselines = tuple(read_baseline(item) for item in self.report.uniform)
        chosen = front[number - 1]
        return SearchResult(
            goal=goal,
            chosen=chosen,
            goal_met=goal_is_met(goal, read_score(reference), chosen) if goal else None,
            reference=read_score(reference),
            baselines=baselines,
            best_uniform=next((item for item in baselines if item.weight_bits == self.report.best_uniform), None),
            front=front,
            evaluations=front,
            nodes=tuple(self.report.nodes),
        )


def _is_there(folder: Path, name: str, value: str) -> bool:
    """Whether what a setting names needs no file, or has one when seen from a folder."""
    return (name == "hw" and is_builtin_chip(value)) or (folder / _file_of(value)).exists()


def _from(folder: Path, name: str, value: str) -> str:
    return value if name == "hw" and is_builtin_chip(value) else str(folder / value)


def _file_of(value: str) -> str:
    """The file of a path, which may name a function in it: `samples.py:batches`."""
    file, separator, _ = value.rpartition(":")
    return file if separator and file.endswith(".py") else value


def _contradiction(base: OptimizeConfig, given: OptimizeConfig, name: str, folder: Path) -> str:
    """Which setting is not that of the search, in the words of the command line."""
    theirs, ours = (item.model_dump(mode="json")[name] for item in (base, given))
    option = "--no-drop" if name == "drop" else f"--{name.replace('_', '-')}"
    if isinstance(ours, bool):
        return f"{option}: the search in {folder} ran {'with' if theirs is not (name == 'drop') else 'without'} it"
    return f"{option}: the search in {folder} ran with {_text(theirs)}, not {_text(ours)}"


def _text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def read_search(folder: str | Path) -> EarlierSearch:
    """Read a result folder.

    Raises:
        ConfigError: It holds no finished search.
        ManifestError: Its files cannot be read, were changed, or are of different runs.
    """
    folder = Path(folder)
    if not (folder / _MANIFEST_FILE).is_file() or not (folder / _REPORT_FILE).is_file():
        raise ConfigError(
            f"--from {folder}: it is no result folder, which holds {_MANIFEST_FILE} and {_REPORT_FILE}; name what -o "
            "named for the search"
        )
    manifest = read_manifest(folder / _MANIFEST_FILE)
    try:
        report = Report.model_validate_json((folder / _REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{folder / _REPORT_FILE}: cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "top level"
        raise ManifestError(f"{folder / _REPORT_FILE}: {key}: {first['msg']}") from error
    if manifest.search is None or not report.figures:
        raise ConfigError(f"--from {folder}: no search was run for it, so it has no other points")
    if manifest.search.front != report.front:
        raise ManifestError(f"{folder}: {_MANIFEST_FILE} and {_REPORT_FILE} are not of one run")
    return EarlierSearch(folder, manifest, report)


def with_earlier_settings(config: OptimizeConfig) -> tuple[OptimizeConfig, EarlierSearch | None]:
    """The settings of a run; with `choose`, those of the earlier search, which is read.

    Raises:
        ConfigError: Only one of `choose` and `earlier` is given, or settings contradict the earlier search.
        ManifestError: The earlier results cannot be read.
    """
    if config.choose is None and config.earlier is None:
        return config, None
    if config.earlier is None:
        raise ConfigError("--choose: name the result folder of a finished search with --from")
    if config.choose is None:
        raise ConfigError("--from: say with --choose which point of that search to write; its report.json lists them")
    found = read_search(config.earlier)
    return found.settings(config), found
