"""Re-reads an output folder as a stranger would and checks everything that it promises.

Nothing is taken from the run that wrote it: the model, the manifest and, where there is one, the cells file are read
from disk, and each rule is checked by its own arithmetic. Then the model runs at both onnxruntime optimization levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.data import open_dataset, synthetic_dataset
from raqu_onnx.errors import DataError, ManifestError, ModelError
from raqu_onnx.evaluation import collect, default_threads, make_session, score
from raqu_onnx.model_io import load_model, model_digest, model_inputs
from raqu_onnx.validate_phases import CELLS_FILE, MANIFEST_FILE, MODEL_FILE, FolderChecks
from raqu_onnx.validate_report import Check, Checklist, ValidationReport

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from raqu_onnx.data import Dataset, DataSource
    from raqu_onnx.evaluation import Level, Outputs, Score
    from raqu_onnx.manifest import Manifest

__all__ = ["CELLS_FILE", "MANIFEST_FILE", "MODEL_FILE", "Check", "ValidationReport", "validate"]

_LEVELS: tuple[Level, ...] = ("disable-all", "enable-all")
# Generated samples that the model runs on where no data is given.
_SAMPLES = 4


def validate(
    out_dir: str | Path,
    dataset: DataSource | None = None,
    *,
    reference: str | Path | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> ValidationReport:
    """Check an output folder.

    Args:
        out_dir: Holds `model.onnx`, `manifest.json` and perhaps `cells.npz`.
        dataset: Evaluation data; generated inputs where it is None, which give no scores.
        reference: The float model, for fidelity; must be the one that the manifest names.
        threads: Threads of onnxruntime, default all that this process may use.
        seed: Seed of generated inputs.

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
    model = load_model(folder / MODEL_FILE, check_weights=False)
    data = None if dataset is None else open_dataset(dataset, model_inputs(model))
    checklist = Checklist()
    manifest = FolderChecks(folder, checklist, seed).run(model)
    if reference is not None and manifest is not None:
        _check_reference(manifest, Path(reference), checklist)
    runs = _Runs(folder / MODEL_FILE, checklist, threads or default_threads(), _smallest_activation(model))
    outputs = runs.run(data or _generated(model, seed, checklist))
    scores: dict[str, Score] = {}
    if data is not None:
        baseline = None
        if reference is not None:
            baseline = collect(make_session(reference, threads=threads), data)
        scores = {level: score(found, baseline) for level, found in outputs.items()}
    return ValidationReport(tuple(checklist.checks), scores, synthetic=data is None or data.synthetic)


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


def _smallest_activation(model: ir.Model) -> int:
    """Fewest bits that the model clips an activation to."""
    from raqu_onnx.graph_edit import constant_array

    fewest = 8
    for node in model.graph:
        bound = constant_array(node.inputs[2]) if node.op_type == "Clip" and len(node.inputs) > 2 else None
        if bound is not None and bound.dtype == np.uint8:
            fewest = min(fewest, int(bound).bit_length())
    return fewest


@dataclass(frozen=True)
class _Runs:
    """Runs of the emitted model at both optimization levels."""

    path: Path
    checklist: Checklist
    threads: int
    activation_bits: int

    def run(self, data: Dataset | None) -> dict[str, Outputs]:
        """Outputs by level."""
        outputs: dict[str, Outputs] = {}
        if data is None:
            return outputs
        for level in _LEVELS:
            try:
                found = collect(make_session(self.path, level=level, threads=self.threads), data)
            except ModelError as error:
                self.checklist.run(f"run.{level}", [str(error)])
                continue
            except DataError as error:
                if not data.synthetic:
                    raise
                self.checklist.skip(f"run.{level}", f"not run: {error}; give data")
                continue
            detail = f"{found.samples} samples of {data.name}, {self.threads} threads"
            self.checklist.run(f"run.{level}", _not_finite(found), detail)
            outputs[level] = found
        if len(outputs) == len(_LEVELS):
            self._compare(*(outputs[level] for level in _LEVELS))
        return outputs

    def _compare(self, slow: Outputs, fast: Outputs) -> None:
        """Both levels agree.

        Fused kernels round a small share of requantized values (measured: up to 0.2 %) to the neighbouring step, so
        outputs are not equal to the last bit, and one step of a narrow activation is large. Saturated sums or a lost
        bias show as errors of the size of the outputs themselves. The share of noise that is let pass is 2 % of the
        outputs' size for 8-bit activations, twice that for each bit less, and never more than half.
        """
        allowed = min(0.5, 0.02 * 2 ** (8 - self.activation_bits))
        findings, details = [], []
        for name, one, other in zip(slow.names, slow.outputs, fast.outputs, strict=True):
            if one.shape != other.shape:
                findings.append(f"output {name}: shapes {one.shape} and {other.shape}")
                continue
            if not np.issubdtype(one.dtype, np.floating) or not one.size:
                continue
            masked = np.isneginf(one)
            if not np.array_equal(masked, np.isneginf(other)):
                findings.append(f"output {name}: the two levels mask different values with -inf")
                continue
            a, b = one[~masked].astype(np.float64), other[~masked].astype(np.float64)
            if not (a.size and np.isfinite(a).all() and np.isfinite(b).all()):
                continue  # a finding of its own
            size, noise = float(np.sqrt(np.mean(a**2))), float(np.sqrt(np.mean((a - b) ** 2)))
            span = float(a.max() - a.min()) or 1.0
            steps = float(np.abs(a - b).max()) / (span / 255)
            text = f"output {name}: differ by up to {steps:.3g} of 255 steps of the output range"
            details.append(text)
            if noise > allowed * size:
                share = noise / size if size else np.inf
                findings.append(f"{text}, by {share:.3f} of its size; allowed is {allowed:.2f}")
        self.checklist.run("run.levels-agree", findings, "; ".join(details))


def _not_finite(outputs: Outputs) -> Iterator[str]:
    for name, array in zip(outputs.names, outputs.outputs, strict=True):
        if not np.issubdtype(array.dtype, np.floating):
            continue
        # Minus infinity is what masks put into scores; nothing else is meant to be infinite.
        broken = int((~np.isfinite(array) & ~np.isneginf(array)).sum())
        if broken:
            yield f"output {name}: {broken} values are not finite"
