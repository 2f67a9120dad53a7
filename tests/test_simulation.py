"""The simulator against the emitted model: what the search judges is what the user gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from tensors import normal

from raqu_onnx.annotations import MAPPED, QUANTIZED, NodeBits, mapped_nodes
from raqu_onnx.data import Dataset, open_dataset
from raqu_onnx.errors import DataError, ModelError
from raqu_onnx.evaluation import collect, make_session
from raqu_onnx.graph_edit import infer_shapes, name_nodes
from raqu_onnx.model_io import load_model, model_inputs, to_proto
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.insert_qdq import InsertQDQPass
from raqu_onnx.passes.quantize_weights import build_quantizer
from raqu_onnx.simulation import Simulator

if TYPE_CHECKING:
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.quantized import QuantizedNode
    from raqu_onnx.quantizer import ModelQuantizer

# A convolutional net with a residual sum, Gemm and MatMul with the constant on either side.
NET = """<ir_version: 10, opset_import: ["": 18]>
g (float[n, 3, 8, 8] x) => (float[n, 5] logits, float[n, 2, 64] side)
<int64[2] flat = {0, -1}, int64[3] rows = {0, 6, 64}>
{
    [stem] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu (a)
    [body] c = Conv <pads = [1, 1, 1, 1], group = 2> (r, w2)
    sum = Add (c, r)
    s = Relu (sum)
    p = GlobalAveragePool (s)
    f = Reshape (p, flat)
    [gemm] h = Gemm <transB = 1> (f, w3, b3)
    t = Tanh (h)
    [head] logits = MatMul (t, w4)
    m = Reshape (s, rows)
    [left] side = MatMul (w5, m)
}"""


def net() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(NET)
    weights = {
        "w1": normal(6, 3, 3, 3, seed=2, size=0.3),
        "b1": normal(6, seed=3),
        "w2": normal(6, 3, 3, 3, seed=4, size=0.3),
        "w3": normal(7, 6, seed=5),
        "b3": normal(7, seed=6),
        "w4": normal(7, 5, seed=7),
        "w5": normal(2, 6, seed=8),
    }
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return proto


class Calibrated:
    """A calibrated model and the simulator over it."""

    def __init__(
        self, proto: onnx.ModelProto, feeds: dict[str, np.ndarray], *, float_activations: bool = False
    ) -> None:
        self.model: ir.Model = load_model(proto)
        name_nodes(self.model)
        infer_shapes(self.model)
        self.data: Dataset = open_dataset(feeds, model_inputs(self.model))
        AnnotateTilingPass()(self.model)
        CalibratePass(self.data, threads=1)(self.model)
        self.quantizer: ModelQuantizer = build_quantizer(self.model, "offset")
        self.nodes: list[MappedNode] = [MAPPED.require(node) for node in mapped_nodes(self.model)]
        self.before = to_proto(self.model).SerializeToString(deterministic=True)
        self.simulator = Simulator(self.model, self.nodes, threads=1, float_activations=float_activations)

    def quantized(self, weight: int, activation: int | None, **bits: NodeBits) -> dict[str, QuantizedNode]:
        default = NodeBits(weight, activation)
        return {n.name: self.quantizer.quantize(n.name, bits.get(n.name, default)) for n in self.nodes}

    def emitted(self, quantized: dict[str, QuantizedNode]) -> tuple[np.ndarray, ...]:
        """Outputs of the emitted model, node by node."""
        model = load_model(ir.from_proto(onnx.ModelProto.FromString(self.before)))
        AnnotateTilingPass()(model)
        for node in mapped_nodes(model):
            QUANTIZED.set(node, quantized[node.name or ""])
        InsertQDQPass()(model)
        session = make_session(to_proto(model).SerializeToString(), level="disable-all", threads=1)
        return collect(session, self.data).outputs


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    return Calibrated(net(), {"x": normal(24, 3, 8, 8)})


def assert_equal_outputs(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    """Equal but for the order of float sums, which now and then tips a code over."""
    for got, wanted in zip(found, expected, strict=True):
        assert got.shape == wanted.shape
        size = np.abs(wanted).max()
        difference = np.abs(got - wanted)
        assert np.mean(difference > 1e-4 * size) < 0.01
        assert difference.max() < 0.05 * size


@pytest.mark.parametrize(("weight", "activation"), [(8, 8), (4, 8), (3, 4), (2, 2)])
def test_outputs_equal_those_of_the_emitted_model(calibrated: Calibrated, weight: int, activation: int) -> None:
    quantized = calibrated.quantized(weight, activation)
    outputs = calibrated.simulator.run(quantized, calibrated.data.batches(7))
    assert outputs.names == ("logits", "side")
    assert outputs.samples == 24
    assert_equal_outputs(outputs.outputs, calibrated.emitted(quantized))


def test_mixed_widths_and_dropped_kernels(calibrated: Calibrated) -> None:
    quantized = calibrated.quantized(
        5, 6, stem=NodeBits((0, 2, 3, 4, 8, 0), 8), gemm=NodeBits((2, 8, 0, 3, 3, 4, 5), 3), left=NodeBits((0, 7), 4)
    )
    outputs = calibrated.simulator.run(quantized, calibrated.data.batches(64))
    assert_equal_outputs(outputs.outputs, calibrated.emitted(quantized))
    assert not outputs.outputs[1][:, 0].any()


def test_a_candidate_leaves_no_trace_in_the_next(calibrated: Calibrated) -> None:
    batches = list(calibrated.data.batches(8))
    assert [batch.size for batch in batches] == [8, 8, 8]
    fine, coarse = calibrated.quantized(8, 8), calibrated.quantized(2, 2)
    first = calibrated.simulator.run(fine, batches)
    middle = calibrated.simulator.run(coarse, batches)
    again = calibrated.simulator.run(fine, batches)
    np.testing.assert_array_equal(first.outputs[0], again.outputs[0])
    assert np.abs(middle.outputs[0] - first.outputs[0]).max() > 0.1
    assert to_proto(calibrated.model).SerializeToString(deterministic=True) == calibrated.before


def test_float_activations_leave_inputs_as_they_are() -> None:
    model = Calibrated(net(), {"x": normal(24, 3, 8, 8)}, float_activations=True)
    quantized = model.quantized(3, None)
    outputs = model.simulator.run(quantized, model.data.batches(24))
    assert_equal_outputs(outputs.outputs, model.emitted(quantized))
    # Widths of activations, where given, play no part; at 8 bits only the weights' error is left.
    fine = model.simulator.run(model.quantized(8, None), model.data.batches(24))
    expected = collect(make_session(to_proto(model.model).SerializeToString(), threads=1), model.data)
    for got, wanted in zip(fine.outputs, expected.outputs, strict=True):
        assert np.abs(got - wanted).max() < 0.03 * np.abs(wanted).max()


def test_labels_come_along() -> None:
    labels = np.arange(24) % 5
    model = Calibrated(net(), {"x": normal(24, 3, 8, 8), "labels": labels})
    outputs = model.simulator.run(model.quantized(8, 8), model.data.batches(5))
    assert outputs.labels is not None
    np.testing.assert_array_equal(outputs.labels, labels)


def test_bodies_that_read_outer_values_survive() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 18]>
        g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) <bool c = {1}> {
            [m] a = MatMul (x, w)
            y = Relu (a)
            z = If (c) <
                then_branch = t () => (float[n, 4] t2) { t1 = MatMul (y, w) t2 = Add (t1, k) },
                else_branch = e () => (float[n, 4] e1) { e1 = Identity (y) }
            >
            [last] unused = MatMul (z, v)
        }""")
    weights = {"w": normal(4, 4), "v": normal(4, 4, seed=2), "k": normal(4, seed=3)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    x = normal(10, 4)
    model = Calibrated(proto, {"x": x})
    assert [node.name for node in model.nodes] == ["m", "last"]
    quantized = model.quantized(4, 8)
    outputs = model.simulator.run(quantized, model.data.batches(10))
    assert_equal_outputs(outputs.outputs, model.emitted(quantized))
    # The body still multiplies by the float weight.
    np.testing.assert_allclose(outputs.outputs[1], outputs.outputs[0] @ weights["w"] + weights["k"], atol=1e-5)


def test_a_float_activation_needs_the_mode_for_it(calibrated: Calibrated) -> None:
    with pytest.raises(ValueError, match="stem: its activation is float"):
        calibrated.simulator.run(calibrated.quantized(8, None), calibrated.data.batches(8))


def test_data_that_does_not_run_is_one_line(calibrated: Calibrated) -> None:
    quantized = calibrated.quantized(8, 8)
    batch = next(iter(calibrated.data.batches(8)))
    wrong = type(batch)({"x": np.zeros((2, 4, 8, 8), np.float32)})
    for batches, message in (([], "no samples"), ([wrong], "cannot be run")):
        with pytest.raises(DataError, match=message) as caught:
            calibrated.simulator.run(quantized, batches)
        assert "\n" not in str(caught.value)


def test_a_model_that_does_not_load_is_one_line(calibrated: Calibrated) -> None:
    model = calibrated.model.clone()
    next(node for node in model.graph if node.op_type == "Tanh").domain = "no.such.domain"
    model.opset_imports["no.such.domain"] = 1
    with pytest.raises(ModelError, match="cannot load") as caught:
        Simulator(model, calibrated.nodes, threads=1)
    assert "\n" not in str(caught.value)
