"""Put thousands of random small graphs through the pipeline and check what comes out.

    python tools/fuzz_graphs.py --graphs 10000 --seed 0 --jobs 2 --report fuzz.json
    python tools/fuzz_graphs.py --only 526 --save folder

Each graph gets random widths, a random chip and random settings, and no search. What must hold:

* nothing is raised but the refusals that `graph_case.py` lists;
* the rewritten float model gives the float model's outputs, and names, types and dimensions of its inputs and outputs
  stay;
* the emitted model passes the ONNX checker and loads at both optimization levels;
* each mapped node, fed the same codes, is at most one step of its next quantizer from an integer reference in numpy,
  and at most 1e-4 of its range where its output stays float;
* of every tenth graph the files pass the full validation; of every fiftieth a second process writes the same bytes.

Weights have at most 7 bits on processors without VNNI, where onnxruntime saturates 8-bit ones. A failure is printed
with the graph's number and the run goes on; the exit code says at the end whether there were any.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from graph_case import CaseResult, has_vnni, run_case
from random_graphs import random_graph

__all__ = ["Task", "main", "run_tasks", "summary"]

# Graphs of one seed; the next seed's begin here.
_GRAPHS_PER_SEED = 1_000_000
# Graphs after which a process is replaced, and seconds that one graph may take.
_TASKS_PER_PROCESS, _SECONDS = 500, 300


@dataclass(frozen=True)
class Task:
    """One graph to be run.

    Attributes:
        seed: Its number.
        full: Also validate the files.
    """

    seed: int
    full: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.only is not None:
        return _run_one(options.only, options.save)
    begin = time.monotonic()
    first = options.seed * _GRAPHS_PER_SEED + options.start
    tasks = [Task(first + i, full=i % options.validate_every == 0) for i in range(options.graphs)]
    results = list(_shown(run_tasks(tasks, options.jobs), len(tasks), "graphs"))
    again = [Task(task.seed) for i, task in enumerate(tasks) if i % options.repeat_every == 0]
    by_seed = {result.seed: result for result in results}
    repeated = _shown(run_tasks(again, options.jobs), len(again), "graphs again")
    differing = sorted(result.seed for result in repeated if result.digests != by_seed[result.seed].digests)
    for seed in differing:
        _say(f"graph {seed}: a second process wrote other bytes")
        by_seed[seed].problems.append("a second process wrote other bytes")
    report = summary(results, repeated=len(again), seconds=time.monotonic() - begin)
    text = json.dumps(report, indent=1)
    if options.report is not None:
        options.report.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    return 1 if report["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=10_000, help="graphs to run (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="which million of graphs (default 0)")
    parser.add_argument("--start", type=int, default=0, help="first graph of the seed (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each (default 2)")
    parser.add_argument("--report", type=Path, help="JSON file for the report")
    parser.add_argument("--validate-every", type=int, default=10, help="validate the files of every such graph")
    parser.add_argument("--repeat-every", type=int, default=50, help="write every such graph twice")
    parser.add_argument("--only", type=int, help="run one graph, by the number that a failure was printed with")
    parser.add_argument("--save", type=Path, help="with --only: folder for the graph, its inputs and its results")
    return parser


def _run_one(seed: int, folder: Path | None) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            graph = random_graph(seed)
            onnx.save(graph.model, folder / "float.onnx")
            np.savez(folder / "inputs.npz", **graph.feeds)  # type: ignore[arg-type]
            folder = folder / "out"
            folder.mkdir(exist_ok=True)
        result = run_case(seed, folder or Path(scratch), full=True)
    sys.stdout.write(json.dumps(vars(result), indent=1) + "\n")
    return 1 if result.problems else 0


# --- processes ----------------------------------------------------------------------------------------------------


class _Worker:
    """A process that runs one graph after another; it may die of one."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self.task: Task | None = None
        self.left = _TASKS_PER_PROCESS
        self.deadline = 0.0

    def give(self, task: Task) -> None:
        """Start on a graph."""
        self.task, self.deadline = task, time.monotonic() + _SECONDS
        self.left -= 1
        self.connection.send(task)

    def take(self) -> CaseResult:
        """The result of the graph, or what the process died of."""
        task = self.task
        if task is None:
            raise ValueError("there is no graph under way")
        self.task = None
        try:
            result: CaseResult = self.connection.recv()
        except (EOFError, OSError):
            self.left = 0
            self._process.join()
            return CaseResult(task.seed, problems=[f"crashed: the process died with code {self._process.exitcode}"])
        return result

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self._process.kill()
        self._process.join()


def _work(connection: Connection) -> None:
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        with tempfile.TemporaryDirectory() as folder:
            connection.send(run_case(task.seed, Path(folder), full=task.full))


def run_tasks(tasks: Iterable[Task], jobs: int) -> Iterator[CaseResult]:
    """Run graphs in processes that were started for them; results come as they are ready."""
    pending = deque(tasks)
    workers: list[_Worker] = []
    try:
        while pending or any(worker.task for worker in workers):
            while pending and len(workers) < jobs:
                workers.append(_Worker())
            for worker in workers:
                if worker.task is None and pending:
                    worker.give(pending.popleft())
            yield from _finished(workers)
    finally:
        for worker in workers:
            worker.stop()


def _finished(workers: list[_Worker]) -> Iterator[CaseResult]:
    ready = wait([worker.connection for worker in workers if worker.task], timeout=5)
    for worker in list(workers):
        if worker.connection in ready:
            yield worker.take()
        elif worker.task is not None and time.monotonic() > worker.deadline:
            yield CaseResult(worker.task.seed, problems=[f"crashed: it was not done after {_SECONDS} s"])
            worker.left, worker.task = 0, None
        if worker.left <= 0 and worker.task is None:
            worker.stop()
            workers.remove(worker)


# --- results ------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _shown(results: Iterable[CaseResult], total: int, what: str) -> Iterator[CaseResult]:
    begin, failed = time.monotonic(), 0
    for count, result in enumerate(results, 1):
        for problem in result.problems:
            _say(f"graph {result.seed}: {problem}")
        failed += bool(result.problems)
        if count % 100 == 0 or count == total:
            rate = count / max(time.monotonic() - begin, 1e-9)
            _say(f"{count} of {total} {what}, {failed} failed, {rate:.1f} a second")
        yield result


def summary(results: list[CaseResult], *, repeated: int, seconds: float) -> dict[str, Any]:
    """Totals, the largest differences with the graphs that show them, and all failures."""
    operators: Counter[str] = Counter()
    for result in results:
        operators.update(result.operators)
    return {
        "graphs": len(results),
        "refused": dict(Counter(result.refused for result in results if result.refused)),
        "validated": sum(result.validated for result in results),
        "written_twice": repeated,
        "vnni": has_vnni(),
        "nodes_compared": dict(sorted(operators.items())),
        "largest_node_difference_in_steps": _largest(results, "steps"),
        "largest_node_difference_in_shares_of_range": _largest(results, "share"),
        "largest_end_to_end_difference_in_shares_of_range": _largest(results, "ends"),
        "failures": {result.seed: result.problems for result in results if result.problems},
        "seconds": round(seconds, 1),
    }


def _largest(results: list[CaseResult], name: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for result in results:
        for key, value in getattr(result, name).items():
            if key not in found or value > found[key]["difference"]:
                found[key] = {"difference": value, "graph": result.seed}
    return found


if __name__ == "__main__":
    sys.exit(main())
