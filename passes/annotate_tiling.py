"""Which nodes crossbars compute, and how their weights are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from raqu_onnx.already_quantized import check_float, quantized_nodes
from raqu_onnx.annotations import INPUT, KEPT, MAPPED, UNMAPPED
from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.errors import ConfigError, ModelError
from raqu_onnx.manifest_stages import execution_order
from raqu_onnx.mapping import MAPPABLE_OPS, UnmappedNode, scan
from raqu_onnx.selection import FIRST, ends, excluded_reason, select

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from raqu_onnx.layout import MappedNode

__all__ = ["AnnotateTilingPass"]


@dataclass(frozen=True)
class AnnotateTilingPass(ir.passes.InPlacePass):
    """Annotate every Conv, ConvTranspose, Gemm and MatMul with its matrix, or with the reason why it stays in float.

    Before: ``y = Conv(x, w, b)``

    After: the same graph; the node carries a `MappedNode` in `meta` (groups G, rows K, kernels M, MVMs), or an
    `UnmappedNode` with a reason, which also stands in `metadata_props` under ``raqu.unmapped``.

    Attributes:
        exclude: Patterns of nodes that stay as they are: names, operator types, regular expressions.
        keep: Patterns of mapped nodes that keep 8 bits; ``first`` and ``last`` mean those at the ends of the graph.
        input_bits: Width of the model's own inputs; refused where every node that reads them is kept.
    """

    name: ClassVar[str] = "annotate-tiling"

    exclude: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    input_bits: int = MAX_BITS

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Annotate; the graph itself does not change.

        Raises:
            ConfigError: A pattern means no node, or `input_bits` has no effect.
            ModelError: The model is quantized already, or has no node that crossbars could compute.
        """
        mapped, unmapped = scan(model)
        operators = {node.name or "": node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)}
        excluded = self._excluded(model, operators, [*(item for _, item in mapped), *unmapped])
        check_float(model, excluded)
        mapped = [(node, item) for node, item in mapped if item.name not in excluded]
        left = {item.name: item for item in unmapped if item.name not in excluded}
        quantized = {node.name for node in quantized_nodes(model)}
        left.update(
            (name, UnmappedNode(name, operators[name], excluded_reason(pattern, quantized=name in quantized)))
            for name, pattern in excluded.items()
        )
        _require_mapped(mapped, list(left.values()))
        for node, description in mapped:
            MAPPED.set(node, description)
        self._mark(model, mapped, left, operators)
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            found = left.get(node.name or "")
            if found is not None and found.op_type == node.op_type:
                UNMAPPED.set(node, found)
                node.metadata_props["raqu.unmapped"] = found.reason
        return ir.passes.PassResult(model, modified=bool(mapped or left))

    def _excluded(
        self, model: ir.Model, operators: dict[str, str], seen: Sequence[MappedNode | UnmappedNode]
    ) -> dict[str, str]:
        """Pattern by name of every node that the user excludes."""
        candidates = {item.name for item in seen} | {node.name or "" for node in quantized_nodes(model)}
        return select(
            "--exclude",
            self.exclude,
            {name: operator for name, operator in operators.items() if name in candidates},
            others={name: operator for name, operator in operators.items() if name not in candidates},
            unfit="never go into crossbars",
        )

    def _mark(
        self,
        model: ir.Model,
        mapped: Sequence[tuple[ir.Node, MappedNode]],
        left: Iterable[str],
        operators: dict[str, str],
    ) -> None:
        """Mark the nodes that read the model's own inputs, and those that are kept."""
        names = {item.name: item.op_type for _, item in mapped}
        words = ends(execution_order(model, names)[1])
        # A layer in float gives activations like any other.
        reading = ends(execution_order(model, [*names, *left])[1])[FIRST]
        kept = select(
            "--keep",
            self.keep,
            names,
            words=words,
            others={name: operator for name, operator in operators.items() if name not in names},
            unfit="are not on crossbars",
        )
        self._require_inputs({item.name for _, item in mapped if item.name in reading}, kept)
        for node, item in mapped:
            if item.name in reading:
                INPUT.set(node, True)
            if item.name in kept:
                KEPT.set(node, kept[item.name])

    def _require_inputs(self, reading: Collection[str], kept: Mapping[str, str]) -> None:
        """Make sure that a width for the model's own inputs has a node to be used in."""
        if self.input_bits == MAX_BITS or not reading or not all(name in kept for name in reading):
            return
        patterns = ", ".join(dict.fromkeys(kept[name] for name in kept if name in reading))
        raise ConfigError(
            f"--input-bits: every node that reads the model's own inputs keeps {MAX_BITS} bits (--keep {patterns}); "
            "leave one of the two out"
        )


def _require_mapped(mapped: Sequence[object], unmapped: Sequence[UnmappedNode]) -> None:
    if mapped:
        return
    reasons = "; ".join(f"{item.name} ({item.op_type}): {item.reason}" for item in unmapped[:3])
    raise ModelError(
        "the model has no node that crossbars can compute: " + (reasons or f"it has no {', '.join(MAPPABLE_OPS)}")
    )
