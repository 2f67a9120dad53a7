"""Which nodes crossbars compute, and how their weights are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from raqu_onnx.annotations import MAPPED, UNMAPPED
from raqu_onnx.errors import ModelError
from raqu_onnx.mapping import MAPPABLE_OPS, scan

__all__ = ["AnnotateTilingPass"]


@dataclass(frozen=True)
class AnnotateTilingPass(ir.passes.InPlacePass):
    """Annotate every Conv, ConvTranspose, Gemm and MatMul with its matrix, or with the reason why it stays in float.

    Before: ``y = Conv(x, w, b)``

    After: the same graph; the node carries a `MappedNode` in `meta` (groups G, rows K, kernels M, MVMs), or an
    `UnmappedNode` with a reason, which also stands in `metadata_props` under ``raqu.unmapped``.
    """

    name: ClassVar[str] = "annotate-tiling"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Annotate; the graph itself does not change.

        Raises:
            ModelError: There is no node that crossbars could compute.
        """
        mapped, unmapped = scan(model)
        if not mapped:
            reasons = "; ".join(f"{item.name} ({item.op_type}): {item.reason}" for item in unmapped[:3])
            raise ModelError(
                "the model has no node that crossbars can compute: "
                + (reasons or f"it has no {', '.join(MAPPABLE_OPS)}")
            )
        for node, description in mapped:
            MAPPED.set(node, description)
        left = {item.name: item for item in unmapped}
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            found = left.get(node.name or "")
            if found is not None and found.op_type == node.op_type:
                UNMAPPED.set(node, found)
                node.metadata_props["raqu.unmapped"] = found.reason
        return ir.passes.PassResult(model, modified=bool(mapped or unmapped))
