"""Who judges candidates: processes of this machine (joblib), or the workers of a Dask cluster.

Every worker builds a judge of its own, once, from a `JudgeSource`. Each evaluation runs with the same number of threads
wherever it runs, and answers are put in order by whoever asks, so that the result does not depend on who is quick.

A worker that dies takes only what it was judging with it, which is judged again by another one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from raqu_onnx.errors import WorkerError

if TYPE_CHECKING:
    from raqu_onnx.search.judge import Judge
    from raqu_onnx.search.judge_source import JudgeSource
    from raqu_onnx.search.questions import Answer, Question
    from raqu_onnx.search.records import Judges
    from raqu_onnx.search.result import Bits

__all__ = ["MOST_DEATHS", "LocalPool", "Pool", "answers_despite_deaths", "judge_in_worker"]

#: Times in a row that workers may die without an answer in between.
MOST_DEATHS = 3


class Pool(Protocol):
    """Workers that judge.

    Attributes:
        workers: How many there are when the search starts.
        threads: Threads of each evaluation.
        processors: Kinds of processors that they run on.
    """

    workers: int
    threads: int
    processors: tuple[str, ...]

    def judges(self, source: Callable[[Path | None], JudgeSource]) -> Judges:
        """Judges for one search.

        Args:
            source: Gives what they are made of; data is written to the folder that it is given, if any.
        """


def answers_despite_deaths(
    candidates: Sequence[Bits],
    until: Callable[[], bool],
    run: Callable[[list[tuple[int, Bits]]], Iterator[tuple[int, Answer]]],
    gone: tuple[type[BaseException], ...],
    wrong: Callable[[int], WorkerError | None],
) -> Iterator[tuple[int, Answer]]:
    """The answers as they come; what dying workers were judging is judged again by others.

    Args:
        candidates: What is judged.
        until: Once it says so, no run is begun.
        run: Judges some of the candidates, each with its position.
        gone: What is raised where a worker has died.
        wrong: What is wrong, by the deaths in a row without an answer in between; None to try again.

    Raises:
        WorkerError: What is wrong.
    """
    left, deaths = dict(enumerate(candidates)), 0
    while left and not until():
        try:
            for index, answer in run(list(left.items())):
                deaths = 0
                del left[index]
                yield index, answer
        except gone as error:
            deaths += 1
            if (found := wrong(deaths)) is not None:
                raise found from error
        else:
            return


@dataclass
class LocalPool:
    """Processes of this machine.

    Attributes:
        workers: How many.
        threads: Threads of each.
        scratch: Where what they are made of is written; who made the folder removes it.
    """

    workers: int
    threads: int
    scratch: Path
    processors: tuple[str, ...] = ()

    def judges(self, source: Callable[[Path | None], JudgeSource]) -> Judges:
        """Write what workers are made of; they read it when they first judge.

        Raises:
            OSError: It cannot be written.
        """
        import joblib

        self.scratch.mkdir(exist_ok=True)
        path = self.scratch / "judge.joblib"
        joblib.dump(source(self.scratch), path)
        return _LocalJudges(self.workers, path)

    def close(self) -> None:
        """End the processes, which would else wait for more work with all that they hold in memory."""
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor(max_workers=self.workers).shutdown(wait=True, kill_workers=True)


@dataclass
class _LocalJudges:
    workers: int
    path: Path

    def answers(
        self, question: Question, candidates: Sequence[Bits], until: Callable[[], bool]
    ) -> Iterator[tuple[int, Answer]]:
        """The answers as they come.

        Raises:
            WorkerError: Workers die again and again.
        """

        def run(jobs: list[tuple[int, Bits]]) -> Iterator[tuple[int, Answer]]:
            return self._run(question, jobs, until)

        def wrong(deaths: int) -> WorkerError | None:
            if deaths < MOST_DEATHS:
                return None
            return WorkerError(
                f"workers died {deaths} times in a row while they judged, maybe for want of memory; use fewer than "
                f"{self.workers} --workers"
            )

        return answers_despite_deaths(candidates, until, run, (BrokenProcessPool,), wrong)

    def _run(
        self, question: Question, jobs: list[tuple[int, Bits]], until: Callable[[], bool]
    ) -> Iterator[tuple[int, Answer]]:
        from joblib import Parallel, delayed

        call = delayed(_judge_here)
        # One job at a time for each worker: they take seconds, and are not begun when time is up.
        parallel = Parallel(
            self.workers, backend="loky", return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs"
        )
        parent = os.getpid()
        yield from parallel(call(self.path, parent, index, question, bits) for index, bits in jobs if not until())


# --- in a worker ----------------------------------------------------------------------------------------------------

_judges: dict[str, Judge] = {}
_lock = threading.Lock()
_watching: list[threading.Thread] = []


def _judge_here(path: Path, parent: int, index: int, question: Question, bits: Bits) -> tuple[int, Answer]:
    """Judge in a process of this machine."""
    _stay_quiet(parent)

    def load() -> JudgeSource:
        import joblib

        # Arrays are mapped: all workers share their memory.
        source: JudgeSource = joblib.load(path, mmap_mode="r")
        return source

    return index, judge_in_worker(str(path), load, question, bits)


def judge_in_worker(name: str, load: Callable[[], JudgeSource], question: Question, bits: Bits) -> Answer:
    """Judge with the judge of this process, which is built when it is first asked for.

    Args:
        name: Stands for the judge.
        load: Gives what it is made of.
        question: What is asked.
        bits: The candidate.
    """
    # Loaded before the limit, which reaches only libraries that are in memory: scipy has a BLAS of its own.
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_limits

    # Threads of a Dask worker take turns: what a judge remembers is not made for several at once.
    with _lock, threadpool_limits(1, user_api="blas"):
        if name not in _judges:
            # Those of searches that are over.
            _judges.clear()
            _judges[name] = load().build()
        return _judges[name].answer(question, bits)


def _stay_quiet(parent: int) -> None:
    """Leave Ctrl-C, which reaches all processes of a terminal, to the parent, and end when it has ended."""
    if _watching or os.getpid() == parent:
        return
    with suppress(ValueError):  # Not in the main thread.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _watching.append(threading.Thread(target=_end_with, args=(parent,), daemon=True))
    _watching[0].start()


def _end_with(parent: int) -> None:
    # A parent that was killed tells nobody.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
