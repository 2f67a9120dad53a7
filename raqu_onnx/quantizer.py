"""All widths of all nodes: fitted on demand, each once.

The search asks for hundreds of combinations of the same few fits; the emitted model is made of the same objects, so
what is judged is what is emitted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.annotations import NodeBits
from raqu_onnx.dropping import Pruned
from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.quantized import ActivationQuantizer, QuantizedNode
from raqu_onnx.ranges import activation_quantizer
from raqu_onnx.weights import WeightFitter

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir
    from numpy.typing import NDArray

    from raqu_onnx.data import Dataset
    from raqu_onnx.dropping import DropRules
    from raqu_onnx.encodings import SignedEncoding
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.ranges import RangeMethod
    from raqu_onnx.sequential import SequentialQuantizer
    from raqu_onnx.statistics import Histogram, InputMoments
    from raqu_onnx.weights import FitPart, FittedWeights, Target, WeightMethod

__all__ = ["ModelQuantizer", "NodeSource", "QuantizerSettings"]

# The INT32 bias keeps a factor of two below its limits, so that sums with it cannot wrap.
_BIAS_LIMIT = 2**30
# What fitters with their moments and factors may take together; one of 4,608 rows takes 0.6 GB.
_FITTER_BYTES = 256 << 20


@dataclass(frozen=True)
class QuantizerSettings:
    """How a model is quantized once its widths are known.

    Attributes:
        weight_method: How weight codes are chosen.
        activation_range: How activation ranges are chosen.
        without: Parts of the weight method to leave out.
        fit_samples: Most calibration samples that ``sequential`` fits on.
        threads: Threads for onnxruntime, None for all.
    """

    weight_method: WeightMethod = "sequential"
    activation_range: RangeMethod = "mse"
    without: frozenset[FitPart] = frozenset()
    fit_samples: int = 512
    threads: int | None = None


@dataclass(frozen=True)
class NodeSource:
    """What is known of a mapped node before quantization.

    Attributes:
        node: The node.
        weight: Float weight, shape of the ONNX tensor.
        bias: Float bias, shape (output channels,), or None.
        histogram: Values of its input, None without calibration.
        moments: Second moments of its input vectors, None without calibration.
    """

    node: MappedNode
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    histogram: Histogram | None
    moments: InputMoments | None

    @property
    def takes_bias(self) -> bool:
        """A MatMul has nowhere to put a bias."""
        return self.node.op_type != "MatMul"


@dataclass
class ModelQuantizer:
    """Quantizes mapped nodes at any width and remembers every fit.

    Attributes:
        sources: The nodes by name, in graph order.
        scheme: The chip's signed encoding, which sets the ranges of weight codes.
        settings: How.
        rules: What follows from dropped kernels; without them every row is stored.
    """

    sources: Mapping[str, NodeSource]
    scheme: SignedEncoding
    settings: QuantizerSettings = field(default_factory=QuantizerSettings)
    rules: DropRules | None = None
    _sequential: SequentialQuantizer | None = field(default=None, repr=False)
    _fitters: dict[str, WeightFitter] = field(default_factory=dict, repr=False)
    _fits: dict[tuple[str, bytes], FittedWeights] = field(default_factory=dict, repr=False)
    _activations: dict[tuple[str, int], ActivationQuantizer] = field(default_factory=dict, repr=False)

    @property
    def without(self) -> frozenset[FitPart]:
        """Parts of the weight method that are left out."""
        return self.settings.without

    @property
    def fit_data(self) -> Dataset | None:
        """What `fit_sequentially` chose of the calibration data, None where nodes are fitted one by one."""
        return None if self._sequential is None else self._sequential.dataset

    def fit_sequentially(self, model: ir.Model, dataset: Dataset, *, whole: bool = False) -> None:
        """From now on `quantize_model` fits each node to the inputs that the nodes before it produce.

        Args:
            model: The tidied float model.
            dataset: Calibration inputs.
            whole: They are the `fit_data` of another quantizer, all of which is used.
        """
        from raqu_onnx.sequential import SequentialQuantizer

        self._sequential = SequentialQuantizer(
            model, self, dataset, samples=self.settings.fit_samples, threads=self.settings.threads, whole=whole
        )

    def quantize_model(self, bits: Mapping[str, NodeBits]) -> dict[str, QuantizedNode]:
        """All nodes at the widths given by name, with what follows from dropped kernels."""
        pruned = self.pruned(bits)
        found = {name: NodeBits(tuple(pruned.bits[name].tolist()), bits[name].activation) for name in self.sources}
        if self._sequential is not None:
            return self._sequential.quantize(found, pruned.stored)
        return {name: self.quantize(name, found[name], pruned.stored.get(name)) for name in self.sources}

    def pruned(self, bits: Mapping[str, NodeBits]) -> Pruned:
        """Widths per entry of each scale axis and stored rows, with what follows from dropped kernels."""
        widths = {name: bits[name].channel_bits(item.node.layout.channels) for name, item in self.sources.items()}
        return Pruned(widths, {}) if self.rules is None else self.rules.apply(widths)

    def quantize(self, name: str, bits: NodeBits, stored: NDArray[np.bool_] | None = None) -> QuantizedNode:
        """Codes, scales and bias of one node at the given widths, with all rows stored or some, shape (G, K)."""
        widths = bits.channel_bits(self.sources[name].node.layout.channels)
        if stored is None:
            return self._assemble(name, bits, self.fit(name, widths))
        return self._assemble(name, bits, self._new_fitter(self.sources[name], stored=stored).fit(widths), stored)

    def quantize_to(
        self, name: str, bits: NodeBits, target: Target, stored: NDArray[np.bool_] | None = None
    ) -> QuantizedNode:
        """Like `quantize`, with weights fitted to the inputs that really arrive; not remembered."""
        widths = bits.channel_bits(self.sources[name].node.layout.channels)
        fit = self._new_fitter(self.sources[name], target, stored=stored).fit(widths)
        return self._assemble(name, bits, fit, stored)

    def fit_to(
        self,
        name: str,
        bits: NodeBits,
        target: Target,
        stored: NDArray[np.bool_] | None = None,
        *,
        without: tuple[FitPart, ...] = ("refit", "polish"),
    ) -> FittedWeights:
        """Weights alone, without some parts of the method: quick, to compare targets."""
        widths = bits.channel_bits(self.sources[name].node.layout.channels)
        quick = self.without.union(without)
        return self._new_fitter(self.sources[name], target, quick, stored).fit(widths)

    def _assemble(
        self, name: str, bits: NodeBits, fit: FittedWeights, stored: NDArray[np.bool_] | None = None
    ) -> QuantizedNode:
        source = self.sources[name]
        widths = bits.channel_bits(source.node.layout.channels)
        activation = None if bits.activation is None else self.activation(name, bits.activation)
        bias = self._bias(source, fit, widths)
        quantized = QuantizedNode(
            node=source.node,
            bits=widths,
            codes=source.node.layout.from_matrices(fit.codes),
            scales=fit.scales,
            bias=None,
            float_bias=bias,
            activation=activation,
            stored=stored,
        )
        if activation is None or bias is None:
            return quantized
        codes = np.rint(bias.astype(np.float64) / quantized.bias_scales())
        limited = np.clip(codes, -(2**31) + 1, 2**31 - 1).astype(np.int32)
        return replace(quantized, bias=limited, float_bias=None)

    def fit(self, name: str, widths: NDArray[np.int64]) -> FittedWeights:
        """Weights of one node at widths per entry of its scale axis, shape (channels,)."""
        key = (name, widths.tobytes())
        if key not in self._fits:
            self._fits[key] = self._fitter(name).fit(widths)
        return self._fits[key]

    def activation(self, name: str, bits: int) -> ActivationQuantizer:
        """Quantizer of one node's input.

        Raises:
            ValueError: The model was not calibrated.
        """
        histogram = self.sources[name].histogram
        if histogram is None:
            raise ValueError(f"{name}: no calibration data has been seen, its input cannot be quantized")
        key = (self.sources[name].node.input_name, bits)
        if key not in self._activations:
            self._activations[key] = activation_quantizer(histogram, bits, self.settings.activation_range)
        return self._activations[key]

    def _fitter(self, name: str) -> WeightFitter:
        if self.settings.weight_method in ("nearest", "mse"):
            # Quickly made anew; kept, those of a whole model hold its weights twice more, in double precision.
            return self._new_fitter(self.sources[name])
        # The one used last is at the end.
        found = self._fitters.pop(name) if name in self._fitters else self._new_fitter(self.sources[name])
        self._fitters[name] = found
        kept = list(self._fitters)
        while len(kept) > 1 and sum(self._fitters[item].nbytes for item in kept) > _FITTER_BYTES:
            del self._fitters[kept.pop(0)]
        return found

    def _new_fitter(
        self,
        source: NodeSource,
        target: Target | None = None,
        without: frozenset[FitPart] | None = None,
        stored: NDArray[np.bool_] | None = None,
    ) -> WeightFitter:
        return WeightFitter(
            source.node,
            source.weight,
            source.moments,
            self.scheme,
            method="gptq" if self.settings.weight_method == "sequential" else self.settings.weight_method,
            absorb_mean=self.absorbs_mean(source),
            scale_floor=self._scale_floor(source),
            target=target,
            without=self.without if without is None else without,
            stored=stored,
        )

    def absorbs_mean(self, source: NodeSource) -> bool:
        """Whether the bias of a node takes up its mean error."""
        return source.takes_bias and "bias" not in self.without

    def _scale_floor(self, source: NodeSource) -> NDArray[np.float64] | None:
        """Smallest weight scale at which the INT32 bias stays within its limit, shape (channels,)."""
        if source.bias is None or source.histogram is None:
            return None
        layout = source.node.layout
        # The widest activation has the smallest step; the floor then holds for the narrower ones too.
        step = self.activation(source.node.name, MAX_BITS).scale
        floor = np.zeros(layout.channels)
        np.maximum.at(floor, layout.channel_index().reshape(-1), np.abs(source.bias) / (_BIAS_LIMIT * step))
        return floor

    def _bias(self, source: NodeSource, fit: FittedWeights, widths: NDArray[np.int64]) -> NDArray[np.float32] | None:
        if not source.takes_bias:
            return None
        shift = fit.bias_shift.reshape(-1)
        bias = shift if source.bias is None else source.bias.astype(np.float64) + shift
        dropped = widths[source.node.layout.channel_index().reshape(-1)] == 0
        return np.where(dropped, 0.0, bias).astype(np.float32)
