"""report.html: what stands in it, and that names from strangers' models are text everywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import onnx
import pytest

from raqu_onnx.data import PictureOptions
from raqu_onnx.html import write_html
from raqu_onnx.html.page import render_page
from raqu_onnx.manifest import read_manifest
from raqu_onnx.node_names import printable
from raqu_onnx.report_files import read_report

Cli = Callable[..., Any]

RUN = (
    "optimize", "model.onnx", "--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz",
    "--hw", "chip.toml", "--evaluations", "2", "--no-progress",
)  # fmt: skip
NASTY = {
    "conv1": "</script><script>document.title='taken'</script>",
    "conv2": "<img src=x onerror=\"document.title='taken'\">&lt;b&gt;{{ 7 * 7 }}${7*7}@name",
    "fc": "$$\\href{javascript:alert(1)}{x}$$ \u202e\u2028'\"`",
}


class Page(HTMLParser):
    """Tags, the text outside scripts and the content of each script."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert tag
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, bytes]]:
    """Files of the runs that were made so far, by kind."""
    return {}


def result_folder(kind: str, cli: Cli, workspace: Path, results: dict[str, dict[str, bytes]]) -> Path:
    """A folder with the result of a short search, which is run once for each kind."""
    folder = workspace / "model-raqu"
    if kind not in results:
        ran = cli(*RUN)
        assert ran.code == 0, ran.err
        results[kind] = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.mkdir(exist_ok=True)
    for name, content in results[kind].items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def drawn(cli: Cli, workspace: Path, results: dict[str, dict[str, bytes]]) -> Path:
    """The result of a short search."""
    return result_folder("plain", cli, workspace, results)


@pytest.fixture
def nasty(cli: Cli, workspace: Path, results: dict[str, dict[str, bytes]]) -> Path:
    """The same with names that mean something to browsers, templates and plots."""
    model = onnx.load(workspace / "model.onnx")
    for node in model.graph.node:
        node.name = NASTY.get(node.name, node.name)
    onnx.save(model, workspace / "model.onnx")
    return result_folder("nasty", cli, workspace, results)


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_tells_what_an_architect_asks(drawn: Path) -> None:
    page = page_of(drawn)
    said = " ".join(page.text.split())
    report = json.loads((drawn / "report.json").read_text())
    manifest = json.loads((drawn / "manifest.json").read_text())
    for row in report["figures"]:
        assert row["label"] in said
    assert f"{report['figures'][-1]['crossbars']:,}" in said
    for text in (
        manifest["digest"], manifest["model"]["sha256"], manifest["model"]["source_sha256"], "onnxruntime", "numpy",
        "calibration.npz (48 samples)", "raqu-onnx optimize model.onnx", "--hw chip.toml", "conv1", "conv2", "fc",
        "Fewest bits: ", "candidates were judged", "count as ideal", "is on crossbars",
    ):  # fmt: skip
        assert text in said, text
    ids = {attributes.get("id") for _, attributes in page.tags}
    plots = json.loads(page.scripts[0])
    assert {"shares", "kernels", "floor", "front-loss", "front-points", "sensitivity", "adc"} < set(plots)
    assert {f"plot-{name}" for name in plots} < ids
    links = {str(attributes["href"])[1:] for tag, attributes in page.tags if tag == "a"}
    assert links <= ids


def test_settings_that_are_tables_are_shown_with_their_values(drawn: Path) -> None:
    manifest = read_manifest(drawn / "manifest.json")
    pictures = PictureOptions(mean=(0.25, 0.5, 0.75), resize=256).model_dump(mode="json")
    changed = manifest.model_copy(update={"configuration": {**manifest.configuration, "pictures": pictures}})
    page = Page(render_page(changed, read_report(drawn / "report.json")))
    assert "mean: 0.25, 0.5, 0.75; " in page.text
    assert "resize: 256" in page.text


def test_nothing_is_loaded_from_elsewhere(drawn: Path) -> None:
    page = page_of(drawn)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "img", "object", "embed", "base"}
        assert not {"src", "srcset", "data", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "unsafe-eval" not in policy


def test_names_are_text_everywhere(nasty: Path) -> None:
    page = page_of(nasty)
    assert len(page.scripts) == 3
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert "img" not in {tag for tag, _ in page.tags}
    shown = {printable(name) for name in NASTY.values()}
    for name in shown:
        assert name in page.text
    # A name that turns text around would turn the sentences that it stands in.
    assert "\u202e" not in page.text
    # What plots say when hovered is in their data, whole and as data.
    plots = json.loads(page.scripts[0])
    for plot in ("shares", "kernels", "floor", "sensitivity", "adc"):
        strings = set(strings_in(plots[plot]))
        assert shown <= strings
        assert not any("{safe}" in text for text in strings)
    # Labels of axes are objects that say that they are no formula.
    labels = [value for value in dicts_in(plots["shares"]) if value.get("name") == "PlainText"]
    assert len(labels) == 3
    raw = (nasty / "report.html").read_text(encoding="utf-8")
    data = raw[raw.index('id="plots">') : raw.index("</script>", raw.index('id="plots">'))]
    assert not re.search(r"[<&]", data.removeprefix('id="plots">'))


def strings_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in strings_in(part)]


def dicts_in(value: Any) -> list[dict[str, Any]]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*([value] if isinstance(value, dict) else []), *(found for part in parts for found in dicts_in(part))]


def test_the_command_draws_what_optimize_drew(cli: Cli, drawn: Path, workspace: Path) -> None:
    ran = cli("report", drawn, "-o", "page.html", "--format", "json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == {
        "schema_version": 1, "file": "page.html", "bytes": (workspace / "page.html").stat().st_size,
    }  # fmt: skip
    assert (workspace / "page.html").read_bytes() == (drawn / "report.html").read_bytes()
    # Nothing but these two files is read, and nothing else is written.
    only = workspace / "only"
    only.mkdir()
    for name in ("manifest.json", "report.json"):
        shutil.copy(drawn / name, only)
    assert cli("report", only).out == f"written to {Path(only) / 'report.html'}\n"
    assert (only / "report.html").read_bytes() == (drawn / "report.html").read_bytes()
    assert len(list(only.iterdir())) == 3


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: cannot be read"),
        (lambda folder: (folder / "report.json").unlink(), "report.json: cannot be read"),
        (lambda folder: (folder / "report.json").write_text("{"), "is no JSON file"),
        (lambda folder: (folder / "report.json").write_text('{"schema_version": 2}'), "schema_version: found 2"),
        (lambda folder: (folder / "report.json").write_text('{"schema_version": 1}'), "Field required"),
        (lambda folder: shutil.rmtree(folder), "manifest.json: cannot be read"),
    ],
)  # fmt: skip
def test_damaged_folders_are_refused(
    refused: Callable[..., str], workspace: Path, drawn: Path, damage: Callable[[Path], object], says: str
) -> None:
    (drawn / "report.html").unlink()
    damage(drawn)
    refused(workspace, ("report", "model-raqu"), says)


def test_a_page_that_cannot_be_written_is_one_line(refused: Callable[..., str], workspace: Path, drawn: Path) -> None:
    assert drawn.is_dir()
    refused(workspace, ("report", "model-raqu", "-o", "nowhere/page.html"), "nowhere/page.html: cannot be written")


def test_reports_from_before_the_page_are_drawn(drawn: Path) -> None:
    values = json.loads((drawn / "report.json").read_text())
    for key in ("evaluations", "uniform", "sensitivity", "lossless_adc_bits"):
        del values[key]
    (drawn / "report.json").write_text(json.dumps(values))
    write_html(drawn, drawn / "report.html")
    page = page_of(drawn)
    assert set(json.loads(page.scripts[0])) == {"shares", "kernels", "floor"}
    assert "not known which resolution" in page.text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_draws_every_plot_without_a_complaint(nasty: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900", "--virtual-time-budget=20000",
            "--dump-dom", (nasty / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    said = [line for line in ran.stderr.splitlines() if "CONSOLE" in line and "setting log level" not in line]
    assert said == []
    assert "<title>model.onnx on small" in ran.stdout
    page = Page(ran.stdout)
    classes = [attributes.get("class") or "" for _, attributes in page.tags]
    plots = json.loads(page.scripts[0])
    assert sum("bk-Figure" in item for item in classes) == len(plots)
    body = next(attributes for tag, attributes in page.tags if tag == "body")
    assert body["data-drawn"] == list(plots)[-1]
