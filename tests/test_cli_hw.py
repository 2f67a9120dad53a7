from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raqu_onnx.cli.hw import add_parser
from raqu_onnx.errors import ChipError
from raqu_onnx.hardware import builtin_chips, load_chip

UNSOURCED = """schema_version = 1
name = "mine"
encoding = "offset"
sharing = "time"
dac_bits = 1
[[crossbars]]
name = "main"
rows = 128
cols = 64
cell_bits = 2
[sources]
"crossbars.main" = "[bold]measured[/bold]"
cycle_ns = "absent"
"""


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, and no escape codes."""
    monkeypatch.setattr("raqu_onnx.cli.printing._PIPE_COLUMNS", 80)


def hw(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="raqu-onnx")
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["hw", *words])
    code = args.run(args)
    assert isinstance(code, int)
    return code


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(UNSOURCED, encoding="utf-8")
    return path


@pytest.mark.usefixtures("terminal")
def test_list_shows_every_chip_in_80_plain_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert hw("list") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == ["name", "crossbars", "bits", "count", "encoding", "sharing", "title"]
    assert {line.split()[0] for line in lines} >= set(builtin_chips())
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in out
    isaac = next(line for line in lines if line.startswith("isaac"))
    assert isaac.split()[1:6] == ["128x128", "2", "16128", "offset", "exclusive"]
    assert any(line.split()[:3] == ["256x256", "2", "32"] for line in lines)  # hetero's third size


def test_list_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert hw("list", "--format", "json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert [chip["name"] for chip in document["chips"]] == builtin_chips()
    by_name = {chip["name"]: chip for chip in document["chips"]}
    assert by_name["neurram"]["total_cells"] == 48 * 256 * 256
    assert by_name["generic"]["total_cells"] is None


def test_a_pipe_gets_one_whole_line_for_each_crossbar_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert hw("list") == 0
    lines = capsys.readouterr().out.splitlines()
    chips = [load_chip(name) for name in builtin_chips()]
    assert len(lines) == 3 + sum(len(chip.crossbars) for chip in chips)  # Headers, a rule, and the legend of ~.
    assert all(line == line.rstrip() for line in lines)
    for chip in chips:
        assert any(line.startswith(f"{chip.name} ") and line.endswith(chip.title) for line in lines)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("name", builtin_chips())
def test_show_numbers_sources_where_lines_are_short(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hw("show", name) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    chip = load_chip(name)
    figures, _, notes = out.partition("sources\n")
    sources = dict(re.findall(r"(\[\d+\]) ((?:[^\n]|\n )+)", notes))
    assert sources
    for line in figures.splitlines():
        if found := re.match(r"([\w.]+) .*(\[\d+\])$", line):
            assert " ".join(sources[found[2]].split()) == chip.source_of(found[1])


@pytest.mark.parametrize("name", builtin_chips())
def test_show_prints_every_figure_with_its_source(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hw("show", name) == 0
    out = capsys.readouterr().out
    chip = load_chip(name)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    for key, value in chip.settings().items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert float(rows[key][0]) == pytest.approx(value)
            assert " ".join(rows[key][1:]) == (chip.source_of(key) or "")
        elif value is None and key != "encoding_is_approximation":
            assert key in out
    assert ("The encoding is an approximation: " in out) is bool(chip.encoding_is_approximation)


def test_show_json_is_the_chip(capsys: pytest.CaptureFixture[str]) -> None:
    assert hw("show", "isaac", "--format", "json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["chip"] == load_chip("isaac").model_dump(mode="json")
    assert document["unsourced_figures"] == []


def test_show_file_takes_texts_as_they_are(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hw("show", str(mine)) == 0
    assert "[bold]measured[/bold]" in capsys.readouterr().out


def test_show_unknown_chip() -> None:
    with pytest.raises(ChipError, match="did you mean prime"):
        hw("show", "prim")


def test_check_passes_with_warnings(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hw("check", str(mine), "isaac") == 0
    out, err = capsys.readouterr()
    assert out == f"{mine}: OK\nisaac: OK\n"
    assert err == (f"warning: {mine}: dac_bits: no source\nwarning: {mine}: sources.cycle_ns: no such figure here\n")


def test_check_reports_all_errors_of_all_files(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(UNSOURCED.replace("rows = 128", "rows = -1\ncycle_us = 3"), encoding="utf-8")
    assert hw("check", str(bad), str(tmp_path / "absent.toml"), "isac", str(mine)) == 2
    out, err = capsys.readouterr()
    assert out == f"{mine}: OK\n"
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors[0] == f"error: {bad}: 2 errors in the chip description"
    assert "crossbars.main.rows: found -1" in errors[1]
    assert "crossbars.main.cycle_us: found an unknown key" in errors[2]
    assert "absent.toml: cannot be read" in errors[3]
    assert "did you mean isaac" in errors[4]
    assert len(errors) == 5


def test_check_json(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hw("check", "--format", "json", str(mine), "nope.toml") == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    assert document["schema_version"] == 1
    good, bad = document["files"]
    assert (good["file"], good["ok"], good["errors"], len(good["warnings"])) == (str(mine), True, [], 2)
    assert (bad["file"], bad["ok"], bad["warnings"]) == ("nope.toml", False, [])
    assert len(bad["errors"]) == 1


@pytest.mark.parametrize("words", [(), ("check",), ("show",), ("list", "--format", "yaml")])
def test_bad_usage(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        hw(*words)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_parser_does_not_import_rich() -> None:
    code = "import sys, raqu_onnx.cli.hw; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
