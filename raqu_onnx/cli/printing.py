"""How results reach stdout: as text that never folds a table, or as one JSON object."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TextIO, cast

from raqu_onnx.errors import RaquError
from raqu_onnx.node_names import printable, shortened

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.console import Console

__all__ = [
    "StdoutError",
    "console",
    "counted",
    "hanging",
    "print_json",
    "print_table",
    "printable",
    "result_is_complete",
    "shortened",
    "telling_stdout",
]

# A pipe has no width: whoever reads it wants whole names and one line for each statement.
_PIPE_COLUMNS = 10_000
_GAP = 2
# A name is never shortened below this; a table that is still too wide is left to the terminal.
_LEAST_NAME = 12


class StdoutError(RaquError):
    """The work is done, but what it gave cannot be printed."""

    exit_code: ClassVar[int] = 1


class _Telling:
    """A stream whose failures are told from those of other files; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _stdout_errors():
            return self._stream.write(text)

    def flush(self) -> None:
        with _stdout_errors():
            self._stream.flush()


@contextmanager
def _stdout_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StdoutError(f"standard output: {error.strerror or error}") from error


@contextmanager
def telling_stdout() -> Iterator[None]:
    """Inside this block, a stdout that cannot be written raises `StdoutError`, and no `OSError` as any file would."""
    stream = sys.stdout
    sys.stdout = cast("TextIO", _Telling(stream))
    try:
        yield
    finally:
        sys.stdout = stream


@contextmanager
def result_is_complete(folder: Path | None) -> Iterator[None]:
    """Print inside this block what is already written to `folder`.

    Raises:
        StdoutError: Stdout cannot be written, such as on a full disk; says that the files are complete.
        BrokenPipeError: The reader of a pipe has left.
    """
    try:
        yield
        sys.stdout.flush()
    except StdoutError as error:
        where = "" if folder is None else f"; the result in {folder} is complete"
        raise StdoutError(f"{error}{where}") from error


def console() -> Console:
    """Where results are printed; lines have no end where stdout is no terminal."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            """Raise the error that is being handled again: the command line knows the exit code."""
            raise

        def print(self, *objects: Any, **settings: Any) -> None:
            """Print what names hold, but do nothing that they ask a terminal for."""
            super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **settings)

    # Names of nodes are not markup.
    width = None if sys.stdout.isatty() else _PIPE_COLUMNS
    return Plain(highlight=False, markup=False, emoji=False, width=width)


def print_table(
    out: Console, headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), bold: str = ""
) -> None:
    """Print a table of which no cell is ever folded.

    Where the terminal is too narrow, names in the first column lose their middle.

    Args:
        out: Where to.
        headers: One per column.
        rows: Texts, one per column.
        right: Columns that are aligned to the right.
        bold: First cell of the rows that stand out.
    """
    from rich.cells import cell_len

    unicode = out.encoding.startswith("utf")
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(headers, *rows, strict=True)]
    excess = sum(widths) + _GAP * (len(widths) - 1) - out.width
    widths[0] = min(widths[0], max(widths[0] - excess, _LEAST_NAME))

    def line(cells: Sequence[str]) -> str:
        padded = []
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            pad = " " * (width - cell_len(cell))
            padded.append(pad + cell if index in right else cell + pad)
        return (" " * _GAP).join(padded).rstrip()

    out.print()
    out.print(line(headers), style="bold", soft_wrap=True)
    out.print(("─" if unicode else "-") * (sum(widths) + _GAP * (len(widths) - 1)), soft_wrap=True)
    names = shortened([row[0] for row in rows], widths[0], "…" if unicode else "...")
    for name, (first, *others) in zip(names, rows, strict=True):
        out.print(line([name, *others]), style="bold" if bold and first == bold else None, soft_wrap=True)


def hanging(out: Console, text: str, indent: int) -> str:
    """Text that follows `indent` columns of a line, further lines under it; one line where stdout is no terminal."""
    from textwrap import wrap

    if out.width >= _PIPE_COLUMNS:
        return text
    lines = wrap(printable(text), max(out.width - indent, _LEAST_NAME), break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}".join(lines)


def counted(count: int, noun: str) -> str:
    """A number with its noun, such as `1 crossbar` and `2 crossbars`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object; what JSON does not know, infinity and NaN, becomes null."""
    import json

    from raqu_onnx.json_values import finite

    print(json.dumps(finite(content), indent=1, allow_nan=False))
