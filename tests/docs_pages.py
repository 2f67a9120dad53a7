"""The code blocks of a Markdown page, run as a reader would run them: in order, in one folder."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]

_TITLE = re.compile(r'title="([^"]+)"')
# `<!-- needs: olive -->` before a block: it runs where that package is installed.
_NEEDS = re.compile(r"<!-- needs: (\w+) -->")
# Far more than any takes: a page that hangs must not stop all tests.
_SHELL_SECONDS = 1800


@dataclass(frozen=True)
class Block:
    """A fenced block. One with a title is a file of that name; ```text title="prints"`` is what came before it."""

    language: str
    title: str | None
    text: str
    where: str
    needs: str | None

    @property
    def runs(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def blocks(page: Path) -> Iterator[Block]:
    """Blocks of a page."""
    needs = None
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block" and (found := _NEEDS.match(token.content.strip())):
            needs = found[1]
        if token.type == "fence" and token.map is not None:
            title = _TITLE.search(token.info)
            where = f"{page.name}:{token.map[0] + 1}"
            yield Block(token.info.split(" ")[0], title[1] if title else None, token.content, where, needs)
            needs = None


def links(page: Path) -> Iterator[str]:
    """Where the links and pictures of a page lead."""
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if target:
                yield str(target)


@dataclass
class Reader:
    """Somebody who does what a page says."""

    folder: Path
    names: dict[str, Any] = field(default_factory=dict)
    printed: str = ""

    def do(self, block: Block) -> None:
        """Follow one block.

        Raises:
            AssertionError: A command fails, or prints something else than the page says.
        """
        if block.title == "prints":
            self.compare(block)
        elif block.title is not None:
            (self.folder / block.title).write_text(block.text, encoding="utf-8")
            # What a folder holds is remembered, and a file that is new within a clock's tick would not be found.
            importlib.invalidate_caches()
        elif block.language == "bash":
            self.shell(block)
        elif block.language == "python":
            exec(compile(block.text, block.where, "exec"), self.names)  # noqa: S102 - the page's own code

    def shell(self, block: Block) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ran = subprocess.run(
            [shutil.which("bash") or "bash", "-euo", "pipefail", "-c", block.text],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=_SHELL_SECONDS,
        )
        assert ran.returncode == 0, f"{block.where}: exit code {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
        self.printed = ran.stdout

    def compare(self, block: Block) -> None:
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        same = doctest.OutputChecker().check_output(block.text, self.printed, flags)
        assert same, f"{block.where}: says\n{block.text}\nand the command printed\n{self.printed}"
