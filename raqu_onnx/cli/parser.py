"""An argument parser whose errors are one line and name what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn

from raqu_onnx.errors import ConfigError

__all__ = ["Parser"]

_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)$", re.DOTALL)
_UNKNOWN = re.compile(r"unrecognized arguments: (.*)$", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are like all others: one line and exit code 2."""

    #: The parser of the command that was named, whose options an unknown one is compared with.
    chosen: argparse.ArgumentParser | None = None

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print, with the nearest name that exists.

        Raises:
            ConfigError: Always.
        """
        parser: argparse.ArgumentParser = self
        if found := _UNKNOWN.match(message):
            # Whatever a command does not know reaches the parser above it.
            parser = self.chosen or self
            hint = _nearest_option(found[1], parser)
        else:
            hint = _nearest_choice(message)
        raise ConfigError(f"{message}{hint}; see `{parser.prog} --help`")


def _nearest_option(arguments: str, parser: argparse.ArgumentParser) -> str:
    known = [name for action in _deep_actions(parser) for name in action.option_strings]
    for word in arguments.split():
        name = word.partition("=")[0]
        if name.startswith("-"):
            return _did_you_mean(name, [option for option in known if option.startswith("--")])
    return ""


def _deep_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Actions of a parser and of the parsers below it, such as `manifest show`."""
    actions = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in set(action.choices.values()):
                actions += _deep_actions(below)
    return actions


def _nearest_choice(message: str) -> str:
    found = _CHOICE.search(message)
    if found is None:
        return ""
    given = found[1]
    if message.startswith("argument COMMAND") and given.endswith(".onnx"):
        return f", did you mean `raqu-onnx optimize {given}`?"
    return _did_you_mean(given, [choice.strip(" '\"") for choice in found[2].split(",")])


def _did_you_mean(given: str, known: list[str]) -> str:
    near = difflib.get_close_matches(given.lower().replace("_", "-"), known, n=1, cutoff=0.6)
    return f", did you mean {near[0]}?" if near else ""
