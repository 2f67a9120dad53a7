"""Running models with onnxruntime and scoring what they say.

With labels a classifier's top-1 accuracy is reported; against a float reference, with or without labels, fidelity:
top-1 agreement, KL divergence and signal-to-quantization-noise ratio (SQNR).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raqu_onnx.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import onnxruntime as ort
    from numpy.typing import NDArray

    from raqu_onnx.data import Batch, Dataset

__all__ = ["Level", "Outputs", "Score", "collect", "default_threads", "make_session", "score"]

Level = Literal["enable-all", "disable-all", "simulate"]


@dataclass(frozen=True)
class Outputs:
    """What a model said on a dataset.

    Attributes:
        names: Names of the outputs.
        outputs: One array per model output, samples along axis 0.
        labels: Class of each sample, shape (samples,), or None.
    """

    names: tuple[str, ...]
    outputs: tuple[NDArray[Any], ...]
    labels: NDArray[np.integer] | None

    @property
    def samples(self) -> int:
        """Samples that were run."""
        return len(self.outputs[0])


@dataclass(frozen=True)
class Score:
    """How good a model is on a dataset.

    Attributes:
        samples: Samples scored.
        top1: Share of samples whose largest output is the label, None without labels.
        agreement: Share of samples whose largest output is the reference's.
        kl: Mean KL divergence from the reference's softmax to the model's, in nats.
        sqnr_db: Power of the reference over power of the difference, in dB, over all float outputs.
    """

    samples: int
    top1: float | None = None
    agreement: float | None = None
    kl: float | None = None
    sqnr_db: float | None = None

    @property
    def loss(self) -> float:
        """What the search minimizes: top-1 error where there are labels, plus KL (or noise) to break ties.

        Top-1 over a few thousand samples moves in coarse steps; the KL divergence is smooth and tells apart
        candidates of equal accuracy.
        """
        if self.kl is not None:
            fidelity = self.kl
        elif self.sqnr_db is not None:
            fidelity = 10 ** (-self.sqnr_db / 10)
        else:
            fidelity = 0.0
        return fidelity + (0.0 if self.top1 is None else 1.0 - self.top1)

    @property
    def quality(self) -> float:
        """Share of right answers: top-1 with labels, else agreement with the float model, else 1 - noise / signal."""
        if self.top1 is not None:
            return self.top1
        if self.agreement is not None:
            return self.agreement
        return 1.0 - min(1.0, 10 ** (-(self.sqnr_db or 0.0) / 10))


def default_threads() -> int:
    """Threads that this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_session(
    model: bytes | str | Path, *, level: Level = "enable-all", threads: int | None = None
) -> ort.InferenceSession:
    """Open a model with onnxruntime's CPU provider.

    Args:
        model: Serialized model or path.
        level: ``enable-all`` is what users get by default; ``disable-all`` runs node by node; ``simulate`` enables
            every optimization but leaves Q/DQ pairs as they are, which gives the values of ``disable-all`` faster.
        threads: Threads inside operators, default all that this process may use.

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
    # Spinning threads take the cores from numpy between two runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    # With fallback, onnxruntime prints each failure to stdout, where results go, and tries the same provider again.
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        where = "the model" if isinstance(model, bytes) else str(model)
        raise ModelError(f"{where}: onnxruntime cannot load it: {_first_line(error)}") from error


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
    for batch, outputs in results:
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
    return Outputs(names, tuple(joined), np.concatenate(labels) if labels else None)


def score(outputs: Outputs, reference: Outputs | None = None) -> Score:
    """Score outputs against their labels and against those of the float model.

    The first float output of shape (samples, classes), with or without trailing dimensions of 1, is taken as class
    scores; without one there is no top-1 and no KL, and SQNR over all float outputs stands alone.
    """
    index = _class_scores(outputs)
    top1 = agreement = kl = None
    if index is not None:
        logits = _as_table(outputs.outputs[index])
        if outputs.labels is not None and outputs.labels.shape == logits.shape[:1]:
            top1 = float(np.mean(logits.argmax(1) == outputs.labels))
        if reference is not None:
            expected = _as_table(reference.outputs[index])
            agreement = float(np.mean(logits.argmax(1) == expected.argmax(1)))
            kl = _kl_divergence(expected, logits)
    sqnr = None if reference is None else _sqnr_db(reference.outputs, outputs.outputs)
    return Score(outputs.samples, top1, agreement, kl, sqnr)


def _class_scores(outputs: Outputs) -> int | None:
    for index, array in enumerate(outputs.outputs):
        is_table = array.ndim >= 2 and array.shape[1] > 1 and math.prod(array.shape[2:]) == 1
        if is_table and np.issubdtype(array.dtype, np.floating):
            return index
    return None


def _as_table(scores: NDArray[Any]) -> NDArray[Any]:
    """Class scores without trailing dimensions of 1, shape (samples, classes)."""
    return scores.reshape(scores.shape[:2])


def _log_probabilities(scores: NDArray[Any]) -> NDArray[np.float64]:
    values = scores.astype(np.float64)
    if values.min() >= 0 and np.allclose(values.sum(1), 1, atol=1e-3):
        # The model ends in Softmax already.
        return np.log(np.maximum(values, 1e-12))
    from scipy.special import log_softmax

    # An infinite score gives NaN, which counts as the worst divergence.
    with np.errstate(invalid="ignore"):
        return np.asarray(log_softmax(values, axis=1))


def _kl_divergence(reference: NDArray[Any], scores: NDArray[Any]) -> float:
    p, q = _log_probabilities(reference), _log_probabilities(scores)
    # A class that a model rules out, with minus infinity, adds nothing.
    gain = np.subtract(p, q, out=np.zeros_like(p), where=p != -np.inf)
    divergence = float(np.mean(np.sum(np.exp(p) * gain, axis=1)))
    return math.inf if math.isnan(divergence) else divergence


def _sqnr_db(reference: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]) -> float:
    signal = noise = 0.0
    for expected, got in zip(reference, outputs, strict=True):
        if np.issubdtype(expected.dtype, np.floating):
            # What the reference rules out with an infinity is no signal.
            finite = np.isfinite(expected)
            values = expected[finite].astype(np.float64)
            signal += float(np.sum(np.square(values)))
            noise += float(np.sum(np.square(values - got[finite])))
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf
