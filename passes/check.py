"""The written files, read back and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from raqu_onnx.annotations import VALIDATION, MissingAnnotationError
from raqu_onnx.validation import MANIFEST_FILE, validate

if TYPE_CHECKING:
    from raqu_onnx.data import Dataset

__all__ = ["CheckPass"]


@dataclass(frozen=True)
class CheckPass(ir.passes.InPlacePass):
    """Validate a folder as a stranger would, who has nothing but its files.

    Before and after: the same graph. The model gains a `ValidationReport`.

    Attributes:
        folder: Where ``write-manifest`` wrote.
        dataset: Inputs to run the emitted model on, None for random ones.
        threads: Threads for onnxruntime, None for all.
    """

    name: ClassVar[str] = "check"

    folder: Path
    dataset: Dataset | None = None
    threads: int | None = None

    def requires(self, model: ir.Model) -> None:
        """The files are written."""
        del model
        if not (self.folder / MANIFEST_FILE).exists():
            raise MissingAnnotationError(f"there is no {MANIFEST_FILE}: run the pass write-manifest first")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Check; nothing is changed.

        Raises:
            ManifestError: A file is missing or cannot be read.
        """
        VALIDATION.set(model, validate(self.folder, self.dataset, threads=self.threads))
        return ir.passes.PassResult(model, modified=False)
