"""Every command that prints a result prints it as JSON too, with the number of its schema."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raqu_onnx.cli import _COMMANDS

#: What these print is a text or a schema in itself.
TEXTS = {"completion", "manifest schema"}
RESULTS: dict[str, tuple[object, ...]] = {
    "inspect": ("model.onnx", "--hw", "chip.toml"),
    "validate": ("model-raqu",),
    "simulate": ("model-raqu", "--data", "eval.npz"),
    "report": ("model-raqu",),
    "hw list": (),
    "hw show": ("isaac",),
    "hw check": ("chip.toml",),
    "passes": (),
    "manifest show": ("model-raqu",),
}
RUN = ("optimize", "model.onnx", "--hw", "chip.toml", "--weight-bits", "8", "--no-progress", "--format", "json")


def leaves(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield name, parser
    for action in below:
        for key, child in action.choices.items():
            yield from leaves(child, f"{name} {key}")


def commands() -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for name in _COMMANDS:
        parser = argparse.ArgumentParser()
        subparsers = parser.add_subparsers()
        importlib.import_module(f"raqu_onnx.cli.{name}").add_parser(subparsers)
        found.update(leaves(subparsers.choices[name], name))
    return found


def test_every_result_can_be_json() -> None:
    found = commands()
    assert set(found) == {*TEXTS, *RESULTS, "optimize", "demo"}
    for name, parser in found.items():
        formats = next((item.choices for item in parser._actions if "--format" in item.option_strings), None)
        assert (formats is None) if name in TEXTS else formats == ["text", "json"], name


@pytest.mark.usefixtures("workspace")
def test_every_json_has_the_number_of_its_schema(cli: Callable[..., Any]) -> None:
    for command in (
        RUN,
        (*RUN, "--dry-run", "--force"),
        (*RUN, "--show-config"),
        *((*name.split(), *more) for name, more in RESULTS.items()),
    ):
        ran = cli(*command, *(() if "--format" in command else ("--format", "json")))
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["schema_version"] >= 1, command
    assert Path("model-raqu").is_dir()
