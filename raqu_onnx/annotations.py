"""Typed access to what passes leave on nodes and on the model.

Python objects live in `meta` while the pipeline runs; what a reader of the ONNX file needs is written to
`metadata_props` as strings under the prefix `raqu.`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.data import Dataset
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.manifest_entries import CostEntry, PartitionEntry
    from raqu_onnx.mapping import UnmappedNode
    from raqu_onnx.placement import Placement
    from raqu_onnx.quantized import EmittedNames, QuantizedNode
    from raqu_onnx.quantizer import ModelQuantizer
    from raqu_onnx.search import SearchResult
    from raqu_onnx.statistics import Histogram, InputMoments
    from raqu_onnx.validation import ValidationReport

__all__ = [
    "BITS",
    "CALIBRATION",
    "COST",
    "CYCLES",
    "EMITTED",
    "HISTOGRAM",
    "INPUT",
    "KEPT",
    "MAPPED",
    "METADATA_PREFIX",
    "MOMENTS",
    "NO_COPIES",
    "PARTITIONS",
    "PLACEMENT",
    "PROTECTED",
    "QUANTIZED",
    "QUANTIZER",
    "SEARCH",
    "SINGLE",
    "UNMAPPED",
    "VALIDATION",
    "Annotation",
    "NodeBits",
    "emitted_nodes",
    "mapped_nodes",
    "unmapped_nodes",
]

METADATA_PREFIX = "raqu."

T = TypeVar("T")


class _HasMeta(Protocol):
    @property
    def meta(self) -> MutableMapping[str, object]: ...


class MissingAnnotationError(LookupError):
    """A pass needs what another one has not yet written."""


@dataclass(frozen=True)
class Annotation(Generic[T]):
    """A key under which one type of object is kept in `meta` of a node or a model.

    Attributes:
        key: Name in `meta`, behind the prefix `raqu.`.
        writer: The pass that writes it.
    """

    key: str
    writer: str

    def get(self, holder: _HasMeta) -> T | None:
        """The object, or None."""
        return cast("T | None", holder.meta.get(METADATA_PREFIX + self.key))

    def require(self, holder: _HasMeta) -> T:
        """The object.

        Raises:
            MissingAnnotationError: The pass that writes it has not run.
        """
        found = self.get(holder)
        if found is None:
            raise MissingAnnotationError(f"no {self.key} annotation: run the pass {self.writer} first")
        return found

    def set(self, holder: _HasMeta, value: T) -> None:
        """Keep an object."""
        holder.meta[METADATA_PREFIX + self.key] = value


@dataclass(frozen=True)
class NodeBits:
    """The widths of one mapped node.

    Attributes:
        weight: Bits of all kernels, or per entry of the scale axis.
        activation: Bits of the node's input, None to leave it float.
    """

    weight: int | tuple[int, ...]
    activation: int | None

    def channel_bits(self, channels: int) -> NDArray[np.int64]:
        """Weight bits per entry of the scale axis, shape (channels,)."""
        return np.broadcast_to(np.asarray(self.weight, np.int64), (channels,)).copy()


MAPPED: Annotation[MappedNode] = Annotation("mapped_node", "annotate-tiling")
UNMAPPED: Annotation[UnmappedNode] = Annotation("unmapped_node", "annotate-tiling")
# The pattern that keeps a mapped node at 8 bits.
KEPT: Annotation[str] = Annotation("kept", "annotate-tiling")
INPUT: Annotation[bool] = Annotation("reads_input", "annotate-tiling")
# Set on nodes that carry somebody else's quantization of a weight: no pass folds them.
PROTECTED: Annotation[bool] = Annotation("protected", "tidy")
HISTOGRAM: Annotation[Histogram] = Annotation("histogram", "calibrate")
MOMENTS: Annotation[InputMoments] = Annotation("moments", "calibrate")
QUANTIZER: Annotation[ModelQuantizer] = Annotation("quantizer", "calibrate")
CALIBRATION: Annotation[Dataset] = Annotation("calibration", "calibrate")
BITS: Annotation[NodeBits] = Annotation("bits", "search-bits")
SEARCH: Annotation[SearchResult] = Annotation("search", "search-bits")
QUANTIZED: Annotation[QuantizedNode] = Annotation("quantized_node", "quantize-weights")
EMITTED: Annotation[EmittedNames] = Annotation("emitted_names", "insert-qdq")
PLACEMENT: Annotation[Placement] = Annotation("placement", "place-crossbars")
# The placement with one copy of each node, where the other one has more.
SINGLE: Annotation[Placement] = Annotation("single_placement", "place-crossbars")
# Why there are no copies where they were wanted.
NO_COPIES: Annotation[str] = Annotation("no_copies", "place-crossbars")
PARTITIONS: Annotation[tuple[PartitionEntry, ...]] = Annotation("partitions", "write-manifest")
COST: Annotation[CostEntry] = Annotation("cost", "write-manifest")
# Cycles of one inference by node, None where unknown.
CYCLES: Annotation[dict[str, int | None]] = Annotation("cycles", "write-manifest")
VALIDATION: Annotation[ValidationReport] = Annotation("validation", "check")


def mapped_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes that crossbars compute, in graph order.

    Raises:
        MissingAnnotationError: No node is annotated.
    """
    nodes = [node for node in model.graph if MAPPED.get(node) is not None]
    if not nodes:
        raise MissingAnnotationError("no node is mapped: run the pass annotate-tiling first")
    return nodes


def emitted_nodes(model: ir.Model) -> list[QuantizedNode]:
    """What was written into the graph, in its order."""
    found = (QUANTIZED.get(node) for node in model.graph if EMITTED.get(node) is not None)
    return [item for item in found if item is not None]


def unmapped_nodes(model: ir.Model) -> list[UnmappedNode]:
    """Nodes of mappable types that stay as they are, with the reasons."""
    import onnx_ir as ir

    found = (UNMAPPED.get(node) for node in ir.traversal.RecursiveGraphIterator(model.graph))
    return [node for node in found if node is not None]
