"""`raqu-onnx completion`: what a shell loads so that it completes our commands, options and files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from raqu_onnx.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    # What shtab calls by shell, and for some shells a name with its definition.
    _Complete = Mapping[str, str | dict[str, str]]

__all__ = ["add_parser"]

_SHELLS = ("bash", "zsh", "fish")
_DESCRIPTION = """\
Print a script that makes a shell complete commands, options, choices, chips,
passes and files:

  raqu-onnx completion bash \\
      > ~/.local/share/bash-completion/completions/raqu-onnx
  raqu-onnx completion zsh > DIR/_raqu-onnx    # DIR is in $fpath
  raqu-onnx completion fish > ~/.config/fish/completions/raqu-onnx.fish
"""
# What is completed where an argument's metavar holds one of these words.
_FILE_WORDS = ("FILE", "DATA", "MODEL")
_FOLDER_WORDS = ("DIR",)
_CHIP_METAVAR = "NAME|FILE"
_PIPELINE_METAVAR = "PASS"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `completion` to the command line."""
    parser = subparsers.add_parser(
        "completion",
        help="print a completion script for bash, zsh or fish",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=_SHELLS, help="the shell that will read the script")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    print(_script(args.shell))
    return 0


def _script(shell: str) -> str:
    """The completion script of the whole command line.

    Raises:
        ConfigError: The package that writes it is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise ConfigError("completion needs the package shtab: pip install shtab") from error
    from raqu_onnx.cli import full_parser
    from raqu_onnx.hardware import builtin_chips
    from raqu_onnx.passes import PASSES

    parser = full_parser()
    for action in _actions(parser):
        complete = _completer(action, shtab.FILE, shtab.DIRECTORY)
        if complete is not None:
            action.complete = complete  # type: ignore[attr-defined]
    functions = (_function(shell, "chips", builtin_chips(), files=True), _function(shell, "passes", list(PASSES)))
    script: str = shtab.complete(parser, shell, preamble="\n".join(functions))
    return script


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for item in action._choices_actions:
                # Descriptions are paragraphs; a shell's list has room for one line.
                action.choices[item.dest].description = item.help
            for below in action.choices.values():
                yield from _actions(below)
        else:
            yield action


def _completer(action: argparse.Action, file: _Complete, folder: _Complete) -> _Complete | None:
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if metavar == _CHIP_METAVAR:
        return _own("chips")
    if metavar == _PIPELINE_METAVAR:
        return _own("passes")
    if any(word in metavar for word in _FOLDER_WORDS):
        return folder
    return file if any(word in metavar for word in _FILE_WORDS) else None


def _own(name: str) -> _Complete:
    """How shtab calls a function of ours, by shell."""
    return {"bash": f"_raqu_onnx_{name}", "zsh": f"_raqu_onnx_{name}", "fish": f"(_raqu_onnx_{name})"}


def _function(shell: str, name: str, words: Sequence[str], *, files: bool = False) -> str:
    """A shell function that offers words, and files besides if asked."""
    write: dict[str, Callable[[str], str]] = {
        "bash": lambda text: (
            f'_raqu_onnx_{name}() {{ compgen -W "{text}" -- "$1"' + ('; _shtab_compgen_files "$1"' * files) + "; }"
        ),
        "zsh": lambda text: f"_raqu_onnx_{name}() {{ compadd {text}" + ("; _files" * files) + "; }",
        "fish": lambda text: (
            f"function _raqu_onnx_{name}; printf '%s\\n' {text}"
            + ("; __fish_complete_path (commandline -ct)" * files)
            + "; end"
        ),
    }
    return write[shell](" ".join(words))
