"""What `--help` promises of every option: what it does, its default and its unit."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from raqu_onnx.cli import full_parser, main
from raqu_onnx.config import OptimizeConfig

# What an option that takes a number may count or measure.
UNITS = (
    "area", "bits", "bytes", "candidates", "chips", "crossbars", "energy", "kernels", "mean", "nJ", "ns", "parts",
    "pictures", "pixels", "points", "processes", "resolution", "samples", "seconds", "seed", "share",
    "standard deviation", "threads", "times", "uJ", "us", "width", "widths",
)  # fmt: skip


def options(parser: argparse.ArgumentParser, command: str = "") -> Iterator[tuple[str, argparse.Action]]:
    """Every option and argument with the command that it belongs to."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from options(below, f"{command} {name}".strip())
        else:
            yield command, action


ALL = {f"{command} {action.option_strings or action.dest}": action for command, action in options(full_parser())}
VALUED = {name: action for name, action in ALL.items() if action.option_strings and action.nargs != 0}


def words(action: argparse.Action) -> str:
    return action.help or ""


@pytest.mark.parametrize("action", ALL.values(), ids=ALL)
def test_it_says_what_it_does(action: argparse.Action) -> None:
    what = re.sub(r"\(default:.*?\)", "", words(action)).strip()
    assert len(what.split()) >= 2, "one word, or the default alone, says too little"
    assert not what.endswith("."), "a phrase, as those of all others"


@pytest.mark.parametrize("action", VALUED.values(), ids=VALUED)
def test_it_says_its_default(action: argparse.Action) -> None:
    if action.required:
        return
    stated = re.search(r"\(default: ([^()]+)\)", words(action))
    assert stated is not None, words(action)
    if action.default is not None:
        # Of an argument with a default, it is that one.
        assert stated[1] == str(action.default) or float(stated[1]) == action.default


def test_the_defaults_of_optimize_are_those_of_its_settings() -> None:
    """Where a setting has a plain default, help states that one."""
    settings = OptimizeConfig().model_dump(mode="json")
    checked = 0
    for command, action in options(full_parser()):
        value = settings.get(action.dest)
        if command != "optimize" or isinstance(value, bool | list | None | dict):
            continue
        stated = re.search(r"\(default: ([^()]+)\)", words(action))
        assert stated is not None
        assert stated[1] == str(value), action.option_strings
        checked += 1
    assert checked > 10


@pytest.mark.parametrize("action", VALUED.values(), ids=VALUED)
def test_a_number_has_a_unit(action: argparse.Action) -> None:
    numeric = action.type in (int, float) or re.match(r"N\b|SECONDS", str(action.metavar))
    if numeric:
        said = f"{words(action)} {str(action.metavar).lower()}"
        assert any(re.search(rf"\b{unit}\b", said) for unit in UNITS), said


def test_help_and_version_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--help"], "COMMAND"),
        (["--version"], "raqu-onnx "),
        (["optimize", "--help"], "exit codes"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert said in capsys.readouterr().out
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    ["optimize", "inspect", "validate", "simulate", "report", "demo", "hw", "passes", "manifest", "completion"],
)
def test_every_command_has_help_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80


def test_help_starts_without_heavy_imports() -> None:
    code = (
        "import sys\n"
        "from raqu_onnx.cli import main\n"
        "try:\n    main(['optimize', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'scipy', 'skopt', 'rich', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        """Of processors, since others may keep them busy."""
        before = os.times()
        subprocess.run([sys.executable, "-m", "raqu_onnx", "--help"], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(5)) < 0.3
