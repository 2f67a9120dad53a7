"""Parts of the weight method: each does something, can be left out, and the sequential ones pay on unseen inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded

from raqu_onnx.annotations import NodeBits
from raqu_onnx.data import open_dataset
from raqu_onnx.evaluation import collect, make_session
from raqu_onnx.model_io import load_model, model_inputs, to_proto
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.quantize_weights import build_quantizer
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.quantizer import ModelQuantizer, QuantizerSettings
from raqu_onnx.simulation import Simulator
from raqu_onnx.weights import FIT_PARTS, FitPart, WeightMethod

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from raqu_onnx.quantized import QuantizedNode

HEADER = '<ir_version: 10, opset_import: ["": 18]>'
SEQUENTIAL_PARTS: tuple[FitPart, ...] = ("targets", "residuals", "shrinkage")


def inputs(samples: int, seed: int, channels: int = 6, size: int = 6) -> np.ndarray:
    """Pictures that vary smoothly: neighbours are alike, as in what nets are made for."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(samples, channels, size + 2, size + 2))
    smooth = sum(noise[:, :, i : i + size, j : j + size] for i in range(3) for j in range(3)) / 3
    return np.asarray(smooth, np.float32)


def residual_net(seed: int = 0, blocks: int = 3, width: int = 12) -> ir.Model:
    """Residual blocks of two convolutions, and a linear layer."""
    rng = np.random.default_rng(seed)
    weights: dict[str, tuple[int, ...]] = {"w": (width, 6, 1, 1), "b": (width,), "v": (5, width), "c": (5,)}
    text = "s0 = Conv (x, w, b) "
    for i in range(blocks):
        text += f"""a{i} = Conv <pads = [1, 1, 1, 1]> (s{i}, w{i}, b{i})  r{i} = Relu (a{i})
            d{i} = Conv <pads = [1, 1, 1, 1]> (r{i}, v{i}, c{i})  s{i + 1} = Add (s{i}, d{i}) """
        weights |= {f"w{i}": (width, width, 3, 3), f"b{i}": (width,), f"v{i}": (width, width, 3, 3), f"c{i}": (width,)}
    text += f"p = GlobalAveragePool (s{blocks})  f = Flatten (p)  y = Gemm <transB = 1> (f, v, c)"
    proto = onnx.parser.parse_model(f"{HEADER} g (float[n, 6, 6, 6] x) => (float[n, 5] y) {{ {text} }}")
    for name, shape in weights.items():
        array = rng.normal(size=shape) * np.sqrt(2 / max(1.0, float(np.prod(shape[1:]))))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return prepared(proto)


def linear_net(seed: int = 0) -> ir.Model:
    """Two linear layers with more rows than there are samples."""
    rng = np.random.default_rng(seed)
    proto = onnx.parser.parse_model(
        f"""{HEADER} g (float[n, 64] x) => (float[n, 8] y)
        {{ a = Gemm <transB = 1> (x, w, b)  r = Relu (a)  y = Gemm <transB = 1> (r, v, c) }}"""
    )
    for name, shape in {"w": (64, 64), "b": (64,), "v": (8, 64), "c": (8,)}.items():
        array = rng.normal(size=shape) * np.sqrt(2 / shape[-1])
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return prepared(proto)


def prepared(proto: onnx.ModelProto) -> ir.Model:
    model: ir.Model = TidyPass()(load_model(proto)).model
    AnnotateTilingPass()(model)
    return model


def fitted(
    model: ir.Model,
    x: np.ndarray,
    *without: FitPart,
    bits: int = 3,
    method: WeightMethod = "sequential",
    activation: int = 8,
) -> tuple[ModelQuantizer, dict[str, QuantizedNode]]:
    """The model calibrated on inputs and quantized; the model itself keeps its graph and its weights."""
    data = open_dataset({"x": x}, model_inputs(model))
    CalibratePass(data, threads=1)(model)
    quantizer = build_quantizer(model, "offset", QuantizerSettings(method, without=frozenset(without), threads=1))
    return quantizer, quantizer.quantize_model(dict.fromkeys(quantizer.sources, NodeBits(bits, activation)))


def error(model: ir.Model, quantizer: ModelQuantizer, nodes: Mapping[str, QuantizedNode], x: np.ndarray) -> float:
    """Mean squared error of the outputs, over their variance."""
    data = open_dataset({"x": x}, model_inputs(model))
    expected = collect(make_session(to_proto(model).SerializeToString(), threads=1), data)
    simulator = Simulator(model, [source.node for source in quantizer.sources.values()], threads=1)
    found = simulator.run(nodes, data.batches(64))
    y, reference = found.outputs[0], expected.outputs[0]
    return float(np.square(y - reference).mean() / reference.var(0).mean())


def unlike(one: Mapping[str, QuantizedNode], other: Mapping[str, QuantizedNode]) -> set[str]:
    """Nodes whose codes differ."""
    return {name for name in one if (one[name].codes != other[name].codes).any()}


def assert_equal(one: Mapping[str, QuantizedNode], other: Mapping[str, QuantizedNode]) -> None:
    assert not unlike(one, other)
    for name, node in one.items():
        np.testing.assert_array_equal(node.scales, other[name].scales)
        for left, right in ((node.bias, other[name].bias), (node.float_bias, other[name].float_bias)):
            assert (left is None) == (right is None)
            assert left is None or np.array_equal(left, right)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small() -> ir.Model:
    return residual_net(blocks=1, width=8)


# ------------------------------------------------------------------------------------------------------- each by itself


@pytest.mark.parametrize("part", FIT_PARTS)
def test_every_part_can_be_left_out_and_does_something(small: ir.Model, part: FitPart) -> None:
    model, x = small, inputs(128, 1)
    if part == "shrinkage":
        # Vectors held out decide where there are fewer than rows.
        model, x = linear_net(), np.random.default_rng(1).normal(size=(24, 64)).astype(np.float32)
    whole, rest = (fitted(model, x, *parts)[1] for parts in ((), (part,)))
    different = unlike(whole, rest)
    assert different
    if part == "residuals":
        names = list(whole)
        # Only the node whose output is added to a value, and what comes behind it.
        assert different == set(names[2:])


def test_all_parts_can_be_left_out_together(small: ir.Model) -> None:
    x = inputs(8, 1)
    quantizer, found = fitted(small, x, *FIT_PARTS)
    _, gptq = fitted(small, x, method="gptq")
    assert unlike(found, gptq)
    for name, node in found.items():
        bias, kept = quantizer.sources[name].bias, node.real_bias()
        if bias is not None:
            # Nothing takes up the mean error: the bias is the float one, to its step.
            assert kept is not None
            assert np.abs(kept - bias).max() <= 0.51 * node.bias_scales().max()


@pytest.mark.parametrize(
    ("method", "idle"),
    [
        ("gptq", SEQUENTIAL_PARTS),
        ("mse", tuple(part for part in FIT_PARTS if part != "bias")),
        ("nearest", tuple(part for part in FIT_PARTS if part != "bias")),
    ],
)
def test_parts_of_other_methods_change_nothing(
    small: ir.Model, method: WeightMethod, idle: tuple[FitPart, ...]
) -> None:
    x = inputs(16, 1)
    whole = fitted(small, x, method=method)[1]
    for part in FIT_PARTS:
        rest = fitted(small, x, part, method=method)[1]
        if part in idle:
            assert_equal(whole, rest)
        else:
            apart = any((whole[name].bias != rest[name].bias).any() for name in whole)  # type: ignore[union-attr]
            assert apart or unlike(whole, rest), part


@pytest.mark.parametrize("part", ["scales", "refit"])
def test_scales_are_refined_at_four_bits_and_less_or_where_rows_are_few(small: ir.Model, part: FitPart) -> None:
    x = inputs(16, 1)
    for bits in (4, 5):
        whole, rest = (fitted(small, x, *parts, bits=bits, method="gptq")[1] for parts in ((), (part,)))
        refined = {name for name in whole if (whole[name].scales != rest[name].scales).any()}
        # Rows of the nodes: 6, 72, 72, 8.
        names = list(whole)
        assert refined == (set(names) if bits == 4 else {names[0], names[3]})
        assert unlike(whole, rest) <= refined


def test_without_targets_weights_stay_as_near_to_the_float_ones_as_without_errors_before(small: ir.Model) -> None:
    x = inputs(128, 1)

    def distance(method: WeightMethod, *without: FitPart) -> float:
        quantizer, found = fitted(small, x, *without, bits=8, method=method, activation=3)
        apart = [found[name].weight() - source.weight for name, source in quantizer.sources.items()]
        return float(np.mean([np.abs(item).mean() for item in apart]))

    assert distance("sequential", "targets") < 1.1 * distance("gptq")
    assert distance("sequential") > 1.2 * distance("sequential", "targets")


def test_a_bias_that_stays_is_not_learned_by_the_weights() -> None:
    """Without the part `bias`, a node adds its bias unchanged: weights that gave it as well would give it twice."""
    proto = onnx.parser.parse_model(f"{HEADER} g (float[n, 12] x) => (float[n, 5] y) {{ y = Gemm (x, w, b) }}")
    weights = {"w": np.random.default_rng(0).normal(size=(12, 5)), "b": np.full(5, 40.0)}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()
    )
    model = prepared(proto)
    x = np.random.default_rng(1).normal(size=(400, 12)).astype(np.float32) + 1
    quantizer, nodes = fitted(model, x, "bias", bits=8)
    assert error(model, quantizer, nodes, x) < 1e-3


# ---------------------------------------------------------------------------------------------------- unseen inputs


@pytest.mark.parametrize(("part", "share", "seeds"), [("residuals", 0.98, 40), ("targets", 0.75, 3)])
def test_on_unseen_inputs_the_error_is_less_than_without(part: FitPart, share: float, seeds: int) -> None:
    ratios = []
    for seed in range(seeds):
        model = residual_net(seed, blocks=4, width=8)
        x, unseen = inputs(128, 100 + seed), inputs(64, 200 + seed)
        errors = [error(model, *fitted(model, x, *parts), unseen) for parts in ((), (part,))]
        ratios.append(errors[0] / errors[1])
    assert np.exp(np.mean(np.log(ratios))) < share, ratios


def test_with_few_samples_vectors_held_out_keep_the_fit_from_harm() -> None:
    # The regression fits the outputs of few samples exactly, and knows nothing of others.
    ratios = []
    for seed in range(6):
        rng = np.random.default_rng(100 + seed)
        model = linear_net(seed)
        x, unseen = (rng.normal(size=(count, 64)).astype(np.float32) for count in (24, 200))
        parts: tuple[tuple[FitPart, ...], ...] = ((), ("shrinkage",))
        errors = [error(model, *fitted(model, x, *without), unseen) for without in parts]
        ratios.append(errors[0] / errors[1])
    assert np.exp(np.mean(np.log(ratios))) < 0.97, ratios


# ------------------------------------------------------------------------------------------------------- scarce data


@pytest.mark.parametrize("samples", [1, 2, 3, 7])
def test_few_samples_give_sound_weights_every_time(small: ir.Model, samples: int) -> None:
    x = inputs(samples, 3)
    quantizer, found = fitted(small, x)
    assert_equal(found, fitted(small, x)[1])
    assert_equal(found, quantizer.quantize_model(dict.fromkeys(quantizer.sources, NodeBits(3, 8))))
    for node in found.values():
        assert np.isfinite(node.weight()).all()
        assert np.isfinite(node.real_bias()).all()  # type: ignore[arg-type]
        assert node.codes.any()
    # What ranges of so few samples cost, any method pays.
    methods: tuple[WeightMethod, ...] = ("sequential", "nearest")
    eight, plain = (error(small, *fitted(small, x, bits=8, method=method), inputs(64, 4)) for method in methods)
    assert eight < 1.05 * plain + 1e-3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("limit", [-1e3, 1e3])
def test_a_node_that_no_vector_drives_keeps_its_weights_and_bias(limit: float) -> None:
    """What a selection leaves may be nothing, in the first batch or in all."""
    proto = onnx.parser.parse_model(
        f"""{HEADER} g (float[n, 6] x) => (float[m, 4] y)
        < float limit = {{{limit}}}, int64[1] last = {{1}} >
        {{ top = ReduceMax <keepdims = 0> (x, last)  yes = Less (top, limit)  kept = Compress <axis = 0> (x, yes)
           y = Gemm (kept, w, b) }}"""
    )
    weights = {"w": np.random.default_rng(0).normal(size=(6, 4)), "b": np.array([1.0, -2.0, 3.0, 40.0])}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()
    )
    quantizer, found = fitted(prepared(proto), inputs(70, 0, 1, 6)[:, 0, 0], bits=8)
    node = next(iter(found.values()))
    assert np.isfinite(node.weight()).all()
    np.testing.assert_allclose(node.weight(), weights["w"], atol=0.05)
    np.testing.assert_allclose(node.real_bias(), weights["b"], atol=0.1)  # type: ignore[arg-type]
    assert list(quantizer.sources) == [node.node.name]
