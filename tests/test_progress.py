"""What people see of long steps: stage, step and the best so far."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.progress import BEST, show_progress
from raqu_onnx.scoring import Score
from raqu_onnx.search.best import BestSoFar
from raqu_onnx.search.result import Bits, Evaluation, Goal, points_below
from raqu_onnx.search.trend import Trend

REFERENCE = Score(100, top1=0.9, agreement=1.0, kl=0.0)
SCORES = st.builds(
    Evaluation,
    st.just(Bits((8,), (8,))),
    st.integers(1, 9),
    st.builds(Score, st.just(100), st.floats(0.8, 0.92), st.just(0.9), st.floats(0, 1)),
    st.just("drawn"),
)


@settings(deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=8), st.sampled_from([Goal(None, 2.0), Goal(5, None), Goal(5, 2.0)]))
def test_the_best_so_far_serves_the_goal_best(found: list[Evaluation], goal: Goal) -> None:
    said: list[str] = []
    best = BestSoFar(REFERENCE, goal, lambda what, _done, _total: said.append(what))
    for evaluation in found:
        best.see(evaluation)
    assert all(text.startswith(BEST) for text in said)
    drop, budget = goal.max_accuracy_drop, goal.max_crossbars
    trend = Trend(REFERENCE, found)
    own = [
        item
        for item in found
        if (budget is None or item.crossbars <= budget)
        and (drop is None or points_below(REFERENCE, item.score) <= drop + 1e-9)
    ]
    meeting = [item for item in own if drop is None or trend.points(item.score) <= drop + 1e-9] or own
    assert said[-1].endswith("the goal is not met yet") == (not meeting)
    if not meeting:
        return
    if budget is None:
        expected = min(meeting, key=lambda item: (item.crossbars, item.score.loss))
    else:
        expected = min(meeting, key=lambda item: item.score.loss)
    crossbars = "1 crossbar" if expected.crossbars == 1 else f"{expected.crossbars} crossbars"
    assert said[-1].startswith(f"{BEST}{crossbars}, ")
    assert f"{abs(points_below(REFERENCE, expected.score)):.2f} points" in said[-1]


def test_a_log_names_a_stage_once_and_everything_better(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(enabled=True) as update:
        for what in ("pass tidy", "Bayesian search", f"{BEST}5 crossbars", "Bayesian search", "pass check"):
            update(what, 0, 3)
    lines = [line.split("s  ")[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["pass tidy", "Bayesian search", f"{BEST}5 crossbars", "pass check"]


@pytest.mark.parametrize("settings", [{"enabled": False}, {"enabled": True, "lines": False}])
def test_progress_can_be_silent(capsys: pytest.CaptureFixture[str], settings: dict[str, bool]) -> None:
    with show_progress(**settings) as update:
        update("pass tidy", 0, 3)
    assert capsys.readouterr().err == ""


def test_the_view_has_stage_step_count_and_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from raqu_onnx.progress_view import drawn_progress

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    for name, value in {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with drawn_progress() as update:
        update("pass search-bits", 3, 9)
        update("measuring sensitivity [bold]", 4, 40)
        update(f"{BEST}14 crossbars, 0.20 points below float", 0, 1)
    lines = terminal.getvalue().splitlines()
    drawn = [line for line in lines if "search-bits" in line][-1]
    for part in ("4/9 search-bits", "measuring sensitivity [bold]", "4/40", "0:00:0"):
        assert part in drawn
    assert any(line.strip().endswith("best so far: 14 crossbars, 0.20 points below float") for line in lines)
