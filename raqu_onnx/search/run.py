"""How one search is carried out: what it writes down, what it may look up, and how long it may take.

None of it changes a number; only a timeout changes which candidates are judged.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from raqu_onnx.search.disk_cache import DiskCache
from raqu_onnx.search.identity import judging_identity
from raqu_onnx.search.judge_source import JudgeSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import onnx_ir as ir

    from raqu_onnx.data import Dataset
    from raqu_onnx.quantizer import ModelQuantizer
    from raqu_onnx.search.journal import Journal
    from raqu_onnx.search.judge import Judge
    from raqu_onnx.search.pools import Pool
    from raqu_onnx.search.questions import Answer, Question
    from raqu_onnx.search.records import Judges
    from raqu_onnx.search.result import Bits, SearchResult, SearchSettings

__all__ = ["Clock", "InProcess", "SearchRun"]


@dataclass
class Clock:
    """When a search must come to its end.

    Attributes:
        seconds: How long it may take; None for as long as it likes.
        stopped: Whether something was left undone for want of time.
    """

    seconds: float | None = None
    stopped: bool = False
    _start: float = field(default_factory=time.monotonic)

    def is_over(self) -> bool:
        """Whether the time is up; whoever asks leaves something undone then, which is remembered."""
        over = self.seconds is not None and time.monotonic() - self._start >= self.seconds
        self.stopped = self.stopped or over
        return over


@dataclass(frozen=True)
class SearchRun:
    """How a search is carried out.

    Attributes:
        journal: Gets every answer as it comes; None for a search that cannot be gone on with.
        timeout: Seconds after which no more candidates are sought.
        pool: Workers that judge; None for this process.
        use_cache: Look for sensitivities and error curves of earlier searches on disk, and leave them there.
        known: What a search of the same model, data and settings found: its answer is taken instead of searching.
    """

    journal: Journal | None = None
    timeout: float | None = None
    use_cache: bool = False
    pool: Pool | None = None
    known: SearchResult | None = None

    def begin(
        self, model: ir.Model, quantizer: ModelQuantizer, selection: Dataset, settings: SearchSettings
    ) -> DiskCache | None:
        """Open the journal and the cache for what is going to be judged.

        Raises:
            OutputError: The journal is of another search, or cannot be written.
        """
        if self.journal is None and not self.use_cache:
            return None
        processors = () if self.pool is None else self.pool.processors
        identity = judging_identity(model, quantizer, selection, settings, processors)
        if self.journal is not None:
            self.journal.begin(identity)
        return DiskCache(identity) if self.use_cache else None

    def judges(
        self, judge: Judge, model: ir.Model, quantizer: ModelQuantizer, selection: Dataset, settings: SearchSettings
    ) -> Judges:
        """Whoever judges: the workers, or the judge of this process."""
        if self.pool is None:
            return InProcess(judge)
        settings = replace(settings, threads=self.pool.threads)
        return self.pool.judges(lambda folder: JudgeSource.of(model, quantizer, selection, settings, folder))


@dataclass(frozen=True)
class InProcess:
    """Judges one candidate after the other here."""

    judge: Judge

    def answers(
        self, question: Question, candidates: Sequence[Bits], until: Callable[[], bool]
    ) -> Iterator[tuple[int, Answer]]:
        """The answers in the order of the candidates."""
        for index, bits in enumerate(candidates):
            if until():
                return
            yield index, self.judge.answer(question, bits)
