"""Progress on stderr: on a terminal stage, step and the best so far, else one plain line for each stage."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from raqu_onnx.search import ProgressCallback

__all__ = ["BEST", "PASS", "show_progress"]

#: What begins so tells of a pass of the pipeline; the steps that follow are within it.
PASS: Final = "pass "  # noqa: S105 - no password
#: What begins so tells of the best candidate that a search has found.
BEST: Final = "best so far: "


@contextmanager
def show_progress(*, enabled: bool, lines: bool = True) -> Iterator[ProgressCallback]:
    """A callback that shows on stderr, while the block runs, how far it is.

    Where stderr is no terminal, such as in a log file, the start of each stage is one line with the seconds so far.

    Args:
        enabled: False shows nothing.
        lines: Whether those lines are written; False keeps a pipe silent.
    """
    if not enabled or (not lines and not sys.stderr.isatty()):
        yield lambda _what, _done, _total: None
    elif not sys.stderr.isatty():
        yield _plain_lines()
    else:
        # Imported here: rich is needed only where something is drawn.
        from raqu_onnx.progress_view import drawn_progress

        with drawn_progress() as update:
            yield update


def _plain_lines() -> ProgressCallback:
    start = time.perf_counter()
    last: list[str] = []

    def update(what: str, _done: int, _total: int) -> None:
        if [what] == last:
            return
        # The step in which something better was found goes on.
        if not what.startswith(BEST):
            last[:] = [what]
        print(f"{time.perf_counter() - start:8.1f} s  {what}", file=sys.stderr, flush=True)

    return update
