"""Bad options, settings and output folders: exit code 2, one line that names the culprit, and not a file touched."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
Refused = Callable[..., str]
Snapshot = Callable[[Path], dict[str, Any]]

DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--evaluations", "1")


# ------------------------------------------------------------------------------------------------------------ output


def test_an_output_that_exists_is_refused(refused: Refused, workspace: Path) -> None:
    (workspace / "out").mkdir()
    (workspace / "out" / "notes.txt").write_text("mine")
    for extra in ((), ("--dry-run",)):
        run = ("optimize", "model.onnx", *DATA, "-o", "out", *extra)
        refused(workspace, run, "out", "exists", "--force")
    (workspace / "model-raqu").write_text("a file")
    refused(workspace, ("optimize", "model.onnx", *DATA, "--force"), "model-raqu", "is a file")
    run = ("optimize", "model.onnx", *DATA, "--force", "-o", ".")
    refused(workspace, run, "would replace the model model.onnx")


def test_a_folder_that_cannot_be_written_is_refused(refused: Refused, workspace: Path) -> None:
    refused(workspace, ("optimize", "model.onnx", *DATA, "-o", "/proc/raqu"), "/proc/raqu", "cannot")


def test_a_read_only_folder_is_refused(refused: Refused, workspace: Path) -> None:
    out = workspace / "out"
    out.mkdir()
    # Permission bits do not bind root, the immutable flag does.
    if os.geteuid() == 0:
        if subprocess.run(["chattr", "+i", str(out)], capture_output=True, check=False).returncode:  # noqa: S607
            pytest.skip("this file system knows no immutable folders")
    else:
        out.chmod(0o555)
    try:
        refused(workspace, ("optimize", "model.onnx", *DATA, "-o", "out"), "out", "writ")
        refused(workspace, ("optimize", "model.onnx", *DATA, "-o", "out/deep"), "out/deep", "writ")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["chattr", "-i", str(out)], check=True)  # noqa: S607
        else:
            out.chmod(0o755)


@pytest.mark.parametrize("victim", ["model.onnx", "manifest.json", "cells.npz", "report.json"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_all_as_it_was(
    refused: Refused, cli: Cli, workspace: Path, monkeypatch: pytest.MonkeyPatch, victim: str, exists: bool
) -> None:
    run = ("optimize", "model.onnx", *DATA, "--weight-bits", "8", "--cells", "-o", "out", "--force")
    if exists:
        assert cli(*run).code == 0
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real_open = Path.open

    def guarded(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if victim in self.name and set(mode) & set("wxa+"):
            raise full
        return real_open(self, mode, *args, **options)

    # Path.write_text and Path.write_bytes go through io.open or Path.open, depending on the version of Python.
    monkeypatch.setattr(Path, "open", guarded)
    if victim == "cells.npz":
        monkeypatch.setattr("zipfile.ZipFile.writestr", lambda *_: (_ for _ in ()).throw(full))
    for name in ("write_text", "write_bytes"):
        real = getattr(Path, name)

        def write(self: Path, *args: Any, _real: Any = real, **options: Any) -> Any:
            if victim in self.name:
                raise full
            return _real(self, *args, **options)

        monkeypatch.setattr(Path, name, write)
    refused(workspace, run, "error: out", "No space left on device")


# ------------------------------------------------------------------------------------------------- options, settings

OPTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--frobnicate",), ("--frobnicate",)),
    (("--seed", "one"), ("--seed", "one")),
    (("--seed", "-1"), ("--seed",)),
    (("--seed", str(2**40)), ("--seed",)),
    (("--format", "xml"), ("--format", "xml", "json")),
    (("--weight-method", "magic"), ("--weight-method", "magic", "gptq")),
    (("--weight-bits", "9"), ("--weight-bits", "9", "2 to 8")),
    (("--weight-bits", "8-2"), ("--weight-bits", "8-2")),
    (("--weight-bits", "float"), ("--weight-bits", "float")),
    (("--activation-bits", "1"), ("--activation-bits", "1")),
    (("--max-crossbars", "0"), ("--max-crossbars", "0")),
    (("--max-crossbars", "4.5"), ("--max-crossbars", "4.5")),
    (("--max-accuracy-drop", "-1"), ("--max-accuracy-drop",)),
    (("--max-accuracy-drop", "nan"), ("--max-accuracy-drop",)),
    (("--threads", "0"), ("--threads",)),
    (("--batch-size", "0"), ("--batch-size",)),
    (("--picture-size", "8"), ("--picture-size",)),
    (("--picture-size", "axb"), ("--picture-size", "axb")),
    (("--picture-std", "0"), ("--picture-std",)),
    (("-q", "-v"), ("-v", "-q")),
    (("--passes", ""), ("--passes",)),
    (("--passes", "tidy,,check"), ("--passes", ",check")),
    (("--passes", "tidy{"), ("--passes", "tidy{")),
    (("--passes", "Tidy"), ("--passes", "Tidy")),
    (("--passes", "polish"), ("--passes", "polish", "annotate-tiling")),
    (("--passes", "tidy{speed=9}"), ("--passes", "speed", "minimum_opset")),
    (("--passes", "tidy{minimum_opset}"), ("--passes", "minimum_opset")),
    (("--passes", "tidy{minimum_opset=high}"), ("--passes", "minimum_opset", "high")),
    (("--passes", "tidy,calibrate"), ("calibrate", "run the pass annotate-tiling first")),
    (("--passes", "tidy,annotate-tiling,quantize-weights"), ("quantize-weights", "run the pass calibrate first")),
    (("--passes", "insert-qdq"), ("insert-qdq", "run the pass annotate-tiling first")),
    (("--passes", "tidy,annotate-tiling,insert-qdq"), ("insert-qdq", "run the pass quantize-weights first")),
    (("--skip", "insert-qdq"), ("write-manifest", "run the pass insert-qdq first")),
    (("--skip", "place-crossbars"), ("write-manifest", "run the pass place-crossbars first")),
    (("--skip", "polish"), ("--skip", "polish", "tidy")),
    (("--dump-after", "polish"), ("--dump-after", "polish", "tidy")),
    (("--skip", "check", "--dump-after", "check"), ("--dump-after", "check")),
    (("--passes", "check"), ("check", "run the pass write-manifest first")),
]


@pytest.mark.parametrize(("arguments", "said"), OPTIONS)
def test_a_bad_option_is_refused(
    refused: Refused, workspace: Path, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    refused(workspace, ("optimize", "model.onnx", *DATA, *arguments), *said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("optimise", "model.onnx"), "did you mean optimize?"),
        (("model.onnx",), "did you mean `raqu-onnx optimize model.onnx`?"),
        (("optimize", "model.onnx", "--max-crosbars", "4"), "did you mean --max-crossbars?; see `raqu-onnx optimize"),
        (("optimize", "model.onnx", "--max_crosbars=4"), "did you mean --max-crossbars?"),
        (("optimize", "model.onnx", "--weight-method", "gtpq"), "did you mean gptq?"),
        (("hw", "lst"), "did you mean list?"),
        (("manifest", "schema", "cels"), "did you mean cells?"),
        (("manifest", "show", "absent", "--fromat", "json"), "did you mean --format?"),
        (("inspect", "model.onnx", "--hw", "isaac.toml"), "did you mean the built-in chip isaac?"),
        (("optimize", "model.onnx", "--config", "chip.toml"), "chip.toml: it describes a chip"),
        (("inspect",), "MODEL.onnx"),
        (("inspect", "model.onnx", "--weight-bits", "1"), "--weight-bits"),
        (("inspect", "model.onnx", "--weight-bits", "2-8"), "--weight-bits"),
        (("hw",), "ACTION"),
        (("hw", "show", "isac"), "isac"),
        (("validate", "absent"), "absent"),
        (("manifest", "show", "absent"), "absent"),
        (("demo", "--model", "alexnet"), "alexnet"),
        (("optimize", "model.onnx", "--config", "absent.toml"), "absent.toml"),
    ],
)
def test_a_bad_command_is_refused(refused: Refused, workspace: Path, arguments: tuple[str, ...], said: str) -> None:
    refused(workspace, arguments, said)


@pytest.mark.parametrize("text", ["sede = 1", 'seed = "1"', "no toml", "weight_bits = 1"])
def test_a_bad_configuration_is_refused(refused: Refused, workspace: Path, text: str) -> None:
    (workspace / "run.toml").write_text(text)
    refused(workspace, ("optimize", "model.onnx", "--config", "run.toml"), "run.toml")


def test_settings_in_the_place_of_a_chip_are_told_in_a_few_words(cli: Cli, refused: Refused, workspace: Path) -> None:
    (workspace / "run.toml").write_text(cli("optimize", "model.onnx", "--show-config").out)
    said = refused(workspace, ("inspect", "model.onnx", "--hw", "run.toml"), "run.toml", "--config")
    assert len(said) < 160
    (workspace / "other.toml").write_text("[tool.black]\nline-length = 120\n")
    said = refused(workspace, ("inspect", "model.onnx", "--hw", "other.toml"), "other.toml", "no chip description")
    assert "--config" not in said


# -------------------------------------------------------------------------------------------- as users really run it


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("optimize", "bad.onnx"), "bad.onnx"),
        (("optimize", "model.onnx", "--hw", "bad.toml"), "bad.toml"),
        (("optimize", "model.onnx", "--frobnicate"), "--frobnicate"),
    ],
)
def test_a_real_process_says_the_same(
    snapshot: Snapshot, workspace: Path, arguments: tuple[str, ...], said: str
) -> None:
    (workspace / "bad.onnx").write_bytes(b"nothing")
    (workspace / "bad.toml").write_text((workspace / "chip.toml").read_text() + "x = 1")
    before = snapshot(workspace)
    command = [sys.executable, "-m", "raqu_onnx", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("error: ")
    assert said in ran.stderr
    assert snapshot(workspace) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("hw", "list", "--format", "json"),
        ("hw", "show", "isaac"),
        ("passes",),
        ("manifest", "schema"),  # More than fits a buffer.
        ("inspect", "model.onnx"),
        ("optimize", "model.onnx", "--dry-run", "-q"),
        ("optimize", "--show-config"),
        ("inspect", "--help"),
        ("--version",),
    ],
)
def test_a_full_disk_behind_stdout_is_one_line(workspace: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "raqu_onnx", *arguments]
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=workspace)
    assert ran.returncode == 1
    assert ran.stderr == "error: standard output: No space left on device\n"
