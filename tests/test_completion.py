"""Completion scripts, by the shells that read them; one that is not installed is skipped."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raqu_onnx.passes import PASSES

needs = {
    shell: pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")
    for shell in ("bash", "zsh", "fish")
}
SHELLS = [pytest.param(shell, marks=mark) for shell, mark in needs.items()]


@pytest.fixture
def script(tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a shell's script into the current folder, where a model and a folder stand too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").touch()
    (tmp_path / "out").mkdir()

    def write(shell: str) -> Path:
        ran = cli("completion", shell)
        assert ran.code == 0, ran.err
        (tmp_path / f"script.{shell}").write_text(ran.out)
        return tmp_path / f"script.{shell}"

    return write


def ask(shell: str, text: str) -> str:
    return subprocess.run([shutil.which(shell) or shell, "-c", text], check=True, capture_output=True, text=True).stdout


def bash(path: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    before = words[-2]
    call = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_raqu_onnx raqu-onnx '{words[-1]}' '{before}'"
    return set(ask("bash", f"source {path}; {call}; printf '%s\\n' \"${{COMPREPLY[@]}}\"").split())


def fish(path: Path, *words: str) -> set[str]:
    """What fish offers for the last word, without the descriptions."""
    said = ask("fish", f"source {path}; complete -C '{' '.join(words)}'")
    return {line.split("\t")[0] for line in said.splitlines()}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_that_the_shell_can_read(script: Callable[[str], Path], shell: str) -> None:
    subprocess.run([shutil.which(shell) or shell, "-n", str(script(shell))], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("shell", "offered"),
    [pytest.param("bash", bash, marks=needs["bash"]), pytest.param("fish", fish, marks=needs["fish"])],
)
class TestOffers:
    def test_commands(self, script: Callable[[str], Path], shell: str, offered: Callable[..., set[str]]) -> None:
        assert offered(script(shell), "raqu-onnx", "o") == {"optimize"}

    def test_options(self, script: Callable[[str], Path], shell: str, offered: Callable[..., set[str]]) -> None:
        assert "--max-crossbars" in offered(script(shell), "raqu-onnx", "optimize", "--max-c")

    def test_choices(self, script: Callable[[str], Path], shell: str, offered: Callable[..., set[str]]) -> None:
        assert offered(script(shell), "raqu-onnx", "optimize", "--placement", "") == {"fast", "exact"}

    def test_chips(self, script: Callable[[str], Path], shell: str, offered: Callable[..., set[str]]) -> None:
        assert offered(script(shell), "raqu-onnx", "optimize", "--hw", "neur") == {"neurosim", "neurram"}

    def test_passes(self, script: Callable[[str], Path], shell: str, offered: Callable[..., set[str]]) -> None:
        assert offered(script(shell), "raqu-onnx", "optimize", "--skip", "") == set(PASSES)

    def test_models(self, script: Callable[[str], Path], shell: str, offered: Callable[..., set[str]]) -> None:
        assert "net.onnx" in offered(script(shell), "raqu-onnx", "optimize", "n")

    def test_folders(self, script: Callable[[str], Path], shell: str, offered: Callable[..., set[str]]) -> None:
        assert {name.rstrip("/") for name in offered(script(shell), "raqu-onnx", "validate", "o")} == {"out"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_knows_chips_passes_and_options(script: Callable[[str], Path]) -> None:
    text = script("zsh").read_text()
    assert text.startswith("#compdef raqu-onnx\n")
    assert "_raqu_onnx_chips() { compadd forms generic" in text
    assert "--max-crossbars" in text


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_finds_and_loads_it(script: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "functions").mkdir()
    (tmp_path / "functions" / "_raqu-onnx").write_text(script("zsh").read_text())
    found = "fpath=(functions $fpath); autoload -Uz compinit; compinit -u -D; print ${_comps[raqu-onnx]}"
    assert ask("zsh", f"{found}; autoload +X _raqu-onnx && print loaded").split() == ["_raqu-onnx", "loaded"]


def test_another_shell_is_refused(cli: Callable[..., Any]) -> None:
    ran = cli("completion", "csh")
    assert ran.code == 2
    assert "bash" in ran.err
