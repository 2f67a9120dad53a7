"""Sessions and scores."""

from __future__ import annotations

import itertools
import math
import tempfile
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from raqu_onnx.data import open_dataset
from raqu_onnx.errors import DataError, ModelError
from raqu_onnx.evaluation import (
    Outputs,
    Reference,
    Score,
    collect,
    default_threads,
    make_session,
    run_batches,
    score,
)
from raqu_onnx.model_io import load_model, model_inputs
from raqu_onnx.scoring import Scorer

if TYPE_CHECKING:
    from pathlib import Path

    from raqu_onnx.data import Dataset

HEADER = '<ir_version: 10, opset_import: ["": 18]>'
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(50, 6)).astype(np.float32) * 3
NOISY = LOGITS + RNG.normal(size=LOGITS.shape).astype(np.float32)


def outputs_of(*arrays: Any, labels: np.ndarray | None = None) -> Outputs:
    return Outputs(tuple(f"o{i}" for i in range(len(arrays))), tuple(map(np.asarray, arrays)), labels, len(arrays[0]))


def model_of(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{HEADER} {text}")


def opened(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> Dataset:
    return open_dataset(feeds, model_inputs(load_model(proto)))


# ----------------------------------------------------------------------------------------------------------- scores


def test_top1_counts_labels_that_are_largest() -> None:
    labels = LOGITS.argmax(1)
    assert score(outputs_of(LOGITS, labels=labels)) == Score(50, top1=1.0)
    labels[:20] = (labels[:20] + 1) % 6
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


def test_the_only_table_of_floats_holds_the_classes() -> None:
    boxes, ids = np.ones((50, 4, 4), np.float32), np.ones((50, 6), np.int64)
    labels = LOGITS.argmax(1)
    one = outputs_of(boxes, ids, LOGITS, labels=labels)
    assert score(one, one) == Score(50, 1.0, 1.0, 0.0, math.inf)
    # Of two, `auto` takes neither.
    two = outputs_of(boxes, ids, LOGITS, -LOGITS, labels=labels)
    assert score(two, two) == Score(50, sqnr_db=math.inf)
    assert score(two, two, "classification") == Score(50, 1.0, 1.0, 0.0, math.inf)
    # Noise counts in all float outputs, integers are no signal.
    noise = score(
        outputs_of(boxes, ids, LOGITS, -NOISY), outputs_of(boxes, ids * 100, LOGITS, -LOGITS), "classification"
    )
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
    assert Score(10, top1=0.9, agreement=0.8, kl=0.05, sqnr_db=20).loss == pytest.approx(0.05)
    assert Score(10, top1=0.9, kl=0.05, measured="top-1", value=0.9).loss == pytest.approx(0.06)
    assert Score(10, agreement=0.8, kl=0.05, sqnr_db=20).loss == pytest.approx(0.05)
    assert Score(10, sqnr_db=20).loss == pytest.approx(0.01)
    assert Score(10, top1=0.75, measured="top-1", value=0.75).loss == pytest.approx(0.025)
    assert [Score(1, 0.9, 0.8, 0.1, 9).quality, Score(1, None, 0.8, 0.1, 9).quality] == [0.9, 0.8]
    assert Score(1, sqnr_db=20).quality == pytest.approx(0.99)


def test_the_task_says_what_is_judged() -> None:
    labels = LOGITS.argmax(1)
    labelled, reference = outputs_of(NOISY, labels=labels), outputs_of(LOGITS, labels=labels)
    values = score(labelled, reference, "regression")
    assert (values.top1, values.agreement, values.kl) == (None, None, None)
    assert values.sqnr_db == score(labelled, reference).sqnr_db
    assert values.metric == "1 - noise/signal"
    assert values.quality == pytest.approx(1 - 10 ** (-(values.sqnr_db or 0) / 10))
    assert score(labelled, reference).metric == "top-1"
    assert score(outputs_of(NOISY), outputs_of(LOGITS)).metric == "agreement"
    with pytest.raises(DataError, match=r"^--task classification: no float output has one row of class scores"):
        score(outputs_of(np.ones((4, 3, 2))), task="classification")
    # As many rows as samples, not as many as anything.
    halves = Outputs(("o",), (LOGITS,), None, 25)
    assert score(halves, halves).metric == "1 - noise/signal"


def test_an_output_of_another_shape_is_lost() -> None:
    boxes = np.ones((4, 5, 2))
    found = score(outputs_of(np.ones((4, 7, 2))), outputs_of(boxes))
    assert (found.sqnr_db, found.quality) == (0.0, 0.0)


# ------------------------------------------------------------------------------------------------- batch by batch

HEADS = """g (float[n, 6] x) => (float[n, 6] y, float[n, 2, 3] maps, int64[n] best) {
    two = Constant <value_float = 2.0> () y = Mul (x, two)
    shape = Constant <value_ints = [-1, 2, 3]> () maps = Reshape (x, shape)
    best = ArgMax <axis = 1, keepdims = 0> (x)
}"""


@pytest.mark.parametrize("memory", [0, 1000, 1 << 20])
@pytest.mark.parametrize("task", ["auto", "regression"])
def test_scores_by_batch_are_those_of_the_whole(memory: int, task: Any) -> None:
    """Whatever lies in the temporary file; counts and KL to the last bit, powers up to their order of summing."""
    session = make_session(model_of(HEADS).SerializeToString(), threads=1)
    labels = LOGITS.argmax(1)
    labels[:7] = 0
    clean = opened(model_of(HEADS), {"x": LOGITS, "labels": labels})
    noisy = opened(model_of(HEADS), {"x": NOISY, "labels": labels})
    reference = Reference(session, clean, 8, task, memory_bytes=memory)
    whole = collect(session, clean, 8)
    assert reference.is_classifier == (task == "auto")
    assert reference.score == score(whole, whole, task)
    expected = score(collect(session, noisy, 8), whole, task)
    for _ in range(2):
        found = reference.judge(run_batches(session, noisy, 8))
        assert replace(found, sqnr_db=None) == replace(expected, sqnr_db=None)
        assert found.sqnr_db == pytest.approx(expected.sqnr_db, rel=1e-12)
    # The first batches alone; two readers at once do not disturb each other.
    first = itertools.islice(run_batches(session, noisy, 8), 3)
    judged = reference.judge(
        (item, reference.judge(run_batches(session, clean, 8)) and values) for item, values in first
    )
    part = {"x": LOGITS[:24], "labels": labels[:24]}, {"x": NOISY[:24], "labels": labels[:24]}
    first_clean, first_noisy = (collect(session, opened(model_of(HEADS), data), 8) for data in part)
    few = score(first_noisy, first_clean, task)
    assert replace(judged, sqnr_db=None) == replace(few, sqnr_db=None)


def test_a_reference_keeps_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = model_of(
        "g (float[n, 4000] x) => (float[n, 40, 100] y) "
        "{ s = Constant <value_ints = [-1, 40, 100]> () y = Reshape (x, s) }"
    )
    session = make_session(proto.SerializeToString(), threads=1)
    data = opened(proto, {"x": np.ones((200, 4000), np.float32)})
    reference = Reference(session, data, 4, memory_bytes=0)
    tracemalloc.start()
    assert reference.judge(run_batches(session, data, 4)).sqnr_db == math.inf
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All outputs are 3.2 MB, those of a batch 64 kB.
    assert peak < 1_000_000

    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"^no room for data that is read again \(No space left on device\); make room"):
        Reference(session, data, 4, memory_bytes=0)


def test_results_must_keep_their_number_of_classes() -> None:
    scorer = Scorer(0, where="data")
    scorer.add([LOGITS], 50)
    with pytest.raises(DataError, match=r"^data: class scores change their shape from batch to batch"):
        scorer.add([LOGITS[:, :4]], 50)
    with pytest.raises(DataError, match="it holds no samples"):
        Scorer(None).result()


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
