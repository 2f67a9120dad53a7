"""What outputs are worth: against labels, and against what the float model said on the same samples.

Scores are summed batch by batch, so that memory does not grow with the data. With labels a classifier's top-1 accuracy
is reported; against a float reference, with or without labels, fidelity: top-1 agreement, KL divergence and
signal-to-quantization-noise ratio (SQNR).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raqu_onnx.data_checks import check_classes
from raqu_onnx.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["KL", "NOISE", "Score", "Scorer", "Task", "are_probabilities", "find_class_scores", "float_positions"]

Task = Literal["auto", "classification", "regression"]
"""What the outputs are: class scores, or values of which every one counts; `auto` looks at their shapes."""


# Values that are widened to float64 at a time.
_PIECE = 1 << 20


#: Names of metrics that are fidelities themselves.
KL = "KL"
NOISE = "1 - noise/signal"

# Of what a named metric lacks to 1 in what the search minimizes.
_QUALITY_WEIGHT = 0.1


@dataclass(frozen=True)
class Score:
    """How good a model is on a dataset.

    Attributes:
        samples: Samples scored.
        top1: Share of samples whose largest output is the label, None without labels or class scores.
        agreement: Share of samples whose largest output is the reference's, None without class scores.
        kl: Mean KL divergence from the reference's softmax to the model's, in nats, None without class scores.
        sqnr_db: Power of the reference over power of the difference, in dB, over all float outputs.
        measured: Name of the metric that was asked for, None for none.
        value: Its value, the higher the better: for `KL` its negative.
    """

    samples: int
    top1: float | None = None
    agreement: float | None = None
    kl: float | None = None
    sqnr_db: float | None = None
    measured: str | None = None
    value: float | None = None

    @property
    def loss(self) -> float:
        """What the search minimizes: KL divergence (or noise), plus a tenth of what a metric that was named lacks to 1.

        Where labels are there but nobody asked for a metric, top-1 does not count: candidates within one budget differ
        by less than the luck of a few thousand samples moves it, and the KL divergence tells them apart.
        """
        counted = None if self.measured in (None, KL, NOISE) else self.value
        return self.fidelity + (0.0 if counted is None else _QUALITY_WEIGHT * (1.0 - counted))

    @property
    def fidelity(self) -> float:
        """KL divergence from the float model; noise over signal without class scores, or where that is measured."""
        if self.kl is not None and self.measured != NOISE:
            return self.kl
        return 0.0 if self.sqnr_db is None else 10 ** (-self.sqnr_db / 10)

    @property
    def likeness(self) -> float:
        """1 - noise over signal, from 0."""
        return 1.0 - min(1.0, 10 ** (-(self.sqnr_db or 0.0) / 10))

    @property
    def quality(self) -> float:
        """What was measured; else top-1 with labels, else agreement with the float model, else 1 - noise / signal."""
        for value in (self.value, self.top1, self.agreement):
            if value is not None:
                return value
        return self.likeness

    @property
    def metric(self) -> str:
        """What `quality` says: `top-1`, `agreement` (with the float model), `1 - noise/signal`, or what was named."""
        if self.measured is not None:
            return self.measured
        if self.top1 is not None:
            return "top-1"
        return "agreement" if self.agreement is not None else NOISE


def float_positions(outputs: Sequence[NDArray[Any]]) -> list[int]:
    """Which outputs are floating-point; scores look at no others."""
    return [index for index, array in enumerate(outputs) if np.issubdtype(array.dtype, np.floating)]


def find_class_scores(
    outputs: Sequence[NDArray[Any]], samples: int, task: Task, labels: NDArray[Any] | None = None
) -> int | None:
    """The output that holds class scores: shape (samples, classes), with or without trailing dimensions of 1.

    Args:
        outputs: Float outputs of one batch.
        samples: Samples in the batch.
        task: With `auto` there must be exactly one such output, and labels must be one per sample; with
            `classification` the first one is taken; with `regression` none.
        labels: Labels of the batch.

    Returns:
        Its position, None where the outputs are no class scores.

    Raises:
        DataError: The task is classification, and no output has this shape.
    """
    if task == "regression":
        return None
    tables = [
        index
        for index, array in enumerate(outputs)
        if array.ndim >= 2 and array.shape[0] == samples and array.shape[1] > 1 and math.prod(array.shape[2:]) == 1
    ]
    if task == "classification":
        if not tables:
            raise DataError("--task classification: no float output has one row of class scores per sample")
        return tables[0]
    if len(tables) != 1 or (labels is not None and labels.shape != (samples,)):
        return None
    return tables[0]


def are_probabilities(scores: NDArray[Any]) -> bool:
    """Whether class scores of a batch sum to 1: the model ends in Softmax already."""
    values = scores.reshape(scores.shape[:2]).astype(np.float64)
    return bool(values.size) and bool(values.min() >= 0) and np.allclose(values.sum(1), 1, atol=1e-3)


class Scorer:
    """Adds up a score batch by batch.

    Args:
        class_scores: Position of the class scores among the float outputs, None without any.
        probabilities: The float model's class scores are probabilities.
        where: What errors name.
    """

    def __init__(self, class_scores: int | None, *, probabilities: bool = False, where: str = "data") -> None:
        self._class_scores = class_scores
        self._probabilities = probabilities
        self._where = where
        self._classes: int | None = None
        self._samples = self._labelled = self._compared = 0
        self._right = self._agreeing = 0
        self._divergences: list[NDArray[np.float64]] = []
        self._signal = self._noise = 0.0

    def add(
        self,
        outputs: Sequence[NDArray[Any]],
        samples: int,
        labels: NDArray[Any] | None = None,
        expected: Sequence[NDArray[Any]] | None = None,
    ) -> None:
        """Score one batch.

        Args:
            outputs: Float outputs.
            samples: Samples in the batch.
            labels: Class of each sample, shape (samples,); of another shape they are not used.
            expected: What the float model said.

        Raises:
            DataError: The number of classes changes from batch to batch, or a label lies beyond them.
        """
        self._samples += samples
        if self._class_scores is not None:
            table = self._table(outputs[self._class_scores], samples)
            best = table.argmax(1)
            if labels is not None and labels.shape == best.shape:
                check_classes(self._where, labels, table.shape[1])
                self._labelled += samples
                self._right += int(np.sum(best == labels))
            if expected is not None:
                other = self._table(expected[self._class_scores], samples)
                self._agreeing += int(np.sum(best == other.argmax(1)))
                self._divergences.append(_kl_divergences(other, table, probabilities=self._probabilities))
        if expected is not None:
            self._compared += samples
            for one, got in zip(expected, outputs, strict=True):
                signal, noise = _powers(one, got)
                self._signal += signal
                self._noise += noise

    def _table(self, scores: NDArray[Any], samples: int) -> NDArray[Any]:
        """Class scores without trailing dimensions of 1, shape (samples, classes)."""
        if self._classes is None:
            self._classes = scores.shape[1]
        if scores.shape[:2] != (samples, self._classes) or math.prod(scores.shape[2:]) != 1:
            raise DataError(
                f"{self._where}: class scores change their shape from batch to batch; give samples of one size"
            )
        return scores.reshape(samples, self._classes)

    def result(self) -> Score:
        """The score of all batches so far.

        Raises:
            DataError: There were none.
        """
        if not self._samples:
            raise DataError(f"{self._where}: it holds no samples")
        top1 = agreement = kl = None
        if self._labelled == self._samples:
            top1 = self._right / self._samples
        if self._divergences:
            agreement = self._agreeing / self._samples
            divergence = float(np.mean(np.concatenate(self._divergences)))
            # Scores that are not finite count as the worst divergence.
            kl = divergence if math.isfinite(divergence) else math.inf
        return Score(self._samples, top1, agreement, kl, self._sqnr_db() if self._compared else None)

    def _sqnr_db(self) -> float:
        if self._noise == 0.0:
            return math.inf
        finite = self._signal and math.isfinite(self._noise)
        return 10 * math.log10(self._signal / self._noise) if finite else -math.inf


def _log_probabilities(scores: NDArray[Any], *, probabilities: bool) -> NDArray[np.float64]:
    values = scores.astype(np.float64)
    if probabilities:
        return np.log(np.maximum(values, 1e-12))
    from scipy.special import log_softmax

    # An infinite score gives NaN, which counts as the worst divergence.
    with np.errstate(invalid="ignore"):
        return np.asarray(log_softmax(values, axis=1))


def _kl_divergences(reference: NDArray[Any], scores: NDArray[Any], *, probabilities: bool) -> NDArray[np.float64]:
    """KL divergence of every sample, shape (samples,)."""
    p = _log_probabilities(reference, probabilities=probabilities)
    q = _log_probabilities(scores, probabilities=probabilities and are_probabilities(scores))
    # A class that a model rules out, with minus infinity, adds nothing.
    gain = np.subtract(p, q, out=np.zeros_like(p), where=p != -np.inf)
    return np.asarray(np.sum(np.exp(p) * gain, axis=1))


def _powers(expected: NDArray[Any], got: NDArray[Any]) -> tuple[float, float]:
    """Power of an output and of its error; an output of another shape is lost as a whole."""
    signal = noise = 0.0
    alike = expected.shape == got.shape
    flat, other = expected.reshape(-1), got.reshape(-1)
    # In pieces: large outputs would take many times their size in float64.
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        # What the reference rules out with an infinity is no signal.
        finite = np.isfinite(piece)
        values = piece[finite].astype(np.float64)
        signal += float(np.sum(np.square(values)))
        if alike:
            noise += float(np.sum(np.square(values - other[start : start + _PIECE][finite])))
    return signal, noise if alike else signal
