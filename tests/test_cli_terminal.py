"""The command line in terminals and pipes: progress, escape codes, full disks, readers that leave, signals."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

Cli = Callable[..., Any]
Snapshot = Callable[[Path], dict[str, Any]]

DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz", "--hw", "chip.toml")
#: A whole run in a fraction of a second.
RUN = ("optimize", "model.onnx", *DATA, "--evaluations", "2")
FILES = ["manifest.json", "model.onnx", "report.html", "report.json"]
ANSI = re.compile(r"\x1b")


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the journal, which is there after a search only and tells how it was carried out."""
    files = sorted(path for path in folder.iterdir() if path.name != "journal.jsonl")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_pipe_gets_no_escape_codes(workspace: Path) -> None:
    command = [sys.executable, "-m", "raqu_onnx", *RUN, "--weight-bits", "8", "-q"]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm-256color"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=workspace)
    assert ran.returncode == 0
    assert ran.stderr == ""
    assert not ANSI.search(ran.stdout)
    assert "ours" in ran.stdout


def test_a_log_file_gets_one_line_for_every_stage(cli: Cli, workspace: Path) -> None:
    assert workspace.is_dir()
    lines = cli(*RUN).err.splitlines()
    stages = [match[1] for line in lines if (match := re.fullmatch(r" *\d+\.\d s  (.+)", line))]
    assert stages[:3] == ["pass tidy", "pass annotate-tiling", "pass calibrate"]
    assert stages.count("measuring sensitivity") == 1
    assert "pass check" in stages
    assert not ANSI.search("".join(lines))
    for option in ("-q", "--no-progress"):
        assert "pass tidy" not in cli(*RUN, "--force", option).err


@pytest.mark.parametrize("columns", [80, 66])
def test_tables_fit_a_terminal(workspace: Path, columns: int, small_net: Callable[..., onnx.ModelProto]) -> None:
    model = small_net()
    for index, node in enumerate(model.graph.node):
        node.name = f"/a/very/long/path/of/modules/in/a/model/block{index}/branch/{node.op_type}"
    onnx.save(model, workspace / "model.onnx")
    for command in (RUN, ("inspect", "model.onnx"), ("manifest", "show", "model-raqu")):
        leader, follower = pty.openpty()
        environment = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "xterm"}
        process = subprocess.Popen(
            [sys.executable, "-m", "raqu_onnx", *command], stdout=follower, stderr=subprocess.DEVNULL, env=environment
        )
        os.close(follower)
        said = read_all(leader)
        assert process.wait(60) == 0
        lines = re.sub(r"\x1b\[\d*m", "", said.decode()).splitlines()
        assert max(map(len, lines)) <= columns
        rows = [line.split() for line in lines if line.startswith("/a") and "…" in line]
        assert len({row[0] for row in rows}) == len(rows) == 3
        assert all(row[-1][0].isdigit() for row in rows)


def read_all(leader: int) -> bytes:
    """What is written to a terminal until its other end is closed."""
    said = b""
    while True:
        ready, _, _ = select.select([leader], [], [], 60)
        assert ready, "the command says nothing for a minute"
        try:
            piece = os.read(leader, 65536)
        except OSError:  # The other end is closed.
            break
        if not piece:
            break
        said += piece
    os.close(leader)
    return said


def on_terminal(command: list[str], **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout (a pipe) and stderr (a terminal)."""
    leader, follower = pty.openpty()
    variables = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=follower, text=True, env=variables | {"TERM": "xterm"} | environment
    )
    os.close(follower)
    drawn = read_all(leader)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, drawn.decode()


def test_progress_is_drawn_on_a_terminal_only_and_on_stderr(workspace: Path) -> None:
    assert workspace.is_dir()
    code, out, drawn = on_terminal([sys.executable, "-m", "raqu_onnx", *RUN, "--weight-bits", "8"])
    assert code == 0
    assert ANSI.search(drawn)
    assert "starting" in drawn
    assert "ours" in out
    assert not ANSI.search(out)


COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|38|9[0-7])[;m]")


@pytest.mark.parametrize(
    ("arguments", "variables", "drawn", "coloured"),
    [
        ((), {}, True, True),
        ((), {"NO_COLOR": "1"}, True, False),
        (("--no-progress",), {}, False, False),
        (("-q",), {}, False, False),
    ],
)
def test_progress_may_be_plain_or_off(
    cli: Cli,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    drawn: bool,
    coloured: bool,
) -> None:
    assert workspace.is_dir()
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "", **variables}.items():
        monkeypatch.setenv(name, value)
    if "NO_COLOR" not in variables:
        monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ran = cli(*RUN, "--weight-bits", "8", *arguments)
    assert ran.code == 0
    assert ("starting" in ran.err) is drawn
    assert bool(COLOUR.search(ran.err)) is coloured
    assert not ANSI.search(ran.out)


SLEEPER = """
import pathlib, time
import numpy as np

reads = 0

def feeds():
    global reads
    rng = np.random.default_rng(1)
    yield {"input": rng.normal(size=(8, 3, 8, 8)).astype(np.float32)}
    reads += 1
    if reads == %d:
        pathlib.Path("asleep").touch()
        time.sleep(60)
    yield {"input": rng.normal(size=(8, 3, 8, 8)).astype(np.float32)}
"""


@pytest.mark.parametrize(
    ("number", "code", "exists"), [(signal.SIGINT, 130, False), (signal.SIGINT, 130, True), (signal.SIGTERM, 143, True)]
)
def test_an_interrupted_run_leaves_nothing(
    snapshot: Snapshot, workspace: Path, number: signal.Signals, code: int, exists: bool
) -> None:
    # The second whole read of the selection data is the search's.
    (workspace / "feeds.py").write_text(SLEEPER % 2)
    if exists:
        (workspace / "out").mkdir()
        (workspace / "out" / "model.onnx").write_bytes(b"old")
    command = [sys.executable, "-B", "-m", "raqu_onnx", "optimize", "model.onnx", "--hw", "chip.toml", "-o", "out"]
    data = ["--calibration", "calibration.npz", "--selection", "feeds.py:feeds", "--force", "-q"]
    before = snapshot(workspace)
    # Jobs that a shell runs in the background ignore SIGINT, and so do their children; one that is handled is not.
    handled = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen([*command, *data], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, handled)
    deadline = time.monotonic() + 60
    while not (workspace / "asleep").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # The run has begun to write, somewhere.
    assert any(path.suffix == ".part" for path in workspace.rglob("*"))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    (workspace / "asleep").unlink()
    assert process.returncode == code
    assert out == ""
    assert err.endswith("ted; no result was written\n")
    assert len(err.splitlines()) == 1
    assert snapshot(workspace) == before


def test_a_reader_that_leaves_early_is_no_error(workspace: Path) -> None:
    """Print through `print` and through rich to a pipe that nobody reads: quiet, and the code of SIGPIPE."""
    assert workspace.is_dir()
    for command in (("manifest", "schema"), ("hw", "list"), ("passes",), ("inspect", "model.onnx")):
        read, write = os.pipe()
        os.close(read)
        ran = subprocess.run(
            [sys.executable, "-m", "raqu_onnx", *command], stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
        os.close(write)
        assert (ran.returncode, ran.stderr) == (141, ""), command


def test_a_closed_stdout_is_no_error(workspace: Path) -> None:
    assert workspace.is_dir()
    command = f"{sys.executable} -m raqu_onnx hw list >&-"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)  # noqa: S607
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_a_full_stdout_does_not_hide_that_the_result_is_complete(workspace: Path) -> None:
    command = [sys.executable, "-m", "raqu_onnx", *RUN, "--weight-bits", "8", "-q"]
    for form in ("text", "json"):
        with Path("/dev/full").open("w") as full:
            ran = subprocess.run(
                [*command, "--format", form, "-o", form], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert ran.returncode == 1
        assert ran.stderr == f"error: standard output: No space left on device; the result in {form} is complete\n"
        assert sorted(digests(workspace / form)) == FILES
