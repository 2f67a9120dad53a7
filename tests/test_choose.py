"""`--choose`: another point of a finished search, without searching again."""

from __future__ import annotations

import html
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

import raqu_onnx
import raqu_onnx.passes.search_bits as search_pass
from raqu_onnx.cli.front import print_front
from raqu_onnx.evaluation import Score
from raqu_onnx.front import FrontReport
from raqu_onnx.manifest import digest_of, read_manifest
from raqu_onnx.points import front_values, read_point, read_widths, widths_text
from raqu_onnx.search import Bits, Evaluation, SearchResult
from raqu_onnx.search.budget import Cost

Cli = Callable[..., Any]
FILES = ("model.onnx", "manifest.json")
DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz")
SEARCH = ("optimize", "model.onnx", "--hw", "chip.toml", *DATA, "--max-accuracy-drop", "2", "--evaluations", "2")


_FOLDERS: dict[str, Path] = {}


@pytest.fixture
def report(cli: Cli, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Puts the result of one search, made once for all tests, into the folder `out`; its report."""
    if "out" not in _FOLDERS:
        assert cli(*SEARCH, "-o", "out").code == 0
        _FOLDERS["out"] = Path(shutil.copytree(workspace / "out", tmp_path_factory.mktemp("searched") / "out"))
    else:
        shutil.copytree(_FOLDERS["out"], workspace / "out")
    found: dict[str, Any] = json.loads(Path("out/report.json").read_text())
    return found


def test_every_point_is_what_the_search_would_have_written(
    cli: Cli, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(report["front"]) > 1
    assert [point["k"] for point in report["front"]] == list(range(1, len(report["front"]) + 1))
    search = search_pass.search
    for k in (report["chosen"], 1):
        assert cli("optimize", "-o", f"k{k}", "--choose", k, "--from", "out").code == 0

        def other(*arguments: Any, number: int = k) -> SearchResult:
            found = search(*arguments)
            return replace(found, chosen=found.front[number - 1])

        monkeypatch.setattr(search_pass, "search", other)
        # A search that had chosen this point; whether its goal is met is its own affair.
        assert cli(*SEARCH, "-o", f"would{k}").code in (0, 1)
        for name in ("model.onnx", "manifest.json"):
            assert Path(f"k{k}", name).read_bytes() == Path(f"would{k}", name).read_bytes()
    assert Path("k1/model.onnx").read_bytes() != Path("out/model.onnx").read_bytes()


def test_the_point_that_was_written_gives_the_same_files(cli: Cli, report: dict[str, Any]) -> None:
    assert cli("optimize", "-o", "again", "--choose", report["chosen"], "--from", "out").code == 0
    for name in FILES:
        assert Path("out", name).read_bytes() == Path("again", name).read_bytes()


def test_the_search_can_be_gone_on_with_from_a_chosen_point(cli: Cli, report: dict[str, Any]) -> None:
    """In the search's own folder too, which is replaced."""
    journal = Path("out/journal.jsonl").read_bytes()
    other = 1 if report["chosen"] > 1 else 2
    assert cli("optimize", "-o", "out", "--choose", other, "--from", "out", "--force").code == 0
    assert Path("out/journal.jsonl").read_bytes() == journal
    assert cli(*SEARCH, "-o", "out", "--resume", "--force").code == 0
    assert json.loads(Path("out/report.json").read_text())["chosen"] == report["chosen"]
    assert Path("out/journal.jsonl").read_bytes() == journal


def test_the_page_says_that_a_point_was_chosen(cli: Cli, report: dict[str, Any]) -> None:
    assert len(report["front"]) > 1
    assert "earlier search" not in Path("out/report.html").read_text(encoding="utf-8")
    assert cli("optimize", "-o", "k1", "--choose", 1, "--from", "out").code == 0
    page = Path("k1/report.html").read_text(encoding="utf-8")
    assert "Point 1 was chosen from an earlier search" in page
    command = html.unescape(page.split('<pre id="command">')[1].split("</pre>")[0])
    assert command.startswith("raqu-onnx optimize model.onnx --choose 1 --from SEARCH ")
    # It is the command that makes the same files.
    assert cli(*shlex.split(command.replace("SEARCH", "out"))[1:], "-o", "again").code == 0
    for name in FILES:
        assert Path("k1", name).read_bytes() == Path("again", name).read_bytes()


def test_a_point_is_written_from_python(report: dict[str, Any]) -> None:
    result = raqu_onnx.optimize("model.onnx", "new", choose=1, earlier="out")
    assert result.search is not None
    assert result.search.chosen_number == 1
    assert result.figures[-1].crossbars == report["front"][0]["crossbars"]
    assert result.exit_code == 0


@pytest.mark.usefixtures("report")
def test_no_candidate_is_judged(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a search was run")

    monkeypatch.setattr(search_pass, "search", refuse)
    monkeypatch.setattr(search_pass, "Problem", refuse)
    # A point that misses the goal is what was asked for all the same.
    assert cli("optimize", "-o", "k1", "--choose", 1, "--from", "out").code == 0
    assert cli("validate", "k1", "--data", "eval.npz").code == 0


def test_the_front_stands_in_the_manifest_with_the_widths_of_every_kernel(report: dict[str, Any]) -> None:
    manifest = read_manifest("out/manifest.json")
    assert manifest.search is not None
    assert [point.model_dump() for point in manifest.search.front] == report["front"]
    assert manifest.search.chosen == report["chosen"]
    chosen = report["front"][report["chosen"] - 1]
    for node, text in zip(manifest.nodes, chosen["widths"], strict=True):
        kernels = "".join(str(bits) * run for bits, run in node.bits)
        assert text == kernels or kernels == text * len(kernels)
    assert chosen["latency_cycles"] == manifest.totals.cost.latency_cycles
    assert chosen["average_bits"] == pytest.approx(report["figures"][-1]["weight_bits"])


@pytest.mark.usefixtures("workspace")
def test_the_front_is_listed(cli: Cli) -> None:
    ran = cli(*SEARCH, "-o", "out")
    lines = ran.out.splitlines()
    head = next(index for index, line in enumerate(lines) if line.split()[:2] == ["K", "crossbars"])
    written = [line.split() for line in lines[head:] if line.rstrip().endswith("written")]
    report = json.loads(Path("out/report.json").read_text())
    assert [int(words[0]) for words in written] == [report["chosen"]]
    assert int(written[0][1]) == report["figures"][-1]["crossbars"]


@pytest.mark.parametrize(("judged", "said"), [(3, "this point alone"), (1, "")])
def test_a_front_of_one_point_says_how_others_are_found(
    judged: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_front(cast("SearchResult", SimpleNamespace(front=[object()], evaluations=[object()] * judged)))
    out = capsys.readouterr().out
    assert said in out if said else out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--choose", "1"), "--from"),
        (("--from", "out"), "--choose"),
        (("--choose", "99", "--from", "out"), "points, 1 to"),
        (("--choose", "0", "--from", "out"), "--choose: must be at least 1"),
        (("--choose", "1", "--from", "nowhere"), "no result folder"),
        (("--choose", "1", "--from", "out", "--seed", "3"), "--seed: the search in out ran with 0, not 3"),
        (("--choose", "1", "--from", "out", "--max-crossbars", "3"), "--max-crossbars: the search in out ran with "),
        (
            ("--choose", "1", "--from", "out", "--weight-bits", "4"),
            "--weight-bits: the search in out ran with 2-8, not 4;",
        ),
        (("--choose", "1", "--from", "out", "--keep", "first,last"), "ran with none, not first,last;"),
        (("--choose", "1", "--from", "out", "--equalize"), "--equalize: the search in out ran without it;"),
        (("--choose", "1", "--from", "out", "--no-drop"), "--no-drop: the search in out ran without it;"),
        (("--choose", "1", "--from", "out", "--hw", "generic"), "chip generic"),
        (("--choose", "1", "--from", "out", "--calibration", "eval.npz"), "--calibration: eval.npz"),
        (("--choose", "1", "--from", "out", "--selection", "eval.npz"), "--selection: eval.npz"),
    ],
)
@pytest.mark.usefixtures("report")
def test_what_is_not_of_that_search_is_refused(
    refused: Callable[..., str], workspace: Path, arguments: tuple[str, ...], said: str
) -> None:
    refused(workspace, ("optimize", "model.onnx", *arguments, "-o", "new"), said)


@pytest.mark.usefixtures("report")
def test_files_are_found_from_another_folder(
    cli: Cli, refused: Callable[..., str], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("optimize", "-o", "here", "--choose", 1, "--from", "out").code == 0
    elsewhere = workspace / "deep" / "elsewhere"
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert cli("optimize", "-o", "there", "--choose", 1, "--from", "../../out").code == 0
    assert Path("there/model.onnx").read_bytes() == (workspace / "here/model.onnx").read_bytes()
    (workspace / "selection.npz").rename(workspace / "moved.npz")
    run = ("optimize", "--choose", 1, "--from", "../../out", "-o", "new")
    said = refused(workspace, run, "relative to the folder that it was run in")
    assert "model.onnx: no such file" in said
    files = {"--calibration": "calibration.npz", "--selection": "moved.npz", "--eval": "eval.npz", "--hw": "chip.toml"}
    named = [word for option, file in files.items() for word in (option, f"../../{file}")]
    assert cli("optimize", "../../model.onnx", *run[1:], *named).code == 0


@pytest.mark.usefixtures("report")
def test_another_model_is_refused(refused: Callable[..., str], workspace: Path, small_net: Callable[..., Any]) -> None:
    Path("other.onnx").write_bytes(small_net(depthwise=True).SerializeToString())
    refused(workspace, ("optimize", "other.onnx", "--choose", 1, "--from", "out", "-o", "new"), "not the one")


def test_files_of_two_runs_are_refused(refused: Callable[..., str], report: dict[str, Any], workspace: Path) -> None:
    report["front"].pop()
    Path("out/report.json").write_text(json.dumps(report))
    refused(workspace, ("optimize", "--choose", 1, "--from", "out", "-o", "new"), "not of one run")
    Path("out/report.json").write_text("{}")
    refused(workspace, ("optimize", "--choose", 1, "--from", "out", "-o", "new"), "report.json: ")


@pytest.mark.usefixtures("report")
def test_a_changed_manifest_is_refused(refused: Callable[..., str], workspace: Path) -> None:
    manifest = json.loads(Path("out/manifest.json").read_text())
    manifest["search"]["chosen"] = 1 if manifest["search"]["chosen"] > 1 else 2
    Path("out/manifest.json").write_text(json.dumps(manifest))
    refused(workspace, ("optimize", "--choose", 1, "--from", "out", "-o", "new"), "digest")
    manifest["search"] = None
    Path("out/manifest.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))
    refused(workspace, ("optimize", "--choose", 1, "--from", "out", "-o", "new"), "no search was run")


WIDTHS = st.sampled_from([0, *range(2, 9)])


@given(st.lists(st.integers(2, 8) | st.lists(WIDTHS, min_size=2, max_size=9).map(tuple), min_size=1), st.booleans())
def test_points_are_read_back(weights: list[Any], quantized: bool) -> None:
    activations = tuple(8 for _ in weights) if quantized else None
    cost = Cost(3, 2.5, 100, None, None)
    score = Score(10, top1=0.5, agreement=0.75, kl=0.1, sqnr_db=float("inf"))
    point = Evaluation(Bits(tuple(weights), activations), 3, score, "kernel allocation", cost)
    values = json.loads(json.dumps(front_values([point])[0]))
    assert read_point(FrontReport.model_validate(values)) == point
    assert all(read_widths(widths_text(width)) == width for width in weights)
