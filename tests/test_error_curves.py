"""What widths and dropping cost: closed forms, what is measured on the vectors themselves, and a trained network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import scipy.linalg
from onnx import helper
from scipy.stats import spearmanr
from tensors import normal
from threadpoolctl import threadpool_limits

from raqu_onnx.annotations import MAPPED, mapped_nodes
from raqu_onnx.bundled import bundled_arrays, bundled_model
from raqu_onnx.channel_flow import channel_flows
from raqu_onnx.data import open_dataset
from raqu_onnx.error_curves import ErrorCurve, error_curves
from raqu_onnx.errors import ConfigError, DataError
from raqu_onnx.evaluation import make_session
from raqu_onnx.model_io import load_model, model_inputs, to_proto
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.quantize_weights import build_quantizer
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.patches import input_vectors, output_vectors
from raqu_onnx.quantizer import QuantizerSettings

if TYPE_CHECKING:
    import onnx_ir as ir

    from raqu_onnx.quantizer import ModelQuantizer, NodeSource

Feeds = Mapping[str, np.ndarray]


class Case:
    """A calibrated model; nodes go by the names of their outputs."""

    def __init__(self, proto: onnx.ModelProto, feeds: Feeds) -> None:
        self.model: ir.Model = TidyPass()(load_model(proto)).model
        AnnotateTilingPass()(self.model)
        CalibratePass(open_dataset(feeds, model_inputs(self.model)), threads=1)(self.model)
        self.quantizer: ModelQuantizer = build_quantizer(self.model, "offset", QuantizerSettings("gptq", threads=1))
        self.names = {MAPPED.require(n).output_name: MAPPED.require(n).name for n in mapped_nodes(self.model)}
        self.curves = error_curves(self.model, self.quantizer)
        self._session = self._open()
        self.values = self.run(feeds)

    def _open(self) -> Any:
        """The model with weights and biases as inputs and what mapped nodes read and write as outputs."""
        proto = to_proto(self.model)
        constants = {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}
        inputs = {value.name for value in proto.graph.input}
        outputs = {value.name for value in proto.graph.output}
        nodes = [source.node for source in self.quantizer.sources.values()]
        for name in {name for node in nodes for name in (node.weight_name, node.bias_name) if name}:
            proto.graph.input.append(helper.make_tensor_value_info(name, 1, constants[name].shape))
        for name in {name for node in nodes for name in (node.input_name, node.output_name)} - inputs - outputs:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
        return make_session(proto.SerializeToString(), threads=1)

    def run(self, feeds: Feeds, replaced: Feeds | None = None, only: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Values by name, all or only some, with some weights or biases replaced."""
        names = list(only) or [output.name for output in self._session.get_outputs()]
        found = self._session.run(names, {**feeds, **(replaced or {})})
        return {**feeds, **dict(zip(names, found, strict=True))}

    def source(self, output: str = "a") -> NodeSource:
        return self.quantizer.sources[self.names[output]]

    def curve(self, output: str = "a") -> ErrorCurve:
        return self.curves[self.names[output]]

    def vectors(self, output: str, *, centred: bool = True) -> np.ndarray:
        """What drives a node, shape (G, P, K)."""
        node = self.source(output).node
        x = input_vectors(node, self.values[node.input_name]).astype(np.float64).transpose(1, 0, 2)
        return x - x.mean(1, keepdims=True) if centred else x

    @cache  # noqa: B019 - a case lives as long as the test
    def moments(self, output: str) -> tuple[np.ndarray, np.ndarray]:
        """Centred second moments and mean of all that drives the first group of a node."""
        x = self.vectors(output, centred=False)[0]
        mean = x.mean(0)
        return (x - mean).T @ (x - mean) / len(x), mean

    def weight(self, output: str) -> np.ndarray:
        source = self.source(output)
        return source.node.layout.to_matrices(source.weight.astype(np.float64))


def case(text: str, weights: Mapping[str, tuple[int, ...] | np.ndarray], feeds: Feeds) -> Case:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 18]> {text}')
    for output in proto.graph.output:
        output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for seed, (name, given) in enumerate(weights.items()):
        array = normal(*given, seed=50 + seed) if isinstance(given, tuple) else np.asarray(given)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Case(proto, feeds)


def orthogonal(samples: int, columns: int) -> np.ndarray:
    """Columns of mean 0 that are orthogonal to each other, with powers 1, 4, 9, ..."""
    signs = scipy.linalg.hadamard(samples)[:, 1 : columns + 1]
    return np.asarray(signs * np.arange(1, columns + 1), np.float32)


MIXED = normal(64, 6, seed=3) @ normal(6, 6, seed=4)
PICTURES = {"x": normal(6, 3, 5, 5, seed=5)}

# ---------------------------------------------------------------------------------------------------- closed forms


def test_an_independent_channel_costs_its_variance() -> None:
    net = case(
        "g (float[n, 4] x) => (y) { a = Gemm (x, w1, b1) y = Gemm (a, w2, b2) }",
        {"w1": np.eye(4, dtype=np.float32), "b1": (4,), "w2": (4, 5), "b2": (5,)},
        {"x": orthogonal(16, 4)},
    )
    curve = net.curve()
    assert curve.absorbed
    np.testing.assert_allclose(curve.errors[0], [1, 4, 9, 16], rtol=1e-5)
    np.testing.assert_allclose(curve.gains, np.square(net.weight("y")[0]).sum(1))
    # The last node's outputs are the model's: their mean is lost as well.
    last = net.curve("y")
    assert not last.absorbed
    np.testing.assert_allclose(last.errors[0], np.square(net.values["y"]).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(last.gains, 1)


def test_a_twin_makes_up_for_a_channel() -> None:
    weight = normal(6, 4)
    weight[:, 3] = weight[:, 2]
    net = case(
        "g (float[n, 6] x) => (y) { a = Gemm (x, w1, b1) r = Relu (a) y = Gemm (r, w2, b2) }",
        {"w1": weight, "b1": np.array([0.3, -0.2, 0.1, 0.1], np.float32), "w2": (4, 5), "b2": (5,)},
        {"x": MIXED},
    )
    curve, variance = net.curve(), net.values["a"].var(0)
    assert (curve.errors[0, 2:] < 0.07 * variance[2:]).all()
    assert (curve.errors[0, :2] > 0.2 * variance[:2]).all()


def test_a_channel_that_nobody_listens_to_costs_nothing() -> None:
    weight = normal(4, 5)
    weight[1] = 0
    net = case(
        "g (float[n, 6] x) => (y) { a = Gemm (x, w1) y = Gemm (a, w2) }", {"w1": (6, 4), "w2": weight}, {"x": MIXED}
    )
    assert net.curve().errors[0, 1] == 0
    assert (net.curve().errors[0, [0, 2, 3]] > 0).all()


def test_kernels_that_cannot_be_absorbed_cost_their_variance() -> None:
    net = case(
        "g (float[n, 4] x) => (y) { a = Gemm (x, w1, b1) s = Add (a, x) y = Gemm (s, w2, b2) }",
        {"w1": (4, 4), "b1": (4,), "w2": (4, 5), "b2": (5,)},
        {"x": MIXED[:, :4]},
    )
    np.testing.assert_allclose(net.curve().errors[0], net.values["a"].var(0), rtol=1e-4)
    assert not net.curve().absorbed


# --------------------------------------------------------------------------------- measured on the vectors themselves


def refit(net: Case, reader: str, group: int, rows: np.ndarray, *, centred: bool) -> float:
    """Least error of a reader without some rows, by least squares on its vectors, with the change penalized."""
    x, weight = net.vectors(reader, centred=centred)[group], net.weight(reader)[group]
    missing = x[:, rows] @ weight[rows] / np.sqrt(len(x))
    ridge = 0.05 * np.square(x).sum() / x.size
    others = np.delete(x, rows, axis=1) / np.sqrt(len(x))
    design = np.vstack([others, np.sqrt(ridge) * np.eye(others.shape[1])])
    wanted = np.vstack([missing, np.zeros((others.shape[1], weight.shape[1]))])
    solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
    return float(np.square(design @ solution - wanted).sum())


READERS = {
    "conv": ("y = Conv <pads = [1, 1, 1, 1]> (s, w2, b2)", (5, 4, 3, 3)),
    "groups": ("y = Conv <group = 2> (s, w2, b2)", (5 * 2, 2, 3, 3)),
    "strides": ("y = Conv <strides = [2, 2], dilations = [2, 1]> (s, w2, b2)", (5, 4, 2, 2)),
    "transposed": ("y = ConvTranspose <strides = [2, 2], group = 2> (s, w2, b2)", (4, 5, 2, 2)),
    "flatten": ("f = Flatten (s) y = Gemm (f, w2, b2)", (100, 5)),
    "no bias": ("f = Flatten (s) y = MatMul (f, w2)", (100, 5)),
}


@pytest.mark.parametrize(("reader", "shape"), READERS.values(), ids=READERS)
def test_the_loss_is_that_of_a_reader_fitted_anew(reader: str, shape: tuple[int, ...]) -> None:
    biases = shape[1] * 2 if "Transpose" in reader else shape[0] if "Conv" in reader else shape[1]
    net = case(
        f"g (float[n, 3, 5, 5] x) => (y) {{ a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) s = Relu (a) {reader} }}",
        {"w1": (4, 3, 3, 3), "b1": (4,), "w2": shape, "b2": (biases,)},
        PICTURES,
    )
    curve = net.curve()
    (read,) = channel_flows(net.model)[curve.name].readers
    centred = "MatMul" not in reader
    expected = [sum(refit(net, "y", g, rows, centred=centred) for g, rows in read.rows(k)) for k in range(4)]
    np.testing.assert_allclose(curve.errors[0] * curve.gains, expected, rtol=1e-3)
    # Gains: the share that Relu lets through, which the normal distribution tells roughly, times the power.
    power = [sum(np.square(net.weight("y")[g, rows]).sum() for g, rows in read.rows(k)) for k in range(4)]
    np.testing.assert_allclose(curve.gains / power, (net.values["a"] > 0).mean((0, 2, 3)), atol=0.1)


def test_losses_in_several_readers_add_up() -> None:
    net = case(
        """g (float[n, 3, 5, 5] x) => (y) { a = Conv (x, w1, b1) s = Relu (a) p = GlobalAveragePool (s)
        c = Conv (p, w2, b2) d = Conv (s, w3, b2) y = Add (c, d) }""",
        {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (5, 4, 1, 1), "b2": (5,), "w3": (5, 4, 1, 1)},
        PICTURES,
    )
    curve = net.curve()
    expected = [sum(refit(net, name, 0, np.array([k]), centred=True) for name in "cd") for k in range(4)]
    np.testing.assert_allclose(curve.errors[0] * curve.gains, expected, rtol=1e-3)
    # Nine positions are averaged for one reader, none for the other.
    pooled, direct = (np.square(net.weight(name)[0]).sum(1) for name in "cd")
    passing = (net.values["a"] > 0).mean((0, 2, 3))
    np.testing.assert_allclose(curve.gains, passing * (pooled / 9 + direct), rtol=0.25)


def test_a_depthwise_kernel_without_rows_is_dropped_as_well() -> None:
    net = case(
        """g (float[n, 3, 5, 5] x) => (y) { a = Conv (x, w1, b1) r = Relu (a)
        d = Conv <group = 4, pads = [1, 1, 1, 1]> (r, w2, b2) s = Relu (d) y = Conv (s, w3, b3) }""",
        {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 1, 3, 3), "b2": (4,), "w3": (5, 4, 1, 1), "b3": (5,)},
        PICTURES,
    )
    following, variance = net.curve("d").errors[0], net.values["d"].var((0, 2, 3))
    np.testing.assert_allclose(net.curve().errors[0] * net.curve().gains, np.minimum(following, variance), rtol=1e-4)
    assert (following < variance).any()


LAYERS = {
    "conv": ("y = Conv <pads = [1, 0, 1, 0]> (x, w, b)", (4, 3, 3, 3), 4),
    "transposed groups": ("y = ConvTranspose <group = 3, strides = [2, 1]> (x, w, b)", (3, 4, 3, 2), 12),
    "depthwise": ("y = Conv <group = 3> (x, w, b)", (6, 1, 3, 3), 6),
    "no bias": ("t = Transpose <perm = [0, 2, 3, 1]> (x) y = MatMul (t, w)", (3, 4), 1),
}


@pytest.mark.parametrize(("layer", "shape", "biases"), LAYERS.values(), ids=LAYERS)
def test_errors_are_those_measured_on_the_calibration_vectors(layer: str, shape: tuple[int, ...], biases: int) -> None:
    net = case(f"g (float[n, 3, 5, 5] x) => (y) {{ {layer} }}", {"w": shape, "b": (biases,)}, PICTURES)
    curve, layout = net.curve("y"), net.source("y").node.layout
    assert curve.errors.shape == (9, layout.channels)
    assert np.isnan(curve.errors[1]).all()
    assert np.isfinite(np.delete(curve.errors, 1, 0)).all()
    x, index = net.vectors("y", centred="MatMul" not in layer), layout.channel_index()
    for bits in range(2, 9):
        fit = net.quantizer.fit(curve.name, np.full(layout.channels, bits))
        rounded = fit.codes * fit.scales.astype(np.float64)[index][:, None, :]
        per_kernel = np.square(x @ (net.weight("y") - rounded)).mean(1)
        measured = np.zeros(layout.channels)
        np.add.at(measured, index, per_kernel)
        np.testing.assert_allclose(curve.errors[bits], measured, rtol=1e-3)
    outputs = output_vectors(net.source("y").node, net.values["y"])
    dropped = np.square(outputs).mean(0).reshape(-1, layout.channels).sum(0)
    np.testing.assert_allclose(curve.errors[0], dropped, rtol=1e-3)
    # Of a handful of weights, some happen to fit fewer codes better.
    assert layout.rows < 27 or (curve.errors[3:] <= 1.05 * curve.errors[2:-1]).all()
    widths = np.arange(layout.channels) % 3 * 2
    np.testing.assert_array_equal(curve.at(widths), [curve.errors[b, k] for k, b in enumerate(widths)])


# --------------------------------------------------------------------------------------------------- as a collection


def test_curves_are_made_when_asked_for_and_kept() -> None:
    net = case(
        "g (float[n, 6] x) => (y) { a = Gemm (x, w1) y = Gemm (a, w2) }", {"w1": (6, 4), "w2": (4, 5)}, {"x": MIXED}
    )
    fits: list[tuple[str, int]] = []
    fit = net.quantizer.fit

    def counted(name: str, widths: np.ndarray) -> Any:
        fits.append((name, int(widths[0])))
        return fit(name, widths)

    net.quantizer.fit = counted  # type: ignore[method-assign]
    curves = error_curves(net.model, net.quantizer, widths=(4, 2))
    assert list(curves) == list(net.names.values())
    assert len(curves) == 2
    assert not fits
    curve = curves[net.names["y"]]
    assert curves[net.names["y"]] is curve
    assert fits == [(net.names["y"], 2), (net.names["y"], 4)]
    assert np.isnan(curve.errors[[1, 3, 5, 6, 7, 8]]).all()
    assert np.isfinite(curve.errors[[0, 2, 4]]).all()


def test_what_is_refused() -> None:
    net = case("g (float[n, 6] x) => (y) { y = Gemm (x, w1) }", {"w1": (6, 4)}, {"x": MIXED})
    for bits in (1, 0, 9):
        with pytest.raises(ConfigError, match=f"2 to 8 bits, not {bits}$"):
            error_curves(net.model, net.quantizer, widths=(bits, 4))
    AnnotateTilingPass()(net.model)
    for node in mapped_nodes(net.model):
        node.meta.pop("raqu.moments")
    with pytest.raises(DataError, match=r"calibrate with moments first$"):
        error_curves(net.model, build_quantizer(net.model, "offset", QuantizerSettings("mse")))


# --------------------------------------------------------------------------------------------------- a trained network


@pytest.fixture(scope="module")
def resnet() -> Case:
    images = bundled_arrays("calibration")["input"][:64]
    with threadpool_limits(1):
        return Case(onnx.load_from_string(bundled_model("resnet20")), {"input": images})


def without_kernel(net: Case, source: NodeSource, reader: NodeSource, kernel: int, rows: np.ndarray) -> Feeds:
    """Weights with one kernel dropped and its reader fitted anew on the calibration images."""
    weight, bias = source.weight.copy(), np.array(source.bias)
    weight[kernel], bias[kernel] = 0, 0
    output = reader.node.output_name
    before = net.weight(output)[0]
    second, mean = net.moments(output)
    left = second + 0.05 * np.trace(second) / len(second) * np.eye(len(second))
    others = np.delete(np.arange(len(before)), rows)
    after = before.copy()
    after[rows] = 0
    after[others] += np.linalg.solve(left[np.ix_(others, others)], second[np.ix_(others, rows)] @ before[rows])
    shifted = np.array(reader.bias) + mean @ (before - after)
    return {
        source.node.weight_name: weight,
        str(source.node.bias_name): bias,
        reader.node.weight_name: reader.node.layout.from_matrices(after[None]).astype(np.float32),
        str(reader.node.bias_name): shifted.astype(np.float32),
    }


def at_two_bits(net: Case, source: NodeSource, kernel: int) -> Feeds:
    fit = net.quantizer.fit(source.node.name, np.full(source.node.layout.channels, 2))
    rounded = source.node.layout.from_matrices(fit.codes * fit.scales[source.node.layout.channel_index()][:, None, :])
    weight, bias = source.weight.copy(), np.array(source.bias)
    weight[kernel] = rounded[kernel]
    bias[kernel] += fit.bias_shift.reshape(-1)[kernel]
    return {source.node.weight_name: weight, str(source.node.bias_name): bias}


def test_curves_of_a_trained_network_rank_kernels_as_measured(resnet: Case) -> None:
    net, curves = resnet, error_curves(resnet.model, resnet.quantizer, widths=(2,))
    images = {"input": bundled_arrays("selection")["input"][:64]}
    # The first convolution of every block: only the second one reads it.
    flows = {name: flow for name, flow in channel_flows(net.model).items() if flow.absorbable}
    assert len(flows) == 9
    rng = np.random.default_rng(0)
    reference = net.run(images)
    found: list[tuple[float, ...]] = []
    for name in list(flows)[::3]:
        source, reader = net.quantizer.sources[name], net.quantizer.sources[flows[name].readers[0].name]
        curve = curves[name]
        outputs = (reader.node.output_name, "logits")
        for kernel in rng.permutation(source.node.layout.channels)[:8]:
            ((_, rows),) = flows[name].readers[0].rows(int(kernel))
            for bits, replaced in (
                (0, without_kernel(net, source, reader, kernel, rows)),
                (2, at_two_bits(net, source, kernel)),
            ):
                values = net.run(images, replaced, outputs)
                own = curve.errors[bits, kernel]
                following, logits = (
                    float(
                        np.square(values[output] - reference[output]).mean((0, *range(2, reference[output].ndim))).sum()
                    )
                    for output in outputs
                )
                found.append((bits, own, own * curve.gains[kernel], following, logits))
    bits, own, seen, following, logits = np.array(found).T
    assert len(bits) == 2 * 24
    for width in (0, 2):
        chosen = bits == width
        # Measured 0.966 and 0.973; 0.71 to 1.32 and 0.58 to 1.16.
        assert spearmanr(seen[chosen], following[chosen]).statistic > 0.92
        ratio = seen[chosen] / following[chosen]
        assert (ratio.min() > 0.4, ratio.max() < 1.8) == (True, True), ratio
        assert 0.8 < np.median(ratio) < 1.25
    # Measured 0.99, 0.86, 0.82 and 0.84: dropped and rounded kernels of three depths on one scale.
    assert spearmanr(seen, following).statistic > 0.96
    assert spearmanr(own, following).statistic > 0.75
    assert spearmanr(own, logits).statistic > 0.7
    assert spearmanr(seen, logits).statistic > 0.7
