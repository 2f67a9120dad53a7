"""How good a mapped model still is on real crossbars: limited converters, cells that vary, stick and are noisy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raqu_onnx.backend.folder import open_folder
from raqu_onnx.backend.session import CrossbarSession, NodeReport, Plan, Setting, converters
from raqu_onnx.cell_errors import CellErrors
from raqu_onnx.data import open_dataset, take
from raqu_onnx.errors import ConfigError
from raqu_onnx.evaluation import Reference, run_batches
from raqu_onnx.json_values import finite
from raqu_onnx.model_io import model_inputs
from raqu_onnx.validation import task_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from raqu_onnx.data import Dataset, DataSource
    from raqu_onnx.scoring import Score

__all__ = ["SimulationReport", "simulate"]

# Samples that run together.
_BATCH = 64
# Chips that are tried where errors are drawn at random.
_REPEATS = 10


@dataclass(frozen=True)
class SimulationReport:
    """What a model does on virtual crossbars.

    Attributes:
        data: Name of the data.
        samples: Samples that were run.
        adc_bits: Resolution of the converters, None for ideal ones.
        adc_signed: They read negative sums.
        errors: What cells do.
        seed: Seed of these errors.
        ideal: Score with ideal cells and converters, which is the quantized model's own.
        runs: Scores of the repeats; their fidelity is to the ideal crossbars.
        nodes: What the converters did, over all repeats.
    """

    data: str
    samples: int
    adc_bits: int | None
    adc_signed: bool
    errors: CellErrors
    seed: int
    ideal: Score
    runs: tuple[Score, ...]
    nodes: tuple[NodeReport, ...]

    @property
    def metric(self) -> str:
        """What is judged: `top-1`, `agreement` (with ideal crossbars) or `1 - noise/signal`."""
        return self.runs[0].metric

    @property
    def distribution(self) -> dict[str, float]:
        """Mean, standard deviation (of the repeats themselves, not an estimate), smallest and largest quality."""
        values = np.array([score.quality for score in self.runs])
        figures = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
        return {name: float(value) for name, value in figures.items()}

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values; null stands for what JSON does not know."""
        content = {**asdict(self), "metric": self.metric, "distribution": self.distribution}
        found: dict[str, Any] = finite(content)
        return found


def simulate(
    out_dir: str | Path,
    dataset: DataSource,
    *,
    variation: float = 0.0,
    stuck: float = 0.0,
    stuck_high: float = 0.5,
    read_noise: float = 0.0,
    repeats: int | None = None,
    seed: int = 0,
    adc_bits: int | Literal["chip", "ideal"] = "chip",
    samples: int | None = None,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> SimulationReport:
    """Run a result folder on virtual crossbars.

    Nothing but `manifest.json`, `model.onnx` and, where there is one, `cells.npz` is read. Memory does not grow with
    the data.

    Args:
        out_dir: The folder that `optimize` wrote.
        dataset: What to run on; with labels accuracy is judged, else agreement with ideal crossbars.
        variation: Standard deviation of a programmed level over that level.
        stuck: Share of cells that are stuck.
        stuck_high: Share of those that give the highest level; the others give 0.
        read_noise: Standard deviation of one read of a cell over its level.
        repeats: How many chips with errors of their own are tried, default 10; without errors there is one.
        seed: Seed of the errors.
        adc_bits: Resolution of the converters: the chip's, ideal, or another one.
        samples: Run the first ones only.
        threads: Threads, default all that this process may use.
        progress: Told of every batch.

    Returns:
        Scores of all repeats and what the converters did.

    Raises:
        RaquError: Folder, data or settings are not usable.
    """
    errors = CellErrors(variation, stuck, stuck_high, read_noise)
    count = _repeats(repeats, errors)
    for name, value in (("samples", samples), ("threads", threads)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: must be at least 1, found {value}")
    if seed < 0:
        raise ConfigError(f"--seed: must be at least 0, found {seed}")
    mapped = open_folder(out_dir)
    setting = Setting(converters(mapped.manifest.chip, adc_bits), errors, seed)
    data = open_dataset(dataset, model_inputs(mapped.model))
    data = data if samples is None else take(data, samples)
    plan = Plan(mapped, threads)
    tell = progress or (lambda _what, _done, _total: None)
    ideal = CrossbarSession(plan)
    watched = _Watched(ideal, "ideal crossbars", data.size, tell)
    reference = Reference(watched, data, _BATCH, task_of(mapped.manifest))
    runs: tuple[Score, ...] = (reference.score,)
    if setting.ideal:
        nodes = ideal.reports()
    else:
        runs, nodes = _disturbed(plan, setting, count, data, reference, tell)
    return SimulationReport(
        data.name, reference.score.samples, setting.adc.bits, setting.adc.signed, errors, seed, reference.score, runs,
        nodes,
    )  # fmt: skip


def _repeats(repeats: int | None, errors: CellErrors) -> int:
    if repeats is not None and repeats < 1:
        raise ConfigError(f"--repeats: must be at least 1, found {repeats}")
    if not errors.any:
        if repeats is not None and repeats > 1:
            raise ConfigError(
                f"--repeats {repeats}: nothing is drawn at random, so that all chips would give the same; leave it "
                "out, or give --variation, --stuck or --read-noise"
            )
        return 1
    return _REPEATS if repeats is None else repeats


def _disturbed(
    plan: Plan,
    setting: Setting,
    repeats: int,
    data: Dataset,
    reference: Reference,
    tell: Callable[[str, int, int], None],
) -> tuple[tuple[Score, ...], tuple[NodeReport, ...]]:
    """Scores of all repeats, and the conversions of all of them together."""
    scores: list[Score] = []
    nodes: tuple[NodeReport, ...] = ()
    for repeat in range(repeats):
        session = CrossbarSession(plan, replace(setting, repeat=repeat))
        watched = _Watched(session, f"crossbars {repeat + 1} of {repeats}", data.size, tell)
        scores.append(reference.judge(run_batches(watched, data, _BATCH)))
        found = session.reports()
        nodes = tuple(map(_joined, nodes, found)) if nodes else found
    return tuple(scores), nodes


def _joined(one: NodeReport, other: NodeReport) -> NodeReport:
    return replace(
        one,
        conversions=one.conversions + other.conversions,
        clipped=one.clipped + other.clipped,
        seen_bits=max(one.seen_bits or 0, other.seen_bits or 0),
    )


class _Watched:
    """A session that tells how far it is."""

    def __init__(
        self, session: CrossbarSession, what: str, total: int | None, tell: Callable[[str, int, int], None]
    ) -> None:
        self._session, self._what, self._total, self._tell = session, what, total, tell
        self._done = 0

    def get_outputs(self) -> tuple[Any, ...]:
        return self._session.get_outputs()

    def run(self, names: list[str] | None, feeds: dict[str, NDArray[Any]]) -> list[Any]:
        self._tell(self._what, self._done, self._total or self._done)
        found = self._session.run(names, feeds)
        self._done += len(next(iter(feeds.values()), ()))
        return found
