"""Running models with onnxruntime and scoring what they say, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raqu_onnx.errors import DataError, ModelError
from raqu_onnx.metrics import AUTO, Measure, Metric
from raqu_onnx.scoring import Score, Scorer, Task, are_probabilities, find_class_scores, float_positions
from raqu_onnx.session_model import SessionModel
from raqu_onnx.spool import MEMORY_BYTES, Spool

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import onnxruntime as ort
    from numpy.typing import NDArray

    from raqu_onnx.data import Batch, Dataset

__all__ = ["Level", "Outputs", "Reference", "Score", "Task", "collect", "default_threads", "make_session", "score"]

Level = Literal["enable-all", "disable-all", "simulate"]


@dataclass(frozen=True)
class Outputs:
    """What a model said on a dataset.

    Attributes:
        names: Names of the outputs.
        outputs: One array per model output, batches joined along axis 0.
        labels: Class of each sample, shape (samples,), or None.
        samples: Samples that were run; an output need not have one row for each.
    """

    names: tuple[str, ...]
    outputs: tuple[NDArray[Any], ...]
    labels: NDArray[np.integer] | None
    samples: int


def default_threads() -> int:
    """Threads that this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_session(
    model: bytes | str | Path | SessionModel,
    *,
    level: Level = "enable-all",
    threads: int | None = None,
    exact: bool = False,
) -> ort.InferenceSession:
    """Open a model with onnxruntime's CPU provider.

    Args:
        model: Path, serialized model, or a model with its weights by reference.
        level: ``enable-all`` is what users get by default; ``disable-all`` runs node by node; ``simulate`` enables
            every optimization but leaves Q/DQ pairs as they are, which gives the values of ``disable-all`` faster.
        threads: Threads inside operators, default all that this process may use.
        exact: Sums of 8-bit weights do not saturate on CPUs without VNNI either, at the price of time.

    Raises:
        ModelError: onnxruntime refuses the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if level == "disable-all":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    elif level == "simulate":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Spinning threads take the cores from numpy between two runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source, held = model.hand_over(options) if isinstance(model, SessionModel) else (model, [])
    source = source if isinstance(source, bytes) else str(source)
    # With fallback, onnxruntime prints each failure to stdout, where results go, and tries the same provider again.
    try:
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        where = "the model" if isinstance(model, bytes | SessionModel) else str(model)
        raise ModelError(f"{where}: onnxruntime cannot load it: {_first_line(error)}") from error
    # Release 1.32 copies weights that are handed over while it opens the session; nothing promises that others do.
    session.raqu_weights = held
    return session


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def run_batches(
    session: ort.InferenceSession, dataset: Dataset, batch_size: int, names: Sequence[str] | None = None
) -> Iterator[tuple[Batch, list[NDArray[Any]]]]:
    """Run a dataset batch by batch.

    Raises:
        DataError: onnxruntime cannot run a batch.
    """
    for batch in dataset.batches(batch_size):
        yield batch, run_feeds(session, names, batch.feeds, dataset.name)


def run_feeds(
    session: ort.InferenceSession, names: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]], where: str
) -> list[NDArray[Any]]:
    """Run one batch of the data called `where`.

    Raises:
        DataError: onnxruntime cannot run it.
    """
    try:
        return list(session.run(names, feeds))
    except Exception as error:  # as above
        raise DataError(f"{where}: the model cannot be run on it: {_first_line(error)}") from error


def collect(session: ort.InferenceSession, dataset: Dataset, batch_size: int = 64) -> Outputs:
    """Outputs of a model over a whole dataset.

    Raises:
        DataError: The dataset is empty or cannot be run.
    """
    names = tuple(output.name for output in session.get_outputs())
    return gather(names, run_batches(session, dataset, batch_size), dataset.name)


def gather(names: tuple[str, ...], results: Iterable[tuple[Batch, list[NDArray[Any]]]], where: str) -> Outputs:
    """Join the outputs of all batches of the data called `where`.

    Raises:
        DataError: There are none, or they do not fit together.
    """
    chunks: list[list[NDArray[Any]]] = []
    labels: list[NDArray[np.integer]] = []
    samples = 0
    for batch, outputs in results:
        samples += batch.size
        chunks.append([np.atleast_1d(np.asarray(value)) for value in outputs])
        if batch.labels is not None:
            labels.append(batch.labels)
    if not chunks:
        raise DataError(f"{where}: it holds no samples")
    joined = []
    for name, values in zip(names, zip(*chunks, strict=True), strict=True):
        if len({value.shape[1:] for value in values}) > 1:
            raise DataError(f"{where}: output {name!r} changes its shape from batch to batch; give samples of one size")
        joined.append(np.concatenate(values))
    return Outputs(names, tuple(joined), np.concatenate(labels) if labels else None, samples)


def score(outputs: Outputs, reference: Outputs | None = None, task: Task = "auto") -> Score:
    """Score outputs against their labels and against those of the float model.

    Args:
        outputs: What a model said.
        reference: What the float model said on the same samples; without it there is no fidelity.
        task: What the outputs are, see `find_class_scores`.

    Raises:
        DataError: The task is classification, and no output has class scores.
    """
    picked = float_positions(outputs.outputs)
    found = [outputs.outputs[index] for index in picked]
    expected = None if reference is None else [reference.outputs[index] for index in picked]
    index = find_class_scores(found, outputs.samples, task, outputs.labels)
    probabilities = expected is not None and index is not None and are_probabilities(expected[index])
    scorer = Scorer(index, probabilities=probabilities)
    scorer.add(found, outputs.samples, outputs.labels, expected)
    return scorer.result()


class Reference:
    """What the float model says on a dataset: what candidates are held against.

    The model runs once. Memory does not grow with the data: see `Spool`.

    Args:
        session: The float model.
        dataset: The data; `judge` must be given results on the same batches.
        batch_size: Samples per run.
        task: What the outputs are, see `find_class_scores`.
        metric: What quality is.
        memory_bytes: Most bytes of outputs kept in memory, the others lie in a temporary file.

    Attributes:
        score: Score of the float model itself.
        is_classifier: Its outputs are judged as class scores.

    Raises:
        DataError: The dataset is empty or cannot be run, or the task is classification and there are no class scores.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        dataset: Dataset,
        batch_size: int = 64,
        task: Task = "auto",
        metric: Metric = AUTO,
        *,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._metric = metric
        self._names = tuple(output.name for output in session.get_outputs())
        self._spool = Spool(memory_bytes)
        self._picked: list[int] | None = None
        self._index: int | None = None
        self._probabilities = False
        self._where = dataset.name
        scorer, measure = Scorer(None), Measure(metric, (), None, "")
        for batch, values in run_batches(session, dataset, batch_size):
            outputs = [np.atleast_1d(np.asarray(value)) for value in values]
            if self._picked is None:
                self._picked = float_positions(outputs)
                outputs = [outputs[index] for index in self._picked]
                self._index = find_class_scores(outputs, batch.size, task, batch.labels)
                self._probabilities = self._index is not None
                scorer, measure = Scorer(self._index, where=self._where), self._measure()
            else:
                outputs = [outputs[index] for index in self._picked]
            scorer.add(outputs, batch.size, batch.labels, outputs)
            measure.add(values, batch.size, batch.labels)
            if self._index is not None:
                self._probabilities = self._probabilities and are_probabilities(outputs[self._index])
            self._spool.append(outputs)
        self.score = measure.on(scorer.result())
        self.is_classifier = self._index is not None

    def _measure(self) -> Measure:
        index = None if self._index is None or self._picked is None else self._picked[self._index]
        return Measure(self._metric, self._names, index, self._where)

    def judge(
        self,
        results: Iterable[tuple[Batch, Sequence[NDArray[Any]]]],
        *,
        places: Collection[int] | None = None,
        measured: bool = True,
    ) -> Score:
        """Score what another model says on the same batches, or on some of them.

        Args:
            results: Each batch with the outputs, in the order of the dataset.
            places: Which batches these are, None for all.
            measured: Whether the metric is measured too.

        Raises:
            DataError: There are no batches, they cannot be run, or the metric cannot be measured.
        """
        measure = self._measure()
        scorer = Scorer(self._index, probabilities=self._probabilities, where=self._where)
        kept = (item for place, item in enumerate(self._spool) if places is None or place in places)
        # The results first: with no more of them, no batch of the reference is read.
        for (batch, values), expected in zip(results, kept, strict=False):
            outputs = [np.atleast_1d(np.asarray(values[index])) for index in self._picked or ()]
            scorer.add(outputs, batch.size, batch.labels, expected)
            if measured:
                measure.add(values, batch.size, batch.labels)
        found = scorer.result()
        return measure.on(found) if measured else found
