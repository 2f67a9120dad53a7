"""Cross-layer equalization: what it may scale, what it leaves alone, and that the model computes what it did."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx.config import OptimizeConfig
from raqu_onnx.data import Dataset, open_dataset, take
from raqu_onnx.equalization import channel_scales, scalable_channels
from raqu_onnx.errors import ConfigError
from raqu_onnx.hardware import load_chip
from raqu_onnx.model_io import load_model, model_inputs, to_proto
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.equalize import EqualizePass
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.pipeline import Resources, build_pipeline, pass_names

INPUT = "float[n, 3, 6, 6] x"
FIRST = "[first] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu (a)"
LAST = "[last] y = Conv (r, w2)"


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights or biases of which each first index has a magnitude of its own."""
    rng = np.random.default_rng(list(name.encode()))
    spread = np.exp(rng.normal(0, 1.2, (shape[0], *(1,) * (len(shape) - 1))))
    return (rng.normal(size=shape) * spread).astype(np.float32)


# Constants, and inputs beside x, that a body may name.
CONSTANTS = {
    "zero": "zero = Constant <value_float = 0.0> ()",
    "one": "one = Constant <value_float = 1.0> ()",
    "six": "six = Constant <value_float = 6.0> ()",
    "by": "by = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> ()",
    "axes": "axes = Constant <value_ints = [1]> ()",
}
Shapes = dict[str, tuple[int, ...]]


def prepared(
    body: str, shapes: Shapes, *, inputs: str = INPUT, exclude: tuple[str, ...] = ()
) -> tuple[ir.Model, Dataset]:
    """A mapped model and its data; outputs are y, and z where the body has one."""
    words = set(re.findall(r"\w+", body))
    inputs += ", float[n, 4, 6, 6] other" * ("other" in words)
    outputs = "float[] y" + ", float[] z" * ("z" in words)
    body = " ".join([*(text for name, text in CONSTANTS.items() if name in words), body])
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => ({outputs}) {{ {body} }}')
    tensors = {name: weight(name, shape) for name, shape in shapes.items() if name in words}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in tensors.items())
    for value in proto.graph.output:
        # Shapes are for inference to find.
        value.type.tensor_type.ClearField("shape")
    inferred = {value.name: value for value in onnx.shape_inference.infer_shapes(proto).graph.output}
    for value in proto.graph.output:
        value.CopyFrom(inferred[value.name])
    onnx.checker.check_model(proto)
    model = TidyPass(exclude=exclude)(load_model(proto)).model
    AnnotateTilingPass(exclude=exclude)(model)
    return model, data(model)


def data(model: ir.Model, samples: int = 6) -> Dataset:
    inputs = model_inputs(model)
    sizes = {item.name: [samples, *(int(size or 1) for size in item.fixed_shape[1:])] for item in inputs}
    rng = np.random.default_rng(5)
    return open_dataset({name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}, inputs)


def run(model: ir.Model, dataset: Dataset, names: list[str] | None = None) -> list[np.ndarray]:
    proto = to_proto(model)
    present = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names or () if name not in present)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(names, next(dataset.batches(100)).feeds)]


def constants(model: ir.Model) -> dict[str, np.ndarray]:
    values = model.graph.initializers.items()
    return {name: value.const_value.numpy().copy() for name, value in values if value.const_value is not None}


def changed_by_equalizing(model: ir.Model, dataset: Dataset, strength: float = 0.5) -> set[str]:
    """Names of the initializers that the pass changes; the outputs must stay."""
    before, expected = constants(model), run(model, dataset)
    result = EqualizePass(dataset, strength=strength, threads=1)(model)
    after = constants(model)
    for found, value in zip(run(model, dataset), expected, strict=True):
        assert np.abs(found - value).max() <= 1e-5 * np.abs(value).max()
    onnx.checker.check_model(to_proto(model), full_check=True)
    assert list(after) == list(before)
    changed = {name for name, array in after.items() if not np.array_equal(array, before[name])}
    assert result.modified == bool(changed)
    return changed


W: Shapes = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (2, 4, 1, 1)}
SCALED: dict[str, tuple[str, Shapes, str]] = {
    "a chain": (f"{FIRST} {LAST}", W, "w1 b1 w2"),
    "a residual": (
        f"{FIRST} c = Conv <pads = [1, 1, 1, 1]> (r, v, vb) s = Add (c, r) t = Relu (s) y = Conv (t, w2)",
        {**W, "v": (4, 4, 3, 3), "vb": (4,)},
        "w1 b1 v vb w2",
    ),
    "a branch that is subtracted, and a sum of three": (
        f"{FIRST} c = Conv (r, v) d = Conv (r, u) e = Sub (r, c) s = Sum (d, e, r) y = Conv (s, w2)",
        {**W, "v": (4, 4, 1, 1), "u": (4, 4, 1, 1)},
        "w1 b1 v u w2",
    ),
    "groups": (
        f"{FIRST} c = Conv <group = 2> (r, v, vb) t = Relu (c) y = Conv (t, u)",
        {**W, "v": (6, 2, 3, 3), "vb": (6,), "u": (2, 6, 1, 1)},
        "w1 b1 v vb u",
    ),
    "a depthwise node between two sets": (
        f"{FIRST} c = Conv <group = 4> (r, v, vb) t = LeakyRelu <alpha = 0.2> (c) y = Conv (t, w2)",
        {**W, "v": (4, 1, 3, 3), "vb": (4,)},
        "w1 b1 v vb w2",
    ),
    "two readers": (
        f"{FIRST} y = Conv (r, w2) z = Conv (r, v)",
        {**W, "v": (3, 4, 3, 3)},
        "w1 b1 w2 v",
    ),
    "Gemm behind Flatten": (
        f"{FIRST} f = Flatten (r) y = Gemm (f, v, vb)",
        {**W, "v": (144, 5), "vb": (5,)},
        "w1 b1 v",
    ),
    "Gemm behind pooling": (
        (
            f"{FIRST} p = GlobalAveragePool (r) f = Flatten (p) g = Gemm <transB = 1> (f, v, vb) h = Relu (g) "
            "y = Gemm (h, u)"
        ),
        {**W, "v": (5, 4), "vb": (5,), "u": (5, 2)},
        "w1 b1 v vb u",
    ),
    "operators that keep channels apart": (
        (
            f"{FIRST} p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r) q = PRelu (p, slope) "
            "o = AveragePool <kernel_shape = [2, 2], pads = [1, 1, 0, 0], count_include_pad = 1> (q) "
            "m = ReduceMean <axes = [2, 3], keepdims = 0> (o) y = MatMul (m, v)"
        ),
        {**W, "slope": (4, 1, 1), "v": (4, 2)},
        "w1 b1 v",
    ),
    "a transposed convolution": (
        f"{FIRST} c = ConvTranspose <strides = [2, 2]> (r, v, vb) t = Relu (c) y = Conv (t, u)",
        {**W, "v": (4, 5, 2, 2), "vb": (5,), "u": (2, 5, 1, 1)},
        "w1 b1 v vb u",
    ),
    "a constant on the left": (
        "m = MatMul (v, x) r = Relu (m) y = MatMul (u, r)",
        {"v": (4, 6), "u": (2, 4)},
        "v u",
    ),
    "a concatenation, one part of which is fixed": (
        f"{FIRST} c = Concat <axis = 1> (x, r) y = Conv (c, v)",
        {**W, "v": (2, 7, 1, 1)},
        "w1 b1 v",
    ),
    "channels split up, a part of which escapes": (
        f"{FIRST} c, d = Split <axis = 1> (r) y = Conv (c, v) z = Sigmoid (d)",
        {**W, "v": (2, 2, 1, 1)},
        "w1 b1 v",
    ),
    "a gate": (
        f"{FIRST} p = GlobalAveragePool (r) e = Conv (p, v, vb) g = Sigmoid (e) s = Mul (r, g) y = Conv (s, w2)",
        {**W, "v": (4, 4, 1, 1), "vb": (4,)},
        "w1 b1 v w2",
    ),
    "only behind what clips": (
        f"{FIRST} c = Conv (r, v, vb) t = Clip (c, zero, six) y = Conv (t, w2)",
        {**W, "v": (4, 4, 1, 1), "vb": (4,)},
        "w1 b1 v",
    ),
}


@pytest.mark.parametrize("case", SCALED)
def test_channels_are_scaled_and_the_outputs_stay(case: str) -> None:
    body, shapes, expected = SCALED[case]
    model, dataset = prepared(body, shapes)
    assert changed_by_equalizing(model, dataset) == set(expected.split())


CONV = "[first] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)"
LEFT_ALONE: dict[str, tuple[str, Shapes]] = {
    "ReLU6": (f"{CONV} r = Clip (a, zero, six) {LAST}", W),
    "a gate made of the same value": (f"{FIRST} g = Sigmoid (a) s = Mul (a, g) y = Conv (s, w2)", W),
    "a reader that is no layer": (f"{FIRST} {LAST} z = Sigmoid (r)", W),
    "an output of the model": (f"{CONV} z = Relu (a) y = Conv (z, w2)", W),
    "a constant that is added": (f"{FIRST} s = Add (r, k) y = Conv (s, w2)", {**W, "k": (4, 1, 1)}),
    "an input that is added": (f"{FIRST} s = Add (r, other) y = Conv (s, w2)", W),
    "channels that are added to all others": (
        f"{FIRST} c = Conv (r, v) s = Add (r, c) y = Conv (s, w2)",
        {**W, "v": (1, 4, 1, 1)},
    ),
    "padding with ones": (f"{FIRST} p = Pad (r, by, one) y = Conv (p, w2)", W),
    "a weight that two nodes read": (f"{FIRST} {LAST} z = Conv (other, w2)", W),
    "a weight that two nodes produce with": (f"{FIRST} {LAST} z = Conv (x, w1)", W),
    "a bias that two nodes add": (f"{FIRST} {LAST} z = Conv (x, v, b1)", {**W, "v": (4, 3, 1, 1)}),
    "its own square": (f"{FIRST} s = Mul (r, r) y = Conv (s, w2)", W),
    "a divisor": (f"{FIRST} s = Div (one, a) y = Conv (s, w2)", W),
    "a softmax over channels": (f"{FIRST} s = Softmax <axis = 1> (r) y = Conv (s, w2)", W),
    "a reader that is not mapped": (f"{FIRST} {LAST} z = MatMul (r, other)", W),
    "channels added up": (
        f"{FIRST} s = ReduceSum <keepdims = 1> (r, axes) y = Conv (s, v)",
        {**W, "v": (2, 1, 1, 1)},
    ),
    "the body of an If": (
        (
            f"{FIRST} {LAST} t = ReduceMax <keepdims = 0> (x) o = Greater (t, zero) z = If (o) "
            "<then_branch = g1 () => (float[n, 4, 6, 6] p) { p = Neg (r) }, "
            "else_branch = g2 () => (float[n, 4, 6, 6] q) { q = Abs (r) }>"
        ),
        W,
    ),
    "a transposed convolution with groups": (
        "a = ConvTranspose <group = 3> (x, v, vb) r = Relu (a) y = Conv (r, u)",
        {"v": (3, 2, 2, 2), "vb": (6,), "u": (2, 6, 1, 1)},
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_would_change_the_model_is_left_alone(case: str) -> None:
    assert changed_by_equalizing(*prepared(*LEFT_ALONE[case])) == set()


def test_excluded_nodes_keep_their_weights() -> None:
    model, dataset = prepared(f"{FIRST} {LAST}", W, exclude=("last",))
    assert changed_by_equalizing(model, dataset) == set()
    model, dataset = prepared(f"{FIRST} {LAST}", W, exclude=("first",))
    assert changed_by_equalizing(model, dataset) == set()


def test_at_full_strength_all_channels_reach_equally_far() -> None:
    model, dataset = prepared(*SCALED["a chain"][:2])

    def reach() -> np.ndarray:
        return np.asarray(run(model, dataset, ["r"])[0].max(axis=(0, 2, 3)))

    before = reach()
    assert before.max() / before.min() > 2
    assert changed_by_equalizing(model, dataset, strength=0.5)
    half = reach()
    np.testing.assert_allclose(half / half[0], np.sqrt(before / before[0]), rtol=1e-4)
    assert changed_by_equalizing(model, dataset, strength=1.0)
    np.testing.assert_allclose(reach(), np.exp(np.log(half).mean()), rtol=1e-4)
    assert changed_by_equalizing(model, dataset, strength=0.0) == set()


def test_ranges_are_those_of_the_samples_asked_for() -> None:
    found = []
    for samples, taken in ((2, None), (9, 2), (64, None)):
        model, _ = prepared(*SCALED["a residual"][:2])
        arrays = {name: array[:6] for name, array in next(data(model).batches(100)).feeds.items()}
        dataset = open_dataset(arrays, model_inputs(model))
        EqualizePass(dataset if taken is None else take(dataset, taken), samples=samples, threads=1)(model)
        found.append(constants(model)["w1"])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_a_fixed_batch_stays_whole() -> None:
    model, dataset = prepared(*SCALED["a chain"][:2], inputs="float[2, 3, 6, 6] x")
    assert dataset.unit == 2
    before = constants(model)["w2"]
    EqualizePass(dataset, samples=3, threads=1)(model)
    assert not np.array_equal(constants(model)["w2"], before)


def test_dead_channels_keep_their_weights() -> None:
    model, dataset = prepared(*SCALED["a chain"][:2])
    bias = model.graph.initializers["b1"]
    bias.const_value = ir.tensor(np.array([-1e6, 0, 1, 0], np.float32), name="b1")
    before = constants(model)
    assert changed_by_equalizing(model, dataset)
    after = constants(model)
    np.testing.assert_array_equal(after["w1"][0], before["w1"][0])
    assert (after["w1"][1:] != before["w1"][1:]).any(axis=(1, 2, 3)).all()


def test_it_refuses_to_run_behind_calibrate() -> None:
    model, dataset = prepared(*SCALED["a chain"][:2])
    CalibratePass(dataset, threads=1)(model)
    with pytest.raises(ir.passes.PreconditionError, match="before it"):
        EqualizePass(dataset)(model)


@pytest.mark.parametrize(("options", "said"), [({"samples": 0}, "samples is 0"), ({"strength": 1.5}, "from 0 to 1")])
def test_options_out_of_range_are_refused(options: dict[str, float], said: str) -> None:
    model, dataset = prepared(*SCALED["a chain"][:2])
    with pytest.raises(ConfigError, match=said):
        EqualizePass(dataset, **options)(model)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- the arithmetic


def test_sums_share_classes_and_tensors_share_groups() -> None:
    model, _ = prepared(*SCALED["a residual"][:2])
    found = scalable_channels(model)
    # Both convolutions feed one stream; the last one feeds the output and is fixed.
    first, second, last = found.produced.values()
    assert found.shared[first].tolist() == found.shared[second].tolist()
    assert len(set(found.shared[first].ravel())) == 4
    assert found.free[found.shared[first]].all()
    assert not found.free[found.shared[last]].any()
    assert len(set(found.together[found.shared[first]].ravel())) == 1


def test_scales_are_powers_of_what_a_range_is_over_the_mean() -> None:
    ranges = np.array([8.0, 2.0, 3.0, 0.0, 5.0, np.inf])
    together = np.array([0, 0, 1, 1, 2, 2])
    free = np.array([True, True, True, True, False, True])
    np.testing.assert_allclose(channel_scales(ranges, together, free), [2**0.5, 0.5**0.5, 1, 1, 1, 1])
    np.testing.assert_allclose(channel_scales(ranges, together, free, strength=1.0)[:2], [2, 0.5])
    # A channel that is fixed counts, but keeps its scale.
    np.testing.assert_allclose(channel_scales(ranges[:2], together[:2], np.array([True, False])), [2**0.5, 1])
    np.testing.assert_allclose(channel_scales(np.array([1e4, 1.0]), together[:2], free[:2], strength=1.0), [16, 1 / 16])
    # Next to nothing is nothing.
    np.testing.assert_allclose(channel_scales(np.array([1e8, 1.0, 4.0]), np.zeros(3, int), free[:3]), [1, 1, 1])
    assert channel_scales(np.empty(0), np.empty(0, int), np.empty(0, bool)).shape == (0,)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.floats(0, 1))
def test_the_geometric_mean_stays(ranges: list[float], strength: float) -> None:
    count = len(ranges)
    scales = channel_scales(np.array(ranges), np.zeros(count, int), np.ones(count, bool), strength=strength, limit=1e3)
    assert np.log(scales).mean() == pytest.approx(0, abs=1e-9)
    # The order of the channels stays as well.
    reach = np.array(ranges) / scales
    assert (np.diff(reach[np.argsort(ranges)]) >= -1e-9).all()


# ----------------------------------------------------------------------------------------------------- the option


def test_it_stands_before_calibrate_where_it_is_asked_for(
    tmp_path: Path, small_net: Callable[..., onnx.ModelProto], small_data: Callable[..., dict[str, np.ndarray]]
) -> None:
    dataset = open_dataset(small_data(8), model_inputs(load_model(small_net())))
    resources = Resources(load_chip("generic"), dataset, dataset, tmp_path)

    def names(config: OptimizeConfig) -> list[str]:
        found = [str(item.name) for item in build_pipeline(config, resources)]  # type: ignore[attr-defined]
        assert found == pass_names(config)
        return found

    assert "equalize" not in names(OptimizeConfig())
    found = names(OptimizeConfig(equalize=True))
    assert found[found.index("annotate-tiling") + 1 : found.index("calibrate")] == ["equalize"]
    assert "equalize" not in names(OptimizeConfig(equalize=True, skip=("equalize",)))
    text = OptimizeConfig(passes="tidy,annotate-tiling,equalize{strength=0.25 samples=3}", threads=1)
    item = build_pipeline(text, resources)[2]
    assert item == EqualizePass(dataset, samples=3, strength=0.25, threads=1)


def test_a_run_with_it_is_complete_and_valid(cli: Callable[..., object], workspace: Path) -> None:
    import json

    data = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz")
    fixed = ("--weight-bits", "8", "--hw", "chip.toml", "--seed", "3", "--threads", "1", "--weight-method", "nearest")
    float_weights = onnx.numpy_helper.to_array(onnx.load("model.onnx").graph.initializer[0])
    rows = {}
    for folder, options in (("plain", ()), ("equal", ("--equalize",))):
        ran = cli("optimize", "model.onnx", *data, *fixed, *options, "-q", "-o", folder)
        assert ran.code == 0, ran  # type: ignore[attr-defined]
        assert cli("validate", folder).code == 0  # type: ignore[attr-defined]
        report = json.loads((workspace / folder / "report.json").read_text())
        rows[folder] = {row["label"]: row for row in report["figures"]}
        manifest = json.loads((workspace / folder / "manifest.json").read_text())
        assert manifest["configuration"]["equalize"] == bool(options)
    assert np.array_equal(float_weights, onnx.numpy_helper.to_array(onnx.load("model.onnx").graph.initializer[0]))
    assert (workspace / "plain/model.onnx").read_bytes() != (workspace / "equal/model.onnx").read_bytes()
    assert rows["plain"]["float"] == rows["equal"]["float"]
    # Baselines are judged on the float graph as it came, which all equalized nodes together must fit.
    assert rows["equal"].keys() == rows["plain"].keys()
    for row in rows["equal"].values():
        assert row["evaluation"]["kl"] < 0.01
