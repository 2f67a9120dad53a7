"""The emitted model in the QONNX form, as a file beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from raqu_onnx.annotations import MissingAnnotationError
from raqu_onnx.manifest import read_manifest
from raqu_onnx.model_io import load_model, save_model
from raqu_onnx.output import QONNX_FILE
from raqu_onnx.qonnx_model import qonnx_model
from raqu_onnx.validation import MANIFEST_FILE

__all__ = ["WriteQonnxPass"]


@dataclass(frozen=True)
class WriteQonnxPass(ir.passes.InPlacePass):
    """Write ``model.qonnx.onnx`` beside the emitted model, for tools that read QONNX.

    Before and after: the same graph. The file is made from the written model and manifest, as a stranger would make it.

    Attributes:
        folder: Where ``write-manifest`` wrote.
    """

    name: ClassVar[str] = "write-qonnx"

    folder: Path

    def requires(self, model: ir.Model) -> None:
        """Model and manifest are written."""
        del model
        if not (self.folder / MANIFEST_FILE).exists():
            raise MissingAnnotationError(f"there is no {MANIFEST_FILE}: run the pass write-manifest first")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Write the file."""
        manifest = read_manifest(self.folder / MANIFEST_FILE)
        emitted = load_model(self.folder / manifest.model.file, check_weights=False)
        save_model(qonnx_model(emitted, manifest), self.folder / QONNX_FILE)
        return ir.passes.PassResult(model, modified=False)
