"""Sensitivities and error curves of earlier searches on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raqu_onnx.error_curves import ErrorCurve, ErrorCurves
from raqu_onnx.search import Bits
from raqu_onnx.search.disk_cache import DiskCache, cache_folder
from raqu_onnx.search.journal import JOURNAL_FILE
from raqu_onnx.search.judge import Judge

IDENTITY = {"model": "a" * 64, "threads": "2", "selection data": "b" * 64, "batch size": "64"}
LOSSES = {Bits((2, 8), (8, 8)): 1 / 3, Bits((8, 2), None): 1e-300}
DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--hw", "chip.toml")
SEARCH = ("optimize", "model.onnx", *DATA, "--max-crossbars", "9", "--evaluations", "2", "--threads", "1", "-q")


def curves() -> dict[str, ErrorCurve]:
    rng = np.random.default_rng(0)
    return {
        name: ErrorCurve(name, rng.normal(size=(9, size)), rng.normal(size=size), absorbed)
        for name, size, absorbed in (("a", 3, True), ("b/c", 5, False))
    }


def test_what_is_kept_comes_back_for_the_same_identity_only(tmp_path: Path) -> None:
    cache = DiskCache(IDENTITY, tmp_path)
    assert cache.sensitivities() == {}
    assert cache.curves([2, 4], ["a", "b/c"]) is None
    cache.keep_sensitivities(LOSSES)
    cache.keep_curves([2, 4], curves())
    assert DiskCache(IDENTITY, tmp_path).sensitivities() == LOSSES
    found = DiskCache(IDENTITY, tmp_path).curves([2, 4], ["a", "b/c"])
    assert found is not None
    for name, expected in curves().items():
        assert found[name].errors.tobytes() == expected.errors.tobytes()
        assert found[name].gains.tobytes() == expected.gains.tobytes()
        assert (found[name].name, found[name].absorbed) == (name, expected.absorbed)
    assert cache.curves([2, 4, 6], ["a", "b/c"]) is None
    # Curves know nothing of the data that candidates are judged on, nor of how.
    for changed in ("selection data", "metric"):
        other = DiskCache({**IDENTITY, changed: "c" * 64}, tmp_path)
        assert other.sensitivities() == {}
        assert other.curves([2, 4], ["a", "b/c"]) is not None
    for changed in ("model", "threads"):
        assert DiskCache({**IDENTITY, changed: "x"}, tmp_path).curves([2, 4], ["a", "b/c"]) is None


def test_damaged_files_are_as_good_as_none(tmp_path: Path) -> None:
    cache = DiskCache(IDENTITY, tmp_path)
    cache.keep_sensitivities(LOSSES)
    cache.keep_curves([2], curves())
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    # A journal whose last line is torn still holds the others.
    assert set(cache.sensitivities().items()) < set(LOSSES.items())
    assert cache.curves([2], ["a", "b/c"]) is None
    for path in tmp_path.iterdir():
        path.write_bytes(b"\0" * 100)
    assert cache.sensitivities() == {}
    assert cache.curves([2], ["a", "b/c"]) is None


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    caches = [DiskCache({"model": str(index)}, tmp_path, most_bytes=600) for index in range(6)]
    for index, cache in enumerate(caches):
        cache.keep_sensitivities(LOSSES)
        for path in tmp_path.iterdir():
            if path.stat().st_mtime > 10**8:
                os.utime(path, (index, index))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 600
    kept = [index for index, cache in enumerate(caches) if cache.sensitivities()]
    assert kept == list(range(kept[0], 6))
    assert 0 < kept[0] < 5


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskCache(IDENTITY, tmp_path / "file" / "below")
    cache.keep_sensitivities(LOSSES)
    assert cache.sensitivities() == {}


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "raqu-onnx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "raqu-onnx"


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cache_folder() is None
    cache = DiskCache(IDENTITY)
    cache.keep_sensitivities(LOSSES)
    cache.keep_curves([2], curves())
    assert cache.sensitivities() == {}
    assert cache.curves([2], ["a", "b/c"]) is None


@pytest.mark.parametrize("line", [b"[" * 200_000, b'{"kind":"quick","weights":[2],"activations":null,"value":1%b}'])
def test_lines_that_python_cannot_read_are_as_good_as_none(tmp_path: Path, line: bytes) -> None:
    cache = DiskCache(IDENTITY, tmp_path)
    cache.keep_sensitivities(LOSSES)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + line.replace(b"%b", b"0" * 400) + b"\n")
    assert cache.sensitivities() == {}


def test_half_written_files_of_killed_runs_go_and_those_being_written_stay(tmp_path: Path) -> None:
    for name, age in ((".killed.part", 2 * 86400), (".live.part", 60)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    DiskCache(IDENTITY, tmp_path).keep_sensitivities(LOSSES)
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".part"} == {".live.part"}


def test_a_second_search_measures_no_sensitivity_and_finds_the_same(
    cli: Callable[..., Any], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "cache"))
    assert cli(*SEARCH, "-o", "none", "--no-cache").code == 0
    assert not (workspace / "cache").exists()
    assert cli(*SEARCH, "-o", "first").code == 0

    def measured(*_: object) -> None:
        raise AssertionError("a sensitivity was measured, or a curve computed")

    monkeypatch.setattr(Judge, "quick_fidelity", measured)
    monkeypatch.setattr(ErrorCurves, "__getitem__", measured)
    assert cli(*SEARCH, "-o", "second").code == 0
    # The journal holds sensitivities all the same.
    for name in ("model.onnx", "manifest.json", "report.json", JOURNAL_FILE):
        files = {(workspace / out / name).read_bytes() for out in ("none", "first", "second")}
        assert len(files) == 1
