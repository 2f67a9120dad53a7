"""The pictures of the documentation, drawn anew; that they are the ones in the folder is for a person to see."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_docs", ROOT / "tools" / "draw_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool: Any = _load()


def test_the_sharing_modes_use_fewer_crossbars_from_left_to_right() -> None:
    assert [tool.placed(mode).crossbars for mode in ("exclusive", "diagonal", "time")] == [4, 2, 1]


def test_pictures_are_drawn_and_are_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `docs` is not installed")
    for name in ("one", "two"):
        assert tool.main([str(tmp_path / name)]) == 0
    drawn = sorted((tmp_path / "one").iterdir())
    assert [path.name for path in drawn] == sorted(path.name for path in (ROOT / "docs" / "images").glob("*.svg"))
    for path in drawn:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    # The code -5 in offset form is 3 in 4 bits, and in two's complement 11.
    assert ">3 - 8 = -5<" in (tmp_path / "one" / "encodings.svg").read_text()
