"""Integer codes and scales for the weights of every mapped node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from raqu_onnx.annotations import (
    BITS,
    CALIBRATION,
    HISTOGRAM,
    INPUT,
    KEPT,
    MAPPED,
    MOMENTS,
    QUANTIZED,
    QUANTIZER,
    NodeBits,
    mapped_nodes,
)
from raqu_onnx.channel_flow import channel_flows
from raqu_onnx.dropping import DropRules
from raqu_onnx.encodings import MAX_BITS, SignedEncoding
from raqu_onnx.quantizer import ModelQuantizer, NodeSource, QuantizerSettings
from raqu_onnx.ranges import RangeMethod
from raqu_onnx.weights import FitPart, WeightMethod

__all__ = ["QuantizeWeightsPass", "build_quantizer"]


@dataclass(frozen=True)
class QuantizeWeightsPass(ir.passes.InPlacePass):
    """Fit the weights of every mapped node to the bits that the search, or the options here, gave it.

    Before and after: the same graph. Every mapped node gains a `QuantizedNode` with INT8 codes, one scale per
    kernel, INT32 bias codes and the quantizer of its input.

    Attributes:
        encoding: Signed encoding of the chip, which sets the range of codes.
        weight_bits: Width of nodes that no search gave bits to and that are not kept.
        activation_bits: Width of the inputs of such nodes, None for float.
        weight_method: ``nearest``, ``mse``, ``gptq`` or ``sequential``.
        activation_range: ``min-max``, ``percentile``, ``entropy`` or ``mse``.
        fit_samples: Most calibration samples that ``sequential`` fits on.
        fit_without: Parts of the weight method to leave out, see `raqu_onnx.weights`.
        threads: Threads for onnxruntime, None for all.
        kept_weight_bits: Width of nodes that are kept where there was no search; their inputs have 8 bits.
        input_bits: Width of the model's own inputs where there was no search.
    """

    name: ClassVar[str] = "quantize-weights"

    encoding: SignedEncoding = "offset"
    weight_bits: int = 8
    activation_bits: int | None = 8
    weight_method: WeightMethod = "sequential"
    activation_range: RangeMethod = "mse"
    fit_samples: int = 512
    fit_without: frozenset[FitPart] = frozenset()
    threads: int | None = None
    kept_weight_bits: int = MAX_BITS
    input_bits: int = MAX_BITS

    def requires(self, model: ir.Model) -> None:
        """Nodes are mapped, and calibrated where their inputs become integers."""
        for node in mapped_nodes(model):
            if self._bits(node).activation is not None:
                HISTOGRAM.require(node)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fit; the graph itself does not change."""
        quantizer = QUANTIZER.get(model) or build_quantizer(
            model,
            self.encoding,
            QuantizerSettings(
                self.weight_method, self.activation_range, self.fit_without, self.fit_samples, self.threads
            ),
        )
        nodes = {MAPPED.require(node).name: node for node in mapped_nodes(model)}
        quantized = quantizer.quantize_model({name: self._bits(node) for name, node in nodes.items()})
        for name, node in nodes.items():
            QUANTIZED.set(node, quantized[name])
        return ir.passes.PassResult(model, modified=True)

    def _bits(self, node: ir.Node) -> NodeBits:
        """What the search gave a node, else the widest where it is kept, else the options."""
        found = BITS.get(node)
        if found is not None:
            return found
        weight, activation = self.weight_bits, self.activation_bits
        if INPUT.get(node):
            activation = self.input_bits
        if KEPT.get(node) is not None:
            weight, activation = self.kept_weight_bits, MAX_BITS
        return NodeBits(weight, None if self.activation_bits is None else activation)


def build_quantizer(
    model: ir.Model, encoding: SignedEncoding, settings: QuantizerSettings | None = None
) -> ModelQuantizer:
    """Gather what a mapped, calibrated model knows of each node into a quantizer, and keep it on the model.

    Args:
        model: The model.
        encoding: Signed encoding of the chip.
        settings: How codes, scales and ranges are chosen.
    """
    settings = settings or QuantizerSettings()
    sources: dict[str, NodeSource] = {}
    for node in mapped_nodes(model):
        mapped = MAPPED.require(node)
        initializers = model.graph.initializers
        weight = initializers[mapped.weight_name].const_value
        bias = None if mapped.bias_name is None else initializers[mapped.bias_name].const_value
        if weight is None:
            raise ValueError(f"{mapped.name}: the weight {mapped.weight_name} has no value")
        sources[mapped.name] = NodeSource(
            mapped, weight.numpy(), None if bias is None else bias.numpy(), HISTOGRAM.get(node), MOMENTS.get(node)
        )
    rules = DropRules([source.node for source in sources.values()], channel_flows(model))
    quantizer = ModelQuantizer(sources, encoding, settings, rules)
    calibration = CALIBRATION.get(model)
    if settings.weight_method == "sequential" and calibration is not None:
        quantizer.fit_sequentially(model, calibration)
    QUANTIZER.set(model, quantizer)
    return quantizer
