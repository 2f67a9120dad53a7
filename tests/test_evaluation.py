"""Sessions and scores."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from raqu_onnx.data import open_dataset
from raqu_onnx.errors import DataError, ModelError
from raqu_onnx.evaluation import Outputs, Score, collect, default_threads, make_session, score
from raqu_onnx.model_io import load_model, model_inputs

if TYPE_CHECKING:
    from pathlib import Path

    from raqu_onnx.data import Dataset

HEADER = '<ir_version: 10, opset_import: ["": 18]>'
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(50, 6)).astype(np.float32) * 3
NOISY = LOGITS + RNG.normal(size=LOGITS.shape).astype(np.float32)


def outputs_of(*arrays: Any, labels: np.ndarray | None = None) -> Outputs:
    return Outputs(tuple(f"o{i}" for i in range(len(arrays))), tuple(map(np.asarray, arrays)), labels)


def model_of(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{HEADER} {text}")


def opened(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> Dataset:
    return open_dataset(feeds, model_inputs(load_model(proto)))


# ----------------------------------------------------------------------------------------------------------- scores


def test_top1_counts_labels_that_are_largest() -> None:
    labels = LOGITS.argmax(1)
    assert score(outputs_of(LOGITS, labels=labels)) == Score(50, top1=1.0)
    labels[:20] += 1
    assert score(outputs_of(LOGITS, labels=labels)).top1 == 0.6


def test_class_scores_may_end_in_dimensions_of_one() -> None:
    labels = LOGITS.argmax(1)
    flat = score(outputs_of(NOISY, labels=labels), outputs_of(LOGITS))
    assert score(outputs_of(NOISY[:, :, None, None], labels=labels), outputs_of(LOGITS[:, :, None, None])) == flat
    assert flat.top1 is not None
    maps = np.stack([LOGITS, NOISY], axis=-1)
    assert score(outputs_of(maps, labels=labels)).top1 is None


def test_fidelity_against_a_reference() -> None:
    found = score(outputs_of(NOISY), outputs_of(LOGITS))
    assert found.top1 is None
    assert found.agreement == np.mean(NOISY.argmax(1) == LOGITS.argmax(1))
    assert found.agreement < 1
    expected = entropy(softmax(LOGITS.astype(float), axis=1), softmax(NOISY.astype(float), axis=1), axis=1).mean()
    assert found.kl == pytest.approx(expected, rel=1e-6)
    noise = np.square(NOISY.astype(float) - LOGITS).sum()
    assert found.sqnr_db == pytest.approx(10 * math.log10(np.square(LOGITS.astype(float)).sum() / noise))
    assert score(outputs_of(LOGITS), outputs_of(LOGITS)) == Score(50, None, 1.0, 0.0, math.inf)


def test_outputs_that_are_probabilities_are_taken_as_they_are() -> None:
    p, q = softmax(LOGITS, axis=1), softmax(NOISY, axis=1)
    found = score(outputs_of(q), outputs_of(p)).kl
    assert found == pytest.approx(entropy(p.astype(float), q.astype(float), axis=1).mean(), rel=1e-3)
    assert found == pytest.approx(score(outputs_of(NOISY), outputs_of(LOGITS)).kl, rel=1e-3)


def test_certain_probabilities_and_classes_ruled_out_stay_finite() -> None:
    certain, other = np.eye(3), np.roll(np.eye(3), 1, axis=1)
    found = score(outputs_of(other), outputs_of(certain))
    assert found.kl == pytest.approx(-math.log(1e-12))
    masked = LOGITS.copy()
    masked[:, 2] = -np.inf
    same = score(outputs_of(masked), outputs_of(masked))
    assert (same.kl, same.sqnr_db) == (0.0, math.inf)
    # The rest is the divergence over the classes that are left.
    noisy = np.where(np.isinf(masked), masked, NOISY)
    rest = [0, 1, 3, 4, 5]
    expected = score(outputs_of(NOISY[:, rest]), outputs_of(LOGITS[:, rest])).kl
    found = score(outputs_of(noisy), outputs_of(masked))
    assert found.kl == pytest.approx(expected)
    assert found.sqnr_db == pytest.approx(score(outputs_of(NOISY[:, rest]), outputs_of(LOGITS[:, rest])).sqnr_db)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_model_that_breaks_scores_worst(value: float) -> None:
    broken = LOGITS.copy()
    broken[7, 3] = value
    found = score(outputs_of(broken), outputs_of(LOGITS))
    assert found.loss == math.inf
    assert found.sqnr_db == -math.inf


@pytest.mark.parametrize("array", [np.ones((4, 3, 2)), np.ones((4, 1)), np.ones(4), np.ones((4, 3), np.int64)])
def test_outputs_without_classes_have_no_class_scores(array: np.ndarray) -> None:
    found = score(outputs_of(array, labels=np.zeros(4, int)), outputs_of(array))
    assert (found.top1, found.agreement, found.kl) == (None, None, None)
    assert found.samples == 4
    assert found.quality == 1.0
    assert found.loss == 0.0


def test_the_first_table_of_floats_holds_the_classes() -> None:
    boxes, ids = np.ones((50, 4, 4), np.float32), np.ones((50, 6), np.int64)
    labels = LOGITS.argmax(1)
    found = score(outputs_of(boxes, ids, LOGITS, -LOGITS, labels=labels), outputs_of(boxes, ids, LOGITS, -LOGITS))
    assert (found.top1, found.agreement) == (1.0, 1.0)
    # Noise counts in all float outputs, integers are no signal.
    noise = score(outputs_of(boxes, ids, LOGITS, -NOISY), outputs_of(boxes, ids * 100, LOGITS, -LOGITS))
    signal = boxes.size + 2 * np.square(LOGITS.astype(float)).sum()
    error = np.square(NOISY.astype(float) - LOGITS).sum()
    assert noise.sqnr_db == pytest.approx(10 * math.log10(signal / error))
    assert (noise.agreement, noise.kl) == (1.0, 0.0)


def test_labels_of_another_shape_give_no_top1() -> None:
    assert score(outputs_of(LOGITS, labels=np.zeros((50, 2), int))).top1 is None


def test_silence_where_nothing_was_expected() -> None:
    zeros = np.zeros((3, 2, 2))
    assert score(outputs_of(zeros), outputs_of(zeros)).sqnr_db == math.inf
    lost = score(outputs_of(zeros + 1), outputs_of(zeros))
    assert lost.sqnr_db == -math.inf
    assert (lost.quality, lost.loss) == (0.0, math.inf)


def test_loss_and_quality() -> None:
    assert Score(10, top1=0.9, agreement=0.8, kl=0.05, sqnr_db=20).loss == pytest.approx(0.15)
    assert Score(10, agreement=0.8, kl=0.05, sqnr_db=20).loss == pytest.approx(0.05)
    assert Score(10, sqnr_db=20).loss == pytest.approx(0.01)
    assert Score(10, top1=0.75).loss == pytest.approx(0.25)
    assert [Score(1, 0.9, 0.8, 0.1, 9).quality, Score(1, None, 0.8, 0.1, 9).quality] == [0.9, 0.8]
    assert Score(1, sqnr_db=20).quality == pytest.approx(0.99)


# --------------------------------------------------------------------------------------------------------- sessions

LINEAR = "g (float[n, 3] x) => (float[n, 3] y, float s) { y = Neg (x) s = ReduceSum <keepdims = 0> (x) }"


@pytest.mark.parametrize("level", ["enable-all", "disable-all", "simulate"])
def test_batches_are_joined_in_order(level: Any) -> None:
    proto = model_of(LINEAR)
    x = RNG.normal(size=(10, 3)).astype(np.float32)
    labels = np.arange(10)
    session = make_session(proto.SerializeToString(), level=level, threads=1)
    outputs = collect(session, opened(proto, {"x": x, "labels": labels}), batch_size=4)
    assert outputs.names == ("y", "s")
    assert outputs.samples == 10
    np.testing.assert_array_equal(outputs.outputs[0], -x)
    np.testing.assert_allclose(outputs.outputs[1], [x[:4].sum(), x[4:8].sum(), x[8:].sum()], rtol=1e-5)
    assert outputs.labels is not None
    np.testing.assert_array_equal(outputs.labels, labels)


def test_a_model_opens_from_a_file(tmp_path: Path) -> None:
    onnx.save(model_of(LINEAR), tmp_path / "m.onnx")
    for path in (tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        assert [output.name for output in make_session(path, threads=1).get_outputs()] == ["y", "s"]


def test_levels_are_those_of_onnxruntime() -> None:
    proto = model_of("g (float[n, 3] x) => (float[n, 3] y) { i = Identity (x) y = Neg (i) }")
    kinds = {}
    for level in ("enable-all", "disable-all", "simulate"):
        options = make_session(proto.SerializeToString(), level=level, threads=3).get_session_options()  # type: ignore[arg-type]
        kinds[level] = options.graph_optimization_level.name
        assert options.intra_op_num_threads == 3
        quant = options.get_session_config_entry("session.disable_quant_qdq") if level == "simulate" else "1"
        assert quant == "1"
    assert kinds == {"enable-all": "ORT_ENABLE_ALL", "disable-all": "ORT_DISABLE_ALL", "simulate": "ORT_ENABLE_ALL"}
    assert default_threads() >= 1


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\x00broken")
    proto = model_of("g (float[n, 3] x) => (float[n, 3] y) { y = Neg (x) }")
    proto.graph.node[0].op_type = "NoSuchOperator"
    for source, where in ((tmp_path / "broken.onnx", "broken.onnx"), (proto.SerializeToString(), "the model")):
        with pytest.raises(ModelError, match=f"{where}: onnxruntime cannot load it: .") as caught:
            make_session(source, threads=1)
        assert "\n" not in str(caught.value)


def test_data_that_cannot_be_run_is_one_line() -> None:
    proto = model_of("g (float[n, m] x) => (float[n, k] y) <float[3] w = {1, 2, 3}> { y = Add (x, w) }")
    session = make_session(proto.SerializeToString(), threads=1)
    assert collect(session, opened(proto, {"x": np.ones((2, 3), np.float32)})).samples == 2
    with pytest.raises(DataError, match="the model cannot be run on it") as caught:
        collect(session, opened(proto, {"x": np.ones((2, 4), np.float32)}))
    assert "\n" not in str(caught.value)


def test_outputs_that_do_not_fit_together_are_one_line() -> None:
    proto = model_of("g (float[n, 3] x) => (float[a, b] y) { t = Transpose (x) y = Identity (t) }")
    session = make_session(proto.SerializeToString(), threads=1)
    data = opened(proto, {"x": np.ones((5, 3), np.float32)})
    assert collect(session, data, batch_size=5).outputs[0].shape == (3, 5)
    with pytest.raises(DataError, match="output 'y' changes its shape from batch to batch"):
        collect(session, data, batch_size=2)
