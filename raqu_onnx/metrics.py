"""What a result is measured by: top-1 or top-k accuracy, fidelity to the float model, or a function of the user's.

A user's function `FUNCTION(outputs, labels)` gets the model's outputs over the whole data (an array for a model with
one output, else a dict of arrays by output name) and the labels (an array, or None where the data has none). It returns
a number, the higher the better.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raqu_onnx.data_python import call_user, load_function
from raqu_onnx.errors import DataError
from raqu_onnx.scoring import NOISE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.scoring import Score

__all__ = ["AUTO", "Measure", "Metric", "parse_metric"]

Kind = Literal["auto", "topk", "agreement", "kl", "sqnr", "function"]


@dataclass(frozen=True)
class Metric:
    """What quality is.

    Attributes:
        text: As the user wrote it.
        kind: What it is; `auto` takes accuracy where there are labels, else agreement, or noise without class scores.
        k: Of `topk`: a sample is right where its label is among the k largest class scores.
    """

    text: str
    kind: Kind
    k: int = 1

    @property
    def name(self) -> str:
        """What results call it."""
        match self.kind:
            case "topk":
                return f"top-{self.k}"
            case "kl":
                return "KL"
            case "sqnr":
                return NOISE
            case "function":
                path, _, function = self.text.rpartition(":")
                return f"{Path(path).name}:{function}"
            case _:
                return self.kind

    @cached_property
    def _loaded(self) -> tuple[Callable[..., object], str]:
        path, _, function = self.text.rpartition(":")
        return load_function(Path(path), function)

    @property
    def digest(self) -> str:
        """Stands for what it computes: its name, and the bytes of the user's file."""
        return self._loaded[1] if self.kind == "function" else self.name

    def call(self, outputs: object, labels: NDArray[Any] | None) -> float:
        """What the user's function says.

        Raises:
            DataError: It is missing, raises, or returns no finite number.
        """
        path, _, _ = self.text.rpartition(":")
        found = call_user(self.text, Path(path), self._loaded[0], outputs, labels)
        try:
            value = float(found)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.text}: returned a {type(found).__name__}, expected a number") from error
        if not math.isfinite(value):
            raise DataError(f"{self.text}: returned {value}, expected a finite number")
        return value


AUTO = Metric("auto", "auto")


def parse_metric(text: object) -> Metric:
    """Read ``auto``, ``top1``, ``top5``, ``topk:K``, ``kl``, ``agreement``, ``sqnr`` or ``FILE.py:FUNCTION``.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(text, str):
        if text in ("auto", "agreement", "kl", "sqnr"):
            return Metric(text, text)  # type: ignore[arg-type]
        if found := re.fullmatch(r"top(?:k:)?([1-9][0-9]{0,5})", text):
            return Metric(text, "topk", int(found[1]))
        if re.fullmatch(r".+\.py:[A-Za-z_]\w*", text):
            return Metric(text, "function")
    raise ValueError(
        f"{text!r} is no metric: give auto, top1, top5, topk:K, kl, agreement, sqnr or FILE.py:FUNCTION of outputs and "
        "labels"
    )


class Measure:
    """Measures one pass over a dataset.

    Args:
        metric: What is measured.
        names: Of the model's outputs.
        class_scores: Position of the class scores among them, None where there are none.
        where: What errors name.
    """

    def __init__(self, metric: Metric, names: Sequence[str], class_scores: int | None, where: str) -> None:
        self._metric = metric
        self._names = names
        self._class_scores = class_scores
        self._where = where
        self._right = self._labelled = 0
        self._outputs: list[list[NDArray[Any]]] = []
        self._labels: list[NDArray[Any]] = []

    def add(self, values: Sequence[NDArray[Any]], samples: int, labels: NDArray[Any] | None) -> None:
        """Take one batch.

        Args:
            values: All outputs, in the order of `names`.
            samples: Samples in the batch.
            labels: Their labels, if any.
        """
        if self._metric.kind == "function":
            self._outputs.append([np.array(value) for value in values])
            self._labels += [] if labels is None else [np.array(labels)]
        elif self._metric.kind == "topk" and self._class_scores is not None and labels is not None:
            table = np.asarray(values[self._class_scores]).reshape(samples, -1)
            self._require_choice(table.shape[1])
            # Class scores above the label's own, and equal ones before it, as argmax breaks ties.
            own = table[np.arange(samples), labels][:, None]
            before = np.arange(table.shape[1]) < labels[:, None]
            rank = ((table > own) | ((table == own) & before)).sum(axis=1)
            self._right += int(((rank < self._metric.k) & np.isfinite(own[:, 0])).sum())
            self._labelled += samples

    def _require_choice(self, classes: int) -> None:
        if self._metric.k >= classes:
            raise DataError(
                f"--metric {self._metric.text}: there are {classes} classes, so that every sample would be right; give "
                "a smaller number"
            )

    def on(self, score: Score) -> Score:
        """A score with what was measured in it.

        Raises:
            DataError: The data or the model has not what the metric needs, or the user's function fails.
        """
        metric = self._metric
        if metric.kind == "auto":
            return score
        return replace(score, measured=metric.name, value=self._value(score))

    def _value(self, score: Score) -> float:
        metric, where = self._metric, f"--metric {self._metric.text}: {self._where}"
        if metric.kind == "function":
            return metric.call(*self._collected())
        if metric.kind == "sqnr":
            return score.likeness
        if score.agreement is None or score.kl is None:
            raise DataError(f"{where}: the model has no class scores; see --task, or use sqnr")
        if metric.kind == "agreement":
            return score.agreement
        if metric.kind == "kl":
            return -score.kl
        if self._labelled < score.samples:
            raise DataError(f"{where}: it has no labels; give some, or use agreement, kl or sqnr")
        return self._right / score.samples

    def _collected(self) -> tuple[object, NDArray[Any] | None]:
        """What the user's function gets."""
        joined = {
            name: np.concatenate([np.atleast_1d(value) for value in parts])
            for name, parts in zip(self._names, zip(*self._outputs, strict=True), strict=True)
        }
        labels = np.concatenate(self._labels) if self._labels else None
        return (next(iter(joined.values())) if len(joined) == 1 else joined), labels
