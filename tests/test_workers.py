"""Judging in other processes: the same floats, the same result, and what happens when workers die."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import pytest
from fake_judges import Deadly, Slow
from judging import judge_parts

from raqu_onnx.data import open_dataset, take
from raqu_onnx.errors import WorkerError
from raqu_onnx.search import Bits
from raqu_onnx.search.dask_pool import dask_pool
from raqu_onnx.search.identity import environment
from raqu_onnx.search.judge import Judge
from raqu_onnx.search.judge_source import HeldDataset, JudgeSource
from raqu_onnx.search.pools import LocalPool, judge_in_worker
from raqu_onnx.search.questions import QUICK, SCORE, Answer, Question

Cli = Callable[..., Any]

DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz", "--hw", "chip.toml")
SEARCH = ("optimize", "model.onnx", *DATA, "--max-crossbars", "9", "--evaluations", "6", "--activation-bits", "6-8")
ALIKE = (*SEARCH, "--threads", "1", "--batch", "2", "--no-cache", "--cells", "-q")
FILES = ("model.onnx", "manifest.json", "report.json", "cells.npz")
RAQU = [sys.executable, "-B", "-m", "raqu_onnx"]
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, _small_files: dict[str, bytes]) -> dict[str, bytes]:
    """The result of one process that asks for two candidates at once."""
    folder = tmp_path_factory.mktemp("alone")
    for name, content in _small_files.items():
        (folder / name).write_bytes(content)
    subprocess.run([*RAQU, *ALIKE, "-o", "out"], cwd=folder, check=True, capture_output=True)
    return files(folder / "out")


# ----------------------------------------------------------------------------------------------- judges that travel


@pytest.mark.parametrize(
    "options", [{}, {"batch": 4}, {"channels": 48}, {"depthwise": True}], ids=["plain", "batch", "large", "depthwise"]
)
def test_a_judge_that_travelled_gives_the_same_floats(
    options: dict[str, Any], tmp_path: Path, small_net: Any, small_data: Any
) -> None:
    parts = judge_parts(small_net(**options), small_data(48))
    here = Judge(*parts)
    (tmp_path / "data").mkdir()
    joblib.dump(JudgeSource.of(*parts, tmp_path / "data"), tmp_path / "judge")
    mapped = joblib.load(tmp_path / "judge", mmap_mode="r").build()
    sent = pickle.loads(pickle.dumps(JudgeSource.of(*parts))).build()  # noqa: S301 - our own
    channels = options.get("channels", 8)
    mixed = Bits(((0,) + (3,) * (channels - 1), (8, 2) * (channels // 2), 4), (8, 6, 7))
    for bits in (Bits.uniform(3, 2, 8), mixed):
        for question in (SCORE, QUICK, Question("score", most=0.0)):
            expected = here.answer(question, bits)
            assert mapped.answer(question, bits) == sent.answer(question, bits) == expected
    assert mapped.reference == sent.reference == here.reference


def test_held_data_is_the_data(tmp_path: Path, small_net: Any, small_data: Any) -> None:
    from raqu_onnx.model_io import load_model, model_inputs

    data = small_data(50)
    for batch in ("N", 4):
        base = open_dataset(data, model_inputs(load_model(small_net(batch=batch))))
        for folder in (None, tmp_path):
            held = HeldDataset(base, 16, folder)
            assert (held.digest, held.unit, held.has_labels, held.top_label) == (
                base.digest, base.unit, True, base.top_label
            )  # fmt: skip
            for view, size in ((lambda d: d, 16), (lambda d: take(d, 24), 7), (lambda d: take(d, 48), 32)):
                expected, found = list(view(base).batches(size)), list(view(held).batches(size))
                assert [b.size for b in found] == [b.size for b in expected]
                for one, other in zip(found, expected, strict=True):
                    assert np.array_equal(one.feeds["input"], other.feeds["input"])
                    assert np.array_equal(one.labels, other.labels)


# ------------------------------------------------------------------------------------------------------- processes


def test_two_workers_give_the_bytes_of_one(cli: Cli, workspace: Path, alone: dict[str, bytes]) -> None:
    ran = cli(*ALIKE, "--workers", "2", "-o", "out")
    assert (ran.code, ran.err) == (0, "")
    assert files(workspace / "out") == alone
    # Nothing that workers were made of is left.
    assert not list(workspace.glob(".raqu-*"))


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes that a command has started to judge, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == process.pid and b"LokyProcess" in command:
            found.append(int(path.parent.name))
    return found


def start(*arguments: str) -> subprocess.Popen[str]:
    # Jobs that a shell runs in the background ignore SIGINT, and so do their children; one that is handled is not.
    handled = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [*RAQU, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, handled)


def until(done: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def answers(folder: Path) -> int:
    journal = folder.with_name(f"{folder.name}.journal.jsonl")
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


@linux
def test_a_worker_that_dies_costs_its_evaluation(workspace: Path, alone: dict[str, bytes]) -> None:
    process = start(*ALIKE, "--workers", "2", "-o", "out")
    for judged in (2, 10):
        until(lambda judged=judged: answers(workspace / "out") >= judged and workers_of(process), process)  # type: ignore[misc]
        os.kill(workers_of(process)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert files(workspace / "out") == alone


@linux
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_workers_end_with_the_run(workspace: Path, alone: dict[str, bytes], number: int, code: int) -> None:
    process = start(*ALIKE, "--workers", "2", "-o", "out")
    until(lambda: answers(workspace / "out") >= 4 and len(workers_of(process)) == 2, process)
    workers = workers_of(process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # As a terminal does.
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    if number != signal.SIGKILL:
        assert len(said.splitlines()) == 1, said
        assert said.endswith("the same command with --resume goes on\n")
        assert not list(workspace.glob(".raqu-*"))
    done = subprocess.run([*RAQU, *ALIKE, "-o", "out", "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files(workspace / "out") == alone
    assert not list(workspace.glob(".raqu-*"))


def test_workers_that_always_die_are_given_up(tmp_path: Path) -> None:
    judges = LocalPool(2, 1, tmp_path).judges(lambda _: Deadly())  # type: ignore[arg-type, return-value]
    with pytest.raises(WorkerError, match=r"workers died 3 times in a row while .*than 2 --workers"):
        list(judges.answers(QUICK, [Bits((2,), None)], lambda: False))


def test_no_evaluation_is_begun_when_time_is_up(tmp_path: Path) -> None:
    judges = LocalPool(2, 1, tmp_path).judges(lambda _: Slow())  # type: ignore[arg-type, return-value]
    candidates = [Bits((width,), None) for width in range(2, 9)]
    found = list(judges.answers(QUICK, candidates, lambda: False))
    assert sorted(found) == [(index, index + 2.0) for index in range(7)]
    assert found[0][0] != 0
    assert list(judges.answers(QUICK, candidates, lambda: True)) == []


def test_a_process_keeps_the_judge_of_the_search_at_hand_only() -> None:
    built: list[str] = []

    def load(name: str) -> Callable[[], Any]:
        def build() -> Slow:
            built.append(name)
            return Slow()

        return build

    for name in ("a", "a", "b", "b", "a"):
        assert judge_in_worker(name, load(name), QUICK, Bits((4,), None)) == 4.0
    assert built == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--workers", "0"), "workers"),
        (("--batch", "0"), "batch"),
        (("--workers", "2", "--dask", "tcp://127.0.0.1:1"), "--dask has workers of its own; leave one of them out"),
        (("--dask", "nonsense://x"), "no scheduler answers there"),
    ],
)
def test_what_cannot_be_is_refused(
    refused: Callable[..., str], workspace: Path, options: tuple[str, ...], said: str
) -> None:
    refused(workspace, (*ALIKE, *options, "-o", "out"), said)


# ------------------------------------------------------------------------------------------------------------- Dask


@dataclass
class Cluster:
    """A scheduler and its workers on this machine."""

    address: str
    workers: list[subprocess.Popen[bytes]]

    def add(self) -> None:
        command = [sys.executable, "-m", "dask", "worker", self.address, "--nthreads", "1", "--no-nanny"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        options = ["--no-dashboard", "--host", "127.0.0.1"]
        self.workers.append(subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL, env=environment))


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    distributed = pytest.importorskip("distributed")
    folder = tmp_path_factory.mktemp("cluster")
    monkeypatch.chdir(folder)
    workers: list[subprocess.Popen[bytes]] = []
    told = folder / "scheduler.json"
    where = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(told)]
    scheduler = subprocess.Popen([sys.executable, "-m", "dask", "scheduler", *where], stderr=subprocess.DEVNULL)
    try:
        # Written in place: a torn file has no end yet.
        until(lambda: told.is_file() and told.read_text().rstrip().endswith("}"))
        found = Cluster(json.loads(told.read_text())["address"], workers)
        for _ in range(2):
            found.add()
        with distributed.Client(found.address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield found
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()


def test_a_dask_cluster_gives_the_bytes_of_one_process(
    cli: Cli, cluster: Cluster, workspace: Path, alone: dict[str, bytes]
) -> None:
    ran = cli(*ALIKE, "--dask", cluster.address, "-o", "out")
    assert (ran.code, ran.err) == (0, "")
    assert files(workspace / "out") == alone


def test_a_dask_worker_that_dies_costs_its_evaluation(
    cluster: Cluster, workspace: Path, alone: dict[str, bytes]
) -> None:
    process = start(*ALIKE, "--dask", cluster.address, "-o", "out")
    until(lambda: answers(workspace / "out") >= 3, process)
    cluster.workers[0].kill()
    until(lambda: answers(workspace / "out") >= 12, process)
    # Now the last one that holds what is judged, and another one comes.
    cluster.workers[1].kill()
    cluster.add()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert files(workspace / "out") == alone


def test_a_cluster_that_runs_something_else_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    import raqu_onnx.search.dask_pool as module

    ours = environment()
    monkeypatch.setattr(module, "environment", lambda: {**ours, "numpy": "1.0"})
    said = r"worker tcp://.* does not run what runs here: numpy is .* there and 1\.0 here; install the same"
    with pytest.raises(WorkerError, match=said), dask_pool(cluster.address):
        pass


def test_a_scheduler_without_workers_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    import raqu_onnx.search.dask_pool as module

    for worker in cluster.workers:
        worker.kill()
        worker.wait()
    monkeypatch.setattr(module, "_PATIENCE", 1)
    said = "the scheduler has no workers; start some with `dask worker"
    with pytest.raises(WorkerError, match=said), dask_pool(cluster.address):
        pass


def test_a_scheduler_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    from raqu_onnx.search.dask_pool import _DaskJudges

    client = SimpleNamespace(status="running")

    def lost(*_: object) -> Iterator[tuple[int, Answer]]:
        yield 0, 0.5
        client.status = "closed"
        raise OSError("Timed out trying to connect")

    monkeypatch.setattr(_DaskJudges, "_run", lost)
    judges = _DaskJudges(client, None, 2, (), "judge")  # type: ignore[arg-type]
    found = judges.answers(QUICK, [Bits((2,), None), Bits((3,), None)], lambda: False)
    assert next(found) == (0, 0.5)
    with pytest.raises(WorkerError, match="the scheduler of the Dask cluster is gone; start it again"):
        next(found)


def test_a_judge_that_fails_is_no_worker_that_died() -> None:
    """Neither is asked again: with a full disk it would fail everywhere."""
    from raqu_onnx.search.dask_pool import _answer

    def fails() -> None:
        raise OSError("No space left on device")

    with pytest.raises(WorkerError, match=r"^a worker of the Dask cluster cannot judge: No space left on device$"):
        _answer(SimpleNamespace(status="error", result=fails))
    with pytest.raises(OSError, match="No space left"):
        _answer(SimpleNamespace(status="lost", result=fails))


def test_a_worker_that_joins_late_must_run_the_same() -> None:
    from raqu_onnx.search.dask_pool import _environment, _judge_there, _ours

    source: Any = Slow()
    bits = Bits((3,), None)
    processor = _environment()["processor"]
    assert _judge_there("late", source, _ours(), (processor,), 1, QUICK, bits) == (1, 3.0)
    said = r"does not run what runs here: numpy is .* there and 1\.0 here; install the same releases"
    with pytest.raises(WorkerError, match=said):
        _judge_there("later", source, {**_ours(), "numpy": "1.0"}, (processor,), 1, QUICK, bits)
    with pytest.raises(WorkerError, match=r"another kind of processor .* than those the search began with \(m68k\)"):
        _judge_there("latest", source, _ours(), ("m68k",), 1, QUICK, bits)


def test_without_dask_it_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    said = r"Dask is not installed; pip install 'raqu-onnx\[dask\]'"
    with pytest.raises(WorkerError, match=said), dask_pool("tcp://127.0.0.1:1"):
        pass
