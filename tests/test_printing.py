"""Tables that never fold, and the words around them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from raqu_onnx.cli.costs import bits_column
from raqu_onnx.cli.printing import console, counted, hanging, print_json, print_table, printable, shortened

NAMES = [f"/blocks/block{block}/{part}/conv/Conv" for block in range(9) for part in ("expand", "project")]


@given(st.lists(st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=60)), st.integers(6, 60))
def test_shortened_names_fit_and_keep_both_ends(names: list[str], width: int) -> None:
    for name, short in zip(names, shortened(names, width), strict=True):
        assert len(short) <= width
        if len(name) <= width:
            assert short == name
        else:
            head, tail = short.split("…") if short.count("…") == 1 else (short[0], short[-1])
            assert head
            assert tail
            assert name.startswith(head)
            assert name.endswith(tail)


def test_names_stay_different_where_the_width_allows_it() -> None:
    assert len(set(shortened(NAMES, 22))) == len(NAMES)
    assert shortened(["a" * 30], 11) == ["aaaaa…aaaaa"]
    assert shortened(["abcdefghij"], 8, "...") == ["abc...ij"]


def terminal(columns: int) -> Console:
    out = console()
    out.width = columns
    return out


@given(st.lists(st.text("ab-/", min_size=1, max_size=30), min_size=1).map(" ".join), st.integers(0, 30))
def test_long_text_hangs_under_its_first_line(text: str, indent: int) -> None:
    lines = hanging(terminal(80), text, indent).split("\n")
    assert " ".join(line.strip() for line in lines) == text
    assert all(len(line) <= 80 - (indent if line is lines[0] else 0) for line in lines)
    assert all(line.startswith(" " * indent) and not line[indent:].startswith(" ") for line in lines[1:])
    assert hanging(console(), text, indent) == text


def printed(capsys: pytest.CaptureFixture[str], columns: int, rows: list[list[str]]) -> list[str]:
    print_table(terminal(columns), ("node", "", "crossbars"), rows, right=(2,))
    return capsys.readouterr().out.splitlines()


def test_a_table_fits_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[name, "x", "12"] for name in NAMES]
    for columns in (80, 40, 30):
        lines = printed(capsys, columns, rows)
        assert len(lines) == len(NAMES) + 3  # A blank line, headers and a rule.
        assert max(map(len, lines)) <= columns
        assert all(line.endswith("12") for line in lines[3:])
    assert {line.split()[0] for line in printed(capsys, 80, rows)[3:]} == set(NAMES)


def test_a_hopelessly_narrow_terminal_gets_short_names_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, 10, [[name, "x", "12"] for name in NAMES])
    assert len(lines) == len(NAMES) + 3
    assert all("…" in line for line in lines[3:])


def test_wide_characters_are_counted_as_the_terminal_draws_them(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, 80, [["畳み込み", "x", "1"], ["conv", "x", "2"]])
    assert len({cell_len(line) for line in lines[1:]}) == 1


def test_a_pipe_gets_whole_names(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(console(), ("node", "bits"), [["n" * 300, "8"]])
    assert "n" * 300 in capsys.readouterr().out


def test_an_encoding_without_rules_and_dots_gets_plain_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(console()), "encoding", "ascii", raising=False)
    out = terminal(30)
    monkeypatch.setattr(type(out), "encoding", "ascii", raising=False)
    print_table(out, ("node", "bits"), [["n" * 90, "8"]])
    said = capsys.readouterr().out
    assert said.isascii()
    assert "..." in said


def test_numbers_agree_with_their_nouns() -> None:
    assert [counted(n, "crossbar") for n in (0, 1, 2)] == ["0 crossbars", "1 crossbar", "2 crossbars"]


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("inf"), {"b": float("nan")}, (1.5,)]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, {"b": None}, [1.5]]}


def test_means_of_bits_have_one_format_in_a_column() -> None:
    assert bits_column([8.0, None, 4.0]) == ["8", "-", "4"]
    assert bits_column([8.0, 2.5, 2.55555, None]) == ["8.00", "2.50", "2.56", "-"]


def test_percentages_have_no_space(cli: Callable[..., Any], workspace: Path) -> None:
    assert workspace.is_dir()
    data = ("--calibration", "calibration.npz", "--eval", "eval.npz", "--threads", "1")
    ran = cli("optimize", "model.onnx", *data, "--hw", "chip.toml", "--evaluations", "1", "-o", "out")
    shown = cli("manifest", "show", "out").out + cli("validate", "out", "--data", "eval.npz", "--threads", "1").out
    for text in (ran.out, shown):
        assert "%" in text
        assert not re.search(r"\d %", text)
    assert "1 thread" in shown
    assert "1 threads" not in shown


@given(st.text())
def test_what_is_printed_steers_no_terminal(text: str) -> None:
    shown = printable(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", shown)
    if not set(text) & set(map(chr, range(32))) and text.isprintable():
        assert shown == text


def test_names_in_results_steer_no_terminal(cli: Callable[..., Any], workspace: Path) -> None:
    model = onnx.load(workspace / "model.onnx")
    model.graph.node[0].name = "\x1b]0;taken\x07\x1b[2J\u202econv"
    onnx.save(model, workspace / "model.onnx")
    for command in (("inspect", "model.onnx"), ("optimize", "model.onnx", "--weight-bits", "8", "--no-progress")):
        ran = cli(*command)
        assert ran.code == 0
        for said in (ran.out, ran.err):
            assert not set(said) & {"\x1b", "\x07", "\u202e"}
        assert r"\x1b]0;taken\x07\x1b[2J\u202econv" in ran.out
