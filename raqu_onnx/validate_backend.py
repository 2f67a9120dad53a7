"""The emitted model on ideal virtual crossbars, held against onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.backend.session import CrossbarSession, Plan
from raqu_onnx.data import take
from raqu_onnx.errors import DataError
from raqu_onnx.evaluation import make_session, run_feeds
from raqu_onnx.validate_runs import Comparison, allowed_noise

if TYPE_CHECKING:
    from pathlib import Path

    from raqu_onnx.backend.folder import MappedModel
    from raqu_onnx.data import Dataset
    from raqu_onnx.validate_report import Checklist

__all__ = ["check_crossbars"]

# Samples that are run.
_SAMPLES = 16


def check_crossbars(
    mapped: MappedModel, path: Path, data: Dataset, checklist: Checklist, *, threads: int, activation_bits: int
) -> None:
    """The model on ideal virtual crossbars says what onnxruntime says at `disable-all`.

    Both compute the same integers; only float sums between mapped nodes may be rounded another way.

    Args:
        mapped: The model with its manifest and cells.
        path: The model's file.
        data: Of which the first samples are run.
        checklist: Where findings go.
        threads: Threads of onnxruntime.
        activation_bits: Fewest bits that the model clips an activation to.
    """
    checklist.tell("running the model on crossbars")
    plan = Plan(mapped, threads)
    sessions = (make_session(path, level="disable-all", threads=threads), CrossbarSession(plan))
    comparison, samples = Comparison(), 0
    for batch in take(data, _SAMPLES).batches(_SAMPLES):
        samples += batch.size
        try:
            one, other = (
                [np.atleast_1d(np.asarray(value)) for value in run_feeds(session, None, batch.feeds, data.name)]
                for session in sessions
            )
        except DataError as error:
            checklist.skip("run.crossbars", f"not run: {error}; give data")
            return
        comparison.add(one, other)
    names = [str(output.name) for output in mapped.model.graph.outputs]
    findings, details = comparison.result(names, allowed_noise(activation_bits))
    checklist.run("run.crossbars", findings, "; ".join([f"{samples} samples against disable-all", *details]))
