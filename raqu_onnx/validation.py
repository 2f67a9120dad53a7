"""Re-reads an output folder as a stranger would and checks everything that it promises.

Nothing is taken from the run that wrote it: the model, the manifest and, where there is one, the cells file are read
from disk, and each rule is checked by its own arithmetic. Then the model runs at both onnxruntime optimization levels.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.backend.folder import assemble
from raqu_onnx.cpu import may_saturate, saturation_warning
from raqu_onnx.data import InputSpec, open_dataset, synthetic_dataset
from raqu_onnx.errors import DataError, ManifestError, ModelError
from raqu_onnx.evaluation import default_threads, make_session
from raqu_onnx.manifest import SchemaError, parse_manifest
from raqu_onnx.manifest_view import ManifestView, layout_of
from raqu_onnx.model_io import load_model, model_digest, model_inputs
from raqu_onnx.validate_backend import check_crossbars
from raqu_onnx.validate_model import EmittedModel
from raqu_onnx.validate_phases import CELLS_FILE, MANIFEST_FILE, MODEL_FILE, FolderChecks
from raqu_onnx.validate_qonnx import check_qonnx
from raqu_onnx.validate_report import Check, Checklist, ValidationReport
from raqu_onnx.validate_runs import LevelRuns

if TYPE_CHECKING:
    import onnx_ir as ir

    from raqu_onnx.data import Dataset, DataSource
    from raqu_onnx.manifest import Manifest
    from raqu_onnx.scoring import Score, Task
    from raqu_onnx.search import ProgressCallback

__all__ = ["CELLS_FILE", "MANIFEST_FILE", "MODEL_FILE", "Check", "ValidationReport", "task_of", "validate"]

# Generated samples that the model runs on where no data is given.
_SAMPLES = 4


def validate(
    out_dir: str | Path,
    dataset: DataSource | None = None,
    *,
    reference: str | Path | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> ValidationReport:
    """Check an output folder.

    Args:
        out_dir: Holds `model.onnx`, `manifest.json` and perhaps `cells.npz`.
        dataset: Evaluation data; generated inputs where it is None, which give no scores.
        reference: The float model, for fidelity; must be the one that the manifest names.
        threads: Threads of onnxruntime, default all that this process may use.
        seed: Seed of generated inputs.
        progress: Told of every rule and batch.

    Returns:
        Every rule with what was found.

    Raises:
        ManifestError: The manifest or cells file is missing or cannot be read.
        ModelError: A model is missing or cannot be read.
        DataError: The data does not fit the model.
    """
    folder = Path(out_dir)
    if not folder.is_dir():
        raise ManifestError(f"{out_dir}: is not a folder; give the folder that optimize wrote")
    for name in (MANIFEST_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise ManifestError(f"{folder / name}: is missing; give the folder that optimize wrote")
    model = _emitted_model(folder)
    data = None if dataset is None else open_dataset(dataset, model_inputs(model))
    checklist = Checklist(progress)
    manifest = FolderChecks(folder, checklist, seed).run(model)
    if reference is not None and manifest is not None:
        _check_reference(manifest, Path(reference), checklist)
    sound = all(check.passed is not False for check in checklist.checks)
    # Codes are read from the model where nothing is wrong with it.
    saturating = _saturating(EmittedModel(model, manifest)) if sound and manifest is not None else []
    if sound and manifest is not None:
        check_qonnx(folder, model, manifest, checklist)
    feeds = data or _generated(model, seed, checklist)
    scores: dict[str, Score] = {}
    if feeds is not None:
        runs = LevelRuns(
            folder / MODEL_FILE,
            checklist,
            threads or default_threads(),
            _smallest_activation(model),
            saturating,
            task_of(manifest),
        )
        held_against = None
        if data is not None and reference is not None:
            _require_alike(Path(reference), model)
            held_against = make_session(reference, threads=threads)
        scores = runs.run(feeds, held_against)
        if sound and manifest is not None and manifest.executable:
            mapped = assemble(EmittedModel(model, manifest), ManifestView(manifest), _cells(folder), name=str(out_dir))
            check_crossbars(
                mapped,
                folder / MODEL_FILE,
                feeds,
                checklist,
                threads=threads or default_threads(),
                activation_bits=_smallest_activation(model),
            )
    return ValidationReport(
        tuple(checklist.checks),
        scores if data is not None else {},
        synthetic=data is None or data.synthetic,
        warnings=tuple(saturation_warning(saturating)),
    )


def _emitted_model(folder: Path) -> ir.Model:
    """The model of the folder.

    Raises:
        ModelError: It cannot be read; says that it was changed, where its digest is not the manifest's.
    """
    path = folder / MODEL_FILE
    try:
        return load_model(path, check_weights=False)
    except ModelError as error:
        # Of a model with external data the digest is that of several files: the one of the first is another anyhow.
        with contextlib.suppress(OSError, SchemaError, ManifestError), path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            expected = parse_manifest(folder / MANIFEST_FILE).manifest.model.sha256
            if found != expected:
                raise ModelError(
                    f"{path}: was changed or damaged after it was written: model.sha256 in {MANIFEST_FILE} is "
                    f"{expected}, the file has {found} ({str(error).removeprefix(f'{path}: ')})"
                ) from error
        raise


def _cells(folder: Path) -> Path | None:
    path = folder / CELLS_FILE
    return path if path.exists() else None


def _require_alike(reference: Path, model: ir.Model) -> None:
    """Make sure that the float model takes and gives what the emitted model does.

    Raises:
        ModelError: It does not, so it is another model.
    """
    given = load_model(reference, check_weights=False)
    for what, theirs, ours in (
        ("takes", model_inputs(given), model_inputs(model)),
        ("gives", [output.name for output in given.graph.outputs], [output.name for output in model.graph.outputs]),
    ):
        # What free dimensions are called does not matter.
        if [_without_free_dimensions(item) for item in theirs] != [_without_free_dimensions(item) for item in ours]:
            their_text, our_text = (", ".join(map(str, items)) for items in (theirs, ours))
            raise ModelError(
                f"{reference}: it {what} {their_text}, the model in the folder {our_text}; give the float model that "
                "was optimized as --reference"
            )


def _without_free_dimensions(item: InputSpec | str | None) -> object:
    return (item.name, item.dtype, item.fixed_shape) if isinstance(item, InputSpec) else item


def _check_reference(manifest: Manifest, reference: Path, checklist: Checklist) -> None:
    expected = manifest.model.source_sha256
    found = model_digest(reference)
    if expected is None:
        checklist.skip("reference.sha256", "not checked: the manifest names no source model")
        return
    text = f"{reference}: is not the source model: it has {found}, model.source_sha256 is {expected}"
    checklist.run("reference.sha256", [] if found == expected else [text], found[:12])


def _generated(model: ir.Model, seed: int, checklist: Checklist) -> Dataset | None:
    try:
        return synthetic_dataset(model_inputs(model), _SAMPLES, seed)
    except DataError as error:
        checklist.skip("run", f"not run: {error}")
        return None


def _saturating(emitted: EmittedModel) -> list[str]:
    """Nodes whose sums may saturate on some CPUs."""
    names = []
    for entry, _ in emitted.pairs():
        levels = None if entry.activation is None else (1 << entry.activation.bits) - 1
        if may_saturate(emitted.codes(entry), layout_of(entry.matrix), levels):
            names.append(entry.name)
    return names


def task_of(manifest: Manifest | None) -> Task:
    """What the run that wrote the folder took the outputs for."""
    match None if manifest is None else manifest.configuration.get("task"):
        case "classification":
            return "classification"
        case "regression":
            return "regression"
        case _:
            return "auto"


def _smallest_activation(model: ir.Model) -> int:
    """Fewest bits that the model clips an activation to."""
    from raqu_onnx.graph_edit import constant_array

    fewest = 8
    for node in model.graph:
        bound = constant_array(node.inputs[2]) if node.op_type == "Clip" and len(node.inputs) > 2 else None
        if bound is not None and bound.dtype == np.uint8:
            fewest = min(fewest, int(bound).bit_length())
    return fewest
