"""The commands beside measured figures take hours: that they would start as written is what a test can tell."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_PAGES = ("README.md", "CONTRIBUTING.md")


def commands() -> list[str]:
    """Every command in backquotes that runs a tool, of the pages for people, each once."""
    found: dict[str, None] = {}
    for page in _PAGES:
        text = re.sub(r"\s+", " ", (_ROOT / page).read_text("utf-8"))
        found |= dict.fromkeys(re.findall(r"`(python tools/[^`]+)`", text))
    return list(found)


def test_there_are_such_commands() -> None:
    assert any("bench_allocation.py" in command and "--seeds" in command for command in commands())


@pytest.mark.parametrize("command", commands())
def test_a_tool_takes_the_options_that_a_page_gives_it(command: str) -> None:
    words = shlex.split(command)[1:]
    given = [word.split("=")[0] for word in words if word.startswith("-")]
    # Values in front of it are read before help is shown: one that is refused gives an error instead.
    shown = subprocess.run(
        [sys.executable, *words, "--help"], cwd=_ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert shown.returncode == 0, shown.stderr
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", shown.stdout))
    assert set(given) <= known
