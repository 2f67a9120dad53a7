"""What a search needs not ask again: what it has asked, what its journal holds, and sensitivities of earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from raqu_onnx.search.disk_cache import DiskCache
    from raqu_onnx.search.journal import Journal
    from raqu_onnx.search.questions import Answer, Kind, Question
    from raqu_onnx.search.result import Bits

__all__ = ["Judges", "Records"]


class Judges(Protocol):
    """Whoever judges: this process, or workers."""

    def answers(
        self, question: Question, candidates: Sequence[Bits], until: Callable[[], bool]
    ) -> Iterator[tuple[int, Answer]]:
        """The answer to each candidate with its position, as they come; none is begun once `until` says so."""


def _never() -> bool:
    return False


def _untold(_: int) -> None:
    return


class Records:
    """Answers by candidate, each judged at most once.

    Args:
        judges: Whoever judges what is not known.
        journal: Holds what an earlier run has judged and gets what this one judges.
        cache: Holds the sensitivities of earlier searches.
    """

    def __init__(self, judges: Judges, journal: Journal | None = None, cache: DiskCache | None = None) -> None:
        self._judges = judges
        self._journal = journal
        self._cache = cache
        self._known: dict[tuple[Kind, Bits], Answer] = {}
        self._cached = {} if cache is None else cache.sensitivities()
        for bits, value in self._cached.items():
            self._known["quick", bits] = value

    def answers(
        self,
        question: Question,
        candidates: Sequence[Bits],
        *,
        until: Callable[[], bool] = _never,
        told: Callable[[int], None] = _untold,
    ) -> dict[Bits, Answer]:
        """The answers by candidate.

        Args:
            question: What is asked.
            candidates: The candidates.
            until: Once it says so, what is not known is not judged any more and is left out.
            told: Told after each new answer how many of the candidates have theirs.
        """
        kind, wanted = question.kind, dict.fromkeys(candidates)
        missing = [bits for bits in wanted if not question.is_answered_by(self._recall(kind, bits))]
        self._note_cached([bits for bits in wanted if bits in self._cached] if kind == "quick" else [])
        for done, (index, value) in enumerate(self._judges.answers(question, missing, until) if missing else (), 1):
            self._known[kind, missing[index]] = value
            if self._journal is not None:
                self._journal.put(kind, missing[index], value)
            told(len(wanted) - len(missing) + done)
        found = {bits: self._known[kind, bits] for bits in wanted if (kind, bits) in self._known}
        return {bits: answer for bits, answer in found.items() if question.is_answered_by(answer)}

    def _recall(self, kind: Kind, bits: Bits) -> Answer | None:
        """What is known already."""
        if (kind, bits) not in self._known and self._journal is not None:
            found = self._journal.get(kind, bits)
            if found is not None:
                self._known[kind, bits] = found
        return self._known.get((kind, bits))

    def _note_cached(self, candidates: Sequence[Bits]) -> None:
        """Write what the cache answers into the journal too, which is then the same with and without a cache."""
        new = [bits for bits in candidates if self._journal is not None and self._journal.get("quick", bits) is None]
        if self._journal is not None and new:
            self._journal.put_all("quick", {bits: self._cached[bits] for bits in new})

    def keep_sensitivities(self) -> None:
        """Leave all sensitivities to later searches, where there are new ones."""
        found = {b: value for (kind, b), value in self._known.items() if kind == "quick" and isinstance(value, float)}
        if self._cache is not None and found != self._cached:
            self._cache.keep_sensitivities(found)
            self._cached = found
