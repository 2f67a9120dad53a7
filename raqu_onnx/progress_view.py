"""The live view of long steps on a terminal: two lines that go away when all is done."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from raqu_onnx.progress import BEST, PASS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import RenderableType

    from raqu_onnx.search import ProgressCallback

__all__ = ["drawn_progress"]

_BAR = 20
# What is no part of the last pass any more.
_AFTER = "evaluating"


class _View(Progress):
    """A bar with the stage before it, and below it the best so far."""

    best = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The lines that are drawn."""
        yield self.make_tasks_table(self.tasks)
        if self.best:
            yield Text(f"  {self.best}", overflow="ellipsis", no_wrap=True)


@contextmanager
def drawn_progress() -> Iterator[ProgressCallback]:
    """A callback that draws on stderr, which must be a terminal, while the block runs."""

    def cut() -> Column:
        return Column(no_wrap=True, overflow="ellipsis")

    view = _View(
        SpinnerColumn(),
        TextColumn("{task.fields[stage]}", markup=False, style="bold", table_column=cut()),
        TextColumn("{task.description}", markup=False, table_column=cut()),
        BarColumn(bar_width=_BAR),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with view:
        task = view.add_task("starting", total=None, stage="", count="")

        stage = ""

        def show(step: str, done: int, total: int) -> None:
            # One step is no measure: the bar only moves.
            counts = total > 1
            count = f"{done}/{total}" if counts else ""
            view.update(task, description=step, completed=done, stage=stage, count=count)
            view.tasks[0].total = total if counts else None

        def update(what: str, done: int, total: int) -> None:
            nonlocal stage
            if what.startswith(BEST):
                view.best = what
            elif what.startswith(PASS):
                number = f"{done + 1}/{total} " if total > 1 else ""
                stage = number + what.removeprefix(PASS)
                show("", 0, 1)
            else:
                stage = "" if what.startswith(_AFTER) else stage
                show(what, done, total)

        yield update
