"""What a judge answers, and what of it need not be asked again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from judging import judge_parts

from raqu_onnx.data import open_dataset
from raqu_onnx.evaluation import Score
from raqu_onnx.model_io import model_inputs
from raqu_onnx.search import Bits
from raqu_onnx.search import judge as judging_module
from raqu_onnx.search.judge import Judge
from raqu_onnx.search.questions import QUICK, SCORE, Answer, Question, Verdict
from raqu_onnx.search.records import Records
from raqu_onnx.search.run import InProcess
from raqu_onnx.spool import Spool, SpoolError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BITS = Bits.uniform(3, 3, 8)


@pytest.fixture
def quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Glances at small sets too."""
    monkeypatch.setattr(judging_module, "_FEWEST_GLANCED", 1)


@pytest.mark.usefixtures("quarters")
@pytest.mark.parametrize("room", [0, 1, 9])
def test_a_glance_changes_no_float_of_a_score(
    monkeypatch: pytest.MonkeyPatch, small_net: Any, small_data: Any, room: int
) -> None:
    judge = Judge(*judge_parts(small_net(), small_data(150)))
    plain = judge.score(BITS)

    class Small(Spool):
        def append(self, arrays: Sequence[np.ndarray]) -> None:
            if len(self) == room:
                raise SpoolError("no room")
            super().append(arrays)

    monkeypatch.setattr(judging_module, "Spool", Small)
    found = judge.verdict(BITS)
    assert found.score == plain
    assert judge.glances_first
    assert found.glance not in (0, plain.loss)
    assert judge.verdict(BITS, found.glance) == found
    assert judge.verdict(BITS, np.nextafter(found.glance, 0)) == Verdict(found.glance, None)


@pytest.mark.usefixtures("quarters")
@pytest.mark.parametrize("metric", ["auto", "top1", "kl", "agreement"])
def test_a_glance_is_the_loss_on_a_quarter_of_the_samples(small_net: Any, small_data: Any, metric: str) -> None:
    """Of ten batches three, from all over the data: the same samples alone have the same loss."""
    data = small_data(160)
    model, quantizer, everything, settings = judge_parts(small_net(), data, metric=metric)
    chosen = np.concatenate([np.arange(16 * place, 16 * place + 16) for place in (1, 5, 8)])
    some = open_dataset({name: array[chosen] for name, array in data.items()}, model_inputs(model))
    glance = Judge(model, quantizer, everything, settings).verdict(BITS).glance
    alone = Judge(model, quantizer, some, settings).score(BITS)
    assert glance == pytest.approx(alone.loss, rel=1e-9)


def test_small_data_is_looked_at_as_a_whole(small_net: Any, small_data: Any) -> None:
    judge = Judge(*judge_parts(small_net(), small_data(150)))
    found = judge.verdict(BITS, most=0.0)
    assert found.score is not None
    assert found.glance == found.score.loss
    assert not judge.glances_first


@pytest.mark.usefixtures("quarters")
def test_a_function_of_the_user_sees_all_of_the_data(small_net: Any, small_data: Any, tmp_path: Path) -> None:
    """It may not be made for some of it."""
    path = tmp_path / "mine.py"
    path.write_text("def metric(outputs, labels):\n    assert len(labels) == 150\n    return 1.0\n")
    judge = Judge(*judge_parts(small_net(), small_data(150), metric=f"{path}:metric"))
    found = judge.verdict(BITS, most=0.0)
    assert found.score == judge.score(BITS)
    assert found.score is not None
    assert found.glance == found.score.loss


class Noted:
    """A judge that notes what it is asked; glances are a tenth of the first width."""

    def __init__(self) -> None:
        self.asked: list[tuple[Question, Bits]] = []

    def answer(self, question: Question, bits: Bits) -> Answer:
        self.asked.append((question, bits))
        width = bits.weights[0]
        assert isinstance(width, int)
        glance = width / 10
        if question.kind == "quick":
            return glance
        return Verdict(glance, None if glance > question.most else Score(4, kl=glance))


def test_what_a_glance_answers_is_not_asked_again() -> None:
    low, high = Bits((2,), None), Bits((8,), None)
    judges: Any = Noted()
    records = Records(InProcess(judges))
    some = Question("score", 0.5)
    found = records.answers(some, [low, high])
    assert found == {low: Verdict(0.2, Score(4, kl=0.2)), high: Verdict(0.8, None)}
    assert records.answers(Question("score", 0.7), [high, low]) == found
    assert records.answers(SCORE, [low]) == {low: found[low]}
    assert judges.asked == [(some, low), (some, high)]
    # A whole score is asked for where only a glance is known, and then known for good.
    assert records.answers(SCORE, [high]) == {high: Verdict(0.8, Score(4, kl=0.8))}
    assert records.answers(Question("score", 0.1), [high]) == {high: Verdict(0.8, Score(4, kl=0.8))}
    assert records.answers(QUICK, [high]) == {high: 0.8}
    assert judges.asked[2:] == [(SCORE, high), (QUICK, high)]


def test_a_glance_is_no_score_where_time_is_up() -> None:
    high = Bits((8,), None)
    judge: Any = Noted()
    records = Records(InProcess(judge))
    records.answers(Question("score", 0.5), [high])
    assert records.answers(SCORE, [high], until=lambda: True) == {}
