"""What the backend reads: manifest, model and cells, checked as far as running them needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raqu_onnx.backend.partition import activation_of
from raqu_onnx.cells import CellsFile, ProgrammedCells
from raqu_onnx.errors import ManifestError
from raqu_onnx.manifest_view import ManifestView
from raqu_onnx.model_io import load_model
from raqu_onnx.validate_model import EmittedModel, codes_findings
from raqu_onnx.validate_numbers import cell_array_findings
from raqu_onnx.validate_phases import CELLS_FILE, MANIFEST_FILE, MODEL_FILE, FolderChecks
from raqu_onnx.validate_report import Checklist

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.cells import CellSource
    from raqu_onnx.manifest import Manifest

__all__ = ["MappedModel", "assemble", "map_model", "open_folder"]


@dataclass(frozen=True)
class MappedModel:
    """A model, its manifest and its programmed cells.

    Attributes:
        model: The emitted model.
        view: Its manifest.
        codes: Weight codes by node, in the shape of the ONNX tensor.
        cells: The levels.
        name: What messages call it.
    """

    model: ir.Model
    view: ManifestView
    codes: dict[str, NDArray[np.int8]]
    cells: CellSource
    name: str

    @property
    def manifest(self) -> Manifest:
        """The manifest as such."""
        return self.view.manifest


def open_folder(folder: str | Path) -> MappedModel:
    """Read a folder that `optimize` wrote.

    The cells come from `cells.npz`; without it they are programmed from the model's codes.

    Raises:
        ManifestError: A file is missing or damaged, or files do not belong together.
        ModelError: The model cannot be read.
    """
    path = Path(folder)
    for name in (MANIFEST_FILE, MODEL_FILE):
        if not (path / name).is_file():
            raise ManifestError(f"{path / name}: is missing; give the folder that optimize wrote")
    model = load_model(path / MODEL_FILE, check_weights=False)
    checklist = Checklist()
    checks = FolderChecks(path, checklist)
    manifest = checks.read_manifest()
    if manifest is not None:
        checks.check_model_file(manifest)
    _require(checklist, str(folder))
    if manifest is None:
        raise ManifestError(f"{folder}: its manifest cannot be read")
    cells = path / CELLS_FILE
    return map_model(model, manifest, cells if cells.exists() else None, name=str(folder))


def map_model(model: ir.Model, manifest: Manifest, cells: Path | None = None, *, name: str = "model") -> MappedModel:
    """Put a model, its manifest and its cells file together.

    Args:
        model: The emitted model.
        manifest: Its manifest.
        cells: The cells file; without it the cells are programmed from the model's codes.
        name: What errors call it.

    Raises:
        ManifestError: They contradict each other, or the manifest is not executable.
    """
    checklist = Checklist()
    checks = FolderChecks(Path(name), checklist)
    emitted, view = EmittedModel(model, manifest), ManifestView(manifest)
    if checks.check_tables(manifest, model):
        checks.check_placements(manifest, view)
    _require(checklist, name)
    for entry in manifest.nodes:
        activation_of(entry)
    checklist.run("codes.range", codes_findings(emitted, view))
    _require(checklist, name)
    mapped = assemble(emitted, view, cells, name=name)
    if isinstance(mapped.cells, CellsFile):
        checklist.run("cells.arrays", cell_array_findings(manifest, view, mapped.cells))
        _require(checklist, name)
    return mapped


def assemble(emitted: EmittedModel, view: ManifestView, cells: Path | None, *, name: str) -> MappedModel:
    """The same without any check, for files that were checked already.

    Raises:
        ManifestError: The cells file is no `.npz` archive.
    """
    codes = {entry.name: emitted.codes(entry) for entry in emitted.manifest.nodes}
    source: CellSource = ProgrammedCells(view, codes) if cells is None else CellsFile(cells, emitted.manifest)
    return MappedModel(emitted.model, view, codes, source, name)


def _require(checklist: Checklist, name: str) -> None:
    wrong = [check for check in checklist.checks if check.passed is False]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ManifestError(
            f"{name}: {wrong[0].name}: {wrong[0].detail}{more}; `raqu-onnx validate` tells all that is wrong"
        )
