"""What calibration learns, and the whole core on the bundled ResNet-20."""

from __future__ import annotations

import tracemalloc
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from tensors import normal

from raqu_onnx.annotations import HISTOGRAM, MAPPED, MOMENTS, QUANTIZER, NodeBits, mapped_nodes
from raqu_onnx.data import Batch, Dataset, open_dataset, take
from raqu_onnx.data_base import IndexedDataset
from raqu_onnx.errors import DataError
from raqu_onnx.evaluation import collect, make_session, score
from raqu_onnx.graph_edit import infer_shapes, name_nodes
from raqu_onnx.model_io import load_model, model_inputs, to_proto
from raqu_onnx.passes import calibrate
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.insert_qdq import InsertQDQPass
from raqu_onnx.passes.quantize_weights import QuantizeWeightsPass
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.patches import input_vectors
from raqu_onnx.simulation import Simulator
from raqu_onnx.statistics import Histogram, InputMoments

if TYPE_CHECKING:
    pass

HEADER = '<ir_version: 10, opset_import: ["": 18]>'


def mapped_model(text: str, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f"{HEADER} {text}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    model = load_model(proto)
    name_nodes(model)
    infer_shapes(model)
    AnnotateTilingPass()(model)
    return model


def calibrated(model: ir.Model, feeds: dict[str, np.ndarray], **options: int | bool) -> ir.Model:
    dataset = open_dataset(feeds, model_inputs(model))
    assert CalibratePass(dataset, threads=1, **options)(model).modified  # type: ignore[arg-type]
    return model


def assert_same_histogram(found: Histogram | None, values: np.ndarray) -> None:
    expected = Histogram()
    expected.update(values)
    assert found is not None
    np.testing.assert_array_equal(found.counts, expected.counts)
    assert (found.low, found.high, found.zeros) == (expected.low, expected.high, expected.zeros)


TWO = """g (float[n, 3, 6, 6] x) => (float[n, 5] y)
    { a = Conv <pads = [1, 1, 1, 1]> (x, u, b) r = Relu (a) p = GlobalAveragePool (r) f = Flatten (p)
      y = Gemm (f, w, c) }"""


def two_layers() -> ir.Model:
    return mapped_model(TWO, u=normal(4, 3, 3, 3), b=normal(4), w=normal(4, 5), c=normal(5))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_input_of_a_mapped_node_is_observed_whatever_the_batches(batch_size: int) -> None:
    x = normal(20, 3, 6, 6)
    model = calibrated(two_layers(), {"x": x}, batch_size=batch_size)
    conv, gemm = mapped_nodes(model)
    assert_same_histogram(HISTOGRAM.get(conv), x)
    proto = to_proto(model)
    proto.graph.output.append(onnx.ValueInfoProto(name="f"))
    f = make_session(proto.SerializeToString(), threads=1).run(["f"], {"x": x})[0]
    for node, values in ((conv, x), (gemm, f)):
        mapped, moments = MAPPED.require(node), MOMENTS.require(node)
        vectors = input_vectors(mapped, values)
        assert moments.count == len(vectors)
        expected = InputMoments(mapped.layout.groups, mapped.layout.rows)
        expected.update(vectors)
        np.testing.assert_allclose(moments.mean, expected.mean, atol=1e-5)
        np.testing.assert_allclose(moments.covariance(), expected.covariance(), atol=1e-4)
    assert (MAPPED.require(conv).mvms, MAPPED.require(gemm).mvms) == (36, 1)


def test_the_graph_stays_as_it_was() -> None:
    model = two_layers()
    before = to_proto(model).SerializeToString(deterministic=True)
    calibrated(model, {"x": normal(4, 3, 6, 6)})
    assert to_proto(model).SerializeToString(deterministic=True) == before


def test_a_model_whose_only_mapped_node_reads_its_input() -> None:
    model = mapped_model("g (float[n, 4] x) => (float[n, 5] y) { y = MatMul (x, w) }", w=normal(4, 5))
    x = normal(9, 4)
    node = mapped_nodes(calibrated(model, {"x": x}))[0]
    assert_same_histogram(HISTOGRAM.get(node), x)
    np.testing.assert_allclose(MOMENTS.require(node).mean[0], x.mean(0), atol=1e-6)
    assert MAPPED.require(node).mvms == 1


def test_an_input_that_is_an_output_too() -> None:
    text = "g (float[n, 4] x) => (float[n, 4] r, float[n, 4] y) { r = Relu (x) y = MatMul (r, w) }"
    x = normal(9, 4)
    node = mapped_nodes(calibrated(mapped_model(text, w=normal(4, 4)), {"x": x}))[0]
    assert_same_histogram(HISTOGRAM.get(node), np.maximum(x, 0))


def test_readers_of_one_tensor_share_a_histogram_and_not_their_moments() -> None:
    text = """g (float[n, 2, 5, 5] x) => (float[n, 3, 5, 5] y, float[n, 3, 3, 3] z)
        { y = Conv (x, u) z = Conv (x, v) }"""
    model = mapped_model(text, u=normal(3, 2, 1, 1), v=normal(3, 2, 3, 3))
    first, second = mapped_nodes(calibrated(model, {"x": normal(6, 2, 5, 5)}))
    assert HISTOGRAM.require(first) is HISTOGRAM.require(second)
    assert [MOMENTS.require(n).mean.shape for n in (first, second)] == [(1, 2), (1, 18)]


@pytest.mark.parametrize(
    ("text", "x", "weights", "mvms"),
    [
        ("g (float[n, 2, h, w] x) => (float[n, 3, a, b] y) { y = Conv (x, k) }", (4, 2, 7, 6), (3, 2, 3, 3), 20),
        (
            "g (float[n, 2, h] x) => (float[n, 3, a] y) { y = ConvTranspose <strides=[2]> (x, k) }",
            (4, 2, 5),
            (2, 3, 2),
            10,
        ),
        ("g (float[n, s, 6] x) => (float[n, s, 3] y) { y = MatMul (x, k) }", (4, 9, 6), (6, 3), 9),
        ("g (float[n, 6, s] x) => (float[n, 3, s] y) { y = MatMul (k, x) }", (4, 6, 8), (3, 6), 8),
    ],
)
def test_mvms_are_learned_where_shapes_are_free(
    text: str, x: tuple[int, ...], weights: tuple[int, ...], mvms: int
) -> None:
    model = mapped_model(text, k=normal(*weights))
    assert MAPPED.require(mapped_nodes(model)[0]).mvms is None
    node = mapped_nodes(calibrated(model, {"x": normal(*x)}, batch_size=3))[0]
    assert MAPPED.require(node).mvms == mvms
    assert MOMENTS.require(node).count == x[0] * mvms


def test_mvms_are_counted_where_tokens_lie_on_the_first_axis() -> None:
    text = """g (float[n, 6, 4] x) => (float[m, 3] y)
        { s = Constant <value_ints = [-1, 4]> () r = Reshape (x, s) y = MatMul (r, w) }"""
    model = mapped_model(text, w=normal(4, 3))
    (node,) = mapped_nodes(calibrated(model, {"x": normal(10, 6, 4)}, batch_size=4))
    assert MAPPED.require(node).mvms == 6


def test_moments_are_left_out_on_request() -> None:
    nodes = mapped_nodes(calibrated(two_layers(), {"x": normal(4, 3, 6, 6)}, moments=False))
    assert [MOMENTS.get(node) for node in nodes] == [None, None]
    assert all(HISTOGRAM.get(node) is not None for node in nodes)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_moments_take_the_same_vectors_whatever_the_batches(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    monkeypatch.setattr("raqu_onnx.passes.calibrate._FEWEST_VECTORS", 80)
    monkeypatch.setattr("raqu_onnx.passes.calibrate._VECTORS_PER_ROW", 0)
    x = normal(8, 3, 6, 6)
    conv, gemm = mapped_nodes(calibrated(two_layers(), {"x": x}, batch_size=batch_size))
    assert MOMENTS.require(conv).count == 80
    assert MOMENTS.require(gemm).count == 8
    mean = input_vectors(MAPPED.require(conv), x).mean(0)
    np.testing.assert_allclose(MOMENTS.require(conv).mean, mean, atol=0.5)


def test_no_run_takes_more_vectors_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raqu_onnx.passes.calibrate._VALUES_PER_RUN", 27 * 50)
    conv, _ = mapped_nodes(calibrated(two_layers(), {"x": normal(8, 3, 6, 6)}, batch_size=4))
    # One sample to weigh, then three and four.
    assert MOMENTS.require(conv).count == 36 + 50 + 50


def test_squares_alone_are_the_diagonal_of_all_pairs() -> None:
    feeds = {"x": normal(8, 3, 6, 6)}
    full = mapped_nodes(calibrated(two_layers(), feeds))
    squares = mapped_nodes(calibrated(two_layers(), feeds, pairs=False))
    for one, other in zip(full, squares, strict=True):
        pairs, alone = MOMENTS.require(one), MOMENTS.require(other)
        assert (pairs.full, alone.full) == (True, False)
        np.testing.assert_allclose(alone.mean, pairs.mean, rtol=1e-6)
        diagonal = np.diagonal(pairs.covariance(), axis1=1, axis2=2)
        np.testing.assert_allclose(alone.covariance(), diagonal, rtol=1e-4)


def runs_of(monkeypatch: pytest.MonkeyPatch, x: np.ndarray, text: str = TWO, **options: int) -> list[tuple[int, int]]:
    """Samples and fetched bytes of every run of the model."""
    seen: list[tuple[int, int]] = []
    run_feeds = calibrate.run_feeds

    def record(session: object, names: list[str], feeds: dict[str, np.ndarray], where: str) -> list[np.ndarray]:
        values = run_feeds(session, names, feeds, where)  # type: ignore[arg-type]
        seen.append((len(feeds["x"]), sum(array.nbytes for array in (*feeds.values(), *values))))
        return values

    monkeypatch.setattr(calibrate, "run_feeds", record)
    model = mapped_model(text, u=normal(4, 3, 3, 3), b=normal(4), w=normal(4, 5), c=normal(5))
    calibrated(model, {"x": x}, **options)
    return seen


def test_a_run_takes_as_many_samples_as_memory_allows_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(40, 3, 6, 6)
    free = runs_of(monkeypatch, x, batch_size=16)
    assert [samples for samples, _ in free] == [1, 15, 16, 8]
    monkeypatch.setattr(calibrate, "_FETCHED_BYTES", 5 * free[0][1])
    tight = runs_of(monkeypatch, x, batch_size=16)
    assert sum(samples for samples, _ in tight) == 40
    assert max(fetched for _, fetched in tight) <= 5 * free[0][1]
    assert max(samples for samples, _ in tight) == 5
    monkeypatch.setattr(calibrate, "_READ_BYTES", 2 * x[0].nbytes)
    assert max(samples for samples, _ in runs_of(monkeypatch, x, batch_size=16)) == 2


def test_units_of_a_fixed_batch_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_FETCHED_BYTES", 1)
    runs = runs_of(monkeypatch, normal(12, 3, 6, 6), TWO.replace("float[n, ", "float[4, "), batch_size=16)
    assert [samples for samples, _ in runs] == [4, 4, 4]


class Endless(IndexedDataset):
    """Samples that exist only while they are read."""

    def load(self, where: slice | np.ndarray) -> Batch:
        positions = np.arange(self.size)[where]
        return Batch({"x": normal(len(positions), 3, 6, 6, seed=int(positions[0]))})


@pytest.mark.parametrize("pairs", [True, False])
def test_ten_thousand_samples_take_the_memory_of_a_hundred(pairs: bool) -> None:
    def peak(samples: int) -> int:
        model = two_layers()
        data = Endless("endless", "0", model_inputs(model), size=samples, has_labels=False)
        tracemalloc.start()
        CalibratePass(data, threads=1, pairs=pairs)(model)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert HISTOGRAM.require(mapped_nodes(model)[0]).counts.sum() == samples * 108
        return found

    # What is only made once is made now.
    peak(100)
    few, many = peak(100), peak(10_000)
    # Every sample is 432 bytes: all of them, or what is fetched of them, would be megabytes.
    assert many < few + 100_000


@pytest.mark.parametrize(("expression", "value"), [("Add (x, x)", 3e38), ("Div (x, x)", 0.0), ("Log (x)", 0.0)])
def test_values_that_are_not_finite_are_refused_in_one_line(expression: str, value: float) -> None:
    text = f"g (float[n, 4] x) => (float[n, 4] y) {{ d = {expression} y = MatMul (d, w) }}"
    x = np.abs(normal(9, 4)) + 1
    x[5, 2] = value
    model = mapped_model(text, w=normal(4, 4))
    with pytest.raises(DataError, match="tensor 'd' becomes infinite or not a number") as caught:
        calibrated(model, {"x": x})
    assert "\n" not in str(caught.value)


def test_unmapped_models_are_told_what_is_missing() -> None:
    model = two_layers()
    data = open_dataset({"x": normal(4, 3, 6, 6)}, model_inputs(model))
    for node in model.graph:
        node.meta.clear()
    with pytest.raises(ir.passes.PreconditionError) as caught:
        CalibratePass(data)(model)
    assert "annotate-tiling" in str(caught.value.__cause__ or caught.value)


# -------------------------------------------------------------------------------------------------------- ResNet-20


def bundled_data(model: ir.Model, part: str, samples: int) -> Dataset:
    with np.load(str(files("raqu_onnx.bundled") / "fashion_mnist.npz")) as arrays:
        images, labels = arrays[f"{part}_images"][:samples], arrays[f"{part}_labels"][:samples]
    inputs = model_inputs(model)
    feeds = {inputs[0].name: images[:, None].astype(np.float32) / 255, "labels": labels.astype(np.int64)}
    return open_dataset(feeds, inputs)


def test_resnet20_keeps_its_accuracy_at_eight_bits() -> None:
    model = load_model(str(files("raqu_onnx.bundled") / "resnet20.onnx"))
    calibration, test = bundled_data(model, "calibration", 128), bundled_data(model, "test", 1000)
    TidyPass()(model)
    AnnotateTilingPass()(model)
    CalibratePass(calibration)(model)
    reference = collect(make_session(to_proto(model).SerializeToString()), test)
    floating = score(reference).top1
    assert floating is not None
    assert floating > 0.9
    QuantizeWeightsPass(weight_bits=8, activation_bits=8)(model)
    quantizer = QUANTIZER.require(model)
    nodes = [MAPPED.require(node) for node in mapped_nodes(model)]
    assert len(nodes) == 22
    # Before the graph is rewritten: the simulator, on fewer images.
    few = take(test, 200)
    simulated = Simulator(model, nodes).run(
        {node.name: quantizer.quantize(node.name, NodeBits(8, 8)) for node in nodes}, few.batches(100)
    )
    InsertQDQPass()(model)
    serialized = to_proto(model).SerializeToString()
    for level in ("enable-all", "disable-all"):
        found = score(collect(make_session(serialized, level=level), test), reference)  # type: ignore[arg-type]
        assert found.top1 is not None
        assert found.agreement is not None
        assert abs(found.top1 - floating) <= 0.005
        assert found.agreement >= 0.985
    emitted = collect(make_session(serialized, level="disable-all"), few)
    fidelity = score(simulated, emitted)
    assert fidelity.agreement == 1.0
    assert fidelity.sqnr_db is not None
    assert fidelity.sqnr_db > 30
