"""What a search writes down, and going on with it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx import file_lock
from raqu_onnx.errors import CheckError, ConfigError, OutputError
from raqu_onnx.evaluation import Score
from raqu_onnx.search import Bits
from raqu_onnx.search.identity import differences
from raqu_onnx.search.journal import JOURNAL_FILE, Journal, journal_lines, read_answers
from raqu_onnx.search.questions import Verdict

Cli = Callable[..., Any]

IDENTITY = {"model": "a" * 64, "threads": "2"}
BITS = Bits(((8, 0, 2), 4), (8, 8))
DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz", "--hw", "chip.toml")
SEARCH = ("optimize", "model.onnx", *DATA, "--max-crossbars", "9", "--evaluations", "3", "--threads", "1", "-q")
FILES = ("model.onnx", "manifest.json", "report.json", "cells.npz")

finite = st.floats(allow_nan=False)
scores = st.builds(
    Score, st.integers(1, 10**6), measured=st.none() | st.text(), value=st.none() | finite,
    top1=st.none() | finite, agreement=st.none() | finite, kl=st.none() | finite,
    sqnr_db=st.none() | finite,
)  # fmt: skip
verdicts = st.builds(Verdict, finite, st.none() | scores)
widths = st.integers(2, 8) | st.lists(st.integers(0, 8), min_size=1, max_size=5).map(tuple)
candidates = st.builds(
    Bits, st.lists(widths, min_size=1, max_size=4).map(tuple), st.none() | st.lists(st.integers(2, 8)).map(tuple)
)
answers = st.dictionaries(
    st.tuples(st.sampled_from(["score", "quick"]), candidates), st.integers(0, 3), max_size=4
).flatmap(lambda keys: st.fixed_dictionaries({key: verdicts if key[0] == "score" else finite for key in keys}))


@given(answers)
def test_answers_come_back_bit_by_bit(tmp_path_factory: pytest.TempPathFactory, found: dict[Any, Any]) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    path.write_bytes(journal_lines(IDENTITY, found))
    identity, read = read_answers(path)
    assert identity == IDENTITY
    assert read == found
    assert list(read) == list(found)


def journal(folder: Path, *, end: type[BaseException] | None = KeyboardInterrupt, **options: Any) -> int:
    """Judge one candidate more than an earlier run has, stop, and tell how many were known."""
    try:
        with Journal(folder, **options) as found:
            found.begin(IDENTITY)
            known = len(found)
            found.put("quick", Bits((known + 2,), None), known / 3)
            if end is not None:
                raise end
    except BaseException as error:
        if end is None or not isinstance(error, end):
            raise
    return known


def test_a_torn_line_is_judged_again(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out.journal.jsonl"
    assert journal(out) == 0
    assert journal(out, resume=True) == 1
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert journal(out, resume=True) == 1
        assert path.read_bytes() == whole
    # Not even the first line is whole.
    path.write_bytes(whole[:10])
    assert journal(out, resume=True) == 0


def test_only_an_end_or_a_refusal_removes_the_file(tmp_path: Path) -> None:
    out, path = tmp_path / "a" / "out", tmp_path / "a" / "out.journal.jsonl"
    for end in (None, ConfigError):
        assert journal(out, end=end) == 0
        assert not path.parent.exists()
    for stop in (KeyboardInterrupt, OutputError, CheckError, ZeroDivisionError):
        assert journal(out, end=stop, force=True) == 0
        assert path.exists()
    # What an earlier run has judged is not lost when this one is refused.
    assert journal(out, end=ConfigError, resume=True) == 1
    assert journal(out, end=None, resume=True) == 2
    assert not path.exists()


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path) -> None:
    journal(tmp_path / "out")
    before = (tmp_path / "out.journal.jsonl").read_bytes()
    with pytest.raises(OutputError, match=r"out\.journal\.jsonl: holds what .* --resume, .* --force$"):
        journal(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), Journal(tmp_path / "out", force=True):
        # A run that fails before the search replaces nothing.
        raise ZeroDivisionError
    assert (tmp_path / "out.journal.jsonl").read_bytes() == before
    assert journal(tmp_path / "out", force=True) == 0


def test_two_runs_cannot_write_the_same_folder(tmp_path: Path) -> None:
    with Journal(tmp_path / "out") as first:
        first.begin(IDENTITY)
        for options in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(OutputError, match="another run is writing its results here; wait"):
                Journal(tmp_path / "out", **options)


def test_a_file_that_vanishes_before_it_is_locked_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.journal.jsonl"
    journal(tmp_path / "out")
    lock = file_lock.lock_file

    def late(stream: Any) -> bool | None:
        # The other run ends here.
        monkeypatch.setattr("raqu_onnx.search.journal.lock_file", lock)
        path.unlink()
        return lock(stream)

    monkeypatch.setattr("raqu_onnx.search.journal.lock_file", late)
    with Journal(tmp_path / "out") as found:
        found.begin(IDENTITY)
        assert path.exists()
        with pytest.raises(OutputError, match="another run"):
            Journal(tmp_path / "out", resume=True)


def test_removing_the_file_of_a_run_loses_nothing_and_touches_no_other_run(tmp_path: Path) -> None:
    path = tmp_path / "out.journal.jsonl"
    with Journal(tmp_path / "out") as found:
        found.begin(IDENTITY)
        found.put("quick", BITS, 0.5)
        path.unlink()
        path.write_bytes(b"of another run")
        found.put("score", BITS, Verdict(0.25, Score(3)))
        found.finish(tmp_path)
    _, known = read_answers(tmp_path / JOURNAL_FILE)
    assert known == {("quick", BITS): 0.5, ("score", BITS): Verdict(0.25, Score(3))}
    assert path.read_bytes() == b"of another run"


def test_a_journal_of_another_search_is_refused_and_kept(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out.journal.jsonl"
    path.write_bytes(
        journal_lines({"model": "b" * 64, "threads": "1"}, {("score", BITS): Verdict(math.inf, Score(3, kl=math.inf))})
    )
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"another search: model is another; threads was 1 and is 2; start anew with"):
        journal(out, resume=True)
    assert path.read_bytes() == before
    # Both: go on if that can be done.
    assert journal(out, resume=True, force=True) == 0
    assert journal(out, resume=True, force=True) == 1


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"[]",
        b'{"kind":"quick"}',
        b"\xff",
        b'{"kind":"score","weights":[2],"value":1}',
        b'{"kind":"nonsense","weights":[2],"activations":null,"value":1.0}',
        b'{"kind":"quick","weights":[2],"activations":null,"value":"1.0"}',
        b'{"kind":"quick","weights":[2],"activations":null,"value":true}',
        b'{"kind":"quick","weights":[2],"activations":null,"value":1' + b"0" * 400 + b"}",
        b'{"kind":"quick","weights":[true],"activations":null,"value":1.0}',
        b'{"kind":"quick","weights":[2],"activations":[8.5],"value":1.0}',
        b'{"kind":"score","weights":[2],"activations":null,"value":{"glance":0.5,"samples":"oops"}}',
        b'{"kind":"score","weights":[2],"activations":null,"value":{"glance":0.5,"samples":3,"kl":"0.5"}}',
        b'{"kind":"score","weights":[2],"activations":null,"value":{"glance":0.5,"samples":3,"measured":5}}',
        b'{"kind":"score","weights":[2],"activations":null,"value":{"glance":0.5,"samples":3,"other":5}}',
        b'{"kind":"score","weights":[2],"activations":null,"value":{"samples":3}}',
        b'{"kind":"score","weights":[2],"activations":null,"value":{"glance":"low"}}',
        b"[" * 200_000,
    ],
    ids=range(18),
)
def test_a_damaged_journal_is_refused(tmp_path: Path, line: bytes) -> None:
    lines = journal_lines(IDENTITY, {("score", BITS): Verdict(0.25, Score(3))}).splitlines()
    (tmp_path / "out.journal.jsonl").write_bytes(b"\n".join([lines[0], line, lines[1], b""]))
    with pytest.raises(OutputError, match="line 2 cannot be read, so the journal is damaged; start anew with --force"):
        journal(tmp_path / "out", resume=True)


def test_a_later_version_is_told(tmp_path: Path) -> None:
    (tmp_path / "out.journal.jsonl").write_text('{"journal":7}\n')
    with pytest.raises(OutputError, match="version of the journal was 7 and is none"):
        journal(tmp_path / "out", resume=True)


def test_a_finished_search_can_be_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / JOURNAL_FILE).write_bytes(journal_lines(IDENTITY, {("quick", Bits((2,), None)): 0.5}))
    before = (out / JOURNAL_FILE).read_bytes()
    assert journal(out, resume=True) == 1
    assert (out / JOURNAL_FILE).read_bytes() == before
    assert journal(out, resume=True) == 2


def test_differences_name_what_only_one_has() -> None:
    assert differences({"a": "1"}, {"a": "1"}) == ""
    assert differences({"a": "1", "b": "x"}, {"c": "2"}) == (
        "a was none and is 1; b was none and is x; c was 2 and is none"
    )


# --------------------------------------------------------------------------------------------- through the command line


def wait_for_answers(process: subprocess.Popen[str], path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") <= count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stopped(arguments: tuple[str, ...], folder: Path, answers: int, number: signal.Signals) -> tuple[int, str]:
    """Run a command until it has judged so much, then send a signal; its exit code and what it said."""
    command = [sys.executable, "-B", "-m", "raqu_onnx", *arguments]
    # Jobs that a shell runs in the background ignore SIGINT, and so do their children; one that is handled is not.
    handled = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, handled)
    wait_for_answers(process, folder.with_name(f"{folder.name}.journal.jsonl"), answers)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, _small_files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a run that nobody disturbed, in a process of its own like those that are compared with it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, content in _small_files.items():
        (folder / name).write_bytes(content)
    command = [sys.executable, "-B", "-m", "raqu_onnx", *SEARCH, "--cells", "--no-cache", "-o", "out"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return {name: (folder / "out" / name).read_bytes() for name in FILES}


def test_a_killed_search_ends_with_the_bytes_of_an_undisturbed_one(
    workspace: Path, undisturbed: dict[str, bytes]
) -> None:
    out = workspace / "out"
    options = (*SEARCH, "--cells", "--no-cache", "-o", "out")
    names = {path.name for path in workspace.iterdir()}
    # In the sensitivities, then among the candidates.
    for answers, resume in ((3, ()), (14, ("--resume",))):
        assert stopped((*options, *resume), out, answers, signal.SIGKILL) == (-signal.SIGKILL, "")
        assert not out.exists()
    known = (workspace / "out.journal.jsonl").read_bytes()
    finished = subprocess.run(
        [sys.executable, "-B", "-m", "raqu_onnx", *options, "--resume"], capture_output=True, text=True, check=True
    )
    assert finished.stderr == ""
    assert {name: (out / name).read_bytes() for name in FILES} == undisturbed
    # Nothing is left but the results, among them the journal, whose beginning was not judged again.
    assert {path.name for path in workspace.iterdir()} == names | {"out"}
    assert (out / JOURNAL_FILE).read_bytes().startswith(known[: known.rindex(b"\n") + 1])


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interrupted_search_says_how_to_go_on(
    cli: Cli, workspace: Path, number: signal.Signals, code: int, word: str
) -> None:
    said = f"{word}; no result was written; what was judged is in {workspace / 'out.journal.jsonl'}; "
    assert stopped((*SEARCH, "-o", "out"), workspace / "out", 3, number) == (
        code, f"{said}the same command with --resume goes on\n"
    )  # fmt: skip
    assert not (workspace / "out").exists()
    before = (workspace / "out.journal.jsonl").read_bytes()
    refused = cli(*SEARCH, "-o", "out")
    assert refused.code == 2
    assert "go on with --resume, or start anew with --force" in refused.err
    other = cli(*SEARCH, "-o", "out", "--resume", "--fit-samples", "7")
    assert other.code == 2
    assert "it is of another search: samples to fit on was 512 and is 7; start anew with --force" in other.err
    assert len(other.err.splitlines()) == 1
    assert (workspace / "out.journal.jsonl").read_bytes() == before


def test_a_finished_search_can_be_made_longer(cli: Cli, workspace: Path) -> None:
    longer = (*SEARCH[:-4], "6", "--threads", "1", "-q")
    assert longer.count("--evaluations") == 1
    assert cli(*SEARCH, "-o", "short").code == 0
    assert cli(*longer, "-o", "long").code == 0
    before = (workspace / "short" / JOURNAL_FILE).read_bytes()
    assert cli(*longer, "-o", "short").code == 2
    assert cli(*longer, "-o", "short", "--resume").code == 2
    assert cli(*longer, "-o", "short", "--resume", "--force").code == 0
    for name in FILES[:-1]:
        assert (workspace / "short" / name).read_bytes() == (workspace / "long" / name).read_bytes()
    assert (workspace / "short" / JOURNAL_FILE).read_bytes().startswith(before)


def test_resuming_nothing_starts_anew_and_says_so(cli: Cli, workspace: Path) -> None:
    assert workspace.is_dir()
    arguments = [argument for argument in SEARCH if argument != "-q"]
    ran = cli(*arguments, "-o", "out", "--resume", "--no-progress")
    assert ran.code == 0
    assert "WARNING: out: there is no unfinished search to go on with; it starts anew\n" in ran.err
    fixed = cli("optimize", "model.onnx", *DATA, "--weight-bits", "4", "-o", "fixed", "--resume", "--no-progress")
    assert fixed.code == 0
    assert "WARNING: --resume: nothing is searched here that could be gone on with\n" in fixed.err
    assert not (workspace / "fixed" / JOURNAL_FILE).exists()


def test_a_search_without_time_writes_the_best_that_it_has(cli: Cli, workspace: Path) -> None:
    ran = cli(*SEARCH, "-o", "out", "--timeout", "0", "--no-cache", "--format", "json")
    assert ran.code == 0
    result = json.loads(ran.out)
    assert result["figures"][-1]["crossbars"] <= 9
    warning = next(text for text in result["warnings"] if text.startswith("the search came to its end after 0 seconds"))
    assert warning.endswith("the same command with --resume --force and more time goes on")
    _, known = read_answers(workspace / "out" / JOURNAL_FILE)
    assert {kind for kind, _ in known} == {"score"}
    # With more time it becomes what it would have been.
    assert cli(*SEARCH, "-o", "whole", "--no-cache").code == 0
    assert cli(*SEARCH, "-o", "out", "--resume", "--force", "--no-cache").code == 0
    for name in FILES[:-1]:
        assert (workspace / "out" / name).read_bytes() == (workspace / "whole" / name).read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
def test_a_full_disk_stops_the_search_with_one_line(tmp_path: Path) -> None:
    full = "No space left on device; free some room, then go on with --resume"
    with pytest.raises(OutputError, match=full), Journal(tmp_path / "out") as found:  # noqa: PT012
        found.begin(IDENTITY)
        stream = found._stream
        found._stream = Path("/dev/full").open("ab")  # noqa: SIM115
        found.put("score", BITS, Verdict(0.5, Score(1)))
    assert stream is not None
    stream.close()
    assert os.path.lexists(tmp_path / "out.journal.jsonl")
