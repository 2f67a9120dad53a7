"""What a result is measured by: accuracies, fidelities, and functions of the user's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raqu_onnx.errors import DataError
from raqu_onnx.metrics import AUTO, Measure, parse_metric
from raqu_onnx.scoring import KL, NOISE, Score

Cli = Callable[..., Any]
DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz")
RUN = ("optimize", "model.onnx", "--hw", "chip.toml", *DATA, "--evaluations", "2", "-o", "out")
SCORE = Score(20, top1=0.5, agreement=0.75, kl=0.25, sqnr_db=10.0)


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("auto", "auto", "auto"),
        ("top1", "topk", "top-1"),
        ("top5", "topk", "top-5"),
        ("topk:3", "topk", "top-3"),
        ("agreement", "agreement", "agreement"),
        ("kl", "kl", "KL"),
        ("sqnr", "sqnr", NOISE),
        ("a folder/metric.py:mean_iou", "function", "metric.py:mean_iou"),
    ],
)
def test_metrics_are_read(text: str, kind: str, name: str) -> None:
    found = parse_metric(text)
    assert (found.kind, found.name) == (kind, name)


@pytest.mark.parametrize(
    "text", ["", "top", "top0", "topk:", "accuracy", "metric.py", "metric.py:", "m.py:1x", 5, None]
)
def test_what_is_no_metric_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is no metric"):
        parse_metric(text)


@given(hnp.arrays(np.float32, (9, 6), elements=st.integers(-3, 3).map(float)), st.integers(1, 5), st.data())
def test_top_k_counts_the_labels_among_the_largest(table: np.ndarray, k: int, data: st.DataObject) -> None:
    labels = np.array([data.draw(st.integers(0, 5)) for _ in range(9)])
    measure = Measure(parse_metric(f"topk:{k}"), ("scores",), 0, "data")
    for part in (slice(0, 4), slice(4, 9)):
        measure.add([table[part]], len(table[part]), labels[part])
    # Equal scores: the first class is the larger one, as for argmax.
    order = np.argsort(-table, axis=1, kind="stable")[:, :k]
    expected = np.mean([label in row for label, row in zip(labels, order, strict=True)])
    found = measure.on(Score(9, top1=0.0, agreement=1.0, kl=0.0, sqnr_db=9.0))
    assert found.quality == pytest.approx(expected)
    if k == 1:
        assert found.quality == pytest.approx(np.mean(table.argmax(1) == labels))


def test_quality_is_what_was_named() -> None:
    for text, quality, name in (
        ("agreement", 0.75, "agreement"),
        ("kl", -0.25, KL),
        ("sqnr", 0.9, NOISE),
    ):
        found = Measure(parse_metric(text), ("scores",), 0, "data").on(SCORE)
        assert found.quality == pytest.approx(quality)
        assert found.metric == name
    assert Measure(AUTO, ("scores",), 0, "data").on(SCORE) == SCORE
    assert (SCORE.quality, SCORE.metric) == (0.5, "top-1")


def test_the_search_minimizes_what_was_named() -> None:
    # Labels alone do not make top-1 count.
    assert SCORE.loss == pytest.approx(0.25)
    named = Score(9, top1=0.5, kl=0.25, measured="top-1", value=0.5)
    assert named.loss == pytest.approx(0.25 + 0.05)
    measures = {text: Measure(parse_metric(text), ("scores",), 0, "data").on(SCORE) for text in ("kl", "sqnr")}
    assert measures["kl"].loss == pytest.approx(0.25)
    assert measures["sqnr"].loss == pytest.approx(0.1)
    assert Score(9, kl=0.25, measured="m.py:f", value=0.4).loss == pytest.approx(0.25 + 0.06)


@pytest.mark.parametrize(
    ("text", "score", "said"),
    [
        ("top5", SCORE, "it has no labels"),
        ("kl", Score(9, sqnr_db=3.0), "no class scores"),
        ("agreement", Score(9, sqnr_db=3.0), "no class scores"),
    ],
)
def test_what_data_or_model_lack_is_told(text: str, score: Score, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Measure(parse_metric(text), ("scores",), 0, "data.npz").on(score)


def test_every_sample_being_right_says_nothing() -> None:
    measure = Measure(parse_metric("top5"), ("scores",), 0, "data")
    with pytest.raises(DataError, match="there are 5 classes"):
        measure.add([np.zeros((2, 5), np.float32)], 2, np.zeros(2, np.int64))


def test_a_function_gets_outputs_and_labels_of_the_whole_data(tmp_path: Path) -> None:
    path = tmp_path / "metric.py"
    path.write_text(
        "def score(outputs, labels):\n"
        "    assert set(outputs) == {'a', 'b'} and outputs['a'].shape == (5, 2)\n"
        "    assert labels.tolist() == [0, 1, 2, 3, 4]\n"
        "    return outputs['b'].sum()\n"
    )
    measure = Measure(parse_metric(f"{path}:score"), ("a", "b"), None, "data")
    for start, stop in ((0, 3), (3, 5)):
        size = stop - start
        measure.add([np.zeros((size, 2)), np.full(size, 7)], size, np.arange(start, stop))
    found = measure.on(Score(5, sqnr_db=3.0))
    assert (found.value, found.metric) == (35.0, "metric.py:score")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1, 2]", "returned a list, expected a number"),
        ("return float('nan')", "returned nan, expected a finite number"),
        ("return outputs['nothing']", "at line 2"),
        ("raise RuntimeError('no\\ntwo lines')", "raised RuntimeError at line 2: no"),
        ("import sys; sys.exit(3)", "raised SystemExit at line 2"),
    ],
)
def test_mistakes_in_a_function_take_one_line(
    refused: Callable[..., str], workspace: Path, body: str, said: str
) -> None:
    Path("metric.py").write_text(f"def score(outputs, labels):\n    {body}\n")
    refused(workspace, (*RUN, "--metric", "metric.py:score"), said)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("nowhere.py:score", "nowhere.py: cannot be read"),
        ("metric.py:nothing", "has no function 'nothing'; it has score"),
        ("top9", "there are 5 classes"),
        ("accuracy", "--metric: 'accuracy' is no metric"),
    ],
)
def test_mistakes_about_a_metric_take_one_line(
    refused: Callable[..., str], workspace: Path, metric: str, said: str
) -> None:
    Path("metric.py").write_text("def score(outputs, labels):\n    return 1.0\n")
    refused(workspace, (*RUN, "--metric", metric), said)


@pytest.mark.usefixtures("workspace")
def test_a_function_decides_what_is_lost(cli: Cli) -> None:
    Path("metric.py").write_text(
        "def half(outputs, labels):\n    return 0.5 * float((outputs.argmax(1) == labels).mean())\n"
    )
    ran = cli(*RUN, "--metric", "metric.py:half", "--max-accuracy-drop", "2")
    assert ran.code == 0, ran
    report = json.loads(Path("out/report.json").read_text())
    assert report["metric"] == "metric.py:half"
    for row in report["figures"]:
        for role in ("selection", "evaluation"):
            assert row[role]["value"] == pytest.approx(0.5 * row[role]["top1"])
    drop = 100 * (report["figures"][0]["selection"]["value"] - report["figures"][-1]["selection"]["value"])
    assert drop <= 2
    assert f"points below float: {drop:.2f} on the selection data" in ran.out
    assert "metric.py:half" in Path("out/report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("workspace")
def test_selection_and_evaluation_stand_side_by_side(cli: Cli) -> None:
    ran = cli(*RUN, "--max-accuracy-drop", "3")
    report = json.loads(Path("out/report.json").read_text())
    drops = [
        100 * (report["figures"][0][role]["top1"] - report["figures"][-1][role]["top1"])
        for role in ("selection", "evaluation")
    ]
    assert f"points below float: {drops[0]:.2f} on the selection data, {drops[1]:.2f} on the evaluation data" in ran.out
