"""The emitted model, its manifest and, on request, its cells, as files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from raqu_onnx.annotations import (
    COST,
    CYCLES,
    EMITTED,
    PARTITIONS,
    PLACEMENT,
    QUANTIZED,
    SEARCH,
    mapped_nodes,
    unmapped_nodes,
)
from raqu_onnx.cells import write_cells
from raqu_onnx.manifest import DataProvenance
from raqu_onnx.manifest_build import ManifestContext, build_manifest
from raqu_onnx.manifest_stages import execution_order
from raqu_onnx.model_io import model_digest, save_model
from raqu_onnx.points import search_entry

__all__ = ["CELLS_FILE", "MANIFEST_FILE", "MODEL_FILE", "WriteManifestPass"]

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
CELLS_FILE = "cells.npz"


@dataclass(frozen=True)
class WriteManifestPass(ir.passes.InPlacePass):
    """Write ``model.onnx``, ``manifest.json`` and, if asked, ``cells.npz`` into a folder.

    Before and after: the same graph. The model gains its cost and the cycles of its nodes.

    Attributes:
        folder: An existing folder.
        configuration: Settings of the run, JSON values, recorded as they are.
        seed: Seed of the run, recorded.
        cells: Also write the level of every programmed cell.
        source_sha256: Digest of the source model, None where it was no file.
        calibration: Where ranges come from, recorded.
        selection: Where widths were chosen, recorded.
    """

    name: ClassVar[str] = "write-manifest"

    folder: Path
    configuration: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    cells: bool = False
    source_sha256: str | None = None
    calibration: DataProvenance | None = None
    selection: DataProvenance | None = None

    def requires(self, model: ir.Model) -> None:
        """The model is quantized, rewritten and placed."""
        PLACEMENT.require(model)
        for node in mapped_nodes(model):
            EMITTED.require(node)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Write the files."""
        path = Path(self.folder) / MODEL_FILE
        save_model(model, path)
        nodes = mapped_nodes(model)
        quantized = tuple(QUANTIZED.require(node) for node in nodes)
        found = SEARCH.get(model)
        order, predecessors = execution_order(model, [item.node.name for item in quantized])
        manifest = build_manifest(
            ManifestContext(
                quantized=quantized,
                emitted={QUANTIZED.require(node).node.name: EMITTED.require(node) for node in nodes},
                placement=PLACEMENT.require(model),
                unmapped=tuple(unmapped_nodes(model)),
                model_sha256=model_digest(path),
                source_sha256=self.source_sha256,
                configuration=self.configuration,
                seed=self.seed,
                order=order,
                predecessors=predecessors,
                calibration=self.calibration,
                selection=self.selection,
                model_file=MODEL_FILE,
                search=None if found is None else search_entry(found),
            )
        )
        COST.set(model, manifest.totals.cost)
        PARTITIONS.set(model, manifest.partitions)
        CYCLES.set(model, {stage.node: stage.cycles for stage in manifest.stages})
        manifest.write(Path(self.folder) / MANIFEST_FILE)
        if self.cells:
            write_cells(Path(self.folder) / CELLS_FILE, manifest, {item.node.name: item.codes for item in quantized})
        return ir.passes.PassResult(model, modified=False)
