"""The main job as one function: a trained model and a chip in, a result folder out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from raqu_onnx.annotations import (
    COST,
    CYCLES,
    EMITTED,
    KEPT,
    NO_COPIES,
    PARTITIONS,
    PLACEMENT,
    QUANTIZED,
    QUANTIZER,
    SEARCH,
    SINGLE,
    VALIDATION,
    NodeBits,
    emitted_nodes,
    mapped_nodes,
    unmapped_nodes,
)
from raqu_onnx.config import OptimizeConfig
from raqu_onnx.cpu import saturating, saturation_warning
from raqu_onnx.earlier import with_earlier_settings
from raqu_onnx.emitted_bits import bits_by_node, dropped_by_node, mean_bits
from raqu_onnx.errors import CheckError, naming_model
from raqu_onnx.evaluation import Reference, make_session, run_batches
from raqu_onnx.hardware import Chip, load_chip
from raqu_onnx.inspection import place_anyway
from raqu_onnx.lossless import lossless_in_file
from raqu_onnx.manifest_stages import execution_order
from raqu_onnx.metrics import parse_metric
from raqu_onnx.model_cost import Flow, placement_cost
from raqu_onnx.model_io import load_model, model_digest, save_model
from raqu_onnx.output import check_output, staged_folder
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.passes.write_manifest import MANIFEST_FILE, MODEL_FILE
from raqu_onnx.pipeline import Resources, build_pipeline, run_pipeline
from raqu_onnx.report_files import write_reports
from raqu_onnx.results import Figures, OptimizeResult, in_memory
from raqu_onnx.run_data import RunData, open_run_data
from raqu_onnx.search import SearchRun, no_progress
from raqu_onnx.search_control import open_journal, open_pool, search_warnings
from raqu_onnx.session_model import session_model
from raqu_onnx.simulation import Simulator
from raqu_onnx.tiling import Matrix

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx

    from raqu_onnx.data import DataSource
    from raqu_onnx.evaluation import Score
    from raqu_onnx.hardware import Sharing
    from raqu_onnx.manifest_entries import CostEntry
    from raqu_onnx.placement import Placement
    from raqu_onnx.quantizer import ModelQuantizer
    from raqu_onnx.search import ProgressCallback, SearchResult, UniformBaseline

__all__ = ["optimize"]

_DUMPS = "dumps"


def optimize(
    model: str | Path | onnx.ModelProto | ir.Model,
    output: str | Path | None = None,
    *,
    calibration: DataSource | None = None,
    selection: DataSource | None = None,
    evaluation: DataSource | None = None,
    chip: Chip | str | None = None,
    config: OptimizeConfig | None = None,
    exclude: Iterable[str] = (),
    keep: Iterable[str] = (),
    force: bool = False,
    resume: bool = False,
    progress: ProgressCallback = no_progress,
    **settings: Any,
) -> OptimizeResult:
    """Quantize a model for a chip, map it, and write model, manifest and report into a folder.

    Args:
        model: Path, or a model in memory, which is not changed.
        output: Folder to write; with None here and in `config` nothing is written, and the emitted model is in memory.
        calibration: Inputs that ranges are measured on; wins over `config`, like the next ones. Without any, synthetic
            inputs are used and the result says so.
        selection: Data that widths are chosen on; without any, a part of the calibration data is set aside.
        evaluation: Data that the result is reported on.
        chip: A chip, the name of a built-in one, or a TOML file.
        config: Settings.
        exclude: Patterns of nodes that stay as they are: names, operator types or regular expressions.
        keep: Patterns of nodes that keep 8 bits, and `first` or `last`.
        force: Replace files of an earlier run in `output`, and what an unfinished one has judged.
        resume: Go on with a search for the same `output` that was stopped, or make one that ended longer; the result is
            that of a run that never stopped.
        progress: Told of every step of long passes.
        settings: Any other field of `OptimizeConfig`, which wins over `config`: ``weight_bits=(2, 8), seed=1``.

    Returns:
        The figures of float, baselines and ours, the search, all checks, and the emitted model: `result.model` for
        onnx_ir, `result.proto` as a message.

    Raises:
        RaquError: Model, chip, data, settings or output are not usable; nothing has been written but, where the disk
            was full, what was judged, for `resume`. That is kept too when the run is interrupted.
    """
    # Loaded before the limit below, which reaches only libraries that are in memory: scipy has a BLAS of its own.
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_limits

    run_settings = _with_settings(config or OptimizeConfig(), exclude, keep, settings).given(
        model=model,
        hw=chip.name if isinstance(chip, Chip) else chip,
        calibration=calibration,
        selection=selection,
        evaluation=evaluation,
    )
    run_settings, earlier = with_earlier_settings(run_settings)
    folder = _path(output or run_settings.output)
    path = model if isinstance(model, str | Path) else None
    with open_journal(folder, run_settings, resume=resume, force=force) as journal:
        if folder is not None:
            replaced = force or (journal is not None and journal.is_unfinished)
            check_output(folder, force=replaced, source=_path(path))
        # Many small matrix products: threads of BLAS and onnxruntime would fight for the same cores.
        with naming_model(model), threadpool_limits(1, user_api="blas"), staged_folder(folder) as staging:
            loaded = load_model(model)
            hardware = chip if isinstance(chip, Chip) else load_chip(chip or run_settings.hw)
            data = open_run_data(loaded, run_settings, calibration, selection, evaluation)
            digest = None if path is None else model_digest(path, loaded)
            known = None
            if earlier is not None:
                known = earlier.known(run_settings.choose, digest, hardware, data)
                earlier.copy_journal(staging)
            with open_pool(run_settings, staging.parent / "judging") as (run_settings, pool):
                how = SearchRun(journal, run_settings.timeout, run_settings.cache, pool, known)
                resources = Resources(hardware, data.calibration, data.selection, staging, digest, progress, how)
                return _Run(loaded, run_settings, resources, data).execute(folder)


def _with_settings(
    config: OptimizeConfig, exclude: Iterable[str], keep: Iterable[str], settings: dict[str, Any]
) -> OptimizeConfig:
    """The settings with those given as arguments over them.

    Raises:
        ConfigError: One of them is unknown or wrong.
    """
    given = {**settings}
    for key, patterns in (("exclude", exclude), ("keep", keep)):
        if patterns:
            given[key] = patterns if isinstance(patterns, str) else tuple(patterns)
    checked = OptimizeConfig(**given)
    return config.model_copy(update={name: getattr(checked, name) for name in checked.model_fields_set})


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


class _Run:
    """One run of the pipeline and what is asked of it afterwards."""

    def __init__(self, model: ir.Model, settings: OptimizeConfig, resources: Resources, data: RunData) -> None:
        self.model = model
        self.settings = settings
        self.resources = resources
        self.data = data

    def execute(self, folder: Path | None) -> OptimizeResult:
        passes = build_pipeline(self.settings, self.resources)
        staging = self.resources.folder
        before = self.model.clone()
        model, timings = run_pipeline(
            self.model,
            passes,
            dump_after=self.settings.dump_after,
            dumps=staging / _DUMPS,
            progress=self.resources.progress,
        )
        validation = VALIDATION.get(model)
        if validation is not None and not validation.passed:
            failed = "; ".join(f"{check.name}: {check.detail}" for check in validation.failures)
            raise CheckError(f"the emitted files failed their own check, nothing was written: {failed}")
        if not (staging / MODEL_FILE).exists():
            # A pipeline that ends early still yields its model.
            save_model(model, staging / MODEL_FILE)
        figures, levels = self._figures(model, before)
        placement = PLACEMENT.get(model)
        result = OptimizeResult(
            output=folder,
            figures=figures,
            search=SEARCH.get(model),
            validation=validation,
            levels=levels,
            cycles=CYCLES.get(model) or {},
            partitions=PARTITIONS.get(model) or (),
            lower_bound=None if placement is None else placement.lower_bound,
            gap=None if placement is None else placement.gap,
            exact=None if placement is None else placement.exact,
            replicas={} if placement is None else placement.replicas,
            unmapped=tuple((n.name, n.op_type, n.reason) for n in unmapped_nodes(model)),
            warnings=(
                *self.data.warnings,
                *(self.data.label_warnings(figures[0]) if figures else ()),
                *saturation_warning(saturating(emitted_nodes(model))),
                *search_warnings(SEARCH.get(model), self.resources.search_run),
                *([f"no copies were made: {why}"] if (why := NO_COPIES.get(model)) else ()),
            ),
            timings=tuple(timings),
            bits=bits_by_node(model),
            dropped=dropped_by_node(model),
            data=self.data.summary(),
            method=self.settings.method,
            lossless_adc_bits=lossless_in_file(staging / MANIFEST_FILE, map(QUANTIZED.get, model.graph)),
            picked=self.resources.search_run.known is not None,
            kept=tuple((node.name or "", pattern) for node in model.graph if (pattern := KEPT.get(node)) is not None),
            unwritten=in_memory(staging / MODEL_FILE) if folder is None else None,
        )
        if folder is not None:
            write_reports(result.report, staging)
        if (journal := self.resources.search_run.journal) is not None:
            journal.finish(staging)
        return result

    # --- figures ----------------------------------------------------------------------------------------------

    def _figures(self, model: ir.Model, before: ir.Model) -> tuple[tuple[Figures, ...], dict[str, Score]]:
        placement, found = PLACEMENT.get(model), SEARCH.get(model)
        # Without quantized operands in the graph there is nothing of ours to judge.
        if placement is None or any(EMITTED.get(node) is None for node in mapped_nodes(model)):
            return (), {}
        quantizer = QUANTIZER.require(model)
        judge = _Judge(self, before, quantizer)
        rows = [
            Figures(
                "float", None, None, None, None, None,
                None if found is None else found.reference,
                judge.reference_score,
            )
        ]  # fmt: skip
        rows += _baseline_rows(found, judge, quantizer, self.resources.chip, _flow(model, quantizer))
        levels = judge.levels(self.resources.folder / MODEL_FILE)
        weights, activations = mean_bits(model)
        rows += [
            Figures(
                label,
                weights,
                activations,
                placed.crossbars,
                placed.cell_utilization,
                placed.bit_utilization,
                None if found is None else found.chosen.score,
                levels.get("enable-all"),
                COST.get(model) if placed is placement else _cost_of_ours(model, placed),
            )
            for label, placed in _ours(model, placement)
        ]
        return tuple(rows), levels


class _Judge:
    """Scores on the evaluation data; all None without any."""

    def __init__(self, run: _Run, float_model: ir.Model, quantizer: ModelQuantizer) -> None:
        self._dataset = run.data.evaluation
        self._settings = run.settings
        self._quantizer = quantizer
        self._progress = run.resources.progress
        self._float_model = float_model
        self._reference: Reference | None = None
        self._simulator: Simulator | None = None
        self.reference_score: Score | None = None
        if self._dataset is not None:
            session = make_session(session_model(float_model), threads=run.settings.threads)
            metric = parse_metric(run.settings.metric)
            self._reference = Reference(session, self._dataset, run.settings.batch_size, run.settings.task, metric)
            self.reference_score = self._reference.score

    def uniform(self, baseline: UniformBaseline) -> Score | None:
        """Score of one width for the whole model."""
        if self._dataset is None or self._reference is None:
            return None
        self._progress(f"evaluating uniform {baseline.weight_bits} bits", 0, 1)
        if self._simulator is None:
            nodes = [source.node for source in self._quantizer.sources.values()]
            self._simulator = Simulator(
                _tidied(self._float_model, self._settings.exclude),
                nodes,
                threads=self._settings.threads,
                float_activations=baseline.activation_bits is None,
            )
        weights = baseline.bits.weights
        activations = baseline.bits.activations or (None,) * len(weights)
        bits = (NodeBits(*pair) for pair in zip(weights, activations, strict=True))
        quantized = self._quantizer.quantize_model(dict(zip(self._quantizer.sources, bits, strict=True)))
        batches = self._dataset.batches(self._settings.batch_size)
        return self._reference.judge(self._simulator.stream(quantized, batches))

    def levels(self, path: Path) -> dict[str, Score]:
        """Score of the emitted file at both optimization levels."""
        if self._dataset is None or self._reference is None:
            return {}
        scores: dict[str, Score] = {}
        for level in ("disable-all", "enable-all"):
            self._progress(f"evaluating the emitted model, {level}", 0, 1)
            session = make_session(path, level=level, threads=self._settings.threads)
            scores[level] = self._reference.judge(run_batches(session, self._dataset, self._settings.batch_size))
        return scores


def _tidied(model: ir.Model, exclude: tuple[str, ...]) -> ir.Model:
    tidied: ir.Model = TidyPass(exclude=exclude)(model.clone()).model
    return tidied


def _flow(model: ir.Model, quantizer: ModelQuantizer) -> Flow:
    return Flow(*execution_order(model, quantizer.sources))


def _ours(model: ir.Model, placement: Placement) -> list[tuple[str, Placement]]:
    """What is written, and before it the same weights without copies where there are any."""
    single = SINGLE.get(model)
    return [*([] if single is None else [("ours, one copy", single)]), ("ours", placement)]


def _cost_of_ours(model: ir.Model, placement: Placement) -> CostEntry:
    quantized = [QUANTIZED.require(node) for node in mapped_nodes(model)]
    mvms = {item.node.name: item.node.mvms for item in quantized}
    inputs = {item.node.name: None if item.activation is None else item.activation.bits for item in quantized}
    return placement_cost(placement, mvms, inputs, Flow(*execution_order(model, mvms))).total


def _baseline_rows(
    found: SearchResult | None, judge: _Judge, quantizer: ModelQuantizer, chip: Chip, flow: Flow
) -> list[Figures]:
    if found is None or not found.baselines:
        return []
    baselines = [found.baselines[0]]
    if found.best_uniform is not None and found.best_uniform is not found.baselines[0]:
        baselines.append(found.best_uniform)
    rows: list[Figures] = []
    modes: tuple[tuple[str, Sharing], ...] = (("unpacked", "exclusive"), ("packed", chip.sharing))
    for item in baselines:
        kind = "best uniform" if item is found.best_uniform else "uniform"
        others = set(item.bits.by_node.values()) - {item.weight_bits}
        but = f", kept at {max(others)}" if others else ""
        evaluation = judge.uniform(item)
        sources = zip(quantizer.sources.items(), item.bits.weights, strict=True)
        matrices = {name: Matrix.of(source.node.layout, bits) for (name, source), bits in sources}
        weights = sum(m.weight_bits for m in matrices.values()) / sum(m.rows * m.bits.size for m in matrices.values())
        mvms = {name: source.node.mvms for name, source in quantizer.sources.items()}
        activations = item.bits.activations or (None,) * len(matrices)
        inputs = dict(zip(quantizer.sources, activations, strict=True))
        for label, mode in modes:
            placed, _ = place_anyway(matrices, chip, mode)
            rows.append(
                Figures(
                    f"{kind} {item.weight_bits}-bit{but}, {label}",
                    weights,
                    None if item.bits.activations is None else float(np.mean(item.bits.activations)),
                    placed.crossbars,
                    placed.cell_utilization,
                    placed.bit_utilization,
                    item.score,
                    evaluation,
                    placement_cost(placed, mvms, inputs, flow).total,
                )
            )
    return rows
