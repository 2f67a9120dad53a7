"""Integer codes and scales for the weights of every mapped node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from raqu_onnx.annotations import (
    BITS,
    CALIBRATION,
    HISTOGRAM,
    MAPPED,
    MOMENTS,
    QUANTIZED,
    QUANTIZER,
    NodeBits,
    mapped_nodes,
)
from raqu_onnx.encodings import SignedEncoding
from raqu_onnx.quantizer import ModelQuantizer, NodeSource
from raqu_onnx.statistics import RangeMethod
from raqu_onnx.weights import WeightMethod

__all__ = ["QuantizeWeightsPass", "build_quantizer"]


@dataclass(frozen=True)
class QuantizeWeightsPass(ir.passes.InPlacePass):
    """Fit the weights of every mapped node to the bits that the search, or the options here, gave it.

    Before and after: the same graph. Every mapped node gains a `QuantizedNode` with INT8 codes, one scale per
    kernel, INT32 bias codes and the quantizer of its input.

    Attributes:
        encoding: Signed encoding of the chip, which sets the range of codes.
        weight_bits: Width of nodes that no search gave bits to.
        activation_bits: Width of the inputs of such nodes, None for float.
        weight_method: ``nearest``, ``mse``, ``gptq`` or ``sequential``.
        activation_range: ``min-max``, ``percentile`` or ``mse``.
        fit_samples: Most calibration samples that ``sequential`` fits on.
        threads: Threads for onnxruntime, None for all.
    """

    name: ClassVar[str] = "quantize-weights"

    encoding: SignedEncoding = "offset"
    weight_bits: int = 8
    activation_bits: int | None = 8
    weight_method: WeightMethod = "sequential"
    activation_range: RangeMethod = "mse"
    fit_samples: int = 256
    threads: int | None = None

    def requires(self, model: ir.Model) -> None:
        """Nodes are mapped, and calibrated where their inputs become integers."""
        for node in mapped_nodes(model):
            if (BITS.get(node) or NodeBits(self.weight_bits, self.activation_bits)).activation is not None:
                HISTOGRAM.require(node)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fit; the graph itself does not change."""
        quantizer = QUANTIZER.get(model) or build_quantizer(
            model,
            self.encoding,
            weight_method=self.weight_method,
            range_method=self.activation_range,
            fit_samples=self.fit_samples,
            threads=self.threads,
        )
        default = NodeBits(self.weight_bits, self.activation_bits)
        nodes = {MAPPED.require(node).name: node for node in mapped_nodes(model)}
        quantized = quantizer.quantize_model({name: BITS.get(node) or default for name, node in nodes.items()})
        for name, node in nodes.items():
            QUANTIZED.set(node, quantized[name])
        return ir.passes.PassResult(model, modified=True)


def build_quantizer(
    model: ir.Model,
    encoding: SignedEncoding,
    *,
    weight_method: WeightMethod = "sequential",
    range_method: RangeMethod = "mse",
    fit_samples: int = 256,
    threads: int | None = None,
) -> ModelQuantizer:
    """Gather what a mapped, calibrated model knows of each node into a quantizer, and keep it on the model."""
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
    quantizer = ModelQuantizer(sources, encoding, weight_method, range_method)
    calibration = CALIBRATION.get(model)
    if weight_method == "sequential" and calibration is not None:
        quantizer.fit_sequentially(model, calibration, samples=fit_samples, threads=threads)
    QUANTIZER.set(model, quantizer)
    return quantizer
