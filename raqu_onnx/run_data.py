"""Which data a run calibrates on, chooses on and reports on, and what a user must know of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raqu_onnx.data import open_dataset, split, synthetic_dataset, take
from raqu_onnx.data_checks import check_label_top
from raqu_onnx.model_io import model_inputs
from raqu_onnx.pipeline import pass_names
from raqu_onnx.results import DataSummary

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from raqu_onnx.config import OptimizeConfig
    from raqu_onnx.data import Dataset, DataSource
    from raqu_onnx.evaluation import Score
    from raqu_onnx.results import Figures
    from raqu_onnx.scoring import Task

__all__ = ["RunData", "describe", "open_run_data"]

_SYNTHETIC_SAMPLES = 64
_FITTED = "the calibration data, which ranges and weights are fitted to"
# Share of the way from guessing to perfect below which a float model says nothing, and that any useful one has gone.
_GUESSING, _USEFUL = 0.05, 0.25
# How likely a useful model may look like a guessing one before it is called that.
_DOUBT = 0.01


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        calibration: Inputs that ranges are measured and weights are fitted on.
        selection: Data that widths are chosen on.
        evaluation: Data that the result is reported on, None without any.
        warnings: What a user must know of them.
        classes: Class scores per sample, as far as the model's outputs tell.
        fitted: Roles of the data that ranges and weights are fitted to, `calibration` among them.
    """

    calibration: Dataset
    selection: Dataset
    evaluation: Dataset | None
    warnings: tuple[str, ...]
    classes: int | None = None
    fitted: frozenset[str] = frozenset({"calibration"})

    def summary(self) -> dict[str, DataSummary | None]:
        """What is told of each part of the data in results, by its role."""
        parts = {"calibration": self.calibration, "selection": self.selection, "evaluation": self.evaluation}
        return {
            role: None if data is None else summary(data, fitted=role in self.fitted) for role, data in parts.items()
        }

    def label_warnings(self, float_figures: Figures) -> list[str]:
        """Warnings for labels that cannot be right, or that no output of the model can be held against.

        Args:
            float_figures: Scores of the float model on the data.
        """
        return list(self._label_warnings(float_figures))

    def _label_warnings(self, float_figures: Figures) -> Iterator[str]:
        for data, score in ((self.selection, float_figures.selection), (self.evaluation, float_figures.evaluation)):
            if data is None or score is None or not data.has_labels:
                continue
            classes = self.classes or (data.top_label or 0) + 1
            if score.top1 is None:
                yield (
                    f"labels of {data.name} are not used: the outputs are judged as values, and not as class scores in "
                    "one row per sample, of which --task classification takes the first output that has them"
                )
            elif is_guessing(score, classes):
                yield (
                    f"the float model is right on {score.top1:.1%} of the {score.samples} samples of {data.name}, and "
                    f"guessing among {classes} classes on {1 / classes:.1%}: labels or preprocessing are probably "
                    "wrong; check that labels count the model's classes in its order from 0, and that inputs are "
                    "scaled as in training (range, mean, std, order of channels)"
                )


def is_guessing(score: Score, classes: int) -> bool:
    """Whether a top-1 accuracy is no better than chance, on enough samples to say so.

    It is where the accuracy has gone less than 5 % of the way from chance to 1, and a model that has gone 25 % of it
    would look like that with a probability below 1 %, by Chernoff's bound for a binomial count:
    `P(X <= k) <= exp(-n KL(k/n || p))` for `k/n <= p` (Hoeffding, JASA 58, 1963, theorem 1).

    Args:
        score: Score of the float model, with labels.
        classes: Classes to choose from.
    """
    if score.top1 is None or classes < 2:
        return False
    chance = 1 / classes
    if score.top1 >= chance + _GUESSING * (1 - chance):
        return False
    useful = chance + _USEFUL * (1 - chance)
    found = score.top1
    divergence = (1 - found) * math.log((1 - found) / (1 - useful))
    if found > 0:
        divergence += found * math.log(found / useful)
    return math.exp(-score.samples * divergence) < _DOUBT


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
        selection: Without any, half of the calibration data is set aside; nothing of it where widths are fixed, whose
            figures are then of the calibration data.
        evaluation: Data that the result is reported on.

    Raises:
        DataError: Data cannot be read or does not fit the model.
    """
    inputs = model_inputs(model)
    classes = model_classes(model, settings.task)
    searching = "search-bits" in pass_names(settings)
    warnings: list[str] = []

    def opened(source: DataSource | None, configured: str | None) -> Dataset | None:
        wanted = source if source is not None else configured
        return None if wanted is None else open_dataset(wanted, inputs, pictures=settings.pictures)

    fixed = settings.search_settings.is_uniform
    ranges = opened(calibration, settings.calibration)
    choice = opened(selection, settings.selection)
    report = opened(evaluation, settings.evaluation)
    for item in (choice or ranges, report):
        if classes is not None and item is not None and item.top_label is not None:
            check_label_top(item.name, item.top_label, classes)
    seen = [item.digest for item in (ranges, choice) if item is not None]
    fitted = {"calibration"}
    if ranges is not None:
        fitted |= {role for role, item in (("selection", choice), ("evaluation", report)) if _same(item, ranges)}
    if ranges is None:
        ranges = synthetic_dataset(inputs, _SYNTHETIC_SAMPLES, settings.seed)
        warnings.append(
            "no calibration data: ranges come from synthetic inputs, so the accuracy on real data is unknown and "
            "probably poor; give real inputs with --calibration"
        )
        choice = choice or synthetic_dataset(inputs, _SYNTHETIC_SAMPLES, settings.seed + 1)
    elif choice is None and (fixed or not searching):
        fitted.add("selection")  # Nothing is chosen on it: what would be set aside serves better to calibrate.
    elif not searching:
        pass
    elif choice is None:
        ranges, choice = split(ranges, 0.5, settings.seed)
        warnings.append(
            f"no selection data: widths are chosen on half of {ranges.name}, which calibration then does not see"
        )
    elif choice.digest == ranges.digest:
        what = "figures are of" if fixed else "widths are chosen on"
        warnings.append(f"selection data is the calibration data: {what} what weights are fitted to")
    ranges = take(ranges, settings.calibration_samples)
    choice = choice or ranges
    if searching and choice is ranges and settings.goal:
        warnings.append(f"no selection data: the goal is judged on {ranges.name}, {_FITTED}; give other data")
    if report is None:
        warnings.append(_figures_of(choice, searching=searching, fixed=fixed, fitted=choice is ranges))
    elif report.digest in seen:
        warnings.append("evaluation data is the calibration or selection data: its accuracy is too good to be true")
    return RunData(ranges, choice, report, tuple(warnings), classes, frozenset(fitted))


def _figures_of(choice: Dataset, *, searching: bool, fixed: bool, fitted: bool) -> str:
    """What figures are of where there is no evaluation data.

    Args:
        choice: The selection data.
        searching: It is judged at all.
        fixed: No widths are chosen on it.
        fitted: It is the calibration data, for want of other.
    """
    if not searching:
        return "no evaluation data: how good the result is stays unknown; give data with --eval"
    if fitted:
        return (
            f"no evaluation data: figures are of {choice.name}, {_FITTED}, so how good the result is on other data "
            "stays unknown; give data with --eval"
        )
    return "no evaluation data: figures are of the selection data" + ("" if fixed else ", on which widths were chosen")


def _same(dataset: Dataset | None, calibration: Dataset) -> bool:
    return dataset is not None and dataset.digest == calibration.digest


def model_classes(model: ir.Model, task: Task = "auto") -> int | None:
    """Class scores per sample, from the shapes of the outputs; None where they do not tell, or there are none.

    Args:
        model: The float model.
        task: What its outputs are, as for `scoring.find_class_scores`.
    """
    if task == "regression":
        return None
    tables = []
    for output in model.graph.outputs:
        shape = output.shape
        if output.dtype is None or shape is None:
            return None
        if output.dtype.is_floating_point() and len(shape) >= 2 and all(size == 1 for size in shape[2:]):
            tables.append(shape[1])
    size = tables[0] if len(tables) == 1 or (tables and task == "classification") else None
    return size if isinstance(size, int) and size > 1 else None


def summary(dataset: Dataset, *, fitted: bool) -> DataSummary:
    """What is told of a dataset in results.

    Args:
        dataset: The data.
        fitted: Ranges and weights are fitted to it.
    """
    return DataSummary(
        dataset.name, dataset.size, labels=dataset.has_labels, synthetic=dataset.synthetic, fitted=fitted
    )


def describe(dataset: Dataset) -> str:
    """A dataset in a few words."""
    size = "?" if dataset.size is None else str(dataset.size)
    kind = "synthetic" if dataset.synthetic else dataset.name
    return f"{kind}, {size} samples, {'with' if dataset.has_labels else 'without'} labels"
