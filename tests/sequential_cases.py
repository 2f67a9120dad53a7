"""Models and data that weights are fitted on, node after node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from tensors import normal

from raqu_onnx.annotations import NodeBits
from raqu_onnx.data import Dataset, open_dataset
from raqu_onnx.evaluation import Score, collect, make_session, score
from raqu_onnx.model_io import load_model, model_inputs, to_proto
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.quantize_weights import build_quantizer
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.quantizer import QuantizerSettings
from raqu_onnx.sequential import SequentialQuantizer
from raqu_onnx.simulation import Simulator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raqu_onnx.quantized import QuantizedNode
    from raqu_onnx.weights import FitPart


HEADER = '<ir_version: 10, opset_import: ["": 18]>'


def loaded(text: str, weights: Mapping[str, Sequence[int] | np.ndarray]) -> ir.Model:
    """A tidied model; weights are given as arrays, or by shapes for the size that keeps the signal's power."""
    proto = onnx.parser.parse_model(f"{HEADER} {text}")
    for seed, (name, given) in enumerate(weights.items()):
        if isinstance(given, np.ndarray):
            array = given
        else:
            array = normal(*given, seed=50 + seed) * np.float32(np.sqrt(2 / max(1, np.prod(given[1:]))))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return prepared(proto)


def prepared(proto: onnx.ModelProto) -> ir.Model:
    model: ir.Model = TidyPass()(load_model(proto)).model
    AnnotateTilingPass()(model)
    return model


class Case:
    """A calibrated model with its per-node and its sequential quantizer."""

    def __init__(
        self,
        model: ir.Model,
        feeds: Mapping[str, np.ndarray],
        *,
        without: frozenset[FitPart] = frozenset(),
        **options: Any,
    ) -> None:
        self.model = model
        self.data: Dataset = open_dataset(feeds, model_inputs(model))
        CalibratePass(self.data, threads=1)(model)
        self.quantizer = build_quantizer(model, "offset", QuantizerSettings("gptq", threads=1, without=without))
        self.names = list(self.quantizer.sources)
        self.sequential = SequentialQuantizer(model, self.quantizer, self.data, threads=1, **options)

    def bits(self, weight: int | tuple[int, ...], activation: int | None = 8) -> dict[str, NodeBits]:
        return dict.fromkeys(self.names, NodeBits(weight, activation))

    def one_by_one(self, bits: Mapping[str, NodeBits]) -> dict[str, QuantizedNode]:
        return {name: self.quantizer.quantize(name, bits[name]) for name in self.names}

    def score(self, quantized: Mapping[str, QuantizedNode], data: Dataset | None = None) -> Score:
        data = data or self.data
        reference = collect(make_session(to_proto(self.model).SerializeToString(), threads=1), data)
        nodes = [source.node for source in self.quantizer.sources.values()]
        first = next(iter(quantized.values()))
        simulator = Simulator(self.model, nodes, threads=1, float_activations=first.activation is None)
        return score(simulator.run(quantized, data.batches(64)), reference)


def assert_equal(one: Mapping[str, QuantizedNode], other: Mapping[str, QuantizedNode]) -> None:
    assert list(one) == list(other)
    for a, b in zip(one.values(), other.values(), strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.scales, b.scales)
        for left, right in ((a.bias, b.bias), (a.float_bias, b.float_bias)):
            assert (left is None) == (right is None)
            if left is not None:
                np.testing.assert_array_equal(left, right)
        assert a.activation == b.activation


def assert_sound(quantized: Mapping[str, QuantizedNode]) -> None:
    for name, node in quantized.items():
        assert np.isfinite(node.weight()).all(), name
        assert (node.scales > 0).all(), name
        bias = node.real_bias()
        assert bias is None or np.isfinite(bias).all(), name


# Grouped and depthwise convolutions, a residual sum, ConvTranspose whose groups share scales, Gemm and MatMul with the
# constant on either side.
EVERYTHING = """g (float[n, 3, 8, 8] x) => (float[n, 5] logits, float[n, 3, 64] side)
< int64[2] flat = {0, -1}, int64[3] rows = {0, 6, 64} >
{ a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = Relu (a)
  b = Conv <pads = [1, 1, 1, 1], group = 2> (r, w2)  s1 = Add (b, r)  s = Relu (s1)
  c = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = 6> (s, w3, b3)  t = Relu (c)
  d = ConvTranspose <strides = [2, 2], group = 3> (t, w4, b4)  u = Relu (d)
  m = Reshape (u, rows)  side = MatMul (w5, m)
  p = GlobalAveragePool (u)  f = Reshape (p, flat)  h = Gemm <transB = 1> (f, w6, b6)  i = Relu (h)
  logits = MatMul (i, w7) }"""


EVERYTHING_WEIGHTS = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 3, 3, 3), "w3": (6, 1, 3, 3), "b3": (6,)} | {
    "w4": (6, 2, 2, 2), "b4": (6,), "w5": (3, 6), "w6": (16, 6), "b6": (16,), "w7": (16, 5)
}  # fmt: skip


def everything(**options: Any) -> Case:
    return Case(loaded(EVERYTHING, EVERYTHING_WEIGHTS), {"x": normal(40, 3, 8, 8)}, **options)
