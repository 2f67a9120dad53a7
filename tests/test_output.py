"""A result folder appears whole or not at all, and nothing else changes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raqu_onnx.errors import OutputError
from raqu_onnx.output import RESULT_FILES, check_output, staged_folder

Snapshot = Callable[[Path], dict[str, Any]]


def fill(folder: Path, *names: str, text: str = "new") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_files_appear_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with staged_folder(target) as staging:
        fill(staging, "model.onnx", "dumps/00-tidy.onnx")
        assert not target.exists()
        assert staging.stat().st_dev == tmp_path.stat().st_dev
    assert names(tmp_path) == ["a/b/dumps/00-tidy.onnx", "a/b/model.onnx"]


def test_the_folder_is_as_readable_as_any_other(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out") as staging:
        fill(staging, "model.onnx")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_changes_when_the_block_fails(
    tmp_path: Path, snapshot: Snapshot, error: type[BaseException], exists: bool
) -> None:
    target = tmp_path / "deep" / "out"
    if exists:
        fill(target, "model.onnx", "mine.txt", text="old")
    before = snapshot(tmp_path)
    with pytest.raises(error), staged_folder(target) as staging:  # noqa: PT012
        fill(staging, "model.onnx")
        raise error
    assert snapshot(tmp_path) == before


def test_a_later_run_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path, *RESULT_FILES, "mine.txt", "dumps/mine.onnx", "dumps/00-tidy.onnx", text="old")
    with staged_folder(tmp_path) as staging:
        fill(staging, "model.onnx", "report.json", "dumps/00-tidy.onnx")
    # cells.npz and manifest.json of the earlier run would contradict the new model.
    assert names(tmp_path) == ["dumps/00-tidy.onnx", "dumps/mine.onnx", "mine.txt", "model.onnx", "report.json"]
    old = [name for name in names(tmp_path) if (tmp_path / name).read_text() == "old"]
    assert old == ["dumps/mine.onnx", "mine.txt"]


def test_models_that_an_earlier_run_dumped_go_and_others_stay(tmp_path: Path, snapshot: Snapshot) -> None:
    target = tmp_path / "out"
    fill(target, "model.onnx", "dumps/00-tidy.onnx", "dumps/00-tidy.onnx.data", "dumps/mine.onnx", text="old")
    before = snapshot(target)
    with pytest.raises(KeyError), staged_folder(target) as staging:  # noqa: PT012
        fill(staging, "model.onnx")
        raise KeyError
    assert snapshot(target) == before
    with staged_folder(target) as staging:
        fill(staging, "model.onnx", "dumps/05-insert-qdq.onnx")
    assert names(target) == ["dumps/05-insert-qdq.onnx", "dumps/mine.onnx", "model.onnx"]
    with staged_folder(target) as staging:
        fill(staging, "model.onnx")
    assert names(target) == ["dumps/mine.onnx", "model.onnx"]


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    fill(tmp_path, "elsewhere.onnx", text="old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with staged_folder(tmp_path / "out") as staging:
        fill(staging, "model.onnx")
    assert (tmp_path / "elsewhere.onnx").read_text() == "old"
    assert not (tmp_path / "out" / "model.onnx").is_symlink()


@pytest.mark.parametrize("failing", range(7))
def test_a_failure_while_moving_is_undone(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    target = tmp_path / "out"
    fill(target, "cells.npz", "model.onnx", "report.json", text="old")
    before = snapshot(tmp_path)
    rename = Path.rename
    calls = 0

    def full(self: Path, to: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OutputError, match="No space left"), staged_folder(target) as staging:
        fill(staging, "dumps/a.onnx", "model.onnx", "report.json")
    assert calls > failing
    assert snapshot(tmp_path) == before


def test_a_failure_while_moving_leaves_no_new_folder(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = snapshot(tmp_path)
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OutputError), staged_folder(tmp_path / "a" / "b") as staging:
        fill(staging, "model.onnx", "dumps/x.onnx")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("blocker", ["model.onnx/x", "dumps"])
def test_what_stands_in_the_way_is_named(tmp_path: Path, snapshot: Snapshot, blocker: str) -> None:
    target = tmp_path / "out"
    fill(target, blocker, "cells.npz", text="mine")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=blocker.partition("/")[0]), staged_folder(target) as staging:
        fill(staging, "model.onnx", "dumps/00.onnx")
    assert snapshot(tmp_path) == before


def test_without_a_target_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with staged_folder(None) as staging:
        fill(staging, "model.onnx")
        assert tmp_path in staging.parents
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(OutputError, match="absent"), staged_folder(None):
        pass


def test_a_folder_that_refuses_files_is_named() -> None:
    # Nobody, root included, creates files there.
    with pytest.raises(OutputError, match=r"^/proc/raqu: cannot write in /proc: "), staged_folder(Path("/proc/raqu")):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_refused_early(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    for folder in (tmp_path, tmp_path / "out"):
        with pytest.raises(OutputError, match="not writable"):
            check_output(folder, force=True)
    tmp_path.chmod(0o755)


def test_a_folder_without_write_permission_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, mode: not mode & os.W_OK)
    with pytest.raises(OutputError, match=f"{tmp_path / 'x' / 'y'}: {tmp_path} is not writable"):
        check_output(tmp_path / "x" / "y", force=False)


def test_an_output_that_exists_needs_force(tmp_path: Path) -> None:
    check_output(tmp_path, force=False)  # It is empty.
    fill(tmp_path, "model.onnx")
    with pytest.raises(OutputError, match="--force"):
        check_output(tmp_path, force=False)
    check_output(tmp_path, force=True)


@pytest.mark.parametrize("path", ["file", "file/below/it"])
def test_a_file_is_no_output_folder(tmp_path: Path, path: str) -> None:
    fill(tmp_path, "file")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / path, force=True)


def test_the_source_model_is_never_replaced(tmp_path: Path) -> None:
    fill(tmp_path, "model.onnx", "net.onnx")
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(OutputError, match=r"would replace the model .*model\.onnx"):
            check_output(folder, force=True, source=tmp_path / "model.onnx")
    check_output(tmp_path, force=True, source=tmp_path / "net.onnx")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for two pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)  # noqa: S607


def test_a_disk_that_is_a_mount_point_of_its_own_serves(small_disk: Path) -> None:
    with staged_folder(small_disk) as staging:
        fill(staging, "model.onnx")
    assert names(small_disk) == ["model.onnx"]


def test_a_full_disk_is_told_and_left_as_it_was(small_disk: Path) -> None:
    fill(small_disk, "model.onnx", text="old")
    with pytest.raises(OutputError, match=r"disk: cannot write: No space left"), staged_folder(small_disk) as staging:
        fill(staging, "model.onnx", text="x" * 20_000)
    assert names(small_disk) == ["model.onnx"]
    assert (small_disk / "model.onnx").read_text() == "old"


def test_what_killed_runs_left_behind_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    script = "import os, sys; from pathlib import Path; from raqu_onnx.output import staged_folder\n"
    script += (
        "with staged_folder(Path(sys.argv[1])) as new: (new / 'x').touch(); print(new.parent, flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    others = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, alive = (Path(str(other.stdout and other.stdout.readline()).strip()) for other in others)
    others[0].kill()
    others[0].wait()
    assert killed.is_dir()
    with staged_folder(tmp_path / "mine"):
        assert not killed.exists()
        assert (alive / "new" / "x").exists()
    others[1].communicate("\n")
    assert (tmp_path / "out" / "x").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mine"}
    others[0].communicate()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_where_the_disk_knows_no_locks_nothing_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with staged_folder(tmp_path / "out") as new:
        fill(new, "x")
        with staged_folder(tmp_path / "other"):
            assert (new / "x").exists()
    assert names(tmp_path) == ["out/x"]


def abandon(folder: Path) -> Path:
    """What a run leaves that is killed after it replaced the model and before the rest."""
    staging = folder / ".raqu-killed.part"
    fill(staging / "new", "report.json")
    fill(staging / "old", "model.onnx", "dumps/00-tidy.onnx", "cells.npz", text="old")
    return staging


def test_what_a_killed_run_had_set_aside_goes_back(tmp_path: Path) -> None:
    abandon(tmp_path)
    with pytest.raises(KeyError), staged_folder(tmp_path):
        raise KeyError
    assert names(tmp_path) == ["cells.npz", "dumps/00-tidy.onnx", "model.onnx"]
    assert {(tmp_path / name).read_text() for name in names(tmp_path)} == {"old"}
    assert not list(tmp_path.glob(".raqu-*"))


def test_what_a_killed_run_had_set_aside_stays_where_its_place_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    staging = abandon(tmp_path)
    fill(tmp_path, "model.onnx")
    with pytest.raises(KeyError), staged_folder(tmp_path):
        raise KeyError
    assert (tmp_path / "model.onnx").read_text() == "new"
    assert (staging / "old" / "model.onnx").read_text() == "old"
    assert (tmp_path / "cells.npz").read_text() == "old"
    assert f"{staging}: holds files of an earlier result" in caplog.text


def test_what_cannot_be_put_back_is_kept_and_comes_back_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "cells.npz", "model.onnx", text="old")
    rename = Path.rename

    def broken(self: Path, to: Path) -> Path:
        if to.name == "model.onnx" and to.parent == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", broken)
        with pytest.raises(OutputError, match=r"cannot be put back: it is in .*old; "), staged_folder(tmp_path) as new:
            fill(new, "model.onnx")
    assert (tmp_path / "cells.npz").read_text() == "old"
    assert not (tmp_path / "model.onnx").exists()
    with pytest.raises(KeyError), staged_folder(tmp_path):
        raise KeyError
    assert names(tmp_path) == ["cells.npz", "model.onnx"]
