"""Which data a run calibrates on, chooses on and reports on, and what a user must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raqu_onnx.data import open_dataset, split, synthetic_dataset, take
from raqu_onnx.model_io import model_inputs

if TYPE_CHECKING:
    import onnx_ir as ir

    from raqu_onnx.config import OptimizeConfig
    from raqu_onnx.data import Dataset, DataSource
    from raqu_onnx.results import Figures

__all__ = ["RunData", "describe", "open_run_data"]

_SYNTHETIC_SAMPLES = 64


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        calibration: Inputs that ranges are measured and weights are fitted on.
        selection: Data that widths are chosen on.
        evaluation: Data that the result is reported on, None without any.
        warnings: What a user must know of them.
    """

    calibration: Dataset
    selection: Dataset
    evaluation: Dataset | None
    warnings: tuple[str, ...]

    def unread_labels(self, float_figures: Figures) -> list[str]:
        """Warnings for labels that no output of the model can be held against.

        Args:
            float_figures: Scores of the float model on the data.
        """
        judged = ((self.selection, float_figures.selection), (self.evaluation, float_figures.evaluation))
        return [
            f"labels of {data.name} are not used: no float output has one row of class scores per sample"
            for data, score in judged
            if data is not None and data.has_labels and score is not None and score.top1 is None
        ]


def open_run_data(
    model: ir.Model,
    settings: OptimizeConfig,
    calibration: DataSource | None = None,
    selection: DataSource | None = None,
    evaluation: DataSource | None = None,
) -> RunData:
    """Open the data that is given or that the settings name, and fill in what is missing.

    Args:
        model: The model that the data feeds.
        settings: Names of data, wherever none is given here.
        calibration: Without any, synthetic inputs are used.
        selection: Without any, half of the calibration data is set aside.
        evaluation: Data that the result is reported on.

    Raises:
        DataError: Data cannot be read or does not fit the model.
    """
    inputs = model_inputs(model)
    warnings: list[str] = []

    def opened(source: DataSource | None, configured: str | None) -> Dataset | None:
        wanted = source if source is not None else configured
        return None if wanted is None else open_dataset(wanted, inputs, pictures=settings.pictures)

    ranges = opened(calibration, settings.calibration)
    choice = opened(selection, settings.selection)
    report = opened(evaluation, settings.evaluation)
    seen = [item.digest for item in (ranges, choice) if item is not None]
    if ranges is None:
        ranges = synthetic_dataset(inputs, _SYNTHETIC_SAMPLES, settings.seed)
        warnings.append(
            "no calibration data: ranges come from synthetic inputs, so the accuracy on real data is unknown and "
            "probably poor; give real inputs with --calibration"
        )
        choice = choice or synthetic_dataset(inputs, _SYNTHETIC_SAMPLES, settings.seed + 1)
    elif choice is None:
        ranges, choice = split(ranges, 0.5, settings.seed)
        warnings.append(
            f"no selection data: widths are chosen on half of {ranges.name}, which calibration then does not see"
        )
    elif choice.digest == ranges.digest:
        warnings.append("selection data is the calibration data: widths are chosen on what weights are fitted to")
    if report is None:
        warnings.append("no evaluation data: figures are of the selection data, on which widths were chosen")
    elif report.digest in seen:
        warnings.append("evaluation data is the calibration or selection data: its accuracy is too good to be true")
    return RunData(take(ranges, settings.calibration_samples), choice, report, tuple(warnings))


def describe(dataset: Dataset) -> str:
    """A dataset in a few words."""
    size = "?" if dataset.size is None else str(dataset.size)
    kind = "synthetic" if dataset.synthetic else dataset.name
    return f"{kind}, {size} samples, {'with' if dataset.has_labels else 'without'} labels"
