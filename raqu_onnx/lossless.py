"""The ADC resolution that each node needs for no sum to be clipped, whatever its inputs are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raqu_onnx.cells import ProgrammedCells
from raqu_onnx.converters import Adc
from raqu_onnx.manifest import read_manifest
from raqu_onnx.manifest_view import ManifestView
from raqu_onnx.readout import NodeReadout

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from raqu_onnx.quantized import QuantizedNode
    from raqu_onnx.readout import LevelSource

__all__ = ["lossless_adc_bits", "lossless_in_file"]


def lossless_adc_bits(view: ManifestView, cells: LevelSource) -> dict[str, int]:
    """Fewest bits of an ADC that clips with no input, from the cells as they are programmed.

    All wordlines that are read at once are driven with the largest input slice, see `NodeReadout.lossless_bits`.
    Copies of a node hold the same weights, but may be cut in other places: the one that needs most decides.

    Args:
        view: The manifest.
        cells: The levels of its crossbars.

    Returns:
        Bits by node name, of the nodes with a quantized input.
    """
    adc = Adc(None, view.manifest.chip.adc_signed)
    return {
        node.name: max(
            NodeReadout(view, node, cells, replica=copy, adc=adc).lossless_bits()
            for copy in {placement.replica for placement in node.placements} or {0}
        )
        for node in view.manifest.nodes
        if node.activation is not None
    }


def lossless_in_file(path: Path, quantized: Iterable[QuantizedNode | None]) -> dict[str, int]:
    """The same for a manifest that was just written, none where a pipeline ended before that.

    Args:
        path: Where the manifest is, if anywhere.
        quantized: Its nodes; None stands for nodes that are not mapped.
    """
    if not path.exists():
        return {}
    view = ManifestView(read_manifest(path))
    codes = {item.node.name: item.codes for item in quantized if item is not None}
    return lossless_adc_bits(view, ProgrammedCells(view, codes))
