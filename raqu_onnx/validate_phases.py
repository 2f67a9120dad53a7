"""The checks of an output folder in the order in which they build on each other.

A rule that needs others to hold (no range can be expanded that is longer than its axis) is tried only when they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raqu_onnx import validate_graph as graph_side
from raqu_onnx import validate_mapping as mapping
from raqu_onnx import validate_model as onnx_side
from raqu_onnx import validate_numbers as numbers
from raqu_onnx import validate_tables as tables
from raqu_onnx import validate_totals as totals
from raqu_onnx.cells import CellsFile, CellSource, ProgrammedCells
from raqu_onnx.manifest import Manifest, SchemaError, parse_manifest
from raqu_onnx.manifest_view import ManifestView
from raqu_onnx.model_io import model_digest
from raqu_onnx.validate_model import EmittedModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.validate_report import Checklist

__all__ = ["CELLS_FILE", "MANIFEST_FILE", "MODEL_FILE", "FolderChecks"]

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
CELLS_FILE = "cells.npz"


@dataclass(frozen=True)
class FolderChecks:
    """The checks that need no run of the model.

    Attributes:
        folder: The output folder.
        checklist: Takes what is found.
        seed: Seed of the inputs on which MVMs are compared.
    """

    folder: Path
    checklist: Checklist
    seed: int = 0

    def run(self, model: ir.Model) -> Manifest | None:
        """Check the manifest, the model against it, and the cells.

        Returns:
            The manifest, unless it breaks its schema.

        Raises:
            ManifestError: A file is missing or cannot be read.
        """
        manifest = self.read_manifest()
        if manifest is None:
            return None
        self.check_model_file(manifest)
        if not self.check_tables(manifest, model):
            self._skip("placements and cells", "the entries of nodes are damaged")
            return manifest
        view = ManifestView(manifest)
        if not self.check_placements(manifest, view):
            self._skip("cells", "placements are damaged")
            return manifest
        self.check_cells(EmittedModel(model, manifest), view)
        return manifest

    def _skip(self, what: str, reason: str) -> None:
        self.checklist.skip(what, f"not checked: {reason}")

    def read_manifest(self) -> Manifest | None:
        """The manifest, unless it breaks its schema."""
        path = self.folder / MANIFEST_FILE
        try:
            parsed = parse_manifest(path)
        except SchemaError as error:
            self.checklist.run("manifest.schema", [str(error)])
            return None
        self.checklist.run("manifest.schema", (), f"version {parsed.manifest.version}")
        wrong = parsed.digest != parsed.manifest.digest
        text = f"is {parsed.manifest.digest}, the content gives {parsed.digest}: it was changed after it was written"
        self.checklist.run("manifest.digest", [text] if wrong else [], parsed.digest[:12])
        return parsed.manifest

    def check_model_file(self, manifest: Manifest) -> None:
        """The model file is the one that the manifest was written for."""
        found = model_digest(self.folder / MODEL_FILE)
        findings = []
        if manifest.model.file != MODEL_FILE:
            findings.append(f"model.file: is {manifest.model.file}, the model is {MODEL_FILE}")
        if found != manifest.model.sha256:
            findings.append(f"model.sha256: is {manifest.model.sha256}, {MODEL_FILE} has {found}")
        self.checklist.run("model.sha256", findings, found[:12])

    def check_tables(self, manifest: Manifest, model: ir.Model) -> bool:
        """Entries of nodes and encodings, by themselves and against the model."""
        run, emitted = self.checklist.run, onnx_side.EmittedModel(model, manifest)
        nodes = f"{len(manifest.nodes)} nodes"
        good = run("node.names", tables.name_findings(manifest), nodes)
        good &= run("node.matrix", tables.matrix_findings(manifest), nodes)
        good &= run("node.onnx", onnx_side.node_findings(emitted), nodes)
        good &= run("node.attributes", onnx_side.attribute_findings(emitted), nodes)
        good &= run("node.weight", onnx_side.weight_findings(emitted), nodes)
        good &= run("node.activation", tables.activation_findings(manifest), nodes)
        good &= run("node.activation-chain", onnx_side.activation_chain_findings(emitted), nodes)
        run("node.mvms", graph_side.mvms_findings(emitted), nodes)
        run("model.unmapped", graph_side.unmapped_findings(emitted), f"{len(manifest.unmapped)} nodes not on crossbars")
        run("stages.order", graph_side.order_findings(emitted), nodes)
        if not good:
            return False
        good &= run("node.bits", tables.bits_findings(manifest), nodes)
        good &= run("node.rows-not-stored", tables.rows_not_stored_findings(manifest), nodes)
        good &= run("encoding.tables", tables.encoding_findings(manifest), f"{len(manifest.encodings)} crossbar types")
        if not good:
            return False
        run("node.bias", onnx_side.bias_findings(emitted), nodes)
        return run("node.kernel-order", tables.kernel_order_findings(manifest), nodes)

    def check_placements(self, manifest: Manifest, view: ManifestView) -> bool:
        """Placements, stages and totals."""
        run, table = self.checklist.run, mapping.PlacementTable(manifest)
        count = f"{len(table.entries)} placements"
        good = run("placement.bounds", mapping.bounds_findings(table, view), count)
        if not good:
            return False
        good &= run("placement.shape", mapping.shape_findings(table, view), count)
        good &= run("placement.polarity", mapping.polarity_findings(table, view), count)
        good &= run("placement.coverage", mapping.coverage_findings(table, view), count)
        good &= run("placement.overlap", mapping.overlap_findings(table), count)
        run("placement.sharing", mapping.sharing_findings(table), manifest.sharing)
        run("placement.partial-sums", mapping.partial_sum_findings(table), count)
        run("placement.turns", mapping.turn_findings(table), count)
        staged = run("stages.nodes", totals.stage_findings(manifest, table), f"{len(manifest.stages)} stages")
        counted = run("totals.crossbars", totals.crossbar_findings(table), _crossbars(manifest))
        if counted:
            run("totals.figures", totals.totals_findings(table, view), _utilization(manifest))
        parts = f"{len(manifest.partitions)} partition{'s' if len(manifest.partitions) > 1 else ''}"
        if counted and staged and run("stages.partitions", totals.partition_findings(table), parts):
            run("totals.cost", totals.cost_findings(manifest), f"{manifest.totals.cost.latency_cycles or '?'} cycles")
        return good

    def check_cells(self, emitted: EmittedModel, view: ManifestView) -> None:
        """Codes, flipped columns and, from the cells, codes again and MVMs."""
        run, manifest = self.checklist.run, emitted.manifest
        codes = {entry.name: emitted.codes(entry) for entry in manifest.nodes}
        total = sum(array.size for array in codes.values())
        if not run("codes.range", onnx_side.codes_findings(emitted, view), f"{total} codes"):
            self._skip("cells", "codes leave their range")
            return
        rule = "by the chip's rule" if manifest.chip.flip else "none"
        run("placement.flipped", numbers.flip_findings(view, codes), rule)
        path = self.folder / CELLS_FILE
        if not path.exists():
            self._check_arithmetic(emitted, view, codes, ProgrammedCells(view, codes), "cells programmed here")
            return
        with CellsFile(path, manifest) as cells:
            if not run("cells.arrays", numbers.cell_array_findings(manifest, view, cells), f"{len(cells.keys)} arrays"):
                self._skip("cells", "arrays of the cells file are damaged")
                return
            run("cells.unused", numbers.unused_cell_findings(manifest, view, cells), CELLS_FILE)
            self._check_arithmetic(emitted, view, codes, cells, CELLS_FILE)

    def _check_arithmetic(
        self,
        emitted: EmittedModel,
        view: ManifestView,
        codes: Mapping[str, NDArray[np.int8]],
        cells: CellSource,
        source: str,
    ) -> None:
        run = self.checklist.run
        run("cells.codes", numbers.stored_code_findings(view, codes, cells), f"{source}, against {MODEL_FILE}")
        run("cells.mvm", numbers.mvm_findings(emitted, view, codes, cells, self.seed), f"{source}, against onnxruntime")


def _crossbars(manifest: Manifest) -> str:
    return ", ".join(f"{total.allocated} {total.name}" for total in manifest.totals.crossbars)


def _utilization(manifest: Manifest) -> str:
    cells, bits = manifest.totals.cell_utilization, manifest.totals.bit_utilization
    if not cells.denominator:
        return "no crossbars"
    return f"cells {cells.numerator}/{cells.denominator}, bits {bits.numerator}/{bits.denominator}"
