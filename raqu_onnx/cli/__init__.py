"""The command line: parses, calls the library, prints.

Results go to stdout, logs and progress to stderr. Exit codes: 0 done; 1 ran, but a target was not met or a check
failed, or the result could not be printed; 2 bad usage, configuration, model, chip or data; 130 interrupted; 141 the
reader of a pipe left before all was printed.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from raqu_onnx.cli.parser import Parser
from raqu_onnx.cli.printing import StdoutError, printable, telling_stdout
from raqu_onnx.errors import RaquError

__all__ = ["full_parser", "main"]

# A command's module is imported only when the command is used, so that help answers at once.
_COMMANDS = {
    "optimize": "quantize a model for a chip, map it, write model and manifest",
    "inspect": "show the tiling of a model on a chip, without search",
    "validate": "check a result folder as a stranger would",
    "simulate": "run a result folder on virtual crossbars, with real converters and cells",
    "report": "draw report.html of a result folder",
    "demo": "run the main job on a bundled model and real data",
    "hw": "list, show and check chip descriptions",
    "passes": "list the passes of the pipeline with their options",
    "manifest": "print the manifest's JSON Schema, or a manifest's summary",
    "completion": "print a completion script for bash, zsh or fish",
}

# What a shell reports of programs that SIGPIPE ends.
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name, default those of the process.

    Returns:
        The exit code; every error has been printed, each on one line.

    Raises:
        SystemExit: After `--help` and `--version`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:  # Closed by the caller, as `>&-` does.
        _discard_output()
    if isinstance(sys.stdout, io.TextIOWrapper):  # Names may hold what the terminal's encoding does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _tidy_termination(), telling_stdout():
            code = _run_and_flush(arguments)
    except StdoutError as error:
        _discard_output()
        return _fail(error.lines(), error.exit_code)
    except RaquError as error:
        return _fail([*error.lines(), *_notes(error)], error.exit_code)
    except KeyboardInterrupt as stop:
        print("; ".join(["interrupted; no result was written", *_notes(stop)]), file=sys.stderr)
        return 130
    except _TerminatedError as stop:
        print("; ".join(["terminated; no result was written", *_notes(stop)]), file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. 0 would claim success for a check that failed.
        _discard_output()
        return _BROKEN_PIPE
    except OSError as error:
        # No room for temporary files, and what else the modules could not foresee.
        _discard_output()
        said = f"{error.filename or 'a temporary file'}: {error.strerror or error}"
        return _fail([said], RaquError.exit_code)
    return code


def _notes(error: BaseException) -> list[str]:
    """What is left of a run that ended early."""
    return list(getattr(error, "__notes__", []))


def _fail(lines: Iterable[str], code: int) -> int:
    for line in lines:
        print(f"error: {printable(line)}", file=sys.stderr)
    return code


def _discard_output() -> None:
    """Keep Python from failing again when it flushes stdout at exit."""
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115


class _TerminatedError(BaseException):
    """SIGTERM; like KeyboardInterrupt no Exception, so that nobody takes it for an error of a user's own function."""


@contextmanager
def _tidy_termination() -> Iterator[None]:
    """Let SIGTERM unwind the stack, as Ctrl-C does, so that no half-written folder stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set handlers.
        return

    def stop(*_: object) -> NoReturn:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_and_flush(arguments: list[str]) -> int:
    try:
        code = _run(arguments)
    except SystemExit:  # --help and --version have printed.
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _run(arguments: list[str]) -> int:
    parser = _parser(arguments[0] if arguments else None)
    args = parser.parse_args(arguments)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    try:
        code: int = args.run(args)
    except BrokenPipeError:
        raise
    except (RaquError, OSError):
        if getattr(args, "debug", False):
            # Names in it may ask a terminal for anything.
            for line in traceback.format_exc().splitlines():
                print(printable(line), file=sys.stderr)
        raise
    return code


def full_parser() -> Parser:
    """The parser with the options of all commands; `main` builds only those of the one that is called."""
    return _parser(*_COMMANDS)


def _parser(*chosen: str | None) -> Parser:
    parser = Parser(
        prog="raqu-onnx",
        description="Mixed-precision quantization and mapping of ONNX models for chips made of RRAM crossbars.",
        epilog="`raqu-onnx COMMAND --help` tells more about one command. `raqu-onnx demo` shows it all.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, help_text in _COMMANDS.items():
        if name in chosen:
            importlib.import_module(f"raqu_onnx.cli.{name}").add_parser(commands)
            parser.chosen = commands.choices[name]
        else:
            commands.add_parser(name, help=help_text)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"raqu-onnx {version('raqu-onnx')}")
        parser.exit()
