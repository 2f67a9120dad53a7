"""The emitted model, run at both onnxruntime optimization levels on the same batches and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.cpu import saturates_here
from raqu_onnx.errors import DataError, ModelError
from raqu_onnx.evaluation import make_session, run_feeds
from raqu_onnx.scoring import Scorer, are_probabilities, find_class_scores, float_positions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import onnxruntime as ort
    from numpy.typing import NDArray

    from raqu_onnx.data import Batch, Dataset
    from raqu_onnx.evaluation import Level, Score
    from raqu_onnx.scoring import Task
    from raqu_onnx.validate_report import Checklist

__all__ = ["Comparison", "LevelRuns", "allowed_noise"]

_LEVELS: tuple[Level, ...] = ("disable-all", "enable-all")
_BATCH = 64


@dataclass(frozen=True)
class LevelRuns:
    """Runs of the emitted model, batch by batch, so that memory does not grow with the data.

    Attributes:
        path: The model.
        checklist: Where findings go.
        threads: Threads of onnxruntime.
        activation_bits: Fewest bits that the model clips an activation to.
        saturating: Nodes whose sums may saturate on CPUs without VNNI.
        task: What the outputs are.
    """

    path: Path
    checklist: Checklist
    threads: int
    activation_bits: int
    saturating: Sequence[str] = ()
    task: Task = "auto"

    def run(self, data: Dataset, reference: ort.InferenceSession | None = None) -> dict[str, Score]:
        """Run, compare and score.

        Args:
            data: What to run on.
            reference: The float model, for fidelity.

        Returns:
            Score by level, without those levels at which the model cannot be run.

        Raises:
            DataError: The model cannot be run on real data.
        """
        # Where sums saturate, the levels cannot agree. Whether the model is right is then seen with exact sums.
        exact = bool(self.saturating) and saturates_here()
        sessions = self._sessions(exact=exact)
        runs = {name: _Run(tuple(o.name for o in session.get_outputs())) for name, session in sessions.items()}
        comparison = Comparison()
        scorers = _Scorers(self.task, data.name)
        samples = 0
        fast = "exact" if exact else "enable-all"
        for batch in data.batches(_BATCH):
            self.checklist.tell("running the model", samples, data.size or samples)
            samples += batch.size
            expected = None if reference is None else _arrays(run_feeds(reference, None, batch.feeds, data.name))
            found: dict[str, list[NDArray[Any]]] = {}
            for name in list(sessions):
                try:
                    found[name] = _arrays(run_feeds(sessions[name], None, batch.feeds, data.name))
                except DataError as error:
                    if not data.synthetic:
                        raise
                    self.checklist.skip(f"run.{name}", f"not run: {error}; give data")
                    del sessions[name]
            for name, outputs in found.items():
                runs[name].add(outputs)
                if name in _LEVELS:
                    scorers.add(name, batch, outputs, expected)
            if {"disable-all", fast} <= set(found):
                comparison.add(found["disable-all"], found[fast])
            if not sessions:
                return {}
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        for name in sessions:
            detail = f"{samples} samples of {data.name}, {threads}"
            self.checklist.run(f"run.{name}", runs[name].not_finite(), detail)
        if {"disable-all", fast} <= set(sessions):
            names = runs["disable-all"].names
            findings, details = comparison.result(names, allowed_noise(self.activation_bits))
            if exact:
                details.append("with exact sums, session.x64quantprecision=1, which this CPU needs")
            self.checklist.run("run.levels-agree", findings, "; ".join(details))
        return {name: score for name, score in scorers.results().items() if name in sessions}

    def _sessions(self, *, exact: bool) -> dict[str, ort.InferenceSession]:
        sessions: dict[str, ort.InferenceSession] = {}
        wanted: list[tuple[str, Level]] = [(level, level) for level in _LEVELS]
        if exact:
            wanted.append(("exact", "enable-all"))
        for name, level in wanted:
            try:
                sessions[name] = make_session(self.path, level=level, threads=self.threads, exact=name == "exact")
            except ModelError as error:
                self.checklist.run(f"run.{name}", [str(error)])
        return sessions


def allowed_noise(activation_bits: int) -> float:
    """Share of an output's size by which the two levels may differ.

    Fused kernels round a small share of requantized values (measured: up to 0.2 %) to the neighbouring step, so outputs
    are not equal to the last bit, and one step of a narrow activation is large. Saturated sums or a lost bias show as
    errors of the size of the outputs themselves. The share of noise that is let pass is 2 % of the outputs' size for
    8-bit activations, twice that for each bit less, and never more than half.
    """
    return min(0.5, 0.02 * (1 << (8 - activation_bits)))


def _arrays(values: Sequence[Any]) -> list[NDArray[Any]]:
    return [np.atleast_1d(np.asarray(value)) for value in values]


@dataclass
class _Run:
    """Values of one run that are not finite, by output."""

    names: tuple[str, ...]
    broken: dict[str, int] = field(default_factory=dict)

    def add(self, outputs: Sequence[NDArray[Any]]) -> None:
        for name, array in zip(self.names, outputs, strict=True):
            if np.issubdtype(array.dtype, np.floating):
                # Minus infinity is what masks put into scores; nothing else is meant to be infinite.
                broken = int((~np.isfinite(array) & ~np.isneginf(array)).sum())
                self.broken[name] = self.broken.get(name, 0) + broken

    def not_finite(self) -> Iterator[str]:
        for name, broken in self.broken.items():
            if broken:
                yield f"output {name}: {broken} values are not finite"


class _Scorers:
    """Scores by level; what the outputs are is seen on the first batch."""

    def __init__(self, task: Task, where: str) -> None:
        self._task = task
        self._where = where
        self._scorers: dict[str, Scorer] = {}

    def add(
        self, name: str, batch: Batch, outputs: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]] | None
    ) -> None:
        picked = float_positions(outputs)
        found = [outputs[index] for index in picked]
        wanted = None if expected is None else [expected[index] for index in picked]
        if name not in self._scorers:
            index = find_class_scores(found, batch.size, self._task, batch.labels)
            probabilities = wanted is not None and index is not None and are_probabilities(wanted[index])
            self._scorers[name] = Scorer(index, probabilities=probabilities, where=self._where)
        self._scorers[name].add(found, batch.size, batch.labels, wanted)

    def results(self) -> dict[str, Score]:
        return {name: scorer.result() for name, scorer in self._scorers.items()}


@dataclass
class _Difference:
    """How far one output differs between two runs."""

    values: int = 0
    size: float = 0.0
    noise: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf
    largest: float = 0.0
    finding: str | None = None

    def add(self, one: NDArray[Any], other: NDArray[Any]) -> None:
        if one.shape != other.shape:
            self.finding = self.finding or f"shapes {one.shape} and {other.shape}"
            return
        masked = np.isneginf(one)
        if not np.array_equal(masked, np.isneginf(other)):
            self.finding = self.finding or "the two levels mask different values with -inf"
            return
        a, b = one[~masked].astype(np.float64), other[~masked].astype(np.float64)
        if not (a.size and np.isfinite(a).all() and np.isfinite(b).all()):
            return  # a finding of its own
        self.values += a.size
        self.size += float(np.sum(np.square(a)))
        self.noise += float(np.sum(np.square(a - b)))
        self.lowest, self.highest = min(self.lowest, float(a.min())), max(self.highest, float(a.max()))
        self.largest = max(self.largest, float(np.abs(a - b).max()))


class Comparison:
    """How far all outputs differ between two runs."""

    def __init__(self) -> None:
        self._differences: dict[int, _Difference] = {}

    def add(self, slow: Sequence[NDArray[Any]], fast: Sequence[NDArray[Any]]) -> None:
        """Compare one batch."""
        for index, (one, other) in enumerate(zip(slow, fast, strict=True)):
            if np.issubdtype(one.dtype, np.floating):
                self._differences.setdefault(index, _Difference()).add(one, other)

    def result(self, names: Sequence[str], allowed: float) -> tuple[list[str], list[str]]:
        """Findings, and what was seen.

        Args:
            names: Names of the outputs.
            allowed: Largest root of noise power over power.
        """
        findings, details = [], []
        for index, item in self._differences.items():
            if item.finding is not None:
                findings.append(f"output {names[index]}: {item.finding}")
                continue
            if not item.values:
                continue
            size, noise = math.sqrt(item.size / item.values), math.sqrt(item.noise / item.values)
            steps = item.largest / ((item.highest - item.lowest or 1.0) / 255)
            text = f"output {names[index]}: differ by up to {steps:.3g} of 255 steps of the output range"
            details.append(text)
            if noise > allowed * size:
                share = noise / size if size else np.inf
                findings.append(f"{text}, by {share:.3f} of its size; allowed is {allowed:.2f}")
        return findings, details
