"""Judging on a Dask cluster (the extra `raqu-onnx[dask]`)."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from raqu_onnx.errors import WorkerError
from raqu_onnx.search.identity import differences, environment
from raqu_onnx.search.pools import MOST_DEATHS, answers_despite_deaths, judge_in_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from raqu_onnx.search.identity import Identity
    from raqu_onnx.search.judge_source import JudgeSource
    from raqu_onnx.search.questions import Answer, Question
    from raqu_onnx.search.records import Judges
    from raqu_onnx.search.result import Bits

__all__ = ["DaskPool", "dask_pool"]

# Seconds to wait for a scheduler, and for its first worker.
_PATIENCE = 10
# Tasks for each worker that are handed out ahead, so that none waits for the next one.
_AHEAD = 2
_SAME = "install the same releases"


@contextmanager
def dask_pool(address: str, threads: int | None = None) -> Iterator[DaskPool]:
    """The workers of a scheduler.

    Args:
        address: Of the scheduler, such as `tcp://host:8786`.
        threads: Threads of each evaluation; default the fewest that a worker has.

    Raises:
        WorkerError: Dask is not installed, no scheduler answers there, it has no workers, or they run other releases.
    """
    try:
        # Any: much of it is not annotated.
        distributed: Any = import_module("distributed")
    except ImportError as error:
        raise WorkerError("--dask: Dask is not installed; pip install 'raqu-onnx[dask]'") from error
    try:
        client = distributed.Client(address, timeout=_PATIENCE, set_as_default=False)
    except (TimeoutError, OSError, ValueError, TypeError) as error:
        raise WorkerError(
            f"--dask {address}: no scheduler answers there ({_first_line(error)}); give the address that `dask "
            "scheduler` prints"
        ) from error
    with client:
        yield DaskPool(client, address, threads)


class DaskPool:
    """The workers of a Dask cluster.

    Args:
        client: Connected to the scheduler.
        address: Of the scheduler, for messages.
        threads: Threads of each evaluation; default the fewest that a worker has.

    Attributes:
        workers: How many there are now; others may come and go.
        threads: Threads of each evaluation.
        processors: Kinds of processors that they run on.

    Raises:
        WorkerError: There are no workers, or they run other releases.
    """

    def __init__(self, client: Any, address: str, threads: int | None = None) -> None:
        self._client = client
        self._address = address
        try:
            client.wait_for_workers(1, timeout=_PATIENCE)
        except TimeoutError as error:
            raise WorkerError(
                f"--dask {address}: the scheduler has no workers; start some with `dask worker`"
            ) from error
        found = client.scheduler_info(n_workers=-1)["workers"]
        self.workers = len(found)
        self.threads = threads or min(worker["nthreads"] for worker in found.values())
        self.processors = self._require_same()

    def _require_same(self) -> tuple[str, ...]:
        """Make sure that workers run what runs here; returns their kinds of processors."""
        ours = _ours()
        found: dict[str, Identity | str] = self._client.run(_environment, on_error="return")
        kinds = set()
        for worker, theirs in sorted(found.items()):
            wrong = theirs if isinstance(theirs, str) else None
            if isinstance(theirs, dict):
                kinds.add(theirs.pop("processor"))
                wrong = _differences(ours, theirs)
            elif wrong is None:
                wrong = _first_line(theirs)
            if wrong:
                raise WorkerError(
                    f"--dask {self._address}: worker {worker} does not run what runs here: {wrong}; {_SAME}"
                )
        return tuple(sorted(kinds))

    def judges(self, source: Callable[[Path | None], JudgeSource]) -> Judges:
        """Send workers what they are made of; they build it when they first judge."""
        return _DaskJudges(self._client, source(None), self.workers, self.processors, uuid4().hex)


@dataclass
class _DaskJudges:
    client: Any
    source: JudgeSource
    workers: int
    processors: tuple[str, ...]
    name: str
    _sent: Any = None

    def answers(
        self, question: Question, candidates: Sequence[Bits], until: Callable[[], bool]
    ) -> Iterator[tuple[int, Answer]]:
        """The answers as they come.

        Raises:
            WorkerError: Workers die again and again, or the scheduler is gone.
        """
        distributed: Any = import_module("distributed")
        # The last two where the scheduler itself is gone, or has no workers for long.
        gone = (distributed.KilledWorker, distributed.CancelledError, asyncio.CancelledError, OSError, TimeoutError)

        def run(jobs: list[tuple[int, Bits]]) -> Iterator[tuple[int, Answer]]:
            return self._run(question, jobs, until)

        def wrong(deaths: int) -> WorkerError | None:
            # The last worker that held the source may have gone with it.
            self._sent = None
            if self.client.status == "closed":
                return WorkerError("the scheduler of the Dask cluster is gone; start it again")
            if deaths < MOST_DEATHS:
                return None
            return WorkerError(
                f"workers of the Dask cluster died {deaths} times in a row while they judged, maybe for want of "
                "memory; give them more"
            )

        return answers_despite_deaths(candidates, until, run, gone, wrong)

    def _run(
        self, question: Question, jobs: list[tuple[int, Bits]], until: Callable[[], bool]
    ) -> Iterator[tuple[int, Answer]]:
        if self._sent is None:
            # One future for the source, which the scheduler keeps and workers fetch from each other.
            self._sent = self.client.scatter(self.source, broadcast=True, hash=False)
        waiting, ours = list(reversed(jobs)), _ours()
        running = import_module("distributed").as_completed(loop=self.client.loop)
        futures: list[Any] = []

        def hand_out() -> None:
            if waiting and not until():
                index, bits = waiting.pop()
                call = (_judge_there, self.name, self._sent, ours, self.processors, index, question, bits)
                futures.append(self.client.submit(*call, pure=False))
                running.add(futures[-1])

        try:
            for _ in range(_AHEAD * self.workers):
                hand_out()
            for future in running:
                found = _answer(future)
                hand_out()
                yield found
        finally:
            self.client.cancel(futures)


def _answer(future: Any) -> tuple[int, Answer]:
    """The answer of a task that has ended."""
    try:
        found: tuple[int, Answer] = future.result()
    except OSError as error:
        if future.status == "error":
            # Raised by the judge itself, as where it finds no room to write: another worker need not be asked.
            raise WorkerError(f"a worker of the Dask cluster cannot judge: {_first_line(error)}") from error
        raise
    return found


def _judge_there(
    name: str,
    source: JudgeSource,
    ours: Identity,
    processors: tuple[str, ...],
    index: int,
    question: Question,
    bits: Bits,
) -> tuple[int, Answer]:
    def load() -> JudgeSource:
        # A worker that joined while the search was going on has not been asked yet.
        if wrong := _differences(ours, _ours()):
            raise WorkerError(f"a worker of the Dask cluster does not run what runs here: {wrong}; {_SAME}")
        if (processor := environment()["processor"]) not in processors:
            # The journal tells whoever resumes the search on which processors its answers were found.
            raise WorkerError(
                f"a worker of the Dask cluster joined on another kind of processor ({processor}) than those the search "
                f"began with ({', '.join(processors)}); take it away, or start the search anew with it"
            )
        return source

    return index, judge_in_worker(name, load, question, bits)


def _differences(ours: Identity, theirs: Identity) -> str:
    return differences(ours, theirs, was="is {} there", now="{} here")


def _ours() -> Identity:
    """What workers must run."""
    return {name: value for name, value in environment().items() if name != "processor"}


def _environment() -> Identity:
    return environment()


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
