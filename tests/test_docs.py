"""Every code block of the documentation, run as it stands there; and its tables of keys."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from docs_pages import ROOT, Block, Reader, blocks, links
from result_folders import small_chip, write_folder

from raqu_onnx.hardware import Chip, Components, CrossbarType, Hierarchy
from raqu_onnx.manifest import manifest_schema

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if any(block.language != "text" for block in blocks(path)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # As Python does for somebody who starts it in that folder; what the page saves as modules is forgotten afterwards.
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    reader = Reader(tmp_path)
    for block in blocks(page):
        if block.runs:
            reader.do(block)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


README = ROOT / "README.md"
# Run by .ci/run, each in a copy of the files of its own.
SETUP = "python3 -m venv"
COMMANDS = [
    block
    for block in blocks(README)
    if (block.language in ("bash", "python") or block.text.startswith("raqu-onnx")) and SETUP not in block.text
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, _small_files: dict[str, bytes]) -> Path:
    """A folder with the files that the README speaks of, and what `optimize` makes of them."""
    folder = tmp_path_factory.mktemp("readme")
    for name, content in _small_files.items():
        (folder / name.replace("eval", "test")).write_bytes(content)
    Reader(folder).do(
        Block(
            "bash",
            None,
            "raqu-onnx optimize model.onnx --weight-bits 4 --cells -o out --calibration test.npz",
            "",
            None,
        )
    )
    return folder


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.where)
def test_the_commands_of_the_readme_run(
    block: Block, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(result, tmp_path / "work"))
    if "-o out" in block.text or '"out"' in block.text:  # It writes the folder that others read.
        shutil.rmtree(folder / "out")
    monkeypatch.chdir(folder)
    Reader(folder).do(block if block.language == "python" else dataclasses.replace(block, language="bash"))


def test_the_readme_has_commands() -> None:
    assert {block.language == "python" for block in COMMANDS} == {True, False}
    assert sum(SETUP in block.text for block in blocks(README)) == 2


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.stem)
def test_links_in_the_repository_lead_somewhere(page: Path) -> None:
    """Of the pages outside the site, which mkdocs does not see."""
    for link in links(page):
        if "://" not in link:
            assert (ROOT / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_a_block_that_fails_or_prints_something_else_is_found(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    with pytest.raises(AssertionError, match="exit code 3"):
        reader.do(Block("bash", None, "exit 3", "page:1", None))
    reader.do(Block("bash", None, "echo 4 crossbars", "page:1", None))
    reader.do(Block("text", "prints", "4 ...", "page:2", None))
    with pytest.raises(AssertionError, match="5 crossbars"):
        reader.do(Block("text", "prints", "5 crossbars", "page:2", None))


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"documentation_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


keys: Any = _load(ROOT / "tools" / "docs_keys.py")


@pytest.mark.parametrize("page", keys.PAGES, ids=lambda page: page.stem)
def test_tables_and_example_files_in_the_pages_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert keys.filled(text) == text, "run tools/docs_keys.py"


def test_what_is_not_current_is_filled_in() -> None:
    example = "<!-- file: docs/examples/files.py -->\n```python\nold\n```\nend\n"
    page = f"<!-- keys: settings -->\nold\n<!-- /keys -->\n\n{example}"
    now = keys.filled(page)
    assert now.startswith("<!-- keys: settings -->\n\n| key |")
    assert (DOCS / "examples" / "files.py").read_text() in now
    assert "old" not in now.splitlines()
    assert now.endswith("```\nend\n")
    assert keys.filled(now) == now
    with pytest.raises(ValueError, match="no keys are known"):
        keys.filled("<!-- keys: nothing -->\n<!-- /keys -->")


def rows(name: str) -> list[list[str]]:
    """Cells of all rows of a kind's tables, without the heads."""
    lines = [line for line in keys.tables(name).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines]


def test_every_key_of_a_chip_file_is_explained() -> None:
    models = (Chip, CrossbarType, Hierarchy, Components)
    expected = [f"`{name}`" for model in models for name in model.model_fields]
    assert [row[0] for row in rows("chip")] == expected
    assert all(row[-1] for row in rows("chip"))
    assert ["`dac_bits`", "integer 1 to 16", "required"] in [row[:3] for row in rows("chip")]
    assert ["`adc_bits`", "integer 1 to 32", "none"] in [row[:3] for row in rows("chip")]


def test_every_key_of_the_manifest_is_explained() -> None:
    schema = manifest_schema()
    parts = [schema, *(part for name, part in schema["$defs"].items() if name not in keys.CHIP_PARTS)]
    assert [row[0] for row in rows("manifest")] == [f"`{key}`" for part in parts for key in part.get("properties", ())]
    assert [row for row in rows("manifest") if not row[-1]] == []


def test_every_setting_is_explained() -> None:
    assert len(rows("settings")) > 30
    assert all(row[-1] for row in rows("settings"))


READER: Any = _load(DOCS / "examples" / "read_cells.py")


def test_the_reader_is_one_that_a_reader_can_read() -> None:
    text = (DOCS / "examples" / "read_cells.py").read_text()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 60
    imports = {line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"json", "numpy", "pathlib", "sys"}


@pytest.mark.parametrize(
    ("encoding", "settings"),
    [
        ("offset", {"offset_sum": "unit-column", "flip": True}),
        ("offset", {"split_slices": True, "cols": 9, "cell_bits": 1, "flip": True, "sharing": "exclusive"}),
        ("differential-column", {"polarity_arrays": "pair"}),
        ("differential-column", {"polarity_arrays": "pair", "split_slices": True, "cols": 9}),
        ("differential-row", {"sharing": "diagonal"}),
        ("twos-complement", {"split_slices": True, "cell_bits": 1}),
    ],
)
def test_the_reader_rebuilds_the_weights_of_every_operator_and_encoding(
    tmp_path: Path, encoding: str, settings: dict[str, Any]
) -> None:
    write_folder(tmp_path / "out", small_chip(encoding, **settings))
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    }
    rebuilt = READER.rebuild(tmp_path / "out")
    assert len(rebuilt) == 5
    for name, codes in rebuilt.items():
        np.testing.assert_array_equal(codes, stored[name])
