"""Progress on stderr: a bar on a terminal, else one plain line for each stage."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from raqu_onnx.search import ProgressCallback

__all__ = ["show_progress"]


@contextmanager
def show_progress(*, enabled: bool) -> Iterator[ProgressCallback]:
    """A callback that draws a bar on stderr while the block runs.

    Where stderr is no terminal, such as in a log file, the start of each stage is one line with the seconds so far.
    """
    if not enabled:
        yield lambda _what, _done, _total: None
        return
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=max(1, total))

        yield update


def _plain_lines() -> ProgressCallback:
    start = time.perf_counter()
    last: list[str] = []

    def update(what: str, _done: int, _total: int) -> None:
        if [what] != last:
            last[:] = [what]
            print(f"{time.perf_counter() - start:8.1f} s  {what}", file=sys.stderr, flush=True)

    return update
